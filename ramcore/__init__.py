"""The Recurrent Attention Model of Mnih et al. 2014 (arXiv 1406.6247): data, model, losses, trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramcore.config import Config as Config
    from ramcore.sources import load_task as load_task
    from ramcore.trainer import Trainer as Trainer

_FROM = {"Config": "ramcore.config", "load_task": "ramcore.sources", "Trainer": "ramcore.trainer"}


def __getattr__(name: str) -> Any:
    """A public name, imported on first use: its module may take seconds, and plain data should not."""
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
