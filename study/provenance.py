"""Where a study's numbers come from: the code, the command, the packages and the devices."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from study.flags import SUBMITTED, Flags, command
from study.probe import versions

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

    def git(*arguments: str) -> str:
        line = ["git", "-C", str(Path(__file__).resolve().parent.parent), *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return WorkingTree(git("rev-parse", "HEAD"), bool(git("status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return WorkingTree("unknown", True)


def of_this_run(flags: Flags, devices: dict[str, float]) -> dict[str, Any]:
    """Everything that is needed to do this run again, as plain data."""
    tree = working_tree()
    return {
        "flags": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(flags).items()},
        "command": command(),
        "commit": tree.commit,
        "commit_dirty": tree.dirty,
        "versions": versions(_PACKAGES) | {"platform": platform.platform()},
        "devices": devices,
    }
