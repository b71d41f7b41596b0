from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training import PRODUCTS
from ramcore import cost as cost_module
from ramcore.config import Config
from ramcore.cost import check_memory, cost, memory, pareto_front
from ramcore.errors import UserError
from ramcore.evaluation import BATCH_SIZE, build_model, class_log_probs

CONFIGS = [
    Config(),
    Config(core="gru", layer_norm=True, location_hidden=32, num_glimpses=3, patch_size=8, num_scales=2),
    Config(location_hidden=16, location_input="state+paths"),
    Config(core="lstm", num_glimpses=1, task="original"),
    Config(core="rnn", layer_norm=True, model="ram-random"),
    Config(model="cnn"),
    Config(model="cnn", task="cluttered-100"),
    Config(model="conv"),
    Config(model="fc", hidden_size=64),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_and_macs_equal_those_counted_by_torch(config):
    seeds = torch.tensor([0])
    model = build_model(config, seeds)
    assert cost(config).parameters == sum(p.numel() for p in model.parameters())
    images = torch.zeros(1, 2, config.canvas_size, config.canvas_size, dtype=torch.uint8)
    model.requires_grad_(False)  # else the counter uses the gradients to follow the modules
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        class_log_probs(model, config, seeds, images, torch.arange(2))
    assert cost(config).macs == counter.get_total_flops() // 2 // 2  # 2 images, 2 operations a MAC


def test_cost_of_ram_does_not_depend_on_the_canvas_and_cost_of_a_cnn_does():
    tasks = ("original", "cluttered", "cluttered-100")
    assert len({cost(Config(task=task)) for task in tasks}) == 1
    macs = [cost(Config(task=task, model="cnn")).macs for task in tasks]
    assert macs == sorted(macs) and macs[-1] > 10 * macs[0]


def test_memory_counts_the_tensors_of_weights_and_box_sums():
    assert cost_module._EVALUATED == BATCH_SIZE
    config = Config(num_scales=3, scale_factor=4, batch_size=600)
    retina = build_model(config, torch.tensor([0])).retina
    sums = retina.pyramid(torch.zeros(600, 60, 60, dtype=torch.uint8)).values
    weights = 20 * cost(config).parameters
    assert weights + sums.nbytes < memory(config, 1) < weights + 2 * sums.nbytes
    assert memory(config, 3) > 2.9 * memory(config, 1)


@pytest.mark.parametrize(
    "config",
    [
        Config(num_scales=6, scale_factor=8),
        Config(hidden_size=2**31 - 1),
        Config(model="fc", hidden_size=2**20),
        Config(batch_size=2**31 - 1),
        Config(num_glimpses=100, batch_size=10**6),
        Config(glimpse_size=2**31 - 1),
    ],
)
def test_network_that_does_not_fit_in_memory_is_refused_and_the_defaults_fit(config):
    check_memory(Config(), 3, 2**30)
    with pytest.raises(UserError, match=r"a network must fit in memory; .* GiB and there are 64\.0: lower "):
        check_memory(config, 1, 64 * 2**30)


def test_pareto_front_holds_points_better_than_every_cheaper_one():
    costs, values = [3, 1, 2, 2, 4, 1], [0.7, 0.5, 0.9, 0.9, 0.9, 0.4]
    assert pareto_front(costs, values) == [1, 2]  # of equals the first; a dearer point must be better
    assert pareto_front([], []) == []
