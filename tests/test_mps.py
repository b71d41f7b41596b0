"""The life cycle of CUDA's MPS, with a program in place of NVIDIA's that does what it does, hangs or refuses."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_mps import daemons

from study import mps, ray_folder

ROOT = Path(__file__).resolve().parent.parent


def test_programs_of_the_block_find_the_daemon_which_ends_with_it(mps_place, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_MPS_LOG_DIRECTORY", "/of/the/user")
    folder = mps_place / "m"
    with mps.running(folder):
        assert os.environ[mps.PIPE] == str(folder / "pipe") and len(daemons(folder)) == 1
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert (folder / "log" / "control.log").read_text() == "visible all\n"  # the daemon keeps the machine's numbers
        (daemon,) = daemons(folder)
        assert os.getsid(daemon) != os.getsid(0)  # Ctrl-C in the terminal does not reach it
    assert not daemons(folder) and not folder.exists()
    assert mps.PIPE not in os.environ and os.environ["CUDA_MPS_LOG_DIRECTORY"] == "/of/the/user"


def test_daemon_ends_when_the_block_fails(mps_place):
    with pytest.raises(KeyError), mps.running(mps_place / "m"):
        raise KeyError
    assert not daemons(mps_place / "m") and not (mps_place / "m").exists()


def test_daemon_that_does_not_end_is_killed(mps_place, monkeypatch):
    with mps.running(mps_place / "m"):
        monkeypatch.setenv("FAKE_MPS", "never ends")
    assert not daemons(mps_place / "m")


@pytest.mark.parametrize("named", [True, False])
def test_daemon_that_runs_already_is_used_as_it_is_and_stays(mps_place, tmp_path, monkeypatch, named):
    theirs = tmp_path / "theirs"
    mps.start(theirs)
    if named:
        monkeypatch.setenv(mps.PIPE, str(theirs / "pipe"))
    else:
        monkeypatch.setattr(mps, "_DEFAULT", str(theirs / "pipe"))
    before = dict(os.environ)
    with mps.running(mps_place / "m"):
        assert dict(os.environ) == before and not (mps_place / "m").exists()
    assert len(daemons(theirs)) == 1
    mps.end(theirs)


def test_daemon_of_another_user_that_does_not_answer_is_left_alone(mps_place, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    mps.start(theirs)
    monkeypatch.setattr(mps, "_DEFAULT", str(theirs / "pipe"))
    monkeypatch.setattr(mps, "_answers", lambda pipe, command="": False)
    with mps.running(mps_place / "m"):
        assert not (mps_place / "m").exists()
    monkeypatch.undo()
    mps.end(theirs)


def test_dead_daemon_that_the_environment_names_is_replaced_for_the_block(mps_place, tmp_path, monkeypatch):
    monkeypatch.setenv(mps.PIPE, str(tmp_path / "gone"))
    with mps.running(mps_place / "m"):
        assert os.environ[mps.PIPE] == str(mps_place / "m" / "pipe")
    assert os.environ[mps.PIPE] == str(tmp_path / "gone")


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("hangs", "nvidia-cuda-mps-control did not start within 1 s"),
        ("refuses", "nvidia-cuda-mps-control did not start: MPS is not supported on this device"),
        ("missing", "there is no nvidia-cuda-mps-control"),
    ],
)
def test_mps_that_cannot_start_says_why_and_leaves_nothing(mps_place, monkeypatch, mode, said):
    monkeypatch.setattr(mps, "_SECONDS", 1.0)
    monkeypatch.setenv("FAKE_MPS", mode)
    if mode == "missing":
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(mps.MpsUnusable, match=f"^{said}$"), mps.running(mps_place / "m"):
        pass
    assert not daemons(mps_place / "m") and not (mps_place / "m").exists() and mps.PIPE not in os.environ


KILLED = """
import os, signal
from study import mps, ray_folder
with ray_folder.private_folder(ray_folder.MPS) as folder, mps.running(folder):
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_daemon_of_a_killed_run_is_ended_by_the_next_run_and_that_of_a_live_one_is_kept(mps_place):
    run = subprocess.run(
        [sys.executable, "-c", KILLED], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == -signal.SIGKILL
    orphan = Path(run.stdout.strip())
    assert len(daemons(orphan)) == 1
    with ray_folder.private_folder(ray_folder.MPS) as live, mps.running(live):
        assert not daemons(orphan) and not orphan.parent.exists()
        with ray_folder.private_folder():  # as another run begins
            assert len(daemons(live)) == 1
    assert not list(mps_place.iterdir())


def test_daemon_of_a_node_starts_once_and_ends(mps_place, capsys):
    folder = mps_place / "m"
    mps.main("start", str(folder))
    (first,) = daemons(folder)
    mps.main("start", str(folder))  # Ray is started again
    assert daemons(folder) == [first]
    os.kill(first, signal.SIGKILL)
    while daemons(folder):
        time.sleep(0.05)
    mps.main("start", str(folder))
    assert len(daemons(folder)) == 1
    mps.main("end", str(folder))
    assert not folder.exists() and capsys.readouterr().err == ""


def test_nodes_own_daemon_is_found_through_our_folder_and_stays(mps_place, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    mps.start(theirs)
    monkeypatch.setattr(mps, "_DEFAULT", str(theirs / "pipe"))
    mps.main("start", str(mps_place / "m"))
    assert (mps_place / "m" / "pipe").resolve() == theirs / "pipe" and mps._answers(mps_place / "m" / "pipe")
    mps.main("end", str(mps_place / "m"))
    assert len(daemons(theirs)) == 1 and not (mps_place / "m").exists()
    mps.end(theirs)


def test_node_without_mps_says_so_in_one_line(mps_place, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    mps.main("start", str(mps_place / "m"))
    said = (
        "warning: CUDA's MPS cannot be used (there is no nvidia-cuda-mps-control): trials that share a GPU take turns"
    )
    assert capsys.readouterr().err == f"{said}, and gain nothing\n"
