from __future__ import annotations

import hashlib
import io
import pickle
from collections import Counter

import pytest
import torch

from study.checkpoints import Checkpoints, _pack, numbers_present
from study.object_store import RemoteFolder
from study.storage import LocalFolder, Storage


class Malicious:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


@pytest.fixture(params=["local", "remote"])
def checkpoints(request, tmp_path):
    """Checkpoints in a folder of this machine, and in one that pyarrow opens as it opens an object store."""
    folder = LocalFolder(tmp_path) if request.param == "local" else RemoteFolder(tmp_path.as_uri())
    (tmp_path / "trials" / "0007").mkdir(parents=True)
    return Checkpoints(folder, 7)


ME = {"config": {"patch_size": 8}, "seeds": [0, 1]}


def state(epoch: int) -> dict:
    return {"identity": ME, "trainer": {"weights": torch.full((50, 50), float(epoch))}, "history": [{"val": (0.1,)}]}


def test_last_two_checkpoints_are_kept_and_newest_is_loaded(checkpoints):
    for epoch in (1, 2, 3):
        checkpoints.save(epoch, state(epoch))
    assert checkpoints.folder.names("trials/0007") == ["epoch_0002.pt", "epoch_0003.pt"]
    loaded = checkpoints.load(ME)
    assert loaded["trainer"]["weights"][0, 0] == 3 and loaded["history"] == [{"val": (0.1,)}]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_newest_checkpoint_is_skipped_for_the_one_before(checkpoints, tmp_path, damage):
    for epoch in (1, 2):
        checkpoints.save(epoch, state(epoch))
    path = tmp_path / "trials" / "0007" / "epoch_0002.pt"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 3]
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        content.clear()
    path.write_bytes(content)
    assert checkpoints.load(ME)["trainer"]["weights"][0, 0] == 1


@pytest.mark.parametrize("content", [7, [1], None, {"weights": 1}, {"identity": 3}, {"trainer": Malicious()}])
def test_whole_checkpoint_without_a_state_is_skipped_for_the_one_before_and_reported(checkpoints, content, capsys):
    checkpoints.save(1, state(1))
    checkpoints.folder.write("trials/0007/epoch_0002.pt", _pack(content))
    assert checkpoints.load(ME)["trainer"]["weights"][0, 0] == 1
    (problem,) = checkpoints.problems
    assert problem.startswith("trials/0007/epoch_0002.pt") and "\n" not in problem
    assert checkpoints.identity() in (ME, 3) and "code in a checkpoint ran" not in capsys.readouterr().out


def test_whole_file_that_torch_cannot_read_is_skipped_for_the_one_before(checkpoints):
    checkpoints.save(1, state(1))
    junk = b"not a torch file"
    checkpoints.folder.write("trials/0007/epoch_0002.pt", junk + hashlib.sha256(junk).digest())
    assert checkpoints.load(ME)["trainer"]["weights"][0, 0] == 1 and len(checkpoints.problems) == 1


def test_files_that_are_no_checkpoints_are_reported(checkpoints):
    checkpoints.save(1, state(1))
    for name in ("epoch_1.pt", "notes.txt", ".epoch_0002.pt.4711.tmp"):  # the last is of a process that was killed
        checkpoints.folder.write(f"trials/0007/{name}", b"x")
    assert checkpoints.load(ME)["trainer"]["weights"][0, 0] == 1
    assert checkpoints.problems == ["trials/0007 holds what is no checkpoint, and is not used: epoch_1.pt, notes.txt"]


def test_checkpoint_of_another_configuration_is_not_loaded(checkpoints):
    checkpoints.save(1, state(1))
    assert checkpoints.load(ME | {"seeds": [5]}) is None


def test_missing_checkpoints_load_as_none(checkpoints):
    assert checkpoints.load(ME) is None and checkpoints.load_best() is None


def test_ended_trial_keeps_only_best_weights(checkpoints):
    checkpoints.save(1, state(1))
    checkpoints.save_best({"weights": {"w": torch.ones(2)}})
    checkpoints.drop_epochs(keep_best=True)
    assert checkpoints.folder.names("trials/0007") == ["best.pt"]
    assert checkpoints.load_best()["weights"]["w"].tolist() == [1, 1]
    checkpoints.drop_epochs(keep_best=False)
    assert checkpoints.folder.names("trials/0007") == []


def test_checkpoint_with_code_is_refused(checkpoints, capsys):
    checkpoints.folder.write("trials/0007/best.pt", _pack({"weights": Malicious()}))
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.load_best()
    assert "code in a checkpoint ran" not in capsys.readouterr().out


def test_full_disk_leaves_older_checkpoint_intact(tmp_path, monkeypatch):
    checkpoints = Checkpoints(LocalFolder(tmp_path), 7)
    checkpoints.save(1, state(1))
    monkeypatch.setenv("RAM_STUDY_FAULT", "file.write.half@1:full")
    monkeypatch.setattr("study.faults._passed", Counter())
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, state(2))
    assert [p.name for p in (tmp_path / "trials" / "0007").iterdir()] == ["epoch_0001.pt"]
    loaded = checkpoints.load(ME)
    assert loaded is not None and loaded["trainer"]["weights"][0, 0] == 1


def test_storage_folder_is_local_for_path_and_remote_for_uri(tmp_path):
    local = Storage.parse(str(tmp_path)).folder("study")
    assert isinstance(local, LocalFolder) and local.root == tmp_path / "study"
    assert isinstance(Storage.parse(tmp_path.as_uri()).folder("study"), RemoteFolder)


def test_checkpoint_is_torch_file_followed_by_checksum(checkpoints, tmp_path):
    checkpoints.save(1, state(1))
    content = (tmp_path / "trials" / "0007" / "epoch_0001.pt").read_bytes()
    assert torch.load(io.BytesIO(content[:-32]), weights_only=True)["identity"] == ME


def test_only_folders_with_checkpoints_count_as_trials(checkpoints):
    arabic = chr(0x661)
    for name in ("0007/notes.txt", "8/best.pt", f"000{arabic}/best.pt", f"0009/epoch_000{arabic}.pt", "10/.best.tmp"):
        checkpoints.folder.write(f"trials/{name}", b"x")
    assert numbers_present(checkpoints.folder) == []
    for name in ("0011/best.pt", "10012/epoch_0003.pt"):
        checkpoints.folder.write(f"trials/{name}", b"x")
    assert numbers_present(checkpoints.folder) == [11, 10012]
