"""The check that runs on every node of a cluster, as a Ray task, before it may take trials.

The top of this file needs the standard library only: a node may lack everything else, and has to be able to say so.
"""

from __future__ import annotations

import contextlib
import platform
import secrets
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from ramcore.errors import first_line

_COMPARED = ("ray", "torch", "numpy")  # packages whose versions change a trial's results or how Ray carries them


class Answer(NamedTuple):
    """The answer of one node."""

    versions: dict[str, str]
    lacks: str = ""  # the import that failed
    unseen: bool = False  # the node does not see the driver's file in the storage
    unreachable: str = ""  # why the node cannot write to the storage


def probe(place: str, marker: str) -> Answer:
    """Report the node's versions, the packages it lacks, and problems with the storage.

    Args:
        place: of the storage, as in `Storage.parse`.
        marker: name of a file that the driver has put there if the storage is a folder.
    """
    try:  # imported here, because the node may lack what these need
        from study.storage import Storage
        from study.trainable import tune_trial as tune_trial  # all that a trial imports
    except ImportError as error:
        return Answer(versions(), lacks=str(error)[:200])
    storage = Storage.parse(place)
    if not storage.is_remote and not _seen(Path(place) / marker):
        return Answer(versions(), unseen=True)
    try:
        folder = storage.folder(f"{marker}-{secrets.token_hex(4)}")
        folder.write("probe", b"")
        folder.delete("probe")
        folder.delete_folder("")
    except (OSError, ValueError) as error:
        return Answer(versions(), unreachable=first_line(error))
    return Answer(versions())


def _seen(path: Path) -> bool:
    for _ in range(3):  # a network file system may take a moment
        if path.exists():
            return True
        time.sleep(1.0)
    return False


def versions() -> dict[str, str]:
    """Versions of Python and of the compared packages that are installed."""
    found = {"python": platform.python_version()}
    for name in _COMPARED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
