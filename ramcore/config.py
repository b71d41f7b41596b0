"""The configuration of one training run, and the tasks.

A field of `Config` has the same name everywhere: in the search space, in the tracked parameters and in the analysis'
tables. A hyperparameter is declared here and used where it acts; a Dimension in study/search_space.py has it searched.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ramcore.errors import UserError, brief


class TaskSpec(NamedTuple):
    """The canvas of a task."""

    canvas_size: int  # pixels along a side
    num_clutter: int  # patches of clutter on every image


MAX_CLUTTER = 8  # patches an image has random numbers for; another number here would move every placement
# A task is added here alone.
TASKS: dict[str, TaskSpec] = {
    "original": TaskSpec(canvas_size=28, num_clutter=0),
    "translated": TaskSpec(canvas_size=60, num_clutter=0),
    "cluttered": TaskSpec(canvas_size=60, num_clutter=4),
    "cluttered-100": TaskSpec(canvas_size=100, num_clutter=8),
}


def canvas_side(task: str, canvas: int) -> int:
    """Pixels along a side of the square canvas: `canvas`, or the task's where that is 0."""
    return canvas or TASKS[task].canvas_size


if TYPE_CHECKING:
    Task = str
else:
    Task = Literal[tuple(TASKS)]  # the command line lists these

SOURCES = ("mnist", "fashion-mnist", "digits")  # the images that this project knows, each of 28x28 pixels in 10 classes
Model = Literal["ram", "ram-random", "cnn", "conv", "fc"]
LocationInput = Literal["state", "state+paths"]

CLUTTER_SIZE = 8  # pixels along a side of a patch cut from another image (case study, section 3.1)
DIGIT_SIZE = 28  # pixels along a side of the images of SOURCES
MAX_SCALES = 6


@dataclass(frozen=True)
class Between:
    """The range of a number. Both ends belong to it; with `above` set, the lower end does not."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {brief(self.low)}"
        return low if self.high == math.inf else f"{low} and at most {brief(self.high)}"


class ImagesName:
    """The names of images: those of SOURCES, and of own images, which end with the first 8 digits of their digest."""

    def __contains__(self, name: object) -> bool:
        return name in SOURCES or (isinstance(name, str) and re.fullmatch(r".+-[0-9a-f]{8}", name) is not None)

    def __str__(self) -> str:
        return f"one of {', '.join(SOURCES)}, or own images as `ramcore.sources.load_images` names them"


Count = Annotated[int, Between(1)]
AboveZero = Annotated[float, Between(0, above=True)]
Share = Annotated[float, Between(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run, without its seed. The defaults are the papers' choices (Mnih et al. 2014; the case study).

    Raises UserError for a value that its field does not allow.
    """

    # The data.
    data: Annotated[str, ImagesName()] = "mnist"  # the images: mnist, fashion-mnist, digits, or own ones
    task: Task = "translated"  # size of the canvas, and clutter on it
    canvas: Annotated[int, Between(0, 1000)] = 0  # pixels along a side of the canvas; 0: the task's
    num_classes: Annotated[int, Between(2, 10_000)] = 10  # classes of the images
    placements: Literal["once", "every-epoch"] = "every-epoch"  # how often training digits and clutter get new places

    # The network.
    model: Model = "ram"  # ram-random: random locations; cnn: the case study's; conv, fc: Mnih et al.'s
    num_glimpses: Annotated[int, Between(1, 100)] = 6  # glimpses before the decision
    patch_size: Count = 12  # pixels along a side of every scale of the retina
    num_scales: Annotated[int, Between(1, MAX_SCALES)] = 3  # concentric patches; the first is patch_size pixels wide
    scale_factor: Annotated[int, Between(2, 8)] = 2  # width of a scale over the width of the one before
    input_gain: AboveZero = 1.0  # factor of the pixels, which are in [0, 1]
    glimpse_size: Count = 128  # units of each of the glimpse network's what and where paths
    hidden_size: Count = 256  # units of the core and of the glimpse code; of each hidden layer when model is fc
    core: Literal["rnn", "gru", "lstm"] = "rnn"  # rnn is the papers' rectified core
    location_input: LocationInput = "state"  # input of the location network: the core's state, or with the paths
    location_hidden: Annotated[int, Between(0)] = 0  # units of the location network's hidden layer; 0: no such layer
    layer_norm: bool = False  # normalise the pre-activations of the glimpse code and of the core
    first_glimpse: Literal["random", "center"] = "random"  # the first location
    location_std: AboveZero = 0.17  # standard deviation of the location policy; 1 is half the canvas
    location_std_end: Annotated[float, Between(0, 1, above=True)] = 1.0  # share of location_std left after a cosine

    # The loss.
    loss_mixing: Share = 1.0  # 1: cross-entropy trains the classifier; 0: REINFORCE on a sampled class
    step_supervision: Share = 0.0  # share of the classification loss from all steps; the rest is the last's
    reward: Literal["accuracy", "probability"] = "accuracy"  # 0 or 1, or the probability of the true class
    reward_steps: Literal["last", "every"] = "last"  # the glimpses that have a reward
    discount: Share = 1.0  # factor of a reward one glimpse later
    reinforce_weight: Annotated[float, Between(0)] = 1.0  # of the policy's loss, relative to the classification loss
    reinforce_core: bool = False  # whether the policy's gradient also trains the core and the glimpse network

    # The optimisation.
    epochs: Count = 30  # passes over the training images
    batch_size: Count = 100  # images a step
    learning_rate: AboveZero = 3e-4  # Adam's, at the first step
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: down to 0 over all epochs
    gradient_clip: Annotated[float, Between(0)] = 0.0  # largest norm of a replicate's gradient; 0: no limit
    matmul_precision: Literal["highest", "high"] = "highest"  # of a GPU's products; high: TF32, 10 bits of mantissa
    dropout: Annotated[float, Between(0, 0.95)] = 0.5  # share of maps dropped after the cnn's second convolution

    # The evaluation.
    eval_samples: Annotated[int, Between(0, 10_000)] = 0  # sampled rollouts to average; 0: one, at the policy's means

    def __post_init__(self) -> None:
        for name, annotation in _annotations().items():
            _check(name, getattr(self, name), annotation)
        if self.patch_size > self.canvas_size:
            canvas = f"{self.canvas_size}, the canvas{'' if self.canvas else f' of task {self.task}'}"
            raise UserError(f"patch_size must be at most {canvas}; got {self.patch_size}")
        if self.canvas_size < (least := {"cnn": 16, "conv": 10}.get(self.model, 1)):
            raise UserError(f"model {self.model} needs a canvas of at least {least} pixels; got {self.canvas_size}")

    @property
    def canvas_size(self) -> int:
        """Pixels along a side of the square canvas."""
        return canvas_side(self.task, self.canvas)

    @property
    def is_recurrent(self) -> bool:
        """Whether the model takes glimpses (otherwise it sees the whole canvas at once)."""
        return self.model in ("ram", "ram-random")

    @property
    def glimpse_pixels(self) -> int:
        """Values in one glimpse: num_scales patches of patch_size by patch_size."""
        return self.num_scales * self.patch_size**2


def nearest(name: str, names: Iterable[str]) -> str:
    """How a message goes on after an unknown name: "; did you mean num_scales?", or nothing if none is like it."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def kind(name: str) -> type:
    """What a field of Config holds: int, float, bool or str (one of some names). Raises UserError if there is none."""
    annotations = _annotations()
    if name not in annotations:
        raise UserError(f"a hyperparameter must be a field of Config; got {name}{nearest(name, annotations)}")
    annotation = annotations[name]
    if get_origin(annotation) is Literal:
        return str
    return annotation if isinstance(annotation, type) else get_args(annotation)[0]


def read_value(name: str, text: object) -> Any:
    """A field's value from text, or as TOML has it. Raises UserError if the field does not allow it."""
    value, wanted = text, kind(name)
    if isinstance(text, str) and wanted is not str:
        try:
            value = {"true": True, "false": False}.get(text.lower(), text) if wanted is bool else float(text)
        except ValueError:
            pass  # the check says what is allowed
    if wanted is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    _check(name, value, _annotations()[name])
    return value


_LARGEST = 2**31 - 1  # whole number: the largest size of a tensor


@functools.cache
def _annotations() -> dict[str, Any]:
    return get_type_hints(Config, include_extras=True)


def _check(name: str, value: Any, annotation: Any) -> None:
    """Raises UserError unless a field's value is one that its annotation allows."""
    allowed, near = get_args(annotation), ""
    if get_origin(annotation) is Literal:
        fits, rule, near = value in allowed, f"one of {', '.join(allowed)}", nearest(str(value), allowed)
    elif annotation is bool:
        fits, rule = isinstance(value, bool), "true or false"
    elif allowed[0] is str:
        fits, rule = value in allowed[1], str(allowed[1])
    elif allowed[0] is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        between = replace(allowed[1], high=min(allowed[1].high, _LARGEST))
        fits, rule = whole and value in between, f"a whole number of {between}"
    elif isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        fits, rule = False, "a finite number"
    else:
        fits, rule = value in allowed[1], str(allowed[1])
    if not fits:
        raise UserError(f"{name} must be {rule}; got {brief(value)}{near}")
