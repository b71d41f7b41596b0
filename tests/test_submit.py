"""The command as a job of a real cluster that requires a token, submitted as from a laptop."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from clusters import free_port

from study.flags import Flags, arguments
from study.submit import sent, study_of

ROOT = Path(__file__).resolve().parent.parent
STUDY = ("--data", "digits", "--task", "original", "--trials", "2")


class Head(NamedTuple):
    """A cluster of one node, started as its launcher would."""

    address: str  # of the job server
    token: str
    home: Path  # of the head's user


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("head")
    token, port = secrets.token_hex(32), free_port()
    scratch = tempfile.TemporaryDirectory(prefix="ram-test-", ignore_cleanup_errors=True)  # sockets want short paths
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAM_STORAGE": str(home / "storage"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on loopback
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={free_port()}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}", f"--temp-dir={scratch.name}", "--num-cpus=2",
        "--object-store-memory=200000000",
    ]  # fmt: skip
    log = home / "ray.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=home, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while status(address, "/api/jobs/", token) != 200:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        yield Head(address, token, home)
    finally:
        process.terminate()  # --block: ends what it started
        process.wait(60)
        scratch.cleanup()


def status(address: str, route: str, token: str | None = None, method: str = "GET") -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(address + route, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("GET", "/api/jobs/"),
        ("POST", "/api/jobs/"),
        ("POST", "/api/jobs/x/stop"),
        ("DELETE", "/api/jobs/x"),
        ("GET", "/api/jobs/x/logs"),
        ("GET", "/api/version"),
        ("PUT", "/api/packages/gcs/x.zip"),
        ("GET", "/nodes?view=summary"),
        ("GET", "/api/cluster_status"),
        ("GET", "/api/v0/actors"),
        ("GET", "/api/v0/logs"),
    ],
)
def test_request_without_token_or_with_wrong_token_is_rejected(head, method, route):
    assert status(head.address, route, None, method) == 401
    assert status(head.address, route, "0" * 64, method) == 403


def laptop(head: Head, folder: Path, *flags: str, token: str | None = "") -> subprocess.Popen[str]:
    """Start the command as on another machine: with its own home and without a cluster's environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAM_", "RAY_", "MLFLOW_")) and k != "HOME"}
    environment |= {"HOME": str(folder), "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    if token is not None:
        (folder / ".ray").mkdir(exist_ok=True)
        (folder / ".ray" / "auth_token").write_text(token or head.token)
    command = [sys.executable, "-m", "study.run", "--address", head.address, *flags]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("token", "said"), [(None, "wants one and this machine has none"), ("0" * 64, "wants one and this machine's is")]
)
def test_missing_or_wrong_token_is_refused_in_one_line(head, tmp_path, token, said):
    process = laptop(head, tmp_path, *STUDY, token=token)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("error: a cluster is entered with its own token") and said in line
    assert "copy ~/.ray/auth_token from the cluster's head" in line


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_money_budget_without_price_is_refused_by_the_job(head, tmp_path):
    process = laptop(head, tmp_path, *STUDY, "--money-budget", "5")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "error: a money budget needs a price; got --money-budget alone" in out  # the job's answer, not the laptop's


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dry_run_job_is_stopped_when_left_and_does_not_block_another(head, tmp_path):
    plan = laptop(head, tmp_path, *STUDY, "--study", "planned", "--dry-run")
    assert plan.stderr is not None
    job = re.search(r"as job (\S+)", plan.stderr.readline())
    assert job is not None
    plan.send_signal(signal.SIGINT)
    _, err = plan.communicate(timeout=60)
    assert plan.returncode == 130 and "left; the plan is not made" in err
    again = laptop(head, tmp_path, *STUDY, "--study", "planned", "--dry-run", "--trials", "3")
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, out + err
    assert "Study planned: new" in out and "trials     3" in out
    assert state(head, job[1]) in ("STOPPED", "SUCCEEDED")


def test_job_gets_given_flags_without_address_and_defaults(monkeypatch):
    monkeypatch.delenv("RAM_STORAGE", raising=False)
    flags = Flags(address="http://127.0.0.1:8265", data="digits", trials=5, cpus_per_trial=0.5, dry_run=True)
    assert arguments(flags) == ["--data", "digits", "--trials", "5", "--cpus-per-trial", "0.5", "--dry-run"]
    assert arguments(Flags(address="http://127.0.0.1:8265")) == []
    space = Flags(address="http://a", space=Path("/home/me/my.toml"), range_=("a=1:2", "b=1:2"), from_="s", cancel=0)
    assert arguments(sent(space)) == [
        "--space", "space.toml", "--range", "a=1:2", "--range", "b=1:2", "--from", "s", "--cancel", "0",
    ]  # fmt: skip
    assert study_of(flags) == "default-digits-search" and study_of(Flags(study="mine")) == "mine"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_submitted_study_is_left_followed_again_stopped_and_continued(head, tmp_path):
    flags = (*STUDY, "--study", "s", "--epochs", "60")
    first = laptop(head, tmp_path, *flags)
    assert first.stderr is not None
    job = re.search(r"as job (\S+);", first.stderr.readline())
    assert job is not None
    wait_for_epochs(head, 2)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130
    assert f"stop it    RAY_AUTH_MODE=token ray job stop --address {head.address} {job[1]}" in err
    assert "follow it  python -m study.run --address" in err
    assert state(head, job[1]) == "RUNNING"

    # Other flags for a study that is running would need a second driver.
    other = laptop(head, tmp_path, *STUDY, "--study", "s", "--epochs", "60", "--max-concurrent", "1")
    _, err = other.communicate(timeout=120)
    assert other.returncode == 2 and f"a study has one driver at a time; job {job[1]} runs s as" in err

    again = laptop(head, tmp_path, *flags)
    assert again.stderr is not None
    assert again.stderr.readline() == f"job {job[1]} is running this study: following it\n"
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    stop = [str(Path(sys.executable).parent / "ray"), "job", "stop", "--address", head.address, job[1]]
    subprocess.run(stop, env=environment, check=True, capture_output=True, timeout=120)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 75, out + err
    assert "stopped (SIGTERM); the same command continues: python -m study.run" in out
    assert state(head, job[1]) == "STOPPED"

    # It ended, so the same command is a new job, and goes on where the first one was.
    third = laptop(head, tmp_path, *flags)
    out, err = third.communicate(timeout=1800)  # Ray's workers give way to all else
    assert third.returncode == 0, out + err
    assert "is taken up again" in out and "2 trials finished" in out
    assert "Best configuration" in out and (head.home / "storage" / "s" / "study.db").exists()
    assert not [p for p in tmp_path.iterdir() if p.name != ".ray"]  # nothing happened on the laptop


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_refusal_by_the_job_is_the_commands_refusal(head, tmp_path):
    process = laptop(head, tmp_path, "--data", "digits", "--storage", "elsewhere")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "error: a job's folder goes when it ends, so --storage must be an absolute path or a URI; got elsewh" in out


def state(head: Head, job: str) -> str:
    request = urllib.request.Request(
        f"{head.address}/api/jobs/{job}", headers={"Authorization": f"Bearer {head.token}"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)["status"]


def wait_for_epochs(head: Head, count: int) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if len(list((head.home / "storage" / "s" / "trials").glob("*/epoch_*.pt"))) >= count:
            return
        time.sleep(0.5)
    raise AssertionError("no epoch within 5 minutes")
