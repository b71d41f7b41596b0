from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from crash import Silent
from ray.tune.experiment import Trial
from ray.tune.utils.object_cache import _ObjectCache

from ramcore.config import Config
from study.checkpoints import LocalFolder
from study.halving import Halving
from study.record import Record, StudySettings
from study.searcher import MAX_WORKER_DEATHS, SAME_FAILURES, Engine, FeasibleTPE, Seen, TuneScheduler
from study.space import search_space

EPOCHS = 4
SPACE = search_space(Config(data="digits", task="original", epochs=EPOCHS))
SETTINGS = StudySettings(
    study="s",
    task="original",
    data="digits",
    digest="d",
    design="search",
    epochs=EPOCHS,
    seeds_per_trial=2,
    seed=0,
    space=SPACE.describe(),
)


@pytest.fixture
def opened(tmp_path):
    """opened(total): an engine on the study's record; opening it again closes the one before, as a crash would."""
    records: list[Record] = []

    def open_engine(total: int = 10) -> Engine:
        if records:
            records.pop().close()
        records.append(Record.open(tmp_path / "s", SETTINGS, total=total))
        halving = Halving(min_epochs=1, eta=2)
        return Engine(
            records[-1],
            space=SPACE,
            halving=halving,
            folder=LocalFolder(tmp_path / "s"),
            storage=str(tmp_path),
            watcher=Silent(),
        )

    yield open_engine
    records.pop().close()


def metrics(epoch: int, *accuracy: float) -> dict:
    values = accuracy if len(accuracy) > 1 else accuracy * 2
    diverged = [math.isnan(v) for v in values]
    return {"epoch": epoch, "seconds": 0.1, "seeds": [0, 1], "val_accuracy": values, "diverged": diverged}


def report(engine: Engine, number: int, epoch: int, *accuracy: float) -> bool:
    return engine.report(number, {"epoch": epoch, "metrics": metrics(epoch, *accuracy)})


def train(engine: Engine, number: int, accuracy: float) -> int:
    """Report epochs until the engine stops the trial; returns how many."""
    epoch = 1
    while report(engine, number, epoch, accuracy):
        epoch += 1
    return epoch


def test_only_tpe_trials_are_stopped_and_only_they_are_told_as_pruned(opened):
    engine = opened(10)  # 1 published, 7 Sobol, 2 TPE
    for n in range(10):
        job = engine.next_job()
        assert job.number == n
        # Each worse than the one before: halving would stop all but the first, if it were asked.
        assert train(engine, n, 0.9 - 0.05 * n) == (EPOCHS if job.arm != "tpe" else 1)
    assert engine.next_job() is None and engine.finished
    states = [(t.state.name, t.user_attrs["arm"], sorted(t.intermediate_values)) for t in engine.record.study.trials]
    assert states[7] == ("COMPLETE", "sobol", [1, 2, 3, 4])
    assert states[8] == states[9] == ("PRUNED", "tpe", [1])
    assert engine.record.trials[9].reason == "stopped by successive halving at epoch 1"


def test_a_good_tpe_trial_goes_on_to_the_end(opened):
    engine = opened(10)
    for n in range(10):
        engine.next_job()
        assert train(engine, n, 0.1 + 0.05 * n) == EPOCHS


def test_the_objective_is_the_mean_over_seeds_after_the_last_epoch(opened):
    engine = opened(1)
    engine.next_job()
    for epoch, accuracy in enumerate(((0.5, 0.7), (0.9, 0.9), (0.3, 0.5), (0.6, 0.8)), start=1):
        report(engine, 0, epoch, *accuracy)
    assert engine.record.study.best_value == pytest.approx(0.7)


def test_configurations_are_feasible_and_the_same_for_a_study_that_was_killed(opened, tmp_path):
    def configurations(*, kill: bool) -> list:
        engine, found = opened(12), []
        for n in range(12):
            job = engine.next_job()
            if kill:
                engine = opened(12)  # a new process finds the trial running, and takes it up again
                job = engine.next_job()
            assert job.number == n
            found.append({name: getattr(job.config, name) for name in SPACE.names})
            train(engine, n, found[-1]["location_std"])
        return found

    killed = configurations(kill=True)
    (tmp_path / "s" / "study.db").rename(tmp_path / "killed.db")
    assert all(SPACE.contains(values) for values in killed)
    assert configurations(kill=False) == killed


def test_tpe_suggests_by_trial_number(opened):
    engine = opened(4)
    for n in range(3):
        engine.next_job()
        train(engine, n, 0.1 * n)
    study = engine.record.study
    again = [FeasibleTPE(SPACE, 0, 7).suggest(study) for _ in range(2)]
    assert again[0] == again[1] != FeasibleTPE(SPACE, 0, 8).suggest(study)
    assert all(SPACE.contains(FeasibleTPE(SPACE, 0, n).suggest(study)) for n in range(30))


def test_tpe_sees_in_memory_what_optunas_storage_holds(opened):
    engine = opened(12)
    for n in range(10):
        engine.next_job()
        train(engine, n, 0.9 - 0.05 * n)  # the last two are stopped early
    engine.next_job()
    report(engine, 10, 1, 0.95)  # runs
    engine.next_job()
    engine.report(11, {"error": "RuntimeError: no", "details": ""})
    seen = Seen(engine.record, SPACE)
    for number in range(12, 18):
        assert FeasibleTPE(SPACE, 0, number).suggest(seen) == FeasibleTPE(SPACE, 0, number).suggest(engine.record.study)
    train(engine, 10, 0.99)  # told from the beginning: epoch 1 is known
    assert FeasibleTPE(SPACE, 0, 18).suggest(seen) == FeasibleTPE(SPACE, 0, 18).suggest(engine.record.study)


def test_an_infeasible_suggestion_is_clamped_at_last(opened, monkeypatch):
    engine = opened(4)
    corner = SPACE.default | {"patch_size": 14, "num_scales": 4}
    monkeypatch.setattr(FeasibleTPE, "_sample", lambda *_: dict(corner))
    assert FeasibleTPE(SPACE, 0, 1).suggest(engine.record.study) == corner | {"num_scales": 3}


def test_lost_trials_are_taken_up_first_and_under_their_own_number(opened):
    engine = opened(6)
    jobs = [engine.next_job() for _ in range(3)]
    report(engine, 0, 1, 0.5)
    train(engine, 1, 0.5)
    engine = opened(6)
    again = [engine.next_job() for _ in range(3)]
    assert [(j.number, j.held) for j in again] == [(0, 1), (2, 0), (3, 0)]
    assert again[0].config == jobs[0].config and again[1].config == jobs[2].config


def test_a_decision_that_a_crash_cut_off_is_taken_when_the_epoch_is_told_again(opened):
    engine = opened(10)
    for n in range(9):
        engine.next_job()
        train(engine, n, 0.9)
    engine.next_job()
    engine.record.add_epoch(9, 1, metrics(1, 0.1))  # committed, and then the process died
    engine = opened(10)
    assert engine.next_job().number == 9
    assert not report(engine, 9, 1, 0.1)
    assert engine.record.trials[9].state == "pruned"


def test_an_epoch_before_the_newest_is_not_judged_again(opened):
    engine = opened(10)
    for n in range(8):
        engine.next_job()
        train(engine, n, 0.3)
    engine.next_job()
    assert report(engine, 8, 1, 0.9) and report(engine, 8, 2, 0.9) and report(engine, 8, 3, 0.2)
    engine.next_job()
    train(engine, 9, 0.99)
    assert report(engine, 8, 1, 0.9)  # its worker died and told everything again
    assert report(engine, 8, 2, 0.9)


def test_a_diverged_trial_fails_with_its_seeds_and_epoch(opened):
    engine = opened(2)
    engine.next_job()
    report(engine, 0, 1, 0.5)
    assert not report(engine, 0, 2, 0.5, math.nan)
    assert engine.record.trials[0].reason == "diverged: seed 1 at epoch 2"
    (stored,) = engine.record.study.trials
    assert stored.state.name == "FAIL" and stored.intermediate_values == {1: 0.5}


def test_an_error_fails_its_trial_alone(opened):
    engine = opened(5)
    engine.next_job()
    assert not engine.report(0, {"error": "RuntimeError: no", "details": ""})
    assert engine.record.trials[0].reason == "error: RuntimeError: no"
    for n in range(1, 5):
        engine.next_job()
        train(engine, n, 0.5)
    assert engine.finished and engine.stopping is None


def test_the_same_error_in_the_first_trials_stops_the_study(opened):
    engine = opened(9)
    for n in range(SAME_FAILURES):
        engine.next_job()
        engine.report(n, {"error": f"RuntimeError: shapes {n}x4 and 3x{n}", "details": ""})
    assert engine.broken is not None and engine.next_job() is None
    assert engine.stopping is not None and "the first 3 trials failed alike: error: RuntimeError" in engine.stopping


def test_different_errors_or_a_trained_trial_between_do_not(opened):
    engine = opened(12)
    for n, message in enumerate(("ValueError: a", "ValueError: a", "KeyError: b", "ValueError: a", "ValueError: a")):
        engine.next_job()
        engine.report(n, {"error": message, "details": ""})
    assert engine.broken is None


def test_a_full_disk_stops_the_study_and_leaves_the_trial_to_be_continued(opened):
    engine = opened(5)
    engine.next_job()
    assert not engine.report(0, {"interrupted": "No space left on device: x"})
    assert engine.stopping == "No space left on device: x" and engine.record.trials[0].state == "running"


def test_more_trials_are_added_to_a_finished_study(opened):
    engine = opened(3)
    for n in range(3):
        engine.next_job()
        train(engine, n, 0.5)
    assert engine.finished
    engine = opened(5)
    assert not engine.finished and engine.next_job().number == 3


def test_of_trials_that_end_at_once_every_worker_is_kept_for_the_next(opened):
    controller = SimpleNamespace(_actor_cache=_ObjectCache(may_keep_one=True))
    trial = SimpleNamespace(placement_group_factory="1 CPU")
    scheduler = TuneScheduler(opened(), slots=3)
    for _ in range(2):  # more trials, once more room
        scheduler.on_trial_add(controller, trial)
    assert [controller._actor_cache.cache_object("1 CPU", worker) for worker in "abcd"] == [True, True, True, False]
    scheduler.on_trial_add(SimpleNamespace(), trial)  # a Ray without it is none the worse


def test_idle_workers_go_once_nothing_is_left_to_hand_out(opened):
    cache = _ObjectCache(may_keep_one=True)
    controller = SimpleNamespace(_actor_cache=cache, get_trials=lambda: [])
    engine = opened(2)
    scheduler = TuneScheduler(engine, slots=3)
    scheduler.on_trial_add(controller, SimpleNamespace(placement_group_factory="1 CPU"))
    for worker in "ab":
        cache.cache_object("1 CPU", worker)
    engine.next_job()
    scheduler.choose_trial_to_run(controller)
    assert cache.total_max_objects == 3 and list(cache.flush_cached_objects()) == []
    engine.next_job()
    scheduler.choose_trial_to_run(controller)
    scheduler.choose_trial_to_run(controller)
    assert cache.total_max_objects == 0 and sorted(cache.flush_cached_objects(force_all=True)) == ["a", "b"]


def dead(number: int, failures: int, status: str = "") -> SimpleNamespace:
    """A trial of Tune's whose worker has died so often, as Tune shows it: as ERROR when it will start it again, as
    RUNNING when it gives it up.
    """
    status = status or (Trial.ERROR if failures <= MAX_WORKER_DEATHS else Trial.RUNNING)
    metadata = SimpleNamespace(num_failures=failures)

    def recovers() -> bool:
        return metadata.num_failures <= MAX_WORKER_DEATHS

    return SimpleNamespace(
        config={"number": number}, run_metadata=metadata, num_failures=failures, status=status, error_file=None,
        should_recover=recovers,
    )  # fmt: skip


def test_a_trial_whose_worker_dies_again_and_again_without_an_epoch_fails(opened):
    engine = opened(3)
    engine.next_job()
    scheduler = TuneScheduler(engine, slots=1)
    for failures in range(1, MAX_WORKER_DEATHS + 1):
        scheduler.on_trial_error(None, dead(0, failures))
        assert engine.record.trials[0].state == "running"
        assert not engine._lost  # Tune has it
    scheduler.on_trial_error(None, dead(0, MAX_WORKER_DEATHS + 1))
    assert engine.record.trials[0].state == "failed"
    assert engine.record.trials[0].reason == "error: its worker died 6 times; no message"


def test_a_trial_that_comes_on_survives_any_number_of_worker_deaths(opened):
    engine = opened(3)
    engine.next_job()
    scheduler = TuneScheduler(engine, slots=1)
    report(engine, 0, 1, 0.5)
    for failures in range(1, MAX_WORKER_DEATHS + 1):
        trial = dead(0, failures)
        scheduler.on_trial_error(None, trial)
    report(engine, 0, 2, 0.5)
    trial = dead(0, MAX_WORKER_DEATHS + 1)  # Tune has given it up
    scheduler.on_trial_error(None, trial)
    assert trial.run_metadata.num_failures == 1 and engine.record.trials[0].state == "running"
    assert engine.next_job().number == 0


def test_a_trial_that_tune_loses_before_it_began_is_handed_out_again_once(opened):
    engine = opened(3)
    engine.next_job()
    scheduler = TuneScheduler(engine, slots=1)
    for _ in range(2):
        scheduler.on_trial_error(None, dead(0, 1, status=Trial.PENDING))
    assert [engine.next_job().number for _ in range(2)] == [0, 1]
