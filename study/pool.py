"""Ray: where the trials run. Started or joined, asked for its slots, handed the scheduler, and left again."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from ramcore.errors import UserError

# Read by Ray when it is imported or started; whoever set them keeps them.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's own default from its next version on, without its warning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no csv, json and tensorboard files a trial: MLflow has it all
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer console prints its tables even when told to be quiet
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours also knows SIGTERM and leaves trials to be continued
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # for a trial's thread to end; Tune loses the next trial after its 2 s
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's experiment state is not used
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.exceptions import RayError  # noqa: E402
from ray.tune.error import TuneError  # noqa: E402
from ray.tune.search import ConcurrencyLimiter  # noqa: E402

from study.cluster import (  # noqa: E402
    # noqa: E402     UserError,
    Growth,
    Need,
    capacity,
    code_folder,
    find,
    in_shipped_code,
    nodes,
    one_line,
    watched,
)
from study.scheduler import MAX_WORKER_DEATHS, StudyScheduler, TuneScheduler, TuneSearcher, TuneStopper  # noqa: E402
from study.trainable import SharedData, tune_trial  # noqa: E402

_PENDING = "1000"  # trials that may wait for a place; Tune's default would grow a cluster by one node at a time
_OBJECT_STORE = 512 * 2**20  # bytes on a single machine: the images of any task, with room


class PoolLost(RuntimeError):
    """Ray or Tune broke down; what it ran can be taken up again in a new one."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The resources of a running Ray and of one trial."""

    cpus_per_trial: float
    gpus_per_trial: float
    max_concurrent: int | None
    on_cluster: bool = False
    growth: Growth | None = None  # of a cluster that says what it may grow to

    @property
    def need(self) -> Need:
        """What one trial takes."""
        return Need(cpus=self.cpus_per_trial, gpus=self.gpus_per_trial)

    @property
    def slots(self) -> int:
        """Trials at a time. Of a cluster: once it has grown, so that trials wait there and its autoscaler starts nodes
        for them; --max-concurrent is believed where a cluster does not say what it may grow to.
        """
        if not self.on_cluster:
            return count_slots(ray.cluster_resources(), self)
        if self.growth is None and self.max_concurrent is not None:
            return self.max_concurrent
        return max(1, min(capacity(nodes(), self.growth, self.need), self.max_concurrent or 2**31))

    @property
    def devices(self) -> dict[str, float]:
        """What the cluster has, for the record of where a study ran."""
        return {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU") or k.startswith("accelerator")}


def local_resources() -> dict[str, float]:
    """CPUs and GPUs of this machine."""
    import torch

    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}


def count_slots(resources: Mapping[str, float], pool: Pool) -> int:
    """How many trials fit at a time. Raises UserError if none does."""
    slots = pool.need.fits(resources)
    if slots < 1:
        kind = "CPU" if Need(cpus=pool.cpus_per_trial, gpus=0).fits(resources) < 1 and pool.cpus_per_trial else "GPU"
        need = pool.cpus_per_trial if kind == "CPU" else pool.gpus_per_trial
        raise UserError(
            f"a trial must fit on the machine; --{kind.lower()}s-per-trial is {need:g} and there are "
            f"{resources.get(kind, 0.0):g}: pass a smaller --{kind.lower()}s-per-trial"
        )
    return slots if pool.max_concurrent is None else min(slots, pool.max_concurrent)


@contextmanager
def ray_running(address: str | None) -> Iterator[None]:
    """Ray, started on this machine alone or joined where it runs; left (and stopped, if started here) at the end.

    Args:
        address: of a cluster; None for this machine. A bare `ray.init` would join whatever happens to run here.

    Raises:
        UserError: no cluster there that takes us.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "ignore_reinit_error": False}
    if address is None:
        have = local_resources()
        try:
            ray.init(
                address="local",
                num_cpus=int(have["CPU"]),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                **common,
            )
        except Exception as error:
            if type(error) is not Exception:  # Ray's own for a start of more than 30 s, on a machine that is busy
                raise
            ray.shutdown()
            raise PoolLost(one_line(error)) from error
    else:
        found = find(address)
        with nullcontext() if in_shipped_code() else code_folder() as folder:
            code = {} if folder is None else {"runtime_env": {"working_dir": str(folder)}}
            try:
                ray.init(address=found, **code, **common)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"--address must be that of a Ray cluster that takes this driver; {address} does not "
                    f"({one_line(error)}): mend that; from a machine outside of the cluster, forward its head's port "
                    "8265 and pass --address http://127.0.0.1:8265; or pass --address local for this machine alone"
                ) from error
    try:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there, which ends the process on the spot
        yield
    finally:
        ray.shutdown()


def run_trials(
    scheduler: StudyScheduler,
    data: SharedData,
    pool: Pool,
    work: Callable[..., None] = tune_trial,
    look: Callable[[], int] | None = None,
) -> None:
    """Train what the scheduler wants trained; returns when it has no more or wants to stop. Raises what broke the
    scheduler.

    Args:
        scheduler: decides.
        data: for the trials; Ray brings it to each node once.
        pool: how much a trial takes.
        work: what a trial does.
        look: called every few seconds; returns the slots that there are now. Workers that join get trials.
    """
    slots = pool.slots
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = _PENDING
    limiter = ConcurrencyLimiter(TuneSearcher(scheduler), max_concurrent=slots)

    def grow() -> None:
        with suppress(RayError, RuntimeError, OSError):  # a cluster that is gone: Tune meets it too, and says so
            limiter.max_concurrent = max(limiter.max_concurrent, look() if look else 0)

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its errors reach us as results
    work = partial(work, cpus=pool.cpus_per_trial, gpus=pool.gpus_per_trial)
    trainable = tune.with_resources(
        tune.with_parameters(work, data=data), {"cpu": pool.cpus_per_trial, "gpu": pool.gpus_per_trial}
    )
    with tempfile.TemporaryDirectory(prefix="ram-study-tune-") as scratch:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=-1,
                search_alg=limiter,
                scheduler=TuneScheduler(scheduler, slots),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,  # Tune's own files; see study.checkpoints for why they are not kept
                failure_config=tune.FailureConfig(max_failures=MAX_WORKER_DEATHS),
                stop=TuneStopper(scheduler),
                verbose=0,
            ),
        )
        try:
            with watched(grow) if look else nullcontext():
                tuner.fit()
        except (RuntimeError, TuneError, RayError) as error:
            # Not every death of a worker is one that Tune survives: Ray's own killing of it for lack of memory is not.
            raise PoolLost(_reason(error)) from error
    if scheduler.error is not None:
        raise scheduler.error


def _reason(error: BaseException) -> str:
    """The first telling line of what Ray says in pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "killed due to" in line or "Error" in line]
    return ((telling or lines or [type(error).__name__])[0].removeprefix("Caught unexpected exception: "))[:300]
