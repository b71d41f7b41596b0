"""Tracking: a thread that brings MLflow up to date with the record. Nothing else writes tracked data.

The thread has no queue. The record says which trials changed, and the thread logs what MLflow lacks of them in one call
for each trial. Every call can be repeated: metrics carry the record's timestamps (MLflow stores the same metric once),
params never change, and runs are found again by their tags. So the same code serves after an outage, after a crash and
in the next run of the command. Training never waits for tracking and never fails because of it.

A study is a parent run; each of its trials is a child run. `study.schema` has the names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from study import mlflow_settings as mlflow_settings  # before MLflow, which reads them when it is imported

# isort: split
import mlflow
import sqlalchemy.exc
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from ramcore.cost import cost
from ramcore.errors import UserError, first_line
from study import schema
from study.faults import fault_point
from study.record import Record, TrialRecord

_METRICS_A_CALL = 900  # MLflow takes at most 1,000 in one call; some are not an epoch's
_BACKOFF = (1.0, 2.0, 5.0, 10.0)  # seconds between tries during an outage
_REST = 2.0  # the thread rests this many times as long as it wrote: the driver's other threads are more urgent
_REST_MOST = 5.0  # seconds; epochs that come meanwhile share a call
_PUBLISH_TRIES = 3  # after that the study ends without its published model
_MEANS = (*schema.EPOCH_MEANS, schema.OBJECTIVE)
_RUN_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_SERVER_ERRORS = (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError)  # raised if the server is absent or broken

logger = logging.getLogger(__name__)


def tracking_uri(flag: str | None) -> str:
    """The URI of --tracking-uri, else of $MLFLOW_TRACKING_URI, else of a SQLite file where `mlflow ui` looks for it."""
    return flag or os.environ.get("MLFLOW_TRACKING_URI") or schema.DEFAULT_TRACKING_URI


def check_reachable(uri: str, timeout: float = 5.0) -> None:
    """Check within seconds that a tracking server or database can be used. Raises UserError."""
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout).close()
        except urllib.error.HTTPError:
            pass  # a server answers; if it refuses us, that is a warning later, as training does not depend on it
        except (OSError, ValueError) as error:
            raise UserError(
                f"the tracking server must answer when a study starts; {uri} did not "
                f"({getattr(error, 'reason', error)}): start it with `mlflow server`, or pass another --tracking-uri"
            ) from error
    elif uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            rule = "the tracking database must lie in a writable folder"
            raise UserError(f"{rule}; {folder} is not one: pass another --tracking-uri")
    elif "://" not in uri or uri.startswith("file:"):
        raise UserError(
            f"tracking must be a server or a database (MLflow no longer writes plain folders); got {uri}: "
            "pass --tracking-uri sqlite:///mlflow.db or http://host:5000"
        )


@dataclass(kw_only=True)
class _ChildRun:
    """The run of a trial, and how much of the trial MLflow holds."""

    run_id: str
    epochs: int = -1  # logged; -1: not even the configuration
    ended: bool = False
    tested: bool = False

    @staticmethod
    def of(run: Run) -> _ChildRun:
        """Read it from a run."""
        return _ChildRun(
            run_id=run.info.run_id,
            epochs=int(run.data.tags.get(schema.TRACKED_EPOCHS, -1)),
            ended=run.info.status in ("FINISHED", "FAILED"),
            tested=schema.TEST_ACCURACY in run.data.metrics,
        )

    def holds(self, trial: TrialRecord) -> bool:
        """Whether MLflow holds all of a trial."""
        tested = self.tested == (trial.test is not None)
        return self.epochs >= len(trial.epochs) and self.ended == (trial.state != "running") and tested


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The facts that are needed to repeat a study. They go into study.json, tags and params."""

    settings: dict[str, Any]  # flags and everything resolved from them, the command line, versions, devices
    commit: str
    dirty: bool  # whether the working tree differed from the commit
    params: dict[str, str] = field(default_factory=dict)  # of the parent run


class Publish(NamedTuple):
    """Artifacts that a finished study logs."""

    key: str  # of this content, which is logged once
    call: Callable[[mlflow.MlflowClient, str], None]  # logs them; takes the client and the parent run's id


class Tracker:
    """Brings MLflow up to date with one record, in a thread of its own."""

    def __init__(self, record: Record, uri: str, provenance: Provenance, space: dict[str, Any]) -> None:
        self.record = record
        self.uri = uri
        self.provenance = provenance
        self.space = space
        self.run_id = ""  # of the parent run, once known
        self.outage: str | None = None  # why MLflow cannot be written at present; None if it can
        self._tags = {schema.STUDY: record.settings.study, schema.SCHEMA: str(schema.VERSION), schema.UID: record.uid}
        self._children: dict[int, _ChildRun] = {}  # by trial number
        self._pending: set[int] = set()  # numbers of trials that changed
        self._ends_logged = 0  # trials that the parent run's own metrics count
        self._status = "running"
        self._publish: Publish | None = None
        self._published = ""  # the key of the Publish that MLflow holds
        self._publishing = False
        self._publish_failures: list[str] = []
        self._interrupted = False  # after an outage: the server may have carried out a call that seemed to fail
        self._known = False  # whether the fields above agree with MLflow; false at first and after each failed call
        self._last_success = time.monotonic()  # of a call
        self._closing = threading.Event()
        self._idle = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def finish(self, status: str, *, patience: float = 30.0, publish: Publish | None = None) -> str | None:
        """Log the rest and end the parent run, as finished, stopped or failed.

        Gives up after `patience` seconds without a successful call. `publish` is of a finished study (best model,
        pictures). Returns a phrase that names what MLflow lacks; None if it holds everything.
        """
        self._status = status
        self._publish = publish
        self._last_success = time.monotonic()
        self._closing.set()
        with self.record.changed:
            self.record.changed.notify_all()
        while not self._idle.wait(0.05):
            waited = 0.0 if self._publishing else time.monotonic() - self._last_success
            # A thread that has just done its work is over, too.
            if (waited > patience or not self._thread.is_alive()) and not self._idle.is_set():
                return self._untracked()
        if len(self._publish_failures) == _PUBLISH_TRIES:
            return f"the best model ({self._publish_failures[-1]})"
        return None

    def _untracked(self) -> str:
        trials = epochs = 0
        for trial in self.record.trials.values():
            child = self._children.get(trial.number)
            missing = len(trial.epochs) - (max(child.epochs, 0) if child else 0)
            trials += missing > 0 or child is None or (trial.state != "running" and not child.ended)
            epochs += missing
        what = f"{epochs} epochs of {trials} trials" if trials else "the end of the study"
        return f"{what} ({self.outage or 'no answer'})"

    # The thread.

    def _follow(self) -> None:
        try:
            self._follow_until_closed()
        except Exception as error:  # tracking may fail, the study may not
            self.outage = f"{type(error).__name__}: {first_line(error)}"
            logger.exception("tracking has failed; the study goes on without it")

    def _follow_until_closed(self) -> None:
        client: mlflow.MlflowClient | None = None
        failures = 0
        while True:
            # Read this before the changes: once it is set, the record does not change any more.
            closing = self._closing.is_set()
            self._pending |= self.record.take_changed(timeout=0.0 if closing else 1.0)
            began = time.monotonic()
            try:
                fault_point("tracking.before")
                client = client or _connect(self.uri)
                self._sync(client)
                if closing:
                    self._conclude(client)
                fault_point("tracking.after")
            except _SERVER_ERRORS as error:
                if self.outage is None:
                    logger.warning("tracking is interrupted (%s); training goes on", first_line(error))
                self.outage = first_line(error)
                self._known, self._interrupted = False, True
                # Only the study's end ends the wait early.
                self._closing.wait(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
                if self._closing.is_set():
                    time.sleep(min(1.0, _BACKOFF[0]))
                failures += 1
                continue
            if self.outage is not None:
                logger.warning("tracking is back")
            self.outage, failures = None, 0
            if closing:
                self._idle.set()
                return
            self._closing.wait(min(_REST * (time.monotonic() - began), _REST_MOST))

    def _sync(self, client: mlflow.MlflowClient) -> None:
        """Bring MLflow up to date; after an error, go on with the trials that are left."""
        if not self._known:
            self._find_runs(client)
            self._known = True
        for number in sorted(self._pending):
            self._sync_trial(client, self.record.trials[number])
            self._pending.discard(number)
        self._sync_study(client)

    def _sync_study(self, client: mlflow.MlflowClient) -> None:
        """Log the study's own metrics, with a step for each trial that ended."""
        ended = [t for t in list(self.record.trials.values()) if t.ended is not None]
        ended.sort(key=lambda t: (t.ended, t.number))
        best = -math.inf
        metrics: list[Metric] = []
        for count, trial in enumerate(ended, start=1):
            best = max(best, trial.value if trial.value is not None else -math.inf)
            if count > self._ends_logged:
                metrics += _metrics({schema.TRIALS_FINISHED: count, schema.BEST_OBJECTIVE: best}, trial.ended, count)
        for i in range(0, len(metrics), 1000):
            client.log_batch(self.run_id, metrics=metrics[i : i + 1000])
        self._ends_logged = max(self._ends_logged, len(ended))
        self._last_success = time.monotonic()

    def _conclude(self, client: mlflow.MlflowClient) -> None:
        """Log the artifacts of a finished study, and end the parent run."""
        if self._interrupted:  # find runs that were created twice
            self._interrupted = self._known = False
            self._sync(client)
        publish = self._publish
        if publish is not None and publish.key != self._published and len(self._publish_failures) < _PUBLISH_TRIES:
            mlflow.set_tracking_uri(self.uri)  # MLflow logs models to its global URI only
            self._publishing = True  # imports and drawing have no time limit
            try:
                publish.call(client, self.run_id)
            except _SERVER_ERRORS as error:
                self._publish_failures.append(first_line(error))
                raise
            finally:
                self._publishing = False
                self._last_success = time.monotonic()
            client.set_tag(self.run_id, schema.PUBLISHED, publish.key)
        client.set_tag(self.run_id, schema.STATUS, self._status)
        client.set_terminated(self.run_id, _RUN_STATUS[self._status])

    def _find_runs(self, client: mlflow.MlflowClient) -> None:
        """Read what MLflow holds of this study, create the parent run if there is none, and mark trials that lag."""
        experiment = client.get_experiment_by_name(schema.EXPERIMENT)
        experiment_id = client.create_experiment(schema.EXPERIMENT) if experiment is None else experiment.experiment_id
        uid = f"tags.`{schema.UID}` = '{self.record.uid}'"
        parents = _search(client, experiment_id, f"{uid} and tags.`{schema.KIND}` = 'study'")
        name = self.record.settings.study
        if parents:
            parent = _oldest(client, parents)
        else:
            tags = {schema.KIND: "study", **self._tags}
            parent = client.create_run(experiment_id, start_time=self.record.created, run_name=name, tags=tags)
        self.run_id = parent.info.run_id
        self._published = parent.data.tags.get(schema.PUBLISHED, "")
        self._ends_logged = int(parent.data.metrics.get(schema.TRIALS_FINISHED, 0))
        children: dict[int, list[Run]] = {}
        for run in _search(client, experiment_id, f"{uid} and tags.`{schema.KIND}` = 'trial'"):
            children.setdefault(int(run.data.tags[schema.TRIAL]), []).append(run)
        self._children = {n: _ChildRun.of(_oldest(client, runs)) for n, runs in children.items()}
        for trial in list(self.record.trials.values()):  # list: the driver thread adds trials meanwhile
            child = self._children.get(trial.number)
            if child is None or not child.holds(trial):
                self._pending.add(trial.number)
        self._experiment_id = experiment_id
        self._log_study(client, parent)

    def _log_study(self, client: mlflow.MlflowClient, parent: Run) -> None:
        """Log params, tags, data set, settings and space of the study itself."""
        settings, provenance = self.record.settings, self.provenance
        if parent.info.status != "RUNNING":
            client.update_run(self.run_id, status="RUNNING")
        tags = {
            schema.STATUS: "running",
            schema.TRIALS: str(self.record.totals[-1]),
            **_commit_tags(provenance.commit, provenance.dirty),
            "mlflow.source.git.commit": provenance.commit,
            "mlflow.note.content": f"RAM study: design {settings.design}, task {settings.task}, data {settings.data}. "
            "Trials are nested below.",
        }
        params = [Param(k, v) for k, v in provenance.params.items() if k not in parent.data.params]
        client.log_batch(self.run_id, params=params, tags=[RunTag(k, v) for k, v in tags.items()])
        if not parent.inputs or not parent.inputs.dataset_inputs:
            source = json.dumps({"name": settings.data, "sha256": settings.digest})
            dataset = Dataset(settings.data, settings.digest[:36], "ram-study", source, profile=source)
            client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        client.log_text(self.run_id, json.dumps(provenance.settings, indent=1), schema.SETTINGS_FILE)
        client.log_text(self.run_id, json.dumps(self.space, indent=1), schema.SPACE_FILE)
        self._last_success = time.monotonic()

    def _sync_trial(self, client: mlflow.MlflowClient, trial: TrialRecord) -> None:
        """Log what MLflow lacks of a trial."""
        child = self._children.get(trial.number)
        if child is None:
            child = self._children[trial.number] = self._create_child(client, trial)
        # The driver thread may change the trial meanwhile, so read it once.
        state, reason, epochs, test = trial.state, trial.reason, list(trial.epochs), trial.test
        params: list[Param] = []
        metrics: list[Metric] = []
        if child.epochs < 0:
            size = cost(trial.spec.config)
            params = [Param(name, str(value)) for name, value in asdict(trial.spec.config).items()]
            metrics = _metrics({schema.PARAMETERS: size.parameters, schema.MACS: size.macs}, trial.started, 0)
        start, last = max(child.epochs, 0), False
        epochs_a_call = max(1, _METRICS_A_CALL // (len(_MEANS) + 2 + len(trial.spec.seeds)))
        while not last:
            # An older copy of the record may have fewer epochs than MLflow for a while.
            stop = max(start, min(start + epochs_a_call, len(epochs)))
            last = stop >= len(epochs)
            for number, epoch in enumerate(epochs[start:stop], start + 1):
                metrics += _metrics(_epoch_values(epoch.metrics), epoch.time, number)
            tags = {schema.TRACKED_EPOCHS: str(stop)}
            if last:
                tags |= {schema.STATE: state}
                tags |= {schema.STOP_REASON: reason[:500]} if reason else {}
                tags |= {schema.DIVERGED: "true"} if trial.diverged else {}
                metrics += _test_metrics(test, trial) if test is not None else []
            fault_point("tracking.call.before")
            run_tags = [RunTag(k, v) for k, v in tags.items()]
            client.log_batch(child.run_id, metrics=metrics, params=params, tags=run_tags)
            fault_point("tracking.call.after")
            child.epochs, metrics, params, start = stop, [], [], stop
            self._last_success = time.monotonic()
        child.tested = test is not None
        if state != "running" and not child.ended:
            client.set_terminated(child.run_id, "FAILED" if state == "failed" else "FINISHED", trial.ended)
            child.ended = True
        self._last_success = time.monotonic()

    def _create_child(self, client: mlflow.MlflowClient, trial: TrialRecord) -> _ChildRun:
        commit, dirty = self.provenance.commit, self.provenance.dirty
        if trial.run is not None:  # the code that the trial began with
            commit, dirty = (self.record.runs[trial.run][name] for name in ("commit", "commit_dirty"))
        spec = trial.spec
        tags = {
            schema.PARENT: self.run_id,
            schema.KIND: "trial",
            **self._tags,
            schema.TRIAL: str(trial.number),
            schema.ORIGIN: spec.origin,
            schema.ROW: spec.row,
            schema.BASELINE: spec.baseline,
            schema.PARAMETER: spec.parameter,
            schema.SEEDS: ",".join(map(str, spec.seeds)),
            **_commit_tags(commit, dirty),
        }
        fault_point("tracking.run.before")
        name = f"trial {trial.number:04d}"
        run = client.create_run(self._experiment_id, start_time=trial.started, run_name=name, tags=tags)
        fault_point("tracking.run.after")
        return _ChildRun(run_id=run.info.run_id)


def _connect(uri: str) -> mlflow.MlflowClient:
    """A client. A new SQLite database is made under another name and linked to its own once it is complete.

    MLflow makes its tables in about fifty migrations, and cannot open a database whose process was killed in the middle
    of them.
    """
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.exists():
        for leftover in path.parent.glob(f".{path.name}.*.new*"):
            if time.time() - leftover.stat().st_mtime > 600:
                leftover.unlink(missing_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}.new")
        SqlAlchemyStore(f"sqlite:///{new}", "./mlruns").engine.dispose()
        fault_point("tracking.database")
        with contextlib.suppress(FileExistsError):  # another study was quicker
            os.link(new, path)
        new.unlink()
    return mlflow.MlflowClient(tracking_uri=uri)


def _search(client: mlflow.MlflowClient, experiment_id: str, query: str) -> list[Run]:
    page = client.search_runs([experiment_id], query, max_results=1000)
    runs = list(page)
    while page.token:
        page = client.search_runs([experiment_id], query, max_results=1000, page_token=page.token)
        runs += page
    return runs


def _oldest(client: mlflow.MlflowClient, runs: list[Run]) -> Run:
    """The oldest of several runs of one trial; deletes the others.

    A call that timed out may still have created a run, and then its repetition creates a second one.
    """
    kept, *others = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))
    for run in others:
        client.delete_run(run.info.run_id)
    return kept


def _commit_tags(commit: str, dirty: bool) -> dict[str, str]:
    return {schema.COMMIT: commit, schema.COMMIT_DIRTY: str(dirty).lower()}


def _metrics(values: Mapping[str, float], timestamp: int | None, step: int) -> list[Metric]:
    """Metrics of one time. MLflow has no infinity, and NaN breaks its charts: a trial's tags say that it diverged."""
    return [Metric(name, value, timestamp or 0, step) for name, value in values.items() if math.isfinite(value)]


def _epoch_values(metrics: dict[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {name: statistics.fmean(metrics[name]) for name in _MEANS}
    values[schema.EPOCH_SECONDS] = metrics["seconds"]
    accuracies = metrics[schema.OBJECTIVE]
    if len(accuracies) > 1 and all(map(math.isfinite, accuracies)):
        values[schema.OBJECTIVE_SD] = statistics.stdev(accuracies)
    return values | {f"{schema.SEED_ACCURACY}{seed}": a for seed, a in zip(metrics["seeds"], accuracies, strict=True)}


def _test_metrics(test: dict[str, Any], trial: TrialRecord) -> list[Metric]:
    ended, epochs = trial.ended or trial.started, test["epoch"]
    mean = _metrics({schema.TEST_ACCURACY: statistics.fmean(test["accuracy"])}, ended, round(statistics.fmean(epochs)))
    of_seeds = zip(trial.spec.seeds, test["accuracy"], epochs, strict=True)
    return mean + [Metric(f"{schema.SEED_TEST_ACCURACY}{seed}", a, ended, epoch) for seed, a, epoch in of_seeds]
