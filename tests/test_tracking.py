from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import mlflow
import optuna
import pytest
from crash import waiting
from servers import Proxy, Server

from analysis import load
from ramcore.config import Config
from ramcore.errors import UserError
from study import tracking
from study.designs import TrialSpec
from study.moved import tracking_uri
from study.record import Record, StudySettings
from study.search_space import configuration, search_space
from study.sobol import SobolSequence
from study.tracking import Provenance, Publish, Tracker, check_server

SPACE = search_space(Config(data="digits", task="original", epochs=3))
SETTINGS = StudySettings(
    study="a study",
    task="original",
    data="digits",
    digest="d" * 64,
    design="search",
    epochs=3,
    seeds_per_trial=2,
    seed=0,
    space=SPACE.to_dict(),
)
PROVENANCE = Provenance(
    settings={"command": "python -m study.run"}, commit="abc", dirty=False, params={"task": "original"}
)


@pytest.fixture
def uri(empty_database, tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)  # where artifacts go
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def impatient(monkeypatch) -> None:
    """An MLflow that waits 5 seconds for a locked database, not 20."""
    monkeypatch.setattr("mlflow.store.db.utils.sql", waiting(5000))


@pytest.fixture
def record(tmp_path):
    with Record.open(tmp_path / "s", SETTINGS, total=3) as record:
        yield record


def metrics(epoch: int, *accuracy: float) -> dict:
    names = ("train_loss", "train_accuracy", "reward", "baseline_error", "gradient_norm", "val_loss")
    values = {name: [0.25, 0.75] for name in names}
    return {"epoch": epoch, "seconds": 1.5, "seeds": [0, 1], "val_accuracy": list(accuracy), **values}


def trial(
    record: Record, *accuracies: tuple[float, float], end: str | None = "complete", test: dict | None = None
) -> None:
    index = len(record.trials)
    record.start(
        TrialSpec(config=configuration(SPACE, SobolSequence(SPACE, 0)[index]), origin="sobol", seeds=(0, 1)), SPACE
    )
    for epoch, accuracy in enumerate(accuracies, start=1):
        record.add_epoch(index, epoch, metrics(epoch, *accuracy))
    if end is not None:
        reason = "finished" if end == "complete" else "diverged: seed 1 at epoch 2"
        record.end(index, end, reason, test=test, diverged=end == "failed")


def track(record: Record, uri: str, status: str = "finished", patience: float = 30) -> str | None:
    tracker = Tracker(record, uri, PROVENANCE, {"schema": 1})
    tracker.start()
    return tracker.finish(status, patience=patience)


def runs(uri: str) -> dict[str, mlflow.entities.Run]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("ram-study")
    found = client.search_runs([experiment.experiment_id])
    assert len({r.info.run_name for r in found}) == len(found)
    return {r.info.run_name: r for r in found}


def history(uri: str, run: mlflow.entities.Run, name: str) -> list[tuple[int, float]]:
    found = mlflow.MlflowClient(uri).get_metric_history(run.info.run_id, name)
    return sorted((m.step, m.value) for m in found)


def test_tracked_study_has_the_names_that_analysis_reads(record, uri):
    trial(record, (0.2, 0.4), (0.5, 0.7), test={"accuracy": [0.5, 0.6], "epoch": [2, 1]})
    trial(record, (0.2, 0.4), (0.5, float("nan")), end="failed")
    trial(record, (0.1, 0.1), end=None)
    assert track(record, uri, "stopped") is None
    found = runs(uri)
    assert sorted(found) == ["a study", "trial 0000", "trial 0001", "trial 0002"]
    parent, first, failed, running = (found[name] for name in sorted(found))
    tags = parent.data.tags
    assert (tags["ram.kind"], tags["ram.study"], tags["ram.schema"]) == ("study", "a study", "2")
    assert (tags["ram.status"], tags["ram.commit"], tags["ram.commit_dirty"]) == ("stopped", "abc", "false")
    assert parent.data.metrics["trials_finished"] == 2 and parent.data.metrics["best_val_accuracy"] == pytest.approx(
        0.6
    )
    (dataset,) = parent.inputs.dataset_inputs
    assert dataset.dataset.name == "digits" and "d" * 64 in dataset.dataset.source
    client = mlflow.MlflowClient(uri)
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {"study.json", "space.json"}
    for child in (first, failed, running):
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    tags = first.data.tags
    assert (tags["ram.trial"], tags["ram.origin"], tags["ram.seeds"]) == ("0", "sobol", "0,1")
    assert (tags["ram.state"], tags["ram.stop_reason"]) == ("complete", "finished")
    assert first.data.params == {k: str(v) for k, v in record.trials[0].spec.config.__dict__.items()}
    assert history(uri, first, "val_accuracy") == [(1, pytest.approx(0.3)), (2, pytest.approx(0.6))]
    assert history(uri, first, "val_accuracy.seed_1") == [(1, 0.4), (2, 0.7)]
    assert history(uri, first, "val_accuracy_sd")[0] == (1, pytest.approx(0.2 / 2**0.5))
    assert history(uri, first, "epoch_seconds") == [(1, 1.5), (2, 1.5)]
    assert first.data.metrics["macs"] > 0 and history(uri, first, "parameters")[0][0] == 0
    assert first.data.metrics["test_accuracy"] == pytest.approx(0.55)
    assert history(uri, first, "test_accuracy.seed_0") == [(2, 0.5)]
    assert (failed.info.status, failed.data.tags["ram.state"]) == ("FAILED", "failed")
    assert failed.data.tags["ram.diverged"] == "true" and "ram.diverged" not in tags
    assert history(uri, failed, "val_accuracy") == [(1, pytest.approx(0.3))]  # a NaN is no metric
    assert history(uri, failed, "val_accuracy.seed_0") == [(1, 0.2), (2, 0.5)]
    assert (running.info.status, running.data.tags["ram.state"]) == ("RUNNING", "running")
    assert next(iter(first.data.metrics)) == "val_accuracy"  # MLflow's page compares runs by the first one


def test_trial_that_was_stopped_early_is_told_apart_from_a_finished_one(record, uri):
    trial(record, (0.5, 0.7))
    trial(record, (0.2, 0.4), end="pruned")
    assert track(record, uri) is None
    found = runs(uri)
    assert found["trial 0000"].info.status == "FINISHED"
    assert found["trial 0001 stopped early"].info.status == "KILLED"
    assert track(record, uri) is None  # the next run finds it again, and changes nothing
    again = runs(uri)
    assert again["trial 0001 stopped early"].info.end_time == found["trial 0001 stopped early"].info.end_time


@pytest.mark.parametrize(
    ("server", "at"),
    [
        ("sqlite:///mlflow.db", "http://127.0.0.1:5000/#/experiments/"),
        ("https://me:secret@host:99/prefix/", "https://host:99/prefix/#/experiments/"),
    ],
)
def test_link_opens_the_runs_of_the_study_and_shows_no_password(record, server, at):
    page = Tracker(record, server, PROVENANCE, {}).page
    assert page.startswith(at) and "/runs?workflowType=machine_learning&searchFilter=" in page
    assert "tags.%60ram.study%60%3D%27a+study%27" in page and "val_accuracy" in page and "secret" not in page


def test_experiment_is_marked_as_one_of_training_runs(uri):
    check_server(uri)
    experiment = mlflow.MlflowClient(uri).get_experiment_by_name("ram-study")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_metric_has_the_time_of_its_epoch_in_the_record(record, uri):
    trial(record, (0.2, 0.4))
    track(record, uri)
    child = runs(uri)["trial 0000"]
    (metric,) = mlflow.MlflowClient(uri).get_metric_history(child.info.run_id, "val_accuracy")
    assert metric.timestamp == record.trials[0].epochs[0].time


def test_tracker_that_logs_everything_again_changes_nothing(record, uri, monkeypatch):
    trial(record, (0.2, 0.4), (0.5, 0.7))
    track(record, uri)
    before = {name: (r.data.metrics, r.data.params) for name, r in runs(uri).items()}
    # A tracker that believes that MLflow holds nothing logs everything again.
    monkeypatch.setattr(tracking._ChildRun, "holds", lambda *_: False)
    found = tracking._only
    monkeypatch.setattr(tracking, "_only", lambda client, runs, worth: _forgetful(found(client, runs, worth)))
    track(record, uri)
    assert {name: (r.data.metrics, r.data.params) for name, r in runs(uri).items()} == before
    child = runs(uri)["trial 0000"]
    assert history(uri, child, "val_accuracy") == [(1, pytest.approx(0.3)), (2, pytest.approx(0.6))]


def _forgetful(run):
    run.data.tags.pop("ram.tracked_epochs", None)
    return run


def test_next_run_logs_what_mlflow_lacks(record, uri):
    trial(record, (0.2, 0.4), end=None)
    track(record, uri, "stopped")
    record.add_epoch(0, 2, metrics(2, 0.5, 0.7))
    record.end(0, "complete", "finished")
    trial(record, (0.1, 0.1))
    record.set_test(0, {"accuracy": [0.5, 0.5], "epoch": [1, 1]})
    track(record, uri)
    found = runs(uri)
    assert sorted(found) == ["a study", "trial 0000", "trial 0001"]
    assert found["a study"].data.tags["ram.status"] == "finished" and found["trial 0000"].info.status == "FINISHED"
    assert history(uri, found["trial 0000"], "val_accuracy") == [(1, pytest.approx(0.3)), (2, pytest.approx(0.6))]
    assert found["trial 0000"].data.metrics["test_accuracy"] == 0.5


def test_trial_with_two_runs_keeps_the_older_one(record, uri):
    trial(record, (0.2, 0.4), end=None)
    track(record, uri, "stopped")
    client = mlflow.MlflowClient(uri)
    first = runs(uri)["trial 0000"]
    # The server carried out the creating call twice.
    twin = client.create_run(first.info.experiment_id, run_name="trial 0000", tags=first.data.tags)
    track(record, uri)
    assert runs(uri)["trial 0000"].info.run_id == first.info.run_id
    assert client.get_run(twin.info.run_id).info.lifecycle_stage == "deleted"


@pytest.mark.parametrize("worth_less", ["older", "newer"])
def test_parent_made_twice_keeps_the_one_with_trials(record, uri, worth_less):
    trial(record, (0.2, 0.4), end=None)
    track(record, uri, "stopped")
    client = mlflow.MlflowClient(uri)
    parent = runs(uri)["a study"]
    tags = {k: v for k, v in parent.data.tags.items() if k in ("ram.kind", "ram.uid", "ram.study", "ram.schema")}
    start = record.created - 1 if worth_less == "older" else record.created + 1
    twin = client.create_run(parent.info.experiment_id, start_time=start, run_name="a study", tags=tags)
    studies = load.list_studies(load.connect(uri))  # before the next run has mended it
    assert [study.run_id for study in studies] == [parent.info.run_id]
    track(record, uri, "stopped")
    found = runs(uri)
    assert found["a study"].info.run_id == parent.info.run_id
    assert found["trial 0000"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert client.get_run(twin.info.run_id).info.lifecycle_stage == "deleted"


def test_trials_of_a_deleted_parent_are_nested_below_the_new_one(record, uri):
    trial(record, (0.2, 0.4))
    track(record, uri, "stopped")
    old = runs(uri)["a study"]
    mlflow.MlflowClient(uri).delete_run(old.info.run_id)
    trial(record, (0.1, 0.1))
    track(record, uri)
    found = runs(uri)
    assert sorted(found) == ["a study", "trial 0000", "trial 0001"]
    new = found.pop("a study").info.run_id
    assert new != old.info.run_id
    assert {child.data.tags["mlflow.parentRunId"] for child in found.values()} == {new}


def test_trials_are_read_by_their_study_whatever_parent_they_name(record, uri):
    trial(record, (0.2, 0.4))
    track(record, uri)
    client = mlflow.MlflowClient(uri)
    client.set_tag(runs(uri)["trial 0000"].info.run_id, "mlflow.parentRunId", "0" * 32)
    (study,) = load.list_studies(client)
    assert list(load.load_study(client, study).trials.index) == [0]


def test_run_deleted_during_the_study_is_made_again(record, uri):
    trial(record, (0.2, 0.4), end=None)
    tracker = Tracker(record, uri, PROVENANCE, {"schema": 1})
    tracker.start()
    until(lambda: tracker._children and tracker._children[0].epochs == 1)
    client = mlflow.MlflowClient(uri)
    for run in runs(uri).values():
        client.delete_run(run.info.run_id)
    record.add_epoch(0, 2, metrics(2, 0.5, 0.7))
    assert tracker.finish("stopped") is None
    assert [step for step, _ in history(uri, runs(uri)["trial 0000"], "val_accuracy")] == [1, 2]


def test_outage_is_reported_and_ends_after_the_patience(record, caplog):
    trial(record, (0.2, 0.4), (0.3, 0.3))
    trial(record, (0.2, 0.4))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        untracked = track(record, dead, patience=2)
    assert time.monotonic() - started < 6
    assert untracked is not None and untracked.startswith("at most 3 epochs of 2 trials (")
    assert "training goes on" in caplog.text


def until(fulfilled, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not fulfilled():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_database_that_can_be_read_only_ends_the_wait_and_next_run_completes_it(record, uri, impatient, tmp_path):
    trial(record, (0.2, 0.4), end=None)
    tracker = Tracker(record, uri, PROVENANCE, {"schema": 1})
    tracker.start()
    until(lambda: tracker._children and tracker._children[0].epochs == 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as foreign:
        foreign.execute("begin immediate")
        record.add_epoch(0, 2, metrics(2, 0.5, 0.7))
        started = time.monotonic()
        untracked = tracker.finish("stopped", patience=2)
        assert untracked is not None and untracked.startswith("1 epochs of 1 trials (")
        assert time.monotonic() - started < 10 and tracker.outage is None  # the thread's call still waits
        until(lambda: tracker.outage)
        assert tracker.outage == "database is locked"
        foreign.execute("rollback")
    assert track(record, uri, "stopped") is None
    assert [step for step, _ in history(uri, runs(uri)["trial 0000"], "val_accuracy")] == [1, 2]


def test_description_written_again_and_again_is_no_progress(record, uri, monkeypatch):
    trial(record, (0.2, 0.4))
    tracked = tracking.Tracker._sync_study

    def fails_late(self, client):
        tracked(self, client)
        raise OSError("full")

    monkeypatch.setattr(tracking.Tracker, "_sync_study", fails_late)
    started = time.monotonic()
    assert track(record, uri, patience=3) is not None
    assert time.monotonic() - started < 12


def test_database_deleted_during_a_run_is_made_again_with_everything(record, uri, tmp_path):
    trial(record, (0.2, 0.4), (0.5, 0.7))
    tracker = Tracker(record, uri, PROVENANCE, {"schema": 1})
    tracker.start()
    until(lambda: tracker._children and tracker._children[0].ended)
    (tmp_path / "mlflow.db").unlink()
    trial(record, (0.1, 0.1))
    assert tracker.finish("finished") is None
    found = runs(uri)
    assert sorted(found) == ["a study", "trial 0000", "trial 0001"]
    assert [step for step, _ in history(uri, found["trial 0000"], "val_accuracy")] == [1, 2]


def test_artifacts_that_cannot_be_written_hold_no_metric_back(record, uri, monkeypatch):
    monkeypatch.setattr(tracking, "_BACKOFF", (0.1,))
    trial(record, (0.2, 0.4))

    def unwritable(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/artifacts")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_text", unwritable)
        untracked = track(record, uri)
    assert untracked == "study.json and space.json ([Errno 13] Permission denied: '/artifacts')"
    found = runs(uri)
    assert found["a study"].info.status == "FINISHED" and found["trial 0000"].data.metrics["val_accuracy"] > 0
    assert track(record, uri) is None
    client = mlflow.MlflowClient(uri)
    assert {a.path for a in client.list_artifacts(found["a study"].info.run_id)} == {"study.json", "space.json"}


def test_signal_ends_the_wait_during_an_outage(record):
    trial(record, (0.2, 0.4))
    tracker = Tracker(record, "http://127.0.0.1:9", PROVENANCE, {"schema": 1})
    tracker.start()
    until(lambda: tracker.outage)
    started = time.monotonic()
    assert tracker.finish("stopped", hurry=lambda: True) is not None
    assert time.monotonic() - started < 2


def test_study_ends_when_its_model_cannot_be_published_and_next_run_publishes_it(record, uri, monkeypatch):
    monkeypatch.setattr(tracking, "_BACKOFF", (0.1,))
    trial(record, (0.2, 0.4))
    tries = []

    def full(client: mlflow.MlflowClient, run_id: str) -> None:
        tries.append(run_id)
        raise OSError(28, "No space left on device")

    tracker = Tracker(record, uri, PROVENANCE, {"schema": 1})
    tracker.start()
    untracked = tracker.finish("finished", publish=Publish(key="trial 0", call=full))
    assert untracked is not None and "the best model" in untracked and "No space left on device" in untracked
    assert len(tries) == 3
    parent = runs(uri)["a study"]
    assert parent.info.status == "FINISHED" and "ram.published" not in parent.data.tags
    # The next run of the command tries again.
    tracker = Tracker(record, uri, PROVENANCE, {"schema": 1})
    tracker.start()
    assert tracker.finish("finished", publish=Publish(key="trial 0", call=lambda *_: None)) is None
    assert runs(uri)["a study"].data.tags["ram.published"] == "trial 0"


@pytest.mark.parametrize("tracked", ["three epochs", "its end", "metrics without their tags"])
def test_older_copy_of_the_record_logs_everything_once(record, uri, tmp_path, tracked):
    test = {"epoch": [3, 3], "accuracy": [0.3, 0.4]}
    trial(record, (0.2, 0.4), end=None)
    backup = tmp_path / "backup.db"
    with contextlib.closing(sqlite3.connect(tmp_path / "s" / "study.db")) as now:
        now.execute("vacuum into ?", (str(backup),))
    for epoch in (2, 3):
        record.add_epoch(0, epoch, metrics(epoch, 0.1 * epoch, 0.3))
    if tracked == "its end":
        record.end(0, "complete", "finished", test=test)
    track(record, uri, "stopped")
    record.close()
    if tracked == "metrics without their tags":  # MLflow writes them one after the other
        mlflow.MlflowClient(uri).set_tag(runs(uri)["trial 0000"].info.run_id, "ram.tracked_epochs", "1")
    time.sleep(0.01)  # the next end has another time
    for path in (tmp_path / "s").glob("study.db*"):
        path.unlink()
    backup.rename(tmp_path / "s" / "study.db")
    with Record.open(tmp_path / "s", SETTINGS, total=3) as older:
        assert len(older.trials[0].epochs) == 1
        assert track(older, uri, "stopped") is None
        for epoch in (2, 3):
            older.add_epoch(0, epoch, metrics(epoch, 0.1 * epoch, 0.3))
        older.end(0, "complete", "finished", test=test)
        assert track(older, uri) is None
    child = runs(uri)["trial 0000"]
    assert [step for step, _ in history(uri, child, "val_accuracy")] == [1, 2, 3]
    assert child.data.tags["ram.state"] == "complete" and child.info.status == "FINISHED"
    assert history(uri, child, "test_accuracy") == [(3, pytest.approx(0.35))]
    assert len(history(uri, runs(uri)["a study"], "trials_finished")) == 1


def test_trial_has_the_commit_that_it_began_with(record, uri):
    record.begin_run({"commit": "first", "commit_dirty": False})
    trial(record, (0.2, 0.4))
    record.begin_run({"commit": "second", "commit_dirty": True})
    trial(record, (0.2, 0.4))
    track(record, uri)  # at the commit "abc"
    found = {name: (r.data.tags["ram.commit"], r.data.tags["ram.commit_dirty"]) for name, r in runs(uri).items()}
    assert found == {"a study": ("abc", "false"), "trial 0000": ("first", "false"), "trial 0001": ("second", "true")}


def test_epochs_reported_during_a_slow_call_share_the_next_call(record, uri, monkeypatch):
    calls: list[str] = []
    log_batch = mlflow.MlflowClient.log_batch

    def slow(self: mlflow.MlflowClient, run_id: str, *args: object, **kwargs: object) -> object:
        assert threading.current_thread().name == "tracking"
        calls.append(run_id)
        time.sleep(0.2)
        return log_batch(self, run_id, *args, **kwargs)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", slow)
    trial(record, (0.2, 0.4), end=None)
    tracker = Tracker(record, uri, PROVENANCE, {"schema": 1})
    tracker.start()
    started = time.monotonic()
    for epoch in range(2, 42):
        record.add_epoch(0, epoch, metrics(epoch, 0.5, 0.5))
        time.sleep(0.05)
    assert time.monotonic() - started < 10  # the driver did not wait for the tracker
    assert tracker.finish("stopped") is None
    child = runs(uri)["trial 0000"]
    assert [step for step, _ in history(uri, child, "val_accuracy")] == list(range(1, 42))
    assert calls.count(child.info.run_id) < 20


def test_two_studies_of_one_name_have_two_parent_runs(record, uri, tmp_path):
    trial(record, (0.2, 0.4))
    track(record, uri)
    with Record.open(tmp_path / "other", SETTINGS, total=3) as other:
        trial(other, (0.2, 0.4))
        track(other, uri)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("ram-study")
    assert len(client.search_runs([experiment.experiment_id], "tags.`ram.kind` = 'study'")) == 2


def test_new_database_appears_only_when_complete(tmp_path):
    client = tracking._connect(f"sqlite:///{tmp_path}/new.db")
    client.search_experiments()
    assert [p.name for p in tmp_path.glob("*new.db*") if "wal" not in p.name and "shm" not in p.name] == ["new.db"]


def test_tracking_uri_comes_from_flag_then_environment_then_default(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:5000")
    assert tracking_uri("http://flag:5000") == "http://flag:5000"
    assert tracking_uri(None) == "http://env:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(None) == "sqlite:///mlflow.db"


# The conversation before the start.


def refused(uri: str, *, known: bool = False) -> str:
    """The one line with which a tracking server is refused."""
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        check_server(uri, known=known)
    assert "\n" not in str(error.value) and time.monotonic() - started < 15
    return str(error.value)


def test_unreachable_tracking_is_refused_within_seconds(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        for bad in (address, "./mlruns", f"sqlite:///{tmp_path}/no/such/folder/mlflow.db"):
            refused(bad)
        check_server(address, known=True)  # an outage: a study that continues can be tracked later
    check_server(f"sqlite:///{tmp_path}/mlflow.db")


def change(path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)


@pytest.mark.parametrize("known", [False, True])
def test_tracking_that_will_never_work_is_refused_with_the_remedy(uri, tmp_path, monkeypatch, known):
    database = tmp_path / "mlflow.db"
    (tmp_path / "noise.db").write_bytes(bytes(range(256)) * 40)
    optuna.create_study(storage=f"sqlite:///{tmp_path}/optuna.db")
    shutil.copy(database, tmp_path / "later.db")
    change(tmp_path / "later.db", "update alembic_version set version_num = 'later'")
    shutil.copy(database, tmp_path / "unwritable.db")
    change(
        tmp_path / "unwritable.db",
        "insert into experiments (name, artifact_location, lifecycle_stage, experiment_id) "
        "values ('ram-study', '/proc/nope/a', 'active', 7)",
    )
    os.mkfifo(tmp_path / "pipe")  # and not a device, which must not be deleted either
    before = {*tmp_path.iterdir()}
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    for bad, said in (
        ("ftp://nope/x", "unsupported URI"),
        ("sqlite://", "must be a file"),
        (f"sqlite:///{tmp_path}/noise.db", "file is not a database"),
        (f"sqlite:///{tmp_path}/optuna.db", "holds other tables"),
        (f"sqlite:///{tmp_path}/later.db", "mlflow db upgrade"),
        (f"sqlite:///{tmp_path}/unwritable.db", "/proc/nope/a could not be written"),
        ("postgresql://somebody:s3cret@127.0.0.1:1/x", "install psycopg"),
        ("sqlite+nope:////" + str(tmp_path / "nope.db"), "sqlite.nope"),
        (f"sqlite:///{tmp_path}", "must be a file"),
        (f"sqlite:///{tmp_path}/pipe", "must be a file"),
        (f"sqlite:///file:{tmp_path}/uri.db?uri=true", "a path alone"),
        (f"sqlite:///{tmp_path}/ro.db?mode=ro", "a path alone"),
        ("sqlite:////proc/x.db", "No such file"),
    ):
        line = refused(bad, known=known)
        assert said in line and "s3cret" not in line
    assert (tmp_path / "pipe").is_fifo()
    assert before == {*tmp_path.iterdir()}
    client = mlflow.MlflowClient(uri)
    client.delete_experiment(client.create_experiment("ram-study"))
    assert "mlflow experiments restore -x" in refused(uri, known=known)


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers every request as `content` says."""

    content = b"{}"
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("scheme", "status", "content", "said"),
    [
        ("http", 200, b"{}", "answers, and knows of no experiments"),
        ("https", 200, b"{}", "pass http:// in place of https://"),
        ("http", 404, b"<html>Not here</html>", "404"),
        ("http", 503, b"", "503"),
        ("http", None, b"", "Connection refused"),
    ],
)
def test_fact_of_a_server_that_is_not_mlflows_is_in_the_line(scheme, status, content, said):
    handler = type("Handler", (Answer,), {"content": content, "status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        if status is None:
            server.server_close()
        else:
            thread.start()
        try:
            line = refused(f"{scheme}://127.0.0.1:{server.server_port}")
        finally:
            if status is not None:
                server.shutdown()
                thread.join()
    assert said in line


@pytest.mark.parametrize("folder", ["a?b", "a%41b", "{a} #b"])
def test_study_in_a_folder_with_signs_of_a_uri_is_recorded_and_tracked_there(tmp_path, monkeypatch, folder):
    here = tmp_path / folder
    here.mkdir()
    monkeypatch.chdir(here)
    check_server("sqlite:///mlflow.db")
    with Record.open(here / "runs" / "s", SETTINGS, total=1) as record:
        trial(record, (0.5, 0.5))
        assert track(record, "sqlite:///mlflow.db") is None
    with Record.open(here / "runs" / "s", SETTINGS, total=1) as record:
        assert record.trials[0].state == "complete"
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    assert {path.name for path in here.iterdir()} >= {"mlflow.db", "runs"}


def test_database_locked_by_another_process_is_an_outage(uri, impatient, tmp_path):
    check_server(uri)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as foreign:
        foreign.execute("begin exclusive")
        check_server(uri, known=True)


def test_probe_leaves_no_file(uri, tmp_path):
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    check_server(uri)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_database):
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "server.db")
    with Server(folder) as server:
        yield server


@pytest.fixture(scope="module")
def cert(tmp_path_factory):
    """A certificate that signs itself, with its key."""
    path = tmp_path_factory.mktemp("cert") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run(command, check=True, capture_output=True)
    with path.open("a") as file:
        file.write(Path(f"{path}.crt").read_text())
    return path


def test_password_in_the_uri_is_used_and_a_wrong_one_refused_without_showing_it(server):
    with Proxy(server.port, user="alice:s3cret") as proxy:
        check_server(f"http://alice:s3cret@{proxy.address}")
        for known in (False, True):
            line = refused(f"http://alice:wr0ng@{proxy.address}", known=known)
            assert "401" in line and "MLFLOW_TRACKING_PASSWORD" in line and "wr0ng" not in line and "alice" not in line


def test_password_and_token_of_mlflows_environment_are_used(server, monkeypatch):
    with Proxy(server.port, user="alice:s3cret") as proxy:
        refused(f"http://{proxy.address}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
        check_server(f"http://{proxy.address}")


def test_tls_settings_of_mlflow_are_used(server, cert, monkeypatch):
    with Proxy(server.port, cert=cert) as proxy:
        uri = f"https://{proxy.address}"
        assert "MLFLOW_TRACKING_SERVER_CERT_PATH" in refused(uri, known=True)
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(cert))
            check_server(uri)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of urllib3, that this is insecure
            monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
            check_server(uri)


def test_prefix_of_a_server_is_used(server):
    with Proxy(server.port, prefix="/tracking") as proxy:
        check_server(f"http://{proxy.address}")
        assert "404" in refused(f"http://{proxy.address.removesuffix('/tracking')}/other", known=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["study", "trial"])
def test_run_that_a_slow_server_makes_twice_is_kept_once_with_everything(record, server, monkeypatch, kind):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    trial(record, (0.2, 0.4))
    with Proxy(server.port) as proxy:
        proxy.held[kind] = 10.0  # until after its repetition
        tracker = Tracker(record, f"http://{proxy.address}", PROVENANCE, {"schema": 1})
        tracker.start()
        until(lambda: tracker._children and tracker._children[0].ended, seconds=120)
        assert tracker.finish("finished", patience=90) is None
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("ram-study")
    found = client.search_runs([experiment.experiment_id], f"tags.`ram.uid` = '{record.uid}'")
    child, parent = sorted(found, key=lambda run: run.data.tags["ram.kind"], reverse=True)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.info.status == "FINISHED" and parent.data.metrics["trials_finished"] == 1
    assert history(server.uri, child, "val_accuracy") == [(1, pytest.approx(0.3))]


def test_settings_are_logged_as_study_json(record, uri):
    trial(record, (0.2, 0.4))
    track(record, uri)
    parent = runs(uri)["a study"]
    text = mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/study.json")
    assert json.loads(text) == {"command": "python -m study.run"}


def test_thread_that_ends_between_two_looks_has_tracked_everything(record, uri):
    tracker = Tracker(record, uri, PROVENANCE, {"schema": 1})
    waits: list[bool] = []

    class Late(threading.Event):
        def wait(self, timeout=None):
            if not waits:  # the first look comes too early; then the thread does its work and ends
                waits.append(True)
                tracker._thread.join()
                return False
            return super().wait(timeout)

    tracker._idle = Late()
    tracker.start()
    assert tracker.finish("stopped") is None
