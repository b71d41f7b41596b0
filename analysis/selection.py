"""Counts a study's trials, and selects the trials, dimensions and epochs that the surface is fitted to."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.load import StudyData
from analysis.results import DUMMY, MIN_RANKED, MIN_TRIALS, Counts, Data
from analysis.surrogate import Observations, observe
from ramcore.errors import UserError
from ramcore.space import Array, Dimension, Space
from study.designs import SEARCH_ORIGINS

DEFAULT_EVALUATION_SIZE = 10_000  # images behind an accuracy, if the study does not say


def outcomes(trials: pd.DataFrame) -> dict[int, str]:
    """Each trial's outcome: complete, stopped, diverged, failed or running."""
    plain = {"complete": "complete", "pruned": "stopped", "failed": "failed"}
    return {
        int(trial): "diverged" if diverged else plain.get(str(state), "running")
        for trial, diverged, state in zip(trials.index, trials["diverged"], trials["state"], strict=True)
    }


def count_trials(trials: pd.DataFrame) -> Counts:
    """Number of trials by outcome; `select` fills in `used`."""
    found = list(outcomes(trials).values())
    names = ("complete", "stopped", "diverged", "failed", "running")
    seeds = max((len(s) for s in trials["seeds"]), default=1) or 1
    return Counts(total=len(trials), **{name: found.count(name) for name in names}, used=0, seeds=seeds)


def evaluation_size(settings: Mapping[str, Any]) -> int:
    """Validation images behind an accuracy, as the study saved it, or MNIST's 10,000."""
    for sizes in (settings.get("sizes"), settings.get("data_sizes"), settings):
        if isinstance(sizes, Mapping) and isinstance(sizes.get("validation"), int | float) and sizes["validation"] > 1:
            return int(sizes["validation"])
    return DEFAULT_EVALUATION_SIZE
