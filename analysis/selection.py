"""Counts a study's trials, and selects the trials, dimensions and epochs that the surface is fitted to."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.load import StudyData
from analysis.observations import Observations, observe
from analysis.results import DUMMY, MIN_RANKED, MIN_TRIALS, Counts, Data
from ramcore.errors import UserError
from ramcore.space import Array, Dimension
from study.designs import SEARCH_ORIGINS

DEFAULT_EVALUATION_SIZE = 10_000  # images behind an accuracy, if the study does not say


def outcomes(trials: pd.DataFrame) -> dict[int, str]:
    """Each trial's outcome: complete, stopped, diverged, failed or running."""
    names = {"complete": "complete", "pruned": "stopped", "failed": "failed"}
    plain = trials["state"].map(names.get).fillna("running")
    return plain.mask(trials["diverged"].astype(bool), "diverged").to_dict()


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


class Selection(NamedTuple):
    """The part of a study that is analysed."""

    data: Data
    observations: Observations
    complete: NDArray[np.bool_]  # (T,) which trials of the observations are complete
    tried: Array  # (N, D) unit coordinates of all trials of the search, those without results among them
    failed: NDArray[np.bool_]  # (N,) diverged trials among them
    diverged: NDArray[np.bool_]  # (N,)


def select(records: StudyData) -> Selection:
    """The search's trials, the dimensions that vary, and the epochs that answers are for.

    The order of trials and of parameters in the records has no effect. Raises UserError if there is too little to fit.
    """
    space, name = records.space, records.study.name
    if space is None:
        raise UserError(f"sensitivity needs the search space; {records.space_problem}")
    trials, epochs = records.trials.sort_index(), records.epochs
    searched = trials[trials["origin"].isin(SEARCH_ORIGINS)]
    recorded = [d for d in space.dimensions if d.name in trials]
    x = pd.DataFrame({d.name: d.to_unit(list(searched[d.name])) for d in recorded}, index=searched.index).dropna()
    seen = epochs.loc[epochs["val_accuracy"].notna() & epochs["trial"].isin(list(x.index)), "trial"].unique()
    varied = sorted((d for d in recorded if x.loc[seen, d.name].nunique() > 1), key=lambda d: d.name)
    if len(seen) < MIN_TRIALS:
        states = ", ".join(f"{count} {state}" for state, count in trials["state"].value_counts().items())
        command = records.settings.get("command") or f"python -m study.run --study {name}"
        raise UserError(
            f"a report needs at least {MIN_TRIALS} trials of the search with results; {name} has {len(seen)} of "
            f"{len(trials)} (state: {states}). Run more: {re.sub(r' --trials[ =][0-9]+', '', command)} "
            f"--trials {max(3 * len(space.dimensions), 2 * MIN_RANKED)}"
        )
    if not varied:
        raise UserError(f"a ranking needs a parameter that varies; every trial of {name} has the same configuration")
    budget = min(records.budget, int(epochs.loc[epochs["trial"].isin(list(seen)), "epoch"].max()))
    size = evaluation_size(records.settings)
    early = f"No trial has reached the full budget of {records.budget} epochs yet; answers are for epoch {budget}."

    x = x[[d.name for d in varied]].assign(**{DUMMY: [_dummy(int(trial)) for trial in x.index]})
    observations = observe(epochs, x, budget, size)
    used = trials.loc[list(observations.trials)]
    ended = outcomes(trials)
    data = Data(
        name=name,
        space=space,
        dimensions=(*varied, Dimension(name=DUMMY, type="float")),
        constant=tuple(sorted(set(space.names) - {d.name for d in varied})),
        counts=count_trials(trials)._replace(used=len(used)),
        origins={str(k): int(v) for k, v in trials["origin"].value_counts().items()},
        budget=budget,
        evaluation_size=size,
        biased=bool((used["origin"] == "sobol").sum() < max(1, 0.25 * len(used))),
        warnings=(early,) if budget < records.budget else (),
    )
    return Selection(
        data,
        observations,
        complete=(used["state"] == "complete").to_numpy(),
        tried=x.to_numpy(dtype=float),
        failed=np.array([ended[trial] in ("diverged", "failed") for trial in x.index]),
        diverged=np.array([ended[trial] == "diverged" for trial in x.index]),
    )


def _dummy(trial: int) -> float:
    """The dummy's coordinate: it looks uniform and depends on the trial's number alone, so it is always the same."""
    return zlib.crc32(f"dummy-{trial}".encode()) / 2**32
