"""The ranges that `--design search` tries, unless the command line says others (`study.space_flags`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ramcore.config import Config
from ramcore.errors import UserError
from ramcore.space import Dimension, Space

# Fields of a study as a whole, and the flags that set them.
OF_THE_STUDY = {name: f"--{name}" for name in ("data", "task", "epochs", "canvas")} | {"num_classes": "--data"}


def search_space(base: Config) -> Space:
    """The space for the task of a base configuration, which gives every field its default."""
    largest = max(1, min(20, base.canvas_size // 2))
    dimensions = (
        Dimension(
            name="num_glimpses", type="int", low=2, high=8, step=1, unit="glimpses",
            reason="published: 2 to 8; with one glimpse there is nothing to decide",
        ),
        Dimension(
            name="patch_size", type="int", low=min(4, largest), high=largest, step=1, unit="pixels",
            reason="published: 8 to 20; below 4 a stroke is lost, above half the canvas nothing is hidden",
        ),
        Dimension(
            name="num_scales", type="int", low=1, high=4, step=1, unit="scales",
            reason="published: 1 to 4",
        ),
        Dimension(
            name="location_std", type="float", low=0.03, high=0.5, log=True, unit="half-canvas units",
            reason="below 0.03 (1 pixel of 60) nothing is explored, above 0.5 the policy's mean hardly matters",
        ),
        Dimension(
            name="learning_rate", type="float", low=1e-4, high=1e-2, log=True, unit="per step (Adam)",
            reason="the published 3e-4 lies inside; above 1e-2 Adam diverges on these networks",
        ),
        Dimension(
            name="reinforce_weight", type="float", low=0.01, high=10.0, log=True, unit="ratio",
            reason="the published 1 in the middle, from hardly any policy learning to policy first",
        ),
        Dimension(
            name="loss_mixing", type="float", low=0.0, high=1.0, unit="share",
            reason="from REINFORCE alone to cross-entropy alone: the case study asks which is better",
        ),
        Dimension(
            name="step_supervision", type="float", low=0.0, high=1.0, unit="share",
            reason="from the last step alone to every step alike: the case study's 'alternative choice'",
        ),
    )  # fmt: skip
    searched = [dimension.name for dimension in dimensions]
    values = dataclasses.asdict(base)
    return Space(
        dimensions=dimensions,
        default={name: values[name] for name in searched},
        fixed={name: value for name, value in values.items() if name not in searched},
        widest_scale=2 * base.canvas_size,  # a square that wide sees the whole canvas from anywhere
    )


def configuration(space: Space, values: Mapping[str, object]) -> Config:
    """The whole configuration of a point of a space."""
    return Config(**{**space.fixed, **space.default, **values})


def checked(space: Space) -> Space:
    """The space, if a search can try it: every value must make a configuration. Raises UserError if it cannot."""
    fields = [field.name for field in dataclasses.fields(Config) if field.name not in OF_THE_STUDY]
    if not space.dimensions:
        raise UserError("a search needs at least one dimension; there is none: add one, with --range or --choices")
    configuration(space, {})  # refuses what is fixed, in its own words
    for dimension in space.dimensions:
        if dimension.name not in fields:
            raise UserError(
                f"a dimension must be a field of Config other than {', '.join(OF_THE_STUDY)}; got {dimension.name}: "
                "mend study/search_space.py"
            )
        for value in dimension.choices or dimension.from_unit((0.0, 1.0)):
            try:
                configuration(space, {dimension.name: value})
            except UserError as error:
                raise UserError(f"the dimension {dimension.name} needs another range; {error}") from error
    if not space.feasible(space.clamped({d.name: d.from_unit((1.0,))[0] for d in space.dimensions})):
        raise UserError(f"some of the space must obey {space.rule}; its lowest corner does not: lower its ranges")
    return space
