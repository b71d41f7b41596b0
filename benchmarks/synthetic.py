"""Random images in place of a data set, so that nothing is downloaded: speed depends only on their number and size."""

from __future__ import annotations

import torch

from ramcore.config import Config, Task
from ramcore.data import Split, SplitName, TaskData, make_task

EVALUATION_IMAGES = 1_000


def synthetic(task: Task, images: int, evaluated: int = EVALUATION_IMAGES) -> TaskData:
    """A task of random sparse 28x28 images."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        pixels = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        ink = torch.rand(count, 28, 28, generator=generator) < 0.2
        return Split(pixels * ink, torch.randint(0, 10, (count,), generator=generator))

    sizes: dict[SplitName, int] = {"train": images, "validation": evaluated, "test": evaluated}
    return make_task(Config().data, task, {name: split(count) for name, count in sizes.items()})
