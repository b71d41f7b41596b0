"""Synthetic studies with known answers, as DataFrames or written straight into an MLflow store.

The truth is a function of (unit-cube configuration, u), u = log(epoch) / log(epochs) in [0, 1], on the logit scale.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from scipy.stats import qmc

from analysis.load import StudyData, StudyRun
from ramcore.space import Dimension, Space

Truth = Callable[[np.ndarray, float], np.ndarray]  # (n, d) coordinates in [0, 1] and u -> (n,) logits


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A made-up study: what to measure, how noisily, and how trials were chosen and stopped."""

    truth: Truth
    dimensions: tuple[Dimension, ...]
    trials: int = 48
    epochs: int = 30
    seeds: int = 2
    trial_sd: float = 0.10  # logits, persistent over a run's epochs
    epoch_sd: float = 0.05  # logits, fresh every epoch
    origin: str = "sobol"  # "sobol", "tpe" (adaptive) or "mixed" (first half Sobol, then adaptive)
    stop: bool = False  # successive halving: at epochs 1, 3, 9 the worse two thirds of those seen so far stop
    fail: Callable[[np.ndarray], float] | None = None  # coordinates -> probability that the run diverges midway
    seed: int = 0
    default: Mapping[str, Any] = field(default_factory=dict)


def unit_dimensions(count: int, prefix: str = "x") -> tuple[Dimension, ...]:
    """Plain float dimensions on [0, 1]."""
    return tuple(Dimension(name=f"{prefix}{i + 1}", type="float", low=0.0, high=1.0) for i in range(count))


RAM_DIMENSIONS: tuple[Dimension, ...] = (
    Dimension(name="num_glimpses", type="int", low=2, high=8, step=1, unit="glimpses"),
    Dimension(name="patch_size", type="int", low=4, high=20, step=1, unit="pixels"),
    Dimension(name="num_scales", type="int", low=1, high=4, step=1, unit="scales"),
    Dimension(name="location_std", type="float", low=0.03, high=0.5, log=True, unit="half-canvas"),
    Dimension(name="learning_rate", type="float", low=1e-4, high=1e-2, log=True),
    Dimension(name="reinforce_weight", type="float", low=0.01, high=10.0, log=True),
    Dimension(name="loss_mixing", type="float", low=0.0, high=1.0),
    Dimension(name="step_supervision", type="float", low=0.0, high=1.0),
)
RAM_DEFAULT: dict[str, Any] = {
    "num_glimpses": 6,
    "patch_size": 12,
    "num_scales": 3,
    "location_std": 0.17,
    "learning_rate": 3e-4,
    "reinforce_weight": 1.0,
    "loss_mixing": 1.0,
    "step_supervision": 0.0,
}


def ram_truth(x: np.ndarray, u: float) -> np.ndarray:
    """Shaped like the real response: patch first, a learning-rate optimum, curves that cross, inert dimensions."""
    glimpses, patch, scales, std, rate = x[:, 0], x[:, 1], x[:, 2], x[:, 3], x[:, 4]
    best_rate = 0.75 - 0.20 * u  # fast rates win early, moderate ones late
    end = (
        2.2 * np.sqrt(0.05 + patch)
        + 0.25 * scales
        + 0.5 * glimpses * (1 - patch)
        - 5.0 * (rate - best_rate) ** 2
        - 0.3 * (std - 0.5) ** 2
    )
    return -2.0 + (0.3 + 0.7 * u) * (end + 1.2) + 0.9 * u


def simulate(study: Synthetic) -> StudyData:
    """Run the made-up study and give its tables as `analysis.load.load_study` would."""
    rng = np.random.default_rng(study.seed)
    points = qmc.Sobol(len(study.dimensions), rng=rng).random(2 ** int(np.ceil(np.log2(max(study.trials, 2)))))
    cut = {"sobol": study.trials, "tpe": min(8, study.trials), "mixed": study.trials // 2}[study.origin]
    grid = np.log(np.arange(1, study.epochs + 1)) / max(np.log(study.epochs), 1e-9)
    rungs = [r for r in (1, 3, 9, 27) if r < study.epochs]
    seen: dict[int, list[float]] = {r: [] for r in rungs}
    told: list[tuple[np.ndarray, float]] = []
    trials: list[dict[str, Any]] = []
    epochs: list[pd.DataFrame] = []
    for number in range(study.trials):
        adaptive = number >= cut
        u = _propose(told, rng, len(study.dimensions)) if adaptive else points[number]
        x = np.array([d.quantile(np.array([v]))[0] for d, v in zip(study.dimensions, u, strict=True)])
        config = {d.name: d.from_unit(x[i : i + 1])[0] for i, d in enumerate(study.dimensions)}
        mean = np.array([study.truth(x[None, :], g)[0] for g in grid])
        logits = mean + study.trial_sd * rng.standard_normal((study.seeds, 1))
        logits = logits + study.epoch_sd * rng.standard_normal((study.seeds, study.epochs))
        accuracy = 1 / (1 + np.exp(-logits))
        last, state, reason = study.epochs, "complete", "finished"
        diverges = study.fail is not None and rng.random() < study.fail(x)
        for rung in rungs:
            score = float(accuracy[:, rung - 1].mean())
            seen[rung].append(score)
            kept = sorted(seen[rung], reverse=True)[: max(1, len(seen[rung]) // 3)]
            if study.stop and (adaptive or study.origin == "tpe") and score < kept[-1]:
                last, state = rung, "pruned"
                reason = f"stopped by successive halving at epoch {rung}"
                break
        if diverges:
            last = min(last, max(1, study.epochs // 4))
            state, reason = "failed", f"diverged: seed 0 at epoch {last}"
        told.append((x, float(accuracy[:, last - 1].mean()) if not diverges else 0.1))
        trials.append(
            {
                "trial": number,
                "origin": "tpe" if adaptive or study.origin == "tpe" else "sobol",
                "row": "",
                "baseline": "",
                "parameter": "",
                "state": state,
                "stop_reason": reason,
                "diverged": diverges,
                "seeds": tuple(range(study.seeds)),
                "macs": float(1e5 * (1 + 20 * x[0] * (0.2 + x[min(1, len(x) - 1)]))),
                "parameters": float(1e5 * (1 + x[min(1, len(x) - 1)])),
                "test_accuracy": np.nan,
                "test_accuracies": (),
                "started": float(number),
                "epochs_seen": last,
                **config,
            }
        )
        table = pd.DataFrame(
            {
                "trial": number,
                "seed": np.repeat(np.arange(study.seeds), last),
                "epoch": np.tile(np.arange(1, last + 1), study.seeds),
                "val_accuracy": accuracy[:, :last].ravel(),
            }
        )
        if diverges:
            table.loc[(table["seed"] == 0) & (table["epoch"] == last), "val_accuracy"] = np.nan
        epochs.append(table.assign(origin=trials[-1]["origin"], state=state, stop_reason=reason))
    space = Space(dimensions=study.dimensions, default=dict(study.default))
    run = StudyRun("none", f"synthetic-{study.seed}", "finished", 0.0, {}, {})
    table = pd.DataFrame(trials).set_index("trial")
    return StudyData(run, table, pd.concat(epochs, ignore_index=True), space, None, {"epochs": study.epochs})


def _propose(told: Sequence[tuple[np.ndarray, float]], rng: np.random.Generator, count: int) -> np.ndarray:
    """A TPE-like proposal: near one of the best so far, so the sample is as biased as an optimiser's."""
    best = sorted(told, key=lambda pair: -pair[1])[: max(2, len(told) // 5)]
    if not best or rng.random() < 0.1:
        return rng.random(count)
    centre = best[rng.integers(len(best))][0]
    return np.clip(centre + 0.12 * rng.standard_normal(count), 0.0, 1.0 - 1e-9)


def space_json(records: StudyData) -> dict[str, Any]:
    """The space as a study would save it."""
    space = records.space
    assert space is not None
    return {
        **space.to_dict(),
        "study": records.study.name,
        "objective": "val_accuracy",
        "epochs": records.budget,
        "seeds_per_trial": max(map(len, records.trials["seeds"]), default=1),
        "design": "search",
    }


def write_mlflow(
    records: StudyData,
    uri: str,
    *,
    artifacts: Path,
    status: str = "finished",
    space: Mapping[str, Any] | str | None = "own",
    params: Mapping[str, str] | None = None,
) -> str:
    """Write the tables into an MLflow store in the layout a study writes; give the parent's run id.

    space: "own" saves the study's space, None saves none, a mapping is saved as it is.
    """
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ram-study")
    if experiment is None:
        eid = client.create_experiment("ram-study", artifact_location=artifacts.as_uri())
    else:
        eid = experiment.experiment_id
    name = records.study.name
    tags = {"ram.kind": "study", "ram.study": name, "ram.schema": "2", "ram.status": status}
    start = max((s.info.start_time or 0 for s in client.search_runs([eid], max_results=1)), default=0) + 1000
    parent = client.create_run(eid, start_time=start, tags=tags, run_name=name).info.run_id
    base = {
        "task": "translated",
        "data": "digits",
        "design": "search",
        "trials": str(len(records.trials)),
        **(params or {}),
    }
    for key, value in base.items():
        client.log_param(parent, key, value)
    stored = space_json(records) if space == "own" else space
    with tempfile.TemporaryDirectory() as folder:
        files = {"study.json": {"sizes": {"train": 1000, "validation": 360, "test": 360}}, "space.json": stored}
        for file, content in files.items():
            if content is not None:
                path = Path(folder) / file
                path.write_text(json.dumps(content))
                client.log_artifact(parent, str(path))
    fields = (
        "origin",
        "row",
        "state",
        "stop_reason",
        "seeds",
        "macs",
        "parameters",
        "test_accuracy",
        "test_accuracies",
    )
    extra = (*fields, "started", "epochs_seen")
    by_trial = dict(iter(records.epochs.groupby("trial")))
    for number, row in records.trials.iterrows():
        tags = {
            "mlflow.parentRunId": parent,
            "ram.kind": "trial",
            "ram.study": name,
            "ram.trial": str(number),
            "ram.origin": row["origin"],
            "ram.row": row["row"],
            "ram.baseline": row["baseline"],
            "ram.parameter": row["parameter"],
            "ram.diverged": str(row["diverged"]).lower(),
            "ram.state": row["state"],
            "ram.stop_reason": row["stop_reason"],
            "ram.seeds": ",".join(str(s) for s in row["seeds"]),
        }
        run = client.create_run(eid, start_time=start + 1, tags=tags, run_name=f"trial {number:04d}").info.run_id
        settings = [
            Param(str(k), repr(v) if isinstance(v, float) else str(v)) for k, v in row.items() if k not in extra
        ]
        metrics = [Metric("macs", row["macs"], start, 0), Metric("parameters", row["parameters"], start, 0)]
        curve = by_trial.get(number)
        if curve is not None:
            for (epoch, seed), value in curve.groupby(["epoch", "seed"])["val_accuracy"].last().items():
                metrics.append(Metric(f"val_accuracy.seed_{seed}", float(value), start + int(epoch), int(epoch)))
            for epoch, value in curve.groupby("epoch")["val_accuracy"].apply(lambda v: float(np.mean(v))).items():
                metrics.append(Metric("val_accuracy", value, start + int(epoch), int(epoch)))
        for i, value in enumerate(row["test_accuracies"]):
            metrics.append(Metric(f"test_accuracy.seed_{row['seeds'][i]}", float(value), start, space_epochs(records)))
        if row["test_accuracies"]:
            metrics.append(Metric("test_accuracy", float(row["test_accuracy"]), start, space_epochs(records)))
        for i in range(0, len(metrics), 900):
            client.log_batch(run, metrics[i : i + 900], settings if i == 0 else [], [RunTag("note", "")][:0])
        done = {"failed": "FAILED", "running": "RUNNING"}.get(str(row["state"]), "FINISHED")
        client.set_terminated(run, done) if done != "RUNNING" else None
    if status != "running":
        client.set_terminated(parent, "FINISHED")
    return parent


def space_epochs(records: StudyData) -> int:
    """The study's full budget in epochs."""
    return records.budget
