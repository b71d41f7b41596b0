from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking._tracking_service import utils

from analysis import load
from ramcore.config import Config
from ramcore.evaluation import build_model
from study import results
from study.designs import TrialSpec
from study.moved import follow_move
from study.record import Epoch, TrialRecord
from study.tracking import check_server


@pytest.fixture
def project(empty_database, tmp_path, monkeypatch) -> Path:
    """A folder with a database, and one run in it that has a file."""
    folder = tmp_path / "old"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copy(empty_database, folder / "mlflow.db")
    check_server(uri(folder))
    client = mlflow.MlflowClient(uri(folder))
    experiment = client.get_experiment_by_name("ram-study")
    tags = {"ram.kind": "study", "ram.uid": "u", "ram.study": "s", "ram.schema": "2"}
    run = client.create_run(experiment.experiment_id, tags=tags)
    client.log_text(run.info.run_id, '{"epochs": 7}', "space.json")
    monkeypatch.chdir(tmp_path)
    utils._artifact_repos_cache.clear()  # else this process goes on writing where the run's files were
    return folder


def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def epochs(folder: Path) -> object:
    """What the analysis reads from the study's file."""
    client = load.connect(uri(folder))
    (study,) = load.list_studies(client)
    return (load._read_json(client, study, "space.json") or {}).get("epochs")


def places(folder: Path) -> list[tuple[str, ...]]:
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return database.execute(
            "select artifact_location from experiments union select artifact_uri from runs"
        ).fetchall()


def test_artifacts_of_a_moved_project_are_found_and_the_old_folder_stays_gone(project, tmp_path):
    new = tmp_path / "somewhere" / "else"
    new.parent.mkdir()
    shutil.move(project, new)
    assert epochs(new) == 7
    check_server(uri(new), known=True)
    client = mlflow.MlflowClient(uri(new))
    (study,) = load.list_studies(client)
    client.log_text(study.run_id, "{}", "study.json")
    assert not project.exists() and list(new.rglob("study.json"))


def test_copied_project_has_artifacts_of_its_own(project, tmp_path):
    new = tmp_path / "new"
    shutil.copytree(project, new)
    before = places(project)
    (path,) = new.rglob("space.json")
    path.write_text('{"epochs": 8}')
    assert (epochs(new), epochs(project)) == (8, 7)
    assert places(project) == before


def test_artifacts_above_the_database_are_found(project, tmp_path):
    new = tmp_path / "new"
    shutil.move(project, new)
    (new / "tracking").mkdir()
    shutil.move(new / "mlflow.db", new / "tracking")
    assert epochs(new / "tracking") == 7


def test_places_stay_where_no_artifact_is_found(project, tmp_path):
    before = places(project)
    follow_move(project / "mlflow.db")
    assert places(project) == before
    (tmp_path / "new").mkdir()
    shutil.move(project / "mlflow.db", tmp_path / "new")  # its artifacts stay
    follow_move(tmp_path / "new" / "mlflow.db")
    assert places(tmp_path / "new") == before


def test_best_model_of_a_moved_project_loads(project, tmp_path):
    config = Config(data="digits", task="original", num_glimpses=2, hidden_size=16, glimpse_size=8, epochs=1)
    weights = build_model(config, torch.tensor([0])).state_dict()
    spec = TrialSpec(config=config, origin="sobol", seeds=(0,))
    epoch = Epoch(time=0, value=0.5, metrics={"val_accuracy": [0.5]})
    trial = TrialRecord(number=0, spec=spec, started=0, epochs=[epoch], state="complete")
    (study,) = load.list_studies(load.connect(uri(project)))
    (tmp_path / "scratch").mkdir()
    try:
        mlflow.set_tracking_uri(uri(project))
        results._log_model(study.run_id, trial, weights, [], tmp_path / "scratch")
        shutil.move(project, tmp_path / "new")
        load.connect(uri(tmp_path / "new"))
        mlflow.set_tracking_uri(uri(tmp_path / "new"))
        mlflow.pyfunc.load_model(f"runs:/{study.run_id}/model")
    finally:
        mlflow.set_tracking_uri(None)
