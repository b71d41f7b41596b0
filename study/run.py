"""`python -m study.run`: run a study, or continue it.

Exit codes: 0 done; 1 the first trials failed alike (a programming error), or the driver itself failed; 2 usage,
nothing was started; 3 done with failed trials; 75 stopped (budget, full disk), the same command continues; 130 and
143 on SIGINT and SIGTERM, likewise.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ramcore.config import ConfigError, Task
from ramcore.cost import cost
from ramcore.data import DataError
from study.designs import Design, search_arms
from study.prepare import Prepared, UsageError, prepare
from study.record import Record, RecordError, RecordLost

if TYPE_CHECKING:
    from study.tracking import Tracker

logger = logging.getLogger(__name__)

DONE, BROKEN, USAGE, SOME_FAILED, STOPPED = 0, 1, 2, 3, 75
_FAILURES_SHOWN = 10
_BREAKDOWNS = 3  # of Ray, without an epoch between, after which a run gives up
DEFAULT_TRACKING = "sqlite:///mlflow.db"
_REFUSALS = (UsageError, ConfigError, DataError, RecordError)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Run a hyperparameter study of the recurrent attention model, or continue the one of that name.

    Without flags: a search on translated MNIST (or the bundled digits, if MNIST cannot be had) on this machine.
    """

    task: Task | None = None
    """How digits lie on the canvas. Default: translated; for the designs paper and mnih, translated and cluttered."""
    data: Literal["auto", "mnist", "fashion-mnist", "digits"] = "auto"
    """Where the images come from. auto: MNIST if it can be had, else the bundled digits, with a warning."""
    data_dir: Path | None = None
    """Folder of the IDX files. Default: $RAM_DATA_DIR, then the per-user cache, then a download."""
    design: Design | None = None
    """What is tried: search (default), paper (the case study's table), mnih (Mnih et al.'s tables at the tuned recipe),
    ablation (the tuned recipe less one choice at a time), ofat (one factor at a time around the best and a small-patch
    configuration), replicate (best, default and spread points on held-out seeds)."""
    trials: int | None = None
    """Trials the study is to have in the end, those of earlier runs included. Default: 40 for a search, else all
    rows.
    """
    epochs: int | None = None
    """Epochs of a trial that is not stopped early. Default: 30; paper and mnih: 100."""
    seeds_per_trial: int | None = None
    """Training seeds of a trial, trained in one step. Default: search 2, replicate 5, the others 3."""
    sobol_share: float | None = None
    """Share of a search's trials that are Sobol points, never stopped. Default: 0.4."""
    study: str | None = None
    """Name of the study; an existing one is continued with its own settings. Default: made of task, data and design."""
    storage: str = "runs"
    """Folder of the record and the checkpoints; on several nodes one that all of them see."""
    tracking_uri: str | None = None
    """MLflow server or database. Default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    address: str | None = None
    """Ray cluster to run on, such as auto or ray://host:10001. Default: this machine alone."""
    cpus_per_trial: float = 1.0
    """CPU cores of a trial."""
    gpus_per_trial: float = 0.0
    """GPUs of a trial; a fraction shares one."""
    max_concurrent: int | None = None
    """Trials at a time, at most. Default: as many as fit."""
    time_budget: float | None = None
    """Minutes after which this run stops; the same command continues. Default: none."""
    price_per_hour: float | None = None
    """Price of an hour of the machines, all together, in any currency; see --money-budget."""
    money_budget: float | None = None
    """What this run may cost, in the currency of --price-per-hour. Default: no limit."""
    dry_run: bool = False
    """Print the plan and exit."""


def main(flags: Flags) -> int:
    """Run or continue a study; returns the exit code."""
    _configure_logging()
    try:
        prepared = prepare(flags)
    except _REFUSALS as error:
        return _refuse(error)
    for warning in prepared.warnings:
        _say(f"warning: {warning}")
    if flags.address is None and "ray" not in sys.modules:
        # Even on one machine Ray's workers listen on every interface; a token of this run's own keeps others out. Ray
        # reads it when it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # These bring Ray, torch and MLflow with them, seconds that a refusal need not wait for.
    from study import pool, tracking

    uri = tracking.tracking_uri(flags.tracking_uri)
    wanted = pool.Pool(
        cpus_per_trial=flags.cpus_per_trial,
        gpus_per_trial=flags.gpus_per_trial,
        max_concurrent=flags.max_concurrent,
        autoscales=flags.address is not None,
    )
    try:
        slots = None if flags.address else pool.count_slots(pool.local_resources(), wanted)
        if flags.dry_run:
            print("\n".join(_plan(flags, prepared, uri, slots)))
            return DONE
        if not prepared.exists:
            tracking.check_reachable(uri)
        record = Record.open(prepared.folder, prepared.settings, total=prepared.total, rows=prepared.rows)
    except (*_REFUSALS, tracking.TrackingError, pool.PoolError) as error:
        return _refuse(error)
    except RecordLost as error:
        _say(f"stopped ({error}); the same command continues: {_command()}")
        return STOPPED
    with record:
        return _run(flags, prepared, record, wanted, uri)


def _run(flags: Flags, prepared: Prepared, record: Record, wanted: Any, uri: str) -> int:
    from study import outcome, pool
    from study.checkpoints import open_folder
    from study.halving import default_halving
    from study.progress import Progress
    from study.searcher import Engine
    from study.snapshots import Snapshots, is_remote
    from study.trainable import SharedData

    settings = record.settings
    folder = open_folder(prepared.storage, settings.study)
    if is_remote(prepared.storage):
        record.snapshots = Snapshots(prepared.folder / "study.db", folder)
    devices: dict[str, float] = pool.local_resources() if flags.address is None else {}
    progress = Progress(study=settings.study, epochs=settings.epochs)
    engine = Engine(
        record,
        space=prepared.space,
        halving=default_halving(settings.epochs),
        folder=folder,
        storage=prepared.storage,
        watcher=progress,
    )
    tracker: Tracker | None = None
    with _signals() as received, progress:
        engine.stop_when(_budget(flags, received))
        progress.resume(list(record.trials.values()), engine.arms)
        code = DONE
        try:
            breakdowns = 0
            while not engine.finished and not engine.should_stop():
                before = record.epochs
                try:
                    with pool.ray_running(flags.address):
                        progress.slots, devices = wanted.slots, wanted.devices
                        if tracker is None:
                            tracker = _start_tracker(flags, prepared, record, uri, devices)
                            progress.outage = lambda followed=tracker: followed.outage
                        if not engine.should_stop():  # a signal may have come while Ray started
                            pool.run_trials(engine, SharedData.of(prepared.data), wanted)
                    break
                except pool.PoolLost as error:
                    breakdowns = 1 if record.epochs > before else breakdowns + 1
                    if breakdowns == _BREAKDOWNS:
                        engine.stop(f"Ray broke down {breakdowns} times without an epoch between: {error}")
                    else:
                        progress.note(f"Ray broke down and is started again: {error}")
                        engine.take_up_lost()
        except pool.PoolError as error:
            return _refuse(error)
        except RecordLost as error:
            engine.stop(str(error))
        code = _exit_code(engine, received)
        if tracker is None:
            tracker = _start_tracker(flags, prepared, record, uri, devices)
        done = code in (DONE, SOME_FAILED)
        if done:
            try:
                outcome.read_best_test(record, folder, prepared.data)
            except RecordLost as error:
                _say(f"warning: {error}; the test accuracy is read by the next run of the same command")
        found = outcome.conclude(record)
        publish = outcome.publisher(found, folder, prepared.data) if found and done else None
        status = "finished" if done else "failed" if code == BROKEN else "stopped"
        untracked = tracker.finish(status, publish=publish)
    _report(prepared, engine, found, uri, untracked, code)
    return code


def _exit_code(engine: Any, received: list[int]) -> int:
    if engine.broken:
        return BROKEN
    if engine.finished:
        failed = any(t.state == "failed" for t in engine.record.trials.values())
        return SOME_FAILED if failed else DONE
    return 128 + received[0] if received else STOPPED


def _report(prepared: Prepared, engine: Any, found: Any, uri: str, untracked: str | None, code: int) -> None:
    """What a study ends with: the results on stdout, what is amiss on stderr."""
    from study.outcome import describe

    record = engine.record
    states = [t.state for t in record.trials.values()]
    name = record.settings.study
    if code == BROKEN:
        _say(f"error: {engine.stopping}: mend it and run the same command; failed trials stay failed, the rest are run")
    elif code not in (DONE, SOME_FAILED):
        _say(f"stopped ({engine.stopping or 'Ray Tune ended early'}); the same command continues: {_command()}")
    print(
        f"Study {name}: {states.count('complete')} trials finished, {states.count('pruned')} stopped early, "
        f"{states.count('failed')} failed, {states.count('running')} to be continued, of {engine.total}"
    )
    if found is not None:
        print("\n".join(describe(found, prepared.space.names if prepared.space else ())))
    failed = [t for t in record.trials.values() if t.state == "failed"]
    for trial in failed[:_FAILURES_SHOWN]:
        print(f"  failed: trial {trial.number:04d}: {trial.reason}")
    if len(failed) > _FAILURES_SHOWN:
        print(f"  and {len(failed) - _FAILURES_SHOWN} more")
    print(f"Record: {prepared.folder / 'study.db'}; tracked in {uri}")
    print("Next:")
    default = uri == DEFAULT_TRACKING
    if not uri.startswith("http"):
        print(f"  mlflow ui{'' if default else f' --backend-store-uri {uri}'}")
    print(f"  python -m analysis.sensitivity --study {name}{'' if default else f' --tracking-uri {uri}'}")
    if untracked:
        _say(f"warning: MLflow lacks {untracked}; the same command brings it up to date: {_command()}")


def _start_tracker(flags: Flags, prepared: Prepared, record: Record, uri: str, devices: dict[str, float]) -> Tracker:
    from study.tracking import Origin, Tracker

    settings = record.settings
    commit, dirty = _commit()
    described = {
        **{k: v for k, v in asdict(settings).items() if k != "space"},
        "trials": record.totals[-1],
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(flags).items()},
        "command": _command(),
        "commit": commit,
        "commit_dirty": dirty,
        "versions": _versions(),
        "devices": devices,
        "data_sizes": prepared.data.sizes,
        "record": str(prepared.folder / "study.db"),
    }
    space = {
        **settings.space,
        "study": settings.study,
        "objective": "val_accuracy",
        "epochs": settings.epochs,
        "seeds_per_trial": settings.seeds_per_trial,
        "design": settings.design,
    }
    params = {
        name: str(getattr(settings, name)) for name in ("task", "data", "design", "epochs", "seeds_per_trial")
    } | {"trials": str(record.totals[0])}
    origin = Origin(settings=described, commit=commit, dirty=dirty, params=params)
    tracker = Tracker(record, uri, origin, space)
    tracker.start()
    return tracker


def _plan(flags: Flags, prepared: Prepared, uri: str, slots: int | None) -> list[str]:
    """What --dry-run prints."""
    settings, space = prepared.settings, prepared.space
    lines = [
        f"Study {settings.study}: {'continues' if prepared.exists else 'new'}",
        f"  design     {settings.design}; {settings.epochs} epochs, {settings.seeds_per_trial} seeds a trial",
        f"  task       {settings.task}; data {settings.data} {prepared.data.sizes}, sha256 {settings.digest[:12]}",
        f"  slots      {slots or f'those of the cluster at {flags.address}'}, one trial each "
        f"({flags.cpus_per_trial:g} CPU, {flags.gpus_per_trial:g} GPU each)",
        f"  storage    {prepared.folder}",
        f"  tracking   {uri}",
    ]
    if prepared.rows is None and space is not None:
        from study.designs import published

        total = prepared.total or 0
        arms = search_arms([total], len(published(space)), settings.sobol_share)
        counts = ", ".join(f"{arms.count(arm)} {arm}" for arm in dict.fromkeys(arms))
        lines.append(f"  trials     {total}: {counts} (only tpe trials are stopped early)")
        for d in space.dimensions:
            scale = ", log" if d.log else ""
            lines.append(f"  {d.name:17s} {d.type} {d.low:g} to {d.high:g}{scale} ({d.unit}): {d.reason}")
        sizes = [cost(space.config(space.sobol(i, 0))) for i in range(200)]
        lines.append(
            f"  size       {min(s.parameters for s in sizes):,} to {max(s.parameters for s in sizes):,} parameters, "
            f"{min(s.macs for s in sizes):,} to {max(s.macs for s in sizes):,} multiply-adds an image (200 points)"
        )
    elif prepared.rows is not None:
        rows = prepared.rows()[: prepared.total]
        lines.append(f"  trials     {len(rows)}:")
        for plan in rows:
            size = cost(plan.config)
            lines.append(f"    {plan.row:45s} {size.parameters:>10,} parameters {size.macs:>12,} multiply-adds")
    return lines


def _budget(flags: Flags, received: list[int]) -> Callable[[], str | None]:
    started = time.monotonic()

    def reason_to_stop() -> str | None:
        hours = (time.monotonic() - started) / 3600
        if received:
            return signal.Signals(received[0]).name
        if flags.time_budget is not None and hours * 60 >= flags.time_budget:
            return f"the time budget of {flags.time_budget:g} minutes is used up"
        if flags.money_budget is not None and hours * (flags.price_per_hour or 0) >= flags.money_budget:
            return f"the money budget of {flags.money_budget:g} is used up"
        return None

    return reason_to_stop


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came, first one first; a second one ends the program at once."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _commit() -> tuple[str, bool]:
    """Commit of the working tree and whether it was changed since; ("unknown", True) outside a repository."""
    root = Path(__file__).resolve().parent.parent
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return commit, bool(status.strip())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "ray", "optuna", "mlflow", "numpy", "scipy", "ram-study"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _command() -> str:
    return shlex.join(["python", "-m", "study.run", *sys.argv[1:]])


class _ToStderr(logging.StreamHandler[Any]):
    """To what sys.stderr is at the moment: the live display stands in for it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _configure_logging() -> None:
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("study").setLevel(logging.INFO)
    for noisy in ("mlflow", "alembic", "optuna", "ray"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _refuse(error: Exception) -> int:
    _say(f"error: {error}")
    return USAGE


def cli() -> None:
    """The console entry point."""
    sys.exit(main(tyro.cli(Flags, config=(tyro.conf.FlagCreatePairsOff,))))


if __name__ == "__main__":
    cli()
