"""Hyperparameter studies: which configurations are trained, where, for how long, and how that is recorded.

This package uses Ray, Optuna and MLflow; `ramcore` uses none of them. `analysis` reads what `study.tracking` wrote.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from study.api import StudyResult as StudyResult
    from study.api import run_study as run_study

_FROM = {"StudyResult": "study.api", "run_study": "study.api"}


def __getattr__(name: str) -> Any:
    """A public name, imported on first use: its module may take seconds, and plain data should not."""
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
