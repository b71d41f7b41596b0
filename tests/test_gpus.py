"""Trials on GPUs: how many share one, and what happens when its memory runs out or CUDA breaks. Most GPUs are faked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_mps import daemons
from test_trainable import reports, without_time

from ramcore import machine
from ramcore.config import Config
from ramcore.errors import UserError
from ramcore.sources import load_task
from ramcore.trainer import Trainer
from study import gpus, measure, mps, pool, results
from study.cluster import Growth, Node
from study.designs import TrialSpec
from study.display import Display
from study.flags import DONE, SOME_FAILED, Flags
from study.record import Record, StudySettings, read_study
from study.run import main
from study.scheduler import StudyScheduler
from study.sharing import CPU, GPUs, Sharing, choose
from study.storage import Storage
from study.trainable import Job, SharedData, run_trial

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
H200 = GPUs(count=1, name="NVIDIA H200", memory=140 * GIB)


@pytest.mark.parametrize(
    ("found", "cores_for", "wanted", "memory", "trials", "first"),
    [
        (H200, 64, None, 1, 16, "more than 16 are not known to pay"),
        (H200, 8, 54, 1, 8, "CPU cores for 8"),
        (H200, 16, 54, 20, 6, "its memory holds 6 of 20.0 GiB, measured"),
        (H200, 16, 3, 1, 3, "3 trials to run"),
        (GPUs(count=4, memory=80 * GIB), 8, None, 1, 2, "CPU cores for 8"),
        (GPUs(count=2, memory=80 * GIB), 5, None, 1, 3, "CPU cores for 5"),
        (GPUs(count=4), 2, None, 1, 1, "CPU cores for 2"),  # of a cluster that does not declare the memory
        (GPUs(count=1, memory=GIB), 4, None, 2, 1, "its memory holds 0 of 2.0 GiB, measured"),
    ],
)
def test_fewest_of_memory_cores_gain_and_trials_share_a_gpu(found, cores_for, wanted, memory, trials, first):
    sharing = choose(found, cores_for=cores_for, wanted=wanted, memory=memory * GIB, measured=True)
    assert sharing.trials == trials and sharing.why.startswith(first)


@pytest.mark.parametrize("trials", range(1, 17))
def test_ray_fits_as_many_trials_on_a_gpu_as_share_it(trials):
    part = choose(H200, cores_for=trials, wanted=None, memory=1, measured=True).gpus
    assert round(part * 10_000) * trials <= 10_000  # Ray counts in these, and rounds
    assert Sharing(device="", gpus=part).trials == trials


# This machine.


@pytest.fixture
def images(tiny) -> SharedData:
    return SharedData.of(tiny[1])


@pytest.fixture
def card(monkeypatch, mps_place) -> SimpleNamespace:
    """A GPU that this process takes to be there; no worker sees it, and trains on the CPU. MPS is faked, too."""
    found = SimpleNamespace(name="NVIDIA H200", total_memory=140 * GIB)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(machine, "cpus", lambda: 8.0)
    monkeypatch.setattr(machine, "memory", lambda: 64 * GIB)
    return found


def local(wanted: int = 54, **flags: Any) -> gpus.Local:
    planned = [(Config(data="digits", task="original"), 2)]
    return gpus.Local(Flags(**flags), planned, wanted, pool.local_resources())


def used(chosen: gpus.Local, images: SharedData) -> Sharing:
    with chosen.used(images) as sharing:
        return sharing


def test_gpu_is_used_and_shared_under_mps_as_measured(card, images, monkeypatch):
    seen: list[str] = []

    def gpu_memory(config: Config, data: SharedData, seeds: int) -> int:
        seen.append(os.environ[mps.PIPE])
        return 40 * GIB

    monkeypatch.setattr(measure, "gpu_memory", gpu_memory)
    chosen = local()
    assert chosen.sharing.trials == 8 and "estimated" in chosen.sharing.why
    with chosen.used(images) as sharing:
        assert seen == [os.environ[mps.PIPE]] and len(daemons(Path(seen[0]).parent)) == 1
        assert str(sharing) == "1 x NVIDIA H200 (140 GiB), 3 trials share one"
        assert sharing.why.startswith("its memory holds 3 of 40.6 GiB, measured; CPU cores for 8; ")
    assert not daemons(Path(seen[0]).parent) and mps.PIPE not in os.environ


@pytest.mark.parametrize("trials", [0, 1])
def test_trial_that_is_alone_starts_no_mps(card, images, monkeypatch, trials):
    monkeypatch.setattr(mps, "running", lambda _: pytest.fail("started"))
    assert str(used(local(wanted=trials), images)) == "1 x NVIDIA H200 (140 GiB), 1 a trial"
    assert used(local(gpus_per_trial=0.5, wanted=trials), images).trials == 2
    assert used(local(gpus_per_trial=1), images).gpus == 1


@pytest.mark.parametrize("problem", ["missing", "hangs", "refuses", "the GPU"])
def test_gpu_is_not_shared_where_mps_cannot_be_used(card, images, monkeypatch, problem):
    monkeypatch.setenv("FAKE_MPS", problem)
    monkeypatch.setattr(mps, "_SECONDS", 1.0)

    def gpu_memory(*_: Any) -> int:
        raise measure.NotMeasured("a process on the GPU failed: busy")

    monkeypatch.setattr(measure, "gpu_memory", gpu_memory)
    if problem == "missing":
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
    said = {
        "missing": "there is no nvidia-cuda-mps-control",
        "hangs": "nvidia-cuda-mps-control did not start within 1 s",
        "refuses": "nvidia-cuda-mps-control did not start: MPS is not supported on this device",
        "the GPU": "a process on the GPU failed: busy",
    }[problem]
    with local().used(images) as sharing:
        assert mps.PIPE not in os.environ
        assert sharing == Sharing(device=str(H200), gpus=1.0, why=f"to share one needs CUDA's MPS: {said}")
    asked = used(local(gpus_per_trial=0.25), images)
    assert asked.gpus == 0.25
    assert asked.why == f"they take turns and gain nothing, for CUDA's MPS cannot be used: {said}"


def test_cpu_is_used_without_gpu_or_if_asked_for(card, images, monkeypatch):
    idle = used(local(gpus_per_trial=0), images)
    assert idle.gpus == 0 and idle.explained == (
        "CPU (--gpus-per-trial 0, so 1 x NVIDIA H200 (140 GiB) idle: leave it out to use a GPU)"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert used(local(), images) == used(local(gpus_per_trial=0), images) == CPU


def test_network_larger_than_the_gpu_is_refused(card):
    card.total_memory = 2**20
    with pytest.raises(UserError, match=r"a network must fit in memory; .* and there are 0\.0: lower num_scales"):
        local()


def test_dry_run_says_device_sharing_and_why(card, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "gpu_memory", lambda *_: GIB)
    timed: list[int] = []

    def time_sharing(configs, data, seeds, cpus, gpus, trials):
        timed.append(trials)
        return [1.0] * len(configs)

    monkeypatch.setattr("study.dry_run.time_sharing", time_sharing)
    assert main(Flags(data="digits", task="original", trials=6, dry_run=True)) == DONE
    out = capsys.readouterr().out
    assert "device     1 x NVIDIA H200 (140 GiB), 6 trials share one (6 trials to run; CPU cores for 8; " in out
    assert "more seeds cost little there: 8 seeds a trial take about 1.5 times as long as 2 (alone" in out
    assert "slots      6, one trial each (1 CPU, 0.167 GPU each)" in out
    assert timed == [6] and "timed now, on this machine's GPU, 6 at a time)" in out
    assert main(Flags(data="digits", task="original", trials=6, seeds_per_trial=8, dry_run=True)) == DONE
    assert "cost little" not in capsys.readouterr().out
    assert main(Flags(data="digits", task="original", gpus_per_trial=0.0, dry_run=True)) == DONE
    assert "device     CPU (--gpus-per-trial 0, so 1 x NVIDIA H200 (140 GiB) idle" in capsys.readouterr().out
    assert not list(tmp_path.glob("runs"))


# A cluster.

PLANNED = [(Config(data="digits", task="original"), 2)]


@pytest.mark.parametrize(
    ("worker", "trials"),
    [
        ({"CPU": 4.0, "GPU": 1.0, "GPU memory": 15.0}, 4),
        ({"CPU": 16.0, "GPU": 1.0, "GPU memory": 3.0}, 4),
        ({"CPU": 8.0, "GPU": 4.0}, 2),
        ({"CPU": 64.0, "GPU": 1.0}, 16),
    ],
)
def test_workers_of_a_cluster_share_a_gpu_as_their_cpus_and_memory_allow(worker, trials, monkeypatch):
    monkeypatch.setenv(mps.PIPE, "/tmp/ram-mps/pipe")
    growth = Growth(workers=2, worker=worker)
    assert gpus.of_cluster(Flags(), growth, [], PLANNED).trials == trials
    assert gpus.of_cluster(Flags(gpus_per_trial=0.5), growth, [], PLANNED).gpus == 0.5
    assert gpus.of_cluster(Flags(gpus_per_trial=0.0), growth, [], PLANNED) == CPU
    monkeypatch.delenv(mps.PIPE)
    alone = gpus.of_cluster(Flags(), growth, [], PLANNED)
    assert alone.gpus == 1 and alone.why.endswith("needs CUDA's MPS: the cluster does not set CUDA_MPS_PIPE_DIRECTORY")


def test_of_several_kinds_of_nodes_the_one_where_the_fewest_share_decides(monkeypatch):
    monkeypatch.setenv(mps.PIPE, "/tmp/ram-mps/pipe")
    sizes = ({"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}, {"CPU": 4.0, "GPU": 1.0})
    present = [Node(id=str(i), address="10.0.0.1", resources=size) for i, size in enumerate(sizes)]
    assert gpus.of_cluster(Flags(), None, present, PLANNED).trials == 4
    assert gpus.of_cluster(Flags(), None, present[:2], PLANNED).device == "1 x L4"
    assert gpus.of_cluster(Flags(), None, present[:1], PLANNED) == CPU


# Measuring.


def test_processes_measure_at_the_same_time(tiny):
    config, task = tiny
    start = time.monotonic()
    seconds = measure.time_sharing([config, config], SharedData.of(task), 1, 1.0, 0.0, 2)
    assert len(seconds) == 2 and all(0 < s < time.monotonic() - start for s in seconds)


def test_what_a_gpu_keeps_is_measured_in_a_process_of_its_own(tiny):
    assert measure.gpu_memory(tiny[0], SharedData.of(tiny[1]), 2) == 0  # of torch on a machine without a GPU


def test_process_that_fails_or_hangs_is_told_in_one_line(monkeypatch):
    with pytest.raises(measure.NotMeasured, match=r"^a process on the GPU failed: "):
        measure._in_processes(2, torch.zeros, -1)
    monkeypatch.setattr(measure, "_SECONDS", 2.0)
    with pytest.raises(measure.NotMeasured, match=r"^a process on the GPU did not end within 2 s$"):
        measure._in_processes(1, time.sleep, 100)


# Memory that runs out, and a broken CUDA.

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("error", "lacks", "lost"),
    [
        (OUT_OF_MEMORY, True, False),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False, True),
        (torch.AcceleratorError("CUDA error: the MPS client has been terminated by the server"), False, True),
        (
            RuntimeError("Error from cudaGetDeviceCount(). Error 805: MPS client failed to connect"),
            False,
            True,
        ),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False, False),
        (ValueError("CUDA"), False, False),
    ],
)
def test_errors_of_a_gpu_are_told_apart(tiny, images, tmp_path, monkeypatch, error, lacks, lost):
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "epoch", fails)
    job = Job(number=0, config=tiny[0], seeds=(0,), test=False, held=0, storage=str(tmp_path), study="s")
    said: list[dict[str, Any]] = []
    for shares in (True, False):
        with pytest.raises(type(error)) if lost else contextlib.nullcontext():
            run_trial(job, images, said.append, shares=shares)
    if not lost:
        assert [next(iter(result)) for result in said] == ["out_of_memory" if lacks else "error", "error"]
        assert said[0].get("out_of_memory", said[0].get("error")) == said[1]["error"]


def rows(count: int) -> list[TrialSpec]:
    config = Config(data="digits", task="original", epochs=1)
    return [TrialSpec(config=config, origin="mine", row=str(i), seeds=(i,)) for i in range(count)]


@contextlib.contextmanager
def scheduled(folder: Path, count: int):
    settings = StudySettings(
        study="s", task="original", data="digits", digest="0" * 64, design="ablation", epochs=1, seeds_per_trial=1,
        seed=0, space={"schema": 1, "dimensions": [], "constraints": [], "default": {}, "fixed": {}},
    )  # fmt: skip
    with Record.open(folder / "s", settings, total=None, rows=lambda: rows(count)) as record:
        display = Display(study="s", epochs=1)
        yield StudyScheduler(record, space=None, storage=Storage.parse(str(folder)), callback=display)


def finished(number: int) -> dict[str, Any]:
    metrics = {"epoch": 1, "seconds": 1.0, "seeds": [number], "diverged": [False], "val_accuracy": [0.5]}
    return {"epoch": 1, "metrics": metrics}


def test_trial_out_of_gpu_memory_waits_until_the_others_have_ended_and_fails_the_second_time(tmp_path):
    with scheduled(tmp_path, 3) as scheduler:
        assert [job.number for _ in range(3) if (job := scheduler.next_job())] == [0, 1, 2]
        assert not scheduler.report(1, {"out_of_memory": "OutOfMemoryError: CUDA out of memory"})
        assert scheduler.nothing_to_start and scheduler.next_job() is None and not scheduler.finished
        scheduler.report(0, finished(0))
        scheduler.requeue_running()  # Ray broke down meanwhile
        again = scheduler.next_job()
        assert again is not None and again.number == 2 and scheduler.next_job() is None
        scheduler.report(2, finished(2))
        assert scheduler.retry_crowded()
        again = scheduler.next_job()
        assert again is not None and again.number == 1 and not scheduler.retry_crowded()
        scheduler.report(1, {"error": "OutOfMemoryError: CUDA out of memory"})
        assert scheduler.finished and scheduler.record.trials[1].reason == "error: OutOfMemoryError: CUDA out of memory"


def test_study_goes_on_when_a_trial_runs_out_of_gpu_memory(
    card, tmp_path, empty_database, monkeypatch, capsys
):  # fmt: skip
    """Trial 1 needs more than its part of the GPU, trial 2 more than the whole."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(results, "_log_model", lambda *_: None)
    monkeypatch.setattr(results, "_draw", lambda best, weights, data, path: path.touch())
    monkeypatch.setattr(measure, "gpu_memory", lambda *_: GIB)
    parts: dict[int, list[float]] = {}
    epoch = Trainer.epoch

    def run_trials(scheduler, data, ray_pool, look=None):
        while trial := scheduler.next_job():
            gpus, number = ray_pool.trial.gpus, trial.number
            parts.setdefault(number, []).append(gpus)

            def fails(self, short=(number == 1 and gpus < 1) or number == 2):
                if short:
                    raise OUT_OF_MEMORY
                return epoch(self)

            monkeypatch.setattr(Trainer, "epoch", fails)
            run_trial(trial, data, lambda r, number=number: scheduler.report(number, r), shares=gpus < 1)

    monkeypatch.setattr(pool, "ray_running", lambda address: contextlib.nullcontext())
    monkeypatch.setattr(pool.Pool, "devices", {"GPU": 1.0})
    monkeypatch.setattr(pool, "run_trials", run_trials)
    flags = Flags(data="digits", task="original", trials=4, epochs=1, seeds_per_trial=1, study="s")
    assert main(flags) == SOME_FAILED
    captured = capsys.readouterr()
    assert parts == {0: [0.25], 1: [0.25, 1.0], 2: [0.25, 1.0], 3: [0.25]}
    assert "trial 0001 waits for a whole GPU, after the others: OutOfMemoryError: CUDA out of memory. " in captured.err
    assert "failed: trial 0002: error: OutOfMemoryError: CUDA out of memory. Tried to allocate" in captured.out
    assert "training on 1 x NVIDIA H200 (140 GiB), 4 trials share one (4 trials to run; " in captured.err
    known = read_study(tmp_path / "runs" / "s" / "study.db")
    assert known is not None and [t.state for t in known.trials] == ["complete", "complete", "failed", "complete"]


_OWN = "RAM_TEST_HAS_A_PROCESS_OF_ITS_OWN"


def breaks_once(folder: Path) -> Any:
    """Work that notes its GPUs, loses CUDA at first in trial 0 and runs out of a shared GPU's memory in trial 1.

    It is a closure, because workers import no tests.
    """
    done = finished(0)

    def work(config: dict[str, Any], data: Any, cpus: float, gpus: float) -> None:
        import json
        import os

        from ray import tune

        number, notes = config["number"], folder / f"trial {config['number']}"
        with notes.open("a") as file:
            print(gpus, os.getpid(), file=file)
        if number == 0 and len(notes.read_text().splitlines()) == 1:
            raise RuntimeError("CUDA error: the MPS client has been terminated by the server")
        result = done | {"metrics": done["metrics"] | {"seeds": [number]}}
        if number == 1 and gpus < 1:
            result = {"out_of_memory": "CUDA out of memory"}
        tune.report({"result": json.dumps(result)})

    return work


def test_trial_that_lost_cuda_gets_another_worker_and_one_out_of_memory_a_whole_gpu(
    card, images, tmp_path, monkeypatch, capsys, request
):
    if _OWN not in os.environ:  # a process that has had a Ray of its own cannot work on another cluster afterwards
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{request.node.name}"]
        ran = subprocess.run(command, env=os.environ | {_OWN: "1"}, cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout
        return
    monkeypatch.setattr(machine, "cpus", lambda: 2.0)
    with scheduled(tmp_path, 3) as scheduler, pool.ray_running(None):
        there = pool.Pool(trial=pool.trial_resources(1.0, 0.5, [], on_cluster=False), max_concurrent=None)
        pool.run_trials(scheduler, images, there, work=breaks_once(tmp_path))
        assert scheduler.retry_crowded()
        whole = dataclasses.replace(there, trial=dataclasses.replace(there.trial, gpus=1.0))
        pool.run_trials(scheduler, images, whole, work=breaks_once(tmp_path))
        assert scheduler.error is None and scheduler.finished
    noted = [[line.split() for line in (tmp_path / f"trial {i}").read_text().splitlines()] for i in range(3)]
    assert [[part for part, _ in trial] for trial in noted] == [["0.5", "0.5"], ["0.5", "1.0"], ["0.5"]]
    assert noted[0][0][1] != noted[0][1][1]  # a new process
    assert "trial 0000: its worker died; it is started again" in capsys.readouterr().err


# Real GPUs.


@pytest.mark.gpu
def test_trials_that_share_a_gpu_give_what_each_gives_alone(tmp_path, monkeypatch):
    flags = ["--data", "digits", "--task", "original", "--trials", "4", "--epochs", "3", "--gpus-per-trial", "0.25"]
    done = subprocess.run(
        [sys.executable, "-m", "study.run", *flags, "--study", "s", "--tracking-uri", "sqlite:///m.db"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ", 4 trials share one\n" in done.stderr and "take turns" not in done.stderr, done.stderr
    known = read_study(tmp_path / "runs" / "s" / "study.db")
    assert known is not None and len(known.trials) == 4
    images = SharedData.of(load_task(Config(data="digits", task="original")))
    for trial in known.trials:
        alone = Job(
            number=trial.number, config=trial.spec.config, seeds=trial.spec.seeds, test=False, held=0,
            storage=str(tmp_path / "alone"), study="s",
        )  # fmt: skip
        found = [result["metrics"] for result in without_time(reports(alone, images, device="cuda"))]
        shared = [{k: v for k, v in epoch.metrics.items() if k != "seconds"} for epoch in trial.epochs]
        assert shared and json.loads(json.dumps(found))[: len(shared)] == shared  # it may have been stopped early
