"""What is best in a study, and whether it beats the default."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t

from ramcore.cost import cost, pareto_front
from ramcore.space import Space
from study.display import accuracies, percent
from study.record import StudySettings, TrialRecord, best_trial
from study.search_space import configuration


class Outcome(NamedTuple):
    """The results of a study, for the screen and for MLflow."""

    best: TrialRecord  # see `conclude`
    ended: int  # trials that have ended
    against_default: str  # how it compares with the default, in words; empty where no default was trained
    front: tuple[TrialRecord, ...]  # see `pareto_trials`


def conclude(
    recorded: Iterable[TrialRecord], settings: StudySettings, held_out: Sequence[TrialRecord] = ()
) -> Outcome | None:
    """The results so far; None while no trial is complete.

    The best configuration is that of the highest mean validation accuracy over seeds, unless the same configuration is
    no better than the default in `held_out`, complete trials on other seeds: then it is the default.
    """
    recorded = list(recorded)
    trials = [trial for trial in recorded if trial.value is not None]
    best = best_trial(trials)
    if best is None:
        return None
    space, compared = Space.from_dict(settings.space), ""
    usual = configuration(space, space.default) if space.dimensions else None
    if (default := next((trial for trial in trials if trial.spec.config == usual), None)) is not None:
        best, compared = _against_default(best, default, trials, held_out)
    ended = sum(trial.ended is not None for trial in recorded)
    return Outcome(best, ended, compared, pareto_trials(trials))


def _against_default(
    best: TrialRecord, default: TrialRecord, trials: Sequence[TrialRecord], held_out: Sequence[TrialRecord]
) -> tuple[TrialRecord, str]:
    """The better one of a study's highest trial and its default, and how sure that is."""
    if best.spec.config == default.spec.config:
        return best, "nothing beats it" if len(trials) > 1 else ""
    again = {trial.spec.config: trial for trial in held_out}
    is_held_out = best.spec.config in again and default.spec.config in again
    if is_held_out:
        pair = [again[trial.spec.config] for trial in (best, default)]
        noise, tried, where = held_out, 1, "on held-out seeds"
    else:
        pair, noise, tried = [best, default], trials, len(trials) - 1
        where = f"the highest of {tried} others" if tried > 1 else "the only other one"
    low, ahead, high = _difference(*pair, noise=noise, tried=tried)
    if is_held_out and ahead <= 0:
        ours, theirs = (percent(accuracies(trial)) for trial in pair)
        return default, f"nothing beats it: on held-out seeds, trial {best.number:04d} has {ours}, the default {theirs}"
    points = f"{ahead:.2f} points ({low:.2f} to {high:.2f}, {where})"
    if math.isnan(low):
        return best, f"ahead by {ahead:.2f} points ({where}); one seed each cannot tell whether that is chance"
    return best, f"better by {points}" if low > 0 else f"nothing surely beats it; ahead by {points}"


def _difference(
    best: TrialRecord, default: TrialRecord, *, noise: Sequence[TrialRecord], tried: int
) -> tuple[float, float, float]:
    """Points of accuracy that `best` is ahead of `default`, as (low, mean, high) of a 90 % interval.

    The noise between seeds is that of all trials at least as good as the default together. The interval allows for the
    choice of the highest of `tried` trials (Bonferroni). NaN are its ends where each trial has one seed.
    """
    floor = default.value or 0.0
    groups = [100 * np.array(accuracies(trial)) for trial in noise if trial.value is not None and trial.value >= floor]
    ahead = 100 * float(np.mean(accuracies(best)) - np.mean(accuracies(default)))
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return math.nan, ahead, math.nan
    sd = math.sqrt(sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / freedom)
    error = sd * math.sqrt(1 / len(best.spec.seeds) + 1 / len(default.spec.seeds))
    half = error * float(t.ppf(1 - 0.05 / tried, freedom))
    return ahead - half, ahead, ahead + half


def pareto_trials(trials: list[TrialRecord]) -> tuple[TrialRecord, ...]:
    """Complete trials that are more accurate than every cheaper one; cheapest first."""
    complete = [(trial, trial.value) for trial in trials if trial.value is not None]
    front = pareto_front([cost(trial.spec.config).macs for trial, _ in complete], [value for _, value in complete])
    return tuple(complete[i][0] for i in front)
