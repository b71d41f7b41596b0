"""The analysis of a study: tables -> indices, effects and comparisons, each with an interval. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from analysis.configurations import compare_configurations
from analysis.curves import index_by_epoch, marginal_curve, pair_surface, supported
from analysis.effects import CUBE_POINTS, Predictor, allowed, marginal, rank_parameters, sobol_indices, space_points
from analysis.load import StudyData
from analysis.observations import log_epoch
from analysis.questions import other_effects
from analysis.results import (
    DUMMY,
    MAX_RHAT,
    MIN_R2,
    MIN_RANKED,
    Analysis,
    Curves,
    ParameterDraws,
    Trust,
    interval,
)
from analysis.sampler import CHAINS, diagnose
from analysis.selection import Selection, select
from analysis.surrogate import Posterior, Surface
from analysis.training import Attempts, Training, fit_training
from analysis.trust import (
    cross_validate,
    estimated_seed_noise,
    extrapolation_share,
    late_epochs,
    measured_seed_noise,
    trials_needed,
)
from ramcore.space import Array

HYPERDRAWS, DRAWS_EACH = 160, 3
ROUNDS = 5  # of sampling, each as long as all before it, if it has not converged
MARKS = 6  # epochs at which importance is given, at most
CLAIMED = ("patch_size", "num_scales", "num_glimpses")  # parameters that the case study speaks of

OnStep = Callable[[str], None]  # called with the step that begins


class Fit(NamedTuple):
    """The model fitted to a study."""

    selection: Selection
    surface: Surface
    posterior: Posterior
    training: Training | None  # the chance that a run trains; None: every run did
    failures: Training | None  # the chance that a trial does not fail; None: none did
    predictor: Predictor


def analyse(
    records: StudyData,
    on_step: OnStep = lambda message: None,
    *,
    others: Sequence[StudyData] = (),
    seed: int = 0,
    hyperdraws: int = HYPERDRAWS,
) -> Analysis:
    """Fit the model to a study, and to other studies of the same task and data, and answer every question from it.

    Results do not depend on the order of trials or of parameters. Raises UserError if there is too little to fit.
    """
    return conclude(
        records, fit_study(records, on_step, others=others, seed=seed, hyperdraws=hyperdraws), on_step, seed
    )


def fit_study(
    records: StudyData,
    on_step: OnStep = lambda message: None,
    *,
    others: Sequence[StudyData] = (),
    seed: int = 0,
    hyperdraws: int = HYPERDRAWS,
) -> Fit:
    """Fit the model to a study, and to other studies of the same task and data. Raises UserError as `analyse`."""
    selection = select(records, others)
    observations, dimensions = selection.observations, selection.data.dimensions
    on_step(f"fitting the surface to {len(observations.trials)} trials ({len(observations.y)} rows)")
    surface = Surface(dimensions)
    at = log_epoch(_marks(selection.data.budget), selection.data.budget)
    rng = np.random.default_rng(seed)
    rounds = ROUNDS if hyperdraws >= HYPERDRAWS else 1  # with fewer draws, R-hat is mostly chance
    posterior = surface.sample(observations, at, hyperdraws=hyperdraws, draws_each=DRAWS_EACH, rng=rng, rounds=rounds)
    draws = len(posterior.weights)
    training = fit_training(surface.bases, selection.attempts, draws, rng, rounds=rounds)
    lost = selection.failed.astype(float)
    failures = fit_training(surface.bases, Attempts(selection.tried, np.ones_like(lost), 1 - lost, lost), draws, rng)
    predictor = Predictor(surface, posterior, training, selection.floor, selection.data.chance)
    return Fit(selection, surface, posterior, training, failures, predictor)


def _marks(budget: int) -> Array:
    """The epochs at which importance is given."""
    return np.unique(np.round(np.geomspace(1, budget, MARKS)))


def conclude(records: StudyData, fitted: Fit, on_step: OnStep = lambda message: None, seed: int = 0) -> Analysis:
    """Answer every question from a fit."""
    selection, surface, posterior, training, failures, predictor = fitted
    data, observations, dimensions = selection.data, selection.observations, selection.data.dimensions
    epochs, draws = _marks(data.budget), len(posterior.weights)

    on_step("computing effects and indices")
    points = space_points(dimensions, CUBE_POINTS, seed)
    every = range(len(dimensions))
    marginals = [
        marginal(predictor, i, points[: CUBE_POINTS // 2], supported(data, selection.attempts, i)) for i in every
    ]
    indices = trained = sobol_indices(surface, posterior)
    if training is not None:
        indices = indices._replace(
            first=np.stack([m.first_logit for m in marginals]), total=np.stack([m.total_logit for m in marginals])
        )
    changes = None
    if failures is not None:
        some = points[: CUBE_POINTS // 4]
        changes = [np.ptp(100 * failures.along(some, i, marginals[i].grid).mean(axis=1), axis=0) for i in every]
    reported = np.concatenate([indices.total, [m.effect for m in marginals]])
    rhat, ess = diagnose(reported.reshape(len(reported), CHAINS, -1).transpose(1, 2, 0))
    late = late_epochs(records.epochs, data.budget)
    measured = measured_seed_noise(late, draws, np.random.default_rng(seed + 3))
    seed_sd = estimated_seed_noise(late, posterior.held_out, draws) if measured is None else measured
    fit = cross_validate(selection, predictor, posterior.held_out)
    searched = data.space.dimensions
    outside = 1.0 - float(np.mean(allowed(data.space, searched, space_points(searched, 2048, seed))))
    row, configurations = compare_configurations(selection, predictor)
    best = np.append(observations.x[row, :-1], 0.5)
    tried = np.concatenate([points[: CUBE_POINTS // 2], observations.x])
    return Analysis(
        data=data,
        ranked=rhat <= MAX_RHAT and fit.r2 >= MIN_R2 and min(data.counts.used, fit.finished) >= MIN_RANKED,
        ranking=rank_parameters(indices, trained, marginals, seed_sd, changes, dimensions),
        curves=Curves(
            marginals={dimensions[i].name: marginal_curve(dimensions[i], marginals[i]) for i in every},
            surface=pair_surface(predictor, dimensions[:-1], marginals, points[: CUBE_POINTS // 8]),
            epochs=tuple(int(epoch) for epoch in epochs),
            over_epochs=index_by_epoch(surface, posterior),
        ),
        configurations=configurations,
        other=other_effects(predictor, marginals, data.space, tried, best, seed),
        trust=Trust(
            fit=fit,
            rhat=rhat,
            ess=ess,
            modes=posterior.modes,
            trials_needed=None if fit.r2 >= MIN_R2 else trials_needed(selection, surface, posterior, points[:128]),
            seed_sd=interval(seed_sd),
            seed_sd_measured=measured is not None,
            infeasible_share=outside,
            extrapolation_share=extrapolation_share(predictor, points),
        ),
        draws={
            dimensions[i].name: ParameterDraws(
                total=indices.total[i],
                effect=marginals[i].effect,
                marginal=dict(zip(dimensions[i].from_unit(marginals[i].grid), marginals[i].rows, strict=True)),
            )
            for i in every
            if dimensions[i].name in (*CLAIMED, DUMMY) and dimensions[i].type != "categorical"
        },
    )
