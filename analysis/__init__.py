"""What a study's tracked records say: which hyperparameters matter, by how much, and how sure that is."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.importance import analyse as analyse
    from analysis.load import open_study as open_study

_FROM = {"analyse": "analysis.importance", "open_study": "analysis.load"}


def __getattr__(name: str) -> Any:
    """A public name, imported on first use: its module may take seconds, and plain data should not."""
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
