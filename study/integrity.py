"""Notices that a record was damaged, cut short, moved or deleted.

SQLite checks its own structure, not the values, and it drops the end of a damaged write-ahead log in silence. So every
row of the record has a checksum in the table `checksums`, which triggers write in the row's own commit, each with the
next serial number. The file `study.commits` beside the record holds the newest serial number, and which file it is of:
a record that ends before it has lost commits; another file is a copy that someone has put there. A record without
checksums is an older one: it gets them when it is next opened for writing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ramcore.errors import UserError, first_line

logger = logging.getLogger(__name__)

COMMITS = "study.commits"
# The tables whose rows count. Optuna's dashboard may write to the others.
_TABLES = (
    "studies", "study_directions", "study_user_attributes", "trials", "trial_user_attributes", "trial_params",
    "trial_values", "trial_intermediate_values",
)  # fmt: skip
_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM}  # fmt: skip


class RecordDamaged(UserError):
    """The record is not as it was written. The message is one line."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(
            f"a record must be as it was written; {path} {problem}: put the file back, or add --repair to the command, "
            "which rebuilds it from its backups, the checkpoints and MLflow"
        )


class RecordGone(OSError):
    """The record was moved, replaced, deleted or damaged while it was open."""


@contextlib.contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a SQLite file that exists; one in WAL mode sees the log beside it. Raises sqlite3.Error."""
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=60, isolation_level=None)
    with contextlib.closing(database), _errors_of_sqlite():
        database.text_factory = _text
        yield database


@contextlib.contextmanager
def _errors_of_sqlite() -> Iterator[None]:
    """Raises sqlite3.DatabaseError where the text of SQLite's own error, with a damaged name in it, is no UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise sqlite3.DatabaseError("database disk image is malformed") from error


def _text(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")  # a flipped byte may leave no UTF-8


# Writing.


def protect(connection: sqlite3.Connection) -> None:
    """Have the checksum of every row that this connection writes stored in the same commit."""
    connection.create_function("ram_checksum", -1, _checksum, deterministic=True)
    for table in _TABLES:
        row = ", ".join(f"new.{name}" for _, name, *_ in connection.execute(f"pragma table_info({table})").fetchall())
        for event in ("insert", "update"):
            connection.execute(
                f"create temp trigger checksum_{table}_{event} after {event} on main.{table} begin "
                f"insert or replace into checksums (entry, checksum) "
                f"values ('{table} ' || new.rowid, ram_checksum('{table}', {row})); end"
            )


def adopt(path: Path) -> None:
    """Give a record of Optuna's tables the checksums of what it holds, in one commit, unless it has them already."""
    with connected(path) as database:
        if _has_checksums(database):
            return
        database.execute("begin immediate")
        database.execute(
            "create table checksums (serial integer primary key autoincrement, entry text unique, checksum text)"
        )
        rows = [
            (f"{table} {rowid}", _checksum(table, *row)) for table in _TABLES for rowid, row in _rows(database, table)
        ]
        database.executemany("insert into checksums (entry, checksum) values (?, ?)", rows)
        database.execute("commit")


def _checksum(*row: Any) -> str:
    return hashlib.sha256(repr(row).encode(errors="surrogateescape")).hexdigest()[:32]


class Commits:
    """Follows the commits of an open record: the newest serial number, and whether the file is still where it was."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, sqlite3.Error."""
        self._path = path
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=60)
        self._serial()  # makes the log
        self._files = {file: _identity(file) for file in (path, path.with_name(f"{path.name}-wal"))}
        self._witness = os.open(path.with_name(COMMITS), os.O_RDWR | os.O_CREAT, 0o644)

    def done(self) -> None:
        """Note a commit. Not flushed: after a power cut the file may lag behind, which is no harm.

        Raises RecordGone, sqlite3.Error.
        """
        self.check()
        os.pwrite(self._witness, _line(self._serial(), self._files[self._path]), 0)

    def check(self) -> None:
        """Raises RecordGone if the record is no longer where it was opened."""
        for file, identity in self._files.items():
            if _identity(file) != identity:
                raise RecordGone(f"{file} was moved, replaced or deleted while the study ran")

    def close(self) -> None:
        self._database.close()
        os.close(self._witness)

    def _serial(self) -> int:
        return self._database.execute("select coalesce(max(serial), 0) from checksums").fetchall()[0][0]


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def _line(serial: int, file: tuple[int, int] | None) -> bytes:
    text = b"%012d of file %d %d" % (serial, *(file or (0, 0)))
    return b"%s %08x\n" % (text.ljust(64), zlib.crc32(text))


class _Witness(NamedTuple):
    """What the file beside a record says."""

    serial: int
    same_file: bool  # whether it speaks of the record that is there now


def _witness(path: Path) -> _Witness | None:
    """None if there is none, or it is damaged itself."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        content = path.with_name(COMMITS).read_bytes()
        serial, device, inode = (int(content.split()[n]) for n in (0, 3, 4))
        if content == _line(serial, (device, inode)):
            return _Witness(serial, _identity(path) == (device, inode))
    return None


# Checking.


def check(path: Path, trials: Sequence[int] = ()) -> None:
    """Check a record before it is used.

    Args:
        path: of the SQLite file.
        trials: numbers of the trials whose checkpoints are in the storage.

    Raises:
        RecordDamaged: an entry is not as it was written, commits are missing, or the whole record is.
        sqlite3.OperationalError: it cannot be read now (locked, no access, a failing disk).
    """
    witness = _witness(path)  # first: a driver that is running commits before it notes so
    is_there = path.exists()
    if not is_there or path.stat().st_size == 0:
        if trials:
            raise RecordDamaged(path, f"is missing or empty, and the checkpoints of {_named(trials)} are there")
        if is_there and witness is not None:
            raise RecordDamaged(path, f"is empty, and had {witness.serial} entries")
        return
    try:
        with connected(path) as database:
            problem = _problem(database, witness, trials)
    except sqlite3.DatabaseError as error:
        if _passing(error):
            raise
        if _code(error) == sqlite3.SQLITE_NOTADB and witness is None and not trials:
            return  # never was a record: opening it says so
        problem = f"cannot be read ({first_line(error)})"
    if problem:
        raise RecordDamaged(path, problem)


def problem_of(database: sqlite3.Connection) -> str | None:
    """What is wrong with an open copy of a record, as a phrase; None if it is as it was written."""
    database.text_factory = _text
    try:
        with _errors_of_sqlite():
            return _problem(database, None, ())
    except sqlite3.DatabaseError as error:
        return f"cannot be read ({first_line(error)})"


def _problem(database: sqlite3.Connection, witness: _Witness | None, trials: Sequence[int]) -> str | None:
    database.execute("begin")  # one state, even while a driver writes
    if (answer := database.execute("pragma integrity_check(1)").fetchall()[0][0]) != "ok":
        return f"is damaged ({' '.join(str(answer).split())[:150]})"
    if not _has_checksums(database):
        if witness is not None and witness.same_file:
            return "has lost its checksums"
    else:
        stored = dict(database.execute("select entry, checksum from checksums").fetchall())
        wrong = [
            f"{table} {rowid}"
            for table in _TABLES
            for rowid, row in _rows(database, table)
            if stored.pop(f"{table} {rowid}", None) != _checksum(table, *row)
        ]
        if wrong := [*wrong, *stored]:
            return f"is damaged ({len(wrong)} entries differ from their checksums or are gone, first {wrong[0]!r})"
        newest = database.execute("select coalesce(max(serial), 0) from checksums").fetchall()[0][0]
        if witness is not None and newest < witness.serial:
            lacks = f"lacks the last {witness.serial - newest} entries"
            if witness.same_file:
                return f"{lacks} that were written (its write-ahead log was damaged or deleted)"
            logger.warning("the record is an older copy that was put there: it %s", lacks)
    if trials:
        held = database.execute("select count(*) from trials").fetchall()[0][0] if _has(database, "trials") else 0
        if lost := [number for number in trials if number >= held]:
            return f"holds {held} trials, and the checkpoints of {_named(lost)} are there"
    return None


def _named(trials: Sequence[int]) -> str:
    return f"{len(trials)} trials" if len(trials) > 3 else f"trial {', '.join(f'{n:04d}' for n in trials)}"


def _rows(database: sqlite3.Connection, table: str) -> list[tuple[int, tuple[Any, ...]]]:
    """(rowid, row) of a table."""
    if not _has(database, table):
        return []
    return [(rowid, tuple(row)) for rowid, *row in database.execute(f"select rowid, * from {table}").fetchall()]


def _has(database: sqlite3.Connection, table: str) -> bool:
    found = database.execute("select 1 from sqlite_master where type = 'table' and name = ?", [table])
    return bool(found.fetchall())


def _has_checksums(database: sqlite3.Connection) -> bool:
    return _has(database, "checksums")


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; -1 for an error of Python's module itself."""
    return getattr(error, "sqlite_errorcode", -1) & 0xFF


def _passing(error: sqlite3.Error) -> bool:
    """Whether an error is of the disk, the rights or another process, and not of the content."""
    return _code(error) in _PASSING


# What a damaged record still holds.


@dataclass(kw_only=True)
class Salvaged:
    """The user attributes of a record's study and trials that are as they were written."""

    serial: int = 0  # of the newest of them
    study: dict[str, str] = field(default_factory=dict)  # JSON by key
    trials: dict[int, dict[str, str]] = field(default_factory=dict)  # the same, by trial number


def salvage(path: Path) -> Salvaged:
    """Read what can be read of a damaged record, without changing it."""
    found = Salvaged()
    with tempfile.TemporaryDirectory(prefix="ram-study-") as scratch:
        copy = Path(scratch) / path.name
        for name in (path.name, f"{path.name}-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(path.with_name(name), copy.with_name(name))
        with contextlib.suppress(sqlite3.DatabaseError), connected(copy) as database:
            stored = {entry: (checksum, serial) for serial, entry, checksum in _readable(database, "checksums")}
            # An older record has no checksums: it counts if SQLite finds nothing wrong.
            whole = not stored and database.execute("pragma integrity_check(1)").fetchall()[0][0] == "ok"

            def good(table: str) -> Iterator[tuple[Any, ...]]:
                for row in _readable(database, table):
                    checksum, serial = stored.get(f"{table} {row[0]}", ("", 0))
                    if whole or checksum == _checksum(table, *row):
                        found.serial = max(found.serial, serial)
                        yield row

            numbers = {row[0]: row[1] for row in good("trials")}
            found.study = {key: value for _, _, key, value in good("study_user_attributes")}
            for _, trial, key, value in good("trial_user_attributes"):
                # Ids count from 1 in a file of one study.
                found.trials.setdefault(numbers.get(trial, trial - 1), {})[key] = value
    return found


def _readable(database: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a table before its first damaged page, and those after its last one. The first column is the id."""
    seen: set[int] = set()
    for order in ("asc", "desc"):
        with contextlib.suppress(sqlite3.DatabaseError):
            for rowid, *row in database.execute(f"select rowid, * from {table} order by rowid {order}"):
                if rowid not in seen:
                    seen.add(rowid)
                    yield tuple(row)
