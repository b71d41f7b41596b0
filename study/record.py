"""The durable record of a study: Optuna's storage, and the only file that writes to it.

Everything a study needs to go on is here or in the checkpoints beside it. The storage is a SQLite file that the
driver alone writes. SQLite, because its commits survive a killed process and a torn tail, which Optuna's journal file
does not; write-ahead log with synchronous=FULL, so that a commit also survives a power cut (about 1 ms each, twice an
epoch), since MLflow and the checkpoints are written after the commit and must never know more than the record.

A trial enters the record with its whole configuration in one commit, and leaves it with its reason first and its final
state second; whichever of these a crash cuts off, `Record.open` finishes or the caller repeats, to the same end.

In the storage:
  study user attributes   settings (StudySettings), totals (trials asked for, as it grew), rows (of a fixed design),
                          uid, created, "run 0007" (what one run of the command was: commit, versions, devices, ...),
                          "test 0007" (of a trial whose test images were read after its end)
  trial user attributes   plan (TrialSpec.to_dict); run (the number of the one that began it); origin, row, seeds (for readers);
                          "epoch 0007" (one record an epoch:
                          {"time": ms since 1970, "metrics": EpochMetrics.to_dict()}), test, end ({"state", "reason",
                          "time"})
  intermediate values     mean validation accuracy over seeds, by epoch
  state                   RUNNING; COMPLETE with the last epoch's value; PRUNED; FAIL
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import statistics
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import optuna
import sqlalchemy.event
import sqlalchemy.exc
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from ramcore.errors import UserError
from ramcore.space import Space
from study.checkpoints import open_folder
from study.designs import DEFAULT_SOBOL_SHARE, TrialSpec
from study.faults import fault_point
from study.snapshots import Lease, LeaseHeld, Snapshots, fetch, is_remote, record_folder

logger = logging.getLogger(__name__)

State = Literal["running", "complete", "pruned", "failed"]
OPTUNA_STATE: dict[State, TrialState] = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_TOLERANCE = 1e-6  # largest difference between two reports of one epoch; more means that a resumed trial drifted


class RecordLost(RuntimeError):
    """The record cannot be written any more (full disk, storage gone): the study has to stop and can be continued."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What makes a study this study: asked for again under the same name, these have to agree."""

    study: str
    task: str
    data: str
    digest: str  # sha256 of the data
    design: str
    epochs: int
    seeds_per_trial: int
    seed: int  # of Sobol and TPE
    sobol_share: float = DEFAULT_SOBOL_SHARE  # of a search's trials
    space: dict[str, Any]  # Space.to_dict()

    def differences(self, other: StudySettings) -> list[str]:
        """What differs, in words: 'epochs 30 there, 10 asked for'."""
        found: list[str] = []
        ours, theirs = asdict(self), asdict(other)
        for name in ours:
            if name == "space":
                found += _space_differences(ours[name], theirs[name])
            elif name == "digest" and ours[name] != theirs[name]:
                found.append(f"images (sha256 {ours[name][:12]} there, {theirs[name][:12]} here)")
            elif ours[name] != theirs[name]:
                found.append(f"{name} {ours[name]} there, {theirs[name]} asked for")
        return found


def _space_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """As `differences`; the reasons and units of a range may be reworded."""

    def flat(space: dict[str, Any]) -> dict[str, Any]:
        ranges = {
            f"{d['name']}.{k}": v for d in space["dimensions"] for k, v in d.items() if k not in ("reason", "unit")
        }
        rules = {"constraint": [c["rule"] for c in space["constraints"]]}
        return ranges | rules | {f"default {k}": v for k, v in space["default"].items()} | space["fixed"]

    old, new = flat(ours), flat(theirs)
    names = [n for n in {**old, **new} if old.get(n) != new.get(n) and n not in ("task", "data", "epochs")]
    return [f"space: {name} {old.get(name, 'absent')} there, {new.get(name, 'absent')} here" for name in names]


@dataclass(kw_only=True)
class Epoch:
    """One recorded epoch of a trial."""

    time: int  # ms since 1970, when it was recorded
    value: float  # mean validation accuracy over seeds
    metrics: dict[str, Any]  # EpochMetrics.to_dict()


@dataclass(kw_only=True)
class TrialRecord:
    """One trial as the record holds it; kept in step with the storage by `Record`."""

    number: int
    trial_id: int  # Optuna's
    spec: TrialSpec
    started: int  # ms since 1970
    run: int | None = None  # number of the run of the command that began it
    epochs: list[Epoch] = field(default_factory=list)  # epochs 1, 2, ... without gaps
    state: State = "running"
    reason: str = ""  # why it ended
    diverged: bool = False  # it ended because a loss or a gradient was not finite
    ended: int | None = None  # ms since 1970
    test: dict[str, Any] | None = None  # what `ramcore` read on the test images at the trial's end, if it did

    @property
    def value(self) -> float | None:
        """The objective, of a complete trial only: mean validation accuracy after the last epoch."""
        return self.epochs[-1].value if self.state == "complete" and self.epochs else None


class Record:
    """An open record. Only one process can hold one open for writing; see `open`."""

    def __init__(self, study: optuna.Study, rdb: RDBStorage, settings: StudySettings, lock: int) -> None:
        self.study = study
        self.settings = settings
        self.trials: dict[int, TrialRecord] = {}
        self.changed = threading.Condition()  # notified after each change, for who follows the record
        self._dirty: set[int] = set()
        self.created: int = study.user_attrs["created"]  # ms since 1970
        self.uid: str = study.user_attrs["uid"]  # tells two studies of one name apart in MLflow
        self.runs: list[dict[str, Any]] = []  # of the command, those that trained; see `begin_run`
        self.snapshots: Snapshots | None = None  # of a record whose storage is elsewhere
        self._lock = lock
        self._rdb = rdb
        self._storage = study._storage  # with Optuna's cache of ended trials in front of the database

    # Opening and closing.

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: StudySettings,
        *,
        total: int | None,
        rows: Callable[[], list[TrialSpec]] | None = None,
    ) -> Self:
        """Create the record in `folder`, or continue the one that is there.

        Args:
            folder: of the study; made if absent.
            settings: of the study asked for.
            total: trials asked for, all runs of the command together; None: as many as there are rows, or were asked
                for.
            rows: makes those of a fixed design; None for a search. A continued study keeps those it has.

        Raises:
            UserError: another process holds it, or it is a study with other settings.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder / "driver.lock")
        except OSError as error:
            raise UserError(
                f"a study's folder must be one that can be written; {folder}: {error.strerror}: pass another --storage"
            ) from error
        try:
            return cls._open(folder, settings, lock, total=total, rows=rows)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def _open(
        cls,
        folder: Path,
        settings: StudySettings,
        lock: int,
        *,
        total: int | None,
        rows: Callable[[], list[TrialSpec]] | None,
    ) -> Self:
        with _write_errors():
            study, rdb = _open_storage(folder / "study.db", settings.study)
            assert study is not None
            attrs = study.user_attrs
            fault_point("record.open")
            if "settings" in attrs:
                there = StudySettings(**attrs["settings"])
                if differences := there.differences(settings):
                    raise UserError(
                        f"a study's name stands for one space, task and data; {settings.study} differs in "
                        f"{'; '.join(differences)}: pass another --study, or the same settings"
                    )
            if "uid" not in attrs:
                study.set_user_attr("created", _now())
                study.set_user_attr("uid", uuid.uuid4().hex)
            record = cls(study, rdb, settings, lock)
            record._ask_for(total, rows)
            fault_point("record.open.asked")
            # Last, because its presence says that the rest of the study's attributes are complete.
            if "settings" not in attrs:
                study.set_user_attr("settings", asdict(settings))
            record._load()
            return record

    def _ask_for(self, total: int | None, rows: Callable[[], list[TrialSpec]] | None) -> None:
        attrs: dict[str, Any] = self.study.user_attrs
        if "settings" not in attrs:  # new, or a crash came before it was complete: what is there counts for nothing
            attrs = {"rows": [plan.to_dict() for plan in rows()]} if rows is not None else {}
            for name, value in attrs.items():
                self.study.set_user_attr(name, value)
            fault_point("record.open.rows")
        self.rows = [TrialSpec.from_dict(row) for row in attrs["rows"]] if "rows" in attrs else None
        self.totals: list[int] = attrs.get("totals", [])
        if total is None and self.rows is not None:
            total = len(self.rows)
        if total is not None and total > (self.totals[-1] if self.totals else 0):
            self.totals = [*self.totals, total]
            self.study.set_user_attr("totals", self.totals)
        assert self.totals, "a new study is asked for some trials"

    def _load(self) -> None:
        tests = self.study.user_attrs
        while (run := tests.get(_run_key(len(self.runs)))) is not None:
            self.runs.append(run)
        for frozen in self.study.get_trials(deepcopy=False):
            trial = _from_storage(frozen)
            trial.test = tests.get(_test_key(trial.number), trial.test)
            self.trials[trial.number] = trial
            self._dirty.add(trial.number)
            # An epoch's attribute is committed before its intermediate value, an end's reason before its state.
            for number, epoch in enumerate(trial.epochs, start=1):
                if frozen.state == TrialState.RUNNING and number not in frozen.intermediate_values:
                    self._set_value(trial, number, epoch.value)
            if frozen.state == TrialState.RUNNING and trial.state != "running":
                self._set_state(trial)

    def close(self) -> None:
        """Let another driver have it."""
        if self._lock >= 0:
            if self.snapshots is not None:
                try:
                    self.snapshots.close()
                except (OSError, LeaseHeld) as error:
                    logger.warning("the storage lacks the record's last state: %s", _first_line(error))
            os.close(self._lock)
            self._lock = -1
            self._rdb.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Writing: each of these returns after the commit.

    def begin_run(self, provenance: dict[str, Any]) -> None:
        """Note where and with what the trials that start from now on are trained: commit, versions, devices, ..."""
        with _write_errors():
            self.study.set_user_attr(_run_key(len(self.runs)), provenance)
        self.runs.append(provenance)

    def start(self, spec: TrialSpec, space: Space | None) -> TrialRecord:
        """Enter a new trial, with everything that defines it in one commit.

        Args:
            spec: the trial.
            space: for Optuna, the search space that it lies in; None for a trial outside of any (the CNN).
        """
        ranges = distributions(space) if space is not None else {}
        params = {name: getattr(spec.config, name) for name in ranges}
        now, run = _now(), len(self.runs) - 1 if self.runs else None
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=ranges,
            user_attrs={"plan": spec.to_dict(), "started": now, "run": run, **_readable(spec)},
        )
        with _write_errors():
            fault_point("record.start.before")
            trial_id = self._storage.create_new_trial(self.study._study_id, template_trial=template)
            number = self._storage.get_trial_number_from_id(trial_id)
            if self.snapshots is not None:
                self.snapshots.save()
        fault_point("record.start.after")
        trial = TrialRecord(number=number, trial_id=trial_id, spec=spec, started=now, run=run)
        self.trials[number] = trial
        self._touch(number)
        return trial

    def add_epoch(self, number: int, epoch: int, metrics: dict[str, Any]) -> bool:
        """Enter an epoch's metrics; a repeated report is compared and ignored. Returns whether it was new.

        Args:
            number: of the trial.
            epoch: 1-based; at most one more than the record holds.
            metrics: `EpochMetrics.to_dict()`.
        """
        trial = self.trials[number]
        value = mean_accuracy(metrics)
        if epoch <= len(trial.epochs):
            there = trial.epochs[epoch - 1].value
            if abs(there - value) > _TOLERANCE:
                text = "trial %04d epoch %d was reported twice, with accuracy %.6f and then %.6f; the first one counts"
                logger.warning(text, number, epoch, there, value)
            return False
        if epoch != len(trial.epochs) + 1:
            raise AssertionError(f"trial {number} reported epoch {epoch} after {len(trial.epochs)}")
        entry = Epoch(time=_now(), value=value, metrics=metrics)
        with _write_errors():
            fault_point("record.epoch.before")
            self._storage.set_trial_user_attr(
                trial.trial_id, _epoch_key(epoch), {"time": entry.time, "metrics": metrics}
            )
        fault_point("record.epoch.between")
        self._set_value(trial, epoch, value)
        with _write_errors():
            if self.snapshots is not None:
                self.snapshots.check()
        fault_point("record.epoch.after")
        trial.epochs.append(entry)
        self._touch(number)
        return True

    def end(
        self, number: int, state: State, reason: str, *, test: dict[str, Any] | None = None, diverged: bool = False
    ) -> None:
        """End a trial. A second end of the same trial is ignored: the first one counts."""
        trial = self.trials[number]
        if trial.state != "running":
            return
        end = {"state": state, "reason": reason, "time": _now(), "test": test, "diverged": diverged}
        with _write_errors():
            fault_point("record.end.before")
            self._storage.set_trial_user_attr(trial.trial_id, "end", end)
        fault_point("record.end.between")
        _apply_end(trial, end)
        self._set_state(trial)
        with _write_errors():
            self._soon()
        fault_point("record.end.after")
        self._touch(number)

    def set_test(self, number: int, test: dict[str, Any]) -> None:
        """Keep what was read on the test images of an ended trial (Optuna's ended trials are immutable, so: a
        study's).
        """
        with _write_errors():
            self.study.set_user_attr(_test_key(number), test)
            self._soon()
        self.trials[number].test = test
        self._touch(number)

    def _soon(self) -> None:
        if self.snapshots is not None:
            self.snapshots.soon()

    def flush(self) -> None:
        """See to it that the storage holds everything. Raises RecordLost."""
        with _write_errors():
            if self.snapshots is not None:
                self.snapshots.save()

    def _set_value(self, trial: TrialRecord, epoch: int, value: float) -> None:
        if math.isfinite(value):
            with _write_errors():
                self._storage.set_trial_intermediate_value(trial.trial_id, epoch, value)

    def _set_state(self, trial: TrialRecord) -> None:
        values = [trial.value] if trial.value is not None else None
        with _write_errors():
            self._storage.set_trial_state_values(trial.trial_id, OPTUNA_STATE[trial.state], values)

    @property
    def epochs(self) -> int:
        """Epochs of all trials together."""
        return sum(len(t.epochs) for t in self.trials.values())

    # Following.

    def _touch(self, number: int) -> None:
        with self.changed:
            self._dirty.add(number)
            self.changed.notify_all()

    def take_changed(self, timeout: float) -> set[int]:
        """The numbers of trials that changed since the last call; waits up to `timeout` seconds for one."""
        with self.changed:
            if not self._dirty:
                self.changed.wait(timeout)
            numbers, self._dirty = self._dirty, set()
            return numbers


def open_record(
    storage: str,
    settings: StudySettings,
    *,
    total: int | None,
    rows: Callable[[], list[TrialSpec]] | None = None,
    say: Callable[[str], None] = logger.info,
) -> Record:
    """`Record.open` for a study in a storage; in a remote one, with its lease and what was written until that was ours.

    Args:
        storage: a folder, or a URI that pyarrow understands.
        settings, total, rows: as for `Record.open`.
        say: is told of waiting for another machine's driver.

    Raises:
        UserError: another driver has it, here or elsewhere, or it is a study with other settings.
        RecordLost: the storage cannot be reached.
    """
    folder = record_folder(storage, settings.study)
    record = Record.open(folder, settings, total=total, rows=rows)
    if not is_remote(storage):
        return record
    try:
        shared = open_folder(storage, settings.study)
        lease = Lease(shared, settings.study, folder)
        lease.take(say)
        # Whoever had the lease may have gone on since our copy was made.
        record.close()
        fetch(storage, settings.study)
        record = Record.open(folder, settings, total=total, rows=rows)
        record.snapshots = Snapshots(folder / "study.db", shared, lease)
    except LeaseHeld as error:
        record.close()
        raise UserError(str(error)) from error
    except OSError as error:
        record.close()
        raise RecordLost(f"the storage cannot be written: {error}") from error
    return record


def read_settings(path: Path) -> tuple[StudySettings, int] | None:
    """Settings of the study in a SQLite file, and the trials it was asked for; None if no complete study is there."""
    if not path.is_file():
        return None
    study, rdb = _open_storage(path, None)
    attrs = study.user_attrs if study is not None else {}
    rdb.engine.dispose()
    return (StudySettings(**attrs["settings"]), attrs["totals"][-1]) if "settings" in attrs else None


def read_totals(path: Path) -> list[int]:
    """The trials that the study in a SQLite file was asked for, as they grew."""
    study, rdb = _open_storage(path, None)
    totals = list(study.user_attrs.get("totals", [])) if study is not None else []
    rdb.engine.dispose()
    return totals


def read_trials(path: Path) -> tuple[list[TrialRecord], list[TrialSpec] | None]:
    """The trials of the study in a SQLite file, and the rows of its design if that is fixed."""
    study, rdb = _open_storage(path, None)
    trials = [_from_storage(frozen) for frozen in study.get_trials(deepcopy=False)] if study is not None else []
    rows = study.user_attrs.get("rows") if study is not None else None
    rdb.engine.dispose()
    return trials, None if rows is None else [TrialSpec.from_dict(row) for row in rows]


def best_trial(trials: list[TrialRecord]) -> TrialRecord | None:
    """The complete trial of highest objective; the earliest of equals."""
    complete = [t for t in trials if t.value is not None]
    return max(complete, key=lambda t: (t.value or 0.0, -t.number), default=None)


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """A search space as Optuna's distributions."""
    found: dict[str, BaseDistribution] = {}
    for d in space.dimensions:
        if d.type == "categorical":
            found[d.name] = CategoricalDistribution(d.choices)
        elif d.type == "int":
            found[d.name] = IntDistribution(int(d.low), int(d.top), log=d.log, step=d.step or 1)
        else:
            found[d.name] = FloatDistribution(d.low, d.high, log=d.log)
    return found


# Reading and writing details.


def mean_accuracy(metrics: dict[str, Any]) -> float:
    """The objective of one epoch: mean validation accuracy over seeds, in [0, 1]; NaN once a seed has diverged."""
    return statistics.fmean(metrics["val_accuracy"])


def _from_storage(frozen: FrozenTrial) -> TrialRecord:
    attrs = frozen.user_attrs
    trial = TrialRecord(
        number=frozen.number,
        trial_id=frozen._trial_id,
        spec=TrialSpec.from_dict(attrs["plan"]),
        started=attrs["started"],
        run=attrs.get("run"),
    )
    while (entry := attrs.get(_epoch_key(len(trial.epochs) + 1))) is not None:
        metrics = entry["metrics"]
        trial.epochs.append(Epoch(time=entry["time"], value=mean_accuracy(metrics), metrics=metrics))
    if "end" in attrs:
        _apply_end(trial, attrs["end"])
    return trial


def _apply_end(trial: TrialRecord, end: dict[str, Any]) -> None:
    trial.reason, trial.ended, trial.test = end["reason"], end["time"], end["test"]
    trial.diverged = end.get("diverged", end["reason"].startswith("diverged"))  # older records say it in words only
    trial.state = end["state"]  # last: the tracker's thread takes it for the sign that the rest is there


def _epoch_key(epoch: int) -> str:
    return f"epoch {epoch:04d}"


def _run_key(number: int) -> str:
    return f"run {number:04d}"


def _test_key(number: int) -> str:
    return f"test {number:04d}"


def _readable(spec: TrialSpec) -> dict[str, Any]:
    """What a person looking at Optuna's dashboard wants as columns of their own."""
    return {"origin": spec.origin, "row": spec.row, "seeds": ",".join(map(str, spec.seeds))}


def _now() -> int:
    return time.time_ns() // 1_000_000


def _open_storage(path: Path, name: str | None) -> tuple[optuna.Study | None, RDBStorage]:
    """The Optuna study in a SQLite file, made if absent and named; unnamed: whichever is there."""
    try:
        rdb = RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})

        @sqlalchemy.event.listens_for(rdb.engine, "connect")
        def _durable(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")

        rdb.engine.dispose()  # the connection that made the tables was not listened to
        if name is None:
            names = optuna.get_all_study_names(rdb)
            return (optuna.load_study(study_name=names[0], storage=rdb) if names else None), rdb
        study = optuna.create_study(study_name=name, storage=rdb, direction="maximize", load_if_exists=True)
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, sqlalchemy.exc.OperationalError) or isinstance(error, sqlalchemy.exc.OperationalError):
            raise RecordLost(f"the record cannot be opened: {_first_line(cause)}") from error  # full, I/O, locked
        raise UserError(
            f"a study's record must be an Optuna SQLite file; {path} cannot be used ({_first_line(cause)}): "
            "pass another --study, or move the file away"
        ) from error
    return study, rdb


_DATABASE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError, LeaseHeld)


class _write_errors:
    """Turn the database's refusal to write into RecordLost."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and isinstance(error, _DATABASE_ERRORS):
            raise RecordLost(f"the record cannot be written: {_first_line(error.__cause__ or error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _lock(path: Path) -> int:
    """Hold the file's lock until closed or dead. The file names its holder."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 100).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise UserError(
            f"a study has one driver at a time; process {holder} is running {path.parent.name}: wait for it or end it"
        ) from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}".encode(), 0)
    return handle
