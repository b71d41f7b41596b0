"""The storage of studies: a folder, or an object store such as s3://bucket/folder.

<storage>/<study>/study.db          the record (study.record)
<storage>/<study>/trials/0007/      the checkpoints of a trial (study.checkpoints)

Beside the record, on the driver's machine: study.commits (study.integrity), backups/ (study.snapshots), driver.lock.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import boto3
import pooch
import pyarrow.fs
from botocore.exceptions import BotoCoreError, ClientError

from ramcore.errors import UserError, first_line
from study.faults import fault_point

RECORD = "study.db"


@dataclass(frozen=True)
class Storage:
    """Where studies are kept. Made by `Storage.parse`."""

    place: str  # an absolute path, or a URI that pyarrow understands

    @staticmethod
    def parse(text: str) -> Storage:
        """The storage that a user or a job names: a path, or a URI."""
        return Storage(text.rstrip("/") if "://" in text else str(Path(text).absolute()))

    def __str__(self) -> str:
        return self.place

    @property
    def is_remote(self) -> bool:
        """Whether it is a URI, and not a folder that this machine sees."""
        return "://" in self.place

    def folder(self, study: str) -> Folder:
        """The folder of a study. Raises OSError or ValueError for a URI that pyarrow cannot open."""
        return RemoteFolder(f"{self.place}/{study}") if self.is_remote else LocalFolder(Path(self.place) / study)

    def record_folder(self, study: str) -> Path:
        """Where the driver works on a study's record: in the storage itself, or in this user's cache."""
        if not self.is_remote:
            return Path(self.place) / study
        name = hashlib.sha256(self.place.encode()).hexdigest()[:16]
        return Path(pooch.os_cache("ram-study")) / "studies" / name / study

    def studies(self) -> list[str]:
        """The names of the studies. Raises OSError if the storage cannot be reached."""
        if not self.is_remote:
            return sorted(path.parent.name for path in Path(self.place).glob(f"*/{RECORD}"))
        found = RemoteFolder(self.place).entries("")
        folders = (info.base_name for info in found if info.type == pyarrow.fs.FileType.Directory)
        return sorted(name for name in folders if not name.startswith("."))

    def check_writable(self) -> None:
        """Raises UserError if nothing can be written here."""
        if self.is_remote:
            try:
                self.probe(".probe")
            except (OSError, ValueError) as error:  # pyarrow's ValueError: no such kind of storage
                raise self.unreachable(error) from error
            return
        path = Path(self.place)
        while not path.exists():
            path = path.parent
        if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"--storage must be a folder that can be written; {path} cannot: pass another --storage")

    def probe(self, name: str) -> None:
        """Write a file into a folder of this name, and delete both. Raises OSError or ValueError."""
        folder = self.folder(name)
        folder.write("probe", b"")
        folder.delete("probe")
        folder.delete_folder("")

    def unreachable(self, error: Exception) -> UserError:
        """The error to raise when the storage did not answer."""
        answer = f"{self} did not answer ({first_line(error)})"
        return UserError(f"--storage must be within reach; {answer}: check its name and its credentials")


class LocalFolder:
    """Files by relative name in a folder of this machine, or in one that all nodes mount."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, content: bytes) -> None:
        """Write atomically: a reader sees all of the new content or none of it. Raises OSError."""
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
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError."""
        return (self.root / name).read_bytes()

    def names(self, folder: str) -> list[str]:
        """The base names of the files right inside a folder; none if there is no such folder."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(entry.name for entry in os.scandir(self.root / folder) if entry.is_file())
        return []

    def folders(self, folder: str) -> list[str]:
        """The base names of the folders right inside a folder that hold something; none if there is no such folder."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(e.name for e in os.scandir(self.root / folder) if e.is_dir() and os.listdir(e.path))
        return []

    def delete(self, name: str) -> None:
        """Delete a file; none there is fine."""
        (self.root / name).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        """Delete an empty folder; none there, or not empty, is fine."""
        with contextlib.suppress(OSError):
            (self.root / folder).rmdir()


class VersionConflict(OSError):
    """A file in an object store is no longer the version that was to be replaced."""


class RemoteFolder:
    """As `LocalFolder`, in an object store, through pyarrow: an object appears whole or not at all.

    pyarrow cannot replace an object on condition that it is still a known version, so that is boto3's work in S3.
    """

    def __init__(self, uri: str) -> None:
        self._fs, self._root = pyarrow.fs.FileSystem.from_uri(uri)

    @functools.cached_property
    def _s3(self) -> Any:
        """boto3's client; None if the store is not S3."""
        return boto3.client("s3") if self._fs.type_name == "s3" else None

    def _key(self, name: str) -> dict[str, str]:
        bucket, _, key = self._path(name).partition("/")
        return {"Bucket": bucket, "Key": key}

    def read_version(self, name: str) -> tuple[bytes, str]:
        """The content of a file, and which version of it that is. Raises FileNotFoundError, OSError."""
        if self._s3 is None:
            content = self.read(name)
            return content, hashlib.sha256(content).hexdigest()
        with _s3_errors(name):
            found = self._s3.get_object(**self._key(name))
            return found["Body"].read(), found["ETag"]

    def write_version(self, name: str, content: bytes, version: str | None) -> str:
        """Replace a version of a file by another, and return that; `version` is None for a file that does not exist.

        In S3 the store compares the versions itself. Elsewhere the comparison comes just before the writing.
        Raises VersionConflict, OSError.
        """
        if self._s3 is not None:
            condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
            try:
                with _s3_errors(name):
                    return self._s3.put_object(**self._key(name), Body=content, **condition)["ETag"]
            except FileNotFoundError as error:
                raise VersionConflict(f"{name} was deleted by another process") from error
        try:
            there = self.read_version(name)[1]
        except FileNotFoundError:
            there = None
        if there != version:
            raise VersionConflict(f"{name} was changed by another process")
        self.write(name, content)
        return hashlib.sha256(content).hexdigest()

    def _path(self, name: str) -> str:
        return str(PurePosixPath(self._root) / name)

    def entries(self, folder: str) -> list[pyarrow.fs.FileInfo]:
        return self._fs.get_file_info(pyarrow.fs.FileSelector(self._path(folder), allow_not_found=True))

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
        return sorted(info.base_name for info in self.entries(folder) if info.is_file)

    def folders(self, folder: str) -> list[str]:
        return sorted(
            info.base_name
            for info in self.entries(folder)
            if not info.is_file and any(self.entries(f"{folder}/{info.base_name}"))
        )

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._path(name))

    def delete_folder(self, folder: str) -> None:
        # An object store has no folders, but pyarrow leaves an empty object in the place of one.
        with contextlib.suppress(OSError):
            if not self.entries(folder):
                self._fs.delete_dir(self._path(folder))


@contextlib.contextmanager
def _s3_errors(name: str) -> Iterator[None]:
    """Raises OSError for boto3's errors: FileNotFoundError, VersionConflict, or with boto3's own words."""
    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
            raise FileNotFoundError(name) from error
        if status in (409, 412):  # 409: another conditional write was going on
            raise VersionConflict(f"{name} was changed by another process") from error
        raise OSError(first_line(error)) from error
    except BotoCoreError as error:
        raise OSError(first_line(error)) from error


Folder = LocalFolder | RemoteFolder
