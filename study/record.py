"""The durable record of a study: Optuna's storage, which only this file writes.

A study continues from the record and the checkpoints beside it, and needs nothing else. The storage is a SQLite file
that the driver alone writes. SQLite, because its commits survive a killed process and a torn tail, which Optuna's
journal file does not. A write-ahead log with synchronous=FULL, so that a commit also survives a power cut (about 1 ms
each, twice an epoch): MLflow is written after the commit, and must never hold more than the record.

A trial enters the record with its whole configuration in one commit. It ends in two commits: first the reason, then the
final state. If a crash comes in between, `Record.open` completes what was begun.

Every entry has a checksum (`study.integrity`), which is compared when a record is opened or read. While it is open, the
file is looked after at every commit, and copied to backups (`study.snapshots`).

In the storage:
  study user attributes   settings (StudySettings), totals (trials asked for, as it changed), aims (of the trials that
                          each total added), rows (of a fixed design),
                          asked (points of --try), taken over (trials of an earlier study, from --from), uid, created,
                          "run 0007" (of one run of the command: commit, versions, devices, ...),
                          "test 0007" (of a trial whose test images were read after its end), driver epoch (how often a
                          driver has taken over a study in an object store)
  trial user attributes   plan (TrialSpec.to_dict); run (the number of the run that started it); origin, row, seeds (for
                          readers); "epoch 0007" (one an epoch: {"time": ms since 1970, "metrics":
                          EpochMetrics.to_dict()}); end ({"state", "reason", "time", "test", "diverged"})
  intermediate values     mean validation accuracy over seeds, by epoch
  state                   RUNNING; COMPLETE or PRUNED with the last epoch's value; FAIL
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import sqlite3
import statistics
import struct
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import optuna
import sqlalchemy.event
import sqlalchemy.exc
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import BaseModel
from optuna.trial import FrozenTrial, TrialState

from ramcore.config import Config
from ramcore.errors import UserError, first_line
from ramcore.space import Space, Values
from study import integrity
from study.checkpoints import numbers_present
from study.designs import AIMS, DEFAULT_SOBOL_SHARE, TrialSpec, of_record
from study.faults import fault_point
from study.snapshots import Lease, LeaseHeld, Snapshots, fetch, set_aside
from study.storage import RECORD, LocalFolder, Storage

if TYPE_CHECKING:
    from study.object_store import RemoteFolder

logger = logging.getLogger(__name__)

MakeRows = Callable[[], list[TrialSpec]]  # makes the rows of a fixed design
State = Literal["running", "complete", "pruned", "failed"]
OPTUNA_STATE: dict[State, TrialState] = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
OF_STUDY = {"settings": dict, "uid": str, "created": int, "totals": list}  # attributes that no study can be without
OF_TRIAL = {"plan": dict, "started": int}  # nor any trial
_MARK = 1 << 40  # the byte of the record that its driver locks: beyond those that SQLite locks
_TOLERANCE = 1e-6  # between two reports of one epoch; a larger difference means that a resumed trial drifted


class RecordLost(RuntimeError):
    """The record can no longer be written (full disk, storage gone). The study must stop, and can be continued."""


class RecordGone(RecordLost):
    """The record was moved, deleted or damaged while the study ran: the same command alone does not continue."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The identity of a study: a request to continue it must have the same settings."""

    study: str
    task: str
    data: str
    digest: str  # sha256 of the data
    design: str
    epochs: int
    seeds_per_trial: int
    seed: int  # of Sobol and TPE
    sobol_share: float = DEFAULT_SOBOL_SHARE  # of a search's trials
    canvas: int = 0  # as `Config.canvas`
    own_space: bool = False  # the space is not that of study/search_space.py, but asked for or an earlier study's
    space: dict[str, Any]  # Space.to_dict()

    def check_same(self, asked: StudySettings) -> None:
        """Raises UserError if the settings asked for are not these."""
        ours, theirs = self._flat(), asked._flat()
        differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if differing:
            words = [f"{n} {ours.get(n, 'absent')} there, {theirs.get(n, 'absent')} asked for" for n in differing]
            if "epochs" in differing:
                words[differing.index("epochs")] += (
                    " (a trial follows its schedule over all epochs, so no finished one can be trained on)"
                )
            teaches = ""
            if self.design == asked.design == "search":
                teaches = f" (with --from {self.study} it learns from this one)"
            raise UserError(
                f"a study's name stands for one space, task and data; {asked.study} differs in {'; '.join(words)}: "
                f"pass another --study{teaches}, or the same settings"
            )

    def _flat(self) -> dict[str, Any]:
        """Every setting and everything of the space by name, but the reasons and units of ranges: they may change."""
        flat = asdict(self)
        del flat["own_space"]  # not what it is, but where it is from
        space, flat["images"] = flat.pop("space"), f"sha256 {flat.pop('digest')[:12]}"
        ranges = ((d["name"], key, value) for d in space["dimensions"] for key, value in d.items())
        inside = {f"{name}.{key}": value for name, key, value in ranges if key not in ("reason", "unit")}
        inside |= {f"default {name}": value for name, value in space["default"].items()}
        searched = {d["name"] for d in space["dimensions"]}
        fixed = asdict(Config()) | space["fixed"]  # a field that is newer than a study had its default value there
        inside |= {name: value for name, value in fixed.items() if name not in flat and name not in searched}
        inside["constraint"] = [constraint["rule"] for constraint in space["constraints"]]
        return flat | {f"space: {name}": value for name, value in inside.items()}


class AskedPoint(NamedTuple):
    """A point that --try asks for."""

    at: int  # trials that had begun then: it is one of the next
    text: str  # as it was asked for
    values: Values  # of all searched fields

    @staticmethod
    def read(attrs: Mapping[str, Any]) -> list[AskedPoint]:
        """The points in a study's attributes."""
        return [AskedPoint(*point) for point in attrs.get("asked", ())]


class TakenTrial(NamedTuple):
    """An ended trial of an earlier study, from which a new one learns. It is no trial of the new one."""

    number: int  # there
    origin: str
    state: str  # complete or pruned
    values: Values  # of the new study's searched fields
    accuracy: list[float]  # by epoch, mean over seeds


class TakenOver(NamedTuple):
    """What a study has taken over from an earlier one when it began."""

    study: str
    epochs: int  # of that study's trials
    trials: list[TakenTrial]

    def summary(self, epochs: int) -> str:
        """One line about what they teach a study whose trials have `epochs` epochs."""
        informs = (
            "TPE and the report" if epochs == self.epochs else f"TPE alone, as their schedule has {self.epochs} epochs"
        )
        return f"from {len(self.trials)} trials of {self.study}, which inform {informs}; none counts as this study's"

    @staticmethod
    def read(attrs: Mapping[str, Any]) -> TakenOver | None:
        """What a study's attributes hold."""
        if (taken := attrs.get("taken over")) is None:
            return None
        study, epochs, trials = taken
        return TakenOver(study, epochs, [TakenTrial(*trial) for trial in trials])


@dataclass(kw_only=True)
class Epoch:
    """One recorded epoch of a trial."""

    time: int  # ms since 1970, when it was recorded
    value: float  # mean validation accuracy over seeds
    metrics: dict[str, Any]  # EpochMetrics.to_dict()


@dataclass(kw_only=True)
class TrialRecord:
    """One trial of the record. `Record` keeps it equal to what is stored."""

    number: int
    spec: TrialSpec
    started: int  # ms since 1970
    run: int | None = None  # number of the run of the command that started it
    epochs: list[Epoch] = field(default_factory=list)  # epochs 1, 2, ... without gaps
    state: State = "running"
    reason: str = ""  # why it ended
    diverged: bool = False  # it ended because a loss or a gradient was not finite
    ended: int | None = None  # ms since 1970
    test: dict[str, Any] | None = None  # on the test images, if they were read; see `study.trainable.test_results`

    @property
    def value(self) -> float | None:
        """The objective, of a complete trial only: mean validation accuracy after the last epoch."""
        return self.epochs[-1].value if self.state == "complete" and self.epochs else None


@contextmanager
def _write_errors() -> Iterator[None]:
    """Raises RecordLost where the database or the storage cannot be written."""
    try:
        yield
    except integrity.RecordGone as error:
        raise RecordGone(str(error)) from error
    except (
        sqlalchemy.exc.SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        sqlite3.Error,
        OSError,
        LeaseHeld,
    ) as error:
        raise RecordLost(f"the record cannot be written: {first_line(error.__cause__ or error)}") from error


class Record:
    """An open record. Only one process can hold a record open for writing; see `open`."""

    def __init__(self, path: Path, settings: StudySettings, held: contextlib.ExitStack) -> None:
        """Use `open`. Raises UserError, RecordLost. `held` lets go of the record when it is closed."""
        _check(path, numbers_present(LocalFolder(path.parent)))
        if not path.exists() and path.with_name(integrity.COMMITS).exists():
            text = "%s is gone: the study starts anew, and what was left of the old one is kept as %s-*"
            logger.warning(text, path, set_aside(path))
        held.enter_context(_marked(path))
        study, self._rdb = _open_database(path, settings.study)
        assert study is not None
        fault_point("record.open")
        attrs = study.user_attrs
        if "settings" in attrs:  # else it is new, or a crash came before all its attributes were written
            _check_whole(path, study)
            of_record(StudySettings, attrs["settings"]).check_same(settings)
        if "uid" not in attrs:
            study.set_user_attr("created", _now())
            study.set_user_attr("uid", uuid.uuid4().hex)
        self.study, self.settings = study, settings
        self.trials: dict[int, TrialRecord] = {}
        self.changed = threading.Condition()  # notified after each change
        self.created: int = study.user_attrs["created"]  # ms since 1970
        self.uid: str = study.user_attrs["uid"]  # tells two studies of one name apart in MLflow
        self.runs = _runs(attrs)  # see `begin_run`
        self.totals: list[int] = []  # trials asked for, as it changed
        self.aims: list[str] = []  # of the trials that each total added
        self.rows: list[TrialSpec] | None = None  # of a fixed design
        self.asked: list[AskedPoint] = []
        self.taken: TakenOver | None = None
        self.snapshots: Snapshots | None = None  # once it is open
        self._dirty: set[int] = set()  # numbers of the trials that changed; see `take_changed`
        self._held: contextlib.ExitStack | None = held  # None once it is closed
        self._commits = integrity.Commits(path)
        self._study_id = self._rdb.get_study_id_from_name(settings.study)
        self._trial_ids: dict[int, int] = {}  # Optuna's, of the trials that can be written to

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: StudySettings,
        *,
        total: int | None,
        rows: MakeRows | None = None,
        asked: Sequence[AskedPoint] = (),
        taken: TakenOver | None = None,
        aim: str = AIMS[0],
    ) -> Self:
        """Create the record in `folder`, or continue the one that is there.

        Args:
            folder: of the study; made if absent.
            settings: of the study asked for.
            total: trials asked for, all runs of the command together; None: all rows, or as many as before.
            rows: None for a search. A continued study keeps the rows that it has.
            asked: points to try, beside those that were asked for before.
            taken: of a new study.
            aim: one of AIMS, of the trials that the total adds.

        Raises:
            UserError: another process holds the record, or it is of a study with other settings.
            RecordLost: the record cannot be read or written.
        """
        held = contextlib.ExitStack()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.callback(_lock(folder / "driver.lock").release)
        except OSError as error:
            raise UserError(
                f"a study's folder must be one that can be written; {folder}: {error.strerror}: pass another --storage"
            ) from error
        try:
            with _write_errors():
                record = cls(folder / RECORD, settings, held)
                record._ask_for(total, aim, rows, asked, taken)
                record._load_trials()
                record._commits.done()
                record.snapshots = Snapshots(folder / RECORD)
                record.snapshots.soon()
                return record
        except BaseException:
            held.close()
            raise

    def _ask_for(
        self,
        total: int | None,
        aim: str,
        rows: MakeRows | None,
        asked: Sequence[AskedPoint],
        taken: TakenOver | None,
    ) -> None:
        """Enter which trials the study is asked for; a continued study keeps those that have begun."""
        is_new = "settings" not in self.study.user_attrs
        if rows is not None and is_new:
            self.study.set_user_attr("rows", [spec.to_dict() for spec in rows()])
            fault_point("record.open.rows")
        if taken is not None and is_new:
            self.study.set_user_attr("taken over", taken)
        before = AskedPoint.read(self.study.user_attrs)
        if more := [point for point in asked if point.values not in [known.values for known in before]]:
            self.study.set_user_attr("asked", [*before, *more])
        attrs = self.study.user_attrs
        self.asked, self.taken = AskedPoint.read(attrs), TakenOver.read(attrs)
        self.rows = _rows(attrs)
        self.totals = [] if is_new else attrs["totals"]
        self.aims = _aims(attrs, self.totals)
        if total is None and self.rows is not None and is_new:
            total = len(self.rows)
        if total is not None and self.totals:
            total = max(total, len(self.study.get_trials(deepcopy=False)))
        if total is not None and total != (self.totals or [0])[-1]:
            self.totals, self.aims = [*self.totals, total], [*self.aims, aim]
            self.study.set_user_attr("aims", self.aims)  # before the totals, which say how many of them count
            self.study.set_user_attr("totals", self.totals)
        assert self.totals, "a new study is asked for some trials"
        fault_point("record.open.asked")
        if is_new:  # last, because it says that the other attributes are there
            self.study.set_user_attr("settings", asdict(self.settings))

    def _load_trials(self) -> None:
        """Load the trials, and complete the writes that a crash cut off."""
        attrs = self.study.user_attrs
        for frozen in self.study.get_trials(deepcopy=False):
            trial = _from_storage(frozen)
            number = trial.number
            trial.test = attrs.get(f"test {number:04d}", trial.test)
            self.trials[number] = trial
            self._dirty.add(number)
            if frozen.state == TrialState.RUNNING:
                self._trial_ids[number] = self._rdb.get_trial_id_from_study_id_trial_number(self._study_id, number)
                # An epoch's attribute is committed before its intermediate value, an end's reason before its state.
                for epoch, entry in enumerate(trial.epochs, start=1):
                    if epoch not in frozen.intermediate_values:
                        self._set_value(trial, epoch, entry.value)
                if trial.state != "running":
                    self._set_state(trial)

    def close(self) -> None:
        """Release the record for another driver."""
        if self._held is None:
            return
        if self.snapshots is not None:
            try:
                self.snapshots.close()
            except (OSError, LeaseHeld) as error:
                logger.warning("the record's last state was not copied: %s", first_line(error))
        self._commits.close()
        self._rdb.engine.dispose()
        self._held.close()
        self._held = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_alone(self) -> None:
        """Raises LeaseHeld if another driver may have taken the study over while this one was suspended."""
        if self.snapshots is not None:
            self.snapshots.check_alone()

    def take_over(self, folder: RemoteFolder, lease: Lease, version: str | None) -> None:
        """Become the one driver that can write the record to an object store; see `Snapshots.take_over`."""
        assert self.snapshots is not None
        self.study.set_user_attr("driver epoch", self.study.user_attrs.get("driver epoch", 0) + 1)
        self._commits.done()
        self.snapshots.take_over(folder, lease, version)

    # Writing: each of these returns after the commit, or raises RecordLost.

    @_write_errors()
    def begin_run(self, provenance: dict[str, Any]) -> None:
        """Enter the commit, versions, devices, ... with which the trials that start from now on are trained."""
        self.study.set_user_attr(f"run {len(self.runs):04d}", provenance)
        self._commits.done()
        self.runs.append(provenance)

    @_write_errors()
    def start(self, spec: TrialSpec, space: Space | None) -> TrialRecord:
        """Enter a new trial and all that defines it in one commit. `space` is None for a trial outside (the CNN)."""
        ranges = distributions(space) if space is not None else {}
        now, run = _now(), len(self.runs) - 1 if self.runs else None
        columns = {"origin": spec.origin, "row": spec.row, "seeds": ",".join(map(str, spec.seeds))}  # of the dashboard
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params={name: getattr(spec.config, name) for name in ranges},
            distributions=ranges,
            user_attrs={"plan": spec.to_dict(), "started": now, "run": run, **columns},
        )
        fault_point("record.start.before")
        trial_id = self._rdb.create_new_trial(self._study_id, template_trial=template)
        number = self._rdb.get_trial_number_from_id(trial_id)
        self._commits.done()
        if self.snapshots is not None and self.snapshots.is_remote:
            self.snapshots.save()
        fault_point("record.start.after")
        trial = TrialRecord(number=number, spec=spec, started=now, run=run)
        self._trial_ids[number], self.trials[number] = trial_id, trial
        self._touch(number)
        return trial

    @_write_errors()
    def add_epoch(self, number: int, epoch: int, metrics: dict[str, Any]) -> bool:
        """Enter the metrics (`EpochMetrics.to_dict()`) of a trial's epoch, from 1. Returns whether they were new.

        A repeated report is compared and ignored.
        """
        trial = self.trials[number]
        entry = Epoch(time=_now(), value=mean_accuracy(metrics), metrics=metrics)
        if epoch <= len(trial.epochs):
            there = trial.epochs[epoch - 1].value
            if abs(there - entry.value) > _TOLERANCE:
                text = "trial %04d epoch %d was reported twice, with accuracy %.6f and then %.6f; the first one counts"
                logger.warning(text, number, epoch, there, entry.value)
            return False
        assert epoch == len(trial.epochs) + 1, f"trial {number} reported epoch {epoch} after {len(trial.epochs)}"
        fault_point("record.epoch.before")
        stored = {"time": entry.time, "metrics": metrics}
        self._rdb.set_trial_user_attr(self._trial_ids[number], f"epoch {epoch:04d}", stored)
        fault_point("record.epoch.between")
        self._set_value(trial, epoch, entry.value)
        self._commits.done()
        if self.snapshots is not None:
            self.snapshots.check()
        fault_point("record.epoch.after")
        trial.epochs.append(entry)
        self._touch(number)
        return True

    @_write_errors()
    def end(
        self, number: int, state: State, reason: str, *, test: dict[str, Any] | None = None, diverged: bool = False
    ) -> None:
        """End a trial. A second end of the same trial is ignored: the first one counts."""
        trial = self.trials[number]
        if trial.state != "running":
            return
        end = {"state": state, "reason": reason, "time": _now(), "test": test, "diverged": diverged}
        fault_point("record.end.before")
        self._rdb.set_trial_user_attr(self._trial_ids[number], "end", end)
        fault_point("record.end.between")
        _apply_end(trial, end)
        self._set_state(trial)
        self._commits.done()
        if self.snapshots is not None:
            self.snapshots.soon()
        fault_point("record.end.after")
        self._touch(number)

    @_write_errors()
    def set_test(self, number: int, test: dict[str, Any]) -> None:
        """Enter an ended trial's test results. The study gets them: Optuna allows no change of an ended trial."""
        self.study.set_user_attr(f"test {number:04d}", test)
        self._commits.done()
        if self.snapshots is not None:
            self.snapshots.soon()
        self.trials[number].test = test
        self._touch(number)

    @_write_errors()
    def flush(self) -> None:
        """Check the record, and copy it to its backups and to its storage now."""
        self._commits.check()
        if self.snapshots is not None:
            self.snapshots.save()

    def _set_value(self, trial: TrialRecord, epoch: int, value: float) -> None:
        if math.isfinite(value):
            self._rdb.set_trial_intermediate_value(self._trial_ids[trial.number], epoch, value)

    def _set_state(self, trial: TrialRecord) -> None:
        # Optuna also keeps the last value of a stopped trial, for its dashboard.
        last = trial.epochs[-1].value if trial.epochs and trial.state in ("complete", "pruned") else math.nan
        values = [last] if math.isfinite(last) else None
        self._rdb.set_trial_state_values(self._trial_ids[trial.number], OPTUNA_STATE[trial.state], values)

    @property
    def epochs(self) -> int:
        """Recorded epochs of all trials together."""
        return sum(len(t.epochs) for t in self.trials.values())

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
        if numbers and self.snapshots is not None and self.snapshots.is_taken():
            return set()  # another driver tracks the study now
        return numbers


def open_record(
    storage: Storage,
    settings: StudySettings,
    *,
    total: int | None,
    rows: MakeRows | None = None,
    asked: Sequence[AskedPoint] = (),
    taken: TakenOver | None = None,
    aim: str = AIMS[0],
    say: Callable[[str], None] = logger.info,
) -> Record:
    """`Record.open` for a study in a storage. In a remote one, take its lease first.

    `say` is called with a line if another machine's driver has to be waited for. Raises UserError as `Record.open`, or
    if another machine's driver has the study; RecordLost if the storage cannot be reached.
    """
    folder = storage.record_folder(settings.study)
    record = Record.open(folder, settings, total=total, rows=rows, asked=asked, taken=taken, aim=aim)
    shared = storage.folder(settings.study)
    if isinstance(shared, LocalFolder):
        return record
    try:
        lease = Lease(shared, settings.study, folder)
        lease.take(say)
        # The driver that had the lease may have gone on since our copy was made.
        record.close()
        version = fetch(storage, settings.study)
        record = Record.open(folder, settings, total=total, rows=rows, asked=asked, taken=taken, aim=aim)
        record.take_over(shared, lease, version)
    except (LeaseHeld, OSError) as error:
        record.close()
        lost = RecordLost(f"the storage cannot be written: {error}")
        raise (UserError(str(error)) if isinstance(error, LeaseHeld) else lost) from error
    return record


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep drivers out of a study's folder. Raises UserError if one is running; OSError."""
    lock = _lock(folder / "driver.lock")
    try:
        yield
    finally:
        lock.release()


def write_anew(path: Path, study: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> None:
    """Write a record from the user attributes of a study and of its trials, by number.

    Values and states of trials are not written: `Record.open` completes them from the attributes.
    """
    settings = of_record(StudySettings, study["settings"])
    made, rdb = _open_database(path, settings.study)
    assert made is not None
    space = Space.from_dict(settings.space)
    for attrs in trials:
        spec = TrialSpec.from_dict(attrs["plan"])
        values = {name: getattr(spec.config, name) for name in space.names}
        ranges = distributions(space) if values and spec.config.is_recurrent and space.contains(values) else {}
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params={name: values[name] for name in ranges},
            distributions=ranges,
            user_attrs=dict(attrs),
        )
        rdb.create_new_trial(rdb.get_study_id_from_name(settings.study), template_trial=template)
    for name in sorted(study, key=lambda name: name == "settings"):  # last: it says that the others are there
        made.set_user_attr(name, study[name])
    rdb.engine.dispose()


class StoredStudy(NamedTuple):
    """A study as its record holds it."""

    settings: StudySettings
    totals: list[int]  # trials asked for, as this changed
    aims: list[str]  # of the trials that each of these added
    rows: list[TrialSpec] | None  # of a fixed design
    trials: list[TrialRecord]
    asked: list[AskedPoint]
    taken: TakenOver | None
    flags: dict[str, Any]  # of the newest run of the command that trained

    @property
    def ended(self) -> int:
        """Trials that have ended."""
        return sum(trial.state != "running" for trial in self.trials)


def read_study(path: Path, trials: Sequence[int] = ()) -> StoredStudy | None:
    """Read the study in a SQLite file without opening it for writing; None if no complete study is there.

    `trials` are the numbers of those whose checkpoints are there. Raises RecordDamaged, UserError, RecordLost.
    """
    _check(path, trials)
    if not path.is_file():
        return None
    study, database = _open_database(path, None)
    try:
        attrs = study.user_attrs if study is not None else {}
        if study is None or "settings" not in attrs:
            if study is not None and (study.study_name != path.parent.name or study.get_trials(deepcopy=False)):
                raise UserError(
                    f"a study's record must be made by this project; {path} holds the Optuna study {study.study_name}, "
                    "made by something else: pass another --study, or move the file away"
                )
            return None
        _check_whole(path, study)
        settings = of_record(StudySettings, attrs["settings"])
        found = [_from_storage(frozen) for frozen in study.get_trials(deepcopy=False)]
        runs = _runs(attrs)
        flags = runs[-1].get("flags", {}) if runs else {}
        asked, taken = AskedPoint.read(attrs), TakenOver.read(attrs)
        rows, aims = _rows(attrs), _aims(attrs, attrs["totals"])
        return StoredStudy(settings, attrs["totals"], aims, rows, found, asked, taken, flags)
    finally:
        database.engine.dispose()


def _aims(attrs: Mapping[str, Any], totals: Sequence[int]) -> list[str]:
    """The aim of each total; records of earlier versions have none."""
    return [*attrs.get("aims", ()), *[AIMS[0]] * len(totals)][: len(totals)]


def best_trial(trials: list[TrialRecord]) -> TrialRecord | None:
    """The complete trial of the configuration of highest objective, a mean over its trials; the earliest of equals."""
    complete = [t for t in trials if t.value is not None]
    values: dict[Config, list[float]] = defaultdict(list)
    for trial in complete:
        values[trial.spec.config].append(trial.value or 0.0)
    return max(complete, key=lambda t: (statistics.fmean(values[t.spec.config]), -t.number), default=None)


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


def mean_accuracy(metrics: dict[str, Any]) -> float:
    """The objective of one epoch: mean validation accuracy over seeds, in [0, 1]; NaN once a seed has diverged."""
    return statistics.fmean(metrics["val_accuracy"])


def _runs(attrs: Mapping[str, Any]) -> list[Any]:
    """The facts of each run of the command, in a study's attributes."""
    return [attrs[name] for name in sorted(attrs) if name.startswith("run ")]


def _from_storage(frozen: FrozenTrial) -> TrialRecord:
    attrs = frozen.user_attrs
    spec = TrialSpec.from_dict(attrs["plan"])
    trial = TrialRecord(number=frozen.number, spec=spec, started=attrs["started"], run=attrs.get("run"))
    while (entry := attrs.get(f"epoch {len(trial.epochs) + 1:04d}")) is not None:
        trial.epochs.append(Epoch(**entry, value=mean_accuracy(entry["metrics"])))
    if "end" in attrs:
        _apply_end(trial, attrs["end"])
    return trial


def _apply_end(trial: TrialRecord, end: dict[str, Any]) -> None:
    trial.reason, trial.ended, trial.test = end["reason"], end["time"], end["test"]
    trial.diverged = end.get("diverged", end["reason"].startswith("diverged"))  # older records say it in words only
    trial.state = end["state"]  # last: once it is set, the tracker's thread reads the other fields


def _rows(attrs: dict[str, Any]) -> list[TrialSpec] | None:
    return [TrialSpec.from_dict(row) for row in attrs["rows"]] if "rows" in attrs else None


def _now() -> int:
    return time.time_ns() // 1_000_000


def _check(path: Path, trials: Sequence[int]) -> None:
    """`integrity.check`. Raises RecordDamaged; RecordLost if the record cannot be read now."""
    try:
        integrity.check(path, trials)
    except (sqlite3.Error, OSError) as error:
        raise RecordLost(f"the record cannot be opened: {first_line(error)}") from error


def lost(attrs: Mapping[str, Any], kinds: Mapping[str, type]) -> list[str]:
    """The names of what is missing among attributes of these kinds, or empty."""
    return [name for name, kind in kinds.items() if not isinstance(attrs.get(name), kind) or attrs[name] in ([], {})]


def _check_whole(path: Path, study: optuna.Study) -> None:
    """Raises RecordDamaged if a study lacks what every version of this project writes."""
    missing = lost(study.user_attrs, OF_STUDY)
    if "uid" not in study.user_attrs:  # a study that is older than these
        missing = [name for name in missing if name not in ("created", "uid")]
    for trial in study.get_trials(deepcopy=False):
        missing += [f"{name} of trial {trial.number:04d}" for name in lost(trial.user_attrs, OF_TRIAL)]
    if missing:
        raise integrity.RecordDamaged(path, f"lacks its {', '.join(missing[:3])}")


def _open_database(path: Path, name: str | None) -> tuple[optuna.Study | None, RDBStorage]:
    """The Optuna study in a SQLite file: the named one, made if absent; without a name, the one there, or None."""
    try:
        uri = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()  # ? and % in the path are escaped
        rdb = RDBStorage(uri, engine_kwargs={"connect_args": {"timeout": 60}})

        if name is not None:
            # A process that was killed while Optuna made the tables may have left one without its index. Optuna does
            # not complete it, and without it two studies can have one name.
            for table in BaseModel.metadata.tables.values():
                for index in table.indexes:
                    index.create(rdb.engine, checkfirst=True)
            integrity.adopt(path)

        @sqlalchemy.event.listens_for(rdb.engine, "connect")
        def _durable(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            if name is not None:
                integrity.protect(connection)

        rdb.engine.dispose()  # the connection that made the tables is older than the listener
        if name is None:
            names = optuna.get_all_study_names(rdb)
            return (optuna.load_study(study_name=names[0], storage=rdb) if names else None), rdb
        return optuna.create_study(study_name=name, storage=rdb, direction="maximize", load_if_exists=True), rdb
    except (
        sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError, RuntimeError
    ) as error:  # fmt: skip
        cause = error.__cause__ or error
        if any(isinstance(e, sqlalchemy.exc.OperationalError | sqlite3.OperationalError) for e in (cause, error)):
            raise RecordLost(f"the record cannot be opened: {first_line(cause)}") from error  # full, I/O, locked
        raise UserError(
            f"a study's record must be an Optuna SQLite file; {path} cannot be used ({first_line(cause)}): "
            "pass another --study, or move the file away"
        ) from error


def _lock(path: Path) -> FileLock:
    """Lock a file, which then holds the number of this process. Raises UserError if another one has it; OSError."""
    held = FileLock(path, blocking=False, thread_local=False)
    try:
        held.acquire()
    except Timeout:
        holder = path.read_text(errors="replace").strip() or "unknown"
        raise UserError(
            f"a study has one driver at a time; process {holder} is running {path.parent.name}: wait for it or end it"
        ) from None
    path.write_text(str(os.getpid()))
    return held


@contextlib.contextmanager
def _marked(path: Path) -> Iterator[None]:
    """Lock a byte of the record itself, in case someone deletes the lock file.

    A lock of the open file, which SQLite's own locks do not touch. Only Linux has such locks. Raises UserError if
    another process has it; OSError.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if hasattr(fcntl, "F_OFD_SETLK"):
            try:
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, _MARK, 1, 0))
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise UserError(
                        "a study has one driver at a time; another process has the record open, though its driver.lock "
                        f"is gone: end the process that is running {path.parent.name}"
                    ) from None
                logger.debug("%s cannot be marked: %s", path, error)  # a file system without such locks
        yield
    finally:
        os.close(file)
