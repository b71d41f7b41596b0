"""Trains one trial in a worker. The only file that trains, checkpoints and reports.

After each epoch the worker saves a checkpoint, then reports. The driver commits the report to the record, and decides
whether the trial goes on. So the record never holds an epoch that no checkpoint holds, and a crash anywhere costs a
trial at most one epoch. A checkpoint holds the metrics of all epochs: a resumed trial reports again what the record may
lack, and the record ignores what it has.
"""

from __future__ import annotations

import gc
import json
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch

from ramcore.config import Config
from ramcore.data import Split, SplitName, TaskData
from ramcore.errors import first_line
from ramcore.evaluation import Evaluation
from ramcore.trainer import Trainer
from study.checkpoints import UNUSABLE, Checkpoints
from study.faults import fault_point
from study.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Job:
    """A trial as a worker gets it."""

    number: int
    config: Config
    seeds: tuple[int, ...]
    test: bool  # whether to read the test images at the end
    held: int  # epochs that the record holds already
    storage: str  # `str(Storage)`
    study: str

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Job:
        """The inverse of `asdict`: Tune carries plain data."""
        return Job(**data | {"config": Config(**data["config"]), "seeds": tuple(data["seeds"])})


@dataclass(frozen=True, kw_only=True)
class SharedData:
    """The images as numpy arrays. A node keeps them once, and every trial there reads them without a copy."""

    data: str
    digest: str
    canvas: int = 0  # as `Config.canvas`
    arrays: dict[str, np.ndarray]  # "train.images": (N, I, I) uint8, "train.labels": (N,) int64, ...

    @staticmethod
    def of(task: TaskData) -> SharedData:
        """From tensors. All tasks are made from the same images."""
        splits = [(name, task.split(name)) for name in get_args(SplitName)]
        arrays = {f"{name}.images": split.images.numpy() for name, split in splits}
        arrays |= {f"{name}.labels": split.labels.numpy() for name, split in splits}
        return SharedData(data=task.data, digest=task.digest, canvas=task.canvas, arrays=arrays)

    def task(self, task: str) -> TaskData:
        """A task, of tensors over the same memory."""
        with warnings.catch_warnings():
            # The shared memory is read-only, which torch cannot express. Nothing writes to a task's images.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        splits = {n: Split(tensors[f"{n}.images"], tensors[f"{n}.labels"]) for n in get_args(SplitName)}
        return TaskData(data=self.data, task=task, digest=self.digest, canvas=self.canvas, **splits)


def run_trial(
    job: Job, data: SharedData, report: Callable[[dict[str, Any]], None], device: str = "cpu", shares: bool = False
) -> None:
    """Train one trial to its last epoch, or until `report` does not return.

    `report` is called after each epoch with {"epoch": 1-based, "metrics": EpochMetrics.to_dict()}. In the last epoch of
    a design that reads the test images, "test" is added; if checkpoints could not be used, "notes" (lines). If training
    fails, it is called with {"error": one line, "details": traceback}; if the storage of the checkpoints fails (full,
    out of reach), with {"interrupted": one line}; if the GPU's memory does not suffice and the trial `shares` the GPU
    with others, with {"out_of_memory": one line}.

    Raises the error of a GPU that is lost to this process, perhaps by another one's fault: another worker may continue.
    """
    if device != "cpu":  # a worker trains one trial after another: free the memory of the one before
        gc.collect()
        torch.cuda.empty_cache()
    try:
        _train(job, data, report, device)
    except _StorageLost as error:
        report({"interrupted": str(error)})
    except Exception as error:  # anything that a trial raises is that trial's failure
        if _lost_gpu(error):
            raise
        line = f"{type(error).__name__}: {first_line(error, 1000)}"
        if shares and _lacks_gpu_memory(error):
            report({"out_of_memory": line})
        else:
            report({"error": line, "details": traceback.format_exc()})


def _lacks_gpu_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(mark in str(error) for mark in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))
    )


def _lost_gpu(error: Exception) -> bool:
    """Whether CUDA can no longer be used by this process.

    After most errors of CUDA it cannot. Under MPS, one client's error or the server's end breaks all clients.
    """
    is_cuda = re.search(r"CUDA|CUBLAS|cuda[A-Z]", str(error))
    return isinstance(error, RuntimeError) and is_cuda is not None and not _lacks_gpu_memory(error)


def _train(job: Job, data: SharedData, report: Callable[[dict[str, Any]], None], device: str) -> None:
    fault_point("trial.start")
    with _storage_errors():
        checkpoints = Checkpoints(Storage.parse(job.storage).folder(job.study), job.number)
    identity = {"config": asdict(job.config), "seeds": list(job.seeds)}
    trainer, history = _resumed(checkpoints, identity, job, data, device)

    def tell(metrics: dict[str, Any]) -> None:
        result: dict[str, Any] = {"epoch": metrics["epoch"], "metrics": metrics}
        if checkpoints.problems:
            result["notes"], checkpoints.problems = checkpoints.problems, []
        if metrics["epoch"] == job.config.epochs and not any(metrics["diverged"]):
            best = {"identity": identity, "weights": trainer.best_weights(), "epoch": list(trainer.best_epoch)}
            with _storage_errors():
                checkpoints.save_best(best)
            if job.test:
                result["test"] = test_results(trainer.evaluate("test"), trainer.best_epoch)
        fault_point("report.before")
        report(result)
        fault_point("report.after")

    # The newest recorded epoch is reported again too: a crash may have come before the decision that follows it.
    for metrics in history[max(0, job.held - 1) :]:
        tell(metrics)
    while trainer.epochs_done < job.config.epochs:
        metrics = trainer.epoch().to_dict()
        history.append(metrics)
        state = {"identity": identity, "trainer": trainer.state_dict(), "history": history}
        with _storage_errors():
            checkpoints.save(trainer.epochs_done, state)
        tell(metrics)


def _resumed(
    checkpoints: Checkpoints, identity: dict[str, Any], job: Job, data: SharedData, device: str
) -> tuple[Trainer, list[dict[str, Any]]]:
    """The trainer as the newest usable checkpoint left it, and the metrics of all its epochs; else a new one."""

    def new() -> Trainer:
        return Trainer(job.config, data.task(job.config.task), seeds=job.seeds, device=device)

    with _storage_errors():
        for epoch, saved in checkpoints.candidates(identity):
            trainer = new()  # for each: one that could not be used may have left half of its state
            try:
                trainer.load_state_dict(saved["trainer"])
                history = list(saved["history"])
                held = [m["epoch"] for m in history if len(m["val_accuracy"]) == len(m["diverged"]) == len(job.seeds)]
                if not (held == list(range(1, epoch + 1)) and trainer.epochs_done == epoch):
                    raise ValueError(f"its history is of the epochs {held}")
                return trainer, history
            except UNUSABLE as error:
                what = f"{checkpoints.name}: the checkpoint of epoch {epoch}"
                checkpoints.problem(f"{what} cannot be used ({first_line(error)})")
    return new(), []


class _StorageLost(Exception):
    """The storage of the checkpoints is full, gone or out of reach: not the trial's fault."""


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = f"{error.strerror}: {error.filename or 'checkpoint'}" if error.strerror else first_line(error)
        raise _StorageLost(said) from error


def test_results(evaluation: Evaluation, epochs: Sequence[int]) -> dict[str, Any]:
    """The results of each seed's best weights (of these epochs) on the test images, as the record keeps them."""
    return {
        "accuracy": list(evaluation.accuracy),
        "loss": list(evaluation.loss),
        "accuracy_per_glimpse": [list(a) for a in evaluation.accuracy_per_glimpse],
        "epoch": list(epochs),
    }


def device_of(gpus: float) -> str:
    """Where a trial with these GPUs trains. It does not ask whether CUDA works: if not, the trial is to fail."""
    return "cuda" if gpus > 0 and torch.cuda.device_count() else "cpu"


def tune_trial(config: dict[str, Any], data: SharedData, cpus: float, gpus: float) -> None:
    """`run_trial` as Tune calls it, in an actor that runs one trial after another."""
    from ray import tune  # puts off Ray

    torch.set_num_threads(max(1, int(cpus)))
    device, shares = device_of(gpus), 0 < gpus < 1
    # Each report is one JSON text, because Tune would make a column of every nested metric.
    run_trial(Job.from_dict(config), data, lambda result: tune.report({"result": json.dumps(result)}), device, shares)
