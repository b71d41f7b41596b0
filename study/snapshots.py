"""Copies the record of a study to and from an object store.

SQLite needs a real file. So the driver works on a copy in its cache, and writes the whole copy back: before it starts a
new trial, soon after a trial has ended, and otherwise once a minute. If the driver's machine is lost for good, at most
the epochs of the last minute are lost, and the trials' checkpoints report these again.

A lock file is seen by one machine only. So the driver also keeps a lease in the store, `driver.json`, and renews it
every minute. Another machine's driver waits until the lease is no longer renewed, and is refused if it is.
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

from ramcore.errors import first_line
from study.storage import RECORD, Folder, Storage

LEASE = "driver.json"
_COPY = "copy-id"  # the file with the name of a working copy
_PUSHED = "in-storage"  # the file that marks a working copy that was written to the storage
_INTERVAL = 60.0  # seconds between two copies while no trial starts or ends
_EXPIRES = 180.0  # seconds after which a lease that is not renewed may be taken over
_READS = 3  # attempts at a lease that cannot be parsed, before it counts as none
_PATIENCE = 600.0  # seconds that the store may be out of reach before the study stops

logger = logging.getLogger(__name__)


def fetch(storage: Storage, study: str) -> None:
    """Replace the working copy by the record in the storage, unless the copy is further. Raises OSError."""
    if not storage.is_remote:
        return
    copy = storage.record_folder(study) / RECORD
    pushed = copy.parent / _PUSHED
    try:
        content = storage.folder(study).read(RECORD)
    except FileNotFoundError:
        if pushed.exists():  # the storage had the record once, so the whole study was deleted there
            _set_aside(copy)
            pushed.unlink()
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    fetched = copy.with_suffix(".fetched")
    fetched.write_bytes(content)
    mine, theirs = _extent(copy), _extent(fetched)
    if mine is not None and theirs is not None and mine[0] == theirs[0] and mine >= theirs:
        fetched.unlink()
        return
    _set_aside(copy)
    fetched.replace(copy)
    pushed.touch()


def _set_aside(path: Path) -> None:
    """Rename a working copy, so that another can take its place. No result is deleted."""
    aside = f"{RECORD}.{time.strftime('%Y%m%d-%H%M%S')}"
    for leftover in (path, path.with_name(f"{RECORD}-wal"), path.with_name(f"{RECORD}-shm")):
        if leftover.exists():
            leftover.replace(leftover.with_name(leftover.name.replace(RECORD, aside)))


def _extent(path: Path) -> tuple[str, int, int, int] | None:
    """Identity and progress of a record: uid, trials, epochs, ended trials. None if the file is no record."""
    query = """
        select value_json, (select count(*) from trials), (select count(*) from trial_intermediate_values),
            (select count(*) from trials where state != 'RUNNING') from study_user_attributes where key = 'uid'
    """
    if not path.exists():
        return None
    with contextlib.closing(sqlite3.connect(path)) as database, contextlib.suppress(sqlite3.DatabaseError):
        return database.execute(query).fetchone()


class LeaseHeld(ValueError):
    """Another machine's driver is running the study. The message is one line."""


class Lease:
    """The right to drive a study, as a file in its storage."""

    def __init__(self, folder: Folder, study: str, copy: Path) -> None:
        """For one study in a folder of its storage, with its working copy in another.

        The lock file of the copy admits one driver at a time, so a lease that an earlier driver of the same copy left
        behind need not be waited for.
        """
        self._folder, self._study = folder, study
        self._holder = uuid.uuid4().hex
        place = copy / _COPY
        if not place.exists():
            place.write_text(uuid.uuid4().hex)
        self._copy = place.read_text()

    def take(self, say: Callable[[str], None]) -> None:
        """Take the lease; wait first if another machine may still renew it. Raises LeaseHeld if it does; OSError."""
        first = self._read()
        if first is not None and first.get("copy") != self._copy:
            left = _EXPIRES - max(0.0, time.time() - first["time"])
            if left > 0:
                say(f"{first['host']} was driving {self._study}: waiting up to {left:.0f} s to see whether it still is")
            end = time.monotonic() + left
            while time.monotonic() < end:
                time.sleep(min(5.0, _EXPIRES / 20))
                if (now := self._read()) is None:
                    break
                if now != first:
                    running = f"{now['host']} is running {self._study}"
                    raise LeaseHeld(f"a study has one driver at a time; {running}: wait for it or end it")
        self.renew()

    def renew(self) -> None:
        """Write the lease with the time of now. Raises OSError."""
        mine = {"holder": self._holder, "copy": self._copy, "host": socket.gethostname(), "time": time.time()}
        self._folder.write(LEASE, json.dumps(mine).encode())

    def check(self) -> None:
        """Raises LeaseHeld if another driver has taken over; OSError."""
        if (now := self._read()) is not None and now["holder"] != self._holder:
            raise LeaseHeld(f"the driver on {now['host']} has taken {self._study} over: this one stops")

    def _read(self) -> dict[str, Any] | None:
        for _ in range(_READS):
            try:
                return json.loads(self._folder.read(LEASE))
            except FileNotFoundError:
                return None
            except ValueError:  # read while it was being written, in a store without atomic writes
                time.sleep(0.2)
        return None


class Snapshots:
    """Writes a record back to its storage: at once, or in a thread of its own."""

    def __init__(self, path: Path, folder: Folder, lease: Lease) -> None:
        self._path, self._folder, self._lease = path, folder, lease
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
        """Write it back soon, without waiting. Raises OSError as `check` does."""
        self.check()
        self._wake.set()

    def check(self) -> None:
        """Raises OSError if the storage was out of reach for too long, or another driver has taken over."""
        if self._lost is not None:
            raise OSError(self._lost)

    def close(self) -> None:
        """Write the last state back, and let the next driver start at once. Raises OSError, LeaseHeld."""
        self._closing.set()
        self._wake.set()
        self._thread.join()
        self.save()
        self._folder.delete(LEASE)

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
                logger.warning("the record could not be written back to its storage: %s", first_line(error))
                if time.monotonic() - self._written > _PATIENCE:
                    self._lost = f"the storage was out of reach for {_PATIENCE / 60:.0f} minutes: {first_line(error)}"
                self._closing.wait(5.0)
