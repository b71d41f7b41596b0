"""ASHA: asynchronous successive halving over epochs, as a pure function of the recorded epochs and their order in time.

Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020 (the "stopping" variant, in
    which a trial is judged once a rung, against all that have reached it).
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count, takewhile


class ASHA:
    """At each rung (min_epochs * eta**k, below the full number of epochs), the best 1/eta of the trials go on.

    A trial is judged once at a rung, against those that reached it before. Trials that are never stopped compete too,
    but at a later rung only if they would have gone on at the one before. Otherwise a later rung would hold all trials
    and not the best ones, and hardly any trial would be stopped there.
    """

    def __init__(self, epochs: int, *, min_epochs: int | None = None, eta: int = 3) -> None:
        """For trials that have `epochs` epochs unless they are stopped.

        The first rung, `min_epochs`, is a tenth of the epochs by default: before that, RAM's accuracy says little about
        the final one. `eta` is the reduction factor.
        """
        self.eta = eta
        first = max(1, round(epochs / 10)) if min_epochs is None else min_epochs
        self.rungs = tuple(takewhile(lambda rung: rung < epochs, (first * eta**k for k in count())))
        self._values: dict[int, list[float]] = {rung: [] for rung in self.rungs}  # of the trials that compete there
        self._goes_on: dict[tuple[int, int], bool] = {}  # by (rung, trial number)

    def reach(self, number: int, rung: int, value: float) -> bool:
        """Enter a trial's accuracy at a rung. Returns whether the trial goes on; a repeated call returns the same."""
        if (rung, number) in self._goes_on:
            return self._goes_on[rung, number]
        before = self.rungs.index(rung) - 1
        competes = before < 0 or self._goes_on.get((self.rungs[before], number), False)
        goes_on = competes and not self.stops(value, self._values[rung])
        if competes:
            self._values[rung].append(value)
        self._goes_on[rung, number] = goes_on
        return goes_on

    def stops(self, value: float, others: Collection[float]) -> bool:
        """Whether a trial is stopped, given its accuracy at a rung and those of all others that reached the rung.

        It goes on if it is among the best 1/eta of all; at least one goes on.
        """
        keep = max(1, (len(others) + 1) // self.eta)
        return sum(other > value for other in others) >= keep
