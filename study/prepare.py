"""From flags to everything a study needs, or to one line that says why not. Nothing here starts Ray or trains."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramcore.config import Config, Data
from ramcore.data import DataMissing, TaskData, load_task
from ramcore.errors import UserError
from ramcore.recipes import TUNED
from ramcore.space import Space
from study import designs
from study.checkpoints import open_folder
from study.designs import Design, DesignInputs, TrialSpec, get_design
from study.record import RecordLost, StudySettings, best_trial, read_settings, read_trials
from study.search_space import search_space
from study.snapshots import fetch, is_remote, record_folder, studies
from study.sobol import SobolSequence

if TYPE_CHECKING:
    from study.run import Flags

# What the bundled digits are studied with. Batches of 20 of 1,197 images, so that an epoch is 59 steps, not 11; and the
# recipe of before location_input: in the 700 steps of a quick trial the tuned one finds better configurations, but what
# 28 trials of it show supports no ranking (results/LOG.md, 2026-11-25).
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
SEED = 0  # of Sobol and TPE in every study: two studies differ by what they are, not by luck
_EMPTY_SPACE: dict[str, Any] = {"schema": 1, "dimensions": [], "constraints": [], "default": {}, "fixed": {}}


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A study that can start."""

    settings: StudySettings
    space: Space | None  # None: the paper's rows, which span two tasks and other models
    rows: Callable[[], list[TrialSpec]] | None  # of a fixed design
    total: int | None  # trials asked for; None: all rows
    data: TaskData  # the images; every task is made from the same
    folder: Path  # of the record
    storage: str  # where the checkpoints are: a path or a URI
    exists: bool  # whether this is the continuation of a study
    warnings: tuple[str, ...]

    @property
    def trials_left(self) -> int:
        """Trials that have not ended."""
        if not self.exists:
            return self.total or len(self.rows() if self.rows else ())
        trials, rows = read_trials(self.folder / "study.db")
        total = min(self.total or 0, len(rows)) if rows is not None else self.total or 0
        return total - sum(t.state != "running" for t in trials)


def prepare(flags: Flags) -> Prepared:
    """Resolve the flags. What is not given is taken from the study of that name if it exists, else from the defaults.

    Raises:
        UserError: one line each.
    """
    check_numbers(flags)
    if flags.money_budget is not None and flags.price_per_hour is None:  # known where the study runs
        raise UserError("a money budget needs a price; got --money-budget alone: pass --price-per-hour too")
    _check_writable(flags.storage)
    known = _read(flags.storage, flags.study) if flags.study else None
    if known is None:
        name_of_design = flags.design or "search"
        design = get_design(name_of_design)
        tasks = (flags.task,) if flags.task else design.tasks
        wanted = flags.data
    else:
        name_of_design = flags.design or known[0].design
        design = get_design(name_of_design)
        tasks = (flags.task,) if flags.task else tuple(known[0].task.split("+"))
        wanted = known[0].data if flags.data == "auto" else flags.data
    if not set(tasks) <= set(design.possible_tasks):
        raise UserError(
            f"--design {name_of_design} is for the tasks {', '.join(design.possible_tasks)}; got --task {flags.task}: "
            "leave --task out, or pass one of these"
        )
    if flags.sobol_share is not None and design.rows is not None:
        raise UserError(f"--sobol-share is a search's; the design is {name_of_design}: leave it out")
    warnings: list[str] = []
    if wanted == "auto" and not flags.study:
        wanted, known = _existing_study(flags.storage, tasks, name_of_design, warnings)
    task_data = _load(wanted, tasks[0], flags.data_dir, warnings)
    data: Data = task_data.data  # type: ignore[assignment]
    name = flags.study or _default_name(tasks, data, name_of_design)
    folder = record_folder(flags.storage, name)
    known = known or _read(flags.storage, name)

    source = None
    if design.from_search and known is None:
        source = _source(flags.storage, tasks[0], data, warnings)
    epochs = flags.epochs or (known[0].epochs if known else source[0].epochs if source else None)
    epochs = epochs or design.epochs
    seeds = flags.seeds_per_trial or (known[0].seeds_per_trial if known else design.seeds_per_trial)
    share = flags.sobol_share if flags.sobol_share is not None else known[0].sobol_share if known else None
    total = flags.trials or (designs.DEFAULT_TRIALS if design.rows is None else None)
    if known:
        total = max(flags.trials or 0, known[1])  # a study never has fewer than it was asked for

    base = dataclasses.replace(TUNED, data=data, task=tasks[0], epochs=epochs)
    if data == "digits":
        base = dataclasses.replace(base, **DIGITS)
    space = search_space(base) if design.has_space else None
    rows = _rows(design, DesignInputs(base=base, tasks=tasks, seeds_per_trial=seeds, space=space), source)
    settings = StudySettings(
        study=name,
        task="+".join(tasks),
        data=data,
        digest=task_data.digest,
        design=name_of_design,
        epochs=epochs,
        seeds_per_trial=seeds,
        seed=SEED,
        sobol_share=designs.DEFAULT_SOBOL_SHARE if share is None else share,
        space=space.to_dict() if space else _EMPTY_SPACE,
    )
    if known and (differences := known[0].differences(settings)):
        raise UserError(
            f"a study's name stands for one space, task and data; {name} differs in {'; '.join(differences)}: "
            "pass another --study, or the same settings"
        )
    return Prepared(
        settings=settings,
        space=space,
        rows=rows,
        total=total,
        data=task_data,
        folder=folder,
        storage=flags.storage if is_remote(flags.storage) else str(Path(flags.storage).absolute()),
        exists=known is not None,
        warnings=tuple(warnings),
    )


def _rows(
    design: Design, inputs: DesignInputs, source: tuple[StudySettings, dict[str, Any]] | None
) -> Callable[[], list[TrialSpec]] | None:
    make = design.rows
    if make is None:
        return None
    if not design.from_search:
        return lambda: make(inputs)

    def around_the_best() -> list[TrialSpec]:
        assert source is not None and inputs.space is not None
        points = SobolSequence(inputs.space, designs.SPREAD_SEED)
        return make(
            dataclasses.replace(
                inputs,
                best={name: source[1][name] for name in inputs.space.names},
                source=source[0].study,
                spread=[points[i] for i in range(designs.SPREAD_POINTS)],
            )
        )

    return around_the_best


def _source(storage: str, task: str, data: str, warnings: list[str]) -> tuple[StudySettings, dict[str, Any]]:
    """The search whose best configuration a design starts from: the newest of the same task and data in the storage."""
    found: list[tuple[float, StudySettings, dict[str, Any], str]] = []
    for name in studies(storage):
        path = record_folder(storage, name) / "study.db"
        try:
            fetch(storage, name)
            known = read_settings(path)
            if known is None or (known[0].design, known[0].task, known[0].data) != ("search", task, data):
                continue
            trials, _ = read_trials(path)
        except (OSError, UserError, RecordLost) as error:
            logger.warning("the study %s is left out: %s", name, error)
            continue
        best = best_trial(trials)
        if best is not None:
            ended = sum(t.state != "running" for t in trials)
            unfinished = f"{ended} of {known[1]} trials have ended" if ended < known[1] else ""
            found.append((path.stat().st_mtime, known[0], dataclasses.asdict(best.spec.config), unfinished))
    if not found:
        raise UserError(
            f"this design starts from a search's best configuration; {storage} holds no search of {task} {data} with a "
            f"finished trial: run `python -m study.run --task {task} --data {data}` first"
        )
    _, settings, best, unfinished = max(found, key=lambda item: item[0])
    if unfinished:
        warnings.append(
            f"this design keeps the best configuration that {settings.study} has now, and that search is not finished "
            f"({unfinished}): finish it first if a better one may be found"
        )
    return settings, best


def _default_name(tasks: tuple[str, ...], data: str, design: str) -> str:
    """What a study is called that was given no name."""
    return f"{'-'.join(tasks)}-{data}-{design}"


def _existing_study(
    storage: str, tasks: tuple[str, ...], design: str, warnings: list[str]
) -> tuple[str, tuple[StudySettings, int] | None]:
    """What `--data auto` means, and what is known of the study that it continues: the same command continues a study,
    also where MNIST has come or gone since.

    A study of MNIST goes before one of digits; without either, "auto" is left to mean MNIST if it can be had.
    """
    for data in ("mnist", "digits"):
        name = _default_name(tasks, data, design)
        if (known := _read(storage, name)) is not None:
            if data == "digits":
                warnings.append(f"{name} is continued, on the bundled digits: pass --data mnist for a study of MNIST")
            return data, known
    return "auto", None


def _load(wanted: str, task: str, data_dir: Path | None, warnings: list[str]) -> TaskData:
    if wanted != "auto":
        return load_task(Config(data=wanted, task=task), data_dir)  # type: ignore[arg-type]
    try:
        return load_task(Config(data="mnist", task=task), data_dir)
    except DataMissing as error:
        warnings.append(f"training on the bundled digits (1,797 images of 8x8 pixels), not on MNIST: {error}")
        return load_task(Config(data="digits", task=task))


def check_numbers(flags: Flags) -> None:
    """Refuse numbers that mean nothing. Raises UserError."""
    for name, value in (
        ("--trials", flags.trials),
        ("--epochs", flags.epochs),
        ("--seeds-per-trial", flags.seeds_per_trial),
        ("--max-concurrent", flags.max_concurrent),
    ):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1; got {value}: pass a larger number or leave it out")
    for name, value in (
        ("--cpus-per-trial", flags.cpus_per_trial),
        ("--time-budget", flags.time_budget),
        ("--price-per-hour", flags.price_per_hour),
        ("--money-budget", flags.money_budget),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} must be above 0; got {value:g}: pass a positive number or leave it out")
    if flags.sobol_share is not None and not 0 < flags.sobol_share <= 0.8:
        raise UserError(
            f"--sobol-share must be above 0 and at most 0.8; got {flags.sobol_share:g}: a fifth of the trials is TPE's"
        )
    if not 0 <= (flags.gpus_per_trial or 0) < float("inf"):
        raise UserError(
            f"--gpus-per-trial must be at least 0; got {flags.gpus_per_trial:g}: pass 0, a fraction or a count"
        )
    if flags.study is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", flags.study):
        raise UserError(
            "a study's name is a folder's name: up to 100 letters, digits, and . _ + - after the first; "
            f"got {flags.study!r}: pass another --study"
        )


def _read(storage: str, study: str) -> tuple[StudySettings, int] | None:
    """What is known of a study of that name."""
    try:
        fetch(storage, study)
    except OSError as error:
        raise UserError(_unreachable(storage, error)) from error
    return read_settings(record_folder(storage, study) / "study.db")


def _unreachable(storage: str, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return f"--storage must be within reach; {storage} did not answer ({reason}): check its name and its credentials"


def _check_writable(storage: str) -> None:
    if is_remote(storage):
        try:
            folder = open_folder(storage, ".probe")
            folder.write("probe", b"")
            folder.delete("probe")
            folder.delete_folder("")
        except (OSError, ValueError) as error:  # pyarrow's ValueError: no such kind of storage
            raise UserError(_unreachable(storage, error)) from error
        return
    path = Path(storage).absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"--storage must be a folder that can be written; {path} cannot: pass another --storage")
