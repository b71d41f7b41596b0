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
from study.record import OPTUNA_STATE, Record, TakenOver, distributions

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
        self._taken = record.taken  # trials of an earlier study, until the first suggestion

    def suggest(self, number: int) -> Values:
        """The point for a trial number: the first feasible one of 20 samples, else the last one, clamped."""
        self._follow_record()
        if self._taken is not None:
            self._learn_from(self._taken)
            self._taken = None
        seed = int(np.random.SeedSequence((self._record.settings.seed, number)).generate_state(1)[0])
        # constant_liar: running trials count as bad, so parallel suggestions spread.
        sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=0)
        values: Values = {}
        for _ in range(_RESAMPLES):
            values = sampler.sample_relative(self._study, self._coming, self._distributions)
            if self._space.feasible(values):
                return values
        return self._space.clamped(values)

    def _learn_from(self, taken: TakenOver) -> None:
        """Add the trials of an earlier study.

        If its trials had another number of epochs, accuracies of the two studies do not compare, but ranks do: a
        complete trial gets the accuracy at its own quantile among this study's complete trials that TPE did not choose.
        """
        same = taken.epochs == self._record.settings.epochs
        trials = [trial for trial in taken.trials if same or trial.state == "complete"]
        there = sorted(trial.accuracy[-1] for trial in trials)
        others = (trial for trial in self._record.trials.values() if trial.spec.origin != "tpe")
        here = [trial.value for trial in others if trial.value is not None]
        for trial in trials if same or here else ():
            value = trial.accuracy[-1]
            if not same:
                value = float(np.quantile(here, there.index(value) / max(len(there) - 1, 1)))
            complete = trial.state == "complete"
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=OPTUNA_STATE["complete" if complete else "pruned"],
                    params=trial.values,
                    distributions=self._distributions,
                    value=value if complete else None,
                    intermediate_values={} if complete else dict(enumerate(trial.accuracy, start=1)),
                )
            )

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
