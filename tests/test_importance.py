"""Indices and effects against known truths, and changes that must not affect them."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pandas as pd
import pytest
from scipy.stats import sobol_indices, uniform

from analysis.crosschecks import fanova, last_accuracy, ped_anova
from analysis.effects import Predictor, marginal, ranks_of, space_points
from analysis.importance import analyse
from analysis.load import StudyData
from analysis.questions import shapley_effects
from analysis.results import (
    DUMMY,
    MAX_RHAT,
    MIN_R2,
    Analysis,
    Interval,
    Matrix,
    ParameterDraws,
    interval,
    why_not_ranked,
)
from analysis.selection import combine, count_trials, select, unit_table
from analysis.surrogate import HeldOut, Posterior, Surface
from analysis.training import Training
from analysis.trust import measured_seed_noise, seed_sds
from analysis.verdicts import Verdict, judge
from benchmarks.sensitivity import DESIGNS, crossing_truth, true_indices
from ramcore.errors import UserError
from ramcore.space import Dimension
from tests.synthetic import RAM_DEFAULT, RAM_DIMENSIONS, Synthetic, Truth, ram_truth, simulate, unit_dimensions

pytestmark = pytest.mark.usefixtures("quick_fits")

FEW = 80  # hyperparameter draws: enough for these tolerances


def totals(analysis: Analysis) -> dict[str, float]:
    return {e.name: e.total.mid for e in analysis.ranking.effects}


def ishigami(x: np.ndarray, u: float) -> np.ndarray:
    z = np.pi * (2 * x - 1)
    value = np.sin(z[:, 0]) + 7 * np.sin(z[:, 1]) ** 2 + 0.1 * z[:, 2] ** 4 * np.sin(z[:, 0])
    return 0.2 * (value - 3.5) + 0 * u


def sobol_g(x: np.ndarray, u: float) -> np.ndarray:
    a = np.array([0.0, 1.0, 4.5, 9.0])
    return np.prod((np.abs(4 * x - 2) + a) / (1 + a), axis=1) - 1 + 0 * u


@cache
def analytic(truth: Truth, count: int, trials: int) -> Analysis:
    """The analysis of a function that is measured nearly without noise."""
    study = Synthetic(
        truth=truth, dimensions=unit_dimensions(count), trials=trials, epochs=1, seeds=1, trial_sd=0.0, epoch_sd=1e-3
    )
    records = simulate(study)._replace(settings={"sizes": {"validation": 10_000_000}})
    return analyse(records, hyperdraws=FEW)


@pytest.mark.parametrize(("truth", "count", "trials"), [(ishigami, 3, 128), (sobol_g, 4, 96)])
def test_indices_of_analytic_functions_agree_with_scipy(truth: Truth, count: int, trials: int) -> None:
    analysis = analytic(truth, count, trials)
    effects = {e.name: e for e in analysis.ranking.effects}
    names = [f"x{i + 1}" for i in range(count)]
    known = sobol_indices(func=lambda x: truth(x.T, 1.0), n=2**13, dists=[uniform()] * count, rng=0)
    assert analysis.trust.fit.r2 > 0.8
    assert [effects[n].first.mid for n in names] == pytest.approx(list(known.first_order), abs=0.06)
    assert [effects[n].total.mid for n in names] == pytest.approx(list(known.total_order), abs=0.06)
    assert effects[DUMMY].total.mid < 0.02


@pytest.fixture(scope="module")
def mixed() -> tuple[StudyData, Analysis]:
    design = dataclasses.replace(DESIGNS["half Sobol, half optimiser + halving (64)"], trials=40, seed=7)
    records = simulate(design)
    return records, analyse(records, hyperdraws=FEW)


def test_stopped_trials_with_crossing_curves_give_true_indices_and_plain_fanova_does_not(
    mixed: tuple[StudyData, Analysis],
) -> None:
    records, analysis = mixed
    dimensions = DESIGNS["half Sobol, half optimiser + halving (64)"].dimensions
    first, total = true_indices(crossing_truth, dimensions)
    names = [d.name for d in dimensions]
    assert (records.trials["state"] == "pruned").any()
    ours = totals(analysis)
    assert [ours[n] for n in names] == pytest.approx(list(total), abs=0.10)
    assert analysis.ranking.effects[0].name == names[int(np.argmax(total))]
    assert ours[DUMMY] < 0.04
    assert ours["inert"] < 0.04
    covered = [e.total.low - 0.005 <= dict(zip(names, total, strict=True))[e.name] <= e.total.high + 0.005
               for e in analysis.ranking.effects if e.name != DUMMY]  # fmt: skip
    assert np.mean(covered) >= 0.8
    assert analysis.trust.fit.r2 > 0.7

    last = last_accuracy(records.epochs)
    naive = fanova(names, unit_table(records, dimensions).loc[last.index].to_numpy(), last.to_numpy())
    shares = np.array([naive[n] for n in names])
    error = np.abs(shares - first / first.sum()).mean()
    mine = np.array([ours[n] for n in names])
    assert error > 2 * np.abs(mine / mine.sum() - total / total.sum()).mean(), "the plain estimator fails on these data"


def test_failed_trials_are_counted_and_their_cause_is_found() -> None:
    study = Synthetic(
        truth=ram_truth, dimensions=RAM_DIMENSIONS[:5], trials=32, fail=lambda x: float(x[4] > 0.8), default=RAM_DEFAULT
    )
    records = simulate(study)
    analysis = analyse(records, hyperdraws=FEW)
    diverged = int((records.trials["state"] == "failed").sum())
    assert analysis.data.counts.diverged == diverged > 2
    assert analysis.data.counts.used == len(records.trials), "diverged trials inform the surface until they diverge"
    effects = {e.name: e for e in analysis.ranking.effects}
    rate = effects["learning_rate"]
    assert rate.failure is not None and rate.failure.low > 20
    others = [e.failure.mid for e in analysis.ranking.effects if e.failure is not None and e.name != "learning_rate"]
    assert max(others) < 15
    assert rate.training is not None and rate.training.low > 20
    assert rate.effect.mid > rate.trained.mid - 1, "the effect counts runs that do not train"


def test_shuffled_trials_and_parameters_give_the_same_results() -> None:
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
    assert one.trust.fit.r2 == pytest.approx(two.trust.fit.r2, abs=1e-6)
    effects = [np.array([e.effect for e in analysis.ranking.effects]) for analysis in (one, two)]
    assert effects[0] == pytest.approx(effects[1], abs=1e-4)


def test_constant_parameter_leaves_all_indices_unchanged() -> None:
    records = simulate(
        Synthetic(truth=lambda x, u: 2 * x[:, 0] + u, dimensions=unit_dimensions(2), trials=12, epochs=3)
    )
    assert records.space is not None
    more = dataclasses.replace(
        records.space, dimensions=(*records.space.dimensions, Dimension(name="fixed", type="float"))
    )
    wider = records._replace(space=more, trials=records.trials.assign(fixed=0.3))
    one, two = analyse(records, hyperdraws=10), analyse(wider, hyperdraws=10)
    assert two.data.constant == ("fixed",)
    assert totals(one) == totals(two)


def test_half_the_range_gives_half_the_linear_effect() -> None:
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
        {e.name: e.effect.mid for e in analyse(simulate(study), hyperdraws=FEW).ranking.effects}
        for study in (whole, half)
    )
    assert after["x1"] / before["x1"] == pytest.approx(0.5, abs=0.08)
    assert after["x2"] / before["x2"] == pytest.approx(1.0, abs=0.15)


def test_pure_noise_is_not_ranked() -> None:
    study = Synthetic(
        truth=lambda x, u: 0 * x[:, 0] + u, dimensions=unit_dimensions(3), trials=20, epochs=4, trial_sd=0.4
    )
    analysis = analyse(simulate(study), hyperdraws=FEW)
    assert analysis.trust.fit.r2 < MIN_R2
    assert not analysis.ranked
    assert all(v.verdict == "undecided" for v in judge(analysis))


def test_study_without_sobol_results_is_marked_as_biased() -> None:
    study = Synthetic(
        truth=ram_truth, dimensions=RAM_DIMENSIONS, trials=20, epochs=9, origin="tpe", stop=True, default=RAM_DEFAULT
    )
    records = simulate(study)
    assert select(records, []).data.biased
    lost = records.trials.assign(origin=["tpe"] * 10 + ["sobol"] * 10, state=["complete"] * 10 + ["failed"] * 10)
    epochs = records.epochs[records.epochs["trial"] < 10]
    assert select(records._replace(trials=lost, epochs=epochs), []).data.biased, "Sobol trials without results"


def test_verdicts_agree_with_a_known_truth() -> None:
    def truth(x: np.ndarray, u: float) -> np.ndarray:
        return 1.5 * x[:, 1] - 0.6 * x[:, 0] + 0.02 * x[:, 2] + u  # glimpses hurt, patch helps, scales do nothing

    study = Synthetic(truth=truth, dimensions=RAM_DIMENSIONS[:3], trials=32, epochs=4, trial_sd=0.03, epoch_sd=0.02)
    verdicts = judge(analyse(simulate(study), hyperdraws=FEW))
    assert [v.verdict for v in verdicts] == ["confirmed", "confirmed", "refuted", "confirmed"]
    only = dataclasses.replace(study, dimensions=(RAM_DIMENSIONS[1], *unit_dimensions(2)))
    assert judge(analyse(simulate(only), hyperdraws=FEW)) == (), "no claim is about patch size alone"


def judged(
    analysis: Analysis, draws: dict[str, ParameterDraws], dimensions: tuple[Dimension, ...]
) -> tuple[Verdict, ...]:
    """The verdicts if these were the draws of a ranked study."""
    data = analysis.data._replace(dimensions=dimensions)
    return judge(analysis._replace(draws=draws, data=data, ranked=True))


def test_verdict_states_the_change_over_the_case_studys_own_values(mixed: tuple[StudyData, Analysis]) -> None:
    rng = np.random.default_rng(0)
    none: np.ndarray = np.zeros(500)
    draws = {name: ParameterDraws(none + 0.1, rng.normal(9, 1, 500), {}) for name in (DUMMY, "num_glimpses")}
    glimpses = {n: rng.normal(80 + n, 0.1, 500) for n in (2, 6, 8)}
    draws["num_glimpses"] = draws["num_glimpses"]._replace(marginal=glimpses)
    dimensions = (dataclasses.replace(mixed[1].data.dimensions[0], name="num_glimpses"),)
    hardly, more = judged(mixed[1], draws, dimensions)
    for verdict in (hardly, more):
        assert "mean accuracy changes by +2.0 points (+1.8 to +2.2) from 6 to 8 glimpses" in verdict.evidence
    assert more.verdict == "refuted"
    for name, (few, many, step) in {"patch_size": (8, 20, 3), "num_scales": (2, 4, 3)}.items():
        marginal = {few: none + 80.0, many: 80 + rng.normal(step, 1, 500)}
        draws[name] = ParameterDraws(none + 0.1, none, marginal)
    scales_only = (*dimensions, dataclasses.replace(dimensions[0], name="num_scales"))
    size = judged(mixed[1], draws, scales_only)[0].evidence
    patch, scales = (np.abs(draws[n].marginal[v] - 80) for n, v in (("patch_size", 20), ("num_scales", 4)))
    change = np.abs(glimpses[8] - glimpses[6])
    share = np.mean((patch > scales) & (patch > change))
    assert 0.3 < share < 0.7 and f"that of patch size is the largest with a probability of {share:.0%}" in size
    del glimpses[6]
    *_, hardly = judged(mixed[1], draws, scales_only)
    assert hardly.claim == "The number of glimpses hardly matters" and "glimpses" not in hardly.evidence


def test_ablation_path_leads_from_default_to_best_configuration(mixed: tuple[StudyData, Analysis]) -> None:
    _, analysis = mixed
    assert not analysis.configurations.default_inside, "this study saved no default, and that is said"
    assert analysis.configurations.path[-1].accuracy.mid == pytest.approx(
        analysis.configurations.best_accuracy.mid, abs=1e-6
    )
    assert sum(s.gain.mid for s in analysis.configurations.path) == pytest.approx(
        analysis.configurations.best_accuracy.mid - analysis.configurations.default_accuracy.mid, abs=3
    )
    assert analysis.configurations.tunability[0].gain.mid >= analysis.configurations.tunability[-1].gain.mid
    assert all(isinstance(g.gain, Interval) for g in analysis.configurations.tunability)


def study_of(trials: int) -> StudyData:
    return simulate(Synthetic(truth=ram_truth, dimensions=RAM_DIMENSIONS[:5], trials=trials, epochs=3))


def test_study_with_too_little_to_fit_is_refused_in_one_line() -> None:
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


def test_six_trials_are_reported_and_not_ranked() -> None:
    analysis = analyse(study_of(6), hyperdraws=10)
    assert not analysis.ranked
    assert why_not_ranked(analysis) == "6 trials are too few to tell parameters apart, and 8 the least"


def test_running_study_is_answered_for_the_epoch_it_reached() -> None:
    records = study_of(12)
    trials = records.trials.assign(state=["complete"] * 4 + ["running"] * 8)
    epochs = records.epochs[(records.epochs["trial"] < 4) | (records.epochs["epoch"] == 1)]
    analysis = analyse(records._replace(trials=trials, epochs=epochs), hyperdraws=10)
    assert analysis.data.counts.running == 8
    early = records.epochs[records.epochs["epoch"] < 3]
    partial = select(records._replace(trials=trials, epochs=early), [])
    assert "answers are for epoch 2" in partial.data.warnings[0]


def test_different_numbers_of_epochs_are_not_taken_for_an_effect() -> None:
    records = simulate(
        Synthetic(truth=lambda x, u: 0 * x[:, 0] + 3 * u, dimensions=unit_dimensions(3), trials=18, epochs=30)
    )
    reached = {n: 30 if n < 6 else 1 + 2 * (n - 6) for n in range(18)}
    epochs = records.epochs[records.epochs["epoch"] <= records.epochs["trial"].map(reached)]
    trials = records.trials.assign(state=["complete"] * 6 + ["running"] * 12)
    analysis = analyse(records._replace(trials=trials, epochs=epochs), hyperdraws=10)
    assert analysis.trust.fit.r2 < MIN_R2 and not analysis.ranked
    assert why_not_ranked(analysis) == "6 trials have come to the last epoch so far, and 8 are the least"


def test_diverging_learning_rates_are_not_recommended() -> None:
    def truth(x: np.ndarray, u: float) -> np.ndarray:
        return 2 * x[:, 4] + 0.5 * x[:, 1] + u  # the faster the better, for the runs that survive

    study = Synthetic(
        truth=truth, dimensions=RAM_DIMENSIONS[:5], trials=40, epochs=6, fail=lambda x: 0.95 * float(x[4] > 0.6),
        default=RAM_DEFAULT,
    )  # fmt: skip
    analysis = analyse(simulate(study), hyperdraws=FEW)
    rate = next(g for g in analysis.configurations.tunability if g.name == "learning_rate")
    assert RAM_DIMENSIONS[4].to_unit([rate.best])[0] < 0.75
    assert RAM_DIMENSIONS[4].to_unit([analysis.configurations.best["learning_rate"]])[0] < 0.75


def test_forbidden_configurations_are_not_recommended_and_are_marked() -> None:
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
    scales = next(g for g in analysis.configurations.tunability if g.name == "num_scales")
    assert space.feasible({**analysis.configurations.default, "num_scales": scales.best})
    curve = analysis.curves.marginals["num_scales"]
    assert bool(curve.extrapolated[-1]) and not curve.extrapolated[0]


def test_trial_effect_is_not_counted_as_seed_noise() -> None:
    study = Synthetic(
        truth=lambda x, u: np.sign(np.sin(40 * x[:, 0]) * np.sin(37 * x[:, 1])) + u,  # too rough for any surface
        dimensions=unit_dimensions(2), trials=20, epochs=3, seeds=3, trial_sd=0.02, epoch_sd=0.01,
    )  # fmt: skip
    analysis = analyse(simulate(study), hyperdraws=FEW)
    assert not analysis.ranked
    assert analysis.trust.fit.ceiling > 0.9, "seeds account for a hundredth of the differences"


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
def test_interval_of_seed_noise_covers_it_if_trials_differ_in_noise(spread: float) -> None:
    rng, held = np.random.default_rng(0), []
    for _ in range(200):
        sds = np.exp(spread * rng.standard_normal(40))  # points, of 40 trials of two seeds
        accuracy = (50 + sds[:, None] * rng.standard_normal((40, 2))) / 100
        index = pd.MultiIndex.from_product([range(40), range(2)], names=["trial", "seed"])
        epochs = pd.Series(accuracy.ravel(), index=index, name="val_accuracy").reset_index().assign(epoch=1)
        draws = measured_seed_noise(epochs, 300, rng)
        assert draws is not None
        found = interval(draws)
        held.append(found.low <= sds.mean() <= found.high)
    assert np.mean(held) > 0.82, "nominally 0.90; pooled by the sum of degrees of freedom 0.3 at a spread of 2"


def test_parameter_without_effect_has_an_effect_near_zero(mixed: tuple[StudyData, Analysis]) -> None:
    effects = {e.name: e.effect for e in mixed[1].ranking.effects}
    for name in (DUMMY, "inert"):
        assert effects[name].low < 1 and effects[name].high < effects["width"].low


def test_claim_stays_undecided_if_the_dummy_reaches_the_same_effect(mixed: tuple[StudyData, Analysis]) -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(6, 1, 300)
    names = {"num_scales": "mixing", "num_glimpses": "steps"}
    dimensions = tuple(
        dataclasses.replace(d, name=next((k for k, v in names.items() if v == d.name), d.name))
        for d in mixed[1].data.dimensions
    )
    for dummy, verdict in ((rng.normal(0, 1, 300), "refuted"), (rng.normal(5, 2, 300), "undecided")):
        one = ParameterDraws(draws, draws, {})
        verdicts = judged(
            mixed[1], {"num_scales": one, "num_glimpses": one, DUMMY: one._replace(effect=dummy)}, dimensions
        )
        assert [v.verdict for v in verdicts] == [verdict] * 2


def posterior_of(weights: np.ndarray) -> Posterior:
    """A posterior of these draws (S, P, 1) of the surface's weights."""
    none = np.zeros((len(weights), 1))
    return Posterior(weights, none, none, 1, HeldOut(none, none, none))


def test_log_whole_number_dimension_is_averaged_by_how_often_each_value_is_sampled() -> None:
    width = Dimension(name="width", type="int", low=1, high=16, log=True)
    surface = Surface((width, Dimension(name=DUMMY, type="float")))
    weights = np.random.default_rng(0).standard_normal((4, len(surface.groups), 1))
    predictor = Predictor(surface, posterior_of(weights), None, -2.2, 0.1)
    middle = np.array([[0.5, 0.5]])
    found = marginal(predictor, 0, middle)
    sampled = space_points((width,), 2**13, 0)
    truth = predictor.accuracy(np.column_stack([sampled, np.full(len(sampled), 0.5)]))
    assert width.level_weights @ found.rows == pytest.approx(truth.mean(axis=0), abs=0.04)
    assert np.abs(found.rows.mean(axis=0) - truth.mean(axis=0)).max() > 1, "equal weights give another mean"
    shares = marginal(predictor, 0, space_points([b.dimension for b in surface.bases], 256, 1))
    both = predictor.accuracy(space_points([b.dimension for b in surface.bases], 2**13, 0))
    uniform = (np.arange(256) + 0.5) / 256
    rows = np.array([predictor.accuracy(np.column_stack([np.full(256, x), uniform])).mean(axis=0) for x in found.grid])
    first = width.level_weights @ (rows - width.level_weights @ rows) ** 2 / both.var(axis=0)
    assert shares.first_accuracy == pytest.approx(first, abs=0.03)


def test_parameters_that_are_not_surely_apart_share_a_rank() -> None:
    more = np.array([[np.nan, 0.8, 0.99], [0.2, np.nan, 0.8], [0.01, 0.2, np.nan]])
    assert ranks_of(Matrix(("A", "B", "C"), more)) == {"A": 1, "B": 1, "C": 2}
    beside = np.pad(more, ((0, 1), (0, 1)), constant_values=0.99)
    assert ranks_of(Matrix(("A", "B", "C", DUMMY), beside)) == {"A": 1, "B": 1, "C": 2}, "the dummy has no rank"


def test_every_trial_is_counted_by_its_outcome() -> None:
    trials = pd.DataFrame(
        {
            "state": ["complete", "pruned", "failed", "failed", "running"],
            "diverged": [False, False, True, False, False],
            "seeds": [(0, 1)] * 5,
        }
    )
    counts = count_trials(trials)
    assert counts[:6] == (5, 1, 1, 1, 1, 1)


def test_crosschecks_name_the_right_parameter_in_any_order() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((60, 3))
    y = 3 * x[:, 0] + 0.1 * x[:, 2]
    for estimate in (fanova, ped_anova):
        shares = estimate(["zeta", "beta", "alpha"], x, y)
        assert max(shares, key=lambda name: shares[name]) == "zeta"
        assert sum(shares.values()) == pytest.approx(1)


def test_shapley_effects_of_a_known_function_agree_with_its_closed_form() -> None:
    analysis = analytic(ishigami, 3, 128)
    found = [analysis.other[f"x{i}"].shapley.mid for i in (1, 2, 3)]
    assert found == pytest.approx([0.3139 + 0.2437 / 2, 0.4424, 0.2437 / 2], abs=0.05)


def test_shapley_effects_count_what_the_chance_of_training_changes() -> None:
    surface = Surface((*unit_dimensions(2), Dimension(name=DUMMY, type="float")))
    weights = np.zeros((2, len(surface.groups), 1))
    weights[:, 0] = 0.5  # the first function of x1
    posterior = posterior_of(weights)
    assert [s.mid for s in shapley_effects(Predictor(surface, posterior, None, -2.2, 0.1), 0)] == pytest.approx(
        [1, 0, 0]
    )
    odds = np.zeros((2, 1 + 6 * 3))
    odds[:, 1 + 6] = 2.0  # the first function of x2
    predictor = Predictor(surface, posterior, Training(tuple(surface.bases), odds), -2.2, 0.1)
    shares = [s.mid for s in shapley_effects(predictor, 0)]
    points = space_points([base.dimension for base in surface.bases], 2**12, 0)
    values = predictor.expected_logits(points)[:, 0]
    rest = values - np.mean(values)
    alone = [np.var([rest[(points[:, i] // 0.05) == k].mean() for k in range(20)]) / np.var(values) for i in (0, 1)]
    together = 1 - sum(alone)
    assert shares[:2] == pytest.approx([alone[0] + together / 2, alone[1] + together / 2], abs=0.03)
    assert sum(shares) == pytest.approx(1)


def test_run_of_two_studies_counts_once_and_others_of_the_space_join() -> None:
    records = study_of(12)
    assert records.space is not None
    settings = {"core": "rnn"}
    records = records._replace(
        space=dataclasses.replace(records.space, fixed=settings), trials=records.trials.assign(**settings)
    )
    names = [d.name for d in records.space.dimensions]
    again = records._replace(
        study=records.study._replace(name="again", run_id="2"), trials=records.trials.iloc[:3].assign(origin="ofat")
    )
    same, added = combine(records, [again])
    assert added == {} and len(same.trials) == 12, "the same configurations and seeds"
    seeds = again._replace(
        trials=again.trials.assign(seeds=[(7, 8)] * 3), epochs=again.epochs.assign(seed=again.epochs["seed"] + 7)
    )
    more, added = combine(records, [seeds])
    assert added == {"again": 3} and len(more.trials) == 15
    assert more.trials[names].iloc[12:].to_numpy().tolist() == again.trials[names].to_numpy().tolist()
    other = seeds._replace(trials=seeds.trials.assign(core="lstm"))
    assert combine(records, [other])[1] == {}, "a field that is not searched differs"
    outside = seeds._replace(trials=seeds.trials.assign(num_glimpses=40))
    assert combine(records, [outside])[1] == {}
    assert select(records, [seeds]).data.others == {"again": 3}


def test_report_says_why_trials_that_were_taken_over_are_not_in_the_fit() -> None:
    records = simulate(Synthetic(truth=ram_truth, dimensions=RAM_DIMENSIONS[:5], trials=8, epochs=3))

    def said(epochs: int, others: list[StudyData]) -> str:
        taken = {"study": "before", "epochs": epochs, "trials": [0, 4]}
        return " ".join(
            select(records._replace(settings={**records.settings, "taken_over": taken}), others).data.warnings
        )

    assert "The 2 trials taken over from before informed TPE and are not in this fit" in said(9, [])
    assert said(9, []).endswith("their schedule has 9 epochs, not 3.")
    assert said(3, []).endswith("their study was not read here.")
    before = records._replace(
        study=records.study._replace(name="before"),
        trials=records.trials.assign(seeds=[(7,)] * 8),
        epochs=records.epochs.loc[records.epochs["seed"] == 0].assign(seed=7),
    )
    assert "taken over" not in said(3, [before])


def test_evidence_of_other_studies_narrows_the_intervals() -> None:
    design = Synthetic(truth=ram_truth, dimensions=RAM_DIMENSIONS[:5], trials=14, epochs=3)
    records = simulate(design)
    others = simulate(dataclasses.replace(design, trials=40, seed=9))
    others = others._replace(study=others.study._replace(name="other"))
    others = others._replace(
        trials=others.trials.assign(seeds=[(5, 6)] * 40), epochs=others.epochs.assign(seed=others.epochs["seed"] + 5)
    )
    alone, together = analyse(records, hyperdraws=FEW), analyse(records, others=[others], hyperdraws=FEW)

    def width(analysis: Analysis) -> float:
        return float(np.mean([e.effect.high - e.effect.low for e in analysis.ranking.effects]))

    assert width(together) < 0.8 * width(alone)
    assert together.data.counts.total == 14, "the study's own"
    assert together.configurations.best_trial in records.trials.index


def test_nothing_is_ranked_if_the_sampler_has_not_converged(mixed: tuple[StudyData, Analysis]) -> None:
    analysis = mixed[1]
    assert analysis.ranked and analysis.trust.rhat <= MAX_RHAT
    apart = analysis._replace(ranked=False, trust=analysis.trust._replace(rhat=1.2))
    assert why_not_ranked(apart) == "the sampler has not converged (R-hat 1.20, and 1.1 is the most)"
    assert all(v.verdict == "undecided" for v in judge(apart))


def test_retuned_effect_is_smaller_where_another_parameter_makes_up_for_it() -> None:
    def truth(x: np.ndarray, u: float) -> np.ndarray:
        return 1 + 3.0 * np.maximum(x[:, 0], x[:, 1]) + 0 * u  # either will do

    study = Synthetic(truth=truth, dimensions=unit_dimensions(3), trials=48, epochs=2, trial_sd=0.02, epoch_sd=0.01)
    analysis = analyse(simulate(study), hyperdraws=FEW)
    effects = {e.name: e.effect for e in analysis.ranking.effects}
    assert effects["x1"].low > 3
    assert analysis.other["x1"].retuned.mid < 0.4 * effects["x1"].mid
    assert abs(analysis.other["x3"].retuned.mid) < 0.5
    held = dict(analysis.other["x1"].held)
    assert held[0.0].mid < 0.4 * effects["x1"].mid and min(lost.mid for lost in held.values()) == pytest.approx(
        0, abs=0.3
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_intervals_cover_the_truth(quick_fits: pytest.MonkeyPatch) -> None:
    quick_fits.undo()
    inside: list[bool] = []
    for name in ("Sobol, never stopped (36)", "half Sobol, half optimiser + halving (64)"):
        design = DESIGNS[name]
        _, total = true_indices(design.truth, design.dimensions)
        for seed in range(6):
            analysis = analyse(simulate(dataclasses.replace(design, seed=300 + seed)), seed=seed)
            for e in analysis.ranking.effects:
                if e.name != DUMMY:
                    true = total[[d.name for d in design.dimensions].index(e.name)]
                    inside.append(e.total.low - 0.005 <= true <= e.total.high + 0.005)
    assert np.mean(inside) >= 0.8
