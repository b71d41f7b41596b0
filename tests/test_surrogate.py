"""The Gaussian process: its basis, its kernel, its noise, its failures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.basis import MAIN, basis
from analysis.effects import sobol_indices
from analysis.observations import Observations, logit, observe
from analysis.sampler import Chain, diagnose, find_modes, weights_without
from analysis.surrogate import PAIR, TRIPLE, Surface, _Powers
from analysis.tails import DEGREES, LOG_PRIOR, SCALES, Tails
from analysis.training import Attempts, fit_training
from ramcore.space import Dimension
from tests.synthetic import Synthetic, simulate, unit_dimensions

pytestmark = pytest.mark.usefixtures("quick_fits")

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
    powers = [_Powers(per, most, order) for order, most in enumerate((MAIN, PAIR, TRIPLE), start=1)]
    kernel = surface._surface_kernel(theta, powers).numpy()
    features = surface.features(x)
    assert kernel == pytest.approx(features * surface.variances(theta).numpy() @ features.T, rel=1e-6)
    assert len(surface.groups) == features.shape[1]


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
    posterior = surface.sample(observations, np.ones(1), hyperdraws=30, draws_each=1, rng=rng)
    assert np.sqrt(3) * np.median(posterior.held_out.noise) == pytest.approx(0.3, rel=0.35), "rows are of three seeds"


def test_one_lost_seed_does_not_make_all_others_noisy() -> None:
    def fitted(lost: float) -> tuple[float, float]:
        rng = np.random.default_rng(5)
        x = pd.DataFrame({"a": rng.random(20)})
        table = curves(20, 2, 3, 0.1, rng)
        y = np.log(table["val_accuracy"] / (1 - table["val_accuracy"]))
        y = y + 2 * x["a"].to_numpy()[table["trial"]] - lost * ((table["trial"] == 3) & (table["seed"] == 1))
        surface = Surface(DIMENSIONS[:1])
        found = surface.sample(
            observe(table.assign(val_accuracy=1 / (1 + np.exp(-y))), x, 3, 10_000), np.ones(1), hyperdraws=20,
            draws_each=3, rng=rng,
        )  # fmt: skip
        ends = surface.features(np.array([[0.1], [0.9]])) @ found.weights[:, :, 0].T
        return float(np.median(found.held_out.noise)), float((ends[1] - ends[0]).std())

    (noise, width), (with_lost, wider) = fitted(0.0), fitted(4.0)
    assert with_lost == pytest.approx(noise, rel=0.6)
    assert wider < 2 * width


def test_scales_of_noise_are_drawn_from_what_they_are_given() -> None:
    rng, tails = np.random.default_rng(0), Tails(2000)
    flat = torch.zeros(len(SCALES), 2000)
    for _ in range(3):
        tails.redraw(flat, rng)
    assert float(tails.scale.log().mean()) == pytest.approx(
        float((SCALES.log() * LOG_PRIOR.exp()).sum(dim=1)[-1]), abs=0.05
    )
    wide = torch.zeros(len(SCALES), 2000)
    wide[:12, :500] = -1e3  # a quarter of the trials is far noisier
    for _ in range(20):
        tails.redraw(wide, rng)
    assert (tails.scale[:500] >= SCALES[12]).all()
    assert tails._degrees < len(DEGREES) - 1, "noise with such tails is not normal"


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
    posterior = surface.sample(observations, np.ones(1), hyperdraws=20, draws_each=2, rng=rng)
    total = np.median(sobol_indices(surface, posterior).total, axis=1)
    assert total[0] > 0.98
    assert total[1] < 0.02


def test_along_a_dimension_equals_the_surface_at_each_value() -> None:
    surface = Surface(DIMENSIONS)
    rng = np.random.default_rng(0)
    x = np.column_stack([d.quantile(rng.random(5)) for d in DIMENSIONS])
    weights = rng.standard_normal((len(surface.groups), 3))
    for i, dimension in enumerate(DIMENSIONS):
        grid = dimension.grid(4)
        rest, *factors = surface.along(x, i, weights)
        found = rest[None] + np.tensordot(surface.bases[i](grid), np.stack(factors), axes=1)
        for value, rows in zip(grid, found, strict=True):
            x[:, i] = value
            assert rows == pytest.approx(surface.features(x) @ weights)


def test_prediction_without_a_trial_equals_a_fit_to_the_others() -> None:
    rng = np.random.default_rng(3)
    x = pd.DataFrame({"a": rng.random(8)})
    observations = observe(curves(8, 2, 4, 0.2, rng), x, 4, 10_000)
    surface = Surface(DIMENSIONS[:1])
    theta = surface.prior_mean + 0.2 * surface.prior_sd
    data = surface._prepare(observations)
    factor = torch.linalg.cholesky(surface.covariance(theta, data))
    mean, variance, _, _ = surface._without_each(theta, data, factor)
    covariance = surface.covariance(theta, data).numpy()
    for trial, row in enumerate(observations.last):
        rest = observations.trial_of != trial
        solved = np.linalg.solve(covariance[np.ix_(rest, rest)], covariance[rest, row])
        assert mean[trial] == pytest.approx(solved @ data.y.numpy()[rest])
        assert variance[trial] == pytest.approx(covariance[row, row] - solved @ covariance[rest, row])


def test_expected_r2_of_more_trials_is_what_they_bring() -> None:
    study = Synthetic(
        truth=lambda x, u: 2 * x[:, 0] + x[:, 1] + 0 * u,
        dimensions=unit_dimensions(2),
        trials=10,
        epochs=3,
        trial_sd=0.5,
    )
    surface, rng = Surface(study.dimensions), np.random.default_rng(0)

    def fitted(trials: int) -> tuple[Observations, np.ndarray]:
        records = simulate(dataclasses.replace(study, trials=trials))
        observations = observe(records.epochs, records.trials[["x1", "x2"]], 3, 1_000_000)
        return observations, surface.sample(observations, np.ones(1), hyperdraws=20, draws_each=1, rng=rng).theta

    points = rng.random((100, 2))
    few, theta = fitted(10)
    many, _ = fitted(40)
    now = surface.explained(theta, few, points)
    then = surface.explained(theta, few.with_trials(many.x[10:], 2), points)
    truly = surface.explained(theta, many, points)
    assert now < then == pytest.approx(truly, abs=0.05)


def failing(x: np.ndarray, failed: np.ndarray) -> Attempts:
    return Attempts(x, np.ones(len(x)), 1.0 - failed, failed.astype(float))


def test_failures_of_one_cause_are_not_attributed_to_other_parameters() -> None:
    rng = np.random.default_rng(4)
    bases = [basis(d) for d in unit_dimensions(3)]
    x = rng.random((60, 3))
    training = fit_training(bases, failing(x, x[:, 1] > 0.8), 200, rng)
    assert training is not None
    assert fit_training(bases, failing(x, x[:, 1] > 1), 200, rng) is None, "every run trained"

    def change(i: int) -> float:
        ends = training.along(np.full((1, 3), 0.5), i, np.array([0.02, 0.98]))[:, 0]
        return float(np.median(np.abs(ends[1] - ends[0])))

    assert change(1) > 0.5
    assert change(0) < 0.15
    assert change(2) < 0.15
    points = rng.random((5, 3))
    along = training.along(points, 1, np.array([0.3]))[0]
    points[:, 1] = 0.3
    assert along == pytest.approx(training.probability(points))


def test_runs_that_were_stopped_early_count_less_as_failures() -> None:
    rng = np.random.default_rng(4)
    bases = [basis(d) for d in unit_dimensions(1)]
    x, failed = rng.random((60, 1)), np.arange(60) < 20
    late = fit_training(bases, failing(x, failed), 200, rng)
    early = fit_training(bases, failing(x, failed)._replace(u=np.where(failed, 0.2, 1.0)), 200, rng)
    assert late is not None and early is not None
    assert late.probability(x).mean() == pytest.approx(2 / 3, abs=0.07)
    assert early.probability(x).mean() > late.probability(x).mean() + 0.1


def two_bells(state: np.ndarray) -> tuple[float, np.ndarray]:
    """Normals of standard deviation 1 at -4 and 4, the second twice as likely."""
    logs = np.array([-0.5 * np.sum((state - m) ** 2) + w for m, w in ((-4.0, 0.0), (4.0, np.log(2)))])
    total = np.logaddexp(*logs)
    share = np.exp(logs - total)
    return float(total), -(share[0] * (state + 4.0) + share[1] * (state - 4.0))


def test_both_modes_are_found_and_visited_as_often_as_they_weigh() -> None:
    rng = np.random.default_rng(0)
    modes = find_modes(two_bells, list(5 * rng.standard_normal((8, 2))), np.full(2, 5.0))
    assert sorted(float(mode.at[0]) for mode in modes) == pytest.approx([-4, 4], abs=0.1)
    chains = [Chain(two_bells, modes, k, child) for k, child in enumerate(rng.spawn(4))]
    paths = np.stack([chain.run(500) for chain in chains])
    assert (paths[..., 0] > 0).mean() == pytest.approx(2 / 3, abs=0.08)
    assert paths[paths > 0].std() == pytest.approx(1, abs=0.1)
    assert diagnose(paths)[0] < 1.05


def test_weights_of_draws_without_an_observation_undo_what_it_told() -> None:
    draws = (
        np.random.default_rng(0).standard_normal((4000, 1)) * np.sqrt(0.5) + 0.5
    )  # N(0, 1) after seeing 1 of N(x, 1)
    weights = weights_without(-0.5 * (1 - draws) ** 2)
    assert (weights * draws).sum() == pytest.approx(0, abs=0.12)
    flat = weights_without(np.zeros((50, 2)))
    assert flat == pytest.approx(np.full((50, 2), 1 / 50), rel=0.1)


def test_rhat_is_one_for_settled_chains_and_large_for_chains_apart() -> None:
    chains = np.random.default_rng(5).standard_normal((2, 400, 3))
    rhat, ess = diagnose(chains)
    assert rhat == pytest.approx(1.0, abs=0.03) and 400 < ess < 1200
    chains[1] += [0.0, 0.0, 3.0]
    rhat, ess = diagnose(chains)
    assert rhat > 1.5 and ess < 20
