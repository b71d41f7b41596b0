"""The record of a study whose storage is an object store: worked on in a file of this machine, kept in the store.

SQLite needs a real file, so the driver works on a copy in its cache and writes the whole of it back: before a new
trial is handed out, when one has ended, and once a minute otherwise. A driver machine that is lost for good so costs
at most the epochs of the last minute, which the trials' checkpoints tell again.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import time
from pathlib import Path

from study.checkpoints import Folder, open_folder

NAME = "study.db"
_INTERVAL = 60.0  # seconds between two copies while nothing starts or ends


def is_remote(storage: str) -> bool:
    """Whether a storage is a URI, and not a folder that this machine sees."""
    return "://" in storage


def record_folder(storage: str, study: str) -> Path:
    """Where the driver works on a study's record: in the storage itself, or in this user's cache."""
    if not is_remote(storage):
        return Path(storage).absolute() / study
    import pooch

    name = hashlib.sha256(storage.rstrip("/").encode()).hexdigest()[:16]
    return Path(pooch.os_cache("ram-study")) / "studies" / name / study


def fetch(storage: str, study: str) -> None:
    """Bring the working copy up to the storage, unless it is further. Raises OSError if the storage cannot be
    reached.
    """
    if not is_remote(storage):
        return
    try:
        content = open_folder(storage, study).read(NAME)
    except FileNotFoundError:
        return
    path = record_folder(storage, study) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    fetched = path.with_suffix(".fetched")
    fetched.write_bytes(content)
    if path.exists() and _extent(path) >= _extent(fetched):
        fetched.unlink()
        return
    for leftover in (path.with_name(f"{NAME}-wal"), path.with_name(f"{NAME}-shm")):
        leftover.unlink(missing_ok=True)
    fetched.replace(path)


def _extent(path: Path) -> tuple[int, int, int]:
    """How far a record is: trials, epochs, ended trials."""
    queries = (
        "select count(*) from trials",
        "select count(*) from trial_intermediate_values",
        "select count(*) from trials where state != 'RUNNING'",
    )
    with contextlib.closing(sqlite3.connect(path)) as database:
        try:
            trials, epochs, ended = (int(database.execute(query).fetchone()[0]) for query in queries)
        except sqlite3.DatabaseError:
            return (0, 0, 0)
    return trials, epochs, ended


class Snapshots:
    """Writes a record back to its storage."""

    def __init__(self, path: Path, folder: Folder) -> None:
        self._path = path
        self._folder = folder
        self._last = 0.0

    def push(self, *, now: bool) -> None:
        """Write the record back, at once or if a minute has passed. Raises OSError."""
        if not now and time.monotonic() - self._last < _INTERVAL:
            return
        with (
            contextlib.closing(sqlite3.connect(self._path)) as source,
            contextlib.closing(sqlite3.connect(":memory:")) as copy,
        ):
            source.backup(copy)
            content = copy.serialize()
        self._folder.write(NAME, content)
        self._last = time.monotonic()
