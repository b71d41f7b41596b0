"""The results of a study, for the screen and for MLflow: the best configuration, its test accuracy, its model."""

from __future__ import annotations

import json
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from study import mlflow_settings as mlflow_settings  # before MLflow, which reads them when it is imported

# isort: split
import mlflow
import numpy as np
import torch
from mlflow.entities import Metric, RunTag
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import Tensor

import ramcore
from ramcore.config import Config
from ramcore.cost import cost
from ramcore.data import TaskData
from ramcore.errors import first_line
from ramcore.evaluation import build_model, evaluate
from ramcore.pictures import draw_glimpses, glimpse_paths
from ramcore.space import shown
from study import schema
from study.best import Outcome
from study.checkpoints import UNUSABLE, Checkpoints
from study.display import accuracies, percent
from study.record import Record, TrialRecord
from study.storage import Folder
from study.tracking import Publish
from study.trainable import test_results


def read_best_test(record: Record, best: TrialRecord, folder: Folder, data: TaskData) -> bool:
    """Evaluate the best trial on the test images, unless the record holds that already.

    Returns whether the record holds it now; it does not if the best weights are lost.
    """
    if best.test is not None:
        return True
    saved = _best_weights(best, folder)
    if saved is None:
        return False
    config = best.spec.config
    network = build_model(config, torch.tensor(best.spec.seeds))
    network.load_state_dict(saved["weights"])
    evaluation = evaluate(network, config, best.spec.seeds, replace(data, task=config.task), "test")
    record.set_test(best.number, test_results(evaluation, saved["epoch"]))
    return True


def _best_weights(trial: TrialRecord, folder: Folder) -> dict[str, Any] | None:
    """A trial's best weights, {"weights", "epoch"}; None if they are lost, damaged or not of this trial's networks."""
    checkpoints = Checkpoints(folder, trial.number)
    try:
        saved = checkpoints.load_best()
        if saved is None:
            return None
        # A field that is newer than the weights had its default value.
        whose = asdict(Config()) | saved["identity"]["config"], saved["identity"]["seeds"]
        if whose != (asdict(trial.spec.config), list(trial.spec.seeds)) or len(saved["epoch"]) != len(trial.spec.seeds):
            raise ValueError("they are of another configuration")
        build_model(trial.spec.config, torch.tensor(trial.spec.seeds)).load_state_dict(saved["weights"])
        return saved
    except UNUSABLE as error:
        checkpoints.problem(f"{checkpoints.name}/best.pt: the best weights are not used: {first_line(error)}")
        return None


def summary_lines(outcome: Outcome, searched: tuple[str, ...]) -> list[str]:
    """The lines that a study prints at its end, with the searched fields (or else those that are not the default)."""
    best, spec = outcome.best, outcome.best.spec
    lines = [
        f"Best configuration: trial {best.number:04d} ({spec.origin}{f', {spec.row}' if spec.row else ''})",
        f"  validation accuracy  {percent(accuracies(best))} over seeds {', '.join(map(str, spec.seeds))}",
    ]
    if best.test is not None:
        mean, epochs = percent(tuple(best.test["accuracy"])), ", ".join(map(str, best.test["epoch"]))
        lines.append(f"  test accuracy        {mean} (weights of epochs {epochs}; read once)")
    if outcome.against_default:
        lines.append(f"  against the default  {outcome.against_default}")
    size = cost(spec.config)
    lines.append(f"  size                 {size.parameters:,} parameters, {size.macs:,} multiply-adds an image")
    lines += [f"  {name:20s} {shown(value, digits=4)}" for name, value in _telling(spec.config, searched).items()]
    lines.append("Accuracy against multiply-adds an image (none is both cheaper and better than these):")
    for trial in outcome.front:
        size, name = cost(trial.spec.config), trial.spec.row or _brief(trial.spec.config)
        lines.append(f"  {size.macs:>12,}  {percent(accuracies(trial)):>18s}  trial {trial.number:04d}  {name}")
    return lines


def _telling(config: Config, searched: tuple[str, ...]) -> dict[str, Any]:
    """The searched fields of a configuration, or else those that are not the default."""
    values, default = asdict(config), asdict(Config())
    return {name: values[name] for name in searched or [n for n in values if values[n] != default[n]]}


def publisher(outcome: Outcome, searched: tuple[str, ...], folder: Folder, data: TaskData) -> Publish:
    """A call that logs what is best to the parent run: its accuracy and its values (those searched, or else those that
    are not the default), best_config.json, and the model and its glimpses if the weights are there.
    """
    best, spec = outcome.best, outcome.best.spec
    facts = {
        "trial": best.number,
        "origin": spec.origin,
        "row": spec.row,
        "seeds": spec.seeds,
        "config": asdict(spec.config),
        "val_accuracy": accuracies(best),
        "test": best.test,
        "cost": cost(spec.config)._asdict(),
    }

    reached = {schema.OBJECTIVE: accuracies(best)} | (
        {schema.TEST_ACCURACY: best.test["accuracy"]} if best.test else {}
    )
    metrics = [Metric(name, statistics.fmean(seeds), best.ended or 0, outcome.ended) for name, seeds in reached.items()]

    def publish(client: mlflow.MlflowClient, run_id: str) -> None:
        values = _telling(spec.config, searched).items()
        client.log_batch(run_id, metrics, tags=[RunTag(schema.BEST + name, str(value)) for name, value in values])
        client.log_text(run_id, json.dumps(facts, indent=1), schema.BEST_CONFIG_FILE)
        saved = _best_weights(best, folder)
        if saved is None:
            return
        with tempfile.TemporaryDirectory(prefix="ram-study-") as scratch:
            if spec.config.model == "ram":
                picture = Path(scratch) / "glimpses.png"
                _draw(best, saved["weights"], replace(data, task=spec.config.task), picture)
                client.log_artifact(run_id, str(picture))
            _log_model(run_id, best, saved["weights"], metrics, Path(scratch))

    return Publish(key=f"trial {best.number}", call=publish)


def _log_model(
    run_id: str, trial: TrialRecord, weights: dict[str, Tensor], metrics: Sequence[Metric], scratch: Path
) -> None:
    """Log the trial's networks as an MLflow model of the run, with its configuration and what it reached.

    See `study.served` for how to load it.
    """
    import mlflow.pyfunc  # takes seconds, so it is imported at the end of a study only

    config = trial.spec.config
    torch.save({"weights": weights}, scratch / "weights.pt")
    (scratch / "config.json").write_text(json.dumps({"config": asdict(config), "seeds": trial.spec.seeds}, indent=1))
    classes = TensorSpec(np.dtype(np.float32), (-1, len(trial.spec.seeds), config.num_classes))
    with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*An input example was not provided", category=UserWarning)
        model = mlflow.pyfunc.log_model(
            name=schema.MODEL,
            params=asdict(config),
            python_model=Path(__file__).with_name("served.py"),
            artifacts={"weights": str(scratch / "weights.pt"), "config": str(scratch / "config.json")},
            code_paths=[str(Path(ramcore.__path__[0]))],
            # No inputs: MLflow would take a single type of number. The model itself says what it does not take.
            signature=ModelSignature(outputs=Schema([classes])),
            # PyPI has no local versions such as 2.13.0+cpu.
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "numpy", "mlflow")],
        )
        for m in metrics:
            mlflow.log_metric(m.key, m.value, step=m.step, timestamp=m.timestamp, model_id=model.model_id)


def _draw(trial: TrialRecord, weights: dict[str, Tensor], data: TaskData, path: Path) -> None:
    """Draw the glimpses of the trial's best seed on the first test images."""
    config = trial.spec.config
    best = max(range(len(trial.spec.seeds)), key=lambda r: accuracies(trial)[r])
    one = {name: value[best : best + 1] for name, value in weights.items()}
    draw_glimpses(config, glimpse_paths(config, one, data)).savefig(path, dpi=150)


def _brief(config: Config) -> str:
    if not config.is_recurrent:
        return config.model
    counts = (config.num_glimpses, "glimpse"), (config.num_scales, "scale")
    glimpses, scales = (f"{number} {one}{'s' if number > 1 else ''}" for number, one in counts)
    return f"{glimpses}, {config.patch_size}x{config.patch_size}, {scales}"
