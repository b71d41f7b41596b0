from __future__ import annotations

import json
import shutil
import threading
import time

import pytest
from test_record import SETTINGS, SPACE, metrics, plan

from study import record as record_module
from study import snapshots
from study.checkpoints import open_folder
from study.record import Record, RecordLost
from study.snapshots import LEASE, Lease, LeaseHeld, fetch, is_remote, record_folder, studies


@pytest.fixture
def storage(tmp_path, monkeypatch) -> str:
    """A storage that is a URI (an object store is one more kind of it), and a cache of this test's own."""
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    (tmp_path / "store").mkdir()
    return (tmp_path / "store").as_uri()


def open_record(storage: str) -> Record:
    fetch(storage, "s")
    return record_module.open_record(storage, SETTINGS, total=5, say=print)


def test_a_path_is_its_own_place(tmp_path):
    assert not is_remote(str(tmp_path)) and record_folder(str(tmp_path), "s") == tmp_path / "s"
    fetch(str(tmp_path), "s")  # nothing to do


def test_a_study_goes_on_from_the_storage_when_its_driver_machine_is_lost(storage, tmp_path):
    with open_record(storage) as record:
        for index, accuracy in enumerate((0.2, 0.6)):
            record.start(plan(index), SPACE)
            record.add_epoch(index, 1, metrics(1, accuracy, accuracy))
        record.end(0, "complete", "finished")
    shutil.rmtree(tmp_path / "cache")
    with open_record(storage) as record:
        assert [(t.state, len(t.epochs)) for t in record.trials.values()] == [("complete", 1), ("running", 1)]
        assert record.trials[1].spec == plan(1)


def test_a_trial_is_in_the_storage_before_it_is_handed_out(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "_EXPIRES", 0.5)
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        shutil.rmtree(tmp_path / "cache")  # the machine is gone
        with open_record(storage) as again:
            assert again.trials[0].spec == plan() and again.uid == record.uid


def test_a_working_copy_that_is_further_is_kept(storage):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        record.add_epoch(0, 1, metrics(1, 0.5, 0.5))  # less than a minute ago: not in the storage yet
    with open_record(storage) as record:
        assert len(record.trials[0].epochs) == 1


def elsewhere(storage: str, seconds_ago: float) -> None:
    """A lease of another machine's driver."""
    lease = {"holder": "another", "host": "elsewhere", "time": time.time() - seconds_ago}
    open_folder(storage, "s").write(LEASE, json.dumps(lease).encode())


def test_a_driver_on_another_machine_keeps_this_one_out(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "_EXPIRES", 2.0)
    elsewhere(storage, 0)
    renewing = threading.Timer(0.5, elsewhere, (storage, 0))
    renewing.start()
    said: list[str] = []
    with pytest.raises(LeaseHeld, match="a study has one driver at a time; elsewhere is running s"):
        Lease(open_folder(storage, "s"), "s", tmp_path).take(said.append)
    renewing.join()
    assert "waiting up to 2 s to see whether it still is" in said[0]


def test_a_driver_whose_machine_is_gone_is_waited_for_and_then_succeeded(storage, monkeypatch):
    monkeypatch.setattr(snapshots, "_EXPIRES", 1.0)
    elsewhere(storage, 0)
    with open_record(storage) as record:
        record.start(plan(), SPACE)
    assert open_folder(storage, "s").names("") == ["study.db"]  # the lease is given back


def test_what_another_driver_wrote_while_this_one_waited_is_not_overwritten(storage, tmp_path, monkeypatch):
    with open_record(storage) as first:
        first.start(plan(), SPACE)
    old = (tmp_path / "store" / "s" / "study.db").read_bytes()
    with open_record(storage) as first:
        first.add_epoch(0, 1, metrics(1, 0.5, 0.5))
        first.end(0, "complete", "finished")
    new = (tmp_path / "store" / "s" / "study.db").read_bytes()
    shutil.rmtree(tmp_path / "cache")  # this machine has never seen the study
    (tmp_path / "store" / "s" / "study.db").write_bytes(old)
    take = Lease.take

    def waits_for_its_end(lease: Lease, say: object) -> None:
        (tmp_path / "store" / "s" / "study.db").write_bytes(new)
        take(lease, print)

    monkeypatch.setattr(Lease, "take", waits_for_its_end)
    with open_record(storage) as mine:
        assert [(t.state, len(t.epochs)) for t in mine.trials.values()] == [("complete", 1)]
        mine.start(plan(1), SPACE)
    shutil.rmtree(tmp_path / "cache")
    with open_record(storage) as mine:
        assert [(t.state, len(t.epochs)) for t in mine.trials.values()] == [("complete", 1), ("running", 0)]


def test_a_study_that_another_driver_made_while_this_one_waited_is_the_study(storage, tmp_path, monkeypatch):
    with open_record(storage) as theirs:
        theirs.start(plan(), SPACE)
    made = (tmp_path / "store" / "s" / "study.db").read_bytes()
    shutil.rmtree(tmp_path / "store" / "s")
    shutil.rmtree(tmp_path / "cache")
    take = Lease.take

    def waits_for_its_end(lease: Lease, say: object) -> None:
        open_folder(storage, "s").write("study.db", made)
        take(lease, print)

    monkeypatch.setattr(Lease, "take", waits_for_its_end)
    with open_record(storage) as mine:
        assert mine.uid == theirs.uid and len(mine.trials) == 1


def test_a_driver_that_was_succeeded_stops(storage):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        elsewhere(storage, 0)
        with pytest.raises(RecordLost, match="elsewhere has taken s over"):
            record.start(plan(1), SPACE)


def test_what_ended_is_in_the_storage_soon_without_waiting_for_it(storage, tmp_path):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        before = (tmp_path / "store" / "s" / "study.db").read_bytes()
        record.add_epoch(0, 1, metrics(1, 0.5, 0.5))
        record.end(0, "complete", "finished")
        end = time.monotonic() + 20
        while (tmp_path / "store" / "s" / "study.db").read_bytes() == before:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_study_deleted_in_the_storage_begins_anew_and_the_working_copy_is_set_aside(storage, tmp_path):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        folder = record_folder(storage, "s")
    shutil.rmtree(tmp_path / "store" / "s")
    with open_record(storage) as again:
        assert not again.trials and again.uid != record.uid
    assert len(list(folder.glob("study.db.2*"))) >= 1


def test_a_longer_working_copy_of_another_study_does_not_win(storage, tmp_path):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        record.start(plan(1), SPACE)
    kept = (tmp_path / "store" / "s" / "study.db").read_bytes()
    shutil.rmtree(tmp_path / "store" / "s")
    with open_record(storage) as other:
        for index in range(3):
            other.start(plan(index), SPACE)
    (tmp_path / "store" / "s" / "study.db").write_bytes(kept)
    with open_record(storage) as again:
        assert again.uid == record.uid and len(again.trials) == 2


def test_the_studies_of_a_storage_are_found_without_a_working_copy(storage, tmp_path):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
    shutil.rmtree(tmp_path / "cache")
    assert studies(storage) == ["s"]


def test_a_lease_that_makes_no_sense_is_read_again(storage, monkeypatch):
    with open_record(storage) as record:
        good = open_folder(storage, "s").read(LEASE)
        answers = [b"\xa3\xff", good[:10], good]
        with monkeypatch.context() as patch:
            patch.setattr(record.snapshots._folder, "read", lambda name: answers.pop(0))
            record.start(plan(), SPACE)
        assert not answers
