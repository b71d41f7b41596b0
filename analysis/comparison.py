"""Studies side by side: the effects on what their spaces share, their best configurations, what differs in settings.

A parameter that all studies vary is compared over the range that all of them search. One that only some vary is held,
in those, at the value that it has in the others. Effects are then of the same question, asked of each study's own fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.curves import QUANTILES, supported
from analysis.effects import CUBE_POINTS, GRID, contrast, space_points
from analysis.figures import Trial
from analysis.importance import Fit
from analysis.load import StudyData
from analysis.results import DUMMY, Analysis, Curve, Interval, interval
from ramcore.config import Config
from ramcore.space import Array, Dimension, shown, words

CONFIG = [f.name for f in fields(Config)]
NEAR = 0.1  # of the shared range: values of best configurations that are no farther apart are alike
BEST = 5  # best trials of a study that are shown
SETTINGS = ("design", "task", "data", "digest", "epochs", "seeds_per_trial", "seed", "sobol_share", "trials", "commit")


class Side(NamedTuple):
    """One of the studies."""

    records: StudyData
    tracked: list[Trial]
    fit: Fit | None  # None: it has no effects
    analysis: Analysis | None
    problem: str = ""  # why it has none

    @property
    def name(self) -> str:
        """The study's name."""
        return self.records.study.name


class Shared(NamedTuple):
    """What the spaces of studies share."""

    dimensions: tuple[Dimension, ...]  # varied by all, over the range that all search
    held: dict[str, Any]  # varied by some, held there at what the others have
    apart: dict[str, str]  # varied, and compared nowhere: why


class Difference(NamedTuple):
    """One parameter's effect in two studies."""

    parameter: str
    first: str
    second: str
    difference: Interval  # points: the second's effect less the first's
    larger: float  # probability that the second's is larger
    differs: float  # probability that they differ by more than one standard deviation between seeds


class Effects(NamedTuple):
    """The effects of the shared parameters."""

    shared: Shared
    effects: dict[str, dict[str, Interval]]  # parameter -> study -> points
    curves: dict[str, dict[str, Curve]]  # likewise: mean accuracy over the shared range
    differences: list[Difference]


# ---- what is shared ------------------------------------------------------------------------------------------


def shared_space(sides: Sequence[Side]) -> Shared:
    """What fitted studies share."""
    varied = [{d.name: d for d in side.fit.selection.data.dimensions[:-1]} for side in sides if side.fit]
    constants = [_constants(side) for side in sides if side.fit]
    dimensions: list[Dimension] = []
    held: dict[str, Any] = {}
    apart: dict[str, str] = {}
    for name in sorted({name for own in varied for name in own}):
        found = [own[name] for own in varied if name in own]
        fixed = [known[name] for known, own in zip(constants, varied, strict=True) if name not in own and name in known]
        if len(found) + len(fixed) < len(varied):
            apart[name] = "not every study records it"
        elif fixed:
            if len(set(fixed)) == 1 and all(d.contains(fixed[0]) for d in found):
                held[name] = fixed[0]
            else:
                apart[name] = "the fixed value of one study lies outside what another searches"
        elif (common := intersect(found)) is None:
            apart[name] = "the ranges do not meet"
        elif common.count == 1 or (common.type != "categorical" and common.low == common.top):
            held[name] = common.from_unit([0.0])[0]
        else:
            dimensions.append(common)
    return Shared(tuple(dimensions), held, apart)


def intersect(dimensions: Sequence[Dimension]) -> Dimension | None:
    """The values that all of these dimensions of one name have; None if there are none."""
    first, *others = dimensions
    if any((d.type == "categorical") != (first.type == "categorical") for d in others):
        return None
    if first.type == "categorical":
        choices = tuple(c for c in first.choices if all(d.contains(c) for d in others))
        return replace(first, choices=choices) if choices else None
    low, high = max(d.low for d in dimensions), min(d.top for d in dimensions)
    if low > high:
        return None
    if all(d.type == "float" for d in dimensions):
        return replace(first, low=low, high=high)
    values = [v for v in range(int(np.ceil(low)), int(high) + 1) if all(d.contains(v) for d in dimensions)]
    steps = set(np.diff(values).tolist())
    if not values or len(steps) > 1:
        return None
    step = None if first.log else next(iter(steps), None)
    whole = next(d for d in dimensions if d.type == "int")
    return replace(whole, low=float(values[0]), high=float(values[-1]), step=step)


def _fields(side: Side) -> list[str]:
    """The fields of a configuration that a study records."""
    searched = side.records.space.names if side.records.space else ()
    return [name for name in (*CONFIG, *(n for n in searched if n not in CONFIG)) if name in side.records.trials]


def _constants(side: Side) -> dict[str, Any]:
    """The fields that have one value in all trials of a study."""
    trials = side.records.trials
    return {name: trials[name].iloc[0] for name in _fields(side) if len(set(trials[name])) == 1}


# ---- effects -------------------------------------------------------------------------------------------------


def compare_effects(sides: Sequence[Side], seed: int = 0) -> Effects:
    """Effects of the shared parameters over the shared ranges, from each study's own fit."""
    shared, fitted = shared_space(sides), [side for side in sides if side.fit]
    uniform = space_points(shared.dimensions, CUBE_POINTS // 2, seed) if shared.dimensions else np.zeros((1, 0))
    points = {side.name: _points(side.fit, shared, uniform, seed) for side in fitted if side.fit}
    effects: dict[str, dict[str, Interval]] = {}
    curves: dict[str, dict[str, Curve]] = {}
    differences: list[Difference] = []
    for dimension in shared.dimensions:
        grid = dimension.grid(GRID)
        values = dimension.from_unit(grid)
        known = np.logical_and.reduce([_supported(side.fit, dimension.name, values) for side in fitted if side.fit])
        rows = {side.name: _rows(side.fit, dimension.name, values, points[side.name]) for side in fitted if side.fit}
        draws = {name: contrast(row, known) for name, row in rows.items()}
        effects[dimension.name] = {name: interval(drawn) for name, drawn in draws.items()}
        bands = {name: np.quantile(row, QUANTILES, axis=1) for name, row in rows.items()}
        curves[dimension.name] = {
            name: Curve(values, band[0], band[1], band[2], ~known) for name, band in bands.items()
        }
        for one, two in combinations(fitted, 2):
            assert one.analysis and two.analysis
            noise = max(one.analysis.trust.seed_sd.mid, two.analysis.trust.seed_sd.mid)
            difference = np.subtract.outer(draws[two.name], draws[one.name]).ravel()  # independent fits: any two draws
            differences.append(
                Difference(
                    dimension.name, one.name, two.name, interval(difference),
                    float((difference > 0).mean()), float((np.abs(difference) > noise).mean()),
                )
            )  # fmt: skip
    return Effects(shared, effects, curves, differences)


def _points(fit: Fit, shared: Shared, uniform: Array, seed: int) -> Array:
    """The shared points in a study's own unit coordinates (N, D); the rest of its space is averaged over."""
    dimensions = fit.selection.data.dimensions
    points = space_points(dimensions, len(uniform), seed + 1)
    common = {d.name: uniform[:, k] for k, d in enumerate(shared.dimensions)}
    by_name = {d.name: d for d in shared.dimensions}
    for i, dimension in enumerate(dimensions):
        if dimension.name in common:
            points[:, i] = dimension.to_unit(by_name[dimension.name].from_unit(common[dimension.name]))
        elif dimension.name in shared.held:
            points[:, i] = dimension.to_unit([shared.held[dimension.name]])
    return points


def _at(fit: Fit, name: str) -> tuple[int, Dimension]:
    return next((i, d) for i, d in enumerate(fit.selection.data.dimensions) if d.name == name)


def _rows(fit: Fit, name: str, values: Sequence[Any], points: Array) -> Array:
    """Mean accuracy (G, S) at each value of a parameter, the others averaged over the points."""
    i, dimension = _at(fit, name)
    return fit.predictor.along(points, i, dimension.to_unit(values)).accuracy.mean(axis=1)


def _supported(fit: Fit, name: str, values: Sequence[Any]) -> NDArray[np.bool_]:
    """Which values the study's own trials support: as the nearest value of its own grid."""
    i, dimension = _at(fit, name)
    own = supported(fit.selection.data, fit.selection.attempts, i)
    nearest = np.abs(dimension.to_unit(values)[:, None] - dimension.grid(GRID)[None, :]).argmin(axis=1)
    return own[nearest]


# ---- configurations and settings -----------------------------------------------------------------------------


class Best(NamedTuple):
    """A study's best configuration."""

    trial: int
    accuracy: float  # mean over seeds, points
    sd: float  # between seeds
    test: float  # points; NaN if not tested
    values: dict[str, Any]
    spread: dict[str, str]  # by field: the values of the BEST best trials


def best_trials(side: Side) -> list[Trial]:
    """The complete trials with the highest accuracy, at most BEST, the best first; the fit's best one leads."""
    chosen = side.analysis.configurations.best_trial if side.analysis else -1
    complete = [t for t in side.tracked if t.complete] or side.tracked
    return sorted(complete, key=lambda t: (t.number != chosen, -t.last))[:BEST]


def best_configuration(side: Side, names: Sequence[str]) -> Best | None:
    """The best configuration and how far the next ones agree with it; None if no trial has a result."""
    best = best_trials(side)
    if not best:
        return None
    trials = side.records.trials
    known = [name for name in names if name in trials]
    spread = {name: _spread([trials.at[t.number, name] for t in best]) for name in known}
    values = {name: trials.at[best[0].number, name] for name in known}
    test = 100 * float(trials.at[best[0].number, "test_accuracy"])
    return Best(best[0].number, best[0].last, best[0].sd, test, values, spread)


def _spread(values: Sequence[Any]) -> str:
    """3; 3 to 5; gru, lstm."""
    different = set(values)
    if len(different) == 1:
        return shown(values[0])
    if all(isinstance(v, int | float | np.number) for v in different):
        return f"{shown(min(values))} to {shown(max(values))}"
    return ", ".join(sorted(map(shown, different)))


def alike(name: str, values: Sequence[Any], sides: Sequence[Side]) -> bool:
    """Whether the best configurations agree: in the value, or for a real one within NEAR of the range searched."""
    if len(set(values)) == 1:
        return True
    spaces = [side.records.space for side in sides if side.records.space]
    found = [d for space in spaces for d in space.dimensions if d.name == name]
    common = intersect(found) if found else None
    if common is None or common.type != "float":
        return False
    return float(np.ptp(common.to_unit(list(values)))) <= NEAR


def setting_rows(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each study) of all that differs: of the study, the ranges, and fields that are fixed."""
    columns = [_settings(side) for side in sides]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name, "-") for column in columns]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _settings(side: Side) -> dict[str, str]:
    records = side.records
    known: Mapping[str, Any] = {**records.study.params, **records.settings}
    found = {words(name): shown(known[name]) for name in SETTINGS if known.get(name) is not None}
    found |= {name: f"{found[name]:.12}" for name in ("digest", "commit") if name in found}
    sizes = known.get("data_sizes") or known.get("sizes") or {}
    found |= {f"{part} images": shown(size) for part, size in sizes.items()}
    for dimension in records.space.dimensions if records.space else ():
        found[words(dimension.name)] = f"searched: {dimension.extent}"
    fixed = {words(name): shown(value) for name, value in _constants(side).items() if name not in SETTINGS}
    return fixed | found


def shared_runs(sides: Sequence[Side]) -> int:
    """How many runs of the first studies another one has too: same configuration and seed."""
    both = [name for name in _fields(sides[0]) if all(name in side.records.trials for side in sides)]
    rows = [side.records.trials.to_dict(orient="records") for side in sides]
    runs = [{(*(row[f] for f in both), seed) for row in own for seed in row["seeds"]} for own in rows]
    return sum(len(one & two) for one, two in combinations(runs, 2))


def effect_names(effects: Effects) -> list[str]:
    """The shared parameters, the largest effect first; the dummy is none of them."""
    size = {name: max(e.mid for e in by_study.values()) for name, by_study in effects.effects.items() if name != DUMMY}
    return sorted(size, key=lambda name: -size[name])
