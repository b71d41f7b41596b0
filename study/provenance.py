"""Where a study's numbers come from: the code, the command, the packages and the devices."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from study.flags import SUBMITTED, Flags, command

_PACKAGES = ("torch", "ray", "optuna", "mlflow", "numpy", "scipy", "ram-study")


class WorkingTree(NamedTuple):
    """The code's commit, and whether the code was changed since."""

    commit: str
    dirty: bool


def working_tree() -> WorkingTree:
    """The working tree of this code, or of the code that was submitted; "unknown" and changed outside a repository."""
    if SUBMITTED in os.environ:
        submitted = json.loads(os.environ[SUBMITTED])
        return WorkingTree(submitted["commit"], submitted["dirty"])
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return WorkingTree("unknown", True)
    return WorkingTree(commit.strip(), bool(status.strip()))


def of_this_run(flags: Flags, devices: dict[str, float]) -> dict[str, Any]:
    """Everything that is needed to do this run again, as plain data."""
    tree = working_tree()
    return {
        "flags": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(flags).items()},
        "command": command(),
        "commit": tree.commit,
        "commit_dirty": tree.dirty,
        "versions": _versions(),
        "devices": devices,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
