"""The search space as the study saved it: bounds, scales, levels and rules, never guessed."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_LEVELS = 24  # a whole-number dimension with more values than this is treated as continuous


class SpaceError(ValueError):
    """The saved space cannot be used; the message says rule, fact and fix in one line."""


def words(name: str) -> str:
    """A parameter's name as a reader would say it: num_glimpses is "number of glimpses"."""
    return (
        name.replace("num_", "number of ", 1).replace("_", " ") if name.startswith("num_") else name.replace("_", " ")
    )


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One searched hyperparameter and its map to the unit interval.

    A float (or a whole number with many values) has coordinate (x - low) / (high - low), in logarithms where it was
    sampled in logarithms. A whole number with few values and a categorical keep their values: every level counts the
    same, as in the search.
    """

    name: str
    kind: str  # "int", "float" or "categorical"
    low: float = 0.0
    high: float = 1.0
    step: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    unit: str = ""
    reason: str = ""

    @property
    def levels(self) -> tuple[Any, ...]:
        """The values it can take, where they are few; empty for a continuous dimension."""
        if self.kind == "categorical":
            return self.choices
        if self.kind == "int":
            step = int(self.step or 1)
            values = tuple(range(round(self.low), round(self.high) + 1, step))
            return values if len(values) <= MAX_LEVELS else ()
        return ()

    @property
    def label(self) -> str:
        """The name in plain words, with its unit where it has one that the name does not say already."""
        plain = words(self.name)
        return f"{plain}, {self.unit}" if self.unit and self.unit not in plain else plain

    def to_unit(self, values: Sequence[Any] | pd.Series) -> Array:
        """Unit-interval coordinates of values; what cannot be read or is not a choice becomes NaN."""
        if self.kind == "categorical":
            texts = [str(choice) for choice in self.choices]
            last = max(len(texts) - 1, 1)
            return np.array([texts.index(str(v)) / last if str(v) in texts else math.nan for v in values])
        numbers = np.asarray(pd.to_numeric(pd.Series(list(values)), errors="coerce"), dtype=np.float64)
        if self.low == self.high:
            return np.where(np.isfinite(numbers), 0.0, math.nan)
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                return (np.log(numbers) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (numbers - self.low) / (self.high - self.low)

    def from_unit(self, unit: Array) -> list[Any]:
        """Values at unit-interval coordinates (levels are rounded to the nearest)."""
        if self.kind == "categorical":
            last = len(self.choices) - 1
            return [self.choices[min(max(round(float(u) * last), 0), last)] for u in unit]
        if self.log:
            numbers = np.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        else:
            numbers = self.low + unit * (self.high - self.low)
        if self.kind == "int":
            return [round(float(n)) for n in numbers]
        return [float(n) for n in numbers]

    def quantile(self, unit: Array) -> Array:
        """Map uniform numbers to coordinates distributed as the dimension is: levels equally often, else unchanged."""
        count = len(self.levels)
        if not count:
            return unit
        return np.minimum(np.floor(unit * count), count - 1) / max(count - 1, 1)

    def grid(self, size: int = 25) -> Array:
        """Coordinates to draw or to integrate a curve on: the levels, or evenly spaced points."""
        return np.linspace(0.0, 1.0, len(self.levels) or size)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A constraint of the space: an arithmetic comparison of dimension names."""

    rule: str
    reason: str = ""

    def holds(self, configuration: Mapping[str, Any]) -> bool:
        """Whether a configuration keeps the rule. Raises SpaceError if the rule is not plain arithmetic."""
        try:
            return bool(_evaluate(ast.parse(self.rule, mode="eval").body, configuration))
        except (SyntaxError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise SpaceError(f"a constraint must be plain arithmetic on dimension names; got {self.rule!r}") from error


@dataclass(frozen=True, kw_only=True)
class Space:
    """Everything a study varied, with the default it varied around and what it held fixed."""

    dimensions: tuple[Dimension, ...]
    rules: tuple[Rule, ...] = ()
    default: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 1
    seeds_per_trial: int = 1
    design: str = "search"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the dimensions, in the study's order."""
        return tuple(dimension.name for dimension in self.dimensions)

    def feasible(self, configuration: Mapping[str, Any]) -> bool:
        """Whether every rule holds."""
        return all(rule.holds({**self.fixed, **configuration}) for rule in self.rules)


def parse_space(raw: Mapping[str, Any]) -> Space:
    """Read the space a study saved. Raises SpaceError where a dimension or a constraint makes no sense."""
    try:
        dimensions = tuple(_parse_dimension(entry) for entry in raw["dimensions"])
        space = Space(
            dimensions=dimensions,
            rules=tuple(
                Rule(rule=str(r["rule"]), reason=str(r.get("reason") or "")) for r in raw.get("constraints") or ()
            ),
            default=dict(raw.get("default") or {}),
            fixed=dict(raw.get("fixed") or {}),
            epochs=int(raw.get("epochs") or 1),
            seeds_per_trial=int(raw.get("seeds_per_trial") or 1),
            design=str(raw.get("design") or "search"),
        )
        middle = {d.name: d.from_unit(np.array([0.5]))[0] for d in dimensions}
        space.feasible({**middle, **space.default})  # a rule that cannot be understood is told now
        return space
    except SpaceError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise SpaceError(
            f"space.json must list its dimensions with name, type and bounds; {error!r} is amiss"
        ) from error


def _parse_dimension(entry: Mapping[str, Any]) -> Dimension:
    kind, name = str(entry["type"]), str(entry["name"])
    common: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "unit": str(entry.get("unit") or ""),
        "reason": str(entry.get("reason") or ""),
    }
    if kind == "categorical":
        return Dimension(**common, choices=tuple(entry["choices"]))
    if kind not in ("int", "float"):
        raise SpaceError(f"a dimension's type must be int, float or categorical; {name} has {kind!r}")
    low, high, log = float(entry["low"]), float(entry["high"]), bool(entry.get("log"))
    if not (math.isfinite(low) and math.isfinite(high)) or low > high or (log and low <= 0):
        raise SpaceError(f"a dimension needs finite low <= high, and low > 0 in log; {name} has {low:g} and {high:g}")
    step = entry.get("step")
    return Dimension(**common, low=low, high=high, step=float(step) if step else None, log=log)


_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.Mod: operator.mod,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def _evaluate(node: ast.AST, names: Mapping[str, Any]) -> Any:
    # A rule comes from a stored file: only arithmetic, comparisons and and/or are understood, nothing is executed.
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise SpaceError(f"a constraint may only name dimensions and fixed fields; got {node.id!r}")
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left, names), _evaluate(node.right, names))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, names)
    if isinstance(node, ast.BoolOp):
        values = [bool(_evaluate(value, names)) for value in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.Compare) and all(type(op) in _OPERATORS for op in node.ops):
        sides = [_evaluate(side, names) for side in (node.left, *node.comparators)]
        return all(_OPERATORS[type(op)](a, b) for op, a, b in zip(node.ops, sides[:-1], sides[1:], strict=True))
    raise SpaceError(f"a constraint must be plain arithmetic on dimension names; got {ast.dump(node)[:60]}")
