"""Checks of the fitted surface: prediction of held-out trials, seed noise, extrapolation."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import gammaln

from analysis.effects import Predictor
from analysis.observations import Observations
from analysis.results import MIN_R2, MIN_RANKED, CrossValidation
from analysis.surrogate import Posterior, Start, Surface
from ramcore.space import Array

FOLDS = 5
UNCERTAIN = 0.9  # of the SD over the space: a surface with a larger SD explains under a fifth of the variance
MEASURED = 3  # trials with two seeds or more, from which seed noise is measured and not taken from the surface
Z90 = 1.645  # half a 90% interval of a normal distribution, in standard deviations


def cross_validate(
    surface: Surface, observations: Observations, start: Start, rng: np.random.Generator
) -> CrossValidation:
    """Predict the final accuracy of whole trials that the fold has not seen, with hyperparameters refitted in each."""
    final = observations.u[observations.last] > observations.u.max() - 0.1
    trials = len(final)
    targets = np.flatnonzero(final) if final.sum() >= MIN_RANKED else np.arange(trials)
    whole = _hold_out(surface, observations, start, targets, rng, keep=1.0)
    r2, ceiling, half = whole.r2, whole.ceiling, math.nan
    if r2 < MIN_R2 + 0.2:
        half = _hold_out(surface, observations, start, targets, rng, keep=0.5).r2
    return CrossValidation(
        r2=r2,
        finished=int(final.sum()),
        coverage=float(np.mean(np.abs(whole.observed - whole.predicted) <= Z90 * whole.sd)),
        held_out=len(targets),
        ceiling=ceiling,
        r2_half=half,
        trials_needed=trials_needed(r2, half, trials, ceiling),
        observed=whole.observed,
        predicted=whole.predicted,
        predicted_sd=whole.sd,
    )


class _HeldOut(NamedTuple):
    """Results of held-out trials and their predictions, in logits, (N,) each."""

    observed: Array
    predicted: Array
    sd: Array
    noise: Array  # variance of seed and epoch noise
    reference: Array  # what a prediction is compared with

    @property
    def spread(self) -> float:
        return float(np.mean((self.observed - self.reference) ** 2)) or 1.0

    @property
    def r2(self) -> float:
        return 1 - float(np.mean((self.observed - self.predicted) ** 2)) / self.spread

    @property
    def ceiling(self) -> float:
        return max(0.0, 1 - float(self.noise.mean()) / self.spread)


def _hold_out(
    surface: Surface,
    observations: Observations,
    start: Start,
    targets: np.ndarray,
    rng: np.random.Generator,
    keep: float,
) -> _HeldOut:
    """Predict the targets' last rows fold by fold, from a share `keep` of the other trials."""
    folds = np.resize(np.arange(FOLDS), len(targets))
    rng.shuffle(folds)
    last = observations.last
    predicted, sd, noise, level = (np.zeros(len(targets)) for _ in range(4))
    for fold in range(FOLDS):
        mine = folds == fold
        held = targets[mine]
        rest = np.setdiff1d(np.arange(len(observations.trials)), held)
        if keep < 1:
            rest = np.sort(rng.choice(rest, max(int(keep * len(rest)), 3), replace=False))
        part = observations.subset(rest)
        at, where = np.unique(observations.u[last[held]], return_inverse=True)
        posterior, _ = surface.sample(part, at, hyperdraws=12, draws_each=8, rng=rng, start=start)
        values = np.tensordot(surface.features(observations.x[held]), posterior.weights, axes=(1, 1))  # (n, S, E)
        rows = values[np.arange(len(held)), :, where] + posterior.level[:, where].T
        scale = float(part.y.std()) or 1.0
        seeds = float(observations.seeds[last[held]].mean())
        own = surface.predictive_sd(posterior.theta, scale, seeds)
        predicted[mine] = rows.mean(axis=1)
        level[mine] = posterior.level.mean(axis=0)[where]
        noise[mine] = np.mean(surface.predictive_sd(posterior.theta, scale, seeds, trial_effect=False) ** 2)
        sd[mine] = np.sqrt(rows.var(axis=1) + np.mean(own**2))
    observed = observations.y[last[targets]]
    # The number of epochs makes trials differ that ended early, and the surface is not asked to explain that part.
    same_end = np.ptp(observations.u[last[targets]]) < 0.11
    return _HeldOut(observed, predicted, sd, noise, np.full(len(targets), observed.mean()) if same_end else level)


def trials_needed(r2: float, half: float, trials: int, ceiling: float) -> int | None:
    """A rough number of trials for R2 = MIN_R2, from how R2 grew between half and all of them; None if out of reach.

    The unexplained share is assumed to fall as a power of the number of trials, no faster than 1 / trials. If it did
    not fall, or if more than ten times the trials are needed, there is no answer.
    """
    if r2 >= MIN_R2 or ceiling < MIN_R2 or half >= r2:
        return None
    if not math.isfinite(half):
        return 2 * trials
    now, before = max(1 - r2, 1e-3), max(1 - half, 1e-3)
    power = float(np.clip(math.log(before / now) / math.log(2), 0.3, 1.0))
    factor = (now / (1 - MIN_R2)) ** (1 / power)
    return math.ceil(trials * factor) if factor <= 10 else None


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


def estimated_seed_noise(
    late: pd.DataFrame, surface: Surface, posterior: Posterior, observations: Observations
) -> Array:
    """The same as the surface estimates it, for studies of one seed a trial."""
    scale = float(observations.y.std()) or 1.0
    logits = surface.predictive_sd(posterior.theta, scale, 1.0)
    centre = float(late["val_accuracy"].to_numpy(dtype=float).mean()) if len(late) else 0.5
    return 100 * np.repeat(logits, len(posterior.weights) // len(logits)) * max(centre * (1 - centre), 1e-4)


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
