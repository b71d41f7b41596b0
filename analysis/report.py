"""Figures and tables -> files and one self-contained HTML page that a stranger understands."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import figures
from analysis.importance import (
    DUMMY,
    INTERVAL,
    MIN_R2,
    TIE,
    Analysis,
    Effect,
    Interval,
    outcome,
)
from analysis.records import Records
from analysis.verdicts import THRESHOLDS, Verdict

NAMES = {
    "num_glimpses": "number of glimpses",
    "num_scales": "number of scales",
    "location_std": "location (policy) std",
}


class Section(NamedTuple):
    """One part of the page: a heading, HTML paragraphs, figures by file name with captions."""

    title: str
    body: str
    figures: tuple[tuple[str, str], ...] = ()


# ---- plain words ---------------------------------------------------------------------------------------------


def words(name: str) -> str:
    """A parameter's name as a reader would say it."""
    return NAMES.get(name, name.replace("_", " "))


def span(value: Interval, digits: int = 1, unit: str = "") -> str:
    """An interval as text: 4.2 (2.9 to 5.4)."""
    return f"{value.mid:.{digits}f}{unit} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def answer(analysis: Analysis, verdicts: Sequence[Verdict]) -> list[str]:
    """The study's answer in three sentences."""
    real = [e for e in analysis.effects if e.name != DUMMY]
    runs = f"{analysis.counts.used} trials with {analysis.counts.seeds} seed{'s' if analysis.counts.seeds > 1 else ''} each"
    if not analysis.ranked:
        need = analysis.fit.trials_needed
        more = f" About {need} trials in all would probably do." if need else ""
        ceiling = ""
        if analysis.fit.ceiling < MIN_R2:
            ceiling = " Seed noise alone hides most of the differences: more seeds per trial would help more than more trials."
        return [
            f"These {runs} do not support a ranking: predicting trials it has not seen, the fitted surface explains "
            f"{max(analysis.fit.r2, 0):.0%} of the differences in accuracy, and below {MIN_R2:.0%} a ranking would be guesswork.",
            f"What would help: more trials spread over the whole space.{more}{ceiling}",
            f"The best configuration tried is expected to reach {span(analysis.best_accuracy)} points of validation accuracy.",
        ]
    first = [e for e in real if e.rank == 1]
    clear = [e for e in real if e.above_dummy >= TIE[1] and e.effect.mid > analysis.seed_sd.mid]
    inert = [words(e.name) for e in real if e not in clear]
    leader = first[0]
    if len(first) == 1:
        lead = (
            f"On these data {words(leader.name)} matters most: averaged over everything else it moves validation accuracy by "
            f"{span(leader.effect)} points, {leader.effect_in_sd.mid:.1f} times the standard deviation between seeds."
        )
    else:
        names = join(words(e.name) for e in first)
        lead = f"On these data {names} matter most and cannot be told apart; their effects are {join(f'{e.effect.mid:.1f}' for e in first)} accuracy points."
    others = [f"{words(e.name)} ({e.effect.mid:.1f} points)" for e in clear if e not in first]
    second = f"Also larger than seed noise: {join(others)}." if others else "Nothing else stands clear of seed noise."
    if inert:
        second = (
            second[:-1] + f"; not told apart from seed noise or from a parameter without any effect: {join(inert)}."
        )
    counted = [
        f"{sum(v.verdict == kind for v in verdicts)} {kind}"
        for kind in ("confirmed", "refuted", "undecided", "not tested")
        if any(v.verdict == kind for v in verdicts)
    ]
    third = f"Of the case study's four claims, {join(counted)} on these data ({runs}; unseen trials are predicted with R² = {analysis.fit.r2:.2f})."
    return [lead, second, third]


def join(parts: Iterable[str]) -> str:
    """a, b and c."""
    items = list(parts)
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""


# ---- tables --------------------------------------------------------------------------------------------------


def importance_table(analysis: Analysis) -> pd.DataFrame:
    """importance.csv: one row a parameter, the dummy included."""
    rows = []
    for e in analysis.effects:
        row: dict[str, Any] = {"parameter": e.name, "rank": e.rank if analysis.ranked and e.rank else ""}
        for key in ("effect", "effect_in_sd", "first", "total", "first_accuracy", "total_accuracy"):
            value: Interval = getattr(e, key)
            row |= {f"{key}_low": value.low, key: value.mid, f"{key}_high": value.high}
        row["p_above_dummy"] = e.above_dummy
        rows.append(row)
    return pd.DataFrame(rows)


def trial_points(records: Records, analysis: Analysis) -> pd.DataFrame:
    """Each trial's last accuracy (mean and SD over seeds, points), with what it costs and how it ended."""
    table = records.epochs[records.epochs["val_accuracy"].notna()]
    last = table.groupby("trial")["epoch"].transform("max")
    ends = table[table["epoch"] == last].groupby("trial")["val_accuracy"].agg(["mean", "std"])
    points = records.trials.join(ends, how="inner").sort_index()
    points["accuracy"], points["sd"] = 100 * points["mean"], 100 * points["std"]
    points["complete"] = (points["state"] == "complete") & (points["epochs_seen"] >= 0.9 * analysis.budget)
    points["pareto"] = False
    best = -math.inf
    full = points[points["complete"] & points["macs"].notna()].sort_values(
        ["macs", "accuracy"], ascending=[True, False]
    )
    for trial, row in full.iterrows():
        if row["accuracy"] > best:
            best = row["accuracy"]
            points.loc[trial, "pareto"] = True  # pyright: ignore[reportArgumentType,reportCallIssue]
    return points.rename_axis("trial").reset_index()


# ---- figures -------------------------------------------------------------------------------------------------


def draw_all(records: Records, analysis: Analysis) -> dict[str, Figure]:
    """Every figure of the report by file name."""
    with mpl.rc_context(figures.STYLE):
        points = trial_points(records, analysis)
        drawn: dict[str, Figure] = {}

        def keep(name: str, ax: Axes) -> None:
            drawn[name] = ax.figure  # pyright: ignore[reportArgumentType]

        keep("forest", figures.forest(analysis))
        keep("sobol", figures.sobol(analysis))
        drawn["marginals"] = _marginals(analysis, points)
        if analysis.surface is not None:
            keep("surface", figures.pair_surface(analysis.surface))
        if len(analysis.interactions) > 1:
            keep("interactions", figures.interactions(analysis))
        keep("more_than", figures.more_than(analysis))
        if analysis.over_epochs["epoch"].nunique() > 1:
            keep("over_epochs", figures.over_epochs(analysis))
        keep("ablation", figures.ablation(analysis))
        keep("learning_curves", figures.learning_curves(_curves(records)))
        if points["macs"].notna().any() and points["complete"].any():
            keep("compute", figures.compute(points[points["complete"] & points["macs"].notna()]))
        keep("history", figures.history(points))
        keep("calibration", figures.calibration(analysis))
        return drawn


def _marginals(analysis: Analysis, points: pd.DataFrame) -> Figure:
    real = [e for e in analysis.effects if e.name != DUMMY]
    by_name = {d.name: d for d in analysis.dimensions}
    rows = math.ceil(len(real) / 2)
    figure = Figure(figsize=(7.2, 2.7 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, 2, sharey=True, squeeze=False)).ravel()
    for k, effect in enumerate(real):
        raw = points.rename(columns={effect.name: "value"})[["value", "accuracy", "complete"]]
        figures.marginal(analysis.curves[effect.name], by_name[effect.name], raw, axes[k])
        if k % 2:
            axes[k].set_ylabel("")
    for ax in axes[len(real) :]:
        ax.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=9)
    return figure


def _curves(records: Records) -> pd.DataFrame:
    table = records.epochs[records.epochs["val_accuracy"].notna()]
    curves = table.groupby(["trial", "epoch"])["val_accuracy"].mean().mul(100).rename("accuracy").reset_index()
    ended = {trial: outcome(row) for trial, row in records.trials.iterrows()}
    return curves.assign(arm=curves["trial"].map(records.trials["arm"]), outcome=curves["trial"].map(ended))


# ---- the page ------------------------------------------------------------------------------------------------


def write_report(
    out: Path,
    records: Records,
    analysis: Analysis,
    verdicts: Sequence[Verdict],
    *,
    crosschecks: pd.DataFrame | None = None,
) -> list[Path]:
    """Write every file of the report to `out` and give their paths."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures").mkdir(exist_ok=True)
    drawn = draw_all(records, analysis)
    images: dict[str, str] = {}
    paths: list[Path] = []
    for name, figure in drawn.items():
        with mpl.rc_context(figures.STYLE):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            figure.savefig(out / "figures" / f"{name}.svg", metadata={"Date": None})
        (out / "figures" / f"{name}.png").write_bytes(buffer.getvalue())
        images[name] = base64.b64encode(buffer.getvalue()).decode()
        paths += [out / "figures" / f"{name}.png", out / "figures" / f"{name}.svg"]
    importance_table(analysis).to_csv(out / "importance.csv", index=False)
    records.epochs.to_csv(out / "epochs.csv", index=False)
    _plain(records.trials).to_csv(out / "trials.csv")
    (out / "verdicts.json").write_text(json.dumps(_verdicts_json(verdicts), indent=2) + "\n")
    (out / "diagnostics.json").write_text(json.dumps(diagnostics(analysis, crosschecks), indent=2) + "\n")
    page = render(records, analysis, verdicts, images, crosschecks)
    (out / "report.html").write_text(page, encoding="utf-8")
    names = ("report.html", "importance.csv", "verdicts.json", "diagnostics.json", "trials.csv", "epochs.csv")
    return [out / name for name in names] + paths


def _plain(trials: pd.DataFrame) -> pd.DataFrame:
    table = trials.copy()
    for column in ("seeds", "test_accuracies"):
        if column in table:
            table[column] = [" ".join(str(v) for v in values) for values in table[column]]
    return table


def _verdicts_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    listed = [{**v._asdict(), "estimate": v.estimate._asdict() if v.estimate else None} for v in verdicts]
    return {
        "thresholds": {name: {"value": value, "reason": reason} for name, (value, reason) in THRESHOLDS.items()},
        "claims": listed,
    }


def diagnostics(analysis: Analysis, crosschecks: pd.DataFrame | None) -> dict[str, Any]:
    """diagnostics.json: everything that tells how far the answers can be trusted."""
    fit = analysis.fit
    return {
        "study": analysis.name,
        "ranked": analysis.ranked,
        "r2": fit.r2,
        "r2_needed": MIN_R2,
        "r2_ceiling_from_seed_noise": fit.ceiling,
        "r2_with_half_of_the_trials": None if math.isnan(fit.r2_half) else fit.r2_half,
        "trials_needed": fit.trials_needed,
        "coverage_of_90_percent_intervals": fit.coverage,
        "held_out_trials": fit.held_out,
        "rhat_max": analysis.mixing,
        "trials": analysis.counts._asdict(),
        "arms": analysis.arms,
        "not_varied": list(analysis.constant),
        "budget_epochs": analysis.budget,
        "evaluation_size": analysis.evaluation_size,
        "seed_sd_points": analysis.seed_sd._asdict(),
        "seed_sd_measured": analysis.seed_sd_known,
        "infeasible_share": analysis.infeasible_share,
        "extrapolation_share": analysis.extrapolation_share,
        "biased_sample": analysis.biased,
        "warnings": list(analysis.warnings),
        "crosschecks": None if crosschecks is None else crosschecks.to_dict(orient="records"),
    }


def render(
    records: Records,
    analysis: Analysis,
    verdicts: Sequence[Verdict],
    images: dict[str, str],
    crosschecks: pd.DataFrame | None,
) -> str:
    """The whole page. Everything that comes from a study is escaped."""
    e = html.escape
    sentences = " ".join(e(s) for s in answer(analysis, verdicts))
    body = [
        f"<header><p class=kicker>Sensitivity report</p><h1>{e(analysis.name)}</h1><p class=answer>{sentences}</p></header>"
    ]
    for section in sections(records, analysis, verdicts, crosschecks):
        pictures = "".join(_picture(images[name], name, caption) for name, caption in section.figures if name in images)
        body.append(f"<section><h2>{e(section.title)}</h2>{section.body}{pictures}</section>")
    return _PAGE.replace("{{title}}", e(analysis.name)).replace("{{body}}", "\n".join(body))


def _picture(data: str, name: str, caption: str) -> str:
    return (
        f'<figure><div class=scroll><img src="data:image/png;base64,{data}" alt="{html.escape(caption, quote=True)}"></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def table_html(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls inside itself on a narrow screen."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def sections(
    records: Records, analysis: Analysis, verdicts: Sequence[Verdict], crosschecks: pd.DataFrame | None
) -> list[Section]:
    """The page's parts in reading order."""
    return [
        _effects_section(analysis),
        _verdict_section(verdicts),
        _marginal_section(analysis),
        _pair_section(analysis),
        _comparison_section(analysis),
        _epoch_section(analysis),
        _tuning_section(analysis),
        _runs_section(records, analysis),
        _diagnostics_section(analysis, crosschecks),
        _method_section(analysis),
    ]


def _caution(text: str) -> str:
    return f"<p class=caution>{html.escape(text)}</p>"


def _effects_section(analysis: Analysis) -> Section:
    notes = ""
    if not analysis.ranked:
        notes += _caution(
            f"No ranking: cross-validated R² is {analysis.fit.r2:.2f}, and {MIN_R2} is needed. The picture shows what can be said so far."
        )
    if analysis.biased:
        notes += _caution(
            "Biased sample: most trials were chosen by the optimiser, which looks where accuracy is already high. Effects over the whole "
            "range rest on the model there, and the ranking may be wrong; a study with a Sobol arm would settle it."
        )
    notes += "".join(_caution(w) for w in analysis.warnings)
    rows = [
        (
            _rank(analysis, e),
            words(e.name),
            span(e.effect),
            span(e.effect_in_sd),
            span(e.first, 2),
            span(e.total, 2),
            f"{e.above_dummy:.0%}" if e.name != DUMMY else "",
        )
        for e in analysis.effects
    ]
    table = table_html(
        (
            "rank",
            "parameter",
            "effect (points)",
            "effect (seed SDs)",
            "first-order index",
            "total index",
            "P(more than dummy)",
        ),
        rows,
    )
    text = (
        "<p>Each line shows how many points of accuracy lie between a parameter's best and worst value, all others averaged over "
        f"the searched space, with a {INTERVAL:.0%} interval. Parameters are in order of total Sobol index (next figure), which also counts "
        "what a parameter does together with others.</p>"
    )
    captions = (
        (
            "forest",
            "Effect of each parameter on validation accuracy at the full budget, with its interval. Grey band: one standard deviation between seeds. Dotted: where a made-up parameter without effect ends.",
        ),
        (
            "sobol",
            "Share of the variance of logit accuracy over the searched space: alone (first order) and with interactions (total).",
        ),
    )
    return Section("What matters, and by how much", notes + text + table, captions)


def _rank(analysis: Analysis, effect: Effect) -> str:
    if effect.name == DUMMY or not analysis.ranked:
        return "–"
    tied = sum(e.rank == effect.rank for e in analysis.effects) > 1
    return f"{effect.rank}{' (tied)' if tied else ''}"


def _verdict_section(verdicts: Sequence[Verdict]) -> Section:
    rows = [
        (v.claim, v.verdict, "–" if v.probability is None else f"{v.probability:.0%}", v.evidence) for v in verdicts
    ]
    fixed = table_html(("threshold", "value", "meaning"), [(k, v, why) for k, (v, why) in THRESHOLDS.items()])
    text = "<p>The case study by Fang, Tian and Yang drew four conclusions from single runs. Thresholds were fixed in the code beforehand.</p>"
    return Section(
        "The case study's claims",
        text + table_html(("claim", "verdict", "probability it holds", "evidence"), rows) + fixed,
    )


def _marginal_section(analysis: Analysis) -> Section:
    share = ""
    if analysis.constant:
        share += (
            f"<p>Not varied, so nothing can be said of: {html.escape(join(words(n) for n in analysis.constant))}.</p>"
        )
    text = "<p>Mean accuracy as one parameter changes, averaged over the others, with its band. Points are the trials themselves: they scatter because everything else differs too. Hatched: no or one trial beyond, the curve extrapolates.</p>"
    return Section(
        "How each parameter acts",
        text + share,
        (("marginals", "Marginal accuracy of each parameter with 90% band over the raw trials."),),
    )


def _pair_section(analysis: Analysis) -> Section:
    best = sorted(analysis.pair_intervals.items(), key=lambda item: -item[1].mid)[:5]
    table = table_html(
        ("pair", "share of variance (%)"),
        [(f"{words(a)} × {words(b)}", span(Interval(*(100 * v for v in value)))) for (a, b), value in best],
    )
    higher = f"<p>Interactions of three parameters together: {span(Interval(*(100 * v for v in analysis.higher_order)))} % of the variance.</p>"
    return Section(
        "Which parameters act together",
        "<p>An interaction is the part of the variance that two parameters have only in combination.</p>"
        + table
        + higher,
        (
            ("surface", "Mean accuracy over two parameters, all others averaged over."),
            ("interactions", "Median share of variance of every pair's interaction."),
        ),
    )


def _comparison_section(analysis: Analysis) -> Section:
    text = f"<p>The chance that one parameter's total index is larger than another's. Between {TIE[0]:.0%} and {TIE[1]:.0%} they are tied: these data do not say which matters more.</p>"
    return Section(
        "Does this one matter more than that one?",
        text,
        (("more_than", "Probability that the row's parameter matters more than the column's."),),
    )


def _epoch_section(analysis: Analysis) -> Section:
    text = "<p>What decides early is not always what decides late; a ranking from short runs can be the wrong one.</p>"
    return Section(
        "Importance against epoch",
        text,
        (("over_epochs", "Total Sobol index at several epochs, with 90% bands for the first five."),),
    )


def _tuning_section(analysis: Analysis) -> Section:
    rows = [(words(g.name), _value(g.default), _value(g.best), span(g.gain)) for g in analysis.tunability]
    note = (
        ""
        if analysis.default_inside
        else _caution("The default lies outside the searched space in part; it was moved to the nearest edge.")
    )
    text = "<p>What changing one parameter alone can gain over the default configuration, and the path from the default to the best configuration tried, one change at a time.</p>"
    return Section(
        "What is worth tuning",
        text + note + table_html(("parameter", "default", "better", "gain (points)"), rows),
        (
            (
                "ablation",
                f"Expected accuracy along the path from the default to trial {analysis.best_trial}, the best configuration tried.",
            ),
        ),
    )


def _runs_section(records: Records, analysis: Analysis) -> Section:
    c = analysis.counts
    rows = [
        ("complete", c.complete),
        ("stopped early", c.stopped),
        ("diverged", c.diverged),
        ("failed", c.failed),
        ("running", c.running),
        ("all", c.total),
    ]
    text = "<p>Every trial is counted. Stopped trials inform the surface up to the epoch they reached; diverged ones count as chance in the expected accuracy.</p>"
    return Section(
        "The trials",
        text + table_html(("trials", "number"), rows),
        (
            ("learning_curves", "Validation accuracy of every trial against epoch, and how it ended."),
            (
                "compute",
                "Accuracy of full-budget trials against compute, bars: one SD between seeds, line: Pareto front.",
            ),
            ("history", "Last accuracy of every trial in order, and the best full-budget one so far."),
        ),
    )


def _diagnostics_section(analysis: Analysis, crosschecks: pd.DataFrame | None) -> Section:
    fit = analysis.fit
    rows = [
        (
            "R² on unseen trials (grouped cross-validation)",
            f"{fit.r2:.2f} of at most {fit.ceiling:.2f} that seed noise allows",
        ),
        ("90% intervals that held the unseen result", f"{fit.coverage:.0%} of {fit.held_out}"),
        (
            "seed standard deviation",
            f"{span(analysis.seed_sd, 2)} points"
            + ("" if analysis.seed_sd_known else " (one seed a trial: estimated by the model, not measured)"),
        ),
        ("space ruled out by constraints", f"{analysis.infeasible_share:.0%}"),
        ("space where the surface is mostly extrapolation", f"{analysis.extrapolation_share:.0%}"),
        ("sampler's largest R-hat", f"{analysis.mixing:.2f}"),
    ]
    body = table_html(("check", "value"), rows)
    if crosschecks is not None and len(crosschecks):
        body += "<p>Other estimators on the same trials, with what each of them estimates:</p>" + table_html(
            list(crosschecks.columns), crosschecks.round(3).itertuples(index=False)
        )
    return Section(
        "How far to trust this",
        body,
        (("calibration", "Held-out trials: predicted against reached, with 90% intervals."),),
    )


def _method_section(analysis: Analysis) -> Section:
    text = (
        "<p>A Gaussian process over unit-cube configuration and log epoch is fitted to the logit of accuracy, with a trial effect and seed noise "
        "measured from the differences between seeds of the same trial. Its hyperparameters are sampled, not fixed. Sobol indices are computed on "
        "joint posterior draws (Marrel et al. 2009; Le Gratiet et al. 2014).</p>"
    )
    return Section("How each number was computed", text)


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}} – sensitivity report</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 52rem; padding: 1.5rem 1.2rem 4rem; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1a1a1a; background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .8rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid #ddd; }
.kicker { margin: 0; color: #666; font-size: .85rem; }
.answer { font-size: 1.1rem; }
.caution { border-left: 4px solid #D55E00; background: #fdf3ec; padding: .5rem .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e4e4e4; overflow-wrap: normal; }
figure { margin: 1.4rem 0; }
img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .88rem; color: #555; margin-top: .3rem; }
@media (max-width: 600px) { img { max-width: none; width: 34rem; } body { padding: 1rem .8rem 3rem; } }
@media print { body { max-width: none; font-size: 11pt; } figure, table { break-inside: avoid; } h2 { break-after: avoid; } }
</style></head><body>
{{body}}
</body></html>
"""
