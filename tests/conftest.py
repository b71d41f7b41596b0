from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ramcore.config import Config
from ramcore.data import TaskData, load_source, make_task

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """Folder with MNIST's files; tests that need it are skipped where there is none."""
    folder = os.environ.get("RAM_DATA_DIR")
    if not folder or not any(Path(folder).glob("**/train-images-idx3-ubyte*")):
        pytest.skip("no MNIST files: set RAM_DATA_DIR to a folder that holds them")
    return Path(folder)


@pytest.fixture(scope="session")
def digits() -> dict:
    return load_source("digits")


@pytest.fixture(scope="session")
def digits_task(digits):
    """digits_task("translated"): the bundled digits as any task."""
    return lambda task: make_task("digits", task, digits)


@pytest.fixture
def tiny(digits) -> tuple[Config, TaskData]:
    """A configuration and data on which an epoch takes milliseconds."""
    config = Config(
        data="digits",
        task="original",
        num_glimpses=3,
        patch_size=6,
        num_scales=2,
        glimpse_size=16,
        hidden_size=32,
        batch_size=20,
        epochs=4,
        learning_rate=3e-3,
        gradient_clip=5.0,
        schedule="cosine",
    )
    small = {name: type(split)(split.images[:200], split.labels[:200]) for name, split in digits.items()}
    return config, make_task("digits", "original", small)
