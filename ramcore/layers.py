"""Layers with a leading replicate dimension: R networks side by side, each with its own weights.

A product over all replicates is one torch.baddbmm. For R = 1 it costs as much as a plain product. `ramcore.rng` draws
the initial weights from each replicate's seed and the position of the layer, so a replicate has the same weights alone
and among others.

R: replicates, N: rows, I/O: input and output units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ramcore.rng import Stream, key, uniform


class Weights:
    """Draws the initial weights of R replicates, layer after layer."""

    def __init__(self, seeds: Tensor) -> None:
        self.seeds = seeds
        self.drawn = 0

    def uniform(self, shape: tuple[int, ...], bound: float) -> nn.Parameter:
        """(R, *shape) uniform in [-bound, bound)."""
        keys = key(self.seeds, Stream.WEIGHTS, self.drawn)
        self.drawn += 1
        values = uniform(keys, math.prod(shape)) * (2 * bound) - bound
        return nn.Parameter(values.view(len(self.seeds), *shape))

    def constant(self, shape: tuple[int, ...], value: float) -> nn.Parameter:
        """(R, *shape) of one value."""
        return nn.Parameter(torch.full((len(self.seeds), *shape), value, device=self.seeds.device))


class Linear(nn.Module):
    """y = x W + b per replicate; initialised uniformly in +-1/sqrt(I), as torch.nn.Linear."""

    def __init__(self, weights: Weights, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = weights.uniform((inputs, outputs), bound)
        self.bias = weights.uniform((1, outputs), bound)

    def forward(self, x: Tensor) -> Tensor:
        """x: (R, N, I); returns (R, N, O)."""
        return torch.baddbmm(self.bias, x, self.weight)


class LayerNorm(nn.Module):
    """Normalises each of some groups of units (Ba, Kiros, Hinton 2016); gain and bias per replicate."""

    def __init__(self, weights: Weights, size: int, groups: int = 1) -> None:
        super().__init__()
        self.shape = (groups, size)
        self.gain = weights.constant((1, groups * size), 1.0)
        self.bias = weights.constant((1, groups * size), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: (R, N, groups * size)."""
        normalised = functional.layer_norm(x.unflatten(-1, self.shape), self.shape[1:]).flatten(-2)
        return torch.addcmul(self.bias, normalised, self.gain)


class Conv(nn.Module):
    """A convolution per replicate. The replicates are computed in turn: a CPU is slow at grouped convolutions."""

    def __init__(self, weights: Weights, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs * kernel**2)
        self.stride = stride
        self.weight = weights.uniform((outputs, inputs, kernel, kernel), bound)
        self.bias = weights.uniform((outputs,), bound)

    def forward(self, x: Tensor, replicate: int) -> Tensor:
        """x: (N, I, height, width) of one replicate; returns (N, O, height, width) after the convolution."""
        return functional.conv2d(x, self.weight[replicate], self.bias[replicate], stride=self.stride)
