from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import mlflow
import numpy as np
import optuna
import pytest
import torch
from rich.console import Console
from test_security import descendants, is_loopback, listeners

from ramcore import machine
from ramcore.config import TASKS, Config
from ramcore.data import Split, make_task
from ramcore.errors import UserError
from ramcore.sources import load_task
from ramcore.space import Dimension
from study import best, designs, driver, pool, prepare, ray_folder, results, tracking
from study.best import pareto_trials
from study.checkpoints import Checkpoints
from study.display import Display, duration, percent, time_left
from study.flags import DONE, SOME_FAILED, STOPPED, UNTRACKED, USAGE, Flags, parse, signals_caught
from study.record import Epoch, Record, TrialRecord, read_study
from study.run import main
from study.search_space import configuration, search_space
from study.trainable import run_trial

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory of the test's own, and no tracking server from the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def refused(capsys, **flags) -> str:
    """Run a command that is refused; returns the one line that it prints."""
    assert main(Flags(**{"data": "digits", **flags})) == USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    return line


LONG = "a" * 300  # characters; a file's name has at most 255


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"trials": 0}, "--trials must be at least 1; got 0"),
        ({"trials": 10**20}, "--trials must be at most 1000000; got about 1e20"),
        ({"trials": "9" * 5000}, "--trials must be a number of at most 1000000, or +N for more; got '99"),
        ({"epochs": 10**400}, "--epochs must be at most 1000000; got about 1e400"),
        ({"epochs": 1_000_001}, "--epochs must be at most 1000000; got 1000001"),
        ({"canvas": 10**400}, "--canvas must be at least 8 and at most 1000; got about 1e400"),
        ({"max_concurrent": 10**7}, "--max-concurrent must be at most 1000000; got 10000000"),
        ({"cpus_per_trial": 1e-5}, "--cpus-per-trial must be at least 0.0001; got 1e-05"),
        ({"gpus_per_trial": 1.5}, "--gpus-per-trial must be whole above 1; got 1.5"),
        ({"epochs": -3}, "--epochs must be at least 1; got -3"),
        ({"seeds_per_trial": 0}, "--seeds-per-trial must be at least 1; got 0"),
        ({"max_concurrent": 0}, "--max-concurrent must be at least 1; got 0"),
        ({"cpus_per_trial": 0.0}, "--cpus-per-trial must be above 0; got 0"),
        ({"cpus_per_trial": 4096.0}, "a trial must fit on the machine; --cpus-per-trial is 4096"),
        ({"gpus_per_trial": -0.5}, "--gpus-per-trial must be at least 0; got -0.5"),
        ({"time_budget": 0.0}, "--time-budget must be above 0; got 0"),
        ({"money_budget": 5.0}, "a money budget needs a price"),
        ({"storage": "gs//nope"}, "--storage must be a folder or a URI such as s3://bucket/folder; got gs//nope"),
        ({"storage": ""}, "--storage must be a folder or a URI; got '': pass one, or leave it out"),
        ({"storage": "a\0b"}, "a flag must be text without NUL; got 'a\\x00b': leave it out"),
        ({"from_": "a\0b"}, "a flag must be text without NUL"),
        ({"cancel": 10**400}, "--cancel must be at least 0 and at most 1000000; got about 1e400"),
        ({"address": "http://[::1"}, "--address must be a Ray cluster's job server; http://[::1"),
        (
            {"tracking_uri": "sqlite://[::1/x"},
            "the tracking database must be a file, and its URI a path alone; got sqlite://[::1/x",
        ),
        ({"tracking_uri": "http://[::1"}, "the tracking server must answer when a study starts"),
        ({"data": "/dev/null"}, "/dev/null is none of these: pass another --data"),
        ({"task": "original", "set_": ("patch_size=29",)}, "error: patch_size must be at most 28, the canvas"),
        ({"storage": "s3:bucket/runs"}, "--storage must be a folder or a URI"),
        ({"seeds_per_trial": 10**6}, "a trial must fit in memory; with Ray and the study itself it takes"),
        ({"study": "../escape"}, "a study's name is a folder's name"),
        ({"task": "nope"}, f"--task must be one of {', '.join(TASKS)}; got 'nope'"),
        ({"data": "nope"}, "--data must be one of auto, mnist, fashion-mnist, digits; got 'nope'"),
        ({"design": "nope"}, "--design must be one of search, paper, mnih, ablation, ofat, replicate; got 'nope'"),
        (
            {"design": "paper", "task": "original"},
            "--design paper is for the tasks translated, cluttered; got --task original",
        ),
        ({"sobol_share": 0.9}, "--sobol-share must be above 0 and at most 0.8; got 0.9"),
        ({"sobol_share": 0.5, "design": "paper"}, "--sobol-share is a search's; the design is paper"),
        ({"design": "ofat"}, "this design starts from a search's best configuration; runs holds no search"),
        ({"design": "replicate"}, "this design starts from a search's best configuration; runs holds no search"),
        ({"data": "mnist", "data_dir": Path("/no/such/folder")}, "--data-dir must be a folder"),
        ({"data": LONG}, f"--data must be a path that this user can use; {LONG}: File name too long: pass another"),
        ({"data": f"./{LONG}"}, "--data must be a path that this user can use"),
        ({"data": "a\nb/"}, "there is no a\\nb"),
        ({"data": "a\x1b[2J\u2028b/"}, "there is no a\\x1b[2J\\u2028b"),
        ({"data": "mnist", "data_dir": Path(LONG)}, "--data-dir must be a path that this user can use"),
        ({"space": Path(LONG)}, "--space must be a path that this user can use"),
        ({"storage": LONG}, "--storage must be a path that this user can use"),
        ({"tracking_uri": f"sqlite:////{LONG}/m.db"}, "--tracking-uri must be a path that this user can use"),
        ({"tracking_uri": "./mlruns"}, "tracking must be a server or a database"),
        ({"tracking_uri": "http://127.0.0.1:9"}, "the tracking server must answer when a study starts"),
        (
            {"tracking_uri": "sqlite:////no/such/folder/mlflow.db"},
            "the tracking database must lie in a writable folder",
        ),
    ],
)
def test_bad_flags_are_refused_in_one_line_and_nothing_is_written(here, capsys, flags, said):
    assert said in refused(capsys, **flags)
    assert not list(here.iterdir())


@pytest.mark.parametrize("flag", ["data", "data_dir", "space", "storage", "tracking_uri", "$RAM_DATA_DIR"])
def test_path_in_a_folder_that_the_user_may_not_enter_is_refused(here, capsys, monkeypatch, flag):
    stat = os.stat

    def locked(path, *args, **kwargs):  # a test that runs as root may enter every folder
        if "locked" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", locked)
    monkeypatch.setenv("RAM_DATA_DIR", "locked/x" if flag == "$RAM_DATA_DIR" else "")
    values = {
        "data": {"data": "locked/x.npz"},
        "$RAM_DATA_DIR": {"data": "mnist"},
        "tracking_uri": {"tracking_uri": "sqlite:///locked/x/m.db"},
    }
    if flag in ("data_dir", "space"):
        values[flag] = {"data": "mnist", flag: Path("locked/x")}
    said = refused(capsys, **values.get(flag, {flag: "locked/x"}))
    name = flag if flag.startswith("$") else f"--{flag.replace('_', '-')}"
    assert f"{name} must be a path that this user can use; " in said and "Permission denied" in said
    assert not list(here.iterdir())


def test_foreign_optuna_study_is_refused_and_left_as_it_is(here, capsys):
    (here / "runs" / "s").mkdir(parents=True)
    storage = f"sqlite:///{here}/runs/s/study.db"
    optuna.create_study(study_name="theirs", storage=storage).ask()
    assert "holds the Optuna study theirs, made by something else" in refused(capsys, study="s", task="original")
    assert optuna.get_all_study_names(storage) == ["theirs"]


def test_container_with_less_memory_than_a_trial_needs_is_refused(here, capsys, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 2**30)
    assert "and this machine or container has 1.0: give it more, or train smaller networks" in refused(capsys)
    assert not list(here.iterdir())


def test_slots_are_what_cpus_and_memory_allow(monkeypatch):
    monkeypatch.setattr(machine, "cpus", lambda: 7.9)
    config = Config(task="original", data="digits")
    trial = pool.trial_resources(1.0, 0.0, [(config, 1)], on_cluster=False)
    for gib, slots in ((64, 7), (3, 5), (1.5, 1)):
        monkeypatch.setattr(machine, "memory", lambda gib=gib: int(gib * 2**30))
        assert pool.count_slots(pool.local_resources(), pool.Pool(trial=trial, max_concurrent=None)) == slots
    monkeypatch.setattr(machine, "cpus", lambda: 0.5)
    assert pool.count_slots(pool.local_resources(), pool.Pool(trial=trial, max_concurrent=None)) == 1


def test_unsafe_temporary_folder_is_refused(here, capsys, monkeypatch):
    (here / "open").mkdir()
    (here / "open").chmod(0o777)
    monkeypatch.setenv("RAY_TMPDIR", "open")
    monkeypatch.setattr(ray_folder, "_LONGEST", 4096)
    assert "the temporary folder must be safe from other users" in refused(capsys, task="original")


def test_unwritable_storage_is_refused(here, capsys):
    (here / "file").write_text("")
    assert "--storage must be a folder that can be written" in refused(capsys, storage="file/runs")


def test_gpu_share_without_gpu_is_refused(here, capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert "a trial must fit on the machine; --gpus-per-trial is 0.5 and there are 0" in refused(
        capsys, gpus_per_trial=0.5
    )


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("--help", 0, "{search,paper,mnih,ablation,ofat,replicate}"),
        ("--help", 0, f"(default: {designs.DEFAULT_TRIALS} for search"),
        ("--help", 0, f"(default: {designs.DEFAULT_SOBOL_SHARE})"),
        ("--trials 0", 2, "error: --trials must be at least 1"),
        ("--design paper --task original", 2, "error: --design paper is for the tasks translated, cluttered"),
        ("--design paper --sobol-share 0.5", 2, "error: --sobol-share is a search's"),
        ("--money-budget 3", 2, "error: a money budget needs a price"),
        ("--address http://127.0.0.1:9", 2, "error: --address must be a Ray cluster's job server"),
    ],
)
def test_help_and_refusals_do_not_import_torch_ray_mlflow_or_scipy(here, line, code, said):
    program = "import sys; sys.argv[1:] = sys.argv[1].split(); from study.run import cli\n"
    program += "try: cli()\nfinally: print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, line], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr
    imported = set(done.stdout.splitlines()[-1].split())
    assert "tyro" in imported and not imported & {"torch", "ray", "mlflow", "scipy", "pandas", "optuna"}


def test_help_has_groups_examples_and_no_default_that_is_none(here):
    program = "import sys; sys.argv[1:] = ['--help']; from study.run import cli; cli()"
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    shown = subprocess.run([sys.executable, "-c", program], cwd=here, env=env, capture_output=True, text=True).stdout
    for group in ("What is studied.", "Where the results are kept.", "Where the trials run.", "What a run may take."):
        assert group in shown
    assert "Examples:\n  python -m study.run --dry-run\n" in shown
    described = shown.count("(default:") + shown.count("(repeatable)")
    assert "default: None" not in shown and described == len(dataclasses.fields(Flags))
    assert max(map(len, shown.splitlines())) <= 80
    examples = re.findall(r"(?m)^  python -m study.run (.*)$", shown)
    assert len(examples) >= 3 and all(parse(example.split()) for example in examples)


def test_dry_run_prints_plan_and_writes_nothing(here, capsys):
    assert main(Flags(data="digits", dry_run=True, trials=40)) == DONE
    out = capsys.readouterr().out
    assert "Study translated-digits-search: new" in out
    assert "40: 5 published, 16 sobol, 19 tpe" in out
    assert "patch_size" in out and "multiply-adds an image" in out and "sqlite:///mlflow.db" in out
    assert not list(here.iterdir())


@pytest.fixture
def untimed(monkeypatch) -> None:
    """Dry runs in which no epoch is timed, which takes seconds."""
    monkeypatch.setattr("study.dry_run.time_epochs", lambda configs, *_: [1.0] * len(configs))


def edited(monkeypatch, edit) -> None:
    """Have the study search a space with other dimensions."""

    def search(base):
        space = search_space(base)
        dimensions = tuple(edit(list(space.dimensions)))
        values, names = dataclasses.asdict(base), [d.name for d in dimensions]
        default = {name: values[name] for name in names if name in values}
        fixed = {name: value for name, value in values.items() if name not in names}
        return dataclasses.replace(space, dimensions=dimensions, default=default, fixed=fixed)

    monkeypatch.setattr(prepare, "search_space", search)


CORE = Dimension(name="core", type="categorical", choices=("rnn", "gru"), unit="kind", reason="why not")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda dimensions: [*dimensions, CORE], "core              categorical rnn, gru (kind): why not"),
        (lambda dimensions: [d for d in dimensions if d.name != "patch_size"], "num_glimpses      int 2 to 8"),
        (lambda dimensions: [d for d in dimensions if d.name != "num_scales"], "patch_size        int 4 to"),
        (lambda _: [CORE], "core              categorical rnn, gru"),
    ],
)
def test_dry_run_of_an_edited_space_prints_its_dimensions(here, untimed, capsys, monkeypatch, edit, said):
    edited(monkeypatch, edit)
    assert main(Flags(data="digits", task="original", dry_run=True)) == DONE
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dimension", "said"),
    [
        (None, "a search needs at least one dimension"),
        (
            {"name": "num_glimpses", "low": 2, "high": 3},
            "a field can be searched once; the dimensions are num_glimpses",
        ),
        (
            {"name": "glimpses", "low": 2, "high": 3},
            "a dimension must be a field of Config other than data, task, epochs",
        ),
        (
            {"name": "epochs", "low": 2, "high": 3},
            "a dimension must be a field of Config other than data, task, epochs",
        ),
        ({"name": "scale_factor", "low": 1, "high": 3}, "the dimension scale_factor needs another range"),
        ({"name": "hidden_size", "low": 16, "high": 2**20}, "a trial must fit in memory"),
        ({"name": "location_hidden", "type": "float", "low": 16, "high": 20}, "location_hidden must be a whole number"),
        ({"name": "layer_norm", "low": 0, "high": 1}, "layer_norm must be true or false; got 0"),
        ({"name": "core", "type": "categorical", "choices": ("rnn", "cnn")}, "core must be one of rnn, gru, lstm"),
        ({"name": "patch_size", "low": 28, "high": 28}, "a field can be searched once"),
    ],
)
def test_space_that_makes_no_configurations_is_refused(here, capsys, monkeypatch, dimension, said):
    more = [] if dimension is None else [Dimension(**{"type": "int", **dimension})]
    edited(monkeypatch, lambda dimensions: [*dimensions, *more] if more else [])
    assert main(Flags(data="digits", task="original", trials=4)) == USAGE
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: "))
    assert line.startswith("error: ") and said in line
    assert not list(here.iterdir())


def test_dry_run_of_paper_lists_its_rows(here, untimed, capsys):
    assert main(Flags(data="digits", design="paper", dry_run=True)) == DONE
    out = capsys.readouterr().out
    assert "Study translated-cluttered-digits-paper: new" in out and "100 epochs, 3 seeds" in out
    assert "cluttered RAM 6 gl 20x20 3 s" in out and "translated CNN" in out


def test_caught_signal_is_collected_and_handler_is_restored():
    before = signal.getsignal(signal.SIGUSR1)
    with signals_caught(signal.SIGUSR1) as received:
        assert received == []
        signal.raise_signal(signal.SIGUSR1)
    assert received == [signal.SIGUSR1] and signal.getsignal(signal.SIGUSR1) == before


def test_caught_signal_raises_the_given_error():
    with pytest.raises(LookupError), signals_caught(signal.SIGUSR1, raising=LookupError):
        signal.raise_signal(signal.SIGUSR1)


# What the display prints.


def trial(number: int, *accuracy: float, origin: str = "sobol", state: str = "complete", **values) -> TrialRecord:
    space = search_space(Config(epochs=4))
    spec = designs.TrialSpec(config=configuration(space, space.default | values), origin=origin, seeds=(0, 1))
    epochs = [Epoch(time=0, value=a, metrics={"val_accuracy": [a - 0.01, a + 0.01], "seconds": 10.0}) for a in accuracy]
    return TrialRecord(number=number, spec=spec, started=0, epochs=epochs, state=state)  # type: ignore[arg-type]


def test_pareto_front_holds_trials_that_none_beats_in_accuracy_and_cost():
    trials = [
        trial(0, 0.9, num_glimpses=8),
        trial(1, 0.8, num_glimpses=4),
        trial(2, 0.7, num_glimpses=6),
        trial(3, 0.99, num_glimpses=2, state="pruned"),
        trial(4, 0.6, num_glimpses=2),
    ]
    assert [t.number for t in pareto_trials(trials)] == [4, 1, 0]


def test_time_left_is_a_range_that_allows_for_early_stopping():
    origins = ["sobol"] * 2 + ["tpe"] * 2
    done = [trial(0, 0.1, 0.1, 0.1, 0.1), trial(1, 0.1, 0.1, 0.1, 0.1), trial(2, 0.1, origin="tpe", state="pruned")]
    low, high = time_left(done, origins, 4, slots=1) or (0, 0)
    # One TPE trial is left: as short as the one before it, or all four epochs of 10 s, give or take.
    assert low == pytest.approx(10 * 0.8) and high == pytest.approx(40 * 1.25)
    # With more slots than trials it is no shorter: its epochs follow one another.
    assert time_left(done, origins, 4, slots=8) == (low, high)
    assert time_left([], origins, 4, slots=1) is None
    assert time_left([*done, trial(3, 0.1, origin="tpe", state="pruned")], origins, 4, slots=1) == (0, 0)


@pytest.fixture
def progress() -> Display:
    """A display of five trials: one complete, one stopped, one in its first of four epochs."""
    progress = Display(study="a-study", epochs=4)
    running = trial(2, 0.5, origin="tpe", state="running")
    progress.resume([trial(0, 0.5, 0.6, 0.7, 0.8), trial(1, 0.1, origin="tpe", state="pruned"), running], ["tpe"] * 5)
    return progress


def rendered(progress: Display) -> str:
    """What the live part shows at 80 columns; no line is cut."""
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(progress._render())
    shown = console.export_text()
    assert "…" not in shown
    return shown


def test_live_display_shows_counts_best_trial_and_running_trials(progress):
    for _ in range(2):
        progress.reported(progress._trials[2])
    progress.outage = lambda: "connection refused"
    shown = rendered(progress)
    assert "a-study" in shown and "2 of 5 ended: 1 finished, 1 stopped early, 0 failed; 1 running" in shown
    assert "best    80.00 +- 1.41 %, trial 0000 sobol" in shown and "epochs/s" in shown and " left" in shown
    assert "time    0 s, " in shown
    assert "behind (connection refused); training goes on" in shown
    assert "0002  tpe  epoch 1/4  50.00 +- 1.41 %" in shown


def test_best_before_a_trial_is_complete_is_the_one_that_leads(progress):
    progress.resume([trial(0, 0.5, state="running"), trial(1, 0.6, 0.7, state="running")], ["sobol"] * 5)
    assert "best    so far 70.00 +- 1.41 %, trial 0001 sobol, epoch 2/4" in rendered(progress)
    progress.resume([], ["sobol"] * 5)
    assert "best    -" in rendered(progress)


def test_lines_of_trials_that_ended_stay_above_the_live_display_in_80_columns(progress):
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    progress._console, progress._live = console, object()  # type: ignore[assignment]
    progress.ended(trial(0, 0.5, 0.6, 0.7, 0.8, origin="published"))
    progress.ended(trial(1, 0.1, origin="tpe", state="pruned"))
    lines = console.export_text().splitlines()
    assert lines == [
        "[2/5] 0 s, trial 0000 published: 80.00 +- 1.41 % in 40 s, best so far",
        "[2/5] 0 s, trial 0001 tpe: 10.00 +- 1.41 %, stopped at epoch 1 after 10 s",
    ]


def test_signal_is_answered_at_once_and_the_answer_stays(progress, capfd):
    with signals_caught(signal.SIGUSR1, answer=progress.interrupted):
        os.kill(os.getpid(), signal.SIGUSR1)
        said = capfd.readouterr().err
    assert said == "stopping; what is trained stays, to be continued (Ctrl-C again: at once)\n"
    progress.doing("starting workers")
    assert capfd.readouterr().err == ""
    assert "stopping; what is trained stays" in rendered(progress) and "starting workers" not in rendered(progress)


def test_study_without_terminal_prints_its_first_epoch_then_once_a_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = Display(study="a-study", epochs=4)
    first = trial(0, 0.5, state="running")
    progress.resume([first], ["tpe"] * 5)
    progress.reported(first)
    said = capsys.readouterr().err
    assert said.startswith("[0/5] 0 s, trial 0000 sobol: epoch 1/4, 50.00 +- 1.41 %; best so far 50.00 +- 1.41 %, ")
    running = trial(2, 0.5, origin="tpe", state="running")
    progress.resume([trial(0, 0.5, 0.6, 0.7, 0.8), running], ["tpe"] * 5)
    for clock[0] in (50, 70, 100, 140):
        progress.reported(running)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["[1/5] 70 s", "[1/5] 2 min"]
    assert all("trial 0002 tpe: epoch 1/4, 50.00 +- 1.41 %; best 80.00 +- 1.41 %" in line for line in lines)


def test_terminal_shows_what_is_loaded_before_anything_else(here):
    leader, follower = pty.openpty()
    line = [sys.executable, "-m", "study.run", "--data", "mnist", "--data-dir", "/no/such"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(line, cwd=here, env=env, stdout=subprocess.PIPE, stderr=follower, check=False)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(leader, 65536):
            shown += part
    os.close(leader)
    assert done.returncode == USAGE and done.stdout == b""
    order = [b"starting", b"loading PyTorch", b"reading the images", b"error: --data-dir must"]
    assert sorted(order, key=shown.index) == order


# What is best.


def concluded(*trials: TrialRecord, held_out: tuple[TrialRecord, ...] = ()) -> tuple[int, str]:
    """The number of the best trial of a study, and how it compares with the default, which is trial 0."""
    settings = SimpleNamespace(space=search_space(Config(epochs=4)).to_dict())
    outcome = best.conclude(trials, settings, held_out)  # type: ignore[arg-type]
    assert outcome is not None
    return outcome.best.number, outcome.against_default


def test_nothing_beats_a_default_that_is_highest():
    assert concluded(trial(0, 0.9), trial(1, 0.8, num_glimpses=4)) == (0, "nothing beats it")
    assert concluded(trial(0, 0.9)) == (0, "")  # nothing else was tried
    assert concluded(trial(1, 0.8, num_glimpses=4)) == (1, "")  # the default was not


def test_highest_trial_is_said_to_beat_the_default_only_beyond_seed_noise():
    assert concluded(trial(0, 0.5), trial(1, 0.9, num_glimpses=4)) == (
        1,
        "better by 40.00 points (35.87 to 44.13, the only other one)",
    )
    number, said = concluded(trial(0, 0.89), trial(1, 0.9, num_glimpses=4))
    assert number == 1 and said.startswith("nothing surely beats it; ahead by 1.00 points (-3.13 to 5.13,")
    # The highest of many is more likely to be so by chance: a wider interval for the same noise.
    worse = [trial(n, 0.1, num_glimpses=n) for n in range(2, 6)]
    assert (
        "points (30.15 to 49.85, the highest of 5 others)"
        in concluded(trial(0, 0.5), trial(1, 0.9, num_glimpses=8), *worse)[1]
    )


def test_one_seed_each_cannot_tell_chance():
    alone = [dataclasses.replace(t, spec=dataclasses.replace(t.spec, seeds=(0,))) for t in (trial(0), trial(1))]
    for t, accuracy in zip(alone, (0.8, 0.9), strict=True):
        t.epochs = [Epoch(time=0, value=accuracy, metrics={"val_accuracy": [accuracy], "seconds": 1.0})]
    alone[1].spec = dataclasses.replace(alone[1].spec, config=dataclasses.replace(alone[1].spec.config, num_glimpses=4))
    assert concluded(*alone)[1].startswith("ahead by 10.00 points (the only other one); one seed each cannot tell")


def test_held_out_seeds_decide_between_the_highest_trial_and_the_default():
    search = [trial(0, 0.8), trial(1, 0.9, num_glimpses=4)]
    worse = (trial(0, 0.7, num_glimpses=4), trial(1, 0.75))  # the replicate design's own numbers
    assert concluded(*search, held_out=worse) == (
        0,
        "nothing beats it: on held-out seeds, trial 0001 has 70.00 +- 1.41 %, the default 75.00 +- 1.41 %",
    )
    better = (trial(0, 0.9, num_glimpses=4), trial(1, 0.75))
    assert concluded(*search, held_out=better)[1] == "better by 15.00 points (10.87 to 19.13, on held-out seeds)"
    of_others = (trial(0, 0.7, num_glimpses=2), trial(1, 0.75))
    assert "the only other one" in concluded(*search, held_out=of_others)[1]


def test_percent_and_duration_are_formatted():
    assert percent((0.96, 0.98)) == "97.00 +- 1.41 %" and percent((0.5,)) == "50.00 %" and percent(()) == "-"
    assert [duration(s) for s in (5, 600, 12_000)] == ["5 s", "10 min", "3.3 h"]


# Ray breaking down.


@pytest.fixture
def fragile(here, empty_database, monkeypatch) -> list[str]:
    """Replaces Ray by one that breaks down once for each entry of this list, then trains the trials one by one.

    It trains on the first images, and no model is logged, because that takes seconds.
    """
    shutil.copy(empty_database, here / "mlflow.db")
    # In full: MLflow keeps what it opened, and would write into the database of the test before.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here}/mlflow.db")
    monkeypatch.setattr(results, "_log_model", lambda *_: None)
    monkeypatch.setattr(results, "_draw", lambda best, weights, data, path: path.touch())
    load, breakdowns = prepare.load_task, []

    def load_few(config, *place):
        whole = load(config, *place)
        few = {n: Split(s.images[:100], s.labels[:100]) for n in whole.sizes if (s := whole.split(n))}
        return make_task(config.data, config.task, few)

    monkeypatch.setattr(prepare, "load_task", load_few)

    def run_trials(scheduler, data, ray_pool, look=None):
        if breakdowns:
            while scheduler.next_job():
                pass
            raise pool.PoolLost(breakdowns.pop())
        while job := scheduler.next_job():
            run_trial(job, data, lambda result, number=job.number: scheduler.report(number, result))

    monkeypatch.setattr(pool, "ray_running", lambda address: contextlib.nullcontext())
    monkeypatch.setattr(pool.Pool, "slots", 1)
    monkeypatch.setattr(pool.Pool, "devices", {})
    monkeypatch.setattr(pool, "run_trials", run_trials)
    return breakdowns


SMALL = Flags(data="digits", task="original", trials=2, epochs=1, seeds_per_trial=1, study="s")


def test_broken_ray_is_started_again_and_study_finishes(fragile, capsys):
    fragile.extend(["a worker was killed", "a worker was killed"])
    assert main(SMALL) == DONE
    captured = capsys.readouterr()
    assert captured.err.count("Ray broke down and is started again: a worker was killed") == 2
    assert "trial 0000 is taken up again (0 epochs recorded)" in captured.err and "2 trials finished" in captured.out


def test_ray_broken_three_times_stops_study_and_same_command_continues(fragile, capsys):
    fragile.extend(["killed"] * 5)
    assert main(SMALL) == STOPPED
    assert "Ray broke down 3 times without an epoch between: killed" in capsys.readouterr().err
    fragile.clear()
    assert main(SMALL) == DONE


def test_only_running_trial_fails_after_ray_breaks_down_three_times(fragile, capsys):
    fragile.extend(["out of memory"] * 3)
    assert main(dataclasses.replace(SMALL, trials=1)) == SOME_FAILED
    assert "failed: trial 0000: error: Ray broke down 3 times over it; out of memory" in capsys.readouterr().out


@pytest.fixture
def short_of_memory(fragile, monkeypatch) -> list[int]:
    """Memory that is short with more than one trial at a time; returns the numbers at a time that were tried."""
    run_trials, tried = pool.run_trials, []
    monkeypatch.setattr(pool.Pool, "slots", property(lambda self: min(5, self.max_concurrent or 5)))

    def short(scheduler, data, ray_pool, look=None):
        tried.append(ray_pool.slots)
        if ray_pool.slots > 1:
            while scheduler.next_job():
                pass
            raise pool.ShortOfMemory("a worker was killed due to the node running low on memory")
        run_trials(scheduler, data, ray_pool, look)

    monkeypatch.setattr(pool, "run_trials", short)
    return tried


def test_worker_killed_for_lack_of_memory_halves_the_trials_at_a_time_until_they_fit(short_of_memory, capsys):
    assert main(SMALL) == DONE
    assert short_of_memory == [5, 2, 1]
    err = capsys.readouterr().err
    assert "memory ran short with 5 trials at a time, so from now on 2: a worker was killed" in err
    assert "memory ran short with 2 trials at a time, so from now on 1: a worker was killed" in err


def test_memory_too_short_for_any_trial_stops_study_and_names_the_remedy(fragile, monkeypatch, capsys):
    def short(scheduler, data, ray_pool, look=None):
        scheduler.next_job()
        raise pool.ShortOfMemory("killed")

    monkeypatch.setattr(pool, "run_trials", short)
    assert main(SMALL) == STOPPED
    captured = capsys.readouterr()
    assert "one trial at a time needs more: give this machine or container more memory" in captured.err
    assert "0 failed, 1 to be continued" in captured.out


def test_ray_that_does_not_start_stops_study_and_fails_no_trial(fragile, monkeypatch, capsys):
    fragile.extend(["killed"])
    running = pool.ray_running
    attempts = []

    @contextlib.contextmanager
    def starts_once(address):
        attempts.append(address)
        if len(attempts) > 1:
            raise pool.PoolLost("timed out during startup")
        with running(address):
            yield

    monkeypatch.setattr(pool, "ray_running", starts_once)
    assert main(dataclasses.replace(SMALL, trials=1)) == STOPPED
    assert "1 to be continued" in capsys.readouterr().out


def test_tune_that_ends_early_is_started_again(fragile, monkeypatch, capsys):
    run_trials = pool.run_trials
    lost = []

    def ends_early(scheduler, data, ray_pool, look=None):
        if not lost:
            lost.append(scheduler.next_job())
            return
        run_trials(scheduler, data, ray_pool, look)

    monkeypatch.setattr(pool, "run_trials", ends_early)
    assert main(SMALL) == DONE
    captured = capsys.readouterr()
    assert "Ray Tune ended with trials to go" in captured.err and "2 trials finished" in captured.out


def test_fewer_trials_than_before_keep_those_that_have_begun_and_say_so(fragile, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(pool, "run_trials", lambda scheduler, *_, **__: scheduler.next_job() and scheduler.stop("enough"))
        assert main(dataclasses.replace(SMALL, trials=6)) == STOPPED
    capsys.readouterr()
    assert main(dataclasses.replace(SMALL, trials=3, dry_run=True)) == DONE
    captured = capsys.readouterr()
    assert "  trials     3: " in captured.out
    assert "--trials 3 is fewer than the 6 that s was asked for, and 1 have begun: it ends with 3" in captured.err
    assert main(dataclasses.replace(SMALL, trials=3)) == DONE
    assert "3 trials finished" in capsys.readouterr().out
    assert main(dataclasses.replace(SMALL, trials=2)) == DONE  # all three have begun
    captured = capsys.readouterr()
    assert "and 3 have begun: it ends with 3" in captured.err and "3 trials finished" in captured.out
    assert main(dataclasses.replace(SMALL, trials=None)) == DONE
    captured = capsys.readouterr()
    assert captured.err == "" and "3 trials finished" in captured.out
    assert main(dataclasses.replace(SMALL, trials=5)) == DONE
    assert "5 trials finished" in capsys.readouterr().out


def test_full_disk_stops_study_and_same_command_continues(fragile, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "/tmp/ray")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "run_trials", full)
        assert main(SMALL) == STOPPED
    err = capsys.readouterr().err
    assert "No space left on device" in err and "; once that is mended, the same command continues" in err
    assert main(SMALL) == DONE


def test_unreadable_best_weights_finish_study_and_next_run_reads_test_accuracy(fragile, monkeypatch, capsys):
    def unreadable(*_):
        raise OSError(5, "Input/output error", "best.pt")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "load_best", unreadable)
        patch.setattr("study.tracking._BACKOFF", (0.1,))
        assert main(SMALL) == UNTRACKED
    captured = capsys.readouterr()
    assert "2 trials finished" in captured.out and "test accuracy is read by the next run" in captured.err
    assert "MLflow lacks the best model ([Errno 5] Input/output error" in captured.err
    assert main(SMALL) == DONE
    captured = capsys.readouterr()
    assert "test accuracy" in captured.out and captured.err == ""


def test_signal_ends_the_wait_for_tracking_at_the_end(fragile, monkeypatch, capsys):
    finish = tracking.Tracker.finish

    def signalled(self, status, **arguments):
        threading.Timer(1, signal.raise_signal, [signal.SIGINT]).start()
        return finish(self, status, **arguments)

    def away(*_):
        raise OSError("no route to MLflow")

    monkeypatch.setattr(tracking.Tracker, "finish", signalled)
    with monkeypatch.context() as patch:
        patch.setattr(tracking.Tracker, "_sync", away)
        began = time.monotonic()
        assert main(dataclasses.replace(SMALL, trials=1)) == UNTRACKED
        assert time.monotonic() - began < 20  # without the signal it waits half a minute
    captured = capsys.readouterr()
    assert "MLflow lacks at most 1 epochs of 1 trials (no route to MLflow) in sqlite:///" in captured.err
    assert "tracked in" not in captured.out and "python -m analysis" not in captured.out


def test_failure_of_tracking_alone_has_an_exit_code_of_its_own_and_next_run_completes_it(fragile, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(tracking.Tracker, "_log_description", lambda *_: 1 / 0)
        patch.setattr("study.tracking._BACKOFF", (0.1,))
        assert main(dataclasses.replace(SMALL, trials=1)) == UNTRACKED
    assert "MLflow lacks study.json and space.json (ZeroDivisionError: division by zero) in" in capsys.readouterr().err
    assert main(dataclasses.replace(SMALL, trials=1)) == DONE
    assert capsys.readouterr().err == ""


def test_copied_study_says_how_to_continue_it(fragile, here, capsys):
    assert main(dataclasses.replace(SMALL, trials=1)) == DONE
    shutil.copytree(here / "runs" / "s", here / "runs" / "t")
    capsys.readouterr()
    line = refused(capsys, study="t")
    assert f"{here}/runs/t holds s, copied or renamed" in line and "move it to OTHER/s and pass --study s" in line
    shutil.move(here / "runs" / "t", here / "other" / "s")
    flags = dataclasses.replace(SMALL, storage="other", tracking_uri=f"sqlite:///{here}/other/mlflow.db")
    assert main(flags) == DONE


def test_money_budget_stops_study_and_same_command_continues(fragile, capsys):
    assert main(dataclasses.replace(SMALL, money_budget=1e-9, price_per_hour=100.0)) == STOPPED
    err = capsys.readouterr().err
    assert "stopped (the money budget of 1e-09 is used up); the same command continues" in err
    assert main(SMALL) == DONE


def test_provenance_is_of_the_last_run_that_trained(fragile, monkeypatch):
    def settings() -> dict:
        client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        (parent,) = client.search_runs(["1"], "tags.`ram.kind` = 'study'")
        told = json.loads(mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/study.json"))
        assert (parent.data.tags["ram.commit"], parent.data.tags["ram.commit_dirty"]) == (
            told["commit"], str(told["commit_dirty"]).lower(),
        )  # fmt: skip
        return told

    for commit, trials in (("a" * 40, 1), ("b" * 40, 2), ("c" * 40, 2)):
        monkeypatch.setattr(driver, "working_tree", lambda commit=commit: (commit, False))
        monkeypatch.setattr(driver, "command", lambda trials=trials: f"python -m study.run --trials {trials}")
        assert main(dataclasses.replace(SMALL, trials=trials)) == DONE
    told = settings()  # the third run trained nothing
    assert (told["commit"], told["command"]) == ("b" * 40, "python -m study.run --trials 2")
    assert [r["commit"] for r in told["runs"]] == ["a" * 40, "b" * 40]
    assert told["versions"]["torch"] == torch.__version__ and told["flags"]["data"] == "digits"


# Studies that exist already.


def test_study_of_digits_continues_on_digits_after_mnist_appears(fragile, untimed, idx_folder, capsys):
    dry = dataclasses.replace(SMALL, data="auto", study=None, data_dir=idx_folder, dry_run=True)
    assert main(dry) == DONE
    assert "Study original-mnist-search: new" in capsys.readouterr().out
    assert main(dataclasses.replace(SMALL, study=None)) == DONE
    capsys.readouterr()
    assert main(dry) == DONE
    said = capsys.readouterr()
    assert "Study original-digits-search" in said.out and ": new" not in said.out
    assert "original-digits-search is continued, on the bundled digits: pass --data mnist" in said.err


def test_study_of_mnist_is_refused_after_mnist_disappears(fragile, idx_folder, capsys):
    assert main(dataclasses.replace(SMALL, data="mnist", study=None, data_dir=idx_folder)) == DONE
    capsys.readouterr()
    empty = idx_folder.parent / "empty"
    empty.mkdir()
    assert "mnist" in refused(capsys, task="original", data="auto", data_dir=empty, trials=2, epochs=1)


def test_design_from_unfinished_search_prints_warning(fragile, untimed, capsys):
    assert main(SMALL) == DONE
    around = Flags(data="digits", task="original", design="replicate", dry_run=True)
    capsys.readouterr()
    assert main(around) == DONE
    assert "is not finished" not in capsys.readouterr().err
    settings, *_ = read_study(Path("runs/s/study.db")) or pytest.fail("no study")
    Record.open(Path("runs/s"), settings, total=4).close()  # asked for two more
    assert main(around) == DONE
    said = capsys.readouterr().err
    assert "the best configuration that s has now, and that search is not finished (2 of 4 trials have ended)" in said


# A whole study.


class Finished(NamedTuple):
    folder: Path
    returncode: int
    stdout: str
    stderr: str
    listening: set[tuple[str, int]]  # (address, port) of the sockets of all its processes while it trained


@pytest.fixture(scope="module")
def finished(tmp_path_factory, empty_database) -> Finished:
    """A small real study, run from the command line."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copy(empty_database, folder / "mlflow.db")
    return command(folder, "--data", "digits", "--task", "original", "--trials", "4", "--epochs", "2")


def command(folder: Path, *flags: str) -> Finished:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAM_", "MLFLOW_"))}
    line, env = [sys.executable, "-m", "study.run", *flags], env | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(line, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not list(folder.glob("runs/*/trials/*/*.pt")):
            time.sleep(0.1)
        listening = listeners(descendants(process.pid))
        stdout, stderr = process.communicate(timeout=250)
    finally:
        process.kill()
    return Finished(folder, process.returncode, stdout, stderr, listening)


def test_local_study_listens_on_loopback_only(finished):
    assert len(finished.listening) > 3  # Ray's own
    assert [address for address, _ in finished.listening if not is_loopback(address)] == []


def test_study_prints_results_to_stdout_and_progress_to_stderr(finished):
    folder, done = finished.folder, finished
    assert done.returncode == 0, done.stderr
    for said in (
        "Best configuration: trial",
        "test accuracy",
        "read once",
        "mlflow ui    # then open\n  http://127.0.0.1:5000/#/experiments/",
        "against the default",
        "analysis.sensitivity --study",
    ):
        assert said in done.stdout
    assert done.stderr.startswith("starting Ray\nstarting workers\n[0/4] ")
    assert (
        len(re.findall(r"(?m)^\[\d/4\] .* trial 000\d .* (in \d+ s|, stopped at epoch \d after \d+ s)", done.stderr))
        == 4
    )
    for noise in ("╭", "Trial status", "INFO", "Warning", "\x1b"):
        assert noise not in done.stdout + done.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["mlflow.db", "mlruns", "runs"]


def test_finished_study_is_reported_again_without_new_trials(finished):
    folder, done = finished.folder, finished
    again = command(folder, "--study", "original-digits-search")  # the study has the other settings
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    study = optuna.load_study(
        study_name="original-digits-search", storage=f"sqlite:///{folder}/runs/original-digits-search/study.db"
    )
    assert len(study.trials) == 4
    for stored in study.trials:  # a stopped trial keeps its last value, too, for Optuna's dashboard
        assert stored.value == stored.intermediate_values[max(stored.intermediate_values)]


def test_other_settings_under_same_name_are_refused(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.folder)
    said = refused(capsys, task="original", epochs=5)
    assert "original-digits-search differs in epochs 2 there, 5 asked for" in said
    said = refused(capsys, task="translated", study="original-digits-search")
    assert "task original there, translated asked for" in said


def test_published_model_loads_and_reproduces_test_accuracy(finished, monkeypatch):
    folder = finished.folder
    monkeypatch.chdir(folder)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("ram-study")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`ram.kind` = 'study'")
    (trials,) = {m.step for m in client.get_metric_history(parent.info.run_id, "test_accuracy")}
    assert trials == 4
    artifacts = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert artifacts >= {"study.json", "space.json", "best_config.json", "glimpses.png"}
    best = mlflow.artifacts.load_dict(f"runs:/{parent.info.run_id}/best_config.json")

    (logged,) = client.search_logged_models([experiment.experiment_id])
    for measured in (parent.data.metrics, {m.key: m.value for m in logged.metrics}):
        assert measured["test_accuracy"] == pytest.approx(np.mean(best["test"]["accuracy"]))
        assert measured["val_accuracy"] == pytest.approx(np.mean(best["val_accuracy"]))
    values = {name: str(value) for name, value in best["config"].items()}
    assert values.items() <= logged.params.items()
    shown = {k.removeprefix("best."): v for k, v in parent.data.tags.items() if k.startswith("best.")}
    assert len(shown) == 8 and shown.items() <= values.items()

    model = mlflow.pyfunc.load_model(f"runs:/{parent.info.run_id}/model")

    data = load_task(Config(**best["config"]))
    index = torch.arange(data.sizes["test"])
    images = data.render("test", index[None], data.placement_keys("test", torch.tensor([0]), 0))[0]
    probabilities = model.predict(images.numpy().astype(np.float32) / 255)
    hits = probabilities.argmax(-1) == data.test.labels.numpy()[:, None]
    assert hits.mean(0).tolist() == pytest.approx(best["test"]["accuracy"])
    assert model.metadata.signature is not None

    canvases = images.numpy()[:20]
    expected = probabilities[:20]
    for taken in (canvases, canvases / 255, (canvases / 255).tolist()):  # uint8, float64, as from JSON
        assert np.allclose(model.predict(taken), expected, atol=1e-6)
    assert model.predict(canvases[:0]).shape == (0, *expected.shape[1:])
    wrong = np.where(canvases == 0, np.nan, canvases / 255)
    for refused_input, said in (
        (canvases.astype(np.float32), r"must be floating-point numbers in \[0, 1\], or uint8; got 0 to 255"),
        (canvases / 255 - 0.1, "got -0.1 to 0.9"),
        (canvases / 255 * 1.0000001, "got 0 to 1.0000001"),
        (wrong, "some are not finite"),
        (canvases.astype(np.int64), "got int64"),
        (canvases[0], r"must have shape \(images, 28, 28\), canvases of task original; got \(28, 28\)"),
        (canvases[:, :27], r"got \(20, 27, 28\)"),
        ([[[0.0]], [[0.0, 1.0]]], "images must be one array"),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            model.predict(refused_input)
        assert "\n" not in str(refusal.value)
    mlflow.set_tracking_uri(None)


def test_published_model_loads_without_this_project_and_needs_only_what_pypi_has(finished, tmp_path):
    (model,) = finished.folder.glob("mlruns/*/models/*/artifacts")
    requirements = (model / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in requirements} == {"torch", "numpy", "mlflow"}
    assert not [line for line in requirements if "+" in line or "file:" in line]
    program = f"""
import importlib.util, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
assert importlib.util.find_spec("ramcore") is None and importlib.util.find_spec("study") is None
import mlflow, numpy
model = mlflow.pyfunc.load_model({str(model)!r})
print(model.predict(numpy.zeros((3, 28, 28), numpy.uint8)).shape)
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("(3, "), done.stderr
