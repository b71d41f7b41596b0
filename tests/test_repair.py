"""A real study whose record is damaged, lost or moved: what the command says is so, and --repair rebuilds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from study.checkpoints import numbers_present
from study.flags import BROKEN, DONE, STOPPED, USAGE
from study.record import StoredStudy, read_study
from study.storage import LocalFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--data", "digits", "--task", "original", "--study", "s", "--trials", "4", "--seeds-per-trial", "2")


def start(folder: Path, *flags: str, epochs: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "study.run", *FLAGS, "--epochs", str(epochs), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, *flags: str) -> tuple[int, str, str]:
    process = start(folder, *flags)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def stored(folder: Path) -> StoredStudy:
    path = folder / "runs" / "s" / "study.db"
    study = read_study(path, numbers_present(LocalFolder(path.parent)))
    assert study is not None
    return study


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    code, _, err = run(folder)
    assert code == DONE, err
    return folder


@pytest.fixture
def here(finished, tmp_path) -> Iterator[Path]:
    """A copy of a finished study and of its tracking database."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    yield tmp_path


def test_lost_record_beside_checkpoints_is_refused_and_rebuilt_from_its_backup(here):
    before = stored(here)
    (here / "runs" / "s" / "study.db").unlink()
    code, out, err = run(here)
    (line,) = err.strip().splitlines()
    assert code == USAGE and out == "" and "is missing or empty, and the checkpoints of" in line
    code, out, err = run(here, "--repair")
    assert code == DONE and "the record of s was rebuilt: 4 trials" in err and "Best configuration" in out, err
    assert stored(here) == before


def test_record_without_backups_is_rebuilt_from_mlflow_which_lacks_what_is_said(here):
    before = stored(here)
    (here / "runs" / "s" / "study.db").unlink()
    shutil.rmtree(here / "runs" / "s" / "backups")
    code, _, err = run(here, "--repair")
    assert code == DONE, err
    assert "the study's settings are from MLflow" in err and "losses as means over the seeds" in err
    after = stored(here)
    assert after.settings == before.settings
    for old, new in zip(before.trials, after.trials, strict=True):
        assert (old.spec, old.state, old.reason, old.ended, old.test) == (
            new.spec, new.state, new.reason, new.ended, new.test,
        )  # fmt: skip
        assert [epoch.metrics["val_accuracy"] for epoch in old.epochs] == [
            epoch.metrics["val_accuracy"] for epoch in new.epochs
        ]


def test_study_of_other_settings_cannot_be_dry_run_and_repaired_at_once(here):
    code, _, err = run(here, "--repair", "--dry-run")
    assert code == USAGE and "--dry-run writes nothing, and --repair does" in err


@pytest.mark.parametrize("what", ["moved", "deleted"])
def test_folder_that_goes_away_under_a_running_study_is_an_error(tmp_path, what):
    process = start(tmp_path, epochs=40)
    folder = tmp_path / "runs" / "s"
    try:
        end = time.monotonic() + 300
        while not any(folder.glob("trials/*/epoch_*.pt")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        if what == "moved":
            folder.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == BROKEN, err
    assert "study.db was moved, replaced or deleted while the study ran: put it back" in err
    assert "the same command continues" not in err and "Record:" not in out and "Traceback" not in err
    if what == "moved":
        shutil.rmtree(folder, ignore_errors=True)
        (tmp_path / "elsewhere").rename(folder)
        process = start(tmp_path, "--time-budget", "0.02", epochs=40)
        _, err = process.communicate(timeout=300)
        assert process.returncode == STOPPED, err
    else:
        code, _, err = run(tmp_path)
        assert code == USAGE and "differs in" not in err and "checkpoints of" in err, err
