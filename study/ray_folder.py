"""The private folder of a Ray on this machine: its sockets, its logs, and the code that its workers load.

Ray's own choice, /tmp/ray, is open to all users of the machine, who could replace that code. This folder is the user's
alone (mode 0700), is made in the temporary folder for one run, and is removed with it. A run that was killed leaves its
folder to the next run. CUDA's MPS has such a folder, too; the next run also ends an MPS that was left.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ramcore.errors import UserError
from study import mps

_LONGEST = 107 if sys.platform.startswith("linux") else 103  # bytes: the longest path of a socket
_NAME = "ram-{}"  # with six hexadecimal digits
_SOCKET = "session_2026-01-31_00-00-00_000000_4194304/sockets/plasma_store"  # Ray's longest, in its folder
_ROOM = 100 * 2**20  # bytes: of Ray's logs, and more than it writes in a day
_LOCK = "driver.lock"
_RAYS = "r"  # the folder inside that Ray gets, because Ray opens it to everybody
MPS = "m"  # the folder inside that MPS gets
_FIX = "set RAY_TMPDIR to a folder of your own with a short name"


def check() -> None:
    """Raises UserError if Ray could not run in the temporary folder, or not safely."""
    parent = _parent()
    rule = "the temporary folder must"
    try:
        with _made(parent):
            pass
    except OSError as error:
        raise UserError(f"{rule} be one that can be written; {parent}: {error.strerror}: {_FIX}") from error
    if (free := shutil.disk_usage(parent).free) < _ROOM:
        fact = f"{parent} has {free / 2**20:.0f}"
        raise UserError(f"{rule} have {_ROOM / 2**20:.0f} MB free for Ray; {fact}: free some, or {_FIX}")
    longest = _LONGEST - len(f"/{_NAME.format('000000')}/{_RAYS}/{_SOCKET}")
    if len(os.fsencode(parent)) > longest:
        raise UserError(f"{rule} have a path of at most {longest} bytes for Ray's sockets; got {parent}: {_FIX}")
    for folder in (parent, *parent.parents):
        about = folder.stat()
        sticky = about.st_mode & stat.S_ISVTX  # there, others cannot replace what is ours
        if not sticky and (about.st_mode & 0o022 or about.st_uid not in (0, os.geteuid())):
            fact = f"in {folder} other users can replace it ({stat.filemode(about.st_mode)}, user {about.st_uid})"
            raise UserError(f"{rule} be safe from other users, since Ray keeps code there; {fact}: {_FIX}")


@contextmanager
def private_folder(name: str = _RAYS) -> Iterator[Path]:
    """The path of a folder for one run of Ray, or of MPS, inside of one that others cannot enter. Raises OSError."""
    parent = _parent()
    _remove_left(parent)
    with _made(parent) as folder, FileLock(folder / _LOCK):
        yield folder / name


def _parent() -> Path:
    """The temporary folder, as Ray chooses it."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform.startswith("linux") else ("RAY_TMPDIR",)  # macOS' is too long
    return Path(next(filter(None, map(os.environ.get, names)), "/tmp")).absolute()


@contextmanager
def _made(parent: Path) -> Iterator[Path]:
    folder = parent / _NAME.format(secrets.token_hex(3))
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        for _ in range(5):  # a process of Ray's that is just ending may still write
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.2)


def _remove_left(parent: Path) -> None:
    """Remove this user's folders of runs that are no more."""
    for folder in parent.glob(_NAME.format("*")):
        with suppress(OSError, Timeout):
            about = folder.lstat()
            is_ours = re.fullmatch(_NAME.format("[0-9a-f]{6}"), folder.name) and about.st_uid == os.geteuid()
            is_new = time.time() - about.st_mtime < 60 and not (folder / MPS).exists()  # perhaps not locked yet
            if is_ours and not is_new and stat.S_ISDIR(about.st_mode) and (folder / _LOCK).is_file():
                with FileLock(folder / _LOCK, blocking=False):
                    mps.end(folder / MPS)
                    shutil.rmtree(folder, ignore_errors=True)
