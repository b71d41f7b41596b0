"""Tables of a study -> indices, effects and comparisons, each with an interval. Draws and writes nothing."""

from __future__ import annotations

# pandas' own annotations are unions that its indexing never returns here, so these checks only raise false alarms.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportAssignmentType=false
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import gammaln
from scipy.stats import qmc, t

from analysis.load import StudyData
from analysis.surrogate import (
    Failures,
    Observations,
    Posterior,
    Surface,
    failure_logits,
    fit_failures,
    observe,
)
from ramcore.errors import UserError
from ramcore.space import Array, Dimension, Space
from study.designs import SEARCH_ORIGINS

DUMMY = "dummy (no effect)"
INTERVAL = 0.90  # every interval holds this much posterior probability
MIN_TRIALS = 5  # below this nothing can be cross-validated
MIN_RANKED = 8  # trials; below this a surface over several dimensions is a guess, whatever its fit
MIN_R2 = 0.5  # grouped cross-validated R2 below which nothing is ranked: less than half of the variance is understood
TIE = (0.05, 0.95)  # P(i matters more than j) inside: tied
FOLDS = 5
UNKNOWN = 0.9  # of the SD over the space: where the surface is less sure than that it explains under a fifth
HYPERDRAWS, DRAWS_EACH = 100, 3
DEFAULT_EVALUATION_SIZE = 10_000  # images behind an accuracy, where the study does not say
CHANCE = 0.1  # accuracy of guessing one of ten digits: what a diverged run delivers
CUBE_POINTS = 512  # quasi-random configurations that averages over the space are taken on

Progress = Callable[[str], None]


class Interval(NamedTuple):
    """A posterior median, or a mean of measurements, with the bounds of its INTERVAL."""

    low: float
    mid: float
    high: float


class Effect(NamedTuple):
    """What one parameter does at the full budget."""

    name: str
    label: str
    effect: Interval  # accuracy points from the worst to the best value, others averaged over, of runs that train
    effect_in_sd: Interval  # the same in standard deviations between seeds
    first: Interval  # first-order Sobol index of the logit
    total: Interval  # total Sobol index of the logit
    first_accuracy: Interval  # the same on the accuracy scale
    total_accuracy: Interval
    above_dummy: float  # P(total index greater than the dummy's)
    rank: int  # one more than the number of parameters that surely (TIE) matter more; equal ranks are ties
    with_divergence: Interval | None  # the effect when a run that diverges counts as guessing; None: none diverged
    failure: Interval | None  # change of the failure probability over the range, percentage points


class Curve(NamedTuple):
    """A parameter's marginal accuracy: grid values and bands, in accuracy points (0 to 100)."""

    name: str
    values: list[Any]
    unit: Array
    low: Array
    mid: Array
    high: Array
    extrapolated: Array  # bool: fewer than two full-budget trials at or beyond it, or mostly forbidden combinations


class Fit(NamedTuple):
    """How far the surface can be trusted."""

    r2: float  # grouped cross-validated, logit accuracy of trials the fold had not seen, against their mean by epoch
    final: int  # trials that came to the end of the budget; where they are few, r2 is of every trial's last epoch
    coverage: float  # share of them inside their 90% prediction interval
    held_out: int
    ceiling: float  # R2 a perfect surface would get, given the seed noise of a trial's mean
    r2_half: float  # the same with half of the trials, for judging what more trials would bring
    trials_needed: int | None  # rough number of trials for R2 = MIN_R2; None: reached, or out of reach
    observed: Array
    predicted: Array
    predicted_sd: Array


class Step(NamedTuple):
    """One step of the ablation path."""

    name: str
    before: Any
    after: Any
    gain: Interval  # accuracy points of this step
    accuracy: Interval  # accuracy after it, points


class Gain(NamedTuple):
    """Tunability: what setting one parameter alone can gain over the default."""

    name: str
    default: Any
    best: Any
    gain: Interval  # accuracy points


class Counts(NamedTuple):
    """Where every trial went."""

    total: int
    complete: int
    stopped: int
    diverged: int
    failed: int  # errors, not divergence
    running: int
    used: int  # trials that contribute to the surface
    seeds: int


class Analysis(NamedTuple):
    """Everything computed from one study."""

    name: str
    space: Space
    dimensions: tuple[Dimension, ...]
    constant: tuple[str, ...]
    counts: Counts
    origins: dict[str, int]
    budget: int
    evaluation_size: int
    fit: Fit
    ranked: bool
    effects: tuple[Effect, ...]  # in order of total index; the dummy among them
    more_than: pd.DataFrame  # P(row matters more than column), by total index
    interactions: pd.DataFrame  # median share of variance of each pair
    pair_intervals: dict[tuple[str, str], Interval]
    higher_order: Interval
    curves: dict[str, Curve]
    surface: PairSurface | None
    over_epochs: pd.DataFrame  # epoch, name, low, mid, high: total index
    seed_sd: Interval  # accuracy points at the full budget, averaged over trials
    seed_sd_known: bool
    tunability: tuple[Gain, ...]
    ablation: tuple[Step, ...]
    default: dict[str, Any]
    default_inside: bool
    best: dict[str, Any]
    best_trial: int
    best_accuracy: Interval
    default_accuracy: Interval
    claims: dict[str, Array]  # posterior draws behind the verdicts
    infeasible_share: float
    extrapolation_share: float
    failures: Failures | None
    biased: bool
    warnings: tuple[str, ...]
    mixing: float


class PairSurface(NamedTuple):
    """Mean accuracy over two parameters, others averaged over; points."""

    x: Dimension
    y: Dimension
    grid_x: Array
    grid_y: Array
    mean: Array  # (len(grid_y), len(grid_x))
    sd: Array


def interval(draws: Array) -> Interval:
    """Median and central interval of posterior draws."""
    low, mid, high = np.quantile(draws, [(1 - INTERVAL) / 2, 0.5, (1 + INTERVAL) / 2])
    return Interval(float(low), float(mid), float(high))


def mean_interval(values: Array) -> Interval:
    """Mean of repeated measurements and its t interval; NaN where there are none, or too few for an interval."""
    mean, half = float(values.mean()) if len(values) else math.nan, math.nan
    if len(values) > 1:
        half = float(t.ppf((1 + INTERVAL) / 2, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean - half, mean, mean + half)


def analyse(
    records: StudyData, progress: Progress | None = None, *, seed: int = 0, hyperdraws: int = HYPERDRAWS
) -> Analysis:
    """Fit the surface to a study and answer every question of it.

    Results do not depend on the order of trials or of parameters. Raises UserError if there is too little to fit.
    """
    tell = progress or _quiet
    space = records.space
    if space is None:
        raise UserError(f"sensitivity needs the search space; {records.space_problem}")
    trials, epochs = records.trials.sort_index(), records.epochs
    counts = count_trials(trials)
    missing = [d.name for d in space.dimensions if d.name not in trials.columns]
    x = pd.DataFrame(
        {d.name: d.to_unit(trials[d.name]) for d in space.dimensions if d.name not in missing}, index=trials.index
    )
    x = x[x.notna().all(axis=1)]
    searched = trials.index[trials["origin"].isin(SEARCH_ORIGINS)]
    x = x.loc[x.index.isin(list(searched))]
    seen = epochs.loc[epochs["val_accuracy"].notna() & epochs["trial"].isin(list(x.index)), "trial"].unique()
    constant = tuple(sorted([n for n in x.columns if x.loc[seen, n].nunique() < 2] + missing))
    varied = sorted((d for d in space.dimensions if d.name not in constant), key=lambda d: d.name)
    if len(seen) < MIN_TRIALS:
        raise UserError(
            f"a report needs at least {MIN_TRIALS} trials of the search with results; {records.study.name} has "
            f"{len(seen)} "
            f"of {len(trials)} (state: {_states(trials)}). Run more: python -m study.run --study {records.study.name} "
            f"--trials {max(3 * len(space.dimensions), 2 * MIN_RANKED)}"
        )
    if not varied:
        raise UserError(
            f"a ranking needs a parameter that varies; every trial of {records.study.name} has the same configuration"
        )
    budget, size = records.budget, evaluation_size(records.settings)
    last_seen = int(epochs.loc[epochs["trial"].isin(list(seen)), "epoch"].max())
    warnings: list[str] = []
    if last_seen < budget:
        warnings.append(
            f"No trial has reached the full budget of {budget} epochs yet; answers are for epoch {last_seen}."
        )
        budget = last_seen

    x = x[[d.name for d in varied]].copy()
    dummy = Dimension(name=DUMMY, type="float")
    x[DUMMY] = [_hash_unit(int(trial)) for trial in x.index]
    dimensions = (*varied, dummy)
    observations = observe(epochs, x, budget, size)
    surface = Surface(dimensions)
    rng = np.random.default_rng(seed)
    marks = np.unique(np.round(np.geomspace(1, budget, 6)))
    at = np.log(marks) / max(math.log(budget), 1e-9) if budget > 1 else np.zeros(1)
    tell(f"fitting the surface to {len(observations.trials)} trials ({len(observations.y)} rows)")
    posterior, warm = surface.sample(observations, at, hyperdraws=hyperdraws, draws_each=DRAWS_EACH, rng=rng)
    tell("cross-validating")
    fit = cross_validate(surface, observations, warm, np.random.default_rng(seed + 1))
    tell("computing indices and effects")

    failed = trials.loc[x.index].apply(lambda row: outcome(row) in ("diverged", "failed"), axis=1)
    diverged = trials.loc[x.index].apply(lambda row: outcome(row) == "diverged", axis=1)
    draws = len(posterior.weights)
    failures = _failures(surface, x, failed, draws, seed + 2)
    divergence = _failures(surface, x, diverged, draws, seed + 2)
    cube = _Cube(surface, posterior, None, seed)
    risky = cube if divergence is None else _Cube(surface, posterior, divergence, seed)
    indices = sobol_indices(surface, posterior)
    sd_draws, known = seed_noise(epochs, budget, posterior, surface, observations, np.random.default_rng(seed + 3))
    curves = {
        d.name: cube.curve(i, _support(observations, i, budget, space, dimensions)) for i, d in enumerate(dimensions)
    }
    contrasts = {d.name: cube.contrast(i) for i, d in enumerate(dimensions)}
    order = sorted(range(len(dimensions)), key=lambda i: -float(np.median(indices.total[i])))
    more = _more_than([d.name for d in dimensions], indices.total, order)
    ranks = _ranks([dimensions[i].name for i in order if dimensions[i].name != DUMMY], more)
    dummy_total = indices.total[-1]
    effects = tuple(
        Effect(
            dimensions[i].name,
            dimensions[i].label,
            interval(contrasts[dimensions[i].name]),
            interval(contrasts[dimensions[i].name] / sd_draws),
            interval(indices.first[i]),
            interval(indices.total[i]),
            interval(cube.marginal(i).first),
            interval(cube.marginal(i).total),
            1.0 if i == len(dimensions) - 1 else float(np.mean(indices.total[i] > dummy_total)),
            ranks.get(dimensions[i].name, 0),
            None if divergence is None else interval(risky.contrast(i)),
            None if failures is None else interval(_failure_range(surface, failures, i, cube.points[:64])),
        )
        for i in order
    )
    point = _PointEstimates(surface, posterior, varied, divergence, space)
    default = {d.name: space.default.get(d.name, d.from_unit(np.array([0.5]))[0]) for d in varied}
    default_x = np.array([d.to_unit([default[d.name]])[0] for d in varied])
    inside = bool(np.all((default_x >= -1e-9) & (default_x <= 1 + 1e-9))) and all(
        d.name in space.default for d in varied
    )
    default_x = np.clip(np.nan_to_num(default_x, nan=0.5), 0.0, 1.0)
    best_trial = _best_trial(point, observations, trials, space)
    best_x = x.loc[best_trial, [d.name for d in varied]].to_numpy(dtype=float)
    tunability = tuple(sorted((point.tune(i, default_x) for i in range(len(varied))), key=lambda g: -g.gain.mid))
    pairs = [(d.name, e.name) for k, d in enumerate(varied) for e in varied[k + 1 :]]
    pair_intervals = {pair: interval(indices.pair[pair]) for pair in pairs}
    heat = pd.DataFrame(0.0, index=[d.name for d in varied], columns=[d.name for d in varied])
    for (a, b), value in pair_intervals.items():
        heat.loc[a, b] = heat.loc[b, a] = value.mid
    origins = {str(k): int(v) for k, v in trials["origin"].value_counts().items()}
    used = trials.loc[[int(n) for n in observations.trials], "origin"].value_counts()
    biased = bool(used.get("sobol", 0) < max(1, 0.25 * used.sum()))
    mixing = float(np.nanmax(posterior.rhat)) if np.isfinite(posterior.rhat).any() else math.nan
    ranked = fit.r2 >= MIN_R2 and min(len(observations.trials), fit.final) >= MIN_RANKED
    return Analysis(
        name=records.study.name,
        space=space,
        dimensions=dimensions,
        constant=constant,
        counts=counts._replace(used=len(observations.trials)),
        origins=origins,
        budget=budget,
        evaluation_size=size,
        fit=fit,
        ranked=ranked,
        effects=effects,
        more_than=more,
        interactions=heat,
        pair_intervals=pair_intervals,
        higher_order=interval(indices.triple),
        curves=curves,
        surface=cube.pair_surface(varied),
        over_epochs=_over_epochs(surface, posterior, marks),
        seed_sd=interval(sd_draws),
        seed_sd_known=known,
        tunability=tunability,
        ablation=point.ablate(default_x, best_x),
        default=default,
        default_inside=inside,
        best={d.name: d.from_unit(best_x[i : i + 1])[0] for i, d in enumerate(varied)},
        best_trial=best_trial,
        best_accuracy=interval(point.accuracy(best_x[None, :])[0]),
        default_accuracy=interval(point.accuracy(default_x[None, :])[0]),
        claims=_claims(cube, indices, [d.name for d in varied], varied),
        infeasible_share=_infeasible(space, seed),
        extrapolation_share=cube.extrapolation_share(),
        failures=failures,
        biased=biased,
        warnings=tuple(warnings),
        mixing=mixing,
    )


def why_not_ranked(analysis: Analysis) -> str:
    """Why a study that is not ranked is not, as half a sentence."""
    if analysis.counts.used < MIN_RANKED:
        return f"{analysis.counts.used} trials are too few to tell parameters apart, and {MIN_RANKED} the least"
    if analysis.fit.final < MIN_RANKED:
        return f"{analysis.fit.final} trials have come to the last epoch so far, and {MIN_RANKED} are the least"
    return (
        f"predicting trials it has not seen, the fitted surface explains {max(analysis.fit.r2, 0):.0%} of the "
        f"differences in accuracy (R² = {analysis.fit.r2:.2f}), and below {MIN_R2:.0%} a ranking would be guesswork"
    )


def _quiet(message: str) -> None:
    del message


# ---- counting ------------------------------------------------------------------------------------------------


def outcome(row: pd.Series) -> str:
    """complete, stopped, diverged, failed or running."""
    if row["diverged"]:
        return "diverged"
    state = str(row["state"])
    if state == "failed":
        return "failed"
    return {"complete": "complete", "pruned": "stopped"}.get(state, "running")


def count_trials(trials: pd.DataFrame) -> Counts:
    """Where every trial went; `used` is filled in by `analyse`."""
    outcomes = [outcome(row) for _, row in trials.iterrows()]
    seeds = max((len(s) for s in trials["seeds"]), default=1) or 1
    names = ("complete", "stopped", "diverged", "failed", "running")
    return Counts(len(trials), *(outcomes.count(name) for name in names), used=0, seeds=seeds)


def evaluation_size(settings: Mapping[str, Any]) -> int:
    """Validation images behind an accuracy, as the study saved it, or MNIST's 10,000."""
    for sizes in (settings.get("sizes"), settings.get("data_sizes"), settings):
        if isinstance(sizes, Mapping) and isinstance(sizes.get("validation"), int | float) and sizes["validation"] > 1:
            return int(sizes["validation"])
    return DEFAULT_EVALUATION_SIZE


def _states(trials: pd.DataFrame) -> str:
    return ", ".join(f"{count} {state}" for state, count in trials["state"].value_counts().items())


def _hash_unit(trial: int) -> float:
    # The dummy's coordinate: looks uniform, depends on the trial's number alone, so re-reading gives the same answer.
    return zlib.crc32(f"dummy-{trial}".encode()) / 2**32


def allowed(space: Space, varied: Sequence[Dimension], x: Array) -> Array:
    """Which coordinates (N, dimensions in `varied`) the space's rules allow, others at their default -> (N,) bool."""
    if space.rule is None:
        return np.ones(len(x), dtype=bool)
    columns = {d.name: d.from_unit(x[:, i]) for i, d in enumerate(varied)}
    return np.array([space.feasible({**space.default, **{n: c[k] for n, c in columns.items()}}) for k in range(len(x))])


def _infeasible(space: Space, seed: int) -> float:
    if space.rule is None:
        return 0.0
    points = qmc.Sobol(len(space.dimensions), rng=seed).random(2048)
    columns = [d.from_unit(d.quantile(points[:, i])) for i, d in enumerate(space.dimensions)]
    good = [space.feasible(dict(zip(space.names, row, strict=True))) for row in zip(*columns, strict=True)]
    return 1.0 - float(np.mean(good))


# ---- indices from weights ------------------------------------------------------------------------------------


class Indices(NamedTuple):
    """Posterior draws of Sobol indices: (D, S) each; pairs by names."""

    first: Array
    total: Array
    pair: dict[tuple[str, str], Array]
    triple: Array
    variance: Array


def sobol_indices(surface: Surface, posterior: Posterior, epoch: int = -1) -> Indices:
    """Indices of the logit at one of the posterior's epochs, exactly: squared weights over their sum."""
    power = posterior.weights[:, :, epoch] ** 2
    groups = surface.groups()
    variance = power.sum(axis=1)
    shares = power / variance[:, None]
    member = np.array([[i in g for g in groups] for i in range(surface.size)], dtype=float)
    order = np.array([len(g) for g in groups])
    names = [base.dimension.name for base in surface.bases]
    position = {g: k for k, g in enumerate(dict.fromkeys(g for g in groups if len(g) == 2))}
    pair_of = np.array([position.get(g, -1) for g in groups])
    pair = {
        (names[i], names[j]): shares[:, pair_of == k].sum(axis=1) for (i, j), k in ((g, k) for g, k in position.items())
    }
    return Indices(
        first=member[:, order == 1] @ shares[:, order == 1].T,
        total=member @ shares.T,
        pair=pair,
        triple=shares[:, order == 3].sum(axis=1),
        variance=variance,
    )


def _over_epochs(surface: Surface, posterior: Posterior, marks: Array) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for e, mark in enumerate(marks):
        total = sobol_indices(surface, posterior, e).total
        for i, base in enumerate(surface.bases):
            rows.append({"epoch": int(mark), "name": base.dimension.name, **interval(total[i])._asdict()})
    return pd.DataFrame(rows)


def _more_than(names: Sequence[str], total: Array, order: Sequence[int]) -> pd.DataFrame:
    matrix = pd.DataFrame(np.nan, index=[names[i] for i in order], columns=[names[i] for i in order])
    for i in order:
        for j in order:
            if i != j:
                matrix.loc[names[i], names[j]] = float(np.mean(total[i] > total[j]))
    return matrix


def _ranks(names: Sequence[str], more: pd.DataFrame) -> dict[str, int]:
    """A parameter's rank is one more than the number of those that surely matter more; equal ranks are ties."""
    return {name: 1 + sum(more.loc[other, name] >= TIE[1] for other in names if other != name) for name in names}


# ---- accuracy scale ------------------------------------------------------------------------------------------


def _sigmoid(values: Array) -> Array:
    return 1 / (1 + np.exp(-values))


class _Marginal(NamedTuple):
    """One dimension with the others averaged over, on the accuracy scale.

    Its variance is split over the same points: what moving along the dimension does at each of the others' points
    (within) and what is left between these points. So a first-order index is never above the total one, nor that
    above 1.
    """

    grid: Array  # (G,) unit coordinates
    rows: Array  # (G, S) mean accuracy, points
    first: Array  # (S,) first-order Sobol index
    total: Array  # (S,) total Sobol index


class _Cube:
    """Expected accuracy over the whole space, per posterior draw.

    Without a divergence model it is the accuracy of runs that train; with one, a run that diverges counts as chance.
    """

    def __init__(self, surface: Surface, posterior: Posterior, divergence: Failures | None, seed: int) -> None:
        self.surface, self.divergence = surface, divergence
        self.weights = np.ascontiguousarray(posterior.weights[:, :, -1].T)  # (P, S)
        self.level = posterior.level[:, -1]
        self.dimensions = [base.dimension for base in surface.bases]
        uniform = qmc.Sobol(len(self.dimensions), rng=seed).random(CUBE_POINTS)
        self.points = np.column_stack([d.quantile(uniform[:, i]) for i, d in enumerate(self.dimensions)])
        self._curves: dict[int, _Marginal] = {}

    def logits(self, x: Array) -> Array:
        return self.surface.features(x) @ self.weights + self.level[None, :]

    def accuracy(self, x: Array) -> Array:
        """Expected accuracy at coordinates (N, D) -> (N, S), fractions."""
        value = _sigmoid(self.logits(x))
        if self.divergence is None:
            return value
        lost = _sigmoid(failure_logits(self.surface.bases, self.divergence, x))
        return (1 - lost) * value + lost * CHANCE

    def marginal(self, i: int) -> _Marginal:
        """Dimension i with the others averaged over."""
        if i not in self._curves:
            dimension = self.dimensions[i]
            grid = dimension.grid(17)
            base = self.points[: CUBE_POINTS // 4]
            draws = np.empty((len(grid), len(base), self.weights.shape[1]))
            for g, value in enumerate(grid):
                x = base.copy()
                x[:, i] = value
                draws[g] = 100 * self.accuracy(x)
            weight = np.ones(len(grid))
            if not dimension.levels:
                weight[[0, -1]] = 0.5
            weight /= weight.sum()
            rows, along = draws.mean(axis=1), np.tensordot(weight, draws, axes=1)
            within = np.tensordot(weight, (draws - along) ** 2, axes=1).mean(axis=0)
            variance = within + along.var(axis=0) + 1e-12
            first = weight @ (rows - weight @ rows) ** 2
            self._curves[i] = _Marginal(grid, rows, first / variance, within / variance)
        return self._curves[i]

    def contrast(self, i: int) -> Array:
        """Accuracy points between the value that is best on average over the draws and the one that is worst -> (S,).

        Not each draw's own largest difference: that is above zero for every curve that is merely uncertain, and a
        parameter without effect would seem to have one.
        """
        rows = self.marginal(i).rows
        mean = rows.mean(axis=1)
        return rows[mean.argmax()] - rows[mean.argmin()]

    def curve(self, i: int, extrapolated: Callable[[Array], Array]) -> Curve:
        grid, rows = self.marginal(i)[:2]
        low, mid, high = np.quantile(rows, [(1 - INTERVAL) / 2, 0.5, (1 + INTERVAL) / 2], axis=1)
        dimension = self.dimensions[i]
        return Curve(dimension.name, dimension.from_unit(grid), grid, low, mid, high, extrapolated(grid))

    def extrapolation_share(self) -> float:
        """Share of the space where the surface says little more than the average over the space does: where its
        posterior SD is above UNKNOWN times the SD of accuracy over the space (both of logits).
        """
        logits = self.logits(self.points)
        spread = logits.std(axis=1)
        overall = float(np.median(logits.std(axis=0)))
        return float(np.mean(spread > UNKNOWN * overall)) if overall > 0 else 1.0

    def pair_surface(self, varied: Sequence[Dimension]) -> PairSurface | None:
        names = [d.name for d in varied]
        if len(varied) < 2:
            return None
        if "patch_size" in names and "num_glimpses" in names:
            i, j = names.index("patch_size"), names.index("num_glimpses")
        else:
            spans = [float(np.median(self.contrast(k))) for k in range(len(varied))]
            i, j = (int(k) for k in np.argsort(spans)[::-1][:2])
        grid_x, grid_y = varied[i].grid(11), varied[j].grid(11)
        base = self.points[: CUBE_POINTS // 8]
        mean, sd = np.zeros((len(grid_y), len(grid_x))), np.zeros((len(grid_y), len(grid_x)))
        for a, value_y in enumerate(grid_y):
            for b, value_x in enumerate(grid_x):
                x = base.copy()
                x[:, i], x[:, j] = value_x, value_y
                cell = 100 * self.accuracy(x).mean(axis=0)
                mean[a, b], sd[a, b] = cell.mean(), cell.std()
        return PairSurface(varied[i], varied[j], grid_x, grid_y, mean, sd)


def _support(
    observations: Observations, i: int, budget: int, space: Space, dimensions: Sequence[Dimension]
) -> Callable[[Array], Array]:
    """Whether a coordinate lies beyond all but one of the trials seen near the full budget, or the space's rules forbid
    most of what is averaged over there.
    """
    varied = dimensions[:-1]  # all but the dummy
    others = qmc.Sobol(len(varied), rng=0).random(128)
    others = np.column_stack([d.quantile(others[:, k]) for k, d in enumerate(varied)])

    def forbidden(value: float) -> bool:
        if i >= len(varied):
            return False
        x = others.copy()
        x[:, i] = value
        return bool(allowed(space, varied, x).mean() < 0.5)

    late = observations.u > math.log(max(0.9 * budget, 1)) / max(math.log(budget), 1e-9) - 1e-9
    at = np.sort(observations.x[np.unique(observations.trial_of[late]), i])

    def extrapolated(grid: Array) -> Array:
        if len(at) < 4:
            return np.ones(len(grid), dtype=bool)
        return (grid < at[1] - 1e-9) | (grid > at[-2] + 1e-9) | np.array([forbidden(float(v)) for v in grid])

    return extrapolated


# ---- configurations ------------------------------------------------------------------------------------------


class _PointEstimates:
    """Expected accuracy of single configurations (the dummy held at its middle); a run that diverges counts as chance.

    Only configurations that the space's rules allow are proposed.
    """

    def __init__(
        self,
        surface: Surface,
        posterior: Posterior,
        varied: Sequence[Dimension],
        divergence: Failures | None,
        space: Space,
    ) -> None:
        self.surface, self.varied, self.divergence, self.space = surface, varied, divergence, space
        self.weights, self.level = posterior.weights[:, :, -1].T, posterior.level[:, -1]

    def accuracy(self, x: Array) -> Array:
        """Accuracy points at coordinates (N, D without the dummy) -> (N, S)."""
        full = np.column_stack([x, np.full(len(x), 0.5)])
        value = _sigmoid(self.surface.features(full) @ self.weights + self.level[None, :])
        if self.divergence is not None:
            lost = _sigmoid(failure_logits(self.surface.bases, self.divergence, full))
            value = (1 - lost) * value + lost * CHANCE
        return 100 * value

    def allowed(self, x: Array) -> Array:
        """Which coordinates (N, D without the dummy) the space's rules allow -> (N,) bool."""
        return allowed(self.space, self.varied, x)

    def tune(self, i: int, default: Array) -> Gain:
        """Best single change, chosen by its expected gain; a lone maximum over draws would flatter itself."""
        dimension = self.varied[i]
        grid = np.append(dimension.grid(25), default[i])
        x = np.repeat(default[None, :], len(grid), axis=0)
        x[:, i] = grid
        keep = self.allowed(x)
        keep[-1] = True  # the default itself
        grid, x = grid[keep], x[keep]
        draws = self.accuracy(x)
        best = int(np.argmax(draws.mean(axis=1)))
        gain = interval(draws[best] - draws[-1])
        values = dimension.from_unit(grid[[best, -1]])
        return Gain(dimension.name, values[1], values[0], gain)

    def ablate(self, default: Array, best: Array) -> tuple[Step, ...]:
        """Greedy path from default to best (Fawcett and Hoos 2016): at each step the change that gains most.

        A step that the space's rules forbid waits for one that makes room for it.
        """
        here, left, steps = default.copy(), [i for i in range(len(default)) if abs(default[i] - best[i]) > 1e-9], []
        before = self.accuracy(here[None, :])[0]
        while left:
            candidates = np.repeat(here[None, :], len(left), axis=0)
            for row, i in enumerate(left):
                candidates[row, i] = best[i]
            draws = self.accuracy(candidates)
            legal = self.allowed(candidates)
            expected = draws.mean(axis=1)
            pick = int(np.argmax(np.where(legal, expected, -1.0) if legal.any() else expected))
            i = left.pop(pick)
            values = self.varied[i].from_unit(np.array([here[i], best[i]]))
            here[i] = best[i]
            steps.append(
                Step(self.varied[i].name, values[0], values[1], interval(draws[pick] - before), interval(draws[pick]))
            )
            before = draws[pick]
        return tuple(steps)


def _best_trial(point: _PointEstimates, observations: Observations, trials: pd.DataFrame, space: Space) -> int:
    """The tried configuration the surface expects most of; a complete one if there is any."""
    expected = point.accuracy(observations.x[:, :-1]).mean(axis=1)
    numbers = observations.trials.astype(int)
    complete = np.array([trials.at[n, "state"] == "complete" for n in numbers])
    if complete.any():
        expected = np.where(complete, expected, -1.0)
    return int(numbers[int(np.argmax(expected))])


# ---- noise and failures --------------------------------------------------------------------------------------


def seed_noise(
    epochs: pd.DataFrame,
    budget: int,
    posterior: Posterior,
    surface: Surface,
    observations: Observations,
    rng: np.random.Generator,
) -> tuple[Array, bool]:
    """Draws of the standard deviation between seeds at the full budget, accuracy points, and whether it was measured.

    Measured, it is the average over trials of two seeds or more, of which a few shaky ones may make up most: drawn by
    the Bayesian bootstrap over trials (Rubin 1981). Otherwise it is the surface's own estimate.
    """
    last = epochs[(epochs["epoch"] > 0.9 * budget) & epochs["val_accuracy"].notna()]
    each = seed_sds(last)
    if len(each) >= 3:
        weights = rng.dirichlet(np.ones(len(each)), len(posterior.weights))
        return np.maximum(weights @ each, 1e-6), True
    scale = float(observations.y.std()) or 1.0
    draws_each = len(posterior.weights) // len(posterior.theta)
    logits = np.repeat(surface.predictive_sd(posterior.theta, scale, 1.0), draws_each)
    centre = float(np.mean(last["val_accuracy"])) if len(last) else 0.5
    return 100 * logits * max(centre * (1 - centre), 1e-4), False


def seed_sds(epochs: pd.DataFrame) -> Array:
    """Standard deviation between seeds of each trial that has two or more, accuracy points, of their mean accuracies in
    these epochs; unbiased if accuracies are normal.
    """
    trials = epochs.groupby(["trial", "seed"])["val_accuracy"].mean().groupby("trial")
    seeds = trials.size().to_numpy(dtype=float)
    sds = 100 * trials.std(ddof=1).to_numpy(dtype=float)
    sds, seeds = sds[seeds > 1], seeds[seeds > 1]
    return sds / (np.sqrt(2 / (seeds - 1)) * np.exp(gammaln(seeds / 2) - gammaln((seeds - 1) / 2)))


def _failures(surface: Surface, x: pd.DataFrame, failed: pd.Series, draws: int, seed: int) -> Failures | None:
    if not failed.any():
        return None
    rng = np.random.default_rng(seed)
    return fit_failures(surface.bases, x.to_numpy(dtype=float), failed.to_numpy(dtype=float), draws, rng)


def _failure_range(surface: Surface, failures: Failures, i: int, points: Array) -> Array:
    """Largest minus smallest failure probability over a dimension, others averaged over; points (S,)."""
    rows = []
    for value in surface.bases[i].dimension.grid(11):
        x = points.copy()
        x[:, i] = value
        rows.append(100 * _sigmoid(failure_logits(surface.bases, failures, x)).mean(axis=0))
    return np.max(rows, axis=0) - np.min(rows, axis=0)


# ---- trust ---------------------------------------------------------------------------------------------------


def cross_validate(
    surface: Surface, observations: Observations, warm: tuple[torch.Tensor, torch.Tensor], rng: np.random.Generator
) -> Fit:
    """Predict the final accuracy of whole trials that the fold had not seen, hyperparameters refitted in each fold."""
    last = np.zeros(len(observations.trials), dtype=int)
    for row, trial in enumerate(observations.trial_of):
        last[trial] = row  # rows are sorted by bin, so the trial's last stays
    final = observations.u[last] > observations.u.max() - 0.1
    enough = int(final.sum()) >= MIN_RANKED
    targets = np.flatnonzero(final) if enough else np.arange(len(last))
    r2, coverage, observed, predicted, sd, ceiling = _folds(surface, observations, warm, targets, last, rng, keep=1.0)
    half = _folds(surface, observations, warm, targets, last, rng, keep=0.5)[0] if r2 < MIN_R2 + 0.2 else math.nan
    needed = trials_needed(r2, half, len(observations.trials), ceiling)
    return Fit(r2, int(final.sum()), coverage, len(targets), ceiling, half, needed, observed, predicted, sd)


def _folds(
    surface: Surface,
    observations: Observations,
    warm: tuple[torch.Tensor, torch.Tensor],
    targets: np.ndarray,
    last: np.ndarray,
    rng: np.random.Generator,
    keep: float,
) -> tuple[float, float, Array, Array, Array, float]:
    folds = np.resize(np.arange(FOLDS), len(targets))
    rng.shuffle(folds)
    predicted, sd, noise, level = (np.zeros(len(targets)) for _ in range(4))
    for fold in range(FOLDS):
        held = targets[folds == fold]
        if not len(held):
            continue
        rest = np.setdiff1d(np.arange(len(observations.trials)), held)
        if keep < 1:
            rest = np.sort(rng.choice(rest, max(int(keep * len(rest)), 3), replace=False))
        part = subset(observations, rest)
        at, where = np.unique(observations.u[last[held]], return_inverse=True)
        posterior, _ = surface.sample(part, at, hyperdraws=12, draws_each=8, rng=rng, warm=warm)
        values = surface.features(observations.x[held]) @ posterior.weights.transpose(1, 0, 2).reshape(
            -1, len(posterior.weights) * len(at)
        )
        values = values.reshape(len(held), len(posterior.weights), len(at))
        rows = values[np.arange(len(held)), :, where] + posterior.level[:, where].T
        scale = float(part.y.std()) or 1.0
        seeds = float(observations.seeds[last[held]].mean())
        own = surface.predictive_sd(posterior.theta, scale, seeds)
        predicted[folds == fold] = rows.mean(axis=1)
        level[folds == fold] = posterior.level.mean(axis=0)[where]
        noise[folds == fold] = float(np.mean(surface.predictive_sd(posterior.theta, scale, seeds, misfit=False) ** 2))
        sd[folds == fold] = np.sqrt(rows.var(axis=1) + np.mean(own**2))
    observed = observations.y[last[targets]]
    # Trials that ended at different epochs differ by how long they learned; that is not what is to be explained.
    same_end = np.ptp(observations.u[last[targets]]) < 0.11
    spread = float(np.mean((observed - (observed.mean() if same_end else level)) ** 2)) or 1.0
    r2 = 1 - float(np.mean((observed - predicted) ** 2)) / spread
    coverage = float(np.mean(np.abs(observed - predicted) <= 1.645 * sd))
    ceiling = max(0.0, 1 - float(noise.mean()) / spread)
    return r2, coverage, observed, predicted, sd, ceiling


def subset(observations: Observations, trials: np.ndarray) -> Observations:
    """The observations of some trials (positions); seeds' departures stay, they say nothing of a configuration."""
    keep = np.isin(observations.trial_of, trials)
    position = {int(t): i for i, t in enumerate(trials)}
    return observations._replace(
        trials=observations.trials[trials],
        x=observations.x[trials],
        trial_of=np.array([position[int(t)] for t in observations.trial_of[keep]], dtype=int),
        u=observations.u[keep],
        y=observations.y[keep],
        seeds=observations.seeds[keep],
        epochs=observations.epochs[keep],
    )


def trials_needed(r2: float, half: float, trials: int, ceiling: float) -> int | None:
    """A rough number of trials for R2 = MIN_R2, from how R2 grew between half and all of them; None if not to be had.

    The unexplained share is taken to fall as a power of the number of trials, no faster than 1 / trials; where it did
    not fall, or would need more than ten times the trials, nothing is promised.
    """
    if r2 >= MIN_R2 or ceiling < MIN_R2 or half >= r2:
        return None
    if not math.isfinite(half):
        return 2 * trials
    now, before = max(1 - r2, 1e-3), max(1 - half, 1e-3)
    power = float(np.clip(math.log(before / now) / math.log(2), 0.3, 1.0))
    factor = (now / (1 - MIN_R2)) ** (1 / power)
    return math.ceil(trials * factor) if factor <= 10 else None


# ---- the case study's claims ---------------------------------------------------------------------------------


def _claims(cube: _Cube, indices: Indices, names: Sequence[str], varied: Sequence[Dimension]) -> dict[str, Array]:
    """Draws the verdicts are judged on, for the parameters the case study speaks of, and the dummy's."""
    out: dict[str, Array] = {f"effect {DUMMY}": cube.contrast(len(varied))}
    for name in ("patch_size", "num_scales", "num_glimpses"):
        if name in names:
            i = names.index(name)
            out[f"total {name}"] = indices.total[i]
            out[f"effect {name}"] = cube.contrast(i)
            grid, rows = cube.marginal(i)[:2]
            values = varied[i].from_unit(grid)
            for value, row in zip(values, rows, strict=True):
                out[f"marginal {name} {value}"] = row
    return out
