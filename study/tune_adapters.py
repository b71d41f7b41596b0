"""Ray Tune's interfaces to a `StudyScheduler`.

Tune starts trials, restarts them when a worker dies, and carries reports. It keeps nothing that a study needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from study.ray_internals import forget_worker_deaths, keep_idle_workers, lacks_memory, last_message
from study.scheduler import StudyScheduler, guarded

MAX_WORKER_DEATHS = 5  # of one trial; a sixth makes it a failed trial (its configuration may be what kills workers)


class _Unpickled:
    """Leaves the study's own objects out when Tune pickles an adapter into its experiment state, which is not used."""

    _scheduler: StudyScheduler

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_scheduler", "_check")}


class TuneSearcher(_Unpickled, Searcher):
    """Gives Tune the next job where Tune asks for a configuration."""

    def __init__(self, scheduler: StudyScheduler) -> None:
        super().__init__(metric="training_iteration", mode="max")  # Tune wants a metric; it is not used
        self._scheduler = scheduler

    def suggest(self, trial_id: str) -> Any:
        """A job as plain data; FINISHED when no more will come."""
        with guarded(self._scheduler):
            if job := self._scheduler.next_job():
                return asdict(job)
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Does nothing: the end of a trial is recorded where it is decided."""

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the record is the only state."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing: the record is the only state."""


class TuneScheduler(_Unpickled, FIFOScheduler):
    """Gives every report to the study's scheduler, also the last one of a trial, which Tune hides from searchers."""

    def __init__(self, scheduler: StudyScheduler, slots: int) -> None:
        super().__init__()
        self._scheduler, self._slots = scheduler, slots
        self._keeps_workers = False
        self._release_workers: Callable[[], None] | None = None
        self._epochs_at_death: dict[int, int] = {}  # by trial number: recorded epochs when its worker last died
        self.worker_died = False
        self.memory_lack: str | None = None  # Ray's line about a worker that it killed for lack of memory

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Have idle workers kept for the next trials, one for each slot."""
        super().on_trial_add(tune_controller, trial)
        if not self._keeps_workers:
            self._release_workers = keep_idle_workers(tune_controller, trial, self._slots)
            self._keeps_workers = True

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Choose as FIFO does. Once no trial is left to start, idle workers end, so that a cluster can shrink."""
        if self._release_workers is not None and self._scheduler.nothing_to_start:
            self._release_workers()
            self._release_workers = None
        return super().choose_trial_to_run(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Record a report and decide whether the trial goes on."""
        with guarded(self._scheduler):
            if "result" in result and not self._scheduler.report(trial.config["number"], json.loads(result["result"])):
                return TrialScheduler.STOP
        return TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Start a trial again whose worker died or never started, on another node if need be; fail it at last."""
        with guarded(self._scheduler):
            number, message = trial.config["number"], last_message(trial)
            self.worker_died = True
            if lacks_memory(message):
                self.memory_lack = message
            tune_restarts = trial.status == Trial.ERROR  # Tune has stopped it by now, and has queued it again
            epochs = len(self._scheduler.record.trials[number].epochs)
            if epochs > self._epochs_at_death.get(number, 0):  # it makes progress, so it does not kill its workers
                forget_worker_deaths(trial)
            self._epochs_at_death[number] = epochs
            if not trial.should_recover():
                error = f"its worker died {trial.num_failures} times; {message}"
                self._scheduler.report(number, {"error": error})
                return
            # Tune does not restart a trial that had not begun, nor one whose worker died often, whatever its progress.
            if not tune_restarts:
                self._scheduler.requeue(number)
            self._scheduler.callback.note(f"trial {number:04d}: its worker died; it is started again")


class TuneStopper(_Unpickled, tune.Stopper):
    """Ends Tune's experiment when the study stops: on a signal, a spent budget or an error; or when Ray broke down."""

    def __init__(self, scheduler: StudyScheduler, check: Callable[[], None]) -> None:
        """`check` raises the error that is to end the experiment, if there is one."""
        self._scheduler, self._check = scheduler, check

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stops no single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether to stop everything. Tune asks in each step."""
        self._check()
        return self._scheduler.should_stop()
