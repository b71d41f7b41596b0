"""`--dry-run`: print what a study would do and take, without doing it.

The time is an estimate. An epoch's time is read from the study's own trials if it has any. Else three of its
configurations, a quarter, half and three quarters up in multiply-adds, are timed for a few seconds where the trials
would run: on this machine, or on a node that can run a trial. While a cluster has no such node, its head is timed, and
the plan says so. Each is timed alone, on 1/25 or less of the images. The number of epochs is uncertain too, because
early stopping decides it: see `study.display.time_left`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import ray
import torch
from ray.exceptions import RayError

from ramcore.config import Config
from ramcore.cost import cost
from ramcore.data import Split, TaskData
from ramcore.errors import UserError
from ramcore.trainer import Trainer
from study import cluster, pool
from study.designs import TrialSpec, published, search_origins
from study.display import duration, time_left
from study.flags import Flags
from study.prepare import Prepared
from study.ray_internals import ray_reason
from study.record import TrialRecord, read_totals, read_trials
from study.search_space import configuration
from study.sobol import SobolSequence
from study.trainable import SharedData

_TIMED_STEPS = 20  # training steps of a timed epoch, at least
_TIMED_SHARE = 25  # one in this many images is used, at most
_POINTS = 200  # of the space, to say how large its networks are
_PATIENCE = 180.0  # seconds for the timing on a node, which may be busy with another study


class _Trials(NamedTuple):
    """The study's trials."""

    recorded: list[TrialRecord]  # so far
    rows: list[TrialSpec] | None  # of a fixed design
    configs: list[Config]  # of the rows, or of points all over the space
    origins: Sequence[str]  # of every trial that the study is to have

    @property
    def num_epochs(self) -> int:
        """Epochs that are recorded."""
        return sum(len(trial.epochs) for trial in self.recorded)

    def typical(self) -> list[Config]:
        """The configurations a quarter, half and three quarters up in multiply-adds."""
        ordered = sorted(self.configs, key=lambda config: cost(config).macs)
        return [ordered[len(ordered) * quarter // 4] for quarter in (1, 2, 3)]


class _Place(NamedTuple):
    """Where the trials would run, and how fast."""

    slots: int  # trials at a time
    machines: int  # that are paid for
    lines: list[str]  # about the cluster
    seconds: list[float]  # of an epoch of each timed configuration; empty: the record's epochs tell
    timed: str  # how these are known


def plan_lines(flags: Flags, prepared: Prepared, uri: str, ray_pool: pool.Pool) -> list[str]:
    """The lines that --dry-run prints. Raises UserError."""
    settings = prepared.settings
    trials = _trials(prepared)
    place = (_on_cluster if flags.address is not None else _here)(flags, prepared, uri, ray_pool, trials)
    storage = prepared.storage if prepared.storage.is_remote else prepared.record_path.parent
    return [
        f"Study {settings.study}: {'continues' if prepared.exists else 'new'}",
        f"  design     {settings.design}; {settings.epochs} epochs, {settings.seeds_per_trial} seeds a trial",
        f"  task       {settings.task}; data {settings.data} {prepared.data.sizes}, sha256 {settings.digest[:12]}",
        *place.lines,
        f"  slots      {place.slots}, one trial each ({flags.cpus_per_trial:g} CPU, {flags.gpus_per_trial or 0:g} GPU "
        "each)",
        f"  storage    {storage}",
        f"  tracking   {uri}",
        *_time_and_cost(flags, settings.epochs, trials, place),
        *(_search_lines(prepared, trials) if trials.rows is None else _row_lines(trials.rows)),
    ]


def _trials(prepared: Prepared) -> _Trials:
    recorded, rows = read_trials(prepared.record_path) if prepared.exists else ([], None)
    if rows is None and prepared.rows is not None:
        rows = prepared.rows()
    if rows is not None:
        rows = rows[: prepared.total]
        return _Trials(recorded, rows, [spec.config for spec in rows], [spec.origin for spec in rows])
    space, settings, total = prepared.space, prepared.settings, prepared.total or 0
    assert space is not None
    points = SobolSequence(space, settings.seed)
    totals = read_totals(prepared.record_path) if prepared.exists else []
    if total > (totals[-1] if totals else 0):
        totals.append(total)
    origins = search_origins(totals, len(published(space)), settings.sobol_share)
    return _Trials(recorded, None, [configuration(space, points[i]) for i in range(_POINTS)], origins)


def _search_lines(prepared: Prepared, trials: _Trials) -> list[str]:
    assert prepared.space is not None
    origins = trials.origins
    counts = ", ".join(f"{origins.count(origin)} {origin}" for origin in dict.fromkeys(origins))
    lines = [f"  trials     {len(origins)}: {counts} (only tpe trials are stopped early)"]
    for d in prepared.space.dimensions:
        scale = ", log" if d.log else ""
        lines.append(f"  {d.name:17s} {d.type} {d.low:g} to {d.high:g}{scale} ({d.unit}): {d.reason}")
    sizes = [cost(config) for config in trials.configs]
    return [
        *lines,
        f"  size       {min(s.parameters for s in sizes):,} to {max(s.parameters for s in sizes):,} parameters, "
        f"{min(s.macs for s in sizes):,} to {max(s.macs for s in sizes):,} multiply-adds an image ({_POINTS} points)",
    ]


def _row_lines(rows: list[TrialSpec]) -> list[str]:
    lines = [f"  trials     {len(rows)}:"]
    for spec in rows:
        size = cost(spec.config)
        lines.append(f"    {spec.row:45s} {size.parameters:>10,} parameters {size.macs:>12,} multiply-adds")
    return lines


def _time_and_cost(flags: Flags, epochs: int, trials: _Trials, place: _Place) -> list[str]:
    one_by_one = time_left(trials.recorded, trials.origins, epochs, 1, place.seconds)
    side_by_side = time_left(trials.recorded, trials.origins, epochs, place.slots, place.seconds)
    if one_by_one is None or side_by_side is None:
        return [f"  time       unknown: {place.timed}"]
    low, high = (s / 3600 for s in one_by_one)
    lines = [
        f"  time       {low:.2g} to {high:.2g} trial-hours; {duration(side_by_side[0])} to {duration(side_by_side[1])} "
        f"on all slots ({place.timed})"
    ]
    if flags.price_per_hour is not None:
        low, high = (s / 3600 * place.machines * flags.price_per_hour for s in side_by_side)
        machines, rest = "this machine", ""
        if flags.address is not None:
            machines = f"{place.machines} worker{'s' if place.machines > 1 else ''}"
            rest = "; their start, the head and the storage come on top"
        lines.append(f"  cost       {low:.2f} to {high:.2f} for {machines} at {flags.price_per_hour:g} an hour{rest}")
    return lines


def _here(flags: Flags, prepared: Prepared, uri: str, ray_pool: pool.Pool, trials: _Trials) -> _Place:
    slots = pool.count_slots(pool.local_resources(), ray_pool)
    if trials.num_epochs:
        return _Place(slots, 1, [], [], f"from {trials.num_epochs} epochs so far")
    configs, seeds = trials.typical(), tuple(range(prepared.settings.seeds_per_trial))
    data = SharedData.of(prepared.data)
    seconds = time_epochs(configs, data, seeds, ray_pool.cpus_per_trial, ray_pool.gpus_per_trial)
    return _Place(slots, 1, [], seconds, f"{len(configs)} configurations timed now, on this machine")


def _on_cluster(flags: Flags, prepared: Prepared, uri: str, ray_pool: pool.Pool, trials: _Trials) -> _Place:
    assert flags.address is not None
    cluster.check_lasting(flags.storage, uri)
    trial, growth = ray_pool.trial, ray_pool.growth
    with pool.ray_running(flags.address):
        present = cluster.nodes()
        if problem := cluster.Check(prepared.storage)(present):
            raise UserError(problem)
        able = [node for node in present if trial.fits(node.resources)]
        slots = ray_pool.slots
        machines = growth.workers if growth is not None else max(1, len(able))
        lines = _cluster_lines(present, able, growth)
        if trials.num_epochs:
            return _Place(slots, machines, lines, [], f"from {trials.num_epochs} epochs so far")
        configs, data = trials.typical(), ray.put(SharedData.of(prepared.data))
        # Without a worker, a node that runs no trials is timed: a plan must not start a machine that costs money.
        node, cpus, gpus = (able[0], trial.cpus, trial.gpus) if able else (present[0], 0.0, 0.0)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=cluster.only_on(node))(time_epochs)
        seeds = tuple(range(prepared.settings.seeds_per_trial))
        try:
            seconds = ray.get(task.remote(configs, data, seeds, trial.cpus, gpus), timeout=_PATIENCE)
        except RayError as error:
            failed = f"timing an epoch on {node} failed ({ray_reason(str(error))})"
            return _Place(slots, machines, lines, [], failed)
        timed = f"{len(configs)} configurations timed now, on {node}"
        if not able:
            timed += f", as no worker is up{' and on its CPU, where a GPU is faster' if trial.gpus else ''}"
        return _Place(slots, machines, lines, seconds, timed)


def _cluster_lines(present: list[cluster.Node], able: list[cluster.Node], growth: cluster.Growth | None) -> list[str]:
    sizes = [f"{n}: {n.resources.get('CPU', 0):g} CPUs, {n.resources.get('GPU', 0):g} GPUs" for n in present]
    cpus, gpus = (sum(n.resources.get(kind, 0) for n in present) for kind in ("CPU", "GPU"))
    lines = [f"  cluster    {len(present)} nodes, {cpus:g} CPUs, {gpus:g} GPUs ({'; '.join(sizes)})"]
    if growth is not None:
        lines.append(
            f"             may grow to {growth.workers} workers of {growth.worker['CPU']:g} CPUs, "
            f"{growth.worker['GPU']:g} GPUs"
        )
    elif not able:
        lines.append("             none can run a trial yet")
    return lines


def time_epochs(
    configs: list[Config], data: SharedData, seeds: tuple[int, ...], cpus: float, gpus: float
) -> list[float]:
    """Seconds that an epoch of each configuration takes here, trained as `study.trainable` does.

    Each trains one short epoch to warm up and one that is timed, on the first images of each split.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cpus)))
    device = "cuda" if gpus > 0 and torch.cuda.is_available() else "cpu"
    found: list[float] = []
    try:
        for config in configs:
            whole = data.task(config.task)
            short = _shortened(whole, config.batch_size)
            trainer = Trainer(dataclasses.replace(config, epochs=2), short, seeds=seeds, device=device)
            trainer.epoch()
            steps = len(whole.train.labels) / len(short.train.labels)
            found.append(trainer.epoch().to_dict()["seconds"] * steps)
    finally:
        torch.set_num_threads(threads)
    return found


def _shortened(whole: TaskData, batch_size: int) -> TaskData:
    """The first images of each split, as many as an epoch is timed on."""
    total = len(whole.train.labels)
    share = max(min(total, _TIMED_STEPS * batch_size) / total, 1 / _TIMED_SHARE)

    def first(split: Split) -> Split:
        count = max(1, round(share * len(split.labels)))
        return Split(split.images[:count], split.labels[:count])

    return dataclasses.replace(
        whole, train=first(whole.train), validation=first(whole.validation), test=first(whole.test)
    )
