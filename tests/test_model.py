from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from ramcore.config import Config
from ramcore.evaluation import build_model, whole_image_input
from ramcore.layers import Conv, LayerNorm, Linear, Weights
from ramcore.model import RAM, Rollout, gaussian_log_prob

SEEDS = torch.tensor([3, 4])
SMALL = Config(num_glimpses=4, patch_size=5, num_scales=2, glimpse_size=8, hidden_size=12)
CORES = [
    {"core": core, "layer_norm": norm, "location_hidden": hidden, "location_input": read, "reinforce_core": hidden > 0}
    for core in ("rnn", "gru", "lstm")
    for norm, hidden, read in ((False, 0, "state"), (True, 6, "state"), (True, 6, "state+paths"))
] + [{"location_input": "state+paths"}]


def look(config: Config, batch: int = 7):
    model = RAM(config, SEEDS)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, batch, 60, 60), dtype=torch.uint8, generator=generator)
    first = torch.rand(2, batch, 2, generator=generator) * 2 - 1
    noise = torch.randn(2, config.num_glimpses - 1, batch, 2, generator=generator)
    return model, images, first, noise


def plain_rollout(model: RAM, images, first, noise):
    """The papers' equations, step by step."""
    config = model.config
    location, state, logits, log_probs, baselines = first, None, [], [], []
    for t in range(config.num_glimpses):
        seen = model.retina.see(images, location).flatten(2)
        what = torch.relu(model.glimpse.what(seen))
        where = torch.relu(model.glimpse.where(location))
        code = model.glimpse.code(torch.cat([what, where], -1))
        code = torch.relu(code if model.glimpse.norm is None else model.glimpse.norm(code))
        if state is None:
            state = (torch.zeros_like(code), torch.zeros_like(code))
        state = model.core.step(model.core.input(code), model.core.recurrent(state[0]), state)
        h = state[0]
        logits.append(model.action(h))
        if t == config.num_glimpses - 1:
            break
        read = torch.cat([h, what, where], -1) if config.location_input == "state+paths" else h
        read = read if config.reinforce_core else read.detach()
        if model.location.hidden is not None:
            read = torch.relu(model.location.hidden(read))
        mean = torch.tanh(model.location.mean(read))
        sample = (mean + config.location_std * noise[:, t]).detach()
        normal = torch.distributions.Normal(mean, config.location_std)
        log_probs.append(normal.log_prob(sample).sum(-1))
        baselines.append(model.baseline(h.detach())[..., 0])
        location = sample.clamp(-1, 1)
    return torch.stack(logits, 1), torch.stack(log_probs, 1), torch.stack(baselines, 1)


@pytest.mark.parametrize("settings", CORES)
def test_rollout_and_gradients_equal_the_papers_equations(settings):
    model, images, first, noise = look(dataclasses.replace(SMALL, **settings))
    weights = [torch.randn(2, 4, 7, 10), torch.randn(2, 3, 7), torch.randn(2, 3, 7)]

    def gradients(seen, glimpses=None, rollout=None):
        model.zero_grad()
        steps = seen[0].shape[1]
        sum((w[:, -steps:] * part).sum() for w, part in zip(weights, seen, strict=True)).backward()
        if glimpses is not None:
            model.backward(glimpses, rollout)
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    for every_step in (True, False):
        plain = plain_rollout(model, images, first, noise)
        if not every_step:
            plain = (plain[0][:, -1:], *plain[1:])
        glimpses = model.look(model.retina.pyramid(images), first, noise, keep=True)
        rollout = model.rollout(glimpses, every_step=every_step)
        seen = rollout.logits, rollout.log_probs, rollout.baselines
        for mine, reference in zip(seen, plain, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
        expected, found = gradients(plain), gradients(seen, glimpses, rollout)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
        spared = model.look(model.retina.pyramid(images), first, noise)
        assert torch.equal(spared.hiddens, glimpses.hiddens) and spared.seen.shape[1] == 1


@pytest.mark.parametrize(("core", "reference"), [("rnn", nn.RNNCell), ("gru", nn.GRUCell), ("lstm", nn.LSTMCell)])
def test_cores_equal_torchs_cells(core, reference):
    config = dataclasses.replace(SMALL, core=core)
    mine = RAM(config, SEEDS[:1]).core
    cell = reference(12, 12, **({"nonlinearity": "relu"} if core == "rnn" else {}))
    with torch.no_grad():
        cell.weight_ih.copy_(mine.input.weight[0].T)
        cell.weight_hh.copy_(mine.recurrent.weight[0].T)
        cell.bias_ih.copy_(mine.input.bias[0, 0])
        cell.bias_hh.copy_(mine.recurrent.bias[0, 0])
        state = theirs = None
        for _ in range(3):
            code = torch.randn(1, 5, 12)
            state = state or (torch.zeros(1, 5, 12), torch.zeros(1, 5, 12))
            state = mine.step(mine.input(code), mine.recurrent(state[0]), state)
            theirs = cell(code[0], theirs)
            torch.testing.assert_close(state[0][0], theirs[0] if core == "lstm" else theirs, rtol=1e-4, atol=1e-5)


def test_layers_equal_torchs():
    weights = Weights(SEEDS)
    linear, conv, norm = Linear(weights, 6, 4), Conv(weights, 3, 5, 3, stride=2), LayerNorm(weights, 6)
    x, image = torch.randn(2, 9, 6), torch.randn(2, 9, 3, 11, 11)
    for r in range(2):
        torch.testing.assert_close(linear(x)[r], functional.linear(x[r], linear.weight[r].T, linear.bias[r, 0]))
        expected = functional.conv2d(image[r], conv.weight[r], conv.bias[r], stride=2)
        torch.testing.assert_close(conv(image[r], r), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm(x)[r], functional.layer_norm(x[r], (6,)))
    assert linear.weight.abs().max() <= 1 / math.sqrt(6)
    assert linear.weight.std().item() == pytest.approx(1 / math.sqrt(18), rel=0.3)


@pytest.mark.parametrize("model", ["ram", "ram-random", "cnn", "conv", "fc"])
def test_replicate_has_the_same_initial_weights_alone_and_among_others(model):
    config = dataclasses.replace(SMALL, model=model)
    together = build_model(config, torch.tensor([7, 8, 9])).state_dict()
    alone = build_model(config, torch.tensor([8])).state_dict()
    for name, value in alone.items():
        assert torch.equal(together[name][1:2], value), name


@pytest.mark.parametrize("model", ["cnn", "conv", "fc"])
@pytest.mark.parametrize("task", ["original", "translated"])
def test_whole_image_networks_give_each_replicate_its_own_images(model, task):
    config = Config(model=model, task=task, hidden_size=16)
    net = build_model(config, SEEDS)
    images = torch.rand(2, 3, config.canvas_size, config.canvas_size)
    scores = net(images)
    assert scores.shape == (2, 3, 10)
    changed = images.clone()
    changed[0, 1] = 0
    assert torch.equal(net(changed)[1], scores[1])
    assert (net(changed)[0] != scores[0]).any(-1).tolist() == [False, True, False]
    rollout = Rollout.without_decisions(scores[:, None])
    assert rollout.logits.shape == (2, 1, 3, 10) and rollout.log_probs.shape == (2, 0, 3)


def test_locations_are_the_policys_mean_plus_scaled_noise_clipped_to_the_canvas():
    model, images, first, noise = look(SMALL)
    pyramid = model.retina.pyramid(images)
    sampled, followed = model.look(pyramid, first, noise), model.look(pyramid, first)
    assert torch.equal(sampled.locations[:, 0], first)
    torch.testing.assert_close(sampled.samples[:, 0] - followed.samples[:, 0], SMALL.location_std * noise[:, 0])
    assert torch.equal(sampled.locations[:, 1:], sampled.samples.clamp(-1, 1))
    wild = model.look(pyramid, first, 50 * noise)
    assert wild.locations.abs().max() == 1


def test_gaussian_log_prob_equals_torchs():
    sample, mean = torch.randn(5, 2), torch.randn(5, 2)
    expected = torch.distributions.Normal(mean, 0.3).log_prob(sample).sum(-1)
    torch.testing.assert_close(gaussian_log_prob(sample, mean, torch.tensor(0.3)), expected)


def test_single_glimpse_has_no_location_decision():
    model, images, first, _ = look(dataclasses.replace(SMALL, num_glimpses=1))
    rollout = model.rollout(model.look(model.retina.pyramid(images), first, torch.empty(2, 0, 7, 2)))
    assert rollout.logits.shape == (2, 1, 7, 10)
    assert rollout.log_probs.shape == (2, 0, 7)


def test_input_gain_multiplies_the_pixels_only():
    model, images, first, noise = look(dataclasses.replace(SMALL, input_gain=3.0))
    plain = RAM(SMALL, SEEDS)
    with torch.no_grad():
        plain.glimpse.what.weight *= 3
    seen, expected = (m.look(m.retina.pyramid(images), first, noise, keep=True) for m in (model, plain))
    torch.testing.assert_close(seen.seen, 3 * expected.seen)
    torch.testing.assert_close(seen.hiddens, expected.hiddens)
    torch.testing.assert_close(whole_image_input(model.config, images), 3 * images.float() / 255)
