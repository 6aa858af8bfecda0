"""An objective as a chain of pure transforms, as an optimiser is in optax.

Order matters only where one transform reads or replaces what another wrote: an estimator sets the advantages and so
comes first. The others may follow in any order: penalties on the advantage subtract, penalties on the loss add, weights
multiply and masks narrow. docs/objectives.md lists them all with their formulas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import as_mask
from dcjax.rl.advantages import relative_to_group, relative_to_mean, relative_to_others
from dcjax.rl.discrepancy import Discrepancy, DistributionGap, discrepancy_of
from dcjax.rl.losses import kl_estimate
from dcjax.rl.masked import masked_mean
from dcjax.rl.penalties import PenaltyForm, PenaltyShape, as_published, linear, penalize
from dcjax.types import Array, Batch


@flax.struct.dataclass
class Terms:
    """What the loss is computed from; each transform returns a changed copy."""

    advantages: Float[Array, "B T"]
    # multiplied into the loss
    weights: Float[Array, "B T"]
    # tokens that count in the loss and its denominator
    mask: Bool[Array, "B T"]
    # added to the surrogate's loss of each token; gradients flow through what is computed from `Context.logps`
    loss: Float[Array, "B T"]
    # one value per row each; the step averages over rows
    metrics: dict[str, Array]


@flax.struct.dataclass
class Context:
    """What a transform may read. Rows need not be whole groups: each carries its group's rewards."""

    batch: Batch
    # log-probs of the policy that is being differentiated, with their gradient
    logps: Float[Array, "B T"]
    # log-probs of the training policy at the rollout's weights, under stop-gradient
    old_logps: Float[Array, "B T"]
    # λ of this iteration, before its dual step; None where the optimiser's chain has no dual ascent
    multiplier: Array | None
    # mean reward of the whole iteration's responses
    mean_reward: Float[Array, ""]
    # log-probs of a policy to stay close to; None where there is none
    reference_logps: Float[Array, "B T"] | None = None
    # what the objective's `Requirements` name: [B, T] of the model's head; [], [B] or [B, T] of the whole iteration or
    # minibatch
    quantities: dict[str, Array] = flax.struct.field(default_factory=dict)
    # those of the head that are `old`, of the training policy at the rollout's weights, under stop-gradient, [B, T]
    old_quantities: dict[str, Array] = flax.struct.field(default_factory=dict)


LossTransform = Callable[[Terms, Context], Terms]
"""A pure function from terms to terms; `chain` composes several."""


def initial_terms(batch: Batch) -> Terms:
    """Advantages 0, weights 1, a mask of every response token, and nothing added to the loss."""
    mask = as_mask("response_mask", batch.response_mask)
    return Terms(jnp.zeros(mask.shape), jnp.ones(mask.shape), mask, jnp.zeros(mask.shape), {})


def chain(*transforms: LossTransform) -> LossTransform:
    """Applies transforms from left to right. `chain()` is the identity, and chaining is associative.

    Examples:
      One group of two responses, each with one token:

      >>> rewards, mask, logps = jnp.array([1.0, 0.0]), jnp.ones((2, 1), bool), jnp.zeros((2, 1))
      >>> batch = Batch(
      ...     tokens=jnp.zeros((2, 2), int), attention_mask=jnp.ones((2, 2), bool), response_mask=mask,
      ...     rollout_logps=logps, temperature=jnp.ones(2), rewards=rewards, group_rewards=jnp.array([[1.0, 0.0]] * 2),
      ... )
      >>> context = Context(batch, logps, old_logps=logps, multiplier=None, mean_reward=jnp.mean(rewards))
      >>> objective = chain(group_relative_advantages(scale_by_std=False), drop_zero_variance())
      >>> terms = objective(initial_terms(batch), context)
      >>> terms.advantages.tolist(), terms.mask.tolist()
      ([[0.5], [-0.5]], [[True], [True]])
    """

    def apply(terms: Terms, context: Context) -> Terms:
        for transform in transforms:
            terms = transform(terms, context)
        return terms

    return apply


# --- estimators: they set the advantages ---


def group_relative_advantages(*, scale_by_std: bool = True) -> LossTransform:
    """A_i = (R_i − mean R) / (std R + 1e-6) over the group, on every token of the response (GRPO, arXiv 2402.03300).

    Args:
      scale_by_std: False leaves the division out (Dr.GRPO, arXiv 2503.20783).
    """

    def apply(terms: Terms, context: Context) -> Terms:
        batch = context.batch
        return _set_advantages(terms, relative_to_group(batch.rewards, batch.group_rewards, scale_by_std=scale_by_std))

    return apply


def leave_one_out_advantages() -> LossTransform:
    """A_i = R_i − mean of the group's other G − 1 rewards (RLOO, arXiv 2402.14740; paper B's estimator)."""

    def apply(terms: Terms, context: Context) -> Terms:
        return _set_advantages(terms, relative_to_others(context.batch.rewards, context.batch.group_rewards))

    return apply


def batch_baseline_advantages() -> LossTransform:
    """A_i = R_i − mean R over all responses of the iteration: REINFORCE with the batch's mean as its baseline."""

    def apply(terms: Terms, context: Context) -> Terms:
        return _set_advantages(terms, relative_to_mean(context.batch.rewards, mean_reward=context.mean_reward))

    return apply


def _set_advantages(terms: Terms, advantages: Float[Array, "B"]) -> Terms:
    """Gives every token the advantage of its response."""
    return dataclasses.replace(terms, advantages=jnp.broadcast_to(advantages[:, None], terms.mask.shape))


# --- masks ---


def drop_zero_variance() -> LossTransform:
    """Takes groups of equal rewards out of the loss and its denominator (paper B, §4.1), but not out of δ̄."""

    def apply(terms: Terms, context: Context) -> Terms:
        groups = context.batch.group_rewards
        dropped = jnp.max(groups, axis=1) == jnp.min(groups, axis=1)
        metrics = {**terms.metrics, "dropped_fraction": dropped.astype(jnp.float32)}
        return dataclasses.replace(terms, mask=terms.mask & ~dropped[:, None], metrics=metrics)

    return apply


# --- penalties: behind the estimator ---


def discrepancy_penalty(
    discrepancy: Discrepancy | DistributionGap,
    *,
    shape: PenaltyShape = linear,
    form: PenaltyForm = as_published,
    baseline: str | None = None,
    multiplier: float | None = None,
) -> LossTransform:
    """Ã = A − λ · stop_gradient(pen(δ)) with δ of `old_logps` and `rollout_logps` (paper A, eqs. 3-4 and 8-10).

    Args:
      discrepancy: δ, one of the signals, a `measure` of one, or a gap of whole distributions.
      shape: pen.
      form: `as_published`, or `centred_on_response`.
      baseline: the name of the old quantity that is subtracted from pen(δ) of each token before that: with
        `expected_penalty` of the same signal and shape, the penalty's mean under μ in the state (ours).
      multiplier: a fixed λ; None takes the one of `dual_ascent` in the optimiser's chain.

    Raises:
      ValueError: a fixed λ below 0; at trace time, no fixed λ and no `dual_ascent`.
    """
    _require_multiplier(multiplier)

    def apply(terms: Terms, context: Context) -> Terms:
        mask = context.batch.response_mask
        expected = 0.0 if baseline is None else context.old_quantities[baseline]
        advantages = penalize(
            terms.advantages,
            discrepancy_of(discrepancy, context.old_logps, context.batch, context.old_quantities),
            multiplier=_multiplier(multiplier, context, "discrepancy_penalty"),
            shape=lambda delta: form(shape(delta) - expected, mask),
        )
        return dataclasses.replace(terms, advantages=advantages)

    return apply


def direct_penalty(
    discrepancy: Discrepancy | DistributionGap, *, shape: PenaltyShape = linear, multiplier: float | None = None
) -> LossTransform:
    """loss += λ · pen(δ(π_θ, stop_gradient(μ))) on each sampled token, differentiated through π_θ.

    The advantage stays GRPO's, and the surrogate's clip and weights do not apply to this term. It is not in paper A,
    whose penalty changes the reward of the sampled action; this one differentiates the gap itself.

    Args:
      discrepancy: δ, given π_θ's log-probs as `old_logps`, or a gap of whole distributions: then the term is that of
        the state, whichever token was sampled.
      shape: pen.
      multiplier: a fixed λ; None takes the one of `dual_ascent` in the optimiser's chain.

    Raises:
      ValueError: a fixed λ below 0; at trace time, no fixed λ and no `dual_ascent`.
    """
    _require_multiplier(multiplier)

    def apply(terms: Terms, context: Context) -> Terms:
        delta = discrepancy_of(discrepancy, context.logps, context.batch, context.quantities)
        penalty = _multiplier(multiplier, context, "direct_penalty") * shape(delta)
        return dataclasses.replace(terms, loss=terms.loss + penalty)

    return apply


def kl_penalty(coefficient: float, *, kind: str = "k3") -> LossTransform:
    """loss += β · KL(π_θ ‖ π_ref), estimated on each sampled token and differentiated (GRPO, arXiv 2402.03300, eq. 4).

    Per-row metric: `kl/reference`, the mean of the estimate over the response.

    Args:
      coefficient: β, at least 0; both papers have 0.
      kind: "k1", "k2", "k3" or "abs", as in `kl_estimate`. On-policy, only k2 has the KL's gradient on average; k1's
        gradient has mean 0.

    Raises:
      ValueError: a negative coefficient; at trace time, an unknown kind, or no reference log-probs.
    """
    if not coefficient >= 0:
        raise ValueError(f"coefficient is {coefficient}; it must be at least 0")

    def apply(terms: Terms, context: Context) -> Terms:
        if context.reference_logps is None:
            raise ValueError("kl_penalty needs reference_logps; give the TrainState a reference policy")
        reference, mask = jax.lax.stop_gradient(context.reference_logps), context.batch.response_mask
        estimate = kl_estimate(logps=context.logps, reference_logps=reference, mask=mask, kind=kind)
        metrics = {**terms.metrics, "kl/reference": jax.lax.stop_gradient(masked_mean(estimate, mask, axis=1))}
        return dataclasses.replace(terms, loss=terms.loss + coefficient * estimate, metrics=metrics)

    return apply


# --- score centering: behind what changes the advantages ---


def score_centering(quantity: str) -> LossTransform:
    """loss += sg(Ã) · C: the expectation of the score in the state is taken out of each token's (arXiv 2609.20807).

    C is the quantity of this name, `expected_score` for example. With the loss −w · Ã · log π on each token sampled
    from μ, which has the gradient −Ã · w ∇ log π, what is left is −Ã · (w ∇ log π − E_μ[w ∇ log π]): for an advantage
    that does not depend on the token its mean in the state is 0.

    Args:
      quantity: the name of C among `Context.quantities`.
    """

    def apply(terms: Terms, context: Context) -> Terms:
        added = jax.lax.stop_gradient(terms.advantages) * context.quantities[quantity]
        return dataclasses.replace(terms, loss=terms.loss + jnp.where(terms.mask, added, 0))

    return apply


# --- metrics ---


def report_quantities(names: Mapping[str, str]) -> LossTransform:
    """Per-row metrics: the mean over the response of quantities at the rollout's weights; nothing else is changed.

    Args:
      names: of old quantities, by the names of their metrics.
    """

    def apply(terms: Terms, context: Context) -> Terms:
        mask = context.batch.response_mask
        means = {metric: masked_mean(context.old_quantities[name], mask, axis=1) for metric, name in names.items()}
        return dataclasses.replace(terms, metrics={**terms.metrics, **means})

    return apply


def _require_multiplier(multiplier: float | None) -> None:
    if multiplier is not None and not multiplier >= 0:
        raise ValueError(f"multiplier is {multiplier}; it must be at least 0, or None for dual_ascent's")


def _multiplier(fixed: float | None, context: Context, needed_by: str) -> Array | float:
    if fixed is not None:
        return fixed
    if context.multiplier is None:
        raise ValueError(
            f"{needed_by} needs a multiplier; put dual_ascent(...) into the optimiser's chain, or give it a fixed one"
        )
    return context.multiplier
