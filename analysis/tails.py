"""Heavy tails of seed noise: the noise of every trial has a scale of its own.

Noise whose squared scale is inverse-gamma with `degrees` degrees of freedom is Student's t (West 1984). Scales are of a
grid, and so are the degrees of freedom, so both are drawn exactly from what they are given.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SCALES = torch.exp(torch.arange(-0.75, 3.01, 0.25, dtype=torch.float64))  # of a trial's seed noise, standard deviations
DEGREES = (2.0, 4.0, 8.0, 64.0)  # 64 is all but normal

_DEGREES = torch.tensor(DEGREES, dtype=torch.float64)[:, None]
_UNSCALED = -_DEGREES * torch.log(SCALES) - 0.5 * _DEGREES / SCALES**2
LOG_PRIOR = _UNSCALED - torch.logsumexp(_UNSCALED, dim=1, keepdim=True)  # of the scales, (degrees, scales)


class Tails:
    """The scales of T trials, and which of DEGREES they have."""

    def __init__(self, trials: int) -> None:
        """Begin as if noise were normal."""
        self.scale = torch.ones(trials, dtype=torch.float64)
        self._degrees = len(DEGREES) - 1

    def redraw(self, log_likelihood: Tensor, rng: np.random.Generator) -> None:
        """Draw all scales, given the log likelihood of each trial's noise under each scale (scales, T); then the
        degrees of freedom, given the scales.
        """
        chosen = _draw(log_likelihood + LOG_PRIOR[self._degrees][:, None], rng)
        self.scale = SCALES[chosen]
        self._degrees = int(_draw(LOG_PRIOR[:, chosen].sum(dim=1, keepdim=True), rng))


def _draw(log_weights: Tensor, rng: np.random.Generator) -> Tensor:
    """A row for each column, with the probabilities that are given up to a factor (Gumbel's way)."""
    return (log_weights + torch.as_tensor(rng.gumbel(size=log_weights.shape))).argmax(dim=0)
