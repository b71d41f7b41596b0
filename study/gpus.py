"""The GPUs of this machine or of a cluster: how many trials share one, and CUDA's MPS for these trials."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from ramcore.config import Config
from ramcore.cost import check_memory, memory
from ramcore.errors import first_line
from study import cluster, measure, mps, ray_folder
from study.cluster import Growth, TrialResources
from study.flags import Flags
from study.sharing import CPU, GPUs, Sharing, choose, trial_memory
from study.trainable import SharedData

_NO_DAEMON = f"the cluster does not set {mps.PIPE}"


def here() -> GPUs:
    """The GPUs of this machine that torch can use. Mixed ones count as the smallest."""
    count = torch.cuda.device_count()
    if count == 0:
        return GPUs(count=0)
    all_of_them = [torch.cuda.get_device_properties(i) for i in range(count)]
    smallest = min(all_of_them, key=lambda one: one.total_memory)
    return GPUs(count=count, name=smallest.name, memory=float(smallest.total_memory))


class Local:
    """The choice for this machine."""

    def __init__(
        self, flags: Flags, planned: list[tuple[Config, int]], wanted: int, resources: dict[str, float]
    ) -> None:
        """Choose from the (configuration, seeds) of the trials, of which `wanted` could run at a time.

        Raises UserError if the largest does not fit on a GPU.
        """
        self._gpus = here()
        self._asked = flags.gpus_per_trial
        self._cores_for = TrialResources(cpus=flags.cpus_per_trial, gpus=0).fits(resources)
        self._wanted = wanted
        self._config, self._seeds = max(planned, key=lambda trial: memory(*trial))
        self.sharing = self._choose(memory(self._config, self._seeds), measured=False)
        if self.sharing.gpus and self._gpus.memory:
            check_memory(self._config, self._seeds, self._gpus.memory)

    def _choose(self, counted: int, *, measured: bool, problem: str | None = None) -> Sharing:
        gpus, asked = self._gpus, self._asked
        if asked == 0 and gpus.count:
            return replace(CPU, why=f"--gpus-per-trial 0, so {gpus} idle: leave it out to use a GPU")
        if asked is None:
            taken = trial_memory(counted, measured=measured)
            places = {"cores_for": self._cores_for, "wanted": self._wanted}
            return choose(gpus, **places, memory=taken, measured=measured, mps=problem) if gpus.count else CPU
        why = f"they take turns and gain nothing, for CUDA's MPS cannot be used: {problem}" if problem else ""
        return Sharing(device=str(gpus), gpus=asked, why=why) if asked else CPU

    @contextmanager
    def used(self, data: SharedData) -> Iterator[Sharing]:
        """What the trials run on. In the block, processes that share a GPU compute under CUDA's MPS, if that works.

        The largest configuration is trained for a moment then, which also shows whether it works.
        """
        if self.sharing.trials == 1 or self._wanted < 2 or not self._gpus.count:
            yield self.sharing
            return
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(ray_folder.private_folder(ray_folder.MPS))
                stack.enter_context(mps.running(folder))
                sharing = self._choose(measure.gpu_memory(self._config, data, self._seeds), measured=True)
            except (mps.MpsUnusable, measure.NotMeasured, OSError) as error:
                stack.close()
                sharing = self._choose(0, measured=True, problem=first_line(error))
            yield sharing


def of_cluster(
    flags: Flags, growth: Growth | None, present: list[cluster.Node], planned: list[tuple[Config, int]]
) -> Sharing:
    """The choice for a cluster: for the workers that it may grow to, else for the nodes that are there.

    All trials take the same part of a GPU. Of several kinds of nodes, the one on which the fewest share a GPU decides.
    """
    kinds = [growth.worker] if growth is not None else [node.resources for node in present]
    if flags.gpus_per_trial is not None or not (kinds := [kind for kind in kinds if kind.get("GPU", 0.0) > 0]):
        return Sharing(device="GPUs of the cluster", gpus=flags.gpus_per_trial) if flags.gpus_per_trial else CPU
    needed = trial_memory(max(memory(*trial) for trial in planned), measured=False)
    problem = None if os.environ.get(mps.PIPE) else _NO_DAEMON
    choices = [
        choose(
            cluster.gpus_of(kind),
            cores_for=TrialResources(cpus=flags.cpus_per_trial, gpus=0).fits(kind),
            wanted=None,
            memory=needed,
            measured=False,
            mps=problem,
        )
        for kind in kinds
    ]
    return min(choices, key=lambda choice: choice.trials)
