"""Security: listening sockets, the hosts that the tracking server accepts, and files that could carry code."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from clusters import free_port
from servers import Proxy, Server

from ramcore.config import Config
from ramcore.errors import UserError, first_line
from ramcore.evaluation import build_model
from ramcore.private import without_secrets
from study import results, submit
from study.designs import TrialSpec
from study.flags import USAGE, Flags
from study.record import Epoch, TrialRecord
from study.run import main

ROOT = Path(__file__).resolve().parent.parent


def descendants(pid: int) -> set[int]:
    """The ids of a process and of all its descendants."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listeners(pids: set[int]) -> set[tuple[str, int]]:
    """The (address, port) of each TCP socket on which one of these processes listens."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != "0A" or fields[9] not in inodes:
                continue
            number, port = fields[1].split(":")
            words = [bytes.fromhex(number[i : i + 8])[::-1] for i in range(0, len(number), 8)]
            found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


def is_loopback(address: str) -> bool:
    return address.removeprefix("::ffff:").startswith("127.") or address == "::1"


def test_listeners_finds_sockets_of_all_addresses():
    with socket.create_server(("127.0.0.1", 0)) as inside, socket.create_server(("0.0.0.0", 0)) as outside:
        found = listeners({os.getpid()})
        assert ("127.0.0.1", inside.getsockname()[1]) in found and ("0.0.0.0", outside.getsockname()[1]) in found
    assert is_loopback("::ffff:127.0.0.1") and not is_loopback("0.0.0.0") and not is_loopback("::")


# The tracking server.


@pytest.fixture
def server(tmp_path) -> Iterator[int]:
    """The port of an MLflow server as a cluster's head runs it."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination", str(tmp_path / "artifacts"),
        "--allowed-hosts", f"127.0.0.1:{port},localhost:{port}",
    ]  # fmt: skip
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 240
        while answer(port, "/health", f"127.0.0.1:{port}") != 200:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def answer(port: int, route: str, host: str, body: bytes | None = None, **headers: str) -> int:
    headers |= {"Host": host, "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{route}", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as got:
            return got.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.slow
def test_tracking_server_refuses_forged_host_and_origin(server):
    search, create = "/api/2.0/mlflow/experiments/search", "/api/2.0/mlflow/experiments/create"
    body = b'{"max_results": 1}'
    assert answer(server, search, f"127.0.0.1:{server}", body) == 200
    assert answer(server, search, "evil.example", body) == 403  # a page that rebinds its name to loopback
    assert answer(server, create, "evil.example", b'{"name": "x"}') == 403
    # A page of another origin that posts to loopback by its right name.
    assert answer(server, create, f"127.0.0.1:{server}", b'{"name": "x"}', Origin="http://evil.example") == 403


# Secrets.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://alice:s3cret@host:5000/a", "http://***@host:5000/a"),
        ("to postgresql://user:p/w@d@host/db?x=1, then", "to postgresql://***@host/db?x=1, then"),
        ("s3://KEY:s3cret@bucket/folder", "s3://***@bucket/folder"),
        ("https://token@host", "https://***@host"),
        ("mysql://host/db?user=a&password=s3cret&x=1", "mysql://host/db?user=a&password=***&x=1"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Ds3cret", "mssql+pyodbc:///?odbc_connect=***"),
        ("https://host/f?X-Amz-Signature=s3cret&sig=s3cret", "https://host/f?X-Amz-Signature=***&sig=***"),
        ("got alice:s3cret@host:5000: no", "got ***@host:5000: no"),
        ("--address alice:s3cret@host:6379", "--address ***@host:6379"),
        ("http:/alice:s3cret@host", "***@host"),
        ("http:alice:s3cret@host", "***@host"),
        ("(//alice:s3cret@host)", "(//***@host)"),
        ("alice%3As3cret%40host", "***@host"),
        ("postgresql://alice:s3 cr\tet@host/x", "postgresql://***@host/x"),
        ("https://host/?auth=s3cret&code=s3cret&jwt=s3cret", "https://host/?auth=***&code=***&jwt=***"),
        ("https://host/#access_token=s3cret", "https://host/#access_token=***"),
        ("https://host/?password%3Ds3cret", "https://host/?password%3D***"),
        ("Bearer hunter-22", "Bearer ***"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("http://host:5000: [Errno 111] refused (3:40)", "http://host:5000: [Errno 111] refused (3:40)"),
        ("write to me@example.org", "write to me@example.org"),
    ],
)
def test_secrets_of_uris_and_of_the_environment_are_hidden(monkeypatch, text, shown):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter-22\n")
    assert without_secrets(text) == shown
    assert without_secrets({"a": [text, 1], "b": (text, None)}) == {"a": [shown, 1], "b": (shown, None)}


def test_error_is_cut_after_its_secrets_are_hidden():
    error = ValueError("http://alice:" + 300 * "s3cret" + "@host failed")
    assert first_line(error) == "http://***@host failed"


def test_messages_and_logs_show_no_secret(capsys):
    uri = "http://alice:s3cret@127.0.0.1:9"
    assert main(Flags(data="digits", task="original", tracking_uri=uri)) == USAGE
    logging.getLogger("study.tracking").warning("no answer from %s", uri)
    captured = capsys.readouterr()
    assert "http://***@127.0.0.1:9" in captured.err and "s3cret" not in captured.err + captured.out


def test_job_with_a_secret_is_not_submitted(monkeypatch):
    monkeypatch.setattr(submit, "_connect", lambda address: None)
    with pytest.raises(UserError, match="must hold no password") as refused:
        submit.submit(Flags(tracking_uri="http://alice:s3cret@host"), "http://127.0.0.1:9")
    assert "s3cret" not in str(refused.value)


def command_lines(pids: set[int]) -> list[bytes]:
    lines = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return lines


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_that_a_study_leaves_or_shows_holds_a_secret(tmp_path):
    study = ["--data", "digits", "--task", "original", "--trials", "4", "--epochs", "1", "--seeds-per-trial", "1"]
    (tmp_path / "server").mkdir()
    ray = Path(tempfile.mkdtemp(prefix="r"))  # a short path: Ray has sockets there
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAM_", "MLFLOW_"))}
    env |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(ray)}
    seen: list[bytes] = []

    def run(*command: str, code: int = 0, **variables: str) -> None:
        with (tmp_path / "output").open("a") as out:
            line = [sys.executable, "-m", *command]
            process = subprocess.Popen(line, cwd=tmp_path, env=env | variables, stdout=out, stderr=subprocess.STDOUT)
            time.sleep(5)  # until it has replaced itself
            while process.poll() is None:
                seen.extend(command_lines(descendants(process.pid)))
                time.sleep(0.5)
        assert process.returncode == code, (tmp_path / "output").read_text()

    try:
        with Server(tmp_path / "server") as server, Proxy(server.port, user="alice:s3cret") as proxy:
            uri = f"http://alice:s3cret@{proxy.address}"
            run("study.run", *study, "--storage", "s", "--tracking-uri", uri)
            run("study.run", *study, "--storage", "t", MLFLOW_TRACKING_URI=uri)
            run("study.run", *study, "--storage", "t", "--dry-run", MLFLOW_TRACKING_URI=uri)
            run("study.run", *study, "--storage", "u", "--tracking-uri", uri.replace("s3cret", "s3cretly"), code=2)
            run("analysis.export", "--tracking-uri", uri, "--out", "exported")
            studies = mlflow.MlflowClient(server.uri).search_runs(["1"], "tags.`ram.kind` = 'study'")
        assert len(studies) == 2 and {run.info.status for run in studies} == {"FINISHED"}
        files = [path for folder in (tmp_path, ray) for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 50 and any(b"study.run" in line for line in seen)
        for secret in (b"s3cret", b"alice"):
            assert not [path for path in files if secret in path.read_bytes()]
            assert not [line for line in seen if secret in line]
    finally:
        shutil.rmtree(ray)


# Files that carry code.


class Malicious:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_model_with_pickled_code_is_refused_and_the_code_does_not_run(tmp_path, empty_database, monkeypatch):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        config = Config(data="digits", task="original", num_glimpses=2, hidden_size=16, glimpse_size=8, epochs=1)
        weights = build_model(config, torch.tensor([0])).state_dict()
        epoch = Epoch(time=0, value=0.5, metrics={"val_accuracy": [0.5]})
        trial = TrialRecord(
            number=0, spec=TrialSpec(config=config, origin="sobol", seeds=(0,)), started=0, epochs=[epoch],
            state="complete",
        )  # fmt: skip
        client = mlflow.MlflowClient()
        run = client.create_run(client.create_experiment("e")).info.run_id
        (tmp_path / "scratch").mkdir()
        results._log_model(run, trial, weights, [], tmp_path / "scratch")
        folder = Path(mlflow.artifacts.download_artifacts(f"runs:/{run}/model", dst_path=str(tmp_path / "model")))
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert not [name for name in files if name.endswith((".pkl", ".pickle", ".joblib"))]
        mlflow.pyfunc.load_model(str(folder))
        # The same model, with weights replaced by somebody who can write to the artifacts.
        (path,) = folder.rglob("weights.pt")
        torch.save({"weights": Malicious(tmp_path / "ran")}, path)
        with pytest.raises(pickle.UnpicklingError):
            mlflow.pyfunc.load_model(str(folder))
        assert not (tmp_path / "ran").exists()
        torch.load(path, weights_only=False)  # where pickles are trusted, the exploit works
        assert (tmp_path / "ran").exists()
    finally:
        mlflow.set_tracking_uri(None)
