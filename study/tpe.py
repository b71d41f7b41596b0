"""Optuna's TPE as a function of the record and a trial number, restricted to feasible points.

Usually Optuna creates a trial first and stores one parameter after another, so a crash leaves trials without a
configuration. Here the point comes first, and the record enters the trial whole. The sampler is seeded by the trial's
number, so a study that was killed and continued gets the suggestions that it would have got.
"""

from __future__ import annotations

import math

import numpy as np
import optuna
from optuna.samplers import RandomSampler, TPESampler

from ramcore.space import Space, Values
from study.record import OPTUNA_STATE, Record, distributions

_RESAMPLES = 20  # tries for a feasible point before the last one is clamped


class FeasibleTPE:
    """Suggests points of a space.

    TPE reads the trials from an in-memory Optuna study that follows the record. Reading them from the database would
    take longer than sampling. The first trial of that study is no trial of the record: Optuna's sampler needs a trial
    to suggest for, and leaves that one out of what it learns from.
    """

    def __init__(self, record: Record, space: Space) -> None:
        self._record, self._space = record, space
        self._distributions = distributions(space)
        self._study = optuna.create_study(direction="maximize", sampler=RandomSampler())
        self._study.ask()
        self._coming = self._study.get_trials(deepcopy=False)[0]
        self._copied = 0  # trials of the record that are in the in-memory study
        self._running: dict[int, optuna.Trial] = {}  # those that have not ended there, by number

    def suggest(self, number: int) -> Values:
        """The point for a trial number: the first feasible one of 20 samples, else the last one, clamped."""
        self._follow_record()
        seed = int(np.random.SeedSequence((self._record.settings.seed, number)).generate_state(1)[0])
        # constant_liar: running trials count as bad, so parallel suggestions spread.
        sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=0)
        values: Values = {}
        for _ in range(_RESAMPLES):
            values = sampler.sample_relative(self._study, self._coming, self._distributions)
            if self._space.feasible(values):
                return values
        return self._space.clamped(values)

    def _follow_record(self) -> None:
        """Bring the in-memory study up to the record."""
        for number in range(self._copied, len(self._record.trials)):
            config = self._record.trials[number].spec.config
            self._study.enqueue_trial({name: getattr(config, name) for name in self._distributions})
            self._running[number] = self._study.ask(self._distributions)
            self._copied += 1
        for number in [n for n in self._running if self._record.trials[n].state != "running"]:
            trial, copy = self._record.trials[number], self._running.pop(number)
            for epoch, entry in enumerate(trial.epochs, start=1):
                if math.isfinite(entry.value):
                    copy.report(entry.value, epoch)
            self._study.tell(copy, trial.value, state=OPTUNA_STATE[trial.state])
