"""Ray as the trials' place of work."""

from __future__ import annotations

import os
from typing import Any

from ramcore.config import Config
from study.checkpoints import open_folder
from study.designs import DEFAULT_SEEDS
from study.halving import default_halving
from study.pool import Pool, ray_running, run_trials
from study.progress import Progress
from study.record import Record, StudySettings
from study.searcher import Engine
from study.space import search_space

TRIALS, SLOTS = 16, 4


def waiting() -> Any:
    """A trial of one epoch that ends together with all others of its round; made here, as workers import no tests."""

    def work(config: dict[str, Any], data: Any, cpus: float, gpus: float) -> None:
        import json
        import os
        import time

        from ray import tune

        time.sleep(1 - time.time() % 1)
        metrics = {"epoch": 1, "seconds": 1.0, "seeds": [0, 1], "diverged": [False, False], "val_accuracy": [0.5, 0.5]}
        tune.report({"result": json.dumps({"epoch": 1, "metrics": metrics | {"worker": os.getpid()}})})

    return work


def test_trials_that_end_at_once_do_not_cost_their_workers(tmp_path):
    space = search_space(Config(data="digits", epochs=1))
    settings = StudySettings(
        study="s", task="translated", data="digits", digest="0" * 64, design="search", epochs=1,
        seeds_per_trial=DEFAULT_SEEDS["search"], seed=0, space=space.describe(),
    )  # fmt: skip
    with Record.open(tmp_path / "s", settings, total=TRIALS) as record:
        engine = Engine(
            record, space=space, halving=default_halving(1), folder=open_folder(str(tmp_path), "s"),
            storage=str(tmp_path), watcher=Progress(study="s", epochs=1),
        )  # fmt: skip
        cpus = len(os.sched_getaffinity(0)) / SLOTS
        with ray_running(None):
            pool = Pool(cpus_per_trial=cpus, gpus_per_trial=0, max_concurrent=SLOTS)
            run_trials(engine, {}, pool, work=waiting())  # type: ignore[arg-type]
        assert engine.finished and engine.error is None
        workers = {trial.epochs[0].metrics["worker"] for trial in record.trials.values()}
        assert len(workers) <= SLOTS
