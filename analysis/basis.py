"""Basis functions of one dimension, from which the components of the surface are built."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ramcore.space import Array, Dimension

MAIN = 14  # functions of a dimension, at most
LENGTH = 0.5  # length scale of the Matérn kernel, in unit coordinates
LINEAR = 6.0  # prior variance of the slope; without it straight lines are flattened towards their ends


class Basis(NamedTuple):
    """M orthonormal mean-zero functions of one dimension, and the prior variance each has at roughness 1.

    They are the eigenfunctions of a centred kernel, Matérn 5/2 and a straight line, under the dimension's own
    distribution (uniform, or its levels as often as they are sampled), so no shape is imposed: the first is a line but
    for its ends, the second nearly a parabola, and so on.
    """

    dimension: Dimension
    nodes: Array  # (Q,) unit coordinates
    spread: Array  # (Q, M): node weights times functions over their eigenvalues
    centre: Array  # (Q,) node weights
    variances: Array  # (M,)

    def __call__(self, x: Array) -> Array:
        """Functions at coordinates (N,) -> (N, M)."""
        kernel = _kernel(self.dimension, x, self.nodes)
        mean = _kernel(self.dimension, self.nodes, self.nodes) @ self.centre
        centred = kernel - (kernel @ self.centre)[:, None] * mean[None, :] / float(self.centre @ mean)
        return centred @ self.spread


def basis(dimension: Dimension) -> Basis:
    """The functions of a dimension: as many as its levels allow, MAIN at most."""
    if dimension.levels:
        nodes, weights = dimension.grid(), dimension.level_weights
    else:
        points, weights = np.polynomial.legendre.leggauss(64)
        nodes, weights = (points + 1) / 2, weights / 2
    kernel = _kernel(dimension, nodes, nodes)
    mean = kernel @ weights
    centred = kernel - np.outer(mean, mean) / float(weights @ mean)
    root = np.sqrt(weights)
    values, vectors = np.linalg.eigh(root[:, None] * centred * root[None, :])
    keep = min(MAIN, len(nodes) - 1)
    values, vectors = values[::-1][:keep], vectors[:, ::-1][:, :keep]
    vectors = vectors * np.where(vectors[-1] < 0, -1.0, 1.0)  # a sign convention: results do not depend on the library
    spread = (root[:, None] * vectors) / values[None, :]
    return Basis(dimension, nodes, spread, weights, values / values.sum())


def _kernel(dimension: Dimension, x: Array, nodes: Array) -> Array:
    distance = np.abs(x[:, None] - nodes[None, :])
    if dimension.type == "categorical":
        return (distance < 1e-9).astype(float)
    scaled = math.sqrt(5) * distance / LENGTH
    line = LINEAR * (x[:, None] - 0.5) * (nodes[None, :] - 0.5)
    return (1 + scaled + scaled**2 / 3) * np.exp(-scaled) + line
