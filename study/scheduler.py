"""Tune <-> the record: which trial is next, and what follows from a report.

`StudyScheduler` decides, and knows nothing of Ray. `TuneSearcher`, `TuneScheduler` and `TuneStopper` hand it Tune's
questions: Tune starts trials, restarts them where a worker died, and carries reports; it keeps nothing that matters.
"""

from __future__ import annotations

import json
import logging
import math
import re
import traceback
from collections.abc import Callable, Container
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import optuna
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ramcore.space import Space, Values
from study.asha import Halving, Ladder
from study.checkpoints import Checkpoints, Folder
from study.designs import TrialSpec, published, search_origins
from study.faults import fault_point
from study.record import OPTUNA_STATE, Record, RecordLost, State, TrialRecord, distributions
from study.search_space import configuration
from study.sobol import SobolSequence
from study.trainable import Job

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

SAME_FAILURES = 3  # this many first trials that fail alike stop the study: it is the program, not the configuration
MAX_WORKER_DEATHS = 5  # of one trial; a sixth makes it a failed trial (its configuration may be what kills workers)
_TIDIED_AGAIN = 20  # ended trials whose leftovers are looked for when a study is continued
_RESAMPLES = 20  # tries of TPE for a feasible point before the last one is clamped


class Callback(Protocol):
    """Whoever watches the study (see `study.display`)."""

    def started(self, trial: TrialRecord) -> None: ...
    def reported(self, trial: TrialRecord) -> None: ...
    def ended(self, trial: TrialRecord) -> None: ...
    def note(self, text: str) -> None: ...


class FeasibleTPE(TPESampler):
    """Optuna's TPE as a function of the record and a trial number, restricted to feasible points.

    Optuna's own way is to create a trial and then to store one parameter after another, so a crash leaves trials
    without a configuration. Here the point comes first and the trial is created whole. And it is seeded by number, so
    a study that was killed suggests what it would have suggested.
    """

    def __init__(self, space: Space, seed: int, number: int) -> None:
        # constant_liar: running trials count as bad, so parallel suggestions spread.
        own_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
        super().__init__(seed=own_seed, multivariate=True, constant_liar=True, n_startup_trials=0)
        self._space = space
        self._number = number

    def suggest(self, study: Any) -> Values:
        """A feasible point: resampled while infeasible, clamped at last.

        Args:
            study: an Optuna study, or `Seen`.
        """
        coming = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
        coming.number = self._number
        values: Values = {}
        for _ in range(_RESAMPLES):
            # What `sample_relative` calls, without its note in the storage about a trial that does not exist yet.
            values = self._sample(study, coming, distributions(self._space))
            if self._space.feasible(values):
                return values
        return self._space.clamped(values)


class Seen:
    """A record as TPE asks an Optuna study for it, from memory: read from the database, the trials that are running
    would take longer than the sampling.
    """

    directions: ClassVar = [StudyDirection.MAXIMIZE]
    direction: ClassVar = StudyDirection.MAXIMIZE

    def __init__(self, record: Record, space: Space) -> None:
        self._record = record
        self._distributions = distributions(space)
        self._ended: dict[int, FrozenTrial] = {}

    def _is_multi_objective(self) -> bool:
        return False

    def _get_trials(self, deepcopy: bool, states: Container[TrialState], use_cache: bool) -> list[FrozenTrial]:
        return [t for t in map(self._frozen, self._record.trials.values()) if t.state in states]

    def _frozen(self, trial: TrialRecord) -> FrozenTrial:
        if trial.number in self._ended:
            return self._ended[trial.number]
        values = {epoch: e.value for epoch, e in enumerate(trial.epochs, start=1) if math.isfinite(e.value)}
        frozen = FrozenTrial(
            number=trial.number,
            trial_id=trial.trial_id,
            state=OPTUNA_STATE[trial.state],
            value=trial.value,
            params={name: getattr(trial.spec.config, name) for name in self._distributions},
            distributions=self._distributions,
            intermediate_values=values,
            user_attrs={},
            system_attrs={},
            datetime_start=datetime.fromtimestamp(trial.started / 1000),
            datetime_complete=None if trial.ended is None else datetime.fromtimestamp(trial.ended / 1000),
        )
        if trial.state != "running":
            self._ended[trial.number] = frozen
        return frozen


class StudyScheduler:
    """Decides which trial comes next and which one ends. All its state is the record's."""

    def __init__(
        self, record: Record, *, space: Space | None, halving: Halving, folder: Folder, storage: str, callback: Callback
    ) -> None:
        """Take a record up.

        Args:
            record: open.
            space: of a search; a fixed design's rows are in the record, and it needs none unless they lie in the space.
            halving: early stopping of the origins that may be stopped.
            folder: of the study, for the checkpoints of ended trials.
            storage: where `folder` is, for the workers.
            callback: is told what happens.
        """
        self.record = record
        self.space = space
        self.folder = folder
        self.storage = storage
        self.callback = callback
        self.stopping: str | None = None  # why no more trials are to be trained now
        self.broken: str | None = None  # why the study should not be continued as it is: a programming error
        self.error: BaseException | None = None  # what went wrong in the driver itself
        self._deadline: Callable[[], str | None] = lambda: None
        self._first_ends: list[str] = []  # of this run; an error's text, or the trial's own name
        self._ladder = Ladder(halving, record.settings.epochs)
        self._published = published(space) if space is not None else []
        self._sobol = SobolSequence(space, record.settings.seed) if space is not None else None
        self._seen = Seen(record, space) if space is not None else None
        if record.rows is None:
            self.origins: list[str] = search_origins(record.totals, len(self._published), record.settings.sobol_share)
        else:
            self.origins = [spec.origin for spec in record.rows[: record.totals[-1]]]
        self._lost: list[int] = []
        self.take_up_lost()
        reached = [
            (trial.epochs[rung - 1].time, trial.number, rung)
            for trial in record.trials.values()
            for rung in self._ladder.rungs
            if rung <= len(trial.epochs)
        ]
        for _, number, rung in sorted(reached):
            self._goes_on(record.trials[number], rung)
        # A crash may have come between a trial's end and its tidying; only the latest ones can be concerned.
        ended = sorted((t for t in record.trials.values() if t.ended is not None), key=lambda t: t.ended or 0)
        for trial in ended[-_TIDIED_AGAIN:]:
            self._tidy(trial)

    @property
    def total(self) -> int:
        """Trials the study is to have."""
        return len(self.origins)

    @property
    def finished(self) -> bool:
        """Whether every trial asked for has ended."""
        trials = self.record.trials.values()
        return len(trials) >= self.total and all(t.state != "running" for t in trials)

    @property
    def handed_out(self) -> bool:
        """Whether no trial is left to start, or none is to be started any more."""
        return self.stopping is not None or (not self._lost and len(self.record.trials) >= self.total)

    def stop_when(self, deadline: Callable[[], str | None]) -> None:
        """Ask this before going on: it returns why to stop, or None."""
        self._deadline = deadline

    def stop(self, reason: str) -> None:
        """Train no further; running trials stay running in the record, to be continued."""
        self.stopping = self.stopping or reason

    def should_stop(self) -> bool:
        """Whether to stop now."""
        if self.stopping is None and (reason := self._deadline()):
            self.stop(reason)
        return self.stopping is not None

    def take_up_lost(self) -> None:
        """Hand out again, first of all, what the record calls running: nobody else holds the record, so it was lost."""
        self._lost = sorted((t.number for t in self.record.trials.values() if t.state == "running"), reverse=True)

    def hand_out_again(self, number: int) -> None:
        """Hand a trial out once more: nobody works on it."""
        if self.record.trials[number].state == "running" and number not in self._lost:
            self._lost.append(number)

    # What is next.

    def next_job(self) -> Job | None:
        """The next trial to train: a lost one first, else a new one; None when there is none to start."""
        if self.should_stop():
            return None
        if self._lost:
            trial = self.record.trials[self._lost.pop()]
            self.callback.note(f"trial {trial.number:04d} is taken up again ({len(trial.epochs)} epochs recorded)")
        else:
            number = len(self.record.trials)
            if number >= self.total:
                return None
            spec = self._spec(number)
            inside = self.space is not None and spec.config.is_recurrent and self._in_space(spec)
            trial = self.record.start(spec, self.space if inside else None)
            assert trial.number == number, "only the driver adds trials"
        self.callback.started(trial)
        fault_point("scheduler.started")
        return Job(
            number=trial.number,
            config=trial.spec.config,
            seeds=trial.spec.seeds,
            test=trial.spec.tested,
            held=len(trial.epochs),
            storage=self.storage,
            study=self.record.settings.study,
        )

    def _in_space(self, spec: TrialSpec) -> bool:
        assert self.space is not None
        return self.space.contains({name: getattr(spec.config, name) for name in self.space.names})

    def _spec(self, number: int) -> TrialSpec:
        if self.record.rows is not None:
            return self.record.rows[number]
        assert self.space is not None
        origin = self.origins[number]
        before = self.origins[:number].count(origin)
        seed = self.record.settings.seed
        row = ""
        if origin == "published":
            row, values = self._published[before]
        elif origin == "sobol":
            assert self._sobol is not None
            values = self._sobol[before]
        else:
            values = FeasibleTPE(self.space, seed, number).suggest(self._seen)
        seeds = tuple(range(self.record.settings.seeds_per_trial))
        return TrialSpec(config=configuration(self.space, values), origin=origin, row=row, seeds=seeds)

    # What follows from a report.

    def report(self, number: int, result: dict[str, Any]) -> bool:
        """Take a worker's report in (see `run_trial`). Returns whether the trial goes on."""
        trial = self.record.trials[number]
        if trial.state != "running":
            return False
        if "interrupted" in result:
            self.stop(result["interrupted"])
            return False
        if "error" in result:
            self._end(trial, "failed", f"error: {result['error']}")
            logger.info("trial %04d failed:\n%s", number, result.get("details", ""))
            return False
        epoch, metrics = result["epoch"], result["metrics"]
        newest = self.record.add_epoch(number, epoch, metrics) or epoch == len(trial.epochs)
        goes_on = self._goes_on(trial, epoch)
        self.callback.reported(trial)
        if not newest:
            return True
        fault_point("scheduler.decision.before")
        if any(metrics["diverged"]):
            seeds = [s for s, bad in zip(metrics["seeds"], metrics["diverged"], strict=True) if bad]
            which = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            self._end(trial, "failed", f"diverged: {which} at epoch {epoch}", diverged=True)
        elif epoch >= trial.spec.config.epochs:
            self._end(trial, "complete", "finished", test=result.get("test"))
        elif trial.spec.stoppable and not goes_on:
            self._end(trial, "pruned", f"stopped by successive halving at epoch {epoch}")
        fault_point("scheduler.decision.after")
        return trial.state == "running"

    def worker_lost(self, number: int, message: str) -> None:
        """A trial's workers died more often than is bearable."""
        trial = self.record.trials[number]
        if trial.state == "running":
            self._end(trial, "failed", f"error: {message}")

    def _goes_on(self, trial: TrialRecord, epoch: int) -> bool:
        """Whether early stopping would let a trial go on after an epoch; a diverged one is no competitor."""
        value = trial.epochs[epoch - 1].value
        if epoch not in self._ladder.rungs or value != value:
            return True
        return self._ladder.reach(trial.number, epoch, value)

    def _end(
        self,
        trial: TrialRecord,
        state: State,
        reason: str,
        *,
        test: dict[str, Any] | None = None,
        diverged: bool = False,
    ) -> None:
        self.record.end(trial.number, state, reason, test=test, diverged=diverged)
        self._tidy(trial)
        self.callback.ended(trial)
        if len(self._first_ends) < SAME_FAILURES:
            # Figures in a message (sizes, addresses) may differ from one configuration to the next.
            self._first_ends.append(
                re.sub(r"\d+", "", reason) if reason.startswith("error: ") else f"trial {trial.number}"
            )
            if len(self._first_ends) == SAME_FAILURES and len(set(self._first_ends)) == 1:
                self.broken = reason
                self.stop(f"the first {SAME_FAILURES} trials failed alike: {reason}")

    def _tidy(self, trial: TrialRecord) -> None:
        try:
            Checkpoints(self.folder, trial.number).drop_epochs(keep_best=trial.state == "complete")
        except OSError as error:  # storage out of reach: the next run looks again
            logger.warning("checkpoints of trial %04d could not be tidied: %s", trial.number, error)


# Tune's side.


@contextmanager
def guarded(scheduler: StudyScheduler) -> Iterator[None]:
    """Stop the study where the driver itself fails; Tune would log the error and go on without us."""
    try:
        yield
    except Exception as error:
        scheduler.error = scheduler.error or error
        if not isinstance(error, RecordLost):
            logger.debug("%s", traceback.format_exc())
        scheduler.stop(str(error))


class _Unsaved:
    """Tune pickles what it is given into its own experiment state, which nobody reads: the scheduler stays out of it."""

    _scheduler: StudyScheduler

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_scheduler"}


class TuneSearcher(_Unsaved, Searcher):
    """Answers Tune's question for a configuration with a job."""

    def __init__(self, scheduler: StudyScheduler) -> None:
        super().__init__(metric="training_iteration", mode="max")  # Tune wants one; it is not looked at
        self._scheduler = scheduler

    def suggest(self, trial_id: str) -> Any:
        """A job as plain data; FINISHED when no more will come."""
        job = None
        with guarded(self._scheduler):
            job = self._scheduler.next_job()
        return Searcher.FINISHED if job is None else job.to_dict()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: an end is recorded where it is decided."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the record is the only state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""


class TuneScheduler(_Unsaved, FIFOScheduler):
    """Hands every report to the scheduler, also the one after which a trial stops (which Tune hides from searchers)."""

    def __init__(self, scheduler: StudyScheduler, slots: int) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._slots = slots
        self._release: Callable[[], None] | None = None  # takes back what `on_trial_add` did, once
        self._epochs_at_death: dict[int, int] = {}  # of each trial whose worker died, at the last time
        self._keeps_workers = False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Have Tune keep every idle worker for the next trial.

        By itself it keeps one: of two trials that end at once the second one's worker would be ended, and another
        started for seconds. Ray has no setting for it, so this reaches inside; without effect should Ray change.
        """
        super().on_trial_add(tune_controller, trial)
        if not self._keeps_workers:
            controller = getattr(tune_controller, "_tune_controller", tune_controller)
            if (cache := getattr(controller, "_actor_cache", None)) is not None:
                cache.increase_max(trial.placement_group_factory, by=self._slots)
                self._release = partial(cache.decrease_max, trial.placement_group_factory, by=self._slots)
            self._keeps_workers = True

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """As ever; once nothing is left to hand out, idle workers go, and with them the machines of a cluster."""
        if self._release is not None and self._scheduler.handed_out:
            self._release()
            self._release = None
        return super().choose_trial_to_run(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Record, decide."""
        goes_on = True
        with guarded(self._scheduler):
            if "result" in result:
                goes_on = self._scheduler.report(trial.config["number"], json.loads(result["result"]))
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Its worker died, or never came up: it is tried again, on another node if need be, up to a point."""
        with guarded(self._scheduler):
            number = trial.config["number"]
            by_tune = trial.status == Trial.ERROR  # it has been stopped by now, and is queued again
            epochs = len(self._scheduler.record.trials[number].epochs)
            if epochs > self._epochs_at_death.get(number, 0):  # it comes on, so it is not what kills workers
                trial.run_metadata.num_failures = 1
            self._epochs_at_death[number] = epochs
            if not trial.should_recover():
                self._scheduler.worker_lost(number, f"its worker died {trial.num_failures} times; {_last_line(trial)}")
                return
            if not by_tune:  # Tune gives up what had not begun, and what died often however far it came
                self._scheduler.hand_out_again(number)
            self._scheduler.callback.note(f"trial {number:04d}: its worker died; it is started again")


def _last_line(trial: Any) -> str:
    """What Ray said last about a trial's death."""
    path = trial.error_file
    lines = Path(path).read_text().split("\n") if path and Path(path).is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    telling = [line for line in said if "killed due to" in line]  # lack of memory, on which Ray has a page to say
    return (telling or said or ["no message"])[-1][:300]


class TuneStopper(_Unsaved, tune.Stopper):
    """Lets signals, budgets and errors end the experiment between two reports."""

    def __init__(self, scheduler: StudyScheduler) -> None:
        self._scheduler = scheduler

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped here."""
        return False

    def stop_all(self) -> bool:
        """Whether to stop everything."""
        return self._scheduler.should_stop()
