from __future__ import annotations

import dataclasses

import pytest
import torch

from ramcore.config import Config
from ramcore.loss import hybrid_loss, location_returns, needs_every_step
from ramcore.model import Rollout

CONFIG = Config(num_glimpses=3)


rollout_of = Rollout.without_decisions


def test_returns_equal_those_computed_by_hand():
    reward = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1)  # after glimpses 1, 2, 3; two decisions, placing 2 and 3
    last = dataclasses.replace(CONFIG, discount=0.5)
    assert location_returns(last, reward, 2).flatten().tolist() == [2, 4]
    every = dataclasses.replace(last, reward_steps="every")
    assert location_returns(every, reward, 2).flatten().tolist() == [2 + 0.5 * 4, 4]
    assert location_returns(CONFIG, reward, 2).flatten().tolist() == [4, 4]


def test_step_supervision_mixes_last_and_every_step():
    logits, labels = torch.randn(2, 3, 5, 10), torch.randint(0, 10, (2, 5))
    per_step = torch.stack(
        [torch.stack([torch.nn.functional.cross_entropy(logits[r, t], labels[r]) for t in range(3)]) for r in range(2)]
    )
    for share in (0.0, 0.3, 1.0):
        config = dataclasses.replace(CONFIG, step_supervision=share)
        expected = (1 - share) * per_step[:, -1] + share * per_step.mean(1)
        found = hybrid_loss(config, rollout_of(logits), labels)
        torch.testing.assert_close(found.classification, expected)
        torch.testing.assert_close(found.total, expected)
        assert needs_every_step(config) == (share > 0)


def test_reward_is_0_or_1_or_the_true_class_probability():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]]).log().nan_to_num(neginf=-50).view(1, 1, 2, 2)
    logits = torch.nn.functional.pad(logits, (0, 8), value=-50)
    labels = torch.tensor([[0, 0]])
    accuracy = hybrid_loss(CONFIG, rollout_of(logits), labels)
    assert accuracy.reward.item() == pytest.approx(0.5)
    assert accuracy.accuracy.item() == pytest.approx(0.5)
    probability = hybrid_loss(dataclasses.replace(CONFIG, reward="probability"), rollout_of(logits), labels)
    assert probability.reward.item() == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)


def policy_gradients(baseline: float, samples: int = 40_000):
    """REINFORCE gradients of one location decision whose expected reward is known in closed form.

    The class scores are set so that the reward is 1 where the sampled x is above 0, so E[reward] = Phi(mean / std).
    """
    config = dataclasses.replace(CONFIG, location_std=0.5)
    generator = torch.Generator().manual_seed(1)
    mean = torch.tensor([0.3, -0.2]).repeat(samples, 1).requires_grad_()
    drawn = (mean + 0.5 * torch.randn(samples, 2, generator=generator)).detach()
    logits = torch.zeros(samples, 1, 1, 10)
    logits[:, 0, 0, 0] = torch.where(drawn[:, 0] > 0, 5.0, -5.0)
    places = (mean.view(-1, 1, 1, 2), drawn.view(-1, 1, 1, 2), torch.full((samples, 1, 1), 0.5))
    rollout = Rollout(logits, *places, torch.full((samples, 1, 1), baseline))
    losses = hybrid_loss(config, rollout, torch.zeros(samples, 1, dtype=torch.int64))
    losses.total.sum().backward()
    return -mean.grad


def test_policy_gradient_is_unbiased_and_the_baseline_changes_only_its_variance():
    normal = torch.distributions.Normal(0.0, 1.0)
    closed_form = normal.log_prob(torch.tensor(0.3 / 0.5)).exp().item() / 0.5  # d Phi(mean / std) / d mean
    spreads = {}
    for baseline in (0.0, 0.7, -2.0):
        gradients = policy_gradients(baseline)
        error = 4 * gradients.std(0) / len(gradients) ** 0.5
        assert abs(gradients[:, 0].mean().item() - closed_form) < error[0]
        assert abs(gradients[:, 1].mean().item()) < error[1]
        spreads[baseline] = gradients[:, 0].var().item()
    assert spreads[0.7] < 0.5 * spreads[0.0] < 0.5 * spreads[-2.0]


def test_class_reinforce_gradient_is_unbiased():
    """The expected gradient is that of the expected reward: the probability of the true class."""
    samples = 40_000
    scores = torch.randn(10, generator=torch.Generator().manual_seed(0))
    exact = scores.clone().requires_grad_()
    exact.softmax(0)[2].backward()
    logits = scores.expand(1, 1, samples, 10).clone().requires_grad_()
    uniform = torch.rand(1, samples, generator=torch.Generator().manual_seed(1))
    config = dataclasses.replace(CONFIG, loss_mixing=0.0)
    losses = hybrid_loss(config, rollout_of(logits), torch.full((1, samples), 2), uniform)
    losses.total.sum().backward()
    gradients = -logits.grad[0, 0] * samples
    error = 4 * gradients.std(0) / samples**0.5
    assert ((gradients.mean(0) - exact.grad).abs() < error + 1e-6).all()


def test_loss_mixing_is_linear():
    logits, labels, uniform = torch.randn(1, 1, 50, 10), torch.randint(0, 10, (1, 50)), torch.rand(1, 50)

    def at(mixing):
        config = dataclasses.replace(CONFIG, loss_mixing=mixing)
        return hybrid_loss(config, rollout_of(logits), labels, uniform).classification

    torch.testing.assert_close(at(0.25), 0.25 * at(1.0) + 0.75 * at(0.0))


def test_reinforce_weight_scales_only_the_policys_gradient():
    def gradients(weight):
        logits = torch.zeros(1, 1, 4, 10, requires_grad=True)
        means, baselines = torch.zeros(1, 2, 4, 2, requires_grad=True), torch.zeros(1, 2, 4, requires_grad=True)
        rollout = Rollout(logits, means, torch.ones(1, 2, 4, 2), torch.ones(1, 1, 1), baselines)
        config = dataclasses.replace(CONFIG, reinforce_weight=weight)
        hybrid_loss(config, rollout, torch.zeros(1, 4, dtype=torch.int64)).total.sum().backward()
        return logits.grad, means.grad, baselines.grad

    one, three = gradients(1.0), gradients(3.0)
    assert torch.equal(one[0], three[0])
    assert torch.equal(3 * one[1], three[1]) and one[1].abs().sum() > 0
    assert torch.equal(one[2], three[2]) and one[2].abs().sum() > 0
