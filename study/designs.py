"""The designs of a study: which configurations it tries, in which order, and how the result is reported.

A design is added to DESIGNS, and nowhere else. This module is plain data: the analysis reads it too.

What chose a trial's configuration is its origin: "published", "asked" (--try), "sobol", "tpe" or "aimed" (--aim
sensitivity) in a search, the design's name in every other one. The origin depends on the trial's number alone, never on
how many trials happen to be running. So parallel starts cannot exceed a share (ray#52535), and a continued study goes
on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar

from ramcore.config import TASKS, Config
from ramcore.errors import UserError
from ramcore.published import CASE_STUDY, MNIH, Published, first_points, published_rows
from ramcore.recipes import PAPER, TUNED
from ramcore.space import Space, Values, shown
from study.search_space import configuration

SEARCH_ORIGINS = ("published", "asked", "sobol", "tpe", "aimed")
STOPPABLE = frozenset({"tpe"})  # origins that early stopping may cut short

HELD_OUT_SEED = 1000  # replicate's first seed; the other designs count from 0
SPREAD_POINTS = 4  # of replicate
SPREAD_SEED = 1  # of the Sobol sequence that spread points come from; a search's is 0
SMALL_PATCH = 8  # pixels: the smallest patch of the case study's table
OFAT_LEVELS = (0.0, 1 / 3, 2 / 3, 0.999999)  # what uniform numbers draw the values of one factor at a time

AIMS = ("accuracy", "sensitivity")  # of the trials that a search is asked for
DEFAULT_TRIALS = 40  # of a search; the other designs have as many as rows
DEFAULT_SOBOL_SHARE = 0.4  # of a search's trials
LEAST_SOBOL = 16  # trials, whatever the share

Kept = TypeVar("Kept")  # a dataclass that a record keeps


def of_record(kind: type[Kept], values: Mapping[str, Any]) -> Kept:
    """A dataclass from its fields in a record. Raises UserError if a newer version wrote them, or some are missing."""
    known = {f.name: f for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    newer = [f"field {name}" for name in sorted(values.keys() - known.keys())]
    if (design := str(values.get("design", "search"))) not in DESIGNS:
        newer.append(f"design {design}")
    if newer:
        raise UserError(
            f"a record must be of this version of the project or an older one; it has the {', '.join(newer)}: "
            "update the project"
        )
    if lost := [name for name, f in known.items() if name not in values and f.default is MISSING]:
        raise UserError(f"a record must be whole; it lacks {', '.join(lost)}: put a copy of it back")
    return kind(**values)


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """What defines a trial before it runs."""

    config: Config
    origin: str
    row: str = ""  # which row of its design, for people; empty in a search
    baseline: str = ""  # of ofat: the name of the baseline; of replicate: best, default or empty
    parameter: str = ""  # of one factor at a time: the one field that differs from the baseline; empty: none does
    seeds: tuple[int, ...]

    @property
    def tested(self) -> bool:
        """Whether its networks are read on the test images when it completes."""
        return self.origin in DESIGNS and DESIGNS[self.origin].tested

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the record keeps it."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> TrialSpec:
        """The inverse of `to_dict`; also reads records that say "arm" for origin."""
        values = {("origin" if name == "arm" else name): value for name, value in data.items()}
        spec = of_record(TrialSpec, values)
        return replace(spec, config=of_record(Config, data["config"]), seeds=tuple(spec.seeds))


@dataclass(frozen=True, kw_only=True)
class DesignInputs:
    """What the rows of a fixed design are made from."""

    base: Config  # data, the first task, the number of epochs; else TUNED, on the bundled digits with its own changes
    tasks: tuple[str, ...]
    seeds_per_trial: int
    space: Space | None = None  # of a design that starts from a search
    best: Values | None = None  # the searched values of that search's best trial
    source: str = ""  # that search's name
    spread: Sequence[Values] = ()  # SPREAD_POINTS points that fill the space

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of every trial, unless the design has its own."""
        return tuple(range(self.seeds_per_trial))

    def of(self, recipe: Config) -> Config:
        """A recipe with the base's images, task and number of epochs."""
        base = self.base
        images = {"data": base.data, "canvas": base.canvas, "num_classes": base.num_classes}
        return replace(recipe, task=base.task, epochs=base.epochs, **images)


@dataclass(frozen=True, kw_only=True)
class Design:
    """Everything that tells one design from another."""

    summary: str  # for --help
    epochs: int  # of a trial, unless asked otherwise
    seeds_per_trial: int  # likewise
    tasks: tuple[str, ...] = ("translated",)  # likewise
    possible_tasks: tuple[str, ...] = tuple(TASKS)
    tested: bool = False  # whether every complete trial is read on the test images
    from_search: bool = False  # whether it starts from the best trial of a search
    report: Literal["sensitivity", "comparison", "tables"]  # a ranking; rows side by side; the tables of the papers
    rows: Callable[[DesignInputs], list[TrialSpec]] | None = None  # None: trials are suggested while the study runs

    @property
    def has_space(self) -> bool:
        """Whether its trials lie in the search space."""
        return self.rows is None or self.from_search


def _specs(design: str, seeds: tuple[int, ...], rows: Iterable[tuple[str, Config]]) -> list[TrialSpec]:
    return [TrialSpec(config=config, origin=design, row=row, seeds=seeds) for row, config in rows]


def _sizes(row: Published) -> dict[str, int]:
    return {"num_glimpses": row.glimpses, "patch_size": row.patch, "num_scales": row.scales} if row.glimpses else {}


def _row_config(row: Published, base: Config) -> Config:
    """The configuration of a published row; what the row does not say is the base's."""
    return replace(base, task=row.task, model=row.model, **_sizes(row))  # pyright: ignore[reportArgumentType]


def paper(inputs: DesignInputs) -> list[TrialSpec]:
    """The rows of the case study's Table 1, at its own setting."""
    base = inputs.of(PAPER)
    table = published_rows(CASE_STUDY, inputs.tasks)
    return _specs("paper", inputs.seeds, ((f"{row.task} {row.short}", _row_config(row, base)) for row in table))


def mnih(inputs: DesignInputs) -> list[TrialSpec]:
    """Every row of Mnih et al.'s tables for the tasks, with the tuned recipe: the same glimpse budget, trained well."""
    rows: list[tuple[str, Config]] = []
    base = inputs.of(TUNED)
    for task in inputs.tasks:
        table = published_rows(MNIH, (task,))
        rams = [row for row in reversed(table) if row.model == "ram"]  # the largest budget first: the table's headline
        largest = _row_config(rams[0], base)
        for row in [*rams, *(row for row in table if row.model != "ram")]:
            rows.append((f"{task} {row.short}", replace(_row_config(row, largest), hidden_size=row.hidden)))
    return _specs("mnih", inputs.seeds, rows)


def ablation(inputs: DesignInputs) -> list[TrialSpec]:
    """The tuned recipe at 6 glimpses, 12x12, 3 scales; then the same with one of its choices as in the papers."""
    tuned = inputs.of(TUNED)
    names = [f.name for f in fields(TUNED) if f.name != "epochs"]
    changed = {name: getattr(PAPER, name) for name in names if getattr(TUNED, name) != getattr(PAPER, name)}
    rows = [("tuned", tuned)]
    for name, value in changed.items():
        undone = {name: value}
        if name == "reward_steps":  # undiscounted, or the last reward would reach the last decision alone
            undone["discount"] = PAPER.discount
        label = ", ".join(f"{field}={paper_value}" for field, paper_value in undone.items())
        rows.append((f"tuned but {label}", replace(tuned, **undone)))
    return _specs("ablation", inputs.seeds, [*rows, ("paper", replace(tuned, **changed))])


def ofat(inputs: DesignInputs) -> list[TrialSpec]:
    """One factor at a time around the best configuration found and around the same with a small patch.

    The second baseline shows an interaction that one baseline cannot: a factor may matter only where patches are small.
    A space without small patches has the first baseline alone.
    """
    space, best = inputs.space, inputs.best
    assert space is not None and best is not None
    small = space.clamped(best | {"patch_size": SMALL_PATCH}) if "patch_size" in space.names else best
    specs: list[TrialSpec] = []
    baselines = {"best": best} | ({"small patch": small} if small != best and space.contains(small) else {})
    for name, baseline in baselines.items():
        rows = [(f"baseline {name}", "", baseline)]
        for dimension in space.dimensions:
            factor = dimension.name
            levels = dict.fromkeys(dimension.sample(u) for u in OFAT_LEVELS)
            others = [level for level in levels if level != baseline[factor]]
            rows += [(f"baseline {name}: {factor}={shown(x)}", factor, baseline | {factor: x}) for x in others]
        for row, factor, values in rows:
            if not factor or space.feasible(values):
                spec = TrialSpec(config=configuration(space, values), origin="ofat", row=row, seeds=inputs.seeds)
                specs.append(replace(spec, baseline=name, parameter=factor))
    return specs


def replicate(inputs: DesignInputs) -> list[TrialSpec]:
    """A search's best configuration, the default unless it is the best, and a few spread points, on held-out seeds."""
    space, best = inputs.space, inputs.best
    assert space is not None and best is not None
    rows = [(f"best of {inputs.source}", "best", best)]
    if best != space.default:
        rows.append(("default", "default", dict(space.default)))
    rows += [(f"spread point {i}", "", values) for i, values in enumerate(inputs.spread, start=1)]
    seeds = tuple(range(HELD_OUT_SEED, HELD_OUT_SEED + inputs.seeds_per_trial))
    specs = _specs("replicate", seeds, ((row, configuration(space, values)) for row, _, values in rows))
    return [replace(spec, baseline=baseline) for spec, (_, baseline, _) in zip(specs, rows, strict=True)]


DESIGNS: dict[str, Design] = {
    "search": Design(
        summary="the default, the published sizes and Sobol points, never stopped; then TPE with early stopping",
        epochs=30, seeds_per_trial=2, report="sensitivity",
    ),
    "paper": Design(
        summary="the rows of the case study's Table 1, at its own setting",
        epochs=100, seeds_per_trial=3, tasks=("translated", "cluttered"), possible_tasks=("translated", "cluttered"),
        tested=True, report="tables", rows=paper,
    ),
    "mnih": Design(
        summary="the rows of Mnih et al.'s tables, at the tuned recipe",
        epochs=100, seeds_per_trial=3, tasks=("translated", "cluttered"),
        possible_tasks=tuple(dict.fromkeys(row.task for row in published_rows(MNIH))), tested=True, report="tables",
        rows=mnih,
    ),
    "ablation": Design(
        summary="the tuned recipe, and the same with one of its choices undone at a time",
        epochs=30, seeds_per_trial=3, tested=True, report="tables", rows=ablation,
    ),
    "ofat": Design(
        summary="one factor at a time around a search's best configuration and around a small patch",
        epochs=30, seeds_per_trial=3, from_search=True, report="comparison", rows=ofat,
    ),
    "replicate": Design(
        summary="a search's best configuration, the default and spread points, on held-out seeds",
        epochs=30, seeds_per_trial=5, tested=True, from_search=True, report="comparison", rows=replicate,
    ),
}  # fmt: skip


def published(space: Space) -> list[tuple[str, Values]]:
    """(row, values) of a search's first trials: the space's default, then the published points, if inside the space."""
    return [(row, values) for row, values in _first_points(space) if space.contains(values)]


def points_outside(space: Space) -> list[str]:
    """The first trials that a search leaves out, with the values outside the space: "default: num_glimpses=6"."""
    found = []
    for row, values in _first_points(space):
        bad = [f"{d.name}={values[d.name]}" for d in space.dimensions if not d.contains(values[d.name])]
        if bad or not space.feasible(values):
            found.append(f"{row}: {', '.join(bad) or space.rule}")
    return found


def _first_points(space: Space) -> list[tuple[str, Values]]:
    """The default, and what was published for the searched fields; all other fields have the space's fixed values.

    A published point that needs another size than a fixed one is none of the space's.
    """
    points = [("default", dict(space.default))]
    for row in first_points(space.fixed["task"]):
        sizes = _sizes(row)
        if all(space.fixed.get(name, size) == size for name, size in sizes.items()):
            config = replace(PAPER, **sizes)
            points.append((row.short.removeprefix("RAM "), {name: getattr(config, name) for name in space.names}))
    return points


def search_origins(
    totals: Sequence[int],
    num_published: int,
    sobol_share: float = DEFAULT_SOBOL_SHARE,
    asked_at: Iterable[int] = (),
    aims: Sequence[str] = (),
) -> list[str]:
    """The origin of every trial of a search that was asked for totals[0] trials, then for totals[1] in all, ...

    Of the first total, an eighth (at least one, at most num_published) are the default and published configurations.
    Sobol points follow until `sobol_share` of the total and at least 16 are such; but a fifth of the total (at least
    one trial, from four on) is kept for TPE. An extension starts with the Sobol points that the new total lacks. A
    smaller total takes back the last trials. Where the aim of a total is sensitivity, all its trials after the first
    16 Sobol points are aimed, and none is TPE's; `aims` of earlier versions are missing. A point that was asked for
    when `asked_at` trials had begun is put in there, and all that follow move back by one.
    """
    origins: list[str] = []
    for number, total in enumerate(totals):
        del origins[total:]
        if not origins:
            origins += ["published"] * min(num_published, max(1, total // 8))
        if list(aims[number : number + 1]) == ["sensitivity"]:
            origins += ["sobol"] * min(LEAST_SOBOL - origins.count("sobol"), total - len(origins))
            origins += ["aimed"] * (total - len(origins))
        for_tpe = max(1, total // 5) - origins.count("tpe") if total >= 4 else 0
        sobol = max(LEAST_SOBOL, math.ceil(round(sobol_share * total, 6))) - origins.count("sobol")
        origins += ["sobol"] * min(sobol, total - len(origins) - max(0, for_tpe))  # none if negative
        origins += ["tpe"] * (total - len(origins))
    for at in asked_at:
        origins.insert(at, "asked")
    return origins[: totals[-1]] if totals else origins
