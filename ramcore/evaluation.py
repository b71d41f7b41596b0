"""Evaluation: class scores of R networks on canvases, following the policy's mean or averaging sampled rollouts.

R replicates, B images, T glimpses, C classes, S canvas side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ramcore.baselines import CNN, ConvNet, FullyConnected
from ramcore.config import Config
from ramcore.data import SplitName, TaskData
from ramcore.model import RAM
from ramcore.rng import Stream, key, normal, uniform, unit

BATCH_SIZE = 500  # images; fits the cache of a laptop. The noise of sampled rollouts is drawn for so many at a time
_GPU_ROWS = {True: 40_000, False: 4_000}  # images x networks that a GPU evaluates at once: of RAM, of the others
_FIXED_SEED = -1  # of the first locations at evaluation, which are the same in every run


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy (a fraction) and mean cross-entropy (nats) of each seed on one split."""

    split: str
    seeds: tuple[int, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy_per_glimpse: tuple[tuple[float, ...], ...]  # of each seed, deciding after 1, 2, ..., T glimpses


def build_model(config: Config, seeds: Tensor) -> nn.Module:
    """R untrained networks of a configuration; seeds: (R,) int64, on the device of the weights."""
    return {"cnn": CNN, "conv": ConvNet, "fc": FullyConnected}.get(config.model, RAM)(config, seeds)


def whole_image_input(config: Config, images: Tensor) -> Tensor:
    """The input of the networks without glimpses, from 8-bit canvases: pixels in [0, 1] times config.input_gain."""
    return images.float() * (config.input_gain / 255)


@torch.no_grad()
def class_log_probs(
    model: nn.Module, config: Config, seeds: Tensor, images: Tensor, index: Tensor, *, every_step: bool = False
) -> Tensor:
    """Log probabilities of the classes (R, t, B, C) that R networks give to canvases.

    Args:
        seeds: (R,) int64, of the sampled rollouts.
        images: (1, B, S, S) uint8, seen by all replicates.
        index: (B,) int64 numbers of the images, which determine the first locations.
        every_step: give them after every glimpse, not only after the last.
    """
    if not isinstance(model, RAM):
        logits = model(whole_image_input(config, images.expand(len(seeds), -1, -1, -1)))
        return functional.log_softmax(logits, -1)[:, None]
    pyramid = model.retina.pyramid(images)
    first = first_locations(config, index).expand(len(seeds), -1, -1)

    def scores(noise: Tensor | None) -> Tensor:
        hiddens = model.look(pyramid, first, noise).hiddens
        return model.scores(hiddens if every_step else hiddens[:, -1:])

    if config.eval_samples == 0 and config.model == "ram":
        return functional.log_softmax(scores(None), -1)
    total, samples = torch.zeros(()), max(config.eval_samples, 1)
    for sample in range(samples):
        noise = [
            policy_noise(config, key(seeds, Stream.LOCATION_NOISE, -1 - sample, part[0]), len(part))
            for part in index.split(BATCH_SIZE)
        ]
        total = total + functional.softmax(scores(torch.cat(noise, 2)), -1)
    return (total / samples).clamp_min(1e-12).log()


def first_locations(config: Config, index: Tensor) -> Tensor:
    """The first location on each evaluation image, (1, B, 2): a function of the image's number alone."""
    if config.first_glimpse == "center":
        return torch.zeros(1, len(index), 2, device=index.device)
    keys = key(torch.full((1,), _FIXED_SEED, device=index.device), Stream.FIRST_LOCATION)
    return unit(keys[:, None], 2 * index[:, None] + torch.arange(2, device=index.device))[None] * 2 - 1


def policy_noise(config: Config, keys: Tensor, batch: int) -> Tensor:
    """The noise of `RAM.look` for each key, (..., T - 1, B, 2): standard normal; for ram-random in [-1, 1)."""
    shape = (config.num_glimpses - 1, batch, 2)
    if config.model == "ram-random":
        return uniform(keys, math.prod(shape)).unflatten(-1, shape) * 2 - 1
    return normal(keys, math.prod(shape)).unflatten(-1, shape)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    config: Config,
    seeds: tuple[int, ...],
    data: TaskData,
    split: SplitName,
    *,
    every_step: bool = True,
) -> Evaluation:
    """Accuracy and loss of R networks on a split; with every_step=False only after the last glimpse."""
    labels = data.split(split).labels
    device = labels.device
    seed_tensor = torch.tensor(seeds, device=device)
    keys = data.placement_keys(split, seed_tensor, 0)
    hits: list[Tensor] = []  # correct decisions (R, t) of each batch
    nats: list[Tensor] = []  # sum of the cross-entropies (R,) of each batch
    batch = BATCH_SIZE
    if device.type == "cuda":  # which waits for the host between small batches
        batch *= max(1, _GPU_ROWS[config.is_recurrent] // (BATCH_SIZE * len(seeds)))
    for start in range(0, len(labels), batch):
        index = torch.arange(start, min(start + batch, len(labels)), device=device)
        images = data.render(split, index[None], keys)
        log_probs = class_log_probs(model, config, seed_tensor, images, index, every_step=every_step)
        hits.append((log_probs.argmax(-1) == labels[index]).sum(-1))
        target = labels[index].expand(len(seeds), -1)[..., None]
        nats.append(-log_probs[:, -1].gather(-1, target).sum((1, 2)))
    accuracy = (torch.stack(hits).sum(0).double() / len(labels)).tolist()
    return Evaluation(
        split=split,
        seeds=seeds,
        accuracy=tuple(a[-1] for a in accuracy),
        loss=tuple((torch.stack(nats).sum(0).double() / len(labels)).tolist()),
        accuracy_per_glimpse=tuple(tuple(a) for a in accuracy),
    )
