"""python -m analysis.compare: what is shared, what differs, its page and tables, and every request that it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import figures
from analysis.compare import Args, _different_ranges, cautions, main, read_side, sentences, write_comparison
from analysis.comparison import (
    Effects,
    Side,
    alike,
    best_configuration,
    best_trials,
    compare_effects,
    intersect,
    setting_rows,
    shared_runs,
    shared_space,
)
from analysis.load import Exported, StudyData
from ramcore.space import Dimension
from tests.synthetic import Synthetic, simulate, unit_dimensions

pytestmark = pytest.mark.usefixtures("quick_fits")

RATE = Dimension(name="learning_rate", type="float", low=1e-4, high=1e-2, log=True)
PATCH = Dimension(name="patch_size", type="int", low=4, high=20, step=1)
SCALES = Dimension(name="num_scales", type="int", low=1, high=4, step=1)


def made(name: str, *dimensions: Dimension, weights: tuple[float, ...], seed: int = 0, **fixed: object) -> StudyData:
    """A study whose logits are a weighted sum of unit coordinates."""
    truth = Synthetic(
        truth=lambda x, u: x @ np.array(weights[: x.shape[1]]) + u,
        dimensions=dimensions, trials=20, epochs=3, seeds=2, trial_sd=0.03, epoch_sd=0.02, seed=seed,
    )  # fmt: skip
    records = simulate(truth)
    params = {"task": "original", "data": "digits", "design": "search", "epochs": "3"}
    study = records.study._replace(name=name, run_id=name, params=params)
    return records._replace(study=study, trials=records.trials.assign(**fixed))


@pytest.fixture(scope="module")
def sides() -> list[Side]:
    """Patch size matters in the first, and in the second, which searches less of it, little; scales are fixed there."""
    one = made("one", PATCH, RATE, SCALES, weights=(3.0, 0.0, 0.5))
    two = made("two", replace(PATCH, low=8), RATE, weights=(0.3, 0.0), seed=1, num_scales=2)
    fixed = made("three", PATCH, weights=(1.0,))
    fixed = fixed._replace(trials=fixed.trials.assign(origin="ofat"))
    found = [read_side(records, 24) for records in (one, two, fixed)]
    # So few draws never converge; what they say is close enough for the tests.
    return [s._replace(analysis=s.analysis and s.analysis._replace(ranked=True)) for s in found]


@pytest.fixture(scope="module")
def effects(sides: list[Side]) -> Effects:
    return compare_effects([side for side in sides if side.fit])


def test_ranges_are_intersected_and_a_parameter_of_one_study_is_held_at_the_value_of_the_other(
    sides: list[Side],
) -> None:
    shared = shared_space([side for side in sides if side.fit])
    found = {d.name: (d.low, d.high) for d in shared.dimensions}
    assert found == {"patch_size": (8, 20), "learning_rate": (1e-4, 1e-2)}
    assert shared.held == {"num_scales": 2} and not shared.apart


def test_values_that_dimensions_have_in_common() -> None:
    assert intersect([PATCH, replace(PATCH, low=21, high=30)]) is None
    odd = intersect([replace(PATCH, low=1, high=19, step=2), replace(PATCH, low=3, high=30)])
    assert odd and odd.levels == (3, 5, 7, 9, 11, 13, 15, 17, 19)
    core = Dimension(name="core", type="categorical", choices=("rnn", "gru", "lstm"))
    both = intersect([core, replace(core, choices=("lstm", "gru", "x"))])
    assert both and both.choices == ("gru", "lstm")
    assert intersect([core, replace(core, choices=("x",))]) is None
    assert intersect([core, RATE]) is None
    narrow = intersect([RATE, replace(RATE, low=1e-3, high=1.0)])
    assert narrow and (narrow.low, narrow.high, narrow.log) == (1e-3, 1e-2, True)


def test_ranges_that_differ_only_in_the_step_are_different(sides: list[Side]) -> None:
    one = next(side for side in sides if side.fit)
    space = one.records.space
    assert space is not None
    stepped = tuple(replace(d, step=2) if d.name == "patch_size" else d for d in space.dimensions)
    other = one._replace(records=one.records._replace(space=replace(space, dimensions=stepped)))
    assert _different_ranges([one, other]) and not _different_ranges([one, one])


def test_effect_that_differs_is_told_and_one_that_does_not_is_not(sides: list[Side], effects: Effects) -> None:
    by_name = {d.parameter: d for d in effects.differences}
    assert set(by_name) == set(effects.effects) == {"patch_size", "learning_rate"}
    patch, rate = by_name["patch_size"], by_name["learning_rate"]
    assert (patch.first, patch.second) == ("one", "two")
    assert patch.differs > 0.95 and patch.larger < 0.05 and patch.difference.high < 0
    assert rate.differs < 0.95
    # The logit of patch size's effect from 8 to 20 in the first study is 3 * 12 / 16, at the mean of the rest.
    rest = 0.5 / 3 + 1
    low, high = (100 / (1 + np.exp(-(3 * x + rest))) for x in (0.25, 1.0))
    assert effects.effects["patch_size"]["one"].mid == pytest.approx(high - low, abs=2.5)
    said = " ".join(sentences(sides, effects))
    assert "The effect of patch size is smaller in two than in one" in said and "learning rate" not in said
    warned = " ".join(cautions(sides, effects))
    assert "compared on what they share; number of scales is not varied there" in warned
    assert "three has no effects here: it is a fixed design" in warned


def test_study_without_a_ranking_is_named_and_nothing_is_said_to_differ(sides: list[Side], effects: Effects) -> None:
    assert sides[0].analysis
    unsure = sides[0]._replace(analysis=sides[0].analysis._replace(ranked=False))
    said = " ".join(sentences([unsure, sides[1]], effects))
    assert "cannot be said yet, because of one" in said and "The effect of" not in said
    assert "one supports no ranking" in " ".join(cautions([unsure, sides[1]], effects))


def test_studies_that_share_nothing_are_not_compared_and_it_says_so() -> None:
    two = [read_side(made(n, d, weights=(1.0,)), 8) for n, d in (("a", unit_dimensions(1)[0]), ("b", SCALES))]
    assert all(side.fit for side in two)
    effects = compare_effects(two)
    assert not effects.effects and set(effects.shared.apart) == {"x1", "num_scales"}
    assert "vary no parameter over values that all of them have" in " ".join(sentences(two, effects))


def test_best_configurations_and_what_they_share(sides: list[Side]) -> None:
    one = best_configuration(sides[0], ["patch_size", "num_scales"])
    assert one and one.trial == sides[0].analysis.configurations.best_trial  # type: ignore[union-attr]
    assert one.values["patch_size"] == sides[0].records.trials.at[one.trial, "patch_size"]
    trials = best_trials(sides[2])
    assert [t.last for t in trials] == sorted((t.last for t in sides[2].tracked), reverse=True)[:5]
    assert alike("num_scales", [2, 2], sides) and not alike("num_scales", [2, 3], sides)
    assert alike("learning_rate", [1e-3, 1.4e-3], sides) and not alike("learning_rate", [1e-3, 2e-3], sides)


def test_settings_that_differ_are_listed_and_others_are_not(sides: list[Side]) -> None:
    rows = dict(setting_rows(sides))
    assert rows["patch size"] == ["searched: 4 to 20", "searched: 8 to 20", "searched: 4 to 20"]
    assert rows["number of scales"] == ["searched: 1 to 4", "2", "-"]
    assert "task" not in rows and "epochs" not in rows


def test_runs_that_two_studies_share_are_counted(sides: list[Side]) -> None:
    first = sides[0]
    again = first._replace(records=first.records._replace(study=first.records.study._replace(name="again")))
    assert shared_runs([first, again]) == 40, "20 trials of two seeds"
    assert "40 runs are of the same configuration and seed" in " ".join(cautions([first, again], None))


def test_page_and_tables_hold_what_was_compared(sides: list[Side], effects: Effects, tmp_path: Path) -> None:
    paths = write_comparison(tmp_path, sides, effects)
    assert all(path.stat().st_size for path in paths)
    page = (tmp_path / "compare.html").read_text()
    for name in ("effects", "marginals", "learning_curves", "compute"):
        assert (tmp_path / "figures" / f"{name}.png").is_file()
    assert page.count("<img") == 4
    assert "number of scales: held at 2" in page and "patch size: 8 to 20" in page
    assert re.findall(r'<a href="#(\w+)"', page) == re.findall(r"<section id=(\w+)", page)
    table = pd.read_csv(tmp_path / "compare.csv").set_index("parameter")
    patch = next(d for d in effects.differences if d.parameter == "patch_size")
    assert table.at["patch_size", "difference"] == pytest.approx(patch.difference.mid)
    assert table.at["patch_size", "p_differs"] == pytest.approx(patch.differs)
    best = pd.read_csv(tmp_path / "best.csv").set_index("parameter")
    assert list(best.columns) == ["one", "two", "three", "alike"] and "num_scales" in best.index


def test_figures_draw_each_study(sides: list[Side], effects: Effects) -> None:
    ax = figures.compared_effects(effects.effects)
    assert ax.get_legend_handles_labels()[1] == ["one", "two"]
    mids = sorted(float(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 1)  # type: ignore[arg-type]
    assert mids == sorted(e.mid for by_study in effects.effects.values() for e in by_study.values())
    best = {side.name: best_trials(side) for side in sides}
    ax = figures.compared_curves(best)
    assert len(ax.lines) == 15 and ax.get_legend_handles_labels()[1] == ["one", "two", "three"]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), best["one"][0].accuracy)
    ax = figures.compared_fronts({side.name: side.tracked for side in sides})
    assert [len(c.get_offsets()) for c in ax.collections] == [20, 20, 20]  # type: ignore[arg-type]


def test_command_compares_three_studies_of_a_folder(
    sides: list[Side], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for side in sides:
        raw = side.records.space.to_dict() | {"epochs": 3}  # type: ignore[union-attr]
        Exported.write_to(tmp_path / "records", side.records._replace(raw_space=raw))
    args = Args(studies=("one", "two", "three"), records=tmp_path / "records", out=tmp_path / "out")
    assert main(args, hyperdraws=8) == 0
    shown = capfd.readouterr()
    assert (
        "one: of 20 trials, the fit expects most of trial" in shown.out
        and str(tmp_path / "out" / "compare.html") in shown.out
    )
    assert "one: fitting the surface" in shown.err
    assert len(pd.read_csv(tmp_path / "out" / "compare.csv")) == 2
    for wrong, message in (
        (("one",), "two different studies or more; got one"),
        (("one", "one"), "two different studies or more; got one and one"),
        (("one", "nope"), "a comparison must name a study that exists; got 'nope'"),
    ):
        assert main(Args(studies=wrong, records=tmp_path / "records", out=tmp_path / "no")) == 2
        error = capfd.readouterr().err.strip()
        assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "no").exists()
