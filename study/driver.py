"""One run of a study: check the machines, open the record, train the trials with Ray, report the results.

Importing this module imports torch, Ray and MLflow, so `study.run` does it once the flags are checked.

How a study continues after kill -9: `prepare` reads its settings from the record, `StudyScheduler` queues the trials
that the record calls running and replays the ASHA rungs, and a worker loads its trial's checkpoint by number.
"""

from __future__ import annotations

import platform
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ramcore.errors import UserError, say, show
from ramcore.private import without_secrets
from study import best, cluster, gpus, pool, results, schema, tracking
from study.designs import DESIGNS
from study.display import Display
from study.dry_run import dry_run_lines, planned_configurations
from study.flags import (
    BROKEN,
    DONE,
    SOME_FAILED,
    STOPPED,
    UNTRACKED,
    USAGE,
    Flags,
    command,
    signals_caught,
    stopped,
    working_tree,
)
from study.moved import tracking_uri
from study.prepare import Prepared, held_out
from study.probe import versions
from study.record import Record, RecordGone, RecordLost, open_record
from study.scheduler import StudyScheduler
from study.sharing import CPU, Sharing
from study.status import status
from study.trainable import SharedData

_PACKAGES = ("torch", "ray", "optuna", "mlflow", "numpy", "scipy", "ram-study")  # the record holds their versions
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FAILURES_SHOWN = 10
_BREAKDOWNS = 3  # a run gives up after this many breakdowns of Ray in a row, without an epoch between them


def run_prepared(flags: Flags, prepared: Prepared) -> int:
    """Run or continue a prepared study, or print what it would do; returns the exit code.

    Raises UserError if the machines, the tracking server or the record cannot be used: nothing was started then.
    Raises RecordLost if the record cannot be opened.
    """
    uri = tracking_uri(flags.tracking_uri)
    planned = planned_configurations(prepared)
    trials = min(prepared.trials_left, flags.max_concurrent or 2**31)  # that could run at a time
    growth = cluster.Growth.declared() if flags.address is not None else None
    if flags.address is None:
        local = gpus.Local(flags, planned, trials, pool.local_resources())
        sharing, used = local.sharing, local.used(SharedData.of(prepared.data))
    else:
        present = _nodes(flags.address) if flags.gpus_per_trial is None and growth is None and trials else []
        sharing = gpus.of_cluster(flags, growth, present, planned)
        used = nullcontext(sharing)

    def pool_of(sharing: Sharing) -> pool.Pool:
        on_cluster = flags.address is not None
        trial = pool.trial_resources(flags.cpus_per_trial, sharing.gpus, planned, on_cluster=on_cluster)
        return pool.Pool(trial=trial, max_concurrent=flags.max_concurrent, on_cluster=on_cluster, growth=growth)

    ray_pool = pool_of(sharing)
    if flags.address is None:
        pool.count_slots(pool.local_resources(), ray_pool)
    if flags.dry_run:
        with used as sharing, status("timing an epoch"):
            lines = dry_run_lines(flags, prepared, uri, pool_of(sharing), sharing)
        return DONE if show(without_secrets("\n".join(lines))) else USAGE
    check = cluster.Check(prepared.storage)
    if flags.address is not None:
        cluster.check_lasting(flags.storage, uri)
        _check_cluster(flags.address, prepared, ray_pool, check)
    with status(f"checking MLflow ({without_secrets(uri)})"):
        tracking.check_server(uri, known=prepared.known is not None)
    with (
        open_record(
            prepared.storage,
            prepared.settings,
            total=prepared.total,
            rows=prepared.rows,
            asked=prepared.asked,
            taken=prepared.taken,
            aim=prepared.aim,
            say=say,
        ) as record,
        used as sharing,
    ):
        if record.taken:
            say(f"learns {record.taken.summary(record.settings.epochs)}")
        return _Run(flags, prepared, record, pool_of(sharing), uri, check, sharing).run()


def _nodes(address: str) -> list[cluster.Node]:
    with pool.ray_running(address):
        return cluster.nodes()


def _check_cluster(address: str, prepared: Prepared, ray_pool: pool.Pool, check: cluster.Check) -> None:
    """Wait for workers and check every node, before the study starts. Raises UserError."""
    trials = min(prepared.trials_left, ray_pool.max_concurrent or 2**31)
    if trials < 1:
        return
    growth = ray_pool.growth
    others = not prepared.storage.is_remote and growth is not None and growth.workers > 0
    with pool.ray_running(address):
        present = cluster.wait_for_workers(ray_pool.trial, growth, trials, others=others, say=say)
        if problem := check(present):
            raise UserError(problem)


class _Run:
    """One run of the command, over an open record."""

    def __init__(
        self,
        flags: Flags,
        prepared: Prepared,
        record: Record,
        ray_pool: pool.Pool,
        uri: str,
        check: cluster.Check,
        sharing: Sharing = CPU,
    ) -> None:
        settings = record.settings
        self.flags = flags
        self.prepared = prepared
        self.record = record
        self.ray_pool = ray_pool
        self.uri = uri  # of MLflow
        self.check = check
        self.sharing = sharing
        self.display = Display(study=settings.study, epochs=settings.epochs, device=str(sharing))
        self.scheduler = StudyScheduler(record, space=prepared.space, storage=prepared.storage, callback=self.display)
        self.tracker: tracking.Tracker | None = None  # until Ray has started
        self.devices = pool.local_resources() if flags.address is None else {}
        self.machine_hours = cluster.MachineHours(machines=1)
        self.started = time.monotonic()
        self.signals: list[int] = []  # received, in order
        self.breakdowns = 0  # of Ray, since the last epoch
        self.trained = False  # whether Ray got as far as training, this time

    def run(self) -> int:
        """Train, conclude and report; returns the exit code. Raises UserError if Ray could not be joined at all."""
        with signals_caught(*_SIGNALS, answer=self.display.interrupted) as self.signals, self.display:
            self.scheduler.deadline = self._reason_to_stop
            self.display.resume(list(self.record.trials.values()), self.scheduler.origins)
            self._train()
            code = self._exit_code()
            outcome = self._conclude()
            untracked = self._finish_tracking(code, outcome)
        if gone := self._gone():
            say(f"error: {gone}: put it back and give the same command, or add --repair to rebuild what can be")
            return BROKEN
        if untracked and code in (DONE, SOME_FAILED):
            code = UNTRACKED
        self._report(code, outcome, untracked)
        return code

    def _gone(self) -> RecordGone | None:
        """Why the record is not there as it was written, if so: then nothing can be said of the study."""
        if isinstance(self.scheduler.error, RecordGone):
            return self.scheduler.error
        try:
            self.record.flush()
        except RecordGone as error:
            return error
        except RecordLost:
            pass  # `_exit_code` has reported that it cannot be written
        return None

    # Training.

    def _train(self) -> None:
        """Train until the study is finished or has to stop. Ray is started again when it breaks down."""
        try:
            while self._goes_on():
                epochs = self.record.epochs
                try:
                    self._train_with_ray()
                except pool.PoolLost as error:
                    self.breakdowns = 1 if self.record.epochs > epochs else self.breakdowns + 1
                    self._after_breakdown(error)
        except UserError as error:
            if self.tracker is None:
                raise
            self.scheduler.stop(str(error))  # the cluster went away while the study ran
        except RecordLost as error:
            self.scheduler.error = self.scheduler.error or error
            self.scheduler.stop(str(error))
        except OSError as error:  # Ray's own files, on a full disk
            self.scheduler.stop(str(error))
        try:
            self.record.flush()
        except RecordLost as error:
            self.scheduler.error = self.scheduler.error or error
            self.scheduler.stop(str(error))

    def _goes_on(self) -> bool:
        return not self.scheduler.finished and not self.scheduler.should_stop()

    def _train_with_ray(self) -> None:
        """Start or join Ray once and train there. Raises PoolLost, UserError, RecordLost, OSError."""
        self.trained = False
        self.display.doing("starting Ray" if self.flags.address is None else "joining the cluster")
        with pool.ray_running(self.flags.address):
            self.display.doing("starting workers")
            self.display.slots, self.devices = self.ray_pool.slots, self.ray_pool.devices
            if self.tracker is None:
                self.record.begin_run(self._provenance())
                self.tracker = self._start_tracker()
                if self.sharing != CPU:
                    self.display.note(f"training on {self.sharing.explained}")
            if self.scheduler.should_stop():  # a signal may have come while Ray started
                return
            self.trained = True
            self._run_trials()
            if self._goes_on() and self.scheduler.retry_crowded():
                self.ray_pool = replace(self.ray_pool, trial=replace(self.ray_pool.trial, gpus=1.0))
                self.display.slots = self.ray_pool.slots
                self._run_trials()
            if self._goes_on():
                raise pool.PoolLost("Ray Tune ended with trials to go")

    def _run_trials(self) -> None:
        if not self.scheduler.nothing_to_start:
            look = None if self.flags.address is None else self._look
            pool.run_trials(self.scheduler, SharedData.of(self.prepared.data), self.ray_pool, look=look)

    def _after_breakdown(self, error: pool.PoolLost) -> None:
        """Continue the lost trials. After too many breakdowns, fail the trial if it ran alone, else stop the study.

        If memory was short, fewer trials run at a time from then on.
        """
        short, slots = isinstance(error, pool.ShortOfMemory), self.display.slots
        if short and self.trained and slots > 1:
            self.ray_pool = replace(self.ray_pool, max_concurrent=slots // 2)
            self.breakdowns = 0
            self.display.note(f"memory ran short with {slots} trials at a time, so from now on {slots // 2}: {error}")
            self.scheduler.requeue_running()
            return
        if self.breakdowns < _BREAKDOWNS:
            self.display.note(f"Ray broke down and is started again: {error}")
            self.scheduler.requeue_running()
            return
        running = [trial.number for trial in self.record.trials.values() if trial.state == "running"]
        if (
            self.trained and len(running) == 1 and not (short and not self.record.epochs)
        ):  # no other trial can be the cause
            self.scheduler.report(running[0], {"error": f"Ray broke down {self.breakdowns} times over it; {error}"})
            self.breakdowns = 0
        else:
            remedy = "; one trial at a time needs more: give this machine or container more memory" if short else ""
            self.scheduler.stop(f"Ray broke down {self.breakdowns} times without an epoch between: {error}{remedy}")

    def _look(self) -> int:
        """Count and check the nodes that have joined or left the cluster; returns the slots. Runs in a thread."""
        present = cluster.nodes()
        self.machine_hours.set(sum(self.ray_pool.trial.fits(node.resources) > 0 for node in present))
        # A second look, because a node's single bad answer may pass, and stopping a long study is costly.
        if self.check(present) and (problem := self.check(cluster.nodes())):
            self.scheduler.stop(problem)
        self.display.slots = max(self.display.slots, self.ray_pool.slots)
        return self.display.slots

    def _reason_to_stop(self) -> str | None:
        """Why the study has to stop now, if it has to: a signal or a budget."""
        minutes, cost = self.flags.time_budget, self.flags.money_budget
        if self.signals:
            return signal.Signals(self.signals[0]).name
        if minutes is not None and (time.monotonic() - self.started) / 60 >= minutes:
            return f"the time budget of {minutes:g} minutes is used up"
        if cost is not None and self.machine_hours.hours() * (self.flags.price_per_hour or 0) >= cost:
            return f"the money budget of {cost:g} is used up"
        return None

    # The end.

    def _exit_code(self) -> int:
        if self.scheduler.broken or isinstance(self.scheduler.error, RecordGone):
            return BROKEN
        if isinstance(self.scheduler.error, RecordLost):
            return STOPPED  # even if this was the last trial's end: the record does not hold it
        if self.scheduler.finished:
            failed = any(trial.state == "failed" for trial in self.record.trials.values())
            return SOME_FAILED if failed else DONE
        return 128 + self.signals[0] if self.signals else STOPPED

    def _conclude(self) -> best.Outcome | None:
        """The results so far, judged also by held-out seeds."""
        try:
            again = held_out(self.prepared.storage, self.record.settings)
        except OSError as error:
            say(f"warning: {error}; results on held-out seeds are not looked at")
            again = []
        return best.conclude(self.record.trials.values(), self.record.settings, again)

    @property
    def _searched(self) -> tuple[str, ...]:
        return self.prepared.space.names if self.prepared.space else ()

    def _finish_tracking(self, code: int, outcome: best.Outcome | None) -> str | None:
        """Bring MLflow up to the record; returns what it lacks. A finished study's best model is read and published."""
        self.tracker = tracker = self.tracker or self._start_tracker()
        done = code in (DONE, SOME_FAILED)
        publish = None
        if done and outcome is not None:
            if self.trained:
                self.display.doing("reading the best configuration's test accuracy, and completing MLflow")
            self._read_best_test(outcome)
            publish = results.publisher(outcome, self._searched, self.scheduler.folder, self.prepared.data)
        status = "finished" if done else "failed" if code == BROKEN else "stopped"
        return tracker.finish(status, publish=publish, hurry=lambda: bool(self.signals))

    def _read_best_test(self, outcome: best.Outcome) -> None:
        try:
            if not results.read_best_test(self.record, outcome.best, self.scheduler.folder, self.prepared.data):
                lost = f"the best weights, of trial {outcome.best.number:04d}, are gone"
                say(f"warning: {lost}: no test accuracy, no model")
        except (RecordLost, OSError) as error:
            say(f"warning: {error}; the test accuracy is read by the next run of the same command")

    def _provenance(self) -> dict[str, Any]:
        """Everything that is needed to do this run again, as plain data."""
        commit, dirty = working_tree()
        facts = {
            "flags": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.flags).items()},
            "command": command(),
            "commit": commit,
            "commit_dirty": dirty,
            "versions": versions(_PACKAGES) | {"platform": platform.platform()},
            "devices": self.devices,
            "device": self.sharing.explained,
        }
        return without_secrets(facts)

    def _start_tracker(self) -> tracking.Tracker:
        settings, record = self.record.settings, self.record
        # The last run that trained made the study; a run that only looks at it again did not.
        made_by = record.runs[-1] if record.runs else self._provenance()
        plain = asdict(settings)
        space = plain.pop("space") | {name: plain[name] for name in ("study", "epochs", "seeds_per_trial", "design")}
        params = {name: str(plain[name]) for name in ("task", "data", "design", "epochs", "seeds_per_trial")}
        described = {
            **plain,
            **made_by,
            "trials": record.totals[-1],
            "runs": record.runs,
            "data_sizes": self.prepared.data.sizes,
            "asked": [point.text for point in record.asked],
            "taken_over": record.taken
            and {
                "study": record.taken.study,
                "epochs": record.taken.epochs,
                "trials": [t.number for t in record.taken.trials],
            },
            "record": f"{self.flags.storage.rstrip('/')}/{settings.study}/study.db",
        }
        params["trials"] = str(record.totals[0])
        commit, dirty = made_by["commit"], made_by["commit_dirty"]
        made = tracking.Provenance(settings=without_secrets(described), commit=commit, dirty=dirty, params=params)
        tracker = tracking.Tracker(record, self.uri, made, space | {"objective": schema.OBJECTIVE})
        tracker.start()
        self.display.outage = lambda: tracker.outage
        return tracker

    def _report(self, code: int, outcome: best.Outcome | None, untracked: str | None) -> None:
        """Print the results to stdout, and what went wrong to stderr."""
        scheduler, name = self.scheduler, self.record.settings.study
        if code == BROKEN:
            fix = "mend it and run the same command; failed trials stay failed, the rest are run"
            say(f"error: {scheduler.stopping}: {fix}")
        elif code not in (DONE, SOME_FAILED, UNTRACKED):
            broken = scheduler.stopping != self._reason_to_stop()  # neither a signal nor a budget
            stopped(scheduler.stopping or "Ray Tune ended early", broken=broken)
        trials = self.record.trials.values()
        states = [trial.state for trial in trials]
        show(
            f"Study {name}: {states.count('complete')} trials finished, {states.count('pruned')} stopped early, "
            f"{states.count('failed')} failed, {states.count('running')} to be continued, of {scheduler.total}"
        )
        if outcome is not None:
            show("\n".join(results.summary_lines(outcome, self._searched)))
        failed = [f"failed: trial {trial.number:04d}: {trial.reason}" for trial in trials if trial.state == "failed"]
        if len(failed) > _FAILURES_SHOWN:
            failed[_FAILURES_SHOWN:] = [f"and {len(failed) - _FAILURES_SHOWN} more"]
        for line in failed:
            show(f"  {line}")
        if untracked:
            show(f"Record: {self.prepared.record_path}")
            lost = f"MLflow lacks {untracked} in {without_secrets(self.uri)}"
            say(f"warning: {lost}; the record and the checkpoints have it all")
            say(f"  once MLflow takes it, this adds it: {command()}")
            return
        show(f"Record: {self.prepared.record_path}; tracked in {without_secrets(self.uri)}")
        show("Next:")
        default = self.uri == schema.DEFAULT_TRACKING_URI
        if not self.uri.startswith("http"):
            show(f"  mlflow ui{'' if default else f' --backend-store-uri {without_secrets(self.uri)}'}    # then open")
        if self.tracker is not None:
            show(f"  {self.tracker.page}")
        report = "paper" if DESIGNS[self.record.settings.design].report == "tables" else "sensitivity"
        place = "" if default else f" --tracking-uri {without_secrets(self.uri)}"
        show(f"  python -m analysis.{report} --study {name}{place}")
