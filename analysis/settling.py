"""How many more trials, and of which kind, would settle a claim that is undecided.

By the model itself: what a Gaussian process will not know about a number depends on where it is measured, not on what
will be found. The number that decides a claim is taken as linear in the surface's weights around each draw. The rest of
its variance (of the chance of training, and of the hyperparameters) is taken to fall with the number of runs. A claim
counts as settled by so many trials if the probability is LIKELY, as seen from now, that it will then be decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from analysis.effects import space_points
from analysis.importance import DRAWS_EACH, Fit
from analysis.observations import Observations
from analysis.verdicts import SURE, Margin, Verdict
from ramcore.space import Array

LIKELY = 0.8
FACTORS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8)  # times the trials that there are
MOST = 600  # more trials, at most
THETAS = 4  # draws of the hyperparameters
POINTS = 128  # configurations that an average over the space is taken on
SEEDS = (1, 2, 4, 8)  # more for every trial that there is


class Kind(NamedTuple):
    """A way of running more."""

    about: str  # "more Sobol trials of one seed"
    runs: Callable[[int], int]  # seeds that are trained, of a number of these
    numbers: tuple[int, ...]  # to choose from
    of: Callable[[Observations, int], Observations]  # what there would be to see


def settle(fitted: Fit, verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
    """The verdicts, those that are undecided with what would settle them."""
    kinds = possible_kinds(fitted)
    return tuple(
        verdict._replace(needs=_needs(fitted, verdict.margin, kinds))
        if verdict.verdict == "undecided" and verdict.margin is not None
        else verdict
        for verdict in verdicts
    )


def possible_kinds(fitted: Fit) -> list[Kind]:
    """New Sobol trials of one seed, and of as many as the study's have; more seeds of its trials."""
    data, have = fitted.selection.data, len(fitted.selection.attempts.u)
    numbers = tuple(sorted({min(MOST, math.ceil(factor * have)) for factor in FACTORS}))
    points = space_points(data.dimensions, MOST, 1)

    def sobol(seeds: int) -> Kind:
        words = "one seed" if seeds == 1 else f"{seeds} seeds"
        return Kind(
            f"more Sobol trials of {words}", lambda n: n * seeds, numbers,
            lambda seen, n: seen.with_trials(points[:n], seeds),
        )  # fmt: skip

    repeated = Kind("more seeds of every trial", lambda n: n * have, SEEDS, Observations.with_seeds)
    return [*(sobol(seeds) for seeds in sorted({1, data.counts.seeds})), repeated]


def _needs(fitted: Fit, margin: Margin, kinds: Sequence[Kind]) -> str:
    """What would settle a claim, as a sentence."""
    outlook, found, not_enough = Outlook(fitted, margin), [], []
    for kind in kinds:
        number = outlook.number_needed(kind)
        if number is None:
            not_enough.append(f"{kind.numbers[-1]} {kind.about}")
        else:
            found.append((kind.runs(number), f"about {number} {kind.about} ({kind.runs(number)} runs)"))
    text = " or ".join(text for _, text in sorted(found))
    text = f"{text[0].upper()}{text[1:]} would probably settle it" if found else ""
    if not_enough:
        text += f"{'; ' if text else 'Not even '}{' or '.join(not_enough)} would {'not' if text else 'settle it'}"
    return text


class Outlook:
    """What more trials would tell of the margin of a claim."""

    def __init__(self, fitted: Fit, margin: Margin) -> None:
        self._fitted, self._margin = fitted, margin
        draws = len(fitted.posterior.weights) // DRAWS_EACH
        self._chosen = np.linspace(0, draws - 1, THETAS).astype(int)
        self._gradients = np.stack([gradient(fitted, margin, k * DRAWS_EACH)[None, :] for k in self._chosen])
        self._now = self._remaining(fitted.selection.observations)

    def number_needed(self, kind: Kind) -> int | None:
        """How many of a kind would probably settle the claim; None: not even the most that are considered."""
        draws = self._margin.draws
        return next((n for n in kind.numbers if _probability(draws, self.after(kind, n)) >= LIKELY), None)

    def after(self, kind: Kind, number: int) -> float:
        """The variance that the margin will have after so many of a kind."""
        variance, selection = float(self._margin.draws.var()), self._fitted.selection
        of_surface = min(self._now, variance)
        runs = float((selection.attempts.trained + selection.attempts.failed).sum())
        then = self._remaining(kind.of(selection.observations, number))
        return of_surface * then / max(self._now, 1e-12) + (variance - of_surface) * runs / (runs + kind.runs(number))

    def _remaining(self, seen: Observations) -> float:
        """The variance that the surface's weights leave when these rows have been seen."""
        theta = self._fitted.posterior.theta[self._chosen]
        return float(np.mean(self._fitted.surface.left(theta, seen, self._gradients)[1]))


def gradient(fitted: Fit, margin: Margin, draw: int) -> Array:
    """The derivative of a margin in the surface's weights, at one of the posterior's draws (P,)."""
    names = [dimension.name for dimension in fitted.selection.data.dimensions]
    i, weights = names.index(margin.parameter), fitted.predictor.weights[:, draw]
    if margin.other:
        member, power = fitted.surface.member.T, weights**2
        own, other = (2 * weights * (member[k] - member[k] @ power / power.sum()) / power.sum()
                      for k in (i, names.index(margin.other)))  # fmt: skip
        return own - other
    points = space_points(fitted.selection.data.dimensions, POINTS, 0)
    before, then = (
        _slope(fitted, points, i, at, draw)
        for at in fitted.selection.data.dimensions[i].to_unit(list(margin.values))
    )  # fmt: skip
    return then - before


def _slope(fitted: Fit, points: Array, i: int, at: float, draw: int) -> Array:
    """The derivative of the mean accuracy, points, where dimension i has a coordinate."""
    predictor, moved = fitted.predictor, points.copy()
    moved[:, i] = at
    features = fitted.surface.features(moved)
    accuracy = 1 / (1 + np.exp(-features @ predictor.weights[:, draw] - predictor.level[draw]))
    trains = 1.0 if predictor.training is None else predictor.training.probability(moved)[:, draw]
    return 100 * (trains * accuracy * (1 - accuracy)) @ features / len(points)


def _probability(draws: Array, variance: float) -> float:
    """That a claim is decided when the variance of its margin has become this: its mean moves by what was learned."""
    mean, moves = float(draws.mean()), math.sqrt(max(float(draws.var()) - variance, 1e-12))
    needed = norm.ppf(SURE) * math.sqrt(variance)
    return float(norm.cdf((-needed - mean) / moves) + norm.sf((needed - mean) / moves))
