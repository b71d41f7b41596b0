"""How many more trials would settle a claim."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from analysis.importance import Fit, conclude, fit_study
from analysis.settling import Outlook, gradient, possible_kinds, settle
from analysis.verdicts import Margin, Verdict, judge
from tests.synthetic import RAM_DIMENSIONS, Synthetic, simulate

pytestmark = pytest.mark.usefixtures("quick_fits")

STUDY = Synthetic(
    truth=lambda x, u: 1.2 * x[:, 1] + 0.25 * x[:, 0] + 0.9 * np.sin(5 * x[:, 2]) + u,
    dimensions=RAM_DIMENSIONS[:3], trials=14, epochs=3, trial_sd=0.35, epoch_sd=0.02,
)  # fmt: skip


def judged(trials: int) -> tuple[Fit, tuple[Verdict, ...]]:
    records = simulate(dataclasses.replace(STUDY, trials=trials))
    fitted = fit_study(records, hyperdraws=60)
    return fitted, judge(conclude(records, fitted)._replace(ranked=True))


@pytest.fixture(scope="module")
def few() -> tuple[Fit, tuple[Verdict, ...]]:
    return judged(14)


def margin_of(verdicts: tuple[Verdict, ...]) -> Margin:
    """That of "8 glimpses are worse than 6"."""
    assert verdicts[-1].margin is not None
    return verdicts[-1].margin


def test_gradient_is_the_derivative_of_what_decides_the_claim(few: tuple[Fit, tuple[Verdict, ...]]):
    fitted, verdicts = few
    first = verdicts[0].margin
    assert first is not None and first.other
    names = [d.name for d in fitted.selection.data.dimensions]
    i, j = names.index(first.parameter), names.index(first.other)
    weights, member = fitted.predictor.weights[:, 0], fitted.surface.member.T

    def difference(w: np.ndarray) -> float:
        return float((member[i] - member[j]) @ w**2 / (w**2).sum())

    step = 1e-6 * np.random.default_rng(0).standard_normal(len(weights))
    moved = difference(weights + step) - difference(weights - step)
    assert gradient(fitted, first, 0) @ (2 * step) == pytest.approx(moved, rel=1e-3)


def test_what_more_trials_leave_is_what_they_leave(few: tuple[Fit, tuple[Verdict, ...]]):
    fitted, verdicts = few
    margin, kind = margin_of(verdicts), possible_kinds(fitted)[1]
    assert "Sobol trials of 2 seeds" in kind.about and kind.runs(10) == 20
    outlook = Outlook(fitted, margin)
    expected = [np.sqrt(outlook.after(kind, more)) for more in (1, 14, 42, 100)]
    assert expected == sorted(expected, reverse=True) and expected[0] < margin.draws.std()
    truly = margin_of(judged(56)[1]).draws.std()
    assert truly < expected[2] < 2 * truly, "hyperparameters that so few trials do not tell count as unknown"
    assert expected[2] < 0.75 * margin.draws.std()


def test_an_undecided_claim_says_what_would_settle_it_and_others_do_not(few: tuple[Fit, tuple[Verdict, ...]]):
    fitted, verdicts = few
    settled = settle(fitted, verdicts)
    for before, now in zip(verdicts, settled, strict=True):
        assert now._replace(needs="") == before
        assert bool(now.needs) == (before.verdict == "undecided")
    undecided = [v for v in settled if v.verdict == "undecided"]
    assert undecided, "the study is too small to decide all claims"
    assert any("would probably settle it" in v.needs or v.needs.startswith("Not even") for v in undecided)


def test_claim_far_from_its_threshold_needs_fewer_trials_than_one_near_it(few: tuple[Fit, tuple[Verdict, ...]]):
    fitted, verdicts = few
    margin, kind = margin_of(verdicts), possible_kinds(fitted)[1]._replace(numbers=(7, 14, 28, 56, 112, 224, 448))
    centred = margin.draws - margin.draws.mean()

    def needed(distance: float) -> float:
        moved = margin._replace(draws=centred + distance * centred.std())
        return Outlook(fitted, moved).number_needed(kind) or np.inf

    assert needed(1.6) < needed(1.2) <= needed(0.0)
