"""Ray on this machine for real: its services killed, a container's limits, other users of the machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import cluster_of
from test_security import descendants

from study import ray_folder
from study.record import read_study

pytestmark = pytest.mark.timeout(1500)

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--data", "digits", "--task", "original", "--seeds-per-trial", "1", "--storage", "s", "--study", "s",
         "--tracking-uri", "sqlite:///m.db"]  # fmt: skip
MAIN = "import sys; from study.run import cli; sys.argv[0] = 'study.run'; {}; cli()"


def environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAM_", "MLFLOW_"))}
    return {**env, "PYTHONPATH": str(ROOT), **more}


def command(*flags: str, before: str = "pass") -> list[str]:
    """A study's command, after a line of code."""
    return [sys.executable, "-c", MAIN.format(before), *FLAGS, *flags]


@contextlib.contextmanager
def started(folder: Path, *flags: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A study that trains: it has saved a checkpoint."""
    with (folder / "out").open("w") as out:
        study = subprocess.Popen(
            command(*flags), cwd=folder, env=environment(**env), stdout=out, stderr=subprocess.STDOUT, text=True
        )
    try:
        end = time.monotonic() + 600
        while not list(folder.glob("s/s/trials/*/epoch_*.pt")):
            assert study.poll() is None and time.monotonic() < end, (folder / "out").read_text()
            time.sleep(0.2)
        yield study
    finally:
        study.send_signal(signal.SIGINT)
        study.wait(120)


def process(parent: int, name: str) -> int:
    """The id of the process below a parent whose program has a name."""
    for pid in descendants(parent):
        with contextlib.suppress(OSError):
            if name in Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]:
                return pid
    raise AssertionError(f"no process {name}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "service"),
    [("raylet/raylet", "raylet"), ("gcs_server", "GCS"), ("ray::DashboardAgent", "raylet")],
)
def test_death_of_a_service_of_rays_starts_ray_again_and_the_study_finishes(tmp_path, name, service):
    with started(tmp_path, "--trials", "2", "--epochs", "15") as study:
        os.kill(process(study.pid, name), signal.SIGKILL)
        code = study.wait(1000)
    said = (tmp_path / "out").read_text()
    assert code == 0 and f"Ray broke down and is started again: its {service} died" in said, said
    known = read_study(tmp_path / "s" / "s" / "study.db")
    assert known is not None and [len(t.epochs) for t in known.trials if t.state == "complete"] == [15, 15]


@pytest.mark.slow
@pytest.mark.parametrize("service", ["gcs_server", "raylet", "agent"])
def test_death_of_a_service_of_a_clusters_head_stops_the_study_and_the_same_command_continues(tmp_path, service):
    with cluster_of(2) as cluster:
        flags = ("--trials", "2", "--epochs", "200", "--address", cluster.address)
        settings = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        with started(tmp_path, *flags, **settings) as study:
            head = cluster.head_node
            if service == "agent":
                os.kill(process(head.all_processes["raylet"][0].process.pid, "ray::DashboardAgent"), signal.SIGKILL)
            else:
                getattr(head, f"kill_{service}")()
            code = study.wait(1000)
        said = (tmp_path / "out").read_text()
    assert code == 75 and "the same command continues" in said, said
    assert ("--address must be that of a running Ray cluster" in said) == (service == "gcs_server"), said


# The temporary folder.


@pytest.fixture
def place(monkeypatch) -> Iterator[Path]:
    """A temporary folder whose path is as long as it may be."""
    path = Path("/tmp") / secrets.token_hex(20)[: ray_folder._LONGEST - 77 - len("/tmp/")]
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
def test_study_in_the_longest_temporary_folder_leaves_nothing_there(place, tmp_path):
    before = set(Path("/tmp").glob("ram-*")) | set(Path("/tmp/ray").glob("session_2*"))
    with started(tmp_path, "--trials", "1", "--epochs", "2", RAY_TMPDIR=str(place)) as study:
        assert [path.name for path in place.glob("ram-*/r/session_latest/sockets/*")]
        assert study.wait(1000) == 0
    assert not list(place.iterdir())
    assert not (set(Path("/tmp").glob("ram-*")) | set(Path("/tmp/ray").glob("session_2*"))) - before


OTHER = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]


@pytest.mark.root
def test_other_user_can_neither_read_nor_change_what_a_studys_workers_load(place, tmp_path):
    place.chmod(0o755)
    with started(tmp_path, "--trials", "1", "--epochs", "200", RAY_TMPDIR=str(place)):
        (folder,) = place.glob("ram-*")
        inside = [path for path in folder.rglob("*") if not path.is_symlink()]
        assert len(inside) > 10 and any(path.stat().st_mode & 0o002 for path in inside)  # Ray opens them to everybody
        script = 'for f; do [ ! -r "$f" ] && [ ! -w "$f" ] && [ ! -e "$f" ] || echo "$f"; done; ! ls "$0"'
        reached = subprocess.run([*OTHER, "bash", "-c", script, folder, *inside], capture_output=True, text=True)
        assert reached.returncode == 0 and reached.stdout == ""
        replaced = subprocess.run([*OTHER, "mv", folder, f"{folder}.old"], capture_output=True)
        assert replaced.returncode != 0


# A container's limits.


@contextlib.contextmanager
def container(controller: str, **limits: int) -> Iterator[list[str]]:
    """The words before a command that runs it in a control group with limits, and sees only that group."""
    root = Path("/sys/fs/cgroup")
    version2 = (root / "cgroup.controllers").exists()
    group = (root if version2 else root / controller) / f"ram-{secrets.token_hex(4)}"
    try:
        group.mkdir()
        for name, value in limits.items():
            (group / f"{controller}.{name}").write_text(str(value))
    except OSError as error:
        pytest.skip(f"control groups of version {2 if version2 else 1} cannot be made here: {error}")
    mount = f"mount --bind {group} {group.parent}"
    try:
        yield [
            "bash",
            "-c",
            f'echo $$ > {group}/cgroup.procs; exec unshare -m bash -c \'{mount} && exec "$@"\' x "$@"',
            "x",
        ]
    finally:
        end = time.monotonic() + 30
        while group.exists() and time.monotonic() < end:
            with contextlib.suppress(OSError):
                group.rmdir()
            time.sleep(0.5)


def run(line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=1000)


VERSION2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()


@pytest.mark.root
@pytest.mark.skipif(VERSION2, reason="written for control groups of version 1")
def test_slots_are_what_a_containers_cpu_quota_allows(tmp_path):
    with container("cpu", cfs_quota_us=100000) as inside:
        done = run([*inside, *command("--trials", "4", "--epochs", "1", "--dry-run")], tmp_path)
    assert done.returncode == 0 and "slots      1, one trial each" in done.stdout, done.stderr


@pytest.mark.root
@pytest.mark.skipif(VERSION2, reason="written for control groups of version 1")
def test_container_with_too_little_memory_is_refused_with_the_remedy(tmp_path):
    with container("memory", limit_in_bytes=1_200_000_000) as inside:
        done = run([*inside, *command("--trials", "4", "--epochs", "1")], tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "this machine or container has 1.1: give it more" in line
    assert not (tmp_path / "s").exists()


@pytest.mark.root
@pytest.mark.skipif(VERSION2, reason="written for control groups of version 1")
def test_workers_killed_for_lack_of_memory_lower_the_number_of_trials_at_a_time(tmp_path):
    before = "from study import pool; pool._OVERHEAD = 0.0"  # so that more trials are started than fit
    with container("memory", limit_in_bytes=1_450_000_000) as inside:
        done = run([*inside, *command("--trials", "3", "--epochs", "3", before=before)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memory ran short with 2 trials at a time, so from now on 1: " in done.stderr
