"""Checks of the fitted surface: prediction of held-out trials, seed noise, extrapolation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy.special import gammaln

from analysis.effects import Predictor, space_points
from analysis.observations import Observations, at_full_budget
from analysis.results import MIN_R2, MIN_RANKED, CrossValidation
from analysis.sampler import weights_without
from analysis.selection import Selection
from analysis.surrogate import HeldOut, Posterior, Surface
from analysis.training import Attempts
from ramcore.space import Array

UNCERTAIN = 0.9  # of the SD over the space: a surface with a larger SD explains under a fifth of the variance
MEASURED = 3  # trials with two seeds or more, from which seed noise is measured and not taken from the surface
Z90 = 1.645  # half a 90% interval of a normal distribution, in standard deviations


def cross_validate(selection: Selection, predictor: Predictor, held_out: HeldOut) -> CrossValidation:
    """Predictions of the last result of each trial from all other trials.

    Both parts of the model take part: whether the runs train, and how accurate they become. If too few trials have come
    to the full budget, all count.
    """
    attempts, trials = selection.attempts, selection.final.index.to_numpy()
    numbers = selection.observations.trials
    place, read = np.searchsorted(trials, numbers), np.isin(numbers, trials)
    logits = predictor.logits(attempts.x)
    accuracy, sd = logits.mean(axis=1), logits.std(axis=1)
    noise = np.full(len(trials), float(np.median(held_out.noise**2)))
    for known, value in ((accuracy, held_out.mean), (sd, held_out.sd), (noise, held_out.noise**2)):
        known[place[read]] = value[read]
    trains = _trains_without_each(predictor, attempts)
    predicted = trains * accuracy + (1 - trains) * selection.floor
    spread = np.sqrt(trains * (sd**2 + accuracy**2) + (1 - trains) * selection.floor**2 - predicted**2)
    finished = at_full_budget(attempts.u, selection.data.budget)
    targets = finished if finished.sum() >= MIN_RANKED else np.ones(len(trials), bool)
    observed = selection.final.to_numpy(dtype=float)
    total = float(observed[targets].var()) or 1.0
    alike = np.ptp(attempts.u[targets]) < 0.11  # the number of epochs makes trials differ that ended early
    error = float(np.mean((observed - predicted)[targets] ** 2))
    own = selection.observations
    miss = np.abs(own.y[own.last] - held_out.mean)
    return CrossValidation(
        r2=1 - error / total if alike else _within(own, held_out),
        finished=int(finished.sum()),
        coverage=float(np.mean(miss <= Z90 * held_out.sd)),
        held_out=int(targets.sum()),
        ceiling=max(0.0, 1 - float(noise[targets].mean()) / total),
        observed=observed[targets],
        predicted=predicted[targets],
        predicted_sd=spread[targets],
    )


def trials_needed(selection: Selection, surface: Surface, posterior: Posterior, points: Array) -> int | None:
    """A rough number of Sobol trials, in all, with which R2 would come to MIN_R2; None if eight times as many as there
    are would not do, if the model expects that there are enough, or if most trials did not train: then the surface,
    which is of those that did, does not tell.
    """
    if len(selection.observations.trials) < max(MIN_RANKED, len(selection.attempts.u) / 2):
        return None
    theta, seeds = posterior.theta[:: max(1, len(posterior.theta) // 8)], float(selection.data.counts.seeds)
    have = len(selection.attempts.u)

    def expected(extra: Array) -> float:
        return surface.explained(theta, selection.observations.with_trials(extra, seeds), points)

    if expected(points[:0]) > MIN_R2:
        return None
    for factor in (1.5, 2, 3, 4, 6, 8):
        extra = space_points(selection.data.dimensions, math.ceil((factor - 1) * have), 1)
        if expected(extra) >= MIN_R2:
            return have + len(extra)
    return None


def _within(own: Observations, held_out: HeldOut) -> float:
    """R2 of trials that ended at different epochs, against the mean of all configurations at each one's epoch."""
    y, u = own.y[own.last], own.u[own.last]
    trend = np.polyval(np.polyfit(u, y, min(2, len(np.unique(u)) - 1)), u)
    spread = float(np.mean((y - trend) ** 2)) or 1.0
    return 1 - float(np.mean((y - held_out.mean) ** 2)) / spread


def _trains_without_each(predictor: Predictor, attempts: Attempts) -> Array:
    """Probability of training of each trial, from the other trials (N,)."""
    if predictor.training is None:
        return np.ones(len(attempts.u))
    odds = predictor.training.log_odds(attempts.x)
    log_density = -attempts.trained[:, None] * np.logaddexp(0, -odds) - attempts.failed[:, None] * np.logaddexp(0, odds)
    return (weights_without(log_density.T).T / (1 + np.exp(-odds))).sum(axis=1)


def late_epochs(epochs: pd.DataFrame, budget: int) -> pd.DataFrame:
    """The results of the last tenth of the epochs."""
    return epochs.loc[(epochs["epoch"] > 0.9 * budget) & epochs["val_accuracy"].notna()]


def measured_seed_noise(late: pd.DataFrame, draws: int, rng: np.random.Generator) -> Array | None:
    """Draws of the standard deviation between seeds, accuracy points, averaged over the trials of two seeds or more;
    None with fewer than MEASURED of them.

    A few unstable trials may make up most of the average, so it is drawn by the Bayesian bootstrap over trials (Rubin
    1981).
    """
    each = seed_sds(late)
    if len(each) < MEASURED:
        return None
    return np.maximum(rng.dirichlet(np.ones(len(each)), draws) @ each, 1e-6)


def estimated_seed_noise(late: pd.DataFrame, held_out: HeldOut, draws: int) -> Array:
    """The same as the surface estimates it, for studies of one seed a trial."""
    centre = float(late["val_accuracy"].to_numpy(dtype=float).mean()) if len(late) else 0.5
    return np.full(draws, 100 * float(np.median(held_out.noise)) * max(centre * (1 - centre), 1e-4))


def seed_sds(epochs: pd.DataFrame) -> Array:
    """Standard deviation between seeds of each trial that has two or more, accuracy points, of their mean accuracies in
    these epochs; unbiased if accuracies are normal.
    """
    means = epochs.groupby(["trial", "seed"]).agg(accuracy=("val_accuracy", "mean"))
    trials = means.groupby("trial")["accuracy"]
    seeds, sds = trials.size().to_numpy(dtype=float), 100 * trials.std(ddof=1).to_numpy(dtype=float)
    sds, seeds = sds[seeds > 1], seeds[seeds > 1]
    return sds / (np.sqrt(2 / (seeds - 1)) * np.exp(gammaln(seeds / 2) - gammaln((seeds - 1) / 2)))


def extrapolation_share(predictor: Predictor, points: Array) -> float:
    """Share of the space where the surface adds little to the average over the space: its posterior SD is above
    UNCERTAIN times the SD of accuracy over the space (both of logits).
    """
    logits = predictor.logits(points)
    overall = float(np.median(logits.std(axis=0)))
    return float(np.mean(logits.std(axis=1) > UNCERTAIN * overall)) if overall > 0 else 1.0
