"""The hybrid loss: cross-entropy for the class, REINFORCE with a baseline for the locations.

As in Mnih et al. 2014, section 3.1: cross-entropy trains the action network, the core and the glimpse network, the
policy gradient (equation 4) trains the location network, and squared error trains the baseline. Replicates share no
weights, so the sum of their losses trains each as if it were alone.

R replicates, B images, T glimpses, t of these glimpses (the last t), C classes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ramcore import kernels
from ramcore.config import Config
from ramcore.model import Rollout


class Losses(NamedTuple):
    """Per replicate, each (R,)."""

    total: Tensor  # to be minimised
    classification: Tensor  # the mixture of cross-entropy and class REINFORCE
    policy: Tensor  # the location policy's surrogate loss
    baseline: Tensor  # mean squared error of the baseline
    reward: Tensor  # mean reward after the last glimpse
    accuracy: Tensor  # after the last glimpse


def needs_every_step(config: Config) -> bool:
    """Whether the losses use class scores after every glimpse."""
    return config.step_supervision > 0 or config.reward_steps == "every"


def hybrid_loss(config: Config, rollout: Rollout, labels: Tensor, class_uniform: Tensor | None = None) -> Losses:
    """Losses of a training rollout.

    Args:
        config: with the settings of the loss.
        rollout: with the logits of every step if `needs_every_step`.
        labels: (R, B) int64.
        class_uniform: (R, B) in [0, 1), to sample a class; only used when loss_mixing < 1.
    """
    log_class = F.log_softmax(rollout.logits, dim=-1)  # (R, t, B, C)
    target = labels[:, None, :, None].expand(*log_class.shape[:-1], 1)
    log_true = log_class.gather(-1, target)[..., 0]  # (R, t, B)
    correct = (rollout.logits.argmax(-1) == labels[:, None]).float()

    per_step = -log_true
    if config.loss_mixing < 1:
        assert class_uniform is not None
        reinforce = _class_reinforce(log_class, log_true, target, class_uniform)
        per_step = config.loss_mixing * per_step + (1 - config.loss_mixing) * reinforce
    per_step = per_step.mean(-1)  # (R, t)
    spread = config.step_supervision
    classification = (1 - spread) * per_step[:, -1] + spread * per_step.mean(-1)

    reward = correct if config.reward == "accuracy" else log_true.detach().exp()  # (R, t, B)
    zero = torch.zeros_like(classification)
    policy = baseline = zero
    if rollout.log_probs.shape[1]:
        earned = location_returns(config, reward, rollout.log_probs.shape[1])
        advantage = (earned - rollout.baselines).detach()
        policy = -(advantage * rollout.log_probs).sum(1).mean(-1)
        baseline = (earned - rollout.baselines).square().mean((1, 2))
    return Losses(
        total=classification + config.reinforce_weight * policy + baseline,
        classification=classification.detach(),
        policy=policy.detach(),
        baseline=baseline.detach(),
        reward=reward[:, -1].mean(-1),
        accuracy=correct[:, -1].mean(-1),
    )


def losses_with_gradients(config: Config, rollout: Rollout, labels: Tensor, class_uniform: Tensor) -> Losses:
    """`hybrid_loss`, which also writes the gradients of the rollout's leaves, of the losses' sum, into their .grad."""
    if not kernels.usable(labels.device):
        losses = hybrid_loss(config, rollout, labels, class_uniform)
        losses.total.sum().backward()
        return losses
    leaves = [rollout.logits, rollout.means, rollout.baselines]
    gradients = [torch.empty_like(leaf) for leaf in leaves]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
    return Losses(
        *kernels.losses(
            leaves=[leaf.detach() for leaf in leaves],
            gradients=gradients,
            samples=rollout.samples,
            std=rollout.std,
            labels=labels,
            class_uniform=class_uniform if config.loss_mixing < 1 else None,
            flags=(config.reward == "probability", config.reward_steps == "every"),
            numbers=(config.loss_mixing, config.step_supervision, config.discount, config.reinforce_weight),
        )
    )


def location_returns(config: Config, reward: Tensor, decisions: int) -> Tensor:
    """Discounted return of each location decision: the rewards of the glimpse that it places and of those after it.

    reward: (R, t, B) after each of the last t glimpses; with reward_steps last, only the last one's counts.
    decisions: T - 1. Returns (R, T - 1, B): decision i places glimpse i + 1, and its return is the sum over s > i of
    discount**(s - i - 1) * reward_s.
    """
    weights = _return_weights(decisions, config.discount, config.reward_steps == "every", reward.device)
    return torch.matmul(weights, reward[:, -decisions:]) if config.reward_steps == "every" else weights * reward[:, -1:]


@functools.lru_cache(maxsize=64)
def _return_weights(decisions: int, discount: float, every: bool, device: torch.device) -> Tensor:
    """What each reward counts in the return of each decision, (decisions, decisions); the last one, (decisions, 1)."""
    later = torch.arange(decisions) - torch.arange(decisions)[:, None]  # glimpses between decision and reward
    weights = torch.where(later >= 0, discount ** later.clamp(min=0).float(), 0.0)
    weights = (weights if every else weights[:, -1:]).to(device)
    kernels.wait_for(weights)
    return weights


def _class_reinforce(log_class: Tensor, log_true: Tensor, target: Tensor, class_uniform: Tensor) -> Tensor:
    """Surrogate loss (R, t, B) of REINFORCE on a sampled class, with reward 1 for the true class.

    The baseline is the expected reward in that state: the probability of the true class.
    """
    cumulative = log_class.detach().exp().cumsum(-1)
    sampled = (class_uniform[:, None, :, None] >= cumulative).sum(-1, keepdim=True).clamp(max=log_class.shape[-1] - 1)
    advantage = (sampled == target)[..., 0].float() - log_true.detach().exp()
    return -advantage * log_class.gather(-1, sampled)[..., 0]
