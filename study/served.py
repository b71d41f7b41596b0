"""The best model in MLflow: weights and configuration as data, and this file as the code that loads them.

    model = mlflow.pyfunc.load_model("runs:/<parent run>/model")
    probabilities = model.predict(images)

images: (B, S, S) float32 in [0, 1], canvases of the model's task. probabilities: (B, R, 10) float32, one network for
    each training seed. A study reports the mean over seeds of each network's accuracy: see `accuracy`. Weights are read
    with weights_only=True, so a model cannot carry pickled code. `ramcore` must be installed where a model is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from torch import Tensor

from ramcore.config import Config
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
        """Probabilities (B, R, 10) of canvases (B, S, S) in [0, 1]. The first glimpse of image i depends on i only."""
        images = torch.from_numpy(np.asarray(model_input) * 255).round().to(torch.uint8)
        parts: list[Tensor] = []
        for start in range(0, len(images), BATCH_SIZE):
            index = torch.arange(start, min(start + BATCH_SIZE, len(images)))
            log_probs = class_log_probs(self.network, self.config, torch.tensor(self.seeds), images[index][None], index)
            parts.append(log_probs[:, -1].exp().transpose(0, 1))
        return torch.cat(parts).numpy()


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """Accuracy of each network: probabilities (B, R, 10), labels (B,)."""
    return (probabilities.argmax(-1) == labels[:, None]).mean(0).tolist()


set_model(ServedModel())
