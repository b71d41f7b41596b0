"""What people ask beside the mean effect over the whole space: the effect with everything else retuned, that around the
best configuration, and shares of the differences that add up to one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from analysis.effects import GRID, Marginal, Predictor, allowed
from analysis.results import DUMMY, Interval, Other, interval
from ramcore.space import Array, Dimension, Space

WALKS = 512  # from one configuration to another, one coordinate at a time
CLIMBS, ROUNDS = 16, 2  # configurations that are improved one coordinate at a time, and how often


def other_effects(
    predictor: Predictor, marginals: Sequence[Marginal], space: Space, tried: Array, best: Array, seed: int
) -> dict[str, Other]:
    """The answers for every parameter, by name; the dummy has none.

    tried: unit coordinates (N, D) of configurations with the dummy last; best: those of the best one (D,).
    """
    dimensions = [base.dimension for base in predictor.surface.bases]
    shares = dict(zip((d.name for d in dimensions), shapley_effects(predictor, seed), strict=True))
    candidates = climb(predictor, dimensions, space, tried)
    found = {}
    for i, (dimension, marginal) in enumerate(zip(dimensions, marginals, strict=True)):
        if dimension.name == DUMMY:
            continue
        reach = reachable(predictor, dimensions, space, candidates, i, marginal.grid)
        around = predictor.along(best[None, :], i, marginal.grid).accuracy[:, 0]
        known = np.isfinite(reach).all(axis=1)
        usable = np.array(marginal.supported & known)
        usable = usable if usable.any() else np.array(known)
        effect = marginal._replace(supported=usable).contrast(reach)
        top = reach[usable][reach[usable].mean(axis=1).argmax()]
        lost = [(value, interval(top - row)) for value, row, ok in
                zip(dimension.from_unit(marginal.grid), reach, usable, strict=True) if ok]  # fmt: skip
        found[dimension.name] = Other(
            interval(effect), tuple(lost), interval(marginal.contrast(around)), shares[dimension.name]
        )
    return found


def climb(predictor: Predictor, dimensions: Sequence[Dimension], space: Space, tried: Array) -> Array:
    """The configurations, and the most promising of them improved one coordinate at a time."""
    tried = tried[_allowed(space, dimensions, tried)]
    best = tried[np.argsort(-predictor.accuracy(tried).mean(axis=1))[:CLIMBS]].copy()
    for _ in range(ROUNDS):
        for i, dimension in enumerate(dimensions[:-1]):
            grid = dimension.grid(GRID)
            expected = predictor.along(best, i, grid).accuracy.mean(axis=2)  # (G, N)
            moved = best.copy()
            moved[:, i] = grid[expected.argmax(axis=0)]
            take = _allowed(space, dimensions, moved)
            best[take] = moved[take]
    return np.concatenate([tried, best])


def reachable(
    predictor: Predictor, dimensions: Sequence[Dimension], space: Space, candidates: Array, i: int, grid: Array
) -> Array:
    """The best expected accuracy with dimension i held at each of G values and all others chosen for it -> (G, S).

    The others are chosen by the mean of one half of the draws and judged by the other half. A value that no allowed
    candidate has is NaN.
    """
    draws = predictor.along(candidates, i, grid).accuracy  # (G, N, S)
    halves = np.arange(draws.shape[2]) % 2
    found = np.full((len(grid), draws.shape[2]), np.nan)
    for g, value in enumerate(grid):
        moved = candidates.copy()
        moved[:, i] = value
        legal = _allowed(space, dimensions, moved)
        for half in (0, 1):
            if legal.any():
                expected = np.where(legal, draws[g][:, halves != half].mean(axis=1), -1.0)
                found[g, halves == half] = draws[g, expected.argmax(), halves == half]
    return found


def _allowed(space: Space, dimensions: Sequence[Dimension], x: Array) -> NDArray[np.bool_]:
    return allowed(space, dimensions[:-1], x[:, :-1])


def shapley_effects(predictor: Predictor, seed: int) -> list[Interval]:
    """Shares of the variance of the expected logit that add up to 1: an interaction is divided equally among its
    parameters. One interval a dimension, the dummy among them.

    For runs that train they follow exactly from the surface's components (Owen 2014). What the probability of training
    changes about that is computed on WALKS random walks (Goda 2021).
    """
    power = predictor.weights**2  # (P, S)
    member = predictor.surface.member
    exact = (member / member.sum(axis=1)[:, None]).T @ power  # (D, S)
    if predictor.training is not None:
        walks = _Walks(predictor, seed)
        exact = exact + walks.effects(predictor.expected_logits) - walks.effects(predictor.logits)
    shares = np.maximum(exact, 0) / np.maximum(exact, 0).sum(axis=0)
    return [interval(row) for row in shares]


class _Walks:
    """Random walks between two configurations that change one coordinate at a time, in random order."""

    def __init__(self, predictor: Predictor, seed: int) -> None:
        dimensions = [base.dimension for base in predictor.surface.bases]
        size, rng = len(dimensions), np.random.default_rng(seed)
        uniform = qmc.Sobol(2 * size, rng=seed).random(WALKS)
        at, end = (
            np.column_stack([d.quantile(uniform[:, first + i]) for i, d in enumerate(dimensions)])
            for first in (0, size)
        )
        self._orders = rng.permuted(np.tile(np.arange(size), (WALKS, 1)), axis=1)
        stops = [at.copy()]
        for step in range(size):
            at = at.copy()
            at[range(WALKS), self._orders[:, step]] = end[range(WALKS), self._orders[:, step]]
            stops.append(at)
        self._stops = stops

    def effects(self, value: Callable[[Array], Array]) -> Array:
        """Shapley effects of a function of coordinates, (N, D) -> (N, S), as variances (D, S)."""
        values = [value(stop) for stop in self._stops]
        found = np.zeros((self._orders.shape[1], values[0].shape[1]))
        for step, (before, after) in enumerate(itertools.pairwise(values)):
            part = (values[0] - 0.5 * (before + after)) * (before - after)
            np.add.at(found, self._orders[:, step], part / WALKS)
        return found
