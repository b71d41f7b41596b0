"""A study on a cluster: checks before the first trial, and nodes that join later."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from clusters import add_node, cluster_of

from ramcore.config import Config
from ramcore.errors import UserError
from study import cluster, pool, run
from study.cluster import Check, Growth, MachineHours, Node, TrialResources, capacity, gpus_of, wait_for_workers
from study.display import Display
from study.flags import DONE, USAGE, Flags
from study.pool import Pool, ray_running, run_trials
from study.ray_internals import ray_reason
from study.record import Record, StudySettings
from study.run import main
from study.scheduler import StudyScheduler
from study.search_space import search_space
from study.storage import Storage


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A folder for the test, and an environment without a cluster."""
    monkeypatch.chdir(tmp_path)
    names = ("RAM_STORAGE", "RAM_MAX_WORKERS", "RAM_WORKER_CPUS", "RAM_WORKER_GPUS", "RAM_PRICE_PER_HOUR")
    for name in (*names, "RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")  # so that values that the command sets are undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "disabled"))
    return tmp_path


# Room for trials.


@pytest.mark.parametrize(
    ("cpus", "gpus", "resources", "fits"),
    [
        (1, 0, {"CPU": 4.0}, 4),
        (1.5, 0, {"CPU": 4.0}, 2),
        (1, 0.25, {"CPU": 8.0, "GPU": 1.0}, 4),
        (1, 0.4, {"CPU": 8.0, "GPU": 2.0}, 4),  # two per GPU: a trial's part is on one GPU
        (1, 2, {"CPU": 8.0, "GPU": 3.0}, 1),
        (1, 0, {}, 0),
        (1, 1, {"CPU": 8.0}, 0),
        (1, 1 / 3, {"CPU": 8.0, "GPU": 1.0}, 3),
    ],
)
def test_trials_that_fit_on_a_node_are_counted_by_cpus_and_gpus(cpus, gpus, resources, fits):
    assert TrialResources(cpus=cpus, gpus=gpus).fits(resources) == fits


def node(cpus: float, *, head: bool = False) -> Node:
    marks = {"node:__internal_head__": 1.0} if head else {}
    return Node(id=f"{cpus}{head}", address="10.0.0.1", resources={"CPU": cpus} | marks)


def test_capacity_counts_the_nodes_that_a_cluster_can_grow_to():
    growth = Growth(workers=4, worker={"CPU": 4.0, "GPU": 0.0})
    trial = TrialResources(cpus=1, gpus=0)
    assert capacity([node(0, head=True)], growth, trial) == 16
    assert capacity([node(2, head=True), node(4)], growth, trial) == 18
    assert capacity([node(0, head=True), node(4), node(4)], None, trial) == 8
    # A trial does not fit on two halves of its CPUs on two nodes.
    assert capacity([node(1), node(1)], None, TrialResources(cpus=2, gpus=0)) == 0


def test_flags_left_out_are_read_from_the_environment(monkeypatch):
    for name, value in {
        "RAM_STORAGE": "s3://bucket/ram", "RAY_ADDRESS": "auto", "RAM_MAX_WORKERS": "4", "RAM_WORKER_CPUS": "4",
        "RAM_WORKER_GPUS": "1", "RAM_WORKER_GPU_MEMORY": "15", "RAM_PRICE_PER_HOUR": "0.5",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    flags = run._settled(Flags())
    assert (flags.storage, flags.address) == ("s3://bucket/ram", "auto")
    assert flags.price_per_hour == 0.5
    growth = Growth.declared()
    assert growth == Growth(workers=4, worker={"CPU": 4.0, "GPU": 1.0, "GPU memory": 15.0})
    assert str(gpus_of(growth.worker)) == "1 x GPU a worker (15 GiB)"
    # --address local overrides the environment:
    local = run._settled(Flags(address="local", storage="runs"))
    assert (local.address, local.storage) == (None, "runs")


def test_empty_environment_gives_the_defaults_of_one_machine():
    flags = run._settled(Flags())
    assert (flags.address, flags.storage, flags.price_per_hour) == (None, "runs", None)


def test_machine_hours_add_up_when_the_number_of_machines_changes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    counted = MachineHours(machines=1)
    clock[0] = 3600
    counted.set(3)
    clock[0] = 5400
    assert counted.hours() == pytest.approx(1 + 3 * 0.5)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "no message"),
        ("Failure # 1\n\nits last line\n", "its last line"),
        ("Traceback\nValueError: first\nTypeError: last\nhelp", "TypeError: last"),
        (
            "OutOfMemoryError: Task was killed due to memory.\nSet RAY_x, or see Error page",
            "OutOfMemoryError: Task was killed due to memory.",
        ),
        ("ActorDiedError: died\nWorker exit detail: end of file.", "Worker exit detail: end of file."),
        ("Caught unexpected exception: RuntimeError: no", "RuntimeError: no"),
    ],
)
def test_ray_error_text_is_reduced_to_its_telling_line(text, line):
    assert ray_reason(text) == line


# Refusals without a cluster.


def refused(capsys, **flags: Any) -> str:
    """Run a command that must be refused; returns the one line that it prints."""
    assert main(Flags(**{"data": "digits", **flags})) == USAGE
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert captured.out == "" and line.startswith("error: ")
    return line


def test_address_without_a_cluster_is_refused_within_seconds(here, capsys):
    started = time.monotonic()
    line = refused(capsys, address="127.0.0.1:9")
    assert "--address must be that of a running Ray cluster; 127.0.0.1:9 did not answer" in line
    assert "--address must be a Ray cluster's job server; http://127.0.0.1:9 did not answer" in refused(
        capsys, address="http://127.0.0.1:9"
    )
    assert time.monotonic() - started < 60
    assert not list(here.iterdir())


def test_other_server_at_the_address_is_refused_as_no_job_server(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connections = []
            for _ in range(2):  # the check whether something listens, and the client
                connection, _ = server.accept()
                connections.append(connection)
            connections[-1].recv(1000)
            connections[-1].sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            for connection in connections:
                connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        line = refused(capsys, address=f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert "--address must be a Ray cluster's job server" in line and "is not one" in line


def test_ray_client_address_is_refused_and_the_right_one_named(capsys):
    line = refused(capsys, address="ray://head:10001")
    assert "got ray://head:10001" in line and "pass --address http://127.0.0.1:8265" in line


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RAM_PRICE_PER_HOUR", "cheap", "RAM_PRICE_PER_HOUR must be a number of at least 0; it is 'cheap'"),
        ("RAM_MAX_WORKERS", "-1", "RAM_MAX_WORKERS must be a number of at least 0; it is '-1'"),
        ("RAM_MAX_WORKERS", "2", "RAM_MAX_WORKERS needs the size of a worker; RAM_WORKER_CPUS is not set"),
    ],
)
def test_invalid_environment_variable_is_refused(monkeypatch, capsys, name, value, said):
    monkeypatch.setenv(name, value)
    assert said in refused(capsys, address="127.0.0.1:9")


def test_job_that_would_write_to_its_own_folder_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://code.zip"}}')
    with pytest.raises(UserError, match="--storage must be an absolute path or a URI; got runs: set RAM_STORAGE"):
        cluster.check_lasting("runs", "http://127.0.0.1:5000")
    with pytest.raises(UserError, match=r"got sqlite:///mlflow\.db: set MLFLOW_TRACKING_URI"):
        cluster.check_lasting("s3://bucket", "sqlite:///mlflow.db")
    cluster.check_lasting("/mnt/shared", "sqlite:////mnt/shared/mlflow.db")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    cluster.check_lasting("runs", "sqlite:///mlflow.db")


def test_code_folder_holds_the_packages_code_only():
    with cluster.code_folder() as folder:
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert {"study/run.py", "study/cluster.py", "ramcore/model.py"} <= files
        assert all(name.endswith(".py") and name.split("/")[0] in ("study", "ramcore") for name in files)
    assert not folder.exists()


def test_local_ray_that_starts_too_slowly_raises_pool_lost(monkeypatch):
    def slow(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(pool.ray, "init", slow)
    with pytest.raises(pool.PoolLost, match="timed out during startup"), ray_running(None):
        pass


@pytest.mark.parametrize(("trials", "places"), [(1, 1), (100, 12)])
def test_waiting_asks_for_at_most_as_many_places_as_trials(monkeypatch, trials, places):
    asked: list[tuple[Any, ...]] = []
    fake = SimpleNamespace(remote=lambda *given: asked.append(given))
    monkeypatch.setattr(pool.ray, "remote", lambda **_: lambda task: fake)
    monkeypatch.setattr(pool.ray, "cancel", lambda *_, **__: None)
    monkeypatch.setattr(pool.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "head"))
    monkeypatch.setattr(cluster, "nodes", lambda: [node(0, head=True)])
    monkeypatch.setattr(cluster, "JOIN_MINUTES", 0.01)
    growth = Growth(workers=3, worker={"CPU": 4.0, "GPU": 0.0})
    with pytest.raises(UserError, match="none came"):
        wait_for_workers(TrialResources(cpus=1, gpus=0), growth, trials, others=False, say=lambda _: None)
    assert len(asked) == places


# A real cluster.


@pytest.fixture(scope="module")
def two_nodes():
    """A head that runs no trials, and a worker."""
    with cluster_of(0, {"num_cpus": 1}) as found:
        yield found


def test_storage_folder_of_one_node_is_refused_before_anything_is_made(two_nodes, here, capsys):
    # Each process has its own working directory, so no other process sees this path's folder.
    line = refused(capsys, address=two_nodes.address, storage="/proc/self/cwd/runs")
    assert line.startswith("error: on several nodes --storage must be the same folder on all of them; 127.0.0.1")
    assert "does not see /proc/self/cwd/runs: pass --storage s3://bucket/folder or a folder that all" in line
    assert list(here.iterdir()) == []


def planned(address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The output of a dry run on a cluster that may grow to three workers of four CPUs."""
    monkeypatch.setenv("RAM_MAX_WORKERS", "3")
    monkeypatch.setenv("RAM_WORKER_CPUS", "4")
    flags = Flags(data="digits", address=address, dry_run=True, price_per_hour=0.5, epochs=2)
    assert main(flags) == DONE
    return capsys.readouterr().out


def test_dry_run_on_cluster_prints_nodes_growth_time_and_cost(two_nodes, here, capsys, monkeypatch):
    out = planned(two_nodes.address, monkeypatch, capsys)
    assert "2 nodes, 1 CPUs, 0 GPUs" in out and "may grow to 3 workers of 4 CPUs, 0 GPUs" in out
    assert "slots      12, one trial each" in out
    assert "trial-hours" in out and "timed now, on 127.0.0.1" in out and "for 3 workers at 0.5 an hour" in out
    assert list(here.iterdir()) == []


@pytest.fixture
def lonely_head():
    """A cluster that is only a head, which runs no trials; its workers would start when needed."""
    with cluster_of(0) as found:
        yield found


@pytest.mark.slow
def test_cluster_without_workers_is_planned_and_a_finished_study_asks_for_none(lonely_head, here, capsys, monkeypatch):
    out = planned(lonely_head.address, monkeypatch, capsys)
    assert "1 nodes, 0 CPUs, 0 GPUs" in out or "1 node, 0 CPUs, 0 GPUs" in out
    assert "slots      12, one trial each" in out
    assert "trial-hours" in out and "(the head), as no worker is up" in out and "for 3 workers at 0.5 an hour" in out

    # A finished study needs no worker: the same command prints its results and starts no machine.
    small = Flags(data="digits", task="original", study="s", trials=1, epochs=1, storage=str(here / "runs"))
    alone = ("--data", "digits", "--task", "original", "--study", "s", "--trials", "1", "--epochs", "1")
    subprocess.run(
        [sys.executable, "-m", "study.run", *alone, "--address", "local"],
        env={**os.environ, "PYTHONPATH": str(Path(run.__file__).parent.parent)}, check=True, timeout=200,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "wait_for_workers", lambda *_, **__: pytest.fail("asked for workers"))
        assert main(dataclasses.replace(small, address=lonely_head.address)) == DONE


@pytest.fixture(scope="module")
def joined(two_nodes):
    """The same cluster, with this process as its driver; the tests above join it themselves."""
    with ray_running(two_nodes.address):
        yield two_nodes


def test_storage_folder_seen_by_all_nodes_passes_and_is_left_clean(joined, here):
    assert Check(Storage.parse(str(here / "shared" / "folder")))(cluster.nodes()) is None
    assert list(here.iterdir()) == []
    assert Check(Storage.parse(str(here)))(cluster.nodes()) is None
    assert here.is_dir()  # empty, but not ours to delete


def test_storage_that_a_worker_cannot_reach_is_refused(joined):
    said = Check(Storage.parse("nosuch://bucket/folder"))(cluster.nodes())
    assert said is not None and "every node must reach --storage; 127.0.0.1" in said and "\n" not in said


def shadowed(folder: Path, *, version: str | None = None, fails: bool = False) -> dict[str, str]:
    """An environment in which torch has another version, or cannot be imported."""
    folder.mkdir()
    if version is not None:
        (folder / f"torch-{version}.dist-info").mkdir()
        (folder / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    if fails:
        (folder / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("shadow", "said"),
    [
        ({"version": "1.0"}, "every node must have the driver's versions; 127.0.0.1 has torch 1.0, the driver "),
        (
            {"fails": True},
            "every node must have the project's packages; 127.0.0.1 lacks some (No module named 'torch')",
        ),
    ],
)
def test_node_with_other_versions_or_missing_packages_is_named(joined, here, shadow, said):
    check = Check(Storage.parse(str(here)))
    assert check(cluster.nodes()) is None
    other = add_node(joined, num_cpus=1, env_vars=shadowed(here / "shadow", **shadow))
    try:
        found = check(cluster.nodes())  # checks only the node that joined
    finally:
        joined.remove_node(other)
    assert found is not None and said in found and "\n" not in found and "constraints.txt" in found


def test_worker_that_joins_within_the_time_limit_is_returned(joined):
    lines: list[str] = []
    came: list[Any] = []
    trial = TrialResources(cpus=2, gpus=0)
    coming = threading.Timer(2.0, lambda: came.append(add_node(joined, num_cpus=2)))
    coming.start()
    present = wait_for_workers(trial, None, 1, others=False, say=lines.append)
    coming.join()
    joined.remove_node(came[0])
    assert any(trial.fits(n.resources) for n in present)
    assert lines and lines[0].startswith("waiting for a worker with 2 CPUs and 0 GPUs: 2 nodes so far")


def test_waiting_for_a_worker_ends_with_an_error(joined, monkeypatch):
    monkeypatch.setattr(cluster, "JOIN_MINUTES_FIXED", 0.02)
    with pytest.raises(UserError, match=r"a trial needs a node with 64 CPUs and 0 GPUs; within 0\.02 min none"):
        wait_for_workers(TrialResources(cpus=64, gpus=0), None, 1, others=False, say=print)
    small = Growth(workers=2, worker={"CPU": 4.0, "GPU": 0.0})
    with pytest.raises(UserError, match="a trial must fit on a node; it takes 64 CPUs and 0 GPUs"):
        wait_for_workers(TrialResources(cpus=64, gpus=0), small, 1, others=False, say=print)


def until_two_nodes_work() -> Any:
    """A trial of one epoch that waits until trials run on two nodes. It is a closure, because workers import no tests.

    It has to last longer than the start of a worker: else the first worker runs all trials.
    """

    def work(config: dict[str, Any], data: Any, cpus: float, gpus: float) -> None:
        import json
        import time
        from pathlib import Path

        import ray
        from ray import tune

        place = ray.get_runtime_context().get_node_id()
        at_work = Path(config["storage"]) / "at work"
        at_work.mkdir(exist_ok=True)
        (at_work / place).touch()
        end = time.monotonic() + 100
        while len(list(at_work.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.2)
        metrics = {"epoch": 1, "seconds": 1.0, "seeds": [0, 1], "diverged": [False, False], "val_accuracy": [0.5, 0.5]}
        metrics |= {"node": place, "images": data["images"]}
        tune.report({"result": json.dumps({"epoch": 1, "metrics": metrics})})

    return work


def test_worker_that_joins_during_a_study_gets_trials(joined, here, monkeypatch):
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.5)
    space = search_space(Config(data="digits", epochs=1))
    settings = StudySettings(
        study="s", task="translated", data="digits", digest="0" * 64, design="search", epochs=1, seeds_per_trial=2,
        seed=0, space=space.to_dict(),
    )  # fmt: skip
    came: list[Any] = []
    with Record.open(here / "s", settings, total=4) as record:
        scheduler = StudyScheduler(
            record, space=space, storage=Storage.parse(str(here)), callback=Display(study="s", epochs=1),
        )  # fmt: skip
        there = Pool(trial=TrialResources(cpus=1, gpus=0), max_concurrent=None, on_cluster=True)
        assert there.slots == 1

        def look() -> int:
            if not came and record.trials:
                came.append(add_node(joined, num_cpus=2))
            return there.slots

        data: Any = {"images": "those of the driver"}
        run_trials(scheduler, data, there, work=until_two_nodes_work(), look=look)
        done = [t.epochs[0].metrics for t in record.trials.values() if t.epochs]
        joined.remove_node(came[0])
    assert scheduler.error is None and len(done) == 4
    assert len({metrics["node"] for metrics in done}) == 2
    assert {metrics["images"] for metrics in done} == {"those of the driver"}
