"""Curves and surfaces for figures: marginal accuracy, two parameters at once, importance against epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.effects import GRID, Marginal, Predictor, allowed, sobol_indices, space_points
from analysis.observations import at_full_budget
from analysis.results import INTERVAL, Curve, Data, PairSurface
from analysis.surrogate import Posterior, Surface
from analysis.training import Attempts
from ramcore.space import Array, Dimension

PAIR_GRID = 11  # values of each parameter of a surface over two
QUANTILES = ((1 - INTERVAL) / 2, 0.5, (1 + INTERVAL) / 2)


def marginal_curve(dimension: Dimension, found: Marginal) -> Curve:
    """A dimension's mean accuracy, with where it extrapolates."""
    low, mid, high = np.quantile(found.rows, QUANTILES, axis=1)
    return Curve(dimension.from_unit(found.grid), low, mid, high, ~found.supported)


def supported(data: Data, attempts: Attempts, i: int) -> NDArray[np.bool_]:
    """Which values of dimension i's grid are tried: at most a step of the grid beyond all but one of the trials near
    the full budget, and not mostly forbidden in combination with the other parameters; of choices, those with two such
    trials -> (G,) bool.
    """
    grid = data.dimensions[i].grid(GRID)
    at = np.sort(attempts.x[at_full_budget(attempts.u, data.budget), i])
    if len(at) < 4:
        return np.zeros(len(grid), dtype=bool)
    if data.dimensions[i].type == "categorical":  # no value lies between two others
        return np.array([np.sum(np.abs(at - value) < 1e-9) > 1 for value in grid])
    near = 0.0 if data.dimensions[i].levels else 1 / (GRID - 1)
    found = (grid >= at[1] - near - 1e-9) & (grid <= at[-2] + near + 1e-9)
    varied = data.dimensions[:-1]
    if i >= len(varied):
        return found
    points = space_points(varied, 128, 0)
    for k, value in enumerate(grid):
        points[:, i] = value
        found[k] &= allowed(data.space, varied, points).mean() >= 0.5
    return found


def pair_surface(
    predictor: Predictor, varied: Sequence[Dimension], marginals: Sequence[Marginal], points: Array
) -> PairSurface | None:
    """Accuracy over patch size and number of glimpses, or over the two parameters with the largest effects."""
    names = [d.name for d in varied]
    if len(varied) < 2:
        return None
    if "patch_size" in names and "num_glimpses" in names:
        i, j = names.index("patch_size"), names.index("num_glimpses")
    else:
        sizes = [float(np.median(marginals[k].effect)) for k in range(len(varied))]
        i, j = (int(k) for k in np.argsort(sizes)[::-1][:2])
    grid_x, grid_y = varied[i].grid(PAIR_GRID), varied[j].grid(PAIR_GRID)
    mean = np.zeros((len(grid_y), len(grid_x)))
    x = points.copy()
    for a, b in np.ndindex(mean.shape):
        x[:, i], x[:, j] = grid_x[b], grid_y[a]
        mean[a, b] = predictor.accuracy(x).mean()
    return PairSurface(varied[i], varied[j], grid_x, grid_y, mean)


def index_by_epoch(surface: Surface, posterior: Posterior) -> dict[str, Array]:
    """Total index of every dimension at the posterior's E epochs, (E, 3): low, mid, high."""
    totals = [sobol_indices(surface, posterior, e).total for e in range(posterior.weights.shape[2])]
    bands = np.quantile(totals, QUANTILES, axis=2)  # (3, E, D)
    return {base.dimension.name: bands[:, :, i].T for i, base in enumerate(surface.bases)}
