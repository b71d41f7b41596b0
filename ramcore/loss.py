"""The hybrid objective: cross-entropy for what is decided, REINFORCE with a baseline for where to look.

Mnih et al. 2014, section 3.1: the class is trained by cross-entropy through the core and the glimpse network, the
location policy by the policy gradient of equation 4, the baseline by squared error. R replicates, B images, T
glimpses, C classes. Replicates share no weights, so the sum of their losses trains each as if alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ramcore.config import Config
from ramcore.model import Rollout


class Losses(NamedTuple):
    """Per replicate, each (R,)."""

    total: Tensor  # what is minimised
    classification: Tensor  # the mixture of cross-entropy and class REINFORCE
    policy: Tensor  # the location policy's surrogate loss
    baseline: Tensor  # mean squared error of the baseline
    reward: Tensor  # mean reward after the last glimpse
    accuracy: Tensor  # of the last decision


def needs_every_step(config: Config) -> bool:
    """Whether the losses use class scores after every glimpse."""
    return config.step_supervision > 0 or config.reward_steps == "every"


def hybrid_loss(config: Config, rollout: Rollout, labels: Tensor, class_uniform: Tensor | None = None) -> Losses:
    """Losses of a training rollout.

    Args:
        config: the loss' settings.
        rollout: with every step's logits if `needs_every_step`.
        labels: (R, B) int64.
        class_uniform: (R, B) in [0, 1), draws the sampled class when loss_mixing < 1.
    """
    log_class = functional.log_softmax(rollout.logits, dim=-1)  # (R, t, B, C)
    target = labels[:, None, :, None].expand(*log_class.shape[:-1], 1)
    log_true = log_class.gather(-1, target)[..., 0]  # (R, t, B)
    correct = (rollout.logits.argmax(-1) == labels[:, None]).float()

    per_step = -log_true
    if config.loss_mixing < 1:
        assert class_uniform is not None
        per_step = config.loss_mixing * per_step + (1 - config.loss_mixing) * _class_reinforce(
            log_class, log_true, target, class_uniform
        )
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


def location_returns(config: Config, reward: Tensor, decisions: int) -> Tensor:
    """Discounted return of each location decision: what is earned by the glimpse it places and by those after.

    Args:
        config: reward_steps and discount. With reward_steps last, only the last glimpse earns.
        reward: (R, t, B) after each of the last t glimpses.
        decisions: T - 1.

    Returns:
        (R, T - 1, B); decision i places glimpse i + 1 and earns sum over s > i of discount**(s - i - 1) * reward_s.
    """
    returns = [reward[:, -1]]
    for i in range(1, decisions):
        earned = config.discount * returns[-1]
        if config.reward_steps == "every":
            earned = earned + reward[:, -1 - i]
        returns.append(earned)
    return torch.stack(returns[::-1], dim=1)


def _class_reinforce(log_class: Tensor, log_true: Tensor, target: Tensor, class_uniform: Tensor) -> Tensor:
    """Surrogate loss (R, t, B) of REINFORCE on a sampled class, rewarded 1 if it is the true one.

    Its baseline is the expected reward given the state, which a classifier knows: the true class' probability.
    """
    cumulative = log_class.detach().exp().cumsum(-1)
    sampled = (class_uniform[:, None, :, None] >= cumulative).sum(-1, keepdim=True).clamp(max=log_class.shape[-1] - 1)
    advantage = (sampled == target)[..., 0].float() - log_true.detach().exp()
    return -advantage * log_class.gather(-1, sampled)[..., 0]
