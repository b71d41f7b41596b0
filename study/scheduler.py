"""Decides which trial comes next and when one ends. Knows nothing of Ray: see `study.tune_adapters`."""

from __future__ import annotations

import logging
import math
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ramcore.space import Space
from study import cancel
from study.aim import Aimed
from study.asha import ASHA
from study.checkpoints import Checkpoints
from study.designs import STOPPABLE, TrialSpec, published, search_origins
from study.faults import fault_point
from study.record import Record, RecordLost, State, TrialRecord
from study.search_space import configuration
from study.sobol import SobolSequence, fixed_point
from study.storage import Storage
from study.tpe import FeasibleTPE
from study.trainable import Job

logger = logging.getLogger(__name__)

SAME_FAILURES = 3  # this many first trials that fail alike stop the study: it is the program, not the configuration
_TIDIED_AGAIN = 20  # ended trials whose checkpoints are tidied again when a study is continued


class Callback(Protocol):
    """Is told what happens in a study (see `study.display`)."""

    def started(self, trial: TrialRecord) -> None: ...
    def reported(self, trial: TrialRecord) -> None: ...
    def ended(self, trial: TrialRecord) -> None: ...
    def note(self, text: str) -> None: ...


class StudyScheduler:
    """Decides which trial comes next and which one ends. Its whole state follows from the record."""

    def __init__(
        self, record: Record, *, space: Space | None, storage: Storage, callback: Callback, asha: ASHA | None = None
    ) -> None:
        """Continue from what the record holds.

        `space` is None for a fixed design whose trials do not lie in one. `asha` must not have seen a trial.
        """
        self.record, self.space, self.storage = record, space, storage
        self.folder = storage.folder(record.settings.study)
        self.callback = callback
        self.stopping: str | None = None  # why no more trials are trained now
        self.broken: str | None = None  # why the study should not be continued as it is: a programming error
        self.error: BaseException | None = None  # the error of the driver itself
        self.deadline: Callable[[], str | None] = lambda: None  # says why to stop, before the study goes on
        self._first_ends: list[str] = []  # of this run; an error's text, or the trial's own name
        self._asha = ASHA(record.settings.epochs) if asha is None else asha
        if record.rows is None:  # a search
            assert space is not None
            self._published = published(space)
            self._sobol = SobolSequence(space, record.settings.seed)
            self._tpe = FeasibleTPE(record, space)
            asked_at = [point.at for point in record.asked]
            self._aimed = Aimed(record, space)
            share = record.settings.sobol_share
            self.origins = search_origins(record.totals, len(self._published), share, asked_at, record.aims)
        else:
            self.origins = [spec.origin for spec in record.rows[: record.totals[-1]]]
        self.total = len(self.origins)  # trials that the study was asked for
        self._interrupted: list[int] = []  # running trials without a worker; the last one is continued first
        self._crowded: set[int] = set()  # running trials that ran out of a shared GPU's memory; they wait
        self.requeue_running()
        self._replay_rungs()
        # A crash may have come between a trial's end and its tidying.
        ended = (trial for trial in record.trials.values() if trial.ended is not None)
        for trial in sorted(ended, key=lambda trial: trial.ended or 0)[-_TIDIED_AGAIN:]:
            self._tidy(trial)

    def _replay_rungs(self) -> None:
        """Bring early stopping to the state that the recorded epochs led to."""
        trials, rungs = self.record.trials, self._asha.rungs
        reached = [(t.epochs[r - 1].time, n, r) for n, t in trials.items() for r in rungs if r <= len(t.epochs)]
        for _, number, rung in sorted(reached):
            self._goes_on(trials[number], rung)

    @property
    def finished(self) -> bool:
        """Whether all trials asked for have ended."""
        trials = self.record.trials.values()
        return len(trials) >= self.total and all(t.state != "running" for t in trials)

    @property
    def nothing_to_start(self) -> bool:
        """Whether no trial is left to start, or none may be started any more."""
        return self.stopping is not None or (not self._interrupted and len(self.record.trials) >= self.total)

    def stop(self, reason: str) -> None:
        """Stop training. Running trials stay running in the record, to be continued."""
        self.stopping = self.stopping or reason

    def should_stop(self) -> bool:
        """Whether to stop now."""
        if self.stopping is None and (reason := self.deadline()):
            self.stop(reason)
        return self.stopping is not None

    def requeue_running(self) -> None:
        """Have every running trial continued before a new one starts. No worker may be training one of them."""
        running = {number for number, trial in self.record.trials.items() if trial.state == "running"}
        self._interrupted = sorted(running - self._crowded, reverse=True)

    def requeue(self, number: int) -> None:
        """Have a trial that lost its worker continued by another one."""
        if self.record.trials[number].state == "running" and number not in self._interrupted:
            self._interrupted.append(number)

    def retry_crowded(self) -> bool:
        """Have the trials continued that ran out of a shared GPU's memory; returns whether there are any.

        They must have a GPU each from now on.
        """
        self._interrupted += sorted(self._crowded, reverse=True)
        found, self._crowded = bool(self._crowded), set()
        return found

    # The next trial.

    def next_job(self) -> Job | None:
        """The next trial to train: an interrupted one, else a new one; None if there is none to start."""
        if self.should_stop() or self.nothing_to_start:
            return None
        if self._interrupted:
            trial = self.record.trials[self._interrupted.pop()]
            self.callback.note(f"trial {trial.number:04d} is taken up again ({len(trial.epochs)} epochs recorded)")
        else:
            number = len(self.record.trials)
            spec = self._suggest(number) if self.record.rows is None else self.record.rows[number]
            trial = self.record.start(spec, self.space if self._lies_in_space(spec) else None)
            assert trial.number == number, "only the driver adds trials"
        self.callback.started(trial)
        fault_point("scheduler.started")
        return Job(
            number=trial.number,
            config=trial.spec.config,
            seeds=trial.spec.seeds,
            test=trial.spec.tested,
            held=len(trial.epochs),
            storage=str(self.storage),
            study=self.record.settings.study,
        )

    def _lies_in_space(self, spec: TrialSpec) -> bool:
        space, config = self.space, spec.config
        return (
            space is not None
            and config.model == space.fixed.get("model", config.model)
            and space.contains({n: getattr(config, n) for n in space.names})
        )

    def _suggest(self, number: int) -> TrialSpec:
        """The trial of a number in a search."""
        assert self.space is not None
        origin = self.origins[number]
        asked = [(point.text, point.values) for point in self.record.asked]
        row, values = fixed_point(self.origins, number, self._published, asked, self._sobol)
        if values is None:
            values = (self._aimed if origin == "aimed" else self._tpe).suggest(number)
        config, count = configuration(self.space, values), self.record.settings.seeds_per_trial
        # A configuration that was tried has other seeds now: on the same ones, training would repeat itself.
        first = count * sum(trial.spec.config == config for trial in self.record.trials.values())
        return TrialSpec(config=config, origin=origin, row=row, seeds=tuple(range(first, first + count)))

    # The reports of workers.

    def report(self, number: int, result: dict[str, Any]) -> bool:
        """Take in a report of `run_trial`, or an {"error": ...} of its worker. Returns whether the trial goes on."""
        trial = self.record.trials[number]
        for note in result.get("notes", ()):
            self.callback.note(note)
        if trial.state != "running":
            return False
        if "interrupted" in result:
            self.stop(result["interrupted"])
            return False
        if "out_of_memory" in result:
            self._crowded.add(number)
            self.callback.note(f"trial {number:04d} waits for a whole GPU, after the others: {result['out_of_memory']}")
            return False
        if "error" in result:
            self._end(trial, "failed", f"error: {result['error']}")
            logger.info("trial %04d failed:\n%s", number, result.get("details", ""))
            return False
        epoch = result["epoch"]
        newest = self.record.add_epoch(number, epoch, result["metrics"]) or epoch == len(trial.epochs)
        goes_on = self._goes_on(trial, epoch)
        self.callback.reported(trial)
        if newest:
            fault_point("scheduler.decision.before")
            self._decide(trial, epoch, result, goes_on)
            fault_point("scheduler.decision.after")
        return trial.state == "running"

    def _decide(self, trial: TrialRecord, epoch: int, result: dict[str, Any], goes_on: bool) -> None:
        """End a trial after its newest epoch if it diverged, is complete or is stopped early."""
        metrics = result["metrics"]
        if any(metrics["diverged"]):
            seeds = [s for s, bad in zip(metrics["seeds"], metrics["diverged"], strict=True) if bad]
            which = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            self._end(trial, "failed", f"diverged: {which} at epoch {epoch}", diverged=True)
        elif epoch >= trial.spec.config.epochs:
            self._end(trial, "complete", "finished", test=result.get("test"))
        elif trial.spec.origin in STOPPABLE and not goes_on:
            self._end(trial, "pruned", f"stopped by successive halving at epoch {epoch}")
        elif cancel.is_asked(self.folder, trial.number):
            self._end(trial, "pruned", f"cancelled by the user at epoch {epoch}")

    def _goes_on(self, trial: TrialRecord, epoch: int) -> bool:
        """Whether ASHA lets a trial go on after an epoch; a diverged trial does not compete."""
        value = trial.epochs[epoch - 1].value
        return epoch not in self._asha.rungs or math.isnan(value) or self._asha.reach(trial.number, epoch, value)

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
        # Numbers in a message (sizes, addresses) may differ from one configuration to the next.
        self._first_ends.append(re.sub(r"\d+", "", reason) if reason.startswith("error: ") else f"trial {trial.number}")
        if len(self._first_ends) == SAME_FAILURES and len(set(self._first_ends)) == 1:
            self.broken = reason
            self.stop(f"the first {SAME_FAILURES} trials failed alike: {reason}")

    def _tidy(self, trial: TrialRecord) -> None:
        """Delete the checkpoints that an ended trial no longer needs."""
        try:
            Checkpoints(self.folder, trial.number).drop_epochs(keep_best=trial.state == "complete")
            cancel.forget(self.folder, trial.number)
        except OSError as error:  # storage out of reach: the next run tidies again
            logger.warning("checkpoints of trial %04d could not be tidied: %s", trial.number, error)


@contextmanager
def guarded(scheduler: StudyScheduler) -> Iterator[None]:
    """Stop the study if the driver's own code fails. Tune would log the error and continue."""
    try:
        yield
    except Exception as error:
        scheduler.error = scheduler.error or error
        if not isinstance(error, RecordLost):
            logger.debug("%s", traceback.format_exc())
        scheduler.stop(str(error))
