"""A Bayesian logistic regression of the probability that a run fails or diverges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.basis import Basis
from analysis.sampler import elliptical_step
from ramcore.space import Array


class Failures(NamedTuple):
    """Posterior draws of the model: weights (S, 1 + functions), intercept first."""

    bases: tuple[Basis, ...]
    weights: Array
    failed: int
    trials: int

    def probability(self, x: Array) -> Array:
        """Probability of failure at coordinates (N, D) -> (N, S)."""
        return 1 / (1 + np.exp(-(_design(self.bases, x) @ self.weights.T)))

    def change(self, i: int, points: Array) -> Array:
        """Largest minus smallest probability over dimension i, averaged over the other coordinates of `points`;
        percentage points (S,).
        """
        rows = []
        for value in self.bases[i].dimension.grid(11):
            x = points.copy()
            x[:, i] = value
            rows.append(100 * self.probability(x).mean(axis=0))
        return np.max(rows, axis=0) - np.min(rows, axis=0)


def fit_failures(
    bases: Sequence[Basis], x: Array, failed: NDArray[np.bool_], draws: int, rng: np.random.Generator
) -> Failures | None:
    """Regress failure on each dimension's first two functions; None if nothing failed.

    x: unit coordinates (N, D); failed: (N,). Every dimension has its own scale, which is small unless the data ask
    for more, so that two failures in fifty trials do not implicate every parameter. Sampled by elliptical slice
    sampling (Murray et al. 2010): the prior is Gaussian in standardised weights and log scales.
    """
    if not failed.any():
        return None
    design = _design(bases, x)
    owner = np.repeat(np.arange(len(bases)), [min(len(base.variances), 2) for base in bases])
    size, burn, thin = design.shape[1] + len(bases), 600, 10
    signs = np.where(failed, 1.0, -1.0)

    def weights_of(state: Array) -> Array:
        scales = np.exp(math.log(0.2) + 1.4 * state[1 + len(owner) :])
        return np.concatenate([[-2.0 + 2.0 * state[0]], scales[owner] * state[1 : 1 + len(owner)]])

    def log_likelihood(state: Array) -> float:
        return -float(np.logaddexp(0.0, -signs * (design @ weights_of(state))).sum())

    state = np.zeros(size)
    value = log_likelihood(state)
    kept: list[Array] = []
    for step in range(burn + thin * draws):
        state, value = elliptical_step(state, value, log_likelihood, rng)
        if step >= burn and (step - burn) % thin == thin - 1:
            kept.append(weights_of(state))
    return Failures(tuple(bases), np.stack(kept), int(failed.sum()), len(failed))


def _design(bases: Sequence[Basis], x: Array) -> Array:
    """Intercept and columns of the model at coordinates (N, D) -> (N, 1 + functions); two levels have one column."""
    return np.concatenate([np.ones((len(x), 1)), *(base(x[:, i])[:, :2] for i, base in enumerate(bases))], axis=1)
