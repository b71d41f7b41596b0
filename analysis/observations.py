"""Learning curves -> the rows that the Gaussian process is fitted to."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ramcore.space import Array

ROW_BUDGET = 640  # rows at most; curves are averaged in bins of log epoch to stay within it
MAX_BINS = 5  # epochs that summarise a curve, at most


class Observations(NamedTuple):
    """N rows of T trials, with R seeds at most and B bins of log epoch."""

    trials: Array  # (T,) trial numbers
    x: Array  # (T, D) unit coordinates
    trial_of: np.ndarray  # (N,) row -> trial
    u: Array  # (N,) log(epoch) / log(full budget)
    y: Array  # (N,) logit of accuracy, mean over seeds and over the bin
    seeds: Array  # (N,) how many were averaged
    epochs: Array  # (N,) how many were averaged
    contrasts: Contrasts

    @property
    def last(self) -> np.ndarray:
        """Each trial's last row, (T,)."""
        last = np.zeros(len(self.trials), dtype=int)
        last[self.trial_of] = np.arange(len(self.trial_of))  # rows are sorted by bin, so a trial's last one stays
        return last

    def subset(self, trials: np.ndarray) -> Observations:
        """The rows of some trials (positions, sorted). All contrasts stay: they only tell of seed noise."""
        keep = np.isin(self.trial_of, trials)
        rows = {name: getattr(self, name)[keep] for name in ("u", "y", "seeds", "epochs")}
        trial_of = np.searchsorted(trials, self.trial_of[keep])
        return self._replace(trials=self.trials[trials], x=self.x[trials], trial_of=trial_of, **rows)

    def with_trials(self, x: Array, seeds: float) -> Observations:
        """These, and the last epoch of M more trials at coordinates (M, D), for what depends on no result."""
        first, count = len(self.trials), len(x)
        return self._replace(
            trials=np.arange(first + count), x=np.concatenate([self.x, x]),
            trial_of=np.concatenate([self.trial_of, first + np.arange(count)]),
            u=np.append(self.u, np.ones(count)),
            y=np.append(self.y, np.resize(self.y[self.last], count)),  # the size of the noise looks at them
            seeds=np.append(self.seeds, np.full(count, seeds)), epochs=np.append(self.epochs, np.ones(count)),
        )  # fmt: skip

    def with_seeds(self, more: float) -> Observations:
        """These, if every trial had so many seeds more, for what depends on no result."""
        return self._replace(seeds=self.seeds + more)


class Contrasts(NamedTuple):
    """How the seeds of C trials depart from their trial's mean."""

    trials: Array  # (C,) trial numbers
    u: Array  # (C, B) zero where a bin is missing
    y: Array  # (C,) the trial's mean logit at its last bin
    epochs: Array  # (C, B) epochs averaged; 0 where a bin is missing
    outer: Array  # (C, B, B) outer products of the departures, summed over seeds
    df: Array  # (C,) seeds - 1


def logit(accuracy: Array, evaluation_size: int) -> Array:
    """Log-odds of an accuracy measured on `evaluation_size` images, which is kept half an image from 0 and 1."""
    edge = 0.5 / evaluation_size
    clipped = np.clip(accuracy, edge, 1 - edge)
    return np.log(clipped / (1 - clipped))


def log_epoch(epochs: Array, budget: int) -> Array:
    """u of epochs: log(epoch) / log(budget)."""
    return np.log(epochs) / max(math.log(budget), 1e-9)


def at_full_budget(u: Array, budget: int) -> NDArray[np.bool_]:
    """Which u are of the last tenth of the epochs, whose results count as those of the full budget."""
    return u > log_epoch(np.array(max(0.9 * budget, 1.0)), budget) - 1e-9


def observe(epochs: pd.DataFrame, x: pd.DataFrame, budget: int, evaluation_size: int) -> Observations:
    """Summarise learning curves in bins of log epoch.

    epochs: columns trial, seed, epoch, val_accuracy (NaN: diverged, left out); x: unit coordinates indexed by trial;
    budget: epochs of a full run; evaluation_size: images behind an accuracy.
    """
    known = epochs["val_accuracy"].notna() & epochs["trial"].isin(list(x.index)) & (epochs["epoch"] <= budget)
    table = epochs.loc[known, ["trial", "seed", "epoch", "val_accuracy"]].copy()
    table["y"] = logit(table["val_accuracy"].to_numpy(dtype=float), evaluation_size)
    table["u"] = log_epoch(table["epoch"].to_numpy(dtype=float), budget)
    bins = int(np.clip(ROW_BUDGET // max(table["trial"].nunique(), 1), 1, min(MAX_BINS, budget)))
    edges = np.unique(np.round(np.geomspace(1, budget, bins)))
    if bins == 1:  # too many trials for curves: each trial is its last recorded tenth
        last = table.groupby("trial")["epoch"].transform("max")
        table = table[table["epoch"] > 0.9 * last].assign(bin=0)
    else:
        table["bin"] = _bins(table["epoch"].to_numpy(dtype=float), edges, budget)
    means = {"y": ("y", "mean"), "u": ("u", "mean")}
    per_seed = table.groupby(["trial", "seed", "bin"]).agg(**means, epochs=("y", "size")).reset_index()
    by_bin = per_seed.groupby(["trial", "bin"])
    rows = by_bin.agg(**means, seeds=("seed", "nunique"), epochs=("epochs", "mean")).reset_index()
    trials = np.unique(rows["trial"].to_numpy())
    columns = {name: rows[name].to_numpy(dtype=float) for name in ("u", "y", "seeds", "epochs")}
    return Observations(
        trials=trials,
        x=x.loc[list(trials)].to_numpy(dtype=float),
        trial_of=np.searchsorted(trials, rows["trial"].to_numpy()),
        **columns,
        contrasts=_contrasts(per_seed, len(edges)),
    )


def _bins(epochs: Array, edges: Array, budget: int) -> np.ndarray:
    """Each epoch's bin: the nearest edge below the budget, or the last bin.

    The last bin takes only the last tenth of the epochs, so that "at the full budget" means that.
    """
    lower = np.log(edges[:-1]) if len(edges) > 1 else np.log(edges)
    nearest = np.abs(np.log(epochs)[:, None] - lower[None, :]).argmin(axis=1)
    return np.where(epochs > 0.9 * budget, len(edges) - 1, nearest)


def _contrasts(per_seed: pd.DataFrame, bins: int) -> Contrasts:
    """Contrasts of every trial with two seeds or more, over the bins that all of its seeds reached."""
    curves = per_seed.pivot(index=["trial", "seed"], columns="bin", values="y").reindex(range(bins), axis=1)
    means = {
        name: per_seed.pivot_table(name, index="trial", columns="bin").reindex(range(bins), axis=1)
        for name in ("u", "y", "epochs")
    }
    trials, u, y, count, outer, df = [], [], [], [], [], []
    for trial, curve in curves.groupby(level="trial"):
        values = curve.to_numpy()
        here = ~np.isnan(values).any(axis=0)
        if len(values) < 2 or not here.any():
            continue
        departures = np.where(here, values - values.mean(axis=0), 0.0)
        for rows, name in ((u, "u"), (count, "epochs")):
            rows.append(np.where(here, means[name].loc[trial], 0.0))
        trials.append(trial)
        y.append(means["y"].loc[trial].to_numpy()[here][-1])
        outer.append(departures.T @ departures)
        df.append(len(values) - 1.0)
    size = len(df)
    u, count = (np.reshape(rows, (size, bins)) for rows in (u, count))
    outer = np.reshape(outer, (size, bins, bins))
    return Contrasts(np.array(trials), u, np.array(y), count, outer, np.array(df))
