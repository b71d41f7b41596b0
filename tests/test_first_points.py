"""--try, --from and --cancel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from crash import Silent
from test_scheduler import EPOCHS, SETTINGS, SPACE, train

from ramcore.errors import UserError
from study import cancel
from study.asha import ASHA
from study.designs import search_origins
from study.flags import Flags
from study.prepare import prepare
from study.record import Record, TakenOver, best_trial, open_record, read_study
from study.scheduler import StudyScheduler
from study.space_flags import SpaceFlags, asked_space
from study.storage import Storage


def test_asked_points_are_put_in_where_they_were_asked_for_and_take_no_other_place():
    plain = search_origins([20], 3)
    assert search_origins([20], 3, asked_at=[0, 1]) == ["asked", "asked", *plain][:20]
    later = search_origins([20], 3, asked_at=[0, 1, 5])
    assert later[:5] == ["asked", "asked", *plain[:3]] and later[5] == "asked" and len(later) == 20
    grown = search_origins([20, 30], 3, asked_at=[0, 1, 5])
    assert grown[:20] == later and len(grown) == 30


FLAGS = {"data": "digits", "task": "original", "epochs": EPOCHS, "seeds_per_trial": 2, "study": "s"}


def opened(tmp_path: Path, **flags) -> StudyScheduler:
    """A scheduler on the study that these flags mean."""
    prepared = prepare(Flags(**{**FLAGS, "storage": str(tmp_path), **flags}))
    record = open_record(
        prepared.storage, prepared.settings, total=prepared.total, asked=prepared.asked, taken=prepared.taken
    )
    asha = ASHA(prepared.settings.epochs, min_epochs=1, eta=2)
    return StudyScheduler(record, space=prepared.space, storage=prepared.storage, callback=Silent(), asha=asha)


def run(scheduler: StudyScheduler, count: int) -> list[tuple[str, str]]:
    """Train the next trials; (origin, row) of each."""
    found = []
    for _ in range(count):
        job = scheduler.next_job()
        assert job is not None
        spec = scheduler.record.trials[job.number].spec
        found.append((spec.origin, spec.row))
        train(scheduler, job.number, 0.3 + job.number / 100)
    return found


def test_points_of_try_come_first_and_later_ones_come_next(tmp_path):
    scheduler = opened(tmp_path, trials=8, try_=("num_glimpses=4", "patch_size=10"))
    assert run(scheduler, 3) == [("asked", "num_glimpses=4"), ("asked", "patch_size=10"), ("published", "default")]
    trials = scheduler.record.trials
    assert (trials[0].spec.config.num_glimpses, trials[0].spec.config.patch_size) == (4, SPACE.default["patch_size"])
    scheduler.record.close()
    again = opened(tmp_path, trials=8, try_=("num_glimpses=4", "patch_size=10"))
    assert again.origins == scheduler.origins, "the same command continues"
    again.record.close()
    more = opened(tmp_path, try_=("num_glimpses=8",))
    assert more.origins[:4] == [*scheduler.origins[:3], "asked"]
    assert run(more, 1) == [("asked", "num_glimpses=8")] and more.record.trials[3].spec.config.num_glimpses == 8
    more.record.close()
    few = opened(tmp_path, trials=1, try_=("num_glimpses=5",))
    assert few.total == 5, "a point that is asked for is tried"
    few.record.close()


def test_configuration_that_is_tried_again_has_other_seeds(tmp_path):
    (tmp_path / "space.toml").write_text("[layer_norm]\nchoices = [true, false]\n")
    scheduler = opened(tmp_path, trials=8, space=tmp_path / "space.toml")
    run(scheduler, 8)
    runs = [(t.spec.config, seed) for t in scheduler.record.trials.values() for seed in t.spec.seeds]
    assert len({config for config, _ in runs}) == 2 and len(set(runs)) == len(runs) == 16
    best, trials = best_trial(list(scheduler.record.trials.values())), scheduler.record.trials.values()
    means = {c: np.mean([t.value for t in trials if t.spec.config == c]) for c in {c for c, _ in runs}}
    assert best and means[best.spec.config] == max(means.values()), "not the luckiest trial of a configuration"
    scheduler.record.close()


def earlier(tmp_path: Path, count: int = 6) -> list[int]:
    """A study `s` with ended trials; their numbers of glimpses."""
    scheduler = opened(tmp_path, trials=count)
    run(scheduler, count)
    scheduler.record.close()
    return [trial.spec.config.num_glimpses for trial in scheduler.record.trials.values()]


def test_new_study_learns_from_trials_in_its_space_and_counts_none_of_them(tmp_path):
    glimpses = earlier(tmp_path)
    scheduler = opened(tmp_path, study="narrow", from_="s", trials=6, range_=("num_glimpses=2:5",))
    taken = scheduler.record.taken
    assert (
        taken
        and taken.study == "s"
        and [t.number for t in taken.trials] == [n for n, value in enumerate(glimpses) if value <= 5]
    )
    assert scheduler.record.trials == {} and "asked" not in scheduler.origins
    assert scheduler.origins.count("sobol") + scheduler.origins.count("tpe") + scheduler.origins.count("published") == 6
    assert scheduler.record.settings.seeds_per_trial == 2
    run(scheduler, 6)
    states = [t.state.name for t in scheduler._tpe._study.get_trials(deepcopy=False)]
    assert states.count("COMPLETE") == len(taken.trials) + 5, "the last own trial ended after the last suggestion"
    scheduler.record.close()
    stored = read_study(tmp_path / "narrow" / "study.db")
    assert stored and stored.taken == taken and len(stored.trials) == 6
    again = opened(tmp_path, study="narrow", from_="s", trials=6, range_=("num_glimpses=2:5",))
    assert again.record.taken == taken and again.finished
    again.record.close()
    with pytest.raises(UserError, match="a study takes trials over when it begins; s began without"):
        opened(tmp_path, from_="narrow", study="s")


def test_study_of_more_epochs_learns_ranks_and_finished_trials_are_not_trained_on(tmp_path):
    earlier(tmp_path)
    with pytest.raises(UserError, match=r"epochs 4 there, 8 asked for \(a trial follows its schedule .*--from s"):
        opened(tmp_path, epochs=8)
    scheduler = opened(tmp_path, study="longer", from_="s", epochs=8, trials=6)
    taken = scheduler.record.taken
    assert taken and taken.epochs == EPOCHS and "TPE alone, as their schedule has 4 epochs" in taken.summary(8)
    run(scheduler, 6)
    own = [t.value for t in scheduler.record.trials.values() if t.value is not None]
    values = [t.value for t in scheduler._tpe._study.get_trials(deepcopy=False) if t.value is not None]
    learnt = sorted(value for value in values if value not in own)
    assert len(values) > len(own) and all(min(own) <= value <= max(own) for value in learnt)
    scheduler.record.close()


def test_from_a_study_without_trials_in_the_space_is_refused(tmp_path):
    earlier(tmp_path, 4)
    with pytest.raises(UserError, match="of the 4 of s none does"):
        opened(tmp_path, study="other", from_="s", set_=("core=rnn",))
    with pytest.raises(UserError, match=r"--from must name a search in .*; t: there is none"):
        opened(tmp_path, study="other", from_="t")
    assert not (tmp_path / "other").exists()


def test_own_space_is_kept_by_a_study_and_another_is_refused(tmp_path):
    scheduler = opened(tmp_path, trials=4, range_=("num_glimpses=2:5",), choices=("core=rnn,gru",))
    scheduler.record.close()
    again = opened(tmp_path)
    assert again.space == scheduler.space
    again.record.close()
    with pytest.raises(UserError, match=r"space: num_glimpses.high 5 there, 6 asked for.*--from s it learns"):
        opened(tmp_path, range_=("num_glimpses=2:6",))


def test_older_record_without_the_new_fields_is_continued():
    space = SPACE.to_dict()
    fixed = {name: value for name, value in space["fixed"].items() if name not in ("canvas", "num_classes")}
    old = SETTINGS.__class__(**{**vars(SETTINGS), "space": {**space, "fixed": fixed}})
    old.check_same(SETTINGS)


def test_cancelled_trial_ends_after_its_next_epoch_as_stopped(tmp_path):
    scheduler = opened(tmp_path, trials=4)
    job = scheduler.next_job()
    assert job is not None
    stored = read_study(tmp_path / "s" / "study.db")
    assert stored is not None
    storage = Storage.parse(str(tmp_path))
    cancel.ask(storage, stored, job.number)
    assert train(scheduler, job.number, 0.5) == 1
    trial = scheduler.record.trials[job.number]
    assert (trial.state, trial.reason) == ("pruned", "cancelled by the user at epoch 1")
    assert not (tmp_path / "s" / "cancel").exists()
    stored = read_study(tmp_path / "s" / "study.db")
    assert stored is not None
    with pytest.raises(UserError, match=r"trial 0 has ended \(cancelled by the user at epoch 1\)"):
        cancel.ask(storage, stored, 0)
    with pytest.raises(UserError, match="it has not begun: those of s that run are none"):
        cancel.ask(storage, stored, 3)
    scheduler.next_job()
    scheduler.record.close()
    stored = read_study(tmp_path / "s" / "study.db")
    assert stored is not None
    with pytest.raises(UserError, match="s does not: continue it"):
        cancel.ask(storage, stored, 1)


def test_space_of_flags_survives_the_record(tmp_path):
    space = asked_space(SPACE, SpaceFlags(choices=("layer_norm=true,false",)))
    settings = SETTINGS.__class__(**{**vars(SETTINGS), "space": space.to_dict(), "own_space": True})
    taken = TakenOver("before", 3, [])
    Record.open(tmp_path / "s", settings, total=4, taken=taken).close()
    stored = read_study(tmp_path / "s" / "study.db")
    assert stored and stored.settings == settings and stored.taken == taken
