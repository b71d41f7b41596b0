"""The record of a study whose storage is an object store: worked on in a file of this machine, kept in the store.

SQLite needs a real file, so the driver works on a copy in its cache and writes the whole of it back: before a new
trial is handed out, soon after one has ended, and once a minute otherwise. A driver machine that is lost for good so
costs at most the epochs of the last minute, which the trials' checkpoints tell again.

A lock file is seen by one machine only. In the store the driver keeps `driver.json`, which it renews with every minute;
another machine's driver waits until that stands still, or is refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from study.storage import RECORD, Folder, Storage

LEASE = "driver.json"
_COPY = "copy-id"  # names a working copy
_PUSHED = "in-storage"  # marks a working copy of which the storage has had a state
_INTERVAL = 60.0  # seconds between two copies while nothing starts or ends
_EXPIRES = 180.0  # seconds that a lease stands without being renewed before another driver may take over
_READS = 3  # of a lease that makes no sense, before it counts as none
_PATIENCE = 600.0  # seconds that the store may be out of reach before the study stops

logger = logging.getLogger(__name__)


def is_remote(storage: str) -> bool:
    """For callers that still have the text."""
    return Storage.parse(storage).is_remote


def record_folder(storage: str, study: str) -> Path:
    """For callers that still have the text."""
    return Storage.parse(storage).record_folder(study)


def fetch(storage: Storage | str, study: str) -> None:
    """Bring the working copy up to the storage, unless it is further. Raises OSError if the storage cannot be
    reached.
    """
    storage = Storage.parse(str(storage))
    if not storage.is_remote:
        return
    path = storage.record_folder(study) / RECORD
    try:
        content = storage.folder(study).read(RECORD)
    except FileNotFoundError:
        if (path.parent / _PUSHED).exists():  # it was there once: whoever deleted it meant the whole study
            _set_aside(path)
            (path.parent / _PUSHED).unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fetched = path.with_suffix(".fetched")
    fetched.write_bytes(content)
    mine, theirs = _extent(path), _extent(fetched)
    if mine is not None and theirs is not None and mine[0] == theirs[0] and mine >= theirs:
        fetched.unlink()
        return
    _set_aside(path)
    fetched.replace(path)
    (path.parent / _PUSHED).touch()


def studies(storage: str) -> list[str]:
    """For callers that still have the text."""
    return Storage.parse(storage).studies()


def _set_aside(path: Path) -> None:
    """Make room for another record; nothing computed is deleted."""
    aside = f"{RECORD}.{time.strftime('%Y%m%d-%H%M%S')}"
    for leftover in (path, path.with_name(f"{RECORD}-wal"), path.with_name(f"{RECORD}-shm")):
        if leftover.exists():
            leftover.replace(leftover.with_name(leftover.name.replace(RECORD, aside)))


def _extent(path: Path) -> tuple[str, int, int, int] | None:
    """Which study a record is of and how far it is: uid, trials, epochs, ended trials; None if it is none."""
    queries = (
        "select value_json from study_user_attributes where key = 'uid'",
        "select count(*) from trials",
        "select count(*) from trial_intermediate_values",
        "select count(*) from trials where state != 'RUNNING'",
    )
    if not path.exists():
        return None
    with contextlib.closing(sqlite3.connect(path)) as database:
        try:
            uid, trials, epochs, ended = (database.execute(query).fetchone()[0] for query in queries)
        except (sqlite3.DatabaseError, TypeError):  # TypeError: no uid yet
            return None
    return str(uid), int(trials), int(epochs), int(ended)


class LeaseHeld(ValueError):
    """Another machine's driver is running the study; the message says rule, fact and fix in one line."""


class Lease:
    """The right to drive a study, as a file in its storage."""

    def __init__(self, folder: Folder, study: str, copy: Path) -> None:
        """Of a study.

        Args:
            folder: of the study in its storage.
            study: its name.
            copy: folder of the working copy. Drivers of one copy keep each other out by its lock file, so among them
                a lease that was left behind need not be waited for.
        """
        self._folder = folder
        self._study = study
        self._holder = uuid.uuid4().hex
        place = copy / _COPY
        if not place.exists():
            place.write_text(uuid.uuid4().hex)
        self._copy = place.read_text()

    def take(self, say: Callable[[str], None]) -> None:
        """Take it, waiting while another machine's may still be renewed. Raises LeaseHeld if it is; OSError."""
        first = self._read()
        if first is not None and first.get("copy") != self._copy:
            left = _EXPIRES - max(0.0, time.time() - first["time"])
            if left > 0:
                say(f"{first['host']} was driving {self._study}: waiting up to {left:.0f} s to see whether it still is")
            end = time.monotonic() + left
            while time.monotonic() < end:
                time.sleep(min(5.0, _EXPIRES / 20))
                now = self._read()
                if now is None:
                    break
                if now != first:
                    rule, fix = "a study has one driver at a time", "wait for it or end it"
                    raise LeaseHeld(f"{rule}; {now['host']} is running {self._study}: {fix}")
        self.renew()

    def renew(self) -> None:
        """Say that we are still here. Raises OSError."""
        mine = {"holder": self._holder, "copy": self._copy, "host": socket.gethostname(), "time": time.time()}
        self._folder.write(LEASE, json.dumps(mine).encode())

    def check(self) -> None:
        """Raises LeaseHeld if another driver has taken over; OSError."""
        now = self._read()
        if now is not None and now["holder"] != self._holder:
            raise LeaseHeld(f"the driver on {now['host']} has taken {self._study} over: this one stops")

    def give_back(self) -> None:
        """Let the next driver start at once. Raises OSError."""
        self._folder.delete(LEASE)

    def _read(self) -> dict[str, Any] | None:
        for _ in range(_READS):
            try:
                return json.loads(self._folder.read(LEASE))
            except FileNotFoundError:
                return None
            except ValueError:  # read while it was being written, by a store that is none of the best
                time.sleep(0.2)
        return None


class Snapshots:
    """Writes a record back to its storage, from a thread of its own where nobody has to wait for it."""

    def __init__(self, path: Path, folder: Folder, lease: Lease) -> None:
        self._path = path
        self._folder = folder
        self._lease = lease
        self._lock = threading.Lock()  # of the store: one copy at a time
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._written = time.monotonic()  # when the store was last reached
        self._lost: str | None = None  # why the study has to stop
        self._thread = threading.Thread(target=self._follow, name="snapshots", daemon=True)
        self._thread.start()

    def save(self) -> None:
        """Write the record back now. Raises OSError (the store cannot be reached), LeaseHeld."""
        with self._lock:
            self._lease.check()
            with (
                contextlib.closing(sqlite3.connect(self._path)) as source,
                contextlib.closing(sqlite3.connect(":memory:")) as copy,
            ):
                source.backup(copy)
                content = copy.serialize()
            self._folder.write(RECORD, content)
            (self._path.parent / _PUSHED).touch()
            self._written = time.monotonic()

    def soon(self) -> None:
        """Have it written back without waiting. Raises OSError if that has not worked for long, or must not be."""
        if self._lost is not None:
            raise OSError(self._lost)
        self._wake.set()

    def check(self) -> None:
        """Raises OSError if writing back has not worked for long, or must not be."""
        if self._lost is not None:
            raise OSError(self._lost)

    def close(self) -> None:
        """Write the last state back and let the next driver start. Raises OSError, LeaseHeld."""
        self._closing.set()
        self._wake.set()
        self._thread.join()
        self.save()
        self._lease.give_back()

    def _follow(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(_INTERVAL)
            self._wake.clear()
            if self._closing.is_set():
                return
            try:
                self.save()
                self._lease.renew()
            except LeaseHeld as error:
                self._lost = str(error)
                return
            except (OSError, sqlite3.Error) as error:
                logger.warning("the record could not be written back to its storage: %s", str(error)[:200])
                if time.monotonic() - self._written > _PATIENCE:
                    self._lost = f"the storage was out of reach for {_PATIENCE / 60:.0f} minutes: {str(error)[:200]}"
                self._closing.wait(5.0)
