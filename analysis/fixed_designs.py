"""One-factor-at-a-time and replicate designs, summarised to stand beside the global indices.

They answer narrower questions than a search: how one parameter acts around one baseline, and how good a configuration
is on fresh seeds that no choice was made by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import studentized_range

from analysis.load import StudyData
from analysis.results import INTERVAL, Interval, mean_interval
from analysis.selection import count_trials
from ramcore.space import Array, shown
from study.designs import DESIGNS, SEARCH_ORIGINS


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
    noise: float  # range that seed noise alone exceeds in one of ten cases; NaN if unknown

    @property
    def range(self) -> float:
        """The largest accuracy less the smallest."""
        return self.high - self.low


class Replicate(NamedTuple):
    """One configuration of a design, such as one run again on fresh seeds; accuracy in points."""

    row: str
    mean: Interval  # over seeds, with the mean's 90% t interval
    sd: float  # between seeds; NaN with one
    seeds: int
    test: float  # mean test accuracy; NaN if not tested
    baseline: str = ""  # of a replicate: best, the default, or "" for another point


class FixedDesigns(NamedTuple):
    """Other designs run on the same task, data and epochs."""

    ofat: Sequence[OfatRow] = ()
    ranges: Sequence[OfatRange] = ()
    replicates: Sequence[Replicate] = ()
    others: Sequence[Replicate] = ()  # rows of designs that have no table of their own


def newest(others: Sequence[StudyData]) -> list[StudyData]:
    """Of studies that are sorted newest first, the first of every design that compares configurations."""
    found: dict[str, StudyData] = {}
    for one in others:
        design = one.study.params.get("design", "")
        if design in DESIGNS and DESIGNS[design].report == "comparison":
            found.setdefault(design, one)
    return [found[design] for design in DESIGNS if design in found]


def summarise(records: Sequence[StudyData]) -> FixedDesigns:
    """The OFAT and replicate trials among the records, and the rows of other designs that compare configurations."""
    ofat: list[OfatRow] = []
    replicates: list[Replicate] = []
    others: list[Replicate] = []
    for one in records:
        trials = one.trials.to_dict(orient="index")
        for number, accuracies in final_accuracies(one).items():
            trial = trials[number]
            mean, seeds = mean_interval(accuracies), len(accuracies)
            sd = float(accuracies.std(ddof=1)) if seeds > 1 else math.nan
            if trial["origin"] == "ofat":
                value = shown(trial[trial["parameter"]]) if trial["parameter"] else ""
                ofat.append(OfatRow(trial["baseline"], trial["parameter"], value, mean.mid, sd, seeds))
            elif trial["origin"] not in SEARCH_ORIGINS:
                test = 100 * float(np.mean(trial["test_accuracies"])) if trial["test_accuracies"] else math.nan
                rows = replicates if trial["origin"] == "replicate" else others
                rows.append(Replicate(trial["row"], mean, sd, seeds, test, trial["baseline"]))
    return FixedDesigns(ofat, ranges(ofat), replicates, others)


def final_accuracies(records: StudyData) -> dict[int, Array]:
    """Accuracy points of every seed at the last epoch of each complete trial."""
    last = records.epochs[(records.epochs["epoch"] == records.budget) & records.epochs["val_accuracy"].notna()]
    trials = last.groupby("trial")["val_accuracy"]
    return {int(str(trial)): 100 * accuracy.to_numpy(dtype=float) for trial, accuracy in trials}


def ranges(rows: Sequence[OfatRow]) -> list[OfatRange]:
    """The range over every baseline's parameters, in the order of their names. A baseline that has not run has none."""
    baselines = {row.baseline: row for row in reversed(rows) if not row.parameter}
    found: list[OfatRange] = []
    for name, parameter in sorted({row[:2] for row in rows if row.parameter and row.baseline in baselines}):
        levels = [baselines[name], *(row for row in rows if row[:2] == (name, parameter))]
        accuracies = [row.accuracy for row in levels]
        bounds = min(accuracies), max(accuracies)
        found.append(OfatRange(name, parameter, *bounds, baselines[name].accuracy, _noise_range(levels)))
    return found


def completion_line(records: StudyData) -> str:
    """One line on how many rows of a fixed design are complete."""
    counts = count_trials(records.trials)
    failed = counts.failed + counts.diverged
    return f"{counts.complete} of {counts.total} rows are complete, {counts.running} running, {failed} failed"


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
