"""What a worker does with one trial. The only file that trains, checkpoints and reports.

The order after each epoch is: checkpoint, report; the driver then commits the report to the record, decides whether
the trial goes on, and lets the tracker know. So the record never knows an epoch that no checkpoint holds, and a crash
anywhere leaves a trial that repeats at most one epoch. A checkpoint carries the metrics of all its epochs: the
resumed trial reports again what the record may lack, and the record ignores what it has.
"""

from __future__ import annotations

import gc
import json
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ramcore.config import Config
from ramcore.data import Split, TaskData
from ramcore.trainer import Trainer
from study.checkpoints import Checkpoints, open_folder
from study.faults import fault_point


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told about a trial."""

    number: int
    config: Config
    seeds: tuple[int, ...]
    test: bool  # whether to read the test images at its end
    held: int  # epochs the record holds already
    storage: str
    study: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as Tune carries it."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Job:
        """The inverse of `to_dict`."""
        return Job(**data | {"config": Config(**data["config"]), "seeds": tuple(data["seeds"])})


@dataclass(frozen=True, kw_only=True)
class SharedData:
    """The images as numpy arrays, which Ray keeps once a node and every trial there reads without a copy."""

    data: str
    digest: str
    arrays: dict[str, np.ndarray]  # "train.images": (N, 28, 28) uint8, "train.labels": (N,) int64, ...

    @staticmethod
    def of(task: TaskData) -> SharedData:
        """From tensors; a source's images serve all its tasks."""
        names = task.sizes
        arrays = {f"{n}.images": task.split(n).images.numpy() for n in names}  # type: ignore[arg-type]
        arrays |= {f"{n}.labels": task.split(n).labels.numpy() for n in names}  # type: ignore[arg-type]
        return SharedData(data=task.data, digest=task.digest, arrays=arrays)

    def task(self, task: str) -> TaskData:
        """As tensors over the same memory, laid out as a task."""
        with warnings.catch_warnings():
            # The shared memory is read-only and torch cannot express that; nothing writes to a task's images.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        splits = {n: Split(tensors[f"{n}.images"], tensors[f"{n}.labels"]) for n in ("train", "validation", "test")}
        return TaskData(data=self.data, task=task, digest=self.digest, **splits)


def run_trial(job: Job, data: SharedData, report: Callable[[dict[str, Any]], None], device: str = "cpu") -> None:
    """Train one trial to its last epoch, or until `report` does not return.

    `report` is given {"epoch": 1-based, "metrics": EpochMetrics.to_dict()}, with "test" beside them in the last epoch
    of the designs that read the test images; or, instead, {"error": one line, "details": traceback} when training
    failed, or {"interrupted": one line} when its surroundings did (full disk, storage out of reach).
    """
    if device != "cpu":  # actors are reused: the memory of the trial before is given back before more is taken
        gc.collect()
        torch.cuda.empty_cache()
    try:
        _train(job, data, report, device)
    except _StorageLost as error:
        report({"interrupted": str(error)})
    except Exception as error:  # the boundary: whatever a trial raises is that trial's failure, told to the driver
        lines = (str(error) or "no message").splitlines()
        report({"error": f"{type(error).__name__}: {lines[0]}", "details": traceback.format_exc()})


class _StorageLost(Exception):
    """The checkpoints' storage is full, gone or out of reach: not the trial's fault."""


@contextmanager
def _storage() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise _StorageLost(f"{error.strerror}: {error.filename or 'checkpoint'}" if error.strerror else said) from error


def _train(job: Job, data: SharedData, report: Callable[[dict[str, Any]], None], device: str) -> None:
    fault_point("trial.start")
    with _storage():
        checkpoints = Checkpoints(open_folder(job.storage, job.study), job.number)
    trainer = Trainer(job.config, data.task(job.config.task), seeds=job.seeds, device=device)
    identity = {"config": asdict(job.config), "seeds": list(job.seeds)}
    history: list[dict[str, Any]] = []
    with _storage():
        saved = checkpoints.load(identity)
    if saved:
        trainer.load_state_dict(saved["trainer"])
        history = saved["history"]

    def tell(metrics: dict[str, Any]) -> None:
        result: dict[str, Any] = {"epoch": metrics["epoch"], "metrics": metrics}
        if metrics["epoch"] == job.config.epochs and not any(metrics["diverged"]):
            best = {"identity": identity, "weights": trainer.best_weights(), "epoch": list(trainer.best_epoch)}
            with _storage():
                checkpoints.save_best(best)
            if job.test:
                result["test"] = read_test(trainer)
        fault_point("report.before")
        report(result)
        fault_point("report.after")

    # The newest epoch that the record holds is told again too: a crash may have come before the decision about it.
    for metrics in history[max(0, job.held - 1) :]:
        tell(metrics)
    while trainer.epochs_done < job.config.epochs:
        metrics = trainer.epoch().to_dict()
        history.append(metrics)
        with _storage():
            checkpoints.save(
                trainer.epochs_done, {"identity": identity, "trainer": trainer.state_dict(), "history": history}
            )
        tell(metrics)


def read_test(trainer: Trainer) -> dict[str, Any]:
    """Accuracy on the test images with each seed's best weights: the one reading that is reported."""
    evaluation = trainer.evaluate("test")
    return {
        "accuracy": list(evaluation.accuracy),
        "loss": list(evaluation.loss),
        "accuracy_per_glimpse": [list(a) for a in evaluation.accuracy_per_glimpse],
        "epoch": list(trainer.best_epoch),
    }


def tune_trial(config: dict[str, Any], data: SharedData, cpus: float, gpus: float) -> None:
    """`run_trial` as Tune calls it, in an actor that runs one trial after another."""
    from ray import tune

    torch.set_num_threads(max(1, int(cpus)))
    device = "cuda" if gpus > 0 and torch.cuda.is_available() else "cpu"
    # One JSON text a report: Tune would flatten nested metrics into a column each.
    run_trial(Job.from_dict(config), data, lambda result: tune.report({"result": json.dumps(result)}), device)
