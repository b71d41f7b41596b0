"""The check that runs on every node of a cluster, as a Ray task, before it may take trials.

The top of this file needs the standard library only: a node may lack everything else, and has to be able to say so.
"""

from __future__ import annotations

import contextlib
import platform
import secrets
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ramcore.errors import first_line

COMPARED = ("ray", "torch", "numpy")  # packages whose versions change a trial's results or how Ray carries them
_FIX = "install the project there with constraints.txt, as CLUSTER.md says, or take the node out of the cluster"


def probe(node: str, place: str, marker: str, ours: dict[str, str]) -> str | None:
    """The first problem of the node where this runs, as rule, fact and fix; None if there is none.

    `node` is its name for the message, `place` the storage's, as in `Storage.parse`, `ours` the driver's
    `versions(COMPARED)`. The driver has put a file of the name `marker` into the storage if that is a folder.
    """
    theirs = versions(COMPARED)
    differing = [
        f"{name} {theirs.get(name, 'not installed')}, the driver {version}"
        for name, version in ours.items()
        if theirs.get(name) != version
    ]
    if differing:
        return f"every node must have the driver's versions; {node} has {'; '.join(differing)}: {_FIX}"
    try:  # imported here, because the node may lack what these need
        from study.storage import Storage
        from study.trainable import tune_trial as tune_trial  # all that a trial imports
    except ImportError as error:
        return f"every node must have the project's packages; {node} lacks some ({first_line(error)}): {_FIX}"
    storage = Storage.parse(place)
    if not storage.is_remote and not _seen(Path(place) / marker):
        return (
            f"on several nodes --storage must be the same folder on all of them; {node} does not see {storage}: pass "
            "--storage s3://bucket/folder or a folder that all nodes mount, or set RAM_STORAGE on the nodes"
        )
    try:
        storage.probe(f"{marker}-{secrets.token_hex(4)}")
    except (OSError, ValueError) as error:
        return (
            f"every node must reach --storage; {node} cannot write to {storage} ({first_line(error)}): give that node "
            "access (an instance profile, or AWS_* in its environment)"
        )
    return None


def _seen(path: Path) -> bool:
    for _ in range(3):  # a network file system may take a moment
        if path.exists():
            return True
        time.sleep(1.0)
    return False


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
