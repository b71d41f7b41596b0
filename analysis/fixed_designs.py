"""One-factor-at-a-time and replicate designs, summarised to stand beside the global indices.

They answer narrower questions than a search: what one parameter does at one place, and how well a configuration does
again on seeds that nothing was chosen by.
"""

from __future__ import annotations

# pandas' own annotations are unions that its indexing never returns here, so these checks only raise false alarms.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAssignmentType=false
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import studentized_range

from analysis.importance import INTERVAL, count_trials, mean_interval
from analysis.load import NoTrials, Source, StudyData, StudyRun, load_study
from ramcore.space import shown
from study.designs import DESIGNS


class Companions(NamedTuple):
    """Other designs run on the same task, data and epochs; empty tables where there are none.

    ofat: baseline, parameter ("" for the baseline itself), value, accuracy (points), sd (points), seeds.
    ranges: baseline, parameter, low, high, baseline_accuracy, range, noise (points that seed noise alone exceeds
        in one of ten such ranges, by the noise of the parameter's own levels).
    replicates: row, accuracy, low, high (90% t interval of the mean), sd, seeds, test (points or NaN).
    """

    ofat: pd.DataFrame
    ranges: pd.DataFrame
    replicates: pd.DataFrame
    studies: tuple[str, ...]


def read_companions(source: Source, studies: Sequence[StudyRun], study: StudyRun) -> Companions:
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


def summarise(records: Sequence[StudyData]) -> Companions:
    """Tables of OFAT and replicate trials among the records."""
    ofat, replicates = [], []
    for one in records:
        ends = final_accuracies(one)
        for trial, values in ends.items():
            row = one.trials.loc[trial]
            if row["origin"] == "ofat":
                ofat.append(_ofat_row(row, values))
            elif row["origin"] == "replicate":
                replicates.append(_replicate_row(str(row["row"]), values, tuple(row["test_accuracies"])))
    table = pd.DataFrame(ofat, columns=["baseline", "parameter", "value", "accuracy", "sd", "seeds"])
    columns = ["row", "accuracy", "low", "high", "sd", "seeds", "test"]
    return Companions(
        table, _ranges(table), pd.DataFrame(replicates, columns=columns), tuple(r.study.name for r in records)
    )


def final_accuracies(records: StudyData) -> dict[int, np.ndarray]:
    """Accuracy points of every seed at the last epoch of each complete trial."""
    budget = records.budget
    last = records.epochs[(records.epochs["epoch"] == budget) & records.epochs["val_accuracy"].notna()]
    return {int(trial): 100 * part["val_accuracy"].to_numpy(dtype=float) for trial, part in last.groupby("trial")}


def _ofat_row(trial: pd.Series, values: np.ndarray) -> tuple[str, str, str, float, float, int]:
    parameter = str(trial["parameter"])
    value = trial[parameter] if parameter else ""
    return str(trial["baseline"]), parameter, shown(value), float(values.mean()), _sd(values), len(values)


def _replicate_row(
    row: str, values: np.ndarray, test: tuple[float, ...]
) -> tuple[str, float, float, float, float, int, float]:
    mean, tested = mean_interval(values), 100 * float(np.mean(test)) if test else math.nan
    return row, mean.mid, mean.low, mean.high, _sd(values), len(values), tested


def _sd(values: np.ndarray) -> float:
    """Between seeds; NaN with one."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _ranges(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for baseline, part in table.groupby("baseline"):
        own = part[part["parameter"] == ""]
        if own.empty:
            continue
        start = float(own["accuracy"].iloc[0])
        for parameter, others in part[part["parameter"] != ""].groupby("parameter"):
            levels = pd.concat([own, others])
            accuracy = levels["accuracy"].to_numpy(dtype=float)
            low, high = accuracy.min(), accuracy.max()
            rows.append((baseline, parameter, low, high, start, high - low, _noise_range(levels)))
    columns = ["baseline", "parameter", "low", "high", "baseline_accuracy", "range", "noise"]
    return pd.DataFrame(rows, columns=columns)


def _noise_range(levels: pd.DataFrame) -> float:
    """The range that seed noise alone exceeds in one of ten cases, by these levels' own noise; NaN with one seed each.

    Other parameters' levels do not count: that some of them train shakily says nothing of these.
    """
    seeds = levels["seeds"].to_numpy(dtype=float)
    df = float((seeds - 1).sum())
    if not df:
        return math.nan
    pooled = math.sqrt(float(((seeds - 1) * levels["sd"].fillna(0) ** 2).sum()) / df)
    return float(studentized_range.ppf(INTERVAL, len(levels), df)) * pooled / math.sqrt(float(seeds.mean()))


def describe(records: StudyData) -> str:
    """One line on how far a fixed design has come."""
    counts = count_trials(records.trials)
    return (
        f"{counts.complete} of {counts.total} rows are complete, {counts.running} running, "
        f"{counts.failed + counts.diverged} failed"
    )
