"""Turn flags into everything that a study needs, or into one line that says why not. Starts no Ray, trains nothing."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ramcore.config import Config
from ramcore.data import TaskData
from ramcore.errors import UserError
from ramcore.recipes import TUNED
from ramcore.sources import DataMissing, load_task
from ramcore.space import Space
from study import designs
from study.checkpoints import numbers_present
from study.designs import DESIGNS, DesignInputs, TrialSpec
from study.flags import Flags, check_design
from study.integrity import RecordDamaged
from study.moved import tracking_uri
from study.record import RecordLost, StoredStudy, StudySettings, TrialRecord, best_trial, read_study
from study.search_space import checked, search_space
from study.snapshots import fetch
from study.sobol import SobolSequence
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
        source = _find_source(flags, storage, tasks[0], data.data, warnings)

    followed = known or source
    epochs = flags.epochs or (followed.settings.epochs if followed else design.epochs)
    seeds = flags.seeds_per_trial or (known.settings.seeds_per_trial if known else design.seeds_per_trial)
    total = flags.trials or (designs.DEFAULT_TRIALS if design.rows is None else None)
    if known:
        total = _total(flags.trials, known, warnings)

    recipe = DIGITS if data.data == "digits" else {}
    base = dataclasses.replace(TUNED, data=data.data, task=tasks[0], epochs=epochs, **recipe)
    space = checked(search_space(base)) if design.has_space else None
    inputs = DesignInputs(base=base, tasks=tasks, seeds_per_trial=seeds, space=space)
    if source:
        inputs = _around_best(inputs, source)
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
        data=data,
        storage=storage,
        known=known,
        warnings=tuple(warnings),
    )


def _total(asked: int | None, known: StoredStudy, warnings: list[str]) -> int:
    """The trials that a study is to have from now on: those asked for, but never fewer than have begun."""
    begun, before = len(known.trials), known.totals[-1]
    total = before if asked is None else max(asked, begun)
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
    if flags.task:
        tasks = (flags.task,)
    source = known.settings.data if known and flags.data == "auto" else flags.data
    if source == "auto" and not flags.study:
        # The study of these settings is continued, even where MNIST has come or gone since it began. MNIST goes first.
        names = (_default_name(tasks, data, design) for data in ("mnist", "digits"))
        known = next(filter(None, map(read, names)), None)
        source = known.settings.data if known else source
        if known and source == "digits":
            name = known.settings.study
            warnings.append(f"{name} is continued, on the bundled digits: pass --data mnist for a study of MNIST")
    data = _load(source, tasks[0], flags.data_dir, warnings)
    name = flags.study or _default_name(tasks, data.data, design)
    return name, design, tasks, data, known or read(name)


def _default_name(tasks: tuple[str, ...], data: str, design: str) -> str:
    return f"{'-'.join(tasks)}-{data}-{design}"


def _load(source: str, task: str, data_dir: Path | None, warnings: list[str]) -> TaskData:
    """The images; the bundled digits for "auto" where MNIST cannot be had. Raises UserError."""
    if source != "auto":
        return load_task(Config(data=source, task=task), data_dir)  # pyright: ignore[reportArgumentType]
    try:
        return load_task(Config(data="mnist", task=task), data_dir)
    except DataMissing as error:
        warnings.append(f"training on the bundled digits (1,797 images of 8x8 pixels), not on MNIST: {error}")
        return load_task(Config(data="digits", task=task))


def _find_source(flags: Flags, storage: Storage, task: str, data: str, warnings: list[str]) -> StoredStudy:
    """The newest search of this task and data that has a complete trial. Raises UserError if there is none."""
    found = _studies_of(storage, "search", task, data)
    searches = {name: search for name, search in found.items() if best_trial(search.trials)}
    if not searches:
        raise UserError(
            f"this design starts from a search's best configuration; {flags.storage} holds no search of {task} {data} "
            f"with a finished trial: run `python -m study.run --task {task} --data {data}` first"
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
    studies = _studies_of(storage, "replicate", settings.task, settings.data).values()
    return [trial for study in studies for trial in study.trials if trial.value is not None]


def _studies_of(storage: Storage, *kind: str) -> dict[str, StoredStudy]:
    """The studies of a (design, task, data) by name; those that cannot be read are left out."""
    found: dict[str, StoredStudy] = {}
    for name in storage.studies():
        try:
            known = _read(storage, name)
        except (UserError, RecordLost) as error:
            logger.warning("the study %s is left out: %s", name, error)
            continue
        if known is not None and (known.settings.design, known.settings.task, known.settings.data) == kind:
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
