"""python -m analysis.paper: the published tables and figures, ours beside theirs."""

from __future__ import annotations

from ramcore.errors import UserError, entry_point, parsed, say, show

if __name__ == "__main__":
    entry_point("analysis.paper")

import itertools
import json
import math
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from scipy.stats import ttest_ind

from analysis import figures, load
from analysis.load import Exported, NoTrials, Source, StudyData, StudyRun
from analysis.results import INTERVAL, Interval, mean_interval
from analysis.text import number, span
from ramcore.config import SOURCES, TASKS, Config
from ramcore.data import TaskData
from ramcore.pictures import GlimpsePath, draw_canvas, draw_glimpses, glimpse_paths
from ramcore.private import private_arguments
from ramcore.published import CASE_STUDY, MNIH, PUBLISHED, Published
from ramcore.sources import load_task
from ramcore.space import Array
from study.designs import DESIGNS
from study.moved import tracking_uri

SIZES = ("glimpses", "patch", "scales")  # fields of Published
_DESIGN = {CASE_STUDY: "paper", MNIH: "mnih"}  # the design whose trials stand beside a source's rows


# ---- the tables ----------------------------------------------------------------------------------------------


class TableRow(NamedTuple):
    """A published row and ours beside it. Accuracies are of the test images, in points."""

    source: str
    task: str
    model: str
    published: float
    ours: float  # NaN where the note says why
    low: float
    high: float
    seeds: int
    data: str
    epochs: int
    note: str

    @property
    def mean(self) -> Interval:
        """Ours with its 90% interval."""
        return Interval(self.low, self.ours, self.high)


class Comparison(NamedTuple):
    """Two rows of one published table that differ in one size alone, and the change of test accuracy in points."""

    source: str
    task: str
    size: str
    before: str  # model
    after: str
    published: float
    change: float
    low: float
    high: float


class AblationRow(NamedTuple):
    """The tuned recipe, or the same with one choice undone: test accuracy in points, and the change from tuned."""

    task: str
    row: str
    accuracy: float
    low: float
    high: float
    change: float  # from the tuned row of the same study
    change_low: float
    change_high: float
    seeds: int
    epochs: int


class Measured(NamedTuple):
    """What we measured of one row: each seed's test accuracy, a fraction; none where the note says why."""

    accuracies: tuple[float, ...]
    data: str
    epochs: int
    note: str


def paper_table(records: Sequence[StudyData]) -> list[TableRow]:
    """Every published row with ours beside it.

    The case study's rows are trained at its own setting (design `paper`), Mnih's with the tuned recipe (design `mnih`).
    A row that no study has run yet says so.
    """
    table: list[TableRow] = []
    for row in PUBLISHED:
        ours = _measured(row, records)
        low, mid, high = mean_interval(_points(ours.accuracies))
        numbers = (row.accuracy, mid, low, high, len(ours.accuracies))
        table.append(TableRow(row.source, row.task, row.label, *numbers, *ours[1:]))
    return table


def comparison_table(records: Sequence[StudyData]) -> list[Comparison]:
    """Neighbouring RAMs of one published table and task that differ in one size alone, where both have been run."""
    table: list[Comparison] = []
    rams = [row for row in PUBLISHED if row.model == "ram"]
    for size in SIZES:
        by_size = sorted(rams, key=lambda row: (_all_but(row, size), getattr(row, size)))
        for before, after in itertools.pairwise(by_size):
            if _all_but(before, size) != _all_but(after, size):
                continue
            was, now = _measured(before, records), _measured(after, records)
            if was.accuracies and now.accuracies and (was.data, was.epochs) == (now.data, now.epochs):
                published, change = round(after.accuracy - before.accuracy, 2), _change(was.accuracies, now.accuracies)
                names = (before.source, before.task, size, before.label, after.label)
                table.append(Comparison(*names, published, change.mid, change.low, change.high))
    return table


def ablation_table(records: Sequence[StudyData]) -> list[AblationRow]:
    """What each choice of the tuned recipe is worth; empty where no `ablation` study has been run."""
    table: list[AblationRow] = []
    for one in records:
        tested = {str(trial["row"]): trial for trial in _trials(one) if trial["origin"] == "ablation"}
        tuned = tested["tuned"]["test_accuracies"] if "tuned" in tested else ()
        for row, trial in tested.items():
            accuracies = trial["test_accuracies"]
            mean, change = mean_interval(_points(accuracies)), _change(tuned, () if row == "tuned" else accuracies)
            numbers = (mean.mid, mean.low, mean.high, change.mid, change.low, change.high, len(accuracies))
            table.append(AblationRow(trial.get("task", ""), row, *numbers, int(_tracked(trial, "epochs"))))
    return table


def _all_but(row: Published, size: str) -> tuple[str | int, ...]:
    """A row's table, task and sizes without one size."""
    return row.source, row.task, *(getattr(row, name) for name in SIZES if name != size)


def _change(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Change of mean test accuracy between two rows, in points, with its 90% interval by Welch's t."""
    old, new = _points(before), _points(after)
    mid = float(new.mean() - old.mean()) if len(old) and len(new) else math.nan
    if min(len(old), len(new)) < 2:
        return Interval(math.nan, mid, math.nan)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # seeds that end alike
        bounds = ttest_ind(new, old, equal_var=False).confidence_interval(INTERVAL)
    return Interval(float(bounds.low), mid, float(bounds.high))


def _points(accuracies: Sequence[float]) -> Array:
    """Accuracies in points, of the seeds that have one."""
    values = 100 * np.array(accuracies, dtype=float)
    return values[np.isfinite(values)]


def _trials(records: StudyData) -> list[dict[Any, Any]]:
    return records.trials.to_dict(orient="records")


def _measured(row: Published, records: Sequence[StudyData]) -> Measured:
    """The best measurement of a row.

    Tested comes before not tested, MNIST before other images, more epochs before fewer, newer before older.
    """
    found: list[tuple[tuple[bool, bool, int, int], Measured]] = []
    for age, one in enumerate(records):  # newest first
        for trial in _trials(one):
            if trial["origin"] != _DESIGN[row.source] or not _same(row, trial):
                continue
            accuracies, epochs = tuple(trial["test_accuracies"]), int(_tracked(trial, "epochs"))
            data, note = str(trial.get("data", "")), ""
            if not len(_points(accuracies)):
                accuracies = ()
                known = {"running": "running", "failed": f"failed: {trial['stop_reason']}"}
                note = known.get(trial["state"], "not tested")
            found.append(((not note, data == "mnist", epochs, -age), Measured(accuracies, data, epochs, note)))
    return max(found, key=lambda item: item[0])[1] if found else Measured((), "", 0, "not run yet")


def _tracked(trial: dict[Any, Any], name: str) -> float:
    """A tracked number; 0 where none was tracked yet."""
    value = trial.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _same(row: Published, trial: dict[Any, Any]) -> bool:
    """Whether a trial trains the network of a published row."""
    expected: dict[str, Any] = {"task": row.task, "model": row.model}
    if row.model == "fc":
        expected["hidden_size"] = row.hidden
    elif row.glimpses:
        expected |= {"num_glimpses": row.glimpses, "patch_size": row.patch, "num_scales": row.scales}
    return not trial.get("canvas") and all(trial.get(name) == value for name, value in expected.items())


# ---- Markdown ------------------------------------------------------------------------------------------------

_NOTE = """\
Test accuracy with each seed's best validation epoch; mean over seeds. Beside the case study: its own setting. Beside \
Mnih et al.: the tuned recipe (ramcore/recipes.py)."""


def markdown(table: Sequence[TableRow], compared: Sequence[Comparison], ablated: Sequence[AblationRow]) -> str:
    """The published rows, one part a source; what their sizes change; what the tuned recipe's choices are worth."""
    parts = [f"# Published results and ours\n\n{_NOTE}"]
    for source, rows in itertools.groupby(table, key=lambda row: row.source):
        parts.append(f"## {source}")
        headings = ("task", "model", "published %", "ours % (90% interval)", "seeds", "data, epochs")
        parts.append(markdown_table(headings, (_published_cells(row) for row in rows)))
    if compared:
        parts.append("## What a size changes\n\nFrom one row to the next of the same table, in points.")
        headings = ("table", "task", "from", "to", "published", "ours (90% interval)")
        parts.append(markdown_table(headings, (_compared_cells(row) for row in compared)))
    if ablated:
        parts.append("## What each choice of the tuned recipe is worth")
        headings = ("task", "setting", "test % (90% interval)", "against tuned (90% interval)", "seeds", "epochs")
        parts.append(markdown_table(headings, (_ablated_cells(row) for row in ablated)))
    return "\n\n".join(parts) + "\n"


def _published_cells(row: TableRow) -> Sequence[object]:
    ours, setting = row.note or span(row.mean, 2), f"{row.data}, {row.epochs}" if row.data else ""
    return row.task, row.model, number(row.published, 2), ours, row.seeds or "", setting


def _compared_cells(row: Comparison) -> Sequence[object]:
    change = span(Interval(row.low, row.change, row.high), 2, "+")
    return row.source, row.task, row.before, row.after, number(row.published, 2, "+"), change


def _ablated_cells(row: AblationRow) -> Sequence[object]:
    mean, change = Interval(row.low, row.accuracy, row.high), Interval(row.change_low, row.change, row.change_high)
    shown = "not run yet" if math.isnan(mean.mid) else span(mean, 2)
    return row.task, row.row, shown, "" if math.isnan(change.mid) else span(change, 2, "+"), row.seeds, row.epochs


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headings, *([str(cell).replace("|", "/") for cell in row] for row in rows)]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(headings), *body])


# ---- figures -------------------------------------------------------------------------------------------------


def table_figure(rows: Sequence[TableRow], ax: Axes | None = None) -> Axes:
    """Published accuracy and ours with its interval, for every row."""
    labels = [f"{row.task}: {row.model}" for row in rows]
    ax = figures.row_axes(labels, "test accuracy (%)", ax, width=7.2, height=0.24)
    for y, row in enumerate(rows):
        ax.plot([row.published], [y], "D", color=figures.BLACK if row.source == CASE_STUDY else figures.GREY, ms=4.5)
        style = {"mec": "white"} if row.data == "mnist" else {"mec": figures.BLUE, "mfc": "none"}
        figures.draw_interval(ax, y, row.mean, width=2.5, ms=5.5, **style)
    ax.plot([], [], "D", color=figures.BLACK, label="case study")
    ax.plot([], [], "D", color=figures.GREY, label="Mnih et al.")
    ax.plot([], [], "o", color=figures.BLUE, label="ours, 90% interval")
    if any(math.isfinite(row.ours) and row.data != "mnist" for row in rows):
        ax.plot([], [], "o", color=figures.BLUE, mfc="none", label="ours, not on MNIST")
    ax.tick_params(axis="y", labelsize=8)
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=9)
    return ax


def sample_digits(tasks: Sequence[TaskData], count: int = 6) -> Figure:
    """The first test images of each task, one row a task (the case study's Figures 2 and 3)."""
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
            path = Path(download_artifacts(f"runs:/{study.run_id}/model", dst_path=folder, tracking_uri=uri))
        except (MlflowException, OSError):
            return None
        weights, described = next(path.rglob("weights.pt"), None), next(path.rglob("config.json"), None)
        if weights is None or described is None:
            return None
        config = Config(**json.loads(described.read_text())["config"])
        saved = torch.load(weights, weights_only=True, map_location="cpu")["weights"]
    found = SavedModel(study.name, config, {name: value[:1] for name, value in saved.items()})
    return found if config.model == "ram" else None


def glimpse_animation(config: Config, paths: Sequence[GlimpsePath]) -> FuncAnimation:
    """An animation of the glimpses of a few images, one after the other."""
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
    """Write the tables and figures. Gives 0, or 2 after a one-line message."""
    return load.exit_code("results", lambda: _write_all(args))


def _write_all(args: Args) -> None:
    uri = tracking_uri(args.tracking_uri)
    source = load.open_source(uri, args.records)
    studies = load.list_studies(source)
    records = _with_tables(source, studies, args.study)
    text = write_tables(args.out, records)
    model = None if isinstance(source, Exported) else _find_model(uri, studies, args.model_study)
    say(draw_pictures(args.out, model, _images(studies, records, model), args.data_dir))
    show(f"{text}\ntables and figures: {args.out}")


@figures.styled
def write_tables(out: Path, records: Sequence[StudyData]) -> str:
    """Write table.md, the tables as CSV and the table's figure to `out`. Gives the Markdown."""
    table, compared, ablated = paper_table(records), comparison_table(records), ablation_table(records)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(table, compared, ablated)
    (out / "table.md").write_text(text, encoding="utf-8")
    pd.DataFrame(table).to_csv(out / "table.csv", index=False)
    pd.DataFrame(compared, columns=list(Comparison._fields)).to_csv(out / "comparisons.csv", index=False)
    pd.DataFrame(ablated, columns=list(AblationRow._fields)).to_csv(out / "ablation.csv", index=False)
    figure = figures.figure_of(table_figure(table))
    for kind in ("png", "svg"):
        figure.savefig(out / f"table.{kind}")
    return text


def draw_pictures(out: Path, model: SavedModel | None, source: str, data_dir: Path | None) -> str:
    """Save sample digits, glimpses and their animation to `out`. Gives one line on what was drawn."""
    tasks = tuple(TASKS)
    try:
        samples = [load_task(Config(data=source, task=task), data_dir) for task in tasks]
        sample_digits(samples).savefig(out / "samples.png", dpi=170)
        if model is None:
            return "no study has saved a RAM yet, so no glimpses are drawn; run python -m study.run first"
        paths = glimpse_paths(model.config, model.weights, load_task(model.config, data_dir))
    except UserError as error:
        return f"no pictures of {source}: {error}"
    draw_glimpses(model.config, paths).savefig(out / "glimpses.png", dpi=170)
    glimpse_animation(model.config, paths).save(out / "glimpses.gif", writer=PillowWriter(fps=1.5), dpi=110)  # pyright: ignore[reportArgumentType]
    return f"glimpses of the best model of {model.study}"


def _with_tables(source: Source, studies: Sequence[StudyRun], name: str | None) -> list[StudyData]:
    """The named study, or every study that is reported as a table, newest first."""
    records: list[StudyData] = []
    for study in [load.find_study(studies, name)] if name else filter(_has_tables, studies):
        try:
            records.append(load.load_study(source, study, load.progress_line(f"reading {study.name}")))
        except NoTrials:
            say(f"{study.name} has no trial yet")
    return records


def _has_tables(study: StudyRun) -> bool:
    design = DESIGNS.get(study.params.get("design", ""))
    return design is not None and design.report == "tables"


def _find_model(uri: str, studies: Sequence[StudyRun], name: str | None) -> SavedModel | None:
    """The saved model of the named study, or of the newest one; studies with tables come first."""
    chosen = [load.find_study(studies, name)] if name else sorted(studies, key=lambda s: not _has_tables(s))
    return next(filter(None, (load_model(uri, study) for study in chosen[:10])), None)


def _images(studies: Sequence[StudyRun], records: Sequence[StudyData], model: SavedModel | None) -> str:
    """The images to draw: those of the model, else of the newest study."""
    if model is not None:
        return model.config.data
    named = [one.study.params.get("data") for one in records] + [study.params.get("data") for study in studies]
    return named[0] if named[0] in SOURCES else "digits"


def cli() -> int:
    """Entry point."""
    load.quieten()
    arguments = private_arguments()
    return main(parsed(lambda: tyro.cli(Args, args=arguments, description=__doc__)))
