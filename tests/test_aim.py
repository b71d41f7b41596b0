"""--aim sensitivity, and --trials +N."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from crash import Silent
from test_first_points import FLAGS
from test_scheduler import EPOCHS, train

from analysis.figures import ORIGIN_STYLE
from ramcore.config import Config
from ramcore.errors import UserError
from ramcore.space import Dimension, Space, Values
from study.aim import aimed_point
from study.asha import ASHA
from study.designs import SEARCH_ORIGINS, search_origins
from study.flags import Flags, check
from study.prepare import Prepared, prepare
from study.record import open_record
from study.scheduler import StudyScheduler
from study.sobol import SobolSequence

SPACE = Space(
    dimensions=(
        Dimension(name="discount", type="float", low=0, high=1),
        Dimension(name="loss_mixing", type="float", low=0, high=1),
        Dimension(name="core", type="categorical", choices=("rnn", "gru", "lstm")),
    ),
    default={"discount": 1.0, "loss_mixing": 0.5, "core": "rnn"},
    fixed={"task": "original"},
)


def prepared(folder: Path, **flags) -> Prepared:
    asked = Flags(**{**FLAGS, "storage": str(folder), **flags})
    check(asked)
    return prepare(asked)


def opened(plan: Prepared) -> StudyScheduler:
    record = open_record(plan.storage, plan.settings, total=plan.total, aim=plan.aim)
    asha = ASHA(EPOCHS, min_epochs=1, eta=2)
    return StudyScheduler(record, space=plan.space, storage=plan.storage, callback=Silent(), asha=asha)


def run_all(scheduler: StudyScheduler) -> None:
    while job := scheduler.next_job():
        train(scheduler, job.number, 0.3 + 0.5 * job.config.loss_mixing)
    scheduler.record.close()


def test_added_trials_of_that_aim_follow_the_first_sobol_points_and_are_of_no_other_origin():
    grown = search_origins([24, 34], 3, aims=["accuracy", "sensitivity"])
    assert grown == [*search_origins([24], 3), *["aimed"] * 10]
    assert search_origins([24], 3, aims=["sensitivity"]) == ["published"] * 3 + ["sobol"] * 16 + ["aimed"] * 5
    assert search_origins([12], 3, aims=["sensitivity"]) == ["published"] + ["sobol"] * 11
    later = search_origins([24, 34, 44], 3, aims=["accuracy", "sensitivity"])
    assert later[:34] == grown and set(later[34:]) == {"sobol", "tpe"}, "totals without an aim are for accuracy"


def test_every_origin_of_a_search_has_a_mark_in_figures():
    assert set(SEARCH_ORIGINS) <= set(ORIGIN_STYLE)


def test_aimed_trials_are_never_stopped_are_tried_once_and_come_again_after_a_kill(tmp_path: Path):
    plan = prepared(tmp_path, trials="24")
    assert plan.total == 24
    run_all(opened(plan))
    first = opened(prepared(tmp_path, trials="+4", aim="sensitivity"))
    assert first.record.totals == [24, 28] and first.record.aims == ["accuracy", "sensitivity"]
    assert first.next_job() and first.next_job()
    first.record.close()
    second = opened(prepared(tmp_path, trials="+4", aim="sensitivity"))  # the same command, after a kill
    assert second.total == 28
    run_all(second)
    trials = [second.record.trials[n] for n in range(24, 28)]
    assert [(t.spec.origin, t.state, len(t.epochs)) for t in trials] == [("aimed", "complete", EPOCHS)] * 4
    configs = [t.spec.config for t in second.record.trials.values()]
    assert all(configs.count(config) == 1 for config in configs[24:])
    third = prepared(tmp_path, trials="+4")
    assert third.total == 32 and third.aim == "accuracy"


def test_a_request_that_adds_nothing_says_so(tmp_path: Path):
    scheduler = opened(prepared(tmp_path, trials=20))
    assert scheduler.next_job()
    scheduler.record.close()
    plan = prepared(tmp_path, trials="+5", aim="sensitivity")
    assert plan.total == 20
    assert "0 of the 20 trials of s have ended: this run ends the others, and --trials +5 adds none" in plan.warnings
    assert any("--aim sensitivity is of trials that a run adds" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"trials": "+0"}, "--trials must be at least 1; got 0"),
        ({"trials": "many"}, "--trials must be a number of at most 1000000, or .N for more; got 'many'"),
        ({"trials": "-3"}, "--trials must be at least 1; got -3"),
        ({"aim": "speed"}, "--aim must be one of accuracy, sensitivity; got 'speed'"),
        ({"aim": "sensitivity", "design": "paper"}, "--aim is a search's; the design is paper"),
    ],
)
def test_what_cannot_be_asked_is_refused(flags: dict, message: str):
    with pytest.raises(UserError, match=message):
        check(Flags(**flags))


def test_points_go_where_the_effects_of_parameters_are_least_known():
    sobol = SobolSequence(SPACE, 0)
    tried = [sobol[i] | {"discount": 0.5} for i in range(12)]  # nothing is known of discount
    accuracy = [0.4 + 0.4 * float(point["loss_mixing"]) for point in tried]
    chosen: list[Values] = []
    for seed in range(6):
        chosen.append(aimed_point(SPACE, tried + chosen, accuracy + [np.nan] * len(chosen), seed))
    assert all(SPACE.contains(point) for point in chosen)
    ends = [abs(float(point["discount"]) - 0.5) for point in chosen]
    assert np.mean(ends) > 0.3, "a point at random is 0.25 away"
    again = aimed_point(SPACE, tried, accuracy, 0)
    assert again == chosen[0]


def test_a_search_without_results_can_be_aimed():
    space = prepare(Flags(data="digits", task="original", study="none")).space
    assert space is not None
    point = aimed_point(space, [dict(space.default)], [np.nan], 0)
    assert space.contains(point)
    Config(**{**point, "data": "digits", "task": "original"})
