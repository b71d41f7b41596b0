from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from synthetic import RAM_DIMENSIONS, Synthetic, simulate

from analysis.curves import supported
from analysis.importance import analyse
from analysis.report import write_report
from analysis.selection import select
from analysis.verdicts import judge
from ramcore.config import Config, read_value
from ramcore.errors import UserError
from ramcore.recipes import TUNED
from ramcore.space import Dimension, Space
from study import designs
from study.designs import DesignInputs
from study.record import distributions
from study.search_space import OF_THE_STUDY, checked, configuration, search_space
from study.sobol import SobolSequence
from study.space_flags import SpaceFlags, asked_points, asked_space, space_toml

SPACE = search_space(TUNED)


def asked(**flags) -> Space:
    return checked(asked_space(SPACE, SpaceFlags(**flags)))


def test_ranges_choices_and_fixed_values_change_the_space():
    space = asked(
        ranges=("num_scales=1:3", "learning_rate=1e-4:3e-3:log", "hidden-size=64:256:64"),
        choices=("core=rnn,gru", "layer_norm=true,false", "num_glimpses=2,8"),
        fixed=("input_gain=2", "patch_size=10"),
    )
    found = {d.name: d for d in space.dimensions}
    assert space.names[:2] == ("num_glimpses", "num_scales"), "those that stay keep their order"
    assert (found["num_scales"].low, found["num_scales"].high, found["num_scales"].unit) == (1, 3, "scales")
    assert (found["learning_rate"].low, found["learning_rate"].high, found["learning_rate"].log) == (1e-4, 3e-3, True)
    assert found["hidden_size"].levels == (64, 128, 192, 256)
    assert found["core"].choices == ("rnn", "gru") and found["layer_norm"].choices == (True, False)
    assert found["num_glimpses"].choices == (2, 8)
    assert "patch_size" not in found and (space.fixed["patch_size"], space.fixed["input_gain"]) == (10, 2)
    assert space.default["core"] == TUNED.core and set(space.default) == set(space.names)
    assert set(space.default) | set(space.fixed) == {field.name for field in dataclasses.fields(Config)}
    assert asked_space(space, SpaceFlags(ranges=("num_scales=1:3",))) == space, "the same command continues"


def test_every_field_of_config_can_be_searched():
    for field in dataclasses.fields(Config):
        name, default = field.name, getattr(TUNED, field.name)
        if name in OF_THE_STUDY:
            with pytest.raises(UserError, match=f"{name} is the same in all trials"):
                asked(fixed=(f"{name}=1",))
        elif isinstance(default, bool | str):
            with pytest.raises(UserError) as allowed:
                read_value(name, "?")
            rule = str(allowed.value).split("; got")[0].partition(" must be ")[2].removeprefix("one of ")
            space = asked(choices=(f"{name}={rule.replace(' or ', ',').replace(', ', ',')}",))
            drawn = [configuration(space, SobolSequence(space, 0)[i]) for i in range(60)]
            assert {getattr(config, name) for config in drawn} == set(space.dimensions[-1].choices)
        else:
            space = asked(ranges=(f"{name}=0.2:0.9" if isinstance(default, float) else f"{name}=2:3",))
            assert name in space.names and configuration(space, SobolSequence(space, 0)[3])


def test_file_replaces_all_dimensions_and_flags_change_the_file(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(
        'input_gain = 2\n[num_glimpses]\nlow = 2\nhigh = 6\nreason = "few\\nof them"\n'
        '[core]\nchoices = ["rnn", "gru"]\n'
        "[location_std]\nlow = 0.05\nhigh = 0.5\nlog = true\n"
    )
    space = asked(file=path, ranges=("num_glimpses=3:4",))
    assert space.names == ("num_glimpses", "core", "location_std") and space.fixed["input_gain"] == 2
    assert (space.dimensions[0].high, space.dimensions[0].reason) == (4, "from the command line")
    assert asked(file=path).dimensions[0].reason == "few of them"
    assert space.dimensions[1].reason == f"from {path}"


def test_printed_space_is_read_back_as_it_was(tmp_path):
    space = asked(ranges=("hidden_size=64:256:64",), choices=("layer_norm=true,false",), fixed=("input_gain=2",))
    text = space_toml(space, TUNED)
    assert "# published: 1 to 4" in text and "# unit: scales" in text and tomllib.loads(text)["input_gain"] == 2
    path = tmp_path / "space.toml"
    path.write_text(text)
    again = asked(file=path)

    def plain(one: Space) -> Space:
        named = (dataclasses.replace(d, reason="", step=d.step if d.step != 1 else None) for d in one.dimensions)
        return dataclasses.replace(one, dimensions=tuple(named))

    assert plain(again) == plain(space)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"ranges": ("num_scale=1:3",)}, "got num_scale; did you mean num_scales?"),
        ({"ranges": ("num_scales=3:1",)}, "a range needs low < high; num_scales has 3 and 1: swap them"),
        ({"ranges": ("num_scales=2:2",)}, "one value is --set num_scales=2"),
        ({"ranges": ("num_scales=1:9",)}, "num_scales must be a whole number of at least 1 and at most 6; got 9"),
        ({"ranges": ("num_scales=1.5:3",)}, "num_scales must be a whole number"),
        (
            {"ranges": ("num_scales=:3",)},
            "a range must be LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP, with a STEP of at most 9 digits; got ':3'",
        ),
        ({"ranges": ("num_scales=1",)}, "a range must be LOW:HIGH"),
        ({"ranges": ("num_scales",)}, "--range must be NAME=...,"),
        ({"ranges": ("num_scales=1:3:9",)}, "a step must leave two values"),
        ({"ranges": ("num_scales=1:9:²",)}, "with a STEP of at most 9 digits; got '1:9:²'"),
        ({"ranges": (f"num_scales=1:9:{'9' * 5000}",)}, "with a STEP of at most 9 digits; got '1:9:99"),
        ({"fixed": ("hidden_size=3e9",)}, "a whole number of at least 1 and at most 2147483647; got 3000000000"),
        ({"fixed": (f"input_gain={'9' * 400}",)}, "input_gain must be a finite number; got inf"),
        ({"ranges": ("num_scales=1:3:0",)}, "a step must be a whole number of at least 1, between whole numbers"),
        ({"ranges": ("input_gain=1:9:2",)}, "input_gain has 2: leave it out"),
        ({"ranges": ("patch_size=10:70",)}, "patch_size must be at most 60, the canvas of task translated; got 70"),
        ({"ranges": ("loss_mixing=0:1:log",)}, "logarithms needs low > 0"),
        ({"ranges": ("learning_rate=a:b",)}, "learning_rate must be a finite number; got 'a'"),
        ({"ranges": ("core=1:2",)}, "a range is of numbers; core is none: pass --choices core=VALUE,VALUE"),
        ({"choices": ("core=rnn",)}, "choices must be 2 to 12 different values"),
        (
            {"choices": ("core=rnn,rnn",)},
            "choices must be 2 to 12 different values, without a range; core has rnn, rnn",
        ),
        ({"choices": (f"num_glimpses={','.join(map(str, range(1, 14)))}",)}, "9, 10, 11, 12, 13: leave out 1"),
        ({"choices": ("core=rnn,gru,rnn",)}, "core has rnn, gru, rnn: say each once"),
        ({"choices": ("core=rnn,lsmt",)}, "core must be one of rnn, gru, lstm; got 'lsmt'; did you mean lstm?"),
        ({"choices": ("core=rnn,cnn",)}, "core must be one of rnn, gru, lstm; got 'cnn'"),
        ({"choices": ("layer_norm=yes,no",)}, "layer_norm must be true or false; got 'yes'"),
        ({"fixed": ("input_gain=-1",)}, "input_gain must be above 0; got -1"),
        ({"fixed": ("epochs=3",)}, "epochs is the same in all trials of a study; it cannot be searched: pass --epochs"),
        ({"fixed": ("core=rnn",), "choices": ("core=rnn,gru",)}, "core has two: keep one"),
        ({"fixed": ("patch_size=60", "num_scales=6")}, None),
        ({"ranges": ("patch_size=30:60",), "fixed": ("num_scales=6",)}, "its lowest corner does not"),
        ({"fixed": tuple(f"{name}={SPACE.default[name]}" for name in SPACE.names)}, "at least one dimension"),
    ],
)
def test_space_that_cannot_be_searched_is_refused_in_one_line(flags, said):
    if said is None:  # the rule is about searched fields alone
        assert asked(**flags).rule is None
        return
    with pytest.raises(UserError) as refusal:
        asked(**flags)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[num_scale]\nlow = 1\nhigh = 3", "did you mean num_scales?"),
        ("[num_scales]\nlow = 1\nhihg = 3", "got hihg; did you mean high?"),
        ("[num_scales]\nlow = 1", "num_scales lacks high"),
        ("[num_scales]\nlow = 1\nhigh = 3\nchoices = [1, 2]", "without a range"),
        ("[num_scales]\nlow = 1\nhigh = 3\nlog = 1", "log must be true or false; num_scales has 1"),
        ("[num_scales]\nlow = 1\nhigh = 3\nstep = 1.5", "num_scales has 1.5: leave it out"),
        (f"input_gain = {'9' * 400}", "input_gain must be a finite number; got about 1e400"),
        ('"a\\nb" = 1', "a hyperparameter must be a field of Config; got a\\nb"),
        (f"a = {'[' * 2000}", "--space must be a TOML file"),
        ("[num_scales]\nlow = 1\nhigh = 3\nstep = true", "a step must be a whole number of at least 1"),
        ("[num_scales]\nlow = 1\nhigh = 3\nunit = 3", "unit must be text of at most 1000 characters; num_scales has 3"),
        (
            f"[num_scales]\nlow = 1\nhigh = 3\nreason = '{'a' * 10**5}'",
            "reason must be text of at most 1000 characters",
        ),
        ("[num_scales]\nlow = 1\nhigh = 3\nchoices = [1, 2]", "num_scales has 1, 2: keep one of the two"),
        ("[core]\nchoices = 'rnn'", "core has no list of them"),
        ("[num_scales\nlow = 1", "--space must be a TOML file"),
    ],
)
def test_bad_file_is_refused_in_one_line(tmp_path, text, said):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        asked(file=path)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_points_to_try_take_the_default_where_they_say_nothing():
    ((text, values),) = asked_points(SPACE, ["num_glimpses=4,patch-size=10"])
    assert text == "num_glimpses=4,patch-size=10"
    assert values == {**SPACE.default, "num_glimpses": 4, "patch_size": 10}
    for bad, said in (
        ("num_glimpses=40", "num_glimpses=40 is not of 2 to 8"),
        ("input_gain=2", "input_gain is fixed to 4.0"),
        ("num_glimpse=2", "did you mean num_glimpses?"),
        ("num_glimpses=2,num_glimpses=3", "num_glimpses has 2 and 3: keep one"),
        ("", "--try must be NAME=..."),
        ("patch_size=20,num_scales=4", "--try must obey patch_size"),
    ):
        with pytest.raises(UserError, match=said):
            asked_points(SPACE, [bad])
    narrow = asked(ranges=("learning_rate=2e-3:1e-2:log",))
    with pytest.raises(UserError, match=r"the default's learning_rate=0\.001 lies outside"):
        asked_points(narrow, ["num_glimpses=4"])


def test_infeasible_values_are_clamped_in_a_space_without_scales_or_with_choices():
    space = asked(ranges=("patch_size=4:20",), fixed=("num_scales=4",))
    assert space.clamped({**space.default, "patch_size": 20})["patch_size"] == 15  # 15 * 2**3 = 120
    space = asked(choices=("patch_size=20,8,12",), fixed=("num_scales=4",))
    assert space.clamped({**space.default, "patch_size": 20})["patch_size"] == 12
    assert all(space.feasible(SobolSequence(space, 0)[i]) for i in range(20))


def test_one_factor_at_a_time_needs_no_patch_size_and_takes_choices():
    space = asked(choices=("core=rnn,gru,lstm",), fixed=tuple(f"{n}={SPACE.default[n]}" for n in SPACE.names))
    inputs = DesignInputs(base=TUNED, tasks=("translated",), seeds_per_trial=1, space=space, best={"core": "gru"})
    rows = designs.ofat(inputs)
    assert [(row.parameter, row.config.core) for row in rows] == [("", "gru"), ("core", "rnn"), ("core", "lstm")]


def test_optuna_knows_choices_and_saved_spaces_keep_them():
    space = asked(choices=("core=rnn,gru", "layer_norm=true,false"))
    assert distributions(space)["layer_norm"].choices == (True, False)
    assert Space.from_dict(json.loads(json.dumps(space.to_dict()))) == space


CHOICES = (
    Dimension(name="core", type="categorical", choices=("rnn", "gru", "lstm"), reason="asked for"),
    Dimension(name="layer_norm", type="categorical", choices=(True, False), reason="asked for"),
)


@pytest.mark.usefixtures("quick_fits")
def test_choice_that_matters_is_found_and_reported(tmp_path: Path):
    def truth(x: np.ndarray, u: float) -> np.ndarray:
        return 2.0 * (np.abs(x[:, 0] - 0.5) < 1e-9) + u  # gru, the one in the middle, is the best

    study = Synthetic(
        truth=truth, dimensions=CHOICES, default={"core": "gru", "layer_norm": False}, trials=30, epochs=3,
        trial_sd=0.05, epoch_sd=0.02,
    )  # fmt: skip
    records = simulate(study)
    analysis = analyse(records, hyperdraws=10)
    assert next(e.name for e in analysis.ranking.effects) == "core"
    curve = analysis.curves.marginals["core"]
    assert curve.values == ["rnn", "gru", "lstm"] and curve.mid.argmax() == 1
    assert analysis.configurations.best["core"] == "gru"
    verdicts = judge(analysis)
    assert verdicts == (), "the case study's parameters were not varied"
    page = write_report(tmp_path, records, analysis, verdicts)[0].read_text()
    assert "case study" not in page and "guessing" in page
    few = dataclasses.replace(study, trials=8)
    assert analyse(simulate(few), hyperdraws=10).data.dimensions[0].name == "core"


def test_choice_without_two_trials_is_not_supported():
    study = Synthetic(truth=lambda x, u: x[:, 0] + u, dimensions=(CHOICES[0], RAM_DIMENSIONS[0]), trials=12, epochs=3)
    records = simulate(study)
    rows = [n for n, core in records.trials["core"].items() if core == "lstm"]
    selection = select(records)
    position = [d.name for d in selection.data.dimensions].index("core")
    at = selection.attempts.x[:, position]
    kept = selection.attempts._replace(
        x=selection.attempts.x[(at < 0.9) | (np.cumsum(at > 0.9) == 1)],
        u=selection.attempts.u[(at < 0.9) | (np.cumsum(at > 0.9) == 1)],
    )
    assert len(rows) > 1 and supported(selection.data, selection.attempts, position).tolist() == [True] * 3
    assert supported(selection.data, kept, position).tolist() == [True, True, False]
