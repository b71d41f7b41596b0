"""Pictures of a network's glimpses, as in the case study's Figure 4. No other module of ramcore needs matplotlib.

T glimpses, K scales, P patch side, S canvas side, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ramcore.config import Config
from ramcore.data import SplitName, TaskData
from ramcore.errors import UserError
from ramcore.evaluation import build_model, first_locations
from ramcore.model import RAM

RED = "#d62728"


class GlimpsePath(NamedTuple):
    """The glimpses of one network at one image, at the policy's means.

    canvas: (S, S) in [0, 1]. locations: (T, 2). seen: (T, K, P, P) in [0, 1]. probabilities: (T, C) of the classes
    after each glimpse. label: the true class.
    """

    canvas: np.ndarray
    locations: np.ndarray
    seen: np.ndarray
    probabilities: np.ndarray
    label: int


@torch.no_grad()
def glimpse_paths(
    config: Config, weights: dict[str, Tensor], data: TaskData, split: SplitName = "test", count: int = 4
) -> list[GlimpsePath]:
    """The glimpses of one trained RAM at the first images of a split. Raises UserError for another model.

    weights: of one replicate, leading dimension 1 (Trainer.best_weights(replicate)).
    """
    if config.model != "ram":
        raise UserError(f"only model ram chooses where to look; got {config.model}")
    seeds = torch.zeros(1, dtype=torch.int64)
    model = build_model(config, seeds)
    assert isinstance(model, RAM)
    model.load_state_dict(weights)
    index = torch.arange(count)
    images = data.to("cpu").render(split, index[None], data.placement_keys(split, seeds, 0))
    glimpses = model.look(model.retina.pyramid(images), first_locations(config, index), keep=True)
    shape = (config.num_glimpses, count, config.num_scales, config.patch_size, config.patch_size)
    seen, locations = glimpses.seen.view(shape) / config.input_gain, glimpses.locations[0]
    probabilities = model.scores(glimpses.hiddens)[0].softmax(-1)
    return [
        GlimpsePath(
            canvas=images[0, i].numpy() / 255,
            locations=locations[:, i].numpy(),
            seen=seen[:, i].numpy(),
            probabilities=probabilities[:, i].numpy(),
            label=int(data.split(split).labels[i]),
        )
        for i in range(count)
    ]


def draw_canvas(path: GlimpsePath, config: Config, ax: Axes) -> Axes:
    """Draw the canvas, each glimpse's finest patch as a numbered red square, and a line between their centres."""
    size, patch = config.canvas_size, config.patch_size
    centres = np.floor((path.locations + 1) * (size / 2) + 0.5) - (patch % 2) / -2
    ax.imshow(path.canvas, cmap="gray", vmin=0, vmax=1, extent=(0, size, size, 0))
    ax.plot(*centres.T, color=RED, linewidth=0.8, alpha=0.6)
    for t, (x, y) in enumerate(centres, start=1):
        ax.add_patch(Rectangle((x - patch / 2, y - patch / 2), patch, patch, fill=False, edgecolor=RED, linewidth=1.2))
        ax.text(x - patch / 2 + 1, y - patch / 2 + 1, str(t), color="white", fontsize=6, va="top", ha="left")
    ax.set(xlim=(0, size), ylim=(size, 0), xticks=[], yticks=[])
    return ax


def retina_view(seen: np.ndarray, scale_factor: int) -> np.ndarray:
    """One picture of patches (K, P, P): each scale at its own width, finer scales over coarser ones."""
    scales, patch = seen.shape[:2]
    side = patch * scale_factor ** (scales - 1)
    view = np.zeros((side, side))
    for k in reversed(range(scales)):
        width = patch * scale_factor**k
        start = (side - width) // 2
        view[start : start + width, start : start + width] = np.kron(seen[k], np.ones((scale_factor**k,) * 2))
    return view


def draw_glimpses(config: Config, paths: list[GlimpsePath]) -> Figure:
    """Draw a row for each image: the canvas with its glimpses; then each glimpse's patches and the likeliest class."""
    columns = config.num_glimpses + 1
    figure = Figure(figsize=(1.5 * columns, 1.75 * len(paths) + 0.3), layout="constrained")
    axes = figure.subplots(len(paths), columns, squeeze=False)
    for row, path in zip(axes, paths, strict=True):
        draw_canvas(path, config, row[0])
        row[0].set_title(f"a {path.label}", fontsize=8)
        for t in range(config.num_glimpses):
            ax = row[t + 1]
            ax.imshow(retina_view(path.seen[t], config.scale_factor), cmap="gray", vmin=0, vmax=1)
            best = int(path.probabilities[t].argmax())
            ax.set_title(f"glimpse {t + 1}: {best}? {path.probabilities[t, best]:.0%}", fontsize=7)
            ax.set(xticks=[], yticks=[])
    return figure
