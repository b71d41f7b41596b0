from __future__ import annotations

import numpy as np
import pytest

from study.asha import ASHA


def test_rungs_lie_below_last_epoch():
    assert ASHA(30, min_epochs=3, eta=3).rungs == (3, 9, 27)
    assert ASHA(3, min_epochs=1, eta=3).rungs == (1,)
    assert ASHA(1, min_epochs=1, eta=3).rungs == ()
    assert ASHA(30).rungs[0] == 3 and ASHA(2).rungs == (1,)


@pytest.mark.parametrize(
    ("value", "others", "stops"),
    [
        (0.1, [], False),  # the first at a rung has no competitor
        (0.5, [0.4], False),
        (0.4, [0.5], True),
        (0.5, [0.9, 0.1, 0.2, 0.3, 0.4], False),  # second of six: a third goes on
        (0.3, [0.9, 0.5, 0.2, 0.1, 0.4], True),
        (0.5, [0.5, 0.5], False),  # equals do not beat each other
    ],
)
def test_trial_outside_best_third_is_stopped(value, others, stops):
    assert ASHA(30, eta=3).stops(value, others) is stops


def test_later_rung_holds_only_the_best_of_the_rung_before():
    asha = ASHA(5, min_epochs=1, eta=2)  # rungs 1, 2, 4
    # Trials 0 to 3 are never stopped. The better of them compete at the next rung.
    assert [asha.reach(n, 1, value) for n, value in enumerate((0.1, 0.4, 0.3, 0.2))] == [True, True, False, False]
    for n, value in enumerate((0.5, 0.8, 0.7, 0.6)):
        asha.reach(n, 2, value)
    # 0.75 is second of five at epoch 2, but second of three among those that compete there, 0.5 and 0.8.
    assert asha.reach(4, 1, 0.5) and not asha.reach(4, 2, 0.75)
    assert asha.reach(5, 1, 0.6) and asha.reach(5, 2, 0.9)


def test_trial_is_judged_once_at_a_rung():
    asha = ASHA(5, min_epochs=1, eta=3)
    assert asha.reach(0, 1, 0.2)
    assert asha.reach(1, 1, 0.9) and asha.reach(2, 1, 0.8) is False
    assert asha.reach(0, 1, 0.2), "reported again after better trials came"


def test_most_tpe_trials_stop_before_the_last_epoch():
    rng = np.random.default_rng(0)
    asha = ASHA(30, min_epochs=3, eta=3)
    ended = []
    for number in range(240):
        quality, stoppable = rng.normal(0.3 if number >= 80 else 0.0), number >= 80
        for rung in asha.rungs:
            if not asha.reach(number, rung, quality + rng.normal(scale=0.3)) and stoppable:
                ended.append(rung)
                break
        else:
            ended += [30] * stoppable
    assert ended.count(3) > 80 and 0 < ended.count(30) < 24  # a third at each of three rungs: 6 of 160, or some more
