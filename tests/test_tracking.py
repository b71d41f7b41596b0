from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import mlflow
import pytest
from crash import new_database

from ramcore.config import Config
from study import tracking
from study.designs import Plan
from study.record import Record, StudySettings
from study.space import search_space
from study.tracking import Origin, Tracker, TrackingError, check_reachable, tracking_uri

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
    space=SPACE.describe(),
)
ORIGIN = Origin(settings={"command": "python -m study.run"}, commit="abc", dirty=False, params={"task": "original"})


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """An MLflow database without runs; making one takes seconds, copying it does not."""
    return new_database(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def uri(empty_database, tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)  # where artifacts go
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


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
    record.start(Plan(config=SPACE.config(SPACE.sobol(index, 0)), arm="sobol", seeds=(0, 1)), SPACE.distributions())
    for epoch, accuracy in enumerate(accuracies, start=1):
        record.add_epoch(index, epoch, metrics(epoch, *accuracy))
    if end is not None:
        record.end(index, end, "finished" if end == "complete" else "diverged: seed 1 at epoch 2", test)


def track(record: Record, uri: str, status: str = "finished", patience: float = 30) -> str | None:
    tracker = Tracker(record, uri, ORIGIN, {"schema": 1})
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


def test_the_layout_is_the_contract_with_the_analysis(record, uri):
    trial(record, (0.2, 0.4), (0.5, 0.7), test={"accuracy": [0.5, 0.6], "epoch": [2, 1]})
    trial(record, (0.2, 0.4), (0.5, float("nan")), end="failed")
    trial(record, (0.1, 0.1), end=None)
    assert track(record, uri, "stopped") is None
    found = runs(uri)
    assert sorted(found) == ["a study", "trial 0000", "trial 0001", "trial 0002"]
    parent, first, failed, running = (found[name] for name in sorted(found))
    tags = parent.data.tags
    assert (tags["ram.kind"], tags["ram.study"], tags["ram.schema"]) == ("study", "a study", "1")
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
    assert (tags["ram.trial"], tags["ram.arm"], tags["ram.seeds"]) == ("0", "sobol", "0,1")
    assert (tags["ram.state"], tags["ram.stop_reason"]) == ("complete", "finished")
    assert first.data.params == {k: str(v) for k, v in record.trials[0].plan.config.__dict__.items()}
    assert history(uri, first, "val_accuracy") == [(1, pytest.approx(0.3)), (2, pytest.approx(0.6))]
    assert history(uri, first, "val_accuracy.seed_1") == [(1, 0.4), (2, 0.7)]
    assert history(uri, first, "val_accuracy_sd")[0] == (1, pytest.approx(0.2 / 2**0.5))
    assert history(uri, first, "epoch_seconds") == [(1, 1.5), (2, 1.5)]
    assert first.data.metrics["macs"] > 0 and history(uri, first, "parameters")[0][0] == 0
    assert first.data.metrics["test_accuracy"] == pytest.approx(0.55)
    assert history(uri, first, "test_accuracy.seed_0") == [(2, 0.5)]
    assert (failed.info.status, failed.data.tags["ram.state"]) == ("FAILED", "failed")
    assert history(uri, failed, "val_accuracy") == [(1, pytest.approx(0.3))]  # a NaN is no metric
    assert history(uri, failed, "val_accuracy.seed_0") == [(1, 0.2), (2, 0.5)]
    assert (running.info.status, running.data.tags["ram.state"]) == ("RUNNING", "running")


def test_metrics_carry_the_records_own_time(record, uri):
    trial(record, (0.2, 0.4))
    track(record, uri)
    child = runs(uri)["trial 0000"]
    (metric,) = mlflow.MlflowClient(uri).get_metric_history(child.info.run_id, "val_accuracy")
    assert metric.timestamp == record.trials[0].epochs[0].time


def test_everything_said_again_changes_nothing(record, uri, monkeypatch):
    trial(record, (0.2, 0.4), (0.5, 0.7))
    track(record, uri)
    before = {name: (r.data.metrics, r.data.params) for name, r in runs(uri).items()}
    # A tracker that believes that nothing has been logged yet says everything again.
    monkeypatch.setattr(Tracker, "_is_tracked", lambda *_: False)
    found = tracking._oldest
    monkeypatch.setattr(tracking, "_oldest", lambda client, all_runs: _forgetful(found(client, all_runs)))
    track(record, uri)
    assert {name: (r.data.metrics, r.data.params) for name, r in runs(uri).items()} == before
    child = runs(uri)["trial 0000"]
    assert history(uri, child, "val_accuracy") == [(1, pytest.approx(0.3)), (2, pytest.approx(0.6))]


def _forgetful(run):
    run.data.tags.pop("ram.tracked_epochs", None)
    return run


def test_the_next_run_brings_mlflow_up_to_date(record, uri):
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


def test_of_two_runs_of_one_trial_the_first_is_kept(record, uri):
    trial(record, (0.2, 0.4), end=None)
    track(record, uri, "stopped")
    client = mlflow.MlflowClient(uri)
    first = runs(uri)["trial 0000"]
    # A creating call that came through twice.
    twin = client.create_run(first.info.experiment_id, run_name="trial 0000", tags=first.data.tags)
    track(record, uri)
    assert runs(uri)["trial 0000"].info.run_id == first.info.run_id
    assert client.get_run(twin.info.run_id).info.lifecycle_stage == "deleted"


def test_an_outage_is_told_and_waits_for_no_longer_than_the_patience(record, caplog):
    trial(record, (0.2, 0.4), (0.3, 0.3))
    trial(record, (0.2, 0.4))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        untracked = track(record, dead, patience=2)
    assert time.monotonic() - started < 6
    assert untracked is not None and untracked.startswith("3 epochs of 2 trials (")
    assert "training goes on" in caplog.text


def test_two_studies_of_one_name_have_a_parent_each(record, uri, tmp_path):
    trial(record, (0.2, 0.4))
    track(record, uri)
    with Record.open(tmp_path / "other", SETTINGS, total=3) as other:
        trial(other, (0.2, 0.4))
        track(other, uri)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("ram-study")
    assert len(client.search_runs([experiment.experiment_id], "tags.`ram.kind` = 'study'")) == 2


def test_a_new_database_appears_whole(tmp_path):
    client = tracking._connect(f"sqlite:///{tmp_path}/new.db")
    client.search_experiments()
    assert [p.name for p in tmp_path.glob("*new.db*") if "wal" not in p.name and "shm" not in p.name] == ["new.db"]


def test_the_uri_is_the_flag_then_the_environment_then_a_file(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:5000")
    assert tracking_uri("http://flag:5000") == "http://flag:5000"
    assert tracking_uri(None) == "http://env:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(None) == "sqlite:///mlflow.db"


def test_what_cannot_be_reached_is_refused_quickly(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        for bad in (address, "./mlruns", f"sqlite:///{tmp_path}/no/such/folder/mlflow.db"):
            started = time.monotonic()
            with pytest.raises(TrackingError) as error:
                check_reachable(bad)
            assert "\n" not in str(error.value) and time.monotonic() - started < 6
    check_reachable(f"sqlite:///{tmp_path}/mlflow.db")


def test_settings_are_artifacts(record, uri):
    trial(record, (0.2, 0.4))
    track(record, uri)
    parent = runs(uri)["a study"]
    text = mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/study.json")
    assert json.loads(text) == {"command": "python -m study.run"}
