from __future__ import annotations

import dataclasses
import math

import pytest

from ramcore.config import TASKS, Config
from ramcore.errors import UserError
from ramcore.recipes import PAPER


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 61}, "patch_size must be at most 60, the canvas of task translated; got 61"),
        ({"task": "original", "patch_size": 29}, "patch_size must be at most 28, the canvas of task original; got 29"),
        ({"num_glimpses": 0}, "num_glimpses must be a whole number of at least 1 and at most 100; got 0"),
        ({"num_glimpses": 2.5}, "num_glimpses must be a whole number of at least 1 and at most 100; got 2.5"),
        ({"num_scales": 7}, "num_scales must be a whole number of at least 1 and at most 6; got 7"),
        ({"location_std": 0.0}, "location_std must be above 0; got 0"),
        ({"location_std": math.nan}, "location_std must be a finite number; got nan"),
        ({"loss_mixing": 1.5}, "loss_mixing must be at least 0 and at most 1; got 1.5"),
        ({"epochs": -1}, "epochs must be a whole number of at least 1 and at most 2147483647; got -1"),
        ({"learning_rate": -1e-3}, "learning_rate must be above 0; got -0.001"),
        ({"core": "transformer"}, "core must be one of rnn, gru, lstm; got 'transformer'"),
        ({"task": "rotated"}, f"task must be one of {', '.join(TASKS)}; got 'rotated'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(UserError) as refusal:
        Config(**settings)
    assert str(refusal.value) == message


def test_defaults_are_the_papers_choices():
    config = Config()
    assert (config.core, config.location_hidden, config.layer_norm) == ("rnn", 0, False)
    assert (config.reward, config.discount, config.step_supervision, config.loss_mixing) == ("accuracy", 1, 0, 1)
    assert (config.hidden_size, config.location_std, config.learning_rate, config.batch_size) == (256, 0.17, 3e-4, 100)
    assert dataclasses.replace(PAPER, epochs=config.epochs) == config


def test_every_field_refuses_a_wrong_value():
    """Without a check, a bad value would reach the training."""
    for field in dataclasses.fields(Config):
        with pytest.raises(UserError):
            Config(**{field.name: "nonsense" if isinstance(field.default, str) else -7})
