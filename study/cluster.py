"""A cluster that a study joins: who is there, how many trials fit, and whether every node can do the work.

What is asked of a node is asked by a task on that node, before the first trial, and again of each node that joins
later. All nodes run the driver's code: Ray carries it there (`code_folder`), so a node needs the project's packages but
no up-to-date copy of the project. Images reach the nodes through Ray's object store, from the driver.

The top of this file imports the standard library only: the task comes to nodes that may lack everything else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ramcore.errors import UserError

JOIN_MINUTES = 15.0  # how long a study waits for the first worker of a cluster that grows; see `wait_for_workers`
JOIN_MINUTES_FIXED = 1.0  # the same, of a cluster that does not say that it grows
_PROBE_SECONDS = 180.0  # for one node's answer: importing torch from a cold disk takes a minute
_CONNECT_SECONDS = 5.0
_LOOK_SECONDS = 5.0  # between two looks at who is there
_SAY_SECONDS = 15.0  # between two lines about waiting
_COMPARED = ("ray", "torch", "numpy")  # packages whose versions a trial's results or its transport depend on
_HEAD = "node:__internal_head__"  # Ray's mark on the head
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray gives a job's driver, under this very name


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one trial takes."""

    cpus: float
    gpus: float

    def fits(self, resources: Mapping[str, float]) -> int:
        """How many trials fit on one node at a time."""
        counts = [math.inf]
        if self.cpus > 0:
            counts.append(math.floor(resources.get("CPU", 0.0) / self.cpus + 1e-9))
        if self.gpus > 0:
            have = resources.get("GPU", 0.0)
            # Of several GPUs a trial takes one or a part of one; parts of two do not add up.
            shared = 0 < self.gpus < 1
            counts.append(math.floor(have) * math.floor(1 / self.gpus) if shared else math.floor(have / self.gpus))
        return int(min(counts)) if min(counts) < math.inf else 0


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What a cluster may grow to, as its launcher wrote it into every node's environment."""

    workers: int  # RAM_MAX_WORKERS
    worker: dict[str, float]  # CPUs and GPUs of one: RAM_WORKER_CPUS, RAM_WORKER_GPUS

    @staticmethod
    def declared() -> Growth | None:
        """From the environment; None if it says nothing. Raises UserError."""
        workers = number("RAM_MAX_WORKERS")
        if workers is None:
            return None
        cpus, gpus = number("RAM_WORKER_CPUS"), number("RAM_WORKER_GPUS") or 0.0
        if cpus is None:
            raise UserError(
                "RAM_MAX_WORKERS needs the size of a worker; RAM_WORKER_CPUS is not set: set it (and RAM_WORKER_GPUS)"
            )
        return Growth(workers=int(workers), worker={"CPU": cpus, "GPU": gpus})


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


def share_of_gpus(growth: Growth, cpus: float) -> float:
    """GPUs of a trial with so many CPUs, when a worker's trials share both alike: with 4 CPUs and 1 GPU, four trials
    of 1 CPU share the GPU; with more GPUs than trials fit, one each.
    """
    trials = math.floor(growth.worker["CPU"] / cpus + 1e-9)
    gpus = growth.worker["GPU"]
    if gpus < 1 or trials < 1:
        return gpus if gpus < 1 else 1.0
    return 1 / math.ceil(trials / math.floor(gpus))


def number(name: str) -> float | None:
    """A number of at least 0 from the environment; None if not set. Raises UserError."""
    text = os.environ.get(name)
    if not text:
        return None
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 <= value < math.inf:
            return value
    raise UserError(f"{name} must be a number of at least 0; it is {text!r}: set it again, or unset it")


# Finding the cluster.


def find(address: str) -> str:
    """host:port of the running cluster at an address, after a look whether it answers and knows our token.

    Ray itself tries for minutes where nobody answers, and says nothing of tokens.

    Raises:
        UserError: nobody there, or the token is missing or wrong.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.exceptions import AuthenticationError, RayError

    rule = "--address must be that of a running Ray cluster"
    fix = "run `ray status` there, or pass --address local for this machine alone"
    try:
        found = canonicalize_bootstrap_address_or_die(address)
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:  # ConnectionError is an OSError: Ray found none
        raise UserError(f"{rule}; {address} did not answer ({one_line(error)}): {fix}") from error
    try:
        with _muted():
            GcsClient(address=found)
    except AuthenticationError as error:
        raise UserError(wrong_token(address)) from error
    except (RuntimeError, ConnectionError, RayError) as error:
        raise UserError(f"{rule}; {address} is not one ({one_line(error)}): {fix}") from error
    return found


@contextmanager
def _muted() -> Iterator[None]:
    """Without what Ray's C++ side writes to stderr; the error that it raises says the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def wrong_token(address: str) -> str:
    """What to say where Ray refuses us."""
    has = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    has = has or (Path.home() / ".ray" / "auth_token").is_file()
    fact = "this machine's is another" if has else "this machine has none"
    return (
        f"a cluster is entered with its own token; {address} wants one and {fact}: copy ~/.ray/auth_token from the "
        "cluster's head to the same place here, and set RAY_AUTH_MODE=token"
    )


@contextmanager
def code_folder() -> Iterator[Path]:
    """A folder with the code that the nodes need, and nothing else of the working tree: no data, no secrets."""
    import ramcore
    import study

    with tempfile.TemporaryDirectory(prefix="ram-study-code-") as scratch:
        for package in (ramcore, study):
            source = Path(package.__path__[0])
            for path in source.rglob("*.py"):
                copy = Path(scratch) / source.name / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
        yield Path(scratch)


def in_shipped_code() -> bool:
    """Whether this is a Ray job that brought its code along: all nodes run that, and its folder goes when it ends."""
    return "working_dir" in json.loads(os.environ.get(_JOB, "{}")).get("runtime_env", {})


def check_lasting(storage: str, tracking_uri: str) -> None:
    """A job's working folder is deleted with the job. Raises UserError if results would go there."""
    if not in_shipped_code():
        return
    if "://" not in storage and not Path(storage).is_absolute():
        raise UserError(
            f"a job's folder goes when it ends, so --storage must be an absolute path or a URI; got {storage}: "
            "set RAM_STORAGE on the cluster's nodes, or pass --storage"
        )
    if tracking_uri.startswith("sqlite:///") and not tracking_uri.startswith("sqlite:////"):
        raise UserError(
            "a job's folder goes when it ends, so tracking must be a server or a database at an absolute path; got "
            f"{tracking_uri}: set MLFLOW_TRACKING_URI on the cluster's nodes, or pass --tracking-uri"
        )


# Who is there.


def nodes() -> list[Node]:
    """The nodes of the cluster that this process has joined."""
    import ray

    return [
        Node(id=n["NodeID"], address=n["NodeManagerAddress"], resources=dict(n["Resources"]))
        for n in ray.nodes()
        if n["Alive"]
    ]


def only_on(node: Node) -> Any:
    """The scheduling strategy of a task that is to run on one node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def capacity(present: list[Node], growth: Growth | None, need: Need) -> int:
    """Trials at a time once the cluster has grown as far as it may."""
    here = sum(need.fits(node.resources) for node in present)
    if growth is None:
        return here
    heads = sum(need.fits(node.resources) for node in present if node.is_head)
    return max(here, heads + growth.workers * need.fits(growth.worker))


def wait_for_workers(
    need: Need, growth: Growth | None, trials: int, *, others: bool, say: Callable[[str], None]
) -> list[Node]:
    """Wait until a node can run a trial; returns the nodes.

    Up to JOIN_MINUTES if the cluster says that it grows, meanwhile asking for the room that the trials can use, so that
    its autoscaler starts the workers at once; else up to JOIN_MINUTES_FIXED, for workers that are being started.

    Args:
        need: of a trial.
        growth: what the cluster may grow to.
        trials: that could run at a time, if there were room.
        others: wait for a node beside the driver's too, for what can be asked of such a node only.
        say: is told every 15 seconds.

    Raises:
        UserError: none came, or none that may come is large enough.
    """
    import ray

    wanted = f"{need.cpus:g} CPUs and {need.gpus:g} GPUs"
    if growth is not None and capacity([n for n in nodes() if n.is_head], growth, need) < 1:
        raise UserError(
            f"a trial must fit on a node; it takes {wanted} and a worker has {growth.worker['CPU']:g} and "
            f"{growth.worker['GPU']:g}: pass a smaller --cpus-per-trial or --gpus-per-trial"
        )
    here = ray.get_runtime_context().get_node_id()
    minutes = JOIN_MINUTES if growth is not None and growth.workers > 0 else JOIN_MINUTES_FIXED
    started, said, asked = time.monotonic(), -math.inf, []
    hold = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus, max_retries=0)(_hold)
    try:
        while True:
            present = nodes()
            able = sum(need.fits(node.resources) for node in present)
            alone = others and all(node.id == here for node in present)
            if able >= 1 and not alone:
                return present
            if growth is not None and not asked:
                asked = [hold.remote(JOIN_MINUTES * 60) for _ in range(min(trials, capacity(present, growth, need)))]
            waited = time.monotonic() - started
            if waited >= minutes * 60:
                break
            if waited - said >= _SAY_SECONDS:
                said = waited
                say(
                    f"waiting for a worker with {wanted}: {len(present)} node{'s' if len(present) > 1 else ''} so far, "
                    f"{waited:.0f} s of at most {minutes:g} min"
                )
            time.sleep(min(_LOOK_SECONDS, 1.0))
    finally:
        for task in asked:
            ray.cancel(task, force=True)
    sizes = "; ".join(f"{n}: {n.resources.get('CPU', 0):g} CPUs, {n.resources.get('GPU', 0):g} GPUs" for n in nodes())
    raise UserError(
        f"a trial needs a node with {wanted}{', and --storage a worker to be checked on' if others else ''}; within "
        f"{minutes:g} min none came ({sizes}): look at `ray status`, or pass a smaller --cpus-per-trial or "
        "--gpus-per-trial"
    )


def _hold(seconds: float) -> None:
    """Makes an autoscaler start a node for it; cancelled as soon as one is there."""
    time.sleep(seconds)


# Whether they can do the work.


class Check:
    """Asks nodes whether they have the packages and see the storage."""

    def __init__(self, storage: str) -> None:
        self._storage = storage
        self._marker = f".probe-{secrets.token_hex(8)}"
        self._passed: set[str] = set()  # node ids

    def __call__(self, present: list[Node]) -> str | None:
        """The first problem of a node that has not passed yet, as rule, fact and fix; None if there is none."""
        new = [node for node in present if node.id not in self._passed]
        local = "://" not in self._storage
        marker = Path(self._storage) / self._marker
        made = [folder for folder in marker.parents if not folder.exists()] if local else []
        try:
            if local and new:
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
            for node, answer in self._ask(new):
                problem = answer if isinstance(answer, str) else self._judge(node, answer)
                if problem:
                    return problem
                self._passed.add(node.id)
        finally:
            if local:
                marker.unlink(missing_ok=True)
                for folder in made:
                    with contextlib.suppress(OSError):  # in use by now
                        folder.rmdir()
        return None

    def _ask(self, new: list[Node]) -> Iterator[tuple[Node, dict[str, Any] | str]]:
        """What each node answers; a problem in words where it does not. Nodes that go meanwhile are left out."""
        import ray
        from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, TaskUnschedulableError

        asked = {}
        for node in new:
            task = ray.remote(num_cpus=0, scheduling_strategy=only_on(node), max_retries=1)(probe)
            asked[node.id] = task.remote(self._storage, self._marker)
        end = time.monotonic() + _PROBE_SECONDS
        for node in new:
            try:
                yield node, ray.get(asked[node.id], timeout=max(1.0, end - time.monotonic()))
            except (NodeDiedError, TaskUnschedulableError):
                continue
            except RayError as error:
                if node.id not in {n.id for n in nodes()}:
                    continue
                if isinstance(error, GetTimeoutError):
                    problem = (
                        f"every node must answer within {_PROBE_SECONDS / 60:g} min; {node} did not: look at it with "
                        "`ray status`, or take it out of the cluster"
                    )
                else:
                    problem = (
                        f"every node must be able to run the project; {node} cannot ({telling_line(error)}): install "
                        "the project there as CLUSTER.md says, or take the node out of the cluster"
                    )
                yield node, problem

    def _judge(self, node: Node, answer: dict[str, Any]) -> str | None:
        ours = versions()
        differing = [
            f"{name} {answer['versions'].get(name, 'not installed')}, the driver {ours[name]}"
            for name in ours
            if answer["versions"].get(name) != ours[name]
        ]
        fix = "install the project there with constraints.txt, as CLUSTER.md says, or take the node out of the cluster"
        if differing:
            return f"every node must have the driver's versions; {node} has {'; '.join(differing)}: {fix}"
        if answer["lacks"]:
            return f"every node must have the project's packages; {node} lacks some ({answer['lacks']}): {fix}"
        if answer["unseen"]:
            return (
                f"on several nodes --storage must be the same folder on all of them; {node} does not see "
                f"{self._storage}: pass --storage s3://bucket/folder or a folder that all nodes mount, or set "
                "RAM_STORAGE on the nodes"
            )
        if answer["unreachable"]:
            return (
                f"every node must reach --storage; {node} cannot write to {self._storage} ({answer['unreachable']}): "
                "give that node access (an instance profile, or AWS_* in its environment)"
            )
        return None


def probe(storage: str, marker: str) -> dict[str, Any]:
    """What a node answers: its versions, what it lacks, and what is wrong with the storage as it sees it."""
    answer: dict[str, Any] = {"versions": versions(), "lacks": "", "unseen": False, "unreachable": ""}
    try:
        from study.checkpoints import open_folder
        from study.trainable import tune_trial  # noqa: F401  # a trial's whole code
    except ImportError as error:
        return answer | {"lacks": one_line(error)}
    if "://" not in storage and not _seen(Path(storage) / marker):
        return answer | {"unseen": True}
    try:
        folder = open_folder(storage, f"{marker}-{secrets.token_hex(4)}")
        folder.write("probe", b"")
        folder.delete("probe")
        folder.delete_folder("")
    except (OSError, ValueError) as error:
        return answer | {"unreachable": one_line(error)}
    return answer


def _seen(path: Path) -> bool:
    for _ in range(3):  # a network file system may take a moment
        if path.exists():
            return True
        time.sleep(1.0)
    return False


def versions() -> dict[str, str]:
    """Of Python and the compared packages, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _COMPARED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def one_line(error: BaseException) -> str:
    """An error's text without its line breaks, at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def telling_line(error: BaseException) -> str:
    """The line of Ray's pages that says what went wrong: the last one that names an error."""
    lines = [line.strip() for line in str(error).splitlines() if "Error" in line]
    return (lines[-1] if lines else one_line(error))[:200]


# While the study runs.


class Meter:
    """Hours that worker machines have run since it was made, all of them together."""

    def __init__(self, machines: int) -> None:
        self._machines = machines
        self._hours = 0.0
        self._since = time.monotonic()
        self._lock = threading.Lock()

    def set(self, machines: int) -> None:
        """From now on so many machines."""
        with self._lock:
            self._add()
            self._machines = machines

    def hours(self) -> float:
        """Machine hours until now."""
        with self._lock:
            self._add()
            return self._hours

    def _add(self) -> None:
        now = time.monotonic()
        self._hours += self._machines * (now - self._since) / 3600
        self._since = now


@contextmanager
def watched(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` every few seconds from a thread, until the end of the block."""
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
