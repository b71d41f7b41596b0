"""Layers with a leading replicate dimension: R networks side by side, each with its own weights.

A product over all replicates is one torch.baddbmm. For R = 1 it costs as much as a plain product. `ramcore.rng` draws
the initial weights from each replicate's seed and the position of the layer, so a replicate has the same weights alone
and among others.

R: replicates, N: rows, I/O: input and output units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ramcore import kernels
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


Products = Sequence[tuple[Tensor, Tensor]]  # x (R, N, I) and weights (R, I, O)


def rows(weight: Tensor, inputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each input with its rows of a weight (R, I, O) whose input they are together, without copying them together."""
    return list(zip(inputs, weight.split([x.shape[-1] for x in inputs], 1), strict=True))


def summed(out: Tensor, products: Products, bias: Tensor | None = None) -> Tensor:
    """out (R, N, O) = the sum of x W for each product, plus the bias (R, 1, O). Autograd does not follow it."""
    (x, weight), *others = products
    if bias is None:
        torch.bmm(x, weight, out=out)
    else:
        torch.baddbmm(bias, x, weight, out=out)
    for x, weight in others:
        out.baddbmm_(x, weight)
    return out


def rectified(out: Tensor, biases: list[Tensor], products: Products) -> Tensor:
    """out (R, N, O) = Rect(the sum of x W for each product, plus one or two biases). Autograd does not follow it."""
    if not kernels.usable(out.device):
        return summed(out, products, sum(biases[1:], biases[0])).relu_()
    kernels.rectify(summed(out, products), *biases)
    return out


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient, to be written to."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def weight_gradients(layer: Linear, inputs: list[Tensor], gradient: Tensor) -> None:
    """Write the gradients of a layer's weight and bias, given its inputs (R, N, I) and its output's (R, N, O)."""
    for x, to_weight in rows(gradient_of(layer.weight), inputs):
        torch.bmm(x.mT, gradient, out=to_weight)
    sum_rows(gradient, out=gradient_of(layer.bias))


def sum_rows(x: Tensor, out: Tensor) -> None:
    """The sum of x (R, N, O) over N, into out (R, 1, O). A CPU is twice as fast at it by a matrix product."""
    if kernels.usable(x.device):
        kernels.sum_rows(x, out)
    else:
        torch.bmm(x.new_ones(x.shape[0], 1, x.shape[1]), x, out=out)


def through(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    parameters: list[nn.Parameter],
) -> list[Tensor]:
    """The gradients of a function's inputs, given those of its outputs; those of parameters are added to their own.

    The function is computed again.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
    found = torch.autograd.grad(outputs, [*leaves, *parameters], gradients, materialize_grads=True)
    for parameter, gradient in zip(parameters, found[len(leaves) :], strict=True):
        gradient_of(parameter).add_(gradient)
    return list(found[: len(leaves)])


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
