"""Results -> Axes. No function here saves, shows or sets a global style; each draws on the axes it is given."""

from __future__ import annotations

# pandas' own annotations are unions that its indexing never returns here, so these checks only raise false alarms.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAssignmentType=false
from typing import Any

import matplotlib.ticker as ticker
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.fixed_designs import Companions
from analysis.importance import DUMMY, Analysis, Curve, PairSurface
from ramcore.space import Dimension, shown, words

# Okabe and Ito's palette: told apart in every common colour blindness, and in grey by lightness.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#000000",
)
GREY, PALE = "#767676", "#D9D9D9"
ORIGIN_STYLE = {  # colour, marker, words
    "published": (BLACK, "*", "published settings"),
    "sobol": (BLUE, "o", "space-filling (Sobol)"),
    "tpe": (ORANGE, "s", "optimiser (TPE)"),
    "paper": (GREEN, "D", "paper's rows"),
    "ofat": (PURPLE, "^", "one factor at a time"),
    "replicate": (RED, "v", "replicates"),
}
STYLE: dict[str, Any] = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 170,
    "svg.hashsalt": "ram-study",
}


def _legend_above(ax: Axes, columns: int = 4) -> None:
    # Above the plot, where it can hide no point.
    ax.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, fontsize=9, columnspacing=1.2, handletextpad=0.5
    )


def _plain_log_axis(ax: Axes, low: float, high: float, axis: str = "x") -> None:
    """A log axis labelled 0.03, 0.1, 0.3 within its range, without powers and without crowding."""
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    marks = np.array([m * 10.0**k for k in decades for m in ((1, 3) if len(decades) > 2 else (1, 2, 5))])
    marks = marks[(marks >= low * 0.98) & (marks <= high * 1.02)]
    if len(marks) > 5:
        tens = np.abs(np.log10(marks) - np.round(np.log10(marks))) < 1e-9
        marks = marks[tens] if tens.sum() >= 2 else marks[::2]
    getattr(ax, f"set_{axis}scale")("log")
    getattr(ax, f"set_{axis}ticks")(marks, [f"{m:g}" for m in marks])
    getattr(ax, f"{axis}axis").set_minor_locator(ticker.NullLocator())


def new_axes(width: float = 7.0, height: float = 4.0) -> Axes:
    """Axes on a figure of their own, outside pyplot's global list."""
    return Figure(figsize=(width, height), layout="constrained").subplots()


def forest(analysis: Analysis, ax: Axes | None = None) -> Axes:
    """Effect of every parameter in accuracy points with its interval, over the seed-noise band and the dummy."""
    ax = ax or new_axes(6.6, 1.2 + 0.42 * len(analysis.effects))
    effects = analysis.effects[::-1]
    sd = analysis.seed_sd
    ax.axvspan(0, sd.mid, color=PALE, alpha=0.7, lw=0, label=f"one seed standard deviation ({sd.mid:.1f} points)")
    dummy = next(e for e in effects if e.name == DUMMY)
    ax.axvline(dummy.effect.high, color=GREY, ls=":", lw=1.3, label="what a parameter without effect can reach")
    for y, effect in enumerate(effects):
        inert = effect.name == DUMMY
        colour = GREY if inert else BLUE
        ax.plot([effect.effect.low, effect.effect.high], [y, y], color=colour, lw=3, solid_capstyle="butt")
        ax.plot(effect.effect.mid, y, marker="D" if inert else "o", color=colour, ms=7, mec="white", mew=0.8)
    ax.set_yticks(range(len(effects)), [e.label for e in effects])
    ax.set_ylim(-0.6, len(effects) - 0.4)
    ax.set_xlim(left=min(0.0, min(e.effect.low for e in effects) - 1.0))
    ax.set_xlabel("effect at the full budget (accuracy points)")
    ax.xaxis.grid(True, color=PALE, lw=0.6)
    ax.set_axisbelow(True)
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=9)
    return ax


def sobol(analysis: Analysis, ax: Axes | None = None) -> Axes:
    """First-order and total Sobol indices with intervals."""
    ax = ax or new_axes(6.6, 1.2 + 0.42 * len(analysis.effects))
    effects = analysis.effects[::-1]
    for y, effect in enumerate(effects):
        for shift, value, colour, marker in ((0.14, effect.total, BLUE, "o"), (-0.14, effect.first, ORANGE, "s")):
            ax.plot([value.low, value.high], [y + shift] * 2, color=colour, lw=2.4, solid_capstyle="butt")
            ax.plot(value.mid, y + shift, marker=marker, color=colour, ms=5.5, mec="white", mew=0.7)
    ax.plot([], [], color=BLUE, marker="o", label="total: alone and with others")
    ax.plot([], [], color=ORANGE, marker="s", label="first order: alone")
    ax.set_yticks(range(len(effects)), [e.label for e in effects])
    ax.set_ylim(-0.6, len(effects) - 0.4)
    ax.set_xlim(0, min(1.0, max(e.total.high for e in effects) * 1.1 + 0.02))
    ax.set_xlabel("share of the variance of logit accuracy (Sobol index)")
    ax.xaxis.grid(True, color=PALE, lw=0.6)
    ax.set_axisbelow(True)
    ax.legend(loc="lower right", fontsize=9)
    return ax


def marginal(curve: Curve, dimension: Dimension, raw: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """A parameter's mean accuracy with its band over the raw trials; hatched where the surface extrapolates.

    raw: one row a trial with columns `value` (the parameter's), `accuracy` (points), `complete` (bool).
    """
    ax = ax or new_axes(3.6, 2.8)
    names = dimension.type == "categorical"
    xs = np.arange(len(curve.values)) if names else np.asarray(curve.values, dtype=float)
    for complete, marker, colour, label in ((False, "x", GREY, "not to the end"), (True, "o", SKY, "full budget")):
        part = raw[raw["complete"] == complete]
        if part.empty:
            continue
        at = [list(curve.values).index(v) for v in part["value"]] if names else part["value"]
        ax.scatter(at, part["accuracy"], s=14, marker=marker, color=colour, alpha=0.75, lw=0.9, label=label, zorder=2)
    ax.fill_between(xs, curve.low, curve.high, color=BLUE, alpha=0.22, lw=0, zorder=3)
    ax.plot(xs, curve.mid, color=BLUE, lw=2, zorder=4, marker="." if dimension.levels else None)
    ax.fill_between(
        xs,
        0,
        1,
        where=curve.extrapolated.tolist(),
        transform=ax.get_xaxis_transform(),
        facecolor="none",
        hatch="///",
        edgecolor=PALE,
        linewidth=0,
        zorder=1,
    )
    if names:
        ax.set_xticks(xs, [str(v) for v in curve.values])
    elif dimension.log:
        _plain_log_axis(ax, dimension.low, dimension.high)
    else:
        ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=dimension.type == "int"))
    ax.set_xlabel(dimension.label)
    ax.set_ylabel("accuracy (points)")
    return ax


def pair_surface(surface: PairSurface, ax: Axes | None = None) -> Axes:
    """Mean accuracy over two parameters; the standard error is written where it is large."""
    ax = ax or new_axes(6.4, 4.2)
    values_x, values_y = surface.x.from_unit(surface.grid_x), surface.y.from_unit(surface.grid_y)
    mesh = ax.pcolormesh(np.arange(len(values_x) + 1), np.arange(len(values_y) + 1), surface.mean, cmap="cividis")
    colorbar = ax.figure.colorbar(mesh, ax=ax, label="mean accuracy (points)")
    colorbar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    middle = (surface.mean.max() + surface.mean.min()) / 2
    for i in range(len(values_y)):
        for j in range(len(values_x)):
            if len(values_x) <= 17 and len(values_y) <= 11 and (len(values_x) <= 12 or j % 2 == 0):
                light = surface.mean[i, j] < middle
                ax.text(
                    j + 0.5,
                    i + 0.5,
                    f"{surface.mean[i, j]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if light else "black",
                )
    ax.set_xticks(np.arange(len(values_x)) + 0.5, [shown(v) for v in values_x], fontsize=9)
    ax.set_yticks(np.arange(len(values_y)) + 0.5, [shown(v) for v in values_y], fontsize=9)
    ax.set_xlabel(surface.x.label)
    ax.set_ylabel(surface.y.label)
    ax.spines[:].set_visible(False)
    return ax


def interactions(analysis: Analysis, ax: Axes | None = None) -> Axes:
    """Share of the variance that each pair has beyond its two parameters alone."""
    size = len(analysis.interactions)
    ax = ax or new_axes(6.6, 1.6 + 0.4 * size)
    labels = [words(str(name)) for name in analysis.interactions.index]
    lower = np.triu(np.ones((size, size), dtype=bool))
    shares = 100 * analysis.interactions
    sns.heatmap(
        shares.iloc[1:, :-1],
        mask=lower[1:, :-1],
        annot=True,
        fmt=".1f",
        cmap="cividis",
        vmin=0,
        vmax=max(5.0, float(shares.to_numpy().max())),  # so that a tenth of a percent does not look like much
        ax=ax,
        xticklabels=labels[:-1],
        yticklabels=labels[1:],
        annot_kws={"fontsize": 8.5},
        cbar_kws={"label": "% of variance"},
        linewidths=0.5,
    )
    ax.tick_params(axis="x", rotation=40)
    ax.tick_params(axis="y", rotation=0)
    for tick in ax.get_xticklabels():
        tick.set_ha("right")
    return ax


def more_than(analysis: Analysis, ax: Axes | None = None) -> Axes:
    """P(row matters more than column); between 5% and 95% is a tie."""
    size = len(analysis.more_than)
    ax = ax or new_axes(6.6, 1.9 + 0.4 * size)
    labels = [words(str(name)) for name in analysis.more_than.index]
    sns.heatmap(
        100 * analysis.more_than,
        annot=True,
        fmt=".0f",
        cmap="cividis",
        vmin=0,
        vmax=100,
        ax=ax,
        xticklabels=labels,
        yticklabels=labels,
        annot_kws={"fontsize": 8.5},
        cbar_kws={"label": "probability (%)"},
        linewidths=0.5,
    )
    ax.tick_params(axis="x", rotation=40)
    ax.tick_params(axis="y", rotation=0)
    for tick in ax.get_xticklabels():
        tick.set_ha("right")
    ax.set_ylabel("this parameter ...")
    ax.set_xlabel("... matters more than this one")
    return ax


def over_epochs(analysis: Analysis, ax: Axes | None = None) -> Axes:
    """Total index against epoch: which parameters matter early and which late."""
    ax = ax or new_axes(6.6, 4.0)
    order = [e.name for e in analysis.effects if e.name != DUMMY]
    palette = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY, BLACK]
    markers = "osD^vP*X"
    for k, name in enumerate(order):
        part = analysis.over_epochs[analysis.over_epochs["name"] == name]
        colour = palette[k % len(palette)] if k < 5 else GREY
        if k < 5:
            ax.fill_between(part["epoch"], part["low"], part["high"], color=colour, alpha=0.13, lw=0)
        label = words(name)
        ax.plot(
            part["epoch"], part["mid"], color=colour, marker=markers[k % 8], ms=5, lw=1.8 if k < 5 else 1, label=label
        )
    ax.set_xscale("log")
    marks = sorted(analysis.over_epochs["epoch"].unique())
    ax.set_xticks(marks, [f"{m:g}" for m in marks])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set_ylim(0, None)
    ax.set_xlabel("epoch")
    ax.set_ylabel("total Sobol index")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return ax


def ablation(analysis: Analysis, ax: Axes | None = None) -> Axes:
    """From the default to the best configuration, one change at a time, in the order that gains most."""
    ax = ax or new_axes(6.6, 1.4 + 0.42 * (len(analysis.ablation) + 1))
    rows = [("default", analysis.default_accuracy)]
    rows += [(f"{words(s.name)}: {shown(s.before)} to {shown(s.after)}", s.accuracy) for s in analysis.ablation]
    for y, (_, value) in enumerate(rows[::-1]):
        ax.plot([value.low, value.high], [y, y], color=BLUE, lw=3, solid_capstyle="butt")
        ax.plot(value.mid, y, "o", color=BLUE, ms=7, mec="white")
    mids = [value.mid for _, value in rows[::-1]]
    ax.plot(mids, range(len(rows)), color=BLUE, lw=0.8, alpha=0.6)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows[::-1]])
    ax.set_xlabel("expected accuracy at the full budget (points)")
    ax.xaxis.grid(True, color=PALE, lw=0.6)
    ax.set_axisbelow(True)
    return ax


def learning_curves(curves: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Every trial's accuracy against epoch by origin, with how it ended.

    curves: columns trial, epoch, accuracy (points, mean over seeds), origin, outcome (complete, stopped,
        diverged, failed, running).
    """
    ax = ax or new_axes(6.6, 4.0)
    ends = {
        "stopped": ("o", "stopped early"),
        "diverged": ("X", "diverged"),
        "failed": ("x", "failed"),
        "running": (">", "running"),
    }
    used: set[str] = set()
    origins: set[str] = set()
    for _, curve in curves.groupby("trial"):
        origin, outcome = str(curve["origin"].iloc[0]), str(curve["outcome"].iloc[0])
        colour, _, words = ORIGIN_STYLE.get(origin, (GREY, "o", origin))
        ax.plot(
            curve["epoch"],
            curve["accuracy"],
            color=colour,
            lw=0.9,
            alpha=0.6,
            label=None if origin in origins else words,
        )
        origins.add(origin)
        if outcome in ends:
            marker, label = ends[outcome]
            stopped = outcome == "stopped"
            ax.plot(
                curve["epoch"].iloc[-1],
                curve["accuracy"].iloc[-1],
                marker=marker,
                ms=4 if stopped else 7,
                mfc="none" if stopped else None,
                color=RED if outcome in ("diverged", "failed") else BLACK,
                ls="none",
                zorder=3,
                label=None if outcome in used else label,
            )
            used.add(outcome)
    if len(curves) and curves["epoch"].max() > 4:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        marks = np.unique(np.round(np.geomspace(1, curves["epoch"].max(), 6)))
        ax.set_xticks(marks)
        ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set_xlabel("epoch")
    ax.set_ylabel("validation accuracy (points)")
    _legend_above(ax)
    return ax


def compute(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy against multiply-accumulates an image, with the Pareto front.

    points: columns macs, accuracy (points), sd (points between seeds), origin, pareto (bool).
    """
    ax = ax or new_axes(6.6, 4.0)
    for origin, part in points.groupby("origin"):
        colour, marker, words = ORIGIN_STYLE.get(str(origin), (GREY, "o", str(origin)))
        ax.errorbar(
            part["macs"] / 1e6,
            part["accuracy"],
            yerr=part["sd"].fillna(0),
            fmt=marker,
            color=colour,
            ms=5,
            lw=0.8,
            alpha=0.8,
            mec="white",
            mew=0.5,
            label=words,
        )
    front = points[points["pareto"]].sort_values("macs")
    ax.step(front["macs"] / 1e6, front["accuracy"], where="post", color=BLACK, lw=1.4, label="Pareto front")
    _plain_log_axis(ax, float(points["macs"].min()) / 1e6, float(points["macs"].max()) / 1e6)
    ax.set_xlabel("compute an image (million multiply-accumulates)")
    ax.set_ylabel("validation accuracy (points)")
    _legend_above(ax)
    return ax


def history(points: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Last accuracy of every trial in the order they were numbered, and the best complete one so far.

    points: columns trial, accuracy (points), origin, complete (bool).
    """
    ax = ax or new_axes(6.6, 3.4)
    for origin, part in points.groupby("origin"):
        colour, marker, words = ORIGIN_STYLE.get(str(origin), (GREY, "o", str(origin)))
        full, cut = part[part["complete"]], part[~part["complete"]]
        ax.scatter(full["trial"], full["accuracy"], color=colour, marker=marker, s=22, label=words)
        ax.scatter(cut["trial"], cut["accuracy"], edgecolors=colour, facecolors="none", marker=marker, s=20, lw=0.8)
    best = points["accuracy"].where(points["complete"]).cummax().ffill()
    ax.step(points["trial"], best, where="post", color=BLACK, lw=1.4, label="best full-budget trial so far")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    ax.set_xlabel("trial number (open: did not reach the full budget)")
    ax.set_ylabel("last accuracy (points)")
    _legend_above(ax, columns=2)
    return ax


def calibration(analysis: Analysis, ax: Axes | None = None) -> Axes:
    """Predictions for trials that were held out, against what they reached, with 90% intervals."""
    ax = ax or new_axes(4.6, 4.2)
    fit = analysis.fit

    def points(values: Any) -> Any:
        return 100 / (1 + np.exp(-values))

    mid = points(fit.predicted)
    low, high = points(fit.predicted - 1.645 * fit.predicted_sd), points(fit.predicted + 1.645 * fit.predicted_sd)
    ax.errorbar(points(fit.observed), mid, yerr=[mid - low, high - mid], fmt="o", ms=4, lw=0.8, color=BLUE, alpha=0.8)
    edge = max(0.0, float(min(points(fit.observed).min(), low.min())) - 2)
    ax.plot([edge, 100], [edge, 100], color=BLACK, lw=1, ls="--", label="perfect prediction")
    ax.set_xlim(edge, 100)
    ax.set_ylim(edge, 100)
    _legend_above(ax)
    ax.set_xlabel("accuracy reached (points)")
    ax.set_ylabel("predicted without having seen the trial (points)")
    return ax


def tornado(companions: Companions, ax: Axes | None = None) -> Axes:
    """One factor at a time at each baseline: the range of accuracy, and how much of it seed noise alone would make."""
    ranges = companions.ranges
    order = ranges.groupby("parameter")["range"].max().sort_values().index.tolist()
    baselines = sorted(ranges["baseline"].unique())
    ax = ax or new_axes(6.6, 1.4 + 0.5 * len(order))
    ax.use_sticky_edges = False  # a bar that ends at guessing shall not look cut off
    height = 0.8 / max(len(baselines), 1)
    for k, baseline in enumerate(baselines):
        part = ranges[ranges["baseline"] == baseline].set_index("parameter")
        colour = (BLUE, ORANGE, GREEN)[k % 3]
        for y, name in enumerate(order):
            if name not in part.index:
                continue
            row = part.loc[name]
            at = y + 0.4 - height * (k + 0.5)
            ax.barh(at, row["high"] - row["low"], left=row["low"], height=height * 0.85, color=colour, alpha=0.85)
            ax.plot([row["baseline_accuracy"]] * 2, [at - height / 2, at + height / 2], color=BLACK, lw=1.5)
            if row["noise"] == row["noise"]:
                ax.plot([row["low"], row["low"] + row["noise"]], [at, at], color="white", lw=1.6)
        ax.barh([np.nan], [0], color=colour, label=f"around: {baseline}")
    ax.plot([], [], color=BLACK, lw=1.5, label="the baseline itself")
    ax.plot([], [], color=GREY, lw=1.6, label="white line: seed noise alone")
    ax.set_yticks(range(len(order)), [words(name) for name in order])
    ax.set_xlabel("validation accuracy at the full budget (points)")
    _legend_above(ax, 2)
    return ax


def replicates(companions: Companions, ax: Axes | None = None) -> Axes:
    """Chosen configurations run again on seeds that nothing was chosen by: mean with 90% interval."""
    table = companions.replicates.iloc[::-1].reset_index(drop=True)
    ax = ax or new_axes(6.6, 1.2 + 0.42 * len(table))
    for y, row in table.iterrows():
        ax.plot([row["low"], row["high"]], [y, y], color=BLUE, lw=3, solid_capstyle="butt")
        ax.plot(row["accuracy"], y, "o", color=BLUE, ms=7, mec="white")
    ax.set_yticks(
        range(len(table)), [f"{row} ({seeds} seeds)" for row, seeds in zip(table["row"], table["seeds"], strict=True)]
    )
    ax.set_xlabel("validation accuracy at the full budget (points)")
    ax.xaxis.grid(True, color=PALE, lw=0.6)
    ax.set_axisbelow(True)
    return ax
