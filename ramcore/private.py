"""Nothing secret is kept or shown: `without_secrets` goes over all that a study records, tracks, exports or says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from typing import TypeVar

HIDDEN = "***"
_ARGUMENTS = "RAM_STUDY_ARGUMENTS"  # environment variable: the real arguments, as JSON

# The user information of a URI, up to the last @: a password may hold one, a slash or a space. Some people leave
# the scheme out or write other slashes.
_USER = re.compile(
    r"(?<=://)(?!/)(?:\S*(?:@|%40)|[^\s/@:]+:[^@\n]*@)|(?<![^\s'\"(,;=/])[^\s'\"(,;=/@:]+(?::(?!//)|%3A)\S*(?:@|%40)",
    re.IGNORECASE,
)
# Parameters of a URI that name a secret; ODBC's holds a whole connection string.
_PARAMETER = re.compile(
    r"([?&;#][\w.-]*(?:pass|pwd|secret|token|key|sig|credential|auth|code|jwt|odbc_connect)[\w.-]*(?:=|%3D))[^&\s'\"]+",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"(PASSWORD|TOKEN|SECRET|SECRET_ACCESS_KEY|ACCOUNT_KEY)$")  # of the environment: holds a secret
_SHORTEST = 8  # characters of a secret in the environment: a shorter one would be found in any text

T = TypeVar("T")


def without_secrets(value: T) -> T:
    """A text, or plain data that holds texts, with `***` for the user, password and other secrets of every URI, and for
    the passwords and tokens of the environment.
    """
    if isinstance(value, str):
        return _hidden(value)  # pyright: ignore[reportReturnType]
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}  # pyright: ignore[reportReturnType]
    if isinstance(value, list | tuple):
        return type(value)(map(without_secrets, value))  # pyright: ignore[reportCallIssue, reportReturnType]
    return value


def _hidden(text: str) -> str:
    for name, secret in os.environ.items():
        if _VARIABLE.search(name) and len(secret.strip()) >= _SHORTEST:
            text = text.replace(secret.strip(), HIDDEN)
    return _PARAMETER.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


def private_arguments() -> list[str]:
    """The arguments of this command; every user of the machine sees them in its process list, but for their secrets.

    If there is a secret, the process replaces itself by one whose command line shows `***` in its place. The real
    arguments go through its environment, which only its own user can read.
    """
    if _ARGUMENTS in os.environ:
        text = os.environ.pop(_ARGUMENTS)
        with contextlib.suppress(ValueError, TypeError):
            return list(map(str, json.loads(text)))
        print(f"error: a command sets {_ARGUMENTS} for itself; got {text!r}: unset it", file=sys.stderr)
        sys.exit(2)
    shown = without_secrets(sys.orig_argv[1:])
    if shown != sys.orig_argv[1:]:
        os.environ[_ARGUMENTS] = json.dumps(sys.argv[1:])
        os.execv(sys.executable, [sys.executable, *shown])
    return sys.argv[1:]
