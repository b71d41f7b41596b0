"""Our Shapley effects beside HyperSHAP's, on a function whose shares are known.

    pip install hypershap    # no dependency of this project
    python -m benchmarks.shapley

HyperSHAP's sensitivity game (Wever et al. 2025) asks how much accuracy varies when some parameters do and the others
stay at a baseline. Ours are averages over the whole space. The two are the same where interactions vanish at the
baseline, and then the exact shares follow by hand: each interaction is divided equally among its parameters.
"""

from __future__ import annotations

import numpy as np
from ConfigSpace import ConfigurationSpace, Float  # pyright: ignore[reportMissingImports]
from hypershap import ExplanationTask, HyperSHAP  # pyright: ignore[reportMissingImports]

from analysis.importance import analyse
from analysis.paper import markdown_table
from analysis.results import DUMMY
from analysis.text import span
from ramcore.space import Array
from tests.synthetic import Synthetic, simulate, unit_dimensions

SLOPES = (2.0, 1.2, 0.0, 0.6)  # logits over a range; the third parameter acts only together with the first
TOGETHER = 5.0  # of the product of the first and the third


def truth(x: Array, u: float) -> Array:
    """Logit accuracy at coordinates (N, 4), centred, so that the interaction vanishes at the middle."""
    z = x - 0.5
    return z @ np.array(SLOPES) + TOGETHER * z[:, 0] * z[:, 2] + 0 * u


def exact() -> Array:
    """Shares of the variance: of a slope a, a^2 / 12; of the product, c^2 / 144."""
    own, together = np.array(SLOPES) ** 2 / 12, TOGETHER**2 / 144
    own[[0, 2]] += together / 2
    return own / own.sum()


class _Exact:
    """The function itself, in place of HyperSHAP's random forest."""

    def predict(self, x: Array) -> Array:
        return truth(np.atleast_2d(x), 1.0)


def theirs(names: list[str]) -> list[float]:
    """HyperSHAP's shares."""
    space = ConfigurationSpace(space=[Float(name, (0.0, 1.0), default=0.5) for name in names])
    task = ExplanationTask.from_base_model(space, _Exact())
    found = HyperSHAP(task).sensitivity(index="SV", order=1, n_samples=10_000)
    values = np.array([found[(i,)] for i in range(len(names))])
    return list(values / values.sum())


def main() -> None:
    """Print the table."""
    dimensions = unit_dimensions(len(SLOPES))
    study = Synthetic(truth=truth, dimensions=dimensions, trials=54, epochs=4, trial_sd=0.05)
    shapley = {name: other.shapley for name, other in analyse(simulate(study)).other.items() if name != DUMMY}
    names = [d.name for d in dimensions]
    rows = zip(names, exact(), theirs(names), strict=True)
    cells = [(name, f"{known:.3f}", f"{their:.3f}", span(shapley[name], 3)) for name, known, their in rows]
    print(markdown_table(("parameter", "exact share", "HyperSHAP", "ours, from 54 trials"), cells))


if __name__ == "__main__":
    main()
