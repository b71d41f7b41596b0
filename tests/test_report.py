"""The report's files and its page: whole, self-contained, escaped, and fit for a phone."""

from __future__ import annotations

import dataclasses
import html
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

from analysis import figures
from analysis.crosschecks import ESTIMATES, crosscheck
from analysis.fixed_designs import Companions, _ranges, summarise
from analysis.importance import DUMMY, Analysis, Interval, analyse
from analysis.load import StudyData
from analysis.report import answer, cautions, trial_points, write_design_report, write_report
from analysis.verdicts import THRESHOLDS, judge
from ramcore.space import words
from tests.synthetic import RAM_DEFAULT, RAM_DIMENSIONS, Synthetic, ram_truth, simulate

HOSTILE = "x\"><script>alert('{{body}}')</script>"


def fixed_design(origin: str, rows: list[str]) -> StudyData:
    """An OFAT or replicate study: one trial a row, three seeds."""
    records = simulate(
        Synthetic(
            truth=ram_truth, dimensions=RAM_DIMENSIONS[:5], trials=len(rows), epochs=4, seeds=3, default=RAM_DEFAULT
        )
    )
    trials = records.trials.assign(origin=origin, row=rows, test_accuracies=[(0.9, 0.91, 0.92)] * len(rows))
    return records._replace(trials=trials, epochs=records.epochs.assign(origin=origin))


@pytest.fixture(scope="module")
def companions() -> Companions:
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
    return records, analyse(records, hyperdraws=20)


@pytest.fixture(scope="module")
def folder(study: tuple[StudyData, Analysis], companions: Companions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    records, analysis = study
    checks = crosscheck(records, analysis)
    paths = write_report(out, records, analysis, judge(analysis), crosschecks=checks, companions=companions)
    assert all(path.stat().st_size > 0 for path in paths)
    return out


def test_every_file_is_there_and_holds_what_it_says(folder: Path, study: tuple[StudyData, Analysis]) -> None:
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
    assert (
        len(pd.read_csv(folder / "epochs.csv"))
        == len(pd.read_parquet(folder / "epochs.parquet"))
        == len(records.epochs)
    )
    for name in ("forest", "sobol", "marginals", "surface", "interactions", "more_than", "over_epochs", "ablation",
                 "learning_curves", "compute", "history", "calibration", "tornado", "replicates"):  # fmt: skip
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
        assert "<svg" in (folder / "figures" / f"{name}.svg").read_text(), name


def test_the_page_needs_nothing_from_outside_and_names_are_inert(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert html.escape(HOSTILE) in page
    assert "&lt;b&gt;t&lt;/b&gt;" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "@import" not in page and "url(" not in page


def test_the_answer_is_three_sentences_before_the_forest_plot(folder: Path, study: tuple[StudyData, Analysis]) -> None:
    _, analysis = study
    page = (folder / "report.html").read_text()
    sentences = answer(analysis, judge(analysis))
    assert len(sentences) == 3
    assert page.index(html.escape(sentences[0])) < page.index(html.escape(sentences[2])) < page.index("<img")
    assert page.index("<img") < page.index("<table"), "the forest plot comes before any table"
    for label in ESTIMATES:
        assert html.escape(label) in page
    for name, (value, _) in THRESHOLDS.items():
        assert f"<td>{name}</td><td>{value}</td>" in page
    assert "<h2>One factor at a time</h2>" in page and "<h2>Replicates</h2>" in page


def test_every_trial_is_counted(study: tuple[StudyData, Analysis]) -> None:
    counts = study[1].counts
    assert counts.complete + counts.stopped + counts.diverged + counts.failed + counts.running == counts.total
    assert counts.stopped and counts.diverged


def test_what_cannot_be_trusted_is_said_first(study: tuple[StudyData, Analysis]) -> None:
    _, analysis = study
    poor = analysis._replace(
        ranked=False,
        biased=True,
        seed_sd_known=False,
        fit=analysis.fit._replace(r2=0.2, coverage=0.5, trials_needed=60),
    )
    said = " ".join(cautions(poor))
    for words_ in ("No ranking", "Biased sample", "too narrow", "could not be measured"):
        assert words_ in said
    assert "About 60 trials" in answer(poor, judge(poor))[1]
    assert "do not support a ranking" in answer(poor, judge(poor))[0]
    assert "a biased sample, see below" in answer(analysis._replace(biased=True), judge(analysis))[2]


def test_the_answer_says_of_each_parameter_one_thing(study: tuple[StudyData, Analysis]) -> None:
    _, analysis = study
    first = analysis.effects[0]
    wide = Interval(2.0, 3.0, 4.0)
    clear = first._replace(name="a", rank=1, above_dummy=1.0, effect=wide, effect_in_sd=wide)
    small = clear._replace(name="b", rank=2, effect_in_sd=Interval(0.4, 0.5, 0.6))
    lost = clear._replace(name="c", rank=2, above_dummy=0.8)
    lead, second, _ = answer(analysis._replace(ranked=True, effects=(clear, small, lost)), judge(analysis))
    assert "a matters most" in lead
    assert second == (
        "An effect, but not surely more than one seed standard deviation: b (3.0 points); not told apart from a "
        "parameter without any effect: c."
    )
    lead, second, _ = answer(analysis._replace(ranked=True, effects=(lost._replace(rank=1),)), judge(analysis))
    assert lead == "On these data no parameter can be told apart from one without any effect."
    assert "matter" not in second and "apart" not in second


def test_pareto_front_only_holds_what_nothing_cheaper_beats(study: tuple[StudyData, Analysis]) -> None:
    points = trial_points(*study)
    front, full = points[points["pareto"]], points[points["complete"]]
    assert len(front)
    for row in front.itertuples():
        better = (full["macs"] <= row.macs) & (full["accuracy"] > row.accuracy)
        assert not better.any()


def test_figures_draw_on_the_axes_they_are_given_and_set_nothing_global(study: tuple[StudyData, Analysis]) -> None:
    _, analysis = study
    before = dict(mpl.rcParams)
    for draw in (figures.forest, figures.sobol, figures.more_than, figures.over_epochs, figures.ablation):
        ax = figures.new_axes()
        assert draw(analysis, ax=ax) is ax
        assert ax.get_xlabel()
    assert dict(mpl.rcParams) == before


def test_companion_tables(companions: Companions) -> None:
    assert set(companions.ranges["baseline"]) == {"best", "small patch"}
    patch = companions.ranges[companions.ranges["parameter"] == "patch_size"].iloc[0]
    three = companions.ofat[companions.ofat["baseline"] == "best"]["accuracy"]
    assert patch["range"] == pytest.approx(three.max() - three.min())
    assert patch["noise"] > 0
    assert list(companions.replicates["seeds"]) == [3, 3, 3]
    assert companions.replicates["test"].iloc[0] == pytest.approx(91.0)
    columns = ["baseline", "parameter", "value", "accuracy", "sd", "seeds"]
    levels = [
        ("b", "", "", 97.0, 0.2, 2),
        ("b", "num_scales", "1", 96.5, 0.2, 2),
        ("b", "patch_size", "4", 70.0, 9.0, 2),
    ]
    noise = _ranges(pd.DataFrame(levels, columns=columns)).set_index("parameter")["noise"]
    assert noise["num_scales"] < 1, "another parameter's shaky levels do not count"
    assert noise["patch_size"] > 10
    row = companions.replicates.iloc[0]
    assert row["low"] < row["accuracy"] < row["high"]


def test_a_fixed_design_gets_a_report_without_a_ranking(companions: Companions, tmp_path: Path) -> None:
    write_design_report(tmp_path, fixed_design("ofat", ["baseline best"]), companions)
    page = (tmp_path / "report.html").read_text()
    assert "cannot rank parameters over a whole space" in page
    assert "One factor at a time" in page


def test_a_study_of_one_epoch_one_seed_one_dimension_still_reports(tmp_path: Path) -> None:
    made = Synthetic(truth=lambda x, u: x[:, 0] + 0 * u, dimensions=RAM_DIMENSIONS[1:2], trials=10, epochs=1, seeds=1)
    records = simulate(made)
    analysis = analyse(records, hyperdraws=10)
    assert not analysis.seed_sd_known
    write_report(tmp_path, records, analysis, judge(analysis))
    assert "Only one parameter was varied" in (tmp_path / "report.html").read_text()
    write_report(tmp_path, records, analysis._replace(ablation=()), judge(analysis))  # as where the default is the best
    page = (tmp_path / "report.html").read_text()
    assert "that path has no step" in page and "along the path from" not in page


def test_categorical_and_one_sided_dimensions_are_drawn(tmp_path: Path) -> None:
    core = dataclasses.replace(RAM_DIMENSIONS[0], name="core", type="categorical", choices=("rnn", "gru", "<lstm>"))
    made = Synthetic(
        truth=lambda x, u: x[:, 0] + x[:, 1] + u, dimensions=(core, RAM_DIMENSIONS[4]), trials=12, epochs=3
    )
    records = simulate(made)
    analysis = analyse(records, hyperdraws=10)
    write_report(tmp_path, records, analysis, judge(analysis))
    assert analysis.curves["core"].values == ["rnn", "gru", "<lstm>"]
    assert "<lstm>" not in (tmp_path / "report.html").read_text()


def test_words() -> None:
    assert words("num_glimpses") == "number of glimpses"
    assert words("learning_rate") == "learning rate"
    assert Interval(1.0, 2.0, 3.0).mid == 2.0
    assert np.isfinite(THRESHOLDS["SURE"][0])


@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_real_browser_nothing_is_broken_or_overflows(folder: Path, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    # The page in a frame of the wanted width (a window cannot be that narrow); the frame's size is what its rules see.
    page = (folder / "report.html").read_text()
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<iframe id="page" width="{width}" height="800" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
        "<pre id=found></pre><script>document.getElementById('page').onload = event => {"
        "const d = event.target.contentDocument, r = d.documentElement, images = [...d.images];"
        "document.getElementById('found').textContent = JSON.stringify({scroll: r.scrollWidth, width: r.clientWidth,"
        "images: images.length, broken: images.filter(i => !i.complete || !i.naturalWidth).length,"
        "text: parseFloat(d.defaultView.getComputedStyle(d.body).fontSize)})}</script>"
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--virtual-time-budget=8000"]
    shown = subprocess.run(
        [*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    match = re.search(r"<pre id=\"found\">(\{.*?\})</pre>", shown)
    assert match, shown[-300:]
    found: dict[str, Any] = json.loads(match[1])
    assert found["images"] >= 12
    assert found["broken"] == 0
    assert found["scroll"] <= found["width"], "the page must not be wider than the screen"
    assert found["text"] >= 16
