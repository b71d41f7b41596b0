"""The case study's claims, judged against thresholds that were fixed before any data were seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis.results import DUMMY, MIN_R2, Analysis, Interval, Value, interval, why_not_ranked
from ramcore.space import Array, words

SURE = 0.95  # posterior probability needed to confirm, and its complement to refute: the usual one in twenty
HARDLY = 2.0  # accuracy points: the case study calls changes of 0.5, 1.2 and 1.8 points "hardly"
TRIED = {  # the least and the largest value in the case study's table; for glimpses the two that surprised its authors
    "patch_size": (8, 20, "pixels"),
    "num_scales": (2, 4, "scales"),
    "num_glimpses": (6, 8, "glimpses"),
}

THRESHOLDS = {
    "SURE": (SURE, "probability needed to call a claim confirmed; one minus it, or less, refutes it"),
    "HARDLY": (
        HARDLY,
        "accuracy points over the whole searched range; more than that, and surely more than a parameter without"
        " effect reaches, is not 'hardly'",
    ),
    "MIN_R2": (MIN_R2, "R² on trials not seen, below which every claim stays undecided"),
}


class Margin(NamedTuple):
    """What decides a claim: a number that is above zero if the claim holds."""

    draws: Array  # (S,)
    parameter: str
    other: str = ""  # of a difference between total indices: the other parameter
    values: tuple[Value, ...] = ()  # of a change of accuracy: the two values


class Verdict(NamedTuple):
    """One claim, its verdict and the numbers behind it."""

    claim: str
    verdict: str  # confirmed, refuted or undecided
    probability: float | None  # posterior probability of the claim
    evidence: str
    estimate: Interval | None
    margin: Margin | None = None
    needs: str = ""  # what would settle it; see analysis.settling


def judge(analysis: Analysis) -> tuple[Verdict, ...]:
    """Those of the four claims whose parameters were varied, in the case study's order."""
    claims = (
        _patch_first(analysis),
        _hardly(analysis, "num_scales", "The number of scales hardly matters"),
        _hardly(analysis, "num_glimpses", "The number of glimpses hardly matters"),
        _more_glimpses(analysis),
    )
    return tuple(claim for claim in claims if claim is not None)


def _patch_first(analysis: Analysis) -> Verdict | None:
    claim = "Patch (retina) size matters most of patch size, number of scales and number of glimpses"
    if any(name not in analysis.draws for name in TRIED):
        return None
    patch, scales, glimpses = (analysis.draws[name].total for name in TRIED)
    probability = float(np.mean(patch > np.maximum(scales, glimpses)))
    evidence = (
        f"total Sobol index {interval(patch).mid:.2f} against {interval(scales).mid:.2f} (scales) and "
        f"{interval(glimpses).mid:.2f} (glimpses)"
    )
    first = analysis.ranking.effects[0].name
    if first != "patch_size":
        evidence += f"; of everything searched, {words(first)} has the largest index"
    evidence += _changes_text(analysis, list(TRIED))
    changes = [change for name in TRIED if (change := _change(analysis, name)) is not None]
    if len(changes) == len(TRIED):
        largest = float(np.mean(np.argmax(np.abs(changes), axis=0) == 0))
        evidence += f"; that of patch size is the largest with a probability of {largest:.0%}"
    rival = "num_scales" if scales.mean() > glimpses.mean() else "num_glimpses"
    margin = Margin(patch - analysis.draws[rival].total, "patch_size", other=rival)
    return _decide(analysis, claim, probability, evidence, interval(patch), margin)


def _hardly(analysis: Analysis, name: str, claim: str) -> Verdict | None:
    if name not in analysis.draws:
        return None
    effect, dummy = analysis.draws[name].effect, analysis.draws[DUMMY].effect
    found = interval(effect)
    dimension = next(d for d in analysis.data.dimensions if d.name == name)
    evidence = (
        f"from its worst to its best value of {dimension.low:g} to {dimension.high:g} mean accuracy changes by "
        f"{found.mid:.1f} points ({found.low:.1f} to {found.high:.1f}); 'hardly' means at most {HARDLY:g}"
    )
    probability = float(np.mean(np.abs(effect) <= HARDLY))
    above_dummy = float(np.mean(np.abs(effect) > np.abs(dummy)))
    like_dummy = probability <= 1 - SURE and above_dummy < SURE
    if like_dummy:
        evidence += f"; a parameter without effect reaches as much with a probability of {1 - above_dummy:.0%}"
    values = sorted(analysis.draws[name].marginal, key=lambda value: analysis.draws[name].marginal[value].mean())
    margin = Margin(HARDLY - np.abs(effect), name, values=tuple(values[:1] + values[-1:]))
    verdict = _decide(analysis, claim, probability, evidence + _changes_text(analysis, [name]), found, margin)
    return verdict._replace(verdict="undecided") if like_dummy else verdict


def _more_glimpses(analysis: Analysis) -> Verdict | None:
    few, many, _ = TRIED["num_glimpses"]
    claim = f"{many} glimpses are worse than {few}"
    change = _change(analysis, "num_glimpses")
    if change is None:
        return None
    evidence = f"mean accuracy changes by {_change_text('num_glimpses', change)}"
    margin = Margin(-change, "num_glimpses", values=(few, many))
    return _decide(analysis, claim, float(np.mean(change < 0)), evidence, interval(change), margin)


def _decide(
    analysis: Analysis, claim: str, probability: float, evidence: str, estimate: Interval, margin: Margin
) -> Verdict:
    if not analysis.ranked:
        return Verdict(claim, "undecided", None, why_not_ranked(analysis), None)
    verdict = "confirmed" if probability >= SURE else "refuted" if probability <= 1 - SURE else "undecided"
    return Verdict(claim, verdict, probability, evidence, estimate, margin)


def _change(analysis: Analysis, name: str) -> Array | None:
    """Draws of the change in mean accuracy (points) from the case study's lower to its higher value; None if one of
    them was not searched.
    """
    low, high, _ = TRIED[name]
    marginal = analysis.draws[name].marginal if name in analysis.draws else {}
    return marginal[high] - marginal[low] if low in marginal and high in marginal else None


def _change_text(name: str, change: Array) -> str:
    found, (low, high, noun) = interval(change), TRIED[name]
    return f"{found.mid:+.1f} points ({found.low:+.1f} to {found.high:+.1f}) from {low} to {high} {noun}"


def _changes_text(analysis: Analysis, names: Sequence[str]) -> str:
    """The changes over the case study's own values, to append to the evidence; empty if none was searched."""
    changes = [_change_text(name, change) for name in names if (change := _change(analysis, name)) is not None]
    return f"; of what the case study tried, mean accuracy changes by {', '.join(changes)}" if changes else ""
