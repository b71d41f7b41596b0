"""Tasks: 28x28 grey images with labels, split into train, validation and test, and laid on a canvas.

Only the images are stored (`ramcore.sources` loads them). `TaskData.render` draws a batch of canvases from them and a
key per replicate. So a placement is a function of (seed, epoch, image) alone, the same on CPU and GPU.

R: replicates, B: images of a batch, N: images of a split, S: canvas side.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ramcore import kernels
from ramcore.config import CLUTTER_SIZE, DIGIT_SIZE, MAX_CLUTTER, TASKS
from ramcore.rng import Stream, integers, key

SplitName = Literal["train", "validation", "test"]
_FIXED_SEED = -1  # places the validation and test digits of every run; no replicate has a negative seed


class Split(NamedTuple):
    """images: (N, 28, 28) uint8; labels: (N,) int64 in 0..9."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """All images of a task, as tensors on one device."""

    data: str
    task: str
    digest: str  # sha256 of the source's images and labels
    train: Split
    validation: Split
    test: Split

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images of each split."""
        return {name: len(self.split(name).labels) for name in get_args(SplitName)}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.train.images.device

    def split(self, name: SplitName) -> Split:
        """One split's images and labels."""
        return getattr(self, name)

    def to(self, device: torch.device | str) -> TaskData:
        """The same task on another device."""
        splits = {name: Split(*(t.to(device) for t in self.split(name))) for name in get_args(SplitName)}
        return TaskData(data=self.data, task=self.task, digest=self.digest, **splits)

    def placement_keys(self, split: SplitName, seeds: Tensor, epoch: int | Tensor) -> Tensor:
        """Keys of the places of digits and clutter: (R,) int64 for train; else (1,), the same in every run.

        seeds: (R,) int64. epoch: of the training split; with a constant here, the places stay.
        """
        if split == "train":
            return key(seeds, Stream.PLACEMENT, epoch)
        fixed = torch.full((1,), _FIXED_SEED, device=seeds.device)
        return key(fixed, Stream.PLACEMENT, 1 if split == "validation" else 2)

    def render(self, split: SplitName, index: Tensor, keys: Tensor) -> Tensor:
        """Draw canvases (R, B, S, S) uint8; the split gives the digits and the images that clutter is cut from.

        index: (R, B) int64, of the split's images. keys: (R,) int64, from `placement_keys`.
        """
        images = self.split(split).images
        canvas, clutter = TASKS[self.task]
        if canvas > DIGIT_SIZE and kernels.usable(index.device):
            return kernels.render(images, index, keys, canvas, clutter, (DIGIT_SIZE, CLUTTER_SIZE, _COUNTERS_PER_IMAGE))
        shape = (*index.shape, canvas, canvas)
        flat_index = index.reshape(-1)
        digits = images.view(len(images), -1).index_select(0, flat_index)
        if canvas == DIGIT_SIZE:
            return digits.view(shape)
        # Every image has its own counters, so its place does not depend on the rest of the batch.
        counter, high, digit_pixels, clutter_pixels, source_pixels = _layout(self.task, len(images), index.device)
        counters = (index * _COUNTERS_PER_IMAGE).reshape(-1, 1) + counter
        drawn = integers(keys[:, None].expand_as(index).reshape(-1, 1), counters, high)

        def place(first: int, side: int, count: int = 1) -> Tensor:
            """Flat offsets (N, count) of the corners drawn for squares of a side x side image."""
            return drawn[:, first : first + count] * side + drawn[:, first + count : first + 2 * count]

        flat = digits.new_zeros(digits.shape[0], canvas * canvas)
        flat.scatter_(1, place(0, canvas) + digit_pixels, digits)
        if clutter:
            other = (flat_index[:, None] + 1 + drawn[:, 2 : 2 + clutter]) % len(images)
            source = other * DIGIT_SIZE**2 + place(2 + clutter, DIGIT_SIZE, clutter)
            patches = images.view(-1)[source[..., None] + source_pixels]
            target = place(2 + 3 * clutter, canvas, clutter)[..., None] + clutter_pixels
            for i in range(clutter):  # in turn, since patches of one image may overlap
                flat.scatter_(1, target[:, i], torch.maximum(flat.gather(1, target[:, i]), patches[:, i]))
        return flat.view(shape)


_COUNTERS_PER_IMAGE = 2 + 5 * MAX_CLUTTER


def _square(size: int, side: int, device: torch.device) -> Tensor:
    """Flat offsets of the pixels of a size x size square in a side x side image: (size * size,)."""
    steps = torch.arange(size, device=device)
    return (steps[:, None] * side + steps).reshape(-1)


class _Layout(NamedTuple):
    """How the places on an image are drawn. D numbers an image: its digit's row and column; then, for all its clutter,
    the images to cut from, the rows and columns to cut at, and the rows and columns to paste at.
    """

    counter: Tensor  # (D,)
    high: Tensor  # (D,) each number is below this
    digit_pixels: Tensor  # flat offsets of a digit's pixels in a canvas
    clutter_pixels: Tensor  # of a clutter patch's pixels in a canvas
    source_pixels: Tensor  # of a clutter patch's pixels in the image it is cut from


@lru_cache(maxsize=64)
def _layout(task: str, num_images: int, device: torch.device) -> _Layout:
    canvas, clutter = TASKS[task]
    places = [canvas - DIGIT_SIZE + 1] * 2
    clutter_high = (num_images - 1, *[DIGIT_SIZE - CLUTTER_SIZE + 1] * 2, *[canvas - CLUTTER_SIZE + 1] * 2)
    places += [high for high in clutter_high for _ in range(clutter)]
    layout = _Layout(
        counter=torch.arange(len(places), device=device),
        high=torch.tensor(places, device=device),
        digit_pixels=_square(DIGIT_SIZE, canvas, device),
        clutter_pixels=_square(CLUTTER_SIZE, canvas, device),
        source_pixels=_square(CLUTTER_SIZE, DIGIT_SIZE, device),
    )
    kernels.wait_for(layout.source_pixels)
    return layout


def make_task(data: str, task: str, splits: dict[SplitName, Split]) -> TaskData:
    """A task from the splits of a source."""
    digest = hashlib.sha256()
    for name in get_args(SplitName):
        for tensor in splits[name]:
            digest.update(tensor.contiguous().numpy().tobytes())
    return TaskData(data=data, task=task, digest=digest.hexdigest(), **splits)
