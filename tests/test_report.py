"""The report: its files, its page, and what each figure draws."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection, QuadMesh

from analysis import charts, figures
from analysis.answer import answer, cautions, rank_label
from analysis.crosschecks import ESTIMATES, crosscheck
from analysis.figures import Trial
from analysis.fixed_designs import FixedDesigns, OfatRow, ranges, summarise
from analysis.importance import analyse
from analysis.load import StudyData
from analysis.report import list_trials, tracked_trials, write_design_report, write_report
from analysis.results import DUMMY, Analysis, Interval
from analysis.selection import outcomes
from analysis.text import join, number, percent, span
from analysis.verdicts import THRESHOLDS, judge
from ramcore.space import Dimension, words
from tests.synthetic import RAM_DEFAULT, RAM_DIMENSIONS, Synthetic, ram_truth, simulate

pytestmark = pytest.mark.usefixtures("quick_fits")

HOSTILE = "x\"><script>alert('{{body}}')</script>"


def fixed_design(origin: str, rows: list[str]) -> StudyData:
    """An OFAT or replicate study: one trial a row, three seeds."""
    records = simulate(
        Synthetic(
            truth=ram_truth, dimensions=RAM_DIMENSIONS[:5], trials=len(rows), epochs=4, seeds=3, default=RAM_DEFAULT
        )
    )
    parts = [re.fullmatch(r"baseline ([^:]+)(?:: (\w+)=.*)?", row) for row in rows]
    which = {"best of digits": "best", "default": "default"}  # of the replicates
    named = [
        (part[1], part[2] or "") if part else (which.get(row, ""), "") for row, part in zip(rows, parts, strict=True)
    ]
    trials = records.trials.assign(origin=origin, row=rows, test_accuracies=[(0.9, 0.91, 0.92)] * len(rows))
    trials = trials.assign(baseline=[b for b, _ in named], parameter=[p for _, p in named])
    return records._replace(trials=trials, epochs=records.epochs.assign(origin=origin))


@pytest.fixture(scope="module")
def fixed_designs() -> FixedDesigns:
    ofat = ["baseline best", "baseline best: patch_size=4", "baseline best: patch_size=20"]
    ofat += ["baseline small patch", "baseline small patch: num_scales=1"]
    return summarise(
        [fixed_design("ofat", ofat), fixed_design("replicate", ["best of digits", "default", "spread point 1"])]
    )


@pytest.fixture(scope="module")
def study() -> tuple[StudyData, Analysis]:
    made = Synthetic(
        truth=ram_truth,
        dimensions=RAM_DIMENSIONS[:5],
        trials=24,
        epochs=9,
        origin="mixed",
        stop=True,
        default=RAM_DEFAULT,
        fail=lambda x: float(x[4] > 0.85),
    )
    records = simulate(made)
    records = records._replace(
        study=records.study._replace(name=HOSTILE, params={"task": "<b>t</b>", "data": "digits"})
    )
    return records, analyse(records, hyperdraws=80)


@pytest.fixture(scope="module")
def folder(
    study: tuple[StudyData, Analysis], fixed_designs: FixedDesigns, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("report")
    records, analysis = study
    checks = crosscheck(records, analysis)
    paths = write_report(out, records, analysis, judge(analysis), crosschecks=checks, fixed_designs=fixed_designs)
    assert all(path.stat().st_size > 0 for path in paths)
    return out


def test_report_writes_every_table_and_every_figure(folder: Path, study: tuple[StudyData, Analysis]) -> None:
    records, _ = study
    importance = pd.read_csv(folder / "importance.csv")
    assert set(importance["parameter"]) == {DUMMY, *(d.name for d in RAM_DIMENSIONS[:5])}
    assert (importance["total_low"] <= importance["total"]).all() and (
        importance["total"] <= importance["total_high"]
    ).all()
    verdicts = json.loads((folder / "verdicts.json").read_text())
    assert set(verdicts["thresholds"]) == set(THRESHOLDS)
    assert len(verdicts["claims"]) == 4
    found = json.loads(
        (folder / "diagnostics.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON")
    )
    assert found["trials"]["total"] == len(records.trials)
    assert found["ess_min"] > 0
    assert len(pd.read_csv(folder / "epochs.csv")) == len(records.epochs)
    for name in ("forest", "sobol", "marginals", "surface", "interactions", "more_than", "over_epochs", "ablation",
                 "learning_curves", "compute", "history", "calibration", "tornado", "replicates"):  # fmt: skip
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
        assert "<svg" in (folder / "figures" / f"{name}.svg").read_text(), name


def test_page_loads_nothing_from_outside_and_hostile_names_are_inert(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert HOSTILE not in page and "<script>alert" not in page
    assert str(escape(HOSTILE)) in page
    assert "&lt;b&gt;t&lt;/b&gt;" in page
    own = page.replace(charts.library(), "")
    assert len(own) < len(page), "Vega stands in the page"
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', own)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "@import" not in own and "url(" not in own
    assert len(page) < 3e6


def test_contents_lead_to_every_section(folder: Path) -> None:
    page = (folder / "report.html").read_text().replace(charts.library(), "")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    contents = dict(re.findall(r'<a href="#([\w-]+)">(.*?)</a>', page))
    assert list(contents.values()) == titles and "The trials" in titles
    assert all(f"<section id={anchor}>" in page for anchor in contents)


def test_names_are_plain_words_in_all_that_is_read(folder: Path) -> None:
    page = (folder / "report.html").read_text().replace(charts.library(), "")
    read = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    assert "number of glimpses" in read
    assert not [d.name for d in RAM_DIMENSIONS if "_" in d.name and d.name in read]
    assert not re.findall(r"[a-z]+_[a-z]+", json.dumps(titles_of(data_of(page, "charts-data"))))


def data_of(page: str, name: str) -> Any:
    """JSON that the page holds for its script."""
    found = re.search(rf"<script type=\"application/json\" id={name}>(.*?)</script>", page)
    assert found
    return json.loads(found[1])


def titles_of(spec: Any) -> list[str]:
    """All titles of charts, axes, legends and hovers."""
    if isinstance(spec, list):
        return [title for part in spec for title in titles_of(part)]
    if isinstance(spec, dict):
        own = [spec["title"]] if isinstance(spec.get("title"), str) else []
        return own + [title for part in spec.values() for title in titles_of(part)]
    return []


def test_every_trial_is_listed_with_its_run_in_mlflow(study: tuple[StudyData, Analysis], tmp_path: Path) -> None:
    records, analysis = study
    paged = records._replace(pages={int(t): f"http://server/#/{t}" for t in records.trials.index})
    write_report(tmp_path, paged, analysis, judge(analysis))
    page = (tmp_path / "report.html").read_text()
    rows = re.findall(r'<tr data-trial="(\d+)">(.*?)</tr>', page, flags=re.DOTALL)
    assert [int(number) for number, _ in rows] == list(records.trials.index)
    for trial_number, row in rows:
        assert f'<a href="http://server/#/{trial_number}">{trial_number}</a>' in row
        assert str(escape(figures.ended(outcomes(records.trials)[int(trial_number)]))) in row
    assert "link to their runs in MLflow." in page and "mlflow ui" not in page
    listed = list_trials(records, tracked_trials(records, 9), RAM_DIMENSIONS[:5])
    assert "row" not in listed.headings, "a column without a value is left out"
    assert listed.trials[3].page == ""
    at = listed.headings.index("validation %")
    last = 100 * records.epochs[(records.epochs["trial"] == 0) & (records.epochs["epoch"] == 9)]["val_accuracy"].mean()
    assert listed.trials[0].cells[at] == (f"{last:.2f}", pytest.approx(last))


def test_charts_hold_each_trial_with_its_configuration_its_seeds_and_why_it_ended(
    folder: Path, study: tuple[StudyData, Analysis]
) -> None:
    records, _ = study
    page = (folder / "report.html").read_text()
    rows, specs = data_of(page, "trials-data"), data_of(page, "charts-data")
    assert set(specs) == {"parallel", "learning_curves", "history", "compute", "marginals"}
    assert len(specs["marginals"]) == 5
    for row in rows:
        trial = records.trials.loc[row["trial"]]
        assert (row["why"], row["seeds"]) == (trial["stop_reason"], "0, 1")
        assert row["p2"] == str(trial["num_scales"])
        assert row["u2"] == pytest.approx((trial["num_scales"] - 1) / 3, abs=1e-4)
        assert len(row["curve"]) == len(row["epoch"]) == row["epoch"][-1] == trial["epochs_seen"]
    assert sorted(row["u5"] for row in rows)[:: len(rows) - 1] == [0, 1], "accuracy, from the lowest to the highest"
    for name in specs:
        titles = titles_of(specs[name])
        assert {"seeds", "why", "learning rate"} <= set(titles), name


def test_page_opens_with_three_sentences_then_forest_plot_then_tables(
    folder: Path, study: tuple[StudyData, Analysis]
) -> None:
    _, analysis = study
    page = (folder / "report.html").read_text()
    sentences = answer(analysis, judge(analysis))
    assert len(sentences) == 3
    assert page.index(str(escape(sentences[0]))) < page.index(str(escape(sentences[2]))) < page.index("<img")
    assert page.index("<img") < page.index("<table"), "the forest plot comes before any table"
    for label in ESTIMATES:
        assert str(escape(label)) in page
    ess = f"{analysis.trust.ess:.0f}"
    assert f'<td data-heading="value">{ess}</td>' in page
    for value, meaning in THRESHOLDS.values():
        assert f'<td data-heading="threshold">{value}</td><td data-heading="meaning">{escape(meaning)}</td>' in page
    assert "<h2>One factor at a time</h2>" in page and "<h2>Replicates</h2>" in page


def test_every_trial_is_counted_once(study: tuple[StudyData, Analysis]) -> None:
    counts = study[1].data.counts
    assert counts.complete + counts.stopped + counts.diverged + counts.failed + counts.running == counts.total
    assert counts.stopped and counts.diverged


def test_poor_fit_and_biased_sample_are_said_before_the_numbers(study: tuple[StudyData, Analysis]) -> None:
    _, analysis = study
    data, trust = analysis.data, analysis.trust
    poor = analysis._replace(
        ranked=False,
        data=data._replace(biased=True, untrained=(20, 200)),
        trust=trust._replace(seed_sd_measured=False, trials_needed=60, fit=trust.fit._replace(r2=0.2, coverage=0.5)),
    )
    said = " ".join(cautions(poor))
    for words_ in ("No ranking", "Biased sample", "too narrow", "could not be measured", "20 of 200 runs"):
        assert words_ in said
    assert "did not train" not in " ".join(cautions(poor._replace(data=data._replace(untrained=(5, 200)))))
    assert "About 60 trials" in answer(poor, judge(poor))[1]
    assert "do not support a ranking" in answer(poor, judge(poor))[0]
    biased = analysis._replace(data=data._replace(biased=True))
    assert "a biased sample, see below" in answer(biased, judge(analysis))[2]


def test_answer_names_each_parameter_once(study: tuple[StudyData, Analysis]) -> None:
    _, analysis = study

    def told(*effects: Any) -> list[str]:
        ranking = analysis.ranking._replace(effects=effects)
        return answer(analysis._replace(ranked=True, ranking=ranking), judge(analysis))

    first = analysis.ranking.effects[0]
    wide = Interval(2.0, 3.0, 4.0)
    clear = first._replace(name="a", rank=1, above_dummy=1.0, effect=wide, effect_in_sd=wide)
    small = clear._replace(name="b", rank=2, effect_in_sd=Interval(0.4, 0.5, 0.6))
    lost = clear._replace(name="c", rank=2, above_dummy=0.8)
    lead, second, _ = told(clear, small, lost)
    assert "a matters most" in lead
    assert second == (
        "An effect, but not surely more than one seed standard deviation: b (3.0 points); not told apart from a "
        "parameter without any effect: c."
    )
    lead, second, _ = told(lost._replace(rank=1))
    assert lead == "On these data no parameter can be told apart from one without any effect."
    assert "matter" not in second and "apart" not in second


def test_shared_rank_is_marked_and_the_dummy_has_none(study: tuple[StudyData, Analysis]) -> None:
    _, analysis = study
    first = analysis.ranking.effects[0]._replace(name="a", rank=1)
    effects = (first, first._replace(name="b"), first._replace(name="c", rank=3), first._replace(name=DUMMY))
    ranked = analysis._replace(ranked=True, ranking=analysis.ranking._replace(effects=effects[:3]))
    assert [rank_label(e, ranked) for e in effects] == ["1 (tied)", "1 (tied)", "3", "-"]
    assert rank_label(first, ranked._replace(ranked=False)) == "-"


# ---- what the figures draw -----------------------------------------------------------------------------------


def rows_of(ax: Axes) -> list[tuple[float, float, float, float]]:
    """(y, low, mid, high) of every interval: a bar, then its marker."""
    found = []
    for bar, marker in itertools.pairwise(ax.lines):
        (bar_x, bar_y), (x, y) = (np.asarray(line.get_data(), dtype=float) for line in (bar, marker))
        if len(x) == 1 and len(bar_x) == 2 and bar_y[0] == bar_y[1] == y[0]:
            found.append((y[0], bar_x[0], x[0], bar_x[1]))
    return found


def trial(number: int, origin: str = "sobol", *, accuracy: float, complete: bool = True, sd: float = 1.0,
          macs: float = 1e6) -> Trial:  # fmt: skip
    """A trial with a curve of two epochs."""
    outcome = "complete" if complete else "stopped"
    return Trial(number, origin, outcome, complete, np.array([1.0, 2]), np.array([10.0, accuracy]), sd, macs)


def xlabels(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


def ylabels(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def line_named(ax: Axes, label: str) -> np.ndarray:
    """(2, N) data of the line that the legend names so."""
    return np.asarray(next(line for line in ax.lines if line.get_label() == label).get_data(), dtype=float)


def cells(ax: Axes) -> np.ndarray:
    """(rows, columns) of a heat map; NaN where a cell is empty."""
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    return np.ma.filled(mesh.get_array(), np.nan)


def band(ax: Axes, k: int = 0) -> np.ndarray:
    """Heights of the corners of the kth filled band."""
    return [c for c in ax.collections if isinstance(c, PolyCollection)][k].get_paths()[0].vertices[:, 1]


def test_forest_draws_each_effect_over_seed_noise_and_the_dummys_bound(study: tuple[StudyData, Analysis]) -> None:
    effects, seed_sd = study[1].ranking.effects, study[1].trust.seed_sd
    ax = figures.forest(effects, seed_sd)
    assert rows_of(ax) == [(y, *e.effect) for y, e in enumerate(effects)]
    assert ylabels(ax) == [e.label for e in effects]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first parameter is on top"
    assert (ax.patches[0].get_x(), ax.patches[0].get_width()) == (0, seed_sd.mid)
    dummy = next(e for e in effects if e.name == DUMMY)
    assert set(line_named(ax, "what a parameter without effect can reach")[0]) == {dummy.effect.high}


def test_sobol_draws_total_and_first_order_index_of_each_parameter(study: tuple[StudyData, Analysis]) -> None:
    effects = study[1].ranking.effects
    found = rows_of(figures.sobol(effects))
    assert [row[1:] for row in found[::2]] == [tuple(e.total) for e in effects]
    assert [row[1:] for row in found[1::2]] == [tuple(e.first) for e in effects]
    assert [round(row[0]) for row in found] == [y for y in range(len(effects)) for _ in range(2)]


def test_marginal_draws_curve_band_trials_and_marks_extrapolation(study: tuple[StudyData, Analysis]) -> None:
    curve = study[1].curves.marginals["learning_rate"]
    dimension = next(d for d in RAM_DIMENSIONS if d.name == "learning_rate")
    far = np.arange(len(curve.values)) >= len(curve.values) - 3
    curve = curve._replace(extrapolated=far)
    trials = [trial(0, accuracy=50.0), trial(1, accuracy=60.0, complete=False), trial(2, accuracy=70.0)]
    ax = figures.marginal(curve, dimension, [1e-4, 1e-3, 1e-2], trials)
    np.testing.assert_array_equal(ax.lines[0].get_data(), [curve.values, curve.mid])
    assert set(band(ax)) == {*curve.low, *curve.high}
    hatched = [c for c in ax.collections if isinstance(c, PolyCollection)][1].get_paths()[0].vertices[:, 0]
    assert set(hatched) == set(np.array(curve.values)[far])
    points = {c.get_label(): c.get_offsets().tolist() for c in ax.collections}
    assert points["full budget"] == [[1e-4, 50.0], [1e-2, 70.0]]
    assert points["not to the end"] == [[1e-3, 60.0]]
    assert ax.get_xscale() == "log" and xlabels(ax) == ["0.0001", "0.0003", "0.001", "0.003", "0.01"]


def test_marginal_of_choices_has_one_place_a_choice(study: tuple[StudyData, Analysis]) -> None:
    curve = study[1].curves.marginals["patch_size"]
    three = {name: getattr(curve, name)[:3] for name in ("low", "mid", "high", "extrapolated")}
    core = Dimension(name="core", type="categorical", choices=("rnn", "gru", "lstm"))
    trials = [trial(0, accuracy=50.0), trial(1, accuracy=60.0)]
    ax = figures.marginal(curve._replace(values=["rnn", "gru", "lstm"], **three), core, ["lstm", "rnn"], trials)
    assert xlabels(ax) == ["rnn", "gru", "lstm"]
    assert ax.collections[0].get_offsets().tolist() == [[2, 50.0], [0, 60.0]]


def test_pair_surface_draws_and_writes_mean_accuracy(study: tuple[StudyData, Analysis]) -> None:
    surface = study[1].curves.surface
    assert surface is not None
    ax = figures.pair_surface(surface)
    np.testing.assert_array_equal(cells(ax), surface.mean)
    assert (len(ylabels(ax)), len(xlabels(ax))) == surface.mean.shape
    assert (ax.get_xlabel(), ax.get_ylabel()) == (surface.x.label, surface.y.label)
    assert ax.texts[0].get_text() == f"{surface.mean[0, 0]:.0f}"


def test_interactions_draw_each_pair_once(study: tuple[StudyData, Analysis]) -> None:
    ranking = study[1].ranking
    ax = figures.interactions(ranking.interactions)
    drawn, names = cells(ax), [words(n) for n in ranking.interactions.names]
    assert (ylabels(ax), xlabels(ax)) == (names[1:], names[:-1])
    for (a, b), share in ranking.pairs.items():
        i, j = sorted((names.index(words(a)), names.index(words(b))))
        assert drawn[j - 1, i] == pytest.approx(100 * share.mid)
    assert np.isfinite(drawn).sum() == len(ranking.pairs) == len(ax.texts)


def test_comparison_draws_the_probability_of_each_pair(study: tuple[StudyData, Analysis]) -> None:
    matrix = study[1].ranking.more_than
    ax = figures.more_than(matrix)
    np.testing.assert_array_equal(cells(ax), 100 * matrix.values)
    assert ylabels(ax) == xlabels(ax) == [words(n) for n in matrix.names]
    assert ax.yaxis_inverted(), "the first parameter is on top"
    mesh = ax.collections[0]
    assert isinstance(mesh, QuadMesh) and mesh.get_clim() == (0, 100)


def test_importance_against_epoch_draws_every_parameter_and_five_bands(study: tuple[StudyData, Analysis]) -> None:
    curves = study[1].curves
    ax = figures.over_epochs(curves.epochs, curves.over_epochs)
    for name, total in curves.over_epochs.items():
        np.testing.assert_array_equal(line_named(ax, words(name)), [curves.epochs, total[:, 1]])
    first = next(iter(curves.over_epochs.values()))
    assert set(band(ax)) == {*first[:, 0], *first[:, 2]}
    assert len(ax.collections) == 5 < len(curves.over_epochs)
    assert xlabels(ax) == [str(e) for e in curves.epochs]


def test_path_draws_the_default_and_every_step(study: tuple[StudyData, Analysis]) -> None:
    configurations = study[1].configurations
    ax = figures.ablation(configurations.default_accuracy, configurations.path)
    steps = [configurations.default_accuracy, *(s.accuracy for s in configurations.path)]
    assert len(steps) > 1
    assert rows_of(ax) == [(y, *accuracy) for y, accuracy in enumerate(steps)]
    assert ylabels(ax)[0] == "default" and ylabels(ax)[1].startswith(words(configurations.path[0].name))


def test_calibration_draws_predictions_with_intervals_against_results() -> None:
    observed, predicted, sd = np.array([0.0, 1.0]), np.array([0.5, 0.8]), np.array([0.2, 0.3])
    ax = figures.calibration(observed, predicted, sd)

    def points(logits: np.ndarray) -> np.ndarray:
        return 100 / (1 + np.exp(-logits))

    np.testing.assert_allclose(ax.lines[0].get_data(), [points(observed), points(predicted)])
    bars = np.array(ax.collections[0].get_segments())  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(bars[:, 0, 1], points(predicted - 1.645 * sd))
    np.testing.assert_allclose(bars[:, 1, 1], points(predicted + 1.645 * sd))
    diagonal = line_named(ax, "perfect prediction")
    np.testing.assert_array_equal(diagonal[0], diagonal[1])


def test_learning_curves_draw_every_trial_and_how_it_ended() -> None:
    epochs = np.arange(1.0, 7)
    curves = [
        Trial(0, "sobol", "complete", True, epochs, epochs * 10, 1.0, 1e6),
        Trial(1, "tpe", "stopped", False, epochs[:2], epochs[:2] * 12, 1.0, 1e6),
        Trial(2, "tpe", "diverged", False, epochs[:3], epochs[:3] * 9, 1.0, 1e6),
    ]
    ax = figures.learning_curves(curves)
    lines = [np.asarray(line.get_data()).tolist() for line in ax.lines]
    assert lines == [
        [[1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60]],
        [[1, 2], [12, 24]], [[2], [24]],
        [[1, 2, 3], [9, 18, 27]], [[3], [27]],
    ]  # fmt: skip
    legend = ["space-filling (Sobol)", "optimiser (TPE)", "stopped early", "diverged"]
    assert ax.get_legend_handles_labels()[1] == legend, "one entry a kind"
    assert ax.get_xscale() == "log"


TRIALS = [
    trial(0, accuracy=80.0, sd=1.0, macs=2e6),
    trial(1, "tpe", accuracy=90.0, sd=np.nan, macs=3e6),
    trial(2, "tpe", accuracy=95.0, sd=0.5, macs=1e6, complete=False),
    trial(3, accuracy=85.0, sd=2.0, macs=4e6),
]


def test_compute_draws_accuracy_with_seed_sd_and_the_pareto_front() -> None:
    ax = figures.compute([t for t in TRIALS if t.complete])
    np.testing.assert_array_equal(line_named(ax, "Pareto front"), [[2, 3], [80, 90]])
    sobol, tpe = (container.lines for container in ax.containers)
    np.testing.assert_array_equal(sobol[0].get_data(), [[2, 4], [80, 85]])
    bars = np.array(sobol[2][0].get_segments())
    assert bars[:, :, 1].tolist() == [[79, 81], [83, 87]]
    assert np.array(tpe[2][0].get_segments())[0, :, 1].tolist() == [90, 90], "one seed has no bar"


def test_history_draws_every_trial_and_the_best_complete_one_so_far() -> None:
    ax = figures.history(TRIALS)
    best = line_named(ax, "best full-budget trial so far")
    assert best.tolist() == [[0, 1, 2, 3], [80, 90, 90, 90]], "an incomplete trial is never the best"
    offsets = [c.get_offsets().tolist() for c in ax.collections]
    assert offsets == [[[0, 80], [3, 85]], [], [[1, 90]], [[2, 95]]]
    assert ax.collections[3].get_facecolor().size == 0, "incomplete trials are open"


def test_tornado_draws_ranges_baselines_and_seed_noise(fixed_designs: FixedDesigns) -> None:
    ax = figures.tornado(fixed_designs.ranges)
    widest = sorted(fixed_designs.ranges, key=lambda r: -r.range)[0]
    assert ylabels(ax)[0] == words(widest.parameter), "the widest range is on top"
    assert {(b.get_x(), b.get_width()) for b in ax.patches} == {(r.low, r.range) for r in fixed_designs.ranges}
    for r in fixed_designs.ranges:
        lines = [np.asarray(line.get_xdata()).tolist() for line in ax.lines]
        assert [r.baseline_accuracy] * 2 in lines and [r.low, r.low + r.noise] in lines
    legend = {"around: best", "around: small patch", "the baseline itself", "white line: seed noise alone"}
    assert set(ax.get_legend_handles_labels()[1]) == legend


def test_replicates_draw_mean_and_interval_of_each_configuration(fixed_designs: FixedDesigns) -> None:
    ax = figures.replicates(fixed_designs.replicates)
    assert rows_of(ax) == [(y, *r.mean) for y, r in enumerate(fixed_designs.replicates)]
    assert ylabels(ax) == [f"{r.row} (3 seeds)" for r in fixed_designs.replicates]


def test_tracked_trials_are_the_records_last_accuracies(study: tuple[StudyData, Analysis]) -> None:
    records, analysis = study
    tracked = tracked_trials(records, analysis.data.budget)
    assert [t.number for t in tracked] == list(records.trials.index)
    for one in tracked:
        own = records.epochs[records.epochs["trial"] == one.number]
        last = 100 * own[own["epoch"] == own["epoch"].max()]["val_accuracy"]
        assert (one.last, one.sd) == pytest.approx((last.mean(), last.std()), nan_ok=True)
        assert one.accuracy[-1] == one.last and one.epochs[-1] == own["epoch"].max()
        assert one.complete == (records.trials.at[one.number, "state"] == "complete")


def test_pareto_front_leaves_out_what_a_cheaper_trial_beats(study: tuple[StudyData, Analysis]) -> None:
    complete = [t for t in tracked_trials(study[0], study[1].data.budget) if t.complete]
    macs, accuracy = line_named(figures.compute(complete), "Pareto front")
    assert len(macs)
    for cost, reached in zip(macs, accuracy, strict=True):
        assert not any(t.macs / 1e6 <= cost and t.last > reached for t in complete)


def test_figures_draw_on_the_axes_they_are_given_and_set_nothing_global(study: tuple[StudyData, Analysis]) -> None:
    _, analysis = study
    effects, curves, configurations = analysis.ranking.effects, analysis.curves, analysis.configurations
    before = dict(mpl.rcParams)
    for draw, values in (
        (figures.forest, (effects, analysis.trust.seed_sd)),
        (figures.sobol, (effects,)),
        (figures.more_than, (analysis.ranking.more_than,)),
        (figures.over_epochs, (curves.epochs, curves.over_epochs)),
        (figures.ablation, (configurations.default_accuracy, configurations.path)),
    ):
        ax = figures.new_axes()
        assert draw(*values, ax=ax) is ax
        assert ax.get_xlabel()
    assert dict(mpl.rcParams) == before


def test_fixed_designs_give_ranges_with_noise_and_replicates_with_intervals(fixed_designs: FixedDesigns) -> None:
    assert {r.baseline for r in fixed_designs.ranges} == {"best", "small patch"}
    patch = next(r for r in fixed_designs.ranges if r.parameter == "patch_size")
    three = [r.accuracy for r in fixed_designs.ofat if r.baseline == "best"]
    assert patch.range == pytest.approx(max(three) - min(three))
    assert patch.noise > 0
    assert [r.seeds for r in fixed_designs.replicates] == [3, 3, 3]
    assert fixed_designs.replicates[0].test == pytest.approx(91.0)
    levels = [
        OfatRow("b", "", "", 97.0, 0.2, 2),
        OfatRow("b", "num_scales", "1", 96.5, 0.2, 2),
        OfatRow("b", "patch_size", "4", 70.0, 9.0, 2),
    ]
    noise = {r.parameter: r.noise for r in ranges(levels)}
    assert noise["num_scales"] < 1, "another parameter's shaky levels do not count"
    assert noise["patch_size"] > 10
    mean = fixed_designs.replicates[0].mean
    assert mean.low < mean.mid < mean.high


def test_fixed_design_gets_tables_and_no_ranking(fixed_designs: FixedDesigns, tmp_path: Path) -> None:
    write_design_report(tmp_path, fixed_design("ofat", ["baseline best"]), fixed_designs)
    page = (tmp_path / "report.html").read_text()
    assert "cannot rank parameters over a whole space" in page
    assert "One factor at a time" in page


def test_rows_of_a_design_without_a_table_of_its_own_are_compared(tmp_path: Path) -> None:
    own = fixed_design("mine", ["2 glimpses", "8 glimpses"])
    summary = summarise([own])
    assert [row.row for row in summary.others] == ["2 glimpses", "8 glimpses"] and not summary.replicates
    write_design_report(tmp_path, own, summary)
    page = (tmp_path / "report.html").read_text()
    assert "The rows of the design" in page and span(summary.others[0].mean) in page
    assert (tmp_path / "figures" / "others.png").is_file()


def test_study_of_one_epoch_one_seed_and_one_dimension_is_reported(tmp_path: Path) -> None:
    made = Synthetic(truth=lambda x, u: x[:, 0] + 0 * u, dimensions=RAM_DIMENSIONS[1:2], trials=10, epochs=1, seeds=1)
    records = simulate(made)
    analysis = analyse(records, hyperdraws=10)
    assert not analysis.trust.seed_sd_measured
    write_report(tmp_path, records, analysis, judge(analysis))
    assert "Only one parameter was varied" in (tmp_path / "report.html").read_text()
    no_path = analysis._replace(configurations=analysis.configurations._replace(path=()))  # the default is the best
    write_report(tmp_path, records, no_path, judge(analysis))
    page = (tmp_path / "report.html").read_text()
    assert "that path has no step" in page and "along the path from" not in page


def test_categorical_dimension_is_drawn_and_its_choices_are_escaped(tmp_path: Path) -> None:
    core = dataclasses.replace(RAM_DIMENSIONS[0], name="core", type="categorical", choices=("rnn", "gru", "<lstm>"))
    made = Synthetic(
        truth=lambda x, u: x[:, 0] + x[:, 1] + u, dimensions=(core, RAM_DIMENSIONS[4]), trials=12, epochs=3
    )
    records = simulate(made)
    analysis = analyse(records, hyperdraws=10)
    write_report(tmp_path, records, analysis, judge(analysis))
    assert analysis.curves.marginals["core"].values == ["rnn", "gru", "<lstm>"]
    assert "<lstm>" not in (tmp_path / "report.html").read_text()


def test_numbers_and_names_as_words() -> None:
    assert words("num_glimpses") == "number of glimpses"
    assert words("learning_rate") == "learning rate"
    assert Interval(1.0, 2.0, 3.0).mid == 2.0
    assert np.isfinite(THRESHOLDS["SURE"][0])
    assert span(Interval(2.94, 4.16, 5.4)) == "4.2 (2.9 to 5.4)"
    assert span(Interval(np.nan, 4.16, np.nan), 2, "+") == "+4.16", "no bounds with one seed"
    assert number(np.nan) == "-" and percent(0.951) == "95%"
    assert [number(-0.01), number(-0.01, sign="+"), number(-0.06)] == ["0.0", "+0.0", "-0.1"]
    assert [join("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


USE_PAGE = """
const frame = document.getElementById("page");
frame.onload = () => {
  const d = frame.contentDocument, r = d.documentElement;
  const seen = (all) => [...all].filter((e) => e.offsetWidth).length;
  const rows = d.querySelectorAll("#trial-table tbody tr");
  const tell = (more) => document.getElementById("found").textContent = JSON.stringify({
    scroll: r.scrollWidth, width: r.clientWidth, text: parseFloat(d.defaultView.getComputedStyle(d.body).fontSize),
    broken: [...d.images].filter((i) => !i.complete || !i.naturalWidth).length,
    images: seen(d.images), charts: seen(d.querySelectorAll("canvas")), ...more});
  const use = () => {
    if (d.querySelectorAll("canvas").length < CHARTS || !d.querySelector("th button")) return setTimeout(use, 50);
    const input = d.getElementById("trial-filter");
    input.value = "diverged";
    input.dispatchEvent(new Event("input"));
    const heading = [...d.querySelectorAll("#trial-table th")].find((th) => th.textContent.startsWith("validation"));
    heading.firstChild.click();
    const shown = () => [...rows].filter((row) => !row.hidden).map((row) => Number(row.dataset.trial));
    const kept = shown().length;
    input.value = "";
    input.dispatchEvent(new Event("input"));
    const axes = d.querySelector("div[data-chart=parallel] canvas"), place = axes.getBoundingClientRect();
    const drag = (type, share, target) => target.dispatchEvent(new PointerEvent(type, {
      clientX: place.left + share * place.width, clientY: place.top + 24, bubbles: true, button: 0, buttons: 1}));
    drag("pointermove", 0.5, axes);
    drag("pointerdown", 0.5, axes);
    for (const share of [0.6, 0.8, 0.99]) drag("pointermove", share, d.defaultView);
    drag("pointerup", 0.99, d.defaultView);
    const first = d.querySelector("#trial-table tbody tr").dataset.trial;
    setTimeout(() => tell({rows: kept, first, brushed: shown()}), 500);
  };
  if (CHARTS) use(); else tell({rows: rows.length});
};
frame.srcdoc = PAGE;
"""


@pytest.mark.parametrize(("width", "scripts"), [(360, True), (1200, True), (390, False)])
def test_page_in_a_browser_shows_charts_or_pictures_without_overflow(
    folder: Path, study: tuple[StudyData, Analysis], tmp_path: Path, width: int, scripts: bool
) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    # The page in a frame of the wanted width (a window cannot be that narrow); the frame's size is what its rules see.
    page = json.dumps((folder / "report.html").read_text()).replace("</", "<\\/")
    use = USE_PAGE.replace("CHARTS", "9" if scripts else "0").replace("PAGE", page)
    wrapper = tmp_path / "wrapper.html"
    sandbox = "" if scripts else "sandbox=allow-same-origin"
    frame = f'<iframe id="page" width="{width}" height="800" style="border:0" {sandbox}></iframe>'
    wrapper.write_text(f"<meta charset=utf-8>{frame}<pre id=found></pre><script>{use}</script>")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--virtual-time-budget=20000"]
    shown = subprocess.run(
        [*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=200, check=True
    ).stdout
    match = re.search(r"<pre id=\"found\">(\{.*?\})</pre>", shown)
    assert match, shown[-300:]
    found: dict[str, Any] = json.loads(match[1])
    assert found["broken"] == 0
    assert found["scroll"] <= found["width"], "the page must not be wider than the screen"
    assert found["text"] >= 16
    trials = study[0].trials
    if not scripts:
        assert (found["images"], found["charts"], found["rows"]) == (14, 0, len(trials))
        return
    assert found["charts"] == 9 and found["images"] == 10, "charts stand in the place of four pictures"
    assert found["rows"] == trials["diverged"].sum() > 0, "the filter keeps the trials that say so"
    glimpses = trials.loc[found["brushed"], "num_glimpses"]
    assert set(found["brushed"]) == set(trials.index[trials["num_glimpses"] >= glimpses.min()]), "the brush of an axis"
    assert 4 < glimpses.min() < 7 and len(glimpses) < len(trials)
    last = study[0].epochs.dropna(subset="val_accuracy").groupby(["trial", "epoch"])["val_accuracy"].mean()
    assert int(found["first"]) == last.groupby("trial").last().idxmin(), "sorted by accuracy, the lowest first"
