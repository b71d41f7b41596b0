"""The project from Python: the names of the packages, `run_study`, and the notebook in examples/."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
from test_architecture import PACKAGES, loaded_by

import analysis
import ramcore
import study
from ramcore.errors import UserError
from study import api
from study.record import read_study

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("package", "names"),
    [
        (ramcore, ["Config", "Trainer", "load_task"]),
        (study, ["run_study", "StudyResult"]),
        (analysis, ["open_study", "analyse"]),
    ],
)
def test_packages_have_their_public_names(package, names):
    assert all(callable(getattr(package, name)) for name in names)
    with pytest.raises(AttributeError, match=f"'{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_importing_the_packages_loads_no_library():
    assert not loaded_by(*PACKAGES) & {"torch", "numpy", "ray", "mlflow", "optuna", "pandas"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"trials": 0}, "--trials must be at least 1; got 0"),
        ({"address": "auto"}, "run_study trains on this machine; got address"),
        ({"dry_run": True}, "got dry_run"),
        ({"print_space": True}, "got print_space"),
        ({"trails": 3}, "got trails; did you mean trials?"),
        ({"range": "num_scales=1:3"}, "got range; did you mean range_?"),
        ({"range_": "num_scale=1:3"}, "got num_scale; did you mean num_scales?"),
        ({"epochs": "three"}, "--epochs must be of type int or None; got 'three'"),
        ({"trials": "three"}, "--trials must be a number of at most 1000000, or .N for more; got 'three'"),
        ({"trials": True}, "got True: pass another value"),
        ({"data": None}, "--data must be of type str; got None"),
        ({"data": "digits", "from_": ""}, "--from must be a study's name"),
        ({"data": ""}, "--data must be one of"),
        ({"data": "digits", "storage": "/dev/null"}, "--storage must be a folder that can be written; /dev/null"),
        ({"data": "mnist", "data_dir": Path("/no/such/folder")}, "--data-dir must be a folder"),
        ({"data": "digits", "tracking_uri": "./mlruns"}, "tracking must be a server or a database"),
    ],
)
def test_bad_request_raises_user_error_and_writes_nothing(tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        api.run_study(**flags)
    assert not list(tmp_path.iterdir())


def test_interrupt_is_passed_on_once_and_the_rest_is_read(capfd):
    program = """
import signal, sys, time
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(1))
print("training", flush=True)
while not got: time.sleep(0.01)
time.sleep(0.3)
print("stopped", len(got))
sys.exit(130)
"""
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        while "training" not in (said := capfd.readouterr().out):
            assert not said
        signal.pthread_kill(main, signal.SIGINT)

    # A shell starts what it runs in the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    waiting = threading.Thread(target=interrupt)
    waiting.start()
    try:
        assert api._run([sys.executable, "-c", program]) == (130, "stopped 1")
    finally:
        signal.signal(signal.SIGINT, before)
    waiting.join()


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("quick_fits")
def test_notebook_runs_under_an_event_loop_and_in_a_thread(tmp_path, empty_database, monkeypatch, capsys):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(analysis.analyse.__kwdefaults__, "hyperdraws", 10)  # what it draws is not tested here
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    notebook = json.loads((ROOT / "examples" / "study.ipynb").read_text())
    names: dict = {}

    async def run_cells() -> None:  # as a notebook's kernel does
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                code = compile("".join(cell["source"]), "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                if inspect.isawaitable(done := eval(code, names)):
                    await done

    kernel = threading.Thread(target=asyncio.run, args=(run_cells(),))
    kernel.start()
    kernel.join()
    said = capsys.readouterr().out
    result = names["result"]
    assert result.exit_code == 0 and result.study == "original-digits-search"
    assert "[6/6]" in said and "computing effects" in said and "dummy (no effect)" in said
    known = read_study(result.record)
    assert known is not None and len(result.trials) == 6
    for trial in known.trials:
        row = result.trials.loc[trial.number]
        assert (row["state"], row["epochs_seen"], row["seeds"]) == (trial.state, len(trial.epochs), trial.spec.seeds)
        assert row["val_accuracy"] == trial.epochs[-1].value and row["patch_size"] == trial.spec.config.patch_size
    assert result.best == known.trials[result.best_trial].spec.config
    assert f"Best configuration: trial {result.best_trial:04d}" in said
    columns = names["analysis"].data.dimensions
    assert len(columns) == 9  # eight searched, and the dummy
    assert set(result.trials) >= {d.name for d in columns[:-1]}
    assert set(result.trials) <= {*names["open_study"](result.study).trials, "val_accuracy"}
