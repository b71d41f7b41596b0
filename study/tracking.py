"""Tracking: a thread that brings MLflow up to date with the record. Nothing else writes tracked data.

The thread has no queue. The record says which trials changed, and the thread logs what MLflow lacks of them in one call
for each trial. Every call can be repeated: metrics carry the record's timestamps (MLflow stores the same metric once),
params never change, and runs are found again by their tags. So the same code serves after an outage, after a crash and
in the next run of the command. Training never waits for tracking and never fails because of it.

A study is a parent run; each of its trials is a child run. `study.schema` has the names. The study's uid tells which
runs belong together; `mlflow.parentRunId`, which MLflow's page needs, is set again wherever it says something else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import statistics
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from study import mlflow_settings as mlflow_settings  # before MLflow, which reads them when it is imported

# isort: split
import mlflow
import requests
import sqlalchemy
import sqlalchemy.exc
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from urllib3.exceptions import HTTPError

from ramcore.cost import cost
from ramcore.errors import UserError, first_line, say, usable
from ramcore.private import without_secrets
from study import schema
from study.faults import fault_point
from study.moved import SQLITE, check_database, database_file
from study.record import Record, State, TrialRecord

_METRICS_A_CALL = 900  # MLflow takes at most 1,000 in one call; some are not an epoch's
_BACKOFF = (1.0, 2.0, 5.0, 10.0)  # seconds between tries during an outage
_REST = 2.0  # the thread rests this many times as long as it wrote: the driver's other threads are more urgent
_REST_MOST = 5.0  # seconds; epochs that come meanwhile share a call
_UPLOAD_TRIES = 3  # of artifacts at the end; after that the study ends without them
_UPLOAD_SECONDS = 600.0  # for all of them, with drawing and imports
_TELL = 5.0  # seconds of waiting at the end, before it is said
_LATE = 10.0  # seconds in which a server may still carry out a call that timed out
_HURRY = 10.0  # seconds from a signal to the end of waiting
_MEANS = (schema.OBJECTIVE, *schema.EPOCH_MEANS)  # MLflow's page compares runs by the metric that was logged first
_DESCRIPTION, _MODEL = f"{schema.SETTINGS_FILE} and {schema.SPACE_FILE}", "the best model"
_RUN_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # of a study
_TRIAL_STATUS: dict[State, str] = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
logger = logging.getLogger(__name__)


def check_server(uri: str, *, known: bool = False) -> None:
    """Have one conversation with the tracking server, of all that a study needs, before anything starts.

    It goes through MLflow's own client, with all its settings. Raises UserError for what the server will never accept
    and, unless the study is `known`, for an outage: a study that continues can be tracked later.
    """
    _check_form(uri)
    try:
        client = _connect(uri)
        experiment = _experiment(client, uri)
        for tag, value in ((schema.SCHEMA, str(schema.VERSION)), schema.KIND_OF_EXPERIMENT):
            client.set_experiment_tag(experiment.experiment_id, tag, value)
    except UserError:
        raise
    except Exception as error:  # a store may raise anything
        if known and _may_pass(error):
            return
        raise UserError(
            f"the tracking server must answer when a study starts; {without_secrets(uri)} did not "
            f"({_reason(error)}): {_remedy(error)}"
        ) from error
    try:
        _write_artifact(experiment.artifact_location, uri)
    except Exception as error:  # as above
        if known and _may_pass(error):
            return
        fix = _remedy(error) if isinstance(error, ImportError) else "give the server another artifact root"
        raise UserError(
            f"this machine must be able to write the tracking server's artifacts; "
            f"{without_secrets(experiment.artifact_location)} could not be written ({_reason(error)}): "
            f"{fix} (`mlflow server --serve-artifacts` writes them itself), or pass another --tracking-uri"
        ) from error


def _check_form(uri: str) -> None:
    """Refuse what can be judged without a connection. Raises UserError."""
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(
            f"tracking must be a server or a database (MLflow no longer writes plain folders); got {uri}: "
            "pass --tracking-uri sqlite:///mlflow.db or http://host:5000"
        )
    if uri.startswith(SQLITE):
        try:
            path, url = database_file(uri), sqlalchemy.make_url(uri)
            is_plain = not set(url.query) - {"timeout"} and not str(url.database).startswith("file:")
        except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: of its port
            path, is_plain = None, False
        with usable("--tracking-uri"):
            if path is None or not is_plain or (path.exists() and not path.is_file()):
                rule = "the tracking database must be a file, and its URI a path alone"
                raise UserError(f"{rule}; got {without_secrets(uri)}: pass --tracking-uri sqlite:///mlflow.db")
            if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
                rule = "the tracking database must lie in a writable folder"
                raise UserError(f"{rule}; {path.parent} is not one: pass another --tracking-uri")


def _experiment(client: mlflow.MlflowClient, uri: str) -> Experiment:
    """The experiment of all studies, made if absent. Raises UserError if it was deleted."""
    found = client.get_experiment_by_name(schema.EXPERIMENT)
    if found is None:
        path = database_file(uri)  # artifacts lie beside it, so that both can be moved together
        location = None if path is None else str(path.parent / "mlruns" / schema.EXPERIMENT)
        try:
            client.create_experiment(schema.EXPERIMENT, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another study was quicker
                raise
        found = client.get_experiment_by_name(schema.EXPERIMENT)
    if found is None or not found.experiment_id:
        fact = f"{without_secrets(uri)} answers, and knows of no experiments"
        raise UserError(f"the tracking server must be MLflow's; {fact}: pass another --tracking-uri")
    if found.lifecycle_stage != "active":
        raise UserError(
            f"a study needs MLflow's experiment {schema.EXPERIMENT}; it was deleted from {without_secrets(uri)}: "
            f"restore it with `mlflow experiments restore -x {found.experiment_id}` (it reads $MLFLOW_TRACKING_URI), "
            "or pass another --tracking-uri"
        )
    return found


def _write_artifact(location: str, uri: str) -> None:
    """Write a small artifact into an experiment's folder, and delete it."""
    artifacts = get_artifact_repository(location, tracking_uri=uri)
    with tempfile.TemporaryDirectory(prefix="ram-study-") as folder:
        path = Path(folder) / f"probe-{os.getpid()}"
        path.write_text("a study can write here")
        artifacts.log_artifact(str(path))
    with contextlib.suppress(Exception):  # not every store can delete, and a small file does no harm
        artifacts.delete_artifacts(path.name)


def _may_pass(error: BaseException) -> bool:
    """Whether an error of the tracking server is an outage. Else the same call will fail in the same way."""
    cause = error.__cause__ or error.__context__
    if isinstance(error, MlflowException):
        if cause is not None and isinstance(cause, requests.RequestException | sqlalchemy.exc.SQLAlchemyError):
            return _may_pass(cause)
        return _status_may_pass(error.get_http_status_code()) and "database schema" not in str(error)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return _status_may_pass(error.response.status_code)
    if isinstance(error, requests.RequestException):
        return not isinstance(error, requests.exceptions.SSLError | ValueError)  # ValueError: no valid URL
    if isinstance(error, sqlalchemy.exc.OperationalError):
        words = ("readonly", "read-only", "authentication", "denied", "does not exist")
        return not any(word in str(error) for word in words)
    if isinstance(error, OSError):
        lasting = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
        return error.errno not in lasting
    return not isinstance(error, ImportError | sqlalchemy.exc.SQLAlchemyError)


def _status_may_pass(status: int) -> bool:
    return status >= 500 or status in (408, 425, 429)


def _remedy(error: BaseException) -> str:
    """What a user can do about an error of the tracking server."""
    cause = error.__cause__ or error.__context__
    status = error.get_http_status_code() if isinstance(error, MlflowException) else 0
    if isinstance(error, ImportError):
        return f"install {error.name} (pip install), or pass another --tracking-uri"
    if isinstance(cause, requests.exceptions.SSLError):
        if "WRONG_VERSION_NUMBER" in str(cause) or "RECORD_LAYER_FAILURE" in str(cause):
            return "it may speak no TLS: pass http:// in place of https://, or another --tracking-uri"
        return (
            "set MLFLOW_TRACKING_SERVER_CERT_PATH to the certificate of its authority, or pass another --tracking-uri"
        )
    if status in (401, 403):
        return (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of one who may write"
        )
    if "database schema" in str(error):
        return "use the version of MLflow that wrote it, or back it up and run `mlflow db upgrade` on it"
    if isinstance(cause, requests.RequestException):
        return "start it with `mlflow server`, or pass another --tracking-uri"
    return "pass another --tracking-uri"


def _innermost(error: BaseException) -> BaseException:
    """What a failed request came from; MLflow, requests and urllib3 each wrap it in words of their own."""
    inner = error.__cause__ or error.__context__
    if not (isinstance(error, MlflowException) and isinstance(inner, requests.RequestException)):
        inner = getattr(error, "reason", None) or next(iter(error.args), None)
    return _innermost(inner) if isinstance(inner, Exception) else error


def _reason(error: BaseException) -> str:
    """An error in one line: a database's own words; with its type, where its text alone may not be understood."""
    cause = error.__cause__ or error
    if isinstance(cause, sqlalchemy.exc.DBAPIError) and cause.orig is not None:
        return first_line(cause.orig)
    error = _innermost(error)
    known = MlflowException | UserError | OSError | ImportError | sqlalchemy.exc.SQLAlchemyError | HTTPError
    return first_line(error) if isinstance(error, known) else f"{type(error).__name__}: {first_line(error)}"


@dataclass(kw_only=True)
class _ChildRun:
    """The run of a trial, and how much of the trial MLflow holds."""

    run_id: str
    epochs: int = -1  # logged; -1: not even the configuration
    written: int = 0  # epochs whose metrics are there; more than `epochs` if a call was cut off before its tags
    ended: bool = False
    tested: bool = False

    @staticmethod
    def of(run: Run) -> _ChildRun:
        """Read it from a run."""
        return _ChildRun(
            run_id=run.info.run_id,
            epochs=int(run.data.tags.get(schema.TRACKED_EPOCHS, -1)),
            ended=run.info.status in _TRIAL_STATUS.values(),
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
        self._experiment_id = ""  # likewise
        self.outage: str | None = None  # why MLflow cannot be written at present; None if it can
        self._tags = {schema.STUDY: record.settings.study, schema.SCHEMA: str(schema.VERSION), schema.UID: record.uid}
        self._children: dict[int, _ChildRun] = {}  # by trial number
        self._pending: set[int] = set()  # numbers of trials that changed
        self._ends_logged = 0  # trials that the parent run's own metrics count
        self._status = "running"
        self._publish: Publish | None = None
        self._published = ""  # the key of the Publish that MLflow holds
        self._failed_uploads: dict[str, str] = {}  # artifacts that MLflow lacks, and why
        self._uploading: float | None = None  # since when
        self._upload_seconds = 0.0  # of the uploads that are over
        self._interrupted = False  # after an outage: the server may have carried out a call that seemed to fail
        self._timed_out = -math.inf  # when a call did last
        self._read = False  # whether the fields above were ever read from MLflow
        self._known = False  # whether the fields above agree with MLflow; false at first and after each failed call
        self._most_held = 0
        self._last_progress = time.monotonic()  # when something was tracked that had not been tracked before
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._idle = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)

    @property
    def page(self) -> str:
        """The address of the study's table of runs, most accurate first, on the server or on a local `mlflow ui`."""
        server = urllib.parse.urlsplit(self.uri)
        base = f"{server.scheme}://{server.netloc.rpartition('@')[2]}{server.path.rstrip('/')}"
        query = {
            "workflowType": "machine_learning",  # else the page is about traces
            "searchFilter": f"tags.`{schema.STUDY}`='{self.record.settings.study}'",
            "orderByKey": f"metrics.`{schema.OBJECTIVE}`",
            "orderByAsc": "false",
        }
        where = base if server.scheme in ("http", "https") else "http://127.0.0.1:5000"
        return f"{where}/#/experiments/{self._experiment_id}/runs?{urllib.parse.urlencode(query)}"

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def finish(
        self,
        status: str,
        *,
        patience: float = 30.0,
        publish: Publish | None = None,
        hurry: Callable[[], bool] = lambda: False,
    ) -> str | None:
        """Log the rest and end the parent run, as finished, stopped or failed.

        Gives up after `patience` seconds in which nothing new was tracked. Once `hurry()` is true, it waits 10 seconds
        at most, and not at all during an outage. `publish` is of a finished study (best model, pictures).

        Returns a phrase that says how much MLflow lacks, and why; None if it holds everything.
        """
        self._status = status
        self._publish = publish
        self._last_progress = began = time.monotonic()
        hurried: float | None = None
        told = False
        self._closing.set()
        with self.record.changed:
            self.record.changed.notify_all()
        # A thread that has just done its work is over, too, so `_idle` is looked at last.
        while not self._idle.wait(0.05) and self._thread.is_alive():
            now = time.monotonic()
            if self._uploading is not None:
                over = now - self._uploading + self._upload_seconds > _UPLOAD_SECONDS
            else:
                over = now - self._last_progress > patience
            if hurried is None and hurry():
                hurried = now
            if over or (hurried is not None and (self.outage is not None or now - hurried > _HURRY)):
                self._abandoned.set()
                break
            if not told and now - began > _TELL:
                told = True
                say(f"waiting for MLflow{f' ({self.outage})' if self.outage else ''}; Ctrl-C ends this")
        return self._lacking()

    def _lacking(self) -> str | None:
        """How much of the record MLflow lacks, and why; None if it lacks nothing."""
        phrases: list[str] = []
        if not self._idle.is_set():
            trials = epochs = 0
            for trial in self.record.trials.values():
                child = self._children.get(trial.number)
                missing = max(0, len(trial.epochs) - (max(child.epochs, child.written) if child else 0))
                trials += child is None or not child.holds(trial)
                epochs += missing
            most = "" if self._read else "at most "  # what MLflow holds is not known
            what = f"{most}{epochs} epochs of {trials} trials" if trials else "the end of the study"
            phrases.append(f"{what} ({self.outage or 'no answer'})")
        phrases += [f"{what} ({why})" for what, why in self._failed_uploads.items()]
        return " and ".join(phrases) or None

    def _note_progress(self) -> None:
        """Note whether MLflow holds more than ever before; the same things written again are no progress."""
        children = list(self._children.values())
        held = self._ends_logged + sum(2 + c.epochs + c.ended + c.tested for c in children) + bool(self.run_id)
        if held > self._most_held:
            self._most_held, self._last_progress = held, time.monotonic()

    # The thread.

    def _follow(self) -> None:
        client: mlflow.MlflowClient | None = None
        failures = 0
        while not self._abandoned.is_set():
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
            except Exception as error:  # tracking may fail in any way, the study may not
                if self.outage is None:
                    logger.warning("tracking is interrupted (%s); training goes on", _reason(error))
                self.outage = _reason(error)
                self._known, self._interrupted = False, True
                if "timed out" in str(error):
                    self._timed_out = time.monotonic()
                client = None
                path = database_file(self.uri)
                if path is not None and not path.exists():
                    self._children, self.run_id = {}, ""
                # Only the study's end ends the wait early.
                self._closing.wait(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
                if self._closing.is_set():
                    self._abandoned.wait(min(1.0, _BACKOFF[0]))
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
        described = self._known
        if not self._known:
            self._find_runs(client)
            self._known = True
        for number in sorted(self._pending):
            self._sync_trial(client, self.record.trials[number])
            self._pending.discard(number)
        self._sync_study(client)
        if not described:
            self._upload(_DESCRIPTION, lambda: self._log_description(client))

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
            self.record.check_alone()
            client.log_batch(self.run_id, metrics=metrics[i : i + 1000])
        self._ends_logged = max(self._ends_logged, len(ended))
        self._note_progress()

    def _conclude(self, client: mlflow.MlflowClient) -> None:
        """Log the artifacts of a finished study, and end the parent run."""
        if self._interrupted:  # find runs that were created twice
            self._abandoned.wait(max(0.0, self._timed_out + _LATE - time.monotonic()))
            self._interrupted = self._known = False
            self._sync(client)
        for attempt in range(_UPLOAD_TRIES):
            self._abandoned.wait(_BACKOFF[0] if attempt else 0.0)
            if _DESCRIPTION in self._failed_uploads:
                self._upload(_DESCRIPTION, lambda: self._log_description(client))
            if self._publish is not None and self._publish.key != self._published:
                self._upload(_MODEL, lambda: self._log_model(client))
            if not self._failed_uploads:
                break
        client.set_tag(self.run_id, schema.STATUS, self._status)
        client.set_terminated(self.run_id, _RUN_STATUS[self._status])

    def _upload(self, what: str, call: Callable[[], None]) -> None:
        """Log artifacts. Artifacts that cannot be written hold nothing else back, so a failure is only noted."""
        self._uploading = time.monotonic()
        try:
            call()
            self._failed_uploads.pop(what, None)
        except Exception as error:  # a store of artifacts may raise anything
            if what not in self._failed_uploads:
                logger.warning("MLflow does not take %s (%s)", what, _reason(error))
            self._failed_uploads[what] = _reason(error)
        finally:
            took = time.monotonic() - self._uploading
            self._uploading = None
            self._upload_seconds += took
            self._last_progress += took  # this time is limited on its own

    def _log_description(self, client: mlflow.MlflowClient) -> None:
        client.log_text(self.run_id, json.dumps(self.provenance.settings, indent=1), schema.SETTINGS_FILE)
        client.log_text(self.run_id, json.dumps(self.space, indent=1), schema.SPACE_FILE)

    def _log_model(self, client: mlflow.MlflowClient) -> None:
        assert self._publish is not None
        mlflow.set_tracking_uri(self.uri)  # MLflow logs models to its global URI only
        self._publish.call(client, self.run_id)
        client.set_tag(self.run_id, schema.PUBLISHED, self._publish.key)
        self._published = self._publish.key

    def _find_runs(self, client: mlflow.MlflowClient) -> None:
        """Read what MLflow holds of this study, create the parent run if there is none, and mark trials that lag."""
        experiment_id = _experiment(client, self.uri).experiment_id
        parents: list[Run] = []
        children: dict[int, list[Run]] = {}
        for run in search_all(client, experiment_id, f"tags.`{schema.UID}` = '{self.record.uid}'"):
            if run.data.tags.get(schema.KIND) == "study":
                parents.append(run)
            elif (number := run.data.tags.get(schema.TRIAL, "")).isdigit():
                children.setdefault(int(number), []).append(run)
        if parents:
            linked = Counter(run.data.tags.get(schema.PARENT) for runs in children.values() for run in runs)
            before = self.run_id
            parent = _only(client, parents, lambda run: 2 * linked[run.info.run_id] + (run.info.run_id == before))
        else:
            name, tags = self.record.settings.study, {schema.KIND: "study", **self._tags}
            parent = client.create_run(experiment_id, start_time=self.record.created, run_name=name, tags=tags)
        self.run_id = parent.info.run_id
        self._published = parent.data.tags.get(schema.PUBLISHED, "")
        self._ends_logged = int(parent.data.metrics.get(schema.TRIALS_FINISHED, 0))
        found: dict[int, _ChildRun] = {}
        for number, runs in children.items():
            run = _only(client, runs, lambda run: int(run.data.tags.get(schema.TRACKED_EPOCHS, -1)))
            if run.data.tags.get(schema.PARENT) != self.run_id:  # the parent was deleted, or made twice
                client.set_tag(run.info.run_id, schema.PARENT, self.run_id)
            found[number] = _ChildRun.of(run)
        self._children, self._read = found, True
        for trial in list(self.record.trials.values()):  # list: the driver thread adds trials meanwhile
            child = self._children.get(trial.number)
            if child is not None and child.holds(trial):
                continue
            self._pending.add(trial.number)
            if child is not None:
                history = client.get_metric_history(child.run_id, schema.OBJECTIVE)
                child.written = max((metric.step for metric in history), default=0)
        self._experiment_id = experiment_id
        self._log_study(client, parent)

    def _log_study(self, client: mlflow.MlflowClient, parent: Run) -> None:
        """Log params, tags and data set of the study itself."""
        settings, provenance = self.record.settings, self.provenance
        if parent.info.status != "RUNNING":
            client.update_run(self.run_id, status="RUNNING")
        tags = {
            schema.STATUS: "running",
            schema.TRIALS: str(self.record.totals[-1]),
            schema.DEVICE: provenance.settings.get("device", "unknown"),  # of a record that is older than this tag
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
            params = [Param(name, str(value)) for name, value in asdict(trial.spec.config).items()]
        start, last = max(child.epochs, child.written), False
        epochs_a_call = max(1, _METRICS_A_CALL // (len(_MEANS) + 2 + len(trial.spec.seeds)))
        while not last:
            # An older copy of the record may have fewer epochs than MLflow for a while.
            stop = max(start, min(start + epochs_a_call, len(epochs)))
            last = stop >= len(epochs)
            for number, epoch in enumerate(epochs[start:stop], start + 1):
                metrics += _metrics(_epoch_values(epoch.metrics), epoch.time, number)
            # With the first epoch, after its accuracy. What MLflow has is not logged again: after a record has lost
            # entries, the trial begins or ends once more, at another time.
            if start == 0 and not child.ended and (stop > 0 or state != "running"):
                size = cost(trial.spec.config)
                metrics += _metrics({schema.PARAMETERS: size.parameters, schema.MACS: size.macs}, trial.started, 0)
            tags = {schema.TRACKED_EPOCHS: str(stop)}
            if last:
                tags |= {schema.STATE: state}
                tags |= {schema.STOP_REASON: reason[:500]} if reason else {}
                tags |= {schema.DIVERGED: "true"} if trial.diverged else {}
                metrics += _test_metrics(test, trial) if test is not None and not child.tested else []
            fault_point("tracking.call.before")
            run_tags = [RunTag(k, v) for k, v in tags.items()]
            self.record.check_alone()
            client.log_batch(child.run_id, metrics=metrics, params=params, tags=run_tags)
            fault_point("tracking.call.after")
            child.epochs, metrics, params, start = stop, [], [], stop
            self._note_progress()
        child.tested = test is not None
        if state != "running" and not child.ended:
            if state == "pruned":  # MLflow's page shows the same mark for a killed and a failed run
                client.update_run(child.run_id, name=f"{_run_name(trial)} stopped early")
            client.set_terminated(child.run_id, _TRIAL_STATUS[state], trial.ended)
            child.ended = True
        self._note_progress()

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
        self.record.check_alone()
        name = _run_name(trial)
        run = client.create_run(self._experiment_id, start_time=trial.started, run_name=name, tags=tags)
        fault_point("tracking.run.after")
        return _ChildRun(run_id=run.info.run_id)


def _run_name(trial: TrialRecord) -> str:
    return f"trial {trial.number:04d}"


def _connect(uri: str) -> mlflow.MlflowClient:
    """A client of a server, or of a database that is there. Raises UserError for a database of something else."""
    if (path := database_file(uri)) is not None:
        sqlalchemy.make_url(uri).get_dialect().import_dbapi()  # raises for a driver that is not there
        _make_database(path)
    check_database(uri, may_be_empty=True)
    return mlflow.MlflowClient(tracking_uri=uri)


def _make_database(path: Path) -> None:
    """Make a new SQLite database under another name, and link it to its own once it is complete.

    MLflow makes its tables in about fifty migrations, and cannot open a database whose process was killed in the middle
    of them.
    """
    if path.exists() and (path.stat().st_size > 0 or not path.is_file()):
        return
    for leftover in path.parent.glob(f".{path.name}.*.new*"):
        if time.time() - leftover.stat().st_mtime > 600:
            leftover.unlink(missing_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    new.touch()  # at once, where MLflow would try for minutes
    try:
        # A relative path, since MLflow makes the folder of what it reads as the path, with ? and % escaped.
        uri = sqlalchemy.URL.create("sqlite", database=os.path.relpath(new)).render_as_string()
        SqlAlchemyStore(uri, "./mlruns").engine.dispose()
        fault_point("tracking.database")
        if path.exists() and path.stat().st_size == 0:  # SQLite makes this in the place of a file that was deleted
            path.unlink()
        with contextlib.suppress(FileExistsError):  # another study was quicker
            os.link(new, path)
    finally:
        new.unlink()


def search_all(client: mlflow.MlflowClient, experiment_id: str, query: str) -> list[Run]:
    """All runs that a query finds, whatever their number."""
    page = client.search_runs([experiment_id], query, max_results=1000)
    runs = list(page)
    while page.token:
        page = client.search_runs([experiment_id], query, max_results=1000, page_token=page.token)
        runs += page
    return runs


def _only(client: mlflow.MlflowClient, runs: list[Run], worth: Callable[[Run], int]) -> Run:
    """The run of most worth among several of one trial or study, the oldest of equals; deletes the others.

    A call that timed out may still have created a run, and then its repetition creates a second one.
    """
    kept, *others = sorted(runs, key=lambda run: (-worth(run), run.info.start_time, run.info.run_id))
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
