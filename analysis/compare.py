"""python -m analysis.compare A B: two or more studies side by side, over what their spaces share."""

from __future__ import annotations

from ramcore.errors import UserError, entry_point, parsed, say, show

if __name__ == "__main__":
    entry_point("analysis.compare")

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import figures, load
from analysis.comparison import (
    BEST,
    Best,
    Effects,
    Side,
    alike,
    best_configuration,
    best_trials,
    compare_effects,
    effect_names,
    setting_rows,
    shared_runs,
)
from analysis.importance import HYPERDRAWS, conclude, fit_study
from analysis.load import StudyData
from analysis.report import TEMPLATES, panels, save_figures, tracked_trials, with_cost
from analysis.results import TIE, why_not_ranked
from analysis.text import join, number, percent, span
from ramcore.private import private_arguments
from ramcore.space import shown, words
from study.designs import SEARCH_ORIGINS
from study.moved import tracking_uri


@dataclass(frozen=True, kw_only=True)
class Args:
    """Compare studies: their effects, best configurations, learning curves, costs and settings."""

    studies: tyro.conf.Positional[tuple[str, ...]]
    """Names of two studies or more."""
    tracking_uri: str | None = None
    """MLflow tracking server; $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db, if left out."""
    records: Path | None = None
    """Read records that analysis.export wrote into this folder, not MLflow."""
    out: Path | None = None
    """Folder for the page; ./reports/<study>-and-<study> if left out."""


def main(args: Args, *, hyperdraws: int = HYPERDRAWS) -> int:
    """Read, fit, compare, write. Gives 0, or 2 after a one-line message if the records cannot answer."""
    return load.exit_code("comparison", lambda: _compare(args, hyperdraws))


def _compare(args: Args, hyperdraws: int) -> None:
    if len(set(args.studies)) < max(2, len(args.studies)):
        raise UserError(
            f"a comparison needs two different studies or more; got {join(args.studies) or 'none'}. Run python -m "
            "analysis.compare A B"
        )
    source = load.open_source(tracking_uri(args.tracking_uri), args.records)
    known = load.list_studies(source)
    chosen = [load.find_study(known, name, "a comparison") for name in args.studies]
    if len({study.run_id for study in chosen}) < len(chosen):
        raise UserError(f"a comparison needs different studies; {join(args.studies)} name one twice. Leave it out")
    sides = []
    for study in chosen:
        records = load.load_study(source, study, load.progress_line(f"reading {study.name}"))
        sides.append(read_side(records, hyperdraws))
    fitted = [side for side in sides if side.fit]
    effects = compare_effects(fitted) if len(fitted) > 1 else None
    out = args.out or Path("reports") / "-and-".join(load.folder_name(side.name) for side in sides)
    write_comparison(out, sides, effects)
    show("\n  ".join(["", *sentences(sides, effects), *cautions(sides, effects)]))
    show(f"\n  comparison: {out / 'compare.html'}")


def read_side(records: StudyData, hyperdraws: int = HYPERDRAWS) -> Side:
    """A study with its fit, from its own trials alone; without one, why it has none."""
    name = records.study.name
    if not set(records.trials["origin"]) & set(SEARCH_ORIGINS):
        return Side(records, tracked_trials(records, records.budget), None, None, "it is a fixed design, not a search")
    try:
        fit = fit_study(records, lambda step: say(f"{name}: {step}"), hyperdraws=hyperdraws)
    except UserError as error:
        return Side(records, tracked_trials(records, records.budget), None, None, str(error))
    return Side(records, tracked_trials(records, fit.selection.data.budget), fit, conclude(records, fit))


# ---- words ---------------------------------------------------------------------------------------------------


def sentences(sides: Sequence[Side], effects: Effects | None) -> list[str]:
    """What the comparison says first."""
    said: list[str] = []
    for side in sides:
        if best := best_configuration(side, ()):
            test = f", test {number(best.test, 2)} %" if math.isfinite(best.test) else ""
            which = "the fit expects most of" if side.analysis else "the best is"
            said.append(
                f"{side.name}: of {len(side.records.trials)} trials, {which} trial {best.trial} "
                f"({number(best.accuracy, 2)} % validation accuracy{test})."
            )
    if effects is None:
        return [*said, "Effects are not compared: that takes two searches with enough trials."]
    if not effects.shared.dimensions:
        return [*said, "Effects are not compared: these studies vary no parameter over values that all of them have."]
    if unsure := [side.name for side in sides if side.analysis and not side.analysis.ranked]:
        return [*said, f"Whether effects differ cannot be said yet, because of {join(unsure)} (see the notes)."]
    differ = [d for d in effects.differences if d.differs >= TIE[1]]
    said += [
        f"The effect of {words(d.parameter)} is {'larger' if d.larger > 0.5 else 'smaller'} in {d.second} than in "
        f"{d.first}: by {span(d.difference, 1, '+')} points (they differ with a probability of {percent(d.differs)})."
        for d in differ
    ]
    return said if differ else [*said, "On these data no effect surely differs between the studies."]


def cautions(sides: Sequence[Side], effects: Effects | None) -> list[str]:
    """What a reader has to know before the numbers."""
    said = [f"{side.name} has no effects here: {side.problem.rstrip('.')}." for side in sides if side.problem]
    said += [
        f"{side.name} supports no ranking: {why_not_ranked(side.analysis)}. Its effects are guesses so far."
        for side in sides
        if side.analysis and not side.analysis.ranked
    ]
    if effects and (parts := [*effects.shared.held, *effects.shared.apart]):
        said.append(
            f"The studies search different spaces. They are compared on what they share; {join(map(words, parts))} "
            f"{'are' if len(parts) > 1 else 'is'} not varied there."
        )
    elif effects and _different_ranges(sides):
        said.append("The studies search different ranges. They are compared over the values that all of them search.")
    if both := shared_runs(sides):
        said.append(
            f"{both} runs are of the same configuration and seed in two studies. The probabilities take the studies as "
            "independent; runs that they share make differences seem less sure than they are."
        )
    return said


def _different_ranges(sides: Sequence[Side]) -> bool:
    spaces = [side.records.space for side in sides if side.fit and side.records.space]
    return len({tuple((d.name, d.extent) for d in space.dimensions) for space in spaces}) > 1


# ---- files ---------------------------------------------------------------------------------------------------


@figures.styled
def write_comparison(out: Path, sides: Sequence[Side], effects: Effects | None) -> list[Path]:
    """Write compare.html, compare.csv, best.csv, settings.csv and the figures; give their paths."""
    names = list(dict.fromkeys(d.name for s in sides if s.records.space for d in s.records.space.dimensions))
    best = {side.name: one for side in sides if (one := best_configuration(side, names))}
    configurations = _configuration_rows(names, sides, best)
    settings, order = setting_rows(sides), effect_names(effects) if effects else []
    drawn = _draw(sides, effects, order)
    out.mkdir(parents=True, exist_ok=True)
    images, paths = save_figures(out, drawn)
    values = {
        "heading": join(side.name for side in sides),
        "kicker": ["Comparison of studies"],
        "running": [side.name for side in sides if side.records.study.status == "running"],
        "sentences": sentences(sides, effects),
        "cautions": cautions(sides, effects),
        "images": images,
        "charts": {},
        "effects": effects if order else None,
        "order": order,
        "fitted": [side.name for side in sides if side.fit],
        "studies": [side.name for side in sides],
        "best": list(best),
        "facts": _fact_rows(best),
        "configurations": configurations,
        "settings": settings,
        "BEST": BEST,
    }
    (out / "compare.html").write_text(TEMPLATES.get_template("compare.html.j2").render(values), encoding="utf-8")
    _effect_table(effects).to_csv(out / "compare.csv", index=False)
    columns = ["parameter", *best, "alike"]
    pd.DataFrame([[n, *cells, same] for n, cells, same in configurations], columns=columns).to_csv(
        out / "best.csv", index=False
    )
    pd.DataFrame([[n, *cells] for n, cells in settings], columns=["setting", *(s.name for s in sides)]).to_csv(
        out / "settings.csv", index=False
    )
    return [out / name for name in ("compare.html", "compare.csv", "best.csv", "settings.csv")] + paths


def _effect_table(effects: Effects | None) -> pd.DataFrame:
    """compare.csv: a row a parameter and pair of studies; effects in points."""
    rows: list[dict[str, Any]] = []
    for d in effects.differences if effects else ():
        row: dict[str, Any] = {"parameter": d.parameter, "first": d.first, "second": d.second}
        own = effects.effects[d.parameter] if effects else {}
        intervals = {"first_effect": own[d.first], "second_effect": own[d.second], "difference": d.difference}
        for key, value in intervals.items():
            row |= {f"{key}_low": value.low, key: value.mid, f"{key}_high": value.high}
        rows.append(row | {"p_differs": d.differs, "p_second_larger": d.larger})
    return pd.DataFrame(rows)


def _fact_rows(best: dict[str, Best]) -> list[tuple[str, list[str]]]:
    found = list(best.values())
    return [
        ("trial", [str(b.trial) for b in found]),
        ("validation accuracy (SD between seeds)", [f"{number(b.accuracy, 2)} ({number(b.sd, 2)})" for b in found]),
        ("test accuracy", [number(b.test, 2) for b in found]),
    ]


def _configuration_rows(
    names: Sequence[str], sides: Sequence[Side], best: dict[str, Best]
) -> list[tuple[str, list[str], bool]]:
    """(field, its value in each best configuration, whether they are alike)."""
    rows: list[tuple[str, list[str], bool]] = []
    for name in names:
        cells = []
        for one in best.values():
            value, spread = shown(one.values[name]) if name in one.values else "-", one.spread.get(name, "")
            cells.append(value if spread in ("", value) else f"{value} ({spread})")
        values = [one.values[name] for one in best.values() if name in one.values]
        rows.append((name, cells, len(values) == len(best) and alike(name, values, sides)))
    return rows


def _draw(sides: Sequence[Side], effects: Effects | None, order: Sequence[str]) -> dict[str, Axes | Figure]:
    """The figures by file name."""
    drawn: dict[str, Axes | Figure] = {}
    if effects and order:
        drawn["effects"] = figures.compared_effects({name: effects.effects[name] for name in order})
        dimensions = {d.name: d for d in effects.shared.dimensions}
        figure, axes = panels(len(order))
        for name, ax in zip(order, axes, strict=True):
            figures.compared_marginal(effects.curves[name], dimensions[name], ax)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=1, fontsize=9)
        drawn["marginals"] = figure
    drawn["learning_curves"] = figures.compared_curves({s.name: found for s in sides if (found := best_trials(s))})
    if known := {side.name: trials for side in sides if (trials := with_cost(side.tracked))}:
        drawn["compute"] = figures.compared_fronts(known)
    return drawn


def cli() -> int:
    """Entry point."""
    load.quieten()
    torch.set_num_threads(1)  # as in analysis.sensitivity
    arguments = private_arguments()
    return main(parsed(lambda: tyro.cli(Args, args=arguments, description=__doc__)))
