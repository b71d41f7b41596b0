"""Which configurations a study tries, in which order, and which of them may be stopped early.

search      the default, the published configurations and scrambled Sobol points, never stopped; then TPE, with early
            stopping
paper       the rows of the case study's Table 1 at its own setting, never stopped
mnih        the rows of Mnih et al.'s tables at the tuned recipe, never stopped
ablation    the tuned recipe, and the same with one of its choices taken back, never stopped
ofat        one factor at a time around two baselines, never stopped
replicate   the best configuration, the default and a few spread points again, on seeds that no search has seen

A trial's arm depends on its number alone, never on how many trials happen to be running, so that parallel starts cannot
overshoot an arm (ray#52535) and a continued study goes on where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ramcore.config import Config, Data, Task
from ramcore.recipes import PAPER, TUNED
from study.space import Space, Values

Design = Literal["search", "paper", "mnih", "ablation", "ofat", "replicate"]
Arm = Literal["published", "sobol", "tpe", "paper", "mnih", "ablation", "ofat", "replicate"]

STOPPABLE: frozenset[str] = frozenset({"tpe"})  # the arms that early stopping may cut short
TESTED: frozenset[str] = frozenset({"paper", "mnih", "ablation", "replicate"})  # arms whose every trial is tested
AROUND_A_SEARCH: frozenset[str] = frozenset({"ofat", "replicate"})  # designs that start from a search's best
HELD_OUT_SEED = 1000  # replicate's first seed; the other designs count from 0
SPREAD_POINTS = 4
SPREAD_SEED = 1  # of the Sobol sequence that spread points come from; a search's is 0 unless said otherwise
SMALL_PATCH = 8  # pixels: the smallest patch of the case study's table
OFAT_LEVELS = (0.0, 1 / 3, 2 / 3, 0.999999)  # unit-cube coordinates

DEFAULT_EPOCHS: dict[Design, int] = {
    "search": 30, "paper": 100, "mnih": 100, "ablation": 30, "ofat": 30, "replicate": 30
}  # fmt: skip
DEFAULT_SEEDS: dict[Design, int] = {"search": 2, "paper": 3, "mnih": 3, "ablation": 3, "ofat": 3, "replicate": 5}
DEFAULT_TASKS: dict[Design, tuple[Task, ...]] = {
    "paper": ("translated", "cluttered"), "mnih": ("translated", "cluttered")
}  # fmt: skip
DEFAULT_TRIALS = 40  # of a search; the other designs have as many as rows
DEFAULT_SOBOL_SHARE = 0.4  # of a search's trials
LEAST_SOBOL = 16  # trials, whatever the share

# (model, num_glimpses, patch_size, num_scales) of Table 1, Fang, Tian and Yang, "Recurrent Models of Visual
# Attention: A Case Study on MNIST Dataset"; Adam 3e-4, batches of 100 and policy std 0.17 are
# `ramcore.recipes.PAPER`'s.
_TABLE_1: dict[str, tuple[tuple[str, int, int, int], ...]] = {
    "translated": (
        ("cnn", 0, 0, 0),
        ("ram", 6, 8, 2),
        ("ram", 6, 8, 3),
        ("ram", 6, 12, 3),
        ("ram", 8, 12, 3),
        ("ram", 6, 16, 3),
    ),
    "cluttered": (
        ("cnn", 0, 0, 0),
        ("ram", 6, 12, 3),
        ("ram", 6, 12, 4),
        ("ram", 8, 12, 3),
        ("ram", 6, 16, 3),
        ("ram", 6, 20, 3),
    ),
}
# Tables 1 and 2 of Mnih et al. 2014: glimpses, patch and scales of RAM; (model, hidden units) of the others.
_MNIH_RAM: dict[str, tuple[tuple[int, ...], int, int]] = {
    "original": ((2, 3, 4, 5, 6, 7), 8, 1),
    "translated": ((4, 6, 8), 12, 3),
    "cluttered": ((4, 6, 8), 12, 3),
    "cluttered-100": ((4, 6, 8), 12, 4),
}
_MNIH_OTHERS: dict[str, tuple[tuple[str, int], ...]] = {
    "original": (("fc", 256), ("conv", 256)),
    "translated": (("fc", 64), ("fc", 256), ("conv", 256)),
    "cluttered": (("fc", 64), ("fc", 256), ("conv", 256), ("ram-random", 256)),
    "cluttered-100": (("conv", 256),),
}
# What a search tries first: for tasks outside the table, what Mnih et al. 2014 published for them.
_PUBLISHED: dict[str, tuple[tuple[int, int, int], ...]] = {
    "original": ((6, 8, 1), (4, 8, 1), (2, 8, 1)),
    "translated": ((6, 12, 3), (6, 16, 3), (8, 12, 3), (6, 8, 3), (6, 8, 2)),
    "cluttered": ((6, 12, 3), (6, 16, 3), (8, 12, 3), (6, 20, 3), (6, 12, 4)),
    "cluttered-100": ((8, 12, 4), (6, 12, 4), (4, 12, 4)),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One trial before it runs."""

    config: Config
    arm: Arm
    row: str = ""  # which row of its design, for people; empty in a search
    seeds: tuple[int, ...]

    @property
    def stoppable(self) -> bool:
        """Whether early stopping may end it."""
        return self.arm in STOPPABLE

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the record keeps it."""
        return {"config": dataclasses.asdict(self.config), "arm": self.arm, "row": self.row, "seeds": list(self.seeds)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Plan:
        """The inverse of `to_dict`."""
        return Plan(config=Config(**data["config"]), arm=data["arm"], row=data["row"], seeds=tuple(data["seeds"]))


def published(space: Space) -> list[tuple[str, Values]]:
    """(row, values) of what a search tries first: the space's default, then the published configurations inside the
    space.

    Published is what is searched (sizes, policy std, learning rate, loss weights); the other fields are the space's.
    """
    paper_values = {name: getattr(PAPER, name) for name in space.names}
    points = [("default", space.default)]
    for glimpses, patch, scales in _PUBLISHED[space.base.task]:
        sizes = {"num_glimpses": glimpses, "patch_size": patch, "num_scales": scales}
        points.append((f"{glimpses} gl {patch}x{patch} {scales} s", paper_values | sizes))
    return [(row, values) for row, values in points if space.contains(values)]


def search_arms(totals: Sequence[int], num_published: int, sobol_share: float = DEFAULT_SOBOL_SHARE) -> list[Arm]:
    """The arm of every trial number of a search that was asked for totals[0] trials, then extended to totals[1], ...

    Of the first total, an eighth (at least one, at most num_published) are the default and published configurations.
    Sobol points follow until `sobol_share` of the total and at least 16 are such; but a fifth of the total (at least
    one trial, from four on) is kept for TPE. An extension starts with the Sobol points that the new total lacks.
    """
    arms: list[Arm] = []
    for total in totals:

        def extend(arm: Arm, count: int, total: int = total) -> None:
            arms.extend(itertools.repeat(arm, max(0, min(count, total - len(arms)))))

        if not arms:
            extend("published", min(num_published, max(1, total // 8)))
        for_tpe = max(1, total // 5) - arms.count("tpe") if total >= 4 else 0
        sobol = max(LEAST_SOBOL, math.ceil(round(sobol_share * total, 6))) - arms.count("sobol")
        extend("sobol", min(sobol, total - len(arms) - max(0, for_tpe)))
        extend("tpe", total)
    return arms


def paper(data: Data, tasks: Sequence[str], epochs: int, seeds_per_trial: int) -> list[Plan]:
    """Table 1, as published: both tasks unless fewer are named."""
    plans: list[Plan] = []
    for task, rows in _TABLE_1.items():
        if task not in tasks:
            continue
        assert task in get_args(Task)
        for model, glimpses, patch, scales in rows:
            config = dataclasses.replace(PAPER, data=data, task=task, epochs=epochs)
            label = f"{task} CNN"
            if model == "ram":
                config = dataclasses.replace(config, num_glimpses=glimpses, patch_size=patch, num_scales=scales)
                label = f"{task} RAM {glimpses} gl {patch}x{patch} {scales} s"
            else:
                config = dataclasses.replace(config, model="cnn")
            plans.append(Plan(config=config, arm="paper", row=label, seeds=tuple(range(seeds_per_trial))))
    return plans


def mnih(data: Data, tasks: Sequence[Task], epochs: int, seeds_per_trial: int) -> list[Plan]:
    """Every row of Mnih et al.'s tables for the tasks, with the tuned recipe: the same glimpse budget, trained well."""
    plans: list[Plan] = []
    for task in tasks:
        glimpses, patch, scales = _MNIH_RAM[task]
        base = dataclasses.replace(
            TUNED, data=data, task=task, epochs=epochs, patch_size=patch, num_scales=scales, num_glimpses=glimpses[-1]
        )
        rows = [
            (f"RAM {n} gl {patch}x{patch} {scales} s", dataclasses.replace(base, num_glimpses=n))
            for n in reversed(glimpses)  # the largest budget first: it is what the table is read for
        ]
        for model, hidden in _MNIH_OTHERS[task]:
            label = f"RAM {glimpses[-1]} random gl" if model == "ram-random" else model
            label += f" {hidden}" if model == "fc" else ""
            rows.append((label, dataclasses.replace(base, model=model, hidden_size=hidden)))  # type: ignore[arg-type]
        seeds = tuple(range(seeds_per_trial))
        plans += [Plan(config=config, arm="mnih", row=f"{task} {label}", seeds=seeds) for label, config in rows]
    return plans


def ablation(data: Data, task: Task, epochs: int, seeds_per_trial: int) -> list[Plan]:
    """The tuned recipe at 6 glimpses, 12x12, 3 scales; then the same with one of its choices as in the papers."""
    tuned = dataclasses.replace(TUNED, data=data, task=task, epochs=epochs)
    names = [f.name for f in dataclasses.fields(TUNED) if getattr(TUNED, f.name) != getattr(PAPER, f.name)]
    changed = {name: getattr(PAPER, name) for name in names if name != "epochs"}
    rows = [("tuned", tuned)]
    for name, value in changed.items():
        taken_back = {name: value}
        if name == "reward_steps":  # undiscounted, or the last reward would reach the last decision alone
            taken_back["discount"] = PAPER.discount
        label = ", ".join(f"{field}={taken}" for field, taken in taken_back.items())
        rows.append((f"tuned but {label}", dataclasses.replace(tuned, **taken_back)))
    rows.append(("paper", dataclasses.replace(tuned, **changed)))
    return [Plan(config=config, arm="ablation", row=row, seeds=tuple(range(seeds_per_trial))) for row, config in rows]


def ofat(space: Space, best: Values, seeds_per_trial: int) -> list[Plan]:
    """One factor at a time around the best configuration found and around the same with a small patch.

    The second baseline is there because a factor may matter only where the patch is small: an interaction that one
    baseline cannot show.
    """
    seeds = tuple(range(seeds_per_trial))
    small = space.clamped(best | {"patch_size": SMALL_PATCH})
    plans: list[Plan] = []
    baselines = {"best": best, "small patch": small} if small != best else {"best": best}
    for name, baseline in baselines.items():
        plans.append(Plan(config=space.config(baseline), arm="ofat", row=f"baseline {name}", seeds=seeds))
        for dimension in space.dimensions:
            levels = [dimension.from_unit(u) for u in OFAT_LEVELS]
            for level in dict.fromkeys(levels):
                values = baseline | {dimension.name: level}
                if level == baseline[dimension.name] or not space.feasible(values):
                    continue
                shown = f"{level:.3g}" if isinstance(level, float) else level
                row = f"baseline {name}: {dimension.name}={shown}"
                plans.append(Plan(config=space.config(values), arm="ofat", row=row, seeds=seeds))
    return plans


def replicate(space: Space, best: Values, source: str, seeds_per_trial: int) -> list[Plan]:
    """The best configuration of the study `source`, the default unless it is the best, and a few spread points, on
    held-out seeds.
    """
    seeds = tuple(range(HELD_OUT_SEED, HELD_OUT_SEED + seeds_per_trial))
    rows = [(f"best of {source}", best)]
    if best != space.default:
        rows.append(("default", space.default))
    rows += [(f"spread point {i + 1}", space.sobol(i, SPREAD_SEED)) for i in range(SPREAD_POINTS)]
    return [Plan(config=space.config(v), arm="replicate", row=row, seeds=seeds) for row, v in rows]
