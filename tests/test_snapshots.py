from __future__ import annotations

import json
import shutil
import threading
import time

import pytest
from test_record import SETTINGS, SPACE, metrics, plan

from study import record as record_module
from study import snapshots
from study.record import Record, RecordLost
from study.snapshots import LEASE, Lease, LeaseHeld, fetch
from study.storage import Storage


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Storage:
    """A storage that is a URI (an object store is one more kind of it), and a cache of this test's own."""
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    (tmp_path / "store").mkdir()
    return Storage.parse((tmp_path / "store").as_uri())


def open_record(storage: Storage) -> Record:
    fetch(storage, "s")
    return record_module.open_record(storage, SETTINGS, total=5, say=print)


def test_record_of_a_local_storage_lies_in_the_storage(tmp_path):
    storage = Storage.parse(str(tmp_path))
    assert not storage.is_remote and storage.record_folder("s") == tmp_path / "s"
    fetch(storage, "s")  # nothing to do


def test_study_continues_from_storage_when_driver_machine_is_lost(storage, tmp_path):
    with open_record(storage) as record:
        for index, accuracy in enumerate((0.2, 0.6)):
            record.start(plan(index), SPACE)
            record.add_epoch(index, 1, metrics(1, accuracy, accuracy))
        record.end(0, "complete", "finished")
    shutil.rmtree(tmp_path / "cache")
    with open_record(storage) as record:
        assert [(t.state, len(t.epochs)) for t in record.trials.values()] == [("complete", 1), ("running", 1)]
        assert record.trials[1].spec == plan(1)


def test_trial_is_in_storage_before_it_starts(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "_EXPIRES", 0.5)
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        shutil.rmtree(tmp_path / "cache")  # the machine is gone
        with open_record(storage) as again:
            assert again.trials[0].spec == plan() and again.uid == record.uid


def test_working_copy_that_is_further_is_kept(storage):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        record.add_epoch(0, 1, metrics(1, 0.5, 0.5))  # less than a minute ago: not in the storage yet
    with open_record(storage) as record:
        assert len(record.trials[0].epochs) == 1


def elsewhere(storage: Storage, seconds_ago: float) -> None:
    """A lease of another machine's driver."""
    lease = {"holder": "another", "host": "elsewhere", "time": time.time() - seconds_ago}
    storage.folder("s").write(LEASE, json.dumps(lease).encode())


def test_driver_is_refused_while_another_machine_renews_its_lease(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "_EXPIRES", 2.0)
    elsewhere(storage, 0)
    renewing = threading.Timer(0.5, elsewhere, (storage, 0))
    renewing.start()
    said: list[str] = []
    with pytest.raises(LeaseHeld, match="a study has one driver at a time; elsewhere is running s"):
        Lease(storage.folder("s"), "s", tmp_path).take(said.append)
    renewing.join()
    assert "waiting up to 2 s to see whether it still is" in said[0]


def test_driver_takes_over_when_lease_is_no_longer_renewed(storage, monkeypatch):
    monkeypatch.setattr(snapshots, "_EXPIRES", 1.0)
    elsewhere(storage, 0)
    with open_record(storage) as record:
        record.start(plan(), SPACE)
    assert storage.folder("s").names("") == ["study.db"]  # the lease is given back


def test_changes_by_another_driver_during_the_wait_are_kept(storage, tmp_path, monkeypatch):
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


def test_study_made_by_another_driver_during_the_wait_is_continued(storage, tmp_path, monkeypatch):
    with open_record(storage) as theirs:
        theirs.start(plan(), SPACE)
    made = (tmp_path / "store" / "s" / "study.db").read_bytes()
    shutil.rmtree(tmp_path / "store" / "s")
    shutil.rmtree(tmp_path / "cache")
    take = Lease.take

    def waits_for_its_end(lease: Lease, say: object) -> None:
        storage.folder("s").write("study.db", made)
        take(lease, print)

    monkeypatch.setattr(Lease, "take", waits_for_its_end)
    with open_record(storage) as mine:
        assert mine.uid == theirs.uid and len(mine.trials) == 1


def test_driver_stops_when_another_has_taken_over(storage):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        elsewhere(storage, 0)
        with pytest.raises(RecordLost, match="elsewhere has taken s over"):
            record.start(plan(1), SPACE)


def test_ended_trial_is_written_to_storage_in_the_background(storage, tmp_path):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        before = (tmp_path / "store" / "s" / "study.db").read_bytes()
        record.add_epoch(0, 1, metrics(1, 0.5, 0.5))
        record.end(0, "complete", "finished")
        end = time.monotonic() + 20
        while (tmp_path / "store" / "s" / "study.db").read_bytes() == before:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_study_deleted_in_storage_starts_anew_and_working_copy_is_renamed(storage, tmp_path):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        folder = storage.record_folder("s")
    shutil.rmtree(tmp_path / "store" / "s")
    with open_record(storage) as again:
        assert not again.trials and again.uid != record.uid
    assert len(list(folder.glob("study.db.2*"))) >= 1


def test_longer_working_copy_of_another_study_is_not_used(storage, tmp_path):
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


def test_studies_are_found_without_a_working_copy(storage, tmp_path):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
    shutil.rmtree(tmp_path / "cache")
    assert storage.studies() == ["s"]


def test_unreadable_lease_is_read_again(storage, monkeypatch):
    with open_record(storage) as record:
        good = storage.folder("s").read(LEASE)
        answers = [b"\xa3\xff", good[:10], good]
        with monkeypatch.context() as patch:
            assert record.snapshots is not None
            patch.setattr(record.snapshots._folder, "read", lambda name: answers.pop(0))
            record.start(plan(), SPACE)
        assert not answers
