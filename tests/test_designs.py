from __future__ import annotations

import dataclasses
import json

import pytest
from crash import Silent
from test_first_points import opened, run
from test_scheduler import EPOCHS

from ramcore.config import Config
from ramcore.recipes import PAPER, TUNED
from study import designs
from study.designs import DESIGNS, Design, DesignInputs, TrialSpec, published, search_origins
from study.flags import Flags
from study.prepare import prepare
from study.record import open_record
from study.scheduler import StudyScheduler
from study.search_space import search_space
from study.sobol import SobolSequence


@pytest.mark.parametrize(
    ("total", "published_rows", "sobol", "tpe"),
    [(40, 5, 16, 19), (100, 6, 40, 54), (24, 3, 16, 5), (12, 1, 9, 2), (6, 1, 4, 1), (3, 1, 2, 0), (1, 1, 0, 0)],
)
def test_search_starts_with_published_then_sobol_then_tpe(total, published_rows, sobol, tpe):
    origins = search_origins([total], 6)
    assert len(origins) == total
    assert origins == ["published"] * published_rows + ["sobol"] * sobol + ["tpe"] * tpe


def test_sobol_share_sets_number_of_sobol_trials():
    origins = search_origins([54], 6, 0.59)
    assert origins == ["published"] * 6 + ["sobol"] * 32 + ["tpe"] * 16
    assert search_origins([40], 6, 0.8).count("tpe") == 8  # a fifth is kept for TPE


def test_extended_search_keeps_earlier_origins_and_sobol_share():
    before, after = search_origins([24], 6), search_origins([24, 100], 6)
    assert after[:24] == before
    assert after.count("sobol") == 40 and len(after) == 100
    assert after[24:48] == ["sobol"] * 24


def test_default_and_published_configurations_come_first():
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


def test_first_points_outside_the_ranges_are_left_out_and_named():
    space = search_space(Config(task="translated"))
    assert designs.points_outside(space) == []
    narrow = dataclasses.replace(space.dimensions[0], high=5)
    narrow = dataclasses.replace(space, dimensions=(narrow, *space.dimensions[1:]))
    assert designs.points_outside(narrow)[:2] == ["default: num_glimpses=6", "6 gl 12x12 3 s: num_glimpses=6"]
    assert published(narrow) == []


def test_published_points_of_another_fixed_size_are_no_first_points():
    space = search_space(Config(task="translated"))
    fixed = dataclasses.replace(
        space,
        dimensions=space.dimensions[1:],
        default={name: value for name, value in space.default.items() if name != "num_glimpses"},
        fixed={**space.fixed, "num_glimpses": 8},
    )
    assert [row for row, _ in published(fixed)] == ["default", "8 gl 12x12 3 s"]


def test_paper_design_is_table_1():
    specs = designs.paper(inputs())
    assert [s.row for s in specs] == [
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
    for spec in specs:
        assert spec.origin == "paper" and spec.origin not in designs.STOPPABLE and spec.seeds == (0, 1, 2)
        assert (spec.config.learning_rate, spec.config.batch_size, spec.config.epochs) == (3e-4, 100, 100)
        assert spec.config.location_std == 0.17 and spec.config.hidden_size == 256
    assert specs[0].config.model == "cnn" and specs[6].config.task == "cluttered"
    assert len(designs.paper(inputs(tasks=("cluttered",)))) == 6


def test_mnih_rows_use_the_tuned_recipe():
    specs = {s.row: s.config for s in designs.mnih(inputs())}
    assert list(specs)[:6] == [
        "translated RAM 8 gl 12x12 3 s",
        "translated RAM 6 gl 12x12 3 s",
        "translated RAM 4 gl 12x12 3 s",
        "translated fc 64",
        "translated fc 256",
        "translated conv",
    ]
    assert len(specs) == 13 and specs["cluttered RAM 8 random gl"].model == "ram-random"
    assert specs["translated RAM 6 gl 12x12 3 s"] == dataclasses.replace(TUNED, epochs=100)
    assert specs["cluttered fc 64"].hidden_size == 64


def test_each_ablation_row_undoes_one_choice_of_the_tuned_recipe():
    tuned, *rows, paper = designs.ablation(inputs(30))
    assert tuned.config == TUNED and tuned.row == "tuned"
    assert dataclasses.replace(paper.config, epochs=100) == PAPER
    for spec in rows:
        differing = [
            f.name for f in dataclasses.fields(TUNED) if getattr(spec.config, f.name) != getattr(TUNED, f.name)
        ]
        # A discount of 0 and a last reward alone would leave all decisions but one without any.
        assert sorted(differing) == (["discount", "reward_steps"] if "reward_steps" in differing else differing[:1])
        assert spec.row == "tuned but " + ", ".join(f"{n}={getattr(PAPER, n)}" for n in sorted(differing, reverse=True))
    changed = [f.name for f in dataclasses.fields(TUNED) if getattr(TUNED, f.name) != getattr(PAPER, f.name)]
    assert len(rows) == len(changed) - 1  # all but the number of epochs


def test_each_ofat_row_changes_one_parameter():
    space = search_space(Config())
    best = {**space.default, "patch_size": 16}
    specs = designs.ofat(inputs(space=space, best=best))
    assert specs[0].row == "baseline best" and len({s.row for s in specs}) == len(specs)
    baselines = {s.row: s.config for s in specs if ":" not in s.row}
    assert baselines["baseline small patch"].patch_size == designs.SMALL_PATCH
    for spec in specs:
        baseline, _, changed = spec.row.partition(": ")
        if changed:
            name = changed.partition("=")[0]
            differing = [n for n in space.names if getattr(spec.config, n) != getattr(baselines[baseline], n)]
            assert differing == [name]
    assert {name for s in specs for name in space.names if f": {name}=" in s.row} == set(space.names)


def test_replicate_uses_seeds_outside_those_of_a_search():
    space = search_space(Config())
    spread = [SobolSequence(space, designs.SPREAD_SEED)[i] for i in range(designs.SPREAD_POINTS)]
    specs = designs.replicate(
        inputs(
            space=space,
            best={**space.default, "patch_size": 20},
            source="translated-mnist-search",
            seeds_per_trial=5,
            spread=spread,
        )
    )
    assert [s.row for s in specs][:2] == ["best of translated-mnist-search", "default"]
    assert [s.baseline for s in specs] == ["best", "default", "", "", "", ""]
    assert all(min(s.seeds) >= 1000 and len(s.seeds) == 5 for s in specs)
    assert len({str(s.config) for s in specs}) == len(specs) == 2 + designs.SPREAD_POINTS
    again = designs.replicate(inputs(space=space, best=dict(space.default), source="a search", spread=spread))
    assert [s.row for s in again][:2] == ["best of a search", "spread point 1"], (
        "the default was the best: once is enough"
    )


def test_spec_survives_json():
    spec = designs.paper(inputs())[1]
    assert TrialSpec.from_dict(spec.to_dict()) == spec
    assert TrialSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_spec_of_an_older_record_says_arm_for_origin():
    """Records of schema 1 hold {"config", "arm", "row", "seeds"}."""
    spec = designs.ofat(inputs(space=search_space(Config()), best=dict(search_space(Config()).default)))[1]
    old = {"config": dataclasses.asdict(spec.config), "arm": "ofat", "row": spec.row, "seeds": list(spec.seeds)}
    read = TrialSpec.from_dict(json.loads(json.dumps(old)))
    assert (read.origin, read.config, read.row, read.seeds) == ("ofat", spec.config, spec.row, spec.seeds)


def test_design_added_to_the_registry_is_prepared_and_run(tmp_path, monkeypatch):
    def rows(inputs: DesignInputs) -> list[TrialSpec]:
        configs = [dataclasses.replace(inputs.base, num_glimpses=n) for n in (2, 4)]
        return [TrialSpec(config=c, origin="mine", row=f"{c.num_glimpses} gl", seeds=inputs.seeds) for c in configs]

    mine = Design(
        summary="two numbers of glimpses", epochs=2, seeds_per_trial=3, tasks=("original",), tested=True,
        report="comparison", rows=rows,
    )  # fmt: skip
    monkeypatch.setitem(DESIGNS, "mine", mine)
    prepared = prepare(Flags(design="mine", data="digits", storage=str(tmp_path)))
    settings = prepared.settings
    assert (settings.study, settings.design, settings.task) == ("original-digits-mine", "mine", "original")
    assert (settings.epochs, settings.seeds_per_trial, prepared.total, prepared.trials_left) == (2, 3, None, 2)
    with open_record(prepared.storage, settings, total=prepared.total, rows=prepared.rows) as record:
        scheduler = StudyScheduler(record, space=prepared.space, storage=prepared.storage, callback=Silent())
        jobs = [scheduler.next_job(), scheduler.next_job(), scheduler.next_job()]
    assert [(j.config.num_glimpses, j.test, j.seeds) for j in jobs if j] == [(2, True, (0, 1, 2)), (4, True, (0, 1, 2))]
    assert scheduler.origins == ["mine", "mine"]


@pytest.mark.parametrize("design", ["ofat", "replicate"])
def test_design_that_starts_from_a_search_is_continued_from_its_own_record(tmp_path, design):
    search = opened(tmp_path, trials=3)
    run(search, 3)
    search.record.close()
    flags = Flags(design=design, data="digits", task="original", epochs=EPOCHS, storage=str(tmp_path))
    first = prepare(flags)
    open_record(first.storage, first.settings, total=first.total, rows=first.rows).close()
    again = prepare(flags)
    assert again.known is not None and again.settings == first.settings
    assert again.trials_left == first.trials_left > 0
