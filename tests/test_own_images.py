from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ramcore.config import Config
from ramcore.data import make_task
from ramcore.errors import UserError
from ramcore.sources import load_images
from ramcore.trainer import Trainer
from study.flags import Flags
from study.prepare import prepare
from study.record import open_record
from study.trainable import SharedData

SIDE = 20


def shapes(side: int = SIDE, classes: tuple[int, ...] = (5, 12, 19)) -> dict[str, np.ndarray]:
    """Made-up images: the k-th class has a bar of its own length."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 120), ("test", 30)):
        kinds = np.arange(count) % len(classes)
        images = np.zeros((count, side, side), np.uint8)
        for image, k in zip(images, kinds, strict=True):
            row = rng.integers(0, side)
            image[row, : 3 * (k + 1)] = 255
        arrays |= {f"{split}_images": images, f"{split}_labels": np.array(classes)[kinds]}
    return arrays


@pytest.fixture
def file(tmp_path) -> Path:
    np.savez(tmp_path / "my shapes.npz", **shapes())
    return tmp_path / "my shapes.npz"


def idx(folder: Path, name: str, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    (folder / name).write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0))


def test_npz_is_split_named_by_its_digest_and_its_labels_are_numbered(file):
    data = load_images(file)
    assert data.data == f"my-shapes-{data.digest[:8]}" and data.sizes == {"train": 100, "validation": 20, "test": 30}
    assert (data.num_classes, data.image_size, data.canvas_size) == (3, SIDE, SIDE)
    assert set(data.test.labels.tolist()) == {0, 1, 2} and data.test.labels.tolist() == [k % 3 for k in range(30)]
    assert torch.equal(load_images(file).validation.images, data.validation.images), "the split is fixed"
    both = torch.cat([data.train.images, data.validation.images]).flatten(1).sum(1).sort().values
    assert torch.equal(both, torch.from_numpy(shapes()["train_images"]).flatten(1).sum(1).sort().values)


def test_given_validation_images_are_taken_and_change_the_digest(file, tmp_path):
    arrays = shapes()
    np.savez(
        tmp_path / "v.npz", **arrays, validation_images=arrays["test_images"], validation_labels=arrays["test_labels"]
    )
    data = load_images(tmp_path / "v.npz")
    assert data.sizes == {"train": 120, "validation": 30, "test": 30} and data.digest != load_images(file).digest


def test_folder_of_idx_files_gives_the_same_images(file, tmp_path):
    folder, arrays = tmp_path / "kmnist", shapes()
    folder.mkdir()
    for split, stem in (("train", "emnist-letters-train"), ("test", "emnist-letters-test")):
        idx(folder, f"{stem}-images-idx3-ubyte.gz", arrays[f"{split}_images"])
        idx(folder, f"{stem}-labels-idx1-ubyte.gz", arrays[f"{split}_labels"])
    data = load_images(folder)
    assert data.data.startswith("kmnist-") and data.digest == load_images(file).digest
    idx(folder, "emnist-byclass-train-images-idx3-ubyte.gz", arrays["train_images"])
    with pytest.raises(UserError, match="found for train_images: emnist-byclass-train"):
        load_images(folder)


def changed(**arrays) -> dict[str, np.ndarray]:
    return {name: array for name, array in {**shapes(), **arrays}.items() if array is not None}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (changed(train_images=shapes()["train_images"] / 255), r"uint8; .* has \(120, 20, 20\) float64"),
        (changed(train_images=shapes()["train_images"][:, :9]), r"square .* has \(120, 9, 20\) uint8"),
        (changed(train_images=shapes()["train_images"][..., None]), r"has \(120, 20, 20, 1\) uint8"),
        (changed(train_labels=None), "it holds train_images, test_images, test_labels: add train_labels"),
        (changed(train_labels=np.array(3), train_images=np.array(3)), r"0 images and labels of shape \(\)"),
        (changed(train_labels=np.arange(7)), r"has 120 images and labels of shape \(7,\)"),
        (changed(train_labels=np.ones(120)), "train_labels must be whole numbers; .* has float64"),
        (
            changed(train_labels=np.ones(120, int), test_labels=np.ones(30, int)),
            "at least 2 classes; .* have the label 1",
        ),
        (changed(test_labels=np.full(30, 7)), "has test label 7 alone"),
        (changed(test_images=np.zeros((30, 8, 8), np.uint8)), "images must be of one size"),
        (changed(validation_images=shapes()["test_images"]), "validation_labels; one is missing"),
        (changed(train_labels=np.array(["a"] * 120, object)), "reading it failed"),
    ],
)
def test_unusable_images_are_refused_with_what_was_found(tmp_path, arrays, said):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=said) as refusal:
        load_images(tmp_path / "bad.npz")
    assert "\n" not in str(refusal.value)


def with_member(file: Path, content: bytes, member: str = "train_labels.npy", **how: int) -> Path:
    """The .npz file with another content of one member, and another header of its entry in the zip's directory."""
    arrays = {f"{name}.npy": array for name, array in shapes().items()}
    with zipfile.ZipFile(file, "w") as zipped:
        for name, array in arrays.items():
            if name != member.removesuffix(".npy") + ".npy":
                np.save(buffer := io.BytesIO(), array)
                zipped.writestr(name, buffer.getvalue())
        zipped.writestr(member, content)
        for key, value in how.items():
            setattr(zipped.infolist()[-1], key, value)
    return file


HUGE = {"descr": "|u1", "fortran_order": False, "shape": (2**53,)}


def header(fields: object) -> bytes:
    text = repr(fields).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "member", "how", "said"),
    [
        (b"", "train_labels.npy", {}, "must hold arrays; train_labels is none|reading it failed"),
        (b"text", "train_labels", {}, "must hold arrays; train_labels is none|reading it failed"),
        (header(HUGE), "train_labels.npy", {}, "reading it failed"),
        (header("{'descr'"), "train_labels.npy", {}, "reading it failed"),
        (b"secret", "train_labels.npy", {"flag_bits": 1}, "reading it failed .*encrypted"),
        (b"packed", "train_labels.npy", {"compress_type": 99}, "reading it failed .*compression"),
        (b"later", "train_labels.npy", {"extract_version": 99}, "reading it failed .*version"),
    ],
)
def test_npz_with_a_member_that_is_no_array_is_refused(tmp_path, content, member, how, said):
    with pytest.raises(UserError, match=said):
        load_images(with_member(tmp_path / "bad.npz", content, member, **how))


def test_npz_may_hold_other_files(tmp_path):
    arrays = shapes()
    np.savez(tmp_path / "more.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "more.npz", "a") as zipped:
        zipped.writestr("README.txt", "made by hand")
    assert load_images(tmp_path / "more.npz").num_classes == 3


def test_damaged_npz_gives_images_or_one_line(tmp_path):
    np.savez_compressed(tmp_path / "small.npz", **shapes(6, (0, 1)))
    whole, rng, path = (tmp_path / "small.npz").read_bytes(), np.random.default_rng(0), tmp_path / "damaged.npz"
    refused = 0
    for _ in range(300):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            load_images(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def test_idx_file_whose_size_overflows_is_refused(tmp_path):
    idx(tmp_path, "train-labels-idx1-ubyte.gz", np.arange(3))
    idx(tmp_path, "t10k-labels-idx1-ubyte.gz", np.arange(3))
    for split in ("train", "t10k"):
        huge = bytes([0, 0, 8, 3]) + 3 * b"\x80\x00\x00\x00"
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(huge)
    with pytest.raises(UserError, match=rf"in {2**93 + 16} bytes; found"):
        load_images(tmp_path)


def test_missing_path_folder_without_images_and_small_canvas_are_refused(file, tmp_path):
    (tmp_path / "no.npz").write_text("hello")
    for path, said in (
        (tmp_path, "found for train_images: none"),
        (tmp_path / "no.npz", "it is none"),
        (tmp_path / "my shape.npz", "did you mean my shapes.npz?"),
        ("minst", "mnist"),
    ):
        with pytest.raises(UserError, match=said):
            load_images(path)
    with pytest.raises(UserError, match="those of my shapes have 20x20 pixels, the canvas of original 12x12"):
        load_images(file, "original", 12)
    np.savez(tmp_path / "tiny.npz", **shapes(6, (0, 1)))
    with pytest.raises(UserError, match="clutter is cut from other images, 8x8 pixels"):
        load_images(tmp_path / "tiny.npz", "cluttered")


@pytest.mark.parametrize(
    ("task", "canvas"), [("original", 0), ("translated", 0), ("cluttered", 24), ("cluttered", SIDE)]
)
def test_network_trains_on_images_of_any_size_and_number_of_classes(file, task, canvas):
    data = load_images(file, task, canvas)
    config = data.configure(Config(patch_size=6, num_glimpses=2, hidden_size=16, glimpse_size=8, batch_size=20))
    assert config.canvas_size == data.canvas_size and config.num_classes == 3
    trainer = Trainer(config, SharedData.of(data).task(task), seeds=(0, 1))
    metrics = trainer.epoch()
    assert trainer.model.action.weight.shape[-1] == 3 and all(0 <= a <= 1 for a in metrics.val_accuracy)
    drawn = data.render("test", torch.arange(5)[None], data.placement_keys("test", torch.tensor([0]), 0))[0]
    whole = torch.from_numpy(shapes()["test_images"][:5]).flatten(1).sum(1)
    held = drawn.flatten(1).long().sum(1)
    assert bool((held >= whole).all()) if task == "cluttered" else held.tolist() == whole.tolist()
    with pytest.raises(UserError, match="data must be mnist translated; got"):
        Trainer(Config(), data)
    few = Config(data=data.data, task=task, canvas=data.canvas, num_classes=2, patch_size=6)
    with pytest.raises(UserError, match="has 3, num_classes is 2"):
        Trainer(few, data)


def test_canvas_of_another_size_holds_known_images_too(digits):
    data = make_task("digits", "translated", digits, 40)
    assert data.render("test", torch.zeros(1, 2, dtype=torch.int64), torch.tensor([1])).shape == (1, 2, 40, 40)
    config = data.configure(Config(patch_size=12))
    assert (config.data, config.canvas_size, config.num_classes) == ("digits", 40, 10)
    with pytest.raises(UserError, match="patch_size must be at most 40, the canvas; got 41"):
        Config(canvas=40, patch_size=41)


def test_study_of_own_images_is_continued_where_they_are_and_after_renaming(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = Flags(data=file.name, task="original", trials=4, epochs=1, seeds_per_trial=1, set_=("batch_size=20",))
    prepared = prepare(flags)
    name = prepared.settings.study
    assert name == f"original-{prepared.data.data}-search" and prepared.settings.canvas == SIDE
    assert prepared.space and prepared.space.fixed["num_classes"] == 3
    assert next(d for d in prepared.space.dimensions if d.name == "patch_size").high == SIDE // 2
    assert str(tmp_path) not in str(prepared.settings), "the record names the images by their digest"
    with open_record(prepared.storage, prepared.settings, total=4) as record:
        record.begin_run({"flags": {"data": file.name}})
    assert prepare(Flags(study=name)).settings == prepared.settings
    file.rename("renamed.npz")
    with pytest.raises(UserError, match=r"my shapes.npz is gone: pass --data PATH"):
        prepare(Flags(study=name))
    assert prepare(Flags(study=name, data="renamed.npz")).settings == prepared.settings
    np.savez("other.npz", **shapes(SIDE, (0, 1)))
    with pytest.raises(UserError, match="differs in"):
        prepare(Flags(study=name, data="other.npz"))
    with pytest.raises(UserError, match="batch_size must be at most 100, the training images; got 500"):
        prepare(Flags(data="renamed.npz", task="original", set_=("batch_size=500",)))
    with pytest.raises(UserError, match="got 500: search smaller ones"):
        prepare(Flags(data="renamed.npz", task="original", choices=("batch_size=20,500",)))
    np.savez("few.npz", **{name: array[:60] for name, array in shapes().items()})
    with pytest.raises(UserError, match="at most 50, the training images; got 100, of design paper"):
        prepare(Flags(data="few.npz", canvas=60, design="paper"))
