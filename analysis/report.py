"""Figures and tables -> files and one self-contained HTML page that a stranger understands."""

from __future__ import annotations

# pandas' own annotations are unions that its indexing never returns here, so these checks only raise false alarms.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAssignmentType=false
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
from analysis.crosschecks import ESTIMATES
from analysis.fixed_designs import Companions, describe
from analysis.importance import (
    DRAWS_EACH,
    DUMMY,
    HYPERDRAWS,
    INTERVAL,
    MIN_R2,
    TIE,
    Analysis,
    Effect,
    Interval,
    outcome,
    why_not_ranked,
)
from analysis.load import StudyData, StudyRun, plain_trials
from analysis.verdicts import THRESHOLDS, Verdict
from ramcore.cost import pareto_front
from ramcore.space import shown, words


class Section(NamedTuple):
    """One part of the page: a heading, escaped HTML, figures by file name with captions.

    intro comes first, then the first `lead` figures, the body and the other figures.
    """

    title: str
    body: str
    figures: tuple[tuple[str, str], ...] = ()
    intro: str = ""
    lead: int = 0


# ---- plain words ---------------------------------------------------------------------------------------------


def span(value: Interval, digits: int = 1, unit: str = "") -> str:
    """An interval as text: 4.2 (2.9 to 5.4)."""
    return f"{value.mid:.{digits}f}{unit} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def answer(analysis: Analysis, verdicts: Sequence[Verdict]) -> list[str]:
    """The study's answer in three sentences."""
    real = [e for e in analysis.effects if e.name != DUMMY]
    runs = (
        f"{analysis.counts.used} trials with {analysis.counts.seeds} "
        f"seed{'s' if analysis.counts.seeds > 1 else ''} each"
    )
    if not analysis.ranked:
        need = analysis.fit.trials_needed
        more = f" About {need} trials in all would probably do." if need else ""
        ceiling = ""
        if analysis.fit.ceiling < MIN_R2:
            ceiling = (
                " Seed noise alone hides most of the differences: more seeds per trial would help more than "
                "more trials."
            )
        return [
            f"These {runs} do not support a ranking: {why_not_ranked(analysis)}.",
            f"What would help: more trials spread over the whole space.{more}{ceiling}",
            f"The best configuration tried is expected to reach {span(analysis.best_accuracy)} points of validation "
            "accuracy.",
        ]
    first = [e for e in real if e.rank == 1]
    apart = [e for e in real if e.above_dummy >= TIE[1]]  # from a parameter without effect
    clear = [e for e in apart if e.effect_in_sd.low > 1]
    small, inert = [e for e in apart if e not in clear], [e for e in real if e not in apart]
    leader = first[0]
    if leader not in apart:
        lead = "On these data no parameter can be told apart from one without any effect."
    elif len(first) == 1:
        lead = (
            f"On these data {words(leader.name)} matters most: averaged over everything else it moves validation "
            "accuracy by "
            f"{span(leader.effect)} points, {leader.effect_in_sd.mid:.1f} times the standard deviation between seeds."
        )
    else:
        names = join(words(e.name) for e in first)
        lead = (
            f"On these data {names} matter most and cannot be told apart; their effects are "
            f"{join(f'{e.effect.mid:.1f}' for e in first)} accuracy points."
        )

    def listed(effects: list[Effect]) -> str:
        return join(f"{words(e.name)} ({e.effect.mid:.1f} points)" for e in effects)

    parts: list[str] = []
    if others := [e for e in clear if e not in first]:
        parts.append(f"also larger than seed noise: {listed(others)}")
    if others := [e for e in small if e not in first]:
        parts.append(f"an effect, but not surely more than one seed standard deviation: {listed(others)}")
    if inert and leader in apart:
        parts.append(f"not told apart from a parameter without any effect: {join(words(e.name) for e in inert)}")
    second = "; ".join(parts) + "." if parts else "Nothing else was varied."
    second = second[0].upper() + second[1:]
    counted = [
        f"{sum(v.verdict == kind for v in verdicts)} {kind}"
        for kind in ("confirmed", "refuted", "undecided", "not tested")
        if any(v.verdict == kind for v in verdicts)
    ]
    third = (
        f"Of the case study's four claims, {join(counted)} on these data ({runs}; unseen trials are predicted "
        f"with R² = {analysis.fit.r2:.2f}{'; a biased sample, see below' if analysis.biased else ''})."
    )
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
        for key in ("with_divergence", "failure"):
            value = getattr(e, key) or Interval(math.nan, math.nan, math.nan)
            row |= {f"{key}_low": value.low, key: value.mid, f"{key}_high": value.high}
        row["p_above_dummy"] = e.above_dummy
        rows.append(row)
    return pd.DataFrame(rows)


def trial_points(records: StudyData, analysis: Analysis) -> pd.DataFrame:
    """Each trial's last accuracy (mean and SD over seeds, points), with what it costs and how it ended."""
    table = records.epochs[records.epochs["val_accuracy"].notna()]
    last = table.groupby("trial")["epoch"].transform("max")
    ends = table[table["epoch"] == last].groupby("trial")["val_accuracy"].agg(["mean", "std"])
    points = records.trials.join(ends, how="inner").sort_index()
    points["accuracy"], points["sd"] = 100 * points["mean"], 100 * points["std"]
    points["complete"] = (points["state"] == "complete") & (points["epochs_seen"] >= 0.9 * analysis.budget)
    points["pareto"] = False
    full = points[points["complete"] & points["macs"].notna()]
    front = pareto_front(full["macs"].tolist(), full["accuracy"].tolist())
    points.loc[full.index[front], "pareto"] = True
    return points.rename_axis("trial").reset_index()


# ---- figures -------------------------------------------------------------------------------------------------


def draw_all(records: StudyData, analysis: Analysis, companions: Companions | None = None) -> dict[str, Figure]:
    """Every figure of the report by file name."""
    with mpl.rc_context(figures.STYLE):
        points = trial_points(records, analysis)
        drawn = {} if companions is None else _draw_companions(companions)

        def keep(name: str, ax: Axes) -> None:
            drawn[name] = _figure(ax)

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
        if analysis.ablation:
            keep("ablation", figures.ablation(analysis))
        keep("learning_curves", figures.learning_curves(_curves(records)))
        if points["macs"].notna().any() and points["complete"].any():
            keep("compute", figures.compute(points[points["complete"] & points["macs"].notna()]))
        keep("history", figures.history(points))
        keep("calibration", figures.calibration(analysis))
        return drawn


def _draw_companions(companions: Companions) -> dict[str, Figure]:
    drawn: dict[str, Figure] = {}
    if len(companions.ranges):
        drawn["tornado"] = _figure(figures.tornado(companions))
    if len(companions.replicates):
        drawn["replicates"] = _figure(figures.replicates(companions))
    return drawn


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _marginals(analysis: Analysis, points: pd.DataFrame) -> Figure:
    real = [e for e in analysis.effects if e.name != DUMMY]
    by_name = {d.name: d for d in analysis.dimensions}
    rows = math.ceil(len(real) / 2)
    figure = Figure(figsize=(6.6, 2.5 * rows), layout="constrained")
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


def _curves(records: StudyData) -> pd.DataFrame:
    table = records.epochs[records.epochs["val_accuracy"].notna()]
    curves = table.groupby(["trial", "epoch"])["val_accuracy"].mean().mul(100).rename("accuracy").reset_index()
    ended = {trial: outcome(row) for trial, row in records.trials.iterrows()}
    return curves.assign(origin=curves["trial"].map(records.trials["origin"]), outcome=curves["trial"].map(ended))


# ---- files ---------------------------------------------------------------------------------------------------


def write_report(
    out: Path,
    records: StudyData,
    analysis: Analysis,
    verdicts: Sequence[Verdict],
    *,
    crosschecks: pd.DataFrame | None = None,
    companions: Companions | None = None,
) -> list[Path]:
    """Write every file of the report to `out` and give their paths, report.html first."""
    drawn = draw_all(records, analysis, companions)
    page = [
        _effects_section(analysis),
        _verdict_section(verdicts),
        _sobol_section(analysis),
        _marginal_section(analysis),
        _pair_section(analysis),
        _comparison_section(analysis),
        _epoch_section(analysis),
        _tuning_section(analysis, companions),
        *_companion_sections(companions, analysis),
        _runs_section(records, analysis),
        _diagnostics_section(analysis, crosschecks),
        _method_section(analysis),
    ]
    out.mkdir(parents=True, exist_ok=True)
    importance_table(analysis).to_csv(out / "importance.csv", index=False)
    (out / "verdicts.json").write_text(json.dumps(_verdicts_json(verdicts), indent=2) + "\n")
    (out / "diagnostics.json").write_text(json.dumps(_finite(diagnostics(analysis, crosschecks)), indent=2) + "\n")
    files = [out / name for name in ("importance.csv", "verdicts.json", "diagnostics.json")]
    return _write_page(out, records, answer(analysis, verdicts), page, drawn) + files


def write_design_report(out: Path, records: StudyData, companions: Companions) -> list[Path]:
    """The report of a study without a search: its OFAT or replicate tables, and no global ranking."""
    sentences = [
        f"This study follows a fixed design ({', '.join(sorted(set(records.trials['origin'])))}); {describe(records)}.",
        "It compares configurations directly and cannot rank parameters over a whole space: that takes a search.",
    ]
    if len(companions.ranges):
        top = companions.ranges.sort_values("range", ascending=False).iloc[0]
        sentences.append(
            f"The largest change from one parameter alone is {top['range']:.1f} accuracy points, by "
            f"{words(str(top['parameter']))} around "
            f"the baseline {top['baseline']!r}."
        )
    elif len(companions.replicates):
        top = companions.replicates.sort_values("accuracy", ascending=False).iloc[0]
        sentences.append(f"The best row is {top['row']!r} with {top['accuracy']:.1f} points on {top['seeds']} seeds.")
    with mpl.rc_context(figures.STYLE):
        drawn = _draw_companions(companions)
        drawn["learning_curves"] = _figure(figures.learning_curves(_curves(records)))
    page = [
        *_companion_sections(companions, None),
        Section(
            "The trials",
            "",
            (("learning_curves", "Validation accuracy of every trial against epoch, and how it ended."),),
        ),
    ]
    return _write_page(out, records, sentences, page, drawn)


def _write_page(
    out: Path, records: StudyData, sentences: Sequence[str], page: Sequence[Section], drawn: dict[str, Figure]
) -> list[Path]:
    (out / "figures").mkdir(parents=True, exist_ok=True)
    images: dict[str, str] = {}
    paths: list[Path] = []
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        with mpl.rc_context(figures.STYLE):
            figure.savefig(buffer, format="png")
            figure.savefig(out / "figures" / f"{name}.svg", metadata={"Date": None})
        (out / "figures" / f"{name}.png").write_bytes(buffer.getvalue())
        images[name] = base64.b64encode(buffer.getvalue()).decode()
        paths += [out / "figures" / f"{name}.png", out / "figures" / f"{name}.svg"]
    records.epochs.to_csv(out / "epochs.csv", index=False)
    # A field may hold text in one trial and a number in another (a setting that changed type): Parquet wants one.
    mixed = [c for c in records.epochs.columns if len(set(map(type, records.epochs[c]))) > 1]
    records.epochs.astype({c: str for c in mixed}).to_parquet(out / "epochs.parquet", index=False)
    plain_trials(records.trials).to_csv(out / "trials.csv")
    (out / "report.html").write_text(render(records.study, sentences, page, images), encoding="utf-8")
    return [out / name for name in ("report.html", "trials.csv", "epochs.csv", "epochs.parquet")] + paths


def _verdicts_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    listed = [{**v._asdict(), "estimate": v.estimate._asdict() if v.estimate else None} for v in verdicts]
    fixed = {name: {"value": value, "reason": reason} for name, (value, reason) in THRESHOLDS.items()}
    return {"thresholds": fixed, "claims": listed}


def _finite(value: Any) -> Any:
    """The same with NaN and infinity as null, which JSON has no word for."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def diagnostics(analysis: Analysis, crosschecks: pd.DataFrame | None) -> dict[str, Any]:
    """diagnostics.json: everything that tells how far the answers can be trusted."""
    fit = analysis.fit
    return {
        "study": analysis.name,
        "ranked": analysis.ranked,
        "r2": fit.r2,
        "r2_needed": MIN_R2,
        "r2_ceiling_from_seed_noise": fit.ceiling,
        "r2_with_half_of_the_trials": fit.r2_half,
        "trials_needed": fit.trials_needed,
        "coverage_of_90_percent_intervals": fit.coverage,
        "held_out_trials": fit.held_out,
        "rhat_max": analysis.mixing,
        "trials": analysis.counts._asdict(),
        "origins": analysis.origins,
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
        "crosschecks_estimate": None if crosschecks is None else ESTIMATES,
    }


# ---- the page ------------------------------------------------------------------------------------------------


def render(study: StudyRun, sentences: Sequence[str], page: Sequence[Section], images: dict[str, str]) -> str:
    """The whole page. Everything that comes from a study is escaped."""
    e = html.escape
    facts = [study.params.get(key, "") for key in ("task", "data")]
    kicker = "Sensitivity report" + "".join(f" · {e(fact)}" for fact in facts if fact)
    state = (
        _caution("This study is still running: everything here is provisional.") if study.status == "running" else ""
    )
    body = [
        f"<header><p class=kicker>{kicker}</p><h1>{e(study.name)}</h1>{state}"
        + "".join(f"<p class=answer>{e(sentence)}</p>" for sentence in sentences)
        + "</header>"
    ]
    for section in page:
        pictures = [_picture(images[name], caption) for name, caption in section.figures if name in images]
        first = "".join(pictures[: section.lead])
        rest = "".join(pictures[section.lead :])
        body.append(f"<section><h2>{e(section.title)}</h2>{section.intro}{first}{section.body}{rest}</section>")
    # The body last: a study named {{body}} must not be filled in.
    return _PAGE.replace("{{title}}", e(study.name).replace("{", "&#123;")).replace("{{body}}", "\n".join(body), 1)


def _picture(data: str, caption: str) -> str:
    return (
        f'<figure><div class=scroll><img src="data:image/png;base64,{data}" '
        f'alt="{html.escape(caption, quote=True)}"></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def table_html(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls inside itself on a narrow screen; every cell escaped."""
    head = "".join(f"<th scope=col>{html.escape(h)}</th>" for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _caution(text: str) -> str:
    return f"<p class=caution>{html.escape(text)}</p>"


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _effects_section(analysis: Analysis) -> Section:
    intro = "".join(_caution(text) for text in cautions(analysis)) + _paragraph(
        "Each line is a parameter's effect: how many points of validation accuracy lie between its best and its worst "
        f"value, everything else averaged over the searched space, with a {INTERVAL:.0%} interval. An effect inside "
        "the grey band is no larger than the luck of a seed. The dotted line is how far a made-up parameter that does "
        "nothing, the dummy, can get; how surely a parameter matters more than that is in the table, by total Sobol "
        "indices."
    )
    diverged = any(e.with_divergence for e in analysis.effects)
    headers = ["rank", "parameter", "effect (points)", "effect (seed SDs)", "total Sobol index", "P(more than dummy)"]
    rows = [
        [
            _rank(analysis, e),
            words(e.name),
            span(e.effect),
            span(e.effect_in_sd),
            span(e.total, 2),
            "" if e.name == DUMMY else f"{e.above_dummy:.0%}",
        ]
        for e in analysis.effects
    ]
    if diverged:
        headers.append("effect, divergence counted")
        for row, e in zip(rows, analysis.effects, strict=True):
            row.append(span(e.with_divergence) if e.with_divergence else "")
    after = _paragraph(
        "A parameter's rank is one more than the number of those that matter more with a probability of "
        f"{TIE[1]:.0%} or more, by their total Sobol indices (next section); equal ranks are ties. The effect is the "
        "difference between the values that are best and worst on average over the draws, so that of a parameter "
        "without effect scatters about zero."
    )
    if diverged:
        after += _paragraph(
            f"{analysis.counts.diverged} trials diverged. Effects are of runs that train; the last column counts a run "
            "that diverges as guessing, with the chance of it modelled."
        )
    caption = (
        "Effect of each parameter on validation accuracy at the full budget, with its interval. Grey band: one "
        "standard "
        "deviation between seeds. Dotted: how far a parameter without effect can get."
    )
    return Section(
        "What matters, and by how much", after + table_html(headers, rows), (("forest", caption),), intro, lead=1
    )


def _sobol_section(analysis: Analysis) -> Section:
    text = _paragraph(
        "A Sobol index is a share of all differences in accuracy over the searched space: first order, what a "
        "parameter "
        "makes alone; total, what would vanish if it were known, counting what it makes together with others. The "
        "logit "
        "scale treats 90 to 95 and 98 to 99 points as steps of similar size; the accuracy scale counts plain points."
    )
    headers = ("parameter", "first order, logit", "total, logit", "first order, accuracy", "total, accuracy")
    rows = [
        (words(e.name), span(e.first, 2), span(e.total, 2), span(e.first_accuracy, 2), span(e.total_accuracy, 2))
        for e in analysis.effects
    ]
    caption = "Share of the variance of logit accuracy: alone (first order) and together with others (total)."
    return Section("Shares of the differences", table_html(headers, rows), (("sobol", caption),), text, lead=1)


def cautions(analysis: Analysis) -> list[str]:
    """What a reader has to know before believing anything."""
    found: list[str] = []
    if not analysis.ranked:
        found.append(
            f"No ranking: {why_not_ranked(analysis)}. What is drawn shows what can be said so far, not an order."
        )
    if analysis.biased:
        found.append(
            "Biased sample: the optimiser chose most trials, so they crowd where accuracy was already high. Over the "
            "rest of the ranges the "
            "effects rest on the model, and the ranking may be wrong. A study with space-filling (Sobol) trials would "
            "settle it."
        )
    if analysis.fit.coverage < 0.75:
        found.append(
            f"Intervals may be too narrow: only {analysis.fit.coverage:.0%} of the unseen results fell inside their "
            "90% intervals."
        )
    if analysis.extrapolation_share > 0.25:
        found.append(
            f"Over {analysis.extrapolation_share:.0%} of the space the surface says little more than the average over "
            "the space does: too few trials lie near."
        )
    if not analysis.seed_sd_known:
        found.append("One seed a trial: seed noise could not be measured and is the model's own estimate.")
    if analysis.mixing > 1.2:
        found.append(
            f"The sampler had not fully settled (R-hat {analysis.mixing:.2f}); small differences between intervals "
            "mean nothing."
        )
    return found + list(analysis.warnings)


def _rank(analysis: Analysis, effect: Effect) -> str:
    if effect.name == DUMMY or not analysis.ranked:
        return "-"
    tied = sum(e.rank == effect.rank for e in analysis.effects) > 1
    return f"{effect.rank}{' (tied)' if tied else ''}"


def _verdict_section(verdicts: Sequence[Verdict]) -> Section:
    rows = [
        (v.claim, v.verdict, "-" if v.probability is None else f"{v.probability:.0%}", v.evidence) for v in verdicts
    ]
    fixed = table_html(("threshold", "value", "meaning"), [(k, v, why) for k, (v, why) in THRESHOLDS.items()])
    text = _paragraph(
        "The case study this project starts from (Fang, Tian and Yang) drew four conclusions from one run a "
        "configuration. Here is what these "
        "data say of them, on this study's task and budget. A claim is judged over the whole searched range, "
        "everything else averaged over; what the values of its own table do is said beside that."
    )
    cited = _paragraph("The thresholds were fixed in the code before any data were seen:")
    return Section(
        "The case study's claims",
        text + table_html(("claim", "verdict", "probability it holds", "evidence"), rows) + cited + fixed,
    )


def _marginal_section(analysis: Analysis) -> Section:
    text = _paragraph(
        "Mean accuracy as one parameter changes, averaged over the others, with a 90% band. The points are the trials "
        "themselves; they scatter "
        "because everything else differs between them. Hatched: at most one full-budget trial lies beyond, so the "
        "curve extrapolates."
    )
    if analysis.constant:
        text += _paragraph(
            f"Not varied in these trials, so nothing can be said of: {join(words(n) for n in analysis.constant)}."
        )
    caption = "Marginal accuracy of each parameter with its 90% band, over the raw trials."
    return Section("How each parameter acts", text, (("marginals", caption),))


def _pair_section(analysis: Analysis) -> Section:
    best = sorted(analysis.pair_intervals.items(), key=lambda item: -item[1].mid)[:5]
    rows = [(f"{words(a)} and {words(b)}", span(_percent(value))) for (a, b), value in best]
    text = _paragraph(
        "An interaction is the part of the differences that two parameters make only in combination. The largest five:"
    )
    higher = _paragraph(f"Three parameters in combination: {span(_percent(analysis.higher_order))} % of the variance.")
    return Section(
        "Which parameters act together",
        text + table_html(("pair", "share of variance (%)"), rows) + higher
        if rows
        else _paragraph("Only one parameter was varied."),
        (
            ("surface", "Mean accuracy over two parameters, all others averaged over (points)."),
            (
                "interactions",
                "Share of the variance of logit accuracy that each pair's interaction has (posterior median).",
            ),
        ),
    )


def _percent(value: Interval) -> Interval:
    return Interval(*(100 * v for v in value))


def _comparison_section(analysis: Analysis) -> Section:
    text = _paragraph(
        f"The chance that one parameter's total index is larger than another's. Between {TIE[0]:.0%} and {TIE[1]:.0%} "
        "the two are tied: these data do not "
        "say which matters more."
    )
    return Section(
        "Does this one matter more than that one?",
        text,
        (("more_than", "Probability that the row's parameter matters more than the column's."),),
    )


def _epoch_section(analysis: Analysis) -> Section:
    text = _paragraph(
        "What decides early is not always what decides late, so a ranking from short runs can be the wrong one."
    )
    caption = "Total Sobol index at several epochs, with 90% bands for the first five parameters."
    return Section("Importance against epoch", text, (("over_epochs", caption),))


def _tuning_section(analysis: Analysis, companions: Companions | None) -> Section:
    rows = [(words(g.name), shown(g.default), shown(g.best), span(g.gain)) for g in analysis.tunability]
    text = _paragraph(
        "What changing one parameter alone is expected to gain over the default, and the path from the default to the "
        "configuration tried that the surface expects most of, one change at a time, the one that gains most first."
    )
    if not analysis.ablation:
        text += _paragraph("Here that path has no step: of all tried, the surface expects most of the default.")
    note = (
        ""
        if analysis.default_inside
        else _caution(
            "Part of the default lies outside the searched space or is not saved; there the nearest edge or the "
            "middle was taken."
        )
    )
    again = ""
    if companions is not None and len(companions.replicates):
        named = companions.replicates[companions.replicates["row"].str.match(r"^(best of|default)")]
        again = "".join(
            _paragraph(
                f"Run again on {r.seeds} fresh seeds, {r.row}: {r.accuracy:.1f} ({r.low:.1f} to {r.high:.1f}) points."
            )
            for r in named.itertuples()
        )
    caption = (
        f"Expected accuracy along the path from the default to trial {analysis.best_trial}, the best configuration "
        "tried, with 90% intervals. "
        "Each step keeps the ones before it."
    )
    return Section(
        "What is worth tuning",
        text + note + table_html(("parameter", "default", "better", "gain (points)"), rows) + again,
        (("ablation", caption),),
    )


def _companion_sections(companions: Companions | None, analysis: Analysis | None) -> list[Section]:
    if companions is None:
        return []
    out: list[Section] = []
    if len(companions.ranges):
        wide = companions.ranges.pivot(index="parameter", columns="baseline", values="range")
        noise = companions.ranges.pivot(index="parameter", columns="baseline", values="noise")
        effects = {e.name: span(e.effect) for e in analysis.effects} if analysis else {}
        rows = [
            (
                words(str(p)),
                *(f"{wide.loc[p, b]:.1f} ({noise.loc[p, b]:.1f})" for b in wide.columns),
                effects.get(str(p), "-"),
            )
            for p in wide.index[np.argsort(-wide.max(axis=1).to_numpy())]
        ]
        headers = (
            "parameter",
            *(f"range around {b} (noise alone)" for b in wide.columns),
            "effect over the whole space",
        )
        text = _paragraph(
            "One parameter at a time around fixed baselines, everything else held. In brackets the range that seed "
            "noise alone exceeds in one of ten such comparisons, by the noise of these very runs. A parameter whose "
            "range depends on the baseline interacts with others; no single baseline shows that."
        )
        levels = _paragraph("The runs: mean validation accuracy over seeds, and the standard deviation between them.")
        levels += table_html(
            ("baseline", "parameter", "value", "accuracy (SD)"),
            [
                (
                    r.baseline,
                    words(r.parameter) if r.parameter else "the baseline itself",
                    r.value,
                    f"{r.accuracy:.2f} ({r.sd:.2f})" if r.sd == r.sd else f"{r.accuracy:.2f}",
                )
                for r in companions.ofat.itertuples()
            ],
        )
        out.append(
            Section(
                "One factor at a time",
                text + table_html(headers, rows) + levels,
                (("tornado", "Range of accuracy as one parameter changes, at each baseline."),),
            )
        )
    if len(companions.replicates):
        rows = [
            (
                r.row,
                r.seeds,
                f"{r.accuracy:.1f} ({r.low:.1f} to {r.high:.1f})",
                f"{r.sd:.2f}",
                "-" if r.test != r.test else f"{r.test:.1f}",
            )
            for r in companions.replicates.itertuples()
        ]
        text = _paragraph(
            "Configurations run again on seeds that no choice was made by: the honest estimate of how good they are, "
            "and of seed noise."
        )
        headers = ("configuration", "seeds", "validation accuracy (90% interval)", "SD between seeds", "test accuracy")
        out.append(
            Section(
                "Replicates",
                text + table_html(headers, rows),
                (("replicates", "Mean accuracy of each configuration over fresh seeds, with its 90% interval."),),
            )
        )
    return out


def _runs_section(records: StudyData, analysis: Analysis) -> Section:
    c = analysis.counts
    rows: list[tuple[str, int, str]] = [
        ("complete", c.complete, "inform the surface at every epoch"),
        ("stopped early", c.stopped, "inform it up to the epoch they reached; never told as final results"),
        (
            "diverged",
            c.diverged,
            "inform it until then; the chance to diverge is modelled, and where a table says so a diverged run counts "
            "as guessing (10 points)",
        ),
        ("failed", c.failed, "inform it as far as they came; their share over the space is modelled (below)"),
        ("running", c.running, "inform it as far as they have come"),
        ("all", c.total, f"of which {c.used} have results and inform the surface"),
    ]
    text = _paragraph("Every trial is counted; none is dropped for how it ended.")
    body = text + table_html(("trials", "number", "how they are used"), [r for r in rows if r[1] or r[0] == "all"])
    if analysis.failures is not None:
        failing = sorted(
            (e for e in analysis.effects if e.failure), key=lambda e: -(e.failure.mid if e.failure else 0)
        )[:4]
        body += _paragraph("Change of the probability to fail or diverge over a parameter's range (percentage points):")
        body += table_html(("parameter", "change"), [(words(e.name), span(e.failure)) for e in failing if e.failure])
    reasons = records.trials.loc[records.trials["state"] == "failed", "stop_reason"].value_counts().head(5)
    if len(reasons):
        body += _paragraph("Reasons of failure:") + table_html(("reason", "trials"), list(reasons.items()))
    best = records.trials.loc[analysis.best_trial]
    held = [(words(d.name), shown(best[d.name])) for d in analysis.space.dimensions if d.name in records.trials.columns]
    tested = (
        f"; test accuracy, read once: {100 * best['test_accuracy']:.1f} points"
        if best["test_accuracy"] == best["test_accuracy"]
        else ""
    )
    body += _paragraph(
        f"Of the configurations tried, the surface expects most of trial {analysis.best_trial}: "
        f"{span(analysis.best_accuracy)} points of a run with it{tested}. "
        "By accuracy alone, which owes more to luck, another may stand first."
    )
    body += table_html(("parameter", "best value"), held)
    return Section(
        "The trials",
        body,
        (
            (
                "learning_curves",
                "Validation accuracy of every trial against epoch, mean over seeds, by how it was chosen and how it "
                "ended.",
            ),
            (
                "compute",
                "Accuracy of full-budget trials against compute. Bars: one standard deviation between seeds. Line: "
                "the Pareto front.",
            ),
            ("history", "Last accuracy of every trial in order, and the best full-budget one so far."),
        ),
    )


def _diagnostics_section(analysis: Analysis, crosschecks: pd.DataFrame | None) -> Section:
    fit = analysis.fit
    measured = "" if analysis.seed_sd_known else " (estimated by the model, not measured)"
    rows = [
        (
            "R² on trials not seen (5-fold, whole trials held out)",
            f"{fit.r2:.2f}; seed noise allows at most {fit.ceiling:.2f}",
        ),
        ("90% intervals that held the unseen result", f"{fit.coverage:.0%} of {fit.held_out}"),
        (
            "seed standard deviation at the full budget, averaged over trials",
            f"{span(analysis.seed_sd, 2)} points{measured}",
        ),
        (
            "share of the space that its rules exclude",
            f"{analysis.infeasible_share:.0%}; indices are over the whole space, the excluded part by extrapolation",
        ),
        (
            "share of the space where the surface says little more than the average",
            f"{analysis.extrapolation_share:.0%}",
        ),
        ("the sampler's largest R-hat", f"{analysis.mixing:.2f} (1 is settled)"),
        (
            "trials by how they were chosen",
            ", ".join(f"{count} {origin}" for origin, count in analysis.origins.items()),
        ),
    ]
    body = table_html(("check", "value"), rows)
    if analysis.space.rule:
        body += _paragraph(f"Rule of the space: {analysis.space.rule}")
    if crosschecks is not None and len(crosschecks):
        body += _paragraph("Other estimators on the same trials. They estimate other things, so they need not agree:")
        rows = [
            [words(str(r[0])), *("-" if v != v else f"{v:.2f}" for v in r[1:])]
            for r in crosschecks.itertuples(index=False)
        ]
        body += table_html(list(crosschecks.columns), rows)
        body += table_html(("estimator", "what it estimates"), list(ESTIMATES.items()))
    caption = "Trials held out: what the surface predicted, with 90% intervals, against what they reached."
    return Section("How far to trust this", body, (("calibration", caption),))


def _method_section(analysis: Analysis) -> Section:
    parts = [
        (
            "Target",
            f"Validation accuracy at epoch {analysis.budget}, on the logit scale, clipped by the "
            f"{analysis.evaluation_size:,} validation images behind it. "
            "Points of accuracy are computed from the same draws through the inverse logit. Effects, curves, indices "
            "and verdicts are of runs that train; where runs diverged, a column of its own counts those as guessing, "
            "and so do what is worth tuning and the path from the default to the best.",
        ),
        (
            "Surface",
            "A Gaussian process over configuration (each range mapped to 0 to 1, in logarithms where it was sampled "
            "so; whole numbers keep their levels) and log "
            "epoch: components of one, two and three parameters, each averaging to zero over every parameter in it, "
            "with their own weights and roughness; "
            "plus a trial effect, lasting seed luck and epoch noise. Seed noise is measured from differences between "
            "seeds of the same trial.",
        ),
        (
            "Uncertainty",
            f"Hyperparameters are sampled (elliptical slice sampling), {HYPERDRAWS} draws with {DRAWS_EACH} joint "
            f"draws of the surface each. Intervals hold the middle {INTERVAL:.0%} of the draws.",
        ),
        (
            "Sobol indices",
            "Shares of the surface's variance over the whole space, per draw: the squared component weights over "
            "their sum (logit), or the variance along each parameter, averaged over the others, as a share of all "
            "(accuracy). Marrel et al. 2009; Le Gratiet et al. 2014.",
        ),
        (
            "Dummy",
            "A column of made-up numbers joins the parameters before fitting. Whatever importance it gets is error.",
        ),
        (
            "Tunability and path",
            "The better value and every step are chosen by expected accuracy and then judged on all draws, so that "
            "luck is not counted as gain. Probst et al. 2019; Fawcett and Hoos 2016.",
        ),
        ("Cross-validation", "Five folds of whole trials; hyperparameters are fitted again without the fold."),
    ]
    return Section(
        "How each number was computed",
        "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in parts) + "</dl>",
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}: sensitivity report</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 50rem; padding: 1.5rem 1.2rem 4rem; color: #1a1a1a; background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .8rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid #ddd; }
.kicker { margin: 0; color: #666; font-size: .85rem; }
.answer { font-size: 1.1rem; margin: .6rem 0; }
.caution { border-left: 4px solid #D55E00; background: #fdf3ec; padding: .5rem .8rem; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: .1rem 0 .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e4e4e4; }
td, th { overflow-wrap: normal; }
figure { margin: 1.4rem 0; }
img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .88rem; color: #555; margin-top: .3rem; }
@media (max-width: 600px) {
  body { padding: 1rem .8rem 3rem; }
  img { max-width: none; width: 27rem; }
}
@media print {
  body { max-width: none; font-size: 11pt; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
</style></head><body>
{{body}}
</body></html>
"""
