"""The policy objective: the built-in section, and the functions that it puts together."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from dcjax.recipe.checks import require, require_choice
from dcjax.rl import centring, corrections, discrepancy, distributions, losses, masked, penalties, presets, verl
from dcjax.rl.by_response import SEQ_MASK_LOW
from dcjax.rl.losses import Surrogate
from dcjax.rl.masked import Aggregation
from dcjax.rl.objective import Objective, Requirements
from dcjax.rl.transforms import (
    LossTransform,
    batch_baseline_advantages,
    chain,
    drop_zero_variance,
    group_relative_advantages,
    kl_penalty,
    leave_one_out_advantages,
)

VerlPreset = Literal[
    "disabled",
    "decoupled_token_is",
    "decoupled_seq_is",
    "decoupled_seq_is_rs",
    "decoupled_geo_rs",
    "decoupled_geo_rs_seq_tis",
    "decoupled_geo_rs_token_tis",
    "decoupled_k3_rs",
    "decoupled_k3_rs_seq_tis",
    "decoupled_k3_rs_token_tis",
    "bypass_pg_is",
    "bypass_pg_geo_rs",
    "bypass_pg_geo_rs_seq_tis",
    "bypass_pg_geo_rs_token_tis",
]


MethodName = Literal[
    "dppo_tv",
    "dppo_kl",
    "ipo",
    "ipo_squared",
    "kpop",
    "drpo",
    "opsm",
    "vexact",
    "seq_mask_tis",
    "m2po",
]


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
    signal: Literal[
        "probability", "ratio", "log_probability", "total_variation", "kl_from_sampler", "kl_to_sampler"
    ] = "probability"
    """Gap δ between the policies' probabilities p (training) and q (sampling) of a token: |p − q|, |p / q − 1| or
    |log p − log q|; or between their whole distributions π and μ: ½ Σ|π − μ|, KL(μ‖π) or KL(π‖μ), the same whichever
    token was sampled, for dc_direct above all (docs/theory.md)."""
    level: Literal["token", "sequence"] = "token"
    """Whether δ is taken per token, or averaged over each response."""
    sides: Literal["two", "one", "signed"] = "two"
    """Whether δ counts in both directions (two), only where the training policy is more probable (one),
    or with its sign (signed)."""
    penalty: Literal["linear", "shifted", "hinge", "gate"] = "linear"
    """Penalty as a function of δ: δ (linear), δ − c (shifted), max(δ − c, 0) (hinge), or δ where δ > c (gate).
    thresholded_dual_grpo uses hinge when this is linear."""
    penalty_form: Literal["as_published", "centred", "state_centred"] = "as_published"
    """Use each token's penalty as it is (as_published), minus its mean over the response (centred), or minus its mean
    under the sampler's distribution in the token's state (state_centred; dc_grpo with it is dc_grpo_centred)."""
    score_centering: bool = False
    """Take the score's mean under the sampler's distribution out of each state (arXiv 2609.20807), with correction
    none, token_tis, token_mis or icepop."""
    sampler_head: int = 0
    """Number of the sampler's most probable tokens that rollouts record, for what reads its distributions; 0 has the
    engine read each rollout once more for the whole distributions."""
    distribution_metrics: bool = False
    """Log the gaps of whole distributions (distribution/*) even where the objective has no other use for them."""
    initial_multiplier: float = presets.MULTIPLIER
    """Initial value of λ, or its value throughout if the algorithm keeps it fixed."""
    dual_lr: float = presets.DUAL_LR
    """Dual learning rate η_λ: λ grows by η_λ · (mean gap − budget) in each iteration."""
    budget: float | Literal["auto"] = presets.BUDGET
    """Tolerated mean gap c. auto is 1.5 times the median gap of the first ten iterations,
    during which λ stays constant. The gap depends on model and format: a number of another model is of no use."""
    budget_window: int = 1
    """Number of iterations over which the gap is averaged before λ is updated."""
    discrepancy_mean: Literal["response", "token"] = "response"
    """How the mean gap weighs tokens: mean over responses of each response's mean,
    or mean over all tokens."""
    max_multiplier: float | None = None
    """Upper bound of λ; None is the algorithm's own: 1 for dc_grpo, .5 for dc_direct (our choices; the paper does
    not give one that we could recover)."""
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
    verl: VerlPreset = "disabled"
    """verl's rollout correction by the name of its preset, computed as verl does; excludes correction.
    Those that begin with bypass_pg need the surrogate policy_gradient and the aggregation seq_mean_token_sum."""
    method: MethodName | None = None
    """Trust region or rejection against the mismatch, as its source has it; excludes correction and verl. Those with
    a loss per token of their own (dppo, ipo, drpo, m2po) take the place of the surrogate clip. None is none."""
    method_bound: float | None = None
    """The method's own bound, in its own unit: of a probability (dppo_tv, ipo, drpo), of nats (dppo_kl, kpop, opsm,
    vexact), of squared nats (m2po), or of the geometric mean (seq_mask_tis, the upper one); None is its source's."""
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
        names = ["initial_multiplier", "dual_lr", "kl_coefficient", "eps_low", "eps_high", "sampler_head"]
        if not isinstance(self.budget, str):
            names.append("budget")
        elif self.budget != "auto":
            raise ValueError(f"objective.budget is {self.budget!r}; it must be a number or auto")
        if self.max_multiplier is not None:
            names.append("max_multiplier")
        require("objective.", self, {**dict.fromkeys(names, 0), "budget_window": 1})
        for name, kind in typing.get_type_hints(ObjectiveConfig).items():
            if typing.get_origin(kind) is Literal:
                require_choice("objective.", self, name)
        if (bound := self._multiplier_bound) is not None and self.initial_multiplier > bound:
            raise ValueError(
                f"objective.initial_multiplier is {self.initial_multiplier}; "
                f"it must be at most objective.max_multiplier, {bound}"
            )
        for name in ("correction_bound", "dual_clip"):
            if (bound := getattr(self, name)) is not None and not 1 < bound < math.inf:
                raise ValueError(f"objective.{name} is {bound}; it must be a finite number above 1")
        if self.budget == "auto" and (self.penalty != "linear" or not self._has_ascent):
            raise ValueError(
                f"objective.budget is auto, which {self.algorithm} with the penalty {self.penalty} cannot take: "
                "a threshold or a fixed multiplier needs a number"
            )
        self._check_verl()
        self._check_method()
        self._check_distributions()

    def _check_verl(self) -> None:
        if self.verl == "disabled":
            return
        if self.correction != "none":
            raise ValueError(
                f"objective.verl is {self.verl} and objective.correction {self.correction}; set one of the two"
            )
        if verl.PRESETS[self.verl].bypass_mode:
            for name, value in (("surrogate", "policy_gradient"), ("aggregation", "seq_mean_token_sum")):
                if (given := getattr(self, name)) != value:
                    raise ValueError(f"objective.verl is {self.verl}, so objective.{name} must be {value}, not {given}")

    def _check_method(self) -> None:
        if self.method is None:
            if self.method_bound is not None:
                raise ValueError(f"objective.method_bound is {self.method_bound}, but objective.method is None")
            return
        if self.method not in presets.METHODS:
            choices = ", ".join(presets.METHODS)
            raise ValueError(f"objective.method is {self.method!r}; it must be None or one of {choices}")
        for name, without in (("correction", "none"), ("verl", "disabled")):
            if (given := getattr(self, name)) != without:
                raise ValueError(f"objective.method is {self.method} and objective.{name} {given}; set one of the two")
        if presets.METHODS[self.method].surrogate is not None:
            for name, unset in (("surrogate", "clip"), ("dual_clip", None)):
                if (given := getattr(self, name)) != unset:
                    raise ValueError(
                        f"objective.method is {self.method}, which has a loss of its own, so objective.{name} must be "
                        f"left at {unset}, not {given}"
                    )
        if (bound := self.method_bound) is not None:
            if not 0 < bound < math.inf:
                raise ValueError(f"objective.method_bound is {bound}; it must be a finite number above 0")
            if self.method == "seq_mask_tis" and bound <= SEQ_MASK_LOW:
                raise ValueError(
                    f"objective.method_bound is {bound}; seq_mask_tis needs one above its lower bound, {SEQ_MASK_LOW}"
                )

    def _check_distributions(self) -> None:
        """Refuses what has no expectation in a state, and heads that nothing reads or that say too little."""
        if self.signal in centring.GAPS:
            self._require_all(f"objective.signal is {self.signal}", sides="two", sampler_head=0)
            if self.penalty_form == "state_centred":
                raise ValueError(
                    f"objective.signal is {self.signal}, the same for all tokens of a state: minus its mean in the "
                    "state, which objective.penalty_form=state_centred makes it, it is 0"
                )
        if self.penalty_form == "state_centred":
            if self.algorithm in ("grpo", "dc_direct"):
                raise ValueError(
                    f"objective.penalty_form is state_centred, and objective.algorithm {self.algorithm}, which has no "
                    "penalty on the advantage; dc_grpo, dual_grpo and thresholded_dual_grpo have one"
                )
            self._require_all("objective.penalty_form is state_centred", level="token")
            if self.sampler_head:
                published = {"signal": "probability", "sides": "two", "penalty": "linear"}
                self._require_all(
                    f"objective.penalty_form is state_centred with {self.sampler_head} tokens", **published
                )
        if self.score_centering:
            if self.correction not in CENTRED_WEIGHTS:
                raise ValueError(
                    f"objective.score_centering is True and objective.correction {self.correction}, whose weights have "
                    f"no expectation in a state; it must be one of {', '.join(CENTRED_WEIGHTS)}"
                )
            self._require_all("objective.score_centering is True", verl="disabled", method=None)
            if self.surrogate == "gspo":
                raise ValueError(
                    "objective.score_centering is True and objective.surrogate gspo, whose ratio is of responses; "
                    "clip, cispo and policy_gradient have one of each token"
                )
        elif self.sampler_head and self.penalty_form != "state_centred":
            raise ValueError(
                f"objective.sampler_head is {self.sampler_head}, which nothing reads; it is for "
                "objective.score_centering and objective.penalty_form=state_centred"
            )
        if self.distribution_metrics:
            self._require_all("objective.distribution_metrics is True", sampler_head=0)

    def _require_all(self, because: str, **needed: Any) -> None:
        for name, value in needed.items():
            if (given := getattr(self, name)) != value:
                raise ValueError(f"{because}, so objective.{name} must be {value}, not {given}")

    @property
    def _has_ascent(self) -> bool:
        return self.algorithm in ("dc_grpo", "dc_direct")

    @property
    def _multiplier_bound(self) -> float | None:
        """The upper bound of λ; None where λ is fixed and has none."""
        own = {"dc_grpo": presets.MAX_MULTIPLIER, "dc_direct": presets.MAX_DIRECT_MULTIPLIER}.get(self.algorithm)
        return own if self.max_multiplier is None else self.max_multiplier

    def build(self, *, updates: int, max_response_length: int) -> Objective:
        """The objective. A subclass may change what this returns, with `dataclasses.replace` for example.

        The chain is: estimator, penalty, score centering, zero-variance groups left out, importance correction, KL to
        the reference, method.

        Args:
          updates: optimiser updates per iteration.
          max_response_length: of rollouts, in tokens.
        """
        preset = self._preset(updates)
        if self.score_centering:
            weight = CENTRED_WEIGHTS[self.correction](self.correction_bound)
            preset = centring.with_score_centering(preset, weight=weight, head=self.sampler_head)
        if self.distribution_metrics or preset.requires.sampler_distributions:
            preset = centring.with_distribution_metrics(preset)
        transforms = [preset.transform]
        if self.zero_variance != "keep":
            transforms.append(drop_zero_variance())
        transforms += self._corrections()
        if self.kl_coefficient:
            transforms.append(kl_penalty(self.kl_coefficient, kind=self.kl_estimator))
        objective = dataclasses.replace(
            preset,
            transform=chain(*transforms),
            surrogate=self._surrogate(),
            aggregate=self._aggregation(max_response_length),
            mean_discrepancy=masked.response_mean if self.discrepancy_mean == "response" else masked.masked_mean,
            budget=None if isinstance(self.budget, str) else self.budget,
            signed=self.sides == "signed",
            requires=Requirements.joined(
                preset.requires,
                Requirements(reference_logps=bool(self.kl_coefficient), mixed_groups=self.zero_variance == "resample"),
            ),
        )
        if self.method is None:
            return objective
        return presets.with_method(objective, self.method, bound=self.method_bound)

    def _preset(self, updates: int) -> Objective:
        """The estimator and what `algorithm` puts behind it."""
        parts = {
            "estimator": ESTIMATORS[self.estimator](),
            "discrepancy": self._discrepancy(),
        }
        if self.algorithm == "grpo":
            return presets.grpo(**parts)
        thresholded = self.algorithm == "thresholded_dual_grpo" and self.penalty == "linear"
        penalty = "hinge" if thresholded else self.penalty
        shape = penalties.linear if penalty == "linear" else THRESHOLDS[penalty](self._threshold)
        of_advantage = {"form": FORMS[self.penalty_form], "baseline": self._baseline(shape)}
        if not self._has_ascent:
            return presets.dual_grpo(multiplier=self.initial_multiplier, shape=shape, **of_advantage, **parts)
        ascending: dict[str, Any] = {
            "updates": updates,
            "initial_multiplier": self.initial_multiplier,
            "dual_lr": self.dual_lr,
            "budget": self.budget,
            "window": self.budget_window,
            "shape": shape,
        }
        if self.max_multiplier is not None:
            ascending["max_multiplier"] = self.max_multiplier
        if self.algorithm == "dc_direct":
            return presets.dc_direct(**ascending, **parts)
        return presets.dc_grpo(**ascending, **of_advantage, **parts)

    def _discrepancy(self) -> presets.Delta:
        if self.signal in centring.GAPS:
            return dataclasses.replace(centring.GAPS[self.signal], level=self.level)
        return discrepancy.measure(SIGNALS[self.signal], level=self.level, sides=self.sides)

    def _baseline(self, shape: penalties.PenaltyShape) -> centring.StateBaseline | None:
        if self.penalty_form != "state_centred":
            return None
        if self.sampler_head:
            return centring.StateBaseline.of_head(self.sampler_head)
        return centring.StateBaseline.exact(discrepancy.sided(SIGNALS[self.signal], self.sides), shape)

    @property
    def _threshold(self) -> float:
        assert not isinstance(self.budget, str)
        return self.budget

    def _corrections(self) -> list[LossTransform]:
        bound = self.correction_bound
        if self.verl != "disabled":
            return [verl.rollout_correction(verl.PRESETS[self.verl])]
        if self.correction == "none":
            return []
        if self.correction == "icepop":
            return [corrections.icepop_mask(1 / bound, bound)]
        return [getattr(corrections, self.correction)(bound)]

    def _surrogate(self) -> Surrogate:
        bounds = {"eps_low": self.eps_low, "eps_high": self.eps_high}
        if self.surrogate == "clip":
            return functools.partial(losses.clipped_surrogate, **bounds, dual_clip=self.dual_clip)
        if self.surrogate == "policy_gradient":
            return losses.policy_gradient
        return functools.partial({"gspo": losses.gspo, "cispo": losses.cispo}[self.surrogate], **bounds)

    def _aggregation(self, max_response_length: int) -> Aggregation:
        if self.aggregation == "seq_mean_token_sum_norm":
            return masked.seq_mean_token_sum_norm(max_response_length)
        return {
            "token_mean": masked.token_mean,
            "seq_mean_token_mean": masked.seq_mean_token_mean,
            "seq_mean_token_sum": masked.seq_mean_token_sum,
        }[self.aggregation]


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
    "state_centred": penalties.as_published,
}

CENTRED_WEIGHTS: dict[str, Callable[[float], distributions.Weight]] = {
    "none": lambda bound: distributions.unweighted,
    "token_tis": lambda bound: lambda ratio: jnp.minimum(ratio, bound),
    "token_mis": lambda bound: lambda ratio: jnp.where(ratio <= bound, ratio, 0),
    "icepop": lambda bound: lambda ratio: jnp.where((ratio >= 1 / bound) & (ratio <= bound), ratio, 0),
}
"""Corrections whose weight depends on a token's ratio alone, as functions of it, by their bound."""
