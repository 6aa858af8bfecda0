"""The objectives of paper A, one of ours, verl's, and others' answers to the mismatch, ready-made.

    objective = dc_grpo(updates=4)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b2=0.95), objective.ascent)
    step = make_train_step(apply_fn, tx, objective.surrogate, objective.transform, ...)

What each is reported to do was seen in runs of a tiny model. All keep groups of equal rewards, as paper A does;
`chain(objective.transform, drop_zero_variance())` drops them. `objective.algorithm`, `objective.verl` and
`objective.method` of a recipe choose among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optax

from dcjax.rl import by_response, trust_regions, verl
from dcjax.rl.centring import EXPECTED_PENALTY, StateBaseline
from dcjax.rl.discrepancy import Discrepancy, DistributionGap, Signal, measure, probability_difference
from dcjax.rl.dual import dual_ascent
from dcjax.rl.losses import Surrogate, policy_gradient, unit_ratio
from dcjax.rl.masked import seq_mean_token_sum
from dcjax.rl.objective import NO_ASCENT, Objective, Requirements
from dcjax.rl.penalties import PenaltyForm, PenaltyShape, as_published, hinge, linear
from dcjax.rl.transforms import (
    LossTransform,
    chain,
    direct_penalty,
    discrepancy_penalty,
    group_relative_advantages,
)

Delta = Discrepancy | DistributionGap
"""δ of the sampled token, or of whole distributions."""

MULTIPLIER = 0.1
"""λ0 of paper A for 8B; it has .05 for 30B-A3B."""
DUAL_LR = 1.0
"""η_λ of paper A."""
BUDGET = 0.0037
"""c of paper A for 8B, a probability; it has .0050 for 30B-A3B. Of any other model or format the gap is another."""
MAX_MULTIPLIER = 1.0
"""The upper bound of λ in `dc_grpo` (ours; the paper's was not recovered)."""
MAX_DIRECT_MULTIPLIER = 0.5
"""The upper bound of λ in `dc_direct`."""

GROUP_RELATIVE = group_relative_advantages()


def grpo(*, estimator: LossTransform = GROUP_RELATIVE, discrepancy: Delta = probability_difference) -> Objective:
    """Ã = A: no penalty, λ = 0.

    Seen: at int8 no penalty beat it. With int4 rollouts and a constant learning rate of 6e-4 the deployed policy ends
    at an accuracy of .58 or .61. Decaying the learning rate gives .82 to .87, and averaging the weights .81, so most of
    that loss is not due to the gap.

    Args:
      estimator: sets the advantages A.
      discrepancy: δ, which is only measured.

    Returns:
      The objective, without an ascent.
    """
    return Objective(estimator, discrepancy=discrepancy, requires=Requirements.of(discrepancy))


def dual_grpo(
    *,
    multiplier: float = MULTIPLIER,
    estimator: LossTransform = GROUP_RELATIVE,
    discrepancy: Delta = probability_difference,
    shape: PenaltyShape = linear,
    form: PenaltyForm = as_published,
    baseline: StateBaseline | None = None,
) -> Objective:
    """Ã = A − λ · δ with λ fixed (paper A, eqs. 3-4).

    Seen: harmful at 4 bits, where δ̄ even rises with λ: the penalty lowers the probability of every sampled action
    with a large δ, whether the training policy overrates or underrates it. At λ = .3 accuracy was .245, and .655 with
    token TIS, which removes that bias. Unlike `dc_grpo`'s, this λ does not anneal once the gap is closed.

    Args:
      multiplier: λ.
      estimator: sets the advantages A.
      discrepancy: δ.
      shape: of the penalty as a function of δ.
      form: of the penalty within a response.
      baseline: the penalty's mean in each state, which is subtracted from it; None subtracts nothing, as published.

    Returns:
      The objective, without an ascent.

    Raises:
      ValueError: λ below 0.
    """
    return _penalized(estimator, discrepancy, baseline, NO_ASCENT, shape=shape, form=form, multiplier=multiplier)


def _penalized(
    estimator: LossTransform,
    discrepancy: Delta,
    baseline: StateBaseline | None,
    ascent: optax.GradientTransformationExtraArgs,
    **penalty: Any,
) -> Objective:
    """The estimator with a penalty on the advantage behind it, and what both need."""
    own = Requirements.of(discrepancy)
    if baseline is None:
        transform = chain(estimator, discrepancy_penalty(discrepancy, **penalty))
        return Objective(transform, discrepancy=discrepancy, ascent=ascent, requires=own)
    centred = discrepancy_penalty(discrepancy, baseline=EXPECTED_PENALTY, **penalty)
    return Objective(
        chain(estimator, centred, baseline.report),
        discrepancy=discrepancy,
        ascent=ascent,
        requires=Requirements.joined(own, baseline.requires),
    )


def thresholded_dual_grpo(
    *,
    multiplier: float = MULTIPLIER,
    threshold: float = BUDGET,
    estimator: LossTransform = GROUP_RELATIVE,
    discrepancy: Delta = probability_difference,
    shape: Callable[[float], PenaltyShape] = hinge,
    form: PenaltyForm = as_published,
    baseline: StateBaseline | None = None,
) -> Objective:
    """Ã = A − λ · max(δ − c, 0), or A − λ · δ · 1[δ > c] with `shape=gate`; λ fixed (paper A, §5).

    Seen: it softens the effect of too large a λ, since tokens within the tolerance are not penalised. No penalty on the
    advantage gave a repeatable gain at 4 bits.

    Args:
      multiplier: λ.
      threshold: c, in units of δ.
      estimator: sets the advantages A.
      discrepancy: δ.
      shape: `hinge` or `gate`.
      form: of the penalty within a response.
      baseline: the penalty's mean in each state, which is subtracted from it; None subtracts nothing, as published.

    Returns:
      The objective, without an ascent.

    Raises:
      ValueError: λ or c below 0.
    """
    return dual_grpo(
        multiplier=multiplier,
        estimator=estimator,
        discrepancy=discrepancy,
        shape=shape(threshold),
        form=form,
        baseline=baseline,
    )


def dc_grpo(
    *,
    updates: int,
    initial_multiplier: float = MULTIPLIER,
    dual_lr: float = DUAL_LR,
    budget: float | Literal["auto"] = BUDGET,
    max_multiplier: float = MAX_MULTIPLIER,
    window: int = 1,
    estimator: LossTransform = GROUP_RELATIVE,
    discrepancy: Delta = probability_difference,
    shape: PenaltyShape = linear,
    form: PenaltyForm = as_published,
    baseline: StateBaseline | None = None,
) -> Objective:
    """Ã = A − λ · δ, λ ← clip(λ + η_λ (δ̄ − c), 0, max) once per iteration (paper A, eqs. 8-11, with its values for 8B).

    Seen on a model of 100 thousand parameters (docs/findings.md, claim A4, ten seeds on two tasks): at 8 bits λ rises,
    δ̄ falls under the budget and λ anneals to 0; nothing of the accuracy is gained from the mismatch. At 4 bits, where
    the gap cannot fall under a budget of .0015, λ saturates while δ̄ rises, and accuracy collapses (.115 against GRPO's
    .861 on chained arithmetic): watch `dual/multiplier` and `dual/discrepancy` together. With "auto" it ends where GRPO
    does. A real model's gap is another: SmolLM2-135M's mean is some .008 in int8 and .035 in w8a8, above the paper's
    budgets, so that "auto" is the budget to begin with. The paper reports gains at 8B and 30B in bf16 and fp8.

    Args:
      updates: optimiser updates per iteration, as given to `make_train_step` (paper A: 4).
      initial_multiplier: λ before the first step.
      dual_lr: η_λ, per unit of δ̄.
      budget: c, in units of δ, or "auto".
      max_multiplier: λ's upper bound (ours; the paper's was not recovered).
      window: iterations over which δ̄ is averaged for λ.
      estimator: sets the advantages A.
      discrepancy: δ; give `make_train_step` the same one.
      shape: of the penalty as a function of δ.
      form: of the penalty within a response.
      baseline: the penalty's mean in each state, which is subtracted from it; None subtracts nothing, as published.

    Returns:
      The objective with λ's ascent.

    Raises:
      ValueError: what `dual_ascent` refuses.
    """
    ascent = dual_ascent(
        dual_lr,
        budget=budget,
        init_value=initial_multiplier,
        max_value=max_multiplier,
        every=updates,
        window=window,
    )
    return _penalized(estimator, discrepancy, baseline, ascent, shape=shape, form=form)


def dc_grpo_centred(
    *,
    updates: int,
    signal: Signal = probability_difference,
    shape: PenaltyShape = linear,
    head: int = 0,
    **settings: Any,
) -> Objective:
    """Ã = A − λ · (δ(y_t) − Σ_v μ_v δ_v), λ as in `dc_grpo`: its penalty without its mean in each state. Ours.

    Sampled from μ and differentiated through π, the published penalty contains −λ E_μ[δ] · (μ − π) on the logits of a
    state, which is ascent on KL(μ‖π); the mean takes that out, and nothing else (docs/theory.md).

    Seen on a model of 100 thousand parameters (docs/findings.md, claim N10, ten seeds on two tasks): with
    `budget="auto"` λ ends at 0, and accuracy ends where that of `grpo` and `dc_grpo` does, at 8 and at 4 bits.

    Args:
      updates: optimiser updates per iteration, as given to `make_train_step`.
      signal: δ of a token; `sided` gives it other sides.
      shape: of the penalty as a function of δ.
      head: how many of the sampler's most probable tokens the mean is computed from, for engines that tell no more; 0
        is all of them. Only with the default signal and shape.
      settings: as of `dc_grpo`, but for its discrepancy and baseline.

    Returns:
      The objective with λ's ascent, which requires the sampler's distributions or its head.

    Raises:
      ValueError: a head with another signal or shape; or what `dual_ascent` refuses.
    """
    if head and (signal, shape) != (probability_difference, linear):
        raise ValueError(
            f"head is {head}; it is for the linear penalty on the probability difference, so leave it at 0"
        )
    baseline = StateBaseline.of_head(head) if head else StateBaseline.exact(signal, shape)
    return dc_grpo(updates=updates, discrepancy=measure(signal), shape=shape, baseline=baseline, **settings)


def dc_direct(
    *,
    updates: int,
    initial_multiplier: float = MULTIPLIER,
    dual_lr: float = DUAL_LR,
    budget: float | Literal["auto"] = BUDGET,
    max_multiplier: float = MAX_DIRECT_MULTIPLIER,
    window: int = 1,
    estimator: LossTransform = GROUP_RELATIVE,
    discrepancy: Delta = probability_difference,
    shape: PenaltyShape = linear,
) -> Objective:
    """Ã = A, loss += λ · |p_θ − stop_gradient(μ)| on sampled tokens, λ as in `dc_grpo`. Ours, not the paper's.

    Seen on a model of 100 thousand parameters (docs/findings.md, claim N1, ten seeds on two tasks): with "auto" λ ends
    at 0, and nothing is gained from the mismatch that could be told. Seen before the laboratory, with a given budget, a
    linearly decaying learning rate and ten other seeds: it brings the two policies together (δ̄ changes by
    −.0020 ± .0010 at int4 and −.0015 ± .0004 at fp4), and the training policy gains accuracy (+.069 ± .020 and
    +.055 ± .011). The deployed policy gains +.020 ± .011 at int4, about half of it mere sharpening, and nothing at fp4
    (−.005 ± .007). A fixed λ of 1 collapsed on one seed of three, hence the bound.

    Args:
      updates: optimiser updates per iteration, as given to `make_train_step` (paper A: 4).
      initial_multiplier: λ before the first step.
      dual_lr: η_λ, per unit of δ̄.
      budget: c, in units of δ, or "auto".
      max_multiplier: λ's upper bound.
      window: iterations over which δ̄ is averaged for λ.
      estimator: sets the advantages A.
      discrepancy: δ; give `make_train_step` the same one.
      shape: of the penalty as a function of δ.

    Returns:
      The objective with λ's ascent.

    Raises:
      ValueError: what `dual_ascent` refuses.
    """
    ascent = dual_ascent(
        dual_lr,
        budget=budget,
        init_value=initial_multiplier,
        max_value=max_multiplier,
        every=updates,
        window=window,
    )
    transform = chain(estimator, direct_penalty(discrepancy, shape=shape))
    return Objective(transform, discrepancy=discrepancy, ascent=ascent, requires=Requirements.of(discrepancy))


def verl_correction(
    name: str, *, estimator: LossTransform = GROUP_RELATIVE, discrepancy: Delta = probability_difference
) -> Objective:
    """GRPO with a preset of verl's rollout correction, as verl computes it (`dcjax.rl.verl`).

    Args:
      name: of `verl.PRESETS`. Those that begin with `bypass_pg` come with verl's surrogate and aggregation for them:
        the policy gradient, summed over each response.
      estimator: sets the advantages A.
      discrepancy: δ, which is only measured.

    Returns:
      The objective, without an ascent.

    Raises:
      ValueError: there is no such preset.
    """
    if name not in verl.PRESETS:
        raise ValueError(f"verl's preset is {name!r}; it must be one of {', '.join(verl.PRESETS)}")
    correction = verl.PRESETS[name]
    objective = grpo(estimator=chain(estimator, verl.rollout_correction(correction)), discrepancy=discrepancy)
    if not correction.bypass_mode:
        return objective
    return dataclasses.replace(objective, surrogate=policy_gradient, aggregate=seq_mean_token_sum)


class Method(NamedTuple):
    """An answer to the mismatch that stands behind an objective."""

    transform: Callable[..., Any]
    """Of its bound, or of nothing, which is the source's. m2po's takes what stands before it too, and returns its
    quantity too."""
    surrogate: Surrogate | None = None
    """The loss of each token that belongs to it; None where it goes with the objective's."""


METHODS = {
    "dppo_tv": Method(trust_regions.dppo_tv, policy_gradient),
    "dppo_kl": Method(trust_regions.dppo_kl, policy_gradient),
    "ipo": Method(trust_regions.ipo, unit_ratio),
    "ipo_squared": Method(lambda bound=0.1: trust_regions.ipo(bound, coefficient=1e-3), unit_ratio),
    "kpop": Method(trust_regions.kpop),
    "drpo": Method(trust_regions.drpo, unit_ratio),
    "opsm": Method(by_response.opsm),
    "vexact": Method(by_response.vexact),
    "seq_mask_tis": Method(by_response.seq_mask_tis),
    "m2po": Method(trust_regions.m2po, unit_ratio),
}


def with_method(objective: Objective, name: str, *, bound: float | None = None) -> Objective:
    """The objective with another's answer to the mismatch behind its transform; docs/objectives.md has the formulas.

    Args:
      objective: estimator, penalty and masks, whose surrogate stays unless the method has one of its own.
      name: of `METHODS`.
      bound: the method's own parameter, in its own unit; None is its source's.

    Returns:
      The objective; m2po's requires a quantity of the minibatch.

    Raises:
      ValueError: there is no such method, or it cannot take the bound.
    """
    if name not in METHODS:
        raise ValueError(f"the method is {name!r}; it must be one of {', '.join(METHODS)}")
    method, requires, given = METHODS[name], objective.requires, () if bound is None else (bound,)
    if name == "m2po":
        transform, quantity = method.transform(objective.transform, *given)
        requires = dataclasses.replace(requires, quantities=(*requires.quantities, quantity))
    else:
        transform = method.transform(*given)
    return dataclasses.replace(
        objective,
        transform=chain(objective.transform, transform),
        surrogate=method.surrogate or objective.surrogate,
        requires=requires,
    )
