"""The private folder of a local Ray, and the temporary folders in which it cannot or must not lie."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramcore.errors import UserError
from study import ray_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def place(monkeypatch) -> Iterator[Path]:
    """A temporary folder with a short path, safe from others."""
    path = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(path))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def refusal() -> str:
    with pytest.raises(UserError) as error:
        ray_folder.check()
    assert "\n" not in str(error.value) and "set RAY_TMPDIR to a folder of your own" in str(error.value)
    return str(error.value)


def test_folder_is_the_users_alone_and_removed_at_the_end(place):
    ray_folder.check()
    with ray_folder.private_folder() as folder:
        assert folder.parent.parent == place and stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        folder.mkdir()
        folder.chmod(0o777)  # as Ray does
    assert not list(place.iterdir())


def test_folder_of_a_killed_run_is_removed_by_the_next_one_and_a_live_one_is_kept(place):
    with ray_folder.private_folder() as live:
        live = live.parent
        left = place / "ram-0123ab"
        left.mkdir()
        (left / "driver.lock").touch()
        others = place / "ram-notes"
        others.mkdir()
        for folder in (live, left, others):
            os.utime(folder, (0, time.time() - 3600))
        with ray_folder.private_folder():
            assert live.exists() and others.exists() and not left.exists()


def test_long_path_is_refused(place, monkeypatch):
    longest = ray_folder._LONGEST - 77  # 30 on Linux
    path = place / ("n" * (longest - len(f"{place}/")))
    path.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(path))
    ray_folder.check()
    longer = path.with_name(path.name + "n")
    longer.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(longer))
    assert f"must have a path of at most {longest} bytes for Ray's sockets; got {longer}" in refusal()


def test_missing_folder_and_file_are_refused(place, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(place / "none"))
    assert f"must be one that can be written; {place}/none: No such file or directory" in refusal()
    (place / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(place / "file"))
    assert f"{place}/file: Not a directory" in refusal()


def test_full_folder_is_refused(place, monkeypatch):
    usage = ray_folder.shutil.disk_usage(place)
    monkeypatch.setattr(ray_folder.shutil, "disk_usage", lambda _: usage._replace(free=3 * 2**20))
    assert f"must have 100 MB free for Ray; {place} has 3: free some" in refusal()


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_folder_in_which_others_can_replace_files_is_refused(place, monkeypatch, mode):
    (place / "open" / "own").mkdir(parents=True)
    (place / "open").chmod(mode)
    for inside in ("open", "open/own"):
        monkeypatch.setenv("RAY_TMPDIR", str(place / inside))
        assert f"must be safe from other users, since Ray keeps code there; in {place}/open other users" in refusal()
    (place / "open").chmod(mode | stat.S_ISVTX)  # as /tmp
    ray_folder.check()


@pytest.mark.root
def test_folder_of_another_user_is_refused(place):
    os.chown(place, 12345, 12345)
    assert "must be safe from other users" in refusal()
    os.chown(place, 0, 0)
    place.chmod(0o755)
    program = "from study import ray_folder; ray_folder.check()"
    line = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", sys.executable, "-c", program]
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert f"must be one that can be written; {place}: Permission denied" in done.stderr
