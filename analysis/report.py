"""Writes a report: tables, figures and one self-contained HTML page. Its words are in analysis/templates.

The page holds each figure as a picture. Where scripts run, charts that answer to the pointer take the place of those of
trials, and the table of trials sorts and filters.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from analysis import charts, figures
from analysis.answer import answer, cautions, rank_label
from analysis.crosschecks import ESTIMATES
from analysis.figures import Trial
from analysis.fixed_designs import FixedDesigns, completion_line
from analysis.importance import DRAWS_EACH, HYPERDRAWS
from analysis.load import MLFLOW_UI, StudyData, plain_trials
from analysis.results import DUMMY, INTERVAL, MIN_R2, TIE, Analysis, Curve, Interval
from analysis.selection import outcomes, trained_above
from analysis.text import join, number, percent, span
from analysis.verdicts import THRESHOLDS, Verdict
from ramcore.space import RULE_REASON, Dimension, shown, words

ASKED = ("retuned", "around_best", "shapley")  # fields of `Other` that are intervals
NO_FIXED_DESIGNS = FixedDesigns()
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,  # names, reasons and values of a study are text, never markup
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
TEMPLATES.filters |= {
    "span": span, "number": number, "percent": percent, "shown": shown, "words": words, "join_words": join,
    "scaled": lambda value, factor: Interval(*(factor * bound for bound in value)),
    "headings": lambda body: [(a, Markup(t)) for a, t in re.findall(r"<section id=([\w-]+)><h2>(.*?)</h2>", body)],
}  # fmt: skip
TEMPLATES.globals |= {
    "DUMMY": DUMMY, "INTERVAL": INTERVAL, "TIE": TIE, "HYPERDRAWS": HYPERDRAWS, "DRAWS_EACH": DRAWS_EACH,
    "THRESHOLDS": THRESHOLDS, "ESTIMATES": ESTIMATES, "RULE_REASON": RULE_REASON, "MLFLOW_UI": MLFLOW_UI,
    "library": lambda: Markup(charts.library()),
}  # fmt: skip


# ---- tables --------------------------------------------------------------------------------------------------


def importance_table(analysis: Analysis) -> pd.DataFrame:
    """importance.csv: one row a parameter, the dummy included."""
    nothing = Interval(math.nan, math.nan, math.nan)
    rows: list[dict[str, Any]] = []
    for e in analysis.ranking.effects:
        row: dict[str, Any] = {"parameter": e.name, "rank": e.rank if analysis.ranked and e.rank else ""}
        intervals = {
            "effect": e.effect, "effect_in_sd": e.effect_in_sd, "first": e.first, "total": e.total,
            "first_accuracy": e.first_accuracy, "total_accuracy": e.total_accuracy,
            "trained": e.trained, "training": e.training or nothing, "failure": e.failure or nothing,
                    }  # fmt: skip
        asked = analysis.other.get(e.name)
        intervals |= {name: getattr(asked, name, nothing) for name in ASKED}
        for key, value in intervals.items():
            row |= {f"{key}_low": value.low, key: value.mid, f"{key}_high": value.high}
        rows.append(row | {"p_above_dummy": e.above_dummy})
    return pd.DataFrame(rows)


def verdict_table(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """verdicts.json: the thresholds, and the claims with their numbers."""
    listed = [
        {name: value for name, value in v._asdict().items() if name != "margin"}
        | {"estimate": v.estimate._asdict() if v.estimate else None}
        for v in verdicts
    ]
    fixed = {name: {"value": value, "reason": reason} for name, (value, reason) in THRESHOLDS.items()}
    return {"thresholds": fixed, "claims": listed}


def diagnostics(analysis: Analysis, crosschecks: pd.DataFrame | None) -> dict[str, Any]:
    """diagnostics.json: everything that says how far the answers can be trusted."""
    data, trust = analysis.data, analysis.trust
    return {
        "study": data.name,
        "ranked": analysis.ranked,
        "r2": trust.fit.r2,
        "r2_needed": MIN_R2,
        "r2_ceiling_from_seed_noise": trust.fit.ceiling,
        "coverage_of_90_percent_intervals": trust.fit.coverage,
        "held_out_trials": trust.fit.held_out,
        "rhat_max": trust.rhat,
        "ess_min": trust.ess,
        "modes": trust.modes,
        "trials_needed": trust.trials_needed,
        "trials_of_other_studies": data.others,
        "runs_that_did_not_train": data.untrained[0],
        "runs": data.untrained[1],
        "trials": data.counts._asdict(),
        "origins": data.origins,
        "not_varied": list(data.constant),
        "budget_epochs": data.budget,
        "evaluation_size": data.evaluation_size,
        "seed_sd_points": trust.seed_sd._asdict(),
        "seed_sd_measured": trust.seed_sd_measured,
        "infeasible_share": trust.infeasible_share,
        "extrapolation_share": trust.extrapolation_share,
        "biased_sample": data.biased,
        "warnings": list(data.warnings),
        "crosschecks": None if crosschecks is None else crosschecks.to_dict(orient="records"),
        "crosschecks_estimate": None if crosschecks is None else ESTIMATES,
    }


def tracked_trials(records: StudyData, budget: int) -> list[Trial]:
    """The trials that have results, as the figures draw them."""
    table = records.epochs[records.epochs["val_accuracy"].notna()]
    by_epoch = 100 * table.groupby(["trial", "epoch"])["val_accuracy"].agg(["mean", "std"])
    ended, trials = outcomes(records.trials), records.trials.to_dict(orient="index")
    found: list[Trial] = []
    for label, part in by_epoch.reset_index().groupby("trial"):
        at = int(str(label))
        trial, (epochs, mean, sd) = trials[at], part[["epoch", "mean", "std"]].to_numpy(float).T
        complete = trial["state"] == "complete" and trial["epochs_seen"] >= 0.9 * budget
        found.append(Trial(at, trial["origin"], ended[at], complete, epochs, mean, float(sd[-1]), trial["macs"]))
    return found


class ListedTrial(NamedTuple):
    """A row of the table of trials."""

    number: int
    page: str  # its run in MLflow; empty if there is none
    cells: list[tuple[str, Any]]  # text, and what it is sorted by


class TrialList(NamedTuple):
    """The table of trials."""

    headings: list[str]
    trials: list[ListedTrial]


def list_trials(records: StudyData, tracked: Sequence[Trial], dimensions: Sequence[Dimension]) -> TrialList:
    """Every trial, those without results among them."""
    headings = ["trial", "chosen by", "row", "how it ended", "why", "seeds", "epochs", "validation %", "SD of seeds"]
    headings += ["test %", "million MACs", *(words(d.name) for d in dimensions)]
    results, ends = {t.number: t for t in tracked}, outcomes(records.trials)
    found: list[ListedTrial] = []
    for at, trial in ((int(str(at)), trial) for at, trial in records.trials.to_dict(orient="index").items()):
        last, end = results.get(at), figures.ended(ends[at])
        texts = [figures.origin_style(trial["origin"])[2], trial["row"], end]
        texts += ["" if trial["stop_reason"] == end else trial["stop_reason"], " ".join(map(str, trial["seeds"]))]
        measured = [last.last, last.sd] if last else [math.nan, math.nan]
        measured += [100 * trial["test_accuracy"], trial["macs"] / 1e6]
        cells: list[tuple[str, Any]] = [(str(at), at), *((text, text) for text in texts)]
        cells.append((str(trial["epochs_seen"]), trial["epochs_seen"]))
        cells += [(number(value, 2), value if math.isfinite(value) else "") for value in measured]
        cells += [(shown(trial[d.name]), trial[d.name]) for d in dimensions]
        found.append(ListedTrial(at, (records.pages or {}).get(at, ""), cells))
    used = [k for k in range(len(headings)) if any(trial.cells[k][0] not in ("", "-") for trial in found)]
    rows = [trial._replace(cells=[trial.cells[k] for k in used]) for trial in found]
    return TrialList([headings[k] for k in used], rows)


# ---- figures -------------------------------------------------------------------------------------------------


def draw_search(records: StudyData, analysis: Analysis, tracked: Sequence[Trial]) -> dict[str, Axes | Figure]:
    """The figures of a search by file name."""
    effects, curves, fit = analysis.ranking.effects, analysis.curves, analysis.trust.fit
    drawn: dict[str, Axes | Figure] = {
        "forest": figures.forest(effects, analysis.trust.seed_sd),
        "sobol": figures.sobol(effects),
        "marginals": _marginals(records, analysis, tracked),
        "more_than": figures.more_than(analysis.ranking.more_than),
        "learning_curves": figures.learning_curves(tracked),
        "history": figures.history(tracked),
        "calibration": figures.calibration(fit.observed, fit.predicted, fit.predicted_sd),
    }
    if curves.surface is not None:
        drawn["surface"] = figures.pair_surface(curves.surface)
    if analysis.ranking.pairs:
        drawn["interactions"] = figures.interactions(analysis.ranking.interactions)
    if len(curves.epochs) > 1:
        totals = {e.name: curves.over_epochs[e.name] for e in effects if e.name != DUMMY}
        drawn["over_epochs"] = figures.over_epochs(curves.epochs, totals)
    if analysis.configurations.path:
        drawn["ablation"] = figures.ablation(analysis.configurations.default_accuracy, analysis.configurations.path)
    if costed := with_cost(tracked):
        drawn["compute"] = figures.compute(costed)
    return drawn


@charts.unchecked
def interactive(
    tracked: Sequence[Trial], dimensions: Sequence[Dimension], marginals: Mapping[str, Curve]
) -> dict[str, list[charts.Spec]]:
    """The charts of trials by the name of the figure in whose place they stand."""
    if not tracked:
        return {}
    drawn = {
        "parallel": [charts.parallel_coordinates(tracked, dimensions)],
        "learning_curves": [charts.learning_curves(tracked, dimensions)],
        "history": [charts.history(tracked, dimensions)],
    }
    if costed := with_cost(tracked):
        drawn["compute"] = [charts.compute(costed, dimensions)]
    panels = [name for name in marginals if name != DUMMY]
    names = [d.name for d in dimensions]
    drawn["marginals"] = [charts.marginal(tracked, dimensions, names.index(n), marginals[n]) for n in panels]
    return drawn


def with_cost(tracked: Sequence[Trial]) -> list[Trial]:
    """The complete trials whose cost is known."""
    return [t for t in tracked if t.complete and math.isfinite(t.macs)]


def _varied(records: StudyData) -> list[Dimension]:
    """The searched fields, or without a space the fields, that differ between trials."""
    if records.space:
        return [d for d in records.space.dimensions if d.name in records.trials]
    return []


def draw_fixed_designs(fixed_designs: FixedDesigns) -> dict[str, Axes | Figure]:
    """The figures of the fixed designs that have rows, by file name."""
    drawn: dict[str, Axes | Figure] = {}
    if fixed_designs.ranges:
        drawn["tornado"] = figures.tornado(fixed_designs.ranges)
    if fixed_designs.replicates:
        drawn["replicates"] = figures.replicates(fixed_designs.replicates)
    if fixed_designs.others:
        drawn["others"] = figures.replicates(fixed_designs.others)
    return drawn


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, two in a row, with one accuracy axis."""
    rows = math.ceil(count / 2)
    figure = Figure(figsize=(5.6, 2.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 2, sharey=True, squeeze=False).ravel())
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]


def _marginals(records: StudyData, analysis: Analysis, tracked: Sequence[Trial]) -> Figure:
    """One panel a parameter."""
    dimensions = {d.name: d for d in analysis.data.dimensions}
    names = [e.name for e in analysis.ranking.effects if e.name != DUMMY]
    figure, axes = panels(len(names))
    trials = records.trials.loc[[t.number for t in tracked]]
    for name, ax in zip(names, axes, strict=True):
        figures.marginal(analysis.curves.marginals[name], dimensions[name], trials[name].tolist(), tracked, ax)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=9)
    return figure


# ---- files ---------------------------------------------------------------------------------------------------


@figures.styled
def write_report(
    out: Path,
    records: StudyData,
    analysis: Analysis,
    verdicts: Sequence[Verdict],
    *,
    crosschecks: pd.DataFrame | None = None,
    fixed_designs: FixedDesigns = NO_FIXED_DESIGNS,
) -> list[Path]:
    """Write every file of a search's report to `out` and give their paths, report.html first."""
    tracked = tracked_trials(records, analysis.data.budget)
    drawn = draw_fixed_designs(fixed_designs) | draw_search(records, analysis, tracked)
    out.mkdir(parents=True, exist_ok=True)
    importance_table(analysis).to_csv(out / "importance.csv", index=False)
    (out / "verdicts.json").write_text(_json(verdict_table(verdicts)))
    (out / "diagnostics.json").write_text(_json(diagnostics(analysis, crosschecks)))
    trials = records.trials.to_dict(orient="index")
    best, effects = trials[analysis.configurations.best_trial], analysis.ranking.effects
    values = analysis._asdict() | {
        "sentences": answer(analysis, verdicts),
        "cautions": cautions(analysis),
        "ranks": {e.name: rank_label(e, analysis) for e in effects},
        "effect_of": {e.name: e.effect for e in effects},
        "pairs": sorted(analysis.ranking.pairs.items(), key=lambda item: -item[1].mid),
        "verdicts": verdicts,
        "reasons": Counter(t["stop_reason"] for t in trials.values() if t["state"] == "failed").most_common(5),
        "best_test": 100 * best["test_accuracy"],
        "best_values": {d.name: best[d.name] for d in analysis.data.space.dimensions if d.name in best},
        "origins": ", ".join(
            f"{count} {figures.origin_style(origin)[2]}" for origin, count in analysis.data.origins.items()
        ),
        "crosschecks": _cells(crosschecks),
        "fixed_designs": fixed_designs,
        "trained_above": 100 * trained_above(analysis.data.chance),
    }
    order = [e.name for e in effects]
    marginals = {name: analysis.curves.marginals[name] for name in order}
    paths = _write_page(out, "search.html.j2", records, tracked, drawn, values, marginals)
    return paths + [out / name for name in ("importance.csv", "verdicts.json", "diagnostics.json")]


@figures.styled
def write_design_report(out: Path, records: StudyData, fixed_designs: FixedDesigns) -> list[Path]:
    """Write the report of a study without a search: its rows side by side, and no global ranking."""
    origins = ", ".join(sorted(set(records.trials["origin"])))
    sentences = [
        f"This study follows a fixed design ({origins}); {completion_line(records)}.",
        "It compares configurations directly and cannot rank parameters over a whole space: that takes a search.",
    ]
    if fixed_designs.ranges:
        widest = max(fixed_designs.ranges, key=lambda r: r.range)
        sentences.append(
            f"The largest change from one parameter alone is {widest.range:.1f} accuracy points, by "
            f"{words(widest.parameter)} around the baseline {widest.baseline!r}."
        )
    elif rows := [*fixed_designs.replicates, *fixed_designs.others]:
        best = max(rows, key=lambda r: r.mean.mid)
        sentences.append(f"The best row is {best.row!r} with {best.mean.mid:.1f} points on {best.seeds} seeds.")
    tracked = tracked_trials(records, records.budget)
    drawn = draw_fixed_designs(fixed_designs) | {"learning_curves": figures.learning_curves(tracked)}
    values = {"sentences": sentences, "fixed_designs": fixed_designs, "effect_of": {}}
    return _write_page(out, "design.html.j2", records, tracked, drawn, values)


def _write_page(
    out: Path,
    template: str,
    records: StudyData,
    tracked: Sequence[Trial],
    drawn: Mapping[str, Axes | Figure],
    values: dict[str, Any],
    marginals: Mapping[str, Curve] = MappingProxyType({}),
) -> list[Path]:
    """Write the page, its figures and the study's tables."""
    images, paths = save_figures(out, drawn)
    ranges, dimensions = values["fixed_designs"].ranges, _varied(records)
    values = values | {
        "heading": records.study.name,
        "kicker": [
            "Sensitivity report",
            *(records.study.params[k] for k in ("task", "data") if k in records.study.params),
        ],
        "running": ["This study"] if records.study.status == "running" else [],
        "images": images,
        "charts": interactive(tracked, dimensions, marginals),
        "chart_rows": charts.trial_rows(tracked, records.trials, dimensions) if tracked else [],
        "listed": list_trials(records, tracked, dimensions),
        "ranges": figures.by_parameter(ranges),
        "baselines": sorted({r.baseline for r in ranges}),
    }
    (out / "report.html").write_text(TEMPLATES.get_template(template).render(values), encoding="utf-8")
    plain_trials(records.trials).to_csv(out / "trials.csv")
    records.epochs.to_csv(out / "epochs.csv", index=False)
    return [out / name for name in ("report.html", "trials.csv", "epochs.csv")] + paths


def save_figures(out: Path, drawn: Mapping[str, Axes | Figure]) -> tuple[dict[str, str], list[Path]]:
    """Save each figure as PNG and SVG; give the PNGs in base64 by name, and the paths."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, str] = {}
    paths: list[Path] = []
    for name, one in drawn.items():
        figure = one if isinstance(one, Figure) else figures.figure_of(one)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        with Image.open(buffer) as picture:  # 256 colours: a third of the bytes
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)
        images[name] = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        paths += [folder / f"{name}.png", folder / f"{name}.svg"]
    return images, paths


def _cells(crosschecks: pd.DataFrame | None) -> dict[str, list[str]]:
    """Each parameter's row of the cross-check table as text."""
    rows = [] if crosschecks is None else crosschecks.to_dict(orient="records")
    return {str(row["parameter"]): [number(row[label], 2) for label in ESTIMATES] for row in rows}


def _json(value: Any) -> str:
    return json.dumps(_finite(value), indent=2) + "\n"


def _finite(value: Any) -> Any:
    """The same with NaN and infinity as null, because JSON has no word for them."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
