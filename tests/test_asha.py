from __future__ import annotations

import numpy as np
import pytest

from study.asha import Halving, Ladder, default_halving


def test_rungs_lie_below_the_last_epoch():
    assert Halving(min_epochs=3, eta=3).rungs(30) == (3, 9, 27)
    assert Halving(min_epochs=1, eta=3).rungs(3) == (1,)
    assert Halving(min_epochs=1, eta=3).rungs(1) == ()
    assert default_halving(30).min_epochs == 3 and default_halving(2).min_epochs == 1


@pytest.mark.parametrize(
    ("value", "others", "stops"),
    [
        (0.1, [], False),  # the first at a rung has nobody to lose to
        (0.5, [0.4], False),
        (0.4, [0.5], True),
        (0.5, [0.9, 0.1, 0.2, 0.3, 0.4], False),  # second of six: a third goes on
        (0.3, [0.9, 0.5, 0.2, 0.1, 0.4], True),
        (0.5, [0.5, 0.5], False),  # equals do not beat each other
    ],
)
def test_the_best_third_goes_on(value, others, stops):
    assert Halving(eta=3).stops(value, others) is stops


def test_a_later_rung_holds_the_best_of_the_one_before():
    ladder = Ladder(Halving(min_epochs=1, eta=2), 5)  # rungs 1, 2, 4
    # Never-stopped trials 0 to 3: the better of them go on, as far as competing is concerned.
    assert [ladder.reach(n, 1, value) for n, value in enumerate((0.1, 0.4, 0.3, 0.2))] == [True, True, False, False]
    for n, value in enumerate((0.5, 0.8, 0.7, 0.6)):
        ladder.reach(n, 2, value)
    # 0.75 is second of five at epoch 2, but of those that halving would have left, 0.5 and 0.8, it must be the best.
    assert ladder.reach(4, 1, 0.5) and not ladder.reach(4, 2, 0.75)
    assert ladder.reach(5, 1, 0.6) and ladder.reach(5, 2, 0.9)


def test_a_trial_is_judged_once_at_a_rung():
    ladder = Ladder(Halving(min_epochs=1, eta=3), 5)
    assert ladder.reach(0, 1, 0.2)
    assert ladder.reach(1, 1, 0.9) and ladder.reach(2, 1, 0.8) is False
    assert ladder.reach(0, 1, 0.2), "told again after better ones came"


def test_most_of_an_optimisers_trials_stop_before_the_end():
    rng = np.random.default_rng(0)
    ladder = Ladder(Halving(min_epochs=3, eta=3), 30)
    ended = []
    for number in range(240):
        quality, stoppable = rng.normal(0.3 if number >= 80 else 0.0), number >= 80
        for rung in ladder.rungs:
            if not ladder.reach(number, rung, quality + rng.normal(scale=0.3)) and stoppable:
                ended.append(rung)
                break
        else:
            ended += [30] * stoppable
    assert ended.count(3) > 80 and 0 < ended.count(30) < 24  # a third at each of three rungs: 6 of 160, or some more
