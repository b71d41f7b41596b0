"""Clusters of several Ray nodes on this machine, on loopback, for tests."""

from __future__ import annotations

import atexit
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray._raylet import Config
from ray.cluster_utils import Cluster

STARTS = 3  # tries: on a busy machine a node may take longer to start than the 30 s that Ray allows


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def add_node(cluster: Cluster, **node: Any) -> Any:
    """Add a node on loopback."""
    for start in range(STARTS):
        try:
            return cluster.add_node(node_ip_address="127.0.0.1", include_dashboard=False, **node)
        except Exception as error:
            if "timed out during startup" not in str(error) or start == STARTS - 1:
                raise
    raise AssertionError


@contextlib.contextmanager
def cluster_of(head_cpus: int, *workers: dict[str, Any]) -> Iterator[Cluster]:
    """A cluster with a head of `head_cpus` CPUs, and workers with these arguments of Ray's."""
    with pytest.MonkeyPatch.context() as patch:
        # Ray's constant and, for the processes it starts, the variable it is made of; see `study.run`.
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        Config.initialize("")  # reads it again: an earlier test may have had a token
        for name in ("RAM_MAX_WORKERS", "RAM_WORKER_CPUS", "RAM_WORKER_GPUS"):
            patch.delenv(name, raising=False)
        assert not ray.is_initialized()
        cluster = Cluster(shutdown_at_exit=False)  # it would set signal handlers, which only the main thread can
        atexit.register(cluster.shutdown)
        try:
            add_node(cluster, num_cpus=head_cpus)
            for worker in workers:
                add_node(cluster, **worker)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            atexit.unregister(cluster.shutdown)
