"""Errors that a user can act on, and what the commands tell while they work."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from ramcore.private import without_secrets

Parsed = TypeVar("Parsed")
_CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"  # also all that begins a new line


class UserError(Exception):
    """A request or an input that cannot be used. The message is one line: the rule, the fact and the fix.

    It is no ValueError, because tyro catches those of the dataclasses it makes.
    """

    def __str__(self) -> str:
        """The message, with the control characters of the values in it escaped."""
        return re.sub(_CONTROL, lambda found: repr(found[0])[1:-1], super().__str__())


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text without secrets, at most `limit` characters; its type where it has no text."""
    text = without_secrets(str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:limit]


def say(text: str) -> None:
    """Print one message, without secrets, to stderr at once; stdout is for results."""
    print(without_secrets(text), file=sys.stderr, flush=True)


def show(text: str, end: str = "\n") -> bool:
    """Print results to stdout; what its encoding lacks is escaped. Returns whether stdout took it.

    If stdout is closed or full, stderr says so once, and nothing else changes: what is done stays done.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except OSError as error:
        _give_up_stdout(error)
        return False
    return True


def _give_up_stdout(error: OSError) -> None:
    # What is left in its buffer, and all that follows, goes nowhere: Python would fail on it again at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    say(f"warning: stdout must take the results; it did not ({error.strerror}): the rest is not printed")


def entry_point(module: str) -> NoReturn:
    """End the process as the `cli` of a module says. A module that is run calls this before its long imports: Ctrl-C
    gives one line and exit code 130 while they last, too.
    """

    def leave(*_: object) -> NoReturn:
        say("stopped")
        os._exit(128 + signal.SIGINT)  # an exception would come up anywhere in an import, and be taken for its failure

    interrupt = signal.getsignal(signal.SIGINT)  # may be ignored, as in a background job
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    cli = importlib.import_module(module).cli
    signal.signal(signal.SIGINT, interrupt)
    try:
        try:
            sys.exit(cli())
        finally:
            show("", end="")  # what was printed otherwise, such as --help
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(128 + signal.SIGINT)


def brief(value: object) -> str:
    """A value as a refusal shows it: a number exactly unless it is huge; text in quotes, cut if it is long."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, int) and abs(value) >= 10**20:  # str() refuses one of more than 4300 digits
        return f"about {'-' if value < 0 else ''}1e{round(math.log10(abs(value)))}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


@contextlib.contextmanager
def usable(flag: str) -> Iterator[None]:
    """Refuse the path of a flag where the system does, as in a folder that this user may not enter, or for too long a
    name: there Path.exists and the like raise, too. Raises UserError.
    """
    try:
        yield
    except OSError as error:
        path, reason = error.filename or "it", error.strerror or first_line(error)
        raise UserError(f"{flag} must be a path that this user can use; {path}: {reason}: pass another") from error


def parsed(parse: Callable[[], Parsed]) -> Parsed:
    """What tyro reads from a command line. What it refuses is said in one line, not in its box, and the process ends
    with its exit code, 2.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return parse()
    except OSError as error:  # of --help
        _give_up_stdout(error)
        sys.exit(2)
    except SystemExit:
        inside = "\n".join(box.getvalue().splitlines()[1:])  # without its title
        if inside := re.sub(r"^\W*[─-]{3,}\W*$", "", re.sub(r"^[│|] | *[│|]$", "", inside, flags=re.M), flags=re.M):
            say(f"error: {_refusal([line.strip() for line in inside.strip().splitlines()])}: see --help")
        raise


def _refusal(lines: list[str]) -> str:
    """The message in tyro's box, with the nearest flag."""
    said = " ".join(lines[: lines.index("")] if "" in lines else lines).removesuffix(".")
    if wrong := re.match(r"Error parsing (\S+): .*?(INT|int|FLOAT|float)\b.*(?:\[|: )'(.*?)'\]?", said):
        flag, kind, got = wrong.groups()
        rule = "a number" if kind.lower() == "float" else "a whole number"
        if len(digits := got.replace(" ", "")) > (most := sys.get_int_max_str_digits()) and digits.isdecimal():
            got, rule = digits, f"{rule} of at most {most} digits"  # the box broke it into lines
        return f"{flag} must be {rule}; got {brief(got)}"
    meant = next((lines[i + 1] for i, line in enumerate(lines) if line.startswith("Perhaps you meant")), "")
    return said + (f"; did you mean {meant.split()[0]}?" if meant else "")
