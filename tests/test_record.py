from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
import subprocess
import sys

import optuna
import pytest
import sqlalchemy.event
from optuna.trial import TrialState

from ramcore.config import Config
from ramcore.errors import UserError
from study import integrity
from study.designs import TrialSpec
from study.record import Record, StudySettings, best_trial, read_study
from study.search_space import configuration, search_space
from study.sobol import SobolSequence
from study.storage import RECORD

SPACE = search_space(Config(data="digits", task="original", epochs=3))
SETTINGS = StudySettings(
    study="s",
    task="original",
    data="digits",
    digest="d" * 64,
    design="search",
    epochs=3,
    seeds_per_trial=2,
    seed=0,
    space=SPACE.to_dict(),
)


def metrics(epoch: int, *accuracy: float) -> dict:
    return {"epoch": epoch, "seconds": 1.0, "val_accuracy": accuracy, "seeds": [0, 1], "diverged": [False, False]}


def plan(index: int = 0) -> TrialSpec:
    return TrialSpec(config=configuration(SPACE, SobolSequence(SPACE, 0)[index]), origin="sobol", seeds=(0, 1))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "s"


def open_record(folder, settings=SETTINGS, total: int | None = 5, rows=None) -> Record:
    return Record.open(folder, settings, total=total, rows=rows)


def test_new_trial_is_stored_whole_in_one_commit(folder):
    with open_record(folder) as record:
        trial = record.start(plan(), SPACE)
        (stored,) = record.study.get_trials()
    assert trial.number == 0 and stored.state == TrialState.RUNNING
    assert stored.params == SobolSequence(SPACE, 0)[0]
    assert stored.user_attrs["origin"] == "sobol" and stored.user_attrs["seeds"] == "0,1"


def test_reports_become_intermediate_values_and_repeated_ones_are_ignored(folder, caplog):
    with open_record(folder) as record:
        record.start(plan(), SPACE)
        assert record.add_epoch(0, 1, metrics(1, 0.2, 0.4))
        assert not record.add_epoch(0, 1, metrics(1, 0.2, 0.4))
        assert "twice" not in caplog.text
        assert not record.add_epoch(0, 1, metrics(1, 0.9, 0.9))
        assert "twice" in caplog.text
        assert record.add_epoch(0, 2, metrics(2, 0.5, 0.5))
        (stored,) = record.study.get_trials()
    assert stored.intermediate_values == {1: pytest.approx(0.3), 2: 0.5}


@pytest.mark.parametrize(
    ("state", "optuna_state", "value"),
    [("complete", TrialState.COMPLETE, 0.3), ("pruned", TrialState.PRUNED, 0.3), ("failed", TrialState.FAIL, None)],
)
def test_first_end_of_a_trial_is_stored_and_second_is_ignored(folder, state, optuna_state, value):
    with open_record(folder) as record:
        record.start(plan(), SPACE)
        record.add_epoch(0, 1, metrics(1, 0.2, 0.4))
        record.end(0, state, "why")
        record.end(0, "failed", "a second end is ignored")
        (stored,) = record.study.get_trials()
    assert stored.state == optuna_state and stored.user_attrs["end"]["reason"] == "why"
    assert stored.value == (pytest.approx(value) if value else None)
    with open_record(folder) as record:
        trial = record.trials[0]
        assert (trial.state, trial.reason, len(trial.epochs)) == (state, "why", 1)


def test_nan_is_kept_as_epoch_but_not_as_intermediate_value(folder):
    with open_record(folder) as record:
        record.start(plan(), SPACE)
        record.add_epoch(0, 1, metrics(1, math.nan, 0.4))
        (stored,) = record.study.get_trials()
        assert stored.intermediate_values == {}
    with open_record(folder) as record:
        assert math.isnan(record.trials[0].epochs[0].value)


def test_opening_completes_writes_that_a_crash_cut_off(folder, monkeypatch):
    with open_record(folder) as record:
        record.start(plan(), SPACE)
        record.add_epoch(0, 1, metrics(1, 0.2, 0.4))
        with monkeypatch.context() as patch:
            patch.setattr(Record, "_set_value", lambda *_: None)
            record.add_epoch(0, 2, metrics(2, 0.4, 0.4))
            patch.setattr(Record, "_set_state", lambda *_: None)
            record.end(0, "complete", "finished")
    with open_record(folder) as record:
        (stored,) = record.study.get_trials()
    assert stored.intermediate_values == {1: pytest.approx(0.3), 2: 0.4}
    assert (stored.state, stored.value) == (TrialState.COMPLETE, 0.4)


def test_record_is_completed_wherever_its_making_was_cut_off(folder, tmp_path):
    copies = []

    def copy(*_):
        """What is on the disk after a statement; a transaction that is open is not."""
        if (folder / RECORD).exists() and (content := (folder / RECORD).read_bytes()) not in copies:
            copies.append(content)

    sqlalchemy.event.listen(sqlalchemy.Engine, "after_cursor_execute", copy)
    try:
        open_record(folder).close()
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "after_cursor_execute", copy)
    assert len(copies) > 15
    for number, content in enumerate(copies):
        cut = tmp_path / str(number) / "s"
        cut.mkdir(parents=True)
        (cut / RECORD).write_bytes(content)
        for _ in range(2):
            with open_record(cut) as record:
                record.start(plan(len(record.trials)), SPACE)
        with sqlite3.connect(cut / RECORD) as database:
            assert database.execute("select count(*) from studies").fetchall() == [(1,)]
        assert optuna.load_study(study_name="s", storage=f"sqlite:///{cut / RECORD}").trials[1].number == 1


def test_test_accuracy_of_ended_trial_is_kept(folder):
    with open_record(folder) as record:
        record.start(plan(), SPACE)
        record.end(0, "complete", "finished")
        record.set_test(0, {"accuracy": [0.5]})
    with open_record(folder) as record:
        assert record.trials[0].test == {"accuracy": [0.5]}


def test_larger_total_extends_study_and_smaller_one_keeps_the_trials_that_have_begun(folder):
    with open_record(folder, total=5) as record:
        record.start(plan(), SPACE)
        record.start(plan(), SPACE)
    with open_record(folder, total=9) as record:
        assert record.totals == [5, 9]
    with open_record(folder, total=None) as record:
        assert record.totals == [5, 9]
    with open_record(folder, total=1) as record:
        assert record.totals == [5, 9, 2]
    with open_record(folder, total=1) as record:
        assert record.totals == [5, 9, 2]
    with open_record(folder, total=4) as record:
        assert record.totals == [5, 9, 2, 4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 4}, "epochs 3 there, 4 asked for"),
        ({"data": "mnist"}, "data digits there, mnist asked for"),
        ({"digest": "e" * 64}, "images sha256 dddddddddddd there, sha256 eeeeeeeeeeee asked for"),
        ({"seeds_per_trial": 1}, "seeds_per_trial 2 there, 1 asked for"),
        ({"design": "ofat"}, "design search there, ofat asked for"),
    ],
)
def test_other_settings_under_the_same_name_are_refused_and_named(folder, change, said):
    open_record(folder).close()
    with pytest.raises(UserError) as error:
        open_record(folder, dataclasses.replace(SETTINGS, **change))
    assert said in str(error.value) and "\n" not in str(error.value)
    open_record(folder).close()  # the refusal let go of the lock


def test_another_space_is_refused_but_a_reworded_reason_is_accepted(folder):
    open_record(folder).close()
    space = SPACE.to_dict()
    space["dimensions"][1] |= {"high": 30, "reason": "another"}
    with pytest.raises(UserError, match=r"space: patch_size.high 14 there, 30 asked for"):
        open_record(folder, dataclasses.replace(SETTINGS, space=space))
    space = SPACE.to_dict()
    space["dimensions"][1] |= {"reason": "another"}
    open_record(folder, dataclasses.replace(SETTINGS, space=space)).close()


def test_study_that_is_older_than_a_field_had_its_default(folder):
    space = SPACE.to_dict()
    del space["fixed"]["matmul_precision"]
    open_record(folder, dataclasses.replace(SETTINGS, space=space)).close()
    open_record(folder).close()
    space["fixed"]["matmul_precision"] = "high"
    with pytest.raises(UserError, match="space: matmul_precision highest there, high asked for"):
        open_record(folder, dataclasses.replace(SETTINGS, space=space))


def test_second_driver_is_refused_with_process_number_of_the_first(folder, tmp_path):
    script = (
        "import sys; from pathlib import Path; from study.record import _lock; held = _lock(Path(sys.argv[1]));"
        "print('held', flush=True); sys.stdin.read()"
    )
    folder.mkdir()
    command = [sys.executable, "-c", script, str(folder / "driver.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid} is running s"):
            open_record(folder)
        other.kill()
    open_record(folder).close()


def test_file_that_is_no_database_is_refused(folder):
    folder.mkdir()
    (folder / "study.db").write_text("not a database, " * 100)
    with pytest.raises(UserError, match="must be an Optuna SQLite file"):
        open_record(folder)


def test_record_can_be_read_without_opening_it_for_writing(folder):
    assert read_study(folder / "study.db") is None
    with open_record(folder) as record:
        for i, accuracy in enumerate((0.2, 0.6, 0.4)):
            record.start(plan(i), SPACE)
            record.add_epoch(i, 1, metrics(1, accuracy, accuracy))
            record.end(i, "complete", "finished")
    stored = read_study(folder / "study.db")
    assert stored is not None and (stored.settings, stored.totals, stored.rows) == (SETTINGS, [5], None)
    assert [t.state for t in stored.trials] == ["complete"] * 3 and stored.ended == 3
    best = best_trial(stored.trials)
    assert best is not None and best.spec == plan(1)


def test_commits_are_durable(folder):
    with open_record(folder) as record, record._rdb.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_optuna_can_load_the_study(folder):
    with open_record(folder) as record:
        record.start(plan(), SPACE)
        study = optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'study.db'}")
        assert len(study.trials) == 1


def changed(folder, change, trial: int | None = None) -> None:
    """Change an attribute of a study, or of a trial, as a process that keeps the checksums would."""
    table = "study_user_attributes" if trial is None else "trial_user_attributes"
    key, value = change
    with integrity.connected(folder / "study.db") as database:
        integrity.protect(database)
        where = "key = ?" if trial is None else f"key = ? and trial_id = {trial + 1}"
        if value is None:
            (rowid,) = database.execute(f"select rowid from {table} where {where}", [key]).fetchone()
            database.execute(f"delete from {table} where rowid = ?", [rowid])
            database.execute("delete from checksums where entry = ?", [f"{table} {rowid}"])
        else:
            database.execute(f"update {table} set value_json = ? where {where}", [json.dumps(value), key])


NEWER = {"newer": 1}


@pytest.mark.parametrize(
    ("change", "trial", "said"),
    [
        (
            ("settings", dataclasses.asdict(SETTINGS) | NEWER),
            None,
            "older one; it has the field newer: update the project",
        ),
        (("settings", dataclasses.asdict(SETTINGS) | {"design": "later"}), None, "it has the design later: update the"),
        (("plan", plan().to_dict() | NEWER), 0, "older one; it has the field newer: update the project"),
        (
            ("plan", plan().to_dict() | {"config": dataclasses.asdict(plan().config) | NEWER}),
            0,
            "older one; it has the field newer: update the project",
        ),
        (("settings", {"study": "s"}), None, "a record must be whole; it lacks task"),
        (("settings", []), None, "lacks its settings: .*--repair"),
        (("settings", "text"), None, "lacks its settings: .*--repair"),
        (("totals", []), None, "lacks its totals: .*--repair"),
        (("totals", None), None, "lacks its totals: .*--repair"),
        (("created", None), None, "lacks its created: .*--repair"),
        (("plan", None), 0, "lacks its plan of trial 0000: .*--repair"),
        (("started", None), 0, "lacks its started of trial 0000: .*--repair"),
    ],
)
def test_record_of_a_newer_version_or_without_what_it_needs_is_refused_in_one_line(folder, change, trial, said):
    with open_record(folder) as record:
        record.start(plan(), SPACE)
    changed(folder, change, trial)
    for use in (open_record, lambda folder: read_study(folder / "study.db")):
        with pytest.raises(UserError, match=said) as error:
            use(folder)
        assert "\n" not in str(error.value)
