from __future__ import annotations

import gzip
import multiprocessing
import shutil

import pytest
import torch

from ramcore import sources
from ramcore.config import Config
from ramcore.data import Split, make_task
from ramcore.errors import UserError
from ramcore.sources import DataMissing, load_source, load_task

SEEDS = torch.tensor([0, 1])


def whole(task, split="train", seeds=SEEDS, epoch=0, count=100):
    index = torch.arange(count).expand(len(seeds), -1)
    if split != "train":
        index = index[:1]
    return task.render(split, index, task.placement_keys(split, seeds, epoch))


# Tasks.


def test_original_canvases_equal_the_source_images(digits_task):
    task = digits_task("original")
    canvases = whole(task)
    assert torch.equal(canvases[0], task.train.images[:100])
    assert torch.equal(canvases[1], task.train.images[:100])


def test_translated_canvas_holds_the_digit_once_and_nothing_else(digits_task):
    task = digits_task("translated")
    canvases = whole(task)[0]
    assert canvases.shape == (100, 60, 60)
    corners = set()
    for canvas, digit in zip(canvases, task.train.images, strict=False):
        windows = canvas.unfold(0, 28, 1).unfold(1, 28, 1)
        found = (windows == digit).all(-1).all(-1).nonzero()
        assert len(found) == 1
        assert canvas.sum() == digit.sum()
        corners.add(tuple(found[0].tolist()))
    assert len(corners) > 90


def test_placement_covers_the_canvas_evenly():
    """A single white pixel in the digit's corner shows the place of the digit."""
    images = torch.zeros(5000, 28, 28, dtype=torch.uint8)
    images[:, 0, 0] = 255
    split = Split(images, torch.zeros(5000, dtype=torch.int64))
    task = make_task("digits", "translated", {"train": split, "validation": split, "test": split})
    where = whole(task, count=5000)[0].nonzero()[:, 1:]
    assert where.min() == 0 and where.max() == 60 - 28
    assert (where.float().mean(0) - 16).abs().max() < 0.5


@pytest.mark.parametrize(("name", "patches"), [("cluttered", 4), ("cluttered-100", 8)])
def test_clutter_is_cut_from_other_images_of_the_split(name, patches):
    """Each image has its own grey, which shows the image that a patch comes from."""
    count = 200
    images = torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None].expand(-1, 28, 28).contiguous()
    split = Split(images, torch.zeros(count, dtype=torch.int64))
    black = Split(torch.zeros_like(images), split.labels)
    task = make_task("digits", name, {"train": split, "validation": black, "test": black})
    most = 0
    for i, canvas in enumerate(whole(task, count=count)[0]):
        greys = set(canvas.unique().tolist()) - {0}
        assert i + 1 in greys
        others = greys - {i + 1}
        assert len(others) <= patches
        most = max(most, len(others))
        for grey in others:
            repeats = patches - len(others) + 1  # one image may lend several patches
            assert (canvas == grey).sum() <= repeats * 64
    assert most == patches


def test_cluttered_canvas_is_the_translated_one_with_clutter(digits_task):
    plain, cluttered = whole(digits_task("translated"))[0], whole(digits_task("cluttered"))[0]
    assert (cluttered >= plain).all()
    assert ((cluttered > plain).flatten(1).sum(1) > 0).float().mean() > 0.9


def test_places_are_fixed_in_validation_and_test_and_follow_seed_and_epoch_in_train(digits_task):
    task = digits_task("cluttered")
    for split in ("validation", "test"):
        a, b = whole(task, split, torch.tensor([0])), whole(task, split, torch.tensor([7]), epoch=5)
        assert torch.equal(a, b)
    first = whole(task)
    assert torch.equal(first, whole(task))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, whole(task, epoch=1))
    assert not torch.equal(whole(task, "validation"), whole(task, "test"))


def test_canvas_does_not_depend_on_the_rest_of_the_batch(digits_task):
    task = digits_task("cluttered")
    keys = task.placement_keys("train", SEEDS, 0)
    index = torch.tensor([[5, 9, 700], [9, 5, 1]])
    batch = task.render("train", index, keys)
    assert torch.equal(batch[0, 1], whole(task)[0, 9])
    assert torch.equal(batch[1, 0], whole(task)[1, 9])


# Sources.


def test_digits_are_split_into_disjoint_parts(digits):
    assert {name: len(split.labels) for name, split in digits.items()} == {
        "train": 1197,
        "validation": 300,
        "test": 300,
    }
    assert {split.images.shape[1:] for split in digits.values()} == {(28, 28)}
    assert all(split.images.dtype == torch.uint8 and split.images.max() > 200 for split in digits.values())
    rows = torch.cat([split.images.flatten(1) for split in digits.values()])
    assert len(rows.unique(dim=0)) == 1797
    assert digits["validation"].labels.bincount().min() > 15


def test_missing_file_of_scikit_learns_digits_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(sources, "_DIGITS_FILE", "sklearn/datasets/data/moved.csv.gz")
    said = r"--data digits needs .*moved\.csv\.gz of scikit-learn; .* not found"
    with pytest.raises(DataMissing, match=said) as error:
        load_source("digits")
    assert "\n" not in str(error.value)


def test_mnist_is_split_into_50000_10000_and_10000_images(mnist_dir):
    task = load_task(Config(), mnist_dir)
    assert task.sizes == {"train": 50_000, "validation": 10_000, "test": 10_000}
    assert task.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert task.test.labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_packed_and_plain_idx_files_give_the_same_images(idx_folder, digits):
    packed = load_source("mnist", idx_folder)
    assert torch.equal(packed["train"].images, digits["train"].images[:1000])
    assert torch.equal(packed["validation"].labels, digits["train"].labels[1000:])
    for path in idx_folder.iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    plain = load_source("mnist", idx_folder)
    assert torch.equal(plain["test"].images, packed["test"].images)


def test_files_are_found_in_data_dir_the_variable_a_subfolder_or_the_cache(idx_folder, monkeypatch, tmp_path):
    with pytest.raises(DataMissing, match=r"mnist must be on this machine or within reach.*--data-dir"):
        load_source("mnist")
    monkeypatch.setenv("RAM_DATA_DIR", str(idx_folder))
    load_source("mnist")
    with pytest.raises(UserError, match=r"--data-dir must be a folder; .*nowhere is not one"):
        load_source("mnist", tmp_path / "nowhere")
    monkeypatch.delenv("RAM_DATA_DIR")
    shared = tmp_path / "shared"
    shutil.copytree(idx_folder, shared / "mnist")
    load_source("mnist", shared)
    shutil.copytree(idx_folder, tmp_path / "cache" / "ram-study" / "mnist", dirs_exist_ok=True)
    load_source("mnist")


@pytest.mark.parametrize("folder", ["MNIST/raw", "raw", "mnist", ""])
def test_torchvisions_layout_is_found(idx_folder, tmp_path, folder):
    place = tmp_path / "root" / folder
    shutil.copytree(idx_folder, place)
    assert len(load_source("mnist", tmp_path / "root")["train"].labels) == 1000
    for path in place.iterdir():  # as some archives have it
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert len(load_source("mnist", tmp_path / "root")["train"].labels) == 1000


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_named_folder_that_lacks_files_is_refused_with_the_folders_searched(idx_folder, monkeypatch, tmp_path, by):
    named = tmp_path / "named"
    shutil.copytree(idx_folder, named)
    shutil.copytree(idx_folder, tmp_path / "cache" / "ram-study" / "mnist")  # not asked for
    for path in sorted(named.iterdir())[:2]:
        path.unlink()
    if by == "variable":
        monkeypatch.setenv("RAM_DATA_DIR", str(named))
    with pytest.raises(UserError) as refusal:
        load_source("mnist", named if by == "flag" else None)
    assert not isinstance(refusal.value, DataMissing)  # for which --data auto takes the digits
    flag = "--data-dir" if by == "flag" else "$RAM_DATA_DIR"
    assert str(refusal.value).startswith(
        f"{flag} must hold mnist's four IDX files, plain or .gz; not found in {named}/"
    )
    assert f"{named}/MNIST/raw, " in str(refusal.value)
    assert f"; {named} lacks t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte: put them there" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("mnist", lambda raw: raw[: len(raw) // 2], "must be a whole .gz file"),
        ("mnist", lambda raw: b"<html>moved</html>", "must be a whole .gz file"),
        ("mnist", lambda raw: gzip.compress(b"\0\0\x09\x03" + gzip.decompress(raw)[4:]), "must start with IDX magic"),
        (
            "mnist",
            lambda raw: gzip.compress(gzip.decompress(raw)[:-100]),
            r"must hold shape \(1197, 28, 28\) in 938464",
        ),
        ("mnist", lambda raw: gzip.compress(gzip.decompress(raw)[:-1] + b"\x01"), "must be mnist's, sha256 .*; found"),
        ("fashion-mnist", lambda raw: gzip.compress(gzip.decompress(raw)[:-1] + b"\x01"), "must be .*, md5 .*; found"),
    ],
)
def test_damaged_file_is_refused_by_name(idx_folder, name, damage, message):
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as refusal:
        load_source(name, idx_folder)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def _download(port: int, queue) -> None:
    sources._IDX_SOURCES["mnist"] = sources._IDX_SOURCES["mnist"]._replace(
        mirrors=("http://127.0.0.1:9/", f"http://127.0.0.1:{port}/")
    )
    try:
        queue.put(len(load_source("mnist")["train"].labels))
    except UserError as error:
        queue.put(str(error))


def test_three_processes_download_at_once_while_the_first_mirror_is_down(idx_folder):
    import http.server
    import threading

    def handler(*args):
        return http.server.SimpleHTTPRequestHandler(*args, directory=str(idx_folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        workers = [context.Process(target=_download, args=(server.server_port, queue)) for _ in range(3)]
        for worker in workers:
            worker.start()
        assert [queue.get() for _ in workers] == [1000, 1000, 1000]
        for worker in workers:
            worker.join()
        path = idx_folder / "train-images-idx3-ubyte.gz"
        path.write_bytes(b"an error page")
        shutil.rmtree(idx_folder.parent / "cache")
        _download(server.server_port, queue)
        assert "no mirror answered" in queue.get()
        server.shutdown()
