from __future__ import annotations

import pytest

from study.halving import Halving, default_halving


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
