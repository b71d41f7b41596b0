"""The reader: tracked studies come back unchanged, and unreadable ones are refused in one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import requests
from mlflow import MlflowClient
from optuna.storages import RDBStorage

from analysis import export
from analysis import load as reader
from ramcore.errors import UserError
from ramcore.space import Dimension, Space
from tests.synthetic import RAM_DIMENSIONS, Synthetic, ram_truth, simulate, space_json, write_mlflow

RECORDS = Path(__file__).parent.parent / "results" / "records"

STUDY = Synthetic(
    truth=ram_truth,
    dimensions=RAM_DIMENSIONS[:5],
    trials=5,
    epochs=4,
    origin="mixed",
    stop=True,
    fail=lambda x: float(x[4] > 0.3),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[str, reader.StudyData]:
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(empty_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    records = simulate(STUDY)
    write_mlflow(records, uri, artifacts=folder / "artifacts")
    other = records._replace(study=records.study._replace(name="newer"))
    write_mlflow(other, uri, artifacts=folder / "artifacts", space=None)
    return uri, records


def read(uri: str, name: str) -> reader.StudyData:
    client = reader.connect(uri)
    return reader.load_study(client, reader.find_study(reader.list_studies(client), name))


def assert_same(ours: reader.StudyData, truth: reader.StudyData) -> None:
    columns = ["trial", "seed", "epoch", "val_accuracy"]
    expected = truth.epochs[columns].sort_values(columns[:3]).reset_index(drop=True)
    pd.testing.assert_frame_equal(ours.epochs[columns], expected, check_dtype=False)
    for column in ("origin", "state", "stop_reason", "seeds", "learning_rate", "patch_size", "epochs_seen"):
        assert list(ours.trials[column]) == list(truth.trials[column]), column


def test_tracked_study_is_read_back_unchanged(store: tuple[str, reader.StudyData]) -> None:
    ours = read(store[0], "synthetic-0")
    assert_same(ours, store[1])
    assert ours.epochs["val_accuracy"].isna().any(), "a diverged seed's NaN is kept, not dropped"
    assert ours.space is not None
    assert ours.space.dimensions == RAM_DIMENSIONS[:5]
    assert ours.settings["sizes"]["validation"] == 360


def test_each_trial_has_its_page_in_mlflow_without_the_servers_password(store: tuple[str, reader.StudyData]) -> None:
    records = read(store[0], "synthetic-0")
    assert records.pages and list(records.pages) == list(records.trials.index)
    client = reader.connect(store[0])
    for trial, page in records.pages.items():
        experiment, run_id = re.fullmatch(rf"{reader.MLFLOW_UI}/#/experiments/(\d+)/runs/(\w+)", page).groups()  # type: ignore[union-attr]
        run = client.get_run(run_id)
        assert (run.info.experiment_id, run.data.tags["ram.trial"]) == (experiment, str(trial))
    made = reader._pages("https://me:secret@host:8443/prefix/", "7", {3: "abc"})
    assert made == {3: "https://host:8443/prefix/#/experiments/7/runs/abc"}
    assert reader._pages("databricks://profile", "7", {3: "abc"}) == {}


def test_reading_without_bulk_requests_gives_the_same_tables(
    store: tuple[str, reader.StudyData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_bulk_history", lambda *_: None)
    assert_same(read(store[0], "synthetic-0"), store[1])


def test_study_read_over_http_is_unchanged(store: tuple[str, reader.StudyData], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store[0], "--port", str(port)]
    command += ["--workers", "1", "--artifacts-destination", str(tmp_path)]
    quiet = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # no helpers of its own that would outlive it
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=quiet, start_new_session=True) as server,
    ):
        try:
            for _ in range(1000):
                try:
                    if requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok:
                        break
                except requests.RequestException:
                    time.sleep(0.2)
            uri = f"http://127.0.0.1:{port}"
            client = reader.connect(uri)
            store_of = client._tracking_client.store
            assert not hasattr(store_of, "get_metric_history_bulk"), "this is the HTTP path"
            runs = [r.info.run_id for r in client.search_runs(["1"], filter_string="tags.`ram.kind` = 'trial'")]
            assert reader._bulk_history(client, runs, "val_accuracy"), "the server has the bulk endpoint"
            assert_same(read(uri, "synthetic-0"), store[1])
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def test_newest_study_is_the_default_and_unknown_name_lists_the_known_ones(
    store: tuple[str, reader.StudyData],
) -> None:
    studies = reader.list_studies(reader.connect(store[0]))
    assert reader.find_study(studies, None).name == "newer"
    with pytest.raises(reader.UserError, match=r"got 'nope'\. There is: newer, synthetic-0"):
        reader.find_study(studies, "nope")


def test_missing_space_is_reported_and_the_rest_is_read(store: tuple[str, reader.StudyData]) -> None:
    ours = read(store[0], "newer")
    assert ours.space is None
    assert ours.space_problem is not None and "space.json is missing" in ours.space_problem


def test_missing_database_experiment_or_trials_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "none.db"
    with pytest.raises(reader.UserError, match=r"there is no .*none\.db"):
        reader.connect(f"sqlite:///{missing}")
    assert not missing.exists(), "looking must not create a database"
    uri = f"sqlite:///{tmp_path}/empty.db"
    MlflowClient(uri).create_experiment("Default-2")
    with pytest.raises(reader.UserError, match="holds none"):
        reader.list_studies(reader.connect(uri))
    records = simulate(STUDY)
    nothing = records._replace(trials=records.trials.iloc[:0], epochs=records.epochs.iloc[:0])
    write_mlflow(nothing, uri, artifacts=tmp_path / "artifacts", status="running")
    with pytest.raises(reader.UserError, match=r"synthetic-0 \(running\) has none yet"):
        read(uri, "synthetic-0")


@pytest.mark.parametrize("content", ["nothing", "another table", "a record", "no SQLite"])
def test_database_that_is_not_mlflows_is_refused_and_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "foreign.db"
    if content == "a record":
        RDBStorage(f"sqlite:///{path}").engine.dispose()
    elif content == "another table":
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("create table own (a)")
    else:
        path.write_text("text" * 1000 if content == "no SQLite" else "")
    before = path.read_bytes()
    for uri in (f"sqlite:///{path}", f"sqlite+pysqlite:///{path}"):
        with pytest.raises(reader.UserError, match=r"must be MLflow's own|file is not a database") as caught:
            reader.connect(uri)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("update tags set value = 'abc' where key = 'ram.trial' and value = '2'", "left out: its tag ram.trial is 'a"),
        ("delete from tags where key = 'ram.trial' and value = '2'", "left out: its tag ram.trial is ''"),
        ("update tags set value = '²' where key = 'ram.schema'", "has schema ²"),
        ("update runs set start_time = null", "must be readable; start_time cannot be None: put a copy"),
        ("drop table runs", "must be MLflow's own"),
        ("update tags set value = '0,²' where key = 'ram.seeds'", ""),
        ("update metrics set key = 'val_accuracy.seed_x' where key = 'val_accuracy.seed_0'", ""),
    ],
)  # fmt: skip
def test_runs_that_are_not_as_a_study_writes_them_are_left_out_or_refused_in_one_line(
    store: tuple[str, reader.StudyData], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, said: str
) -> None:
    path = tmp_path / "mlflow.db"
    for file, command in ((store[0].removeprefix("sqlite:///"), f"vacuum into '{path}'"), (path, damage)):
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute(command)
            database.commit()
    try:
        records = read(f"sqlite:///{path}", "synthetic-0")
    except reader.UserError as error:
        assert said and said in str(error) and "\n" not in str(error)
    else:
        assert said in capsys.readouterr().err and list(records.trials.index) == [0, 1, *([] if said else [2]), 3, 4]


def test_unreachable_server_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(reader.UserError, match=r"must answer; http://127\.0\.0\.1:9 does not") as caught:
        reader.connect("http://127.0.0.1:9")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tracking_uri": "http://[::1"}, "the tracking server must answer; http://[::1 does not (Invalid IPv6 URL)"),
        ({"tracking_uri": f"sqlite:///{'a' * 300}"}, "--tracking-uri must be a path that this user can use; /"),
        ({"records": Path("a" * 300)}, "--records must be a path that this user can use; aaa"),
        ({"records": RECORDS, "out": Path("a" * 300)}, "the records must be writable; [Errno 36] File name too long"),
        ({"records": RECORDS, "out": Path("a\0b")}, "the records must be writable; embedded null byte"),
    ],
)
def test_wrong_place_is_refused_by_its_own_flag(given, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"records": None, "study": None, "tracking_uri": None, "out": tmp_path, **given}

    def work() -> None:
        source = reader.open_source(flags["tracking_uri"] or "", flags["records"])
        study = reader.find_study(reader.list_studies(source), "original-digits-search")
        reader.Exported.write_to(flags["out"], reader.load_study(source, study))

    assert reader.exit_code("records", work) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_dimensions_map_to_the_unit_interval_and_back() -> None:
    log = Dimension(name="rate", type="float", low=1e-4, high=1e-2, log=True)
    assert log.to_unit([1e-4, 1e-3, 1e-2]) == pytest.approx([0, 0.5, 1])
    assert log.from_unit(np.array([0.5])) == pytest.approx([1e-3])
    whole = Dimension(name="patch_size", type="int", low=4, high=20, unit="pixels")
    assert whole.from_unit(whole.to_unit([4, 12, 20])) == [4, 12, 20]
    assert set(whole.from_unit(whole.quantile(np.linspace(0, 0.999, 500)))) == set(range(4, 21))
    kind = Dimension(name="core", type="categorical", choices=("rnn", "gru"))
    assert kind.to_unit(["rnn", "gru"]).tolist() == [0, 1]
    assert np.isnan(kind.to_unit(["lstm"])[0])
    assert Dimension(name="num_glimpses", type="int", unit="glimpses").label == "number of glimpses"
    assert whole.label == "patch size, pixels"


def test_saved_space_is_read_back_and_invalid_ones_are_refused() -> None:
    records = simulate(STUDY)
    raw = space_json(records)
    assert Space.from_dict(raw) == records.space
    for bad in ({}, {"dimensions": [{"name": "a", "type": "float", "low": 0.0, "high": 1.0, "log": True}]}):
        with pytest.raises(UserError):
            Space.from_dict(bad)


# Records as text.


def test_exported_study_equals_the_tracked_one(store: tuple[str, reader.StudyData], tmp_path: Path) -> None:
    tracked = read(store[0], "synthetic-0")
    reader.Exported.write_to(tmp_path, tracked)
    source = reader.open_source("unused", tmp_path)
    again = reader.load_study(source, reader.find_study(reader.list_studies(source), "synthetic-0"))
    pd.testing.assert_frame_equal(again.trials, tracked.trials, check_dtype=False)
    pd.testing.assert_frame_equal(again.epochs, tracked.epochs, check_dtype=False)
    assert again.space == tracked.space and again.settings == tracked.settings
    assert again.study.params == tracked.study.params and again.study.started == tracked.study.started


def test_export_command_writes_the_named_study(store: tuple[str, reader.StudyData], tmp_path: Path) -> None:
    assert export.main(export.Args(study="synthetic-0", tracking_uri=store[0], out=tmp_path)) == 0
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["epochs.csv", "study.json", "trials.csv"]


def test_folder_without_whole_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(reader.UserError, match="--records must be a folder"):
        reader.open_source("unused", tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "study.json").write_text("{")
    with pytest.raises(reader.UserError, match="exported records must be whole"):
        reader.list_studies(reader.open_source("unused", tmp_path))


RECORDS = Path(__file__).parent.parent / "results" / "records"
TRIALS, EPOCHS, DESCRIBED = "trials.csv", "epochs.csv", "study.json"


@pytest.fixture(scope="module")
def today(store: tuple[str, reader.StudyData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that this version exported, with checksums."""
    return reader.Exported.write_to(tmp_path_factory.mktemp("today"), read(store[0], "synthetic-0"))


@pytest.fixture(params=["today", "earlier"])
def exported(request: pytest.FixtureRequest, today: Path, tmp_path: Path) -> Path:
    own = today if request.param == "today" else RECORDS / "original-digits-search"
    return Path(shutil.copytree(own, tmp_path / own.name))


def refusal(own: Path) -> str:
    """What reading an exported study is refused with."""
    source = reader.Exported(own.parent)
    with pytest.raises(reader.UserError, match="exported records must be whole") as caught:
        reader.load_study(source, reader.list_studies(source)[0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", [TRIALS, EPOCHS])
@pytest.mark.parametrize("damage", ["half", "header", "emptied", "twice", "no column", "percent", "text", "gone"])
def test_damaged_table_of_an_export_is_refused_by_its_name(exported: Path, file: str, damage: str) -> None:
    path = exported / file
    header, *rows = path.read_text().splitlines()
    accuracy = header.split(",").index("test_accuracy" if file == TRIALS else "val_accuracy")
    cells = rows[-1].split(",")
    if damage == "half":
        rows = rows[: len(rows) // 2]
    elif damage == "header":
        rows = []
    elif damage == "twice":
        rows += rows
    elif damage == "no column":
        header, rows = header.partition(",")[2], [row.partition(",")[2] for row in rows]
    elif damage in ("percent", "text"):
        cells[accuracy] = "57.3" if damage == "percent" else "text"
        rows[-1] = ",".join(cells)
    path.write_text("" if damage == "emptied" else "\n".join([header, *rows]) + "\n")
    if damage == "gone":
        path.unlink()
    said = refusal(exported)
    # Without a checksum, trials.csv of half the trials is judged by study.json, and epochs.csv by trials.csv.
    assert str(path) in said, said


def test_epochs_of_another_study_are_refused(exported: Path) -> None:
    shutil.copy(RECORDS / "mnist-24" / EPOCHS, exported / EPOCHS)
    assert str(exported / EPOCHS) in refusal(exported)


def test_line_ends_that_git_changed_are_no_damage(exported: Path) -> None:
    for file in (TRIALS, EPOCHS):
        (exported / file).write_bytes((exported / file).read_bytes().replace(b"\n", b"\r\n"))
    source = reader.Exported(exported.parent)
    reader.load_study(source, reader.list_studies(source)[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda d: {},
        lambda d: [],
        lambda d: None,
        lambda d: "text",
        lambda d: {k: v for k, v in d.items() if k != "space"},
        lambda d: {k: v for k, v in d.items() if k != "settings"},
        lambda d: d | {"settings": None},
        lambda d: d | {"study": d["study"] | {"more": 1}},
        lambda d: d | {"study": {k: v for k, v in d["study"].items() if k != "run_id"}},
        lambda d: d | {"study": d["study"] | {"started": None}},
        lambda d: d | {"study": d["study"] | {"tags": {"ram.schema": 2}}},
    ],
)
def test_damaged_description_of_an_export_is_refused_by_its_name(today: Path, tmp_path: Path, change) -> None:
    own = Path(shutil.copytree(today, tmp_path / today.name))
    described = json.loads((own / DESCRIBED).read_text())
    (own / DESCRIBED).write_text(json.dumps(change(described)))
    assert str(own / DESCRIBED) in refusal(own)


def test_committed_exports_are_read_as_they_are() -> None:
    source = reader.Exported(RECORDS)
    for study in reader.list_studies(source):
        assert len(reader.load_study(source, study).trials) == int(study.tags["ram.trials"])


def test_folder_name_has_no_special_characters() -> None:
    assert reader.folder_name("a/b <c>") == "a-b-c"
    assert reader.folder_name("../..") == "study"


def test_space_with_unknown_rule_or_bounds_is_refused() -> None:
    patch = {"name": "patch_size", "type": "int", "low": 4, "high": 20}
    for entry, rule, said in (
        (patch, "min(patch_size, 3) <= 3", "rule of the widest scale only"),
        (patch, "patch_size > 1", "rule of the widest scale only"),
        ({**patch, "low": "two"}, "patch_size * scale_factor**(num_scales - 1) <= 60", "must list dimensions"),
    ):
        with pytest.raises(UserError, match=said):
            Space.from_dict({"dimensions": [entry], "constraints": [{"rule": rule}]})
    point = Dimension(name="a", type="float", low=2.0, high=2.0)
    assert list(point.to_unit([2.0, 2.0])) == [0.0, 0.0]


def test_second_study_of_a_name_does_not_overwrite_the_exported_first(
    store: tuple[str, reader.StudyData], tmp_path: Path
) -> None:
    tracked = read(store[0], "synthetic-0")
    reader.Exported.write_to(tmp_path, tracked)
    reader.Exported.write_to(tmp_path, tracked)  # the same again
    with pytest.raises(reader.UserError, match="a folder holds one study"):
        reader.Exported.write_to(tmp_path, tracked._replace(study=tracked.study._replace(run_id="older")))
    studies = [tracked.study._replace(run_id="newer"), tracked.study._replace(run_id="older")]
    assert reader.find_study(studies, "synthetic-0").run_id == "newer"
    assert reader.find_study(studies, "older").run_id == "older"


def test_records_of_schema_1_are_read_with_the_fields_of_schema_2() -> None:
    rows = [
        "baseline best",
        "baseline best: patch_size=4",
        "baseline small patch: core=gru",
        "",
        "",
        "best of s",
        "spread point 1",
    ]
    old = pd.DataFrame(
        {
            "arm": ["ofat", "ofat", "ofat", "tpe", "sobol", "replicate", "replicate"],
            "row": rows,
            "state": ["complete", "complete", "failed", "failed", *["complete"] * 3],
            "stop_reason": ["finished", "finished", "error: disk", "diverged: seed 1 at epoch 4", *["finished"] * 3],
        }
    )
    new = reader._upgrade(old)
    assert list(new["origin"])[:5] == ["ofat", "ofat", "ofat", "tpe", "sobol"] and "arm" not in new
    assert list(new["baseline"]) == ["best", "best", "small patch", "", "", "best", ""]
    assert list(new["parameter"]) == ["", "patch_size", "core", "", "", "", ""]
    assert list(new["diverged"]) == [False, False, False, True, False, False, False]
    pd.testing.assert_frame_equal(reader._upgrade(new), new)
