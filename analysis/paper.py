"""python -m analysis.paper: the published tables and figures, ours beside theirs."""

from __future__ import annotations

# pandas' own annotations are unions that its indexing never returns here, so these checks only raise false alarms.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAssignmentType=false
import itertools
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import mlflow.artifacts
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from scipy.stats import ttest_ind

from analysis import figures
from analysis.importance import INTERVAL, Interval, mean_interval
from analysis.load import (
    Exported,
    NoTrials,
    Source,
    StudyData,
    StudyRun,
    find_study,
    list_studies,
    load_study,
    open_source,
    progress_line,
    quieten,
    tracking_uri,
)
from ramcore.config import Config, Data, Task
from ramcore.data import TaskData, load_task
from ramcore.errors import UserError
from ramcore.pictures import GlimpsePath, draw_canvas, draw_glimpses, glimpse_paths
from ramcore.published import CASE_STUDY, MNIH, PUBLISHED, Published
from study.designs import DESIGNS

SIZES = ("glimpses", "patch", "scales")  # fields of Published
_DESIGN = {CASE_STUDY: "paper", MNIH: "mnih"}  # the design whose trials stand beside a source's rows


# ---- the table -----------------------------------------------------------------------------------------------


class Ours(NamedTuple):
    """What we measured of one row: each seed's test accuracy, a fraction; none where the note says why."""

    accuracies: tuple[float, ...]
    data: str
    epochs: int
    note: str


def ablation_table(records: Sequence[StudyData]) -> pd.DataFrame:
    """What each choice of the tuned recipe is worth: columns task, row, accuracy, low, high (test, points), change,
    change_low, change_high (from the tuned row of the same study), seeds, epochs; empty where no `ablation` study has
    been run.
    """
    rows = []
    for one in records:
        trials = one.trials[one.trials["origin"] == "ablation"]
        tested = {str(trial["row"]): trial for _, trial in trials.iterrows()}
        tuned = tested["tuned"]["test_accuracies"] if "tuned" in tested else ()
        for row, trial in tested.items():
            accuracies, epochs = trial["test_accuracies"], int(_number(trial.get("epochs")))
            mean, change = mean_interval(_points(accuracies)), _change(tuned, () if row == "tuned" else accuracies)
            numbers = (mean.mid, mean.low, mean.high, change.mid, change.low, change.high)
            rows.append((trial.get("task", ""), row, *numbers, len(accuracies), epochs))
    columns = ["task", "row", "accuracy", "low", "high", "change", "change_low", "change_high", "seeds", "epochs"]
    return pd.DataFrame(rows, columns=columns)


def comparison_table(records: Sequence[StudyData]) -> pd.DataFrame:
    """What a published table lets one compare: its RAMs on one task that differ in one size alone, neighbours only.
    Columns source, task, size, before, after (models), published, change, low, high (of mean test accuracy, points,
    with its 90% interval); empty where no such pair has been run.
    """
    rows = []
    rams = [row for row in PUBLISHED if row.model == "ram"]
    for size in SIZES:
        ladder = sorted(rams, key=lambda row: (_apart_from(row, size), getattr(row, size)))
        for before, after in itertools.pairwise(ladder):
            if _apart_from(before, size) != _apart_from(after, size):
                continue
            was, now = _measured(before, records), _measured(after, records)
            if was.accuracies and now.accuracies and (was.data, was.epochs) == (now.data, now.epochs):
                published = round(after.accuracy - before.accuracy, 2)
                change = _change(was.accuracies, now.accuracies)
                names = (before.source, before.task, size, before.label, after.label)
                rows.append((*names, published, change.mid, change.low, change.high))
    columns = ["source", "task", "size", "before", "after", "published", "change", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _apart_from(row: Published, size: str) -> tuple[str | int, ...]:
    """What two rows share that differ in this size alone."""
    return row.source, row.task, *(getattr(row, name) for name in SIZES if name != size)


def _change(before: Sequence[float], after: Sequence[float]) -> Interval:
    """From one row's mean test accuracy to another's, in points, with its 90% interval by Welch's t."""
    old, new = _points(before), _points(after)
    mid = float(new.mean() - old.mean()) if len(old) and len(new) else math.nan
    if min(len(old), len(new)) < 2:
        return Interval(math.nan, mid, math.nan)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # seeds that end alike
        span = ttest_ind(new, old, equal_var=False).confidence_interval(INTERVAL)
    return Interval(float(span.low), mid, float(span.high))


def _points(accuracies: Sequence[float]) -> np.ndarray:
    """Accuracies in points, of the seeds that have one."""
    values = 100 * np.array(accuracies, dtype=float)
    return values[np.isfinite(values)]


def paper_table(records: Sequence[StudyData]) -> pd.DataFrame:
    """Every published row with ours beside it: columns source, task, model, published, ours, low, high, seeds, data,
    epochs, note. The case study's rows are trained at its own setting (design `paper`), Mnih's with the tuned recipe
    (design `mnih`); a row that no study has run yet says so.
    """
    rows = []
    for published in PUBLISHED:
        ours = _measured(published, records)
        mean = mean_interval(_points(ours.accuracies))
        rows.append(
            {
                "source": published.source,
                "task": published.task,
                "model": published.label,
                "published": published.accuracy,
                "ours": mean.mid,
                "low": mean.low,
                "high": mean.high,
                "seeds": len(ours.accuracies),
                "data": ours.data,
                "epochs": ours.epochs,
                "note": ours.note,
            }
        )
    return pd.DataFrame(rows)


def _measured(row: Published, records: Sequence[StudyData]) -> Ours:
    """The best that was measured of a row: tested before not, MNIST before other images, more epochs before fewer, then
    the newest.
    """
    found: list[tuple[tuple[bool, bool, int, int], Ours]] = []
    for age, one in enumerate(records):  # newest first
        for _, trial in one.trials.iterrows():
            if trial["origin"] != _DESIGN[row.source] or not _same(row, trial):
                continue
            accuracies, epochs = tuple(trial["test_accuracies"]), int(_number(trial.get("epochs")))
            data, note = str(trial.get("data", "")), ""
            if not len(_points(accuracies)):
                accuracies = ()
                known = {"running": "running", "failed": f"failed: {trial['stop_reason']}"}
                note = known.get(trial["state"], "not tested")
            found.append(((not note, data == "mnist", epochs, -age), Ours(accuracies, data, epochs, note)))
    nothing = Ours((), "", 0, "not run yet")
    return max(found, key=lambda item: item[0])[1] if found else nothing


def _number(value: Any) -> float:
    """A tracked number; 0 where none was tracked yet."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _same(row: Published, trial: pd.Series) -> bool:
    if trial.get("task") != row.task or trial.get("model") != row.model:
        return False
    if row.model == "fc":
        return _number(trial.get("hidden_size")) == row.hidden
    if not row.glimpses:
        return True
    sizes = tuple(_number(trial.get(name)) for name in ("num_glimpses", "patch_size", "num_scales"))
    return sizes == (row.glimpses, row.patch, row.scales)


def markdown(table: pd.DataFrame, compared: pd.DataFrame, ablated: pd.DataFrame) -> str:
    """The published rows as Markdown, one part a source, what their sizes change, and what the tuned recipe's choices
    are worth.
    """
    parts = []
    for source, rows in table.groupby("source", sort=False):
        lines = [f"## {source}", "", "| task | model | published % | ours % (90% interval) | seeds | data, epochs |"]
        lines.append("|---|---|---|---|---|---|")
        for _, row in rows.iterrows():
            ours = row["note"] if row["note"] else f"{row['ours']:.2f}{_range(row['low'], row['high'])}"
            setting = f"{row['data']}, {row['epochs']}" if row["data"] else ""
            cells = (row["task"], row["model"], f"{row['published']:.2f}", ours, row["seeds"] or "", setting)
            lines.append("| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |")
        parts.append("\n".join(lines))
    if len(compared):
        lines = ["## What a size changes", "", "From one row to the next of the same table, in points.", ""]
        lines += ["| table | task | from | to | published | ours (90% interval) |", "|---|---|---|---|---|---|"]
        for row in compared.itertuples():
            shown = f"{row.change:+.2f}{_range(row.low, row.high, '+.2f')}"
            names = (row.source, row.task, row.before, row.after)
            lines.append(f"| {' | '.join(names)} | {row.published:+.2f} | {shown} |")
        parts.append("\n".join(lines))
    if len(ablated):
        lines = ["## What each choice of the tuned recipe is worth", ""]
        lines.append("| task | setting | test % (90% interval) | against tuned (90% interval) | seeds | epochs |")
        lines.append("|---|---|---|---|---|---|")
        for row in ablated.itertuples():
            shown = f"{row.accuracy:.2f}{_range(row.low, row.high)}" if row.accuracy == row.accuracy else "not run yet"
            change = f"{row.change:+.2f}{_range(row.change_low, row.change_high, '+.2f')}"
            change = change if row.change == row.change else ""
            lines.append(f"| {row.task} | {row.row} | {shown} | {change} | {row.seeds} | {row.epochs} |")
        parts.append("\n".join(lines))
    note = (
        "Test accuracy with each seed's best validation epoch; mean over seeds. Beside the case study: its own "
        "setting. Beside Mnih et al.: the tuned recipe (ramcore/recipes.py)."
    )
    return f"# Published results and ours\n\n{note}\n\n" + "\n\n".join(parts) + "\n"


def _range(low: float, high: float, digits: str = ".2f") -> str:
    """An interval in brackets after its middle; nothing where there is none."""
    return f" ({low:{digits}} to {high:{digits}})" if low == low else ""


def table_figure(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Published accuracy and ours with its interval, for every row."""
    rows = table.iloc[::-1].reset_index(drop=True)
    ax = ax or figures.new_axes(7.2, 1.2 + 0.24 * len(rows))
    for y, row in rows.iterrows():
        ax.plot(row["published"], y, "D", color=figures.BLACK if row["source"] == CASE_STUDY else figures.GREY, ms=4.5)
        if row["low"] == row["low"]:
            ax.plot([row["low"], row["high"]], [y, y], color=figures.BLUE, lw=2.5, solid_capstyle="butt")
        if row["ours"] == row["ours"] and row["data"] == "mnist":
            ax.plot(row["ours"], y, "o", color=figures.BLUE, ms=5.5, mec="white", mew=0.6)
        elif row["ours"] == row["ours"]:
            ax.plot(row["ours"], y, "o", color=figures.BLUE, ms=5.5, mfc="none")
    for label, colour, marker in (
        ("case study", figures.BLACK, "D"),
        ("Mnih et al.", figures.GREY, "D"),
        ("ours, 90% interval", figures.BLUE, "o"),
    ):
        ax.plot([], [], marker, color=colour, label=label)
    if ((rows["ours"] == rows["ours"]) & (rows["data"] != "mnist")).any():
        ax.plot([], [], "o", color=figures.BLUE, mfc="none", label="ours, not on MNIST")
    ax.set_yticks(
        range(len(rows)), [f"{task}: {model}" for task, model in zip(rows["task"], rows["model"], strict=True)]
    )
    ax.tick_params(axis="y", labelsize=8)
    ax.set_xlabel("test accuracy (%)")
    ax.xaxis.grid(True, color=figures.PALE, lw=0.6)
    ax.set_axisbelow(True)
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=9)
    return ax


# ---- the pictures --------------------------------------------------------------------------------------------


def sample_digits(tasks: Sequence[TaskData], count: int = 6) -> Figure:
    """A row a task: its first test images (the case study's Figures 2 and 3)."""
    figure = Figure(figsize=(1.15 * count, 1.35 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), count, squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        index = torch.arange(count)[None]
        images = task.render("test", index, task.placement_keys("test", torch.zeros(1, dtype=torch.int64), 0))
        for i, ax in enumerate(row):
            ax.imshow(images[0, i].numpy(), cmap="gray", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
        row[0].set_title(f"{task.task}, {images.shape[-1]}x{images.shape[-1]}", fontsize=8.5, loc="left")
    return figure


class SavedModel(NamedTuple):
    """A tracked network: its configuration and one replicate's weights."""

    study: str
    config: Config
    weights: dict[str, torch.Tensor]


def load_model(uri: str, study: StudyRun) -> SavedModel | None:
    """The RAM that a study saved, its first seed; None if it saved none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = mlflow.artifacts.download_artifacts(
                artifact_uri=f"runs:/{study.run_id}/model", dst_path=folder, tracking_uri=uri
            )
        except (MlflowException, OSError):
            return None
        weights, described = next(Path(path).rglob("weights.pt"), None), next(Path(path).rglob("config.json"), None)
        if weights is None or described is None:
            return None
        config = Config(**json.loads(described.read_text())["config"])
        saved = torch.load(weights, weights_only=True, map_location="cpu")["weights"]
    if config.model != "ram":
        return None
    return SavedModel(study.name, config, {name: value[:1] for name, value in saved.items()})


def glimpse_animation(config: Config, paths: Sequence[GlimpsePath]) -> FuncAnimation:
    """The glimpses of a few images one after the other; the figure is the animation's."""
    figure = Figure(figsize=(2.0 * len(paths), 2.3), layout="constrained")
    axes = figure.subplots(1, len(paths), squeeze=False)[0]

    def frame(step: int) -> list[Any]:
        for ax, path in zip(axes, paths, strict=True):
            ax.clear()
            part = path._replace(locations=path.locations[: step + 1])
            draw_canvas(part, config, ax)
            best = int(path.probabilities[step].argmax())
            ax.set_title(f"a {path.label}; after {step + 1}: {best} ({path.probabilities[step, best]:.0%})", fontsize=8)
        return []

    return FuncAnimation(figure, frame, frames=config.num_glimpses, interval=700)


# ---- the command ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write the published tables and figures with ours beside them."""

    study: str | None = None
    """Take the rows from this study only; all of the designs paper, mnih and ablation, newest first, if left out."""
    model_study: str | None = None
    """Draw glimpses with the model this study saved; the newest one with a model if left out."""
    tracking_uri: str | None = None
    """MLflow tracking server; $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db, if left out."""
    records: Path | None = None
    """Read records that analysis.export wrote into this folder, not MLflow; there are no networks in them to draw."""
    data_dir: Path | None = None
    """Where MNIST's files are; the usual places are searched if left out."""
    out: Path = Path("reports/paper")
    """Folder for tables and figures."""


def main(args: Args) -> int:
    """Write table.md, table.csv and figures. Gives 0, or 2 after a one-line message."""
    try:
        uri = tracking_uri(args.tracking_uri)
        source = open_source(uri, args.records)
        studies = list_studies(source)
        records = _paper_records(source, studies, args.study)
        table = paper_table(records)
        args.out.mkdir(parents=True, exist_ok=True)
        compared, ablated = comparison_table(records), ablation_table(records)
        text = markdown(table, compared, ablated)
        (args.out / "table.md").write_text(text, encoding="utf-8")
        table.to_csv(args.out / "table.csv", index=False)
        compared.to_csv(args.out / "comparisons.csv", index=False)
        ablated.to_csv(args.out / "ablation.csv", index=False)
        with mpl.rc_context(figures.STYLE):
            figure = table_figure(table).figure
            for kind in ("png", "svg"):
                figure.savefig(args.out / f"table.{kind}")
        model = None if isinstance(source, Exported) else _find_model(uri, studies, args.model_study)
        for line in draw_pictures(args.out, model, _source(studies, records, model), args.data_dir):
            _say(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the results must be writable; {error}. Choose another folder with --out", file=sys.stderr)
        return 2
    print(text)
    print(f"tables and figures: {args.out}")
    return 0


def draw_pictures(out: Path, model: SavedModel | None, source: Data, data_dir: Path | None) -> list[str]:
    """Sample digits, glimpses and their animation into `out`; what could not be drawn is told in the lines given."""
    said: list[str] = []
    try:
        tasks: tuple[Task, ...] = ("original", "translated", "cluttered", "cluttered-100")
        sample_digits([load_task(Config(data=source, task=task), data_dir) for task in tasks]).savefig(
            out / "samples.png", dpi=170
        )
        if model is None:
            said.append("no study has saved a RAM yet, so no glimpses are drawn; run python -m study.run first")
            return said
        paths = glimpse_paths(model.config, model.weights, load_task(model.config, data_dir))
    except UserError as error:
        return [f"no pictures of {source}: {error}"]
    draw_glimpses(model.config, paths).savefig(out / "glimpses.png", dpi=170)
    glimpse_animation(model.config, paths).save(out / "glimpses.gif", writer=PillowWriter(fps=1.5), dpi=110)
    return [f"glimpses of the best model of {model.study}"]


def _paper_records(source: Source, studies: Sequence[StudyRun], name: str | None) -> list[StudyData]:
    chosen = [find_study(studies, name)] if name else [s for s in studies if _has_tables(s)]
    records: list[StudyData] = []
    for study in chosen:
        try:
            records.append(load_study(source, study, progress_line(f"reading {study.name}")))
        except NoTrials:
            _say(f"{study.name} has no trial yet")
    return records


def _has_tables(study: StudyRun) -> bool:
    design = DESIGNS.get(study.params.get("design", ""))
    return design is not None and design.report == "tables"


def _find_model(uri: str, studies: Sequence[StudyRun], name: str | None) -> SavedModel | None:
    chosen = [find_study(studies, name)] if name else sorted(studies, key=lambda s: not _has_tables(s))
    for study in chosen[:10]:
        model = load_model(uri, study)
        if model is not None:
            return model
    return None


def _source(studies: Sequence[StudyRun], records: Sequence[StudyData], model: SavedModel | None) -> Data:
    if model is not None:
        return model.config.data
    named = [one.study.params.get("data") for one in records] + [study.params.get("data") for study in studies]
    known: tuple[Data, ...] = ("mnist", "fashion-mnist", "digits")
    return next((source for source in known if named and named[0] == source), "digits")


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def cli() -> int:
    """Entry point."""
    quieten()
    return main(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    sys.exit(cli())
