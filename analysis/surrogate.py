"""The Gaussian process over (configuration, epoch) that every answer is drawn from.

Model, on the logit of validation accuracy, u = log(epoch) / log(full budget) in [0, 1]:

    y(trial, seed, u) = m(u) + f(x, u) + b(trial) + s(trial, seed, u) + e(trial, seed, epoch)

f is a sum of components, one for every set of one, two or three dimensions, each with mean zero over the dimensions it
holds (a functional ANOVA, so variances of components are Sobol indices without Monte Carlo). A component is a product
of basis functions with independent Gaussian weights; the weights move smoothly with u. b is the trial effect: the part
of a trial that the smooth surface does not explain. s is the seed noise, which lasts over epochs, and e the epoch
noise. The differences between the seeds of a trial enter the likelihood exactly, so seed noise is measured.

No hyperparameter is fixed at an estimate: they are sampled (`analysis.sampler`), and each draw of them gives joint
posterior draws of all weights (Matheron's rule).

Sources: Marrel et al. 2009 and Le Gratiet et al. 2014 (Sobol indices on posterior draws), Durrande et al. 2013 (ANOVA
kernels), Wilson et al. 2020 (Matheron's rule).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.basis import MAIN, basis
from analysis.observations import Observations
from analysis.sampler import diagnose, find_mode, laplace_factor, sample_chain
from ramcore.space import Array, Dimension

PAIR, TRIPLE = 6, 3  # basis functions a dimension in components of two and three dimensions; MAIN in those of one
JITTER = 1e-6

# Hyperparameters that belong to no dimension: prior mean and standard deviation, for y scaled to unit variance. All but
# the two slopes are logarithms.
SHARED = {
    "interaction": (math.log(0.35), 0.8),  # a pair has about a third of the variance its two weights alone would give
    "memory": (math.log(1.0), 0.5),  # length scale of the surface in u
    "slope": (0.3, 0.7),  # change of the surface's size with u
    "seed_noise": (-1.6, 1.0),  # standard deviation at u = 1
    "epoch_noise": (-2.0, 1.0),  # standard deviation at u = 1
    "trial_effect": (-2.5, 1.0),  # standard deviation
    "noise_slope": (0.0, 0.5),  # change of seed and epoch noise with u
    "seed_memory": (0.7, 1.0),  # length scale of the seed noise in u
}


class Posterior(NamedTuple):
    """Joint draws of the surface: S draws of P weights at E epochs, the same number for each of T hyperparameter draws.

    weights: (S, P, E); level: (S, E), the mean over all configurations; theta: (T, H) hyperparameters; rhat, ess: the
    largest R-hat and the smallest effective sample size of the hyperparameters' chains, NaN for a single chain.
    """

    weights: Array
    level: Array
    theta: Array
    rhat: float
    ess: float


class Start(NamedTuple):
    """Where sampling starts: the mode and the Cholesky factor of the Laplace approximation around it."""

    mode: Tensor
    factor: Tensor


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
        self.prior_sd = torch.tensor([1.6] * d + [0.4] * d + list(sds), dtype=torch.float64)

    def _shared(self, theta: Tensor, name: str) -> Tensor:
        """One of the hyperparameters in SHARED."""
        return theta[2 * self.size + list(SHARED).index(name)]

    # ---- features: weights <-> values -------------------------------------------------------------------------

    def features(self, x: Array) -> Array:
        """All P basis products at coordinates (N, D) -> (N, P): mains, then pairs, then triples."""
        per = [base(x[:, i]) for i, base in enumerate(self.bases)]
        pairs, triples = ([functions[:, :most] for functions in per] for most in (PAIR, TRIPLE))
        parts = [_outer(pairs[i], pairs[j]) for i, j in self.pairs]
        parts += [_outer(_outer(triples[i], triples[j]), triples[k]) for i, j, k in self.triples]
        return np.concatenate(per + parts, axis=1)

    def groups(self) -> list[tuple[int, ...]]:
        """For each of the P features, the dimensions it belongs to."""
        sizes = [len(base.variances) for base in self.bases]
        found: list[tuple[int, ...]] = []
        for most, sets in ((MAIN, [(i,) for i in range(self.size)]), (PAIR, self.pairs), (TRIPLE, self.triples)):
            for one in sets:
                found += [one] * math.prod(min(sizes[i], most) for i in one)
        return found

    def _spectra(self, theta: Tensor) -> list[Tensor]:
        rough = torch.exp(theta[self.size : 2 * self.size])
        tilted = [torch.as_tensor(base.variances) ** (1 / rough[i]) for i, base in enumerate(self.bases)]
        return [spectrum / spectrum.sum() for spectrum in tilted]

    def variances(self, theta: Tensor) -> Tensor:
        """Prior variance of every weight at the full budget -> (P,)."""
        weight, eta = torch.exp(theta[: self.size]), torch.exp(self._shared(theta, "interaction"))
        spectra = self._spectra(theta)
        parts = [weight[i] * spectra[i] for i in range(self.size)]
        for i, j in self.pairs:
            parts.append(eta * torch.outer(weight[i] * spectra[i][:PAIR], weight[j] * spectra[j][:PAIR]).flatten())
        for triple in self.triples:
            product = eta**2 * torch.ones(1, dtype=torch.float64)
            for i in triple:
                product = torch.outer(product, weight[i] * spectra[i][:TRIPLE]).flatten()
            parts.append(product)
        return torch.cat(parts)

    # ---- likelihood ------------------------------------------------------------------------------------------

    def _surface_kernel(self, theta: Tensor, per: list[Tensor]) -> Tensor:
        weight, eta = torch.exp(theta[: self.size]), torch.exp(self._shared(theta, "interaction"))
        spectra = self._spectra(theta)
        orders: list[Tensor] = []
        for order, count in enumerate((MAIN, PAIR, TRIPLE), start=1):
            one = [weight[i] * (p[:, :count] * spectra[i][:count]) @ p[:, :count].T for i, p in enumerate(per)]
            orders.append(eta ** (order - 1) * _symmetric(one, order))
        return orders[0] + orders[1] + orders[2]

    def _time_kernel(self, theta: Tensor, u: Tensor) -> Tensor:
        length, slope = torch.exp(self._shared(theta, "memory")), self._shared(theta, "slope")
        distance = _matern((u[:, None] - u[None, :]).abs() / length)
        return torch.exp(slope * (u - 1))[:, None] * torch.exp(slope * (u - 1))[None, :] * distance

    def _level_kernel(self, theta: Tensor, u: Tensor) -> Tensor:
        length = torch.exp(self._shared(theta, "memory"))
        return 4.0 + 4.0 * _matern((u[:, None] - u[None, :]).abs() / length)

    def _noise(self, theta: Tensor, u: Tensor) -> _Noise:
        change = torch.exp(self._shared(theta, "noise_slope") * (1 - u))
        return _Noise(
            torch.exp(self._shared(theta, "seed_noise")) * change,
            torch.exp(self._shared(theta, "epoch_noise")) * change,
            torch.exp(self._shared(theta, "trial_effect")) * torch.ones_like(u),
        )

    def _seed_memory(self, theta: Tensor, u: Tensor) -> Tensor:
        """Correlation of a seed's noise between u (..., B) -> (..., B, B)."""
        apart = (u[..., :, None] - u[..., None, :]).abs()
        return torch.exp(-apart / torch.exp(self._shared(theta, "seed_memory")))

    def _noise_kernel(self, theta: Tensor, data: _Tensors) -> Tensor:
        """Covariance of rows beyond the surface; only rows of one trial share any, so just those are computed."""
        noise = self._noise(theta, data.times)
        memory = self._seed_memory(theta, data.times)
        seed = noise.seed[:, None] * noise.seed[None, :] * memory
        rows, columns = data.same
        shared = seed[data.time_of[rows], data.time_of[columns]] * (data.seeds[rows] * data.seeds[columns]).rsqrt()
        size = len(data.y)
        kernel = torch.zeros(size, size, dtype=torch.float64).index_put((rows, columns), shared + noise.trial[0] ** 2)
        return kernel + torch.diag(noise.epoch[data.time_of] ** 2 / (data.seeds * data.epochs) + JITTER)

    def covariance(self, theta: Tensor, data: _Tensors) -> Tensor:
        """Covariance of the rows, (N, N)."""
        surface = torch.take(self._surface_kernel(theta, data.per), data.flat_trial)
        time = torch.take(self._time_kernel(theta, data.times), data.flat_time)
        level = torch.take(self._level_kernel(theta, data.times), data.flat_time)
        return surface * time + level + self._noise_kernel(theta, data)

    def log_posterior(self, theta: Tensor, data: _Tensors) -> Tensor:
        """Log density of the hyperparameters given the rows and the seeds' contrasts, up to a constant."""
        prior = -0.5 * (((theta - self.prior_mean) / self.prior_sd) ** 2).sum()
        factor, bad = torch.linalg.cholesky_ex(self.covariance(theta, data))
        if int(bad):
            return torch.tensor(-torch.inf, dtype=torch.float64)
        solved = torch.linalg.solve_triangular(factor, data.y[:, None], upper=False)
        fit = -0.5 * (solved**2).sum() - torch.log(torch.diagonal(factor)).sum()
        return prior + fit + self._contrast_likelihood(theta, data)

    def _contrast_likelihood(self, theta: Tensor, data: _Tensors) -> Tensor:
        if not len(data.contrast_df):
            return torch.zeros((), dtype=torch.float64)
        here = data.contrast_epochs > 0
        noise = self._noise(theta, data.contrast_u)
        memory = self._seed_memory(theta, data.contrast_u)
        both = here[:, :, None] & here[:, None, :]
        cov = torch.where(both, noise.seed[:, :, None] * noise.seed[:, None, :] * memory, 0.0)
        diagonal = torch.where(here, noise.epoch**2 / data.contrast_epochs.clamp_min(1) + JITTER, 1.0)
        factor, bad = torch.linalg.cholesky_ex(cov + torch.diag_embed(diagonal))
        if bool(bad.any()):
            return torch.tensor(-torch.inf, dtype=torch.float64)
        logdet = 2 * torch.log(torch.diagonal(factor, dim1=1, dim2=2)).sum(1)
        trace = torch.cholesky_solve(data.contrast_outer, factor).diagonal(dim1=1, dim2=2).sum(1)
        return -0.5 * (data.contrast_df * logdet + trace).sum()

    # ---- sampling --------------------------------------------------------------------------------------------

    def sample(
        self,
        observations: Observations,
        at: Array,
        *,
        hyperdraws: int,
        draws_each: int,
        rng: np.random.Generator,
        start: Start | None = None,
    ) -> tuple[Posterior, Start]:
        """Posterior draws at u = `at`, in logits; also where the sampling started.

        A fit to part of the data takes the `start` of the fit to all of it, and needs only a short run.
        """
        data = self._prepare(observations)

        def log_density(theta: Tensor) -> Tensor:
            return self.log_posterior(theta, data)

        if start is None:
            chains, thin, burn = 2, 4, 60
            mode = find_mode(log_density, self.prior_mean, iterations=80)
            start = Start(mode, laplace_factor(log_density, mode, self.prior_sd))
        else:
            chains, thin, burn = 1, 2, 10
            start = start._replace(mode=find_mode(log_density, start.mode, iterations=20))
        steps = burn + math.ceil(hyperdraws / chains) * thin
        kept = [sample_chain(log_density, start.mode, start.factor, steps, rng)[burn:] for _ in range(chains)]
        rhat, ess = diagnose(kept) if chains > 1 else (math.nan, math.nan)
        theta = torch.cat([path[thin - 1 :: thin] for path in kept])
        drawn = [self._draw(one, data, torch.as_tensor(at), draws_each, rng) for one in theta]
        weights = np.concatenate([weights * data.scale for weights, _ in drawn])
        level = np.concatenate([level * data.scale + data.centre for _, level in drawn])
        return Posterior(weights, level, theta.numpy(), rhat, ess), start

    def _draw(
        self, theta: Tensor, data: _Tensors, at: Tensor, count: int, rng: np.random.Generator
    ) -> tuple[Array, Array]:
        """Joint draws of weights and level at `at` (E,) given hyperparameters -> (count, P, E), (count, E)."""
        with torch.no_grad():
            times, where = torch.unique(torch.cat([at, data.times]), return_inverse=True)
            at_index, row_index = where[: len(at)], where[len(at) :][data.time_of]
            variances = self.variances(theta)
            time = self._time_kernel(theta, times)
            time_factor = torch.linalg.cholesky(time + 1e-8 * torch.eye(len(times)) * time.diagonal().max())
            level = self._level_kernel(theta, times)
            level_factor = torch.linalg.cholesky(level + 1e-8 * torch.eye(len(times)))
            factor = torch.linalg.cholesky(self.covariance(theta, data))
            noise_factor = torch.linalg.cholesky(self._noise_kernel(theta, data))
            weights, levels = [], []
            for _ in range(count):
                normal = torch.as_tensor(rng.standard_normal((len(variances), len(times))))
                prior = variances.sqrt()[:, None] * normal @ time_factor.T
                prior_level = level_factor @ torch.as_tensor(rng.standard_normal(len(times)))
                rows = (data.features @ prior)[data.trial_of, row_index] + prior_level[row_index]
                rows = rows + noise_factor @ torch.as_tensor(rng.standard_normal(len(data.y)))
                pull = torch.cholesky_solve((data.y - rows)[:, None], factor)[:, 0]
                reach = time[at_index][:, row_index] * pull[None, :]  # (E, N)
                by_trial = torch.zeros((len(at), len(data.features)), dtype=torch.float64)
                by_trial.index_add_(1, data.trial_of, reach)
                weights.append((prior[:, at_index] + variances[:, None] * (data.features.T @ by_trial.T)).numpy())
                levels.append((prior_level[at_index] + level[at_index][:, row_index] @ pull).numpy())
        return np.stack(weights), np.stack(levels)

    def _prepare(self, observations: Observations) -> _Tensors:
        """Observations as tensors, y scaled to mean 0 and variance 1 (undone by `sample`)."""
        y, contrasts = observations.y, observations.contrasts
        centre, scale = float(y.mean()), float(y.std()) or 1.0
        trial_of = torch.tensor(observations.trial_of)
        times, time_of = torch.unique(torch.tensor(observations.u), return_inverse=True)
        return _Tensors(
            per=[torch.as_tensor(base(observations.x[:, i])) for i, base in enumerate(self.bases)],
            features=torch.as_tensor(self.features(observations.x)),
            trial_of=trial_of,
            same=torch.nonzero(trial_of[:, None] == trial_of[None, :], as_tuple=True),
            flat_trial=trial_of[:, None] * len(observations.trials) + trial_of[None, :],
            times=times,
            time_of=time_of,
            flat_time=time_of[:, None] * len(times) + time_of[None, :],
            y=torch.as_tensor((y - centre) / scale),
            seeds=torch.tensor(observations.seeds),
            epochs=torch.tensor(observations.epochs),
            contrast_u=torch.tensor(contrasts.u),
            contrast_epochs=torch.tensor(contrasts.epochs),
            contrast_outer=torch.as_tensor(contrasts.outer / scale**2),
            contrast_df=torch.tensor(contrasts.df),
            centre=centre,
            scale=scale,
        )

    def predictive_sd(self, theta: Array, scale: float, seeds: float, *, trial_effect: bool = True) -> Array:
        """Standard deviation (logits) of a new run's mean over seeds around the surface, full budget -> (T,).

        Without `trial_effect` it is that of seed and epoch noise alone.
        """
        one = torch.ones(1, dtype=torch.float64)
        share, own = 1 / seeds, float(trial_effect)
        parts = [[float(sd) ** 2 for sd in self._noise(row, one)] for row in torch.as_tensor(theta)]
        total = [share * seed + share * epoch + own * trial for seed, epoch, trial in parts]
        return scale * np.sqrt(np.array(total))


class _Noise(NamedTuple):
    """Standard deviations at several u."""

    seed: Tensor
    epoch: Tensor
    trial: Tensor  # of the trial effect, the same at every u


class _Tensors(NamedTuple):
    """Observations of N rows and T trials as tensors."""

    per: list[Tensor]  # of each dimension: its functions at the trials (T, M)
    features: Tensor  # (T, P)
    trial_of: Tensor
    same: tuple[Tensor, ...]  # row and column of every pair of rows of one trial
    flat_trial: Tensor  # (N, N) position of a pair of rows in a flattened (T, T) matrix
    times: Tensor  # (U,) distinct u
    time_of: Tensor  # (N,) row -> distinct u
    flat_time: Tensor  # (N, N) position of a pair of rows in a flattened (U, U) matrix
    y: Tensor
    seeds: Tensor
    epochs: Tensor
    contrast_u: Tensor
    contrast_epochs: Tensor
    contrast_outer: Tensor
    contrast_df: Tensor
    centre: float
    scale: float


def _outer(a: Array, b: Array) -> Array:
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)


def _matern(scaled: Tensor) -> Tensor:
    r = math.sqrt(5) * scaled
    return (1 + r + r**2 / 3) * torch.exp(-r)


def _symmetric(kernels: list[Tensor], order: int) -> Tensor:
    """Sum over all products of `order` different kernels, without listing them (one pass for every dimension)."""
    sums = [torch.ones_like(kernels[0])] + [torch.zeros_like(kernels[0]) for _ in range(order)]
    for kernel in kernels:
        sums = [sums[0]] + [sums[k] + kernel * sums[k - 1] for k in range(1, order + 1)]
    return sums[order]
