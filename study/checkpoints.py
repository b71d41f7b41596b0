"""Checkpoints of trials, by trial number, in the study's storage: a folder, or s3://bucket/folder.

    <storage>/<study>/trials/0007/epoch_0003.pt    trainer state and all epochs' metrics; the last two are kept
    <storage>/<study>/trials/0007/best.pt          what is left of a complete trial: its best weights

Tune's own checkpoints are not used: Tune knows them by its own trial ids, which a new run of the command does not
have, and its experiment state is written every ten seconds at best. Ours are found by number, by any node, after any
crash.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import pyarrow.fs
import torch

from study.faults import fault_point

logger = logging.getLogger(__name__)

KEPT = 2  # epoch checkpoints of a running trial: the newest, and the one before in case the newest is damaged
_DIGEST_SIZE = 32  # bytes of a SHA-256
_EPOCH_FILE = re.compile(r"epoch_(\d{4,})\.pt")


class Folder(Protocol):
    """Files by relative name. `write` is atomic: a reader sees all of the new content or none of it."""

    def write(self, name: str, content: bytes) -> None: ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def names(self, folder: str) -> list[str]:
        """The files right inside a folder, by base name; none if there is no such folder."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file; none there is fine."""
        ...

    def delete_folder(self, folder: str) -> None:
        """Delete an empty folder; none there, or not empty, is fine."""
        ...


class LocalFolder:
    """A folder of this machine, or one that all nodes mount."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, content: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        fault_point("file.write.before")
        try:
            with temporary.open("wb") as file:
                file.write(content[: len(content) // 2])
                fault_point("file.write.half")
                file.write(content[len(content) // 2 :])
                file.flush()
                os.fsync(file.fileno())
            fault_point("file.rename.before")
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        fault_point("file.rename.after")
        _sync_folder(path.parent)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self.root / folder) if entry.is_file())
        except FileNotFoundError:
            return []

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        with contextlib.suppress(OSError):
            (self.root / folder).rmdir()


class RemoteFolder:
    """A folder in an object store, through pyarrow: an object appears whole or not at all."""

    def __init__(self, uri: str) -> None:
        self._fs, self._root = pyarrow.fs.FileSystem.from_uri(uri)

    def _path(self, name: str) -> str:
        return str(PurePosixPath(self._root) / name)

    def write(self, name: str, content: bytes) -> None:
        try:
            stream = self._fs.open_output_stream(self._path(name))
        except FileNotFoundError:  # not an object store but a file:// URI, whose folders have to be made
            self._fs.create_dir(str(PurePosixPath(self._path(name)).parent), recursive=True)
            stream = self._fs.open_output_stream(self._path(name))
        with stream:
            stream.write(content)

    def read(self, name: str) -> bytes:
        with self._fs.open_input_stream(self._path(name)) as stream:
            return stream.read()

    def names(self, folder: str) -> list[str]:
        selector = pyarrow.fs.FileSelector(self._path(folder), allow_not_found=True)
        return sorted(info.base_name for info in self._fs.get_file_info(selector) if info.is_file)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._path(name))

    def delete_folder(self, folder: str) -> None:
        # An object store has no folders, but pyarrow leaves an empty object in the place of one.
        selector = pyarrow.fs.FileSelector(self._path(folder), allow_not_found=True)
        with contextlib.suppress(OSError):
            if not self._fs.get_file_info(selector):
                self._fs.delete_dir(self._path(folder))


def open_folder(storage: str, study: str) -> Folder:
    """The folder of a study in a storage (a path, or a URI that pyarrow understands)."""
    if "://" in storage:
        return RemoteFolder(f"{storage.rstrip('/')}/{study}")
    return LocalFolder(Path(storage).absolute() / study)


class Checkpoints:
    """The checkpoints of one trial."""

    def __init__(self, folder: Folder, number: int) -> None:
        self.folder = folder
        self.name = f"trials/{number:04d}"

    def save(self, epoch: int, content: dict[str, Any]) -> None:
        """Save the state after an epoch, then drop all but the last two. Raises OSError (full disk, no access)."""
        self.folder.write(f"{self.name}/epoch_{epoch:04d}.pt", _pack(content))
        for old in self._epochs()[:-KEPT]:
            self.folder.delete(f"{self.name}/{old}")

    def load(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The newest checkpoint that is whole and whose "identity" is the one given; None: start from the beginning.

        Args:
            identity: configuration and seeds. A record that lost its last commit to a power cut may give a number to
                another configuration; that one must not continue from here.
        """
        for name in reversed(self._epochs()):
            content = self._read(name)
            if content is None:
                continue
            if content.get("identity") == identity:
                return content
            logger.warning("%s/%s belongs to another configuration and is not used", self.name, name)
        return None

    def save_best(self, content: dict[str, Any]) -> None:
        """Save a complete trial's best weights."""
        self.folder.write(f"{self.name}/best.pt", _pack(content))

    def load_best(self) -> dict[str, Any] | None:
        """A complete trial's best weights; None if they are lost or damaged."""
        return self._read("best.pt")

    def drop_epochs(self, *, keep_best: bool) -> None:
        """Delete what an ended trial no longer needs."""
        for name in self.folder.names(self.name):
            if not (keep_best and name == "best.pt"):
                self.folder.delete(f"{self.name}/{name}")
        self.folder.delete_folder(self.name)

    def _epochs(self) -> list[str]:
        return [name for name in self.folder.names(self.name) if _EPOCH_FILE.fullmatch(name)]

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            raw = self.folder.read(f"{self.name}/{name}")
        except FileNotFoundError:
            return None
        body, digest = raw[:-_DIGEST_SIZE], raw[-_DIGEST_SIZE:]
        if hashlib.sha256(body).digest() != digest:
            logger.warning("%s/%s is damaged (%d bytes, wrong checksum) and is not used", self.name, name, len(raw))
            return None
        # weights_only: a checkpoint is data, and one that carries code is refused.
        return torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")


def _pack(content: dict[str, Any]) -> bytes:
    """A torch file and its SHA-256, because torch does not notice all damage."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
