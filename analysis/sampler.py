"""Sampling of hyperparameters: elliptical slice sampling around a Laplace approximation (Nishihara et al. 2014)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from arviz_stats.base import array_stats  # pyright: ignore[reportPrivateImportUsage]
from scipy.optimize import minimize
from torch import Tensor

from ramcore.space import Array

LogDensity = Callable[[Tensor], Tensor]  # (H,) -> (), up to a constant


def find_mode(log_density: LogDensity, start: Tensor, iterations: int) -> Tensor:
    """The most probable point, by L-BFGS."""

    def objective(values: Array) -> tuple[float, Array]:
        theta = torch.tensor(values, requires_grad=True)
        loss = -log_density(theta)
        if not bool(torch.isfinite(loss)):
            return 1e10, np.zeros_like(values)
        (gradient,) = torch.autograd.grad(loss, theta)
        return float(loss.detach()), gradient.numpy()

    options = {"maxiter": iterations, "ftol": 1e-7}
    found = minimize(objective, start.numpy(), jac=True, method="L-BFGS-B", options=options)
    return torch.tensor(found.x)


def laplace_factor(log_density: LogDensity, mode: Tensor, scale: Tensor) -> Tensor:
    """Cholesky factor (H, H) of the Laplace approximation's covariance, between a 20th and all of the prior's `scale`
    wide.
    """
    size, step = len(mode), 1e-3

    def gradient(theta: Tensor) -> Tensor:
        theta = theta.clone().requires_grad_(True)
        return torch.autograd.grad(-log_density(theta), theta)[0]

    columns = []
    for i in range(size):
        shift = torch.zeros(size, dtype=torch.float64)
        shift[i] = step * scale[i]
        columns.append((gradient(mode + shift) - gradient(mode - shift)) / (2 * shift[i]))
    hessian = torch.stack(columns) * scale[:, None] * scale[None, :]
    values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.T))
    root = vectors * values.clamp(1.0, 400.0).rsqrt()[None, :]
    return torch.linalg.cholesky((scale[:, None] * root) @ (scale[:, None] * root).T * 1.3)


def sample_chain(log_density: LogDensity, mode: Tensor, factor: Tensor, steps: int, rng: np.random.Generator) -> Tensor:
    """A chain that starts near the mode -> (steps, H)."""
    root = factor.numpy()

    def residual(whitened: Array) -> float:
        with torch.no_grad():
            theta = mode + torch.as_tensor(root @ whitened)
            return float(log_density(theta)) + 0.5 * float(whitened @ whitened)

    state = 0.3 * rng.standard_normal(len(mode))
    value = residual(state)
    path: list[Tensor] = []
    for _ in range(steps):
        state, value = elliptical_step(state, value, residual, rng)
        path.append(mode + torch.as_tensor(root @ state))
    return torch.stack(path)


def elliptical_step(
    state: Array, value: float, log_likelihood: Callable[[Array], float], rng: np.random.Generator
) -> tuple[Array, float]:
    """One step of elliptical slice sampling under a standard normal prior: the new state and its log likelihood."""
    other = rng.standard_normal(len(state))
    threshold = value + math.log(rng.random())
    angle = rng.uniform(0, 2 * math.pi)
    low, high = angle - 2 * math.pi, angle
    while True:
        candidate = state * math.cos(angle) + other * math.sin(angle)
        proposed = log_likelihood(candidate)
        if proposed > threshold:
            return candidate, proposed
        low, high = (angle, high) if angle < 0 else (low, angle)
        angle = rng.uniform(low, high)


def diagnose(chains: list[Tensor]) -> tuple[float, float]:
    """The largest rank-normalised R-hat and the smallest bulk effective sample size of any hyperparameter."""
    values = torch.stack(chains).numpy()
    rhat = np.max(array_stats.rhat(values, chain_axis=0, draw_axis=1))
    return float(rhat), float(np.min(array_stats.ess(values, chain_axis=0, draw_axis=1)))
