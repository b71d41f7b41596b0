"""The Gaussian process over (configuration, epoch) that every answer is drawn from.

Model, on the logit of validation accuracy, u = log(epoch) / log(full budget) in [0, 1]:

    y(trial, seed, u) = m(u) + f(x, u) + b(trial) + s(trial, seed, u) + noise

f is a sum of components, one for every set of one, two or three dimensions, each with mean zero over the dimensions it
holds (a functional ANOVA, so variances of components are Sobol indices without Monte Carlo). A component is a product
of basis functions with independent Gaussian weights; the weights move smoothly with u. b is what the smooth surface
does not explain in a trial, s a seed's lasting luck, noise its luck of the epoch. The within-trial differences between
seeds enter the likelihood exactly, so seed noise is measured, not guessed.

Nothing is fixed at an estimate: hyperparameters are sampled (elliptical slice sampling around a Laplace approximation)
and each hyperparameter draw gives joint posterior draws of all weights (Matheron's rule).

Sources: Marrel et al. 2009 and Le Gratiet et al. 2014 (Sobol indices on posterior draws), Durrande et al. 2013 (ANOVA
kernels), Nishihara et al. 2014 (the sampler), Wilson et al. 2020 (Matheron's rule).
"""

from __future__ import annotations

# pandas' own annotations are unions that its indexing never returns here, so these checks only raise false alarms.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAssignmentType=false
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize
from torch import Tensor

from ramcore.space import Array, Dimension

MAIN, PAIR, TRIPLE = 8, 6, 3  # basis functions a dimension in components of one, two, three dimensions
ROW_BUDGET = 640  # rows the process is fitted to; curves are averaged in bins of log epoch to stay within it
MAX_BINS = 8  # epochs a curve is summarised by, at most
JITTER = 1e-6


class Observations(NamedTuple):
    """What the process is fitted to: N rows of T trials, R seeds at most, B bins of log epoch.

    trials: (T,) trial numbers; x: (T, D) unit coordinates; trial_of: (N,) row -> trial; u: (N,) in [0, 1];
    y: (N,) logit of accuracy, mean over seeds and over the bin; seeds, epochs: (N,) how many were averaged;
    contrast_*: seeds' departures from their trial's mean, summed as outer products over seeds.
    """

    trials: Array
    x: Array
    trial_of: np.ndarray
    u: Array
    y: Array
    seeds: Array
    epochs: Array
    contrast_u: Array  # (C, B) zero where a bin is missing
    contrast_epochs: Array  # (C, B) epochs averaged; 0 where a bin is missing
    contrast_outer: Array  # (C, B, B)
    contrast_df: Array  # (C,) seeds - 1


class Posterior(NamedTuple):
    """Joint draws of the surface: S draws of P weights at E epochs, the same number for each of T hyperparameter draws.

    weights: (S, P, E); level: (S, E), the mean over all configurations; theta: (T, H) hyperparameters;
    u: (E,); acceptance of the sampler as likelihood evaluations a step; rhat: (H,) split R-hat.
    """

    weights: Array
    level: Array
    theta: Array
    u: Array
    evaluations: float
    rhat: Array


def logit(accuracy: Array, evaluation_size: int) -> Array:
    """Log-odds of an accuracy measured on `evaluation_size` images; half an image short of 0 and 1 at most."""
    edge = 0.5 / evaluation_size
    clipped = np.clip(accuracy, edge, 1 - edge)
    return np.log(clipped / (1 - clipped))


def observe(epochs: pd.DataFrame, x: pd.DataFrame, budget: int, evaluation_size: int) -> Observations:
    """Summarise learning curves in bins of log epoch.

    epochs: columns trial, seed, epoch, val_accuracy (NaN: diverged, left out); x: unit coordinates indexed by trial;
    budget: epochs of a full run; evaluation_size: images behind an accuracy.
    """
    table = epochs.loc[epochs["val_accuracy"].notna() & epochs["trial"].isin(list(x.index))]
    table = table.loc[table["epoch"] <= budget, ["trial", "seed", "epoch", "val_accuracy"]].copy()
    table["y"] = logit(table["val_accuracy"].to_numpy(dtype=float), evaluation_size)
    table["u"] = np.log(table["epoch"]) / max(math.log(budget), 1e-9)
    bins = int(np.clip(ROW_BUDGET // max(table["trial"].nunique(), 1), 1, min(MAX_BINS, budget)))
    edges = np.unique(np.round(np.geomspace(1, budget, bins)))
    # An epoch joins the nearest bin below the full budget; the last bin keeps the last tenth only, so that
    # "at the full budget" means that.
    final = table["epoch"] > 0.9 * budget
    lower = np.log(edges[:-1]) if len(edges) > 1 else np.log(edges)
    nearest = np.abs(np.log(table["epoch"].to_numpy(dtype=float))[:, None] - lower[None, :]).argmin(axis=1)
    table["bin"] = np.where(final, len(edges) - 1, nearest)
    if bins == 1:  # too many trials for curves: each trial is its last recorded tenth
        last = table.groupby("trial")["epoch"].transform("max")
        table = table[table["epoch"] > 0.9 * last].assign(bin=0)
    per_seed = (
        table.groupby(["trial", "seed", "bin"])
        .agg(y=("y", "mean"), u=("u", "mean"), epochs=("y", "size"))
        .reset_index()
    )
    rows = per_seed.groupby(["trial", "bin"]).agg(
        y=("y", "mean"), u=("u", "mean"), seeds=("seed", "nunique"), epochs=("epochs", "mean")
    )
    rows = rows.reset_index().sort_values(["trial", "bin"])
    trials = np.array(sorted(rows["trial"].unique()))
    position = {trial: i for i, trial in enumerate(trials)}
    return Observations(
        trials,
        x.loc[trials].to_numpy(dtype=float),
        rows["trial"].map(position).to_numpy(dtype=int),
        rows["u"].to_numpy(dtype=float),
        rows["y"].to_numpy(dtype=float),
        rows["seeds"].to_numpy(dtype=float),
        rows["epochs"].to_numpy(dtype=float),
        *_contrasts(per_seed, trials, len(edges)),
    )


def _contrasts(per_seed: pd.DataFrame, trials: Array, bins: int) -> tuple[Array, Array, Array, Array]:
    u, count, outer, df = [], [], [], []
    for _, curve in per_seed[per_seed["trial"].isin(list(trials))].groupby("trial"):
        wide = curve.pivot(index="seed", columns="bin", values="y").dropna(axis=1)
        if len(wide) < 2 or not wide.shape[1]:
            continue
        here = np.asarray(wide.columns, dtype=int)
        means = curve.groupby("bin")[["u", "epochs"]].mean()
        departures = (wide - wide.mean()).to_numpy()
        full = np.zeros((bins, bins))
        full[np.ix_(here, here)] = departures.T @ departures
        row_u, row_count = np.zeros(bins), np.zeros(bins)
        row_u[here], row_count[here] = means.loc[here, "u"], means.loc[here, "epochs"]
        u.append(row_u)
        count.append(row_count)
        outer.append(full)
        df.append(len(wide) - 1.0)
    shape = (len(u), bins)
    return (
        np.array(u).reshape(shape),
        np.array(count).reshape(shape),
        np.array(outer).reshape(*shape, bins),
        np.array(df),
    )


class Basis(NamedTuple):
    """Orthonormal mean-zero functions of one dimension, and the prior variance each has at roughness 1.

    They are the eigenfunctions of a centred Matérn 5/2 kernel under the dimension's own distribution (uniform, or its
    levels equally often), so no shape is imposed: the first is nearly a line, the second nearly a parabola, and so on.
    """

    dimension: Dimension
    nodes: Array
    spread: Array  # (Q, M): node weights times functions over their eigenvalues
    centre: Array  # (Q,) node weights
    variances: Array  # (M,)

    def __call__(self, x: Array) -> Array:
        """Functions at coordinates (n,) -> (n, M)."""
        kernel = _matern(x[:, None] - self.nodes[None, :], 0.5)
        if self.dimension.type == "categorical":
            kernel = (np.abs(x[:, None] - self.nodes[None, :]) < 1e-9).astype(float)
        inner = _node_kernel(self.dimension, self.nodes)
        mean = inner @ self.centre
        total = float(self.centre @ mean)
        centred = kernel - (kernel @ self.centre)[:, None] * mean[None, :] / total
        return centred @ self.spread


def basis(dimension: Dimension) -> Basis:
    """The functions for a dimension: as many as its levels allow, MAIN at most."""
    if dimension.levels:
        nodes = dimension.grid()
        weights = np.full(len(nodes), 1 / len(nodes))
    else:
        points, weights = np.polynomial.legendre.leggauss(32)
        nodes, weights = (points + 1) / 2, weights / 2
    kernel = _node_kernel(dimension, nodes)
    mean = kernel @ weights
    centred = kernel - np.outer(mean, mean) / float(weights @ mean)
    root = np.sqrt(weights)
    values, vectors = np.linalg.eigh(root[:, None] * centred * root[None, :])
    keep = min(MAIN, len(nodes) - 1)
    values, vectors = values[::-1][:keep], vectors[:, ::-1][:, :keep]
    vectors = vectors * np.where(vectors[-1] < 0, -1.0, 1.0)  # a sign convention: results do not depend on the library
    spread = (root[:, None] * vectors) / values[None, :]
    return Basis(dimension, nodes, spread, weights, values / values.sum())


def _node_kernel(dimension: Dimension, nodes: Array) -> Array:
    if dimension.type == "categorical":
        return np.eye(len(nodes))
    return _matern(nodes[:, None] - nodes[None, :], 0.5)


def _matern(distance: Array, length: float) -> Array:
    scaled = math.sqrt(5) * np.abs(distance) / length
    return (1 + scaled + scaled**2 / 3) * np.exp(-scaled)


class Surface:
    """The process for a fixed list of dimensions: its likelihood, its sampler, its features.

    Hyperparameters, all on log scale except the two slopes, in this order: weight of each dimension (D), roughness of
    each (D), interaction strength, memory in u, change of signal with u, seed luck, epoch luck, trial misfit, change of
    luck with u, memory of a seed's luck in u. Their priors are Gaussian (`prior_mean`, `prior_sd`), for y scaled to
    unit variance.
    """

    def __init__(self, dimensions: Sequence[Dimension]) -> None:
        self.bases = [basis(d) for d in dimensions]
        self.size = len(self.bases)
        d = self.size
        self.pairs = list(itertools.combinations(range(d), 2))
        self.triples = list(itertools.combinations(range(d), 3))
        # Weights: most dimensions matter little (median share 4% of the variance each), any may matter a lot.
        # Interaction: a pair has about a third of the variance its two weights alone would give.
        self.prior_mean = torch.tensor(
            [math.log(0.06)] * d + [0.0] * d + [math.log(0.35), math.log(1.0), 0.3, -1.6, -2.0, -2.5, 0.0, 0.7],
            dtype=torch.float64,
        )
        self.prior_sd = torch.tensor(
            [1.6] * d + [0.4] * d + [0.8, 0.5, 0.7, 1.0, 1.0, 1.0, 0.5, 1.0], dtype=torch.float64
        )

    # ---- features: weights <-> values -------------------------------------------------------------------------

    def features(self, x: Array) -> Array:
        """All P basis products at coordinates (n, D) -> (n, P): mains, then pairs, then triples."""
        per = [base(x[:, i]) for i, base in enumerate(self.bases)]
        parts = list(per)
        for i, j in self.pairs:
            parts.append(_outer(per[i][:, :PAIR], per[j][:, :PAIR]))
        for i, j, k in self.triples:
            parts.append(_outer(_outer(per[i][:, :TRIPLE], per[j][:, :TRIPLE]), per[k][:, :TRIPLE]))
        return np.concatenate(parts, axis=1)

    def groups(self) -> list[tuple[int, ...]]:
        """For each feature, the dimensions it belongs to; length P."""
        sizes = [len(base.variances) for base in self.bases]
        out: list[tuple[int, ...]] = []
        for i in range(self.size):
            out += [(i,)] * sizes[i]
        for i, j in self.pairs:
            out += [(i, j)] * (min(sizes[i], PAIR) * min(sizes[j], PAIR))
        for t in self.triples:
            out += [t] * math.prod(min(sizes[i], TRIPLE) for i in t)
        return out

    def _spectra(self, theta: Tensor) -> list[Tensor]:
        rough = torch.exp(theta[self.size : 2 * self.size])
        out: list[Tensor] = []
        for i, base in enumerate(self.bases):
            tilted = torch.as_tensor(base.variances) ** (1 / rough[i])
            out.append(tilted / tilted.sum())
        return out

    def variances(self, theta: Tensor) -> Tensor:
        """Prior variance of every weight at the full budget -> (P,)."""
        weight, eta = torch.exp(theta[: self.size]), torch.exp(theta[2 * self.size])
        spectra = self._spectra(theta)
        parts = [weight[i] * spectra[i] for i in range(self.size)]
        for i, j in self.pairs:
            parts.append(eta * torch.outer(weight[i] * spectra[i][:PAIR], weight[j] * spectra[j][:PAIR]).flatten())
        for t in self.triples:
            product = eta**2 * torch.ones(1, dtype=torch.float64)
            for i in t:
                product = torch.outer(product, weight[i] * spectra[i][:TRIPLE]).flatten()
            parts.append(product)
        return torch.cat(parts)

    # ---- likelihood ------------------------------------------------------------------------------------------

    def _surface_kernel(self, theta: Tensor, per: list[Tensor]) -> Tensor:
        weight, eta = torch.exp(theta[: self.size]), torch.exp(theta[2 * self.size])
        spectra = self._spectra(theta)
        orders: list[Tensor] = []
        for order, count in enumerate((MAIN, PAIR, TRIPLE), start=1):
            one = [weight[i] * (p[:, :count] * spectra[i][:count]) @ p[:, :count].T for i, p in enumerate(per)]
            orders.append(eta ** (order - 1) * _symmetric(one, order))
        return orders[0] + orders[1] + orders[2]

    def _time_kernel(self, theta: Tensor, u: Tensor, v: Tensor) -> Tensor:
        d2 = 2 * self.size
        length, slope = torch.exp(theta[d2 + 1]), theta[d2 + 2]
        distance = _torch_matern((u[:, None] - v[None, :]).abs() / length)
        return torch.exp(slope * (u - 1))[:, None] * torch.exp(slope * (v - 1))[None, :] * distance

    def _level_kernel(self, theta: Tensor, u: Tensor, v: Tensor) -> Tensor:
        length = torch.exp(theta[2 * self.size + 1])
        return 4.0 + 4.0 * _torch_matern((u[:, None] - v[None, :]).abs() / length)

    def _luck(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Standard deviations at u of a seed's lasting luck, of its epoch's luck, and the trial's misfit."""
        d2 = 2 * self.size
        change = torch.exp(theta[d2 + 6] * (1 - u))
        return (
            torch.exp(theta[d2 + 3]) * change,
            torch.exp(theta[d2 + 4]) * change,
            torch.exp(theta[d2 + 5]) * torch.ones_like(u),
        )

    def _noise_kernel(self, theta: Tensor, data: _Tensors) -> Tensor:
        """Covariance of rows beyond the surface; only rows of one trial share any, so just those are computed."""
        lasting, fresh, misfit = self._luck(theta, data.times)
        memory = torch.exp(-(data.times[:, None] - data.times[None, :]).abs() / torch.exp(theta[2 * self.size + 7]))
        seed = lasting[:, None] * lasting[None, :] * memory
        rows, columns = data.same
        shared = seed[data.time_of[rows], data.time_of[columns]] * (data.seeds[rows] * data.seeds[columns]).rsqrt()
        size = len(data.y)
        kernel = torch.zeros(size, size, dtype=torch.float64).index_put((rows, columns), shared + misfit[0] ** 2)
        return kernel + torch.diag(fresh[data.time_of] ** 2 / (data.seeds * data.epochs) + JITTER)

    def covariance(self, theta: Tensor, data: _Tensors) -> Tensor:
        """Covariance of the rows, (N, N)."""
        surface = torch.take(self._surface_kernel(theta, data.per), data.flat_trial)
        time = torch.take(self._time_kernel(theta, data.times, data.times), data.flat_time)
        level = torch.take(self._level_kernel(theta, data.times, data.times), data.flat_time)
        return surface * time + level + self._noise_kernel(theta, data)

    def log_posterior(self, theta: Tensor, data: _Tensors) -> Tensor:
        """Log density of the hyperparameters given the rows and the seeds' departures, up to a constant."""
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
        lasting, fresh, _ = self._luck(theta, data.contrast_u)
        apart = (data.contrast_u[:, :, None] - data.contrast_u[:, None, :]).abs()
        memory = torch.exp(-apart / torch.exp(theta[2 * self.size + 7]))
        both = here[:, :, None] & here[:, None, :]
        cov = torch.where(both, lasting[:, :, None] * lasting[:, None, :] * memory, 0.0)
        diagonal = torch.where(here, fresh**2 / data.contrast_epochs.clamp_min(1) + JITTER, 1.0)
        factor, bad = torch.linalg.cholesky_ex(cov + torch.diag_embed(diagonal))
        if bool(bad.any()):
            return torch.tensor(-torch.inf, dtype=torch.float64)
        logdet = 2 * torch.log(torch.diagonal(factor, dim1=1, dim2=2)).sum(1)
        trace = torch.cholesky_solve(data.contrast_outer, factor).diagonal(dim1=1, dim2=2).sum(1)
        return -0.5 * (data.contrast_df * logdet + trace).sum()

    # ---- sampling --------------------------------------------------------------------------------------------

    def mode(self, data: _Tensors, start: Tensor | None = None, iterations: int = 80) -> Tensor:
        """The most probable hyperparameters (L-BFGS)."""

        def objective(values: Array) -> tuple[float, Array]:
            theta = torch.tensor(values, requires_grad=True)
            loss = -self.log_posterior(theta, data)
            if not bool(torch.isfinite(loss)):
                return 1e10, np.zeros_like(values)
            (gradient,) = torch.autograd.grad(loss, theta)
            return float(loss.detach()), gradient.numpy()

        first = (self.prior_mean if start is None else start).numpy()
        found = minimize(objective, first, jac=True, method="L-BFGS-B", options={"maxiter": iterations, "ftol": 1e-7})
        return torch.tensor(found.x)

    def spread(self, mode: Tensor, data: _Tensors) -> Tensor:
        """Cholesky factor of the Laplace approximation's covariance, between a 20th and all of the prior's width."""
        size, step = len(mode), 1e-3

        def gradient(theta: Tensor) -> Tensor:
            theta = theta.clone().requires_grad_(True)
            return torch.autograd.grad(-self.log_posterior(theta, data), theta)[0]

        columns = []
        for i in range(size):
            shift = torch.zeros(size, dtype=torch.float64)
            shift[i] = step * self.prior_sd[i]
            columns.append((gradient(mode + shift) - gradient(mode - shift)) / (2 * shift[i]))
        scale = self.prior_sd
        hessian = torch.stack(columns) * scale[:, None] * scale[None, :]
        values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.T))
        root = vectors * values.clamp(1.0, 400.0).rsqrt()[None, :]
        return torch.linalg.cholesky((scale[:, None] * root) @ (scale[:, None] * root).T * 1.3)

    def chain(
        self, data: _Tensors, mode: Tensor, spread: Tensor, steps: int, rng: np.random.Generator
    ) -> tuple[Tensor, float]:
        """Elliptical slice sampling around the Laplace approximation -> (steps, H), evaluations a step."""
        evaluations, factor = 0, spread.numpy()

        def residual(whitened: Array) -> float:
            nonlocal evaluations
            evaluations += 1
            with torch.no_grad():
                theta = mode + torch.as_tensor(factor @ whitened)
                return float(self.log_posterior(theta, data)) + 0.5 * float(whitened @ whitened)

        state = 0.3 * rng.standard_normal(len(mode))
        value = residual(state)
        out: list[Tensor] = []
        for _ in range(steps):
            state, value = _elliptical_step(state, value, residual, rng)
            out.append(mode + torch.as_tensor(factor @ state))
        return torch.stack(out), evaluations / max(steps, 1)

    def draw(
        self, theta: Tensor, data: _Tensors, at: Tensor, count: int, rng: np.random.Generator
    ) -> tuple[Array, Array]:
        """Joint draws of weights and level at `at` (E,) given hyperparameters -> (count, P, E), (count, E)."""
        with torch.no_grad():
            times, where = torch.unique(torch.cat([at, data.times]), return_inverse=True)
            at_index, row_index = where[: len(at)], where[len(at) :][data.time_of]
            variances = self.variances(theta)
            time = self._time_kernel(theta, times, times)
            time_factor = torch.linalg.cholesky(time + 1e-8 * torch.eye(len(times)) * time.diagonal().max())
            level = self._level_kernel(theta, times, times)
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

    def prepare(self, observations: Observations) -> _Tensors:
        """Observations as tensors, y scaled to mean 0 and variance 1 (undone by `sample`)."""
        y = observations.y
        centre, scale = float(y.mean()), float(y.std()) or 1.0
        trial_of = torch.tensor(observations.trial_of)
        times, time_of = torch.unique(torch.tensor(observations.u), return_inverse=True)
        count = len(observations.trials)
        return _Tensors(
            per=[torch.as_tensor(base(observations.x[:, i])) for i, base in enumerate(self.bases)],
            features=torch.as_tensor(self.features(observations.x)),
            trial_of=trial_of,
            same=torch.nonzero(trial_of[:, None] == trial_of[None, :], as_tuple=True),
            flat_trial=trial_of[:, None] * count + trial_of[None, :],
            times=times,
            time_of=time_of,
            flat_time=time_of[:, None] * len(times) + time_of[None, :],
            y=torch.as_tensor((y - centre) / scale),
            seeds=torch.tensor(observations.seeds),
            epochs=torch.tensor(observations.epochs),
            contrast_u=torch.tensor(observations.contrast_u),
            contrast_epochs=torch.tensor(observations.contrast_epochs),
            contrast_outer=torch.as_tensor(observations.contrast_outer / scale**2),
            contrast_df=torch.tensor(observations.contrast_df),
            centre=centre,
            scale=scale,
        )

    def sample(
        self,
        observations: Observations,
        at: Array,
        *,
        hyperdraws: int,
        draws_each: int,
        rng: np.random.Generator,
        warm: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Posterior, tuple[Tensor, Tensor]]:
        """Posterior draws at u = `at`, in logits; also the mode and spread, to start a fit on part of the data from."""
        data = self.prepare(observations)
        mode = self.mode(data, None if warm is None else warm[0], 80 if warm is None else 20)
        spread = self.spread(mode, data) if warm is None else warm[1]
        # A fit on part of the data starts from the whole's mode and spread and needs only a short run.
        chains, thin, burn = (2, 4, 60) if warm is None else (1, 2, 10)
        kept: list[Tensor] = []
        evaluations = 0.0
        steps = math.ceil(hyperdraws / chains) * thin
        for _ in range(chains):
            path, evaluations = self.chain(data, mode, spread, burn + steps, rng)
            kept.append(path[burn:])
        rhat = _split_rhat(torch.stack(kept).numpy())
        theta = torch.cat([path[thin - 1 :: thin] for path in kept])
        weights, levels = [], []
        for one in theta:
            drawn, level = self.draw(one, data, torch.as_tensor(at), draws_each, rng)
            weights.append(drawn * data.scale)
            levels.append(level * data.scale + data.centre)
        posterior = Posterior(np.concatenate(weights), np.concatenate(levels), theta.numpy(), at, evaluations, rhat)
        return posterior, (mode, spread)

    def predictive_sd(self, theta: Array, scale: float, seeds: float, *, misfit: bool = True) -> Array:
        """Standard deviation (logits) of a new run's mean over seeds around the surface, full budget -> (S,).

        Without `misfit`, what the surface fails to say of a configuration, it is the luck of seeds and epochs alone.
        """
        rows = torch.as_tensor(theta)
        one = torch.ones(1, dtype=torch.float64)
        shares = (1 / seeds, 1 / seeds, 1.0 if misfit else 0.0)
        total = [
            sum(share * float(sd) ** 2 for sd, share in zip(self._luck(t, one), shares, strict=True)) for t in rows
        ]
        return scale * np.sqrt(np.array(total))


class _Tensors(NamedTuple):
    per: list[Tensor]
    features: Tensor
    trial_of: Tensor
    same: tuple[Tensor, Tensor]  # row and column of every pair of rows of one trial
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


def _torch_matern(scaled: Tensor) -> Tensor:
    r = math.sqrt(5) * scaled
    return (1 + r + r**2 / 3) * torch.exp(-r)


def _symmetric(kernels: list[Tensor], order: int) -> Tensor:
    """Sum over all products of `order` different kernels, without listing them (one pass for every dimension)."""
    sums = [torch.ones_like(kernels[0])] + [torch.zeros_like(kernels[0]) for _ in range(order)]
    for kernel in kernels:
        sums = [sums[0]] + [sums[k] + kernel * sums[k - 1] for k in range(1, order + 1)]
    return sums[order]


def _split_rhat(chains: Array) -> Array:
    """Split R-hat of each hyperparameter from chains (C, S, H)."""
    half = chains.shape[1] // 2
    if half < 4:
        return np.full(chains.shape[2], np.nan)
    parts = np.concatenate([chains[:, :half], chains[:, half : 2 * half]])
    within = parts.var(axis=1, ddof=1).mean(axis=0)
    between = half * parts.mean(axis=1).var(axis=0, ddof=1)
    return np.sqrt(((half - 1) / half * within + between / half) / within)


class Failures(NamedTuple):
    """Posterior draws of a logistic model of failure: weights (S, 1 + functions), intercept first."""

    weights: Array
    failed: int
    trials: int


def fit_failures(bases: Sequence[Basis], x: Array, failed: Array, draws: int, rng: np.random.Generator) -> Failures:
    """Bayesian logistic regression of failure on each dimension's first two functions.

    Every dimension has its own scale, small unless the data ask for more, so that two failures in fifty do not make a
    cause of every parameter. Sampled by elliptical slice sampling (Murray et al. 2010): the prior is Gaussian in
    standardised weights and log scales.
    """
    columns = [failure_columns(base, x[:, i]) for i, base in enumerate(bases)]
    design = np.concatenate([np.ones((len(x), 1)), *columns], axis=1)
    owner = np.concatenate([np.full(c.shape[1], i) for i, c in enumerate(columns)])
    size, burn, thin = 1 + len(owner) + len(bases), 600, 10
    signs = np.where(failed > 0, 1.0, -1.0)

    def weights_of(state: Array) -> Array:
        scales = np.exp(math.log(0.2) + 1.4 * state[1 + len(owner) :])
        return np.concatenate([[-2.0 + 2.0 * state[0]], scales[owner] * state[1 : 1 + len(owner)]])

    def likelihood(state: Array) -> float:
        return -float(np.logaddexp(0.0, -signs * (design @ weights_of(state))).sum())

    state = np.zeros(size)
    value = likelihood(state)
    kept: list[Array] = []
    for step in range(burn + thin * draws):
        state, value = _elliptical_step(state, value, likelihood, rng)
        if step >= burn and (step - burn) % thin == thin - 1:
            kept.append(weights_of(state))
    return Failures(np.stack(kept), int(failed.sum()), len(failed))


def failure_columns(base: Basis, x: Array) -> Array:
    """A dimension's columns of the failure model at coordinates (n,) -> (n, 2); a two-level dimension has one."""
    return base(x)[:, :2]


def failure_logits(bases: Sequence[Basis], failures: Failures, x: Array) -> Array:
    """Log-odds of failure at coordinates (n, D) -> (n, S)."""
    columns = [failure_columns(base, x[:, i]) for i, base in enumerate(bases)]
    return np.concatenate([np.ones((len(x), 1)), *columns], axis=1) @ failures.weights.T


def _elliptical_step(
    state: Array, value: float, log_likelihood: Callable[[Array], float], rng: np.random.Generator
) -> tuple[Array, float]:
    """One step of elliptical slice sampling under a standard normal prior."""
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
