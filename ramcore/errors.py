"""Errors that a user can act on, and what the commands tell while they work."""

from __future__ import annotations

import sys

from ramcore.private import without_secrets


class UserError(Exception):
    """A request or an input that cannot be used. The message is one line: the rule, the fact and the fix.

    It is no ValueError, because tyro catches those of the dataclasses it makes.
    """


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text without secrets, at most `limit` characters; its type where it has no text."""
    text = without_secrets(str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:limit]


def say(text: str) -> None:
    """Print one message, without secrets, to stderr at once; stdout is for results."""
    print(without_secrets(text), file=sys.stderr, flush=True)
