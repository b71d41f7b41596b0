"""How close each importance estimator comes to a known truth, and how long reading and reporting take.

    python -m benchmarks.sensitivity truth --replicates 10
    python -m benchmarks.sensitivity holds --replicates 8
    python -m benchmarks.sensitivity choices --replicates 8
    python -m benchmarks.sensitivity settles --replicates 4
    python -m benchmarks.sensitivity time

`holds` asks whether the intervals hold on the ten truths of `benchmarks/truths.py`, and `choices` what other ways of
choosing as many trials would give. `settles` asks whether the trials that a report names for an undecided claim settle
it. The made-up studies of `truth` have six parameters, seed noise, and three ways of choosing trials. One parameter is
inert, one acts only through another, and the optimum of one moves during training, so that learning curves cross. Our
indices are compared with true total Sobol indices, the others with true first-order shares, which they estimate.
"""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from scipy.stats import spearmanr

from analysis import sensitivity
from analysis.crosschecks import fanova, last_accuracy, ped_anova
from analysis.importance import analyse, conclude, fit_study
from analysis.load import connect, find_study, list_studies, load_study
from analysis.paper import markdown_table
from analysis.results import DUMMY, TIE, Interval
from analysis.selection import unit_table
from analysis.settling import Outlook, possible_kinds
from analysis.text import number
from analysis.verdicts import judge
from benchmarks.truths import HELD_OUT, SEEDS, TRUTHS, Facts, origins_of, study_of, true_indices
from ramcore.space import Dimension
from tests.synthetic import RAM_DEFAULT, RAM_DIMENSIONS, Synthetic, ram_truth, simulate, write_mlflow

DIMENSIONS = (
    Dimension(name="width", type="int", low=4, high=20),
    Dimension(name="rate", type="float", low=1e-4, high=1e-2, log=True),
    Dimension(name="steps", type="int", low=2, high=8),
    Dimension(name="mixing", type="float", low=0.0, high=1.0),
    Dimension(name="scales", type="int", low=1, high=4),
    Dimension(name="inert", type="float", low=0.0, high=1.0),
)


def crossing_truth(x: np.ndarray, u: float) -> np.ndarray:
    """Logit accuracy at coordinates (n, 6) and u = log epoch in [0, 1]; the last coordinate does nothing."""
    width, rate, steps, mixing, scales = (x[:, i] for i in range(5))
    end = 1.6 * width - 5.0 * (rate - (0.85 - 0.35 * u)) ** 2 + 1.2 * (steps - 0.5) * (1 - width)
    end = end + 0.5 * mixing * u + 0.2 * scales
    return -1.5 + (0.4 + 0.6 * u) * (end + 1.0) + 1.0 * u


MADE = Synthetic(truth=crossing_truth, dimensions=DIMENSIONS)
DESIGNS = {
    "Sobol, never stopped (36)": replace(MADE, trials=36),
    "half Sobol, half optimiser + halving (64)": replace(MADE, trials=64, origin="mixed", stop=True),
    "optimiser + halving (100)": replace(MADE, trials=100, origin="tpe", stop=True),
}


Row = dict[str, float | str]
BEGUN = 30  # trials of a search before the others are chosen
PERCENT = ("effects hold", "total indices hold", "live told apart", "null told apart", "first in rank 1", "ranked")


def one_study(design: Synthetic) -> list[Row]:
    """The scores of all estimators on one made-up study."""
    records = simulate(design)
    names = [d.name for d in design.dimensions]
    first, total = true_indices(design.truth, design.dimensions)
    analysis = analyse(records, seed=design.seed)
    effects = {e.name: e for e in analysis.ranking.effects}
    inside = np.array([_inside(effects[n].total, true, 0.005) for n, true in zip(names, total, strict=True)])
    ours: Row = {
        **_score("ours: GP over configuration and epoch", {n: effects[n].total.mid for n in names}, total),
        "covered": float(inside.mean()),
        "covered, true index > 0.01": float(inside[total > 0.01].mean()),
        "r2": analysis.trust.fit.r2,
        "held out": analysis.trust.fit.coverage,
        "injected dummy": effects[DUMMY].total.mid,
    }
    last = last_accuracy(records.epochs)
    x, y = unit_table(records, design.dimensions).loc[last.index].to_numpy(), last.to_numpy(dtype=float)
    full = records.trials.loc[last.index, "state"].eq("complete").to_numpy(dtype=bool)
    rows = [
        ours,
        _score("naive fANOVA on the last accuracy", fanova(names, x, y, seed=design.seed), first),
        _score("PED-ANOVA on the last accuracy", ped_anova(names, x, y), first),
    ]
    if full.sum() >= 4:
        only = fanova(names, x[full], y[full], seed=design.seed)
        rows.append(_score("fANOVA on completed trials only", only, first))
    return rows


def _score(estimator: str, estimates: dict[str, float], truth: np.ndarray) -> Row:
    """Compare shares with the truth; the truth is in the order of the designs' dimensions."""
    estimate = np.array([estimates[d.name] for d in DIMENSIONS])
    error, correlation = _agreement(estimate, truth)
    return {
        "estimator": estimator,
        "MAE of shares": error,
        "Spearman": correlation,
        "first is first": float(np.argmax(estimate) == np.argmax(truth)),
        "inert share": float(estimate[-1] / max(estimate.sum(), 1e-12)),
    }


def _agreement(estimate: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Mean absolute error of shares that sum to 1, and Spearman's rank correlation."""
    share, true = estimate / max(estimate.sum(), 1e-12), truth / truth.sum()
    return float(np.abs(share - true).mean()), float(spearmanr(share, true).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def print_truth(*, replicates: int = 10, design: str = "") -> None:
    """Print the table of all estimators and designs.

    Args:
        replicates: Made-up studies per design.
        design: Only designs whose name contains this.
    """
    rows: list[Row] = []
    for name, made in ((name, made) for name, made in DESIGNS.items() if design in name):
        for replicate in range(replicates):
            started = time.monotonic()
            rows += [{"design": name, **row} for row in one_study(replace(made, seed=100 + replicate))]
            print(f"{name}: {replicate + 1}/{replicates} ({time.monotonic() - started:.0f} s)", file=sys.stderr)
    groups = pd.DataFrame(rows).groupby(["design", "estimator"], sort=False, as_index=False)
    means = pd.DataFrame(groups.mean(numeric_only=True))
    cells = ([v if isinstance(v, str) else number(v, 3) for v in row] for row in means.itertuples(index=False))
    print(markdown_table(list(means.columns), cells))


def _held(name: str, seed: int, origins: Sequence[str] | None = None) -> Row:
    """How well the analysis of one study of a truth agrees with it."""
    torch.set_num_threads(1)
    truth = TRUTHS[name]
    facts = Facts(truth)
    analysis = analyse(study_of(truth, seed, origins=origins), seed=seed)
    effects = {e.name: e for e in analysis.ranking.effects}
    names = list(facts.total)
    totals = np.array([effects[n].total.mid for n in names])
    true = np.array([facts.total[n] for n in names])
    something = true.sum() > 0.1
    error, correlation = _agreement(totals, true) if something else (np.nan, np.nan)
    apart = [n for n in names if effects[n].above_dummy >= TIE[1]]
    first = max(facts.total, key=lambda n: facts.total[n])
    more = analysis.ranking.more_than
    strict = [
        (a, b) for a, row in zip(more.names, more.values, strict=True) for b, p in zip(more.names, row, strict=True)
        if p >= TIE[1] and DUMMY not in (a, b)
    ]  # fmt: skip
    return {
        "truth": name,
        "held out": float(name in HELD_OUT),
        "study": float(seed),
        "error of shares": error,
        "rank correlation": correlation,
        "effects hold": float(np.mean([_inside(effects[n].effect, facts.effect[n], 0.1) for n in names])),
        "total indices hold": float(np.mean([_inside(effects[n].total, facts.total[n], 0.005) for n in names]))
        if something else np.nan,
        "live told apart": float(np.mean([n in apart for n in facts.live])) if facts.live else np.nan,
        "null told apart": float(np.mean([n in apart and analysis.ranked for n in truth.null])),
        "first in rank 1": float(effects[first].rank == 1) if something else np.nan,
        "wrong strict orders": float(sum(facts.total[a] < facts.total[b] for a, b in strict)) if something else np.nan,
        "ranked": float(analysis.ranked),
        "R-hat": analysis.trust.rhat,
        "R2": analysis.trust.fit.r2,
        "mean width of effects": float(np.mean([effects[n].effect.high - effects[n].effect.low for n in names])),
    }  # fmt: skip


def _inside(found: Interval, truth: float, slack: float) -> bool:
    """An interval of positive numbers cannot hold a truth of exactly zero without some slack."""
    return found.low - slack <= truth <= found.high + slack


def print_holds(*, replicates: int = 8, truth: str = "", processes: int = 2, out: Path | None = None) -> None:
    """Print, for each truth, how often intervals hold and which parameters are told apart.

    Args:
        replicates: Made-up studies of each truth, 54 trials of 12 epochs and two seeds.
        truth: Only truths whose name contains this.
        processes: How many studies are analysed at a time.
        out: Write every study's row to this CSV file, as they come; studies that it has already are not made again.
    """
    jobs = [(name, seed) for name in TRUTHS if truth in name for seed in range(replicates)]
    print(holds_table(tried(_held, jobs, processes, out)))


def tried(
    work: Callable[..., Row | list[Row]], jobs: Sequence[tuple[Any, ...]], processes: int, out: Path | None
) -> pd.DataFrame:
    """The rows of all jobs, tuples of arguments, in processes of their own; written to `out` as they come.

    Jobs whose rows are in `out` already are not done again.
    """
    rows: list[Row] = []
    if out is not None and out.exists():
        rows = [{str(k): v for k, v in row.items()} for row in pd.read_csv(out).to_dict("records")]
    done = {(row["truth"], row["study"], row.get("trials")) for row in rows}
    jobs = [job for job in jobs if (*job, None)[:3] not in done]  # truth, study, and the choice of trials if it has one
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, found in zip(jobs, pool.map(work, *zip(*jobs, strict=True)), strict=True):
            rows += found if isinstance(found, list) else [found]
            print(f"{job[0]}: study {job[1]}", file=sys.stderr)
            if out is not None:
                pd.DataFrame(rows).to_csv(out, index=False, float_format="%.4g")
    return pd.DataFrame(rows)


def _choices(truth: str) -> dict[str, list[str]]:
    """Ways of choosing trials, by name: the origins of all trials."""
    search, short = origins_of(TRUTHS[truth]), origins_of(TRUTHS[truth], BEGUN)
    more = len(search) - BEGUN
    ends = 2 * len(TRUTHS[truth].space.dimensions)
    first = search.index("sobol")
    return {
        "the search": search,
        f"{ends} Sobol points less, both ends of every range": [
            "ends" if first <= i < first + ends else origin for i, origin in enumerate(search)
        ],
        f"{BEGUN} trials alone": short,
        f"{BEGUN} trials, {more} Sobol points": [*short, *["sobol"] * more],
        f"{BEGUN} trials, {more} aimed": [*short, *["aimed"] * more],
        f"{BEGUN} trials, {more} of TPE": [*short, *["tpe"] * more],
    }


def print_choices(
    *, replicates: int = 8, truths: tuple[str, ...] = ("realistic", "smooth", "steps", "plateau"), processes: int = 2,
    out: Path | None = None,
) -> None:  # fmt: skip
    """Print what other ways of choosing trials would give, a mean over the truths.

    Args:
        replicates: Made-up studies of each truth and way.
        truths: Their names.
        processes: How many studies are analysed at a time.
        out: Write every study's row to this CSV file, as they come; studies that it has already are not made again.
    """
    jobs = [
        (name, seed, way, origins)
        for seed in range(replicates) for name in truths for way, origins in _choices(name).items()
    ]  # fmt: skip
    print(choices_table(tried(_chosen, jobs, processes, out)))


def _chosen(name: str, seed: int, way: str, origins: Sequence[str]) -> Row:
    return {"trials": way, **_held(name, seed, origins)}


def choices_table(rows: pd.DataFrame) -> str:
    """A line for each way of choosing trials, the means over truths and studies."""
    columns = [c for c in rows.columns if c not in ("trials", "truth", "study", "held out")]
    cells = [(way, *_shown(part[columns].mean().to_dict())) for way, part in rows.groupby("trials", sort=False)]
    return markdown_table(["trials", *columns], cells)


def _shown(values: dict[str, float]) -> list[str]:
    return [f"{v:.0%}" if column in PERCENT and np.isfinite(v) else number(v, 2) for column, v in values.items()]


def _settled(name: str, seed: int) -> list[Row]:
    """What becomes of the undecided claims of one study, a row each, if the trials that its report names are run."""
    torch.set_num_threads(1)
    truth, rows = TRUTHS[name], []
    begun = origins_of(truth, BEGUN)
    records = study_of(truth, seed, origins=begun)
    fitted = fit_study(records, seed=seed)
    for place, verdict in enumerate(judge(conclude(records, fitted, seed=seed))):
        if verdict.verdict != "undecided" or verdict.margin is None:
            continue
        kind = next(kind for kind in possible_kinds(fitted) if kind.about.endswith(f"{SEEDS} seeds"))
        outlook = Outlook(fitted, verdict.margin)
        more = outlook.number_needed(kind)
        then = judge(analyse(study_of(truth, seed, origins=[*begun, *["sobol"] * (more or BEGUN)]), seed=seed))[place]
        assert then.margin is not None
        rows.append({
            "truth": name, "study": float(seed), "claim": verdict.claim, "more trials": float(more or BEGUN),
            "settles": np.nan if more is None else float(then.verdict != "undecided"),
            "SD now": float(verdict.margin.draws.std()), "SD then": float(then.margin.draws.std()),
            "SD expected": math.sqrt(outlook.after(kind, more or BEGUN)),
        })  # fmt: skip
    return rows


def print_settles(
    *, replicates: int = 4, truths: tuple[str, ...] = tuple(TRUTHS), processes: int = 2, out: Path | None = None
) -> None:
    """Print whether the Sobol trials of two seeds that a report of 30 trials names settle its undecided claims.

    Args:
        replicates: Made-up studies of each truth.
        truths: Their names.
        processes: How many studies are analysed at a time.
        out: Write every claim's row to this CSV file, as they come; studies that it has already are not made again.
    """
    jobs = [(name, seed) for seed in range(replicates) for name in truths]
    table = tried(_settled, jobs, processes, out).drop(columns="study")
    table["SD then / expected"] = table["SD then"] / table["SD expected"]
    means = pd.DataFrame(table.groupby("truth", sort=False, as_index=False).mean(numeric_only=True))
    cells = ([v if isinstance(v, str) else number(v, 2) for v in row] for row in means.itertuples(index=False))
    print(markdown_table(list(means.columns), cells))


def holds_table(rows: pd.DataFrame) -> str:
    """A line for each truth, the means of its studies; the truths that were held out last."""
    columns = [c for c in rows.columns if c not in ("truth", "study", "held out")]
    cells = []
    for name, part in rows.groupby("truth", sort=False):
        held = " (held out)" if name in HELD_OUT else ""
        cells.append((f"{name}{held}: {TRUTHS[str(name)].about}", *_shown(part[columns].mean().to_dict())))
    return markdown_table(["truth", *columns], cells)


def print_timing(*, trials: tuple[int, ...] = (100, 1000), tracking_uri: str | None = None) -> None:
    """Print reading and reporting times.

    Args:
        trials: Trials of the made-up studies, 30 epochs each.
        tracking_uri: Write to and read from this MLflow server; a fresh SQLite file if left out.
    """
    torch.set_num_threads(1)  # as the command has it
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        uri = tracking_uri or f"sqlite:///{folder}/mlflow.db"
        made = Synthetic(truth=ram_truth, dimensions=RAM_DIMENSIONS, origin="mixed", stop=True, default=RAM_DEFAULT)
        for count in trials:
            name = f"timing-{count}"
            records = simulate(replace(made, trials=count))
            records = records._replace(study=records.study._replace(name=name))
            write_mlflow(records, uri, artifacts=Path(folder) / "artifacts")
            client = connect(uri)
            started = time.monotonic()
            load_study(client, find_study(list_studies(client), name))
            read = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                code = sensitivity.main(sensitivity.Args(study=name, tracking_uri=uri, out=Path(folder) / name))
            reported = time.monotonic()
            rows.append((count, f"{read - started:.3f}", f"{reported - read:.3f}", code))
    print(markdown_table(("trials", "read (s)", "read and report (s)", "exit"), rows))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {
            "truth": print_truth,
            "holds": print_holds,
            "choices": print_choices,
            "settles": print_settles,
            "time": print_timing,
        },
        description=__doc__,
    )
