"""The search space as the command line asks for it: --space, --range, --choices and --set; and as --print-space writes
it. Plain data.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramcore.config import Config, kind, nearest, read_value
from ramcore.errors import UserError, brief, first_line
from ramcore.space import MAX_CHOICES, Dimension, Space, Values
from study.search_space import OF_THE_STUDY

_KEYS = ("low", "high", "step", "log", "choices", "unit", "reason")  # of a dimension's table
_LONGEST = 1000  # characters of a unit or a reason


@dataclass(frozen=True, kw_only=True)
class SpaceFlags:
    """What the command line asks of the space, as text."""

    file: Path | None = None  # TOML: a table for each dimension; a plain value fixes a field
    ranges: tuple[str, ...] = ()  # NAME=LOW:HIGH, then :log or :STEP
    choices: tuple[str, ...] = ()  # NAME=VALUE,VALUE,...
    fixed: tuple[str, ...] = ()  # NAME=VALUE

    def __bool__(self) -> bool:
        return bool(self.file or self.ranges or self.choices or self.fixed)


def asked_space(space: Space, flags: SpaceFlags) -> Space:
    """A space as the flags change it. Raises UserError for what cannot be searched.

    A file replaces all dimensions; a range or choices replace or add one; a fixed field is searched no more.
    """
    if not flags:
        return space
    entries = {} if flags.file is None else _read_file(flags.file)
    changes: Values = {}  # by field: a dimension's table, or the value it is fixed to
    for flag, texts, read in (
        ("--range", flags.ranges, _range),
        ("--choices", flags.choices, lambda text: {"choices": text.split(",")}),
        ("--set", flags.fixed, str),
    ):
        for name, text in _named(flag, texts):
            if name in changes:
                raise UserError(f"a field has one range, one list of choices or one value; {name} has two: keep one")
            changes[name] = read(text)
    known = {d.name: d for d in space.dimensions}
    dimensions, values = known if flags.file is None else {}, {**space.fixed, **space.default}
    for name, entry in (entries | changes).items():
        dimensions = {n: d for n, d in dimensions.items() if n != name or isinstance(entry, dict)}
        if isinstance(entry, dict):
            where = "the command line" if name in changes else str(flags.file)
            dimensions |= {name: _dimension(name, entry, where, known.get(name))}
        else:
            values[name] = read_value(_searchable(name), entry)
    return dataclasses.replace(
        space,
        dimensions=tuple(dimensions.values()),
        default={name: values[name] for name in dimensions},
        fixed={name: value for name, value in values.items() if name not in dimensions},
    )


def asked_points(space: Space, texts: Iterable[str]) -> list[tuple[str, Values]]:
    """(text, values) of the points that --try asks for: NAME=VALUE,NAME=VALUE; the default's values for the rest.

    Raises UserError for a point that is none of the space.
    """
    points: list[tuple[str, Values]] = []
    for text in texts:
        values: Values = {}
        for name, value in _named("--try", text.split(",")):
            if name in values:
                raise UserError(f"--try says a value once; {name} has {values[name]} and {value}: keep one")
            values[name] = read_value(_searchable(name), value)
        for name, value in values.items():
            if name not in space.names:
                rule = f"--try says values of searched fields, {', '.join(space.names)}"
                raise UserError(f"{rule}; {name} is fixed to {space.fixed[name]}: search it, or leave it out")
            if not (own := next(d for d in space.dimensions if d.name == name)).contains(value):
                raise UserError(f"--try must lie in the space; {name}={value} is not of {own.extent}: widen it")
        values = {**space.default, **values}
        outside = [f"{d.name}={values[d.name]}" for d in space.dimensions if not d.contains(values[d.name])]
        if outside:
            raise UserError(
                f"--try takes the default where it says nothing; the default's {', '.join(outside)} lies outside the "
                f"space: say that too, as in --try {text},{outside[0].split('=')[0]}=..."
            )
        if not space.feasible(values):
            raise UserError(f"--try must obey {space.rule}; {text} does not: lower one of these")
        points.append((text, values))
    return points


def space_toml(space: Space, base: Config) -> str:
    """The space as --space reads it. Fields that are fixed otherwise than in the base come first."""
    own = {n: v for n, v in space.fixed.items() if n not in OF_THE_STUDY and v != getattr(base, n)}
    rest = {n: v for n, v in space.fixed.items() if n not in OF_THE_STUDY and n not in own}
    lines = [
        "# A table for each field that is searched: low, high, and step or log; or choices. NAME = VALUE fixes one."
    ]
    fixed = f"Fixed: {', '.join(f'{name}={value}' for name, value in rest.items())}"
    lines += textwrap.wrap(fixed, width=110, initial_indent="# ", subsequent_indent="# ")
    lines += [f"{name} = {json.dumps(value)}" for name, value in own.items()]
    for d in space.dimensions:
        number = int if d.type == "int" else float
        keys = (
            {"choices": list(d.choices)} if d.type == "categorical" else {"low": number(d.low), "high": number(d.high)}
        )
        keys |= {"step": d.step} if d.step and d.step > 1 else {}
        keys |= {"log": True} if d.log else {}
        notes = [f"# {note}" for note in (d.reason, d.unit and f"unit: {d.unit}") if note]
        lines += ["", *notes, f"[{d.name}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    return "\n".join(lines)


def _named(flag: str, texts: Iterable[str]) -> list[tuple[str, str]]:
    """(field, what stands behind its "=") of each text. Raises UserError."""
    found: list[tuple[str, str]] = []
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if not name or not value:
            raise UserError(f"{flag} must be NAME=..., with a field of Config; got {brief(text)}: see --help")
        found.append((name.replace("-", "_"), value))
    return found


def _range(text: str) -> Values:
    """The table of LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP. Raises UserError."""
    low, high, more = [*text.split(":", 2), "", ""][:3]
    if not low or not high or not re.fullmatch("(log|[0-9]{1,9})?", more):
        rule = "a range must be LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP, with a STEP of at most 9 digits"
        raise UserError(f"{rule}; got {brief(text)}: write 1:3, say")
    table: Values = {"low": low, "high": high}
    return table | ({"log": True} if more == "log" else {"step": int(more)} if more else {})


def _searchable(name: str) -> str:
    """The name. Raises UserError unless it is a field that a study may search or fix."""
    kind(name)
    if name in OF_THE_STUDY:
        raise UserError(
            f"{name} is the same in all trials of a study; it cannot be searched: pass {OF_THE_STUDY[name]}"
        )
    return name


def _dimension(name: str, table: Mapping[str, Any], where: str, known: Dimension | None) -> Dimension:
    """A dimension from its table. `known` is the one that it replaces. Raises UserError."""
    wanted = kind(_searchable(name))
    if unknown := next((key for key in table if key not in _KEYS), None):
        raise UserError(f"{name} may have {', '.join(_KEYS)}; got {unknown}{nearest(unknown, _KEYS)}")
    for key in ("unit", "reason"):
        if not isinstance(text := table.get(key, ""), str) or len(text) > _LONGEST:
            raise UserError(
                f"{key} must be text of at most {_LONGEST} characters; {name} has {brief(text)}: shorten it"
            )
    unit = _one_line(table.get("unit") or (known.unit if known else ""))
    reason = _one_line(table.get("reason") or f"from {where}")
    if "choices" in table:
        choices = table["choices"] if isinstance(table["choices"], list) else []
        values = tuple(read_value(name, choice.strip() if isinstance(choice, str) else choice) for choice in choices)
        if "low" in table or "high" in table or not 2 <= len(set(values)) == len(values) <= MAX_CHOICES:
            rule = f"choices must be 2 to {MAX_CHOICES} different values, without a range"
            has = brief(", ".join(map(str, values))).strip("'") or "no list of them"
            fix = "say each once" if len(set(values)) > 1 else f"one value is --set {name}=VALUE"
            fix = "keep one of the two" if "low" in table or "high" in table else fix
            fix = f"leave out {len(values) - MAX_CHOICES}" if len(values) > MAX_CHOICES else fix
            raise UserError(f"{rule}; {name} has {has}: {fix}")
        return Dimension(name=name, type="categorical", choices=values, unit=unit, reason=reason)
    if wanted not in (int, float):
        raise UserError(f"a range is of numbers; {name} is none: pass --choices {name}=VALUE,VALUE")
    if missing := [key for key in ("low", "high") if key not in table]:
        raise UserError(f"a dimension needs low and high, or choices; {name} lacks {' and '.join(missing)}: add them")
    low, high = (wanted(read_value(name, table[key])) for key in ("low", "high"))
    if low >= high:
        fix = f"one value is --set {name}={low}" if low == high else "swap them"
        raise UserError(f"a range needs low < high; {name} has {low} and {high}: {fix}")
    log, step = table.get("log", False), table.get("step")
    if not isinstance(log, bool):
        raise UserError(f"log must be true or false; {name} has {brief(log)}: write log = true")
    whole = isinstance(step, int) and not isinstance(step, bool)
    if step is not None and (wanted is float or not whole or step < 1):
        rule = "a step must be a whole number of at least 1, between whole numbers"
        raise UserError(f"{rule}; {name} has {brief(step)}: leave it out, or list the values with --choices")
    if step is not None and step > high - low:
        raise UserError(f"a step must leave two values; {name} has step {brief(step)} from {low} to {high}: lower it")
    type_ = "int" if wanted is int else "float"
    return Dimension(name=name, type=type_, low=low, high=high, log=log, step=step, unit=unit, reason=reason)


def _one_line(text: str) -> str:
    return " ".join(text.split())  # a comment in what --print-space writes


def _read_file(path: Path) -> Values:
    """The entries of a file by field. Raises UserError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"--space must be a TOML file; {path}: {reason}: --print-space writes one") from error
