"""Tasks: square grey images with labels, split into train, validation and test, and laid on a canvas.

Only the images are stored (`ramcore.sources` loads them). `TaskData.render` draws a batch of canvases from them and a
key per replicate. So a placement is a function of (seed, epoch, image) alone, the same on CPU and GPU.

R: replicates, B: images of a batch, N: images of a split, I: image side, S: canvas side.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ramcore import kernels
from ramcore.config import CLUTTER_SIZE, DIGIT_SIZE, MAX_CLUTTER, TASKS, Config, canvas_side
from ramcore.errors import UserError
from ramcore.rng import Stream, integers, key

SplitName = Literal["train", "validation", "test"]
_FIXED_SEED = -1  # places the validation and test digits of every run; no replicate has a negative seed


class Split(NamedTuple):
    """images: (N, I, I) uint8; labels: (N,) int64 from 0 to the number of classes - 1."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """All images of a task, as tensors on one device."""

    data: str
    task: str
    digest: str  # sha256 of the source's images and labels
    canvas: int = 0  # as `Config.canvas`
    train: Split
    validation: Split
    test: Split

    @property
    def image_size(self) -> int:
        """Pixels along a side of every image."""
        return self.train.images.shape[-1]

    @property
    def canvas_size(self) -> int:
        """Pixels along a side of the canvas."""
        return canvas_side(self.task, self.canvas)

    @cached_property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return 1 + max(int(self.split(name).labels.max()) for name in get_args(SplitName))

    def configure(self, config: Config) -> Config:
        """The configuration, for these images and this task. Raises UserError if its patches exceed the canvas."""
        return replace(config, data=self.data, task=self.task, canvas=self.canvas, num_classes=self.num_classes)

    def check(self, config: Config) -> None:
        """Raises UserError unless a configuration is for these images and this task."""
        own, asked = (f"{x.data} {x.task}{f' on {x.canvas} pixels' if x.canvas else ''}" for x in (self, config))
        if own != asked:
            raise UserError(f"data must be {asked}; got {own}: load_task(config)")
        if self.num_classes > config.num_classes:
            fact = f"{self.data} has {self.num_classes}, num_classes is {config.num_classes}"
            raise UserError(f"a network needs an answer for every class; {fact}: data.configure(config)")

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
        return replace(self, **splits)

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
        canvas, clutter, side = self.canvas_size, TASKS[self.task].num_clutter, self.image_size
        if canvas > side and kernels.usable(index.device):
            return kernels.render(images, index, keys, canvas, clutter, (side, CLUTTER_SIZE, _COUNTERS_PER_IMAGE))
        shape = (*index.shape, canvas, canvas)
        flat_index = index.reshape(-1)
        digits = images.view(len(images), -1).index_select(0, flat_index)
        if canvas == side and not clutter:
            return digits.view(shape)
        # Every image has its own counters, so its place does not depend on the rest of the batch.
        counter, high, digit_pixels, clutter_pixels, source_pixels = _layout(
            side, canvas, clutter, len(images), index.device
        )
        counters = (index * _COUNTERS_PER_IMAGE).reshape(-1, 1) + counter
        drawn = integers(keys[:, None].expand_as(index).reshape(-1, 1), counters, high)

        def place(first: int, side: int, count: int = 1) -> Tensor:
            """Flat offsets (N, count) of the corners drawn for squares of a side x side image."""
            return drawn[:, first : first + count] * side + drawn[:, first + count : first + 2 * count]

        flat = digits.new_zeros(digits.shape[0], canvas * canvas)
        flat.scatter_(1, place(0, canvas) + digit_pixels, digits)
        if clutter:
            other = (flat_index[:, None] + 1 + drawn[:, 2 : 2 + clutter]) % len(images)
            source = other * side**2 + place(2 + clutter, side, clutter)
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
def _layout(side: int, canvas: int, clutter: int, num_images: int, device: torch.device) -> _Layout:
    places = [canvas - side + 1] * 2
    clutter_high = (num_images - 1, *[side - CLUTTER_SIZE + 1] * 2, *[canvas - CLUTTER_SIZE + 1] * 2)
    places += [high for high in clutter_high for _ in range(clutter)]
    layout = _Layout(
        counter=torch.arange(len(places), device=device),
        high=torch.tensor(places, device=device),
        digit_pixels=_square(side, canvas, device),
        clutter_pixels=_square(CLUTTER_SIZE, canvas, device),
        source_pixels=_square(CLUTTER_SIZE, side, device),
    )
    kernels.wait_for(layout.source_pixels)
    return layout


def make_task(data: str, task: str, splits: dict[SplitName, Split], canvas: int = 0) -> TaskData:
    """A task from the splits of a source, on a canvas of that many pixels along a side; 0: the task's.

    A canvas of the size of SOURCES' images, which is the task "original", has the size of these images.
    Raises UserError if the images do not fit.
    """
    side, clutter = splits["train"].images.shape[-1], TASKS[task].num_clutter
    if not canvas and TASKS[task].canvas_size == DIGIT_SIZE != side:
        canvas = side
    if side > (size := canvas_side(task, canvas)):
        raise UserError(
            f"images must fit on the canvas; those of {data} have {side}x{side} pixels, the canvas of {task} {size}x"
            f"{size}: pass --canvas {side} or more"
        )
    if clutter and (side < CLUTTER_SIZE or min(len(split.labels) for split in splits.values()) < 2):
        raise UserError(
            f"clutter is cut from other images, {CLUTTER_SIZE}x{CLUTTER_SIZE} pixels at a time; those of {data} have "
            f"{side}x{side} pixels: pass --task translated or original"
        )
    digest = hashlib.sha256()
    for name in get_args(SplitName):
        for tensor in splits[name]:
            digest.update(tensor.contiguous().numpy().tobytes())
    return TaskData(data=data, task=task, digest=digest.hexdigest(), canvas=canvas, **splits)
