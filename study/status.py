"""What a command does before its display begins: one line on a terminal, removed at the end; elsewhere nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def console() -> Console:
    """Of stderr: stdout is for results."""
    return Console(stderr=True, highlight=False)


def is_live(console: Console) -> bool:
    """Whether lines can be rewritten there."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Show `text` and the time since then; yields a call that replaces the text."""
    if not is_live(shown := console()):
        yield lambda _: None
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=shown, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda text: progress.update(task, description=text)
