"""Sampling of hyperparameters that may have several modes.

Modes are sought from several starts. Around each lies a Laplace approximation. Chains mix two moves, which leave the
posterior unchanged: Hamiltonian Monte Carlo in the coordinates of one of the approximations (Neal 2011), and an
independence proposal from their mixture (Tierney 1994), by which a chain moves between modes. What else the density
depends on may be drawn in turns with them (Gibbs).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from arviz_stats.base import array_stats  # pyright: ignore[reportPrivateImportUsage]
from scipy.optimize import minimize
from torch import Tensor

from analysis.results import SETTLED
from ramcore.space import Array

One = TypeVar("One")
Other = TypeVar("Other")
Density = Callable[[Array], tuple[float, Array]]  # (H,) -> log density up to a constant, and its gradient (H,)

CHAINS = 4
FAR = 4.0  # nats below the best, beyond which a mode is left out
LEAST_SMOOTHED = 30  # draws, for a tail of importance weights to be smoothed
TAILS = 8.0  # degrees of freedom of the proposals
APART = 0.5  # prior standard deviations between two modes, root mean square, at least


class Mode(NamedTuple):
    """A mode and the Laplace approximation around it."""

    at: Array  # (H,)
    root: Array  # (H, H) Cholesky factor of the covariance
    log_weight: float  # of its share of the posterior, by the approximation; normalised over all modes


def differentiated(log_density: Callable[[Tensor], Tensor]) -> Density:
    """A log density that torch computes, with its gradient; minus infinity and zero where it is not finite."""

    def density(state: Array) -> tuple[float, Array]:
        theta = torch.tensor(state, requires_grad=True)
        value = log_density(theta)
        if not bool(torch.isfinite(value)):
            return -math.inf, np.zeros_like(state)
        (gradient,) = torch.autograd.grad(value, theta)
        return float(value.detach()), gradient.numpy()

    return density


def find_mode(density: Density, start: Array, iterations: int) -> tuple[Array, float]:
    """The most probable point, by L-BFGS, and its log density."""

    def objective(state: Array) -> tuple[float, Array]:
        value, gradient = density(state)
        return (-value, -gradient) if math.isfinite(value) else (1e10, gradient)

    options = {"maxiter": iterations, "ftol": 1e-7}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return found.x, -float(found.fun)


def find_modes(density: Density, starts: Sequence[Array], scale: Array) -> list[Mode]:
    """The distinct modes that are reached from the starts, best first; those FAR below the best are left out.

    scale: (H,) standard deviations of the prior, by which modes are told apart.
    """
    found: list[tuple[Array, float]] = []
    for iterations, distance in ((30, 8 * FAR), (100, FAR)):  # roughly first, and only what may be a mode to the end
        points = [at for at, _ in found] if found else starts
        found = at_once(lambda at, most=iterations: find_mode(density, at, most), points)
        found.sort(key=lambda mode: -mode[1])
        kept: list[tuple[Array, float]] = []
        for at, value in found:
            apart = all(float(np.mean(((at - other) / scale) ** 2)) > APART**2 for other, _ in kept)
            if apart and value > found[0][1] - distance and len(kept) < CHAINS:
                kept.append((at, value))
        found = kept
    roots = at_once(lambda mode: laplace_factor(density, mode[0], scale), found)
    weights = [value + float(np.log(root.diagonal()).sum()) for (_, value), root in zip(found, roots, strict=True)]
    total = _log_sum(weights)
    return [Mode(at, root, w - total) for (at, _), root, w in zip(found, roots, weights, strict=True)]


def laplace_factor(density: Density, mode: Array, scale: Array) -> Array:
    """Cholesky factor (H, H) of the Laplace approximation's covariance, between a 20th and all of the prior's `scale`
    wide.
    """
    shifts = 1e-3 * np.diag(scale)
    slopes = [(density(mode - shift)[1] - density(mode + shift)[1]) / 2e-3 for shift in shifts]  # per unit of scale
    hessian = np.stack(slopes) * scale[None, :]
    values, vectors = np.linalg.eigh(0.5 * (hessian + hessian.T))
    root = scale[:, None] * vectors / np.sqrt(np.clip(values, 1.0, 400.0))[None, :]
    return np.asarray(np.linalg.cholesky(root @ root.T * 1.2), dtype=float)


def _log_sum(logs: Sequence[float]) -> float:
    """Logarithm of the sum of exponentials."""
    return float(np.logaddexp.reduce(logs))


class Chain:
    """A chain over the modes' mixture; `run` continues it."""

    def __init__(
        self,
        density: Density,
        modes: Sequence[Mode],
        number: int,
        rng: np.random.Generator,
        *,
        step: float = 0.65,
        leaps: int = 6,
        redraw: Callable[[Array], Array] = lambda state: np.empty(0),
    ) -> None:
        """Start near a mode that the chain's number picks.

        step: of Hamiltonian Monte Carlo, in standard deviations; leaps: how many a trajectory has at most; redraw: from
        the state (H,), draws what else the density depends on (K,), after every step.
        """
        self._density, self._modes, self._rng, self._step, self._leaps = density, modes, rng, step, leaps
        self._redraw = redraw
        self._shares = np.exp([mode.log_weight for mode in modes])
        self._shares = self._shares / self._shares.sum()
        self._inverses = [np.linalg.inv(mode.root) for mode in modes]
        mode = modes[number % len(modes)]
        for width in (1.0, 0.3, 0.0):  # a start where the density is finite
            self._state = mode.at + width * mode.root @ rng.standard_normal(len(mode.at))
            self._value, self._slope = density(self._state)
            if math.isfinite(self._value):
                break

    def run(self, steps: int) -> Array:
        """The next states, each with what was redrawn (steps, H + K)."""
        path = []
        for _ in range(steps):
            self._jump()
            self._glide(self._pick())
            if len(also := self._redraw(self._state)):
                self._value, self._slope = self._density(self._state)
            path.append(np.concatenate([self._state, also]))
        return np.stack(path)

    def _pick(self) -> int:
        return int(self._rng.choice(len(self._modes), p=self._shares))

    def _jump(self) -> None:
        """Propose a point of the mixture, whatever the state."""
        mode = self._modes[self._pick()]
        stretch = math.sqrt(TAILS / self._rng.chisquare(TAILS))
        candidate = mode.at + stretch * mode.root @ self._rng.standard_normal(len(mode.at))
        value, slope = self._density(candidate)
        gain = value - self._value + self._log_proposal(self._state) - self._log_proposal(candidate)
        if math.log(self._rng.random()) < gain:
            self._state, self._value, self._slope = candidate, value, slope

    def _log_proposal(self, state: Array) -> float:
        size, logs = len(state), []
        for mode, inverse in zip(self._modes, self._inverses, strict=True):
            z = inverse @ (state - mode.at)
            fall = -0.5 * (TAILS + size) * math.log1p(float(z @ z) / TAILS)
            logs.append(mode.log_weight + fall - float(np.log(mode.root.diagonal()).sum()))
        return _log_sum(logs)

    def _glide(self, number: int) -> None:
        """One trajectory of leapfrog steps, of random length, in the coordinates of a mode."""
        root, rng = self._modes[number].root, self._rng
        momentum = rng.standard_normal(len(self._state))
        energy = self._value - 0.5 * float(momentum @ momentum)
        state, value, slope = self._state, self._value, self._slope
        size = self._step * rng.uniform(0.6, 1.1)
        for _ in range(rng.integers(self._leaps // 2, self._leaps + 1)):
            momentum = momentum + 0.5 * size * root.T @ slope
            state = state + size * root @ momentum
            value, slope = self._density(state)
            if not math.isfinite(value):
                return
            momentum = momentum + 0.5 * size * root.T @ slope
        if math.log(rng.random()) < value - 0.5 * float(momentum @ momentum) - energy:
            self._state, self._value, self._slope = state, value, slope


def run_until_settled(
    chains: Sequence[Chain], burn: int, steps: int, rounds: int, reported: Callable[[Array], Array]
) -> Array:
    """The states of the chains after the first `burn`: `steps` of each, and then as many again as there are, at most
    rounds - 1 times, until R-hat of what is reported is at most SETTLED -> (chains, steps or more, H + K).

    reported: from the states of a chain (N, H + K) to quantities (N', K).
    """

    def run(steps: int) -> Array:
        return np.stack(at_once(lambda chain: chain.run(steps), chains))

    run(burn)
    paths = run(steps)
    for _ in range(rounds - 1):
        if diagnose(np.stack([reported(path) for path in paths]))[0] <= SETTLED:
            break
        paths = np.concatenate([paths, run(paths.shape[1])], axis=1)
    return paths


def at_once(work: Callable[[One], Other], on: Sequence[One]) -> list[Other]:
    """The work on each, a thread for every core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, on))


def weights_without(log_density: Array) -> Array:
    """Weights of S draws for N observations, each as if the observation had been left out: (S, N) -> (S, N).

    log_density: of each observation, by each draw.
    """
    plain = np.exp(np.min(log_density, axis=0) - log_density)
    if len(log_density) < LEAST_SMOOTHED:
        return plain / plain.sum(axis=0)
    varies = np.ptp(log_density, axis=0) > 1e-9  # the smoothing cannot take draws that all say the same
    weights = np.full_like(log_density, 1 / len(log_density))
    with np.errstate(all="ignore"):  # a tail that cannot be smoothed gives weights that are not finite
        weights[:, varies] = np.exp(array_stats.psislw(log_density[:, varies], axis=0)[0]).T
    weights = np.where(np.isfinite(weights).all(axis=0), weights, plain)
    return weights / weights.sum(axis=0)


def diagnose(draws: Array) -> tuple[float, float]:
    """The largest rank-normalised split R-hat and the smallest bulk effective sample size of K quantities.

    draws: (chains, draws, K). Quantities that are the same in every draw are left out.
    """
    draws = draws[:, :, np.ptp(draws, axis=(0, 1)) > 0]
    if not draws.shape[2]:
        return 1.0, float(draws.shape[0] * draws.shape[1])
    rhat = np.max(array_stats.rhat(draws, chain_axis=0, draw_axis=1))
    return float(rhat), float(np.min(array_stats.ess(draws, chain_axis=0, draw_axis=1)))
