"""A study's folder in an object store, such as s3://bucket/folder. Where files lie in it, `study.storage` says.

boto3 and pyarrow take a while to import, so this module is imported only where a study is in an object store.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import boto3
import pyarrow.fs
from botocore.exceptions import BotoCoreError, ClientError

from ramcore.errors import first_line


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

    def entries(self, folder: str, *, recursive: bool = False) -> list[pyarrow.fs.FileInfo]:
        selector = pyarrow.fs.FileSelector(self._path(folder), allow_not_found=True, recursive=recursive)
        return self._fs.get_file_info(selector)

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

    def files(self, folder: str) -> list[str]:
        return sorted(
            str(PurePosixPath(info.path).relative_to(self._path(folder)))
            for info in self.entries(folder, recursive=True)  # one listing, whatever the number of trials
            if info.is_file
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
