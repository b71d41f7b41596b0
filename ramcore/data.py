"""Sources (MNIST files, Fashion-MNIST files, bundled digits) and tasks (translated, cluttered), held whole as tensors.

A source is 28x28 grey images with labels, split once and for all into train, validation and test. A task lays them on
a canvas: `TaskData.render` draws a batch of canvases from the split's images and a key per replicate, so that a
placement is a pure function of (seed, epoch, image), the same on CPU and GPU, and nothing but the source images is
ever stored.

R: replicates, B: images of a batch, N: images of a split, S: canvas side, D: digit side (28).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ramcore.config import CLUTTER_SIZE, DIGIT_SIZE, MAX_CLUTTER, TASKS, Config, Data
from ramcore.errors import UserError
from ramcore.rng import Stream, bits, integers, key

SplitName = Literal["train", "validation", "test"]
_FIXED_SEED = -1  # places the validation and test digits of every run; no replicate can have it


class DataMissing(UserError):
    """The data is nowhere to be found (as opposed to: there, but damaged)."""


class Split(NamedTuple):
    """images: (N, 28, 28) uint8; labels: (N,) int64 in 0..9."""

    images: Tensor
    labels: Tensor


# Sources.


class _IdxFile(NamedTuple):
    name: str
    shape: tuple[int, ...]
    md5: str  # of the published .gz file
    sha256: str | None  # of what it contains, where known: also vouches for files that were unpacked or packed again


class _IdxSource(NamedTuple):
    mirrors: tuple[str, ...]
    files: tuple[_IdxFile, ...]  # train images, train labels, test images, test labels


_IDX_SOURCES: dict[str, _IdxSource] = {
    "mnist": _IdxSource(
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        files=(
            _IdxFile(
                "train-images-idx3-ubyte",
                (60_000, 28, 28),
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            ),
            _IdxFile(
                "train-labels-idx1-ubyte",
                (60_000,),
                "d53e105ee54ea40749a09fcbcd1e9432",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            ),
            _IdxFile(
                "t10k-images-idx3-ubyte",
                (10_000, 28, 28),
                "9fb629c4189551a2d022fa330f9573f3",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            ),
            _IdxFile(
                "t10k-labels-idx1-ubyte",
                (10_000,),
                "ec29112dd5afa0611ce80d1b7f02629c",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        ),
    ),
    "fashion-mnist": _IdxSource(
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        files=(
            _IdxFile("train-images-idx3-ubyte", (60_000, 28, 28), "8d4fb7e6c68d591d4c3dfef9ec88bf0d", None),
            _IdxFile("train-labels-idx1-ubyte", (60_000,), "25c81989df183df01b3e8a0aad5dffbe", None),
            _IdxFile("t10k-images-idx3-ubyte", (10_000, 28, 28), "bef4ecab320f06d8554ea6380940ec79", None),
            _IdxFile("t10k-labels-idx1-ubyte", (10_000,), "bb300cfdad3c16e7a12a480ee83cd310", None),
        ),
    ),
}
_VALIDATION_SIZE = 10_000  # the last training images: 50,000/10,000/10,000
_DIGITS_SPLIT = (1_197, 300, 300)


def load_source(name: Data, data_dir: Path | None = None) -> dict[SplitName, Split]:
    """The 28x28 images of a source, split.

    IDX files (plain or .gz, in the folder itself or in a subfolder of the source's name) are looked for in data_dir,
    then $RAM_DATA_DIR, then the per-user cache, then downloaded from public mirrors into that cache.

    Raises:
        DataMissing: nowhere to be found, and no mirror can be reached.
        UserError: a file is damaged, truncated or another one; data_dir is not a folder.
    """
    if name == "digits":
        return _load_digits()
    source = _IDX_SOURCES[name]
    arrays = [
        _read_idx(path, file, name) for path, file in zip(_find(name, source, data_dir), source.files, strict=True)
    ]
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(a) for a in arrays)
    train_labels, test_labels = train_labels.long(), test_labels.long()
    cut = len(train_images) - _VALIDATION_SIZE
    return {
        "train": Split(train_images[:cut], train_labels[:cut]),
        "validation": Split(train_images[cut:], train_labels[cut:]),
        "test": Split(test_images, test_labels),
    }


def _load_digits() -> dict[SplitName, Split]:
    """The 1,797 real 8x8 digits inside scikit-learn (UCI Optical Recognition of Handwritten Digits), at 28x28."""
    from sklearn.datasets import load_digits  # slow to import, and needed for this source only

    pixels, target = load_digits(return_X_y=True)
    small = torch.as_tensor(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(DIGIT_SIZE, DIGIT_SIZE), mode="bilinear", align_corners=False)
    images, labels = large[:, 0].round().to(torch.uint8), torch.as_tensor(target).long()
    # The file is ordered by writer, so it is split by a fixed permutation.
    order = torch.argsort(bits(torch.tensor([0]), torch.arange(len(labels))), stable=True)
    parts = torch.split(order, list(_DIGITS_SPLIT))
    return {name: Split(images[p], labels[p]) for name, p in zip(get_args(SplitName), parts, strict=True)}


def _find(name: str, source: _IdxSource, data_dir: Path | None) -> list[Path]:
    import pooch

    cache = Path(pooch.os_cache("ram-study"))
    searched: list[Path] = []
    named = [("--data-dir", data_dir), ("$RAM_DATA_DIR", os.environ.get("RAM_DATA_DIR"))]
    for origin, folder in named:
        if not folder:
            continue
        if not Path(folder).is_dir():
            raise UserError(f"{origin} must be a folder; {folder} is not one: create it or name another")
        searched.append(Path(folder))
    searched.append(cache)
    for folder in searched:
        # A folder for all sources holds one subfolder each; files lying in it directly are MNIST's, as everywhere.
        for place in (folder / name, folder) if name == "mnist" or folder != cache else (folder / name,):
            paths = [_existing(place, file.name) for file in source.files]
            if all(paths):
                return [path for path in paths if path]
    return [_download(name, source, file, cache / name) for file in source.files]


def _existing(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _download(name: str, source: _IdxSource, file: _IdxFile, folder: Path) -> Path:
    import pooch
    import requests

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
    """The array in an IDX file, checked against what the source published."""
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


# Tasks.


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task's images, whole, as tensors of one device."""

    data: str
    task: str
    digest: str  # sha256 of the source's images and labels
    train: Split
    validation: Split
    test: Split

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images of each split."""
        return {name: len(self.split(name).labels) for name in get_args(SplitName)}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.train.images.device

    def split(self, name: SplitName) -> Split:
        """One split's images and labels."""
        return getattr(self, name)

    def to(self, device: torch.device | str) -> TaskData:
        """The same task on another device."""
        splits = {name: Split(*(t.to(device) for t in self.split(name))) for name in get_args(SplitName)}
        return TaskData(data=self.data, task=self.task, digest=self.digest, **splits)

    def placement_keys(self, split: SplitName, seeds: Tensor, epoch: int | Tensor) -> Tensor:
        """Keys that decide where digits and clutter lie.

        Args:
            split: validation and test are placed once for all runs, so theirs is one key, shape (1,).
            seeds: (R,) int64.
            epoch: of the training split; a constant keeps the placements.

        Returns:
            (R,) int64 for train, else (1,).
        """
        if split == "train":
            return key(seeds, Stream.PLACEMENT, epoch)
        fixed = torch.full((1,), _FIXED_SEED, device=seeds.device)
        return key(fixed, Stream.PLACEMENT, 1 if split == "validation" else 2)

    def render(self, split: SplitName, index: Tensor, keys: Tensor) -> Tensor:
        """Draw canvases.

        Args:
            split: whose images, also for the clutter.
            index: (R, B) int64 of the split's images.
            keys: (R,) int64 of `placement_keys`.

        Returns:
            (R, B, S, S) uint8.
        """
        images = self.split(split).images
        canvas, clutter = TASKS[self.task]
        shape = (*index.shape, canvas, canvas)
        flat_index = index.reshape(-1)
        digits = images.view(len(images), -1).index_select(0, flat_index)
        if canvas == DIGIT_SIZE:
            return digits.view(shape)
        # Every image has its own counters, so its place depends neither on the batch nor on the other images.
        counter, high, digit_pixels, clutter_pixels, source_pixels = _layout(self.task, len(images), index.device)
        counters = (index * _COUNTERS_PER_IMAGE).reshape(-1, 1) + counter
        drawn = integers(keys[:, None].expand_as(index).reshape(-1, 1), counters, high)

        def place(first: int, side: int, count: int = 1) -> Tensor:
            """Flat offsets (N, count) of the corners drawn for squares of a side x side image."""
            return drawn[:, first : first + count] * side + drawn[:, first + count : first + 2 * count]

        flat = digits.new_zeros(digits.shape[0], canvas * canvas)
        flat.scatter_(1, place(0, canvas) + digit_pixels, digits)
        if clutter:
            other = (flat_index[:, None] + 1 + drawn[:, 2 : 2 + clutter]) % len(images)
            source = other * DIGIT_SIZE**2 + place(2 + clutter, DIGIT_SIZE, clutter)
            patches = images.view(-1)[source[..., None] + source_pixels]
            target = place(2 + 3 * clutter, canvas, clutter)[..., None] + clutter_pixels
            for i in range(clutter):  # one after the other: patches of one image may overlap
                flat.scatter_(1, target[:, i], torch.maximum(flat.gather(1, target[:, i]), patches[:, i]))
        return flat.view(shape)


_COUNTERS_PER_IMAGE = 2 + 5 * MAX_CLUTTER


def _square(size: int, side: int, device: torch.device) -> Tensor:
    """Flat offsets of the pixels of a size x size square in a side x side image: (size * size,)."""
    steps = torch.arange(size, device=device)
    return (steps[:, None] * side + steps).reshape(-1)


class _Layout(NamedTuple):
    counter: Tensor  # (D,) of the D numbers drawn for an image: its digit's row and column, then for its clutter all
    high: Tensor  # (D,) other images, rows and columns to cut at, rows and columns to paste at; each below its `high`
    digit_pixels: Tensor  # flat offsets of a digit's pixels in a canvas
    clutter_pixels: Tensor  # of a clutter patch's in a canvas
    source_pixels: Tensor  # of a clutter patch's in the image it is cut from


@lru_cache(maxsize=64)
def _layout(task: str, num_images: int, device: torch.device) -> _Layout:
    canvas, clutter = TASKS[task]
    places = [canvas - DIGIT_SIZE + 1] * 2
    clutter_high = (num_images - 1, *[DIGIT_SIZE - CLUTTER_SIZE + 1] * 2, *[canvas - CLUTTER_SIZE + 1] * 2)
    places += [high for high in clutter_high for _ in range(clutter)]
    return _Layout(
        counter=torch.arange(len(places), device=device),
        high=torch.tensor(places, device=device),
        digit_pixels=_square(DIGIT_SIZE, canvas, device),
        clutter_pixels=_square(CLUTTER_SIZE, canvas, device),
        source_pixels=_square(CLUTTER_SIZE, DIGIT_SIZE, device),
    )


def load_task(config: Config, data_dir: Path | None = None, device: torch.device | str = "cpu") -> TaskData:
    """The task of a configuration: the source config.data laid out as config.task. Raises as `load_source`."""
    return make_task(config.data, config.task, load_source(config.data, data_dir)).to(device)


def make_task(data: str, task: str, splits: dict[SplitName, Split]) -> TaskData:
    """A task from splits at hand (28x28 uint8 images, int64 labels)."""
    digest = hashlib.sha256()
    for name in get_args(SplitName):
        for tensor in splits[name]:
            digest.update(tensor.contiguous().numpy().tobytes())
    return TaskData(data=data, task=task, digest=digest.hexdigest(), **splits)
