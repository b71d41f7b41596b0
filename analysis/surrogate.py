"""The Gaussian process over (configuration, epoch) that answers about runs that train are drawn from.

Model, on the logit of validation accuracy, u = log(epoch) / log(full budget) in [0, 1]:

    y(trial, seed, u) = m(u) + f(x, u) + b(trial) + s(trial, seed, u) + e(trial, seed, epoch)

f is a sum of components, one for every set of one, two or three dimensions, each with mean zero over the dimensions it
holds (a functional ANOVA, so variances of components are Sobol indices without Monte Carlo). A component is a product
of basis functions with independent Gaussian weights; the weights move smoothly with u. b is the trial effect: the part
of a trial that the smooth surface does not explain. s is the seed noise, which lasts over epochs, and e the epoch
noise. All three may be larger where accuracy is low, and the seed noise has heavy tails (`analysis.tails`). The
differences between the seeds of a trial enter the likelihood exactly, so seed noise is measured.

No hyperparameter is fixed at an estimate: they are sampled (`analysis.sampler`), in turns with the trials' scales of
noise, and each draw of them gives joint posterior draws of all weights (Matheron's rule). A trial is predicted without
itself from the same draws, exactly for each of them and reweighted between them.

Sources: Marrel et al. 2009 and Le Gratiet et al. 2014 (Sobol indices on posterior draws), Durrande et al. 2013 (ANOVA
kernels), Wilson et al. 2020 (Matheron's rule), Rasmussen and Williams 2006, 5.4.2 (leaving rows out), Vehtari et al.
2024 (Pareto-smoothed importance weights).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.basis import MAIN, basis
from analysis.observations import Observations
from analysis.sampler import (
    CHAINS,
    Chain,
    Mode,
    at_once,
    differentiated,
    find_modes,
    run_until_settled,
    weights_without,
)
from analysis.tails import SCALES, Tails
from ramcore.space import Array, Dimension

PAIR, TRIPLE = 6, 3  # basis functions a dimension in components of two and three dimensions; MAIN in those of one
JITTER = 1e-6
STARTS = 8  # of the search for modes
BURN = 8  # first steps of a chain, which are left out
SAMPLED = 300  # trials that hyperparameters are sampled on, if there are more: time grows with the cube of the rows
MOST_ROUNDS = 3  # of sampling, where there are more
LEAST_STEPS = 20  # of a chain, whatever the number of draws that are asked for

# Hyperparameters that belong to no dimension: prior mean and standard deviation, for y scaled to unit variance. All but
# the three slopes are logarithms.
SHARED = {
    "interaction": (math.log(0.35), 0.8),  # a pair has about a third of the variance its two weights alone would give
    "memory": (math.log(1.0), 0.5),  # length scale of the surface in u
    "slope": (0.3, 0.7),  # change of the surface's size with u
    "seed_noise": (-1.6, 1.0),  # standard deviation at u = 1 and mean accuracy
    "epoch_noise": (-2.0, 1.0),  # standard deviation at u = 1 and mean accuracy
    "trial_effect": (-2.5, 1.0),  # standard deviation at mean accuracy
    "noise_slope": (0.0, 0.5),  # change of seed and epoch noise with u
    "noise_level": (-0.2, 0.4),  # change of all noise with the scaled accuracy
    "seed_memory": (0.7, 1.0),  # length scale of the seed noise in u
}


class HeldOut(NamedTuple):
    """The last row of each trial, predicted without that trial, in logits, (T,) each."""

    mean: Array
    sd: Array  # of the prediction of the row, noise counted
    noise: Array  # of seed and epoch noise alone


class Posterior(NamedTuple):
    """Joint draws of the surface: S draws of P weights at E epochs, the same number for each draw of hyperparameters.

    weights: (S, P, E); level: (S, E), the mean over all configurations; theta: (S / draws each, H) hyperparameters, a
    chain's after another's; modes: how many were found.
    """

    weights: Array
    level: Array
    theta: Array
    modes: int
    held_out: HeldOut


class Surface:
    """The process for a fixed list of D dimensions: its features, its likelihood, its draws.

    Hyperparameters theta, in this order: log weight of each dimension (D), log roughness of each (D), then SHARED.
    Their priors are Gaussian (`prior_mean`, `prior_sd`).
    """

    def __init__(self, dimensions: Sequence[Dimension]) -> None:
        self.bases = [basis(d) for d in dimensions]
        self.size = len(self.bases)
        d = self.size
        self.pairs = list(itertools.combinations(range(d), 2))
        self.triples = list(itertools.combinations(range(d), 3))
        # Weights: most dimensions matter little (median share 4% of the variance each), any may matter a lot.
        means, sds = zip(*SHARED.values(), strict=True)
        self.prior_mean = torch.tensor([math.log(0.06)] * d + [0.0] * d + list(means), dtype=torch.float64)
        self.prior_sd = torch.tensor([1.6] * d + [0.8] * d + list(sds), dtype=torch.float64)

        padded = [
            np.pad(np.log(base.variances), (0, MAIN - len(base.variances)), constant_values=-1e4) for base in self.bases
        ]
        self._log_variances = torch.as_tensor(np.stack(padded))
        products = self._feature_products()
        self.groups = [tuple(dimension for dimension, _ in product) for product in products]  # dimensions, by feature
        self.member = np.array([[float(i in group) for i in range(d)] for group in self.groups])  # (P, D)
        # Which function of each dimension a feature has; -1 for none (P, D)
        self._function = np.array([[dict(product).get(i, -1) for i in range(d)] for product in products])
        self._factors = torch.stack([_count(product, d) for product in products])  # (P, D * MAIN)
        self._orders = torch.as_tensor(self.member.sum(axis=1) - 1)

    def _feature_products(self) -> list[tuple[tuple[int, int], ...]]:
        """For each of the P features, the functions that it is the product of, as (dimension, number)."""
        sizes = [len(base.variances) for base in self.bases]
        found = []
        for most, sets in ((MAIN, [(i,) for i in range(self.size)]), (PAIR, self.pairs), (TRIPLE, self.triples)):
            for one in sets:
                numbers = itertools.product(*(range(min(sizes[i], most)) for i in one))
                found += [tuple(zip(one, number, strict=True)) for number in numbers]
        return found

    def _shared(self, theta: Tensor, name: str) -> Tensor:
        """One of the hyperparameters in SHARED."""
        return theta[2 * self.size + list(SHARED).index(name)]

    # ---- features: weights <-> values -------------------------------------------------------------------------

    def features(self, x: Array) -> Array:
        """All P basis products at coordinates (N, D) -> (N, P): mains, then pairs, then triples."""
        return self._products([base(x[:, i]) for i, base in enumerate(self.bases)])

    def _products(self, per: list[Array]) -> Array:
        """The products of functions that are given for each dimension, (N, M) each -> (N, P)."""
        pairs, triples = ([functions[:, :most] for functions in per] for most in (PAIR, TRIPLE))
        parts = [_outer(pairs[i], pairs[j]) for i, j in self.pairs]
        parts += [_outer(_outer(triples[i], triples[j]), triples[k]) for i, j, k in self.triples]
        return np.concatenate(per + parts, axis=1)

    def along(self, x: Array, i: int, weights: Array) -> Array:
        """What the surface is along dimension i from the other coordinates of x (N, D), for weights (P, S).

        Returns (1 + M, N, S): the part that does not depend on i, and the factor of each of its M functions.
        """
        per = [base(x[:, j]) for j, base in enumerate(self.bases)]
        rows = self._products([np.ones_like(p) if j == i else p for j, p in enumerate(per)])
        number = self._function[:, i]
        return np.stack([rows[:, number == m] @ weights[number == m] for m in range(-1, per[i].shape[1])])

    def _log_spectra(self, theta: Tensor) -> Tensor:
        """Logarithm of every function's prior variance in the component of its own dimension -> (D * MAIN,)."""
        weight, rough = theta[: self.size, None], torch.exp(theta[self.size : 2 * self.size, None])
        tilted = self._log_variances / rough
        return (weight + tilted - torch.logsumexp(tilted, dim=1, keepdim=True)).flatten()

    def variances(self, theta: Tensor) -> Tensor:
        """Prior variance of every weight at the full budget -> (P,)."""
        return torch.exp(self._factors @ self._log_spectra(theta) + self._orders * self._shared(theta, "interaction"))

    # ---- likelihood ------------------------------------------------------------------------------------------

    def _surface_kernel(self, theta: Tensor, powers: list[_Powers]) -> Tensor:
        """Covariance of f between trials (T, T).

        The sums over all products of two and of three different kernels follow from sums of powers of the kernels
        (Newton's identities), and these are products of matrices: no pair is listed.
        """
        eta, spectra = torch.exp(self._shared(theta, "interaction")), self._log_spectra(theta)
        one, two, three = (part.sums(spectra) for part in powers)
        pairs = 0.5 * (two[0] ** 2 - two[1])
        triples = (three[0] ** 3 - 3 * three[0] * three[1] + 2 * three[2]) / 6
        return one[0] + eta * pairs + eta**2 * triples

    def _time_kernel(self, theta: Tensor, u: Tensor) -> Tensor:
        length, slope = torch.exp(self._shared(theta, "memory")), self._shared(theta, "slope")
        distance = _matern((u[:, None] - u[None, :]).abs() / length)
        return torch.exp(slope * (u - 1))[:, None] * torch.exp(slope * (u - 1))[None, :] * distance

    def _level_kernel(self, theta: Tensor, u: Tensor) -> Tensor:
        length = torch.exp(self._shared(theta, "memory"))
        return 4.0 + 4.0 * _matern((u[:, None] - u[None, :]).abs() / length)

    def _noise(self, theta: Tensor, u: Tensor, y: Tensor) -> _Noise:
        """Standard deviations at u of a trial whose scaled accuracy ends at y.

        It is not the accuracy at u: noise that follows the curve itself could explain the whole curve.
        """
        level = torch.exp(self._shared(theta, "noise_level") * y)
        change = level * torch.exp(self._shared(theta, "noise_slope") * (1 - u))
        return _Noise(
            torch.exp(self._shared(theta, "seed_noise")) * change,
            torch.exp(self._shared(theta, "epoch_noise")) * change,
            torch.exp(self._shared(theta, "trial_effect")) * level,
        )

    def _seed_memory(self, theta: Tensor, u: Tensor) -> Tensor:
        """Correlation of a seed's noise between u (..., B) -> (..., B, B)."""
        apart = (u[..., :, None] - u[..., None, :]).abs()
        return torch.exp(-apart / torch.exp(self._shared(theta, "seed_memory")))

    def _noise_kernel(self, theta: Tensor, data: _Tensors, *, trial_effect: bool = True) -> Tensor:
        """Covariance of rows beyond the surface; only rows of one trial share any."""
        noise = self._noise(theta, data.u, data.noise_y)
        seed = noise.seed * data.seeds.rsqrt() * data.scale_of_noise[data.trial_of]
        shared = seed[:, None] * seed[None, :] * (data.time @ self._seed_memory(theta, data.times) @ data.time.T)
        if trial_effect:
            shared = shared + noise.trial[:, None] * noise.trial[None, :]
        return shared * data.same + torch.diag(noise.epoch**2 / (data.seeds * data.epochs) + JITTER)

    def covariance(self, theta: Tensor, data: _Tensors) -> Tensor:
        """Covariance of the rows, (N, N)."""
        surface = self._surface_kernel(theta, data.powers)
        if data.trial is not None:
            surface = data.trial @ surface @ data.trial.T
        time = data.time @ self._time_kernel(theta, data.times) @ data.time.T
        level = data.time @ self._level_kernel(theta, data.times) @ data.time.T
        return surface * time + level + self._noise_kernel(theta, data)

    def log_posterior(self, theta: Tensor, data: _Tensors) -> Tensor:
        """Log density of the hyperparameters given the rows and the seeds' contrasts, up to a constant."""
        prior = -0.5 * (((theta - self.prior_mean) / self.prior_sd) ** 2).sum()
        fit = _LogDensity.apply(self.covariance(theta, data), data.y)
        if len(data.contrast_df):
            scale = torch.where(data.contrast_trial >= 0, data.scale_of_noise[data.contrast_trial], 1.0)
            fit = fit + self._contrast_likelihood(theta, data, scale).sum()
        return prior + fit

    def _contrast_likelihood(self, theta: Tensor, data: _Tensors, scale: Tensor) -> Tensor:
        """Log density of each trial's contrasts, for scales of its seed noise (..., C) -> (..., C)."""
        here = data.contrast_epochs > 0
        noise = self._noise(theta, data.contrast_u, data.contrast_y)
        memory = self._seed_memory(theta, data.contrast_u)
        both = here[:, :, None] & here[:, None, :]
        cov = torch.where(both, noise.seed[:, :, None] * noise.seed[:, None, :] * memory, 0.0)
        own = torch.where(here, noise.epoch**2 / data.contrast_epochs.clamp_min(1) + JITTER, 1.0)
        fit, logdet = _quadratic(scale[..., None, None] ** 2 * cov + torch.diag_embed(own), data.contrast_outer)
        return -0.5 * (data.contrast_df * logdet + fit)

    def _noise_likelihood(self, theta: Tensor, data: _Tensors, noise: Tensor) -> Tensor:
        """Log density of each trial's noise, for each of SCALES: noise (N,) and the contrasts -> (SCALES, T)."""
        at, here = data.rows_of.clamp_min(0), data.rows_of >= 0
        both = here[:, :, None] & here[:, None, :]
        sd = self._noise(theta, data.u, data.noise_y)
        seed = (sd.seed * data.seeds.rsqrt())[at]
        cov = torch.where(both, seed[:, :, None] * seed[:, None, :] * self._seed_memory(theta, data.u[at]), 0.0)
        shared = torch.where(both, sd.trial[at][:, :, None] * sd.trial[at][:, None, :], 0.0)
        own = torch.where(here, (sd.epoch**2 / (data.seeds * data.epochs) + JITTER)[at], 1.0)
        rows = torch.where(here, noise[at], 0.0)
        outer = rows[:, :, None] * rows[:, None, :]
        fit, logdet = _quadratic(SCALES[:, None, None, None] ** 2 * cov + shared + torch.diag_embed(own), outer)
        found = -0.5 * (logdet + fit)
        if len(data.contrast_df):
            contrasts = self._contrast_likelihood(theta, data, SCALES[:, None])
            keep = data.contrast_trial >= 0
            found = found.index_add(1, data.contrast_trial[keep], contrasts[:, keep])
        return found

    # ---- sampling --------------------------------------------------------------------------------------------

    def sample(
        self,
        observations: Observations,
        at: Array,
        *,
        hyperdraws: int,
        draws_each: int,
        rng: np.random.Generator,
        rounds: int = 1,
    ) -> Posterior:
        """Posterior draws at u = `at`, in logits.

        The chains are doubled, at most rounds - 1 times, until the dimensions' shares of the variance have settled.
        """
        data = part = self._prepare(observations)
        if len(observations.trials) > SAMPLED:
            rounds = min(rounds, MOST_ROUNDS)
            chosen = np.sort(rng.permutation(len(observations.trials))[:SAMPLED])
            part = self._prepare(observations.subset(chosen))
        mean, sd = self.prior_mean.numpy(), self.prior_sd.numpy()
        starts = [mean, *(mean + sd * rng.standard_normal((STARTS - 1, len(mean))))]
        modes = find_modes(differentiated(lambda theta: self.log_posterior(theta, part)), starts, sd)
        kept = math.ceil(hyperdraws / CHAINS)
        chains = [self._chain(part, modes, k, child) for k, child in enumerate(rng.spawn(CHAINS))]
        paths = run_until_settled(chains, BURN, max(kept, LEAST_STEPS), rounds, self._prior_shares)
        states = paths[:, np.linspace(0, paths.shape[1] - 1, kept).astype(int)]
        known, rngs = part is data, rng.spawn(CHAINS)
        parts = at_once(
            lambda k: self._draw_all(states[k], data, torch.as_tensor(at), draws_each, rngs[k], known=known),
            range(CHAINS),
        )
        weights = np.concatenate([one for part in parts for one in part[0]]) * data.scale
        level = np.concatenate([one for part in parts for one in part[1]]) * data.scale + data.centre
        without = [one for part in parts for one in part[2]]
        theta = np.concatenate(states)[:, : len(mean)]
        return Posterior(weights, level, theta, len(modes), _held_out(without, data))

    def _draw_all(
        self, states: Array, data: _Tensors, at: Tensor, each: int, rng: np.random.Generator, *, known: bool
    ) -> tuple[list[Array], list[Array], list[tuple[Array, ...]]]:
        """For each of a chain's states: joint draws of weights and of level, and every trial without itself.

        known: whether the states hold the scales of these trials' noise; if not, they are drawn in turns.
        """
        tails = Tails(len(data.features))
        weights, level, without = [], [], []
        with torch.no_grad():
            for state in torch.as_tensor(states):
                theta, scale = state[: len(self.prior_mean)], state[len(self.prior_mean) :]
                if known:
                    tails.scale = scale
                else:
                    self._redraw(theta, data, tails, rng)
                scaled = data._replace(scale_of_noise=tails.scale)
                factor = torch.linalg.cholesky(self.covariance(theta, scaled))
                one, its_level = self._draw(theta, scaled, factor, at, each, rng)
                weights.append(one)
                level.append(its_level)
                without.append(self._without_each(theta, scaled, factor))
        return weights, level, without

    def _chain(self, data: _Tensors, modes: Sequence[Mode], number: int, rng: np.random.Generator) -> Chain:
        """A chain of states (H + T,): hyperparameters, and after each of its steps the trials' scales of noise."""
        tails = Tails(len(data.features))

        def density(theta: Tensor) -> Tensor:
            return self.log_posterior(theta, data._replace(scale_of_noise=tails.scale))

        def redraw(theta: Array) -> Array:
            with torch.no_grad():
                self._redraw(torch.as_tensor(theta), data, tails, rng)
            return tails.scale.numpy()

        return Chain(differentiated(density), modes, number, rng, redraw=redraw)

    def _redraw(self, theta: Tensor, data: _Tensors, tails: Tails, rng: np.random.Generator) -> None:
        """Draw the trials' scales of noise, given hyperparameters and rows."""
        noise = self._draw_noise(theta, data._replace(scale_of_noise=tails.scale), rng)
        tails.redraw(self._noise_likelihood(theta, data, noise), rng)

    def _prior_shares(self, states: Array) -> Array:
        """Total Sobol indices that states (N, H + T) of a chain expect -> (N, D)."""
        with torch.no_grad():
            power = np.stack([self.variances(one).numpy() for one in torch.as_tensor(states)])
        return power @ self.member / power.sum(axis=1)[:, None]

    def _draw(
        self, theta: Tensor, data: _Tensors, factor: Tensor, at: Tensor, count: int, rng: np.random.Generator
    ) -> tuple[Array, Array]:
        """Joint draws of weights and level at `at` (E,) given hyperparameters -> (count, P, E), (count, E).

        factor: of the rows' covariance.
        """
        times, where = torch.unique(torch.cat([at, data.times]), return_inverse=True)
        at_index, row_index = where[: len(at)], where[len(at) :][data.time.argmax(dim=1)]
        variances = self.variances(theta)
        time, level = self._time_kernel(theta, times), self._level_kernel(theta, times)
        noise_factor = torch.linalg.cholesky(self._noise_kernel(theta, data))
        weights, levels = [], []
        for _ in range(count):
            prior, prior_level = self._draw_prior(theta, times, rng)
            rows = (data.features @ prior)[data.trial_of, row_index] + prior_level[row_index]
            rows = rows + noise_factor @ torch.as_tensor(rng.standard_normal(len(data.y)))
            pull = torch.cholesky_solve((data.y - rows)[:, None], factor)[:, 0]
            reach = time[at_index][:, row_index] * pull[None, :]  # (E, N)
            by_trial = torch.zeros((len(at), len(data.features)), dtype=torch.float64)
            by_trial.index_add_(1, data.trial_of, reach)
            weights.append((prior[:, at_index] + variances[:, None] * (data.features.T @ by_trial.T)).numpy())
            levels.append((prior_level[at_index] + level[at_index][:, row_index] @ pull).numpy())
        return np.stack(weights), np.stack(levels)

    def _draw_prior(self, theta: Tensor, times: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A draw of weights and level at the times (U,), before any data -> (P, U), (U,)."""
        identity = 1e-8 * torch.eye(len(times), dtype=torch.float64)
        time, level = self._time_kernel(theta, times), self._level_kernel(theta, times)
        normal = torch.as_tensor(rng.standard_normal((len(self.groups), len(times))))
        weights = self.variances(theta).sqrt()[:, None] * normal
        weights = weights @ torch.linalg.cholesky(time + identity * time.diagonal().max()).T
        return weights, torch.linalg.cholesky(level + identity) @ torch.as_tensor(rng.standard_normal(len(times)))

    def _draw_noise(self, theta: Tensor, data: _Tensors, rng: np.random.Generator) -> Tensor:
        """A joint draw of what the rows are beyond surface and level -> (N,)."""
        weights, level = self._draw_prior(theta, data.times, rng)
        index, noise = data.time.argmax(dim=1), self._noise_kernel(theta, data)
        rows = (data.features @ weights)[data.trial_of, index] + level[index]
        drawn = torch.linalg.cholesky(noise) @ torch.as_tensor(rng.standard_normal(len(data.y)))
        factor = torch.linalg.cholesky(self.covariance(theta, data))
        return drawn + noise @ torch.cholesky_solve((data.y - rows - drawn)[:, None], factor)[:, 0]

    def left(self, theta: Array, observations: Observations, of: Array) -> tuple[Array, Array]:
        """Variance of linear functions of the weights at the full budget, before and after these rows are seen.

        What a Gaussian process will not know does not depend on what is measured, only on where. theta: hyperparameters
        (S, H); of: coefficients, the same for all of these (K, P) or not (S, K, P) -> (S, K) and (S, K), in logits
        squared.
        """
        data, before, known = self._prepare(observations), [], []
        coefficients = torch.as_tensor(of).expand(len(theta), -1, -1)
        with torch.no_grad():
            for one, wanted in zip(torch.as_tensor(theta), coefficients, strict=True):
                scaled = wanted * self.variances(one)
                time = self._time_kernel(one, torch.cat([torch.ones(1, dtype=torch.float64), data.u]))[0]
                reach = (scaled @ data.features.T)[:, data.trial_of] * time[1:]
                factor = torch.linalg.cholesky(self.covariance(one, data))
                known.append((torch.linalg.solve_triangular(factor, reach.T, upper=False) ** 2).sum(dim=0))
                before.append((scaled * wanted).sum(dim=1) * time[0])
        all_of_it, seen = (torch.stack(part).numpy() * data.scale**2 for part in (before, known))
        return all_of_it, all_of_it - seen

    def explained(self, theta: Array, observations: Observations, points: Array) -> float:
        """Expected R2 over the space after these rows: a mean over hyperparameters (S, H), at points (N, D)."""
        before, after = self.left(theta, observations, self.features(points))
        return float(np.mean(1 - after.sum(axis=1) / before.sum(axis=1)))

    def _without_each(self, theta: Tensor, data: _Tensors, factor: Tensor) -> tuple[Array, Array, Array, Array]:
        """For every trial, given hyperparameters: mean and variance of its last row without the trial, the part of the
        variance that is seed and epoch noise, and the log density of all its rows; scaled, (T,) each.

        factor: of the rows' covariance.
        """
        inverse = torch.cholesky_inverse(factor)
        noise = self._noise_kernel(theta, data, trial_effect=False).diagonal()
        pull = inverse @ data.y
        block, here = data.rows_of, data.rows_of >= 0
        at = block.clamp_min(0)
        both = here[:, :, None] & here[:, None, :]
        precision = torch.where(both, inverse[at[:, :, None], at[:, None, :]], 0.0)
        precision = precision + torch.diag_embed((~here).double())
        covariance = torch.linalg.inv(precision)
        apart = (covariance @ torch.where(here, pull[at], 0.0)[:, :, None])[:, :, 0]  # rows less their predictions
        last = here.sum(1) - 1
        trials = torch.arange(len(block))
        own = at[trials, last]
        fit = (apart[:, None, :] @ precision @ apart[:, :, None])[:, 0, 0]
        log_density = 0.5 * torch.logdet(precision) - 0.5 * fit
        mean = data.y[own] - apart[trials, last]
        parts = (mean, covariance[trials, last, last], noise[own], log_density)
        return tuple(part.numpy() for part in parts)  # pyright: ignore[reportReturnType]

    def _prepare(self, observations: Observations) -> _Tensors:
        """Observations as tensors, y scaled to mean 0 and variance 1 (undone by `sample`)."""
        y, contrasts = observations.y, observations.contrasts
        centre, scale = float(y.mean()), float(y.std()) or 1.0
        trial_of = torch.tensor(observations.trial_of)
        times, time_of = torch.unique(torch.tensor(observations.u), return_inverse=True)
        rows = [torch.nonzero(trial_of == trial)[:, 0] for trial in range(len(observations.trials))]
        scaled = torch.as_tensor((y - centre) / scale)
        per = [torch.as_tensor(base(observations.x[:, i])) for i, base in enumerate(self.bases)]
        place = {trial: i for i, trial in enumerate(observations.trials)}
        return _Tensors(
            powers=[_Powers(per, most, order) for order, most in enumerate((MAIN, PAIR, TRIPLE), start=1)],
            features=torch.as_tensor(self.features(observations.x)),
            trial_of=trial_of,
            trial=None if len(y) == len(rows) else torch.nn.functional.one_hot(trial_of, len(rows)).double(),
            rows_of=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1),
            same=(trial_of[:, None] == trial_of[None, :]).double(),
            times=times,
            time=torch.nn.functional.one_hot(time_of, len(times)).double(),
            u=times[time_of],
            y=scaled,
            noise_y=scaled[torch.as_tensor(observations.last)][trial_of].clamp(-3, 3),
            seeds=torch.tensor(observations.seeds),
            epochs=torch.tensor(observations.epochs),
            scale_of_noise=torch.ones(len(rows), dtype=torch.float64),
            contrast_trial=torch.tensor([place.get(trial, -1) for trial in contrasts.trials], dtype=torch.long),
            contrast_u=torch.tensor(contrasts.u),
            contrast_y=torch.as_tensor((contrasts.y - centre) / scale).clamp(-3, 3)[:, None],
            contrast_epochs=torch.tensor(contrasts.epochs),
            contrast_outer=torch.as_tensor(contrasts.outer / scale**2),
            contrast_df=torch.tensor(contrasts.df),
            centre=centre,
            scale=scale,
        )


class _Noise(NamedTuple):
    """Standard deviations of rows."""

    seed: Tensor
    epoch: Tensor
    trial: Tensor  # of the trial effect


class _Tensors(NamedTuple):
    """Observations of N rows and T trials as tensors."""

    powers: list[_Powers]  # of components of one, two and three dimensions
    features: Tensor  # (T, P)
    trial_of: Tensor
    trial: Tensor | None  # (N, T) 1 where a row is of a trial, else 0; None: every trial has one row
    rows_of: Tensor  # (T, B) rows of each trial, the last one last; -1 beyond
    same: Tensor  # (N, N) 1 where two rows are of one trial, else 0
    times: Tensor  # (U,) distinct u
    time: Tensor  # (N, U) 1 where a row is of a time, else 0
    u: Tensor  # (N,)
    y: Tensor
    noise_y: Tensor  # (N,) last accuracy of the row's trial, which the noise depends on
    seeds: Tensor
    epochs: Tensor
    scale_of_noise: Tensor  # (T,) of the trials' seed noise
    contrast_trial: Tensor  # (C,) which trial each is of; -1: none of these
    contrast_u: Tensor
    contrast_y: Tensor
    contrast_epochs: Tensor
    contrast_outer: Tensor
    contrast_df: Tensor
    centre: float
    scale: float


class _LogDensity(torch.autograd.Function):
    """Log density of y under N(0, covariance) up to a constant; minus infinity where that is no covariance.

    Its gradient in the covariance C is (a a' - C^-1) / 2, a = C^-1 y, which takes half the time of differentiating
    through the factorisation.
    """

    @staticmethod
    def forward(ctx: Any, covariance: Tensor, y: Tensor) -> Tensor:
        factor, bad = torch.linalg.cholesky_ex(covariance)
        if int(bad):
            ctx.factor = None
            return torch.tensor(-torch.inf, dtype=torch.float64)
        ctx.factor, ctx.y = factor, y
        solved = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
        return -0.5 * (solved**2).sum() - torch.log(torch.diagonal(factor)).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        if ctx.factor is None:
            return None, None
        inverse = torch.cholesky_inverse(ctx.factor)
        pull = inverse @ ctx.y
        return 0.5 * grad_outputs[0] * (pull[:, None] * pull[None, :] - inverse), None


class _Powers:
    """The kernels of all dimensions between T trials, k_i = sum over m of v_im * phi_im * phi_im, and their powers.

    The power of a kernel is a kernel again, whose functions are the products of its functions. So the sum over the
    dimensions of any power is a single product of matrices.
    """

    def __init__(self, per: list[Tensor], most: int, order: int) -> None:
        """per: each dimension's functions at the trials (T, M), of which `most` are used; order: the highest power."""
        self._parts: list[tuple[Tensor, Tensor]] = []  # for each power: functions (T, C), and counts (C, D * MAIN)
        for power in range(1, order + 1):
            columns, counts = [], []
            for i, functions in enumerate(per):
                index = list(itertools.combinations_with_replacement(range(min(functions.shape[1], most)), power))
                times = [
                    math.factorial(power) / math.prod(math.factorial(one.count(m)) for m in set(one)) for one in index
                ]
                columns.append(functions[:, index].prod(dim=2) * torch.tensor(times).sqrt())
                counts += [_count([(i, m) for m in one], len(per)) for one in index]
            self._parts.append((torch.cat(columns, dim=1), torch.stack(counts)))

    def sums(self, log_spectra: Tensor) -> list[Tensor]:
        """Sums over the dimensions of the kernels' powers 1 to order, (T, T) each."""
        return [(f * torch.exp(counts @ log_spectra)) @ f.T for f, counts in self._parts]


def _held_out(without: Sequence[tuple[Array, ...]], data: _Tensors) -> HeldOut:
    """Every trial's last row, predicted from the other trials, from what each draw of the hyperparameters says."""
    mean, variance, noise, log_density = (np.stack(part) for part in zip(*without, strict=True))  # (T', T) each
    weight = weights_without(log_density)
    centre = (weight * mean).sum(axis=0)
    spread = (weight * (variance + mean**2)).sum(axis=0) - centre**2
    noise = (weight * noise).sum(axis=0)
    return HeldOut(centre * data.scale + data.centre, np.sqrt(spread) * data.scale, np.sqrt(noise) * data.scale)


def _count(functions: Iterable[tuple[int, int]], size: int) -> Tensor:
    """How often a product has each function (dimension, number) -> (size * MAIN,)."""
    count = torch.zeros(size, MAIN, dtype=torch.float64)
    for dimension, number in functions:
        count[dimension, number] += 1
    return count.flatten()


def _quadratic(covariance: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Trace of C^-1 outer, and log determinant of C, for covariances C (..., B, B); infinite where C is none."""
    factor, bad = torch.linalg.cholesky_ex(covariance)
    logdet = 2 * torch.log(factor.diagonal(dim1=-2, dim2=-1)).sum(-1)
    fit = torch.cholesky_solve(outer, factor).diagonal(dim1=-2, dim2=-1).sum(-1)
    return fit, torch.where(bad > 0, math.inf, logdet)


def _outer(a: Array, b: Array) -> Array:
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)


def _matern(scaled: Tensor) -> Tensor:
    r = math.sqrt(5) * scaled
    return (1 + r + r**2 / 3) * torch.exp(-r)
