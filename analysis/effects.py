"""Sobol indices from the surface's weights, and effects on the accuracy scale from averages over the space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from analysis.failures import Failures
from analysis.results import DUMMY, TIE, Effect, Matrix, Ranking, interval
from analysis.surrogate import Posterior, Surface
from ramcore.space import Array, Dimension, Space

CHANCE = 0.1  # accuracy of guessing one of ten digits, which a diverged run counts as
CUBE_POINTS = 512  # quasi-random configurations that averages over the space are taken on


class Indices(NamedTuple):
    """Posterior draws of Sobol indices, S of each."""

    first: Array  # (D, S)
    total: Array  # (D, S)
    pair: dict[tuple[str, str], Array]  # by the names of two dimensions
    triple: Array  # of all interactions of three dimensions


def sobol_indices(surface: Surface, posterior: Posterior, epoch: int = -1) -> Indices:
    """Indices of the logit at one of the posterior's epochs, exactly: squared weights over their sum."""
    power = posterior.weights[:, :, epoch] ** 2
    shares = power / power.sum(axis=1)[:, None]
    groups = surface.groups()
    member = np.array([[i in g for g in groups] for i in range(surface.size)], dtype=float)
    order = np.array([len(g) for g in groups])
    names = [base.dimension.name for base in surface.bases]
    pair_of = np.array([surface.pairs.index((g[0], g[1])) if len(g) == 2 else -1 for g in groups])
    return Indices(
        first=member[:, order == 1] @ shares[:, order == 1].T,
        total=member @ shares.T,
        pair={(names[i], names[j]): shares[:, pair_of == k].sum(axis=1) for k, (i, j) in enumerate(surface.pairs)},
        triple=shares[:, order == 3].sum(axis=1),
    )


class Predictor:
    """Expected accuracy of configurations at the full budget, by posterior draw.

    Without a model of divergence it is that of runs that train; with one, a run that diverges counts as guessing.
    """

    def __init__(self, surface: Surface, posterior: Posterior, divergence: Failures | None = None) -> None:
        self.surface, self.divergence = surface, divergence
        self.weights = np.ascontiguousarray(posterior.weights[:, :, -1].T)  # (P, S)
        self.level = posterior.level[:, -1]

    def logits(self, x: Array) -> Array:
        """Logit of the accuracy of runs that train, at coordinates (N, D) -> (N, S)."""
        return self.surface.features(x) @ self.weights + self.level[None, :]

    def accuracy(self, x: Array) -> Array:
        """Accuracy points at coordinates (N, D) -> (N, S)."""
        value = 1 / (1 + np.exp(-self.logits(x)))
        if self.divergence is not None:
            lost = self.divergence.probability(x)
            value = (1 - lost) * value + lost * CHANCE
        return 100 * value


def space_points(dimensions: Sequence[Dimension], count: int, seed: int) -> Array:
    """Quasi-random unit coordinates over the whole space (N, D)."""
    uniform = qmc.Sobol(len(dimensions), rng=seed).random(count)
    return np.column_stack([d.quantile(uniform[:, i]) for i, d in enumerate(dimensions)])


def allowed(space: Space, dimensions: Sequence[Dimension], x: Array) -> NDArray[np.bool_]:
    """Which coordinates (N, D) the space's rule allows, other fields at their default -> (N,) bool."""
    columns = {d.name: d.from_unit(x[:, i]) for i, d in enumerate(dimensions)}
    rows = zip(*columns.values(), strict=True)
    return np.array([space.feasible(dict(zip(columns, row, strict=True))) for row in rows], bool)


class Marginal(NamedTuple):
    """One dimension with the others averaged over, on the accuracy scale.

    Its variance is split over the same points: the variance along the dimension at each point of the others (within),
    and the rest between these points. So a first-order index is never above the total one, nor that above 1.
    """

    grid: Array  # (G,) unit coordinates
    rows: Array  # (G, S) mean accuracy, points
    first: Array  # (S,) first-order Sobol index
    total: Array  # (S,) total Sobol index

    @property
    def effect(self) -> Array:
        """Accuracy points between the values that are best and worst on average over the draws -> (S,).

        It is not each draw's own largest difference. That is above zero for every curve that is merely uncertain, so a
        parameter without effect would seem to have one.
        """
        mean = self.rows.mean(axis=1)
        return self.rows[mean.argmax()] - self.rows[mean.argmin()]


def marginal(predictor: Predictor, i: int, points: Array) -> Marginal:
    """Dimension i, with the others averaged over `points` (N, D)."""
    dimension = predictor.surface.bases[i].dimension
    grid = dimension.grid(17)
    draws = np.empty((len(grid), len(points), predictor.weights.shape[1]))
    for g, value in enumerate(grid):
        x = points.copy()
        x[:, i] = value
        draws[g] = predictor.accuracy(x)
    if dimension.levels:
        weight = dimension.level_weights
    else:  # the trapezoidal rule
        weight = np.ones(len(grid))
        weight[[0, -1]] = 0.5
        weight /= weight.sum()
    rows, along = draws.mean(axis=1), np.tensordot(weight, draws, axes=1)
    within = np.tensordot(weight, (draws - along) ** 2, axes=1).mean(axis=0)
    variance = within + along.var(axis=0) + 1e-12
    first = weight @ (rows - weight @ rows) ** 2
    return Marginal(grid, rows, first / variance, within / variance)


def rank_parameters(
    indices: Indices,
    marginals: Sequence[Marginal],
    seed_sd: Array,
    counted: Sequence[Marginal] | None,
    failure_changes: Sequence[Array] | None,
    dimensions: Sequence[Dimension],
) -> Ranking:
    """The effects in order of total index, and how surely they differ.

    marginals: of runs that train; counted: the same where a diverged run counts as guessing, None if none diverged;
    seed_sd: draws (S,) in points; failure_changes: draws (S,) by dimension, None if nothing failed; the dummy is the
    last dimension.
    """
    order = sorted(range(len(dimensions)), key=lambda i: -float(np.median(indices.total[i])))
    names = tuple(dimensions[i].name for i in order)
    total = indices.total[order]
    more = (total[:, None] > total[None, :]).mean(axis=2)
    np.fill_diagonal(more, np.nan)
    more_than = Matrix(names, more)
    ranks = ranks_of(more_than)
    effects = tuple(
        Effect(
            name=dimensions[i].name,
            label=dimensions[i].label,
            effect=interval(marginals[i].effect),
            effect_in_sd=interval(marginals[i].effect / seed_sd),
            first=interval(indices.first[i]),
            total=interval(indices.total[i]),
            first_accuracy=interval(marginals[i].first),
            total_accuracy=interval(marginals[i].total),
            above_dummy=1.0 if dimensions[i].name == DUMMY else float(np.mean(indices.total[i] > indices.total[-1])),
            rank=ranks.get(dimensions[i].name, 0),
            with_divergence=None if counted is None else interval(counted[i].effect),
            failure=None if failure_changes is None else interval(failure_changes[i]),
        )
        for i in order
    )
    pairs = {pair: interval(draws) for pair, draws in indices.pair.items() if DUMMY not in pair}
    return Ranking(effects, more_than, pairs, interval(indices.triple))


def ranks_of(more_than: Matrix) -> dict[str, int]:
    """A parameter's rank is one more than the number of those that surely matter more; equal ranks are ties."""
    real = np.array([name != DUMMY for name in more_than.names])
    surely = 1 + ((more_than.values >= TIE[1]) & real[:, None]).sum(axis=0)
    return {name: int(rank) for name, rank in zip(more_than.names, surely, strict=True) if name != DUMMY}
