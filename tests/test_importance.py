"""Indices and effects against known truths, and what must not change them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import sobol_indices, uniform

from analysis.crosschecks import fanova, last_accuracy, ped_anova, unit_table
from analysis.importance import (
    DUMMY,
    MIN_R2,
    Analysis,
    Interval,
    _ranks,
    analyse,
    count_trials,
    interval,
    seed_noise,
    seed_sds,
    trials_needed,
    why_not_ranked,
)
from analysis.load import StudyData
from analysis.verdicts import judge
from benchmarks.sensitivity import DESIGNS, crossing_truth, true_indices
from ramcore.errors import UserError
from ramcore.space import Dimension
from tests.synthetic import RAM_DEFAULT, RAM_DIMENSIONS, Synthetic, Truth, ram_truth, simulate, unit_dimensions

FEW = 24  # hyperparameter draws: enough for these tolerances


def totals(analysis: Analysis) -> dict[str, float]:
    return {e.name: e.total.mid for e in analysis.effects}


def ishigami(x: np.ndarray, u: float) -> np.ndarray:
    z = np.pi * (2 * x - 1)
    value = np.sin(z[:, 0]) + 7 * np.sin(z[:, 1]) ** 2 + 0.1 * z[:, 2] ** 4 * np.sin(z[:, 0])
    return 0.2 * (value - 3.5) + 0 * u


def sobol_g(x: np.ndarray, u: float) -> np.ndarray:
    a = np.array([0.0, 1.0, 4.5, 9.0])
    return np.prod((np.abs(4 * x - 2) + a) / (1 + a), axis=1) - 1 + 0 * u


@pytest.mark.parametrize(("truth", "count", "trials"), [(ishigami, 3, 128), (sobol_g, 4, 96)])
def test_indices_agree_with_scipy_on_analytic_functions(truth: Truth, count: int, trials: int) -> None:
    study = Synthetic(
        truth=truth, dimensions=unit_dimensions(count), trials=trials, epochs=1, seeds=1, trial_sd=0.0, epoch_sd=1e-3
    )
    records = simulate(study)._replace(settings={"sizes": {"validation": 10_000_000}})
    analysis = analyse(records, hyperdraws=FEW)
    effects = {e.name: e for e in analysis.effects}
    names = [f"x{i + 1}" for i in range(count)]
    known = sobol_indices(func=lambda x: truth(x.T, 1.0), n=2**13, dists=[uniform()] * count, rng=0)
    assert analysis.fit.r2 > 0.8
    assert [effects[n].first.mid for n in names] == pytest.approx(list(known.first_order), abs=0.06)
    assert [effects[n].total.mid for n in names] == pytest.approx(list(known.total_order), abs=0.06)
    assert effects[DUMMY].total.mid < 0.02


@pytest.fixture(scope="module")
def mixed() -> tuple[StudyData, Analysis]:
    design = dataclasses.replace(DESIGNS["half Sobol, half optimiser + halving (64)"], trials=40, seed=7)
    records = simulate(design)
    return records, analyse(records, hyperdraws=FEW)


def test_crossing_curves_seed_noise_and_early_stopping(mixed: tuple[StudyData, Analysis]) -> None:
    records, analysis = mixed
    dimensions = DESIGNS["half Sobol, half optimiser + halving (64)"].dimensions
    first, total = true_indices(crossing_truth, dimensions)
    names = [d.name for d in dimensions]
    assert (records.trials["state"] == "pruned").any()
    ours = totals(analysis)
    assert [ours[n] for n in names] == pytest.approx(list(total), abs=0.10)
    assert analysis.effects[0].name == names[int(np.argmax(total))]
    assert ours[DUMMY] < 0.04
    assert ours["inert"] < 0.04
    covered = [e.total.low - 0.005 <= dict(zip(names, total, strict=True))[e.name] <= e.total.high + 0.005
               for e in analysis.effects if e.name != DUMMY]  # fmt: skip
    assert np.mean(covered) >= 0.8
    assert analysis.fit.r2 > 0.7

    last = last_accuracy(records.epochs)
    naive = fanova(names, unit_table(records, dimensions).loc[last.index].to_numpy(), last.to_numpy())
    shares = np.array([naive[n] for n in names])
    error = np.abs(shares - first / first.sum()).mean()
    mine = np.array([ours[n] for n in names])
    assert error > 2 * np.abs(mine / mine.sum() - total / total.sum()).mean(), "the plain estimator fails on these data"


def test_failures_are_counted_and_modelled() -> None:
    study = Synthetic(
        truth=ram_truth, dimensions=RAM_DIMENSIONS[:5], trials=32, fail=lambda x: float(x[4] > 0.8), default=RAM_DEFAULT
    )
    records = simulate(study)
    analysis = analyse(records, hyperdraws=FEW)
    diverged = int((records.trials["state"] == "failed").sum())
    assert analysis.counts.diverged == diverged > 2
    assert analysis.counts.used == len(records.trials), "diverged trials inform the surface until they diverge"
    effects = {e.name: e for e in analysis.effects}
    rate = effects["learning_rate"]
    assert rate.failure is not None and rate.failure.low > 20
    others = [e.failure.mid for e in analysis.effects if e.failure is not None and e.name != "learning_rate"]
    assert max(others) < 15
    assert rate.with_divergence is not None and rate.with_divergence.mid > rate.effect.mid - 1


def test_order_of_rows_and_of_parameters_does_not_matter() -> None:
    study = Synthetic(
        truth=crossing_truth, dimensions=DESIGNS["Sobol, never stopped (36)"].dimensions, trials=14, epochs=4
    )
    records = simulate(study)
    assert records.space is not None
    shuffled = records._replace(
        trials=records.trials.sample(frac=1, random_state=1),
        epochs=records.epochs.sample(frac=1, random_state=2),
        space=dataclasses.replace(records.space, dimensions=records.space.dimensions[::-1]),
    )
    one, two = analyse(records, hyperdraws=10), analyse(shuffled, hyperdraws=10)
    assert totals(one) == pytest.approx(totals(two), abs=1e-6)
    assert one.fit.r2 == pytest.approx(two.fit.r2, abs=1e-6)
    effects = [np.array([e.effect for e in analysis.effects]) for analysis in (one, two)]
    assert effects[0] == pytest.approx(effects[1], abs=1e-4)


def test_a_constant_column_changes_nothing() -> None:
    records = simulate(
        Synthetic(truth=lambda x, u: 2 * x[:, 0] + u, dimensions=unit_dimensions(2), trials=12, epochs=3)
    )
    assert records.space is not None
    more = dataclasses.replace(
        records.space, dimensions=(*records.space.dimensions, Dimension(name="fixed", type="float"))
    )
    wider = records._replace(space=more, trials=records.trials.assign(fixed=0.3))
    one, two = analyse(records, hyperdraws=10), analyse(wider, hyperdraws=10)
    assert two.constant == ("fixed",)
    assert totals(one) == totals(two)


def test_halving_a_range_halves_a_linear_effect() -> None:
    whole = Synthetic(
        truth=lambda x, u: 0.6 * x[:, 0] + 0.3 * x[:, 1] + 0 * u,
        dimensions=unit_dimensions(2),
        trials=24,
        epochs=2,
        trial_sd=0.01,
        epoch_sd=0.01,
    )
    half = dataclasses.replace(whole, truth=lambda x, u: 0.3 * x[:, 0] + 0.3 * x[:, 1] + 0 * u)
    before, after = (
        {e.name: e.effect.mid for e in analyse(simulate(study), hyperdraws=FEW).effects} for study in (whole, half)
    )
    assert after["x1"] / before["x1"] == pytest.approx(0.5, abs=0.08)
    assert after["x2"] / before["x2"] == pytest.approx(1.0, abs=0.15)


def test_pure_noise_is_not_ranked() -> None:
    study = Synthetic(
        truth=lambda x, u: 0 * x[:, 0] + u, dimensions=unit_dimensions(3), trials=20, epochs=4, trial_sd=0.4
    )
    analysis = analyse(simulate(study), hyperdraws=FEW)
    assert analysis.fit.r2 < MIN_R2
    assert not analysis.ranked
    assert all(v.verdict in ("undecided", "not tested") for v in judge(analysis))


def test_a_study_of_the_optimiser_alone_is_marked_as_biased() -> None:
    study = Synthetic(
        truth=ram_truth, dimensions=RAM_DIMENSIONS, trials=20, epochs=9, origin="tpe", stop=True, default=RAM_DEFAULT
    )
    records = simulate(study)
    assert analyse(records, hyperdraws=10).biased
    lost = records.trials.assign(origin=["tpe"] * 10 + ["sobol"] * 10, state=["complete"] * 10 + ["failed"] * 10)
    epochs = records.epochs[records.epochs["trial"] < 10]
    assert analyse(records._replace(trials=lost, epochs=epochs), hyperdraws=10).biased, "Sobol trials without results"


def test_verdicts_on_a_known_truth() -> None:
    def truth(x: np.ndarray, u: float) -> np.ndarray:
        return 1.5 * x[:, 1] - 0.6 * x[:, 0] + 0.02 * x[:, 2] + u  # glimpses hurt, patch helps, scales do nothing

    study = Synthetic(truth=truth, dimensions=RAM_DIMENSIONS[:3], trials=32, epochs=4, trial_sd=0.03, epoch_sd=0.02)
    verdicts = judge(analyse(simulate(study), hyperdraws=FEW))
    assert [v.verdict for v in verdicts] == ["confirmed", "confirmed", "refuted", "confirmed"]
    only = dataclasses.replace(study, dimensions=(RAM_DIMENSIONS[1], *unit_dimensions(2)))
    assert [v.verdict for v in judge(analyse(simulate(only), hyperdraws=FEW))] == ["not tested"] * 4


def test_a_verdict_says_what_the_case_studys_own_values_do(mixed: tuple[StudyData, Analysis]) -> None:
    rng = np.random.default_rng(0)
    claims = {f"effect {name}": rng.normal(9, 1, 500) for name in (DUMMY, "num_glimpses")}
    claims |= {f"marginal num_glimpses {n}": rng.normal(80 + n, 0.1, 500) for n in (2, 6, 8)}
    dimensions = (dataclasses.replace(mixed[1].dimensions[0], name="num_glimpses"),)
    hardly, more = judge(mixed[1]._replace(claims=claims, dimensions=dimensions, ranked=True))[2:]
    for verdict in (hardly, more):
        assert "mean accuracy changes by +2.0 points (+1.8 to +2.2) from 6 to 8 glimpses" in verdict.evidence
    assert more.verdict == "refuted"
    for name, (few, many, step) in {"patch_size": (8, 20, 3), "num_scales": (2, 4, 3)}.items():
        claims[f"marginal {name} {few}"] = np.full(500, 80.0)
        claims[f"marginal {name} {many}"] = 80 + rng.normal(step, 1, 500)
        claims[f"total {name}"] = claims["total num_glimpses"] = np.full(500, 0.1)
    size = judge(mixed[1]._replace(claims=claims, dimensions=dimensions, ranked=True))[0].evidence
    patch, scales = (np.abs(claims[f"marginal {n}"] - 80) for n in ("patch_size 20", "num_scales 4"))
    glimpses = np.abs(claims["marginal num_glimpses 8"] - claims["marginal num_glimpses 6"])
    share = np.mean((patch > scales) & (patch > glimpses))
    assert 0.3 < share < 0.7 and f"that of patch_size is the largest with a probability of {share:.0%}" in size
    del claims["marginal num_glimpses 6"]
    hardly, more = judge(mixed[1]._replace(claims=claims, dimensions=dimensions, ranked=True))[2:]
    assert "glimpses" not in hardly.evidence and more.verdict == "not tested"


def test_tunability_and_ablation_lead_from_the_default_to_the_best(mixed: tuple[StudyData, Analysis]) -> None:
    _, analysis = mixed
    assert not analysis.default_inside, "this study saved no default, and that is said"
    assert analysis.ablation[-1].accuracy.mid == pytest.approx(analysis.best_accuracy.mid, abs=1e-6)
    assert sum(s.gain.mid for s in analysis.ablation) == pytest.approx(
        analysis.best_accuracy.mid - analysis.default_accuracy.mid, abs=3
    )
    assert analysis.tunability[0].gain.mid >= analysis.tunability[-1].gain.mid
    assert all(isinstance(g.gain, Interval) for g in analysis.tunability)


def study_of(trials: int) -> StudyData:
    return simulate(Synthetic(truth=ram_truth, dimensions=RAM_DIMENSIONS[:5], trials=trials, epochs=3))


def test_too_little_to_answer_is_said_in_one_line() -> None:
    records = study_of(10)
    cases = {
        "needs at least 5 trials": study_of(1),
        "of 10 .state: 10 failed": records._replace(
            epochs=records.epochs.assign(val_accuracy=np.nan), trials=records.trials.assign(state="failed")
        ),
        "every trial of synthetic-0 has the same": records._replace(
            trials=records.trials.assign(
                num_glimpses=4, patch_size=8, num_scales=2, location_std=0.1, learning_rate=1e-3
            )
        ),
        "needs the search space": records._replace(space=None, space_problem="it is missing"),
    }
    for message, case in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            analyse(case)
        assert "\n" not in str(caught.value)


def test_a_handful_of_trials_is_reported_and_not_ranked() -> None:
    analysis = analyse(study_of(6), hyperdraws=10)
    assert not analysis.ranked
    assert why_not_ranked(analysis) == "6 trials are too few to tell parameters apart, and 8 the least"


def test_a_running_study_gets_a_partial_answer() -> None:
    records = study_of(12)
    trials = records.trials.assign(state=["complete"] * 4 + ["running"] * 8)
    epochs = records.epochs[(records.epochs["trial"] < 4) | (records.epochs["epoch"] == 1)]
    analysis = analyse(records._replace(trials=trials, epochs=epochs), hyperdraws=10)
    assert analysis.counts.running == 8
    early = records.epochs[records.epochs["epoch"] < 3]
    partial = analyse(records._replace(trials=trials, epochs=early), hyperdraws=10)
    assert "answers are for epoch 2" in partial.warnings[0]


def test_how_long_trials_have_learned_is_not_taken_for_what_their_configuration_does() -> None:
    records = simulate(
        Synthetic(truth=lambda x, u: 0 * x[:, 0] + 3 * u, dimensions=unit_dimensions(3), trials=18, epochs=30)
    )
    reached = {n: 30 if n < 6 else 1 + 2 * (n - 6) for n in range(18)}
    epochs = records.epochs[records.epochs["epoch"] <= records.epochs["trial"].map(reached)]
    trials = records.trials.assign(state=["complete"] * 6 + ["running"] * 12)
    analysis = analyse(records._replace(trials=trials, epochs=epochs), hyperdraws=10)
    assert analysis.fit.r2 < MIN_R2 and not analysis.ranked
    assert why_not_ranked(analysis) == "6 trials have come to the last epoch so far, and 8 are the least"


def test_what_diverges_is_not_recommended() -> None:
    def truth(x: np.ndarray, u: float) -> np.ndarray:
        return 2 * x[:, 4] + 0.5 * x[:, 1] + u  # the faster the better, for the runs that survive

    study = Synthetic(
        truth=truth, dimensions=RAM_DIMENSIONS[:5], trials=40, epochs=6, fail=lambda x: 0.95 * float(x[4] > 0.6),
        default=RAM_DEFAULT,
    )  # fmt: skip
    analysis = analyse(simulate(study), hyperdraws=FEW)
    rate = next(g for g in analysis.tunability if g.name == "learning_rate")
    assert RAM_DIMENSIONS[4].to_unit([rate.best])[0] < 0.75
    assert RAM_DIMENSIONS[4].to_unit([analysis.best["learning_rate"]])[0] < 0.75


def test_what_the_rules_forbid_is_not_recommended_and_is_marked() -> None:
    def truth(x: np.ndarray, u: float) -> np.ndarray:
        return 2 * x[:, 2] + x[:, 1] + u  # the more scales the better, and the larger the patch

    records = simulate(Synthetic(truth=truth, dimensions=RAM_DIMENSIONS[:3], trials=40, epochs=3, default=RAM_DEFAULT))
    assert records.space is not None
    space = dataclasses.replace(records.space, fixed={"scale_factor": 2}, widest_scale=56)
    legal = [n for n, row in records.trials.iterrows() if space.feasible(dict(row))]
    records = records._replace(
        space=space, trials=records.trials.loc[legal], epochs=records.epochs[records.epochs["trial"].isin(legal)]
    )
    analysis = analyse(records, hyperdraws=10)
    scales = next(g for g in analysis.tunability if g.name == "num_scales")
    assert space.feasible({**analysis.default, "num_scales": scales.best})
    curve = analysis.curves["num_scales"]
    assert bool(curve.extrapolated[-1]) and not curve.extrapolated[0]


def test_misfit_is_not_called_seed_noise() -> None:
    study = Synthetic(
        truth=lambda x, u: np.sign(np.sin(40 * x[:, 0]) * np.sin(37 * x[:, 1])) + u,  # too rough for any surface
        dimensions=unit_dimensions(2), trials=20, epochs=3, seeds=3, trial_sd=0.02, epoch_sd=0.01,
    )  # fmt: skip
    analysis = analyse(simulate(study), hyperdraws=FEW)
    assert not analysis.ranked
    assert analysis.fit.ceiling > 0.9, "seeds account for a hundredth of the differences"


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seed_sds_are_unbiased(seeds: int) -> None:
    values = 0.9 + 0.01 * np.random.default_rng(0).standard_normal((4000, seeds))
    index = pd.MultiIndex.from_product([range(4000), range(seeds)], names=["trial", "seed"])
    epochs = pd.Series(values.ravel(), index=index, name="val_accuracy").reset_index()
    alone = pd.DataFrame({"trial": [4000], "seed": [0], "val_accuracy": [0.1]})
    found = seed_sds(pd.concat([epochs, alone]))
    assert len(found) == 4000, "a trial of one seed says nothing of seeds"
    assert found.mean() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_the_interval_of_seed_noise_holds_it_where_trials_differ_in_it(spread: float) -> None:
    rng, held = np.random.default_rng(0), []
    posterior = SimpleNamespace(weights=np.zeros(300))
    for _ in range(200):
        sds = np.exp(spread * rng.standard_normal(40))  # points, of 40 trials of two seeds
        accuracy = (50 + sds[:, None] * rng.standard_normal((40, 2))) / 100
        index = pd.MultiIndex.from_product([range(40), range(2)], names=["trial", "seed"])
        epochs = pd.Series(accuracy.ravel(), index=index, name="val_accuracy").reset_index().assign(epoch=1)
        draws, measured = seed_noise(epochs, 1, posterior, None, None, rng)  # pyright: ignore[reportArgumentType]
        found = interval(draws)
        assert measured
        held.append(found.low <= sds.mean() <= found.high)
    assert np.mean(held) > 0.82, "nominally 0.90; pooled by the sum of degrees of freedom 0.3 at a spread of 2"


def test_uncertainty_alone_is_no_effect(mixed: tuple[StudyData, Analysis]) -> None:
    effects = {e.name: e.effect for e in mixed[1].effects}
    for name in (DUMMY, "inert"):
        assert effects[name].low < 1 and effects[name].high < effects["width"].low


def test_no_claim_is_refuted_by_what_a_dummy_reaches_too(mixed: tuple[StudyData, Analysis]) -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(6, 1, 300)
    names = {"num_scales": "mixing", "num_glimpses": "steps"}
    dimensions = tuple(
        dataclasses.replace(d, name=next((k for k, v in names.items() if v == d.name), d.name))
        for d in mixed[1].dimensions
    )
    for dummy, verdict in ((rng.normal(0, 1, 300), "refuted"), (rng.normal(5, 2, 300), "undecided")):
        claims = {"effect num_scales": draws, "effect num_glimpses": draws, f"effect {DUMMY}": dummy}
        judged = judge(mixed[1]._replace(claims=claims, dimensions=dimensions, ranked=True))
        assert [v.verdict for v in judged[1:3]] == [verdict] * 2


def test_ranks_share_what_is_not_settled() -> None:
    more = pd.DataFrame(
        [[np.nan, 0.8, 0.99], [0.2, np.nan, 0.8], [0.01, 0.2, np.nan]], index=list("ABC"), columns=list("ABC")
    )
    assert _ranks(list("ABC"), more) == {"A": 1, "B": 1, "C": 2}


def test_counts_tell_how_every_trial_ended() -> None:
    trials = pd.DataFrame(
        {
            "state": ["complete", "pruned", "failed", "failed", "running"],
            "stop_reason": ["finished", "stopped", "diverged: seed 1 at epoch 4", "error: disk", ""],
            "seeds": [(0, 1)] * 5,
        }
    )
    counts = count_trials(trials)
    assert counts[:6] == (5, 1, 1, 1, 1, 1)


def test_how_many_more_trials() -> None:
    assert trials_needed(0.7, 0.5, 20, 0.9) is None, "enough already"
    assert trials_needed(0.2, 0.0, 20, 0.4) is None, "seed noise allows no more"
    assert trials_needed(-0.3, -0.3, 20, 0.9) is None, "more trials did not help so far"
    needed = trials_needed(0.3, 0.1, 20, 0.9)
    assert needed is not None and 20 < needed < 60


def test_crosschecks_name_the_right_parameter_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((60, 3))
    y = 3 * x[:, 0] + 0.1 * x[:, 2]
    for estimate in (fanova, ped_anova):
        shares = estimate(["zeta", "beta", "alpha"], x, y)
        assert max(shares, key=lambda name: shares[name]) == "zeta"
        assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    inside: list[bool] = []
    for name in ("Sobol, never stopped (36)", "half Sobol, half optimiser + halving (64)"):
        design = DESIGNS[name]
        _, total = true_indices(design.truth, design.dimensions)
        for seed in range(6):
            analysis = analyse(simulate(dataclasses.replace(design, seed=300 + seed)), seed=seed)
            for e in analysis.effects:
                if e.name != DUMMY:
                    true = total[[d.name for d in design.dimensions].index(e.name)]
                    inside.append(e.total.low - 0.005 <= true <= e.total.high + 0.005)
    assert np.mean(inside) >= 0.8
