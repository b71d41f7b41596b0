"""A storage in S3, for real: pyarrow against a server on loopback that speaks S3."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import mlflow
import optuna
import pytest
import torch
from moto.server import ThreadedMotoServer
from optuna.trial import TrialState
from test_record import SETTINGS, SPACE, metrics, plan

from study import snapshots
from study.checkpoints import Checkpoints
from study.flags import USAGE, Flags
from study.object_store import RemoteFolder, VersionConflict
from study.probe import COMPARED, probe, versions
from study.record import Record, RecordLost, open_record
from study.run import main
from study.snapshots import fetch
from study.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
STORAGE = "s3://bucket/ram-study"
ME = {"config": {"patch_size": 8}, "seeds": [0, 1]}


@pytest.fixture
def store(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty bucket, and a cache of this test's own: the folder of the driver's working copies."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()  # its buckets are the process's
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield tmp_path / "cache"
    server.stop()


def keys(*, marks: bool = False) -> list[str]:
    """What the bucket holds; with pyarrow's marks of folders if asked for."""
    found = boto3.client("s3").list_objects_v2(Bucket="bucket").get("Contents", [])
    return sorted(item["Key"] for item in found if marks or not item["Key"].endswith("/"))


def test_checkpoints_are_saved_in_and_loaded_from_a_bucket(store):
    checkpoints = Checkpoints(Storage.parse(STORAGE).folder("s"), 7)
    assert isinstance(checkpoints.folder, RemoteFolder)
    assert checkpoints.load(ME) is None and checkpoints.load_best() is None
    for epoch in (1, 2, 3):
        state = {"identity": ME, "trainer": {"weights": torch.full((5,), float(epoch))}, "history": []}
        checkpoints.save(epoch, state)
    folder = "ram-study/s/trials/0007"
    assert keys() == [f"{folder}/epoch_0002.pt", f"{folder}/epoch_0003.pt"]
    loaded = checkpoints.load(ME)
    assert loaded is not None and loaded["trainer"]["weights"][0] == 3
    content = checkpoints.folder.read("trials/0007/epoch_0003.pt")
    checkpoints.folder.write("trials/0007/epoch_0003.pt", content[: len(content) // 2])
    loaded = checkpoints.load(ME)
    assert loaded is not None and loaded["trainer"]["weights"][0] == 2  # the newest is damaged
    checkpoints.save_best({"weights": {"w": torch.ones(2)}})
    checkpoints.drop_epochs(keep_best=True)
    assert keys() == [f"{folder}/best.pt"]


def test_probing_a_bucket_leaves_nothing_there(store):
    assert probe("a node", STORAGE, ".probe-of-this-test", versions(COMPARED)) is None
    assert all("probe" not in key for key in keys(marks=True))
    Storage.parse(STORAGE).folder("s").write("study.db", b"")
    Storage.parse(STORAGE).folder(".hidden").write("x", b"")
    assert Storage.parse(STORAGE).studies() == ["s"]


def test_record_survives_loss_of_driver_machine(store):
    def open_here() -> Record:
        fetch(Storage.parse(STORAGE), "s")
        return open_record(Storage.parse(STORAGE), SETTINGS, total=5)

    with open_here() as record:
        for index, accuracy in enumerate((0.2, 0.6)):
            record.start(plan(index), SPACE)
            record.add_epoch(index, 1, metrics(1, accuracy, accuracy))
        record.end(0, "complete", "finished")
        uid = record.uid
    assert keys() == ["ram-study/s/study.db"]
    shutil.rmtree(store)
    with open_here() as record:
        assert [(t.state, len(t.epochs)) for t in record.trials.values()] == [("complete", 1), ("running", 1)]
        assert record.uid == uid


def test_version_of_an_object_is_replaced_once(store):
    folder = Storage.parse(STORAGE).folder("s")
    assert isinstance(folder, RemoteFolder)
    first = folder.write_version("study.db", b"1", None)
    assert folder.read_version("study.db") == (b"1", first)
    with pytest.raises(VersionConflict):
        folder.write_version("study.db", b"2", None)
    second = folder.write_version("study.db", b"2", first)
    with pytest.raises(VersionConflict):
        folder.write_version("study.db", b"3", first)
    assert folder.read_version("study.db") == (b"2", second)
    folder.delete("study.db")
    with pytest.raises(VersionConflict):
        folder.write_version("study.db", b"3", second)
    with pytest.raises(FileNotFoundError):
        folder.read_version("study.db")


def test_suspended_driver_cannot_overwrite_its_successors_record_in_a_bucket(store, monkeypatch):
    monkeypatch.setattr(snapshots, "_EXPIRES", 0.2)
    monkeypatch.setattr(snapshots, "_INTERVAL", 1000.0)
    storage = Storage.parse(STORAGE)
    fetch(storage, "s")
    suspended = open_record(storage, SETTINGS, total=5)
    suspended.start(plan(), SPACE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(store.parent / "another"))
    fetch(storage, "s")
    with open_record(storage, SETTINGS, total=5) as successor:
        successor.add_epoch(0, 1, metrics(1, 0.5, 0.5))
        successor.flush()
        theirs = storage.folder("s").read("study.db")
        monkeypatch.setattr(snapshots.Lease, "check", lambda lease: None)  # it had looked at the lease before
        with pytest.raises(RecordLost, match="another driver has taken the study over"):
            suspended.start(plan(1), SPACE)
        suspended.close()
        assert storage.folder("s").read("study.db") == theirs


def test_missing_bucket_is_refused_in_one_line(store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(Flags(data="digits", storage="s3://nosuch/folder")) == USAGE
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--storage must be within reach; s3://nosuch/folder did not answer" in line


# The whole thing: the head is killed and its disk is gone.


def start(folder: Path) -> subprocess.Popen[str]:
    flags = ("--data", "digits", "--task", "original", "--study", "s", "--trials", "4", "--epochs", "3")
    command = [sys.executable, "-m", "study.run", *flags, "--storage", STORAGE]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def epochs_in(path: Path) -> int:
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute("select count(*) from trial_intermediate_values").fetchone()[0]
    return 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_study_in_s3_continues_when_head_is_lost(store, tmp_path):
    first = start(tmp_path)
    try:
        end = time.monotonic() + 500
        working = Storage.parse(STORAGE).record_folder("s") / "study.db"
        while not (any("best.pt" in key for key in keys()) and epochs_in(working) >= 5):
            assert first.poll() is None and time.monotonic() < end, first.communicate()[1]
            time.sleep(0.2)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        ended_before = [key for key in keys() if key.endswith("best.pt")]
        shutil.rmtree(store)  # the machine is gone, with its cache

        second = start(tmp_path)
        out, err = second.communicate(timeout=600)
    finally:
        first.kill()
    assert second.returncode == 0, err
    assert "4 trials finished" in out or "stopped early" in out
    fetched = Storage.parse(STORAGE).record_folder("s")
    assert set(ended_before) <= set(keys())
    # What the bucket holds is the whole study, not the copy on this machine's disk.
    shutil.rmtree(store)
    fetch(Storage.parse(STORAGE), "s")
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{fetched}/study.db")
    assert len(study.trials) == 4
    assert all(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in study.trials)
    for trial in study.trials:
        if trial.state == TrialState.COMPLETE:
            assert sorted(trial.intermediate_values) == [1, 2, 3]
    # MLflow, which outlived the head, has each trial once.
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("ram-study")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`ram.kind` = 'trial'")
    numbers = sorted(json.loads(run.data.tags.get("ram.trial", "-1")) for run in runs)
    assert numbers == [0, 1, 2, 3]
