"""Ten made-up truths of different character, and studies of them.

A truth says, at a configuration and an epoch, how accurate a run becomes, how likely it is not to train at all, and how
much seeds differ. A study of it has the search's own space, first points, Sobol points, TPE and early stopping. What
its analysis should find is computed by brute force.

The analysis was made with the first five in view (SEEN). The other five (HELD_OUT) were not looked at until it was
finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
import pandas as pd
from scipy.stats import qmc

from analysis.load import StudyData, StudyRun
from ramcore.recipes import TUNED
from ramcore.space import Array, Dimension, Space, Values
from study.aim import aimed_point
from study.asha import ASHA
from study.designs import published, search_origins
from study.record import distributions
from study.search_space import search_space
from study.sobol import SobolSequence

CHANCE = 0.1  # accuracy of a run that does not train
EPOCHS, TRIALS, SEEDS, SOBOL_SHARE = 12, 54, 2, 0.59  # those of the committed searches
RAM = search_space(replace(TUNED, task="translated", epochs=EPOCHS))
IMAGES = 10_000  # behind an accuracy

Columns = dict[str, Array]  # unit coordinates (N,) by parameter


def _same(sd: float) -> Callable[[Array], Array]:
    return lambda accuracy: np.full_like(accuracy, sd)


SEED_SD = _same(0.12)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is true of every configuration; u = log(epoch) / log(epochs)."""

    about: str
    logit: Callable[[Columns, float], Array]  # of how far accuracy is from `floor` to 1, of runs that train
    floor: float = 0.0
    fails: Callable[[Columns], Array] | None = None  # probability that a seed stays at CHANCE
    lost: float = 0.0  # the same probability, whatever the configuration
    seed_sd: Callable[[Array], Array] = SEED_SD  # logits, by the final accuracy
    tails: float = math.inf  # degrees of freedom of the seeds' noise
    epoch_sd: float = 0.05  # logits
    null: tuple[str, ...] = ()  # parameters without any effect
    space: Space = RAM

    def trained(self, x: Columns, u: float = 1.0) -> Array:
        """Expected accuracy of runs that train, without noise."""
        return self.floor + (1 - self.floor) / (1 + np.exp(-self.logit(x, u)))

    def failing(self, x: Columns) -> Array:
        """Probability that a run does not train."""
        own = self.fails(x) if self.fails is not None else 0.0 * next(iter(x.values()))
        return 1 - (1 - own) * (1 - self.lost)

    def accuracy(self, x: Columns) -> Array:
        """Expected accuracy at the full budget, runs that do not train counted."""
        fails = self.failing(x)
        return (1 - fails) * self.trained(x) + fails * CHANCE

    def expected_logit(self, x: Columns) -> Array:
        """Expected logit of accuracy at the full budget, runs that do not train counted."""
        fails = self.failing(x)
        return (1 - fails) * _logit(self.trained(x)) + fails * _logit(np.array(CHANCE))


def _logit(p: Array) -> Array:
    return np.log(p / (1 - p))


def _rises(x: Array, at: float, width: float) -> Array:
    """A smooth step from 0 to 1."""
    return 1 / (1 + np.exp(-(x - at) / width))


def _growing(start: float, rise: float, end: Callable[[Columns], Array]) -> Callable[[Columns, float], Array]:
    """Curves whose differences grow to those of `end`."""
    return lambda x, u: start + rise * u + (0.5 + 0.5 * u) * end(x)


def _realistic(x: Columns, u: float) -> Array:
    patch, scales, std, rate = x["patch_size"], x["num_scales"], x["location_std"], x["learning_rate"]
    glimpses = 1.3 * (1 - np.exp(-3.0 * (0.25 + x["num_glimpses"])))
    size = 1.6 * np.sqrt(patch + 0.05) + 1.7 * np.minimum(scales, 0.7) * (1.25 - patch)
    ends = 1.2 * _rises(std, 0.9, 0.04) + 1.0 * _rises(-std, -0.1, 0.04)
    cliff = 3.5 * _rises(-x["loss_mixing"], -0.08, 0.02)
    end = glimpses + size - 4.0 * (rate - (0.68 - 0.18 * u)) ** 2 - ends - cliff
    return -1.5 + (0.45 + 0.55 * u) * (end + 0.2) + 1.1 * u


def _steps(x: Columns) -> Array:
    steps = 1.5 * (x["patch_size"] > 0.45) + 1.2 * (x["num_glimpses"] > 0.3) + 0.8 * (x["loss_mixing"] > 0.7)
    return steps + 2.2 * np.exp(-0.5 * ((x["learning_rate"] - 0.55) / 0.09) ** 2) + 0.5 * x["num_scales"]


def _three_way(x: Columns) -> Array:
    product = (x["patch_size"] - 0.5) * (x["num_scales"] - 0.5) * (x["learning_rate"] - 0.5)
    return 20.0 * product + 1.2 * x["patch_size"] + 0.9 * x["num_glimpses"] + 0.7 * x["loss_mixing"]


def _plateau(x: Columns) -> Array:
    small = np.maximum(0, 0.35 - x["patch_size"]) / 0.35
    off = np.maximum(0, np.abs(x["learning_rate"] - 0.5) - 0.25) / 0.25
    return 1.4 - 3.0 * small - 3.0 * off - 1.5 * np.maximum(0, 0.2 - x["num_glimpses"]) / 0.2


def _crossing(x: Columns, u: float) -> Array:
    rate, patch = x["learning_rate"], x["patch_size"]
    turning = 2.5 * (rate * (1 - u) + 0.9 * (1 - rate) * u) + 1.5 * u * patch + 0.8 * (1 - u) * (1 - patch)
    return -1.2 + 1.2 * u + turning + 0.9 * u * x["num_scales"] + 0.5 * x["num_glimpses"]


def _heavy(x: Columns) -> Array:
    size = 1.8 * np.sqrt(x["num_scales"] + 0.02) + 1.0 * x["patch_size"]
    return size - 3 * (x["learning_rate"] - 0.6) ** 2 + 0.8 * x["num_glimpses"] * (1 - x["patch_size"])


def _choices(x: Columns) -> Array:
    core = np.select([x["core"] < 0.25, x["core"] < 0.75], [0.0, 2.0], 1.2)
    return core + 1.0 * x["patch_size"] + 0.9 * (x["num_glimpses"] > 0.5) - 2.0 * (x["learning_rate"] - 0.5) ** 2


_CORE = Dimension(name="core", type="categorical", choices=("rnn", "gru", "lstm"))
_WITH_CORE = replace(
    RAM,
    dimensions=tuple(_CORE if d.name == "loss_mixing" else d for d in RAM.dimensions),
    default={name: value for name, value in RAM.default.items() if name != "loss_mixing"} | {"core": "rnn"},
)
_LAST_THREE = ("location_std", "reinforce_weight", "step_supervision")

SEEN = {
    "realistic": Truth(
        about="saturating glimpses, patch x scales, a rate above which runs collapse, a cliff of loss mixing, a cost at"
        " both ends of location std, more noise at low accuracy, one of two seeds lost in a tenth of the trials",
        logit=_realistic, floor=CHANCE, fails=lambda x: 0.9 * _rises(x["learning_rate"], 0.88, 0.02), lost=0.05,
        seed_sd=lambda accuracy: 0.10 + 0.5 * np.clip(1 - accuracy, 0, 0.8),
        null=("reinforce_weight", "step_supervision"),
    ),
    "smooth": Truth(
        about="additive, two equal first ones, three null",
        logit=_growing(-1.0, 1.2, lambda x: 2.0 * x["patch_size"] + 2.0 * x["num_scales"] + 1.0 * x["num_glimpses"]
                       - 5.0 * (x["learning_rate"] - 0.5) ** 2 + 0.6 * x["loss_mixing"]),
        null=_LAST_THREE,
    ),
    "steps": Truth(
        about="steps and a narrow optimum, three null", logit=_growing(-0.5, 1.0, _steps), null=_LAST_THREE
    ),
    "collapse": Truth(
        about="hardly anything but whether a run trains depends on the configuration", floor=CHANCE,
        logit=_growing(0.5, 2.0, lambda x: 0.5 * x["patch_size"]),
        fails=lambda x: _rises(9 * (x["learning_rate"] - 0.62) + 5 * (0.45 - x["num_scales"]), 1.0, 1.0),
        null=(*_LAST_THREE, "num_glimpses"),
    ),
    "three-way": Truth(
        about="half of the variance in one interaction of three", logit=_growing(-0.3, 1.0, _three_way),
        null=_LAST_THREE,
    ),
}  # fmt: skip
HELD_OUT = {
    "nothing": Truth(about="nothing matters", logit=lambda x, u: 2.0 * u + 0 * x["patch_size"], null=RAM.names),
    "plateau": Truth(
        about="a wide plateau that falls off on two sides", logit=_growing(0.5, 1.6, _plateau),
        null=(*_LAST_THREE, "loss_mixing"),
    ),
    "heavy tails": Truth(
        about="smooth, seeds with Student's t of 2 degrees of freedom", logit=_growing(-0.5, 1.4, _heavy),
        seed_sd=_same(0.2), tails=2.0, null=_LAST_THREE,
    ),
    "crossing": Truth(
        about="what is best early is worst late", logit=_crossing,
        null=("location_std", "reinforce_weight", "loss_mixing"),
    ),
    "choices": Truth(
        about="a categorical parameter of three choices first, a step beside it", logit=_growing(-0.8, 1.2, _choices),
        null=_LAST_THREE, space=_WITH_CORE,
    ),
}  # fmt: skip
TRUTHS = SEEN | HELD_OUT


def two_samples(dimensions: Sequence[Dimension], count: int) -> tuple[Array, Array]:
    """Two independent quasi-random samples of unit coordinates, (count, D) each."""
    size, uniform = len(dimensions), qmc.Sobol(2 * len(dimensions), rng=0).random(count)
    halves = (uniform[:, :size], uniform[:, size:])
    a, b = (np.column_stack([d.quantile(u[:, i]) for i, d in enumerate(dimensions)]) for u in halves)
    return a, b


def true_indices(
    truth: Callable[[Array, float], Array], dimensions: Sequence[Dimension], points: int = 2**15
) -> tuple[Array, Array]:
    """First-order and total Sobol indices at the full budget, by pick-freeze on many points; 0 if nothing varies.

    truth: of coordinates (N, D) and u = log(epoch) / log(epochs).
    """
    a, b = two_samples(dimensions, points)
    fa, fb = truth(a, 1.0), truth(b, 1.0)
    variance = max(float(fa.var()), 1e-9)
    first, total = [], []
    for i in range(len(dimensions)):
        mixed = a.copy()
        mixed[:, i] = b[:, i]
        fm = truth(mixed, 1.0)
        first.append(np.mean((fb - fb.mean()) * (fm - fa)) / variance)
        total.append(0.5 * np.mean((fa - fm) ** 2) / variance)
    return np.clip(first, 0, 1), np.array(total)


class Facts:
    """What is true of a truth's parameters, by brute force.

    effect: accuracy points between the worst and the best value, the others averaged over; total: total Sobol index of
    the expected logit; seed_sd: between seeds that train, points, averaged over the space; live: parameters with an
    effect of at least three of these.
    """

    def __init__(self, truth: Truth) -> None:
        dimensions, names = truth.space.dimensions, truth.space.names
        points, _ = two_samples(dimensions, 2**14)
        a = dict(zip(names, points.T, strict=True))
        _, total = true_indices(
            lambda x, u: truth.expected_logit(dict(zip(names, x.T, strict=True))), dimensions, points=2**14
        )
        self.total = dict(zip(names, map(float, total), strict=True))
        self.effect = {}
        for d in dimensions:
            rows = [100 * float(truth.accuracy(a | {d.name: np.full(len(points), v)}).mean()) for v in d.grid(17)]
            self.effect[d.name] = max(rows) - min(rows)
        final = truth.trained(a)
        self.seed_sd = 100 * float(np.mean(truth.seed_sd(final) * final * (1 - final)))
        self.live = tuple(name for name, effect in self.effect.items() if effect >= 3 * self.seed_sd)


def origins_of(truth: Truth, trials: int = TRIALS) -> list[str]:
    """What chooses the configurations of a search of that many trials."""
    return search_origins([trials], len(_first_points(truth)), SOBOL_SHARE)


def _first_points(truth: Truth) -> list[tuple[str, Values]]:
    return published(truth.space) if truth.space is RAM else [("default", dict(truth.space.default))]


def study_of(
    truth: Truth, seed: int, *, origins: Sequence[str] | None = None, epochs: int = EPOCHS, seeds: int = SEEDS
) -> StudyData:
    """A made-up study as `analysis.load.load_study` gives it.

    origins: of its trials, those of a search if left out. Beside a search's there is "ends": the default with one
    parameter at an end of its range, each end in turn.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space, rng = truth.space, np.random.default_rng(seed)
    points, ranges = SobolSequence(space, 1000 + seed), distributions(space)
    first, origins = _first_points(truth), origins or origins_of(truth)
    ends = [dict(space.default) | {d.name: v} for d in space.dimensions for v in d.from_unit(np.array([0.0, 1.0]))]
    asha = ASHA(epochs)
    search = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=0)
    )
    told: tuple[list[Values], list[float]] = ([], [])
    rows: list[dict[str, Any]] = []
    tables: list[pd.DataFrame] = []
    for number, origin in enumerate(origins):
        before = origins[:number].count(origin)
        if origin in ("published", "ends"):
            values = first[before][1] if origin == "published" else ends[before]
        elif origin == "sobol":
            values = points[before]
        elif origin == "aimed":
            values = aimed_point(space, *told, seed + number)
        else:
            values = space.clamped(search.sampler.sample_relative(search, search.ask()._get_latest_trial(), ranges))
        accuracy = _run(truth, values, epochs, seeds, rng)
        last = _last_epoch(asha, number, accuracy) if origin == "tpe" else epochs
        for rung in asha.rungs if origin != "tpe" else ():
            asha.reach(number, rung, float(accuracy[:, rung - 1].mean()))
        state = "complete" if last == epochs else "pruned"
        accuracy = accuracy[:, :last]
        _tell(search, ranges, values, accuracy)
        if state == "complete":
            told[0].append(values)
            told[1].append(float(accuracy[:, -1].mean()))
        rows.append(_row(number, origin, state, seeds, last, values))
        tables.append(_table(number, origin, state, accuracy))
    run = StudyRun("none", f"made-up-{seed}", "finished", 0.0, {}, {})
    settings = {"epochs": epochs, "data_sizes": {"validation": IMAGES}}
    return StudyData(
        run, pd.DataFrame(rows).set_index("trial"), pd.concat(tables, ignore_index=True), space, None, settings
    )


def _run(truth: Truth, values: Values, epochs: int, seeds: int, rng: np.random.Generator) -> Array:
    """Accuracy of every seed and epoch (seeds, epochs)."""
    x = {d.name: np.array(d.to_unit([values[d.name]])) for d in truth.space.dimensions}
    mean = np.array([truth.logit(x, math.log(e) / max(math.log(epochs), 1e-9))[0] for e in range(1, epochs + 1)])
    scale = truth.seed_sd(truth.trained(x))[0]
    draw = rng.standard_normal(seeds) if math.isinf(truth.tails) else rng.standard_t(truth.tails, seeds)
    logits = mean + scale * draw[:, None] + truth.epoch_sd * rng.standard_normal((seeds, epochs))
    accuracy = truth.floor + (1 - truth.floor) / (1 + np.exp(-logits))
    dead = rng.random(seeds) < truth.failing(x)[0]
    accuracy[dead] = CHANCE + 0.01 * rng.standard_normal((int(dead.sum()), epochs))
    return np.round(np.clip(accuracy, 0.0, 1.0) * IMAGES) / IMAGES


def _last_epoch(asha: ASHA, number: int, accuracy: Array) -> int:
    for rung in asha.rungs:
        if not asha.reach(number, rung, float(accuracy[:, rung - 1].mean())):
            return rung
    return accuracy.shape[1]


def _tell(search: optuna.Study, ranges: dict[str, Any], values: Values, accuracy: Array) -> None:
    """Enter a trial as the search's record does: stopped ones are pruned, with what they reached."""
    means = accuracy.mean(axis=0)
    search.add_trial(
        optuna.trial.create_trial(
            params={name: values[name] for name in ranges}, distributions=ranges, value=float(means[-1]),
            intermediate_values={epoch: float(mean) for epoch, mean in enumerate(means, start=1)},
        )
    )  # fmt: skip


def _row(number: int, origin: str, state: str, seeds: int, last: int, values: Values) -> dict[str, Any]:
    blank = dict.fromkeys(("row", "baseline", "parameter", "stop_reason"), "")
    sizes = {"macs": 1.0, "parameters": 1.0, "test_accuracy": math.nan, "test_accuracies": ()}
    fixed = {"state": state, "diverged": False, "seeds": tuple(range(seeds)), "started": float(number)}
    return {"trial": number, "origin": origin, "epochs_seen": last, **blank, **sizes, **fixed, **values}


def _table(number: int, origin: str, state: str, accuracy: Array) -> pd.DataFrame:
    seeds, last = accuracy.shape
    epochs = {"seed": np.repeat(np.arange(seeds), last), "epoch": np.tile(np.arange(1, last + 1), seeds)}
    known = {"val_accuracy": accuracy.ravel(), "origin": origin, "state": state, "stop_reason": ""}
    return pd.DataFrame({"trial": number, **epochs, **known})
