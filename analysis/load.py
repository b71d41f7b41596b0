"""The only reader of studies: from MLflow, or from a folder that `analysis.export` wrote, to tidy DataFrames.

`load_study` gives one row a trial (`trials`) and one row a trial, seed and epoch (`epochs`). It drops nothing: failed,
stopped and diverged trials are in, with their state and the reason that the study recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pandas as pd
import requests
from alembic.util import CommandError
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.rest_utils import http_request
from sqlalchemy.exc import SQLAlchemyError

from ramcore.config import nearest
from ramcore.errors import UserError, first_line, say, usable
from ramcore.private import without_secrets
from ramcore.space import Space
from study import moved, schema

TRIALS_CSV, EPOCHS_CSV = "trials.csv", "epochs.csv"  # of an exported study
EPOCH_COLUMNS = ["trial", "seed", "epoch", "val_accuracy"]
EPOCH_METRICS = (*schema.EPOCH_MEANS, schema.EPOCH_SECONDS)
RUNS_PER_REQUEST = 100  # MLflow's limit for one bulk request
ROWS_PER_REQUEST = 25_000  # MLflow's limit for one bulk answer
READERS = 8  # threads; reading waits for the server, not for this machine
MLFLOW_UI = "http://127.0.0.1:5000"  # where `mlflow ui` shows a database on this machine
NO_SPACE = "the study's space.json is missing or unreadable, so bounds and scales are unknown"
WHOLE_NUMBER = re.compile("[0-9]{1,9}")
OFAT_ROW_1 = re.compile(r"^baseline (?P<baseline>[^:]+?)(?:: (?P<parameter>\w+)=.+)?$")  # schema 1

# study.json of an exported study, and "study" in it.
_DESCRIPTION = {"study": dict, "settings": dict, "space": dict | None, "files": dict | None}
_STUDY = {"run_id": str, "name": str, "status": str, "started": int | float, "tags": dict, "params": dict}

SERVER_ERRORS = (MlflowException, SQLAlchemyError, requests.RequestException, OSError)
OnProgress = Callable[[int, int], None]  # called with the requests done and their number


class NoTrials(UserError):
    """The study has no trial yet."""


class StudyRun(NamedTuple):
    """A study's parent run."""

    run_id: str
    name: str
    status: str  # running, finished, stopped or failed
    started: float  # seconds since 1970
    tags: dict[str, str]
    params: dict[str, str]


class StudyData(NamedTuple):
    """A study as tables.

    trials: index trial number; columns origin, row, state, stop_reason, seeds (tuple), macs, parameters, epochs_seen,
        test_accuracy (fraction or NaN), started (seconds), and every configuration field by its name.
    epochs: one row a trial, seed and epoch (from 1): trial, seed, epoch, val_accuracy (fraction, of that seed), then
        the trial's mean metrics of that epoch, origin, state, stop_reason and the configuration.
    """

    study: StudyRun
    trials: pd.DataFrame
    epochs: pd.DataFrame
    space: Space | None
    space_problem: str | None
    settings: dict[str, Any]  # study.json, empty where it is missing
    raw_space: dict[str, Any] | None = None  # space.json, as saved
    pages: dict[int, str] | None = None  # MLflow's page of each trial; None for exported records

    @property
    def budget(self) -> int:
        """Epochs of a trial that is not stopped early."""
        known = (self.raw_space or {}).get("epochs") or self.settings.get("epochs")
        return known if isinstance(known, int) else int(self.epochs["epoch"].to_numpy().max())


def connect(uri: str) -> MlflowClient:
    """A client for a tracking server that exists. Raises UserError otherwise (MLflow would create an empty file)."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        path = moved.database_file(uri)
        with usable("--tracking-uri"):
            is_missing = path is not None and not path.is_file()
        if is_missing:
            raise UserError(
                f"the tracking database must exist; there is no {path}. Run a study first (python -m study.run), or "
                "name the right one with --tracking-uri"
            )
        moved.check_database(uri)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except (*SERVER_ERRORS, ImportError, CommandError, ValueError) as error:  # ValueError: no such address
        raise UserError(
            f"the tracking server must answer; {uri} does not ({first_line(error)}). Check --tracking-uri"
        ) from error
    return client


def open_study(
    name: str | None = None,
    *,
    tracking_uri: str | None = None,
    records: Path | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> StudyData:
    """Read a study by its name, or the newest one, from MLflow or from the folder `records` of exported ones.

    Raises UserError if there is no such study, it has no trial yet, or it cannot be read.
    """
    source = open_source(moved.tracking_uri(tracking_uri), records)
    return load_study(source, find_study(list_studies(source), name), on_progress)


def open_source(uri: str, folder: Path | None) -> Source:
    """The exported records in a folder if one is given, else the tracking server. Raises UserError."""
    return connect(uri) if folder is None else Exported(Path(folder))


def exit_code(what: str, work: Callable[[], None]) -> int:
    """Do a command's work, which writes `what`. Gives 0, or 2 after one line on an error that the user can act on."""
    try:
        work()
    except UserError as error:
        say(f"error: {error}")
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null byte" not in str(error):  # that is of a NUL in a path
            raise
        say(f"error: the {what} must be writable; {error}. Choose another folder with --out")
    else:
        return 0
    return 2


def quieten() -> None:
    """Keep the libraries' messages off the screen; called by entry points only."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # our one line says that its retries failed
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    warnings.filterwarnings("ignore", category=FutureWarning, module="mlflow")


def list_studies(source: Source) -> list[StudyRun]:
    """All studies, newest first. Raises UserError if there is none."""
    if isinstance(source, Exported):
        return source.studies()
    with _readable("studies"):
        experiment = source.get_experiment_by_name(schema.EXPERIMENT)
        runs = _search(source, experiment.experiment_id, f"tags.`{schema.KIND}` = 'study'") if experiment else []
    if not runs:
        raise UserError(
            f"a study must have been run; experiment {schema.EXPERIMENT!r} holds none. Run python -m study.run"
        )
    # A parent run that was made twice is one study: the tracker has written into one of the two only.
    runs = sorted(runs, key=lambda run: schema.STATUS in run.data.tags)
    studies = {run.data.tags.get(schema.UID, run.info.run_id): _study_run(run) for run in runs}
    return sorted(studies.values(), key=lambda study: study.started, reverse=True)


def _study_run(run: Run) -> StudyRun:
    tags = dict(run.data.tags)
    name, status = tags.get(schema.STUDY) or str(run.info.run_name), tags.get(schema.STATUS, "running")
    return StudyRun(run.info.run_id, name, status, (run.info.start_time or 0) / 1000, tags, dict(run.data.params))


def find_study(studies: Sequence[StudyRun], name: str | None, flag: str = "--study") -> StudyRun:
    """The newest study of that name or run id; without a name, the newest of all.

    Raises UserError with the names that exist if there is none.
    """
    if name is None:
        return studies[0]
    for study in studies:
        if name in (study.name, study.run_id):
            return study
    known = ", ".join(study.name for study in studies[:8]) + (", ..." if len(studies) > 8 else "")
    near = nearest(name, (study.name for study in studies))
    raise UserError(f"{flag} must name a study that exists; got {name!r}{near}. There is: {known}")


def load_others(source: Source, studies: Sequence[StudyRun], study: StudyRun) -> list[StudyData]:
    """All other studies of the same task, data and epochs that have trials, in the order of `studies`."""
    alike = [
        s for s in studies if all(s.params.get(key) == study.params.get(key) for key in ("task", "data", "epochs"))
    ]
    found: list[StudyData] = []
    for other in alike:
        if other.run_id != study.run_id:
            with contextlib.suppress(NoTrials):
                found.append(load_study(source, other))
    return found


def load_study(source: Source, study: StudyRun, on_progress: OnProgress = lambda done, total: None) -> StudyData:
    """Read a study whole: its trials, every epoch of every seed, its space and settings.

    Raises UserError if the study has no trial yet or the server fails on the way.
    """
    _check_schema(study)
    if isinstance(source, Exported):
        return source.read(study)
    with _readable(f"records of {study.name}"):
        experiment = source.get_experiment_by_name(schema.EXPERIMENT)
        if experiment is None:
            raise UserError(f"experiment {schema.EXPERIMENT!r} must exist; it does not. Run python -m study.run")
        # By the uid, because a parent run may have been deleted or made twice. The first studies had none.
        tag, value = (schema.UID, study.tags[schema.UID]) if schema.UID in study.tags else (schema.PARENT, study.run_id)
        found = _search(source, experiment.experiment_id, f"tags.`{tag}` = '{value}'")
        runs: list[Run] = []
        for run in (run for run in found if run.data.tags.get(schema.KIND, "trial") == "trial"):
            if WHOLE_NUMBER.fullmatch(number := run.data.tags.get(schema.TRIAL, "")):
                runs.append(run)
            else:
                say(f"warning: MLflow's run {run.info.run_id} is left out: its tag {schema.TRIAL} is {number!r}")
        history = _read_history(source, runs, on_progress)
        raw_space = _read_json(source, study, schema.SPACE_FILE)
        settings = without_secrets(_read_json(source, study, schema.SETTINGS_FILE) or {})  # older versions kept them
    if not runs:
        raise NoTrials(
            f"a study needs trials to be analysed; {study.name} ({study.status}) has none yet. Wait for it, or choose "
            "another with --study"
        )
    space, problem = _space_of(raw_space)
    trials = _trial_table(runs)
    epochs = _epoch_table(trials, history)
    last = epochs.groupby("trial").agg(last=("epoch", "max"))["last"].to_dict()
    trials["epochs_seen"] = [last.get(trial, 0) for trial in trials.index]
    pages = _pages(source.tracking_uri, experiment.experiment_id, trials["run_id"].to_dict())
    return StudyData(study, trials.drop(columns="run_id"), epochs, space, problem, settings, raw_space, pages)


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Raises UserError where MLflow fails, or holds what it cannot read itself."""
    try:
        yield
    except SERVER_ERRORS as error:
        fix = "put a copy of the database back, or pass another --tracking-uri"
        raise UserError(f"the {what} in MLflow must be readable; {first_line(error)}: {fix}") from error


def _pages(uri: str, experiment: str, runs: Mapping[int, str]) -> dict[int, str]:
    """The web page of each trial's run: of the tracking server, or of an `mlflow ui` that shows the database."""
    parts = urlsplit(uri)
    if parts.scheme == "databricks":
        return {}
    host = parts.netloc.rpartition("@")[2]  # without user and password
    server = f"{parts.scheme}://{host}{parts.path.rstrip('/')}" if parts.scheme in ("http", "https") else MLFLOW_UI
    return {trial: f"{server}/#/experiments/{experiment}/runs/{run_id}" for trial, run_id in runs.items()}


def _check_schema(study: StudyRun) -> None:
    found = study.tags.get(schema.SCHEMA, "1")
    if not WHOLE_NUMBER.fullmatch(found) or int(found) > schema.VERSION:
        raise UserError(
            f"this version reads tracked studies of schema 1 to {schema.VERSION}; {study.name} has schema {found}: "
            "use the version of the project that wrote it, or a newer one"
        )


class Exported:
    """A folder of exported studies, a folder each: study.json (the run, its settings and space, the checksums of the
    other two), trials.csv and epochs.csv. They are text, for version control and for machines without MLflow.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder holds no study."""
        self.folder = folder
        with usable("--records"):
            holds = folder.is_dir() and any((own / "study.json").is_file() for own in folder.iterdir())
        if not holds:
            raise UserError(
                f"--records must be a folder that analysis.export wrote; {folder} holds no study. Run python -m "
                f"analysis.export --out {folder}, or leave --records out to read MLflow"
            )

    def studies(self) -> list[StudyRun]:
        """Every study in the folder, newest first."""
        found = [StudyRun(**self._description(path.parent)["study"]) for path in self.folder.glob("*/study.json")]
        return sorted(found, key=lambda study: (study.started, study.name), reverse=True)

    def read(self, study: StudyRun) -> StudyData:
        """A study as it was exported. Raises UserError if a file is missing or damaged."""
        own = self.folder / folder_name(study.name)
        described = self._description(own)
        space, problem = _space_of(described["space"])
        file = own / TRIALS_CSV
        with _whole(file):
            _check_digest(file, described)
            trials = _exported_trials(file, () if space is None else space.names)
            if described["files"] is None:
                _check_numbers(study, trials)
        file = own / EPOCHS_CSV
        with _whole(file):
            _check_digest(file, described)
            epochs = _exported_epochs(file)
            if described["files"] is None:
                _check_epochs(trials, epochs)
        epochs = _with_context(epochs, trials)
        return StudyData(study, trials, epochs, space, problem, described["settings"], described["space"])

    @staticmethod
    def write_to(folder: Path, records: StudyData) -> Path:
        """Write a study's folder into `folder`, and give its path."""
        own = folder / folder_name(records.study.name)
        there = Exported._description(own)["study"]["run_id"] if (own / "study.json").is_file() else None
        if there not in (None, records.study.run_id):
            raise UserError(
                f"a folder holds one study; {own} holds another of that name (MLflow run {there}). Choose another "
                "folder with --out"
            )
        own.mkdir(parents=True, exist_ok=True)
        study = records.study._replace(tags={k: v for k, v in records.study.tags.items() if k.startswith("ram.")})
        settings = {k: v for k, v in records.settings.items() if k != "record"}  # a path of the machine it ran on
        plain_trials(records.trials).to_csv(own / TRIALS_CSV)
        columns = [*EPOCH_COLUMNS, *(c for c in EPOCH_METRICS if c in records.epochs)]
        records.epochs[columns].to_csv(own / EPOCHS_CSV, index=False)
        files = {name: _digest(own / name) for name in (TRIALS_CSV, EPOCHS_CSV)}
        described = {"study": study._asdict(), "settings": settings, "space": records.raw_space, "files": files}
        (own / "study.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        return own

    @staticmethod
    def _description(own: Path) -> dict[str, Any]:
        """study.json. Raises UserError."""
        with _whole(own / "study.json"):
            described = json.loads((own / "study.json").read_text(encoding="utf-8"))
            if isinstance(described, dict):
                described.setdefault("files", None)  # of an older export
            _check_fields(described, _DESCRIPTION)
            study = described["study"]
            _check_fields(study, _STUDY)
            for name in ("tags", "params"):
                _check_fields(study[name], dict.fromkeys(study[name], str))
        return described


@contextlib.contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Raises UserError with the name of an exported file that cannot be read, or is not as it was exported."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"exported records must be whole; {file}: {first_line(error)}. Delete it and export again"
        ) from error


def _check_fields(value: Any, kinds: Mapping[str, Any]) -> None:
    """Raises ValueError."""
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise ValueError(f"it must hold {', '.join(kinds)}, and nothing else beside them")
    if wrong := [name for name, kind in kinds.items() if not isinstance(value[name], kind)]:
        raise ValueError(f"{wrong[0]} is {json.dumps(value[wrong[0]])[:50]}, which is of another type")


def _exported_trials(file: Path, searched: Iterable[str]) -> pd.DataFrame:
    """trials.csv. Raises OSError, ValueError."""
    trials = pd.read_csv(file, dtype=str, keep_default_na=False).map(_value)
    trials = trials.rename(columns={"arm": "origin"})  # schema 1
    numbers = ("macs", "parameters", "test_accuracy", "started")
    words = ("origin", "row", "state", "stop_reason")
    _check_table(trials, [*words, *numbers, "seeds", "test_accuracies", "epochs_seen", *searched], keys=["trial"])
    for column, kind in (("seeds", int), ("test_accuracies", float)):
        trials[column] = [tuple(kind(v) for v in str(text).split()) for text in trials[column]]
    trials = _upgrade(trials.set_index("trial"))
    for column in (*words, "baseline", "parameter"):
        trials[column] = trials[column].astype(str)
    for column in numbers:
        trials[column] = pd.to_numeric(trials[column])
    _check_fractions("test_accuracy", [*trials["test_accuracy"], *itertools.chain(*trials["test_accuracies"])])
    return trials


def _exported_epochs(file: Path) -> pd.DataFrame:
    """epochs.csv. Raises OSError, ValueError."""
    epochs = pd.read_csv(file)
    _check_table(epochs, ["val_accuracy"], keys=["trial", "seed", "epoch"])
    for name in (known := [*EPOCH_COLUMNS, *(name for name in EPOCH_METRICS if name in epochs)]):
        epochs[name] = pd.to_numeric(epochs[name])
    _check_fractions("val_accuracy", epochs["val_accuracy"])
    return epochs.loc[:, known]


def _check_table(table: pd.DataFrame, columns: Sequence[str], keys: list[str]) -> None:
    """Raises ValueError if a table lacks columns, or two of its rows are of the same trial, seed and epoch."""
    if lost := [name for name in (*keys, *columns) if name not in table]:
        raise ValueError(f"it has no column {', '.join(lost)}")
    for name in keys:
        if not all(WHOLE_NUMBER.fullmatch(str(value)) for value in table[name]):
            raise ValueError(f"{name} must be a whole number in each row")
    if again := [key for key, count in Counter(table[keys].itertuples(index=False, name=None)).items() if count > 1]:
        first = ", ".join(f"{name} {value}" for name, value in zip(keys, again[0], strict=True))
        raise ValueError(f"it holds {len(again)} rows twice, first {first}")


def _check_fractions(name: str, values: Iterable[float]) -> None:
    """Raises ValueError."""
    if wrong := [value for value in values if value < 0 or value > 1]:
        raise ValueError(f"{name} must be from 0 to 1; got {wrong[0]:g}")


def _check_numbers(study: StudyRun, trials: pd.DataFrame) -> None:
    """Raises ValueError if an export lacks trials."""
    asked = study.tags.get(schema.TRIALS, "")
    ended = study.status == "finished" and study.params.get("design", "search") == "search"  # all of them are there
    if set(trials.index) != set(range(len(trials))) or (ended and asked not in ("", str(len(trials)))):
        raise ValueError(f"it holds {len(trials)} trials, not the study's {asked}, from 0")


def _check_epochs(trials: pd.DataFrame, epochs: pd.DataFrame) -> None:
    """Raises ValueError if an export lacks epochs of its trials, or holds others."""
    rows = zip(trials.index, trials["seeds"], trials["epochs_seen"], strict=True)
    expected = {(n, seed, epoch) for n, seeds, seen in rows for seed in seeds for epoch in range(1, int(seen) + 1)}
    held = set(epochs[EPOCH_COLUMNS[:3]].itertuples(index=False, name=None))
    if wrong := sorted(expected ^ held):
        first = "trial {}, seed {}, epoch {}".format(*wrong[0])
        raise ValueError(f"it lacks {len(expected - held)} rows, and has {len(held - expected)} too many: {first}")


def _check_digest(file: Path, described: Mapping[str, Any]) -> None:
    """Raises ValueError if a file is not the one that study.json describes. Older exports have no checksums."""
    if described["files"] is not None and described["files"].get(file.name) != _digest(file):
        raise ValueError("it differs from its checksum in study.json")


def _digest(file: Path) -> str:
    """The SHA-256 of a file's text, whose line ends git may change."""
    return hashlib.sha256(file.read_text(encoding="utf-8").encode()).hexdigest()


Source = MlflowClient | Exported


def folder_name(name: str) -> str:
    """A study's name as a folder that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "study"


def plain_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """The table with its tuples as text: "0 1"."""
    table = trials.copy()
    for column in ("seeds", "test_accuracies"):
        if column in table:
            table[column] = [" ".join(str(v) for v in values) for values in table[column]]
    return table


def progress_line(label: str) -> OnProgress:
    """A callback that counts on stderr: one line that is rewritten on a terminal, a few lines otherwise."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{label} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done == 1 or 4 * done // total > 4 * (done - 1) // total:
            print(f"{label} {done}/{total}", file=sys.stderr)

    return show


def _search(client: MlflowClient, experiment_id: str, query: str) -> list[Run]:
    page = client.search_runs([experiment_id], query, max_results=1000)
    runs = list(page)
    while page.token:
        page = client.search_runs([experiment_id], query, max_results=1000, page_token=page.token)
        runs += page
    return runs


def _read_json(client: MlflowClient, study: StudyRun, name: str) -> dict[str, Any] | None:
    if name not in {entry.path for entry in client.list_artifacts(study.run_id)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            raw = json.loads(Path(client.download_artifacts(study.run_id, name, folder)).read_text(encoding="utf-8"))
        except ValueError:  # no JSON, or no text
            return None
    return raw if isinstance(raw, dict) else None


def _space_of(raw: dict[str, Any] | None) -> tuple[Space | None, str | None]:
    try:
        return (None, NO_SPACE) if raw is None else (Space.from_dict(raw), None)
    except UserError as error:
        return None, str(error)


def _value(text: str) -> Any:
    # Parameters are stored as text. Numbers and truth values come back as such, everything else stays text.
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        return text


def _trial_table(runs: Iterable[Run]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for run in runs:
        tags, metrics = run.data.tags, run.data.metrics
        seeds = tuple(int(s) for s in tags.get(schema.SEEDS, "").split(",") if WHOLE_NUMBER.fullmatch(s.strip()))
        tests = [metrics.get(f"{schema.SEED_TEST_ACCURACY}{seed}") for seed in seeds]
        row: dict[str, Any] = {
            "trial": int(tags[schema.TRIAL]),
            "run_id": run.info.run_id,
            "origin": tags.get(schema.ORIGIN, tags.get("ram.arm", "unknown")),  # ram.arm: schema 1
            "row": tags.get(schema.ROW, ""),
            "baseline": tags.get(schema.BASELINE, ""),
            "parameter": tags.get(schema.PARAMETER, ""),
            "state": tags.get(schema.STATE, "running"),
            "stop_reason": tags.get(schema.STOP_REASON, ""),
            "diverged": tags.get(schema.DIVERGED) == "true",
            "seeds": seeds,
            "macs": metrics.get(schema.MACS, math.nan),
            "parameters": metrics.get(schema.PARAMETERS, math.nan),
            "test_accuracy": metrics.get(schema.TEST_ACCURACY, math.nan),
            "test_accuracies": tuple(accuracy for accuracy in tests if accuracy is not None),
            "started": (run.info.start_time or 0) / 1000,
        }
        rows.append(row | {key: _value(text) for key, text in run.data.params.items() if key not in row})
    # A trial that was re-run after a fault keeps its number: the newest record counts.
    table = pd.DataFrame(rows).sort_values(["trial", "started", "run_id"]).drop_duplicates("trial", keep="last")
    return _upgrade(table.set_index("trial"))


def _upgrade(trials: pd.DataFrame) -> pd.DataFrame:
    """Older records as those of today. Schema 1 has the origin as `arm`, and divergence and rows' facts as text."""
    trials = trials.rename(columns={"arm": "origin"})
    added = {"baseline": "", "parameter": "", "diverged": False, "canvas": 0, "num_classes": 10}
    trials = trials.assign(**{name: default for name, default in added.items() if name not in trials})
    trials["diverged"] |= (trials["state"] == "failed") & trials["stop_reason"].str.startswith("diverged")
    for number, row in trials.loc[(trials["origin"] == "ofat") & (trials["baseline"] == ""), "row"].items():
        if match := OFAT_ROW_1.match(row):
            trials.loc[number, ["baseline", "parameter"]] = match["baseline"], match["parameter"] or ""
    for number, row in trials.loc[(trials["origin"] == "replicate") & (trials["baseline"] == ""), "row"].items():
        trials.loc[number, "baseline"] = "best" if row.startswith("best of ") else "default" if row == "default" else ""
    return trials


def _epoch_table(trials: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    numbers = {run_id: trial for trial, run_id in trials["run_id"].items()}
    history = history.loc[history["run_id"].isin(list(numbers)) & (history["step"] > 0)]
    history = history.assign(trial=[numbers[run_id] for run_id in history["run_id"]])
    wide = history.pivot_table(index=["trial", "step"], columns="key", values="value", aggfunc="last", dropna=False)
    wide = wide.dropna(how="all").reset_index().rename(columns={"step": "epoch"})
    means = [c for c in EPOCH_METRICS if c in wide.columns]
    names = {c: c.removeprefix(schema.SEED_ACCURACY) for c in wide.columns if c.startswith(schema.SEED_ACCURACY)}
    seeds = {c: int(name) for c, name in names.items() if WHOLE_NUMBER.fullmatch(name)}
    if not seeds and schema.OBJECTIVE in wide.columns:
        seeds = {schema.OBJECTIVE: 0}
    parts = [wide[["trial", "epoch", *means]].assign(seed=s, val_accuracy=wide[c]) for c, s in seeds.items()]
    if not parts:
        parts = [pd.DataFrame({"trial": [], "epoch": [], "seed": [], "val_accuracy": []}, dtype=float)]
    table = pd.concat(parts, ignore_index=True).astype({"trial": int, "epoch": int, "seed": int})
    # A pivot makes a cell for every seed that any trial had; keep those of the trial itself.
    seeds_of = trials["seeds"].to_dict()
    pairs = zip(table["trial"], table["seed"], strict=True)
    own = [seed in seeds_of[trial] or not seeds_of[trial] for trial, seed in pairs]
    return _with_context(table.loc[own], trials)


def _with_context(epochs: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Add the trial's columns to each row."""
    context = trials.drop(columns=["run_id", "seeds", "test_accuracies", "started", "epochs_seen"], errors="ignore")
    context = context.drop(columns=list(epochs.columns), errors="ignore")
    keys = ["trial", "seed", "epoch", "val_accuracy"]
    table = epochs[[*keys, *(c for c in epochs.columns if c not in keys)]].join(context, on="trial")
    return table.sort_values(keys[:3]).reset_index(drop=True)


def _read_history(client: MlflowClient, runs: Sequence[Run], on_progress: OnProgress) -> pd.DataFrame:
    """All metric histories as run_id, key, step, value; in bulk where the server can, else one request a curve."""
    known = {key for run in runs for key in run.data.metrics}
    keys = sorted(key for key in known if key in EPOCH_METRICS or key.startswith("val_accuracy"))
    ids = [run.info.run_id for run in runs]
    jobs = [(ids[i : i + RUNS_PER_REQUEST], key) for i in range(0, len(ids), RUNS_PER_REQUEST) for key in keys]
    rows: list[tuple[str, str, int, float]] = []
    with ThreadPoolExecutor(READERS) as pool:
        for done, part in enumerate(pool.map(lambda job: _history(client, *job), jobs), start=1):
            rows.extend(part)
            on_progress(done, len(jobs))
    return pd.DataFrame(rows, columns=["run_id", "key", "step", "value"])


def _history(client: MlflowClient, run_ids: list[str], key: str) -> list[tuple[str, str, int, float]]:
    bulk = _bulk_history(client, run_ids, key)
    if bulk is not None and len(bulk) < ROWS_PER_REQUEST:
        return bulk
    return [(run_id, key, m.step, m.value) for run_id in run_ids for m in client.get_metric_history(run_id, key)]


def _bulk_history(client: MlflowClient, run_ids: list[str], key: str) -> list[tuple[str, str, int, float]] | None:
    # MLflow's client has no public call for many runs at once; its web page uses this endpoint. Any server without it
    # (or a version that moved it) falls back to one request a curve.
    store = client._tracking_client.store  # pyright: ignore[reportPrivateUsage]
    direct = getattr(store, "get_metric_history_bulk", None)
    if direct is not None:
        return [(m.run_id, m.key, m.step, m.value) for m in direct(run_ids, key, ROWS_PER_REQUEST)]
    credentials = getattr(store, "get_host_creds", None)
    if credentials is None:
        return None
    response = http_request(
        host_creds=credentials(),
        endpoint="/ajax-api/2.0/mlflow/metrics/get-history-bulk",
        method="GET",
        params={"run_id": run_ids, "metric_key": key, "max_results": ROWS_PER_REQUEST},
    )
    if response is None or response.status_code != 200:
        return None
    return [(m["run_id"], m["key"], int(m["step"]), float(m["value"])) for m in response.json()["metrics"]]
