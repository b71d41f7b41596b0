"""Asynchronous successive halving over epochs, as a pure function of what the record holds.

Nothing here has state of its own, so early stopping survives whatever the record survives.
Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020 (the "stopping" variant, in
    which a trial is judged once a rung, against all that have reached it).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Halving:
    """At the rungs min_epochs * eta**k below the full number of epochs, the best 1/eta of the trials go on."""

    min_epochs: int = 1  # the first rung, epochs
    eta: int = 3  # one in eta goes on

    def rungs(self, epochs: int) -> tuple[int, ...]:
        """The epochs after which a trial is judged, below `epochs`."""
        rungs: list[int] = []
        rung = self.min_epochs
        while rung < epochs:
            rungs.append(rung)
            rung *= self.eta
        return tuple(rungs)

    def stops(self, value: float, others: Collection[float]) -> bool:
        """Whether a trial with `value` at a rung is stopped, given the values of all others that have reached it.

        The trial goes on if it is among the best 1/eta of them and itself (at least one goes on). Trials that are never
        stopped count among the others: they are competitors too.
        """
        keep = max(1, (len(others) + 1) // self.eta)
        better = sum(other > value for other in others)
        return better >= keep


def default_halving(epochs: int) -> Halving:
    """The first rung is at a tenth of the epochs: earlier, RAM's curves say little about where they end."""
    return Halving(min_epochs=max(1, round(epochs / 10)))
