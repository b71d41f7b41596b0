from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy and torch are imported; two tests run at a time

import torch

from ramcore import sources
from ramcore.config import Config
from ramcore.data import TaskData, make_task
from ramcore.sources import load_source

# The files that take longest, longest first: begun first, they leave no worker waiting for the other at the end.
LONGEST = (
    "test_importance", "test_study", "test_launcher", "test_cluster", "test_tracking", "test_report", "test_gpus",
    "test_one_place", "test_api", "test_sensitivity", "test_seam", "test_crash", "test_surrogate", "test_compare",
    "test_load",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


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


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """An MLflow database without runs; making one takes seconds, copying it does not."""
    from crash import new_database

    return new_database(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="module")
def quick_fits() -> Iterator[pytest.MonkeyPatch]:
    """Fits of the analysis in a fraction of the time, on studies whose modes are found from any start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.surrogate.STARTS", 2)
        patch.setattr("analysis.surrogate.LEAST_STEPS", 5)
        patch.setattr("analysis.training.STARTS", 2)
        patch.setattr("analysis.training.STEPS", 200)
        yield patch


@pytest.fixture
def idx_folder(tmp_path, monkeypatch, digits) -> Path:
    """A small IDX source in a folder, under the name mnist."""
    files = []
    for stem, name in (("train", "train"), ("t10k", "test")):
        split = digits[name]
        for kind, array in (("images-idx3", split.images), ("labels-idx1", split.labels.to(torch.uint8))):
            header = bytes([0, 0, 8, array.dim()]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = header + array.contiguous().numpy().tobytes()
            packed = gzip.compress(content, mtime=0)
            path = tmp_path / "data" / f"{stem}-{kind}-ubyte.gz"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(packed)
            md5, sha256 = hashlib.md5(packed).hexdigest(), hashlib.sha256(content).hexdigest()
            files.append(sources._IdxFile(path.stem, tuple(array.shape), md5, sha256))
    source = sources._IdxSource(("http://127.0.0.1:9/",), tuple(files))
    unsigned = sources._IdxSource(source.mirrors, tuple(f._replace(sha256=None) for f in files))
    monkeypatch.setattr(sources, "_IDX_SOURCES", {"mnist": source, "fashion-mnist": unsigned})
    monkeypatch.setattr(sources, "_VALIDATION_SIZE", 197)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAM_DATA_DIR", raising=False)
    return tmp_path / "data"


@pytest.fixture
def mps_place(tmp_path, monkeypatch) -> Iterator[Path]:
    """A temporary folder for MPS' files, with a program that works first on PATH, and no MPS of the machine's own."""
    from fake_mps import PROGRAM

    from study import mps

    program = tmp_path / "bin" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv(mps.PIPE, raising=False)
    monkeypatch.setattr(mps, "_DEFAULT", str(tmp_path / "nvidia-mps"))
    monkeypatch.setattr(mps, "_SECONDS", 5.0)
    monkeypatch.setattr(mps, "_END_SECONDS", 1.0)
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    for left in list(folder.glob("**/pipe")):
        mps.end(left.parent)
    shutil.rmtree(folder)
