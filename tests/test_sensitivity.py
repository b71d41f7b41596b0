"""python -m analysis.sensitivity from end to end, and every request that it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from analysis.importance import fit_study
from analysis.load import StudyData
from analysis.sensitivity import Args, main
from study.designs import SEARCH_ORIGINS
from tests.synthetic import RAM_DEFAULT, RAM_DIMENSIONS, Synthetic, ram_truth, simulate, write_mlflow

pytestmark = pytest.mark.usefixtures("quick_fits")

STUDY = Synthetic(
    truth=ram_truth, dimensions=RAM_DIMENSIONS[:5], trials=12, epochs=4, origin="mixed", stop=True, default=RAM_DEFAULT
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A store with the tables made; each test adds a study of its own."""
    folder = tmp_path_factory.mktemp("sensitivity")
    shutil.copy(empty_database, folder / "mlflow.db")
    add(folder, simulate(STUDY), "good")
    return folder


def add(folder: Path, records: StudyData, name: str, **options: object) -> str:
    named = records._replace(study=records.study._replace(name=name))
    return write_mlflow(named, uri_of(folder), artifacts=folder / "artifacts", **options)  # type: ignore[arg-type]


def uri_of(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports in seconds, where a test is not about their numbers."""
    monkeypatch.setattr("analysis.sensitivity.fit_study", partial(fit_study, hyperdraws=10))


@pytest.mark.usefixtures("few_draws")
def test_tracked_study_gives_a_report_and_attaches_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("analysis.importance.HYPERDRAWS", 10)  # with so many, chains are doubled
    monkeypatch.setattr("analysis.importance.ROUNDS", 2)
    code = main(Args(study="good", tracking_uri=uri_of(store), out=tmp_path / "out"))
    shown = capfd.readouterr()
    assert code == 0
    assert "Sensitivity of good" in shown.out
    assert "patch size" in shown.out and str(tmp_path / "out" / "report.html") in shown.out
    assert "fitting" in shown.err and "fitting" not in shown.out, "progress goes to stderr"
    for name in ("report.html", "importance.csv", "verdicts.json", "diagnostics.json", "epochs.csv"):
        assert (tmp_path / "out" / name).is_file(), name
    client = MlflowClient(uri_of(store))
    run = client.search_runs(["1"], filter_string="tags.`ram.study` = 'good' and tags.`ram.kind` = 'study'")[0]
    attached = {entry.path for entry in client.list_artifacts(run.info.run_id, "sensitivity")}
    assert {"sensitivity/report.html", "sensitivity/importance.csv", "sensitivity/figures"} <= attached


def one_trial(records: StudyData) -> StudyData:
    return records._replace(trials=records.trials.iloc[:1], epochs=records.epochs[records.epochs["trial"] == 0])


def all_failed(records: StudyData) -> StudyData:
    trials = records.trials.assign(state="failed", stop_reason="error: disk full")
    return records._replace(trials=trials, epochs=records.epochs.iloc[:0])


def all_nan(records: StudyData) -> StudyData:
    return records._replace(epochs=records.epochs.assign(val_accuracy=np.nan))


def same_everywhere(records: StudyData) -> StudyData:
    names = [d.name for d in STUDY.dimensions]
    return records._replace(trials=records.trials.assign(**{n: records.trials[n].iloc[0] for n in names}))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (one_trial, {}, "needs at least 5 trials"),
        (all_failed, {}, "12 failed"),
        (all_nan, {}, "needs at least 5 trials"),
        (same_everywhere, {}, "same configuration"),
        (lambda r: r, {"space": None}, "needs the search space"),
        (lambda r: r, {"space": {"dimensions": "nonsense"}}, "needs the search space"),
        (lambda r: r, {"space": {"dimensions": []}}, "needs a parameter that varies"),
    ],
)
def test_study_that_cannot_be_answered_is_one_line_and_exit_2(
    store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[StudyData], StudyData],
    options: dict[str, object],
    message: str,
    request: pytest.FixtureRequest,
) -> None:
    name = f"bad {request.node.callspec.id}"
    add(store, change(simulate(STUDY)), name, **options)
    code = main(Args(study=name, tracking_uri=uri_of(store), out=tmp_path / "out"))
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(error) == 1 and message in error[0], error
    assert not (tmp_path / "out").exists()


def test_unknown_study_and_missing_store_exit_2(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(Args(study="nope", tracking_uri=uri_of(store))) == 2
    assert "There is: " in capfd.readouterr().err
    assert main(Args(tracking_uri=f"sqlite:///{tmp_path}/no.db")) == 2
    assert "there is no" in capfd.readouterr().err


@pytest.mark.usefixtures("few_draws")
def test_running_study_gets_a_partial_report(store: Path, tmp_path: Path) -> None:
    records = simulate(STUDY)
    trials = records.trials.assign(state=["complete"] * 9 + ["running"] * 3)
    add(store, records._replace(trials=trials), "still going", status="running")
    assert main(Args(study="still going", tracking_uri=uri_of(store), out=tmp_path)) == 0
    page = (tmp_path / "report.html").read_text()
    assert "still running" in page
    assert '<td data-heading="trials">running</td><td data-heading="number">3</td>' in page


@pytest.mark.usefixtures("few_draws")
def test_unwritable_folder_is_one_line_and_exit_2(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(Args(study="good", tracking_uri=uri_of(store), out=tmp_path / "file" / "out")) == 2
    assert "must be writable" in capfd.readouterr().err


@pytest.mark.usefixtures("few_draws")
def test_ofat_study_is_reported_without_a_ranking(store: Path, tmp_path: Path) -> None:
    records = simulate(STUDY)
    rows = ["baseline best"] + [f"baseline best: patch_size={i}" for i in range(11)]
    ofat = records._replace(trials=records.trials.assign(origin="ofat", row=rows, state="complete"))
    add(store, ofat, "ofat", params={"design": "ofat", "epochs": "4"})
    assert main(Args(study="ofat", tracking_uri=uri_of(store), out=tmp_path)) == 0
    assert "One factor at a time" in (tmp_path / "report.html").read_text()
    assert "ofat" not in SEARCH_ORIGINS


@pytest.mark.usefixtures("few_draws")
def test_fixed_design_without_a_trial_does_not_stop_the_report(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    records = simulate(STUDY)
    same = {"task": "translated", "data": "digits", "epochs": "4"}
    add(tmp_path, records, "search", params={"design": "search", **same})
    ended = records._replace(trials=records.trials.assign(origin="replicate", row="default", state="complete"))
    add(tmp_path, ended, "replicate", params={"design": "replicate", **same})
    none = records._replace(trials=records.trials.iloc[:0], epochs=records.epochs.iloc[:0])
    add(tmp_path, none, "replicate again", params={"design": "replicate", **same})
    assert main(Args(study="search", tracking_uri=uri_of(tmp_path), out=tmp_path / "out")) == 0
    assert "<h2>Replicates</h2>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("few_draws")
def test_study_of_paper_tables_is_refused_and_the_newest_search_is_found(
    tmp_path: Path, empty_database: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    add(tmp_path, simulate(STUDY), "search")
    add(tmp_path, simulate(STUDY), "rows", params={"design": "ablation"})
    assert main(Args(study="rows", tracking_uri=uri_of(tmp_path), out=tmp_path / "out")) == 2
    assert "Run python -m analysis.paper --study rows" in capfd.readouterr().err
    assert main(Args(tracking_uri=uri_of(tmp_path), out=tmp_path / "out")) == 0
    assert "Sensitivity of search" in capfd.readouterr().out
