"""The analysis of a study: tables -> indices, effects and comparisons, each with an interval. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from analysis.configurations import compare_configurations
from analysis.curves import index_by_epoch, marginal_curve, pair_surface
from analysis.effects import CUBE_POINTS, Predictor, allowed, marginal, rank_parameters, sobol_indices, space_points
from analysis.failures import fit_failures
from analysis.load import StudyData
from analysis.observations import log_epoch
from analysis.results import DUMMY, MIN_R2, MIN_RANKED, Analysis, Curves, ParameterDraws, Trust, interval
from analysis.selection import select
from analysis.surrogate import Surface
from analysis.trust import cross_validate, estimated_seed_noise, extrapolation_share, late_epochs, measured_seed_noise

HYPERDRAWS, DRAWS_EACH = 100, 3
MARKS = 6  # epochs at which importance is given, at most
CLAIMED = ("patch_size", "num_scales", "num_glimpses")  # parameters that the case study speaks of

OnStep = Callable[[str], None]  # called with the step that begins


def analyse(
    records: StudyData, on_step: OnStep = lambda message: None, *, seed: int = 0, hyperdraws: int = HYPERDRAWS
) -> Analysis:
    """Fit the surface to a study and answer every question from it.

    Results do not depend on the order of trials or of parameters. Raises UserError if there is too little to fit.
    """
    selection = select(records)
    data, observations, dimensions = selection.data, selection.observations, selection.data.dimensions

    on_step(f"fitting the surface to {len(observations.trials)} trials ({len(observations.y)} rows)")
    surface = Surface(dimensions)
    epochs = np.unique(np.round(np.geomspace(1, data.budget, MARKS)))
    at = log_epoch(epochs, data.budget)
    posterior, start = surface.sample(
        observations, at, hyperdraws=hyperdraws, draws_each=DRAWS_EACH, rng=np.random.default_rng(seed)
    )
    draws = len(posterior.weights)

    on_step("cross-validating")
    fit = cross_validate(surface, observations, start, np.random.default_rng(seed + 1))

    on_step("computing indices and effects")
    failures, divergence = (
        fit_failures(surface.bases, selection.tried, which, draws, np.random.default_rng(seed + 2))
        for which in (selection.failed, selection.diverged)
    )
    trained, expected = Predictor(surface, posterior), Predictor(surface, posterior, divergence)
    points = space_points(dimensions, CUBE_POINTS, seed)
    every = range(len(dimensions))
    indices = sobol_indices(surface, posterior)
    marginals = [marginal(trained, i, points[: CUBE_POINTS // 4]) for i in every]
    counted = None if divergence is None else [marginal(expected, i, points[: CUBE_POINTS // 4]) for i in every]
    changes = None if failures is None else [failures.change(i, points[: CUBE_POINTS // 8]) for i in every]
    late = late_epochs(records.epochs, data.budget)
    measured = measured_seed_noise(late, draws, np.random.default_rng(seed + 3))
    seed_sd = estimated_seed_noise(late, surface, posterior, observations) if measured is None else measured
    searched = data.space.dimensions
    outside = 1.0 - float(np.mean(allowed(data.space, searched, space_points(searched, 2048, seed))))
    return Analysis(
        data=data,
        ranked=fit.r2 >= MIN_R2 and min(len(observations.trials), fit.finished) >= MIN_RANKED,
        ranking=rank_parameters(indices, marginals, seed_sd, counted, changes, dimensions),
        curves=Curves(
            marginals={dimensions[i].name: marginal_curve(data, observations, i, marginals[i]) for i in every},
            surface=pair_surface(trained, dimensions[:-1], marginals, points[: CUBE_POINTS // 8]),
            epochs=tuple(int(epoch) for epoch in epochs),
            over_epochs=index_by_epoch(surface, posterior),
        ),
        configurations=compare_configurations(selection, expected),
        trust=Trust(
            fit=fit,
            rhat=posterior.rhat,
            ess=posterior.ess,
            seed_sd=interval(seed_sd),
            seed_sd_measured=measured is not None,
            infeasible_share=outside,
            extrapolation_share=extrapolation_share(trained, points),
        ),
        draws={
            dimensions[i].name: ParameterDraws(
                total=indices.total[i],
                effect=marginals[i].effect,
                marginal=dict(zip(dimensions[i].from_unit(marginals[i].grid), marginals[i].rows, strict=True)),
            )
            for i in every
            if dimensions[i].name in (*CLAIMED, DUMMY)
        },
    )
