"""The case study's claims, judged against thresholds fixed before any data were seen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from analysis.importance import DUMMY, MIN_R2, Analysis, Interval, interval, why_not_ranked
from ramcore.space import Array

SURE = 0.95  # posterior probability needed to confirm, and its complement to refute: the usual one-in-twenty
HARDLY = (
    2.0  # accuracy points; the case study calls changes of 0.5, 1.2 and 1.8 points "hardly", so 2 is its own measure
)
TRIED = {  # the least and the largest value in the case study's table; its surprise is about these numbers of glimpses
    "patch_size": (8, 20),
    "num_scales": (2, 4),
    "num_glimpses": (6, 8),
}

THRESHOLDS = {
    "SURE": (SURE, "posterior probability needed to call a claim confirmed; 1 - SURE or less refutes it"),
    "HARDLY": (
        HARDLY,
        "accuracy points over the whole searched range; more than that, and surely more than a parameter without"
        " effect reaches, is not 'hardly'",
    ),
    "MIN_R2": (MIN_R2, "grouped cross-validated R2 below which every claim stays undecided"),
}
NOUN = {"patch_size": "pixels", "num_scales": "scales", "num_glimpses": "glimpses"}


class Verdict(NamedTuple):
    """One claim, what the data say of it and the numbers behind."""

    claim: str
    verdict: str  # confirmed, refuted, undecided or not tested
    probability: float | None  # posterior probability of the claim
    evidence: str
    estimate: Interval | None


def judge(analysis: Analysis) -> tuple[Verdict, ...]:
    """All four claims, in the case study's order."""
    return (
        _patch_first(analysis),
        _hardly(analysis, "num_scales", "The number of scales hardly matters"),
        _hardly(analysis, "num_glimpses", "The number of glimpses hardly matters"),
        _more_glimpses(analysis),
    )


def _decide(analysis: Analysis, claim: str, probability: float, evidence: str, estimate: Interval | None) -> Verdict:
    if not analysis.ranked:
        return Verdict(claim, "undecided", None, why_not_ranked(analysis), None)
    verdict = "confirmed" if probability >= SURE else "refuted" if probability <= 1 - SURE else "undecided"
    return Verdict(claim, verdict, probability, evidence, estimate)


def _untested(claim: str, names: list[str]) -> Verdict:
    return Verdict(claim, "not tested", None, f"this study did not vary {' or '.join(names)}", None)


def _patch_first(analysis: Analysis) -> Verdict:
    claim = "Patch (retina) size matters most of patch size, number of scales and number of glimpses"
    names = ["patch_size", "num_scales", "num_glimpses"]
    missing = [n for n in names if f"total {n}" not in analysis.claims]
    if missing:
        return _untested(claim, missing)
    patch, scales, glimpses = (analysis.claims[f"total {n}"] for n in names)
    probability = float(np.mean(patch > np.maximum(scales, glimpses)))
    first = analysis.effects[0].name
    also = "" if first == "patch_size" else f"; of everything searched, {first} has the largest index"
    evidence = (
        f"total Sobol index {interval(patch).mid:.2f} against {interval(scales).mid:.2f} (scales) and "
        f"{interval(glimpses).mid:.2f} (glimpses){also}"
    )
    evidence += _tried(analysis, names)
    steps = [step for name in names if (step := _step(analysis, name)) is not None]
    if len(steps) == len(names):
        likely = float(np.mean(np.argmax(np.abs(steps), axis=0) == 0))
        evidence += f"; that of patch_size is the largest with a probability of {likely:.0%}"
    return _decide(analysis, claim, probability, evidence, interval(patch))


def _hardly(analysis: Analysis, name: str, claim: str) -> Verdict:
    key = f"effect {name}"
    if key not in analysis.claims:
        return _untested(claim, [name])
    draws = analysis.claims[key]
    span = interval(draws)
    dimension = next(d for d in analysis.dimensions if d.name == name)
    evidence = (
        f"from its worst to its best value of {dimension.low:g} to {dimension.high:g} mean accuracy changes by "
        f"{span.mid:.1f} points ({span.low:.1f} to {span.high:.1f}); 'hardly' means at most {HARDLY:g}"
    )
    probability = float(np.mean(np.abs(draws) <= HARDLY))
    above = float(np.mean(np.abs(draws) > np.abs(analysis.claims[f"effect {DUMMY}"])))
    like_dummy = probability <= 1 - SURE and above < SURE
    if like_dummy:
        evidence += f"; a parameter without effect reaches as much with a probability of {1 - above:.0%}"
    verdict = _decide(analysis, claim, probability, evidence + _tried(analysis, [name]), span)
    return verdict._replace(verdict="undecided") if like_dummy else verdict


def _more_glimpses(analysis: Analysis) -> Verdict:
    few, many = TRIED["num_glimpses"]
    claim = f"{many} glimpses are worse than {few}"
    change = _step(analysis, "num_glimpses")
    if change is None:
        return _untested(claim, [f"num_glimpses over {few} and {many}"])
    evidence = f"mean accuracy changes by {_said('num_glimpses', change)}"
    return _decide(analysis, claim, float(np.mean(change < 0)), evidence, interval(change))


def _step(analysis: Analysis, name: str) -> Array | None:
    """Draws of the change in mean accuracy (points) over the case study's own values; None where not searched."""
    low, high = (f"marginal {name} {value}" for value in TRIED[name])
    return analysis.claims[high] - analysis.claims[low] if low in analysis.claims and high in analysis.claims else None


def _tried(analysis: Analysis, names: list[str]) -> str:
    """What goes after the evidence of a claim over the whole range; nothing where no such value was searched."""
    steps = [_said(name, step) for name in names if (step := _step(analysis, name)) is not None]
    return f"; of what the case study tried, mean accuracy changes by {', '.join(steps)}" if steps else ""


def _said(name: str, step: Array) -> str:
    span, (low, high) = interval(step), TRIED[name]
    return f"{span.mid:+.1f} points ({span.low:+.1f} to {span.high:+.1f}) from {low} to {high} {NOUN[name]}"
