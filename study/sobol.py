"""Scrambled Sobol points of a search space, and which trial of a search gets which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import qmc

from ramcore.space import Space, Values


def fixed_point(
    origins: Sequence[str],
    number: int,
    first: Sequence[tuple[str, Values]],
    asked: Sequence[tuple[str, Values]],
    sobol: SobolSequence,
) -> tuple[str, Values | None]:
    """(row, values) of a search's trial by its number; None for values that the trials before it decide.

    origins: of all trials; first: the published points; asked: those of --try; sobol: the space's sequence.
    """
    origin = origins[number]
    index = origins[:number].count(origin)  # among the trials of the same origin
    if origin in ("published", "asked"):
        return (first if origin == "published" else asked)[index]
    return "", sobol[index] if origin == "sobol" else None


class SobolSequence:
    """The feasible points of a scrambled Sobol sequence. The same space and seed always give the same points.

    Source: Owen, "Scrambling Sobol' and Niederreiter-Xing points", Journal of Complexity 1998, by scipy.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed
        self._log2 = 5  # of the number of points drawn
        self._points: list[Values] = []

    def __getitem__(self, index: int) -> Values:
        """The point of an index from 0."""
        while len(self._points) <= index:
            self._log2 += 1
            sampler = qmc.Sobol(len(self._space.dimensions), scramble=True, rng=np.random.default_rng(self._seed))
            self._points = []  # a longer sequence begins with the shorter one
            for row in sampler.random_base2(self._log2):
                pairs = zip(self._space.dimensions, row, strict=True)
                point = {dimension.name: dimension.sample(float(u)) for dimension, u in pairs}
                if self._space.feasible(point):
                    self._points.append(point)
        return dict(self._points[index])
