from __future__ import annotations

import math
from types import SimpleNamespace

import optuna
import pytest
from crash import Silent
from ray.tune.experiment import Trial
from ray.tune.utils.object_cache import _ObjectCache

from ramcore.config import Config
from study.asha import ASHA
from study.record import Record, StudySettings
from study.scheduler import SAME_FAILURES, StudyScheduler
from study.search_space import search_space
from study.storage import Storage
from study.tpe import FeasibleTPE
from study.tune_adapters import MAX_WORKER_DEATHS, TuneScheduler

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
    space=SPACE.to_dict(),
)


@pytest.fixture
def opened(tmp_path):
    """opened(total): a scheduler on the study's record. Opening it again closes the record before, as a crash would."""
    records: list[Record] = []

    def open_scheduler(total: int = 10) -> StudyScheduler:
        if records:
            records.pop().close()
        records.append(Record.open(tmp_path / "s", SETTINGS, total=total))
        asha = ASHA(EPOCHS, min_epochs=1, eta=2)
        storage = Storage.parse(str(tmp_path))
        return StudyScheduler(records[-1], space=SPACE, storage=storage, callback=Silent(), asha=asha)

    yield open_scheduler
    records.pop().close()


def metrics(epoch: int, *accuracy: float) -> dict:
    values = accuracy if len(accuracy) > 1 else accuracy * 2
    diverged = [math.isnan(v) for v in values]
    return {"epoch": epoch, "seconds": 0.1, "seeds": [0, 1], "val_accuracy": values, "diverged": diverged}


def report(scheduler: StudyScheduler, number: int, epoch: int, *accuracy: float) -> bool:
    return scheduler.report(number, {"epoch": epoch, "metrics": metrics(epoch, *accuracy)})


def train(scheduler: StudyScheduler, number: int, accuracy: float) -> int:
    """Report epochs until the scheduler stops the trial; returns how many."""
    epoch = 1
    while report(scheduler, number, epoch, accuracy):
        epoch += 1
    return epoch


def test_only_tpe_trials_are_stopped_early_and_pruned(opened):
    scheduler = opened(10)  # 1 published, 7 Sobol, 2 TPE
    for n in range(10):
        job = scheduler.next_job()
        assert job.number == n
        # Each is worse than the one before: ASHA would stop all but the first.
        assert train(scheduler, n, 0.9 - 0.05 * n) == (EPOCHS if scheduler.record.trials[n].spec.origin != "tpe" else 1)
    assert scheduler.next_job() is None and scheduler.finished
    states = [
        (t.state.name, t.user_attrs["origin"], sorted(t.intermediate_values)) for t in scheduler.record.study.trials
    ]
    assert states[7] == ("COMPLETE", "sobol", [1, 2, 3, 4])
    assert states[8] == states[9] == ("PRUNED", "tpe", [1])
    assert scheduler.record.trials[9].reason == "stopped by successive halving at epoch 1"


def test_good_tpe_trial_completes(opened):
    scheduler = opened(10)
    for n in range(10):
        scheduler.next_job()
        assert train(scheduler, n, 0.1 + 0.05 * n) == EPOCHS


def test_objective_is_mean_over_seeds_after_last_epoch(opened):
    scheduler = opened(1)
    scheduler.next_job()
    for epoch, accuracy in enumerate(((0.5, 0.7), (0.9, 0.9), (0.3, 0.5), (0.6, 0.8)), start=1):
        report(scheduler, 0, epoch, *accuracy)
    assert scheduler.record.study.best_value == pytest.approx(0.7)


def test_killed_study_gets_the_same_feasible_configurations(opened, tmp_path):
    def configurations(*, kill: bool) -> list:
        scheduler, found = opened(12), []
        for n in range(12):
            job = scheduler.next_job()
            if kill:
                scheduler = opened(12)  # a new process finds the trial running, and takes it up again
                job = scheduler.next_job()
            assert job.number == n
            found.append({name: getattr(job.config, name) for name in SPACE.names})
            train(scheduler, n, found[-1]["location_std"])
        return found

    killed = configurations(kill=True)
    (tmp_path / "s" / "study.db").rename(tmp_path / "killed.db")
    assert all(SPACE.contains(values) for values in killed)
    assert configurations(kill=False) == killed


def test_tpe_suggestion_depends_on_trial_number(opened):
    scheduler = opened(4)
    for n in range(3):
        scheduler.next_job()
        train(scheduler, n, 0.1 * n)
    tpe = FeasibleTPE(scheduler.record, SPACE)
    again = [tpe.suggest(7), FeasibleTPE(scheduler.record, SPACE).suggest(7)]
    assert again[0] == again[1] == tpe.suggest(7) != tpe.suggest(8)
    assert all(SPACE.contains(tpe.suggest(n)) for n in range(30))


def suggestion_from_storage(record: Record, number: int) -> dict:
    """The suggestion of TPE when it reads every trial from Optuna's own storage."""
    study = optuna.create_study(direction="maximize")
    study.ask()
    study.add_trials(optuna.load_study(study_name="s", storage=record._rdb).get_trials())
    tpe = FeasibleTPE(record, SPACE)
    tpe._study, tpe._coming, tpe._follow_record = study, study.get_trials()[0], lambda: None
    return tpe.suggest(number)


def test_tpe_in_memory_suggests_as_from_optunas_storage(opened):
    scheduler = opened(12)
    tpe = FeasibleTPE(scheduler.record, SPACE)
    for n in range(10):
        scheduler.next_job()
        train(scheduler, n, 0.9 - 0.05 * n)  # the last two are stopped early
        tpe.suggest(n + 1)  # follows the record as it grows
    scheduler.next_job()
    report(scheduler, 10, 1, 0.95)  # runs
    scheduler.next_job()
    scheduler.report(11, {"error": "RuntimeError: no", "details": ""})
    for number in range(12, 18):
        assert tpe.suggest(number) == suggestion_from_storage(scheduler.record, number)
    train(scheduler, 10, 0.99)  # reported from the beginning: epoch 1 is known
    assert tpe.suggest(18) == suggestion_from_storage(scheduler.record, 18)
    assert tpe.suggest(18) == FeasibleTPE(scheduler.record, SPACE).suggest(18)


def test_suggestion_that_stays_infeasible_is_clamped(opened, monkeypatch):
    scheduler = opened(4)
    corner = {**SPACE.default, "patch_size": 14, "num_scales": 4}
    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", lambda *_: dict(corner))
    assert FeasibleTPE(scheduler.record, SPACE).suggest(1) == corner | {"num_scales": 3}


def test_reopened_study_continues_running_trials_first_under_their_numbers(opened):
    scheduler = opened(6)
    jobs = [scheduler.next_job() for _ in range(3)]
    report(scheduler, 0, 1, 0.5)
    train(scheduler, 1, 0.5)
    scheduler = opened(6)
    again = [scheduler.next_job() for _ in range(3)]
    assert [(j.number, j.held) for j in again] == [(0, 1), (2, 0), (3, 0)]
    assert again[0].config == jobs[0].config and again[1].config == jobs[2].config


def test_decision_lost_in_crash_is_made_when_epoch_is_reported_again(opened):
    scheduler = opened(10)
    for n in range(9):
        scheduler.next_job()
        train(scheduler, n, 0.9)
    scheduler.next_job()
    scheduler.record.add_epoch(9, 1, metrics(1, 0.1))  # committed, and then the process died
    scheduler = opened(10)
    assert scheduler.next_job().number == 9
    assert not report(scheduler, 9, 1, 0.1)
    assert scheduler.record.trials[9].state == "pruned"


def test_repeated_report_of_older_epoch_does_not_stop_trial(opened):
    scheduler = opened(10)
    for n in range(8):
        scheduler.next_job()
        train(scheduler, n, 0.3)
    scheduler.next_job()
    assert report(scheduler, 8, 1, 0.9) and report(scheduler, 8, 2, 0.9) and report(scheduler, 8, 3, 0.2)
    scheduler.next_job()
    train(scheduler, 9, 0.99)
    assert report(scheduler, 8, 1, 0.9)  # its worker died, and the next one reports everything again
    assert report(scheduler, 8, 2, 0.9)


def test_diverged_trial_fails_and_reason_names_seed_and_epoch(opened):
    scheduler = opened(2)
    scheduler.next_job()
    report(scheduler, 0, 1, 0.5)
    assert not report(scheduler, 0, 2, 0.5, math.nan)
    assert scheduler.record.trials[0].reason == "diverged: seed 1 at epoch 2"
    (stored,) = scheduler.record.study.trials
    assert stored.state.name == "FAIL" and stored.intermediate_values == {1: 0.5}


def test_error_fails_its_own_trial_only(opened):
    scheduler = opened(5)
    scheduler.next_job()
    assert not scheduler.report(0, {"error": "RuntimeError: no", "details": ""})
    assert scheduler.record.trials[0].reason == "error: RuntimeError: no"
    for n in range(1, 5):
        scheduler.next_job()
        train(scheduler, n, 0.5)
    assert scheduler.finished and scheduler.stopping is None


def test_same_error_in_first_trials_stops_study(opened):
    scheduler = opened(9)
    for n in range(SAME_FAILURES):
        scheduler.next_job()
        scheduler.report(n, {"error": f"RuntimeError: shapes {n}x4 and 3x{n}", "details": ""})
    assert scheduler.broken is not None and scheduler.next_job() is None
    assert (
        scheduler.stopping is not None and "the first 3 trials failed alike: error: RuntimeError" in scheduler.stopping
    )


def test_different_errors_in_first_trials_do_not_stop_study(opened):
    scheduler = opened(12)
    for n, message in enumerate(("ValueError: a", "ValueError: a", "KeyError: b", "ValueError: a", "ValueError: a")):
        scheduler.next_job()
        scheduler.report(n, {"error": message, "details": ""})
    assert scheduler.broken is None


def test_full_disk_stops_study_and_trial_stays_running(opened):
    scheduler = opened(5)
    scheduler.next_job()
    assert not scheduler.report(0, {"interrupted": "No space left on device: x"})
    assert scheduler.stopping == "No space left on device: x" and scheduler.record.trials[0].state == "running"


def test_finished_study_can_be_extended(opened):
    scheduler = opened(3)
    for n in range(3):
        scheduler.next_job()
        train(scheduler, n, 0.5)
    assert scheduler.finished
    scheduler = opened(5)
    assert not scheduler.finished and scheduler.next_job().number == 3


def test_workers_of_trials_that_end_together_are_all_kept(opened):
    controller = SimpleNamespace(_actor_cache=_ObjectCache(may_keep_one=True))
    trial = SimpleNamespace(placement_group_factory="1 CPU")
    adapter = TuneScheduler(opened(), slots=3)
    for _ in range(2):  # a second trial changes nothing
        adapter.on_trial_add(controller, trial)
    assert [controller._actor_cache.cache_object("1 CPU", worker) for worker in "abcd"] == [True, True, True, False]
    adapter.on_trial_add(SimpleNamespace(), trial)  # a Ray without the cache: no error


def test_idle_workers_end_when_no_trial_is_left_to_start(opened):
    cache = _ObjectCache(may_keep_one=True)
    controller = SimpleNamespace(_actor_cache=cache, get_trials=lambda: [])
    scheduler = opened(2)
    adapter = TuneScheduler(scheduler, slots=3)
    adapter.on_trial_add(controller, SimpleNamespace(placement_group_factory="1 CPU"))
    for worker in "ab":
        cache.cache_object("1 CPU", worker)
    scheduler.next_job()
    adapter.choose_trial_to_run(controller)
    assert cache.total_max_objects == 3 and list(cache.flush_cached_objects()) == []
    scheduler.next_job()
    adapter.choose_trial_to_run(controller)
    adapter.choose_trial_to_run(controller)
    assert cache.total_max_objects == 0 and sorted(cache.flush_cached_objects(force_all=True)) == ["a", "b"]


def dead(number: int, failures: int, status: str = "") -> SimpleNamespace:
    """Tune's trial after so many worker deaths. Its status is ERROR if Tune restarts it, RUNNING if Tune gives up."""
    status = status or (Trial.ERROR if failures <= MAX_WORKER_DEATHS else Trial.RUNNING)
    metadata = SimpleNamespace(num_failures=failures)

    def recovers() -> bool:
        return metadata.num_failures <= MAX_WORKER_DEATHS

    return SimpleNamespace(
        config={"number": number}, run_metadata=metadata, num_failures=failures, status=status, error_file=None,
        should_recover=recovers,
    )  # fmt: skip


def test_trial_whose_worker_keeps_dying_without_an_epoch_fails(opened):
    scheduler = opened(3)
    scheduler.next_job()
    adapter = TuneScheduler(scheduler, slots=1)
    for failures in range(1, MAX_WORKER_DEATHS + 1):
        adapter.on_trial_error(None, dead(0, failures))
        assert scheduler.record.trials[0].state == "running"
        assert not scheduler._interrupted  # Tune restarts it
    adapter.on_trial_error(None, dead(0, MAX_WORKER_DEATHS + 1))
    assert scheduler.record.trials[0].state == "failed"
    assert scheduler.record.trials[0].reason == "error: its worker died 6 times; no message"


def test_trial_that_makes_progress_survives_any_number_of_worker_deaths(opened):
    scheduler = opened(3)
    scheduler.next_job()
    adapter = TuneScheduler(scheduler, slots=1)
    report(scheduler, 0, 1, 0.5)
    for failures in range(1, MAX_WORKER_DEATHS + 1):
        trial = dead(0, failures)
        adapter.on_trial_error(None, trial)
    report(scheduler, 0, 2, 0.5)
    trial = dead(0, MAX_WORKER_DEATHS + 1)  # Tune has given it up
    adapter.on_trial_error(None, trial)
    assert trial.run_metadata.num_failures == 1 and scheduler.record.trials[0].state == "running"
    assert scheduler.next_job().number == 0


def test_trial_that_tune_loses_before_it_began_is_started_again_once(opened):
    scheduler = opened(3)
    scheduler.next_job()
    adapter = TuneScheduler(scheduler, slots=1)
    for _ in range(2):
        adapter.on_trial_error(None, dead(0, 1, status=Trial.PENDING))
    assert [scheduler.next_job().number for _ in range(2)] == [0, 1]
