"""Nothing is lost when real processes are killed, with a real Ray and a real MLflow server. Run with `-m slow`.

Each test asserts on what Optuna's storage, MLflow and the checkpoint folder hold afterwards (`settled`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import crash
import mlflow
import optuna
import pytest
from optuna.trial import TrialState
from servers import Server

from study.flags import UNTRACKED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parent.parent
STUDY = ("--data", "digits", "--task", "original", "--study", "s", "--trials", "5", "--epochs", "3")
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **extra}


def start(folder: Path, *flags: str, **extra: str) -> subprocess.Popen[str]:
    """A study in a process of its own, its folder as working directory."""
    command = [sys.executable, "-m", "study.run", *STUDY, *flags]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _started.append(process)
    return process


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    for process in _started:
        if process.poll() is None:  # a test has failed
            process.kill()
            process.communicate()
    _started.clear()


def finish(process: subprocess.Popen[str], timeout: float = 400) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def run(folder: Path, *flags: str, **extra: str) -> tuple[int, str, str]:
    return finish(start(folder, *flags, **extra))


def epochs_recorded(folder: Path) -> int:
    path = folder / "runs" / "s" / "study.db"
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(path)) as database, contextlib.suppress(sqlite3.OperationalError):
        return database.execute("select count(*) from trial_intermediate_values").fetchone()[0]
    return 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 300) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"the study ended early: {process.communicate()}"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        todo += (new := children.get(todo.pop(), []))
        found += new
    return found


def workers(pid: int) -> list[int]:
    """Ray's actors below a driver."""
    found = []
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            if b"ray::ImplicitFunc" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def settled(folder: Path, trials: int = 5, uri: str | None = None, failed: int = 0) -> list[optuna.trial.FrozenTrial]:
    """Assert that a study ended with everything once: in the record, in MLflow and on disk."""
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{folder}/runs/s/study.db")
    stored = study.get_trials()
    assert [t.number for t in stored] == list(range(trials))
    assert all(t.state in ENDED for t in stored), [t.state for t in stored]
    assert sum(t.state == TrialState.FAIL for t in stored) == failed
    for trial in stored:
        steps = sorted(trial.intermediate_values)
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) == 3 or trial.state != TrialState.COMPLETE
    kept = sorted(p.relative_to(folder / "runs" / "s" / "trials") for p in (folder / "runs" / "s").glob("trials/*/*"))
    assert kept == [Path(f"{t.number:04d}/best.pt") for t in stored if t.state == TrialState.COMPLETE]
    tracked(folder, stored, uri or f"sqlite:///{folder}/mlflow.db")
    return stored


def tracked(folder: Path, stored: list[optuna.trial.FrozenTrial], uri: str) -> None:
    """Assert that MLflow holds the record, every trial and epoch once."""
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("ram-study")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.data.tags["ram.kind"] == "study"]
    assert parent.data.tags["ram.status"] == "finished" and parent.info.status == "FINISHED"
    children = {int(r.data.tags["ram.trial"]): r for r in runs if r.data.tags["ram.kind"] == "trial"}
    assert len(runs) == 1 + len(stored) and sorted(children) == [t.number for t in stored]
    assert parent.data.metrics["trials_finished"] == len(stored)
    for trial in stored:
        child = children[trial.number]
        expected = {
            TrialState.COMPLETE: ("complete", "FINISHED"),
            TrialState.PRUNED: ("pruned", "KILLED"),
            TrialState.FAIL: ("failed", "FAILED"),
        }
        assert (child.data.tags["ram.state"], child.info.status) == expected[trial.state]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        history = client.get_metric_history(child.info.run_id, "val_accuracy")
        assert {m.step: m.value for m in history} == pytest.approx(trial.intermediate_values)
        assert len(history) == len(trial.intermediate_values)
        for name, value in json.loads(json.dumps(trial.params)).items():
            assert float(child.data.params[name]) == value


def essence(stored: list[optuna.trial.FrozenTrial]) -> list[tuple]:
    return [(t.number, t.state, t.params, t.intermediate_values, t.user_attrs["end"]["reason"]) for t in stored]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[tuple]:
    """The trials of a serial study without faults."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, out, err = run(folder, "--max-concurrent", "1")
    assert code == 0, err
    assert "Best configuration" in out
    return essence(settled(folder))


def test_serial_studies_with_200_faults_end_as_one_without(tmp_path):
    assert crash.check(tmp_path, 200, seed=1000) >= 200


def test_study_whose_driver_is_killed_continues_to_the_same_end(tmp_path, undisturbed):
    for epochs in (0, 2, 5, 9):
        process = start(tmp_path, "--max-concurrent", "1")
        wait_for(lambda n=epochs: epochs_recorded(tmp_path) >= n and (tmp_path / "runs/s/study.db").exists(), process)
        process.kill()
        finish(process)
    started = time.monotonic()
    process = start(tmp_path, "--max-concurrent", "1")
    before = epochs_recorded(tmp_path)
    wait_for(lambda: epochs_recorded(tmp_path) > before, process)
    seconds = time.monotonic() - started
    print(f"the first epoch after a kill was recorded {seconds:.1f} s after the command")
    assert seconds < 30 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), "on a machine that is not busy, 30 s"
    code, _, err = finish(process)
    assert code == 0, err
    assert essence(settled(tmp_path)) == undisturbed


def test_study_whose_driver_is_killed_in_its_first_seconds_can_be_run(tmp_path):
    for seconds in (0.5, 2, 4, 6, 8, 10):
        process = start(tmp_path)
        time.sleep(seconds)
        process.kill()
        finish(process)
    code, _, err = run(tmp_path)
    assert code == 0, err
    settled(tmp_path)


def test_trial_whose_worker_is_killed_resumes_from_its_checkpoint(tmp_path, undisturbed):
    process = start(tmp_path, "--max-concurrent", "1")
    for epochs in (1, 5):
        wait_for(lambda n=epochs: epochs_recorded(tmp_path) >= n and bool(workers(process.pid)), process)
        for worker in workers(process.pid):
            os.kill(worker, signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err
    assert err.count("its worker died; it is started again") >= 2, err
    assert essence(settled(tmp_path)) == undisturbed


def test_worker_killed_between_two_trials_changes_nothing(tmp_path, undisturbed):
    # The driver is held after the first trial's end, so the worker dies idle, and the next trial is given to it.
    process = start(tmp_path, "--max-concurrent", "1", RAM_STUDY_FAULT="scheduler.decision.after@3:hang=8")
    wait_for(lambda: (tmp_path / "runs" / "s" / "trials" / "0000" / "best.pt").exists(), process)
    time.sleep(3)
    for worker in workers(process.pid):
        os.kill(worker, signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err
    assert essence(settled(tmp_path)) == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_study_and_same_command_continues(tmp_path, number, code):
    process = start(tmp_path)
    wait_for(lambda: epochs_recorded(tmp_path) >= 2, process)
    process.send_signal(number)
    started = time.monotonic()
    found, out, err = finish(process)
    assert found == code and "the same command continues" in err and "to be continued" in out
    assert time.monotonic() - started < 30
    assert run(tmp_path)[0] == 0
    settled(tmp_path)


def test_time_budget_stops_study_and_same_command_continues(tmp_path):
    # starting Ray takes a third or more of the 15 seconds
    code, _, err = run(tmp_path, "--trials", "20", "--time-budget", "0.25")
    assert code == 75 and "time budget" in err
    assert run(tmp_path, "--trials", "20")[0] == 0
    settled(tmp_path, trials=20)


def test_full_disk_of_checkpoints_stops_study_and_same_command_continues(tmp_path):
    code, _, err = run(tmp_path, RAM_STUDY_FAULT="file.write.half@2:full")
    assert code == 75 and "No space left" in err
    code, _, err = run(tmp_path)
    assert code == 0, err
    settled(tmp_path)


def test_full_disk_of_record_stops_study_and_same_command_continues(tmp_path):
    code, _, err = run(tmp_path, RAM_STUDY_FAULT="record.epoch.before@4:full")
    assert code == 75 and "the record cannot be written" in err
    code, _, err = run(tmp_path)
    assert code == 0, err
    settled(tmp_path)


@pytest.mark.root
@pytest.mark.parametrize("size", ["700k", "9m"])  # too small for the record and its log; for a second checkpoint
def test_really_full_disk_stops_study_and_same_command_continues(tmp_path, size):
    disk = tmp_path / "runs"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk is made by root: {mounted.stderr.decode().strip()}")
    try:
        for _ in range(2):  # the second time it is full from the beginning
            code, _, err = run(tmp_path)
            assert code == 75 and "the same command continues" in err, err
            assert "No space left" in err or "disk is full" in err or "disk I/O error" in err, err
        subprocess.run(["mount", "-o", "remount,size=500m", disk], check=True)
        code, _, err = run(tmp_path)
        assert code == 0, err
        settled(tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_failed_trial_is_recorded_and_study_goes_on(tmp_path):
    # Both workers' first trial fails; the third one does not, so it is not the program.
    code, out, _ = run(tmp_path, RAM_STUDY_FAULT="trial.start@1:error")
    assert code == 3 and "RuntimeError: injected at trial.start" in out
    settled(tmp_path, failed=2)


def test_programming_error_stops_study_early(tmp_path):
    plan = ",".join(f"trial.start@{n}:error" for n in range(1, 9))
    code, out, err = run(tmp_path, "--trials", "30", RAM_STUDY_FAULT=plan)
    assert code == 1 and "failed alike: error: RuntimeError: injected at trial.start" in err
    assert 3 <= out.count("failed: trial") <= 5


def test_second_driver_is_refused(tmp_path):
    process = start(tmp_path)
    wait_for(lambda: epochs_recorded(tmp_path) >= 1, process)
    code, _, err = run(tmp_path)
    assert code == 2 and f"process {process.pid} is running s" in err
    assert finish(process)[0] == 0
    settled(tmp_path)


# A real tracking server.


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        yield server


def test_tracking_server_that_returns_is_brought_up_to_date(tmp_path, server):
    process = start(tmp_path, "--trials", "8", "--tracking-uri", server.uri)
    wait_for(lambda: epochs_recorded(tmp_path) >= 3, process)
    server.stop()
    during = epochs_recorded(tmp_path)
    wait_for(lambda: epochs_recorded(tmp_path) >= during + 4, process)  # training does not wait
    server.start()
    code, _, err = finish(process)
    assert code == 0 and "tracking is interrupted" in err and "MLflow lacks" not in err, err
    settled(tmp_path, trials=8, uri=server.uri)


def test_hanging_tracking_server_does_not_delay_training(tmp_path, server):
    process = start(tmp_path, "--tracking-uri", server.uri, MLFLOW_HTTP_REQUEST_TIMEOUT="3")
    wait_for(lambda: epochs_recorded(tmp_path) >= 2, process)
    server.signal(signal.SIGSTOP)
    during = epochs_recorded(tmp_path)
    wait_for(lambda: epochs_recorded(tmp_path) >= during + 4, process, timeout=90)
    server.signal(signal.SIGCONT)
    code, _, err = finish(process)
    assert code == (UNTRACKED if "MLflow lacks" in err else 0), err
    if code == UNTRACKED:
        assert run(tmp_path, "--tracking-uri", server.uri)[0] == 0
    settled(tmp_path, uri=server.uri)


def test_lost_tracking_server_is_reported_and_next_run_completes_it(tmp_path, server):
    process = start(tmp_path, "--tracking-uri", server.uri)
    wait_for(lambda: epochs_recorded(tmp_path) >= 2, process)
    server.stop()
    code, out, err = finish(process)
    assert code == UNTRACKED and "MLflow lacks" in err and "Best configuration" in out
    server.start()
    code, _, err = run(tmp_path, "--tracking-uri", server.uri)
    assert code == 0 and "MLflow lacks" not in err, err
    settled(tmp_path, uri=server.uri)


# Several nodes.


def on_nodes(folder: Path, workers: int, after: int, event: str, **flags: int) -> subprocess.CompletedProcess[str]:
    """A study on a head that runs no trials and some workers of one CPU, in a process of its own.

    Args:
        folder: its working directory.
        workers: at first, the list `nodes`.
        after: epochs, whereupon `event` happens.
        event: a statement about `cluster` and `nodes`, carried out in a thread.
        flags: trials and epochs.
    """
    script = f"""
import os, sys, threading, time
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
from ray.cluster_utils import Cluster
cluster = Cluster(  # its hooks at exit are signal handlers, which threads cannot set
    initialize_head=True, head_node_args={{"num_cpus": 0, "include_dashboard": False}}, shutdown_at_exit=False
)
nodes = [cluster.add_node(num_cpus=1) for _ in range({workers})]
cluster.wait_for_nodes()
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from test_faults import epochs_recorded
def happen():
    while epochs_recorded(Path.cwd()) < {after}:
        time.sleep(0.1)
    {event}
    print("it has happened", file=sys.stderr, flush=True)
    time.sleep(600)  # a node goes with the thread that made it
threading.Thread(target=happen, daemon=True).start()
from study.flags import Flags
from study.run import main
code = main(Flags(data="digits", task="original", study="s", address=cluster.address, **{flags!r}))
sys.stdout.flush(); sys.stderr.flush()
cluster.shutdown()
os._exit(code)
"""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900)


def test_lost_node_costs_at_most_one_epoch(tmp_path, undisturbed):
    done = on_nodes(tmp_path, 2, 4, "cluster.remove_node(nodes[0], allow_graceful=False)", trials=5, epochs=3)
    assert done.returncode == 0 and "it has happened" in done.stderr, done.stderr
    # All but the last trial are chosen without regard to the others, so two at a time end as one after the other.
    assert essence(settled(tmp_path))[:-1] == undisturbed[:-1]
    assert "reported twice" not in done.stderr


def test_node_that_joins_with_other_packages_stops_study(tmp_path):
    shadow = tmp_path / "shadow"
    (shadow / "torch-1.0.dist-info").mkdir(parents=True)
    (shadow / "torch-1.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 1.0\n")
    joins = f"cluster.add_node(num_cpus=1, env_vars={{'PYTHONPATH': {str(shadow)!r}}})"
    done = on_nodes(tmp_path, 1, 2, joins, trials=2, epochs=60)
    assert done.returncode == 75, done.stderr
    assert "stopped (every node must have the driver's versions;" in done.stderr and "torch 1.0" in done.stderr
    assert "to be continued" in done.stdout
