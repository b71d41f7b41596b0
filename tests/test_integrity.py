"""A record that was damaged, cut short, moved or deleted is noticed, and rebuilt as far as it can be."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_record import SETTINGS, SPACE, changed, metrics, open_record, plan
from test_tracking import metrics as full_metrics

from ramcore.errors import UserError
from study import integrity, tracking
from study.checkpoints import Checkpoints, numbers_present
from study.integrity import RecordDamaged
from study.record import RecordGone, RecordLost, StoredStudy, read_study
from study.repair import repair
from study.storage import LocalFolder, Storage

NO_MLFLOW = "sqlite:////nowhere/mlflow.db"


def fill(folder: Path, trials: int = 3) -> None:
    """A study of some trials, all but the last one complete."""
    with open_record(folder) as record:
        for number in range(trials):
            record.start(plan(number), SPACE)
            for epoch in (1, 2, 3) if number < trials - 1 else (1,):
                record.add_epoch(number, epoch, metrics(epoch, 0.1 * number, 0.2 * epoch))
            if number < trials - 1:
                record.end(number, "complete", "finished")


def stored(folder: Path) -> StoredStudy:
    """What a checked record holds."""
    path = folder / "study.db"
    study = read_study(path, numbers_present(LocalFolder(folder)))
    assert study is not None
    return study


def killed(folder: Path, trials: int = 3) -> None:
    """Fill a record in a process that is then killed, so that its write-ahead log stays."""
    program = (
        f"import sys, os, signal; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; import test_integrity as t; from study.record import Record\n"
        "Record.close = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"t.fill(Path({str(folder)!r}), {trials})"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert (folder / "study.db-wal").stat().st_size > 0


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "s"


def test_flipped_value_is_noticed_although_sqlite_finds_nothing(folder):
    fill(folder)
    content = (folder / "study.db").read_bytes()
    place = content.index(b'"val_accuracy": [0.1') + len(b'"val_accuracy": [0.')
    flip(folder / "study.db", place, bit=1)  # 0.1 becomes 0.3
    with sqlite3.connect(folder / "study.db") as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    database.close()
    with pytest.raises(RecordDamaged, match=r"1 entries differ .* 'trial_user_attributes \d+'.*--repair"):
        stored(folder)
    with pytest.raises(RecordDamaged):
        open_record(folder)


@pytest.mark.parametrize("file", ["study.db", "study.db-wal"])
def test_any_flipped_bit_is_noticed_or_changes_nothing(tmp_path, file):
    rng = random.Random(5)
    fill(tmp_path / "whole")
    killed(tmp_path / "cut")
    source = tmp_path / ("whole" if file == "study.db" else "cut")
    shutil.copytree(source, tmp_path / "reference")
    expected = stored(tmp_path / "reference").trials
    noticed = 0
    for attempt in range(30):
        folder = tmp_path / f"{attempt}" / "s"
        shutil.copytree(source, folder)
        path = folder / "study.db"
        # A copy is another file, which the note beside it has to speak of as it did of the first one.
        note = folder / integrity.COMMITS
        note.write_bytes(integrity._line(int(note.read_bytes()[:12]), integrity._identity(path)))
        flip(folder / file, rng.randrange((folder / file).stat().st_size), rng.randrange(8))
        try:
            assert stored(folder).trials == expected
        except (UserError, RecordLost) as error:
            noticed += 1
            assert "\n" not in str(error)
    assert noticed >= 3


def test_name_of_a_table_that_is_no_text_is_damage(tmp_path):
    fill(tmp_path / "whole")
    content, expected = (tmp_path / "whole" / "study.db").read_bytes(), stored(tmp_path / "whole").trials
    places = [found.start() for found in re.finditer(b"trial_user_attributes|checksums|study_user", content)]
    said = []
    for attempt, place in enumerate(places[:16]):
        folder = tmp_path / f"{attempt}" / "s"
        shutil.copytree(tmp_path / "whole", folder)
        flip(folder / "study.db", place + 2, 7)
        try:
            assert stored(folder).trials == expected, "a name that nothing reads"
        except (UserError, RecordLost) as error:
            said.append(str(error))
    assert any("malformed" in text for text in said) and all("\n" not in text for text in said)


@pytest.mark.parametrize("damage", ["wal deleted", "wal cut", "cut to half", "emptied"])
def test_record_that_lost_commits_is_refused(folder, damage):
    killed(folder)
    path, wal = folder / "study.db", folder / "study.db-wal"
    if damage == "wal deleted":
        wal.unlink()
        (folder / "study.db-shm").unlink()
    elif damage == "wal cut":
        os.truncate(wal, wal.stat().st_size // 2)
    elif damage == "cut to half":
        wal.unlink()
        os.truncate(path, path.stat().st_size // 2)
    else:
        wal.unlink()
        os.truncate(path, 0)
    with pytest.raises(RecordDamaged) as error:
        stored(folder)
    assert "--repair" in str(error.value) and "\n" not in str(error.value)


def test_checkpoints_without_their_record_are_refused(folder):
    fill(folder)
    (folder / "trials" / "0001").mkdir(parents=True)
    (folder / "trials" / "0001" / "epoch_0001.pt").write_bytes(b"x")
    (folder / "study.db").unlink()
    with pytest.raises(RecordDamaged, match=r"is missing or empty, and the checkpoints of trial 0001 are there"):
        read_study(folder / "study.db", numbers_present(LocalFolder(folder)))
    with pytest.raises(RecordDamaged):
        open_record(folder)


def test_checkpoints_of_trials_that_the_record_lacks_are_refused(folder):
    fill(folder)
    (folder / "trials" / "0007").mkdir(parents=True)
    (folder / "trials" / "0007" / "epoch_0001.pt").write_bytes(b"x")
    with pytest.raises(RecordDamaged, match="holds 3 trials, and the checkpoints of trial 0007 are there"):
        stored(folder)


@pytest.mark.parametrize("what", ["moved", "deleted", "replaced", "log deleted"])
def test_record_that_goes_away_while_it_is_open_stops_the_study(folder, tmp_path, what):
    with open_record(folder) as record:
        record.start(plan(), SPACE)
        if what == "moved":
            folder.rename(tmp_path / "elsewhere")
        elif what == "deleted":
            shutil.rmtree(folder)
        elif what == "replaced":
            shutil.copy(folder / "study.db", tmp_path / "other.db")
            (tmp_path / "other.db").replace(folder / "study.db")
        else:
            (folder / "study.db-wal").unlink()
        with pytest.raises(RecordGone, match="was moved, replaced or deleted while the study ran"):
            record.add_epoch(0, 1, metrics(1, 0.5, 0.5))
        with pytest.raises(RecordGone):
            record.flush()
    if what == "log deleted":  # closing wrote what it held to the file
        assert len(stored(folder).trials) == 1


def test_record_that_is_damaged_while_it_is_open_stops_the_study(folder):
    with open_record(folder) as record:
        record.start(plan(), SPACE)
        with integrity.connected(folder / "study.db") as database:
            database.execute("update trial_user_attributes set value_json = '7' where key = 'started'")
        with pytest.raises(RecordGone, match="1 entries differ"):
            record.flush()
        with pytest.raises(RecordGone):
            record.add_epoch(0, 1, metrics(1, 0.5, 0.5))


def test_older_record_without_checksums_gets_them_when_it_is_opened(folder):
    fill(folder)
    before = stored(folder)
    with integrity.connected(folder / "study.db") as database:
        database.execute("drop table checksums")
    (folder / integrity.COMMITS).unlink()
    assert stored(folder) == before
    open_record(folder).close()
    assert stored(folder) == before
    with integrity.connected(folder / "study.db") as database:
        database.execute("update trials set state = 'FAIL' where number = 0")
    with pytest.raises(RecordDamaged):
        stored(folder)


def test_second_driver_is_refused_though_the_lock_file_was_deleted(folder):
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; import test_integrity as t\n"
        f"record = t.open_record(Path({str(folder)!r})); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        (folder / "driver.lock").unlink()
        with pytest.raises(UserError, match=r"one driver at a time; another process has the record open"):
            open_record(folder)
        other.kill()
    open_record(folder).close()


# Repair.


def mended(folder: Path, uri: str = NO_MLFLOW) -> list[str]:
    return repair(Storage.parse(str(folder.parent)), folder.name, uri)


@pytest.mark.parametrize("damage", ["deleted", "emptied", "header", "value"])
def test_record_is_rebuilt_from_a_backup(folder, damage):
    fill(folder)
    before, path = stored(folder), folder / "study.db"
    if damage == "deleted":
        path.unlink()
    elif damage == "emptied":
        os.truncate(path, 0)
    elif damage == "header":
        flip(path, 3)
    else:
        flip(path, path.read_bytes().index(b'"val_accuracy": [0.1') + len(b'"val_accuracy": [0.'), bit=1)
    said = mended(folder)
    assert "3 trials (2 complete, 1 to be continued)" in said[0]
    assert stored(folder) == before
    with open_record(folder) as record:  # values and states are completed
        assert [t.value for t in record.study.get_trials()][:2] == [t.value for t in before.trials][:2]


def test_two_damaged_copies_make_one_whole_record(folder):
    fill(folder)
    before = stored(folder)
    for file in (folder / "study.db", folder / "backups" / "study.0.db", folder / "backups" / "study.1.db"):
        rng = random.Random(file.name)
        if file.exists():
            for _ in range(3):
                flip(file, rng.randrange(20_000, file.stat().st_size))
    mended(folder)
    assert stored(folder) == before


def test_trial_that_only_checkpoints_know_is_continued(folder):
    fill(folder, trials=3)
    shutil.copytree(folder / "backups", folder.parent / "kept")
    with open_record(folder) as record:
        record.start(plan(3), SPACE)
    spec = record.trials[3].spec
    identity = {"config": spec.to_dict()["config"], "seeds": list(spec.seeds)}
    Checkpoints(LocalFolder(folder), 3).save(1, {"identity": identity, "trainer": {"w": torch.ones(2)}, "history": []})
    (folder / "study.db").unlink()
    shutil.rmtree(folder / "backups")
    shutil.move(folder.parent / "kept", folder / "backups")
    said = mended(folder)
    trial = stored(folder).trials[3]
    assert trial.spec.config == spec.config and trial.state == "running"
    assert any(line.startswith("trial 0003: configuration from") for line in said)


def test_ended_trial_with_a_lost_epoch_is_trained_again_and_named(folder):
    fill(folder)
    for file in (folder / "study.db", *(folder / "backups").iterdir()):
        with integrity.connected(file) as database:
            database.execute(
                "update trial_user_attributes set value_json = 'x' where key = 'epoch 0002' and trial_id = 1"
            )
    said = mended(folder)
    first, second, _ = stored(folder).trials
    assert (first.state, len(first.epochs)) == ("running", 1) and second.state == "complete"
    assert "trial 0000: epoch 2 is lost, so it is trained again (it had ended: finished)" in said


def test_record_without_any_copy_cannot_be_rebuilt_and_says_so(folder):
    fill(folder)
    shutil.rmtree(folder / "backups")
    (folder / "study.db").unlink()
    with pytest.raises(UserError, match=r"a record can be rebuilt if a backup or MLflow has its settings"):
        mended(folder)


def test_repair_is_refused_while_a_driver_runs(folder):
    with open_record(folder), pytest.raises(UserError, match="one driver at a time"):
        mended(folder)


def test_settings_survive_repair(folder):
    fill(folder)
    (folder / "study.db").unlink()
    mended(folder)
    assert stored(folder).settings == SETTINGS


# What MLflow holds.


def tracked(folder: Path, uri: str, *points: int) -> str:
    """A study whose trials have these Sobol points, in a record and in MLflow; gives its uid."""
    plain = dataclasses.asdict(SETTINGS)
    space = plain.pop("space")
    with open_record(folder) as record:
        for number, point in enumerate(points):
            record.start(plan(point), SPACE)
            record.add_epoch(number, 1, full_metrics(1, 0.1 * number, 0.2))
        described = {**plain, "trials": 5, "runs": [], "record": f"{folder}/study.db"}
        made = tracking.Provenance(settings=described, commit="c", dirty=False, params={})
        tracker = tracking.Tracker(record, uri, made, space)
        tracker.start()
        assert tracker.finish("stopped", patience=30) is None
        return record.uid


def without_record(project: Path, path: Path) -> tuple[Path, str]:
    """A copy of a project whose record and backups are lost, and its tracking URI."""
    shutil.copytree(project, path)
    folder = path / "runs" / "s"
    (folder / "study.db").unlink()
    shutil.rmtree(folder / "backups")
    return folder, f"sqlite:///{path}/mlflow.db"


def damage(uri: str, *commands: str) -> None:
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        for command in commands:
            assert database.execute(command).rowcount != 0, command
        database.commit()


@pytest.fixture(scope="module")
def project(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of seven trials in a folder that was moved after it was tracked."""
    folder = tmp_path_factory.mktemp("project") / "old"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    tracked(folder / "runs" / "s", f"sqlite:///{folder}/mlflow.db", *range(7))
    return folder.rename(folder.with_name("new"))


@pytest.fixture(scope="module")
def two_projects(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and in another storage a second study of its name."""
    folder = tmp_path_factory.mktemp("two") / "old"
    shutil.copytree(project, folder)
    tracked(folder / "other" / "s", f"sqlite:///{folder}/mlflow.db", 0, 5)
    return folder


def checkpoint(folder: Path, number: int, point: int) -> None:
    identity = {"config": dataclasses.asdict(plan(point).config), "seeds": [0, 1]}
    Checkpoints(LocalFolder(folder), number).save(1, {"identity": identity, "history": []})


def test_runs_that_are_not_as_a_study_writes_them_are_left_out_of_a_repair_and_named(project, tmp_path):
    folder, uri = without_record(project, tmp_path / "here")
    last = [f"run_uuid = (select run_uuid from tags where key = 'ram.trial' and value = '{n}')" for n in range(7)]
    damage(
        uri,
        "delete from tags where key = 'ram.trials'",  # study.json has it, too
        f"update params set value = 'junk(' where key = 'dropout' and {last[2]}",
        f"delete from tags where key = 'ram.seeds' and {last[3]}",
        f"update tags set value = 'a' where key = 'ram.seeds' and {last[4]}",
        f"delete from tags where key = 'ram.origin' and {last[5]}",
        f"update tags set value = '²' where key = 'ram.trial' and {last[6]}",
    )
    said = "\n".join(mended(folder, uri))
    assert "the study's settings are from MLflow; how its total grew is not known" in said
    for why in ("dropout must be", "'ram.seeds'", "invalid literal", "'ram.origin'", "ram.trial is '²'"):
        assert f"is left out: {why}" in said
    after = stored(folder)
    assert (after.settings, after.totals, [trial.spec for trial in after.trials]) == (SETTINGS, [5], [plan(0), plan(1)])


def test_study_that_mlflow_does_not_hold_whole_cannot_be_rebuilt_and_says_so(project, tmp_path):
    folder, uri = without_record(project, tmp_path / "here")

    def refused(said: str) -> None:
        with pytest.raises(UserError, match=f"of s are in neither .*{said}") as error:
            mended(folder, uri)
        assert "\n" not in str(error.value) and not (folder / "study.db").exists()

    for content, said in (
        ("{}", "it lacks study"),
        ("[]", "not as a study"),
        ('{"runs": 5}', "it lacks"),
        ("{", "line 1"),
    ):
        next((tmp_path / "here" / "mlruns").rglob("study.json")).write_text(content)
        refused(f"MLflow has no settings of the study .*{said}")
    damage(uri, "delete from tags where key = 'ram.uid'")
    refused("MLflow does not hold the study")
    damage(uri, "update runs set start_time = null")
    refused("MLflow was not read .*start_time")
    damage(uri, "drop table runs")
    refused("MLflow was not read .*must be MLflow's own")


def test_repair_of_one_of_two_studies_of_a_name_is_refused_unless_checkpoints_tell_which(two_projects, tmp_path):
    folder, uri = without_record(two_projects, tmp_path / "here")
    with pytest.raises(
        UserError, match=r"2 there have the name s, .*run \w+, 7 trials, .*; run \w+, 2 trials"
    ) as error:
        mended(folder, uri)
    assert "mlflow runs delete" in str(error.value) and not (folder / "study.db").exists()
    checkpoint(folder, 0, 0)  # the same in both
    with pytest.raises(UserError, match="2 there have the name s"):
        mended(folder, uri)
    checkpoint(folder, 1, 5)
    mended(folder, uri)
    assert [trial.spec for trial in stored(folder).trials] == [plan(0), plan(5)]


def test_repair_takes_no_study_whose_trials_are_not_those_of_the_checkpoints(project, tmp_path):
    folder, uri = without_record(project, tmp_path / "here")
    checkpoint(folder, 1, 5)
    with pytest.raises(UserError, match=r"are in neither .MLflow holds another study of that name"):
        mended(folder, uri)


def test_repair_writes_nothing_into_a_database_that_is_not_mlflows(folder, tmp_path):
    fill(folder)
    with contextlib.closing(sqlite3.connect(tmp_path / "own.db")) as database:
        database.execute("create table own (a)")
    before = (tmp_path / "own.db").read_bytes()
    (folder / "study.db").unlink()
    assert any("must be MLflow's own" in line for line in mended(folder, f"sqlite:///{tmp_path}/own.db"))
    assert (tmp_path / "own.db").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "trial", "lacks"),
    [
        (("settings", None), None, "settings"),
        (("totals", []), None, "totals"),
        (("plan", None), 0, "plan of trial 0000"),
    ],
)
def test_attribute_that_a_record_lacks_is_taken_from_its_backup(folder, change, trial, lacks):
    fill(folder)
    before = stored(folder)
    changed(folder, change, trial)
    if lacks != "settings":
        with pytest.raises(RecordDamaged, match=f"lacks its {lacks}"):
            stored(folder)
    mended(folder)
    assert stored(folder) == before


def test_record_of_a_newer_version_is_not_repaired(folder):
    fill(folder)
    (folder / "driver.lock").unlink()
    changed(folder, ("plan", plan(0).to_dict() | {"newer": 1}), 0)
    before = (folder / "study.db").read_bytes()
    with pytest.raises(UserError, match="it has the field newer: update the project"):
        mended(folder)
    assert (folder / "study.db").read_bytes() == before and not (folder / "study.db.new").exists()
