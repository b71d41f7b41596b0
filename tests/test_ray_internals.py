"""What `study.ray_internals` reaches into must be where Ray 2.60 has it. A failure here names the function to mend."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import ray._raylet
from ray._private import services
from ray.exceptions import RayError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.trainable.metadata import _TrainingRunMetadata
from ray.tune.utils.object_cache import _ObjectCache

from study import ray_internals


def test_tunes_controller_has_the_cache_that_keep_idle_workers_enlarges():
    source = inspect.getsource(TuneController)
    assert "self._actor_cache = _ObjectCache(" in source, "keep_idle_workers: Tune's cache of workers has moved"
    assert "self._actor_cache.cache_object(" in source, "keep_idle_workers: Tune no longer keeps workers in this cache"
    for method in (_ObjectCache.increase_max, _ObjectCache.decrease_max):
        assert "by" in inspect.signature(method).parameters, "keep_idle_workers: the cache's limit is set otherwise"


def test_keep_idle_workers_enlarges_the_cache_and_takes_it_back():
    cache = _ObjectCache(may_keep_one=True)
    trial = SimpleNamespace(placement_group_factory="1 CPU")
    release = ray_internals.keep_idle_workers(SimpleNamespace(_actor_cache=cache), trial, 3)
    assert release is not None and cache.total_max_objects == 3
    release()
    assert cache.total_max_objects == 0


def test_keep_idle_workers_does_nothing_without_the_cache():
    assert ray_internals.keep_idle_workers(SimpleNamespace(), SimpleNamespace(), 3) is None


def test_forget_worker_deaths_sets_the_count_that_tune_decides_by():
    trial = Trial("a trainable", stub=True, max_failures=1)
    metadata = trial.run_metadata
    assert isinstance(metadata, _TrainingRunMetadata), "forget_worker_deaths: the count of deaths has moved"
    metadata.num_failures = 5
    assert trial.num_failures == 5 and not trial.should_recover()
    ray_internals.forget_worker_deaths(trial)
    assert trial.num_failures == 1 and trial.should_recover(), "forget_worker_deaths: Tune decides by another count"


def test_last_message_is_the_last_line_of_the_trials_error_file(tmp_path):
    assert isinstance(inspect.getattr_static(Trial, "error_file"), property), "last_message: the file has moved"
    path = tmp_path / "error.txt"
    path.write_text("Traceback\n  killed due to the node running low on memory.\nmore\n\nlast line\n")
    assert "killed due to" in ray_internals.last_message(SimpleNamespace(error_file=str(path)))
    path.write_text("Traceback\nlast line\n")
    assert ray_internals.last_message(SimpleNamespace(error_file=str(path))) == "last line"
    assert ray_internals.last_message(SimpleNamespace(error_file=None)) == "no message"


def test_cluster_address_is_found_by_rays_own_function():
    assert callable(services.canonicalize_bootstrap_address_or_die), "cluster_address: Ray's function has moved"
    assert ray_internals.cluster_address("192.0.2.7:6379") == "192.0.2.7:6379"


def test_check_token_has_a_client_of_the_control_service():
    assert hasattr(ray._raylet, "GcsClient"), "check_token: the client has moved"
    with pytest.raises((RuntimeError, ConnectionError, RayError)):
        ray_internals.check_token("127.0.0.1:1")
