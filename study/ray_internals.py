"""Everything that reaches into Ray's private parts, as read in Ray 2.60.

tests/test_ray_internals.py fails if another Ray has moved one of them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

_ANSWER_SECONDS = 2.0
_TELLING = ("killed due to", "exit detail", "Error")  # marks of the line that matters in Ray's messages, best first


def keep_idle_workers(tune_controller: Any, trial: Any, count: int) -> Callable[[], None] | None:
    """Have Tune keep up to `count` idle workers for the next trials; returns a function that takes this back.

    Tune keeps one: of two trials that end at once, it ends the second one's worker and starts another, which takes
    seconds. Ray has no setting for it. Reaches into `TuneController._actor_cache`. Without it: None is returned, and
    studies are slower.
    """
    cache = getattr(getattr(tune_controller, "_tune_controller", tune_controller), "_actor_cache", None)
    if cache is None:
        return None
    cache.increase_max(trial.placement_group_factory, by=count)
    return partial(cache.decrease_max, trial.placement_group_factory, by=count)


def forget_worker_deaths(trial: Any) -> None:
    """Count the latest death of a trial's worker as its first one.

    Tune counts the deaths of a whole trial, and gives up after `max_failures`. This writes
    `Trial.run_metadata.num_failures`. Without it: a long trial fails on machines that are often taken away, although it
    makes progress between the deaths.
    """
    trial.run_metadata.num_failures = 1


def last_message(trial: Any) -> str:
    """Ray's last line about the death of a trial's worker.

    Tune hands no message to a scheduler, but writes one to `Trial.error_file`. Without it: "no message".
    """
    path = trial.error_file
    return ray_reason(Path(path).read_text() if path and Path(path).is_file() else "")


def ray_reason(text: str) -> str:
    """The line of one of Ray's long error messages that says what went wrong, at most 300 characters.

    Reads Ray's wording. Without it: the last line, which may say nothing.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    marked = ([line for line in lines if mark in line] for mark in _TELLING)
    best = next((found for found in marked if found), lines)
    return best[-1].removeprefix("Caught unexpected exception: ")[:300]


def lacks_memory(message: str) -> bool:
    """Whether Ray's message says that it killed a worker because a machine ran out of memory.

    Reads Ray's wording. Without it: the study does not lower its concurrency, and Ray breaks down again.
    """
    return "running low on memory" in message


def dead_service() -> str | None:
    """The service of Ray's that has died: this node's raylet (also when its agents die), or the cluster's GCS.

    Ray ends the driver's process 10 to 60 seconds after such a death, without an exception. This connects to the
    sockets of `ray._private.worker._global_node`. Without it: the study ends with 1, and says nothing.
    """
    from ray._private import worker  # puts off Ray

    node: Any = worker._global_node
    if node is None:
        return None
    host, _, port = node.gcs_address.rpartition(":")
    services: list[tuple[str, int, Any]] = [
        ("raylet", socket.AF_UNIX, node.raylet_socket_name),
        ("GCS", socket.AF_INET6 if ":" in host else socket.AF_INET, (host.strip("[]"), int(port))),
    ]
    for name, family, address in services:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(_ANSWER_SECONDS)
            try:
                connection.connect(address)
            except (ConnectionRefusedError, FileNotFoundError):
                return name
            except OSError:  # busy, or out of reach for a moment
                continue
    return None


def cluster_address(address: str) -> str:
    """host:port of the running cluster at an address such as "auto".

    `ray.init` finds the address in this way, and then tries for minutes if nobody answers there. Without it: a wrong
    --address is refused after minutes. Raises ConnectionError or ValueError.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die  # puts off Ray

    return canonicalize_bootstrap_address_or_die(address)


def check_token(found: str) -> None:
    """Connect to a cluster's control service at host:port, which answers only with the right token.

    Without it: `ray.init` ends the process or waits, and says nothing of tokens. Raises
    ray.exceptions.AuthenticationError (token missing or wrong), RuntimeError, ConnectionError or RayError.
    """
    from ray._raylet import GcsClient  # puts off Ray  # pyright: ignore[reportAttributeAccessIssue]

    with _muted():
        GcsClient(address=found)


@contextmanager
def _muted() -> Iterator[None]:
    """Without the lines that Ray's C++ side writes to stderr; the error that it raises says the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
