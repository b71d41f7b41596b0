"""Figures from the few values that they draw.

Each function draws on the axes it is given, or on new ones, and returns them. None saves, shows or sets a global style.
Accuracy is in points (0 to 100).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.ticker as ticker
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.fixed_designs import OfatRange, Replicate
from analysis.results import DUMMY, Curve, Effect, Interval, Matrix, PairSurface, Step
from ramcore.cost import pareto_front
from ramcore.space import Array, Dimension, shown, words

# The palette of Okabe and Ito: distinct in every common colour blindness, and in grey by lightness.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
)  # fmt: skip
GREY, PALE = "#767676", "#D9D9D9"
ACCURACIES = (
    1,
    2,
    5,
    10,
    20,
    30,
    50,
    70,
    80,
    90,
    95,
    97,
    98,
    99,
    99.5,
    99.8,
    99.9,
)  # points that an accuracy axis marks
ORIGIN_STYLE = {  # colour, marker, words
    "published": (BLACK, "*", "published settings"),
    "asked": (GREEN, "P", "asked for (--try)"),
    "sobol": (BLUE, "o", "space-filling (Sobol)"),
    "tpe": (ORANGE, "s", "optimiser (TPE)"),
    "aimed": (BLUE, "D", "where it tells most (--aim)"),
    "paper": (GREEN, "D", "paper's rows"),
    "ofat": (PURPLE, "^", "one factor at a time"),
    "replicate": (RED, "v", "replicates"),
}
END_STYLE = {  # outcome of a trial: colour, marker, size, words
    "stopped": (BLACK, "o", 4, "stopped early"),
    "diverged": (RED, "X", 7, "diverged"),
    "failed": (RED, "x", 7, "failed"),
    "running": (BLACK, ">", 7, "running"),
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
styled = mpl.rc_context(STYLE)  # decorates what draws and saves  # pyright: ignore[reportArgumentType]


class Trial(NamedTuple):
    """A trial's accuracy by epoch, mean over seeds, and what the trial costs."""

    number: int
    origin: str
    outcome: str  # complete, or one of END_STYLE
    complete: bool  # reached the full budget
    epochs: Array
    accuracy: Array
    sd: float  # between seeds at the last epoch; NaN with one
    macs: float  # multiply-accumulates an image; NaN if unknown

    @property
    def last(self) -> float:
        """Accuracy at the last epoch."""
        return float(self.accuracy[-1])


def origin_style(origin: str) -> tuple[str, str, str]:
    """Colour, marker and words of what chose a trial."""
    return ORIGIN_STYLE.get(origin, (GREY, "o", origin))


def ended(outcome: str) -> str:
    """A trial's outcome in words."""
    return END_STYLE[outcome][3] if outcome in END_STYLE else "finished"


# ---- helpers -------------------------------------------------------------------------------------------------


def new_axes(width: float = 5.6, height: float = 4.0) -> Axes:
    """Axes on a figure of their own, outside pyplot's global list."""
    return Figure(figsize=(width, height), layout="constrained").subplots()


def figure_of(ax: Axes) -> Figure:
    """The figure that the axes are part of."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def row_axes(labels: Sequence[str], xlabel: str, ax: Axes | None, width: float = 5.6, height: float = 0.42) -> Axes:
    """Axes with one named row for each label, row 0 at the top."""
    ax = ax or new_axes(width, 1.2 + height * len(labels))
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlabel(xlabel, loc="right")  # it may be longer than the axis
    ax.xaxis.grid(True, color=PALE, lw=0.6)
    ax.set_axisbelow(True)
    return ax


def draw_interval(
    ax: Axes, y: float, value: Interval, colour: str = BLUE, marker: str = "o", width: float = 3.0, **style: Any
) -> None:
    """A bar from low to high and a marker at the middle; without bounds the marker alone."""
    ax.plot([value.low, value.high], [y, y], color=colour, lw=width, solid_capstyle="butt")
    ax.plot([value.mid], [y], marker=marker, color=colour, ls="none", **{"ms": 7, "mec": "white", "mew": 0.8} | style)


def _heat_map(ax: Axes, values: Array, rows: Sequence[str], columns: Sequence[str], label: str, **style: Any) -> Axes:
    """One coloured cell a number, with the number in it, row 0 on top. NaN leaves a cell empty."""
    style = {"annot": True, "cmap": "cividis", "linewidths": 0.5, "annot_kws": {"fontsize": 8.5}} | style
    sns.heatmap(values, xticklabels=columns, yticklabels=rows, cbar_kws={"label": label}, ax=ax, **style)
    ax.tick_params(axis="y", rotation=0)
    return ax


def _matrix(ax: Axes, values: Array, rows: Sequence[str], columns: Sequence[str], label: str, **style: Any) -> Axes:
    """A heat map of parameters, with slanted names below the columns."""
    _heat_map(ax, values, rows, columns, label, vmin=0.0, **style)
    for tick in ax.get_xticklabels():
        tick.set(rotation=40, ha="right", rotation_mode="anchor")
    return ax


def _legend_above(ax: Axes, columns: int = 2) -> None:
    # Above the plot, where it can hide no point.
    ax.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, fontsize=9, columnspacing=1.2, handletextpad=0.5
    )


def _once(ax: Axes, label: str) -> str | None:
    """The label, unless the legend has it already."""
    return None if label in ax.get_legend_handles_labels()[1] else label


def _log_axis(ax: Axes, marks: Sequence[float] | Array) -> None:
    """A log x axis with plain numbers at these marks only."""
    ax.set_xscale("log")
    ax.set_xticks(marks, [f"{m:g}" for m in marks])
    ax.xaxis.set_minor_locator(ticker.NullLocator())


def accuracy_axis(ax: Axes, along: str = "y") -> None:
    """A scale of logits that says accuracies in points, so that 97 and 98 are as far apart as 80 and 86."""
    scale, axis = (ax.set_xscale, ax.xaxis) if along == "x" else (ax.set_yscale, ax.yaxis)
    scale("function", functions=(accuracy_logit, lambda y: 100 / (1 + np.exp(-y))))
    axis.set_major_locator(ticker.FixedLocator(ACCURACIES))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_locator(ticker.NullLocator())
    # Limits of its own: those that were found on the linear scale would leave much room near 100.
    shared = (ax.get_shared_x_axes() if along == "x" else ax.get_shared_y_axes()).get_siblings(ax)
    drawn = accuracy_logit([getattr(one.dataLim, f"interval{along}") for one in shared if one.has_data()])
    room = max(0.05 * float(np.ptp(drawn)), 0.02)
    low, high = 100 / (1 + np.exp(-np.array([drawn.min() - room, drawn.max() + room])))
    (ax.set_xlim if along == "x" else ax.set_ylim)(low, high)


def accuracy_logit(accuracy: Any) -> Array:
    """Log-odds of accuracies in points, which are kept 0.01 points from 0 and 100."""
    share = np.clip(np.asarray(accuracy, dtype=float), 0.01, 99.99) / 100
    return np.log(share / (1 - share))


def log_marks(low: float, high: float) -> Array:
    """About five round numbers such as 0.03, 0.1, 0.3 within a range."""
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    marks = np.array([m * 10.0**k for k in decades for m in ((1, 3) if len(decades) > 2 else (1, 2, 5))])
    marks = marks[(marks >= low * 0.98) & (marks <= high * 1.02)]
    if len(marks) > 5:
        tens = np.abs(np.log10(marks) - np.round(np.log10(marks))) < 1e-9
        marks = marks[tens] if tens.sum() >= 2 else marks[::2]
    return marks


# ---- parameters ----------------------------------------------------------------------------------------------


def forest(effects: Sequence[Effect], seed_sd: Interval, ax: Axes | None = None) -> Axes:
    """Effect of every parameter with its interval, over the band of seed noise and the dummy's upper bound."""
    ax = row_axes([e.label for e in effects], "effect at the full budget (accuracy points)", ax)
    ax.axvspan(
        0, seed_sd.mid, color=PALE, alpha=0.7, lw=0, label=f"one seed standard deviation ({seed_sd.mid:.1f} points)"
    )
    dummy = next(e.effect for e in effects if e.name == DUMMY)
    ax.axvline(dummy.high, color=GREY, ls=":", lw=1.3, label="what a parameter without effect can reach")
    for y, e in enumerate(effects):
        colour, marker = (GREY, "D") if e.name == DUMMY else (BLUE, "o")
        draw_interval(ax, y, e.effect, colour, marker)
    ax.set_xlim(left=min(0.0, min(e.effect.low for e in effects) - 1.0))
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=9)
    return ax


def sobol(effects: Sequence[Effect], ax: Axes | None = None) -> Axes:
    """First-order and total Sobol indices of every parameter with intervals."""
    ax = row_axes([e.label for e in effects], "share of the variance of logit accuracy (Sobol index)", ax)
    for y, e in enumerate(effects):
        draw_interval(ax, y - 0.14, e.total, BLUE, "o", 2.4, ms=5.5)
        draw_interval(ax, y + 0.14, e.first, ORANGE, "s", 2.4, ms=5.5)
    ax.plot([], [], color=BLUE, marker="o", label="total: alone and with others")
    ax.plot([], [], color=ORANGE, marker="s", label="first order: alone")
    ax.set_xlim(0, min(1.0, max(e.total.high for e in effects) * 1.1 + 0.02))
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=9)
    return ax


def marginal(
    curve: Curve, dimension: Dimension, values: Sequence[Any], trials: Sequence[Trial], ax: Axes | None = None
) -> Axes:
    """Mean accuracy over one parameter with its band, and the trials with their `values` of it; hatched where the
    surface extrapolates.
    """
    ax = ax or new_axes(3.6, 2.8)
    names = dimension.type == "categorical"
    xs = np.arange(len(curve.values)) if names else np.asarray(curve.values, dtype=float)
    points = list(zip([curve.values.index(v) for v in values] if names else values, trials, strict=True))
    for complete, marker, colour, label in ((False, "x", GREY, "not to the end"), (True, "o", SKY, "full budget")):
        if part := [(x, trial.last) for x, trial in points if trial.complete == complete]:
            style = {"s": 14, "marker": marker, "color": colour, "alpha": 0.75, "lw": 0.9, "zorder": 2}
            ax.scatter(*zip(*part, strict=True), label=label, **style)
    if names:  # nothing lies between two choices
        ax.vlines(xs, curve.low, curve.high, color=BLUE, alpha=0.22, lw=6, zorder=3)
    else:
        ax.fill_between(xs, curve.low, curve.high, color=BLUE, alpha=0.22, lw=0, zorder=3)
    line: dict[str, Any] = {"ls": "none", "ms": 9} if names else {"lw": 2}
    ax.plot(xs, curve.mid, color=BLUE, zorder=4, marker="." if dimension.levels else None, **line)
    hatch = {"facecolor": "none", "hatch": "///", "edgecolor": PALE, "linewidth": 0, "zorder": 1}
    ax.fill_between(xs, 0, 1, where=curve.extrapolated.tolist(), transform=ax.get_xaxis_transform(), **hatch)
    _value_axis(ax, dimension)
    return ax


def _value_axis(ax: Axes, dimension: Dimension) -> None:
    """Axes of a mean accuracy over one parameter; choices are at 0, 1, 2, ..."""
    if dimension.type == "categorical":
        ax.set_xticks(range(len(dimension.choices)), [str(v) for v in dimension.choices])
    elif dimension.log:
        _log_axis(ax, log_marks(dimension.low, dimension.high))
    else:
        ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=dimension.type == "int"))
    accuracy_axis(ax)
    ax.tick_params(labelsize=8)
    ax.set(xlabel=dimension.label, ylabel="accuracy (points)")
    if (place := ax.get_subplotspec()) and not place.is_first_col():
        ax.set_ylabel("")


def pair_surface(surface: PairSurface, ax: Axes | None = None) -> Axes:
    """Mean accuracy over two parameters, as a heat map."""
    ax = ax or new_axes(6.4, 4.2)
    columns, rows = (
        [shown(v) for v in d.from_unit(u)] for d, u in ((surface.x, surface.grid_x), (surface.y, surface.grid_y))
    )
    write = len(columns) <= 17 and len(rows) <= 11  # more numbers would overlap
    _heat_map(ax, surface.mean, rows, columns, "mean accuracy (points)", annot=write, fmt=".0f")
    ax.invert_yaxis()
    ax.tick_params(labelsize=9)
    ax.set(xlabel=surface.x.label, ylabel=surface.y.label)
    return ax


def interactions(shares: Matrix, ax: Axes | None = None) -> Axes:
    """Share of the variance that each pair has beyond its two parameters alone: the lower triangle."""
    names = [words(name) for name in shares.names]
    ax = ax or new_axes(5.6, 1.6 + 0.4 * len(names))
    percents = 100 * np.where(np.tri(len(names), k=-1, dtype=bool), shares.values, np.nan)[1:, :-1]
    top = max(5.0, float(np.nanmax(percents)))  # so that a tenth of a percent does not look like much
    return _matrix(ax, percents, names[1:], names[:-1], "% of variance", fmt=".1f", vmax=top)


def more_than(probability: Matrix, ax: Axes | None = None) -> Axes:
    """P(the row's parameter matters more than the column's), in percent; from 5% to 95% is a tie."""
    names = [words(name) for name in probability.names]
    ax = ax or new_axes(5.6, 1.9 + 0.4 * len(names))
    _matrix(ax, 100 * probability.values, names, names, "probability (%)", fmt=".0f", vmax=100.0)
    ax.set_ylabel("this parameter ...")
    ax.set_xlabel("... matters more than this one")
    return ax


def over_epochs(epochs: Sequence[int], totals: Mapping[str, Array], ax: Axes | None = None) -> Axes:
    """Total Sobol index against epoch. totals: by parameter, (E, 3): low, mid, high; bands for the first five."""
    ax = ax or new_axes()
    colours = [BLUE, ORANGE, GREEN, RED, PURPLE] + [GREY] * len(totals)
    for k, (name, total) in enumerate(totals.items()):
        if k < 5:
            ax.fill_between(epochs, total[:, 0], total[:, 2], color=colours[k], alpha=0.13, lw=0)
        style = {"color": colours[k], "marker": "osD^vP*X"[k % 8], "ms": 5, "lw": 1.8 if k < 5 else 1}
        ax.plot(epochs, total[:, 1], label=words(name), **style)
    _log_axis(ax, epochs)
    ax.set_ylim(0, None)
    ax.set(xlabel="epoch", ylabel="total Sobol index")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return ax


def ablation(default: Interval, path: Sequence[Step], ax: Axes | None = None) -> Axes:
    """Accuracy from the default to the best configuration, one change at a time, largest gain first."""
    labels = ["default", *(f"{words(s.name)}: {shown(s.before)} to {shown(s.after)}" for s in path)]
    values = [default, *(s.accuracy for s in path)]
    ax = row_axes(labels, "expected accuracy at the full budget (points)", ax)
    ax.plot([v.mid for v in values], range(len(values)), color=BLUE, lw=0.8, alpha=0.6)
    for y, value in enumerate(values):
        draw_interval(ax, y, value)
    return ax


def calibration(observed: Array, predicted: Array, sd: Array, ax: Axes | None = None) -> Axes:
    """Predictions for held-out trials with 90% intervals, against what the trials reached. All three are logits."""
    ax = ax or new_axes(4.6, 4.2)
    reached, low, mid, high = (
        100 / (1 + np.exp(-x)) for x in (observed, predicted - 1.645 * sd, predicted, predicted + 1.645 * sd)
    )
    ax.errorbar(reached, mid, yerr=[mid - low, high - mid], fmt="o", ms=4, lw=0.8, color=BLUE, alpha=0.8)
    edges = [0.9 * float(min(reached.min(), low.min())), 100 - 0.9 * float(100 - max(reached.max(), high.max()))]
    ax.plot(edges, edges, color=BLACK, lw=1, ls="--", label="perfect prediction")
    accuracy_axis(ax, "x")
    accuracy_axis(ax, "y")
    ax.set(xlim=edges, ylim=edges)
    _legend_above(ax)
    ax.set(xlabel="accuracy reached (points)", ylabel="predicted without having seen the trial (points)")
    return ax


# ---- trials --------------------------------------------------------------------------------------------------


def learning_curves(curves: Sequence[Trial], ax: Axes | None = None) -> Axes:
    """Every trial's accuracy against epoch, coloured by origin, with a marker where it ended early."""
    ax = ax or new_axes()
    for curve in curves:
        colour, _, label = origin_style(curve.origin)
        ax.plot(curve.epochs, curve.accuracy, color=colour, lw=0.9, alpha=0.6, label=_once(ax, label))
        if curve.outcome in END_STYLE:
            colour, marker, size, label = END_STYLE[curve.outcome]
            style: dict[str, Any] = {"marker": marker, "ms": size, "color": colour, "ls": "none", "zorder": 3}
            style |= {"mfc": "none"} if curve.outcome == "stopped" else {}
            ax.plot(curve.epochs[-1:], curve.accuracy[-1:], label=_once(ax, label), **style)
    last = max((curve.epochs[-1] for curve in curves), default=0)
    if last > 4:
        _log_axis(ax, np.unique(np.round(np.geomspace(1, last, 6))))
    accuracy_axis(ax)
    ax.set(xlabel="epoch", ylabel="validation accuracy (points)")
    _legend_above(ax)
    return ax


def compute(trials: Sequence[Trial], ax: Axes | None = None) -> Axes:
    """Accuracy of complete trials against multiply-accumulates an image, with the Pareto front."""
    ax = ax or new_axes()
    for origin, (colour, marker, label) in _styles(trials):
        part = [t for t in trials if t.origin == origin]
        style = {"fmt": marker, "color": colour, "ms": 5, "lw": 0.8, "alpha": 0.8, "mec": "white", "mew": 0.5}
        bars = np.nan_to_num([t.sd for t in part])
        ax.errorbar([t.macs / 1e6 for t in part], [t.last for t in part], yerr=bars, label=label, **style)
    macs = [t.macs / 1e6 for t in trials]
    front = pareto_front(macs, [t.last for t in trials])
    style = {"where": "post", "color": BLACK, "lw": 1.4, "label": "Pareto front"}
    ax.step([macs[i] for i in front], [trials[i].last for i in front], **style)
    _log_axis(ax, log_marks(min(macs), max(macs)))
    accuracy_axis(ax)
    ax.set(xlabel="compute an image (million multiply-accumulates)", ylabel="validation accuracy (points)")
    _legend_above(ax)
    return ax


def history(trials: Sequence[Trial], ax: Axes | None = None) -> Axes:
    """Last accuracy of every trial by number (open: not complete), and the best complete trial so far."""
    ax = ax or new_axes(5.6, 3.4)
    for origin, (colour, marker, label) in _styles(trials):
        full, cut = ([t for t in trials if t.origin == origin and t.complete == complete] for complete in (True, False))
        ax.scatter([t.number for t in full], [t.last for t in full], color=colour, marker=marker, s=22, label=label)
        style = {"edgecolors": colour, "facecolors": "none", "marker": marker, "s": 20, "lw": 0.8}
        ax.scatter([t.number for t in cut], [t.last for t in cut], **style)
    best = np.fmax.accumulate([t.last if t.complete else np.nan for t in trials])
    ax.step([t.number for t in trials], best, where="post", color=BLACK, lw=1.4, label="best full-budget trial so far")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    accuracy_axis(ax)
    ax.set(xlabel="trial number (open: did not reach the full budget)", ylabel="last accuracy (points)")
    _legend_above(ax)
    return ax


def _styles(trials: Sequence[Trial]) -> list[tuple[str, tuple[str, str, str]]]:
    """Each origin with its colour, marker and words."""
    return [(origin, origin_style(origin)) for origin in sorted({t.origin for t in trials})]


# ---- fixed designs -------------------------------------------------------------------------------------------


def by_parameter(ranges: Sequence[OfatRange]) -> dict[str, dict[str, OfatRange]]:
    """Each parameter's ranges by baseline; the parameter with the widest one comes first."""
    table: dict[str, dict[str, OfatRange]] = {}
    for r in sorted(ranges, key=lambda r: r.parameter):
        table.setdefault(r.parameter, {})[r.baseline] = r
    return dict(sorted(table.items(), key=lambda item: -max(r.range for r in item[1].values())))


def tornado(ranges: Sequence[OfatRange], ax: Axes | None = None) -> Axes:
    """One factor at a time around each baseline: the range of accuracy, and the range that seed noise alone makes."""
    order = list(by_parameter(ranges))
    baselines = sorted({r.baseline for r in ranges})
    ax = row_axes([words(name) for name in order], "validation accuracy at the full budget (points)", ax, height=0.5)
    ax.use_sticky_edges = False  # a bar that ends at guessing shall not look cut off
    height = 0.8 / len(baselines)
    for k, baseline in enumerate(baselines):
        colour = (BLUE, ORANGE, GREEN)[k % 3]
        for r in (r for r in ranges if r.baseline == baseline):
            y = order.index(r.parameter) - 0.4 + height * (k + 0.5)
            label = _once(ax, f"around: {baseline}")
            ax.barh(y, r.range, left=r.low, height=height * 0.85, color=colour, alpha=0.85, label=label)
            ax.plot([r.baseline_accuracy] * 2, [y - height / 2, y + height / 2], color=BLACK, lw=1.5)
            ax.plot([r.low, r.low + r.noise], [y, y], color="white", lw=1.6)
    ax.plot([], [], color=BLACK, lw=1.5, label="the baseline itself")
    ax.plot([], [], color=GREY, lw=1.6, label="white line: seed noise alone")
    _legend_above(ax)
    return ax


def replicates(rows: Sequence[Replicate], ax: Axes | None = None) -> Axes:
    """Configurations run again on seeds that no choice was made by: mean with its 90% interval."""
    labels = [f"{r.row} ({r.seeds} seeds)" for r in rows]
    ax = row_axes(labels, "validation accuracy at the full budget (points)", ax)
    for y, r in enumerate(rows):
        draw_interval(ax, y, r.mean)
    return ax


# ---- studies side by side ------------------------------------------------------------------------------------

STUDY_STYLE = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (RED, "^"), (PURPLE, "v"), (SKY, "*"), (BLACK, "X")]


def study_styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each study."""
    return {name: STUDY_STYLE[k % len(STUDY_STYLE)] for k, name in enumerate(names)}


def compared_effects(effects: Mapping[str, Mapping[str, Interval]], ax: Axes | None = None) -> Axes:
    """Every parameter's effect in each study. effects: parameter -> study -> points."""
    studies = list(next(iter(effects.values())))
    label = "effect over what the studies share (accuracy points)"
    ax = row_axes([words(name) for name in effects], label, ax, height=0.25 + 0.17 * len(studies))
    for k, (study, (colour, marker)) in enumerate(study_styles(studies).items()):
        for y, by_study in enumerate(effects.values()):
            place = y + (k - (len(studies) - 1) / 2) * 0.6 / len(studies)
            draw_interval(ax, place, by_study[study], colour, marker, 2.4, ms=5.5)
        ax.plot([], [], color=colour, marker=marker, label=study)
    _legend_above(ax, columns=1)
    return ax


def compared_marginal(curves: Mapping[str, Curve], dimension: Dimension, ax: Axes | None = None) -> Axes:
    """Mean accuracy over one parameter in each study with its band. curves: by study."""
    ax = ax or new_axes(3.6, 2.8)
    names = dimension.type == "categorical"
    for (study, curve), (colour, _) in zip(curves.items(), study_styles(list(curves)).values(), strict=True):
        xs = np.arange(len(curve.values)) if names else np.asarray(curve.values, dtype=float)
        ax.fill_between(xs, curve.low, curve.high, color=colour, alpha=0.18, lw=0)
        ax.plot(xs, curve.mid, color=colour, lw=2, label=study, marker="." if dimension.levels else None)
    _value_axis(ax, dimension)
    return ax


def compared_curves(best: Mapping[str, Sequence[Trial]], ax: Axes | None = None) -> Axes:
    """Learning curves of each study's best trials, the best one thick. best: by study, the best first."""
    ax = ax or new_axes()
    for (study, trials), (colour, _) in zip(best.items(), study_styles(list(best)).values(), strict=True):
        for k, trial in enumerate(trials):
            style = {"lw": 0.9 if k else 2.4, "alpha": 0.6 if k else 1.0, "label": None if k else study}
            ax.plot(trial.epochs, trial.accuracy, color=colour, **style)
    last = max((trial.epochs[-1] for trials in best.values() for trial in trials), default=0)
    if last > 4:
        _log_axis(ax, np.unique(np.round(np.geomspace(1, last, 6))))
    accuracy_axis(ax)
    ax.set(xlabel="epoch", ylabel="validation accuracy (points)")
    _legend_above(ax, columns=1)
    return ax


def compared_fronts(trials: Mapping[str, Sequence[Trial]], ax: Axes | None = None) -> Axes:
    """Accuracy against compute of each study's complete trials, with each study's Pareto front."""
    ax = ax or new_axes()
    for (study, own), (colour, marker) in zip(trials.items(), study_styles(list(trials)).values(), strict=True):
        macs, accuracy = [t.macs / 1e6 for t in own], [t.last for t in own]
        ax.scatter(macs, accuracy, color=colour, marker=marker, s=16, alpha=0.55, lw=0)
        front = pareto_front(macs, accuracy)
        ax.step([macs[i] for i in front], [accuracy[i] for i in front], where="post", color=colour, lw=1.6, label=study)
    every = [t.macs / 1e6 for own in trials.values() for t in own]
    _log_axis(ax, log_marks(min(every), max(every)))
    accuracy_axis(ax)
    ax.set(xlabel="compute an image (million multiply-accumulates)", ylabel="validation accuracy (points)")
    _legend_above(ax, columns=1)
    return ax
