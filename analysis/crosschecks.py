"""Optuna's importances on the same trials, as a check from outside, each labelled with what it estimates.

They get unit-cube coordinates (Optuna's fANOVA otherwise integrates log-uniform parameters on the raw scale) and the
parameters in sorted order (one of its evaluators mislabels them otherwise).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator

from analysis.load import StudyData
from analysis.results import DUMMY, Analysis
from analysis.selection import unit_table
from ramcore.space import Array

MIN_TRIALS = 8
MOST_TRIALS = 400  # for fANOVA, whose time grows faster than the trials; of more, as many are drawn

ESTIMATES = {
    "ours": "total Sobol index of logit accuracy at the full budget; seed noise taken out",
    "fANOVA, full-budget trials": (
        "first-order share of the variance a random forest fits; stopped trials left out, noise counted; of at most "
        f"{MOST_TRIALS} trials"
    ),
    "fANOVA, last accuracy": (
        "the same on every trial's last accuracy, whatever its epoch: what a plain importance plot shows"
    ),
    "PED-ANOVA, full-budget trials": (
        "share of how unevenly the best tenth of the trials is spread over each range; local to good trials"
    ),
}


def fanova(names: Sequence[str], x: Array, y: Array, seed: int = 0) -> dict[str, float]:
    """Optuna's fANOVA on unit-cube coordinates (N, D) of at most MOST_TRIALS: shares that sum to 1 by name."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(x))[:MOST_TRIALS])
    return _importances(names, x[chosen], y[chosen], FanovaImportanceEvaluator(seed=seed))


def ped_anova(names: Sequence[str], x: Array, y: Array) -> dict[str, float]:
    """Optuna's PED-ANOVA (its default since version 4): shares that sum to 1 by name."""
    return _importances(names, x, y, PedAnovaImportanceEvaluator())


def crosscheck(records: StudyData, analysis: Analysis) -> pd.DataFrame:
    """One row a parameter, one column an estimator; NaN where there are too few trials for it."""
    dimensions = [d for d in analysis.data.dimensions if d.name != DUMMY]
    last = last_accuracy(records.epochs)
    x = unit_table(records, dimensions).reindex(last.index).dropna()
    last = last.loc[x.index]
    full = records.trials.loc[x.index, "state"].eq("complete").to_numpy()
    names, points, values = [d.name for d in dimensions], x.to_numpy(), last.to_numpy()
    ours = {e.name: e.total.mid for e in analysis.ranking.effects if e.name != DUMMY}
    every = fanova(names, points, values) if len(x) >= MIN_TRIALS else {}
    complete, ped = {}, {}
    if full.sum() >= MIN_TRIALS:
        complete, ped = fanova(names, points[full], values[full]), ped_anova(names, points[full], values[full])
    columns = zip(ESTIMATES, (ours, complete, every, ped), strict=True)
    table = pd.DataFrame({label: [column.get(name, np.nan) for name in ours] for label, column in columns})
    table.insert(0, "parameter", list(ours))
    return table


def last_accuracy(epochs: pd.DataFrame) -> pd.Series:
    """Mean accuracy over seeds at each trial's last epoch with a value, by trial."""
    table = epochs.loc[epochs["val_accuracy"].notna()]
    last = table.groupby("trial")["epoch"].transform("max")
    return table.loc[table["epoch"] == last].groupby("trial")["val_accuracy"].mean()


def _importances(
    names: Sequence[str], x: Array, y: Array, evaluator: FanovaImportanceEvaluator | PedAnovaImportanceEvaluator
) -> dict[str, float]:
    ordered = sorted(names)
    distributions: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in ordered}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = optuna.create_study(direction="maximize")
            for point, value in zip(np.clip(x, 0.0, 1.0), y, strict=True):
                params = dict(zip(names, point.tolist(), strict=True))
                study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=float(value)))
            values = optuna.importance.get_param_importances(study, evaluator=evaluator, params=ordered)
        finally:
            optuna.logging.set_verbosity(verbosity)
    return {name: float(values[name]) for name in ordered}
