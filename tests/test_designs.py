from __future__ import annotations

import dataclasses

import pytest

from ramcore.config import Config
from ramcore.recipes import PAPER, TUNED
from study import designs
from study.designs import DesignInputs, TrialSpec, published, search_origins
from study.search_space import search_space
from study.sobol import SobolSequence


@pytest.mark.parametrize(
    ("total", "published_rows", "sobol", "tpe"),
    [(40, 5, 16, 19), (100, 6, 40, 54), (24, 3, 16, 5), (12, 1, 9, 2), (6, 1, 4, 1), (3, 1, 2, 0), (1, 1, 0, 0)],
)
def test_arms_of_a_search(total, published_rows, sobol, tpe):
    origins = search_origins([total], 6)
    assert len(origins) == total
    assert origins == ["published"] * published_rows + ["sobol"] * sobol + ["tpe"] * tpe


def test_the_share_of_sobol_points_can_be_chosen():
    origins = search_origins([54], 6, 0.59)
    assert origins == ["published"] * 6 + ["sobol"] * 32 + ["tpe"] * 16
    assert search_origins([40], 6, 0.8).count("tpe") == 8  # a fifth is kept for TPE


def test_a_study_that_is_extended_keeps_the_arms_it_had_and_its_share_of_sobol_points():
    before, after = search_origins([24], 6), search_origins([24, 100], 6)
    assert after[:24] == before
    assert after.count("sobol") == 40 and len(after) == 100
    assert after[24:48] == ["sobol"] * 24


def test_the_default_and_published_configurations_come_first():
    rows = published(search_space(Config(task="translated")))
    assert [row for row, _ in rows] == [
        "default",
        "6 gl 12x12 3 s",
        "6 gl 16x16 3 s",
        "8 gl 12x12 3 s",
        "6 gl 8x8 3 s",
        "6 gl 8x8 2 s",
    ]
    assert rows[1][1]["learning_rate"] == 3e-4


def inputs(epochs: int = 100, tasks: tuple[str, ...] = ("translated", "cluttered"), **values) -> DesignInputs:
    base = dataclasses.replace(TUNED, task=tasks[0], epochs=epochs)
    return DesignInputs(base=base, tasks=tasks, **{"seeds_per_trial": 3, **values})


def test_the_paper_design_is_table_1():
    plans = designs.paper(inputs())
    assert [p.row for p in plans] == [
        "translated CNN",
        "translated RAM 6 gl 8x8 2 s",
        "translated RAM 6 gl 8x8 3 s",
        "translated RAM 6 gl 12x12 3 s",
        "translated RAM 8 gl 12x12 3 s",
        "translated RAM 6 gl 16x16 3 s",
        "cluttered CNN",
        "cluttered RAM 6 gl 12x12 3 s",
        "cluttered RAM 6 gl 12x12 4 s",
        "cluttered RAM 8 gl 12x12 3 s",
        "cluttered RAM 6 gl 16x16 3 s",
        "cluttered RAM 6 gl 20x20 3 s",
    ]
    for plan in plans:
        assert plan.origin == "paper" and not plan.stoppable and plan.seeds == (0, 1, 2)
        assert (plan.config.learning_rate, plan.config.batch_size, plan.config.epochs) == (3e-4, 100, 100)
        assert plan.config.location_std == 0.17 and plan.config.hidden_size == 256
    assert plans[0].config.model == "cnn" and plans[6].config.task == "cluttered"
    assert len(designs.paper(inputs(tasks=("cluttered",)))) == 6


def test_mnihs_rows_are_trained_with_the_tuned_recipe():
    plans = {p.row: p.config for p in designs.mnih(inputs())}
    assert list(plans)[:6] == [
        "translated RAM 8 gl 12x12 3 s",
        "translated RAM 6 gl 12x12 3 s",
        "translated RAM 4 gl 12x12 3 s",
        "translated fc 64",
        "translated fc 256",
        "translated conv",
    ]
    assert len(plans) == 13 and plans["cluttered RAM 8 random gl"].model == "ram-random"
    assert plans["translated RAM 6 gl 12x12 3 s"] == dataclasses.replace(TUNED, epochs=100)
    assert plans["cluttered fc 64"].hidden_size == 64


def test_each_ablation_row_takes_back_one_choice_of_the_tuned_recipe():
    tuned, *rows, paper = designs.ablation(inputs(30))
    assert tuned.config == TUNED and tuned.row == "tuned"
    assert dataclasses.replace(paper.config, epochs=100) == PAPER
    for plan in rows:
        differing = [
            f.name for f in dataclasses.fields(TUNED) if getattr(plan.config, f.name) != getattr(TUNED, f.name)
        ]
        # A discount of 0 and a last reward alone would leave all decisions but one without any.
        assert sorted(differing) == (["discount", "reward_steps"] if "reward_steps" in differing else differing[:1])
        assert plan.row == "tuned but " + ", ".join(f"{n}={getattr(PAPER, n)}" for n in sorted(differing, reverse=True))
    changed = [f.name for f in dataclasses.fields(TUNED) if getattr(TUNED, f.name) != getattr(PAPER, f.name)]
    assert len(rows) == len(changed) - 1  # all but the number of epochs


def test_one_factor_at_a_time_changes_one_factor_at_a_time():
    space = search_space(Config())
    best = space.default | {"patch_size": 16}
    plans = designs.ofat(inputs(space=space, best=best))
    assert plans[0].row == "baseline best" and len({p.row for p in plans}) == len(plans)
    baselines = {p.row: p.config for p in plans if ":" not in p.row}
    assert baselines["baseline small patch"].patch_size == designs.SMALL_PATCH
    for plan in plans:
        baseline, _, changed = plan.row.partition(": ")
        if changed:
            name = changed.partition("=")[0]
            differing = [n for n in space.names if getattr(plan.config, n) != getattr(baselines[baseline], n)]
            assert differing == [name]
    assert {name for p in plans for name in space.names if f": {name}=" in p.row} == set(space.names)


def test_replicate_uses_seeds_that_no_search_has_seen():
    space = search_space(Config())
    spread = [SobolSequence(space, designs.SPREAD_SEED)[i] for i in range(designs.SPREAD_POINTS)]
    plans = designs.replicate(
        inputs(
            space=space,
            best=space.default | {"patch_size": 20},
            source="translated-mnist-search",
            seeds_per_trial=5,
            spread=spread,
        )
    )
    assert [p.row for p in plans][:2] == ["best of translated-mnist-search", "default"]
    assert all(min(p.seeds) >= 1000 and len(p.seeds) == 5 for p in plans)
    assert len({str(p.config) for p in plans}) == len(plans) == 2 + designs.SPREAD_POINTS
    again = designs.replicate(inputs(space=space, best=dict(space.default), source="a search", spread=spread))
    assert [p.row for p in again][:2] == ["best of a search", "spread point 1"], (
        "the default was the best: once is enough"
    )


def test_a_plan_survives_json():
    plan = designs.paper(inputs())[1]
    assert TrialSpec.from_dict(plan.to_dict()) == plan
