"""Named places where the fault tests kill, delay or break the program. Without an environment variable they do nothing.

The variable is RAM_STUDY_FAULT=name@n:action, with commas between several faults. The action is done when this process
passes the named place for the n-th time: `kill` ends the process as `kill -9` would, `full` raises the error of a full
disk, `error` raises a programming error, `hang=seconds` waits.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections import Counter

VARIABLE = "RAM_STUDY_FAULT"
_passed: Counter[str] = Counter()
_lock = threading.Lock()


def fault_point(name: str) -> None:
    """Pass a named place (see the module's docstring)."""
    plan = os.environ.get(VARIABLE)
    if not plan:
        return
    with _lock:
        _passed[name] += 1
        count = _passed[name]
    for place, _, action in (part.partition(":") for part in plan.split(",")):
        if place == f"{name}@{count}":
            _act(action, name)


def _act(action: str, name: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    elif action == "error":
        raise RuntimeError(f"injected at {name}")
    elif action.startswith("hang="):
        time.sleep(float(action.removeprefix("hang=")))
    else:
        raise ValueError(f"{VARIABLE}: unknown action {action!r}")
