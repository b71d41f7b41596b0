"""The best model in MLflow: weights and configuration as data, and this file as the code that loads them.

    model = mlflow.pyfunc.load_model("runs:/<parent run>/model")
    probabilities = model.predict(images)

images: (B, S, S), canvases of the model's task: floating-point numbers in [0, 1], or uint8 from 0 to 255.
    probabilities: (B, R, C) float32 of C classes, one network for each training seed. A study reports the mean over
    seeds of each network's accuracy: see `accuracy`. Weights are read with weights_only=True, so they cannot carry
    pickled code. The model carries `ramcore`, so it loads where this project is not installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from ramcore.config import Config
from ramcore.errors import UserError, brief, first_line
from ramcore.evaluation import BATCH_SIZE, build_model, class_log_probs


class ServedModel(PythonModel):
    """Class probabilities of canvases."""

    def load_context(self, context: Any) -> None:
        """Read weights and configuration."""
        saved = torch.load(Path(context.artifacts["weights"]), weights_only=True, map_location="cpu")
        described = json.loads(Path(context.artifacts["config"]).read_text())
        self.config = Config(**described["config"])
        self.seeds = tuple(described["seeds"])
        self.network = build_model(self.config, torch.tensor(self.seeds))
        self.network.load_state_dict(saved["weights"])

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Any:
        """Probabilities (B, R, C) of canvases (B, S, S). The first glimpse of image i depends on i only.

        Raises UserError for anything else than canvases.
        """
        images = torch.from_numpy(_eight_bit(model_input, self.config))
        parts = [torch.empty(0, len(self.seeds), self.config.num_classes)]
        for start in range(0, len(images), BATCH_SIZE):
            index = torch.arange(start, min(start + BATCH_SIZE, len(images)))
            log_probs = class_log_probs(self.network, self.config, torch.tensor(self.seeds), images[index][None], index)
            parts.append(log_probs[:, -1].exp().transpose(0, 1))
        return torch.cat(parts).numpy()


def _eight_bit(model_input: Any, config: Config) -> np.ndarray:
    """Canvases as the networks take them: (B, S, S) uint8. Raises UserError."""
    side, task = config.canvas_size, config.task
    try:
        images = np.asarray(model_input)
    except ValueError as error:  # rows of different lengths
        raise UserError(f"images must be one array; they are none ({first_line(error)}): stack them") from error
    if images.ndim != 3 or images.shape[1:] != (side, side):
        raise UserError(
            f"images must have shape (images, {side}, {side}), canvases of task {task}; got {images.shape}: "
            "reshape them"
        )
    if images.dtype == np.uint8:
        return np.array(images)  # a copy, since torch takes no read-only array
    rule, fix = "images must be floating-point numbers in [0, 1], or uint8", "divide by the white pixel's value"
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{rule}; got {images.dtype}: convert them")
    if not np.isfinite(images).all():
        raise UserError(f"{rule}; some are not finite: mend them")
    if images.size and (images.min() < 0 or images.max() > 1):
        raise UserError(f"{rule}; got {brief(float(images.min()))} to {brief(float(images.max()))}: {fix}")
    return (images * 255).round().astype(np.uint8)


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """Accuracy of each network: probabilities (B, R, C), labels (B,)."""
    return (probabilities.argmax(-1) == labels[:, None]).mean(0).tolist()


set_model(ServedModel())
