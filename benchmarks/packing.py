"""Training steps a second of several trials that share one GPU, by each way of sharing it.

    processes   a process a trial, as Ray's parts of a GPU give them: the driver lets one after another use the card
    MPS         the same under CUDA's Multi-Process Service, as `study.run` shares a card
    streams     one process, with a thread and a CUDA stream for each trial

Each trial trains two seeds of the tuned recipe on random images; its rate counts whole steps within the same seconds.
"""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.synthetic import synthetic
from ramcore.recipes import TUNED
from ramcore.trainer import Trainer
from study import mps

COUNTS = (1, 2, 4, 8, 16)  # trials at a time
SEEDS = 2  # of each
_WARM_UP = 60  # steps: the graph is captured, and the random numbers of 50 steps are drawn twice
_START_SECONDS = 120.0


def packing(seconds: float, counts: Sequence[int] = COUNTS) -> dict[str, dict[int, float]]:
    """Steps a second of all trials together, by the way of sharing and the number of trials."""
    found = {"processes": _processes(seconds, counts)}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with mps.running(Path(scratch) / "mps"):
                found["MPS"] = _processes(seconds, counts)
        except mps.MpsUnusable as error:
            print(f"MPS cannot be used: {error}")
    found["streams"] = _streams(seconds, counts)
    return found


def _trial(images: int = 50_000) -> Callable[[], None]:
    """One training step of a trial that is warm."""
    torch.set_num_threads(1)
    data = synthetic(TUNED.task, images).to("cuda")
    trainer = Trainer(TUNED, data, seeds=range(SEEDS), device="cuda")
    draws = itertools.chain.from_iterable(map(trainer.draws, itertools.count()))

    def step() -> None:
        trainer.step(next(draws))

    for _ in range(_WARM_UP):
        step()
    torch.cuda.synchronize()
    return step


def _rate(step: Callable[[], None], begin: float, seconds: float) -> float:
    """Steps a second from a moment on."""
    while time.time() < begin:
        time.sleep(1e-3)
    steps = 0
    while time.time() < begin + seconds:
        for _ in range(10):
            step()
        torch.cuda.current_stream().synchronize()
        steps += 10
    return steps / (time.time() - begin)


def _processes(seconds: float, counts: Sequence[int]) -> dict[int, float]:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(max(counts))]
    workers = [context.Process(target=_worker, args=(theirs, seconds), daemon=True) for _, theirs in pipes]
    for worker in workers:
        worker.start()
    ours = [own for own, _ in pipes]
    try:
        for pipe in ours:
            if not pipe.poll(_START_SECONDS):
                raise TimeoutError("a trial's process did not start")
            pipe.recv()
        found = {}
        for count in counts:
            begin = time.time() + 0.2
            for pipe in ours[:count]:
                pipe.send(begin)
            found[count] = sum(pipe.recv() for pipe in ours[:count])
        return found
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _worker(pipe: Any, seconds: float) -> None:
    step = _trial()
    pipe.send("ready")
    while True:
        pipe.send(_rate(step, pipe.recv(), seconds))


def _streams(seconds: float, counts: Sequence[int]) -> dict[int, float]:
    streams = [torch.cuda.Stream() for _ in range(max(counts))]
    steps: list[Callable[[], None]] = []
    for stream in streams:
        with torch.cuda.stream(stream):
            steps.append(_trial())
    found = {}
    for count in counts:
        rates: list[float] = []
        begin = time.time() + 0.2

        def run(stream: torch.cuda.Stream, step: Callable[[], None], begin: float = begin) -> None:
            with torch.cuda.stream(stream):
                rates.append(_rate(step, begin, seconds))  # noqa: B023

        threads = [threading.Thread(target=run, args=pair) for pair in zip(streams[:count], steps[:count], strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found[count] = sum(rates)
    return found
