"""`python -m study.run`: run a study, or continue it.

Exit codes: 0 done; 1 the first trials failed alike (a programming error), or the driver itself failed; 2 usage,
nothing was started; 3 done with failed trials; 75 stopped (budget, full disk), the same command continues; 130 and
143 on SIGINT and SIGTERM, likewise.
"""

from __future__ import annotations

import json
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
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ramcore.config import Task
from ramcore.errors import UserError
from study import cluster
from study.dry_run import plan_lines
from study.prepare import Prepared, check_numbers, prepare
from study.record import Record, RecordLost, open_record

if TYPE_CHECKING:
    from study.tracking import Tracker

DONE, BROKEN, USAGE, SOME_FAILED, STOPPED = 0, 1, 2, 3, 75
_FAILURES_SHOWN = 10
_BREAKDOWNS = 3  # of Ray, without an epoch between, after which a run gives up
SUBMITTED = "RAM_STUDY_SUBMITTED"  # what `study.submit` tells the job of where it comes from, as JSON


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Run a hyperparameter study of the recurrent attention model, or continue the one of that name.

    Without flags: a search on translated MNIST (or the bundled digits, if MNIST cannot be had) on this machine; on the
    nodes of a cluster, whose environment says so, on the cluster.
    """

    task: Task | None = None
    """How digits lie on the canvas. Default: translated; for the designs paper and mnih, translated and cluttered."""
    data: Literal["auto", "mnist", "fashion-mnist", "digits"] = "auto"
    """Where the images come from. auto: MNIST if it can be had, else the bundled digits, with a warning."""
    data_dir: Path | None = None
    """Folder of the IDX files. Default: $RAM_DATA_DIR, then the per-user cache, then a download."""
    design: str | None = None
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
    storage: str = field(default_factory=lambda: os.environ.get("RAM_STORAGE") or "runs")
    """Folder of the record and the checkpoints, or s3://bucket/folder; on several nodes one that all of them see.
    Default: $RAM_STORAGE, else runs."""
    tracking_uri: str | None = None
    """MLflow server or database. Default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    address: str | None = field(default_factory=lambda: os.environ.get("RAY_ADDRESS") or None)
    """Where to run: local (this machine alone), auto or host:port (from a node of a Ray cluster), or
    http://127.0.0.1:8265 (a cluster's job server: submits this command there and follows it). Default: $RAY_ADDRESS,
    else local."""
    cpus_per_trial: float = 1.0
    """CPU cores of a trial."""
    gpus_per_trial: float | None = None
    """GPUs of a trial; a fraction shares one. Default: 0; on a cluster whose nodes say RAM_WORKER_GPUS and
    RAM_WORKER_CPUS, the share that goes with --cpus-per-trial."""
    max_concurrent: int | None = None
    """Trials at a time, at most. Default: as many as fit; on a cluster whose nodes say RAM_MAX_WORKERS, once it has
    grown to that."""
    time_budget: float | None = None
    """Minutes after which this run stops; the same command continues. Default: none."""
    price_per_hour: float | None = None
    """Price of an hour of this machine, or of each worker of a cluster, in any currency; for --money-budget and
    --dry-run. Default: $RAM_PRICE_PER_HOUR."""
    money_budget: float | None = None
    """What this run's machines may cost, in the currency of --price-per-hour; a cluster's head is not counted.
    Default: no limit."""
    dry_run: bool = False
    """Print the plan, with an estimate of its time and cost, and exit. On a cluster it starts no machine."""


def main(flags: Flags) -> int:
    """Run or continue a study; returns the exit code."""
    _configure_logging()
    try:
        flags = _settled(flags)
        if flags.address is not None and flags.address.startswith(("http://", "https://")):
            from study.submit import submit

            check_numbers(flags)
            return submit(flags)
        prepared = prepare(flags)
    except UserError as error:
        return _refuse(error)
    except RecordLost as error:
        _say(f"stopped ({error}); the same command continues: {command()}")
        return STOPPED
    for warning in prepared.warnings:
        _say(f"warning: {warning}")
    if flags.address is None and "ray" not in sys.modules:  # which reads these when it is imported
        # Ray of one machine: on loopback (the name is of where this is Ray's own default), and behind a token of this
        # run's own, because other users of the machine reach loopback too.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # These bring Ray, torch and MLflow with them, seconds that a refusal need not wait for.
    from study import pool, tracking

    uri = tracking.tracking_uri(flags.tracking_uri)
    wanted = pool.Pool(
        cpus_per_trial=flags.cpus_per_trial,
        gpus_per_trial=flags.gpus_per_trial or 0.0,
        max_concurrent=flags.max_concurrent,
        on_cluster=flags.address is not None,
        growth=cluster.Growth.declared() if flags.address is not None else None,
    )
    check = cluster.Check(prepared.storage)
    try:
        if flags.address is None:
            pool.count_slots(pool.local_resources(), wanted)
        if flags.dry_run:
            print("\n".join(plan_lines(flags, prepared, uri, wanted)))
            return DONE
        if not prepared.exists:
            tracking.check_reachable(uri)
        if flags.address is not None:
            cluster.check_lasting(flags.storage, uri)
        if flags.address is not None and (trials := min(prepared.trials_left, flags.max_concurrent or 2**31)) > 0:
            with pool.ray_running(flags.address):
                others = "://" not in prepared.storage and wanted.growth is not None and wanted.growth.workers > 0
                present = cluster.wait_for_workers(wanted.need, wanted.growth, trials, others=others, say=_say)
                if problem := check(present):
                    raise UserError(problem)
        record = open_record(prepared.storage, prepared.settings, total=prepared.total, rows=prepared.rows, say=_say)
    except UserError as error:
        return _refuse(error)
    except RecordLost as error:
        _say(f"stopped ({error}); the same command continues: {command()}")
        return STOPPED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    with record:
        return _run(flags, prepared, record, wanted, uri, check)


def _settled(flags: Flags) -> Flags:
    """With what the environment says where a flag was left out."""
    address = None if flags.address in (None, "", "local") else flags.address
    if address is not None and address.startswith("ray://"):
        raise UserError(
            f"--address is a job server, or auto on the cluster itself; got {address}, a Ray client's: forward the "
            "head's port 8265 and pass --address http://127.0.0.1:8265"
        )
    price, gpus = flags.price_per_hour, flags.gpus_per_trial
    if price is None:
        price = cluster.number("RAM_PRICE_PER_HOUR") or None
    if gpus is None and address is not None and (growth := cluster.Growth.declared()):
        gpus = cluster.share_of_gpus(growth, flags.cpus_per_trial)
    return replace(flags, address=address, price_per_hour=price, gpus_per_trial=gpus)


def _run(flags: Flags, prepared: Prepared, record: Record, wanted: Any, uri: str, check: cluster.Check) -> int:
    from study import pool, results
    from study.asha import default_halving
    from study.checkpoints import open_folder
    from study.display import Progress
    from study.scheduler import StudyScheduler
    from study.trainable import SharedData

    settings = record.settings
    folder = open_folder(prepared.storage, settings.study)
    devices: dict[str, float] = pool.local_resources() if flags.address is None else {}
    progress = Progress(study=settings.study, epochs=settings.epochs)
    scheduler = StudyScheduler(
        record,
        space=prepared.space,
        halving=default_halving(settings.epochs),
        folder=folder,
        storage=prepared.storage,
        callback=progress,
    )
    meter = cluster.Meter(machines=1)
    tracker: Tracker | None = None

    def look() -> int:
        """Take in who has joined the cluster or left it."""
        present = cluster.nodes()
        meter.set(sum(wanted.need.fits(node.resources) > 0 for node in present))
        # Asked twice: what a node says once, in the middle of a long study, may be a moment's trouble.
        if check(present) and (problem := check(cluster.nodes())):
            scheduler.stop(problem)
        progress.slots = max(progress.slots, wanted.slots)
        return progress.slots

    with _signals() as received, progress:
        scheduler.stop_when(_budget(flags, received, meter))
        progress.resume(list(record.trials.values()), scheduler.origins)
        code = DONE
        try:
            breakdowns = 0
            while not scheduler.finished and not scheduler.should_stop():
                before, working = record.epochs, False
                try:
                    with pool.ray_running(flags.address):
                        progress.slots, devices = wanted.slots, wanted.devices
                        if tracker is None:
                            record.begin_run(_provenance(flags, devices))
                            tracker = _start_tracker(flags, prepared, record, uri, devices)
                            progress.outage = lambda followed=tracker: followed.outage
                        if not scheduler.should_stop():  # a signal may have come while Ray started
                            follow = None if flags.address is None else look
                            working = True
                            pool.run_trials(scheduler, SharedData.of(prepared.data), wanted, look=follow)
                            if not scheduler.finished and not scheduler.should_stop():
                                raise pool.PoolLost("Ray Tune ended with trials to go")
                except pool.PoolLost as error:
                    breakdowns = 1 if record.epochs > before else breakdowns + 1
                    running = [t.number for t in record.trials.values() if t.state == "running"]
                    if breakdowns == _BREAKDOWNS and working and len(running) == 1:  # nobody else was there
                        scheduler.worker_lost(running[0], f"Ray broke down {breakdowns} times over it; {error}")
                        breakdowns = 0
                    elif breakdowns == _BREAKDOWNS:
                        scheduler.stop(f"Ray broke down {breakdowns} times without an epoch between: {error}")
                    else:
                        progress.note(f"Ray broke down and is started again: {error}")
                        scheduler.take_up_lost()
        except UserError as error:
            if tracker is None:
                return _refuse(error)
            scheduler.stop(str(error))  # the cluster went while the study ran
        except (RecordLost, OSError) as error:  # OSError: Ray's own files, on a full disk
            scheduler.stop(str(error))
        try:
            record.flush()
        except RecordLost as error:
            scheduler.error = scheduler.error or error
            scheduler.stop(str(error))
        code = _exit_code(scheduler, received)
        if tracker is None:
            tracker = _start_tracker(flags, prepared, record, uri, devices)
        done = code in (DONE, SOME_FAILED)
        found = results.conclude(record)
        publish = None
        if done and found is not None:
            try:
                if not results.read_best_test(record, folder, prepared.data):
                    number = found.best.number
                    _say(f"warning: the best weights, of trial {number:04d}, are gone: no test accuracy, no model")
            except (RecordLost, OSError) as error:
                _say(f"warning: {error}; the test accuracy is read by the next run of the same command")
            publish = results.publisher(found, folder, prepared.data)
        status = "finished" if done else "failed" if code == BROKEN else "stopped"
        untracked = tracker.finish(status, publish=publish)
    _report(prepared, scheduler, found, uri, untracked, code)
    return code


def _exit_code(scheduler: Any, received: list[int]) -> int:
    if scheduler.broken:
        return BROKEN
    if isinstance(scheduler.error, RecordLost):
        return STOPPED  # even if it was the last trial's end: the record does not hold it
    if scheduler.finished:
        failed = any(t.state == "failed" for t in scheduler.record.trials.values())
        return SOME_FAILED if failed else DONE
    return 128 + received[0] if received else STOPPED


def _report(prepared: Prepared, scheduler: Any, found: Any, uri: str, untracked: str | None, code: int) -> None:
    """What a study ends with: the results on stdout, what is amiss on stderr."""
    from study import schema
    from study.results import summary_lines

    record = scheduler.record
    states = [t.state for t in record.trials.values()]
    name = record.settings.study
    if code == BROKEN:
        _say(
            f"error: {scheduler.stopping}: mend it and run the same command; failed trials stay failed, the rest are run"
        )
    elif code not in (DONE, SOME_FAILED):
        _say(f"stopped ({scheduler.stopping or 'Ray Tune ended early'}); the same command continues: {command()}")
    print(
        f"Study {name}: {states.count('complete')} trials finished, {states.count('pruned')} stopped early, "
        f"{states.count('failed')} failed, {states.count('running')} to be continued, of {scheduler.total}"
    )
    if found is not None:
        print("\n".join(summary_lines(found, prepared.space.names if prepared.space else ())))
    failed = [t for t in record.trials.values() if t.state == "failed"]
    for trial in failed[:_FAILURES_SHOWN]:
        print(f"  failed: trial {trial.number:04d}: {trial.reason}")
    if len(failed) > _FAILURES_SHOWN:
        print(f"  and {len(failed) - _FAILURES_SHOWN} more")
    print(f"Record: {prepared.folder / 'study.db'}; tracked in {uri}")
    print("Next:")
    default = uri == schema.DEFAULT_TRACKING_URI
    if not uri.startswith("http"):
        print(f"  mlflow ui{'' if default else f' --backend-store-uri {uri}'}")
    print(f"  python -m analysis.sensitivity --study {name}{'' if default else f' --tracking-uri {uri}'}")
    if untracked:
        _say(f"warning: MLflow lacks {untracked}; the same command brings it up to date: {command()}")


def _start_tracker(flags: Flags, prepared: Prepared, record: Record, uri: str, devices: dict[str, float]) -> Tracker:
    from study.tracking import Provenance, Tracker

    settings = record.settings
    # Of the last run that trained: whoever only looks at a study again did not make it.
    provenance = record.runs[-1] if record.runs else _provenance(flags, devices)
    described = {
        **{k: v for k, v in asdict(settings).items() if k != "space"},
        "trials": record.totals[-1],
        **provenance,
        "runs": record.runs,
        "data_sizes": prepared.data.sizes,
        "record": f"{flags.storage.rstrip('/')}/{settings.study}/study.db",
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
    tracker = Tracker(
        record,
        uri,
        Provenance(settings=described, commit=provenance["commit"], dirty=provenance["commit_dirty"], params=params),
        space,
    )
    tracker.start()
    return tracker


def _provenance(flags: Flags, devices: dict[str, float]) -> dict[str, Any]:
    """What is needed to do this run again."""
    commit, dirty = working_tree()
    return {
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(flags).items()},
        "command": command(),
        "commit": commit,
        "commit_dirty": dirty,
        "versions": _versions(),
        "devices": devices,
    }


def _budget(flags: Flags, received: list[int], meter: cluster.Meter) -> Callable[[], str | None]:
    started = time.monotonic()

    def reason_to_stop() -> str | None:
        hours = (time.monotonic() - started) / 3600
        if received:
            return signal.Signals(received[0]).name
        if flags.time_budget is not None and hours * 60 >= flags.time_budget:
            return f"the time budget of {flags.time_budget:g} minutes is used up"
        if flags.money_budget is not None and meter.hours() * (flags.price_per_hour or 0) >= flags.money_budget:
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


def working_tree() -> tuple[str, bool]:
    """Commit of the working tree and whether it was changed since; ("unknown", True) outside a repository."""
    if SUBMITTED in os.environ:  # of the tree that was submitted
        submitted = json.loads(os.environ[SUBMITTED])
        return submitted["commit"], submitted["dirty"]
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


def command() -> str:
    """The command line of this run, as a person repeats it."""
    if SUBMITTED in os.environ:
        return json.loads(os.environ[SUBMITTED])["command"]
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
