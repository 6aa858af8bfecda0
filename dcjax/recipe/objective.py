"""The policy objective, and the functions that it is made of."""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dcjax.recipe.checks import require, require_choice
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


@dataclass(frozen=True)
class ObjectiveConfig:
    """The policy objective; docs/objectives.md has each part's formula."""

    algorithm: Literal["grpo", "dual_grpo", "thresholded_dual_grpo", "dc_grpo", "dc_direct"] = "dc_grpo"
    """grpo: no penalty on the gap; dual_grpo: penalty with a fixed multiplier λ; thresholded_dual_grpo: the same
    above a threshold; dc_grpo (paper A): λ by dual ascent; dc_direct: so too, and the gap itself is differentiated."""
    estimator: Literal["grpo", "dr_grpo", "rloo", "reinforce"] = "grpo"
    """Advantages relative to the group mean and standard deviation (grpo), the group mean (dr_grpo),
    the mean of the other responses in the group (rloo), or the batch mean (reinforce)."""
    surrogate: Literal["clip", "gspo", "cispo", "policy_gradient"] = "clip"
    """Loss per token: PPO's clipped ratio (clip), GSPO's sequence-level ratio (gspo), CISPO's clipped
    weight (cispo), or the plain policy gradient."""
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"] = (
        "token_mean"
    )
    """How token losses are averaged: over all tokens (DAPO), over each response and then over
    responses (GRPO), as sums per response, or as sums divided by the longest response."""
    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """Groups whose rewards are all equal: keep them (paper A), drop them from the loss (paper B),
    or resample them, that is, sample other groups in their place."""
    signal: Literal["probability", "ratio", "log_probability"] = "probability"
    """Gap δ between the policies' probabilities p (training) and q (sampling) of a token:
    |p − q|, |p / q − 1| or |log p − log q|."""
    level: Literal["token", "sequence"] = "token"
    """Whether δ is taken per token, or averaged over each response."""
    sides: Literal["two", "one", "signed"] = "two"
    """Whether δ counts in both directions (two), only where the training policy is more probable (one),
    or with its sign (signed)."""
    penalty: Literal["linear", "shifted", "hinge", "gate"] = "linear"
    """Penalty as a function of δ: δ (linear), δ − c (shifted), max(δ − c, 0) (hinge), or δ where δ > c (gate).
    thresholded_dual_grpo uses hinge when this is linear."""
    penalty_form: Literal["as_published", "centred"] = "as_published"
    """Use each token's penalty as it is (as_published), or minus its mean over the response (centred)."""
    initial_multiplier: float = 0.1
    """Initial value of λ, or its value throughout if the algorithm keeps it fixed."""
    dual_lr: float = 1.0
    """Dual learning rate η_λ: λ grows by η_λ · (mean gap − budget) in each iteration."""
    budget: float | Literal["auto"] = 0.0037
    """Tolerated mean gap c. auto is 1.5 times the median gap of the first ten iterations,
    during which λ stays constant."""
    budget_window: int = 1
    """Number of iterations over which the gap is averaged before λ is updated."""
    discrepancy_mean: Literal["response", "token"] = "response"
    """How the mean gap weighs tokens: mean over responses of each response's mean,
    or mean over all tokens."""
    max_multiplier: float = 1.0
    """Upper bound of λ (our choice; the paper does not give one that we could recover)."""
    correction: Literal[
        "none",
        "token_tis",
        "sequence_tis",
        "geometric_tis",
        "token_mis",
        "sequence_mis",
        "geometric_mis",
        "icepop",
    ] = "none"
    """Importance weights π_old / μ for the mismatch: truncated (tis) or masked (mis), per token,
    per sequence or by geometric mean, or IcePop's."""
    correction_bound: float = 2.0
    """Upper bound of the importance weight; IcePop's lower bound is its inverse."""
    kl_coefficient: float = 0.0
    """Coefficient of the KL penalty to the policy that RL started from; 0, as in both papers, disables it."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Which of Schulman's estimators approximates the KL divergence."""
    eps_low: float = 0.2
    """Lower clip range of the policy ratio, which is clipped at 1 − eps_low."""
    eps_high: float = 0.28
    """Upper clip range of the policy ratio, which is clipped at 1 + eps_high."""
    dual_clip: float | None = None
    """Bounds the loss of a token with a negative advantage Ã, whose ratio has grown large,
    at −Ã times this value, which must be above 1; None sets no bound."""

    def __post_init__(self):
        names = ["initial_multiplier", "dual_lr", "max_multiplier", "kl_coefficient", "eps_low", "eps_high"]
        if not isinstance(self.budget, str):
            names.append("budget")
        elif self.budget != "auto":
            raise ValueError(f"objective.budget is {self.budget!r}; it must be a number or auto")
        require("objective.", self, {**dict.fromkeys(names, 0), "budget_window": 1})
        for name, kind in typing.get_type_hints(type(self)).items():
            if typing.get_origin(kind) is Literal:
                require_choice("objective.", self, name)
        if self.initial_multiplier > self.max_multiplier:
            raise ValueError(
                f"objective.initial_multiplier is {self.initial_multiplier}; "
                f"it must be at most objective.max_multiplier, {self.max_multiplier}"
            )
        for name in ("correction_bound", "dual_clip"):
            if (bound := getattr(self, name)) is not None and not 1 < bound < math.inf:
                raise ValueError(f"objective.{name} is {bound}; it must be a finite number above 1")
        if self.budget == "auto" and (self.penalty != "linear" or not self.has_ascent):
            raise ValueError(
                f"objective.budget is auto, which {self.algorithm} with the penalty {self.penalty} cannot take: "
                "a threshold or a fixed multiplier needs a number"
            )

    @property
    def has_ascent(self) -> bool:
        """Whether λ moves."""
        return self.algorithm in ("dc_grpo", "dc_direct")


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
