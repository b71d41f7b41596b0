"""Single configurations: the default, the best one tried, what one change gains, and the path between the two."""

from __future__ import annotations

import numpy as np

from analysis.effects import Predictor, allowed
from analysis.results import Configurations, Data, Gain, Step, interval
from analysis.selection import Selection
from ramcore.space import Array


def compare_configurations(selection: Selection, predictor: Predictor) -> tuple[int, Configurations]:
    """Compare the default with the best configuration tried, by expected accuracy; also that one's row in the
    observations.
    """
    data, varied = selection.data, selection.data.dimensions[:-1]
    saved = data.space.default
    default = {d.name: saved.get(d.name, d.from_unit([0.5])[0]) for d in varied}
    at = np.array([d.to_unit([default[d.name]])[0] for d in varied])
    inside = all(d.name in saved for d in varied) and bool(np.all((at >= -1e-9) & (at <= 1 + 1e-9)))
    default_x = np.clip(np.nan_to_num(at, nan=0.5), 0.0, 1.0)
    for i in (i for i, d in enumerate(varied) if d.type == "categorical"):  # nothing lies between two choices
        default_x[i] = varied[i].to_unit(varied[i].from_unit(default_x[[i]]))[0]

    row = _best_row(selection, predictor)
    best_x = selection.observations.x[row, :-1]
    gains = [_gain(data, predictor, i, default_x) for i in range(len(varied))]
    return row, Configurations(
        default=default,
        default_inside=inside,
        default_accuracy=interval(_accuracy(predictor, default_x[None, :])[0]),
        best={d.name: d.from_unit(best_x[i : i + 1])[0] for i, d in enumerate(varied)},
        best_trial=int(selection.observations.trials[row]),
        best_accuracy=interval(_accuracy(predictor, best_x[None, :])[0]),
        tunability=tuple(sorted(gains, key=lambda gain: -gain.gain.mid)),
        path=_path(data, predictor, default_x, best_x),
    )


def _accuracy(predictor: Predictor, x: Array) -> Array:
    """Accuracy points at coordinates without the dummy (N, D - 1), the dummy at its middle -> (N, S)."""
    return predictor.accuracy(np.column_stack([x, np.full(len(x), 0.5)]))


def _best_row(selection: Selection, predictor: Predictor) -> int:
    """Which trial of the observations has the largest expected accuracy; a complete one if there is any."""
    expected = _accuracy(predictor, selection.observations.x[:, :-1]).mean(axis=1)
    for best in (selection.complete & selection.own, selection.own):  # the study's own, and complete if any is
        if best.any():
            expected = np.where(best, expected, -1.0)
            break
    return int(np.argmax(expected))


def _gain(data: Data, predictor: Predictor, i: int, default: Array) -> Gain:
    """The allowed change of dimension i alone that has the largest expected gain.

    The change is chosen by its mean over the draws: the largest gain of each draw would be too high on average.
    """
    dimension, varied = data.dimensions[i], data.dimensions[:-1]
    grid = np.append(dimension.grid(25), default[i])
    x = np.repeat(default[None, :], len(grid), axis=0)
    x[:, i] = grid
    keep = allowed(data.space, varied, x)
    keep[-1] = True  # the default itself
    grid, draws = grid[keep], _accuracy(predictor, x[keep])
    chosen = int(np.argmax(draws.mean(axis=1)))
    best, before = dimension.from_unit(grid[[chosen, -1]])
    return Gain(dimension.name, before, best, interval(draws[chosen] - draws[-1]))


def _path(data: Data, predictor: Predictor, default: Array, best: Array) -> tuple[Step, ...]:
    """Greedy path from default to best (Fawcett and Hoos 2016): at each step the change that gains most.

    A step that the space's rule forbids waits until another one has made it possible.
    """
    varied = data.dimensions[:-1]
    here, left = default.copy(), [i for i in range(len(default)) if abs(default[i] - best[i]) > 1e-9]
    before = _accuracy(predictor, here[None, :])[0]
    steps: list[Step] = []
    while left:
        candidates = np.repeat(here[None, :], len(left), axis=0)
        candidates[range(len(left)), left] = best[left]
        draws = _accuracy(predictor, candidates)
        legal, expected = allowed(data.space, varied, candidates), draws.mean(axis=1)
        pick = int(np.argmax(np.where(legal, expected, -1.0) if legal.any() else expected))
        i = left.pop(pick)
        old, new = varied[i].from_unit([here[i], best[i]])
        steps.append(Step(varied[i].name, old, new, interval(draws[pick] - before), interval(draws[pick])))
        here[i], before = best[i], draws[pick]
    return tuple(steps)
