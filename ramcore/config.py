"""What one training run is made of: a frozen, validated dataclass.

A field's name is the name of the same thing everywhere: the key of the search space, the tracked parameter and the
column of the analysis' tables. A hyperparameter is added or changed here and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Data = Literal["mnist", "fashion-mnist", "digits"]
Task = Literal["original", "translated", "cluttered", "cluttered-100"]
Model = Literal["ram", "ram-random", "cnn", "conv", "fc"]
Core = Literal["rnn", "gru", "lstm"]
LocationInput = Literal["state", "state+paths"]

CANVAS_SIZE: dict[str, int] = {"original": 28, "translated": 60, "cluttered": 60, "cluttered-100": 100}
NUM_CLUTTER: dict[str, int] = {"original": 0, "translated": 0, "cluttered": 4, "cluttered-100": 8}
CLUTTER_SIZE = 8  # pixels; clutter is cut as 8x8 patches from other images (case study, section 3.1)
DIGIT_SIZE = 28  # pixels; every source is delivered at this size
NUM_CLASSES = 10
MAX_SCALES = 6


class ConfigError(Exception):
    """A setting breaks a rule; the message says rule, fact and fix in one line."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run, its seed excepted. The defaults are the papers' choices (Mnih et al. 2014; the case study)."""

    # What is learned.
    data: Data = "mnist"  # where the 28x28 images come from
    task: Task = "translated"  # how they are laid on the canvas
    placements: Literal["once", "every-epoch"] = "every-epoch"  # when training digits and clutter get a new place

    # The network.
    model: Model = "ram"  # ram-random: random glimpses; cnn: the case study's; conv, fc: Mnih et al.'s
    num_glimpses: int = 6  # glimpses before the decision, at least 1
    patch_size: int = 12  # pixels along a side of every scale of the retina
    num_scales: int = 3  # concentric patches, each scale_factor times as wide as the one before, 1 to 6
    scale_factor: int = 2  # width of a scale over the width of the one before, at least 2
    input_gain: float = 1.0  # what the network is given is the pixels, in [0, 1], times this
    glimpse_size: int = 128  # units of each of the glimpse network's what and where paths
    hidden_size: int = 256  # units of the core and of the glimpse code; of each hidden layer when model is fc
    core: Core = "rnn"  # rnn is the papers' rectified core
    location_input: LocationInput = "state"  # what the location network reads; state+paths: what and where paths too
    location_hidden: int = 0  # units of a rectified layer inside the location network; 0: none, as in the papers
    layer_norm: bool = False  # normalise the pre-activations of the glimpse code and of the core
    first_glimpse: Literal["random", "center"] = "random"  # where the first glimpse looks
    location_std: float = 0.17  # standard deviation of the location policy, half-canvas units
    location_std_end: float = 1.0  # share of location_std left at the end, where it falls to along half a cosine

    # The loss.
    loss_mixing: float = 1.0  # in [0, 1]; 1: cross-entropy trains the action network, 0: REINFORCE on a sampled class
    step_supervision: float = 0.0  # in [0, 1]; share of the classification loss spread over every step, not the last
    reward: Literal["accuracy", "probability"] = "accuracy"  # 0/1, or the probability given to the true class
    reward_steps: Literal["last", "every"] = "last"  # which glimpses earn a reward
    discount: float = 1.0  # in [0, 1]; a reward k glimpses later counts discount**k
    reinforce_weight: float = 1.0  # of the location policy's loss, against the classification loss
    reinforce_core: bool = False  # let the location policy's gradient train the core and the glimpse network too

    # The optimisation.
    epochs: int = 30  # passes over the training images
    batch_size: int = 100  # images a step
    learning_rate: float = 3e-4  # Adam's, at its highest
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: down to 0 over the epochs
    gradient_clip: float = 0.0  # largest norm of a replicate's gradient; 0: not clipped
    dropout: float = 0.5  # after the second convolution of the cnn

    # The evaluation.
    eval_samples: int = 0  # 0: follow the policy's mean; M: average the class probabilities of M sampled rollouts

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("layer_norm", "reinforce_core"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false; got {getattr(self, name)!r}")
        for name, low, high in _INTEGERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name} must be a whole number {_range(low, high)}; got {value!r}")
        for name, low, high, open_low in _REALS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{name} must be a finite number; got {value!r}")
            if value < low or value > high or (open_low and value == low):
                raise ConfigError(
                    f"{name} must be {_range(low, high, open_low=open_low).removeprefix('of ')}; got {value:g}"
                )
        if self.patch_size > self.canvas_size:
            raise ConfigError(
                f"patch_size must be at most {self.canvas_size}, the canvas of task {self.task}; got {self.patch_size}"
            )

    @property
    def canvas_size(self) -> int:
        """Pixels along a side of the square canvas."""
        return CANVAS_SIZE[self.task]

    @property
    def num_clutter(self) -> int:
        """Clutter patches on every image."""
        return NUM_CLUTTER[self.task]

    @property
    def is_recurrent(self) -> bool:
        """Whether the model takes glimpses (otherwise it sees the whole canvas at once)."""
        return self.model in ("ram", "ram-random")

    @property
    def glimpse_pixels(self) -> int:
        """Values in one glimpse: num_scales patches of patch_size by patch_size."""
        return self.num_scales * self.patch_size**2


def _range(low: float, high: float, *, open_low: bool = False) -> str:
    lower = f"above {low:g}" if open_low else f"of at least {low:g}"
    return lower if high >= _HUGE else f"{lower} and at most {high:g}"


_HUGE = 2**31 - 1
_CHOICES: dict[str, tuple[str, ...]] = {
    "data": get_args(Data),
    "task": get_args(Task),
    "placements": ("once", "every-epoch"),
    "model": get_args(Model),
    "core": get_args(Core),
    "location_input": get_args(LocationInput),
    "first_glimpse": ("random", "center"),
    "reward": ("accuracy", "probability"),
    "reward_steps": ("last", "every"),
    "schedule": ("constant", "cosine"),
}
_INTEGERS: tuple[tuple[str, int, int], ...] = (
    ("num_glimpses", 1, 100),
    ("patch_size", 1, _HUGE),
    ("num_scales", 1, MAX_SCALES),
    ("scale_factor", 2, 8),
    ("glimpse_size", 1, _HUGE),
    ("hidden_size", 1, _HUGE),
    ("location_hidden", 0, _HUGE),
    ("epochs", 1, _HUGE),
    ("batch_size", 1, _HUGE),
    ("eval_samples", 0, 10_000),
)
_REALS: tuple[tuple[str, float, float, bool], ...] = (
    ("input_gain", 0.0, math.inf, True),
    ("location_std", 0.0, math.inf, True),
    ("location_std_end", 0.0, 1.0, True),
    ("loss_mixing", 0.0, 1.0, False),
    ("step_supervision", 0.0, 1.0, False),
    ("discount", 0.0, 1.0, False),
    ("reinforce_weight", 0.0, math.inf, False),
    ("learning_rate", 0.0, math.inf, True),
    ("gradient_clip", 0.0, math.inf, False),
    ("dropout", 0.0, 0.95, False),
)
