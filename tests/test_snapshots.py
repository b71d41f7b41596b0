from __future__ import annotations

import shutil

import pytest
from test_record import SETTINGS, SPACE, metrics, plan

from study.checkpoints import open_folder
from study.record import Record
from study.snapshots import Snapshots, fetch, is_remote, record_folder


@pytest.fixture
def storage(tmp_path, monkeypatch) -> str:
    """A storage that is a URI (an object store is one more kind of it), and a cache of this test's own."""
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    (tmp_path / "store").mkdir()
    return (tmp_path / "store").as_uri()


def open_record(storage: str) -> Record:
    fetch(storage, "s")
    folder = record_folder(storage, "s")
    record = Record.open(folder, SETTINGS, total=5)
    record.snapshots = Snapshots(folder / "study.db", open_folder(storage, "s"))
    return record


def test_a_path_is_its_own_place(tmp_path):
    assert not is_remote(str(tmp_path)) and record_folder(str(tmp_path), "s") == tmp_path / "s"
    fetch(str(tmp_path), "s")  # nothing to do


def test_a_study_goes_on_from_the_storage_when_its_driver_machine_is_lost(storage, tmp_path):
    with open_record(storage) as record:
        for index, accuracy in enumerate((0.2, 0.6)):
            record.start(plan(index), SPACE.distributions())
            record.add_epoch(index, 1, metrics(1, accuracy, accuracy))
        record.end(0, "complete", "finished")
    shutil.rmtree(tmp_path / "cache")
    with open_record(storage) as record:
        assert [(t.state, len(t.epochs)) for t in record.trials.values()] == [("complete", 1), ("running", 1)]
        assert record.trials[1].plan == plan(1)


def test_a_trial_is_in_the_storage_before_it_is_handed_out(storage, tmp_path):
    with open_record(storage) as record:
        record.start(plan(), SPACE.distributions())
        shutil.rmtree(tmp_path / "cache")  # the machine is gone
        with open_record(storage) as again:
            assert again.trials[0].plan == plan() and again.uid == record.uid


def test_a_working_copy_that_is_further_is_kept(storage):
    with open_record(storage) as record:
        record.start(plan(), SPACE.distributions())
        record.add_epoch(0, 1, metrics(1, 0.5, 0.5))  # less than a minute ago: not in the storage yet
    with open_record(storage) as record:
        assert len(record.trials[0].epochs) == 1
