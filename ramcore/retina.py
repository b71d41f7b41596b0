"""The glimpse sensor: concentric square patches around a location, each scale coarser and wider than the one before.

A patch of scale k = 0, 1, ... has patch_size x patch_size values. Each is the mean of a w x w box of the canvas, where
w = scale_factor**k (Mnih et al. 2014, section 3.1). Pixels beyond the canvas are zero.

The sensor works in two steps. `pyramid` runs once a batch and sums the box of every scale at every pixel of every
canvas: 2 * (scale_factor - 1) additions a pixel and scale. No other cost grows with the canvas. `read` runs once a
glimpse and reads num_scales * patch_size**2 of those sums. On 8-bit canvases the sums are exact.

K: scales, P: patch side, S: canvas side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ramcore import kernels


class Pyramid(NamedTuple):
    """Box sums of a batch of canvases. On a GPU the canvases themselves: there it is faster to sum what is read.

    values: (K * n,) one level for each scale. A level holds the canvases in turn, row by row. Each canvas has `ring`
        empty rows above it and `ring` empty columns to its left. After a row comes the next row's ring, and after a
        canvas the next one's, so a flat addition sums the boxes of all canvases and no box reaches into another canvas.
    origin: (..., K) int32 or int64, the position of each canvas' pixel (0, 0) in each level; None with canvases.
    unit: the value of a white pixel (255 for 8-bit canvases).
    """

    values: Tensor
    origin: Tensor | None
    unit: float


@dataclass(frozen=True, kw_only=True)
class Retina:
    """A glimpse sensor for one canvas size."""

    patch_size: int  # pixels
    num_scales: int
    scale_factor: int = 2
    canvas_size: int  # pixels
    gain: float = 1.0  # factor of the values that are read

    @property
    def ring(self) -> int:
        """Empty pixels above a canvas and to its left: the width of the widest box."""
        return self.scale_factor ** (self.num_scales - 1)

    def pyramid(self, images: Tensor) -> Pyramid:
        """Box sums of every scale at every pixel. images: (..., S, S) uint8, or float in [0, 1]."""
        if images.dtype == torch.uint8 and images.dim() == 4 and kernels.usable(images.device):
            return Pyramid(images, None, 255.0)
        ring, side = self.ring, self.canvas_size + self.ring
        count = images.shape[:-2].numel()
        length = count * side**2
        level_length = length + ring * (side + 1)  # boxes of the last canvas reach so far beyond it
        if images.dtype == torch.uint8:
            dtype, unit = (torch.int16 if 255 * ring**2 < 2**15 else torch.int32), 255.0
        else:
            dtype, unit = images.dtype, 1.0
        values = torch.empty(self.num_scales, level_length, dtype=dtype, device=images.device)
        values[0].zero_()[:length].view(count, side, side)[:, ring:, ring:] = images.reshape(count, *images.shape[-2:])
        for k in range(1, self.num_scales):
            # A box of this scale is scale_factor x scale_factor boxes of the scale before.
            step = self.scale_factor ** (k - 1)
            rows = _sum_shifted(values[k - 1], step * side, self.scale_factor)
            values[k, len(rows) - (self.scale_factor - 1) * step :] = 0
            _sum_shifted(rows, step, self.scale_factor, out=values[k])
        whole = torch.int32 if values.numel() < 2**31 else torch.int64  # a CPU adds up the smaller one much faster
        canvas = torch.arange(count, dtype=whole, device=images.device)[:, None] * side**2 + ring * (side + 1)
        level = torch.arange(self.num_scales, dtype=whole, device=images.device) * level_length
        return Pyramid(values.view(-1), (canvas + level).view(*images.shape[:-2], -1), unit)

    def read(self, pyramid: Pyramid, location: Tensor, out: Tensor | None = None) -> Tensor:
        """Read the patches around a location on each canvas.

        Args:
            pyramid: of canvases (...); its leading dimensions broadcast against the location's.
            location: (..., 2) as (x, y) in [-1, 1], 0 the canvas' centre, +1 its right and lower edge. A patch is
                centred on the nearest pixel corner; a patch of odd width half a pixel to the right of it and below.
            out: memory for the result.

        Returns:
            (..., K * P * P) float32 in [0, gain], by scale and row, the finest scale first.
        """
        ring, side = self.ring, self.canvas_size + self.ring
        offset, weight = _tables(self, pyramid.unit, location.device)
        if pyramid.origin is None:
            out = location.new_empty(*location.shape[:-1], len(weight)) if out is None else out
            kernels.read(pyramid.values, location, weight, out, self.num_scales, self.patch_size, self.scale_factor)
            return out
        centre = torch.floor((location + 1) * (self.canvas_size / 2) + 0.5).to(pyramid.origin.dtype)
        # All boxes outside the canvas are zero, so the nearest one on each side replaces those farther out.
        box = (centre[..., None, None] + offset).clamp(-ring, self.canvas_size)  # (..., 2, K, P)
        columns, rows = box.unbind(-3)
        rows = rows * side + pyramid.origin[..., None]
        index = rows[..., :, None] + columns[..., None, :]  # (..., K, P, P)
        seen = pyramid.values.index_select(0, index.view(-1)).view(*index.shape[:-3], -1)
        return torch.mul(seen, weight, out=out)

    def see(self, images: Tensor, location: Tensor) -> Tensor:
        """images: (..., S, S), location: (..., 2); returns (..., K, P, P). For several glimpses, use one `pyramid`."""
        seen = self.read(self.pyramid(images), location)
        return seen.unflatten(-1, (self.num_scales, self.patch_size, self.patch_size))


def _sum_shifted(values: Tensor, shift: int, count: int, *, out: Tensor | None = None) -> Tensor:
    """values[i] + values[i + shift] + ... + values[i + (count - 1) * shift], for every i where all terms exist."""
    length = len(values) - (count - 1) * shift
    result = torch.add(values[:length], values[shift : shift + length], out=None if out is None else out[:length])
    for j in range(2, count):
        result += values[j * shift : j * shift + length]
    return result


@lru_cache(maxsize=64)
def _tables(retina: Retina, unit: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """offset (K, P): of each box from the centre; weight (K * P * P,): gain / (w**2 * unit)."""
    widths = torch.tensor([[retina.scale_factor**k] for k in range(retina.num_scales)], device=device)
    offset = (widths * torch.arange(retina.patch_size, device=device) - (retina.patch_size * widths) // 2).int()
    weight = (retina.gain / (unit * widths.float() ** 2)).expand(-1, retina.patch_size**2).flatten().contiguous()
    kernels.wait_for(weight)
    return offset, weight
