"""The Gaussian process: its basis, its kernel, its noise, its failures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.basis import basis
from analysis.effects import sobol_indices
from analysis.failures import fit_failures
from analysis.observations import logit, observe
from analysis.sampler import diagnose
from analysis.surrogate import Surface
from ramcore.space import Dimension
from tests.synthetic import Synthetic, simulate, unit_dimensions

DIMENSIONS = (
    Dimension(name="a", type="float"),
    Dimension(name="b", type="int", low=1, high=4),
    Dimension(name="c", type="categorical", choices=("x", "y", "z")),
    Dimension(name="d", type="int", low=1, high=12, log=True),
)


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=["float", "int", "categorical", "log int"])
def test_basis_functions_are_orthonormal_with_mean_zero_over_sampled_values(dimension: Dimension) -> None:
    x = dimension.quantile((np.arange(24000) + 0.5) / 24000)
    values = basis(dimension)(x)
    assert values.mean(axis=0) == pytest.approx(0, abs=1e-3)
    assert values.T @ values / len(x) == pytest.approx(np.eye(values.shape[1]), abs=5e-3)


def test_kernel_equals_the_covariance_of_weighted_features() -> None:
    surface = Surface(DIMENSIONS)
    rng = np.random.default_rng(0)
    x = np.column_stack([d.quantile(rng.random(7)) for d in DIMENSIONS])
    theta = surface.prior_mean + 0.3 * surface.prior_sd
    per = [torch.as_tensor(base(x[:, i])) for i, base in enumerate(surface.bases)]
    kernel = surface._surface_kernel(theta, per).numpy()
    features = surface.features(x)
    assert kernel == pytest.approx(features * surface.variances(theta).numpy() @ features.T, rel=1e-9)
    assert len(surface.groups()) == features.shape[1]


def test_logit_of_0_and_1_is_finite_and_depends_on_the_evaluation_size() -> None:
    values = logit(np.array([0.0, 0.5, 1.0]), 100)
    assert values == pytest.approx([-np.log(199), 0, np.log(199)])


def curves(trials: int, seeds: int, epochs: int, noise: float, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for trial in range(trials):
        own = noise * rng.standard_normal(seeds)
        for seed in range(seeds):
            for epoch in range(1, epochs + 1):
                y = 1.0 + own[seed] + 0.02 * rng.standard_normal()
                rows.append((trial, seed, epoch, 1 / (1 + np.exp(-y))))
    return pd.DataFrame(rows, columns=["trial", "seed", "epoch", "val_accuracy"])


def test_seed_noise_is_measured_from_seeds_not_from_configurations() -> None:
    rng = np.random.default_rng(1)
    x = pd.DataFrame({"a": rng.random(16)})
    observations = observe(curves(16, 3, 9, 0.3, rng), x, 9, 10_000)
    surface = Surface(DIMENSIONS[:1])
    posterior, _ = surface.sample(observations, np.ones(1), hyperdraws=30, draws_each=1, rng=rng)
    scale = float(observations.y.std())
    assert float(np.median(surface.predictive_sd(posterior.theta, scale, 1.0))) == pytest.approx(0.3, rel=0.35)


def test_stopped_and_diverged_curves_are_used_up_to_their_last_result() -> None:
    rng = np.random.default_rng(2)
    table = curves(6, 2, 30, 0.1, rng)
    table = table[(table["trial"] != 0) | (table["epoch"] <= 3)]
    table.loc[(table["trial"] == 1) & (table["seed"] == 1) & (table["epoch"] > 5), "val_accuracy"] = np.nan
    observations = observe(table, pd.DataFrame({"a": rng.random(6)}), 30, 10_000)
    u = observations.u[observations.trial_of == 0]
    assert u.max() <= np.log(3) / np.log(30) + 1e-9
    late = (observations.trial_of == 1) & (observations.u > 0.6)
    assert set(observations.seeds[late]) == {1.0}
    assert np.isfinite(observations.y).all()


def test_more_trials_than_rows_keep_one_row_each() -> None:
    rng = np.random.default_rng(3)
    table = curves(700, 1, 3, 0.1, rng)
    observations = observe(table, pd.DataFrame({"a": rng.random(700)}), 3, 10_000)
    assert len(observations.y) == 700


def test_a_surface_without_noise_is_recovered() -> None:
    study = Synthetic(
        truth=lambda x, u: 2 * x[:, 0] + 0 * u,
        dimensions=unit_dimensions(2),
        trials=24,
        epochs=3,
        trial_sd=0.0,
        epoch_sd=1e-3,
    )
    records = simulate(study)
    x = records.trials[["x1", "x2"]]
    observations = observe(records.epochs, x, 3, 1_000_000)
    surface = Surface(study.dimensions)
    rng = np.random.default_rng(0)
    posterior, _ = surface.sample(observations, np.ones(1), hyperdraws=20, draws_each=2, rng=rng)
    total = np.median(sobol_indices(surface, posterior).total, axis=1)
    assert total[0] > 0.98
    assert total[1] < 0.02


def test_failures_of_one_cause_are_not_attributed_to_other_parameters() -> None:
    rng = np.random.default_rng(4)
    bases = [basis(d) for d in unit_dimensions(3)]
    x = rng.random((60, 3))
    failures = fit_failures(bases, x, x[:, 1] > 0.8, 200, rng)
    assert failures is not None and (failures.failed, failures.trials) == ((x[:, 1] > 0.8).sum(), 60)
    assert fit_failures(bases, x, x[:, 1] > 1, 200, rng) is None, "nothing failed"

    def change(i: int) -> float:
        ends = np.full((2, 3), 0.5)
        ends[:, i] = (0.02, 0.98)
        chance = failures.probability(ends)
        return float(np.median(np.abs(chance[1] - chance[0])))

    assert change(1) > 0.5
    assert change(0) < 0.15
    assert change(2) < 0.15


def test_rhat_is_one_for_settled_chains_and_large_for_chains_apart() -> None:
    chains = torch.as_tensor(np.random.default_rng(5).standard_normal((2, 400, 3)))
    rhat, ess = diagnose(list(chains))
    assert rhat == pytest.approx(1.0, abs=0.03) and 400 < ess < 1200
    rhat, ess = diagnose([chains[0], chains[1] + torch.tensor([0.0, 0.0, 3.0])])
    assert rhat > 1.5 and ess < 20
