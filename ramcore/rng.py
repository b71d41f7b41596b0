"""Random numbers that are a pure function of (seed, stream, counters): SplitMix64 in torch integer arithmetic.

There is no generator with a state. The same arguments give the same numbers on CPU and GPU, in any order and in any
process. So the random state of a training run is its seed and its epoch, replicates do not affect one another, and a
resumed run continues exactly. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014
(the mix is their variant 13).

R: replicates (one seed each).
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """The uses of random numbers; numbers of different streams are independent."""

    WEIGHTS = 0
    BATCH_ORDER = 1
    PLACEMENT = 2
    FIRST_LOCATION = 3
    LOCATION_NOISE = 4
    CLASS_SAMPLE = 5
    DROPOUT = 6


# The signed integers with the bits of the unsigned 64-bit ones; torch has signed ones only.
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift (torch's >> keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def key(seeds: Tensor, stream: Stream, *counters: int | Tensor) -> Tensor:
    """Keys, shaped as the broadcast of seeds and counters (such as epoch and step; numbers or int64 tensors)."""
    result = _mix(seeds * _GAMMA + (int(stream) + 1))
    for counter in counters:
        result = _mix(result * _GAMMA + counter)
    return result


def bits(keys: Tensor, index: Tensor) -> Tensor:
    """64 random bits for each key and index. keys and index broadcast, both int64."""
    return _mix(keys + index * _GAMMA)


def integers(keys: Tensor, index: Tensor, high: int | Tensor) -> Tensor:
    """Whole numbers in [0, high), high at most 2**31, shaped as the broadcast of keys, index and high."""
    return (_shift_right(bits(keys, index), 33) * high) >> 31


def unit(keys: Tensor, index: Tensor) -> Tensor:
    """Uniform float32 in [0, 1), shaped as the broadcast of keys and index."""
    return _shift_right(bits(keys, index), 40).float() * 2.0**-24


def uniform(keys: Tensor, count: int) -> Tensor:
    """keys: (...,); returns (..., count) float32 in [0, 1)."""
    return unit(keys[..., None], torch.arange(count, device=keys.device))


def normal(keys: Tensor, count: int) -> Tensor:
    """keys: (...,); returns (..., count) standard normal float32 (Box-Muller)."""
    half = (count + 1) // 2
    u = uniform(keys, 2 * half)
    radius = torch.sqrt(-2 * torch.log1p(-u[..., :half]))
    angle = 2 * math.pi * u[..., half:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)[..., :count]


def permutation(keys: Tensor, n: int) -> Tensor:
    """keys: (R,); returns (R, n) int64, a uniform permutation of 0..n-1 for each key."""
    return torch.argsort(bits(keys[:, None], torch.arange(n, device=keys.device)), dim=1, stable=True)
