"""Rebuilds a damaged or lost record: `python -m study.run --repair`.

Sources, in this order: what the record itself still holds undamaged, its backups, the histories in the checkpoints
(which the trials report again), MLflow, and for a trial whose configuration follows from its number, the design.
Nothing is made up: an ended trial whose epochs are not all found is trained again, and every trial that is not as it
was is named.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from study import mlflow_settings as mlflow_settings  # before MLflow, which reads them when it is imported

# isort: split
import mlflow
import sqlalchemy.exc
from mlflow.artifacts import load_text
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from ramcore.config import Config, read_value
from ramcore.errors import UserError, first_line
from ramcore.space import Space
from study import integrity, schema
from study.checkpoints import Checkpoints, numbers_present
from study.designs import DESIGNS, TrialSpec, of_record, published, search_origins
from study.moved import check_database, database_file
from study.record import OF_STUDY, OF_TRIAL, AskedPoint, StudySettings, exclusive, lost, write_anew
from study.search_space import configuration
from study.snapshots import BACKUPS, Lease, LeaseHeld, set_aside
from study.sobol import SobolSequence, fixed_point
from study.storage import RECORD, Folder, LocalFolder, Storage
from study.tracking import search_all

_MLFLOW_ERRORS = (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError)
_MEANS = (*schema.EPOCH_MEANS, schema.EPOCH_SECONDS)
Attributes = dict[str, Any]


@dataclass(kw_only=True)
class _Found:
    """A study as far as it is known: the user attributes of the record and of its trials."""

    study: Attributes = field(default_factory=dict)
    trials: dict[int, Attributes] = field(default_factory=lambda: defaultdict(dict))
    said: list[str] = field(default_factory=list)  # what was done, and what could not be


def repair(storage: Storage, study: str, uri: str) -> list[str]:
    """Replace a study's record by what can be found of it; returns lines that say what was done.

    The old files are kept under other names. `uri` is MLflow's. Raises UserError if too little is found, or a driver is
    running; OSError.
    """
    path = storage.record_folder(study) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.parent):
        found = _from_copies(storage, study, path)
        tracked = _Tracked.read(uri, study, found, storage.folder(study))
        if tracked is not None:
            try:
                tracked.complete(found, storage.folder(study))
            except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
                fix = "try again, or pass another --tracking-uri"
                raise UserError(f"MLflow must answer while a record is rebuilt; {first_line(error)}: {fix}") from error
        settings = _settings(found, path)
        _complete_plans(found, settings, storage)
        trials = [_consistent(number, found, settings) for number in range(len(found.trials))]
        new = path.with_name(f"{RECORD}.new")
        new.unlink(missing_ok=True)
        write_anew(new, found.study, trials)
        aside = set_aside(path)
        new.replace(path)
        _replace_in_store(storage, study, path)
        states = [trial.get("end", {}).get("state", "to be continued") for trial in trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        return [
            f"the record of {study} was rebuilt: {len(trials)} trials ({counts}); the old files are kept as {aside}*",
            *found.said,
        ]


def _from_copies(storage: Storage, study: str, path: Path) -> _Found:
    """What the record, its backups and the store hold undamaged; of two values the newer one."""
    copies = [path, *(path.parent / name for name in BACKUPS)]
    with tempfile.TemporaryDirectory(prefix="ram-study-") as scratch:
        if storage.is_remote:
            stored = Path(scratch) / RECORD
            try:
                stored.write_bytes(storage.folder(study).read(RECORD))
                copies.append(stored)
            except FileNotFoundError:
                pass
        salvaged = sorted((integrity.salvage(copy) for copy in copies), key=lambda s: s.serial, reverse=True)
    found = _Found()
    for copy in salvaged:
        found.study = _usable(copy.study, OF_STUDY) | found.study
        for number, attrs in copy.trials.items():
            found.trials[number] = _usable(attrs, OF_TRIAL) | found.trials[number]
    return found


def _usable(attrs: Mapping[str, str], kinds: Mapping[str, type]) -> Attributes:
    """Attributes from their JSON, without those that are not of their kind."""
    read = {key: json.loads(value) for key, value in attrs.items()}
    wrong = lost(read, kinds)
    return {key: value for key, value in read.items() if key not in wrong}


def _settings(found: _Found, path: Path) -> StudySettings:
    """The study's settings. Raises UserError if the study itself is not known."""
    unknown = lost(found.study, OF_STUDY)
    settings = None if unknown else of_record(StudySettings, found.study["settings"])
    if settings is None or (DESIGNS[settings.design].rows is not None and "rows" not in found.study):
        why = "; ".join(line for line in found.said if line.startswith("MLflow "))
        raise UserError(
            f"a record can be rebuilt if a backup or MLflow has its settings; {', '.join(unknown) or 'the rows'} of "
            f"{path.parent.name} are in neither{f' ({why})' if why else ''}: put {path} back, or move {path.parent} "
            "away and start anew"
        )
    runs = max((int(name.split()[1]) for name in found.study if name.startswith("run ")), default=-1) + 1
    runs = max(runs, *((attrs.get("run") or 0) + 1 for attrs in found.trials.values()), 0)
    for number in range(runs):
        found.study.setdefault(f"run {number:04d}", {"commit": "unknown", "commit_dirty": True})
    return settings


def _replace_in_store(storage: Storage, study: str, path: Path) -> None:
    """Write the rebuilt record to an object store. Raises UserError if another driver has the study; OSError."""
    folder = storage.folder(study)
    if isinstance(folder, LocalFolder):
        return
    try:
        Lease(folder, study, path.parent).take(lambda text: None)
        version = folder.read_version(RECORD)[1]
    except LeaseHeld as error:
        raise UserError(str(error)) from error
    except FileNotFoundError:
        version = None
    folder.write_version(RECORD, path.read_bytes(), version)


# MLflow.


@dataclass(kw_only=True)
class _Tracked:
    """What MLflow holds of a study."""

    client: mlflow.MlflowClient
    parent: Run
    children: dict[int, Run]
    left_out: list[str]  # lines about the runs that are not as a study writes them

    @staticmethod
    def read(uri: str, study: str, found: _Found, folder: Folder) -> _Tracked | None:
        """None if MLflow cannot be read or does not hold the study; `found` gets a line that says why.

        A study whose uid is not known is the one of its name whose trials have the configurations and seeds of the
        checkpoints in `folder`. Raises UserError if that may be several.
        """
        try:
            named = _Tracked._named(uri, study, found.study.get("uid"))
        except (*_MLFLOW_ERRORS, UserError) as error:
            found.said.append(f"MLflow was not read ({first_line(error)})")
            return None
        if "uid" not in found.study:
            identities = {number: Checkpoints(folder, number).identity() for number in numbers_present(folder)}
            alike = [tracked._alike({n: i for n, i in identities.items() if i}) for tracked in named]
            several = len(named) > 1  # then one trial at least must be alike
            fitting = [t for t, count in zip(named, alike, strict=True) if count is not None and count >= several]
            if several and len(fitting) != 1:
                raise UserError(
                    f"a record is rebuilt from its own study in MLflow; {len(named)} there have the name {study}, and "
                    f"the checkpoints do not tell which it is: {'; '.join(t._described() for t in named)}: hide the "
                    "others with `mlflow runs delete --run-id RUN` (`mlflow runs restore` brings them back)"
                )
            if named and not fitting:
                found.said.append("MLflow holds another study of that name, whose trials are not the checkpoints'")
                return None
            named = fitting
        if not named:
            found.said.append("MLflow does not hold the study")
            return None
        found.said += named[0].left_out
        return named[0]

    @staticmethod
    def _named(uri: str, study: str, uid: str | None) -> list[_Tracked]:
        """The study of a uid, or all of a name."""
        if (path := database_file(uri)) is not None and not path.exists():
            raise FileNotFoundError(f"{uri} does not exist")  # MLflow would make it
        check_database(uri)
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(schema.EXPERIMENT)
        if experiment is None:
            return []
        which = f"tags.`{schema.UID}` = '{uid}'" if uid else f"tags.`{schema.STUDY}` = '{study}'"
        parents = search_all(client, experiment.experiment_id, f"{which} and tags.`{schema.KIND}` = 'study'")
        parents.sort(key=lambda run: run.info.start_time)  # of a parent that was made twice, the newer one
        found: list[_Tracked] = []
        for parent in {run.data.tags[schema.UID]: run for run in parents if schema.UID in run.data.tags}.values():
            tracked = _Tracked(client=client, parent=parent, children={}, left_out=[])
            which = f"tags.`{schema.UID}` = '{parent.data.tags[schema.UID]}' and tags.`{schema.KIND}` = 'trial'"
            for run in search_all(client, experiment.experiment_id, which):
                try:
                    _plan(run)
                    tracked.children[_number(run)] = run
                except (KeyError, ValueError, UserError) as error:
                    tracked.left_out.append(f"MLflow's run {run.info.run_id} is left out: {first_line(error)}")
            found.append(tracked)
        return found

    def _alike(self, identities: Mapping[int, Attributes]) -> int | None:
        """How many trials have the configuration and seeds of their checkpoints; None if one has others."""
        plans = {number: _plan(self.children[number]) for number in identities.keys() & self.children.keys()}
        same = [identities[n] == {"config": p["config"], "seeds": list(p["seeds"])} for n, p in plans.items()]
        return len(same) if all(same) else None

    def _described(self) -> str:
        """What tells this study from others of its name."""
        info, place = self.parent.info, ""
        with contextlib.suppress(*_MLFLOW_ERRORS, ValueError, KeyError):
            place = f", record {self._artifact(schema.SETTINGS_FILE)['record']}"
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.start_time / 1000))
        return f"run {info.run_id}, {len(self.children)} trials, begun {begun}{place}"

    def _artifact(self, name: str) -> Attributes:
        """A JSON artifact of the parent run. Raises MlflowException, OSError, ValueError."""
        mlflow.set_tracking_uri(self.client.tracking_uri)
        content = json.loads(load_text(f"runs:/{self.parent.info.run_id}/{name}"))
        if not isinstance(content, dict):
            raise ValueError(f"{name} is not as a study writes it")
        return content

    def complete(self, found: _Found, folder: Folder) -> None:
        """Add what the copies lack, and the checkpoints in `folder` do not have either."""
        if lost(found.study, OF_STUDY):
            self._complete_study(found)
        for number, run in sorted(self.children.items()):
            attrs = found.trials[number]
            held = set(attrs)
            if "plan" not in attrs:
                attrs |= {"plan": _plan(run), "started": run.info.start_time, "run": None}
                attrs |= {"origin": run.data.tags[schema.ORIGIN], "row": run.data.tags.get(schema.ROW, "")}
                attrs["seeds"] = run.data.tags[schema.SEEDS]
            plan = attrs["plan"]
            if "end" not in attrs and Checkpoints(folder, number).load(
                {"config": plan["config"], "seeds": plan["seeds"]}
            ):
                continue  # it reports its own history again
            if _first_gap(attrs) is not None:
                for name, entry in self._epochs(run, attrs["plan"]["seeds"]).items():
                    attrs.setdefault(name, entry)
            state = run.data.tags.get(schema.STATE)
            has_ended = state in ("complete", "pruned", "failed")
            # Of a tested trial MLflow lacks what the record has, so it is trained again.
            if "end" not in attrs and has_ended and not TrialSpec.from_dict(attrs["plan"]).tested:
                attrs["end"] = {
                    "state": state,
                    "reason": run.data.tags.get(schema.STOP_REASON, ""),
                    "time": run.info.end_time or run.info.start_time,
                    "test": None,
                    "diverged": schema.DIVERGED in run.data.tags,
                }
            new = set(attrs) - held
            epochs = sorted(int(name.split()[1]) for name in new if name.startswith("epoch "))
            parts = ["configuration"] if "plan" in new else []
            parts += [f"epochs {epochs[0]} to {epochs[-1]} (losses as means over the seeds)"] if epochs else []
            parts += ["end"] if "end" in new else []
            if parts:
                found.said.append(f"trial {number:04d}: from MLflow: {', '.join(parts)}")

    def _complete_study(self, found: _Found) -> None:
        """Settings, identity and totals. The rows of a fixed design are not tracked."""
        added = ("study", "epochs", "seeds_per_trial", "design", "objective")  # see study.driver
        tags = self.parent.data.tags
        try:
            described, space = self._artifact(schema.SETTINGS_FILE), self._artifact(schema.SPACE_FILE)
            settings = {f.name: described[f.name] for f in fields(StudySettings) if f.name in described}
            settings["space"] = {name: value for name, value in space.items() if name not in added}
            Space.from_dict(of_record(StudySettings, settings).space)
            runs = {f"run {number:04d}": dict(run) for number, run in enumerate(described.get("runs", []))}
            totals = [int(tags.get(schema.TRIALS) or described["trials"])]
        except (*_MLFLOW_ERRORS, ValueError, KeyError, TypeError, UserError) as error:
            found.said.append(f"MLflow has no settings of the study ({first_line(error)})")
            return
        made = {"created": self.parent.info.start_time, "uid": tags[schema.UID], "totals": totals}
        found.study = {**made, **runs, "settings": settings} | found.study
        found.said.append("the study's settings are from MLflow; how its total grew is not known")

    def _epochs(self, run: Run, seeds: Sequence[int]) -> dict[str, Attributes]:
        """Epochs as the record keeps them, of those that have an accuracy for each seed."""
        histories = {
            name: {metric.step: metric for metric in self.client.get_metric_history(run.info.run_id, name)}
            for name in (*_MEANS, *(f"{schema.SEED_ACCURACY}{seed}" for seed in seeds))
        }
        epochs: dict[str, Attributes] = {}
        for step in sorted(set.intersection(*(set(history) for history in histories.values()))):
            values = {name: history[step].value for name, history in histories.items()}
            metrics: dict[str, Any] = {name: [values[name]] * len(seeds) for name in schema.EPOCH_MEANS}
            metrics |= {"epoch": step, "seconds": values[schema.EPOCH_SECONDS], "seeds": list(seeds)}
            metrics[schema.OBJECTIVE] = [values[f"{schema.SEED_ACCURACY}{seed}"] for seed in seeds]
            metrics["diverged"] = [False] * len(seeds)  # MLflow has no epoch of a trial that diverged
            time = histories[f"{schema.SEED_ACCURACY}{seeds[0]}"][step].timestamp
            epochs[f"epoch {step:04d}"] = {"time": time, "metrics": metrics}
        return epochs


def _plan(run: Run) -> Attributes:
    """The plan of a trial, from its tags and params. Raises KeyError, ValueError, UserError if they make none."""
    tags, params = run.data.tags, run.data.params
    config = {f.name: read_value(f.name, params[f.name]) for f in fields(Config) if f.name in params}
    seeds = tuple(int(seed) for seed in tags[schema.SEEDS].split(","))
    words = {name: tags.get(tag, "") for name, tag in
             (("row", schema.ROW), ("baseline", schema.BASELINE), ("parameter", schema.PARAMETER))}  # fmt: skip
    return TrialSpec(config=Config(**config), origin=tags[schema.ORIGIN], seeds=seeds, **words).to_dict()


def _number(run: Run) -> int:
    """Raises KeyError, ValueError."""
    if not re.fullmatch("[0-9]+", text := run.data.tags[schema.TRIAL]):
        raise ValueError(f"{schema.TRIAL} is {text!r}")
    return int(text)


# Checkpoints, and what follows from a trial's number.


def _complete_plans(found: _Found, settings: StudySettings, storage: Storage) -> None:
    """Give every trial up to the last known one a plan. Raises UserError if one cannot be known."""
    folder = storage.folder(settings.study)
    known = [number for number, attrs in found.trials.items() if attrs]
    for number in range(max([*known, *numbers_present(folder)], default=-1) + 1):
        attrs = found.trials[number]
        if "plan" in attrs:
            TrialSpec.from_dict(attrs["plan"])  # a newer version's is refused before anything is written
            attrs.setdefault("started", found.study["created"])
            continue
        identity = Checkpoints(folder, number).identity()
        spec = _spec(number, identity, found.study, settings)
        if spec is None:
            raise UserError(
                f"every trial's configuration must be known; trial {number:04d} of {settings.study} is in no backup, "
                "in no checkpoint and not in MLflow: put a copy of the record back, or start anew under another --study"
            )
        attrs |= {"plan": spec.to_dict(), "started": int(time.time() * 1000), "run": None, "origin": spec.origin}
        attrs |= {"row": spec.row, "seeds": ",".join(map(str, spec.seeds))}
        source = "its checkpoints" if identity else "the study's design"
        found.said.append(
            f"trial {number:04d}: configuration from {source}; what it had reached is trained or reported again"
        )


def _spec(number: int, identity: Attributes | None, study: Attributes, settings: StudySettings) -> TrialSpec | None:
    """The plan of a trial by its number, and by its checkpoints if it has any."""
    if "rows" in study:
        return TrialSpec.from_dict(study["rows"][number])
    space = Space.from_dict(settings.space)
    if not space.names:
        return None
    first = published(space)
    asked = AskedPoint.read(study)
    origins = search_origins(
        study["totals"], len(first), settings.sobol_share, (point.at for point in asked), study.get("aims", ())
    )
    if number >= len(origins):
        return None
    # The suggestions of TPE, and aimed ones, depended on the trials before them.
    row, values = fixed_point(
        origins, number, first, [(p.text, p.values) for p in asked], SobolSequence(space, settings.seed)
    )
    if identity:
        config, seeds = of_record(Config, identity["config"]), tuple(identity["seeds"])
    elif values is not None:
        config, seeds = configuration(space, values), tuple(range(settings.seeds_per_trial))
    else:
        return None
    return TrialSpec(config=config, origin=origins[number], row=row, seeds=seeds)


def _first_gap(attrs: Attributes) -> int | None:
    """The first epoch that a trial lacks, of those up to its end; None if its end is known and it lacks none."""
    held = 0
    while f"epoch {held + 1:04d}" in attrs:
        held += 1
    last = max((int(name.split()[1]) for name in attrs if name.startswith("epoch ")), default=0)
    end = attrs.get("end")
    if end is None:
        return held + 1
    if end["state"] == "complete":
        last = attrs["plan"]["config"]["epochs"]
    elif stopped := re.search(r"at epoch (\d+)$", end["reason"]):
        last = int(stopped[1])
    return held + 1 if held < last else None


def _consistent(number: int, found: _Found, settings: StudySettings) -> Attributes:
    """A trial's attributes without what follows a gap: an end without all its epochs would be another result."""
    attrs = found.trials[number]
    gap = _first_gap(attrs)
    if gap is None:
        return attrs
    kept = {name: value for name, value in attrs.items() if not name.startswith("epoch ") or int(name.split()[1]) < gap}
    if (end := kept.pop("end", None)) is not None:
        found.study.pop(f"test {number:04d}", None)
        found.said.append(
            f"trial {number:04d}: epoch {gap} is lost, so it is trained again (it had ended: {end['reason']})"
        )
    return kept
