"""Ray as the place where trials run: start or join it, count its slots, run the trials, leave it."""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import ray
import torch
from ray import tune
from ray.exceptions import RayError
from ray.tune.error import TuneError
from ray.tune.search import ConcurrencyLimiter
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ramcore import machine
from ramcore.config import Config
from ramcore.cost import memory
from ramcore.errors import UserError, first_line
from study import cluster, ray_folder
from study.cluster import Growth, TrialResources
from study.flags import stopped
from study.ray_internals import dead_service, lacks_memory, ray_reason
from study.scheduler import StudyScheduler
from study.trainable import SharedData, tune_trial
from study.tune_adapters import MAX_WORKER_DEATHS, TuneScheduler, TuneSearcher, TuneStopper

# For Ray and Tune, which read them when they start. A value that the user has set stays.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's own default from its next version on, without its warning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no csv, json and tensorboard files of each trial: MLflow has it all
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer console prints its tables even when told to be quiet
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours also handles SIGTERM and leaves trials to be continued
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # for a trial's thread to end; after its default of 2 s Tune loses a trial
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's experiment state is not used
    "TUNE_STATE_REFRESH_PERIOD": "1000000",  # only its console needs what it reads, and a dead GCS blocks it
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",  # trials that wait for a place; Tune's default grows a cluster node by node
}
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_LOOK_SECONDS = 2.0  # between two looks at Ray's services
# For the driver to leave a Ray whose service died. A little later, Ray ends the driver's process without a word.
_LEAVE_SECONDS = {"raylet": 7.0, "GCS": 40.0}
# Bytes, as measured on Linux without a GPU.
_USABLE = 0.95  # share of the memory that Ray lets its workers fill before it kills them
_OVERHEAD = 900e6  # of the driver and of Ray's services
_WORKER = 350e6  # of a worker before it trains
_PART = 90_000  # of data that is sent to an actor in its arguments; Ray puts larger arguments into the object store
_OBJECT_STORE = 128 * 2**20  # on a single machine, which keeps next to nothing there


class PoolLost(RuntimeError):
    """Ray or Tune broke down. Its trials can be continued in a new one."""


class ShortOfMemory(PoolLost):
    """Workers were killed because a machine ran out of memory."""


class _Left(BaseException):
    """Carries a PoolLost past Tune. For an Exception, Tune would clean up first, and wait for the dead service."""

    def __init__(self, lost: PoolLost) -> None:
        self.lost = lost


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The resources of a running Ray and of one trial."""

    trial: TrialResources
    max_concurrent: int | None
    on_cluster: bool = False
    growth: Growth | None = None  # of a cluster that declares it

    @property
    def slots(self) -> int:
        """Trials at a time.

        On a cluster: once it has grown, so that trials wait there and its autoscaler starts nodes for them. If a
        cluster does not declare its growth, --max-concurrent counts as its size.
        """
        if not self.on_cluster:
            return count_slots(local_resources(), self)
        if self.growth is None and self.max_concurrent is not None:
            return self.max_concurrent
        return max(1, min(cluster.capacity(cluster.nodes(), self.growth, self.trial), self.max_concurrent or 2**31))

    @property
    def devices(self) -> dict[str, float]:
        """The cluster's CPUs, GPUs and kinds of accelerators, for the record."""
        return {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU") or k.startswith("accelerator")}


def local_resources() -> dict[str, float]:
    """CPUs, GPUs and bytes that trials may use here, within a container's limits. A part of a CPU counts as one."""
    return {
        "CPU": float(max(1, int(machine.cpus()))),
        "GPU": float(torch.cuda.device_count()),
        "memory": max(0.0, _USABLE * machine.memory() - _OVERHEAD),
    }


def trial_resources(
    cpus: float, gpus: float, planned: Iterable[tuple[Config, int]], *, on_cluster: bool
) -> TrialResources:
    """What a trial takes, given the (configuration, seeds) of all. On a cluster, memory is not known beforehand."""
    if on_cluster:
        return TrialResources(cpus=cpus, gpus=gpus)
    largest = 0 if gpus else max(memory(config, seeds) for config, seeds in planned)
    return TrialResources(cpus=cpus, gpus=gpus, memory=_WORKER + largest)


def count_slots(resources: Mapping[str, float], pool: Pool) -> int:
    """How many trials fit on this machine at a time. Raises UserError if none fits."""
    slots = pool.trial.fits(resources)
    if resources.get("memory", math.inf) < pool.trial.memory:
        needed, there = ((size / 2**30) for size in ((_OVERHEAD + pool.trial.memory) / _USABLE, machine.memory()))
        raise UserError(
            f"a trial must fit in memory; with Ray and the study itself it takes {needed:,.1f} GiB, and this machine "
            f"or container has {there:,.1f}: give it more, or train smaller networks"
        )
    if slots < 1:
        kind, asked = "CPU", pool.trial.cpus
        if asked <= resources.get("CPU", 0.0):
            kind, asked = "GPU", pool.trial.gpus
        flag, there = f"--{kind.lower()}s-per-trial", f"{resources.get(kind, 0.0):g}"
        fact = f"{flag} is {asked:g} and there are {there}"
        raise UserError(f"a trial must fit on the machine; {fact}: pass a smaller {flag}")
    return slots if pool.max_concurrent is None else min(slots, pool.max_concurrent)


@contextmanager
def ray_running(address: str | None) -> Iterator[None]:
    """Start Ray on this machine or join the cluster at an address; leave it at the end.

    A Ray that was started here is stopped. (A bare `ray.init` would join any Ray that runs here.) Raises UserError if
    no cluster is there or it refuses us, PoolLost if Ray did not start in time on this machine.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with ray_folder.private_folder() if address is None else nullcontext() as folder:
        if address is None:
            _start_ray(str(folder))
        else:
            _join_ray(address)
        with _never_stuck() as over:
            try:
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray replaces it with one that ends the process at once
                yield
            finally:
                if dead_service() is None:
                    over.set()  # from here on, services end as they should
                ray.shutdown()


@contextmanager
def _never_stuck() -> Iterator[threading.Event]:
    """End the process as stopped if a service of Ray's dies and the block does not end soon, or set the event.

    A call into Ray may block then, which nothing can interrupt.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_SECONDS):
            if (dead := dead_service()) and not over.wait(_LEAVE_SECONDS[dead]):
                os._exit(stopped(f"Ray broke down: its {dead} died"))

    threading.Thread(target=watch, name="ray", daemon=True).start()
    try:
        yield over
    finally:
        over.set()


def _start_ray(folder: str) -> None:
    cpus, gpus = (int(local_resources()[kind]) for kind in ("CPU", "GPU"))
    own: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": _OBJECT_STORE}
    own["_temp_dir"] = folder
    try:
        ray.init(address="local", include_dashboard=False, **own, **_QUIET)
    except Exception as error:
        if type(error) is not Exception:
            raise
        ray.shutdown()  # Ray raises a bare Exception if its start takes more than 30 s, on a busy machine
        raise PoolLost(first_line(error)) from error


def _join_ray(address: str) -> None:
    found = cluster.find(address)
    with nullcontext() if cluster.in_shipped_code() else cluster.code_folder() as folder:
        code = None if folder is None else {"working_dir": str(folder)}
        try:
            ray.init(address=found, runtime_env=code, **_QUIET)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--address must be that of a Ray cluster that takes this driver; {address} does not "
                f"({first_line(error)}): mend that; from a machine outside of the cluster, forward its head's port "
                "8265 and pass --address http://127.0.0.1:8265; or pass --address local for this machine alone"
            ) from error


def run_trials(
    scheduler: StudyScheduler,
    data: SharedData,
    pool: Pool,
    work: Callable[..., None] = tune_trial,
    look: Callable[[], int] | None = None,
) -> None:
    """Train the scheduler's trials with `work`; returns when it has no more or wants to stop.

    On one machine workers read the data from a file, on a cluster from Ray's object store, of which each node gets one
    copy. `look` is called every few seconds and returns the current number of slots, so that workers that join get
    trials. Raises PoolLost if Ray or Tune broke down (ShortOfMemory: because there was too little memory), or the error
    that stopped the scheduler.
    """
    slots = pool.slots
    limiter = ConcurrencyLimiter(TuneSearcher(scheduler), max_concurrent=slots)

    def grow() -> None:
        with suppress(RayError, RuntimeError, OSError):  # the cluster is gone: Tune notices it too and raises
            limiter.max_concurrent = max(limiter.max_concurrent, look() if look else 0)

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its errors come to us as results
    work = partial(work, cpus=pool.trial.cpus, gpus=pool.trial.gpus)
    resources = {"cpu": pool.trial.cpus, "gpu": pool.trial.gpus}
    tune_scheduler = TuneScheduler(scheduler, slots)
    search = tune.TuneConfig(num_samples=-1, search_alg=limiter, scheduler=tune_scheduler, reuse_actors=True)
    with tempfile.TemporaryDirectory(prefix="ram-study-tune-") as scratch:
        run = tune.RunConfig(
            name="tune",
            storage_path=scratch,  # Tune's own files; see study.checkpoints for why they are not kept
            failure_config=tune.FailureConfig(max_failures=MAX_WORKER_DEATHS),
            stop=TuneStopper(scheduler, _breakdown_check(tune_scheduler)),
            verbose=0,
        )
        try:
            if pool.on_cluster:
                with_data = partial(_with_data_held, _held(data), work)
            else:
                joblib.dump(data, file := Path(scratch) / "data")
                with_data = partial(_with_data_of, file, work)
            trainable = tune.with_resources(with_data, resources)
            tuner = tune.Tuner(trainable, tune_config=search, run_config=run)
            with cluster.called_regularly(grow) if look else nullcontext():
                tuner.fit()
        except _Left as left:
            raise left.lost from left
        except (RuntimeError, TuneError, RayError) as error:
            # Tune survives most deaths of a worker, but not when Ray kills the worker for lack of memory.
            reason = ray_reason(str(error))
            raise (ShortOfMemory if lacks_memory(reason) else PoolLost)(reason) from error
    if scheduler.error is not None:
        raise scheduler.error


def _with_data_of(file: Path, work: Callable[..., None], job: dict[str, Any]) -> None:
    """The work on a job, with data that all workers read from one file without a copy."""
    work(job, data=joblib.load(file, mmap_mode="r"))


class _Holder:
    """An actor that has the data of a cluster's trials in Ray's object store.

    If the driver had it there, Ray would end the driver at once and without a word when the raylet dies, which takes
    the store with it. So it comes in parts small enough not to pass through the store.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._held: list[Any] = []

    def add(self, part: bytes) -> None:
        self._parts.append(part)

    def hold(self) -> None:
        self._held = [ray.put(pickle.loads(b"".join(self._parts)))]
        self._parts.clear()

    def references(self) -> list[Any]:
        return self._held


def _held(data: SharedData) -> Any:
    """The data in a holder on this node. Raises RayError."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(_Holder)
    holder = actor.options(num_cpus=0, scheduling_strategy=here).remote()
    whole = pickle.dumps(data)
    for start in range(0, len(whole), _PART):
        holder.add.remote(whole[start : start + _PART])
    ray.get(holder.hold.remote())
    return holder


def _with_data_held(holder: Any, work: Callable[..., None], job: dict[str, Any]) -> None:
    """The work on a job, with data that all workers of a node share."""
    (reference,) = ray.get(holder.references.remote())
    work(job, data=ray.get(reference))


def _breakdown_check(tune_scheduler: TuneScheduler) -> Callable[[], None]:
    """A check that raises _Left when a service of Ray's has died, or a process was killed for lack of memory."""
    kills, looked = machine.memory_kills(), 0.0

    def check() -> None:
        nonlocal looked
        if tune_scheduler.memory_lack is not None:
            raise _Left(ShortOfMemory(tune_scheduler.memory_lack))
        if time.monotonic() - looked < _LOOK_SECONDS:
            return
        looked = time.monotonic()
        dead = dead_service()
        if machine.memory_kills() > kills and (dead or tune_scheduler.worker_died):
            raise _Left(ShortOfMemory("the system killed a process for lack of memory"))
        if dead:
            raise _Left(PoolLost(f"its {dead} died"))

    return check
