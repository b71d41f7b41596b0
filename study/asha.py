"""Asynchronous successive halving over epochs, as a pure function of what the record holds.

What is judged, and against whom, follows from the record's epochs and their order in time, so early stopping survives
whatever the record survives.
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

        The trial goes on if it is among the best 1/eta of them and itself (at least one goes on).
        """
        keep = max(1, (len(others) + 1) // self.eta)
        better = sum(other > value for other in others)
        return better >= keep


class Ladder:
    """The rungs as trials reach them.

    A trial is judged once at a rung, against those that came to it before. Trials that are never stopped compete too,
    but at a later rung only if they would have gone on at the one before: else a rung would hold the whole sample and
    not its best, and hardly anybody would be stopped there.
    """

    def __init__(self, halving: Halving, epochs: int) -> None:
        self.rungs = halving.rungs(epochs)
        self._halving = halving
        self._values: dict[int, list[float]] = {rung: [] for rung in self.rungs}
        self._goes_on: dict[tuple[int, int], bool] = {}  # (rung, trial's number)

    def reach(self, number: int, rung: int, value: float) -> bool:
        """A trial comes to a rung with an accuracy; returns whether it goes on, the same however often it is told."""
        if (rung, number) in self._goes_on:
            return self._goes_on[rung, number]
        before = self.rungs.index(rung) - 1
        competes = before < 0 or self._goes_on.get((self.rungs[before], number), False)
        goes_on = not self._halving.stops(value, self._values[rung])
        if competes:
            self._values[rung].append(value)
        self._goes_on[rung, number] = goes_on and competes
        return self._goes_on[rung, number]


def default_halving(epochs: int) -> Halving:
    """The first rung is at a tenth of the epochs: earlier, RAM's curves say little about where they end."""
    return Halving(min_epochs=max(1, round(epochs / 10)))
