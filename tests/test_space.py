from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramcore.config import TASKS, Config
from ramcore.errors import UserError
from ramcore.recipes import TUNED
from ramcore.space import MAX_LEVELS, Dimension, Space
from study.record import distributions
from study.search_space import configuration, search_space
from study.sobol import SobolSequence

UNIFORM = st.floats(0, 1, exclude_max=True)


@st.composite
def dimensions(draw: st.DrawFn) -> Dimension:
    """Whole numbers with and without a step or logarithm, real numbers, choices; some have one value only."""
    kind = draw(st.sampled_from(["step", "log int", "float", "log float", "categorical"]))
    if kind == "categorical":
        choices = draw(st.lists(st.sampled_from(["rnn", "gru", "lstm", True, False, 3]), min_size=1, unique_by=str))
        return Dimension(name="core", type="categorical", choices=tuple(choices))
    if kind in ("step", "log int"):
        low = draw(st.integers(1, 50))
        high = low + draw(st.integers(0, 200))
        step = draw(st.integers(1, 9)) if kind == "step" else None
        return Dimension(name="n", type="int", low=low, high=high, step=step, log=kind == "log int")
    low = draw(st.floats(1e-6, 100))
    high = low * draw(st.floats(1, 1e4))
    return Dimension(name="x", type="float", low=low, high=high, log=kind == "log float")


@settings(max_examples=300, derandomize=True)
@given(dimensions(), st.lists(UNIFORM, min_size=1, max_size=20))
def test_study_optuna_and_analysis_agree_on_every_value_of_a_dimension(dimension, uniform):
    sampled = [dimension.sample(u) for u in uniform]
    assert all(dimension.contains(value) for value in sampled)
    units = dimension.to_unit(sampled)
    assert np.all((units >= -1e-9) & (units <= 1 + 1e-9))
    back = dimension.from_unit(units)
    if dimension.type == "float":
        assert back == pytest.approx(sampled)
    else:
        assert back == sampled
    space = Space(dimensions=(dimension,))
    optuna = distributions(space)[dimension.name]
    assert all(optuna._contains(optuna.to_internal_repr(value)) for value in sampled)
    if dimension.type != "float":
        assert not math.isnan(dimension.to_unit([str(sampled[0])])[0])  # MLflow keeps text
    assert Space.from_dict(json.loads(json.dumps(space.to_dict()))) == space


@settings(max_examples=300, derandomize=True)
@given(dimensions(), st.lists(UNIFORM, min_size=1, max_size=20))
def test_quantiles_are_the_coordinates_of_what_is_sampled(dimension, uniform):
    if dimension.levels:
        expected = dimension.to_unit([dimension.sample(u) for u in uniform])
        assert dimension.quantile(np.array(uniform)) == pytest.approx(expected)
        assert dimension.grid() == pytest.approx(dimension.to_unit(dimension.levels))
        assert dimension.from_unit(dimension.grid()) == list(dimension.levels)
        assert dimension.level_weights.sum() == pytest.approx(1)
    elif dimension.type == "float":
        assert dimension.quantile(np.array(uniform)).tolist() == uniform


@pytest.mark.parametrize(
    "dimension",
    [
        Dimension(name="n", type="int", low=2, high=9, step=2),
        Dimension(name="n", type="int", low=1, high=16, log=True),
        Dimension(name="n", type="int", low=3, high=3),
        Dimension(name="core", type="categorical", choices=("rnn", "gru", "lstm")),
    ],
)
def test_each_level_is_sampled_as_often_as_its_weight_says(dimension):
    drawn = Counter(dimension.sample((i + 0.5) / 20_000) for i in range(20_000))
    assert list(drawn) == list(dimension.levels)
    assert np.array([drawn[level] for level in dimension.levels]) / 20_000 == pytest.approx(
        dimension.level_weights, abs=2e-4
    )


def test_steps_end_at_the_last_value_they_reach():
    dimension = Dimension(name="n", type="int", low=2, high=9, step=2)
    assert dimension.levels == (2, 4, 6, 8) and dimension.top == 8
    assert dimension.from_unit(dimension.grid()) == [2, 4, 6, 8]
    assert not dimension.contains(3) and not dimension.contains(9)
    many = Dimension(name="n", type="int", low=0, high=10 * MAX_LEVELS, step=3)
    assert many.levels == () and many.from_unit([0.5]) == [120]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"type": "int", "low": 3, "high": 2}, "finite low <= high; x has 3 and 2"),
        ({"type": "float", "low": 0, "high": math.inf}, "finite low <= high"),
        ({"type": "float", "low": 0, "log": True}, "low > 0"),
        ({"type": "int", "low": 0.5, "high": 2}, "whole bounds"),
        ({"type": "int", "low": 1, "high": 8, "step": 2, "log": True}, "without log"),
        ({"type": "float", "step": 1}, "can have a step"),
        ({"type": "categorical"}, "needs choices"),
        ({"type": "real"}, "must be int, float or categorical"),
    ],
)
def test_a_dimension_without_meaning_is_refused(fields, said):
    with pytest.raises(UserError, match=said):
        Dimension(name="x", **fields)


@pytest.mark.parametrize("task", TASKS)
def test_every_dimension_is_a_field_and_every_point_a_configuration(task):
    space = search_space(dataclasses.replace(TUNED, task=task))
    fields = {f.name for f in dataclasses.fields(Config)}
    assert set(space.names) <= fields
    assert space.contains(space.default)
    points = SobolSequence(space, 0)
    for i in range(100):
        values = points[i]
        assert space.contains(values)
        config = configuration(space, values)  # raises where a point is no configuration
        assert {name: getattr(config, name) for name in space.names} == values
        for dimension in space.dimensions:
            assert dimension.from_unit(dimension.to_unit([values[dimension.name]])) == pytest.approx(
                [values[dimension.name]]
            )


def test_sobol_points_are_the_same_however_far_the_sequence_is_drawn():
    space = search_space(Config())
    points = SobolSequence(space, 0)
    early = points[3]
    points[2000]
    assert points[3] == early
    assert SobolSequence(space, 1)[3] != early


def test_sobol_points_fill_each_whole_number_alike():
    points = SobolSequence(search_space(Config()), 0)
    counts = [sum(points[i]["num_glimpses"] == n for i in range(700)) for n in range(2, 9)]
    assert min(counts) > 80 and max(counts) < 120  # 100 each in the mean


def test_infeasible_corners_are_clamped_by_lowering_the_number_of_scales():
    space = search_space(Config(task="original"))
    values = space.default | {"patch_size": 14, "num_scales": 4}
    assert not space.feasible(values)
    assert space.clamped(values)["num_scales"] == 3  # 14 * 2**2 = 56 = twice the canvas
    assert space.clamped(values)["patch_size"] == 14


def test_the_rule_holds_only_between_fields_that_are_known():
    space = Space(dimensions=(Dimension(name="patch_size", type="int", low=4, high=20),), widest_scale=10)
    assert space.feasible({"patch_size": 11}), "nothing says how many scales"
    fixed = {"num_scales": 1, "scale_factor": 2}
    assert not dataclasses.replace(space, fixed=fixed).feasible({"patch_size": 11})
    other = dataclasses.replace(space, dimensions=(Dimension(name="learning_rate", type="float"),))
    assert dataclasses.replace(other, fixed=fixed | {"patch_size": 11}).feasible({}), "it is not searched"
    assert other.rule is None


def test_a_saved_space_says_everything_that_the_analysis_needs():
    space = search_space(Config(task="translated"))
    described = space.to_dict()
    assert described["schema"] == 1
    first = described["dimensions"][0]
    assert set(first) == {"name", "type", "low", "high", "step", "log", "choices", "unit", "reason"}
    assert described["constraints"][0]["rule"] == "patch_size * scale_factor**(num_scales - 1) <= 120"
    searched, fixed = set(described["default"]), set(described["fixed"])
    assert searched | fixed == {f.name for f in dataclasses.fields(Config)} and not searched & fixed
    assert all(d["reason"] and d["unit"] for d in described["dimensions"])
    assert Space.from_dict(json.loads(json.dumps(described))) == space


def test_values_are_said_with_step_and_scale():
    whole = Dimension(name="hidden_size", type="int", low=64, high=256, step=64)
    real = Dimension(name="learning_rate", type="float", low=1e-4, high=1e-2, log=True)
    choices = Dimension(name="core", type="categorical", choices=("rnn", "gru"))
    assert [d.extent for d in (whole, real, choices)] == [
        "64 to 256, step 64", "0.0001 to 0.01, in logarithms", "rnn, gru",
    ]  # fmt: skip


def test_optuna_knows_the_same_ranges():
    space = search_space(Config())
    for dimension in space.dimensions:
        distribution = distributions(space)[dimension.name]
        assert (distribution.low, distribution.high, distribution.log) == (dimension.low, dimension.high, dimension.log)
