"""The results of an analysis, as plain NamedTuples that tables and figures read.

Accuracy is in points (0 to 100) and belongs to the full epoch budget, unless a line says otherwise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from ramcore.space import Array, Dimension, Space

DUMMY = "dummy (no effect)"
TRAINED = 1 / 18  # of the way from guessing to no error, above which a run has trained: 15 % with ten classes
INTERVAL = 0.90  # posterior probability inside every interval
MIN_TRIALS = 5  # the least that can be cross-validated
MIN_RANKED = 8  # trials; with fewer, a surface over several dimensions is a guess, whatever its fit
MIN_R2 = 0.5  # cross-validated R2 below which nothing is ranked: less than half of the variance is explained
SETTLED = 1.05  # R-hat of what is reported, above which intervals may be too narrow
MAX_RHAT = 1.1  # of what is reported, above which nothing is ranked
TIE = (0.05, 0.95)  # two parameters are tied if P(one matters more than the other) is between these

Value = bool | int | float | str  # of one field of a configuration


class Interval(NamedTuple):
    """A posterior median, or a mean of measurements, with the bounds of its INTERVAL."""

    low: float
    mid: float
    high: float


class Counts(NamedTuple):
    """Number of trials by outcome."""

    total: int
    complete: int
    stopped: int
    diverged: int
    failed: int  # errors, not divergence
    running: int
    used: int  # trials with results, those of other studies among them
    seeds: int


class Data(NamedTuple):
    """What the surface is fitted to."""

    name: str  # of the study
    space: Space
    dimensions: tuple[Dimension, ...]  # those that vary, by name, and the dummy last
    constant: tuple[str, ...]  # searched fields that do not vary
    counts: Counts
    origins: dict[str, int]  # trials by what chose their configuration
    others: dict[str, int]  # trials of other studies that the answers also rest on, by study
    untrained: tuple[int, int]  # runs that did not train, and all runs
    budget: int  # epochs the answers are for
    evaluation_size: int  # images behind an accuracy
    chance: float  # accuracy of guessing one of the classes, which a run that does not train has
    biased: bool  # the search algorithm chose most trials, so they crowd where accuracy is high
    warnings: tuple[str, ...]


class Effect(NamedTuple):
    """What one parameter does."""

    name: str
    label: str
    effect: Interval  # from the worst to the best value, others averaged over; a run that does not train is guessing
    effect_in_sd: Interval  # the same in standard deviations between seeds
    trained: Interval  # the same among runs that train
    training: Interval | None  # change of the probability of training, percentage points; None: every run trained
    first: Interval  # first-order Sobol index of the expected logit
    total: Interval  # total Sobol index of the expected logit
    first_accuracy: Interval  # the same on the accuracy scale
    total_accuracy: Interval
    above_dummy: float  # P(total index greater than the dummy's), among all runs or those that train: the larger
    rank: int  # one more than the number of parameters that surely (TIE) matter more; equal ranks are ties; dummy: 0
    failure: Interval | None  # change of the probability that a trial fails, percentage points; None: none did


class Other(NamedTuple):
    """What one parameter does, asked in other ways."""

    retuned: Interval  # points between its best and worst value, all others chosen anew for each
    held: tuple[tuple[Value, Interval], ...]  # by value: points that the best reachable accuracy falls
    around_best: Interval  # points between its best and worst value, all others as in the best configuration
    shapley: Interval  # share of the variance of the expected logit; all add up to 1


class Matrix(NamedTuple):
    """A number for every pair of parameters."""

    names: tuple[str, ...]
    values: Array  # (row, column)


class Ranking(NamedTuple):
    """Which parameters matter."""

    effects: tuple[Effect, ...]  # by total index; the dummy among them
    more_than: Matrix  # P(row matters more than column), by total index, with the dummy; NaN on the diagonal
    pairs: dict[tuple[str, str], Interval]  # share of the variance of each pair's interaction
    higher_order: Interval  # share of the variance of all interactions of three

    @property
    def interactions(self) -> Matrix:
        """Median share of the variance of each pair, symmetric, parameters by name."""
        names = tuple(sorted(effect.name for effect in self.effects if effect.name != DUMMY))
        values = np.zeros((len(names), len(names)))
        for (a, b), share in self.pairs.items():
            i, j = names.index(a), names.index(b)
            values[i, j] = values[j, i] = share.mid
        return Matrix(names, values)


class Curve(NamedTuple):
    """A parameter's marginal accuracy: G grid values and bands."""

    values: list[Value]
    low: Array
    mid: Array
    high: Array
    extrapolated: NDArray[np.bool_]  # beyond all but one full-budget trial, or mostly forbidden combinations


class PairSurface(NamedTuple):
    """Mean accuracy over two parameters, others averaged over."""

    x: Dimension
    y: Dimension
    grid_x: Array  # unit coordinates
    grid_y: Array
    mean: Array  # (len(grid_y), len(grid_x))


class Curves(NamedTuple):
    """How accuracy and importance change."""

    marginals: dict[str, Curve]  # by parameter, the dummy among them
    surface: PairSurface | None  # None: only one parameter varies
    epochs: tuple[int, ...]  # E epochs of `over_epochs`
    over_epochs: dict[str, Array]  # total index by parameter, (E, 3): low, mid, high


class Gain(NamedTuple):
    """Tunability: what setting one parameter alone can gain over the default."""

    name: str
    default: Value
    best: Value
    gain: Interval


class Step(NamedTuple):
    """One step of the path from the default to the best configuration."""

    name: str
    before: Value
    after: Value
    gain: Interval  # of this step
    accuracy: Interval  # after it


class Configurations(NamedTuple):
    """The default, the best configuration tried, and the way from one to the other."""

    default: dict[str, Value]
    default_inside: bool  # False: part of it is outside the space or not saved; the nearest edge or the middle is taken
    default_accuracy: Interval
    best: dict[str, Value]
    best_trial: int
    best_accuracy: Interval
    tunability: tuple[Gain, ...]  # by gain
    path: tuple[Step, ...]  # ablation path


class CrossValidation(NamedTuple):
    """Predictions for trials that were held out whole, in logits, and how good they are."""

    r2: float  # against the trials' mean, by epoch
    finished: int  # trials that reached the budget; if they are few, r2 is of every trial's last epoch
    coverage: float  # share of results inside their 90% prediction interval
    held_out: int
    ceiling: float  # R2 of a perfect surface, given the seed noise of a trial's mean
    observed: Array
    predicted: Array
    predicted_sd: Array


class Trust(NamedTuple):
    """How far the answers can be trusted."""

    fit: CrossValidation
    rhat: float  # the largest R-hat of any effect or total index; 1 is converged
    ess: float  # the smallest effective sample size of any
    modes: int  # of the hyperparameters' posterior
    trials_needed: int | None  # rough number of trials, in all, for R2 = MIN_R2; None: reached, or out of reach
    seed_sd: Interval  # standard deviation between seeds, averaged over trials
    seed_sd_measured: bool  # False: the surface's own estimate
    infeasible_share: float  # of the space
    extrapolation_share: float  # of the space


class ParameterDraws(NamedTuple):
    """Posterior draws (S,) of one parameter, which the verdicts are judged on."""

    total: Array  # total Sobol index of the logit
    effect: Array
    marginal: dict[Value, Array]  # mean accuracy by value


class Analysis(NamedTuple):
    """Everything computed from one study."""

    data: Data
    ranked: bool
    ranking: Ranking
    curves: Curves
    configurations: Configurations
    other: dict[str, Other]  # by parameter
    trust: Trust
    draws: dict[str, ParameterDraws]  # of the parameters that the case study speaks of, and the dummy


def interval(draws: Array) -> Interval:
    """Median and central interval of posterior draws."""
    low, mid, high = np.quantile(draws, [(1 - INTERVAL) / 2, 0.5, (1 + INTERVAL) / 2])
    return Interval(float(low), float(mid), float(high))


def mean_interval(values: Array) -> Interval:
    """Mean of repeated measurements and its t interval; NaN where there are none, or too few for an interval."""
    mean, half = float(values.mean()) if len(values) else math.nan, math.nan
    if len(values) > 1:
        half = float(t.ppf((1 + INTERVAL) / 2, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean - half, mean, mean + half)


def why_not_ranked(analysis: Analysis) -> str:
    """The reason why a study is not ranked, as half a sentence."""
    used, fit = analysis.data.counts.used, analysis.trust.fit
    if used < MIN_RANKED:
        return f"{used} trials are too few to tell parameters apart, and {MIN_RANKED} the least"
    if fit.finished < MIN_RANKED:
        return f"{fit.finished} trials have come to the last epoch so far, and {MIN_RANKED} are the least"
    if analysis.trust.rhat > MAX_RHAT:
        return f"the sampler has not converged (R-hat {analysis.trust.rhat:.2f}, and {MAX_RHAT:g} is the most)"
    return (
        f"predicting trials it has not seen, the fitted surface explains {max(fit.r2, 0):.0%} of the "
        f"differences in accuracy (R² = {fit.r2:.2f}), and below {MIN_R2:.0%} a ranking would be guesswork"
    )
