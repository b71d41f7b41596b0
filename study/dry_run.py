"""`--dry-run`: print what a study would do and take, without doing it.

The time is an estimate. An epoch's time is read from the study's own trials if it has any. Else three of its
configurations, a quarter, half and three quarters up in multiply-adds, are timed for a few seconds where the trials
would run: on this machine, or on a node that can run a trial. While a cluster has no such node, its head is timed, and
the output says so. As many are timed side by side as share a GPU; on a CPU, each is timed alone (`study.measure`). The
number of epochs is uncertain too, because early stopping decides it: see `study.display.time_left`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ray
from ray.exceptions import RayError

from ramcore.config import Config
from ramcore.cost import cost
from ramcore.errors import UserError
from study import cluster, pool
from study.designs import TrialSpec, published, search_origins
from study.display import duration, time_left
from study.flags import Flags
from study.measure import NotMeasured, time_epochs, time_sharing
from study.prepare import Prepared
from study.ray_internals import ray_reason
from study.record import TrialRecord
from study.search_space import configuration
from study.sharing import Sharing, per_gpu
from study.sobol import SobolSequence
from study.trainable import SharedData

_POINTS = 200  # of the space, to say how large its networks are
_MANY_SEEDS = 8  # a trial with so many takes 1.5 times as long as with 2, alone on an H200
_PATIENCE = 180.0  # seconds for the timing on a node, which may be busy with another study


class _Trials(NamedTuple):
    """The study's trials."""

    recorded: list[TrialRecord]  # so far
    rows: list[TrialSpec] | None  # of a fixed design
    configs: list[Config]  # of the rows, or of points all over the space
    origins: list[str]  # of every trial that the study is to have


class _Place(NamedTuple):
    """Where the trials would run, and how fast."""

    slots: int  # trials at a time
    machines: int = 1  # that are paid for
    lines: Sequence[str] = ()  # about the cluster
    seconds: Sequence[float] = ()  # of an epoch of each timed configuration; empty: the record's epochs tell
    timed: str = ""  # how these are known


def dry_run_lines(flags: Flags, prepared: Prepared, uri: str, ray_pool: pool.Pool, sharing: Sharing) -> list[str]:
    """The lines that --dry-run prints. Raises UserError."""
    settings = prepared.settings
    trials = _trials(prepared)
    epochs = sum(len(trial.epochs) for trial in trials.recorded)
    to_time = [] if epochs else _typical(trials.configs)
    if flags.address is None:
        place = _here(prepared, ray_pool, to_time)
    else:
        cluster.check_lasting(flags.storage, uri)
        with pool.ray_running(flags.address):
            place = _on_cluster(prepared, ray_pool, to_time)
    if epochs:
        place = place._replace(timed=f"from {epochs} epochs so far")
    storage = prepared.storage if prepared.storage.is_remote else prepared.record_path.parent
    trial = f"{ray_pool.trial.cpus:g} CPU, {ray_pool.trial.gpus:.3g} GPU each"
    return [
        f"Study {settings.study}: {'continues' if prepared.known else 'new'}",
        f"  design     {settings.design}; {settings.epochs} epochs, {settings.seeds_per_trial} seeds a trial",
        f"  task       {settings.task}; data {settings.data} {prepared.data.sizes}, sha256 {settings.digest[:12]}",
        *place.lines,
        f"  device     {sharing.explained}",
        *_seeds_line(prepared, sharing),
        f"  slots      {place.slots}, one trial each ({trial})",
        f"  storage    {storage}",
        f"  tracking   {uri}",
        *_time_and_cost(flags, settings.epochs, trials, place),
        *(_search_lines(prepared, trials) if trials.rows is None else _row_lines(trials.rows)),
    ]


def _seeds_line(prepared: Prepared, sharing: Sharing) -> list[str]:
    if not sharing.gpus or prepared.known or prepared.settings.seeds_per_trial >= _MANY_SEEDS:
        return []
    cheap = f"{_MANY_SEEDS} seeds a trial take about 1.5 times as long as 2 (alone on an H200)"
    return [f"             more seeds cost little there: {cheap}, see --seeds-per-trial"]


def planned_configurations(prepared: Prepared) -> list[tuple[Config, int]]:
    """The configurations of the study's trials and their numbers of seeds; of a search, those of points all over it."""
    if (rows := _rows(prepared)) is not None:
        return [(spec.config, len(spec.seeds)) for spec in rows]
    assert prepared.space is not None
    points = SobolSequence(prepared.space, prepared.settings.seed)
    seeds = prepared.settings.seeds_per_trial
    return [(configuration(prepared.space, points[i]), seeds) for i in range(_POINTS)]


def _rows(prepared: Prepared) -> list[TrialSpec] | None:
    """The rows of a fixed design, as many as are asked for."""
    known = prepared.known
    rows = known.rows if known else prepared.rows() if prepared.rows else None
    return None if rows is None else rows[: prepared.total]


def _trials(prepared: Prepared) -> _Trials:
    known, rows = prepared.known, _rows(prepared)
    recorded = known.trials if known else []
    configs = [config for config, _ in planned_configurations(prepared)]
    if rows is not None:
        return _Trials(recorded, rows, configs, [spec.origin for spec in rows])
    space, settings, total = prepared.space, prepared.settings, prepared.total or 0
    assert space is not None
    totals, aims = (known.totals, known.aims) if known else ([], [])
    if total != (totals or [0])[-1]:
        totals, aims = [*totals, total], [*aims, prepared.aim]
    asked = [*(known.asked if known else ()), *prepared.asked]
    origins = search_origins(totals, len(published(space)), settings.sobol_share, (point.at for point in asked), aims)
    return _Trials(recorded, None, configs, origins)


def _typical(configs: list[Config]) -> list[Config]:
    """The configurations a quarter, half and three quarters up in multiply-adds."""
    ordered = sorted(configs, key=lambda config: cost(config).macs)
    return [ordered[len(ordered) * quarter // 4] for quarter in (1, 2, 3)]


def _search_lines(prepared: Prepared, trials: _Trials) -> list[str]:
    assert prepared.space is not None
    origins = trials.origins
    counts = ", ".join(f"{origins.count(origin)} {origin}" for origin in dict.fromkeys(origins))
    lines = [f"  trials     {len(origins)}: {counts} (only tpe trials are stopped early)"]
    if prepared.taken:
        lines.append(f"  learns     {prepared.taken.summary(prepared.settings.epochs)}")
    for d in prepared.space.dimensions:
        unit = f" ({d.unit})" if d.unit else ""
        lines.append(f"  {d.name:17s} {d.type} {d.extent}{unit}: {d.reason}")
    parameters, macs = zip(*(cost(config) for config in trials.configs), strict=True)
    size = f"{min(parameters):,} to {max(parameters):,} parameters, {min(macs):,} to {max(macs):,} multiply-adds"
    return [*lines, f"  size       {size} an image ({_POINTS} points)"]


def _row_lines(rows: list[TrialSpec]) -> list[str]:
    lines = [f"  trials     {len(rows)}:"]
    for spec in rows:
        size = cost(spec.config)
        lines.append(f"    {spec.row:45s} {size.parameters:>10,} parameters {size.macs:>12,} multiply-adds")
    return lines


def _time_and_cost(flags: Flags, epochs: int, trials: _Trials, place: _Place) -> list[str]:
    one_by_one, side_by_side = (
        time_left(trials.recorded, trials.origins, epochs, slots, place.seconds) for slots in (1, place.slots)
    )
    if one_by_one is None or side_by_side is None:
        return [f"  time       unknown: {place.timed}"]
    low, high = (s / 3600 for s in one_by_one)
    shortest, longest = map(duration, side_by_side)
    hours = f"{low:.2g} to {high:.2g} trial-hours; {shortest} to {longest} on all slots ({place.timed})"
    if flags.price_per_hour is None:
        return [f"  time       {hours}"]
    low, high = (s / 3600 * place.machines * flags.price_per_hour for s in side_by_side)
    machines, rest = "this machine", ""
    if flags.address is not None:
        machines = f"{place.machines} worker{'s' if place.machines > 1 else ''}"
        rest = "; their start, the head and the storage come on top"
    price = f"{low:.2f} to {high:.2f} for {machines} at {flags.price_per_hour:g} an hour{rest}"
    return [f"  time       {hours}", f"  cost       {price}"]


def _here(prepared: Prepared, ray_pool: pool.Pool, to_time: list[Config]) -> _Place:
    slots = pool.count_slots(pool.local_resources(), ray_pool)
    if not to_time:
        return _Place(slots)
    trial, data, seeds = ray_pool.trial, SharedData.of(prepared.data), prepared.settings.seeds_per_trial
    timed = f"{len(to_time)} configurations timed now, on this machine"
    if not trial.gpus:
        return _Place(slots, seconds=time_epochs(to_time, data, seeds, trial.cpus, 0.0), timed=timed)
    together = min(slots, per_gpu(trial.gpus))
    try:
        seconds = time_sharing(to_time, data, seeds, trial.cpus, trial.gpus, together)
    except NotMeasured as error:
        return _Place(slots, timed=f"timing an epoch failed ({error})")
    return _Place(slots, seconds=seconds, timed=f"{timed}'s GPU, {together} at a time")


def _on_cluster(prepared: Prepared, ray_pool: pool.Pool, to_time: list[Config]) -> _Place:
    """Look at the cluster that this process has joined, and time there."""
    trial, growth = ray_pool.trial, ray_pool.growth
    present = cluster.nodes()
    if problem := cluster.Check(prepared.storage)(present):
        raise UserError(problem)
    able = [node for node in present if trial.fits(node.resources)]
    machines = growth.workers if growth is not None else max(1, len(able))
    place = _Place(ray_pool.slots, machines, _cluster_lines(present, able, growth))
    if not to_time:
        return place
    # Without a worker, a node that runs no trials is timed: a dry run must not start a machine that costs money.
    node = (able or present)[0]
    gpus = trial.gpus if able else 0.0
    together = min(trial.fits(node.resources), per_gpu(gpus)) if gpus else 1
    cpus = trial.cpus * together if able else 0.0
    whole = max(gpus, 1.0) if gpus else 0.0
    where = ray.remote(num_cpus=cpus, num_gpus=whole, scheduling_strategy=cluster.only_on(node))
    task = where(time_sharing if gpus else time_epochs)
    each = (to_time, ray.put(SharedData.of(prepared.data)), prepared.settings.seeds_per_trial, trial.cpus, gpus)
    try:
        seconds = ray.get(task.remote(*each, *([together] if gpus else [])), timeout=_PATIENCE)
    except RayError as error:
        return place._replace(timed=f"timing an epoch on {node} failed ({ray_reason(str(error))})")
    timed = f"{len(to_time)} configurations timed now, on {node}{f', {together} at a time' if gpus else ''}"
    if not able:
        timed += f", as no worker is up{' and on its CPU, where a GPU is faster' if trial.gpus else ''}"
    return place._replace(seconds=seconds, timed=timed)


def _cluster_lines(present: list[cluster.Node], able: list[cluster.Node], growth: cluster.Growth | None) -> list[str]:
    cpus, gpus = (sum(n.resources.get(kind, 0) for n in present) for kind in ("CPU", "GPU"))
    lines = [f"  cluster    {len(present)} nodes, {cpus:g} CPUs, {gpus:g} GPUs ({cluster.sizes(present)})"]
    if growth is not None:
        worker = f"{growth.worker['CPU']:g} CPUs, {growth.worker['GPU']:g} GPUs"
        lines.append(f"             may grow to {growth.workers} workers of {worker}")
    elif not able:
        lines.append("             none can run a trial yet")
    return lines
