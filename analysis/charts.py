"""Charts of trials for a page that answers back: Vega-Lite by way of Altair.

Each function gives a chart that reads one dataset, TRIALS, which the page holds once. The page's script sets the
parameter PICKED to the trials that are to stand out, so that a filter on the page acts on every chart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from altair.utils.schemapi import debug_mode

from analysis.figures import (
    ACCURACIES,
    BLACK,
    BLUE,
    END_STYLE,
    GREY,
    PALE,
    Trial,
    accuracy_logit,
    ended,
    log_marks,
    origin_style,
)
from analysis.results import Curve
from ramcore.cost import pareto_front
from ramcore.space import Array, Dimension, shown

TRIALS = "trials"  # name of the page's dataset
PICKED = "picked"  # trial numbers, or null for all
AXIS, GAP = 38, 30  # pixels: height of an axis of the parallel coordinates, and between two
WIDTH = 640  # of the parallel coordinates, pixels; the page's script puts the width that it has in its place

Spec = dict[str, Any]  # a chart as Vega-Lite's JSON
Channels = dict[str, Any]  # encodings by channel


def trial_rows(tracked: Sequence[Trial], trials: pd.DataFrame, dimensions: Sequence[Dimension]) -> list[dict[str, Any]]:
    """The dataset TRIALS: a row a trial with results, its learning curve in two lists. Accuracies are in points.

    Dimension k is p<k>, and its unit coordinate u<k>: a name may hold what Vega reads as a path. The coordinate after
    the last is the accuracy's.
    """
    units = [d.to_unit(trials.loc[[t.number for t in tracked], d.name].tolist()) for d in dimensions]
    units.append(_accuracy_units([t.last for t in tracked], tracked))
    rows: list[dict[str, Any]] = []
    for at, trial in enumerate(tracked):
        record = trials.loc[trial.number]
        row: dict[str, Any] = {
            "trial": trial.number,
            "chosen": origin_style(trial.origin)[2],
            "row": record["row"] or "-",
            "ended": ended(trial.outcome),
            "why": record["stop_reason"],
            "seeds": ", ".join(map(str, record["seeds"])),
            "accuracy": round(trial.last, 3),
            "sd": _finite(trial.sd),
            "full": trial.complete,
            "macs": _finite(trial.macs / 1e6),
            "epoch": trial.epochs.astype(int).tolist(),
            "curve": np.clip(trial.accuracy, 0.01, 99.99).round(3).tolist(),
        }
        row |= {f"p{k}": shown(record[d.name]) for k, d in enumerate(dimensions)}
        rows.append(row | {f"u{k}": _finite(unit[at]) for k, unit in enumerate(units)})
    return rows


def _finite(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _accuracy_units(accuracies: Sequence[float], tracked: Sequence[Trial]) -> Array:
    """Where accuracies lie between the lowest and the highest last one, on the logit scale."""
    last = accuracy_logit([t.last for t in tracked])
    return (accuracy_logit(accuracies) - last.min()) / max(float(np.ptp(last)), 1e-6)


# ---- pieces --------------------------------------------------------------------------------------------------


def _chart() -> alt.Chart:
    return alt.Chart(alt.NamedData(TRIALS))


def _hover(dimensions: Sequence[Dimension]) -> list[alt.Tooltip]:
    """What is said of a trial: its configuration, its seeds, why it ended."""
    facts = {
        "trial": "trial", "accuracy": "validation accuracy at its end (%)", "sd": "standard deviation between seeds",
        "seeds": "seeds", "chosen": "chosen by", "row": "row of its design", "ended": "how it ended", "why": "why",
    }  # fmt: skip
    said = [alt.Tooltip(f"{field}:N", title=title) for field, title in facts.items()]
    return said + [alt.Tooltip(f"p{k}:N", title=d.label) for k, d in enumerate(dimensions)]


def _y(title: str | None, field: str = "y") -> alt.Y:
    """An axis of logits that says accuracies, so that 97 and 98 are as far apart as 80 and 86."""
    axis = alt.Axis(
        values=accuracy_logit(ACCURACIES).tolist(), labelExpr="format(100 / (1 + exp(-datum.value)), '.3~g')"
    )
    return alt.Y(f"{field}:Q", title=title, axis=axis, scale=alt.Scale(zero=False, nice=False, padding=8))


def _to_logit(field: str) -> str:
    return f"log(datum.{field} / (100 - datum.{field}))"


def _log_x(field: str, title: str, low: float, high: float, at: Array | None = None) -> alt.X:
    at = log_marks(low, high) if at is None else at
    scale = alt.Scale(type="log", domain=[low, high], nice=False, padding=8)
    return alt.X(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(values=at.tolist(), format="~g"))


def _stands_out(*selections: alt.Parameter) -> Any:
    """Whether a trial is among those that the page and these selections pick."""
    return {"and": [*({"param": s.name} for s in selections), f"!{PICKED} || indexof({PICKED}, datum.trial) >= 0"]}


def _opacity(full: float, *selections: alt.Parameter) -> alt.OpacityValue:
    return alt.OpacityValue(0.05, condition={"test": _stands_out(*selections), "value": full})


def _chosen(tracked: Sequence[Trial]) -> Channels:
    """Colour and shape by what chose a trial."""
    styles = [origin_style(origin) for origin in sorted({t.origin for t in tracked})]
    domain, shapes = [label for *_, label in styles], {"o": "circle", "s": "square", "D": "diamond"}
    legend = alt.Legend(orient="top", columns=2, symbolOpacity=1, labelLimit=300)
    colour = alt.Scale(domain=domain, range=[colour for colour, *_ in styles])
    shape = alt.Scale(domain=domain, range=[shapes.get(marker, "triangle-up") for _, marker, _ in styles])
    return {
        "color": alt.Color("chosen:N", title="chosen by", scale=colour, legend=legend),
        "shape": alt.Shape("chosen:N", title="chosen by", scale=shape, legend=legend),
    }


def _spec(chart: Any) -> Spec:
    """The chart's JSON, with the parameter that the page sets."""
    return (
        chart.add_params(alt.param(name=PICKED, value=None))
        .configure_view(stroke=None)
        .configure_axis(labelFontSize=11, titleFontSize=11.5)
        .to_dict(validate=False)
    )


def _wide(chart: Any, height: int = 320) -> Spec:
    """A chart as wide as the page."""
    return _spec(
        chart.properties(
            width="container", height=height, autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
        )
    )


unchecked = debug_mode(False)  # decorates what makes charts: checking each piece against the schema takes seconds


# ---- charts --------------------------------------------------------------------------------------------------


def parallel_coordinates(tracked: Sequence[Trial], dimensions: Sequence[Dimension]) -> Spec:
    """A horizontal axis for each dimension and for accuracy; a line through all of them is a trial.

    Dragging along an axis picks the trials in that range; ranges on several axes are combined. The selection of axis k
    is brush<k>.
    """
    ticks = [_ticks(d) for d in dimensions]
    reached = zip(_accuracy_units(ACCURACIES, tracked).tolist(), map("{:g}".format, ACCURACIES), strict=True)
    ticks.append([(at, text) for at, text in reached if 0 <= at <= 1])
    labels = [*(d.label for d in dimensions), "validation accuracy at the trial's end (%)"]
    brushes = [alt.selection_interval(name=f"brush{k}", encodings=["x"]) for k in range(len(labels))]
    look: Channels = {
        "color": alt.Color(f"u{len(dimensions)}:Q", legend=None, scale=alt.Scale(scheme="viridis", reverse=True)),
        "opacity": _opacity(0.75, *brushes),
        "tooltip": _hover(dimensions),
    }
    views: list[Any] = []
    for k, (label, marked, brush) in enumerate(zip(labels, ticks, brushes, strict=True)):
        through: Channels = {"x": _unit(k), "y": alt.value(0), "y2": alt.value(AXIS)}
        lines = _chart().mark_rule(strokeWidth=1.5).encode(**through, **look).add_params(brush)
        texts = alt.Chart(alt.InlineData(values=[{"at": at, "text": text} for at, text in marked]))
        numbers: Channels = {"x": alt.X("at:Q", scale=UNIT, axis=None), "y": alt.value(28), "text": "text:N"}
        name: Channels = {"x": alt.value(4), "y": alt.value(10), "text": alt.value(label)}
        one = alt.Chart(alt.InlineData(values=[{}]))
        drawn = [
            part
            for style in HALO
            for part in (
                texts.mark_text(fontSize=11, **style).encode(**numbers),
                one.mark_text(fontSize=11.5, fontWeight="bold", align="left", **style).encode(**name),
            )
        ]
        views.append(alt.layer(lines, *drawn).properties(width=WIDTH, height=AXIS, view={"fill": "#f1f1ee"}))
        if k + 1 < len(labels):
            across: Channels = {"x": _unit(k), "x2": f"u{k + 1}:Q", "y": alt.value(0), "y2": alt.value(GAP)}
            rules = _chart().mark_rule(strokeWidth=1.5).encode(**across, **look)
            views.append(rules.properties(width=WIDTH, height=GAP))
    return _spec(alt.vconcat(*views, spacing=0, bounds="flush"))


UNIT = alt.Scale(domain=[-0.03, 1.03], nice=False)
HALO: tuple[Channels, Channels] = (  # a text over lines is written in white, then in black
    {"stroke": "white", "strokeWidth": 4, "strokeJoin": "round"},
    {"color": "#1a1a1a"},
)


def _unit(k: int) -> alt.X:
    return alt.X(f"u{k}:Q", scale=UNIT, axis=None)


def _ticks(dimension: Dimension) -> list[tuple[float, str]]:
    """Unit coordinates and texts of at most some eight values of a dimension."""
    low, high = dimension.low, dimension.high
    values = list(dimension.levels) or list(log_marks(low, high) if dimension.log else np.linspace(low, high, 5))
    values = values if dimension.type == "categorical" else values[:: math.ceil(len(values) / 8)]
    return list(zip(dimension.to_unit(values).tolist(), map(shown, values), strict=True))


def learning_curves(tracked: Sequence[Trial], dimensions: Sequence[Dimension]) -> Spec:
    """Every trial's accuracy by epoch. A click on a line, or on the legend, isolates it; shift adds, a click beside
    them ends it.
    """
    one = alt.selection_point(name="one", fields=["trial"], empty=True)
    kind = alt.selection_point(name="kind", fields=["chosen"], bind="legend")
    over = alt.selection_point(name="over", fields=["trial"], on="pointerover", clear="pointerout", empty=False)
    last = max((int(t.epochs[-1]) for t in tracked), default=1)
    flat = _chart().transform_flatten(["epoch", "curve"]).transform_calculate(y=_to_logit("curve"))
    x = _log_x("epoch", "epoch", 1, max(last, 2), np.unique(np.round(np.geomspace(1, last, 6))))
    colour, y = _chosen(tracked)["color"], _y("validation accuracy (%)")
    shared: Channels = {"x": x, "y": y, "detail": "trial:N"}
    seen: Channels = {"opacity": _opacity(0.7, one, kind), "color": colour}
    wide = alt.StrokeWidthValue(1.1, condition={"param": over.name, "empty": False, "value": 3.5})
    lines = flat.mark_line().encode(**shared, **seen, strokeWidth=wide)
    target = flat.mark_line(strokeWidth=9, stroke="transparent").encode(**shared, tooltip=_hover(dimensions))
    ends = (
        _chart()
        .transform_filter("datum.ended != 'finished'")
        .transform_calculate(y="log(peek(datum.curve) / (100 - peek(datum.curve)))", epoch="peek(datum.epoch)")
    )
    shapes = {"stopped early": "circle", "diverged": "cross", "failed": "cross", "running": "triangle-right"}
    present = [label for *_, label in END_STYLE.values() if any(ended(t.outcome) == label for t in tracked)]
    shape = alt.Shape(
        "ended:N", title="not to the end", scale=alt.Scale(domain=present, range=[shapes[p] for p in present]),
        legend=alt.Legend(orient="top") if present else None,
    )  # fmt: skip
    stops = ends.mark_point(color=BLACK, size=28).encode(
        x=x, y=y, shape=shape, opacity=_opacity(0.8, one, kind), tooltip=_hover(dimensions)
    )
    return _wide(alt.layer(lines, target.add_params(one, kind, over), stops).resolve_scale(shape="independent"), 380)


def history(tracked: Sequence[Trial], dimensions: Sequence[Dimension]) -> Spec:
    """Last accuracy of every trial by number (hollow: not to the end), and the best complete trial so far."""
    points = _points(
        _chart(), tracked, dimensions, alt.X("trial:Q", title="trial number", axis=alt.Axis(tickMinStep=1))
    )
    best = (
        _chart().transform_filter("datum.full")
        .transform_window(best="max(accuracy)", sort=[alt.SortField("trial")])
        .transform_calculate(y=_to_logit("best"))
        .mark_line(interpolate="step-after", color=BLACK)
        .encode(x="trial:Q", y=_y("last accuracy (%)"))
    )  # fmt: skip
    return _wide(alt.layer(best, points))


def compute(tracked: Sequence[Trial], dimensions: Sequence[Dimension]) -> Spec:
    """Accuracy of complete trials with known cost against multiply-accumulates an image, with the Pareto front."""
    costs, values = [t.macs / 1e6 for t in tracked], [t.last for t in tracked]
    front = pareto_front(costs, values)
    x = _log_x("macs", "compute an image (million multiply-accumulates)", min(costs), max(costs) * 1.0001)
    line = (
        alt.Chart(alt.InlineData(values=[{"macs": costs[i], "y": float(accuracy_logit(values[i]))} for i in front]))
        .mark_line(interpolate="step-after", color=BLACK)
        .encode(x=x, y=_y("last accuracy (%)"))
    )
    complete = _chart().transform_filter("datum.full && isValid(datum.macs)")
    bars = complete.transform_filter("isValid(datum.sd)").transform_calculate(
        below="clamp(datum.accuracy - datum.sd, 0.01, 99.99)", above="clamp(datum.accuracy + datum.sd, 0.01, 99.99)"
    )
    bars = bars.transform_calculate(y=_to_logit("below"), y2=_to_logit("above"))
    bars = bars.mark_rule(color=GREY).encode(x=x, y=_y("last accuracy (%)"), y2="y2", opacity=_opacity(0.8))
    return _wide(alt.layer(bars, line, _points(complete, tracked, dimensions, x)))


def marginal(tracked: Sequence[Trial], dimensions: Sequence[Dimension], k: int, curve: Curve) -> Spec:
    """Mean accuracy over dimension k with its band, and the trials; grey where the curve extrapolates."""
    dimension = dimensions[k]
    named = dimension.type == "categorical"
    values = [
        {"x": str(x) if named else float(x), "low": low, "y": mid, "high": high}
        for x, low, mid, high in zip(
            curve.values, *(accuracy_logit(c).tolist() for c in (curve.low, curve.mid, curve.high)),
            strict=True,
        )
    ]  # fmt: skip
    if named:
        sort = [str(c) for c in dimension.choices]
        x = alt.X("x:N", title=dimension.label, sort=sort, axis=alt.Axis(labelAngle=0))
    elif dimension.log:
        x = _log_x("x", dimension.label, dimension.low, dimension.high)
    else:
        axis = alt.Axis(tickCount=6, tickMinStep=1 if dimension.type == "int" else 0)
        x = alt.X("x:Q", title=dimension.label, scale=alt.Scale(zero=False, nice=False, padding=8), axis=axis)
    drawn = alt.Chart(alt.InlineData(values=values)).encode(x=x)
    # Nothing lies between two choices.
    band = (
        drawn.mark_rule(color=BLUE, opacity=0.3, strokeWidth=8) if named else drawn.mark_area(color=BLUE, opacity=0.22)
    )
    line = (
        drawn.mark_point(color=BLUE, size=90, shape="stroke") if named else drawn.mark_line(color=BLUE, strokeWidth=2)
    )
    band, line = band.encode(y=_y(None, "low"), y2="high"), line.encode(y=_y(None))
    beyond = [
        {"x": a["x"], "x2": b["x"]}
        for (a, b), out in zip(pairwise(values), pairwise(curve.extrapolated), strict=True)
        if all(out) and not named
    ]
    far = alt.Chart(alt.InlineData(values=beyond)).mark_rect(color=PALE, opacity=0.6).encode(x=x, x2="x2")
    place = f"datum.p{k}" if named else f"toNumber(datum.p{k})"
    points = _points(_chart().transform_calculate(x=place), tracked, dimensions, x, legend=False)
    return _wide(alt.layer(*([far] if beyond else []), points, band, line), 210)


def _points(
    base: alt.Chart, tracked: Sequence[Trial], dimensions: Sequence[Dimension], x: alt.X, *, legend: bool = True
) -> alt.Chart:
    """A mark a trial at its last accuracy, filled where it reached the full budget."""
    look = _chosen(tracked)
    if not legend:
        look = {name: channel.copy(deep=False) for name, channel in look.items()}
        for channel in look.values():
            channel["legend"] = None
    filled = alt.FillOpacityValue(0, condition={"test": "datum.full", "value": 0.9})
    placed = base.transform_calculate(y="log(peek(datum.curve) / (100 - peek(datum.curve)))")
    return placed.mark_point(size=45, strokeWidth=1.2).encode(
        x=x, y=_y("last accuracy (%)"), **look, fill=look["color"], fillOpacity=filled, opacity=_opacity(0.9),
        tooltip=_hover(dimensions),
    )  # fmt: skip


@functools.cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one JavaScript text that loads nothing."""
    return vl_convert.javascript_bundle(
        "window.vegaEmbed = vegaEmbed;", ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    )
