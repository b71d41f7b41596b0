"""What one training run is made of: a frozen, validated dataclass.

A field's name is the name of the same thing everywhere: the key of the search space, the tracked parameter and the
column of the analysis' tables. A hyperparameter is added or changed here and nowhere else.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ramcore.errors import UserError


class TaskSpec(NamedTuple):
    """How a task lays images on its canvas."""

    canvas_size: int  # pixels along a side
    num_clutter: int  # patches of clutter on every image


MAX_CLUTTER = 8  # patches; each image has random numbers for so many, so a larger task would move every placement
# A task is added here, and nowhere else.
TASKS: dict[str, TaskSpec] = {
    "original": TaskSpec(canvas_size=28, num_clutter=0),
    "translated": TaskSpec(canvas_size=60, num_clutter=0),
    "cluttered": TaskSpec(canvas_size=60, num_clutter=4),
    "cluttered-100": TaskSpec(canvas_size=100, num_clutter=8),
}
if TYPE_CHECKING:
    Task = str
else:
    Task = Literal[tuple(TASKS)]  # so that the command line lists them

Data = Literal["mnist", "fashion-mnist", "digits"]
Model = Literal["ram", "ram-random", "cnn", "conv", "fc"]
Core = Literal["rnn", "gru", "lstm"]
LocationInput = Literal["state", "state+paths"]

CLUTTER_SIZE = 8  # pixels; clutter is cut as 8x8 patches from other images (case study, section 3.1)
DIGIT_SIZE = 28  # pixels; every source is delivered at this size
NUM_CLASSES = 10
MAX_SCALES = 6


@dataclass(frozen=True)
class Between:
    """The range of a number, both ends included unless `above` leaves out the lower one."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return low if self.high == math.inf else f"{low} and at most {self.high:g}"


Positive = Annotated[int, Between(1)]
Share = Annotated[float, Between(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run, its seed excepted. The defaults are the papers' choices (Mnih et al. 2014; the case study)."""

    # What is learned.
    data: Data = "mnist"  # where the 28x28 images come from
    task: Task = "translated"  # how they are laid on the canvas
    placements: Literal["once", "every-epoch"] = "every-epoch"  # when training digits and clutter get a new place

    # The network.
    model: Model = "ram"  # ram-random: random glimpses; cnn: the case study's; conv, fc: Mnih et al.'s
    num_glimpses: Annotated[int, Between(1, 100)] = 6  # glimpses before the decision
    patch_size: Positive = 12  # pixels along a side of every scale of the retina
    num_scales: Annotated[int, Between(1, MAX_SCALES)] = 3  # concentric patches, each scale_factor times as wide
    scale_factor: Annotated[int, Between(2, 8)] = 2  # width of a scale over the width of the one before
    input_gain: Annotated[float, Between(0, above=True)] = 1.0  # pixels, in [0, 1], are multiplied by this
    glimpse_size: Positive = 128  # units of each of the glimpse network's what and where paths
    hidden_size: Positive = 256  # units of the core and of the glimpse code; of each hidden layer when model is fc
    core: Core = "rnn"  # rnn is the papers' rectified core
    location_input: LocationInput = "state"  # what the location network reads; state+paths: what and where paths too
    location_hidden: Annotated[int, Between(0)] = (
        0  # units of a rectified layer inside the location network; 0: none, as in the papers
    )
    layer_norm: bool = False  # normalise the pre-activations of the glimpse code and of the core
    first_glimpse: Literal["random", "center"] = "random"  # where the first glimpse looks
    location_std: Annotated[float, Between(0, above=True)] = 0.17  # SD of the location policy, half-canvas units
    location_std_end: Annotated[float, Between(0, 1, above=True)] = 1.0  # share left at the end of half a cosine

    # The loss.
    loss_mixing: Share = 1.0  # 1: cross-entropy trains the action network, 0: REINFORCE on a sampled class
    step_supervision: Share = 0.0  # share of the classification loss spread over every step, not the last
    reward: Literal["accuracy", "probability"] = "accuracy"  # 0/1, or the probability given to the true class
    reward_steps: Literal["last", "every"] = "last"  # which glimpses earn a reward
    discount: Share = 1.0  # a reward k glimpses later counts discount**k
    reinforce_weight: Annotated[float, Between(0)] = 1.0  # of the location policy's loss, classification loss 1
    reinforce_core: bool = False  # let the location policy's gradient train the core and the glimpse network too

    # The optimisation.
    epochs: Positive = 30  # passes over the training images
    batch_size: Positive = 100  # images a step
    learning_rate: Annotated[float, Between(0, above=True)] = 3e-4  # Adam's, at its highest
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: down to 0 over the epochs
    gradient_clip: Annotated[float, Between(0)] = 0.0  # largest norm of a replicate's gradient; 0: not clipped
    dropout: Annotated[float, Between(0, 0.95)] = 0.5  # after the second convolution of the cnn

    # The evaluation.
    eval_samples: Annotated[int, Between(0, 10_000)] = 0  # 0: the policy's mean; M: average M sampled rollouts

    def __post_init__(self) -> None:
        for name, annotation in _annotations().items():
            _check(name, getattr(self, name), annotation)
        if self.patch_size > self.canvas_size:
            raise UserError(
                f"patch_size must be at most {self.canvas_size}, the canvas of task {self.task}; got {self.patch_size}"
            )

    @property
    def canvas_size(self) -> int:
        """Pixels along a side of the square canvas."""
        return TASKS[self.task].canvas_size

    @property
    def num_clutter(self) -> int:
        """Clutter patches on every image."""
        return TASKS[self.task].num_clutter

    @property
    def is_recurrent(self) -> bool:
        """Whether the model takes glimpses (otherwise it sees the whole canvas at once)."""
        return self.model in ("ram", "ram-random")

    @property
    def glimpse_pixels(self) -> int:
        """Values in one glimpse: num_scales patches of patch_size by patch_size."""
        return self.num_scales * self.patch_size**2


_LARGEST = 2**31 - 1  # of a whole number: torch's sizes


@functools.cache
def _annotations() -> dict[str, Any]:
    hints = get_type_hints(Config, include_extras=True)
    return {field.name: hints[field.name] for field in fields(Config)}


def _check(name: str, value: Any, annotation: Any) -> None:
    """Compare a field's value with its annotation. Raises UserError."""
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise UserError(f"{name} must be one of {', '.join(get_args(annotation))}; got {value!r}")
        return
    if annotation is bool:
        if not isinstance(value, bool):
            raise UserError(f"{name} must be true or false; got {value!r}")
        return
    kind, between = get_args(annotation)
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int) or value not in between or value > _LARGEST:
            raise UserError(f"{name} must be a whole number of {between}; got {value!r}")
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number; got {value!r}")
    if value not in between:
        raise UserError(f"{name} must be {between}; got {value:g}")
