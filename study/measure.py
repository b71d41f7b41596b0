"""What a trial takes where it runs: seconds of an epoch, bytes of a GPU. Trains for a few seconds, as a trial does."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import torch

from ramcore.config import Config
from ramcore.data import Split, SplitName, TaskData
from ramcore.errors import first_line
from ramcore.trainer import Trainer
from study.trainable import SharedData, device_of

_TIMED_STEPS = {"cpu": 20, "cuda": 200}  # training steps of a timed epoch, at least
_TIMED_SHARE = 25  # one in this many images is used, at most
_SECONDS = 180.0  # for processes to measure: importing torch from a cold disk takes a minute

T = TypeVar("T")


class NotMeasured(RuntimeError):
    """Why a process could not measure, in one line."""


def time_epochs(
    configs: list[Config],
    data: SharedData,
    num_seeds: int,
    cpus: float,
    gpus: float,
    together: Callable[[], object] = lambda: None,
) -> list[float]:
    """Seconds that an epoch of each configuration takes here, trained as `study.trainable` does.

    Each trains one short epoch to warm up and one that is timed, on the first images of each split. `together` is
    called before each timed epoch; it may wait for other processes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cpus)))
    device = device_of(gpus)
    found: list[float] = []
    try:
        for config in configs:
            whole = data.task(config.task)
            short = _shortened(whole, config.batch_size, _TIMED_STEPS[device])
            trainer = Trainer(dataclasses.replace(config, epochs=2), short, seeds=range(num_seeds), device=device)
            trainer.epoch()
            together()
            steps = len(whole.train.labels) / len(short.train.labels)
            found.append(trainer.epoch().to_dict()["seconds"] * steps)
    finally:
        torch.set_num_threads(threads)
    return found


def time_sharing(
    configs: list[Config], data: SharedData, num_seeds: int, cpus: float, gpus: float, trials: int
) -> list[float]:
    """`time_epochs` of each of several trials that share a GPU, the mean over them. Raises NotMeasured."""
    of_all = _in_processes(trials, _time_together, configs, data, num_seeds, cpus, gpus)
    return [sum(seconds) / trials for seconds in zip(*of_all, strict=True)]


def gpu_memory(config: Config, data: SharedData, num_seeds: int) -> int:
    """Bytes of a GPU that torch takes to train a configuration, without CUDA's own. Raises NotMeasured.

    A process of its own measures: so this one takes no part of the GPU, and a GPU that hangs does not stop it.
    """
    return _in_processes(1, _gpu_memory, config, data, num_seeds)[0]


def _time_together(*arguments: Any) -> list[float]:
    return time_epochs(*arguments, together=lambda: _barrier.wait(_SECONDS))


def _gpu_memory(config: Config, data: SharedData, num_seeds: int) -> int:
    trainer = Trainer(config, data.task(config.task), seeds=range(num_seeds), device=device_of(1.0))
    for draws in itertools.islice(trainer.draws(0), 3):
        trainer.step(draws)
    trainer.evaluate("validation")
    return torch.cuda.max_memory_reserved()


_barrier: threading.Barrier  # in a process of `_in_processes`: passes once all of them wait


def _begin(barrier: Any) -> None:
    global _barrier
    _barrier = barrier
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that waits for this one, and so this one


def _in_processes(count: int, work: Callable[..., T], *arguments: Any) -> list[T]:
    """What `work` returns in each of `count` new processes that run it at the same time. Raises NotMeasured."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with context.Pool(count, _begin, (context.Barrier(count),)) as pool:
        try:
            return pool.starmap_async(work, [arguments] * count, chunksize=1).get(_SECONDS)
        except multiprocessing.TimeoutError:
            raise NotMeasured(f"a process on the GPU did not end within {_SECONDS:g} s") from None
        except (RuntimeError, OSError) as error:
            raise NotMeasured(f"a process on the GPU failed: {first_line(error, 300)}") from error


def _shortened(whole: TaskData, batch_size: int, timed_steps: int) -> TaskData:
    """The first images of each split, as many as an epoch is timed on."""
    total = len(whole.train.labels)
    share = max(min(total, timed_steps * batch_size) / total, 1 / _TIMED_SHARE)
    splits: dict[str, Split] = {}
    for name in get_args(SplitName):
        count = max(1, round(share * whole.sizes[name]))
        splits[name] = Split(*(part[:count] for part in whole.split(name)))
    return dataclasses.replace(whole, **splits)  # pyright: ignore[reportArgumentType]
