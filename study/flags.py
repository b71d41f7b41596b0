"""The command line of `python -m study.run`: its flags, exit codes, signals and code.

This module is a leaf. It imports no torch, Ray, Optuna or MLflow, so that --help and a refusal answer at once.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro

from ramcore.config import SOURCES, TASKS, Config, nearest
from ramcore.errors import UserError, brief, parsed, say, usable
from study.designs import AIMS, DEFAULT_SOBOL_SHARE, DEFAULT_TRIALS, DESIGNS
from study.schema import DEFAULT_TRACKING_URI
from study.search_space import search_space
from study.space_flags import SpaceFlags, asked_space

# Exit codes, in README.md, too. SIGINT and SIGTERM give 130 and 143; the same command continues then.
DONE = 0
BROKEN = 1  # the first trials failed alike (a programming error), the record went away, or the driver itself failed
USAGE = 2  # the flags or the data cannot be used; nothing was started
SOME_FAILED = 3  # done, with failed trials
UNTRACKED = 4  # done, perhaps with failed trials, but MLflow lacks a part of it; the same command adds that
STOPPED = 75  # by a budget, or by what has to be mended (a full disk, say); then the same command continues

MOST = 1_000_000  # trials, epochs, seeds or slots; more than that means nothing, and would fill the memory
RAY_STEP = 0.0001  # CPUs: Ray counts in these

SUBMITTED = "RAM_STUDY_SUBMITTED"  # environment variable of a submitted job: command, commit, dirty, as JSON
DATA = ("auto", *SOURCES)


def _one_of(names: Collection[str]) -> str:
    """What --help shows for a flag that takes one of some names. `check` refuses other names."""
    return f"{{{','.join(names)}}}"


def _defaults(field_name: str) -> str:
    """A default of each design, in words: '100 for paper and mnih, 30 for the others'."""
    groups: dict[str, list[str]] = {}
    for name, design in DESIGNS.items():
        value = getattr(design, field_name)
        groups.setdefault(" and ".join(value) if isinstance(value, tuple) else str(value), []).append(name)
    *special, usual = sorted(groups, key=lambda value: len(groups[value]))
    return ", ".join([*(f"{value} for {' and '.join(groups[value])}" for value in special), f"{usual} for the others"])


def _default(text: str, metavar: str | None = None) -> Any:
    """The default that --help shows for a flag whose value is settled later, and what it takes."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})", metavar=metavar)


# Help texts with facts of the designs; the other flags have docstrings.
_TASK = tyro.conf.arg(
    metavar=_one_of(TASKS),
    help="How digits are placed on the canvas.",
    help_behavior_hint=f"(default: {_defaults('tasks')})",
)
_SUMMARIES = " ".join(f"{name}: {design.summary}." for name, design in DESIGNS.items())
_DESIGN = tyro.conf.arg(
    metavar=_one_of(DESIGNS),
    help=f"Which configurations are tried. {_SUMMARIES}",
    help_behavior_hint="(default: search)",
)

_TRIALS = _default(f"{DEFAULT_TRIALS} for search, one for each row for the others", "N|+N")
_AIM = _default(AIMS[0], _one_of(AIMS))
_GPUS = "as many trials share a GPU as its memory, the CPU cores and the gain allow; --dry-run says why"
_CONCURRENT = "as many as fit; on a cluster whose nodes set RAM_MAX_WORKERS, as many as fit once it has grown"

# The flags, in the groups of --help.


_Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]  # of a flag that may be given again and again


def flag_of(name: str) -> str:
    """The flag of a field of `Flags`. A field whose flag is a word of Python ends with "_"."""
    return f"--{name.rstrip('_').replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class StudyFlags:
    """What is studied."""

    task: Annotated[str | None, _TASK] = None
    data: Annotated[str, tyro.conf.arg(metavar=_one_of([*DATA, "PATH"]))] = "auto"
    """The images. auto: MNIST if it can be had, else the bundled digits, with a warning. PATH: own images, an .npz file
    or a folder of IDX files (on a cluster: on its head); `ramcore.sources.load_images` says what it holds."""
    canvas: Annotated[int | None, _default("the task's; with own images and --task original, the images'")] = None
    """Pixels along a side of the canvas."""
    data_dir: Annotated[Path | None, _default("$RAM_DATA_DIR, then the per-user cache, then a download")] = None
    """Folder of the IDX files."""
    design: Annotated[str | None, _DESIGN] = None
    trials: Annotated[str | int | None, _TRIALS] = None
    """Trials that the study has in the end, with those of earlier runs. +N: so many more, once all others have
    ended."""
    aim: Annotated[str | None, _AIM] = None
    """What the trials that this run adds to a search are for. accuracy: Sobol points, then TPE. sensitivity: after 16
    Sobol points, the configurations that narrow the report's intervals most; none is stopped early."""
    epochs: Annotated[int | None, _default(_defaults("epochs"))] = None
    """Epochs of a trial that is not stopped early."""
    seeds_per_trial: Annotated[int | None, _default(_defaults("seeds_per_trial"))] = None
    """Seeds of a trial, trained side by side."""
    sobol_share: Annotated[float | None, _default(f"{DEFAULT_SOBOL_SHARE:g}")] = None
    """Share of a search's trials that are Sobol points. These are never stopped early."""


@dataclass(frozen=True, kw_only=True)
class SearchFlags:
    """The space of a search, and its first points."""

    space: Annotated[Path | None, _default("study/search_space.py")] = None
    """TOML file with the space: a table for each field of Config, with low, high, and step or log; or with choices. See
    --print-space."""
    range_: Annotated[_Texts, tyro.conf.arg(name="range", metavar="NAME=LOW:HIGH[:log|:STEP]")] = ()
    """Search a field of Config, a number, between these: num_scales=1:3, learning_rate=1e-4:3e-3:log."""
    choices: Annotated[_Texts, tyro.conf.arg(metavar="NAME=VALUE,VALUE")] = ()
    """Search a field of Config among these: core=rnn,gru,lstm or layer_norm=true,false."""
    set_: Annotated[_Texts, tyro.conf.arg(name="set", metavar="NAME=VALUE")] = ()
    """Fix a field of Config in all trials: input_gain=2."""
    try_: Annotated[_Texts, tyro.conf.arg(name="try", metavar="NAME=VALUE,NAME=VALUE")] = ()
    """Try this point next; what it does not say is the default's."""
    from_: Annotated[str | None, tyro.conf.arg(name="from", metavar="STUDY"), _default("no study")] = None
    """A search: begin with that study's space, and learn from its trials that lie in the new one. They are never
    counted as trials of the new study, whose name --study says. ofat and replicate: the search to start from."""
    print_space: Annotated[bool, _default("no")] = False
    """Print the space, as --space reads it, and exit."""

    @property
    def space_flags(self) -> SpaceFlags:
        """The flags that ask for a space."""
        return SpaceFlags(file=self.space, ranges=self.range_, choices=self.choices, fixed=self.set_)


@dataclass(frozen=True, kw_only=True)
class RecordFlags:
    """Where the results are kept."""

    study: Annotated[str | None, _default("made of task, data and design")] = None
    """Name of the study. An existing study is continued with its own settings."""
    storage: Annotated[str, _default("$RAM_STORAGE, else runs")] = field(
        default_factory=lambda: os.environ.get("RAM_STORAGE") or "runs"
    )
    """Folder of the record and the checkpoints, or s3://bucket/folder. On several nodes, all of them must see it."""
    tracking_uri: Annotated[str | None, _default(f"$MLFLOW_TRACKING_URI, else {DEFAULT_TRACKING_URI}")] = None
    """MLflow server or database."""


@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    """Where the trials run."""

    address: Annotated[str | None, _default("$RAY_ADDRESS, else local")] = field(
        default_factory=lambda: os.environ.get("RAY_ADDRESS") or None
    )
    """local: this machine alone. auto or host:port: the Ray cluster of this node. http://127.0.0.1:8265: a cluster's
    job server; the command is submitted there and followed."""
    cpus_per_trial: float = 1.0
    """CPU cores of a trial."""
    gpus_per_trial: Annotated[float | None, _default(_GPUS)] = None
    """GPUs of a trial; 0 trains on the CPU. Trials share a GPU if this is a fraction (0.25: four)."""
    max_concurrent: Annotated[int | None, _default(_CONCURRENT)] = None
    """Most trials at a time."""


@dataclass(frozen=True, kw_only=True)
class LimitFlags:
    """What a run may take."""

    time_budget: Annotated[float | None, _default("no limit")] = None
    """Minutes after which this run stops; the same command continues."""
    price_per_hour: Annotated[float | None, _default("$RAM_PRICE_PER_HOUR, else none")] = None
    """Price of an hour of this machine, or of each worker of a cluster, in any currency. Used by --money-budget and
    --dry-run."""
    money_budget: Annotated[float | None, _default("no limit")] = None
    """Most that the machines of this run may cost, in the currency of --price-per-hour. A cluster's head is not
    counted."""


@dataclass(frozen=True, kw_only=True)
class ActionFlags:
    """What else the command can do."""

    repair: Annotated[bool, _default("no")] = False
    """Rebuild a damaged or lost record from its backups, the checkpoints and MLflow, say what could not be, and go
    on."""
    cancel: Annotated[int | None, _default("no trial")] = None
    """Stop the trial of this number after its next epoch, in the study that is running with the same name, and exit."""
    dry_run: Annotated[bool, _default("no")] = False
    """Print the plan, with an estimate of its time and cost, and exit. On a cluster, no machine is started."""


@dataclass(frozen=True, kw_only=True)
class Flags(ActionFlags, LimitFlags, MachineFlags, RecordFlags, SearchFlags, StudyFlags):
    """Run a study of the Recurrent Attention Model's hyperparameters, or continue it.

    Without flags, this is a search on translated MNIST on this machine.

    Examples:
      python -m study.run --dry-run
          print what would be done and how long it takes
      python -m study.run --data digits --task original --epochs 8 --trials 28
          a small study, minutes on two cores; the same command continues it
      python -m study.run --task cluttered --data mnist --trials 60
          a real one; a larger --trials later adds trials
      python -m study.run --study wide --from STUDY --range num_glimpses=2:12
          a new search over a wider range, which learns from an earlier one
      python -m study.run --task cluttered --data mnist --design replicate
          train its best configuration and the default again, on held-out seeds
    """


def parse(arguments: Sequence[str]) -> Flags:
    """The flags of a command line. Ends the process after --help, or with a message if they cannot be read."""

    def flags(
        study: StudyFlags,
        search: SearchFlags,
        record: RecordFlags,
        machine: MachineFlags,
        limit: LimitFlags,
        action: ActionFlags,
    ) -> Flags:
        groups = (study, search, record, machine, limit, action)
        return Flags(**{name: value for group in groups for name, value in vars(group).items()})

    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    about = inspect.cleandoc(Flags.__doc__ or "")
    return parsed(lambda: tyro.cli(flags, prog="python -m study.run", description=about, args=arguments, config=config))


def arguments(flags: Flags) -> list[str]:
    """The command line of these flags, without --address and without the flags at their defaults."""
    found: list[str] = []
    default = vars(Flags())
    for name, value in vars(flags).items():
        if name != "address" and value != default[name]:
            values = value if isinstance(value, tuple) else (value,)
            found += [
                word for one in values for word in ([flag_of(name)] if one is True else [flag_of(name), str(one)])
            ]
    return found


def asked_trials(flags: Flags, before: int = 0) -> int | None:
    """The trials that the flags ask for in all, of a study that was asked for `before`; None: they do not say."""
    if flags.trials is None:
        return None
    return int(flags.trials) + (before if str(flags.trials).startswith("+") else 0)


def check(flags: Flags) -> None:
    """Refuse flags that can be judged without the data, the storage or the cluster. Raises UserError."""
    for name, choices in (("task", TASKS), ("design", DESIGNS), ("aim", AIMS)):
        value = getattr(flags, name)
        if value is not None and value not in choices:
            fix = nearest(value, choices) or ": pass one of these"
            raise UserError(f"{flag_of(name)} must be one of {', '.join(choices)}; got {brief(value)}{fix}")
    with usable("--data"):
        is_path = re.search(r"[./]", flags.data) or (flags.data and Path(flags.data).exists())
    if flags.data not in DATA and not is_path:
        fix = nearest(flags.data, DATA) or ": pass one of these, or the path of own images"
        raise UserError(f"--data must be one of {', '.join(DATA)}; got {brief(flags.data)}{fix}")
    _require(flags, "storage", "a folder or a URI", bool, "pass one, or leave it out")
    _require(flags, "space", "a file", lambda v: v.is_file(), "--print-space writes one")
    _require(flags, "from_", "a study's name", bool, "pass one, or leave it out")
    _require(flags, "canvas", "at least 8 and at most 1000", lambda v: 8 <= v <= 1000, "pass another number of pixels")
    _require(flags, "cancel", f"at least 0 and at most {MOST}", lambda v: 0 <= v <= MOST, "pass a trial's number")
    if isinstance(flags.trials, str) and not re.fullmatch(r"[+-]?[0-9]{1,20}", flags.trials):
        rule = f"--trials must be a number of at most {MOST}, or +N for more"
        raise UserError(f"{rule}; got {brief(flags.trials)}: pass another --trials")
    for name in ("trials", "epochs", "seeds_per_trial", "max_concurrent"):
        _require(flags, name, "at least 1", lambda v: v >= 1, "pass a larger number or leave it out")
        _require(flags, name, f"at most {MOST}", lambda v: v <= MOST, "pass a smaller number")
    for name in ("cpus_per_trial", "time_budget", "price_per_hour", "money_budget"):
        _require(flags, name, "above 0", lambda v: 0 < v < math.inf, "pass a positive number or leave it out")
    _require(flags, "sobol_share", "above 0 and at most 0.8", lambda v: 0 < v <= 0.8, "a fifth of the trials is TPE's")
    _require(flags, "cpus_per_trial", f"at least {RAY_STEP}", lambda v: v >= RAY_STEP, "pass a larger number")
    _require(flags, "gpus_per_trial", "at least 0", lambda v: 0 <= v < math.inf, "pass 0, a fraction or a count")
    _require(flags, "gpus_per_trial", "whole above 1", lambda v: v <= 1 or v == int(v), "pass a fraction or a count")
    if re.match(r"([a-z][a-z0-9+.-]+:(?!//)|(s3|gs|gcs|abfss?|hdfs|file)//)", flags.storage):
        raise UserError(
            f"--storage must be a folder or a URI such as s3://bucket/folder; got {flags.storage}, which is neither: "
            "write :// after the kind, or ./ before a folder's name"
        )
    if (word := next((word for word in arguments(flags) if "\0" in word), None)) is not None:
        raise UserError(f"a flag must be text without NUL; got {brief(word)}: leave it out")
    asked_space(search_space(Config()), flags.space_flags)  # refuses wrong names and values at once
    if flags.repair and flags.dry_run:
        raise UserError("--dry-run writes nothing, and --repair does: pass one of them")
    if flags.study is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", flags.study):
        raise UserError(
            "a study's name is a folder's name: up to 100 letters, digits, and . _ + - after the first; "
            f"got {brief(flags.study)}: pass another --study"
        )
    if flags.design is not None:
        check_design(flags, flags.design)


def _require(flags: Flags, name: str, rule: str, fulfils: Callable[[Any], bool], fix: str) -> None:
    """Refuse a flag that is given and breaks the rule. Raises UserError."""
    value = asked_trials(flags) if name == "trials" else getattr(flags, name)
    with usable(flag_of(name)):
        fits = value is None or fulfils(value)
    if not fits:
        got = brief(value) if isinstance(value, int | float | str) else str(value)
        raise UserError(f"{flag_of(name)} must be {rule}; got {got}: {fix}")


def check_design(flags: Flags, name: str) -> None:
    """Refuse flags that do not go with the study's design. Raises UserError."""
    if name not in DESIGNS:
        raise UserError(f"--design must be one of {', '.join(DESIGNS)}; got {name!r}")
    design = DESIGNS[name]
    if flags.task is not None and flags.task not in design.possible_tasks:
        raise UserError(
            f"--design {name} is for the tasks {', '.join(design.possible_tasks)}; got --task {flags.task}: "
            "leave --task out, or pass one of these"
        )
    for field_name in ("aim", "sobol_share", "space", "range_", "choices", "set_", "try_", "print_space"):
        if getattr(flags, field_name) not in (None, (), False) and design.rows is not None:
            raise UserError(f"{flag_of(field_name)} is a search's; the design is {name}: leave it out")
    if flags.from_ is not None and not design.has_space:
        raise UserError(
            f"--from is for searches, and for designs that start from one; the design is {name}: leave it out"
        )
    if flags.from_ is not None and name == "search" and flags.study in (None, flags.from_):
        raise UserError(f"a study that learns from {flags.from_} needs a name of its own; pass --study with a new name")


def command() -> str:
    """The command line of this run, as a person repeats it."""
    if SUBMITTED in os.environ:
        return json.loads(os.environ[SUBMITTED])["command"]
    return shlex.join(["python", "-m", "study.run", *sys.argv[1:]])


def working_tree() -> tuple[str, bool]:
    """The commit of this code, or of the code that was submitted, and whether the code was changed since.

    ("unknown", True) outside a repository.
    """
    if SUBMITTED in os.environ:
        submitted = json.loads(os.environ[SUBMITTED])
        return submitted["commit"], submitted["dirty"]

    def git(*arguments: str) -> str:
        line = ["git", "-C", str(Path(__file__).resolve().parent.parent), *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def stopped(reason: object, *, broken: bool = True) -> int:
    """Print why the run stopped and how to continue; returns the exit code. `broken`: something has to be mended."""
    say(f"stopped ({reason}); {'once that is mended, ' if broken else ''}the same command continues: {command()}")
    return STOPPED


@contextmanager
def signals_caught(
    *numbers: signal.Signals, answer: Callable[[], None] = lambda: None, raising: type[Exception] | None = None
) -> Iterator[list[int]]:
    """Collect the signals that come inside the block, first one first. A second one ends the process at once.

    The first one calls `answer`, and raises `raising` in the main thread if that is given. In another thread than the
    main one, which gets all signals, nothing is caught.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        answer()
        if raising is not None:
            raise raising

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
