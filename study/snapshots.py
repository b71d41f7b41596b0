"""Copies the record of a study: to backups beside it, and to and from an object store.

Every minute, and soon after a trial has ended, a copy made by SQLite's own backup is checked and replaces the older of
two files in `backups/`. `study.repair` rebuilds a damaged record from them.

SQLite needs a real file. So the driver of a study in an object store works on a copy in its cache, and writes the whole
copy back: before it starts a new trial, and whenever a backup is made. If the driver's machine is lost for good, at
most the epochs of the last minute are lost, and the trials' checkpoints report these again.

A lock file is seen by one machine only. So two things keep a second driver out of a study in an object store:

- The record is replaced only if it still is the version that this driver read or wrote (S3's If-Match). A new driver
  first enters the next driver epoch in the record and replaces it. From then on the driver before it, if it was only
  suspended, can write no more, whatever any clock says.
- A lease, `driver.json`, that the driver renews every minute. Another machine's driver watches the lease for three
  minutes by its own clock, and is refused if it is renewed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import logging
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramcore.errors import first_line
from study import integrity
from study.storage import RECORD, LocalFolder, Storage

if TYPE_CHECKING:
    from study.object_store import RemoteFolder

LEASE = "driver.json"
BACKUPS = ("backups/study.0.db", "backups/study.1.db")  # beside the record, written in turn
_COPY = "copy-id"  # the file with the name of a working copy
_PUSHED = "in-storage"  # the file that marks a working copy that was written to the storage
_INTERVAL = 60.0  # seconds between two copies while no trial starts or ends
_EXPIRES = 180.0  # seconds after which a lease that is not renewed may be taken over
_READS = 3  # attempts at a lease that cannot be parsed, before it counts as none
_PATIENCE = 600.0  # seconds that the store may be out of reach before the study stops
_REST = 10.0  # times as long as a copy took, before the next one: the thread is no burden for the driver

logger = logging.getLogger(__name__)


def fetch(storage: Storage, study: str) -> str | None:
    """Replace the working copy by the record in the storage, unless the copy is further.

    Returns which version the storage's record is; None if it has none, or is a folder. Raises OSError, RecordDamaged.
    """
    folder = storage.folder(study)
    if isinstance(folder, LocalFolder):
        return None
    copy = storage.record_folder(study) / RECORD
    pushed = copy.parent / _PUSHED
    try:
        content, version = folder.read_version(RECORD)
    except FileNotFoundError:
        if pushed.exists() and not folder.files("trials"):  # the whole study was deleted in the storage
            set_aside(copy)
            pushed.unlink()
        return None
    copy.parent.mkdir(parents=True, exist_ok=True)
    fetched = copy.with_suffix(".fetched")
    fetched.write_bytes(content)
    with integrity.connected(fetched) as database:
        problem = integrity.problem_of(database)
    if problem:
        raise integrity.RecordDamaged(f"{storage}/{study}/{RECORD}", problem)
    mine, theirs = _extent(copy), _extent(fetched)
    if mine is not None and theirs is not None and mine[0] == theirs[0] and mine >= theirs:
        fetched.unlink()
        return version
    set_aside(copy)
    fetched.replace(copy)
    pushed.touch()
    return version


def set_aside(path: Path) -> str:
    """Rename a record and its backups, so that another can take its place; returns the new name. Nothing is deleted."""
    made = f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    names = (made if n == 0 else f"{made}-{n}" for n in itertools.count())
    aside = next(name for name in names if not any(path.parent.glob(f"{glob.escape(name)}*")))
    path.with_name(integrity.COMMITS).unlink(missing_ok=True)  # it speaks of this one
    for suffix in ("", "-wal", "-shm"):
        if (leftover := path.with_name(path.name + suffix)).exists():
            leftover.replace(path.with_name(aside + suffix))
    if (backups := path.parent / BACKUPS[0]).parent.exists():
        backups.parent.replace(path.with_name(f"{aside}-backups"))
    return aside


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
    """Shows other machines that this driver is alive, by a file in the study's storage."""

    def __init__(self, folder: RemoteFolder, study: str, copy: Path) -> None:
        """For one study in a folder of its storage, with its working copy in another.

        The lock file of the copy admits one driver at a time, so a lease that an earlier driver of the same copy left
        behind need not be waited for.
        """
        self._folder, self._study = folder, study
        self._holder = uuid.uuid4().hex
        self._renewals = 0
        place = copy / _COPY
        if not place.exists():
            place.write_text(uuid.uuid4().hex)
        self._copy = place.read_text()

    def take(self, say: Callable[[str], None]) -> None:
        """Wait if another machine may still renew the lease. Raises LeaseHeld if it does; OSError."""
        first = self._read()
        if first is None or (held := _parsed(first)).get("copy") == self._copy:
            return
        host = held.get("host", f"a driver whose lease cannot be read ({LEASE} is damaged)")
        say(f"{host} was driving {self._study}: waiting up to {_EXPIRES:.0f} s to see whether it still is")
        end = time.monotonic() + _EXPIRES
        while time.monotonic() < end:
            time.sleep(min(5.0, _EXPIRES / 20))
            if (now := self._read()) is None:
                break
            if now != first:
                running = f"{_parsed(now).get('host', 'another machine')} is running {self._study}"
                raise LeaseHeld(f"a study has one driver at a time; {running}: wait for it or end it")

    def renew(self) -> None:
        """Write the lease anew: it differs each time, whatever the clock says. Raises OSError."""
        self._renewals += 1
        mine = {"holder": self._holder, "copy": self._copy, "host": socket.gethostname(), "time": time.time()}
        self._folder.write(LEASE, json.dumps({**mine, "renewals": self._renewals}).encode())

    def release(self) -> None:
        """Let the next driver start at once. Raises OSError."""
        self._folder.delete(LEASE)

    def check(self) -> None:
        """Raises LeaseHeld if another driver has taken over; OSError. A damaged lease says nothing, and is renewed."""
        if (now := self._read()) is not None and _parsed(now).get("holder", self._holder) != self._holder:
            raise LeaseHeld(f"the driver on {_parsed(now).get('host')} has taken {self._study} over: this one stops")

    def is_mine(self) -> bool:
        """Whether it is there, whole, and this driver's. Raises OSError."""
        return _parsed(self._read() or b"").get("holder") == self._holder

    def _read(self) -> bytes | None:
        """The lease as it is; None if there is none."""
        content = b""
        for _ in range(_READS):
            try:
                content = self._folder.read(LEASE)
            except FileNotFoundError:
                return None
            if _parsed(content):
                break
            time.sleep(0.2)  # it may have been read while it was being written, in a store without atomic writes
        return content


def _parsed(content: bytes) -> dict[str, Any]:
    """A lease; empty if it is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(content)
        if isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("holder", "host")):
            return found
    return {}


class Snapshots:
    """Copies an open record to its backups, and to its storage if that is an object store: at once, or in a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder: RemoteFolder | None = None  # of the study in an object store, with its lease; see `take_over`
        self._lease: Lease | None = None
        self._version: str | None = None  # of the record in that store
        self._sent: set[str] = set()  # checksums of what was sent there; an answer may have been lost
        self._lock = threading.Lock()  # one copy at a time
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._written = time.monotonic()  # when the store was last reached
        self._lost: OSError | None = None  # why the study has to stop
        self._turn = _older_backup(path.parent)
        self._thread = threading.Thread(target=self._follow, name="snapshots", daemon=True)
        self._thread.start()

    @property
    def is_remote(self) -> bool:
        """Whether the record is also written to an object store."""
        return self._folder is not None

    def take_over(self, folder: RemoteFolder, lease: Lease, version: str | None) -> None:
        """Become the one driver that can write the record to its object store.

        `version` is the one that the working copy was made from, None if there was none; the copy differs from it by
        the driver's epoch at least. Raises LeaseHeld if another driver was quicker; OSError.
        """
        with self._lock:
            self._version = version
            self._replace(folder, self._copied())
            lease.renew()
            self._folder, self._lease = folder, lease

    def check_alone(self) -> None:
        """Raises LeaseHeld if another driver may have taken over, and perhaps ended, while this one was suspended."""
        if self._lease is not None and time.monotonic() - self._written > _EXPIRES / 2:
            with contextlib.suppress(OSError):  # an outage is no other driver
                if not self._lease.is_mine():
                    raise LeaseHeld("another driver may have taken the study over")

    def save(self) -> None:
        """Copy the record now. Raises OSError (it is gone or damaged, or the store cannot be reached), LeaseHeld."""
        with self._lock:
            content = self._copied()
            try:
                LocalFolder(self._path.parent).write(BACKUPS[self._turn], content)
                self._turn = 1 - self._turn
            except OSError as error:
                logger.warning("no backup of the record could be written: %s", first_line(error))
            if self._folder is not None and self._lease is not None:
                self._lease.check()
                self._replace(self._folder, content)
            self._written = time.monotonic()

    def _replace(self, folder: RemoteFolder, content: bytes) -> None:
        """Replace the record in the store. Raises LeaseHeld if another driver has done so before; OSError."""
        from study.object_store import VersionConflict  # puts off pyarrow and boto3

        self._sent.add(hashlib.sha256(content).hexdigest())
        try:
            self._version = folder.write_version(RECORD, content, self._version)
        except VersionConflict:
            try:
                there, version = folder.read_version(RECORD)
            except FileNotFoundError:
                raise LeaseHeld("the record was deleted in its storage: this driver stops") from None
            if hashlib.sha256(there).hexdigest() not in self._sent:
                raise LeaseHeld("another driver has taken the study over: this one stops") from None
            self._version = folder.write_version(RECORD, content, version)
        (self._path.parent / _PUSHED).touch()

    def _copied(self) -> bytes:
        try:
            with (
                integrity.connected(self._path) as source,
                contextlib.closing(sqlite3.connect(":memory:")) as copy,
            ):
                source.backup(copy)
                if problem := integrity.problem_of(copy):
                    self._lost = integrity.RecordGone(f"{self._path} {problem}")
                    raise self._lost
                return copy.serialize()
        except sqlite3.Error as error:
            raise OSError(f"{self._path} cannot be copied: {first_line(error)}") from error

    def is_taken(self) -> bool:
        """Whether another driver is known to have the study."""
        try:
            if self._lease is not None:
                self._lease.check()
        except LeaseHeld:
            return True
        except OSError:
            pass  # the store is out of reach: nothing is known
        return False

    def soon(self) -> None:
        """Copy the record soon, without waiting. Raises OSError as `check` does, LeaseHeld."""
        self.check()
        if self.is_taken():  # a driver that was suspended must not delete what its successor needs
            raise LeaseHeld("another driver has taken the study over: this one stops")
        self._wake.set()

    def check(self) -> None:
        """Raises OSError if the record is damaged or another's, or its store was out of reach for too long."""
        if self._lost is not None:
            raise self._lost

    def close(self) -> None:
        """Copy the last state, and let the next driver start at once. Raises OSError, LeaseHeld."""
        self._closing.set()
        self._wake.set()
        self._thread.join()
        self.save()
        if self._lease is not None:
            self._lease.release()

    def _follow(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(_INTERVAL)
            self._wake.clear()
            if self._closing.is_set():
                return
            began = time.monotonic()
            try:
                self.save()
                if self._lease is not None:
                    self._lease.renew()
            except LeaseHeld as error:
                self._lost = OSError(str(error))
            except OSError as error:
                logger.warning("the record could not be copied: %s", first_line(error))
                if self.is_remote and time.monotonic() - self._written > _PATIENCE:
                    minutes = f"{_PATIENCE / 60:.0f} minutes"
                    self._lost = OSError(f"the storage was out of reach for {minutes}: {first_line(error)}")
                self._closing.wait(5.0)
            if self._lost is not None:
                return
            self._closing.wait(_REST * (time.monotonic() - began))


def _older_backup(folder: Path) -> int:
    """Which backup to replace next."""
    ages = [path.stat().st_mtime if (path := folder / name).exists() else 0.0 for name in BACKUPS]
    return ages.index(min(ages))
