"""One-factor-at-a-time and replicate designs, summarised to stand beside the global indices.

They answer narrower questions than a search: how one parameter acts around one baseline, and how good a configuration
is on fresh seeds that no choice was made by.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import studentized_range

from analysis.load import NoTrials, Source, StudyData, StudyRun, load_study
from analysis.results import INTERVAL, Interval, mean_interval
from analysis.selection import count_trials
from ramcore.space import Array
from study.designs import DESIGNS


class OfatRow(NamedTuple):
    """One row of a one-factor-at-a-time design; accuracy in points."""

    baseline: str
    parameter: str  # the one that differs from the baseline; "" for the baseline itself
    value: str  # of that parameter
    accuracy: float  # mean over seeds
    sd: float  # between seeds; NaN with one
    seeds: int


class OfatRange(NamedTuple):
    """The range of accuracy (points) over one parameter's levels around one baseline, the baseline among them."""

    baseline: str
    parameter: str
    low: float
    high: float
    baseline_accuracy: float
    range: float
    noise: float  # range that seed noise alone exceeds in one of ten cases; NaN if unknown


class Replicate(NamedTuple):
    """One configuration run again on fresh seeds; accuracy in points, low and high of its mean's 90% t interval."""

    row: str
    accuracy: float
    low: float
    high: float
    sd: float  # between seeds; NaN with one
    seeds: int
    test: float  # mean test accuracy; NaN if not tested

    @property
    def mean(self) -> Interval:
        """Mean accuracy with its interval."""
        return Interval(self.low, self.accuracy, self.high)


class FixedDesigns(NamedTuple):
    """Other designs run on the same task, data and epochs."""

    ofat: tuple[OfatRow, ...]
    ranges: tuple[OfatRange, ...]
    replicates: tuple[Replicate, ...]
    studies: tuple[str, ...]  # names of those that the rows come from


def read_fixed_designs(source: Source, studies: Sequence[StudyRun], study: StudyRun) -> FixedDesigns:
    """The newest OFAT and replicate studies of the same task, data and epochs that have trials, summarised."""
    records: list[StudyData] = []
    for design in (name for name, one in DESIGNS.items() if one.report == "comparison"):
        for other in studies:
            same = all(other.params.get(key) == study.params.get(key) for key in ("task", "data", "epochs"))
            if other.params.get("design") == design and same:
                try:
                    records.append(load_study(source, other))
                except NoTrials:
                    continue
                break
    return summarise(records)


def summarise(records: Sequence[StudyData]) -> FixedDesigns:
    """The OFAT and replicate trials among the records."""
    ofat: list[OfatRow] = []
    replicates: list[Replicate] = []
    for one in records:
        trials = one.trials.to_dict(orient="index")
        for number, accuracies in final_accuracies(one).items():
            trial = trials[number]
            mean, sd, seeds = mean_interval(accuracies), _seed_sd(accuracies), len(accuracies)
            if trial["origin"] == "ofat":
                value = trial[trial["parameter"]] if trial["parameter"] else ""
                shown = f"{value:.3g}" if isinstance(value, float) else str(value)
                ofat.append(OfatRow(trial["baseline"], trial["parameter"], shown, mean.mid, sd, seeds))
            elif trial["origin"] == "replicate":
                test = 100 * float(np.mean(trial["test_accuracies"])) if trial["test_accuracies"] else math.nan
                replicates.append(Replicate(trial["row"], mean.mid, mean.low, mean.high, sd, seeds, test))
    return FixedDesigns(tuple(ofat), ranges(ofat), tuple(replicates), tuple(r.study.name for r in records))


def final_accuracies(records: StudyData) -> dict[int, Array]:
    """Accuracy points of every seed at the last epoch of each complete trial."""
    last = records.epochs[(records.epochs["epoch"] == records.budget) & records.epochs["val_accuracy"].notna()]
    accuracies: dict[int, Array] = {}
    for trial, part in last.groupby("trial")["val_accuracy"]:
        accuracies[int(str(trial))] = 100 * part.to_numpy(dtype=float)
    return accuracies


def ranges(rows: Sequence[OfatRow]) -> tuple[OfatRange, ...]:
    """The range over every baseline's parameters, in the order of their names. A baseline that has not run has none."""
    baselines = {row.baseline: row for row in reversed(rows) if not row.parameter}
    ordered = sorted((row for row in rows if row.parameter), key=lambda row: (row.baseline, row.parameter))
    found: list[OfatRange] = []
    for (name, parameter), others in itertools.groupby(ordered, key=lambda row: (row.baseline, row.parameter)):
        if name not in baselines:
            continue
        baseline = baselines[name]
        levels = [baseline, *others]
        low, high = min(row.accuracy for row in levels), max(row.accuracy for row in levels)
        found.append(OfatRange(name, parameter, low, high, baseline.accuracy, high - low, _noise_range(levels)))
    return tuple(found)


def completion_line(records: StudyData) -> str:
    """One line on how many rows of a fixed design are complete."""
    counts = count_trials(records.trials)
    return (
        f"{counts.complete} of {counts.total} rows are complete, {counts.running} running, "
        f"{counts.failed + counts.diverged} failed"
    )


def _seed_sd(accuracies: Array) -> float:
    return float(accuracies.std(ddof=1)) if len(accuracies) > 1 else math.nan


def _noise_range(levels: Sequence[OfatRow]) -> float:
    """The range that seed noise alone exceeds in one of ten cases; NaN with one seed each.

    The noise is that of these levels alone: other parameters' levels may train less reliably.
    """
    df = sum(row.seeds - 1 for row in levels)
    if not df:
        return math.nan
    pooled = math.sqrt(sum((row.seeds - 1) * row.sd**2 for row in levels if row.seeds > 1) / df)
    seeds = float(np.mean([row.seeds for row in levels]))
    return float(studentized_range.ppf(INTERVAL, len(levels), df)) * pooled / math.sqrt(seeds)
