"""The storage of studies: a folder, or an object store such as s3://bucket/folder.

<storage>/<study>/study.db          the record (study.record)
<storage>/<study>/trials/0007/      the checkpoints of a trial (study.checkpoints)

Beside the record, on the driver's machine: study.commits (study.integrity), backups/ (study.snapshots), driver.lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pooch

from ramcore.errors import UserError, first_line, usable
from study.faults import fault_point

if TYPE_CHECKING:
    from study.object_store import RemoteFolder

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
        if not self.is_remote:
            return LocalFolder(Path(self.place) / study)
        from study.object_store import RemoteFolder  # puts off pyarrow and boto3

        return RemoteFolder(f"{self.place}/{study}")

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
        from study.object_store import RemoteFolder  # puts off pyarrow and boto3

        found = RemoteFolder(self.place).entries("")
        return sorted(i.base_name for i in found if not i.is_file and not i.base_name.startswith("."))

    def check_writable(self) -> None:
        """Raises UserError if nothing can be written here."""
        if self.is_remote:
            try:
                self.probe(".probe")
            except (OSError, ValueError) as error:  # pyarrow's ValueError: no such kind of storage
                raise self.unreachable(error) from error
            return
        path = Path(self.place)
        with usable("--storage"):
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
        fix = "check its name and its credentials" if self.is_remote else "mend it, or pass another --storage"
        return UserError(f"--storage must be within reach; {answer}: {fix}")


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

    def files(self, folder: str) -> list[str]:
        """The names of all files below a folder, relative to it; none if there is no such folder. Raises OSError."""

        def stop(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):  # a folder that a running study deletes meanwhile
                raise error

        top = self.root / folder
        places = os.walk(top, onerror=stop, followlinks=True)
        return sorted(str(Path(place, name).relative_to(top)) for place, _, names in places for name in names)

    def delete(self, name: str) -> None:
        """Delete a file; none there is fine."""
        (self.root / name).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        """Delete an empty folder; none there, or not empty, is fine."""
        with contextlib.suppress(OSError):
            (self.root / folder).rmdir()


Folder: TypeAlias = "LocalFolder | RemoteFolder"
