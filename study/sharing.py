"""What the trials run on, and how many of them share a GPU. Plain data, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST = 16  # trials on a GPU at a time; beyond that, nobody has measured a gain
_USABLE = 0.95  # share of a GPU's memory that trials may fill
_RAY_STEP = 0.0001  # Ray rounds parts of a GPU to this: of seven sevenths, rounded up, it would run six
_CONTEXT = 600e6  # bytes that CUDA itself takes in each process
_ESTIMATED = 3.0  # torch's allocator and a CUDA graph keep about this many times what `ramcore.cost.memory` counts


@dataclass(frozen=True, kw_only=True)
class GPUs:
    """The GPUs of one machine, or of one worker of a cluster."""

    count: int
    name: str = "GPU"
    memory: float | None = None  # bytes of each; None: not known

    def __str__(self) -> str:
        size = f" ({self.memory / 2**30:.0f} GiB)" if self.memory else ""
        return f"{self.count} x {self.name}{size}"


def per_gpu(gpus: float) -> int:
    """How many trials that take this part of a GPU fit on one; 1 for whole GPUs or none."""
    return max(1, math.floor(1 / gpus + 1e-9)) if gpus else 1


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What the trials run on."""

    device: str  # in words
    gpus: float = 0.0  # of a trial: Ray's number
    why: str = ""  # so many trials share a GPU

    @property
    def trials(self) -> int:
        """Trials that share a GPU; 1 without a GPU."""
        return per_gpu(self.gpus)

    def __str__(self) -> str:
        if not self.gpus:
            return self.device
        how = f"{self.trials} trials share one" if self.trials > 1 else f"{max(self.gpus, 1):g} a trial"
        return f"{self.device}, {how}"

    @property
    def explained(self) -> str:
        """The same, with the reason."""
        return f"{self}{self.why and f' ({self.why})'}"


CPU = Sharing(device="CPU")


def trial_memory(counted: float, *, measured: bool) -> float:
    """Bytes that a trial takes on a GPU, from those that torch was seen to take or `ramcore.cost.memory` counts."""
    return _CONTEXT + counted * (1.0 if measured else _ESTIMATED)


def choose(
    gpus: GPUs, *, cores_for: int, wanted: int | None, memory: float, measured: bool, mps: str | None = None
) -> Sharing:
    """As many trials on each GPU as its memory, the CPU cores and the gain allow.

    Args:
        gpus: of this machine, at least one.
        cores_for: trials at a time for which the machine has CPU cores.
        wanted: most trials that could run at a time, because no more are left or allowed; None: any number.
        memory: bytes of a GPU that a trial takes.
        measured: whether that is measured; else it is an estimate.
        mps: why CUDA's MPS cannot be used, if so. A trial has a GPU alone then, since sharing would gain nothing.
    """
    if mps is not None:
        return Sharing(device=str(gpus), gpus=1.0, why=f"to share one needs CUDA's MPS: {mps}")
    limits = [
        (math.ceil(cores_for / gpus.count), f"CPU cores for {cores_for}"),
        (MOST, f"more than {MOST} are not known to pay"),
    ]
    if gpus.memory is not None:
        fit = int(_USABLE * gpus.memory / memory)
        size = f"{memory / 2**30:.1f} GiB, {'measured' if measured else 'estimated'}"
        limits.append((fit, f"its memory holds {fit} of {size}"))
    if wanted is not None:
        limits.append((math.ceil(wanted / gpus.count), f"{wanted} trials to run"))
    limits.sort(key=lambda limit: limit[0])
    part = math.floor(1 / max(1, limits[0][0]) / _RAY_STEP) * _RAY_STEP
    return Sharing(device=str(gpus), gpus=round(part, 4), why="; ".join(text for _, text in limits))
