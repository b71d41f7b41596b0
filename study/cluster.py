"""The Ray cluster that a study runs on: its nodes, how many trials fit on them, and whether they can run trials.

Before the first trial, a task on each node checks that node (`study.probe`); so does one on each node that joins later.
All nodes run the driver's code: Ray copies it to them (`code_folder`), so a node needs the project's packages but no
up-to-date copy of the project. The images reach the nodes through Ray's object store, from the driver.

Ray is imported inside the functions that use it: it takes seconds, and this module also serves `--help` and refusals.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ramcore
import study
from ramcore.errors import UserError, first_line
from study.probe import COMPARED, probe, versions
from study.ray_internals import check_token, cluster_address, ray_reason
from study.sharing import GPUs, per_gpu
from study.storage import Storage

JOIN_MINUTES = 15.0  # a study waits at most this long for the first worker of a cluster that grows
JOIN_MINUTES_FIXED = 1.0  # the same, for a cluster that does not declare that it grows
_PROBE_SECONDS = 180.0  # for a node's answer: importing torch from a cold disk takes a minute
_CONNECT_SECONDS = 5.0
_LOOK_SECONDS = 5.0  # between two looks at the cluster's nodes
_SAY_SECONDS = 15.0  # between two lines about waiting
_HEAD = "node:__internal_head__"  # a resource that Ray gives to the head only
_ACCELERATOR = "accelerator_type:"  # how Ray's resource that names a node's GPUs begins
_GPU_MEMORY = "GPU memory"  # of a worker: GiB of each GPU
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # the environment variable of a job's driver; its name is literally this


@dataclass(frozen=True, kw_only=True)
class TrialResources:
    """The resources of one trial."""

    cpus: float
    gpus: float
    memory: float = 0.0  # bytes of the machine's; 0: not known

    def fits(self, resources: Mapping[str, float]) -> int:
        """How many trials fit on a node with these resources at a time."""
        cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        counts: list[int] = []
        if self.cpus > 0:
            counts.append(math.floor(cpus / self.cpus + 1e-9))
        if 0 < self.gpus < 1:  # a trial's part of a GPU is on one GPU: parts of two do not add up
            counts.append(math.floor(gpus) * per_gpu(self.gpus))
        elif self.gpus > 0:
            counts.append(math.floor(gpus / self.gpus))
        if self.memory > 0 and "memory" in resources:
            counts.append(math.floor(resources["memory"] / self.memory))
        return min(counts, default=0)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The size that a cluster may grow to. Its launcher writes it into every node's environment."""

    workers: int  # RAM_MAX_WORKERS
    worker: dict[str, float]  # of each: CPUs, GPUs, and GiB of each GPU, if known (RAM_WORKER_CPUS, ...)

    @staticmethod
    def declared() -> Growth | None:
        """Read it from the environment; None if it is not set. Raises UserError."""
        workers = number("RAM_MAX_WORKERS")
        if workers is None:
            return None
        cpus, gpus = number("RAM_WORKER_CPUS"), number("RAM_WORKER_GPUS") or 0.0
        if cpus is None:
            fact = "RAM_WORKER_CPUS is not set: set it (and RAM_WORKER_GPUS)"
            raise UserError(f"RAM_MAX_WORKERS needs the size of a worker; {fact}")
        size = number("RAM_WORKER_GPU_MEMORY")
        return Growth(workers=int(workers), worker={"CPU": cpus, "GPU": gpus} | ({_GPU_MEMORY: size} if size else {}))


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that is alive."""

    id: str  # Ray's
    address: str
    resources: dict[str, float]

    @property
    def is_head(self) -> bool:
        """Whether the cluster's own services run there."""
        return _HEAD in self.resources

    def __str__(self) -> str:
        return f"{self.address} (the head)" if self.is_head else self.address


def gpus_of(resources: Mapping[str, float]) -> GPUs:
    """The GPUs of a node or of a worker, at least one, in the words of its resources."""
    kinds = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
    size = resources.get(_GPU_MEMORY)
    return GPUs(
        count=max(1, math.floor(resources["GPU"])),
        name=kinds[0] if kinds else "GPU a worker",
        memory=size and size * 2**30,
    )


def number(name: str) -> float | None:
    """Read a number of at least 0 from the environment; None if it is not set. Raises UserError."""
    text = os.environ.get(name)
    if not text:
        return None
    with suppress(ValueError):
        value = float(text)
        if 0 <= value < math.inf:
            return value
    raise UserError(f"{name} must be a number of at least 0; it is {text!r}: set it again, or unset it")


# Finding the cluster.


def find(address: str) -> str:
    """The host:port of the running cluster at an address.

    Raises UserError if it does not answer or refuses our token. Ray's own attempt takes minutes if nothing answers, and
    its error does not mention tokens.
    """
    from ray.exceptions import AuthenticationError, RayError  # here, to put Ray off

    rule = "--address must be that of a running Ray cluster"
    fix = "run `ray status` there, or pass --address local for this machine alone"
    fact = "did not answer"
    try:
        found = cluster_address(address)
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        fact = "is not one"
        check_token(found)
        return found
    except AuthenticationError as error:
        raise UserError(wrong_token(address)) from error
    except (OSError, ValueError, RuntimeError, RayError) as error:  # ConnectionError is an OSError: Ray found none
        raise UserError(f"{rule}; {address} {fact} ({first_line(error)}): {fix}") from error


def wrong_token(address: str) -> str:
    """The error message for a cluster that refuses our token."""
    file = Path.home() / ".ray" / "auth_token"
    has = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.isfile(file)
    fact = "this machine's is another" if has else "this machine has none"
    return (
        f"a cluster is entered with its own token; {address} wants one and {fact}: copy ~/.ray/auth_token from the "
        "cluster's head to the same place here, and set RAY_AUTH_MODE=token"
    )


def no_job_server(address: str, fact: str) -> UserError:
    """The error to raise when no job server can be used at an address."""
    return UserError(
        f"--address must be a Ray cluster's job server; {address} {fact}: forward the head's port 8265 "
        "(`ray dashboard cluster.yaml`) and try again"
    )


@contextmanager
def code_folder() -> Iterator[Path]:
    """A temporary folder with the code that the nodes need, without data or secrets."""
    with tempfile.TemporaryDirectory(prefix="ram-study-code-") as scratch:
        for package in (ramcore, study):
            source = Path(package.__path__[0])
            for path in source.rglob("*.py"):
                copy = Path(scratch) / source.name / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
        yield Path(scratch)


def in_shipped_code() -> bool:
    """Whether this process is a Ray job with its own code. All nodes run that code; Ray deletes it after the job."""
    return "working_dir" in json.loads(os.environ.get(_JOB, "{}")).get("runtime_env", {})


def check_lasting(storage: str, tracking_uri: str) -> None:
    """Raises UserError if a job would write its results to its working folder, which Ray deletes after the job."""
    if not in_shipped_code():
        return
    if not Storage.parse(storage).is_remote and not Path(storage).is_absolute():
        raise UserError(
            f"a job's folder goes when it ends, so --storage must be an absolute path or a URI; got {storage}: "
            "set RAM_STORAGE on the cluster's nodes, or pass --storage"
        )
    if tracking_uri.startswith("sqlite:///") and not tracking_uri.startswith("sqlite:////"):
        raise UserError(
            "a job's folder goes when it ends, so tracking must be a server or a database at an absolute path; got "
            f"{tracking_uri}: set MLFLOW_TRACKING_URI on the cluster's nodes, or pass --tracking-uri"
        )


# The nodes.


def nodes() -> list[Node]:
    """The living nodes of the cluster that this process has joined."""
    import ray  # here, to put it off

    return [
        Node(id=n["NodeID"], address=n["NodeManagerAddress"], resources=dict(n["Resources"]))
        for n in ray.nodes()
        if n["Alive"]
    ]


def only_on(node: Node) -> Any:  # Ray annotates where it is used too narrowly
    """The scheduling strategy of a task that must run on this node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # here, to put Ray off

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def capacity(present: list[Node], growth: Growth | None, trial: TrialResources) -> int:
    """Trials at a time once the cluster has grown as far as it may."""
    here = sum(trial.fits(node.resources) for node in present)
    if growth is None:
        return here
    heads = sum(trial.fits(node.resources) for node in present if node.is_head)
    return max(here, heads + growth.workers * trial.fits(growth.worker))


def wait_for_workers(
    trial: TrialResources, growth: Growth | None, trials: int, *, others: bool, say: Callable[[str], None]
) -> list[Node]:
    """Wait until a node can run a trial; returns the nodes.

    A cluster that declares its growth gets up to JOIN_MINUTES. Meanwhile tasks of a trial's size wait there, so that
    its autoscaler starts the workers at once. Any other cluster gets up to JOIN_MINUTES_FIXED, for workers that are
    starting.

    Args:
        trial: what a trial takes.
        growth: what the cluster may grow to.
        trials: how many could run at a time if there were room.
        others: also wait for a node other than the driver's; some checks need one.
        say: is called with a line every 15 seconds.

    Raises UserError if no node came in time, or no worker can be large enough.
    """
    import ray  # here, to put it off

    size = f"{trial.cpus:g} CPUs and {trial.gpus:g} GPUs"
    fix = "pass a smaller --cpus-per-trial or --gpus-per-trial"
    if growth is not None and capacity([n for n in nodes() if n.is_head], growth, trial) < 1:
        worker = f"{growth.worker['CPU']:g} and {growth.worker['GPU']:g}"
        raise UserError(f"a trial must fit on a node; it takes {size} and a worker has {worker}: {fix}")
    here = ray.get_runtime_context().get_node_id()
    minutes = JOIN_MINUTES if growth is not None and growth.workers > 0 else JOIN_MINUTES_FIXED
    started, said, holding = time.monotonic(), -math.inf, []
    hold = ray.remote(num_cpus=trial.cpus, num_gpus=trial.gpus, max_retries=0)(_hold)
    try:
        while (waited := time.monotonic() - started) < minutes * 60:
            present = nodes()
            alone = all(node.id == here for node in present)
            if any(trial.fits(node.resources) for node in present) and not (others and alone):
                return present
            if growth is not None and not holding:
                places = min(trials, capacity(present, growth, trial))
                holding = [hold.remote(JOIN_MINUTES * 60) for _ in range(places)]
            if waited - said >= _SAY_SECONDS:
                said = waited
                so_far = f"{len(present)} node{'s' if len(present) > 1 else ''} so far"
                say(f"waiting for a worker with {size}: {so_far}, {waited:.0f} s of at most {minutes:g} min")
            time.sleep(1.0)
    finally:
        for task in holding:
            ray.cancel(task, force=True)
    what = f"a node with {size}{', and --storage a worker to be checked on' if others else ''}"
    raise UserError(
        f"a trial needs {what}; within {minutes:g} min none came ({sizes(nodes())}): look at `ray status`, or {fix}"
    )


def sizes(present: list[Node]) -> str:
    """The CPUs and GPUs of each node, in words."""
    return "; ".join(f"{n}: {n.resources.get('CPU', 0):g} CPUs, {n.resources.get('GPU', 0):g} GPUs" for n in present)


def _hold(seconds: float) -> None:
    """Wait as a task, so that an autoscaler starts a node for it. It is cancelled once a node is there."""
    time.sleep(seconds)


# Checking nodes.


class Check:
    """Checks that nodes have the packages and see the storage; each node that passes is checked once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._marker = f".probe-{secrets.token_hex(8)}"
        self._passed: set[str] = set()  # node ids

    def __call__(self, present: list[Node]) -> str | None:
        """The first problem of a node that has not passed yet, as rule, fact and fix; None if there is none."""
        new = [node for node in present if node.id not in self._passed]
        with nullcontext() if self._storage.is_remote or not new else self._marked():
            for node, problem in self._ask(new):
                if problem:
                    return problem
                self._passed.add(node.id)
        return None

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Put a file into the storage's folder for the nodes to find; remove it and the folders made for it."""
        marker = Path(self._storage.place) / self._marker
        made = [folder for folder in marker.parents if not folder.exists()]
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
            yield
        finally:
            marker.unlink(missing_ok=True)
            for folder in made:
                with suppress(OSError):  # in use by now
                    folder.rmdir()

    def _ask(self, new: list[Node]) -> Iterator[tuple[Node, str | None]]:
        """Each node's problem, if it has one. Nodes that leave meanwhile are skipped."""
        # Imported here to put off Ray.
        import ray
        from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, TaskUnschedulableError

        ours, asked = versions(COMPARED), {}
        for node in new:
            task = ray.remote(num_cpus=0, scheduling_strategy=only_on(node), max_retries=1)(probe)
            asked[node.id] = task.remote(str(node), self._storage.place, self._marker, ours)
        end = time.monotonic() + _PROBE_SECONDS
        for node in new:
            try:
                yield node, ray.get(asked[node.id], timeout=max(1.0, end - time.monotonic()))
            except (NodeDiedError, TaskUnschedulableError):
                continue
            except RayError as error:
                if node.id not in {n.id for n in nodes()}:
                    continue
                rule, fact = "every node must be able to run the project", f"cannot ({ray_reason(str(error))})"
                if isinstance(error, GetTimeoutError):
                    rule, fact = f"every node must answer within {_PROBE_SECONDS / 60:g} min", "did not"
                fix = "install the project there as CLUSTER.md says, see `ray status`, or take it out of the cluster"
                yield node, f"{rule}; {node} {fact}: {fix}"


# While the study runs.


class MachineHours:
    """Counts the hours that worker machines run, all of them together, from its creation on."""

    def __init__(self, machines: int) -> None:
        self._counted = (0.0, machines, time.monotonic())  # hours until a time, and machines since then

    def set(self, machines: int) -> None:
        """Count this many machines from now on."""
        self._counted = (self.hours(), machines, time.monotonic())

    def hours(self) -> float:
        """Machine hours until now."""
        hours, machines, since = self._counted
        return hours + machines * (time.monotonic() - since) / 3600


@contextmanager
def called_regularly(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` from a thread every few seconds until the end of the block."""
    over = threading.Event()

    def follow() -> None:
        while not over.wait(_LOOK_SECONDS):
            look()

    thread = threading.Thread(target=follow, name="cluster", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
