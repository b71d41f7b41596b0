"""What a study answers, in a few sentences, and what limits the answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from analysis.results import DUMMY, MIN_R2, SETTLED, TIE, Analysis, Effect, why_not_ranked
from analysis.text import join, percent, span
from analysis.verdicts import Verdict
from ramcore.space import words

FEW = 0.05  # of the runs: on truths with more that do not train see results/benchmarks/sensitivity-holds.md


def answer(analysis: Analysis, verdicts: Sequence[Verdict]) -> list[str]:
    """The study's answer in three sentences."""
    counts = analysis.data.counts
    own = counts.used - sum(analysis.data.others.values())
    runs = f"{own} trials with {counts.seeds} seed{'s' if counts.seeds > 1 else ''} each"
    if analysis.data.others:
        runs += f" and {counts.used - own} of {join(analysis.data.others)}"
    if not analysis.ranked:
        return _no_ranking(analysis, runs)
    return [_what_matters_most(analysis), _what_else(analysis), _claims(analysis, verdicts, runs)]


def _no_ranking(analysis: Analysis, runs: str) -> list[str]:
    fit = analysis.trust.fit
    help_ = "What would help: more trials spread over the whole space."
    if analysis.trust.trials_needed:
        help_ += f" About {analysis.trust.trials_needed} trials in all would probably do."
    if fit.ceiling < MIN_R2:
        help_ += " Seed noise alone hides most differences: more seeds per trial would help more than more trials."
    best = span(analysis.configurations.best_accuracy)
    return [
        f"These {runs} do not support a ranking: {why_not_ranked(analysis)}.",
        help_,
        f"The best configuration tried is expected to reach {best} points of validation accuracy.",
    ]


def _apart(effect: Effect) -> bool:
    """Whether the parameter can be told apart from one without any effect."""
    return effect.above_dummy >= TIE[1]


def _what_matters_most(analysis: Analysis) -> str:
    first = [e for e in analysis.ranking.effects if e.rank == 1]
    leader = first[0]
    if not _apart(leader):
        return "On these data no parameter can be told apart from one without any effect."
    if len(first) == 1:
        points, sds = span(leader.effect), leader.effect_in_sd.mid
        return (
            f"On these data {words(leader.name)} matters most: averaged over everything else it moves validation "
            f"accuracy by {points} points, {sds:.1f} times the standard deviation between seeds{_parts(leader)}."
        )
    return (
        f"On these data {join(words(e.name) for e in first)} matter most and cannot be told apart; their effects are "
        f"{join(f'{e.effect.mid:.1f}' for e in first)} accuracy points."
    )


def _parts(effect: Effect) -> str:
    """How much of an effect is that runs do not train at all; empty if that is little."""
    if effect.training is None or effect.training.low < 2:
        return ""
    return (
        f": it moves the chance that a run trains at all by {effect.training.mid:.0f} percentage points, and the "
        f"accuracy of those that do by {effect.trained.mid:.1f}"
    )


def _what_else(analysis: Analysis) -> str:
    """The parameters after the first, by how sure their effect is."""

    def listed(effects: Iterable[Effect]) -> str:
        return join(f"{words(e.name)} ({e.effect.mid:.1f} points)" for e in effects)

    effects = [e for e in analysis.ranking.effects if e.name != DUMMY]
    leader = next(e for e in effects if e.rank == 1)
    others = [e for e in effects if _apart(e) and e.rank != 1]
    parts: list[str] = []
    if clear := [e for e in others if e.effect_in_sd.low > 1]:
        parts.append(f"also larger than seed noise: {listed(clear)}")
    if small := [e for e in others if e.effect_in_sd.low <= 1]:
        parts.append(f"an effect, but not surely more than one seed standard deviation: {listed(small)}")
    if (inert := [e for e in effects if not _apart(e)]) and _apart(leader):
        parts.append(f"not told apart from a parameter without any effect: {join(words(e.name) for e in inert)}")
    sentence = "; ".join(parts) or "nothing else was varied"
    return sentence[0].upper() + sentence[1:] + "."


def _claims(analysis: Analysis, verdicts: Sequence[Verdict], runs: str) -> str:
    kinds = [v.verdict for v in verdicts]
    counted = [f"{kinds.count(k)} {k}" for k in ("confirmed", "refuted", "undecided") if k in kinds]
    of = "four claims," if len(kinds) == 4 else f"four claims, {len(kinds)} can be judged:"
    biased = "; a biased sample, see below" if analysis.data.biased else ""
    rest = f"{runs}; unseen trials are predicted with R² = {analysis.trust.fit.r2:.2f}{biased}"
    return f"Of the case study's {of} {join(counted)} on these data ({rest})." if kinds else f"This rests on {rest}."


def cautions(analysis: Analysis) -> list[str]:
    """What a reader has to know before the numbers."""
    trust = analysis.trust
    found: list[str] = []
    if trust.rhat > SETTLED:
        found.append(
            f"Intervals are too narrow to trust: the sampler has not converged (R-hat {trust.rhat:.2f}; {SETTLED:g} is "
            "the most that counts as converged)."
        )
    if not analysis.ranked:
        found.append(f"No ranking: {why_not_ranked(analysis)}. The figures show what can be said so far, not an order.")
    if analysis.data.biased:
        found.append(
            "Biased sample: the optimiser chose most trials, so they crowd where accuracy was already high. Elsewhere "
            "the effects rest on the model and the ranking may be wrong. Space-filling (Sobol) trials would settle it."
        )
    if trust.fit.coverage < 0.75:
        inside = percent(trust.fit.coverage)
        found.append(f"Intervals may be too narrow: only {inside} of unseen results fell inside their 90% intervals.")
    if trust.extrapolation_share > 0.25:
        share = percent(trust.extrapolation_share)
        found.append(f"Over {share} of the space the surface says little beyond the average: too few trials lie near.")
    untrained, runs = analysis.data.untrained
    if untrained > FEW * runs:
        found.append(
            f"{untrained} of {runs} runs did not train. On made-up studies with such runs 90% intervals of total "
            "indices held the truth in 84 and 91% of the cases."
        )
    if not trust.seed_sd_measured:
        found.append("One seed a trial: seed noise could not be measured and is the model's own estimate.")
    return found + list(analysis.data.warnings)


def rank_label(effect: Effect, analysis: Analysis) -> str:
    """A parameter's rank, marked where it is shared; "-" for the dummy and where nothing is ranked."""
    if effect.name == DUMMY or not analysis.ranked:
        return "-"
    tied = sum(e.rank == effect.rank for e in analysis.ranking.effects) > 1
    return f"{effect.rank} (tied)" if tied else str(effect.rank)
