from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch

from ramcore.errors import UserError
from ramcore.evaluation import evaluate
from ramcore.trainer import EpochMetrics, Trainer

VARIANTS = [
    {},
    {"core": "gru", "layer_norm": True, "location_hidden": 8, "step_supervision": 0.5, "loss_mixing": 0.5},
    {
        "core": "lstm",
        "reward": "probability",
        "reward_steps": "every",
        "discount": 0.9,
        "reinforce_core": True,
        "location_input": "state+paths",
        "location_std_end": 0.3,
    },
    {"model": "ram-random", "first_glimpse": "center", "placements": "once"},
    {"model": "cnn", "schedule": "constant"},
    {"model": "conv"},
    {"model": "fc"},
]


def weights_of(trainer: Trainer):
    return trainer.state_dict()["weights"]


@pytest.mark.parametrize("settings", VARIANTS)
def test_seeds_trained_together_equal_seeds_trained_alone(tiny, settings):
    config, data = tiny
    config = dataclasses.replace(config, **settings)
    together = Trainer(config, data, seeds=(5, 2, 9))
    alone = [Trainer(config, data, seeds=(seed,)) for seed in (5, 2, 9)]
    for _ in range(3):
        metrics = together.epoch()
        for r, trainer in enumerate(alone):
            single = trainer.epoch()
            assert metrics.val_accuracy[r] == pytest.approx(single.val_accuracy[0], abs=0.011)
            assert metrics.train_loss[r] == pytest.approx(single.train_loss[0], rel=1e-3)
    for r, trainer in enumerate(alone):
        for name, value in weights_of(trainer).items():
            torch.testing.assert_close(weights_of(together)[name][r : r + 1], value, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("settings", VARIANTS)
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tiny, tmp_path, settings):
    config, data = tiny
    config = dataclasses.replace(config, **settings)
    whole = Trainer(config, data, seeds=(0, 1))
    history = [whole.epoch() for _ in range(4)]
    stopped = Trainer(config, data, seeds=(0, 1))
    for _ in range(2):
        stopped.epoch()
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    torch.save(data, tmp_path / "data.pt")
    program = f"""
import dataclasses, json, sys, torch
from ramcore.config import Config
from ramcore.trainer import Trainer
torch.set_num_threads(1)
state = torch.load(r"{tmp_path / "state.pt"}", weights_only=True)
data = torch.load(r"{tmp_path / "data.pt"}", weights_only=False)
trainer = Trainer(Config(**state["config"]), data, seeds=tuple(state["seeds"]))
trainer.load_state_dict(state)
print(json.dumps([trainer.epoch().to_dict() for _ in range(2)]))
torch.save(trainer.state_dict(), r"{tmp_path / "end.pt"}")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for before, values in zip(history[2:], json.loads(run.stdout), strict=True):
        after = EpochMetrics.from_dict(values)
        assert dataclasses.replace(after, seconds=before.seconds) == before
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    mine = whole.state_dict()
    for part in ("weights", "best_weights"):
        for name, value in mine[part].items():
            assert torch.equal(end[part][name], value), name
    for i, moments in mine["adam"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(end["adam"]["state"][i][name], value)


def test_same_configuration_and_seed_give_identical_metrics(tiny):
    config, data = tiny
    runs = [
        [dataclasses.replace(t.epoch(), seconds=0) for _ in range(2)]
        for t in (Trainer(config, data), Trainer(config, data))
    ]
    assert runs[0] == runs[1]


def test_twelve_epochs_learn_the_digits_and_keep_the_best_epoch(digits_task, tiny):
    config = dataclasses.replace(
        tiny[0], hidden_size=64, glimpse_size=32, patch_size=8, epochs=12, core="gru", step_supervision=0.5
    )
    trainer = Trainer(config, digits_task("original"), seeds=(0, 1))
    metrics = [trainer.epoch() for _ in range(config.epochs)]
    assert min(metrics[-1].val_accuracy) > 0.75
    assert metrics[-1].train_loss < metrics[0].train_loss
    assert trainer.best_epoch == tuple(
        max(range(1, 13), key=lambda e, r=r: (metrics[e - 1].val_accuracy[r], -e)) for r in range(2)
    )
    validation = trainer.evaluate("validation")
    assert validation.accuracy == tuple(max(m.val_accuracy[r] for m in metrics) for r in range(2))
    last = trainer.evaluate("validation", weights="last")
    assert last.accuracy == metrics[-1].val_accuracy
    assert last.loss == pytest.approx(metrics[-1].val_loss)
    for r in range(2):
        per_glimpse = validation.accuracy_per_glimpse[r]
        assert len(per_glimpse) == 3 and per_glimpse[-1] == validation.accuracy[r]
        assert per_glimpse[0] < per_glimpse[-1]
    assert min(trainer.evaluate("test").accuracy) > 0.75


def test_more_sampled_rollouts_lower_the_evaluation_loss(digits_task, tiny):
    config = dataclasses.replace(tiny[0], epochs=6, core="gru", hidden_size=64, location_std=0.4)
    trainer = Trainer(config, digits_task("original"))
    for _ in range(6):
        trainer.epoch()

    def loss(samples):
        sampled = dataclasses.replace(config, eval_samples=samples)
        return evaluate(trainer.model, sampled, (0,), trainer.data, "test").loss[0]

    assert loss(1) == loss(1)
    assert loss(16) < loss(4) < loss(1)  # averaging probabilities can only lower the expected cross-entropy


def test_diverged_seed_is_reported_and_no_longer_trained(tiny):
    config, data = tiny
    trainer = Trainer(dataclasses.replace(config, schedule="constant"), data, seeds=(0, 1))
    first = trainer.epoch()
    assert first.diverged == (False, False)
    best = trainer.best_weights()
    with torch.no_grad():
        trainer.model.get_parameter("action.weight")[1] = math.inf
    metrics = trainer.epoch()
    assert metrics.diverged == (False, True)
    assert math.isnan(metrics.val_accuracy[1]) and math.isnan(metrics.train_loss[1])
    assert not math.isnan(metrics.val_accuracy[0])
    for name, value in trainer.best_weights(1).items():
        assert torch.equal(value, best[name][1:2])
    assert all(torch.isfinite(v[1]).all() for n, v in weights_of(trainer).items() if n != "action.weight")
    restored = Trainer(trainer.config, data, seeds=(0, 1))
    restored.load_state_dict(trainer.state_dict())
    assert restored.epoch().diverged == (False, True)


def test_gradient_clip_bounds_each_replicates_gradient(tiny):
    """Adam's first steps do not depend on the gradient's size, so the test reads the gradients."""
    config, data = tiny
    clipped = Trainer(dataclasses.replace(config, gradient_clip=0.01), data, seeds=(0, 1))
    clipped.step(next(clipped.draws(0)))
    norms = torch.stack([p.grad.flatten(1).square().sum(1) for p in clipped.model.parameters()]).sum(0).sqrt()
    torch.testing.assert_close(norms, torch.full((2,), 0.01))


def test_location_std_falls_to_its_share_over_the_epochs(tiny):
    config, data = tiny
    trainer = Trainer(dataclasses.replace(config, location_std=0.2, location_std_end=0.5), data, (0, 1))
    stds = []
    for _ in range(config.epochs):
        trainer.epoch()
        first, second = trainer.model.location_std.flatten().tolist()
        assert first == second
        stds.append(first)
    assert stds == sorted(stds, reverse=True)
    assert 0.1 < stds[-1] < 0.102 < stds[0] < 0.2


def test_cosine_schedule_lowers_the_learning_rate_to_zero(tiny):
    config, data = tiny
    trainer = Trainer(config, data)
    rates = []
    for _ in range(config.epochs):
        trainer.epoch()
        rates.append(trainer.state_dict()["adam"]["param_groups"][0]["lr"])
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.01 * config.learning_rate < rates[0] < config.learning_rate


@pytest.mark.parametrize(
    ("seeds", "changes", "message"),
    [
        ((), {}, r"seeds must be different whole numbers of at least 0; got \[\]"),
        ((1, 1), {}, "seeds must be different"),
        ((-1,), {}, "seeds must be different"),
        ((0,), {"batch_size": 201}, "batch_size must be at most 200, the training images; got 201"),
        ((0,), {"task": "translated"}, "data must be digits translated; got digits original"),
    ],
)
def test_unusable_seeds_batch_or_data_are_refused(tiny, seeds, changes, message):
    config, data = tiny
    with pytest.raises(UserError, match=message):
        Trainer(dataclasses.replace(config, **changes), data, seeds=seeds)


def test_checkpoint_of_another_run_is_refused(tiny):
    config, data = tiny
    state = Trainer(config, data, seeds=(0, 1)).state_dict()
    with pytest.raises(UserError, match=r"continues the seeds it was made with, \[0, 1\]; got \[0, 2\]"):
        Trainer(config, data, seeds=(0, 2)).load_state_dict(state)
    with pytest.raises(UserError, match="continues the configuration"):
        Trainer(dataclasses.replace(config, location_std=0.3), data, seeds=(0, 1)).load_state_dict(state)
    del state["config"]["input_gain"]  # as if the checkpoint were older than this field, which has its default
    Trainer(config, data, seeds=(0, 1)).load_state_dict(state)
