"""Where the next trial narrows the intervals of a report most: the trials of --aim sensitivity.

A Gaussian process is fitted to the accuracies that are known, and says how uncertain the mean effect of every parameter
is. The next configuration is the one of many whose result would lessen that most, summed over the parameters. What a
Gaussian process will not know depends on where it is measured, not on what will be found there. So these trials need
no result of each other, and where they lie does not favour high accuracies.

Source: Cohn, Ghahramani and Jordan, "Active learning with statistical models", JAIR 1996 (the expected variance).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from ramcore.space import Array, Space, Values
from study.record import Record
from study.sobol import SobolSequence

CANDIDATES, AVERAGED = 256, 64  # configurations to choose from, and those that an effect is averaged over
VALUES = 5  # of each parameter, between which an effect lies
_FITTED = 8  # results, the least that the process is fitted to; with fewer, every parameter counts as likely to matter
_SMOOTH = (0.3, 10.0)  # length scales, in widths of a range


def aimed_point(space: Space, tried: Sequence[Values], accuracy: Sequence[float], seed: int) -> Values:
    """The configuration to try next.

    tried: configurations that have a result or will have one; accuracy: of each, a fraction; NaN while it is not known.
    """
    x, y = _coordinates(space, tried), np.array(accuracy, dtype=float)
    kernel, noise = _fit(x[np.isfinite(y)], y[np.isfinite(y)])
    points = SobolSequence(space, seed)
    averaged = _coordinates(space, [points[i] for i in range(AVERAGED)])
    candidates = [points[i] for i in range(AVERAGED, AVERAGED + CANDIDATES)]
    at = _coordinates(space, candidates)
    own = np.linalg.cholesky(kernel(x) + noise * np.eye(len(x)))
    known = np.linalg.solve(own, kernel(x, at))  # (N, C)
    variance = kernel.diag(at) - (known**2).sum(axis=0) + noise
    gain = np.zeros(len(at))
    for i, dimension in enumerate(space.dimensions):
        effect, seen = [], []
        for value in dimension.grid(VALUES):
            moved = averaged.copy()
            moved[:, i] = value
            effect.append(kernel(moved, at).mean(axis=0))
            seen.append(kernel(moved, x).mean(axis=0))
        effect, seen = (np.array(rows) - np.mean(rows, axis=0) for rows in (effect, seen))
        left = effect - np.linalg.solve(own, seen.T).T @ known  # covariance with the candidates' results, (VALUES, C)
        gain += (left**2).sum(axis=0) / variance
    new = [candidate not in tried for candidate in candidates]
    return candidates[int(np.argmax(np.where(new, gain, -1.0)))]


class Aimed:
    """The trials of --aim sensitivity, as a function of the record and a trial number."""

    def __init__(self, record: Record, space: Space) -> None:
        self._record, self._space = record, space

    def suggest(self, number: int) -> Values:
        """The configuration of a trial."""
        trials = [t for t in self._record.trials.values() if t.state in ("complete", "running")]
        tried = [{name: getattr(t.spec.config, name) for name in self._space.names} for t in trials]
        accuracy = [np.nan if t.value is None else t.value for t in trials]
        return aimed_point(self._space, tried, accuracy, self._record.settings.seed + number)


def _coordinates(space: Space, points: Sequence[Values]) -> Array:
    """Unit coordinates (N, D)."""
    return np.column_stack([d.to_unit([point[d.name] for point in points]) for d in space.dimensions])


def _fit(x: Array, y: Array) -> tuple[Any, float]:
    """The kernel of accuracies that are scaled to unit variance, and the variance of their noise."""
    surface = ConstantKernel(1.0, (0.1, 10.0)) * Matern([1.0] * x.shape[1], _SMOOTH, nu=2.5)
    kernel: Any = surface + WhiteKernel(0.1, (1e-4, 1.0))
    if len(y) >= _FITTED and np.ptp(y) > 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound
            kernel = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0).fit(x, y).kernel_
    return kernel.k1, float(kernel.k2.noise_level)
