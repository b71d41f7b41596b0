"""Where the 28x28 images come from: MNIST's and Fashion-MNIST's IDX files, and scikit-learn's digits."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pooch
import requests
import torch
from torch.nn import functional

from ramcore.config import DIGIT_SIZE, Config, Data
from ramcore.data import Split, SplitName, TaskData, make_task
from ramcore.errors import UserError
from ramcore.rng import bits


class DataMissing(UserError):
    """The data cannot be found (damaged data is a plain UserError)."""


class _IdxFile(NamedTuple):
    name: str
    shape: tuple[int, ...]
    md5: str  # of the published .gz file
    sha256: str | None  # of the unpacked content, where known; so a file may also be unpacked or packed again


class _IdxSource(NamedTuple):
    mirrors: tuple[str, ...]
    files: tuple[_IdxFile, ...]  # train images, train labels, test images, test labels


_IDX_FILES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}


def _idx_source(mirrors: tuple[str, ...], md5: Sequence[str], sha256: Sequence[str | None]) -> _IdxSource:
    rows = zip(_IDX_FILES.items(), md5, sha256, strict=True)
    return _IdxSource(mirrors, tuple(_IdxFile(name, shape, packed, content) for (name, shape), packed, content in rows))


_IDX_SOURCES: dict[str, _IdxSource] = {
    "mnist": _idx_source(
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        md5=(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        sha256=(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion-mnist": _idx_source(
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        md5=(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        sha256=(None,) * 4,
    ),
}
_VALIDATION_SIZE = 10_000  # the last training images, which leaves 50,000
_DIGITS_SPLIT = (1_197, 300, 300)  # images for training, validation and test


def load_source(name: Data, data_dir: Path | None = None) -> dict[SplitName, Split]:
    """Load the 28x28 images of a source and split them.

    The IDX files may be plain or .gz, and lie in the folder or in a subfolder with the source's name. The search order
    is data_dir, $RAM_DATA_DIR, the per-user cache; then public mirrors, from which the files go into the cache.

    Raises:
        DataMissing: no folder holds the files, and no mirror answers.
        UserError: a file is damaged, truncated or not the source's; data_dir is not a folder.
    """
    if name == "digits":
        return _load_digits()
    source = _IDX_SOURCES[name]
    paths = _find(name, source, data_dir)
    arrays = [_read_idx(path, file, name) for path, file in zip(paths, source.files, strict=True)]
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(a) for a in arrays)
    train_labels, test_labels = train_labels.long(), test_labels.long()
    cut = len(train_images) - _VALIDATION_SIZE
    return {
        "train": Split(train_images[:cut], train_labels[:cut]),
        "validation": Split(train_images[cut:], train_labels[cut:]),
        "test": Split(test_images, test_labels),
    }


def _load_digits() -> dict[SplitName, Split]:
    """The 1,797 8x8 digits that come with scikit-learn (UCI Optical Recognition of Handwritten Digits), at 28x28."""
    # The file of `sklearn.datasets.load_digits`, a row an image: 64 pixels from 0 to 16, then the label. Importing
    # scikit-learn takes longer than training an epoch.
    path = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = torch.from_numpy(np.loadtxt(str(path), delimiter=",", dtype=np.float32))
    small = table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)
    large = functional.interpolate(small, size=(DIGIT_SIZE, DIGIT_SIZE), mode="bilinear", align_corners=False)
    images, labels = large[:, 0].round().to(torch.uint8), table[:, -1].long()
    # The rows are ordered by writer, so a fixed permutation splits them.
    order = torch.argsort(bits(torch.tensor([0]), torch.arange(len(labels))), stable=True)
    parts = torch.split(order, list(_DIGITS_SPLIT))
    return {name: Split(images[p], labels[p]) for name, p in zip(get_args(SplitName), parts, strict=True)}


def _find(name: str, source: _IdxSource, data_dir: Path | None) -> list[Path]:
    """The paths of a source's four files; they are downloaded if no folder holds all of them."""
    cache = Path(pooch.os_cache("ram-study"))
    folders: list[Path] = []
    for origin, given in (("--data-dir", data_dir), ("$RAM_DATA_DIR", os.environ.get("RAM_DATA_DIR"))):
        if not given:
            continue
        if not Path(given).is_dir():
            raise UserError(f"{origin} must be a folder; {given} is not one: create it or name another")
        folders.append(Path(given))
    for folder in [*folders, cache]:
        # A folder for several sources has a subfolder for each. The cache's own files could only be MNIST's.
        for place in (folder / name, folder) if name == "mnist" or folder != cache else (folder / name,):
            paths = [_existing(place, file.name) for file in source.files]
            if all(paths):
                return [path for path in paths if path]
    return [_download(name, source, file, cache / name) for file in source.files]


def _existing(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _download(name: str, source: _IdxSource, file: _IdxFile, folder: Path) -> Path:
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(timeout=(5, 60))
    failures: list[str] = []
    for mirror in source.mirrors:
        try:
            path = pooch.retrieve(
                url=f"{mirror}{file.name}.gz",
                known_hash=f"md5:{file.md5}",
                fname=f"{file.name}.gz",
                path=folder,
                downloader=downloader,  # pyright: ignore[reportArgumentType]  # as pooch documents it
            )
            return Path(path)
        except (requests.exceptions.RequestException, OSError, ValueError) as error:
            failures.append(f"{mirror}: {type(error).__name__}")
    raise DataMissing(
        f"{name} must be on this machine or within reach; found in no folder, and no mirror answered "
        f"({'; '.join(failures)}): put its four IDX files into a folder and pass --data-dir, or use --data digits"
    )


def _read_idx(path: Path, file: _IdxFile, source: str) -> np.ndarray:
    """The array in an IDX file. Raises UserError unless shape and checksum are those that the source published."""
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} must be a whole .gz file; reading it failed ({error}): fetch it again") from error
    ndim = len(file.shape)
    magic = bytes([0, 0, 8, ndim])
    header = magic + b"".join(n.to_bytes(4, "big") for n in file.shape)
    expected_size = len(header) + int(np.prod(file.shape))
    if content[:4] != magic:
        raise UserError(f"{path} must start with IDX magic {magic.hex()}; found {content[:4].hex()}: fetch it again")
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim))
    if shape != file.shape or len(content) != expected_size:
        raise UserError(
            f"{path} must hold shape {file.shape} in {expected_size} bytes; "
            f"found {shape} in {len(content)} bytes: fetch it again"
        )
    if file.sha256 is not None:
        found = hashlib.sha256(content).hexdigest()
        if found != file.sha256:
            raise UserError(
                f"{path} must be {source}'s, sha256 {file.sha256} (unpacked); found {found}: fetch it again"
            )
    elif path.suffix == ".gz":
        found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if found != file.md5:
            raise UserError(f"{path} must be {source}'s, md5 {file.md5}; found {found}: fetch it again")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(file.shape).copy()


def load_task(config: Config, data_dir: Path | None = None, device: torch.device | str = "cpu") -> TaskData:
    """The task of a configuration: source config.data, laid out as config.task. Raises as `load_source`."""
    return make_task(config.data, config.task, load_source(config.data, data_dir)).to(device)
