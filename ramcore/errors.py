"""Errors that a user can act on, and what the commands tell while they work."""

from __future__ import annotations

import sys


class UserError(Exception):
    """A request or an input that cannot be used. The message is one line: the rule, the fact and the fix.

    It is no ValueError, because tyro catches those of the dataclasses it makes.
    """


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, at most `limit` characters; its type where it has no text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:limit]


def say(text: str) -> None:
    """Print one message to stderr at once; stdout is for results."""
    print(text, file=sys.stderr, flush=True)
