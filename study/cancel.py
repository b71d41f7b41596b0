"""`--cancel N`: one command asks the driver of a running study to end a trial, by a file in the study's folder."""

from __future__ import annotations

import contextlib

from ramcore.errors import UserError
from study.record import StoredStudy, exclusive
from study.storage import Folder, Storage

_FOLDER = "cancel"


def ask(storage: Storage, study: StoredStudy, number: int) -> None:
    """Ask for the end of a trial after its next epoch. Raises UserError if it is not running; OSError."""
    name, trials = study.settings.study, {trial.number: trial for trial in study.trials}
    if number not in trials or trials[number].state != "running":
        running = ", ".join(str(n) for n, trial in trials.items() if trial.state == "running") or "none"
        fact = f"trial {number} has ended ({trials[number].reason})" if number in trials else "it has not begun"
        raise UserError(f"--cancel ends a trial that runs; {fact}: those of {name} that run are {running}")
    if not storage.is_remote and not _has_driver(storage, name):
        raise UserError(f"--cancel asks the study while it runs; {name} does not: continue it, and cancel then")
    storage.folder(name).write(f"{_FOLDER}/{number:04d}", b"")


def is_asked(folder: Folder, number: int) -> bool:
    """Whether a trial is to end."""
    with contextlib.suppress(OSError):  # a storage out of reach: the next epoch asks again
        return f"{number:04d}" in folder.names(_FOLDER)
    return False


def forget(folder: Folder, number: int) -> None:
    """Delete the request of a trial that has ended. Raises OSError."""
    if is_asked(folder, number):
        folder.delete(f"{_FOLDER}/{number:04d}")
        folder.delete_folder(_FOLDER)


def _has_driver(storage: Storage, name: str) -> bool:
    """Whether a process of this machine runs the study. Raises OSError."""
    try:
        with exclusive(storage.record_folder(name)):
            return False
    except UserError:
        return True
