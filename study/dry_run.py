"""What a study would do and take, without doing it: `--dry-run`.

The time is an estimate. How long an epoch takes is read from the study's own trials if it has any; else three of its
configurations (a quarter, half and three quarters up in multiply-adds) are timed for a few seconds where the trials
would run: on this machine, or on a node that can run a trial (while a cluster has none, on its head, which the plan
says). Each is timed alone, on 1/25 or less of the images. How many epochs there will be is uncertain too, because early
stopping decides: see `study.display.time_left`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ramcore.config import Config
from ramcore.cost import cost
from ramcore.errors import UserError
from study import cluster
from study.designs import TrialSpec, published, search_origins
from study.prepare import Prepared
from study.record import TrialRecord, read_totals, read_trials
from study.search_space import configuration
from study.sobol import SobolSequence

if TYPE_CHECKING:
    from study.pool import Pool
    from study.run import Flags
    from study.trainable import SharedData

_TIMED_STEPS = 20  # training steps of a timed epoch, at least
_TIMED_SHARE = 25  # and at most one in so many images
_POINTS = 200  # of the space, to say how large its networks are


def plan_lines(flags: Flags, prepared: Prepared, uri: str, pool: Pool) -> list[str]:
    """What --dry-run prints. Raises UserError."""
    settings, space = prepared.settings, prepared.space
    trials, rows = read_trials(prepared.folder / "study.db") if prepared.exists else ([], None)
    if rows is None and prepared.rows is not None:
        rows = prepared.rows()
    if rows is not None:
        rows = rows[: prepared.total]
        configs = [spec.config for spec in rows]
        origins: Sequence[str] = [spec.origin for spec in rows]
    else:
        assert space is not None
        points = SobolSequence(space, settings.seed)
        configs = [configuration(space, points[i]) for i in range(_POINTS)]
        totals = read_totals(prepared.folder / "study.db") if prepared.exists else []
        if (prepared.total or 0) > (totals[-1] if totals else 0):
            totals.append(prepared.total or 0)
        origins = search_origins(totals, len(published(space)), settings.sobol_share)
    place = _on_cluster if flags.address is not None else _here
    slots, machines, where, seconds, timed = place(flags, prepared, uri, pool, trials, configs)
    lines = [
        f"Study {settings.study}: {'continues' if prepared.exists else 'new'}",
        f"  design     {settings.design}; {settings.epochs} epochs, {settings.seeds_per_trial} seeds a trial",
        f"  task       {settings.task}; data {settings.data} {prepared.data.sizes}, sha256 {settings.digest[:12]}",
        *where,
        f"  slots      {slots}, one trial each ({flags.cpus_per_trial:g} CPU, {flags.gpus_per_trial or 0:g} GPU each)",
        f"  storage    {prepared.folder if '://' not in prepared.storage else prepared.storage}",
        f"  tracking   {uri}",
        *_time_and_cost(flags, trials, origins, settings.epochs, slots, machines, seconds, timed),
    ]
    return lines + (_search_lines(prepared, origins, configs) if rows is None else _row_lines(rows))


def _search_lines(prepared: Prepared, origins: Sequence[str], configs: list[Config]) -> list[str]:
    assert prepared.space is not None
    counts = ", ".join(f"{origins.count(origin)} {origin}" for origin in dict.fromkeys(origins))
    lines = [f"  trials     {len(origins)}: {counts} (only tpe trials are stopped early)"]
    for d in prepared.space.dimensions:
        scale = ", log" if d.log else ""
        lines.append(f"  {d.name:17s} {d.type} {d.low:g} to {d.high:g}{scale} ({d.unit}): {d.reason}")
    sizes = [cost(config) for config in configs]
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


def _time_and_cost(
    flags: Flags,
    trials: list[TrialRecord],
    origins: Sequence[str],
    epochs: int,
    slots: int,
    machines: int,
    seconds: list[float],
    timed: str,
) -> list[str]:
    from study.display import duration, time_left

    one_by_one = time_left(trials, origins, epochs, 1, seconds)
    side_by_side = time_left(trials, origins, epochs, slots, seconds)
    if one_by_one is None or side_by_side is None:
        return [f"  time       unknown: {timed}"]
    low, high = (s / 3600 for s in one_by_one)
    lines = [
        f"  time       {low:.2g} to {high:.2g} trial-hours; {duration(side_by_side[0])} to {duration(side_by_side[1])} "
        f"on all slots ({timed})"
    ]
    if flags.price_per_hour is not None:
        low, high = (s / 3600 * machines * flags.price_per_hour for s in side_by_side)
        of = f"{machines} worker{'s' if machines > 1 else ''}" if flags.address is not None else "this machine"
        lines.append(
            f"  cost       {low:.2f} to {high:.2f} for {of} at {flags.price_per_hour:g} an hour"
            + ("; their start, the head and the storage come on top" if flags.address is not None else "")
        )
    return lines


_Place = tuple[int, int, list[str], list[float], str]  # slots, machines, lines, seconds an epoch, how they are known


def _here(
    flags: Flags, prepared: Prepared, uri: str, pool: Pool, trials: list[TrialRecord], configs: list[Config]
) -> _Place:
    from study.pool import count_slots, local_resources
    from study.trainable import SharedData

    slots = count_slots(local_resources(), pool)
    if any(t.epochs for t in trials):
        return slots, 1, [], [], f"from {sum(len(t.epochs) for t in trials)} epochs so far"
    some = _some(configs)
    data, seeds = SharedData.of(prepared.data), tuple(range(prepared.settings.seeds_per_trial))
    seconds = time_epochs(some, data, seeds, pool.cpus_per_trial, pool.gpus_per_trial)
    return slots, 1, [], seconds, f"{len(some)} configurations timed now, on this machine"


def _on_cluster(
    flags: Flags, prepared: Prepared, uri: str, pool: Pool, trials: list[TrialRecord], configs: list[Config]
) -> _Place:
    import ray
    from ray.exceptions import RayError

    from study.pool import ray_running
    from study.trainable import SharedData

    need, growth = pool.need, pool.growth
    assert flags.address is not None
    cluster.check_lasting(flags.storage, uri)
    with ray_running(flags.address):
        present = cluster.nodes()
        if problem := cluster.Check(prepared.storage)(present):
            raise UserError(problem)
        able = [node for node in present if need.fits(node.resources)]
        slots = pool.slots
        sizes = [f"{n}: {n.resources.get('CPU', 0):g} CPUs, {n.resources.get('GPU', 0):g} GPUs" for n in present]
        cpus, gpus = (sum(n.resources.get(kind, 0) for n in present) for kind in ("CPU", "GPU"))
        where = [f"  cluster    {len(present)} nodes, {cpus:g} CPUs, {gpus:g} GPUs ({'; '.join(sizes)})"]
        if growth is not None:
            where.append(
                f"             may grow to {growth.workers} workers of {growth.worker['CPU']:g} CPUs, "
                f"{growth.worker['GPU']:g} GPUs"
            )
        elif not able:
            where.append("             none can run a trial yet")
        machines = growth.workers if growth is not None else max(1, len(able))
        if any(t.epochs for t in trials):
            return slots, machines, where, [], f"from {sum(len(t.epochs) for t in trials)} epochs so far"
        some, data = _some(configs), ray.put(SharedData.of(prepared.data))
        # Without a worker, on a node that runs no trials: nobody pays for a machine to see a plan.
        node, gpus = (able[0], need.gpus) if able else (present[0], 0.0)
        cpus = need.cpus if able else 0.0
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=cluster.only_on(node))(time_epochs)
        seeds = tuple(range(prepared.settings.seeds_per_trial))
        try:
            seconds = ray.get(task.remote(some, data, seeds, need.cpus, gpus), timeout=_PATIENCE)
        except RayError as error:
            return slots, machines, where, [], f"timing an epoch on {node} failed ({cluster.telling_line(error)})"
        timed = f"{len(some)} configurations timed now, on {node}"
        if not able:
            faster = " and on its CPU, where a GPU is faster" if need.gpus else ""
            timed += f", as no worker is up{faster}"
        return slots, machines, where, seconds, timed


_PATIENCE = 180.0  # seconds for the timing on a node, which may be busy with another study


def _some(configs: list[Config]) -> list[Config]:
    """Those a quarter, half and three quarters up in multiply-adds."""
    ordered = sorted(configs, key=lambda config: cost(config).macs)
    return [ordered[len(ordered) * quarter // 4] for quarter in (1, 2, 3)]


def time_epochs(
    configs: list[Config], data: SharedData, seeds: tuple[int, ...], cpus: float, gpus: float
) -> list[float]:
    """Seconds that an epoch of each configuration takes here, as `study.trainable` would train it.

    Each trains one short epoch to warm up and one that is timed, on the first images of each split.
    """
    import torch

    from ramcore.data import Split, TaskData
    from ramcore.train import Trainer

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cpus)))
    device = "cuda" if gpus > 0 and torch.cuda.is_available() else "cpu"
    found: list[float] = []
    try:
        for config in configs:
            whole = data.task(config.task)
            size = min(len(whole.train.labels), _TIMED_STEPS * config.batch_size)
            share = max(size / len(whole.train.labels), 1 / _TIMED_SHARE)

            def cut(split: Split, share: float = share) -> Split:
                count = max(1, round(share * len(split.labels)))
                return Split(split.images[:count], split.labels[:count])

            few: dict[str, Any] = {name: cut(whole.split(name)) for name in ("train", "validation", "test")}  # type: ignore[arg-type]
            short = TaskData(data=whole.data, task=whole.task, digest=whole.digest, **few)
            trainer = Trainer(dataclasses.replace(config, epochs=2), short, seeds=seeds, device=device)
            trainer.epoch()
            steps = len(whole.train.labels) / len(short.train.labels)
            found.append(trainer.epoch().to_dict()["seconds"] * steps)
    finally:
        torch.set_num_threads(threads)
    return found
