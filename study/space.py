"""The search space: plain data, with a reason at each range.

What is here is saved with every study (`Space.describe`), so that the analysis never guesses a bound or a scale.
Unit-cube coordinate of a value: (x - low) / (high - low), in logarithms where `log` is set. A whole-number dimension is
sampled in equal cells, one a value.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import qmc

from ramcore.config import CANVAS_SIZE, Config

Values = dict[str, Any]  # dimension name -> value
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One searched field of `Config`: numeric with bounds (both included), or categorical with choices."""

    name: str
    type: Literal["int", "float", "categorical"]
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    choices: tuple[Any, ...] | None = None
    unit: str
    reason: str

    def distribution(self) -> BaseDistribution:
        """The same range in Optuna's words."""
        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        assert self.low is not None and self.high is not None
        if self.type == "int":
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log)

    def from_unit(self, u: float) -> Any:
        """The value at coordinate u in [0, 1)."""
        if self.choices is not None:
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        assert self.low is not None and self.high is not None
        if self.type == "int":
            step = int(self.step or 1)
            cells = int(self.high - self.low) // step + 1
            return int(self.low) + step * min(int(u * cells), cells - 1)
        if self.log:
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + u * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def contains(self, value: Any) -> bool:
        """Whether the value is one this dimension can take."""
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None and self.high is not None
        return self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True)
class Space:
    """The dimensions that are searched, the one constraint between them, and the values of every other field."""

    dimensions: tuple[Dimension, ...]
    base: Config  # the default of every dimension and the fixed value of every other field

    @property
    def names(self) -> tuple[str, ...]:
        """The searched fields, in the order of the dimensions."""
        return tuple(d.name for d in self.dimensions)

    @property
    def widest(self) -> int:
        """Pixels along a side that the coarsest scale may cover: a square that wide sees the whole canvas from
        anywhere.
        """
        return 2 * self.base.canvas_size

    @property
    def default(self) -> Values:
        """The base's values of the searched fields."""
        return {name: getattr(self.base, name) for name in self.names}

    def feasible(self, values: Values) -> bool:
        """Whether the constraint holds: a scale that sees more than everything only adds cost and blur."""
        return values["patch_size"] * self.base.scale_factor ** (values["num_scales"] - 1) <= self.widest

    def clamped(self, values: Values) -> Values:
        """The nearest feasible values: scales are taken away until the coarsest one makes sense."""
        values = dict(values)
        while not self.feasible(values) and values["num_scales"] > 1:
            values["num_scales"] -= 1
        return values

    def contains(self, values: Values) -> bool:
        """Whether every value is in range and the constraint holds."""
        return all(d.contains(values[d.name]) for d in self.dimensions) and self.feasible(values)

    def config(self, values: Values) -> Config:
        """The whole configuration of a point."""
        return dataclasses.replace(self.base, **values)

    def distributions(self) -> dict[str, BaseDistribution]:
        """The space in Optuna's words."""
        return {d.name: d.distribution() for d in self.dimensions}

    def sobol(self, index: int, seed: int) -> Values:
        """The index-th feasible point (from 0) of a scrambled Sobol sequence; the same for the same seed, always."""
        count = 64
        while len(points := _sobol_points(self, seed, count)) <= index:
            count *= 2
        return dict(points[index])

    def describe(self, **settings: Any) -> dict[str, Any]:
        """The space and the settings given, as saved in the record and as `space.json`."""
        fixed = {k: v for k, v in dataclasses.asdict(self.base).items() if k not in self.names}
        return {
            "schema": SCHEMA,
            **settings,
            "dimensions": [dataclasses.asdict(d) for d in self.dimensions],
            "constraints": [
                {
                    "rule": f"patch_size * scale_factor**(num_scales - 1) <= {self.widest}",
                    "reason": "a coarsest scale wider than twice the canvas sees all of it from anywhere",
                }
            ],
            "default": self.default,
            "fixed": fixed,
        }


def search_space(base: Config) -> Space:
    """The space of `--design search` for the task and data of a base configuration."""
    canvas = CANVAS_SIZE[base.task]
    return Space(
        base=base,
        dimensions=(
            Dimension(
                name="num_glimpses",
                type="int",
                low=2,
                high=8,
                step=1,
                unit="glimpses",
                reason="published: 2 to 8; with one glimpse there is nothing to decide",
            ),
            Dimension(
                name="patch_size",
                type="int",
                low=4,
                high=20 if canvas >= 60 else canvas // 2,
                step=1,
                unit="pixels",
                reason="published: 8 to 20; below 4 a stroke is lost, above half the canvas nothing is hidden",
            ),
            Dimension(
                name="num_scales",
                type="int",
                low=1,
                high=4,
                step=1,
                unit="scales",
                reason="published: 1 to 4",
            ),
            Dimension(
                name="location_std",
                type="float",
                low=0.03,
                high=0.5,
                log=True,
                unit="half-canvas units",
                reason="below 0.03 (1 pixel of 60) nothing is explored, above 0.5 the policy's mean hardly matters",
            ),
            Dimension(
                name="learning_rate",
                type="float",
                low=1e-4,
                high=1e-2,
                log=True,
                unit="per step (Adam)",
                reason="the published 3e-4 lies inside; above 1e-2 Adam diverges on these networks",
            ),
            Dimension(
                name="reinforce_weight",
                type="float",
                low=0.01,
                high=10.0,
                log=True,
                unit="ratio",
                reason="the published 1 in the middle, from hardly any policy learning to policy first",
            ),
            Dimension(
                name="loss_mixing",
                type="float",
                low=0.0,
                high=1.0,
                unit="share",
                reason="from REINFORCE alone to cross-entropy alone: the case study asks which is better",
            ),
            Dimension(
                name="step_supervision",
                type="float",
                low=0.0,
                high=1.0,
                unit="share",
                reason="from the last step alone to every step alike: the case study's 'alternative choice'",
            ),
        ),
    )


@functools.lru_cache(maxsize=8)
def _sobol_points(space: Space, seed: int, count: int) -> list[Values]:
    """The feasible ones among the first `count` points (a longer list begins with the shorter one)."""
    cube = qmc.Sobol(len(space.dimensions), scramble=True, rng=np.random.default_rng(seed)).random_base2(
        int(math.log2(count))
    )
    points = [{d.name: d.from_unit(float(u)) for d, u in zip(space.dimensions, row, strict=True)} for row in cube]
    return [point for point in points if space.feasible(point)]
