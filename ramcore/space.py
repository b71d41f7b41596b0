"""A search space as plain data: dimensions, their map to the unit interval, and the rule that holds between them.

The study, Optuna, `space.json` and the analysis all use the code below, so they agree on every value.

Unit coordinate of a value: (x - low) / (high - low), in logarithms where `log` is set, so 0 is `low` and 1 is `high`.
A categorical value has the coordinate of its position among the choices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ramcore.errors import UserError

Array = NDArray[np.float64]
Values = dict[str, Any]  # dimension name -> value

MAX_CHOICES = 12  # of a categorical dimension: the analysis tells no more apart
MAX_LEVELS = 24  # a whole-number dimension with more values than this is treated as continuous
RULE_REASON = "a coarsest scale wider than twice the canvas sees all of it from anywhere"
_RULED = ("num_scales", "patch_size", "scale_factor")  # the fields that the rule is about
_WIDEST = re.compile(r"patch_size \* scale_factor\*\*\(num_scales - 1\) <= (\d+)")


def words(name: str) -> str:
    """A field's name in plain words: num_glimpses is "number of glimpses"."""
    return re.sub(r"^num_", "number of ", name).replace("_", " ")


def shown(value: object, digits: int = 3) -> str:
    """A value for people: a float with this many significant digits, anything else as it is."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One searched field of `Config`. Numeric dimensions have bounds, both included; categorical ones have choices.

    Raises UserError for a dimension that has no value or mixes these up.
    """

    name: str
    type: Literal["int", "float", "categorical"]
    low: float = 0.0
    high: float = 1.0
    step: int | None = None  # between two whole numbers; 1 if left out
    log: bool = False  # sampled evenly in logarithms
    choices: tuple[Any, ...] = ()
    unit: str = ""
    reason: str = ""  # why this range

    def __post_init__(self) -> None:
        name, low, high, step = self.name, self.low, self.high, self.step
        if self.type not in ("int", "float", "categorical"):
            raise UserError(f"a dimension's type must be int, float or categorical; {name} has {self.type!r}")
        if self.type == "categorical":
            if not self.choices:
                raise UserError(f"a categorical dimension needs choices; {name} has none")
            return
        if not -math.inf < low <= high < math.inf:
            raise UserError(f"a dimension needs finite low <= high; {name} has {low:g} and {high:g}")
        if self.log and low <= 0:
            raise UserError(f"a dimension in logarithms needs low > 0; {name} has {low:g}")
        if self.type == "int" and (low % 1 or high % 1):
            raise UserError(f"a whole-number dimension needs whole bounds; {name} has {low} and {high}")
        if step is not None and (self.type == "float" or step < 1 or (self.log and step > 1)):
            raise UserError(f"only a whole-number dimension without log can have a step, of at least 1; see {name}")

    @property
    def top(self) -> float:
        """The largest value: `high`, or the last whole number that steps from `low` reach."""
        return self.high - (self.high - self.low) % (self.step or 1) if self.type == "int" else self.high

    @property
    def count(self) -> int | None:
        """How many values it has; None for a real one."""
        if self.type == "categorical":
            return len(self.choices)
        return int(self.top - self.low) // (self.step or 1) + 1 if self.type == "int" else None

    @property
    def levels(self) -> tuple[Any, ...]:
        """The values it can take, where there are at most MAX_LEVELS of them; else none."""
        if self.type == "categorical":
            return self.choices
        if self.count is None or self.count > MAX_LEVELS:
            return ()
        return tuple(range(int(self.low), int(self.top) + 1, self.step or 1))

    @property
    def level_weights(self) -> Array:
        """How often `sample` gives each level: equally, or in proportion to its share of the logarithmic range."""
        if self.log:
            edges = np.log(np.arange(self.low - 0.5, self.top + 1))
            return np.diff(edges) / (edges[-1] - edges[0])
        return np.full(len(self.levels), 1 / max(len(self.levels), 1))

    @property
    def label(self) -> str:
        """The name in plain words, with its unit where it has one that the name does not say already."""
        plain = words(self.name)
        return f"{plain}, {self.unit}" if self.unit and self.unit not in plain else plain

    def to_unit(self, values: Sequence[Any]) -> Array:
        """Unit coordinates of values, (N,); NaN for a value that is no number or no choice."""
        if self.type == "categorical":
            texts = [str(choice) for choice in self.choices]
            last = max(len(texts) - 1, 1)
            return np.array([texts.index(str(v)) / last if str(v) in texts else math.nan for v in values])
        numbers = np.array([_number(v) for v in values], dtype=np.float64)
        if self.low == self.top or (self.log and math.log(self.low) == math.log(self.top)):
            return np.where(np.isfinite(numbers), 0.0, math.nan)
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                return (np.log(numbers) - math.log(self.low)) / (math.log(self.top) - math.log(self.low))
        return (numbers - self.low) / (self.top - self.low)

    def from_unit(self, unit: Sequence[float] | Array) -> list[Any]:
        """The nearest values to unit coordinates (N,): the inverse of `to_unit`."""
        return [self._nearest(float(u)) for u in unit]

    def _nearest(self, u: float) -> Any:
        if self.type == "categorical":
            last = len(self.choices) - 1
            return self.choices[min(max(round(u * last), 0), last)]
        low, top = (math.log(self.low), math.log(self.top)) if self.log else (self.low, self.top)
        number = low + u * (top - low)
        number = min(max(math.exp(number) if self.log else number, self.low), self.top)
        if self.type == "float":
            return number
        step = self.step or 1
        return int(self.low) + step * round((number - self.low) / step)

    def sample(self, u: float) -> Any:
        """The value that a uniform number u in [0, 1) draws. Every value of an int or a categorical has a cell."""
        if self.type == "float":
            return self._nearest(u)
        assert self.count is not None
        if self.log:
            low, high = math.log(self.low - 0.5), math.log(self.top + 0.5)
            return min(max(round(math.exp(low + u * (high - low))), int(self.low)), int(self.top))
        index = min(int(u * self.count), self.count - 1)
        return self.choices[index] if self.type == "categorical" else int(self.low) + (self.step or 1) * index

    def quantile(self, u: Array) -> Array:
        """Unit coordinates of what uniform numbers (N,) draw where there are levels; else the numbers themselves."""
        count = len(self.levels)
        if not count:
            return u
        if self.log:
            return self.to_unit([self.sample(float(v)) for v in u])
        return np.minimum(np.floor(u * count), count - 1) / max(count - 1, 1)

    def grid(self, size: int = 25) -> Array:
        """Unit coordinates to draw a curve on: those of the levels, or `size` evenly spaced ones."""
        levels = self.levels
        return self.to_unit(levels) if self.log and levels else np.linspace(0.0, 1.0, len(levels) or size)

    @property
    def extent(self) -> str:
        """What it may be, for people: "1 to 4", "4 to 20, step 4", "0.0001 to 0.01, in logarithms", "rnn, gru"."""
        if self.type == "categorical":
            return ", ".join(map(shown, self.choices))
        step = f", step {self.step}" if self.step and self.step > 1 else ""
        return f"{self.low:g} to {self.high:g}{step}{', in logarithms' if self.log else ''}"

    def below(self, value: Any) -> Any:
        """The next smaller value; None if there is none. Only of whole numbers, as a range or as choices."""
        if self.type == "categorical":
            return max((choice for choice in self.choices if choice < value), default=None)
        return value - (self.step or 1) if value > self.low else None

    def contains(self, value: Any) -> bool:
        """Whether the value is one that this dimension can take."""
        if self.type == "categorical":
            return value in self.choices
        number = _number(value)
        on_step = self.type == "float" or (number - self.low) % (self.step or 1) == 0
        return self.low <= number <= self.top and on_step


@dataclass(frozen=True, kw_only=True)
class Space:
    """The dimensions that are searched, their defaults, the fixed value of every other field, and one rule.

    Raises UserError if a field is searched twice.
    """

    dimensions: tuple[Dimension, ...]
    default: Mapping[str, Any] = field(default_factory=dict)  # of the dimensions
    fixed: Mapping[str, Any] = field(default_factory=dict)  # of the other fields
    widest_scale: int | None = None  # pixels along a side that the coarsest scale of a glimpse may cover; None: any

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise UserError(f"a field can be searched once; the dimensions are {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The searched fields, in the order of the dimensions."""
        return tuple(d.name for d in self.dimensions)

    @property
    def rule(self) -> str | None:
        """The rule between dimensions, for people and for `space.json`; None if it is about none of them."""
        widest = self.widest_scale if set(_RULED) & set(self.names) else None
        return None if widest is None else f"patch_size * scale_factor**(num_scales - 1) <= {widest}"

    def feasible(self, values: Mapping[str, Any]) -> bool:
        """Whether the rule holds: a scale that covers more than `widest_scale` only adds cost and blur."""
        known = {**self.fixed, **self.default, **values}
        if self.rule is None or self.widest_scale is None or not set(_RULED) <= set(known):
            return True
        return known["patch_size"] * known["scale_factor"] ** (known["num_scales"] - 1) <= self.widest_scale

    def clamped(self, values: Values) -> Values:
        """The nearest feasible values: first the number of scales, then the sizes are lowered until the rule holds."""
        values, dimensions = dict(values), {d.name: d for d in self.dimensions}
        for name in (name for name in _RULED if name in dimensions):
            while not self.feasible(values) and (lower := dimensions[name].below(values[name])) is not None:
                values[name] = lower
        return values

    def contains(self, values: Mapping[str, Any]) -> bool:
        """Whether every value is in its range and the rule holds."""
        return all(d.contains(values[d.name]) for d in self.dimensions) and self.feasible(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the record and `space.json` keep it."""
        no_bounds = {"low": None, "high": None}
        return {
            "schema": 1,
            "dimensions": [
                asdict(d) | {"choices": list(d.choices) or None} | (no_bounds if d.type == "categorical" else {})
                for d in self.dimensions
            ],
            "constraints": [{"rule": self.rule, "reason": RULE_REASON}] if self.rule else [],
            "default": dict(self.default),
            "fixed": dict(self.fixed),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Space:
        """The inverse of `to_dict`. Raises UserError where a dimension or the rule makes no sense."""
        try:
            widest = [_read_rule(str(constraint["rule"])) for constraint in data.get("constraints") or ()]
            return Space(
                dimensions=tuple(_read_dimension(entry) for entry in data["dimensions"]),
                default=dict(data.get("default") or {}),
                fixed=dict(data.get("fixed") or {}),
                widest_scale=min(widest, default=None),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"space.json must list dimensions with name, type and bounds; {error!r}") from error


def _read_rule(rule: str) -> int:
    if match := _WIDEST.fullmatch(rule):
        return int(match[1])
    raise UserError(f"space.json may hold the rule of the widest scale only; got {rule!r}")


def _read_dimension(entry: Mapping[str, Any]) -> Dimension:
    given: dict[str, Any] = {name: entry[name] for name in ("unit", "reason", "log") if entry.get(name)}
    if entry["type"] == "categorical":
        given["choices"] = tuple(entry["choices"])
    else:
        given |= {"low": float(entry["low"]), "high": float(entry["high"])}
        given |= {"step": int(entry["step"])} if entry.get("step") else {}
    return Dimension(name=str(entry["name"]), type=entry["type"], **given)


def _number(value: Any) -> float:
    """A number as it is or as text; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
