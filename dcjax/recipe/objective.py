"""From an `ObjectiveConfig` to the functions that it names."""

from __future__ import annotations

import functools
from collections.abc import Callable

from dcjax.recipe.config import ObjectiveConfig
from dcjax.rl import corrections, discrepancy, losses, masked, penalties
from dcjax.rl.discrepancy import Discrepancy
from dcjax.rl.losses import Surrogate
from dcjax.rl.masked import Aggregation
from dcjax.rl.transforms import (
    LossTransform,
    batch_baseline_advantages,
    chain,
    direct_penalty,
    discrepancy_penalty,
    drop_zero_variance,
    group_relative_advantages,
    kl_penalty,
    leave_one_out_advantages,
)
from dcjax.types import Array

ESTIMATORS: dict[str, Callable[[], LossTransform]] = {
    "grpo": group_relative_advantages,
    "dr_grpo": functools.partial(group_relative_advantages, scale_by_std=False),
    "rloo": leave_one_out_advantages,
    "reinforce": batch_baseline_advantages,
}

SIGNALS: dict[str, discrepancy.Signal] = {
    "probability": discrepancy.probability_difference,
    "ratio": discrepancy.probability_ratio,
    "log_probability": discrepancy.log_probability_difference,
}

THRESHOLDS: dict[str, Callable[[float], penalties.PenaltyShape]] = {
    "shifted": penalties.shifted,
    "hinge": penalties.hinge,
    "gate": penalties.gate,
}

FORMS: dict[str, penalties.PenaltyForm] = {
    "as_published": penalties.as_published,
    "centred": penalties.centred_on_response,
}


def make_objective(config: ObjectiveConfig) -> LossTransform:
    """The chain: estimator, zero-variance groups left out, penalty, importance correction, KL to the reference."""
    transforms = [ESTIMATORS[config.estimator]()]
    if config.zero_variance != "keep":
        transforms.append(drop_zero_variance())
    transforms += _penalty(config) + _correction(config)
    if config.kl_coefficient:
        transforms.append(kl_penalty(config.kl_coefficient, kind=config.kl_estimator))
    return chain(*transforms)


def make_discrepancy(config: ObjectiveConfig) -> Discrepancy:
    """δ, of the penalty and of what λ follows."""
    return discrepancy.measure(SIGNALS[config.signal], level=config.level, sides=config.sides)


def make_mean_discrepancy(config: ObjectiveConfig) -> Callable[[Array, Array], Array]:
    """δ and mask to δ̄."""
    return masked.response_mean if config.discrepancy_mean == "response" else masked.masked_mean


def make_surrogate(config: ObjectiveConfig) -> Surrogate:
    """Each token's loss."""
    bounds = {"eps_low": config.eps_low, "eps_high": config.eps_high}
    if config.surrogate == "clip":
        return functools.partial(losses.clipped_surrogate, **bounds, dual_clip=config.dual_clip)
    if config.surrogate == "policy_gradient":
        return losses.policy_gradient
    return functools.partial({"gspo": losses.gspo, "cispo": losses.cispo}[config.surrogate], **bounds)


def make_aggregation(config: ObjectiveConfig, max_response_length: int) -> Aggregation:
    """How tokens' losses become one."""
    if config.aggregation == "seq_mean_token_sum_norm":
        return masked.seq_mean_token_sum_norm(max_response_length)
    return {
        "token_mean": masked.token_mean,
        "seq_mean_token_mean": masked.seq_mean_token_mean,
        "seq_mean_token_sum": masked.seq_mean_token_sum,
    }[config.aggregation]


def _penalty(config: ObjectiveConfig) -> list[LossTransform]:
    if config.algorithm == "grpo":
        return []
    delta, shape = make_discrepancy(config), _shape(config)
    multiplier = None if config.has_ascent else config.initial_multiplier
    if config.algorithm == "dc_direct":
        return [direct_penalty(delta, shape=shape, multiplier=multiplier)]
    form = FORMS[config.penalty_form]
    return [discrepancy_penalty(delta, shape=shape, form=form, multiplier=multiplier)]


def _shape(config: ObjectiveConfig) -> penalties.PenaltyShape:
    name = config.penalty
    if config.algorithm == "thresholded_dual_grpo" and name == "linear":
        name = "hinge"
    # a budget that is measured has no threshold
    return penalties.linear if isinstance(config.budget, str) or name == "linear" else THRESHOLDS[name](config.budget)


def _correction(config: ObjectiveConfig) -> list[LossTransform]:
    bound = config.correction_bound
    if config.correction == "none":
        return []
    if config.correction == "icepop":
        return [corrections.icepop_mask(1 / bound, bound)]
    return [getattr(corrections, config.correction)(bound)]
