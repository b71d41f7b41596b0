"""The seam between study and analysis: a study that is run and tracked here is read back and compared with its record.

The record is read with Optuna alone, so neither side can be wrong in the same way twice.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pandas as pd
import pytest
from test_tracking import PROVENANCE, SETTINGS, SPACE, metrics

from analysis.load import Exported, StudyData, connect, find_study, list_studies, load_study
from ramcore.config import Config
from ramcore.cost import cost
from ramcore.errors import UserError
from ramcore.space import Space
from study import schema
from study.designs import TrialSpec
from study.record import Record
from study.search_space import configuration
from study.sobol import SobolSequence
from study.tracking import Tracker

ROOT = Path(__file__).resolve().parent.parent
STATE = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}

# Commands, one after the other, on the first images of the bundled digits. ASHA stops every trial that it may, so that
# some trial is stopped on every machine.
COMMANDS = """
import json, sys
from ramcore.data import Split, make_task
from study import prepare
from study.asha import ASHA
from study.flags import DONE, Flags
from study.run import main
load_task = prepare.load_task

def load_few(config, *args):
    whole = load_task(config, *args)
    splits = {name: whole.split(name) for name in ("train", "validation", "test")}
    few = {name: Split(split.images[:100], split.labels[:100]) for name, split in splits.items()}
    return make_task(config.data, config.task, few)

prepare.load_task = load_few
ASHA.stops = lambda *_: True
for flags in json.loads(sys.argv[1]):
    assert main(Flags(**flags)) == DONE
"""


def run_studies(folder: Path, *commands: dict[str, Any]) -> None:
    common = {"data": "digits", "task": "original", "seeds_per_trial": 2, "max_concurrent": 1, "address": "local"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAM_", "MLFLOW_"))}
    environment["PYTHONPATH"] = str(ROOT)
    program = [sys.executable, "-c", COMMANDS, json.dumps([common | flags for flags in commands])]
    run = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def read_both(folder: Path, name: str) -> Iterator[StudyData]:
    """A study as the analysis reads it from MLflow, and from an export of that."""
    client = connect(f"sqlite:///{folder}/mlflow.db")
    tracked = load_study(client, find_study(list_studies(client), name))
    yield tracked
    Exported.write_to(folder / "exported", tracked)
    exported = Exported(folder / "exported")
    yield load_study(exported, find_study(list_studies(exported), name))


def compare(data: StudyData, record: Path) -> list[str]:
    """Assert that the analysis' tables say what Optuna's storage says; returns the states of the trials."""
    study = optuna.load_study(study_name=record.parent.name, storage=f"sqlite:///{record}")
    trials = study.get_trials()
    settings = study.user_attrs["settings"]
    assert data.budget == settings["epochs"] and data.space == Space.from_dict(settings["space"])
    assert data.study.name == settings["study"]
    assert list(data.trials.index) == [t.number for t in trials]
    for trial in trials:
        compare_trial(data.trials.loc[trial.number], trial, study.user_attrs)
        compare_epochs(data.epochs[data.epochs["trial"] == trial.number], trial)
    assert set(data.epochs["trial"]) <= {t.number for t in trials}
    return [STATE[t.state.name] for t in trials]


def compare_trial(row: pd.Series, trial: optuna.trial.FrozenTrial, study: dict[str, Any]) -> None:
    plan = trial.user_attrs["plan"]
    end = trial.user_attrs.get("end", {"reason": "", "diverged": False, "test": None})
    assert (row["state"], row["stop_reason"]) == (STATE[trial.state.name], end["reason"])
    assert bool(row["diverged"]) == end["diverged"]
    for name in ("origin", "row", "baseline", "parameter"):
        assert row[name] == plan[name], name
    assert row["seeds"] == tuple(plan["seeds"])
    for name, value in plan["config"].items():
        assert row[name] == value and isinstance(row[name], str) == isinstance(value, str), name
    for name, value in trial.params.items():
        assert row[name] == value, name
    assert (row["parameters"], row["macs"]) == cost(Config(**plan["config"]))
    test = study.get(f"test {trial.number:04d}", end["test"])
    assert row["test_accuracies"] == (tuple(test["accuracy"]) if test else ())
    mean = statistics.fmean(test["accuracy"]) if test else math.nan
    assert row["test_accuracy"] == pytest.approx(mean, rel=0, abs=0, nan_ok=True)


def compare_epochs(table: pd.DataFrame, trial: optuna.trial.FrozenTrial) -> None:
    """Every epoch of every seed; an accuracy that is not finite is not tracked."""
    expected: dict[tuple[int, int], dict[str, float]] = {}
    epochs = [trial.user_attrs[key]["metrics"] for key in sorted(trial.user_attrs) if re.fullmatch(r"epoch \d+", key)]
    for epoch, recorded in enumerate(epochs, start=1):
        assert recorded["epoch"] == epoch
        for seed, accuracy in zip(recorded["seeds"], recorded["val_accuracy"], strict=True):
            means = {name: statistics.fmean(recorded[name]) for name in schema.EPOCH_MEANS}
            values = {"val_accuracy": accuracy, **means, schema.EPOCH_SECONDS: recorded["seconds"]}
            if math.isfinite(accuracy):
                expected[epoch, seed] = {name: value for name, value in values.items() if math.isfinite(value)}
    told = table[table["val_accuracy"].notna()]
    found = {
        (int(row["epoch"]), int(row["seed"])): {
            name: float(row[name])
            for name in ("val_accuracy", *schema.EPOCH_MEANS, schema.EPOCH_SECONDS)
            if not math.isnan(row[name])
        }
        for _, row in told.iterrows()
    }
    assert found == expected
    means = told.groupby("epoch")["val_accuracy"].mean()
    for epoch, value in trial.intermediate_values.items():
        assert means[epoch] == pytest.approx(value)
    if trial.state.name == "COMPLETE":
        assert trial.value == trial.intermediate_values[len(epochs)]


def test_search_and_design_that_are_run_are_read_back_as_recorded(tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    run_studies(
        tmp_path,
        {"study": "search", "trials": 4, "epochs": 3},
        {"study": "design", "design": "ofat", "trials": 2, "epochs": 1},
    )
    states, designs = [], []
    for name in ("search", "design"):
        for data in read_both(tmp_path, name):
            states.append(compare(data, tmp_path / "runs" / name / "study.db"))
            designs.append(data.settings["design"])
            assert data.study.status == "finished"
    assert states[0] == states[1] and set(states[0]) == {"complete", "pruned"}
    assert states[2] == states[3] == ["complete"] * 2
    assert designs == ["search", "search", "ofat", "ofat"]


# Trials of all kinds, without training.


def begin(record: Record, *accuracies: tuple[float, float], **spec: str) -> int:
    """Add a trial with these accuracies of its two seeds, an epoch each; returns its number."""
    number = len(record.trials)
    config = configuration(SPACE, SobolSequence(SPACE, 0)[number])
    record.start(TrialSpec(config=config, seeds=(0, 1), **{"origin": "sobol"} | spec), SPACE)
    for epoch, accuracy in enumerate(accuracies, start=1):
        record.add_epoch(number, epoch, metrics(epoch, *accuracy))
    return number


@pytest.fixture
def tracked(empty_database, tmp_path, monkeypatch) -> Path:
    """A folder with a tracked record of trials that ended in every way, and of one that runs."""
    monkeypatch.chdir(tmp_path)  # where artifacts go
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    with Record.open(tmp_path / "runs" / "a study", SETTINGS, total=7) as record:
        test = {"accuracy": [0.5, 0.75], "epoch": [3, 2]}
        record.end(begin(record, (0.2, 0.4), (0.5, 0.7), (0.5, 0.8)), "complete", "finished", test=test)
        record.end(begin(record, (0.2, 0.1)), "pruned", "stopped by successive halving at epoch 1")
        diverged = begin(record, (0.2, 0.4), (0.5, math.nan))
        record.end(diverged, "failed", "diverged: seed 1 at epoch 2", diverged=True)
        record.end(begin(record, (0.2, 0.4)), "failed", "error: RuntimeError: no memory")
        begin(record, (0.1, 0.2), (0.2, 0.3))
        ofat = {"origin": "ofat", "row": "baseline best: learning_rate=0.01", "baseline": "best"}
        record.end(begin(record, (0.3, 0.5), **ofat, parameter="learning_rate"), "complete", "finished")
        record.end(begin(record, (0.3, 0.5), **ofat | {"row": "baseline best"}), "complete", "finished")
        record.set_test(6, {"accuracy": [0.25, 0.5], "epoch": [1, 1]})
        space = {**SETTINGS.space, "study": "a study", "epochs": 3}
        tracker = Tracker(record, f"sqlite:///{tmp_path}/mlflow.db", PROVENANCE, space)
        tracker.start()
        assert tracker.finish("stopped") is None
    return tmp_path


def test_trials_of_every_state_are_read_back_as_recorded(tracked):
    expected = ["complete", "pruned", "failed", "failed", "running", "complete", "complete"]
    for data in read_both(tracked, "a study"):
        assert compare(data, tracked / "runs" / "a study" / "study.db") == expected
        assert data.study.status == "stopped"
        assert list(data.trials["diverged"]) == [False, False, True, False, False, False, False]
        assert list(data.trials["baseline"]) == [""] * 5 + ["best", "best"]
        assert list(data.trials["parameter"]) == [""] * 5 + ["learning_rate", ""]


def test_tracked_study_of_schema_1_is_read_the_same(tracked):
    client = mlflow.MlflowClient(f"sqlite:///{tracked}/mlflow.db")
    now, _ = read_both(tracked, "a study")
    experiment = client.get_experiment_by_name(schema.EXPERIMENT)
    for run in client.search_runs([experiment.experiment_id]):
        client.set_tag(run.info.run_id, schema.SCHEMA, "1")
        if schema.ORIGIN in run.data.tags:
            client.set_tag(run.info.run_id, "ram.arm", run.data.tags[schema.ORIGIN])
        for name in (schema.ORIGIN, schema.BASELINE, schema.PARAMETER, schema.DIVERGED):
            if name in run.data.tags:
                client.delete_tag(run.info.run_id, name)
    shutil.rmtree(tracked / "exported")
    for older in read_both(tracked, "a study"):
        columns = [c for c in now.trials.columns if c != "started"]
        pd.testing.assert_frame_equal(older.trials[columns], now.trials[columns], check_dtype=False)
        pd.testing.assert_frame_equal(older.epochs, now.epochs, check_dtype=False, check_like=True)


def test_study_of_a_later_schema_is_refused_in_one_line(tracked):
    client = connect(f"sqlite:///{tracked}/mlflow.db")
    (study,) = list_studies(client)
    later = schema.VERSION + 1
    Exported.write_to(tracked / "exported", load_study(client, study))
    client.set_tag(study.run_id, schema.SCHEMA, str(later))
    described = json.loads((tracked / "exported" / "a-study" / "study.json").read_text())
    described["study"]["tags"][schema.SCHEMA] = str(later)
    (tracked / "exported" / "a-study" / "study.json").write_text(json.dumps(described))
    for source in (client, Exported(tracked / "exported")):
        with pytest.raises(UserError, match=f"schema 1 to {schema.VERSION}; a study has schema {later}") as error:
            load_study(source, find_study(list_studies(source), "a study"))
        assert "\n" not in str(error.value)


def test_committed_records_of_schema_1_are_read_with_origin_baseline_and_parameter():
    source = Exported(ROOT / "results" / "records")
    study = find_study(list_studies(source), "translated-mnist-ofat")
    assert study.tags[schema.SCHEMA] == "1"
    trials = load_study(source, study).trials
    with (source.folder / "translated-mnist-ofat" / "trials.csv").open() as file:
        raw = list(csv.DictReader(file))
    assert "arm" in raw[0] and "baseline" not in raw[0] and len(raw) == len(trials) == 62
    for row, (number, trial) in zip(raw, trials.iterrows(), strict=True):
        label = f"baseline {trial['baseline']}"
        if parameter := trial["parameter"]:
            value = trial[parameter]
            label += f": {parameter}={f'{value:.3g}' if isinstance(value, float) else value}"
        assert (row["trial"], row["arm"], row["row"]) == (str(number), trial["origin"], label)
        assert (row["state"], row["stop_reason"]) == (trial["state"], trial["stop_reason"])
        assert bool(trial["diverged"]) == row["stop_reason"].startswith("diverged")
    assert set(trials["baseline"]) == {"best", "small patch"} and len(set(trials["parameter"])) > 5
