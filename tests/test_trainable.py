from __future__ import annotations

import dataclasses
import errno

import numpy as np
import pytest
import torch

from ramcore.trainer import Trainer
from study.checkpoints import Checkpoints
from study.storage import Storage
from study.trainable import Job, SharedData, run_trial


class Stopped(BaseException):
    """Stops a worker: the report does not return."""


@pytest.fixture
def job(tiny, tmp_path) -> Job:
    config = dataclasses.replace(tiny[0], epochs=3)
    return Job(number=7, config=config, seeds=(0, 1), test=False, held=0, storage=str(tmp_path), study="s")


@pytest.fixture
def data(tiny) -> SharedData:
    return SharedData.of(tiny[1])


def reports(job: Job, data: SharedData, *, stop_after: int | None = None, device: str = "cpu") -> list[dict]:
    """The reports of a worker that is stopped after `stop_after` of them."""
    found: list[dict] = []

    def report(result: dict) -> None:
        found.append(result)
        if len(found) == stop_after:
            raise Stopped

    try:
        run_trial(job, data, report, device)
    except Stopped:
        pass
    return found


def without_time(results: list[dict]) -> list[dict]:
    return [r | {"metrics": {k: v for k, v in r["metrics"].items() if k != "seconds"}} for r in results]


def test_images_are_shared_and_not_copied(data, tiny):
    task = data.task("translated")
    assert task.task == "translated" and task.digest == tiny[1].digest
    assert np.shares_memory(task.train.images.numpy(), data.arrays["train.images"])
    assert np.shares_memory(data.arrays["train.images"], tiny[1].train.images.numpy())


def test_read_only_images_are_trained_on_without_warning(job, data):
    for array in data.arrays.values():
        array.flags.writeable = False  # as Ray hands it out
    assert len(reports(job, data)) == 3


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resumed_trial_reports_the_same_as_an_uninterrupted_one(job, data, tmp_path, stop_after):
    whole = without_time(reports(dataclasses.replace(job, number=8), data))
    first = without_time(reports(job, data, stop_after=stop_after))
    again = without_time(reports(dataclasses.replace(job, held=stop_after), data))
    assert first == whole[:stop_after]
    assert again == whole[stop_after - 1 :]  # the newest recorded epoch is reported again
    assert without_time(reports(job, data)) == whole  # with held=0, all epochs are reported


def test_epoch_is_checkpointed_before_it_is_reported(job, data, tmp_path):
    reports(job, data, stop_after=2)
    names = Storage.parse(str(tmp_path)).folder("s").names("trials/0007")
    assert names == ["epoch_0001.pt", "epoch_0002.pt"]


def test_best_weights_are_saved_with_last_report(job, data, tmp_path):
    last = reports(job, data)[-1]
    saved = Checkpoints(Storage.parse(str(tmp_path)).folder("s"), 7).load_best()
    assert saved is not None and len(saved["epoch"]) == 2 and "test" not in last
    assert {w.shape[0] for w in saved["weights"].values()} == {2}


def test_tested_trial_reports_test_accuracy_once_at_the_end(job, data):
    results = reports(dataclasses.replace(job, test=True), data)
    assert ["test" in r for r in results] == [False, False, True]
    test = results[-1]["test"]
    assert len(test["accuracy"]) == len(test["epoch"]) == 2 and all(0 <= a <= 1 for a in test["accuracy"])


def test_error_is_reported_in_one_line(job, data):
    (result,) = reports(dataclasses.replace(job, seeds=(3, 3)), data)
    assert result["error"].startswith("UserError: seeds must be different") and "\n" not in result["error"]
    assert "Traceback" in result["details"]


def test_full_disk_is_reported_as_interruption(job, data, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "epoch_0001.pt")

    monkeypatch.setattr(Checkpoints, "save", full)
    assert reports(job, data) == [{"interrupted": "No space left on device: epoch_0001.pt"}]


def test_file_error_outside_checkpoints_is_reported_as_error(job, data, monkeypatch):
    def absent(*_):
        raise FileNotFoundError(2, "No such file or directory", "kernel.so")

    monkeypatch.setattr(Trainer, "epoch", absent)
    (result,) = reports(job, data)
    assert result["error"].startswith("FileNotFoundError: ")


def without_weights(content: dict) -> None:
    del content["trainer"]["weights"]


def other_shapes(content: dict) -> None:
    content["trainer"]["weights"] = {name: value[..., :1] for name, value in content["trainer"]["weights"].items()}


def other_seeds(content: dict) -> None:
    content["trainer"]["seeds"] = [5, 6]


def state_of_another_epoch(content: dict) -> None:
    content["trainer"]["epochs_done"] = 1


def shorter_history(content: dict) -> None:
    content["history"].pop()


def history_without_accuracy(content: dict) -> None:
    del content["history"][1]["val_accuracy"]


@pytest.mark.parametrize(
    "spoil",
    [without_weights, other_shapes, other_seeds, state_of_another_epoch, shorter_history, history_without_accuracy],
)
def test_whole_checkpoint_that_cannot_be_used_is_passed_over_for_the_one_before(job, data, spoil):
    whole = without_time(reports(dataclasses.replace(job, number=8), data))
    reports(job, data, stop_after=2)
    checkpoints = Checkpoints(Storage.parse(job.storage).folder(job.study), job.number)
    content = checkpoints.load({"config": dataclasses.asdict(job.config), "seeds": list(job.seeds)})
    assert content is not None
    spoil(content)
    checkpoints.save(2, content)
    again = reports(dataclasses.replace(job, held=2), data)
    (note,) = again[0].pop("notes")
    assert note.startswith("trials/0007: the checkpoint of epoch 2 cannot be used") and "\n" not in note
    assert without_time(again) == whole[1:]


def test_job_survives_conversion_to_dict_and_back(job):
    assert Job.from_dict(dataclasses.asdict(job)) == job


@pytest.mark.gpu
def test_reused_worker_frees_gpu_memory_of_earlier_trials(job, data):
    reports(job, data, device="cuda")
    first = torch.cuda.memory_reserved()
    for number in range(8, 12):
        reports(dataclasses.replace(job, number=number), data, device="cuda")
    assert torch.cuda.memory_reserved() <= 1.1 * first
