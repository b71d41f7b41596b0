"""Counts a study's trials, and selects the trials, dimensions and epochs that the surface is fitted to."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.load import StudyData
from analysis.observations import Observations, log_epoch, logit, observe
from analysis.results import DUMMY, MIN_RANKED, MIN_TRIALS, TRAINED, Counts, Data
from analysis.training import Attempts
from ramcore.errors import UserError
from ramcore.space import Array, Dimension, Space
from study.designs import SEARCH_ORIGINS

TAKEN_OVER = "taken over"  # origin of the trials of other studies: none is of this study's own Sobol sequence
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


def unit_table(records: StudyData, dimensions: Sequence[Dimension]) -> pd.DataFrame:
    """Unit-cube coordinates of every trial."""
    trials = records.trials
    return pd.DataFrame({d.name: d.to_unit(list(trials[d.name])) for d in dimensions}, index=trials.index)


def combine(records: StudyData, others: Sequence[StudyData]) -> tuple[StudyData, dict[str, int]]:
    """The search's own trials with those of other studies that answer for its space; also how many each adds.

    A trial counts if its configuration lies in the space and all other fields are the space's. A run that is in two
    studies, of the same configuration and seed, counts once. Trials of other studies get numbers after the search's
    own.
    """
    space = records.space
    assert space is not None
    searched = records.trials.loc[records.trials["origin"].isin(SEARCH_ORIGINS)]
    trials, epochs, added = [searched], [records.epochs.loc[records.epochs["trial"].isin(list(searched.index))]], {}
    known = _runs(space, searched)
    number = max(int(n) for n in records.trials.index) + 1
    for other in others:
        inside = other.trials.loc[[_of_space(space, row) for row in other.trials.to_dict(orient="records")]]
        for old in sorted(inside.index):
            runs = _runs(space, inside.loc[[old]])
            fresh = {seed for _, seed in runs - known}
            known |= runs
            mine = other.epochs.loc[(other.epochs["trial"] == old) & other.epochs["seed"].isin(list(fresh))]
            if mine.empty:
                continue
            trials.append(inside.loc[[old]].assign(origin=TAKEN_OVER).set_axis([number]))
            epochs.append(mine.assign(trial=number))
            added[other.study.name] = added.get(other.study.name, 0) + 1
            number += 1
    return records._replace(trials=pd.concat(trials).sort_index(), epochs=pd.concat(epochs, ignore_index=True)), added


def _runs(space: Space, trials: pd.DataFrame) -> set[tuple[tuple[object, ...], int]]:
    """(values, seed) of every run."""
    names = [name for name in space.names if name in trials]
    rows = trials.to_dict(orient="records")
    return {(tuple(row[name] for name in names), seed) for row in rows for seed in row["seeds"]}


def _of_space(space: Space, row: Mapping[str, object]) -> bool:
    """Whether a trial could be the search's own."""
    fixed = all(row[name] == value for name, value in space.fixed.items() if name in row)
    return fixed and all(name in row for name in space.names) and space.contains({n: row[n] for n in space.names})


class Selection(NamedTuple):
    """The part of a study, and of those beside it, that is analysed."""

    data: Data
    observations: Observations  # of the runs that train, while they do
    complete: NDArray[np.bool_]  # (T,) which trials of the observations are complete
    own: NDArray[np.bool_]  # (T,) which trials of the observations are the study's
    attempts: Attempts  # of all trials
    floor: float  # mean logit of the accuracy of runs that do not train
    tried: Array  # (N, D) unit coordinates of all trials, those without results among them
    failed: NDArray[np.bool_]  # (N,) trials among them that ended by an error or diverged
    final: pd.Series  # by trial: mean logit of its runs at their last epoch, those that do not train counted


def select(records: StudyData, others: Sequence[StudyData] = ()) -> Selection:
    """The trials of the search and of others in its space, the dimensions that vary, the epochs that answers are for.

    The order of trials and of parameters in the records has no effect. Raises UserError if there is too little to fit.
    """
    space, name = records.space, records.study.name
    if space is None:
        raise UserError(f"sensitivity needs the search space; {records.space_problem}")
    counts, origins = count_trials(records.trials), records.trials["origin"].value_counts()
    searched = [n for n, origin in records.trials["origin"].items() if origin in SEARCH_ORIGINS]
    known = set(records.epochs.loc[records.epochs["val_accuracy"].notna(), "trial"]) & set(searched)
    if len(known) < MIN_TRIALS:
        states = ", ".join(f"{count} {state}" for state, count in records.trials["state"].value_counts().items())
        command = records.settings.get("command") or f"python -m study.run --study {name}"
        raise UserError(
            f"a report needs at least {MIN_TRIALS} trials of the search with results; {name} has "
            f"{len(known)} of {len(records.trials)} (state: {states}). Run more: "
            f"{re.sub(r' --trials[ =][0-9]+', '', command)} --trials {max(3 * len(space.dimensions), 2 * MIN_RANKED)}"
        )
    full = records.budget
    records, added = combine(records, others)
    trials, epochs = records.trials, records.epochs
    recorded = [d for d in space.dimensions if d.name in trials]
    x = unit_table(records, recorded).dropna()
    epochs = epochs.loc[epochs["val_accuracy"].notna() & epochs["trial"].isin(list(x.index))]
    seen = x.loc[sorted(set(epochs["trial"]))]
    varied = sorted((d for d in recorded if seen[d.name].nunique() > 1), key=lambda d: d.name)
    if not varied:
        raise UserError(f"a ranking needs a parameter that varies; every trial of {name} has the same configuration")
    budget = min(full, int(epochs["epoch"].to_numpy().max()))
    size = evaluation_size(records.settings)
    chance = 1 / float(trials["num_classes"].to_numpy(dtype=float).max()) if "num_classes" in trials else 0.1
    early = f"No trial has reached the full budget of {full} epochs yet; answers are for epoch {budget}."

    x = x[[d.name for d in varied]].assign(**{DUMMY: [_dummy(int(trial)) for trial in x.index]})
    ended = outcomes(trials)
    diverged = [trial for trial in x.index if ended[trial] == "diverged"]
    attempts, floor, final = _attempts(epochs, records.epochs, x, diverged, budget, size, chance)
    observations = observe(epochs.loc[epochs["val_accuracy"] > trained_above(chance)], x, budget, size)
    used = trials.loc[list(observations.trials)]
    own = used.index.isin(searched)
    data = Data(
        name=name,
        space=space,
        dimensions=(*varied, Dimension(name=DUMMY, type="float")),
        constant=tuple(sorted(set(space.names) - {d.name for d in varied})),
        counts=counts._replace(used=len(attempts.u)),
        origins={str(k): int(v) for k, v in origins.items()},
        others=added,
        untrained=(int(attempts.failed.sum()), int((attempts.failed + attempts.trained).sum())),
        budget=budget,
        evaluation_size=size,
        chance=chance,
        biased=bool((used["origin"] == "sobol").sum() < max(1, 0.25 * own.sum())),
        warnings=(*((early,) if budget < full else ()), *_left_out(records.settings, full, added)),
    )
    return Selection(
        data,
        observations,
        complete=(used["state"] == "complete").to_numpy(),
        own=own,
        attempts=attempts,
        floor=floor,
        tried=x.to_numpy(dtype=float),
        failed=np.array([ended[trial] in ("diverged", "failed") for trial in x.index]),
        final=final,
    )


def _left_out(settings: Mapping[str, Any], budget: int, added: Mapping[str, int]) -> list[str]:
    """Why the trials that --from took over are not in the fit, if they are not."""
    taken = settings.get("taken_over")
    if not taken or taken["study"] in added:
        return []
    epochs = taken.get("epochs", budget)
    why = f"their schedule has {epochs} epochs, not {budget}" if epochs != budget else "their study was not read here"
    count = len(taken["trials"])
    return [f"The {count} trials taken over from {taken['study']} informed TPE and are not in this fit: {why}."]


def trained_above(chance: float) -> float:
    """The accuracy above which a run has trained, where guessing has the accuracy `chance`."""
    return chance + (1 - chance) * TRAINED


def _attempts(
    epochs: pd.DataFrame,
    every: pd.DataFrame,
    x: pd.DataFrame,
    diverged: Sequence[int],
    budget: int,
    size: int,
    chance: float,
) -> tuple[Attempts, float, pd.Series]:
    """How the runs ended, the mean logit of those that do not train, and each trial's mean logit at its end.

    A run trains if its last accuracy is above `trained_above(chance)`. One that diverged does not, and would not
    have by the full budget; the other seeds of its trial were cut short and tell nothing.
    """
    ended = epochs.loc[~epochs["trial"].isin(list(diverged))].sort_values("epoch")
    last = ended.drop_duplicates(["trial", "seed"], keep="last")
    accuracy = last["val_accuracy"].to_numpy(dtype=float)
    last = last.assign(failed=accuracy <= trained_above(chance), y=logit(accuracy, size))
    lost = last.loc[last["failed"], "y"].to_numpy(dtype=float)
    floor = float(lost.mean()) if len(lost) else float(logit(np.array(chance), size))
    columns = {"epoch": ("epoch", "max"), "failed": ("failed", "sum"), "seeds": ("failed", "size"), "y": ("y", "mean")}
    broken = every.loc[every["trial"].isin(list(diverged)) & every["val_accuracy"].isna()].groupby("trial")
    seeds = [max(1, len(set(broken.get_group(trial)["seed"])) if trial in broken.groups else 1) for trial in diverged]
    ends = pd.DataFrame({"epoch": budget, "failed": seeds, "seeds": seeds, "y": floor}, index=list(diverged))
    by_trial = pd.concat([last.groupby("trial").agg(**columns), ends]).sort_index().astype(float)
    failed = by_trial["failed"].to_numpy()
    attempts = Attempts(
        x=x.loc[by_trial.index].to_numpy(dtype=float),
        u=log_epoch(np.minimum(by_trial["epoch"].to_numpy(), budget), budget),
        trained=by_trial["seeds"].to_numpy() - failed,
        failed=failed,
    )
    return attempts, floor, pd.Series(by_trial["y"])


def _dummy(trial: int) -> float:
    """The dummy's coordinate: it looks uniform and depends on the trial's number alone, so it is always the same."""
    return zlib.crc32(f"dummy-{trial}".encode()) / 2**32
