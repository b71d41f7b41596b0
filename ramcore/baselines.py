"""The published networks that see the whole canvas at once. R replicates, B images, S canvas side, C classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ramcore.config import Config
from ramcore.layers import Conv, Linear, Weights


class CNN(nn.Module):
    """The case study's CNN: two convolutions, dropout after the second, and two fully connected layers; ReLU.

    The case study gives no sizes. These are the sizes of the small MNIST network that fits its description: 10 and 20
    filters of 5x5, each followed by 2x2 max pooling, and 50 hidden units.
    """

    def __init__(self, config: Config, seeds: Tensor) -> None:
        super().__init__()
        weights = Weights(seeds)
        self.config = config
        self.conv1 = Conv(weights, 1, 10, 5)
        self.conv2 = Conv(weights, 10, 20, 5)
        side = ((config.canvas_size - 4) // 2 - 4) // 2
        self.hidden = Linear(weights, 20 * side**2, 50)
        self.out = Linear(weights, 50, config.num_classes)

    def forward(self, images: Tensor, dropout: Tensor | None = None) -> Tensor:
        """images: (R, B, S, S) float; dropout: (R, B, 20) uniform in [0, 1), to drop whole maps; returns (R, B, C)."""
        features = []
        for r, canvases in enumerate(images):
            maps = functional.max_pool2d(self.conv1(_one_channel(canvases), r), 2).relu()
            maps = self.conv2(maps, r)
            if dropout is not None:
                keep = (dropout[r] >= self.config.dropout).float() / (1 - self.config.dropout)
                maps = maps * keep[:, :, None, None]
            features.append(functional.max_pool2d(maps, 2).relu().flatten(1))
        return self.out(self.hidden(torch.stack(features)).relu())


class ConvNet(nn.Module):
    """Mnih et al.'s convolutional net: 8 filters of 10x10 at stride 5, then 256 hidden units, ReLU (section 4.1)."""

    def __init__(self, config: Config, seeds: Tensor) -> None:
        super().__init__()
        weights = Weights(seeds)
        self.conv = Conv(weights, 1, 8, 10, stride=5)
        side = (config.canvas_size - 10) // 5 + 1
        self.hidden = Linear(weights, 8 * side**2, config.hidden_size)
        self.out = Linear(weights, config.hidden_size, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: (R, B, S, S) float; returns (R, B, C)."""
        features = [self.conv(_one_channel(canvases), r).relu().flatten(1) for r, canvases in enumerate(images)]
        return self.out(self.hidden(torch.stack(features)).relu())


class FullyConnected(nn.Module):
    """Mnih et al.'s fully connected networks: two hidden layers of config.hidden_size units (64 or 256), ReLU."""

    def __init__(self, config: Config, seeds: Tensor) -> None:
        super().__init__()
        weights = Weights(seeds)
        self.hidden1 = Linear(weights, config.canvas_size**2, config.hidden_size)
        self.hidden2 = Linear(weights, config.hidden_size, config.hidden_size)
        self.out = Linear(weights, config.hidden_size, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: (R, B, S, S) float; returns (R, B, C)."""
        return self.out(self.hidden2(self.hidden1(images.flatten(2)).relu()).relu())


def _one_channel(canvases: Tensor) -> Tensor:
    """(B, S, S) as maps (B, 1, S, S), channels last: a CPU convolves this layout two to three times as fast."""
    return canvases[:, None].contiguous(memory_format=torch.channels_last)
