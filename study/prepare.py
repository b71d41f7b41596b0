"""Turn flags into everything that a study needs, or into one line that says why not. Starts no Ray, trains nothing."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ramcore.config import SOURCES, Config, nearest
from ramcore.data import TaskData
from ramcore.errors import UserError, usable
from ramcore.recipes import TUNED
from ramcore.sources import DataMissing, load_images, load_task
from ramcore.space import Space
from study import designs
from study.checkpoints import numbers_present
from study.designs import DESIGNS, DesignInputs, TrialSpec
from study.flags import Flags, asked_trials, check_design
from study.integrity import RecordDamaged
from study.moved import tracking_uri
from study.record import (
    AskedPoint,
    RecordLost,
    StoredStudy,
    StudySettings,
    TakenOver,
    TakenTrial,
    TrialRecord,
    best_trial,
    read_study,
)
from study.search_space import OF_THE_STUDY, checked, search_space
from study.snapshots import fetch
from study.sobol import SobolSequence
from study.space_flags import asked_points, asked_space
from study.storage import RECORD, Storage

# How the bundled digits differ from the tuned recipe. Batches of 20 of the 1,197 images give 59 steps an epoch, not 11.
# The rest is the recipe from before location_input. In the 700 steps of a quick trial the tuned recipe finds better
# configurations, but 28 trials of it support no ranking (results/LOG.md, 2026-11-25).
DIGITS: dict[str, Any] = {
    "batch_size": 20,
    "core": "gru",
    "glimpse_size": 128,
    "location_input": "state",
    "location_std_end": 1.0,
    "reward_steps": "last",
    "discount": 1.0,
    "learning_rate": 2e-3,
}
SEED = 0  # of Sobol and TPE, the same in every study: studies differ by their settings, not by their random numbers
_EMPTY_SPACE: dict[str, Any] = {"schema": 1, "dimensions": [], "constraints": [], "default": {}, "fixed": {}}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A study that can start."""

    settings: StudySettings
    space: Space | None  # None: the trials lie in no space; the published rows span two tasks and other models
    rows: Callable[[], list[TrialSpec]] | None  # of a fixed design
    total: int | None  # trials asked for; None: all rows
    aim: str  # of those that the total adds
    base: Config  # the recipe for these images
    asked: Sequence[AskedPoint]  # points to try that the study does not know yet
    taken: TakenOver | None  # what it learns from an earlier study
    data: TaskData  # the images; every task is made from the same
    storage: Storage
    known: StoredStudy | None  # the study that this continues
    warnings: tuple[str, ...]

    @property
    def record_path(self) -> Path:
        """The SQLite file of the record."""
        return self.storage.record_folder(self.settings.study) / RECORD

    @property
    def trials_left(self) -> int:
        """Trials that have not ended."""
        if self.known is None:
            return self.total or len(self.rows() if self.rows else ())
        total, rows = self.total or 0, self.known.rows
        return (total if rows is None else min(total, len(rows))) - self.known.ended


def prepare(flags: Flags) -> Prepared:
    """Resolve the flags. A flag that is left out is taken from the study if it exists, else from the defaults.

    Raises UserError if the flags, the data or the storage cannot be used, RecordLost if the record cannot be opened.
    """
    storage = Storage.parse(flags.storage)
    warnings: list[str] = []
    name, design_name, tasks, data, known = _find_study(flags, storage, warnings)
    design, source = DESIGNS[design_name], None
    if design.from_search and known is None:
        source = _find_source(flags, storage, tasks[0], data, warnings)
    elif flags.from_ and known is None:
        source = _earlier(storage, flags.from_)
    elif (
        flags.from_ and known and design_name == "search" and (known.taken is None or known.taken.study != flags.from_)
    ):
        there = f"from {known.taken.study}" if known.taken else "without"
        raise UserError(f"a study takes trials over when it begins; {name} began {there}: pass another --study")

    followed = known or source
    epochs = flags.epochs or (followed.settings.epochs if followed else design.epochs)
    like = known or (None if design.from_search else source)
    seeds = flags.seeds_per_trial or (like.settings.seeds_per_trial if like else design.seeds_per_trial)
    total = _total(flags, known, warnings) if known else asked_trials(flags)
    if total is None and design.rows is None:
        total = designs.DEFAULT_TRIALS

    recipe = DIGITS if data.data == "digits" else {}
    # A canvas of fewer than 24 pixels has smaller patches than the recipe.
    patch = min(TUNED.patch_size, max(1, data.canvas_size // 2))
    base = data.configure(dataclasses.replace(TUNED, task=tasks[0], patch_size=patch, epochs=epochs, **recipe))
    space = _space(flags, base, known, source, data) if design.has_space else None
    asked = _asked(flags, space, known) if space else []
    if total is not None:
        total = max(total, (len(known.trials) if known else 0) + len(asked))
    taken = known.taken if known else None
    if source and space and not design.from_search:
        taken = _take_over(source, space, epochs)
    inputs = DesignInputs(base=base, tasks=tasks, seeds_per_trial=seeds, space=space)
    if source and design.from_search:
        inputs = _around_best(inputs, source)
    if design.rows and known is None:
        _check_batches((row.config.batch_size for row in design.rows(inputs)), data, f", of design {design_name}")
    settings = StudySettings(
        study=name,
        task="+".join(tasks),
        data=data.data,
        digest=data.digest,
        design=design_name,
        epochs=epochs,
        seeds_per_trial=seeds,
        seed=SEED,
        sobol_share=flags.sobol_share or (known.settings.sobol_share if known else designs.DEFAULT_SOBOL_SHARE),
        canvas=data.canvas,
        own_space=known.settings.own_space if known else bool(flags.space_flags or source),
        space=space.to_dict() if space else _EMPTY_SPACE,
    )
    if known:
        known.settings.check_same(settings)
    elif design.rows is None and space and (outside := designs.points_outside(space)):
        warnings.append(f"a search begins with points inside its ranges; these lie outside: {'; '.join(outside)}")
    return Prepared(
        settings=settings,
        space=space,
        rows=partial(design.rows, inputs) if design.rows else None,
        total=total,
        aim=flags.aim or designs.AIMS[0],
        base=base,
        asked=asked,
        taken=taken,
        data=data,
        storage=storage,
        known=known,
        warnings=tuple(warnings),
    )


def _space(flags: Flags, base: Config, known: StoredStudy | None, source: StoredStudy | None, data: TaskData) -> Space:
    """The space of a study: its own, an earlier study's or this project's, as the flags change it. Raises UserError."""
    followed = known if known and known.settings.own_space else source
    space = search_space(base)
    if followed:
        space = Space.from_dict(followed.settings.space)
        own = {name: getattr(base, name) for name in OF_THE_STUDY}
        space = dataclasses.replace(space, fixed={**space.fixed, **own}, widest_scale=2 * base.canvas_size)
    space = checked(asked_space(space, flags.space_flags))
    searched = next((d for d in space.dimensions if d.name == "batch_size"), None)
    sizes = [space.fixed["batch_size"]] if searched is None else searched.choices or searched.from_unit((1.0,))
    _check_batches(sizes, data, ": pass --set batch_size=N" if searched is None else ": search smaller ones")
    return space


def _check_batches(sizes: Iterable[int], data: TaskData, fix: str) -> None:
    """Raises UserError if a batch holds more images than there are for training."""
    if (largest := max(sizes)) > (count := data.sizes["train"]):
        raise UserError(f"batch_size must be at most {count}, the training images; got {largest}{fix}")


def _asked(flags: Flags, space: Space, known: StoredStudy | None) -> list[AskedPoint]:
    """The points of --try that the study was not asked for before. Raises UserError."""
    begun, before = (len(known.trials), [point.values for point in known.asked]) if known else (0, [])
    new = [point for point in asked_points(space, flags.try_) if point[1] not in before]
    return [AskedPoint(begun + i, text, values) for i, (text, values) in enumerate(new)]


def _earlier(storage: Storage, name: str) -> StoredStudy:
    """The search that --from names. Raises UserError if there is none of that name."""
    found = _read(storage, name)
    if found is None or found.settings.design != "search":
        fact = "there is none" if found is None else f"it is of the design {found.settings.design}"
        raise UserError(f"--from must name a search in {storage}; {name}: {fact}{nearest(name, storage.studies())}")
    return found


def _take_over(source: StoredStudy, space: Space, epochs: int) -> TakenOver:
    """The ended trials of an earlier search that lie in a space. Raises UserError if there are none."""
    free = {name: value for name, value in space.fixed.items() if name != "epochs"}
    trials: list[TakenTrial] = []
    for trial in source.trials:
        config = dataclasses.asdict(trial.spec.config)
        values = {name: config[name] for name in space.names}
        accuracy = [epoch.value for epoch in trial.epochs if math.isfinite(epoch.value)]
        usable = trial.state in ("complete", "pruned") and accuracy
        if usable and space.contains(values) and all(config[name] == value for name, value in free.items()):
            trials.append(TakenTrial(trial.number, trial.spec.origin, trial.state, values, accuracy))
    if not trials:
        raise UserError(
            f"--from takes over ended trials that lie in the space; of the {len(source.trials)} of "
            f"{source.settings.study} none does: search what it searched, and fix what it fixed"
        )
    return TakenOver(source.settings.study, source.settings.epochs, trials)


def _total(flags: Flags, known: StoredStudy, warnings: list[str]) -> int:
    """The trials that a study is to have from now on: those asked for, but never fewer than have begun."""
    begun, before = len(known.trials), known.totals[-1]
    asked = asked_trials(flags, before)
    if str(flags.trials).startswith("+") and known.ended < before:
        asked = before
        fact = f"{known.ended} of the {before} trials of {known.settings.study} have ended"
        warnings.append(f"{fact}: this run ends the others, and --trials {flags.trials} adds none")
    total = before if asked is None else max(asked, begun)
    if flags.aim and total <= before and flags.aim != known.aims[-1]:
        warnings.append(f"--aim {flags.aim} is of trials that a run adds; this one adds none: pass a larger --trials")
    if asked is not None and asked < before:
        fact = f"--trials {asked} is fewer than the {before} that {known.settings.study} was asked for"
        warnings.append(f"{fact}, and {begun} have begun: it ends with {total}")
    return total


def _find_study(
    flags: Flags, storage: Storage, warnings: list[str]
) -> tuple[str, str, tuple[str, ...], TaskData, StoredStudy | None]:
    """The name, design, tasks and images of the study that the flags mean; and the study, if it exists.

    Raises UserError.
    """
    read = partial(_read, storage, flags=flags, warnings=warnings)
    known = read(flags.study) if flags.study else None
    design = flags.design or (known.settings.design if known else "search")
    check_design(flags, design)
    tasks = tuple(known.settings.task.split("+")) if known else DESIGNS[design].tasks
    earlier = None
    if flags.from_ and design == "search" and not known:
        earlier = _earlier(storage, flags.from_)
        tasks = tuple(earlier.settings.task.split("+"))
    if flags.task:
        tasks = (flags.task,)
    like = known or earlier
    source = like.settings.data if like and flags.data == "auto" else flags.data
    if like and source == like.settings.data and source not in SOURCES:
        source = _own_images(like)
    canvas = flags.canvas or (like.settings.canvas if like else 0)
    if source == "auto" and not flags.study:
        # The study of these settings is continued, even where MNIST has come or gone since it began. MNIST goes first.
        names = (_default_name(tasks, data, design) for data in ("mnist", "digits"))
        known = next(filter(None, map(read, names)), None)
        source = known.settings.data if known else source
        if known and source == "digits":
            name = known.settings.study
            warnings.append(f"{name} is continued, on the bundled digits: pass --data mnist for a study of MNIST")
    data = _load(source, tasks[0], canvas, flags.data_dir, warnings)
    if like and data.digest == like.settings.digest:  # own images may have been renamed
        data = dataclasses.replace(data, data=like.settings.data)
    name = flags.study or _default_name(tasks, data.data, design)
    return name, design, tasks, data, known or read(name)


def _default_name(tasks: tuple[str, ...], data: str, design: str) -> str:
    return f"{'-'.join(tasks)}-{data}-{design}"


def _own_images(study: StoredStudy) -> str:
    """Where the own images of a study were when it last ran. Raises UserError if nothing is there."""
    path = study.flags.get("data", "")
    with usable("--data"):
        is_there = Path(path).exists()
    if not is_there:
        own = study.settings
        raise UserError(
            f"the images of {own.study}, {own.data}, must be on this machine; {path} is gone: pass --data PATH"
        )
    return path


def _load(source: str, task: str, canvas: int, data_dir: Path | None, warnings: list[str]) -> TaskData:
    """The images; the bundled digits for "auto" where MNIST cannot be had. Raises UserError."""
    if source not in (*SOURCES, "auto"):
        return load_images(source, task, canvas)
    # The smallest patch: only the images are asked for here.
    config = Config(data="mnist" if source == "auto" else source, task=task, canvas=canvas, patch_size=1)
    try:
        return load_task(config, data_dir)
    except DataMissing as error:
        if source != "auto":
            raise
        warnings.append(f"using the bundled digits (1,797 images of 8x8 pixels), not MNIST: {error}")
        return load_task(dataclasses.replace(config, data="digits"))


def _find_source(flags: Flags, storage: Storage, task: str, data: TaskData, warnings: list[str]) -> StoredStudy:
    """The search that --from names, else the newest one of this task and data with a complete trial.

    Raises UserError if there is none.
    """
    names = storage.studies() if flags.from_ is None else [flags.from_]
    found = _studies_of(storage, names, ("search", task, data.data, data.canvas))
    searches = {name: search for name, search in found.items() if best_trial(search.trials)}
    if not searches:
        which = f"of {task} {data.data}" if flags.from_ is None else f"{flags.from_} of {task} {data.data}"
        raise UserError(
            f"this design starts from a search's best configuration; {flags.storage} holds no search {which} with a "
            f"finished trial: run `python -m study.run --task {task} --data {data.data}` first"
        )
    name = max(searches, key=lambda name: (storage.record_folder(name) / RECORD).stat().st_mtime)
    source = searches[name]
    if source.ended < source.totals[-1]:
        warnings.append(
            f"this design keeps the best configuration that {name} has now, and that search is not finished "
            f"({source.ended} of {source.totals[-1]} trials have ended): finish it first if a better one may be found"
        )
    return source


def held_out(storage: Storage, settings: StudySettings) -> list[TrialRecord]:
    """The complete trials on held-out seeds (design replicate) of a search's task and data.

    Raises OSError if the storage cannot be reached.
    """
    if settings.design != "search":
        return []
    kind = ("replicate", settings.task, settings.data, settings.canvas)
    studies = _studies_of(storage, storage.studies(), kind).values()
    return [trial for study in studies for trial in study.trials if trial.value is not None]


def _studies_of(storage: Storage, names: list[str], kind: tuple[str, str, str, int]) -> dict[str, StoredStudy]:
    """Those of these studies that are of a (design, task, data, canvas); those that cannot be read are left out."""
    found: dict[str, StoredStudy] = {}
    for name in names:
        try:
            known = _read(storage, name)
        except (UserError, RecordLost) as error:
            logger.warning("the study %s is left out: %s", name, error)
            continue
        if known is None:
            continue
        own = known.settings
        if (own.design, own.task, own.data, own.canvas) == kind:
            found[name] = known
    return found


def _around_best(inputs: DesignInputs, source: StoredStudy) -> DesignInputs:
    """The inputs of a design that starts from the best trial of a search."""
    best = best_trial(source.trials)
    assert best is not None and inputs.space is not None
    points = SobolSequence(inputs.space, designs.SPREAD_SEED)
    return dataclasses.replace(
        inputs,
        best={name: getattr(best.spec.config, name) for name in inputs.space.names},
        source=source.settings.study,
        spread=[points[i] for i in range(designs.SPREAD_POINTS)],
    )


def _read(
    storage: Storage, name: str, flags: Flags | None = None, warnings: list[str] | None = None
) -> StoredStudy | None:
    """What the storage knows of the study of a name; with --repair among the flags, after a damaged record is rebuilt.

    Raises UserError if the storage cannot be reached, RecordDamaged, RecordLost.
    """
    try:
        try:
            return stored_study(storage, name)
        except RecordDamaged as damage:
            if flags is None or warnings is None or not flags.repair:
                raise
            from study.repair import repair  # puts off MLflow

            found = repair(storage, name, tracking_uri(flags.tracking_uri))
            warnings += [str(damage).split(": ")[0], *found]
            return stored_study(storage, name)
    except OSError as error:
        raise storage.unreachable(error) from error


def stored_study(storage: Storage, name: str) -> StoredStudy | None:
    """The study of a name in a storage; None if there is none. Raises OSError, UserError, RecordDamaged, RecordLost."""
    fetch(storage, name)
    known = read_study(storage.record_folder(name) / RECORD, numbers_present(storage.folder(name)))
    if known is not None and (own := known.settings.study) != name:
        raise UserError(
            f"a study's folder has the study's name; {storage}/{name} holds {own}, copied or renamed: rename it back, "
            f"or continue the copy apart: move it to OTHER/{own} and pass --study {own} --storage OTHER "
            "--tracking-uri sqlite:///OTHER/mlflow.db"
        )
    return known
