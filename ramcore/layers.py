"""Layers with a leading replicate dimension: R networks side by side, each with its own weights.

Products are batched over replicates (torch.baddbmm), which for R = 1 costs what a plain product costs. Weights are
drawn by `ramcore.rng` from each replicate's seed and the order of the layers, so a replicate is the same alone or
among others.

R: replicates, N: rows, I/O: input and output units.
"""

from __future__ import annotations

import math
from typing import Any

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


class _KnownProduct(torch.autograd.Function):
    """y = x W + b where y has been computed before: only the gradient is left to do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        to_x = gradient.bmm(weight.mT) if ctx.needs_input_grad[0] else None
        return to_x, x.mT.bmm(gradient), gradient.sum(1, keepdim=True), None


class _ThroughProduct(torch.autograd.Function):
    """y = x W + b where y has been computed before, and W's and b's gradients are taken elsewhere, by way of y's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        (gradient,) = gradients
        (weight,) = ctx.saved_tensors
        return gradient.bmm(weight.mT), None, gradient


class _KnownRectified(torch.autograd.Function):
    """y = Rect(concatenation of each x W + b) where y has been computed before: only the gradient is left to do."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *layers: Tensor) -> Tensor:
        ctx.save_for_backward(y, *layers)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, *layers = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradients[0], y, 0.0)
        bias = gradient.sum(1, keepdim=True)
        result: list[Tensor | None] = [None]
        start = 0
        for i in range(0, len(layers), 3):
            x, weight, _ = layers[i : i + 3]
            part = slice(start, start := start + weight.shape[-1])
            to_x = gradient[..., part].bmm(weight.mT) if ctx.needs_input_grad[1 + i] else None
            result += [to_x, x.mT.bmm(gradient[..., part]), bias[..., part]]
        return tuple(result)


class Linear(nn.Module):
    """y = x W + b per replicate; initialised uniformly in +-1/sqrt(I), as torch.nn.Linear."""

    def __init__(self, weights: Weights, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = weights.uniform((inputs, outputs), bound)
        self.bias = weights.uniform((1, outputs), bound)

    def forward(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """x: (R, N, I); returns (R, N, O), in out if that is given (without gradient)."""
        return torch.baddbmm(self.bias, x, self.weight, out=out)

    def known(self, x: Tensor, y: Tensor) -> Tensor:
        """y = self(x), computed before without its gradient, now with it."""
        return _KnownProduct.apply(x, self.weight, self.bias, y)

    def through(self, x: Tensor, y: Tensor) -> Tensor:
        """y as a function of x alone: its gradient reaches this layer's weights only as y's own."""
        return _ThroughProduct.apply(x, self.weight, y)


def known_rectified(y: Tensor, *layers: tuple[Linear, Tensor]) -> Tensor:
    """y = Rect(concatenation of layer(x) for each layer, x), computed before without its gradient, now with it."""
    return _KnownRectified.apply(y, *(t for layer, x in layers for t in (x, layer.weight, layer.bias)))


class LayerNorm(nn.Module):
    """Normalise each of some groups of units (Ba, Kiros, Hinton 2016); gain and bias per replicate."""

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
    """A convolution per replicate. One after the other: a CPU is slow at grouped convolutions."""

    def __init__(self, weights: Weights, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs * kernel**2)
        self.stride = stride
        self.weight = weights.uniform((outputs, inputs, kernel, kernel), bound)
        self.bias = weights.uniform((outputs,), bound)

    def forward(self, x: Tensor, replicate: int) -> Tensor:
        """x: (N, I, height, width) of one replicate; returns its (N, O, ...)."""
        return functional.conv2d(x, self.weight[replicate], self.bias[replicate], stride=self.stride)
