"""Sobol indices and effects of the parameters: of runs that train, of the chance to train, and of both together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from analysis.results import DUMMY, TIE, Effect, Matrix, Ranking, interval
from analysis.surrogate import Posterior, Surface
from analysis.training import Training
from ramcore.space import Array, Dimension, Space

GRID = 17  # values of a continuous dimension
CUBE_POINTS = 512  # quasi-random configurations that averages over the space are taken on


class Indices(NamedTuple):
    """Posterior draws of Sobol indices, S of each."""

    first: Array  # (D, S)
    total: Array  # (D, S)
    pair: dict[tuple[str, str], Array]  # by the names of two dimensions
    triple: Array  # of all interactions of three dimensions


def sobol_indices(surface: Surface, posterior: Posterior, epoch: int = -1) -> Indices:
    """Indices of the logit of runs that train, at one of the posterior's epochs, exactly: squared weights over their
    sum.
    """
    power = posterior.weights[:, :, epoch] ** 2
    shares = power / power.sum(axis=1)[:, None]
    member, order = surface.member.T, surface.member.sum(axis=1)
    names = [base.dimension.name for base in surface.bases]
    pair_of = np.array([surface.pairs.index((g[0], g[1])) if len(g) == 2 else -1 for g in surface.groups])
    return Indices(
        first=member[:, order == 1] @ shares[:, order == 1].T,
        total=member @ shares.T,
        pair={(names[i], names[j]): shares[:, pair_of == k].sum(axis=1) for k, (i, j) in enumerate(surface.pairs)},
        triple=shares[:, order == 3].sum(axis=1),
    )


class Predictor:
    """What is expected of configurations at the full budget, by posterior draw.

    A run trains with some probability, and then has some accuracy; if it does not, it has the
    accuracy `chance`, of logit `floor`.
    """

    def __init__(
        self, surface: Surface, posterior: Posterior, training: Training | None, floor: float, chance: float
    ) -> None:
        self.surface, self.training, self.floor, self.chance = surface, training, floor, chance
        self.weights = np.ascontiguousarray(posterior.weights[:, :, -1].T)  # (P, S)
        self.level = posterior.level[:, -1]

    def logits(self, x: Array) -> Array:
        """Logit of the accuracy of runs that train, at coordinates (N, D) -> (N, S)."""
        return self.surface.features(x) @ self.weights + self.level[None, :]

    def accuracy(self, x: Array) -> Array:
        """Expected accuracy, points, at coordinates (N, D) -> (N, S)."""
        return self._accuracy(self.logits(x), self._trains(x))

    def expected_logits(self, x: Array) -> Array:
        """Expected logit of accuracy at coordinates (N, D) -> (N, S)."""
        trains = self._trains(x)
        return trains * self.logits(x) + (1 - trains) * self.floor

    def _trains(self, x: Array) -> Array | float:
        return 1.0 if self.training is None else self.training.probability(x)

    def _accuracy(self, logits: Array, trains: Array | float) -> Array:
        return 100 * (trains / (1 + np.exp(-logits)) + (1 - trains) * self.chance)

    def along(self, x: Array, i: int, grid: Array) -> Along:
        """Predictions with coordinate i at each of G values and the others as in x (N, D)."""
        rest, *factors = self.surface.along(x, i, self.weights)
        logits = np.tensordot(self.surface.bases[i](grid), np.stack(factors), axes=1) + (rest + self.level)[None, :, :]
        trained = 100 / (1 + np.exp(-logits))
        if self.training is None:
            return Along(trained, None, trained, logits)
        trains = self.training.along(x, i, grid)
        return Along(trained, 100 * trains, self._accuracy(logits, trains), trains * logits + (1 - trains) * self.floor)


class Along(NamedTuple):
    """Predictions along a dimension, (G values, N points, S draws) each."""

    trained: Array  # accuracy of runs that train, points
    trains: Array | None  # probability of training, percent; None: every run trained
    accuracy: Array  # expected accuracy, points
    logit: Array  # expected logit of accuracy


def space_points(dimensions: Sequence[Dimension], count: int, seed: int) -> Array:
    """Quasi-random unit coordinates over the whole space (N, D)."""
    uniform = qmc.Sobol(len(dimensions), rng=seed).random_base2(max(count - 1, 1).bit_length())[:count]
    return np.column_stack([d.quantile(uniform[:, i]) for i, d in enumerate(dimensions)])


def allowed(space: Space, dimensions: Sequence[Dimension], x: Array) -> NDArray[np.bool_]:
    """Which coordinates (N, D) the space's rule allows, other fields at their default -> (N,) bool."""
    columns = {d.name: d.from_unit(x[:, i]) for i, d in enumerate(dimensions)}
    rows = zip(*columns.values(), strict=True)
    return np.array([space.feasible(dict(zip(columns, row, strict=True))) for row in rows], bool)


def contrast(rows: Array, supported: NDArray[np.bool_]) -> Array:
    """Difference between the supported values that are best and worst on average over the draws: (G, S) -> (S,).

    It is not each draw's own largest difference. That is above zero for every curve that is merely uncertain, so a
    parameter without effect would seem to have one. Each half of the draws is read at the two values that the other
    half has chosen.
    """
    rows = rows[supported] if supported.any() else rows
    halves = np.arange(rows.shape[1]) % 2
    found = np.empty(rows.shape[1])
    for half in (0, 1):
        mean = rows[:, halves != half].mean(axis=1)
        found[halves == half] = (rows[mean.argmax()] - rows[mean.argmin()])[halves == half]
    return found


class Marginal(NamedTuple):
    """One dimension with the others averaged over.

    Variances are split over the same points: the variance along the dimension at each point of the others (within), and
    the rest between these points. So a first-order index is never above the total one, nor that above 1.
    """

    grid: Array  # (G,) unit coordinates
    supported: NDArray[np.bool_]  # (G,) values that enough trials are near to
    rows: Array  # (G, S) expected accuracy, points
    trained: Array  # (G, S) accuracy of runs that train, points
    trains: Array | None  # (G, S) probability of training, percent; None: every run trained
    first_accuracy: Array  # (S,) first-order Sobol index of the expected accuracy
    total_accuracy: Array  # (S,) total Sobol index of it
    first_logit: Array  # (S,) the same of the expected logit
    total_logit: Array

    def contrast(self, rows: Array) -> Array:
        """`contrast` over the supported values."""
        return contrast(rows, self.supported)

    @property
    def effect(self) -> Array:
        """Contrast of the expected accuracy, points (S,)."""
        return self.contrast(self.rows)


def marginal(predictor: Predictor, i: int, points: Array, supported: NDArray[np.bool_] | None = None) -> Marginal:
    """Dimension i, with the others averaged over `points` (N, D)."""
    dimension = predictor.surface.bases[i].dimension
    grid = dimension.grid(GRID)
    if dimension.levels:
        weight = dimension.level_weights
    else:  # the trapezoidal rule
        weight = np.ones(len(grid))
        weight[[0, -1]] = 0.5
        weight /= weight.sum()
    draws = predictor.along(points, i, grid)
    return Marginal(
        grid,
        np.ones(len(grid), bool) if supported is None else supported,
        draws.accuracy.mean(axis=1),
        draws.trained.mean(axis=1),
        None if draws.trains is None else draws.trains.mean(axis=1),
        *_shares(draws.accuracy, weight),
        *_shares(draws.logit, weight),
    )


def _shares(draws: Array, weight: Array) -> tuple[Array, Array]:
    """First-order and total index of values (G, N, S) along a dimension, whose weights are given -> (S,) each."""
    rows, along = draws.mean(axis=1), np.tensordot(weight, draws, axes=1)
    within = np.tensordot(weight, (draws - along) ** 2, axes=1).mean(axis=0)
    variance = within + along.var(axis=0) + 1e-12
    return weight @ (rows - weight @ rows) ** 2 / variance, within / variance


def rank_parameters(
    indices: Indices,
    trained: Indices,
    marginals: Sequence[Marginal],
    seed_sd: Array,
    failure_changes: Sequence[Array] | None,
    dimensions: Sequence[Dimension],
) -> Ranking:
    """The effects in order of total index, and how surely they differ.

    indices: of the expected logit; trained: of the logit of runs that train; seed_sd: draws (S,) in points;
    failure_changes: draws (S,) by dimension, None if nothing failed; the dummy is the last dimension.
    """
    order = sorted(range(len(dimensions)), key=lambda i: -float(np.median(indices.total[i])))
    names = tuple(dimensions[i].name for i in order)
    above = [(one.total > one.total[-1]).mean(axis=1) for one in (indices, trained)]  # the dummy, by draw
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
            trained=interval(marginals[i].contrast(marginals[i].trained)),
            training=None if (trains := marginals[i].trains) is None else interval(marginals[i].contrast(trains)),
            first=interval(indices.first[i]),
            total=interval(indices.total[i]),
            first_accuracy=interval(marginals[i].first_accuracy),
            total_accuracy=interval(marginals[i].total_accuracy),
            above_dummy=1.0 if dimensions[i].name == DUMMY else float(max(above[0][i], above[1][i])),
            rank=ranks.get(dimensions[i].name, 0),
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
