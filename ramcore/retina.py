"""The glimpse sensor: concentric square patches around a location, each scale coarser and wider than the one before.

A scale-k patch is patch_size x patch_size values, each the mean of a w x w box of the canvas, w = scale_factor**k
(Mnih et al. 2014, section 3.1). Beyond the canvas everything is zero.

The sensor works in two steps. `pyramid`, once a batch, sums the box of every scale at every pixel of every canvas:
2 * (scale_factor - 1) additions a pixel and scale, the only cost that grows with the canvas. `glimpse`, once a glimpse,
reads num_scales * patch_size**2 of those sums, whatever the canvas. On 8-bit canvases the sums are exact.

K: scales, P: patch side, S: canvas side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Pyramid(NamedTuple):
    """Box sums of a batch of canvases.

    values: (K * n,) level after level. A level holds the canvases row after row, each with a ring of `ring` empty rows
        above it and `ring` empty columns to its left; what follows a row or a canvas is the next one's ring, so one
        flat addition sums boxes across all canvases at once and no box reaches into a neighbour.
    origin: (..., K) int64, where each canvas' pixel (0, 0) lies in each level.
    unit: what a white pixel is worth (255 for 8-bit canvases).
    """

    values: Tensor
    origin: Tensor
    unit: float


@dataclass(frozen=True, kw_only=True)
class Retina:
    """A glimpse sensor for one canvas size."""

    patch_size: int  # pixels
    num_scales: int
    scale_factor: int = 2
    canvas_size: int  # pixels
    gain: float = 1.0  # of what is seen

    @cached_property
    def box_widths(self) -> tuple[int, ...]:
        """Side in pixels of the box that one value of each scale averages."""
        return tuple(self.scale_factor**k for k in range(self.num_scales))

    @property
    def ring(self) -> int:
        """Empty pixels above and to the left of a canvas: as many as the widest box is wide."""
        return self.box_widths[-1]

    def pyramid(self, images: Tensor) -> Pyramid:
        """Box sums of every scale at every pixel. images: (..., S, S) uint8, or float in [0, 1]."""
        ring, side = self.ring, self.canvas_size + self.ring
        count = images.shape[:-2].numel()
        length = count * side**2
        level_length = length + ring * (side + 1)  # the last canvas' boxes reach this far beyond it
        if images.dtype == torch.uint8:
            dtype, unit = (torch.int16 if 255 * ring**2 < 2**15 else torch.int32), 255.0
        else:
            dtype, unit = images.dtype, 1.0
        values = torch.empty(self.num_scales, level_length, dtype=dtype, device=images.device)
        values[0].zero_()[:length].view(count, side, side)[:, ring:, ring:] = images.reshape(count, *images.shape[-2:])
        for k in range(1, self.num_scales):
            # A box of this scale is scale_factor x scale_factor boxes of the scale before.
            step = self.box_widths[k - 1]
            rows = _sum_shifted(values[k - 1], step * side, self.scale_factor)
            values[k, len(rows) - (self.scale_factor - 1) * step :] = 0
            _sum_shifted(rows, step, self.scale_factor, out=values[k])
        canvas = torch.arange(count, device=images.device)[:, None] * side**2 + ring * (side + 1)
        level = torch.arange(self.num_scales, device=images.device) * level_length
        return Pyramid(values.view(-1), (canvas + level).view(*images.shape[:-2], -1), unit)

    def glimpse(self, pyramid: Pyramid, location: Tensor) -> Tensor:
        """What the retina sees.

        Args:
            pyramid: of canvases (...); their leading dimensions broadcast against the location's.
            location: (..., 2) as (x, y) in [-1, 1], 0 the canvas' centre, +1 its right and lower edge. Patches are
                centred on the nearest pixel corner; one of odd width lies half a pixel right of and below it.

        Returns:
            (..., K * P * P) float32 in [0, gain], scale by scale, row by row, the finest scale first.
        """
        ring, side = self.ring, self.canvas_size + self.ring
        offset, weight = _tables(self, pyramid.unit, location.device)
        centre = torch.floor((location + 1) * (self.canvas_size / 2) + 0.5).long()
        # Boxes wholly outside are all alike: the first such box on either side stands for the rest.
        box = (centre[..., None, None] + offset).clamp(-ring, self.canvas_size)  # (..., 2, K, P)
        columns, rows = box.unbind(-3)
        rows = rows * side + pyramid.origin[..., None]
        index = rows[..., :, None] + columns[..., None, :]  # (..., K, P, P)
        seen = pyramid.values.index_select(0, index.view(-1)).view(*index.shape[:-3], -1)
        return seen * weight

    def see(self, images: Tensor, location: Tensor) -> Tensor:
        """images: (..., S, S), location: (..., 2); returns (..., K, P, P). Many looks share a `pyramid`."""
        seen = self.glimpse(self.pyramid(images), location)
        return seen.unflatten(-1, (self.num_scales, self.patch_size, self.patch_size))


def _sum_shifted(values: Tensor, shift: int, count: int, *, out: Tensor | None = None) -> Tensor:
    """values[i] + values[i + shift] + ... + values[i + (count - 1) * shift] for every i that has them all."""
    length = len(values) - (count - 1) * shift
    result = torch.add(values[:length], values[shift : shift + length], out=None if out is None else out[:length])
    for j in range(2, count):
        result += values[j * shift : j * shift + length]
    return result


@lru_cache(maxsize=64)
def _tables(retina: Retina, unit: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """offset (K, P): of each box from the centre; weight (K * P * P,): gain / (w**2 * unit)."""
    widths = torch.tensor(retina.box_widths, device=device)[:, None]
    offset = widths * torch.arange(retina.patch_size, device=device) - (retina.patch_size * widths) // 2
    weight = (retina.gain / (unit * widths.float() ** 2)).expand(-1, retina.patch_size**2).reshape(-1)
    return offset, weight
