"""The probability that a run trains: a Bayesian logistic regression on configuration and epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import block_diag

from analysis.basis import Basis
from analysis.sampler import CHAINS, Chain, find_modes, run_until_settled
from ramcore.space import Array

STARTS, STEPS = 8, 800  # of the search for modes, and of a chain
TILT = 0.5  # of the spectrum of a dimension: less than 1 is rougher
FUNCTIONS = 6  # of each dimension: enough for a cliff
MEDIAN_SCALE, SPREAD = 0.3, 1.5  # of a dimension's effect in log-odds: small unless the data ask for more


class Attempts(NamedTuple):
    """How the seeds of N trials ended; those that were never read are left out."""

    x: Array  # (N, D) unit coordinates
    u: Array  # (N,) log(epoch) / log(full budget) of the last result
    trained: Array  # (N,) seeds
    failed: Array  # (N,) seeds


class Training(NamedTuple):
    """Posterior draws of the model: weights (S, 1 + functions), intercept first; those of a chain after another's."""

    bases: tuple[Basis, ...]
    weights: Array

    def log_odds(self, x: Array) -> Array:
        """Log-odds of training by the full budget at coordinates (N, D) -> (N, S)."""
        return _design(self.bases, x) @ self.weights.T

    def probability(self, x: Array) -> Array:
        """Probability of training by the full budget at coordinates (N, D) -> (N, S)."""
        return 1 / (1 + np.exp(-self.log_odds(x)))

    def along(self, x: Array, i: int, grid: Array) -> Array:
        """The probability with coordinate i at each of G values and the others as in x (N, D) -> (G, N, S)."""
        columns = np.concatenate([[-1], np.repeat(np.arange(len(self.bases)), _sizes(self.bases))])
        design = _design(self.bases, x)
        others = design[:, columns != i] @ self.weights[:, columns != i].T
        own = self.bases[i](grid)[:, : _sizes(self.bases)[i]] @ self.weights[:, columns == i].T
        return 1 / (1 + np.exp(-(others[None, :, :] + own[:, None, :])))


def fit_training(
    bases: Sequence[Basis], attempts: Attempts, draws: int, rng: np.random.Generator, *, rounds: int = 1
) -> Training | None:
    """Draws of the model, `draws` at least; None if every run trained.

    The chains are doubled, at most rounds - 1 times, until the log-odds at the ends of every range have settled.

    The log-odds are a sum of a smooth function of each dimension, whose scale is its own and small unless the data ask
    for more, so that two failures in fifty trials do not implicate every parameter. A run that was stopped has had less
    time to train: its log-odds are lower by a slope times 1 - u.
    """
    if not attempts.failed.any():
        return None
    sizes = _sizes(bases)
    functions, dimensions = sum(sizes), len(bases)
    owner, first = np.repeat(np.arange(dimensions), sizes), np.concatenate([[0], np.cumsum(sizes)[:-1]])
    spectra = [base.variances[:size] ** TILT for base, size in zip(bases, sizes, strict=True)]
    shape = np.concatenate([np.sqrt(spectrum / spectrum.sum()) for spectrum in spectra])
    columns, early = _design(bases, attempts.x)[:, 1:] * shape, 1 - attempts.u
    trained, failed = attempts.trained, attempts.failed

    def parts(state: Array) -> tuple[float, Array, Array, float]:
        """Intercept, scale of every function, its weight, and slope: all standard normal in the state."""
        scales = np.exp(np.clip(math.log(MEDIAN_SCALE) + SPREAD * state[1 + functions : -1], -20, 5))[owner]
        return 2 + 2 * state[0], scales, scales * state[1 : 1 + functions], math.exp(min(0.5 + 0.7 * state[-1], 5))

    def density(state: Array) -> tuple[float, Array]:
        intercept, scales, weights, slope = parts(state)
        odds = intercept + columns @ weights - slope * early
        yes, no = -np.logaddexp(0, -odds), -np.logaddexp(0, odds)  # log probabilities
        pull = trained * np.exp(no) - failed * np.exp(yes)  # derivative in the log-odds
        by_function = columns.T @ pull
        by_scale = SPREAD * np.add.reduceat(by_function * weights, first)
        gradient = np.concatenate([[2 * pull.sum()], by_function * scales, by_scale, [-0.7 * slope * (pull @ early)]])
        return float(trained @ yes + failed @ no - 0.5 * state @ state), gradient - state

    size = 2 + functions + dimensions
    modes = find_modes(density, list(rng.standard_normal((STARTS, size))), np.ones(size))
    chains = [Chain(density, modes, k, child, step=0.3, leaps=12) for k, child in enumerate(rng.spawn(CHAINS))]
    ends = block_diag(*(base(np.array([0.0, 1.0]))[:, :size] for base, size in zip(bases, sizes, strict=True))) * shape

    def at_ends(path: Array) -> Array:
        return np.array([ends @ parts(state)[2] for state in path[:: len(path) // 200]])

    paths = run_until_settled(chains, STEPS // 4, STEPS, rounds, at_ends)
    chosen = np.linspace(0, paths.shape[1] - 1, math.ceil(draws / CHAINS)).astype(int)
    every = [parts(state) for state in np.concatenate(paths[:, chosen])]
    return Training(tuple(bases), np.stack([np.concatenate([[c], shape * weights]) for c, _, weights, _ in every]))


def _sizes(bases: Sequence[Basis]) -> list[int]:
    return [min(len(base.variances), FUNCTIONS) for base in bases]


def _design(bases: Sequence[Basis], x: Array) -> Array:
    """Intercept and columns of the model at coordinates (N, D) -> (N, 1 + functions)."""
    per = [base(x[:, i])[:, :size] for i, (base, size) in enumerate(zip(bases, _sizes(bases), strict=True))]
    return np.concatenate([np.ones((len(x), 1)), *per], axis=1)
