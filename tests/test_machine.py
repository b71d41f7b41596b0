"""What a machine or a container lets a process use."""

from __future__ import annotations

import os

import pytest

from ramcore import machine

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """groups("0::/a", {"a/cpu.max": "100000 100000"}): this process' control groups, and their files."""
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 16 * GIB // 4096}[name])

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("own", "files", "cpus", "memory"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, 8, 16),
        ("0::/\n", {"cpu.max": "150000 100000\n", "memory.max": f"{2 * GIB}\n"}, 1.5, 2),
        # A service: the limit is its own group's, or one above it.
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000", "a/memory.max": f"{GIB}"}, 0.5, 1),
        # Version 1. In a container without a namespace of groups, its own is the outermost that it sees.
        (
            "5:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n0::/\n",
            {
                "cpu/cpu.cfs_quota_us": "300000\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": f"{3 * GIB}\n",
            },
            3,
            3,
        ),
        (
            "5:memory:/\n2:cpu:/\n",
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": f"{2**63}",
            },
            8,
            16,
        ),
        ("0::/../sibling\n", {}, 8, 16),
    ],
)
def test_limits_of_control_groups_are_seen(groups, own, files, cpus, memory):
    groups(own, files)
    assert machine.cpus() == cpus and machine.memory() == memory * GIB


def test_machine_without_affinity_and_control_groups_counts_its_cpus(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "none")
    assert machine.cpus() == os.cpu_count() and machine.memory() > 0
    assert machine.memory_kills() >= 0
