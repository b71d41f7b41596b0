"""What this machine lets a process use: CPUs and memory, also inside a container or a service with limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")  # Linux control groups, of version 1 or 2; macOS has none
_OWN_GROUPS = Path("/proc/self/cgroup")


def cpus() -> float:
    """CPU cores that this process may use at a time: a fraction if a quota says so."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    found = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    for folder in _own_groups("cpu"):
        quota, period = [*_words(folder / "cpu.max"), *_words(folder / "cpu.cfs_quota_us"), "max", ""][:2]
        period = period if period.isdigit() else next(_words(folder / "cpu.cfs_period_us"), "")
        if quota.isdigit() and period.isdigit() and int(period):
            found = min(found, int(quota) / int(period))
    return found


def memory() -> int:
    """Bytes of memory that this process and its children may use."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _own_groups("memory"):
        for word in [*_words(folder / "memory.max"), *_words(folder / "memory.limit_in_bytes")]:
            found = min(found, int(word)) if word.isdigit() else found
    return found


def memory_kills() -> int:
    """How many processes the system has killed for lack of memory since it started; 0 where it does not say."""
    words = list(_words(Path("/proc/vmstat")))
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def _own_groups(controller: str) -> Iterator[Path]:
    """The folders of this process' control groups, from its own up to the outermost one that it sees."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _GROUPS / controller if controllers else _GROUPS
        group = root / path.lstrip("/")
        while group != root:
            yield group
            group = group.parent
        yield root


def _words(path: Path) -> Iterator[str]:
    """The words of a small file; none if it cannot be read."""
    try:
        yield from path.read_text().split()
    except OSError:
        return
