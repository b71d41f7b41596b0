"""Where the images come from: MNIST's and Fashion-MNIST's IDX files, scikit-learn's digits, and own files."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
import os
import re
import struct
import tokenize
import zipfile
import zlib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pooch
import requests
import torch
from torch.nn import functional

from ramcore.config import DIGIT_SIZE, SOURCES, Config, nearest
from ramcore.data import Split, SplitName, TaskData, make_task
from ramcore.errors import UserError, first_line, usable
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


# A line for each file: its name without "-ubyte", the md5 and, where known, the sha256.
_MNIST = """
train-images-idx3 f68b3c2dcbeaaa9fbdd348bbdeb94873 ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db
train-labels-idx1 d53e105ee54ea40749a09fcbcd1e9432 65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5
t10k-images-idx3 9fb629c4189551a2d022fa330f9573f3 0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7
t10k-labels-idx1 ec29112dd5afa0611ce80d1b7f02629c ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2
"""
_FASHION_MNIST = """
train-images-idx3 8d4fb7e6c68d591d4c3dfef9ec88bf0d
train-labels-idx1 25c81989df183df01b3e8a0aad5dffbe
t10k-images-idx3 bef4ecab320f06d8554ea6380940ec79
t10k-labels-idx1 bb300cfdad3c16e7a12a480ee83cd310
"""


def _idx_source(table: str, *mirrors: str) -> _IdxSource:
    files: list[_IdxFile] = []
    for name, md5, *sha256 in map(str.split, table.strip().splitlines()):
        count = 60_000 if name.startswith("train") else 10_000
        shape = (count, DIGIT_SIZE, DIGIT_SIZE) if "images" in name else (count,)
        files.append(_IdxFile(f"{name}-ubyte", shape, md5, sha256[0] if sha256 else None))
    return _IdxSource(mirrors, tuple(files))


_IDX_SOURCES = {
    "mnist": _idx_source(
        _MNIST,
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": _idx_source(
        _FASHION_MNIST,
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
}
_VALIDATION_SIZE = 10_000  # the last training images, which leaves 50,000
_DIGITS_FILE = "sklearn/datasets/data/digits.csv.gz"  # read by itself, since importing scikit-learn takes seconds
_DIGITS_SPLIT = (1_197, 300, 300)  # images for training, validation and test


def load_source(name: str, data_dir: Path | None = None) -> dict[SplitName, Split]:
    """Load the 28x28 images of a source and split them.

    The IDX files may be plain or .gz, and lie in the folder, in a subfolder with the source's name, or where
    torchvision puts them. They are read from data_dir or $RAM_DATA_DIR if one of these is given; else from the per-user
    cache, or from public mirrors, from which they go into the cache.

    Raises:
        DataMissing: no folder was given, the cache lacks the files, and no mirror answers.
        UserError: a file is damaged, truncated or not the source's; the folder that was given is none or lacks files.
    """
    if name not in SOURCES:
        raise UserError(f"own images are read from their file; got the name {name} alone: load_images(PATH)")
    if name == "digits":
        return _load_digits()
    source = _IDX_SOURCES[name]
    paths = _find(name, source, data_dir)
    arrays = [torch.from_numpy(_read_idx(p, file, name)) for p, file in zip(paths, source.files, strict=True)]
    images, labels, test = arrays[0], arrays[1].long(), Split(arrays[2], arrays[3].long())
    cut = len(images) - _VALIDATION_SIZE
    train, validation = Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:])
    return {"train": train, "validation": validation, "test": test}


def _load_digits() -> dict[SplitName, Split]:
    """The 1,797 8x8 digits that come with scikit-learn (UCI Optical Recognition of Handwritten Digits), at 28x28."""
    try:
        path = distribution("scikit-learn").locate_file(_DIGITS_FILE)
        table = torch.from_numpy(np.loadtxt(str(path), delimiter=",", dtype=np.float32))
    except (PackageNotFoundError, OSError) as error:
        raise DataMissing(
            f"--data digits needs the file {_DIGITS_FILE} of scikit-learn; {first_line(error)}: "
            "install scikit-learn as pyproject.toml says, or use --data mnist"
        ) from error
    # A row is an image: 64 pixels from 0 to 16, then the label.
    small = table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)
    large = functional.interpolate(small, size=(DIGIT_SIZE, DIGIT_SIZE), mode="bilinear", align_corners=False)
    images, labels = large[:, 0].round().to(torch.uint8), table[:, -1].long()
    # The rows are ordered by writer, so a fixed permutation splits them.
    order = torch.argsort(bits(torch.tensor([0]), torch.arange(len(labels))), stable=True)
    parts = torch.split(order, list(_DIGITS_SPLIT))
    return {name: Split(images[p], labels[p]) for name, p in zip(get_args(SplitName), parts, strict=True)}


def _find(name: str, source: _IdxSource, data_dir: Path | None) -> list[Path]:
    """The paths of a source's four files; if no folder was named, they are downloaded where the cache lacks them."""
    given = {"--data-dir": data_dir, "$RAM_DATA_DIR": os.environ.get("RAM_DATA_DIR")}
    named = {flag: Path(folder) for flag, folder in given.items() if folder}
    for flag, folder in named.items():
        with usable(flag):
            is_folder = folder.is_dir()
        if not is_folder:
            raise UserError(f"{flag} must be a folder; {folder} is not one: create it or name another")
    # A folder for several sources has a subfolder for each. The cache's own files could only be MNIST's.
    cache = Path(pooch.os_cache("ram-study"))
    torchvision = Path({"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]) / "raw"
    places = [f / sub for f in named.values() for sub in (name, torchvision, "raw", "")]
    places = places or [cache / name, *([cache] if name == "mnist" else [])]
    lacking: dict[Path, list[str]] = {}
    for place in places:
        with usable(" or ".join(named) or "without --data-dir, the user's cache"):
            paths = [_existing(place, file.name) for file in source.files]
        if all(paths):
            return [path for path in paths if path]
        lacking[place] = [file.name for file, path in zip(source.files, paths, strict=True) if not path]
    if not named:
        return [_download(name, source, file, cache / name) for file in source.files]
    nearest = min(places, key=lambda place: len(lacking[place]))
    missing = f"; {nearest} lacks {', '.join(lacking[nearest])}" if len(lacking[nearest]) < len(source.files) else ""
    raise UserError(
        f"{' or '.join(named)} must hold {name}'s four IDX files, plain or .gz; not found in "
        f"{', '.join(map(str, places))}{missing}: put them there, or name no folder to have them downloaded"
    )


def _existing(folder: Path, name: str) -> Path | None:
    names = (name, name.replace("-idx", ".idx"))  # as published, and as some archives have them
    return next((path for n in names for path in (folder / n, folder / f"{n}.gz") if path.is_file()), None)


def _download(name: str, source: _IdxSource, file: _IdxFile, folder: Path) -> Path:
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(timeout=(5, 60))
    failures: list[str] = []
    for mirror in source.mirrors:
        try:
            packed, known_hash = f"{file.name}.gz", f"md5:{file.md5}"
            # The type of `downloader` in pooch is narrower than its documentation.
            path = pooch.retrieve(mirror + packed, known_hash, packed, folder, downloader=downloader)  # pyright: ignore[reportArgumentType]
            return Path(path)
        except (requests.exceptions.RequestException, OSError, ValueError) as error:
            failures.append(f"{mirror}: {type(error).__name__}")
    raise DataMissing(
        f"{name} must be on this machine or within reach; found in no folder, and no mirror answered "
        f"({'; '.join(failures)}): put its four IDX files into a folder and pass --data-dir, or use --data digits"
    )


def _read_idx(path: Path, file: _IdxFile, source: str) -> np.ndarray:
    """The array in an IDX file. Raises UserError unless shape and checksum are those that the source published."""
    raw, content, array = _parse_idx(path, len(file.shape), file.shape)
    checksum, wanted, found = "md5", file.md5, hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if file.sha256:
        checksum, wanted, found = "sha256 of the unpacked file", file.sha256, hashlib.sha256(content).hexdigest()
    if found != wanted and (file.sha256 or path.suffix == ".gz"):  # no checksum of a plain Fashion-MNIST file is known
        raise UserError(f"{path} must be {source}'s, {checksum} {wanted}; found {found}: fetch it again")
    return array


def _parse_idx(path: Path, ndim: int, wanted: tuple[int, ...] | None = None) -> tuple[bytes, bytes, np.ndarray]:
    """The bytes of an IDX file, the same unpacked, and its array of `ndim` axes of 8-bit numbers.

    Raises UserError if it is damaged, or not of the shape that is wanted.
    """
    with usable("--data-dir or --data"):
        raw = path.read_bytes()
    try:
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} must be a whole .gz file; reading it failed ({error}): fetch it again") from error
    magic = bytes([0, 0, 8, ndim])
    if content[:4] != magic:
        raise UserError(f"{path} must start with IDX magic {magic.hex()}; found {content[:4].hex()}: fetch it again")
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim))
    wanted, header = wanted or shape, 4 + 4 * ndim
    expected_size = header + math.prod(wanted)
    if shape != wanted or len(content) != expected_size:
        raise UserError(
            f"{path} must hold shape {wanted} in {expected_size} bytes; "
            f"found {shape} in {len(content)} bytes: fetch it again"
        )
    return raw, content, np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def load_task(config: Config, data_dir: Path | None = None, device: torch.device | str = "cpu") -> TaskData:
    """The task of a configuration: source config.data, laid out as config.task. Raises as `load_source`."""
    return make_task(config.data, config.task, load_source(config.data, data_dir), config.canvas).to(device)


# ---- own images ----------------------------------------------------------------------------------------------

_OWN_VALIDATION = 6  # one training image in this many is for validation, if the file does not say which; as in MNIST
# What numpy and zipfile raise for a damaged .npz file: also encrypted, of another zip version, or with a header of
# another size, type or syntax.
_DAMAGED = (
    OSError, ValueError, EOFError, RuntimeError, MemoryError, OverflowError, LookupError, TypeError, SyntaxError,
    struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
_OWN_ARRAYS = {  # with what their IDX files' names hold; EMNIST's begin with the name of a part
    "train_images": r"train-images",
    "train_labels": r"train-labels",
    "test_images": r"(test|t10k)-images",
    "test_labels": r"(test|t10k)-labels",
}


def load_images(path: Path | str, task: str = "original", canvas: int = 0) -> TaskData:
    """Own images as a task: from an .npz file, or a folder with four IDX files named as MNIST's, plain or .gz.

    An .npz file holds train_images (N, I, I) uint8, train_labels (N,), and the same for test and, if it likes, for
    validation. Without validation images, a sixth of the training images is taken, always the same. Labels are whole
    numbers; the network's class k stands for the k-th smallest of them. The data's name is that of the file and the
    first 8 digits of the digest, such as letters-3f2a9c1b.

    Raises UserError if these are no such images, or do not fit on the canvas.
    """
    path = Path(path)
    with usable("--data"):
        arrays = _own_arrays(path)
    labels = np.unique(_labels(path, arrays, "train"))
    if len(labels) < 2:
        raise UserError(f"images must be of at least 2 classes; all of {path} have the label {labels[0]}: add others")
    given = {name: _own_split(path, arrays, name, labels) for name in get_args(SplitName) if f"{name}_images" in arrays}
    sizes = {name: tuple(split.images.shape[1:]) for name, split in given.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"images must be of one size; {path} has {sizes}: resize them")
    if "validation" not in given:
        images, of_images = given["train"]
        order = torch.argsort(bits(torch.tensor([0]), torch.arange(len(of_images))), stable=True)
        cut = max(1, len(order) // _OWN_VALIDATION)
        given["validation"] = Split(images[order[:cut]], of_images[order[:cut]])
        given["train"] = Split(images[order[cut:]], of_images[order[cut:]])
    found = make_task(path.stem, task, given, canvas)
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", path.name.removesuffix(".npz")).lstrip("._+-")[:40] or "images"
    return replace(found, data=f"{name}-{found.digest[:8]}")


def _own_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file or a folder. Raises UserError, OSError."""
    if path.is_dir():
        return _idx_folder(path)
    if path.is_file():
        return _npz_file(path)
    rule = f"images must be one of {', '.join(SOURCES)}, an .npz file, or a folder of IDX files"
    if path.exists():
        raise UserError(f"{rule}; {path} is none of these: pass another --data")
    near = [*SOURCES, *(file.name for file in path.parent.glob("*"))]
    raise UserError(f"{rule}; there is no {path}{nearest(path.name, near)}")


def _npz_file(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises UserError, OSError."""
    wanted = "train_images, train_labels, test_images and test_labels"
    known = [f"{split}_{kind}" for split in get_args(SplitName) for kind in ("images", "labels")]
    with path.open("rb") as opened:
        if not zipfile.is_zipfile(opened):
            raise UserError(f"{path} must be an .npz file with {wanted}; it is none: write it with numpy.savez")
        opened.seek(0)
        try:
            with np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files if name in known}
                found = ", ".join(file.files) or "nothing"
        except _DAMAGED as error:
            rule = f"{path} must be an .npz file with {wanted}"
            raise UserError(f"{rule}; reading it failed ({first_line(error)}): write it with numpy.savez") from error
    if none := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise UserError(f"{path} must hold arrays; {none[0]} is none: write it with numpy.savez")
    if missing := [name for name in _OWN_ARRAYS if name not in arrays]:
        raise UserError(f"{path} must hold {wanted}; it holds {found}: add {', '.join(missing)}")
    if len({"validation_images", "validation_labels"} & set(arrays)) == 1:
        raise UserError(f"{path} must hold validation_images with validation_labels; one is missing: add it, or none")
    return arrays


def _idx_folder(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder of IDX files. Raises UserError, OSError."""
    arrays: dict[str, np.ndarray] = {}
    for name, pattern in _OWN_ARRAYS.items():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and re.search(pattern, file.name)]
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise UserError(
                f"{path} must hold one IDX file each such as train-images-idx3-ubyte, train-labels-idx1-ubyte, "
                f"t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte; found for {name}: {found}"
            )
        arrays[name] = _parse_idx(files[0], 3 if name.endswith("images") else 1)[2]
    return arrays


def _labels(path: Path, arrays: dict[str, np.ndarray], split: str) -> np.ndarray:
    """The labels of a split, (N,) whole numbers. Raises UserError."""
    labels, images = arrays[f"{split}_labels"], arrays[f"{split}_images"]
    if labels.ndim != 1 or labels.shape != images.shape[:1] or not len(labels):
        fact = f"{path} has {len(images) if images.ndim else 0} images and labels of shape {labels.shape}"
        raise UserError(f"{split}_labels must have one label for each of at least one image; {fact}")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{split}_labels must be whole numbers; {path} has {labels.dtype}: convert them with astype")
    return labels


def _own_split(path: Path, arrays: dict[str, np.ndarray], split: str, classes: np.ndarray) -> Split:
    """A split whose labels are positions among the classes. Raises UserError."""
    images, labels = arrays[f"{split}_images"], _labels(path, arrays, split)
    rule = f"{split}_images must be square 8-bit images, (N, I, I) uint8"
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1] != images.shape[2] or not images.shape[1]:
        raise UserError(f"{rule}; {path} has {images.shape} {images.dtype}: convert them")
    if len(unknown := np.setdiff1d(labels, classes)):
        raise UserError(f"every class must be among the training images; {path} has {split} label {unknown[0]} alone")
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(np.searchsorted(classes, labels)).long())
