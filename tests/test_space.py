from __future__ import annotations

import dataclasses

import pytest

from ramcore.config import Config, Task
from ramcore.recipes import TUNED
from study.space import search_space

TASKS: tuple[Task, ...] = ("original", "translated", "cluttered", "cluttered-100")


@pytest.mark.parametrize("task", TASKS)
def test_every_dimension_is_a_field_and_every_point_a_configuration(task):
    space = search_space(dataclasses.replace(TUNED, task=task))
    fields = {f.name for f in dataclasses.fields(Config)}
    assert set(space.names) <= fields
    assert space.contains(space.default)
    for i in range(100):
        values = space.sobol(i, 0)
        assert space.contains(values)
        config = space.config(values)  # raises where a point is no configuration
        assert {name: getattr(config, name) for name in space.names} == values


def test_sobol_points_are_the_same_however_far_the_sequence_is_drawn():
    space = search_space(Config())
    early = space.sobol(3, 0)
    space.sobol(2000, 0)
    assert space.sobol(3, 0) == early
    assert space.sobol(3, 1) != early


def test_sobol_points_fill_each_whole_number_alike():
    space = search_space(Config())
    counts = [sum(space.sobol(i, 0)["num_glimpses"] == n for i in range(700)) for n in range(2, 9)]
    assert min(counts) > 80 and max(counts) < 120  # 100 each in the mean


def test_infeasible_corners_are_clamped_by_taking_scales_away():
    space = search_space(Config(task="original"))
    values = space.default | {"patch_size": 14, "num_scales": 4}
    assert not space.feasible(values)
    assert space.clamped(values)["num_scales"] == 3  # 14 * 2**2 = 56 = twice the canvas
    assert space.clamped(values)["patch_size"] == 14


def test_the_description_is_the_contract_with_the_analysis():
    space = search_space(Config(task="translated"))
    described = space.describe(study="s", epochs=30)
    assert described["schema"] == 1 and described["study"] == "s"
    first = described["dimensions"][0]
    assert set(first) == {"name", "type", "low", "high", "step", "log", "choices", "unit", "reason"}
    assert described["constraints"][0]["rule"] == "patch_size * scale_factor**(num_scales - 1) <= 120"
    searched, fixed = set(described["default"]), set(described["fixed"])
    assert searched | fixed == {f.name for f in dataclasses.fields(Config)} and not searched & fixed
    assert all(d["reason"] and d["unit"] for d in described["dimensions"])


def test_optuna_knows_the_same_ranges():
    space = search_space(Config())
    for dimension in space.dimensions:
        distribution = space.distributions()[dimension.name]
        assert (distribution.low, distribution.high, distribution.log) == (dimension.low, dimension.high, dimension.log)
        for u in (0.0, 0.3, 0.999999):
            value = dimension.from_unit(u)
            assert distribution._contains(distribution.to_internal_repr(value))
