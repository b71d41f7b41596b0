"""The Recurrent Attention Model of Mnih et al. 2014 (arXiv 1406.6247): data, model, losses, trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramcore.config import Config as Config
    from ramcore.sources import load_task as load_task
    from ramcore.trainer import Trainer as Trainer


def on_first_use(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's __getattr__ for public names that are imported on first use: their modules may take seconds, and
    plain data should not. modules: the module of each name.
    """

    def attribute(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(modules[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return attribute


__getattr__ = on_first_use(
    __name__, {"Config": "ramcore.config", "load_task": "ramcore.sources", "Trainer": "ramcore.trainer"}
)
