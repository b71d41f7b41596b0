"""The cost of a configuration: parameters, multiply-accumulates an image at evaluation, and memory.

A multiply-accumulate (MAC) is one term of a matrix product or convolution. Additions, activations and the retina are
not counted (the retina does num_scales * patch_size**2 multiplications a glimpse). RAM's MACs do not depend on the size
of the canvas, as the papers say; those of a convolutional network do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ramcore.config import Config
from ramcore.errors import UserError


class Cost(NamedTuple):
    """parameters: of one replicate, with its baseline network. macs: an image, of one evaluation rollout."""

    parameters: int
    macs: int


def cost(config: Config) -> Cost:
    """Parameters and MACs of a configuration."""
    if config.is_recurrent:
        return _ram_cost(config)
    canvas, hidden, classes = config.canvas_size, config.hidden_size, config.num_classes
    if config.model == "cnn":  # layers: (inputs, outputs, places where a convolution is computed)
        first = canvas - 4
        second = first // 2 - 4
        layers = [(25, 10, first**2), (250, 20, second**2), (20 * (second // 2) ** 2, 50, 1), (50, classes, 1)]
    elif config.model == "conv":
        places = ((canvas - 10) // 5 + 1) ** 2
        layers = [(100, 8, places), (8 * places, hidden, 1), (hidden, classes, 1)]
    else:
        layers = [(canvas**2, hidden, 1), (hidden, hidden, 1), (hidden, classes, 1)]
    return Cost(sum((i + 1) * o for i, o, _ in layers), sum(i * o * places for i, o, places in layers))


_FLOAT = 4  # bytes
_EVALUATED = 500  # images of a batch at evaluation: `ramcore.evaluation.BATCH_SIZE`, which needs torch


def memory(config: Config, replicates: int) -> int:
    """Bytes that training takes at least: weights with gradients and moments, box sums, and what a step keeps."""
    weights = cost(config).parameters * replicates * 5 * _FLOAT  # with gradient, two moments, and the best epoch's
    images = replicates * config.batch_size
    if not config.is_recurrent:
        return weights + images * (config.canvas_size**2 + 2 * config.hidden_size) * _FLOAT
    # As `ramcore.retina` lays them out: a level for each scale and one more to add into, of 16 or 32 bits.
    ring = config.scale_factor ** (config.num_scales - 1)
    levels = (config.num_scales + 1) * (config.canvas_size + ring) ** 2
    sums = max(images, _EVALUATED) * levels * (2 if 255 * ring**2 < 2**15 else 4)
    kept = config.glimpse_pixels + 2 * config.glimpse_size + 2 * config.hidden_size
    return weights + sums + images * config.num_glimpses * kept * _FLOAT


def check_memory(config: Config, replicates: int, available: float) -> None:
    """Raises UserError if training needs more memory than these bytes."""
    if (needed := memory(config, replicates)) > available:
        sizes = "num_scales, scale_factor, patch_size, glimpse_size" if config.is_recurrent else "hidden_size"
        raise UserError(
            f"a network must fit in memory; {replicates} at a time with batches of {config.batch_size} images take "
            f"{needed / 2**30:,.1f} GiB and there are {available / 2**30:,.1f}: lower {sizes}, the batch or the seeds"
        )


def _ram_cost(config: Config) -> Cost:
    hidden, path = config.hidden_size, config.glimpse_size
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[config.core]
    glimpse = [(config.glimpse_pixels, path), (2, path), (2 * path, hidden), (hidden, gates * hidden)]
    recurrent = (hidden, gates * hidden)  # not at the first glimpse: the state before it is zero
    read, width = hidden + (2 * path if config.location_input == "state+paths" else 0), config.location_hidden
    location = [(read, width), (width, 2)] if width else [(read, 2)]
    outputs = [(hidden, config.num_classes), (hidden, 1)]  # action and baseline
    norms = config.layer_norm * (1 + (2 * gates if config.core == "gru" else gates))
    decisions = config.num_glimpses - 1 if config.model == "ram" else 0
    return Cost(
        parameters=sum((i + 1) * o for i, o in [*glimpse, recurrent, *location, *outputs]) + norms * 2 * hidden,
        macs=config.num_glimpses * sum(i * o for i, o in glimpse)
        + (config.num_glimpses - 1) * recurrent[0] * recurrent[1]
        + decisions * sum(i * o for i, o in location)
        + hidden * config.num_classes,
    )


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Positions of the points with a higher value than every cheaper point, cheapest first; the first of equals."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if not front or values[i] > values[front[-1]]:
            front.append(i)
    return front
