"""Does the driver hold? And how much of a study's slot-seconds is training?

    python -m benchmarks.driver                   # 2,000 trials x 20 reports over 64 slots, 12 minutes or more
    python -m benchmarks.driver --trials 300      # a shorter one
    python -m benchmarks.driver --study FOLDER    # reads the record of a finished study, such as runs/mnist-24

The trials of the first two wait instead of training, each by its own epoch's time: half to one and a half times
--seconds, since configurations differ in cost. The rest is as in `study.run`, with tracking. Early stopping is computed
at each rung but not obeyed, so every trial sends all its reports.

--study: a slot-second is one second of one slot, between the start of the first trial and the end of the last. Training
is the time of the epochs with their validation, as the trainers measured it. The rest is starting workers, checkpoints,
reports and decisions, and slots without a trial. Their share falls with the number of trials.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ramcore.config import Config
from study.asha import ASHA
from study.cluster import TrialResources
from study.pool import Pool, ray_running, run_trials
from study.record import Record, StudySettings, TrialRecord, read_study
from study.scheduler import StudyScheduler
from study.search_space import search_space
from study.storage import Storage
from study.tracking import Provenance, Tracker


class NeverStops(ASHA):
    """Early stopping that is computed and then ignored."""

    def stops(self, value: float, others: Collection[float]) -> bool:
        super().stops(value, others)
        return False


class Quiet:
    """A callback that prints a line a minute."""

    def __init__(self) -> None:
        self.ended_trials = 0
        self._said = time.monotonic()

    def started(self, trial: TrialRecord) -> None: ...
    def reported(self, trial: TrialRecord) -> None: ...
    def note(self, text: str) -> None: ...

    def ended(self, trial: TrialRecord) -> None:
        self.ended_trials += 1
        if time.monotonic() - self._said > 60:
            self._said = time.monotonic()
            print(f"  {self.ended_trials} trials ended, driver at {_peak_megabytes():.0f} MB", flush=True)


def _waiting_trial(seconds: float, slots: int, folder: str) -> Any:
    """A trainable that sends plausible reports; defined inside, so that workers import neither torch nor study.

    The first trial of each slot waits until all slots have one. Trials end sooner here than 64 workers start, and Tune
    hands a worker that is free to a trial whose own worker is starting, which it then ends: the slots would never fill.
    """

    def work(config: dict[str, Any], data: Any, cpus: float, gpus: float) -> None:
        import json as text
        import pathlib
        import random
        import time as clock

        from ray import tune

        if config["number"] < slots:
            (pathlib.Path(folder) / str(config["number"])).touch()
            while len(list(pathlib.Path(folder).iterdir())) < slots:
                clock.sleep(1)
        rng = random.Random(config["number"])
        top, pause = rng.random(), seconds * rng.uniform(0.5, 1.5)
        for epoch in range(1, config["config"]["epochs"] + 1):
            clock.sleep(pause)
            accuracy = [top * (1 - 0.5**epoch), top * (1 - 0.5**epoch) + 0.01]
            names = ("train_loss", "train_accuracy", "reward", "baseline_error", "gradient_norm", "val_loss")
            metrics: dict[str, Any] = dict.fromkeys((*names, "val_accuracy"), accuracy)
            metrics |= {"epoch": epoch, "seconds": pause, "seeds": [0, 1], "diverged": [False, False]}
            metrics["sent"] = clock.time()
            tune.report({"result": text.dumps({"epoch": epoch, "metrics": metrics})})

    return work


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    """Run or read, and print."""
    parser = argparse.ArgumentParser(description="Does the driver hold? How much of a study is training?")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--reports", type=int, default=20)
    parser.add_argument("--slots", type=int, help="trials at a time (default 64; of a study: its most at once)")
    parser.add_argument("--seconds", type=float, default=1.0, help="between two reports of a trial (default 1)")
    parser.add_argument("--study", type=Path, help="run nothing; read this folder of a finished study, its study.db")
    flags = parser.parse_args()
    if flags.study is not None:
        stored = read_study(flags.study / "study.db")
        if stored is None or not stored.ended:
            parser.error(f"--study must be a folder with the study.db of a finished study; got {flags.study}")
        print(f"{stored.settings.study}: " + "\n".join(overhead(stored.trials, flags.slots)))
    else:
        flags.slots = flags.slots or 64
        print("\n".join(run(flags)))


def run(flags: argparse.Namespace) -> list[str]:
    """Run a study of waiting trials; returns its figures as lines of text."""
    space = search_space(Config(data="digits", task="translated", epochs=flags.reports))
    settings = StudySettings(
        study="driver", task="translated", data="digits", digest="0" * 64, design="search", epochs=flags.reports,
        seeds_per_trial=2, seed=0, space=space.to_dict(),
    )  # fmt: skip
    data: Any = {}  # no images: unpickling `SharedData` would import torch, 80 MB more for each of 64 workers
    with tempfile.TemporaryDirectory(prefix="ram-study-driver-") as root:
        record = Record.open(Path(root) / "driver", settings, total=flags.trials)
        asha = NeverStops(flags.reports, min_epochs=2)
        scheduler = StudyScheduler(record, space=space, storage=Storage.parse(root), callback=Quiet(), asha=asha)
        asked: list[float] = []
        ask = scheduler.next_job

        def timed() -> Any:
            began = time.monotonic()
            job = ask()
            asked.append(time.monotonic() - began)
            return job

        scheduler.next_job = timed  # type: ignore[method-assign]
        tracker = Tracker(record, f"sqlite:///{root}/mlflow.db", Provenance(settings={}, commit="-", dirty=True), {})
        trial = TrialResources(cpus=(os.cpu_count() or 1) / flags.slots, gpus=0)
        pool = Pool(trial=trial, max_concurrent=flags.slots)
        memory = _peak_megabytes()
        with ray_running(None):
            tracker.start()
            started = Path(root) / "started"
            started.mkdir()
            work = _waiting_trial(flags.seconds, min(flags.slots, flags.trials), str(started))
            run_trials(scheduler, data, pool, work=work)
            ended = time.monotonic()
            untracked = tracker.finish("finished", patience=60)
            behind = time.monotonic() - ended
        trials = list(record.trials.values())
        record.close()
    return [
        *([f"untracked: {untracked}"] if untracked else []),
        *_figures(flags, trials, asked),
        f"tracking was behind by           {behind:.1f} s when the last trial had ended",
        f"memory of the driver             {memory:.0f} MB at first, {_peak_megabytes():.0f} MB at most",
    ]


def _figures(flags: argparse.Namespace, trials: list[TrialRecord], asked: list[float]) -> list[str]:
    waits = [epoch.time / 1000 - epoch.metrics["sent"] for trial in trials for epoch in trial.epochs]
    begin, end = min(t.started for t in trials) / 1000, max(t.ended or 0 for t in trials) / 1000
    # The slots fill once: what comes before all of them have sent a report is Ray starting workers.
    full = sorted(t.epochs[0].time / 1000 for t in trials)[min(flags.slots, len(trials)) - 1]
    beyond = [_beyond_training(t) for t in trials if t.started / 1000 > full]
    epochs = sum(len(t.epochs) for t in trials)

    def quantiles(values: list[float]) -> str:
        if not values:
            return "-"
        at = [sorted(values)[min(len(values) - 1, int(len(values) * q))] for q in (0.5, 0.95, 0.99, 1.0)]
        return " / ".join(f"{1000 * v:.0f}" for v in at) + " ms (median / 95% / 99% / most)"

    return [
        f"{len(trials)} trials, {epochs} reports over {flags.slots} slots; of a slot one every {flags.seconds:g} s",
        f"all slots working after {full - begin:.0f} s; the rest took {end - full:.0f} s, "
        f"{(epochs - flags.slots) / max(end - full, 1e-9):.0f} reports/s "
        f"(slots that wait for nothing: {flags.slots / flags.seconds:.0f})",
        f"a report waited for its commit   {quantiles(waits)}",
        f"choosing a configuration took    {quantiles(asked)}",
        f"a trial cost beyond its waiting  {quantiles(beyond)}, {flags.reports} reports each",
    ]


def _beyond_training(trial: TrialRecord) -> float:
    """Seconds of an ended trial that its epochs did not take."""
    return (trial.ended or 0) / 1000 - trial.started / 1000 - sum(e.metrics["seconds"] for e in trial.epochs)


def overhead(trials: list[TrialRecord], slots: int | None) -> list[str]:
    """How the slot-seconds of a study were spent, as lines of text."""
    spans = [(t.started / 1000, t.ended / 1000) for t in trials if t.ended is not None]
    beyond = sorted(_beyond_training(t) for t in trials if t.ended is not None)
    slots = slots or max(sum(s <= start < e for s, e in spans) for start, _ in spans)  # the most trials at once
    length = max(e for _, e in spans) - min(s for s, _ in spans)
    busy, total = sum(e - s for s, e in spans), slots * length
    shares = (("training", busy - sum(beyond)), ("trials, not training", sum(beyond)), ("no trial", total - busy))
    return [
        f"{len(spans)} trials in {slots} slots over {length:.0f} s = {total:.0f} slot-seconds",
        *(f"{name:20}{seconds:8.0f} s  {seconds / total:6.1%}" for name, seconds in shares),
        f"a trial beyond its training: median {statistics.median(beyond):.2f} s, "
        f"95% {beyond[int(0.95 * (len(beyond) - 1))]:.2f} s (the first of each slot starts its worker)",
    ]


if __name__ == "__main__":
    main()
