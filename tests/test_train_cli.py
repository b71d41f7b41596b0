from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from ramcore.config import Config
from ramcore.pictures import draw_glimpses, glimpse_paths, retina_view
from ramcore.train import main
from ramcore.trainer import Trainer

SMALL = "--data digits --task original --num-glimpses 2 --patch-size 8 --num-scales 1 --hidden-size 32 --epochs 2"


def test_command_trains_tests_and_draws_the_glimpses(tmp_path):
    command = [sys.executable, "-m", "ramcore.train", *SMALL.split(), "--seeds", "0", "1", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[0].startswith("ram on original digits: ")
    assert [line.split(":")[0] for line in lines[1:3]] == ["seed 0", "seed 1"]
    assert all(" at epoch " in line and ", test " in line for line in lines[1:3])
    assert "epoch 2/2: validation " in run.stderr
    assert (tmp_path / "glimpses.png").read_bytes().startswith(b"\x89PNG")
    weights = torch.load(tmp_path / "best.pt", weights_only=True)
    assert weights["action.weight"].shape == (1, 32, 10)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--patch-size 61", "patch_size must be at most 60"),
        ("--num-glimpses 0", "num_glimpses must be"),
        ("--location-std 0", "location_std must be above 0"),
        ("--epochs -1", "epochs must be"),
        ("--epochs 99999999999", "epochs must be a whole number of at least 1 and at most 2147483647; got 99999999999"),
        ("--data x.npz --canvas forty", "canvas must be a whole number of at least 0 and at most 1000; got 'forty'"),
        ("--data digits --seeds 99999999999999999999999", "--seeds must be whole numbers of 64 bits; got about 1e23"),
        ("--recipe best", "--recipe must be one of tuned, paper; got 'best'"),
        ("--device tpu", "--device must be cpu or cuda"),
        ("--num-scales 6 --scale-factor 8", "a network must fit in memory; 1 at a time"),
        ("--threads -1", "--threads must be at least 0"),
        ("--data mnist --data-dir /nowhere", "--data-dir must be a folder"),
        ("--data digits --seeds 1 1", "seeds must be different"),
        ("--data digits --out /proc/nowhere", "--out must be a folder that can be written"),
    ],
)
def test_bad_flag_is_refused_in_one_line(capsys, flags, message):
    assert main(flags.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1


def test_unknown_flag_exits_with_2_and_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--glimpses", "3"])
    assert stop.value.code == 2
    assert "--glimpses" in capsys.readouterr().err


def test_picture_has_a_row_for_each_image_and_a_square_for_each_glimpse(tiny):
    config, data = tiny
    trainer = Trainer(config, data)
    trainer.epoch()
    paths = glimpse_paths(config, trainer.best_weights(0), data, count=3)
    assert [p.label for p in paths] == data.test.labels[:3].tolist()
    assert paths[0].canvas.shape == (28, 28) and paths[0].seen.shape == (3, 2, 6, 6)
    assert paths[0].probabilities.sum(-1) == pytest.approx([1, 1, 1])
    figure = draw_glimpses(config, paths)
    assert len(figure.axes) == 3 * (1 + config.num_glimpses)
    assert len(figure.axes[0].patches) == config.num_glimpses


def test_retina_view_draws_fine_scales_over_coarse_ones():
    seen = np.stack([np.full((2, 2), 1.0), np.full((2, 2), 0.5)])
    view = retina_view(seen, 2)
    assert view.shape == (4, 4)
    assert view[1:3, 1:3].tolist() == [[1, 1], [1, 1]]
    assert view[0].tolist() == [0.5] * 4


def test_paper_recipe_with_a_flag_gives_the_papers_configuration(monkeypatch):
    seen = {}
    monkeypatch.setattr("ramcore.train.train", lambda args, *_: seen.update(config=args.config) or 0)
    assert main(["--recipe", "paper", "--patch-size", "8"]) == 0
    assert seen["config"] == Config(epochs=100, patch_size=8)
