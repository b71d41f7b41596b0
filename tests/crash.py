"""Crash test: a serial seeded study, killed and disturbed again and again, must end as one that never was.

Each session is a forked process that opens the study and works on it in one thread (scheduler, training, checkpoints,
record; tracking in its own thread, as always) until a fault stops it or nothing is left to do. Faults are drawn from
a seed: kill -9 at a named place of `study.faults`, or at any moment; a full disk; calls to MLflow that fail before or
after they took effect, or hang; MLflow's database locked, so that it is read only or not at all, or deleted; the
study's folder moved away, or a bit of the record flipped, under a running session; a session suspended while another
one starts; and between sessions, checkpoints, leases, record or write-ahead log flipped, cut short or deleted. A
session that finds damage must say so and end; the record is then repaired, or the folder put back. Once MLflow was
deleted, the record is left alone: nothing else may know the newest trial. Whenever a session ends by itself, what it
says to be missing in MLflow is compared with what is missing. At the end Optuna's storage, MLflow and the checkpoint
folder are compared with those of an undisturbed study.

Every third study is in a store that two machines see, and moves between them. The store is a folder that pyarrow opens
as it opens a bucket. There a session that was suspended wakes beside its successor.

    python -m tests.crash --faults 1000 --seed 3
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import mlflow.store.db.utils
import optuna
import sqlalchemy
import torch

from ramcore.config import Config
from ramcore.data import Split, SplitName, TaskData, make_task
from ramcore.errors import UserError
from ramcore.sources import load_source
from ramcore.space import Space
from ramcore.trainer import Trainer
from study import best, designs, faults, results, snapshots, tracking
from study.asha import ASHA
from study.integrity import RecordDamaged
from study.object_store import RemoteFolder
from study.record import RecordGone, RecordLost, StudySettings, open_record
from study.repair import repair
from study.scheduler import StudyScheduler, guarded
from study.schema import EPOCH_MEANS
from study.search_space import configuration, search_space
from study.snapshots import fetch
from study.storage import RECORD, LocalFolder, Storage
from study.tracking import Provenance, Tracker
from study.trainable import SharedData, run_trial

NAME = "crash"
TOTALS, EPOCHS = (5, 8), 3  # trials asked for at first, and then
PLACES = (
    "record.open", "record.open.rows", "record.open.asked", "record.start.before", "record.start.after",
    "record.epoch.before", "record.epoch.between", "record.epoch.after",
    "record.end.before", "record.end.between", "record.end.after",
    "scheduler.started", "scheduler.decision.before", "scheduler.decision.after",
    "trial.start", "file.write.before", "file.write.half", "file.rename.before", "file.rename.after",
    "report.before", "report.after",
    "tracking.before", "tracking.after", "tracking.run.before", "tracking.run.after",
    "tracking.call.before", "tracking.call.after",
)  # fmt: skip
FULL_DISK = ("record.start.before", "record.epoch.before", "record.end.before", "file.write.before", "file.write.half")
# Exit codes of a session: it found a damaged record; its record went away or was damaged; another session was running
DAMAGED, GONE, REFUSED = 2, 4, 5
MACHINES = ("one", "another")
OUTAGE = ("tracking.run.before", "tracking.run.after", "tracking.call.before", "tracking.call.after")


class Silent:
    """A callback that prints nothing."""

    def started(self, trial: Any) -> None: ...
    def reported(self, trial: Any) -> None: ...
    def ended(self, trial: Any) -> None: ...
    def note(self, text: str) -> None: ...


class _Stopped(BaseException):
    """Ends a trial's training where Tune would end its actor's thread."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The study under test: digits, so small that an epoch takes milliseconds."""

    space: Space
    settings: StudySettings
    data: TaskData

    @staticmethod
    def make(epochs: int = EPOCHS) -> Study:
        source = load_source("digits")
        splits: dict[SplitName, Split] = {
            name: Split(split.images[:120], split.labels[:120]) for name, split in source.items()
        }
        data = make_task("digits", "original", splits)
        base = Config(
            data="digits", task="original", epochs=epochs, batch_size=40, hidden_size=16, glimpse_size=8,
            learning_rate=3e-3, num_glimpses=2, patch_size=6, num_scales=1,
        )  # fmt: skip
        space = search_space(base)
        settings = StudySettings(
            study=NAME, task="original", data="digits", digest=data.digest, design="search", epochs=epochs,
            seeds_per_trial=2, seed=0, space=space.to_dict(),
        )  # fmt: skip
        return Study(space=space, settings=settings, data=data)


def home(root: Path) -> Path:
    """Where the study of a folder is: in the store in it, or in the folder itself."""
    return root / "store" if (root / "store").exists() else root


def storage_of(root: Path) -> Storage:
    """The same as a storage."""
    return Storage.parse(str(root) if home(root) == root else f"file://{home(root)}")


def work(study: Study, root: Path, trials: int = TOTALS[-1]) -> None:
    """One session: continue the study until it is finished or cannot go on."""
    shared, storage = SharedData.of(study.data), storage_of(root)
    try:
        fetch(storage, NAME)
        record = open_record(storage, study.settings, total=trials)
    except RecordDamaged as error:
        print(error)
        sys.stdout.flush()
        os._exit(DAMAGED)
    except RecordLost:  # the store cannot be written
        os._exit(75)
    except UserError as error:
        assert "one driver at a time" in str(error), error
        os._exit(REFUSED)
    scheduler = StudyScheduler(
        record, space=study.space, storage=storage, callback=Silent(), asha=ASHA(EPOCHS, eta=2)
    )  # fmt: skip
    provenance = Provenance(settings={}, commit="none", dirty=True, params={"task": "original"})
    tracker = Tracker(record, f"sqlite:///{root}/mlflow.db", provenance, study.settings.space)
    tracker.start()
    while True:
        job = None
        with guarded(scheduler):
            job = scheduler.next_job()
        if job is None:
            break
        number = job.number

        def report(result: dict[str, Any], number: int = number) -> None:
            goes_on = True
            with guarded(scheduler):
                goes_on = scheduler.report(number, json.loads(json.dumps(result)))
            if not goes_on or scheduler.stopping:
                raise _Stopped

        with contextlib.suppress(_Stopped):
            run_trial(job, shared, report)
    if scheduler.error is not None and not isinstance(scheduler.error, RecordLost):
        raise scheduler.error
    with contextlib.suppress(RecordLost):
        if scheduler.finished and (outcome := best.conclude(record.trials.values(), record.settings)):
            results.read_best_test(record, outcome.best, scheduler.folder, study.data)
    untracked = tracker.finish("finished" if scheduler.finished else "stopped", patience=3 if LOCKS else 20)
    gone = isinstance(scheduler.error, RecordGone)
    try:
        record.flush()
    except RecordGone:
        gone = True
    except RecordLost:
        pass
    with contextlib.suppress(RecordLost):
        record.close()
    if not gone:
        (root / "said").write_text(untracked or "")
    sys.stdout.flush()
    if gone:
        os._exit(GONE)
    os._exit(0 if scheduler.finished and untracked is None else 75)


def _count_epochs(root: Path) -> None:
    """Note every epoch that is trained, to see how many were trained twice."""
    plain = Trainer.epoch

    def noted(self: Trainer) -> Any:
        result = plain(self)
        with (root / "trained.log").open("a") as file:
            file.write(f"{self.epochs_done}\n")
        return result

    Trainer.epoch = noted  # type: ignore[method-assign]


def fork(
    body: Callable[[], None],
    *,
    kill_after: float | None = None,
    fault: str = "",
    suspended: Callable[[], None] = lambda: None,
) -> int:
    """Run a body in a forked process; returns its exit code, negative for a signal. While it is stopped, `suspended` is
    called."""
    pid = os.fork()
    if pid == 0:
        try:
            os.environ[faults.VARIABLE] = fault
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while os.WIFSTOPPED(status := os.waitpid(pid, os.WUNTRACED)[1]):
        suspended()
        os.kill(pid, signal.SIGCONT)
    return os.waitstatus_to_exitcode(status)


def _count_faults(root: Path) -> None:
    """Note every fault that takes effect; not every place in a plan is passed."""
    plain = faults._act

    def noted(action: str, name: str) -> None:
        with (root / "faults.log").open("a") as file:
            file.write(f"{name} {action}\n")
        if action == "move":
            (root / NAME).rename(root / "moved")
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "forget":
            (root / "mlflow.db").unlink()
        elif action.startswith("lock="):
            _, mode, seconds = action.split("=")
            lock(root / "mlflow.db", mode, float(seconds))
        elif action.startswith("flip="):
            flip(root / NAME / "study.db", float(action.removeprefix("flip=")))
        else:
            plain(action, name)

    faults._act = noted


LOCKS: list[sqlite3.Connection] = []  # of this process


def lock(path: Path, mode: str, seconds: float) -> None:
    """Keep others from writing to a database (immediate), or from reading as well (exclusive), for a while."""
    LOCKS.append(sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5))
    LOCKS[-1].execute(f"begin {mode}")
    threading.Timer(seconds, LOCKS[-1].rollback).start()


def taken(root: Path) -> int:
    """Faults from plans that have taken effect so far."""
    path = root / "faults.log"
    return len(path.read_text().splitlines()) if path.exists() else 0


def waiting(milliseconds: int) -> SimpleNamespace:
    """What makes MLflow, in place of `mlflow.store.db.utils.sql`, wait so long for a locked database, not 20 s."""
    plain, ours = sqlalchemy.sql.text, f"timeout = {milliseconds}"
    return SimpleNamespace(text=lambda statement: plain(statement.replace("timeout = 20000", ours)))


def _make_small(root: Path, machine: str = MACHINES[0]) -> None:
    """Prepare a forked process for a study in a folder."""
    designs.LEAST_SOBOL = 2  # so that a study this small has optimiser's trials that follow one another
    tracking._BACKOFF = (0.1,)  # outages are many here, and short
    setattr(mlflow.store.db.utils, "sql", waiting(200))  # noqa: B010
    snapshots._EXPIRES = 0.2
    os.environ["XDG_CACHE_HOME"] = str(root / machine)
    # An object appears whole in a bucket; a file that pyarrow writes does not.
    RemoteFolder.write = lambda self, name, content: LocalFolder(Path(self._root)).write(name, content)
    os.chdir(root)  # where MLflow puts what has no other place


def session(
    study: Study,
    root: Path,
    trials: int,
    *,
    kill_after: float | None = None,
    fault: str = "",
    machine: str = MACHINES[0],
    suspended: Callable[[], None] = lambda: None,
) -> int:
    """One session in a process of its own."""

    def body() -> None:
        _make_small(root, machine)
        _count_epochs(root)
        _count_faults(root)
        work(study, root, trials)

    (root / "said").unlink(missing_ok=True)
    return fork(body, kill_after=kill_after, fault=fault, suspended=suspended)


def check_words(root: Path) -> None:
    """Compare what the last session said to be missing in MLflow with what is missing, if it said anything.

    MLflow may have epochs that the record lacks: another machine goes on from the last copy, and trains them again.
    """
    if not (root / "said").exists():
        return
    said = (root / "said").read_text()
    with contextlib.closing(sqlite3.connect(record_of(root))) as record:
        query = "select number, step from trial_intermediate_values join trials using (trial_id)"
        epochs = set(record.execute(query))
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        query = (
            "select cast(tags.value as integer), step from metrics join tags using (run_uuid) "
            "where metrics.key = 'val_accuracy' and tags.key = 'ram.trial'"
        )
        tracked = set(database.execute(query))
    missing = re.match(r"(at most )?([0-9]+) epochs", said)
    lacks, told = sorted(epochs - tracked), int(missing[2]) if missing else 0
    is_true = len(lacks) <= told if missing and missing[1] else len(lacks) == told
    assert is_true, f"MLflow lacks (trial, epoch) {lacks}, said: {said}"


def record_of(root: Path) -> Path:
    """The SQLite file of the study's record; in a store, the machine's copy that is further."""
    if home(root) == root:
        return root / NAME / RECORD
    copies = [path for machine in MACHINES for path in (root / machine).glob(f"**/{NAME}/{RECORD}")]
    return max(copies, key=lambda path: path.stat().st_mtime)


def draw_fault(rng: random.Random) -> tuple[str, float | None]:
    """(a plan for `study.faults`, seconds until a kill from outside)."""
    kind = rng.random()
    if kind < 0.15:
        return "", rng.uniform(0.0, 1.5)
    if kind < 0.3:
        return f"{rng.choice(FULL_DISK)}@{rng.randint(1, 4)}:full", None
    if kind < 0.45:
        # An outage is survived within the session, so several fit in.
        places = {f"{rng.choice(OUTAGE)}@{rng.randint(1, 5)}" for _ in range(rng.randint(1, 3))}
        return ",".join(f"{place}:{rng.choice(('full', 'hang=0.2'))}" for place in sorted(places)), None
    if kind < 0.50:
        action = rng.choice(("lock=immediate=0.5", "lock=exclusive=0.5", "lock=immediate=30", "forget"))
        return f"{rng.choice(('record.epoch.after', 'record.end.after'))}@{rng.randint(1, 4)}:{action}", None
    if kind < 0.56:
        place = rng.choice(("record.start.after", "record.epoch.after", "report.before"))
        return f"{place}@{rng.randint(1, 4)}:stop", None
    if kind < 0.64:
        place = rng.choice(("record.start.after", "record.epoch.after", "record.end.after"))
        return f"{place}@{rng.randint(1, 4)}:{rng.choice(('move', f'flip={rng.random():.6f}'))}", None
    return f"{rng.choice(PLACES)}@{rng.choice((1, 1, 2, 3, 5))}:kill", None


def flip(path: Path, place: float) -> None:
    """Flip a bit of a file; `place` is a share of its length."""
    content = bytearray(path.read_bytes())
    if content:
        position = int(place * len(content) * 8)
        content[position // 8] ^= 1 << (position % 8)
        with path.open("r+b") as file:  # the same file, which others may have open
            file.write(content)


def tear(rng: random.Random, root: Path) -> bool:
    """Damage a newest checkpoint, as a disk that lost its last writes may; returns whether there was one."""
    newest = [sorted(folder.glob("epoch_*.pt"))[-1:] for folder in sorted(_trials(root).glob("*"))]
    files = [path for paths in newest for path in paths]
    if not files:
        return False
    path = rng.choice(files)
    if rng.random() < 0.5:
        os.truncate(path, rng.randrange(path.stat().st_size))
    else:
        flip(path, rng.random())
    return True


def damage(rng: random.Random, root: Path) -> str | None:
    """Damage the record or its log between two sessions; returns what was done. Not before there is a backup."""
    if not any((root / NAME / "backups").glob("study.*.db")):
        return None
    names = [name for name in ("study.db", "study.db-wal") if (root / NAME / name).exists()]
    path = root / NAME / rng.choice(names) if names else root / NAME / "study.db"
    if not path.exists():
        return None
    return hurt(rng, path)


def damage_lease(rng: random.Random, root: Path) -> str | None:
    """Damage the lease that a killed session left in the store; returns what was done."""
    path = home(root) / NAME / snapshots.LEASE
    return hurt(rng, path) if path.exists() else None


def hurt(rng: random.Random, path: Path) -> str:
    """Flip bits of a file, cut it short or delete it; returns which."""
    kind = rng.choice(("flip", "flip", "cut", "delete"))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 8))):
            flip(path, rng.random())
    elif kind == "cut":
        os.truncate(path, rng.randrange(path.stat().st_size + 1))
    else:
        path.unlink()
    return f"{kind} {path.name}"


def mend(root: Path) -> None:
    """Rebuild the record in a process of its own."""

    def body() -> None:
        _make_small(root)
        print("\n".join(repair(Storage.parse(str(root)), NAME, f"sqlite:///{root}/mlflow.db")))
        sys.stdout.flush()

    assert fork(body) == 0


@dataclass(kw_only=True)
class Chain:
    """What happened to one disturbed study."""

    sessions: int = 0
    faults: int = 0  # that took effect
    torn: int = 0
    damaged: int = 0  # times that the record was damaged
    repaired: int = 0
    forgotten: bool = False  # MLflow's database was deleted
    stopped: int = 0  # times that a session was suspended
    lost: int = 0  # sessions of a study in a store that did not end well: the next one may be on another machine
    plans: list[str] = field(default_factory=list)


def disturbed(study: Study, root: Path, template: Path, seed: int, most: int = 60) -> Chain:
    """Run a study through faults until it is finished; at most so many of them. Each session's are drawn from the seed
    and its number, whatever became of those before.
    """
    (root / "store" if seed % 3 == 0 else root).mkdir(parents=True)
    shutil.copy(template, root / "mlflow.db")
    chain, in_store = Chain(), home(root) != root
    for trials in TOTALS:
        code = -1
        while code != 0:
            rng = random.Random(f"{seed} {chain.sessions}")
            fault, kill_after = draw_fault(rng) if chain.sessions < most else ("", None)
            if (in_store and "move" in fault) or ((in_store or chain.forgotten) and "flip" in fault):
                fault = ""
            machine, other = rng.sample(MACHINES, 2) if in_store else (MACHINES[0], MACHINES[0])
            chain.plans.append(fault or ("nothing" if kill_after is None else f"kill after {kill_after:.3f} s"))
            before = taken(root)

            def successor(machine: str = other, trials: int = trials) -> None:
                found = session(study, root, trials, machine=machine)
                # The suspended session may hold MLflow's database locked.
                assert found in ((0, 75) if in_store else (REFUSED,)), f"seed {seed}: beside a suspended one: {found}"

            code = session(
                study, root, trials, kill_after=kill_after, fault=fault, machine=machine, suspended=successor
            )
            chain.sessions += 1
            expected = (0, 75, -signal.SIGKILL, DAMAGED, *((GONE,) if "move" in fault or "flip" in fault else ()))
            assert code in expected, f"seed {seed}: the last of {chain.plans} ended with {code}"
            chain.faults += taken(root) - before if fault else code == -signal.SIGKILL
            chain.forgotten |= "forget" in fault and taken(root) > before
            chain.stopped += "stop" in fault and taken(root) > before
            chain.lost += in_store and code != 0
            chain.damaged += "flip" in fault and taken(root) > before
            if code in (0, 75) and not (in_store and "stop" in fault):
                check_words(root)
            if (root / "moved").exists():
                assert code in (GONE, -signal.SIGKILL), f"seed {seed}: its folder was moved, and it ended with {code}"
                shutil.rmtree(root / NAME, ignore_errors=True)  # what a worker may have written meanwhile
                (root / "moved").rename(root / NAME)
            if code == DAMAGED:
                assert chain.damaged, f"seed {seed}: {chain.plans}: damage is reported where there was none"
                mend(root)
                chain.repaired += 1
            if code != 0 and rng.random() < 0.25 and tear(rng, root):
                chain.torn += 1
                chain.faults += 1
            left = code != 0 and (in_store or not chain.forgotten)
            damaged = damage_lease if in_store else damage
            if left and rng.random() < 0.15 and (what := damaged(rng, root)):
                chain.plans.append(what)
                chain.damaged += not in_store
                chain.faults += 1
    return chain


# What a study left behind.


def contents(root: Path) -> dict[str, Any]:
    """Everything that must not depend on what happened in between, from Optuna's storage, MLflow and the files."""
    return {"optuna": _optuna(root), "mlflow": _mlflow(root), "files": _files(root)}


def repairable(found: dict[str, Any]) -> dict[str, Any]:
    """Contents without what MLflow does not keep: of each seed it has the accuracy alone, of the others the mean."""
    for *_, attrs in found["optuna"][:-1]:
        for name, value in attrs.items():
            if name.startswith("epoch "):
                value["metrics"] |= {k: statistics.fmean(value["metrics"][k]) for k in EPOCH_MEANS}
        attrs.pop("run", None)
    return found


def _optuna(root: Path) -> list[Any]:
    study = optuna.load_study(study_name=NAME, storage=f"sqlite:///{record_of(root)}")
    found: list[Any] = []
    for trial in study.get_trials():
        attrs = {k: v for k, v in trial.user_attrs.items() if k != "started"}
        for key, value in attrs.items():
            if key.startswith("epoch "):
                value["metrics"].pop("seconds")
                value.pop("time")
            if key == "end":
                value.pop("time")
        found.append((trial.number, trial.state.name, trial.value, trial.params, trial.intermediate_values, attrs))
    found.append(sorted((k, v) for k, v in study.user_attrs.items() if k.startswith(("test", "totals", "settings"))))
    return found


_VARYING = {"epoch_seconds"}
_TAGS = ("ram.kind", "ram.trial", "ram.origin", "ram.row", "ram.seeds", "ram.state", "ram.stop_reason", "ram.status")


def _mlflow(root: Path) -> list[Any]:
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("ram-study")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [r for r in runs if r.data.tags["ram.kind"] == "study"]
    assert len(parents) == 1, f"{len(parents)} parent runs"
    found: list[Any] = []
    for run in sorted(runs, key=lambda r: r.data.tags.get("ram.trial", "")):
        assert run.data.tags.get("mlflow.parentRunId", parents[0].info.run_id) == parents[0].info.run_id
        history: list[tuple[str, int, float]] = []
        with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
            rows = database.execute("select key, step, value from metrics where run_uuid = ?", [run.info.run_id])
            history = sorted((key, step, value) for key, step, value in rows)
        once = {(key, step) for key, step, _ in history}
        assert len(once) == len(history), f"doubled metrics in {run.info.run_name}"
        history = [entry for entry in history if entry[0] not in _VARYING]
        tags = {k: run.data.tags.get(k) for k in _TAGS}
        found.append((run.info.run_name, run.info.status, tags, run.data.params, history))
    return found


def _trials(root: Path) -> Path:
    """The folder of the trials' files."""
    return home(root) / NAME / "trials"


def _files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(_trials(root))) for p in _trials(root).glob("**/*") if p.is_file())


def new_database(root: Path) -> Path:
    """An MLflow database without runs; making one takes seconds."""
    path = root / "empty.db"

    def body() -> None:
        mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()

    assert fork(body) == 0
    return path


def reference(study: Study, root: Path, template: Path) -> dict[str, Any]:
    """What an undisturbed study leaves behind."""
    root.mkdir()
    shutil.copy(template, root / "mlflow.db")
    for trials in TOTALS:
        assert session(study, root, trials) == 0
    return contents(root)


def check(root: Path, faults_wanted: int, seed: int, say: Callable[[str], None] = print) -> int:
    """Disturb studies until so many faults have taken effect. Returns how many did.

    Raises:
        AssertionError: a study ended otherwise than the undisturbed one; the message names its seed.
    """
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = Study.make()
    # Imports what every forked session would import again.
    Trainer(configuration(study.space, study.space.default), study.data)
    template = new_database(root)
    expected = reference(study, root / "reference", template)
    trained = len((root / "reference" / "trained.log").read_text().split())
    total = sessions = 0
    while total < faults_wanted:
        started = time.monotonic()
        folder = root / f"seed{seed}"
        chain = disturbed(study, folder, template, seed)
        found, wanted = contents(folder), expected
        if chain.repaired:
            found, wanted = repairable(found), repairable(copy.deepcopy(expected))
        for part, value in wanted.items():
            differing = [(a, b) for a, b in zip_longest(value, found[part]) if a != b]
            assert not differing, (
                f"seed {seed}, {chain.plans}: {part} differs, first in\nexpected {differing[0][0]}\n"
                f"found    {differing[0][1]}"
            )
        again = len((folder / "trained.log").read_text().split()) - trained
        # One checkpoint interval (an epoch) a fault at most, a torn checkpoint costing the one before it as well. A
        # damaged record may cost the trials since its last backup, and another machine those since the last copy.
        most = chain.faults + chain.torn + (chain.damaged + chain.lost) * EPOCHS * 2
        assert again <= most, f"seed {seed}: {again} epochs trained twice in {chain}"
        total, sessions = total + chain.faults, sessions + chain.sessions
        seconds = time.monotonic() - started
        say(
            f"seed {seed}: {chain.faults} faults ({chain.torn} torn files, {chain.damaged} damaged records, "
            f"{chain.repaired} repaired, {chain.stopped} suspended) in {chain.sessions} sessions, "
            f"{again} epochs trained again, equal; {seconds:.0f} s; {total} faults so far"
        )
        shutil.rmtree(folder)
        seed += 1
    return total


def _main() -> None:
    parser = argparse.ArgumentParser(description="Crash test of the study scheduler.")
    parser.add_argument("--faults", type=int, default=200, help="how many faults to survive (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the first disturbed study (default 0)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ram-study-crash-") as root:
        total = check(Path(root), arguments.faults, arguments.seed)
    print(f"{total} faults survived")


if __name__ == "__main__":
    _main()
