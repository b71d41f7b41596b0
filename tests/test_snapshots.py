from __future__ import annotations

import json
import shutil
import threading
import time

import mlflow
import pytest
from test_record import SETTINGS, SPACE, metrics, plan
from test_tracking import PROVENANCE

from ramcore.errors import UserError
from study import record as record_module
from study import snapshots
from study.integrity import RecordDamaged
from study.record import Record, RecordLost
from study.repair import repair
from study.snapshots import LEASE, Lease, LeaseHeld, fetch, set_aside
from study.storage import Storage
from study.tracking import Tracker


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


def test_two_records_set_aside_within_a_second_are_both_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    for content in ("one", "two", "three"):
        (tmp_path / "backups").mkdir()
        for name in ("study.db", "study.db-wal", "backups/study.0.db"):
            (tmp_path / name).write_text(content)
        aside = set_aside(tmp_path / "study.db")
        for name in (aside, f"{aside}-wal", f"{aside}-backups/study.0.db"):
            assert (tmp_path / name).read_text() == content
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 9


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
            assert record.snapshots is not None and record.snapshots._folder is not None
            folder = record.snapshots._folder
            read = folder.read
            patch.setattr(folder, "read", lambda name: answers.pop(0) if name == LEASE else read(name))
            record.start(plan(), SPACE)
        assert not answers


# A driver that was suspended past its lease, and another that took over.


def other_machine(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.setattr("pooch.os_cache", lambda _: tmp_path / name)


def test_suspended_driver_cannot_overwrite_the_record_of_its_successor(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "_EXPIRES", 0.2)
    monkeypatch.setattr(snapshots, "_INTERVAL", 1000.0)
    suspended = open_record(storage)
    suspended.start(plan(), SPACE)
    other_machine(tmp_path, monkeypatch, "another")
    with open_record(storage) as successor:
        successor.add_epoch(0, 1, metrics(1, 0.5, 0.5))
        successor.end(0, "complete", "finished")
        successor.flush()
        theirs = (tmp_path / "store" / "s" / "study.db").read_bytes()
        # It wakes in the middle of a copy: it has looked at the lease already.
        monkeypatch.setattr(Lease, "check", lambda lease: None)
        suspended.add_epoch(0, 1, metrics(1, 0.5, 0.5))
        with pytest.raises(RecordLost, match="another driver has taken the study over"):
            suspended.start(plan(1), SPACE)
        suspended.close()
        end = time.monotonic() + 20  # the successor's own copies are not written at one stroke to this kind of store
        while (tmp_path / "store" / "s" / "study.db").read_bytes() != theirs:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert LEASE in storage.folder("s").names("")  # the successor's
        monkeypatch.undo()


@pytest.mark.parametrize("successor", ["runs", "has ended"])
def test_suspended_driver_tracks_nothing_beside_its_successor(
    storage, tmp_path, monkeypatch, empty_database, successor
):
    monkeypatch.setattr(snapshots, "_EXPIRES", 0.2)
    monkeypatch.setattr(snapshots, "_INTERVAL", 1000.0)
    shutil.copy(empty_database, tmp_path / "m.db")
    uri = f"sqlite:///{tmp_path}/m.db"
    suspended = open_record(storage)
    suspended.start(plan(), SPACE)
    other_machine(tmp_path, monkeypatch, "another")
    theirs = open_record(storage)
    if successor == "has ended":
        theirs.close()
    time.sleep(0.2)
    tracker = Tracker(suspended, uri, PROVENANCE, {"schema": 1})
    tracker.start()
    assert "another driver may have taken the study over" in str(tracker.finish("finished", patience=1))
    theirs.close()
    client = mlflow.MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("ram-study").experiment_id])
    assert [run.data.tags["ram.kind"] for run in found] == ["study"]
    suspended.close()


def test_suspended_driver_does_not_end_a_trial_of_its_successor(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "_EXPIRES", 0.2)
    suspended = open_record(storage)
    suspended.start(plan(), SPACE)
    suspended.add_epoch(0, 1, metrics(1, 0.5, 0.5))
    other_machine(tmp_path, monkeypatch, "another")
    with open_record(storage):
        with pytest.raises(RecordLost, match="has taken the study over"):
            suspended.end(0, "pruned", "stopped by successive halving at epoch 1")
        assert suspended.take_changed(0.0) == set()  # nothing is tracked twice
        suspended.close()


def test_one_of_two_drivers_that_take_over_at_once_is_refused(storage, tmp_path, monkeypatch):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
    take = Lease.take

    def takes_over_meanwhile(lease: Lease, say: object) -> None:
        take(lease, print)
        monkeypatch.setattr(Lease, "take", take)
        monkeypatch.setattr(record_module, "fetch", lambda *_: fetched)

    fetched = fetch(storage, "s")
    monkeypatch.setattr(Lease, "take", takes_over_meanwhile)
    storage.folder("s").write("study.db", storage.folder("s").read("study.db") + b"\0")  # by the quicker one
    with pytest.raises(UserError, match="another driver has taken the study over"):
        record_module.open_record(storage, SETTINGS, total=5)


def test_clock_that_is_ahead_does_not_skip_the_wait(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "_EXPIRES", 2.0)
    elsewhere(storage, 10_000)
    renewing = threading.Timer(0.5, elsewhere, (storage, 9_999))
    renewing.start()
    with pytest.raises(LeaseHeld, match="elsewhere is running s"):
        Lease(storage.folder("s"), "s", tmp_path).take(print)
    renewing.join()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"7", b"null", b"{}", b"\xff\xfe", b'{"holder": 1, "host": 2}', b"[" * 9999]
)
def test_damaged_lease_is_one_line_and_its_driver_is_waited_for(storage, content, monkeypatch):
    monkeypatch.setattr(snapshots, "_EXPIRES", 0.3)
    storage.folder("s").write(LEASE, content)
    said: list[str] = []
    fetch(storage, "s")
    with record_module.open_record(storage, SETTINGS, total=5, say=said.append) as record:
        record.start(plan(), SPACE)
        storage.folder("s").write(LEASE, content)
        record.start(plan(1), SPACE)  # it says nothing of another driver
    (line,) = said
    assert "lease cannot be read" in line and "waiting up to 0 s" in line


def test_answer_that_was_lost_is_not_another_driver(storage, monkeypatch):
    with open_record(storage) as record:
        folder = record.snapshots._folder
        write = folder.write_version

        def answer_is_lost(*arguments):
            write(*arguments)
            raise OSError("connection reset")

        with monkeypatch.context() as patch:
            patch.setattr(folder, "write_version", answer_is_lost)
            with pytest.raises(RecordLost, match="connection reset"):
                record.start(plan(), SPACE)
        record.flush()


def test_record_deleted_in_its_store_stops_the_driver(storage, tmp_path):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
        (tmp_path / "store" / "s" / "study.db").unlink()
        with pytest.raises(RecordLost, match="the record was deleted in its storage"):
            record.start(plan(1), SPACE)


def test_damaged_record_in_its_store_is_refused_and_repaired(storage, tmp_path):
    with open_record(storage) as record:
        record.start(plan(), SPACE)
    path = tmp_path / "store" / "s" / "study.db"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RecordDamaged, match=r"store/s/study.db .*--repair"):
        fetch(storage, "s")
    repair(storage, "s", "sqlite:////nowhere/mlflow.db")
    shutil.rmtree(tmp_path / "cache")
    with open_record(storage) as record:
        assert record.trials[0].spec == plan()
