"""Hyperparameter studies: which configurations are trained, where, for how long, and how that is recorded.

This package uses Ray, Optuna and MLflow; `ramcore` uses none of them. `analysis` reads what `study.tracking` wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ramcore import on_first_use

if TYPE_CHECKING:
    from study.api import StudyResult as StudyResult
    from study.api import run_study as run_study

__getattr__ = on_first_use(__name__, {"StudyResult": "study.api", "run_study": "study.api"})
