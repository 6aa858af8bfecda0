"""An objective as a chain of pure transforms, as an optimiser is in optax.

Order matters where one transform reads what another wrote: an estimator sets the advantages and so comes first;
penalties subtract from them; masks may come anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.rl.advantages import PenaltyShape, linear, penalize, relative_to_group
from dcjax.types import Array, Batch


@flax.struct.dataclass
class Terms:
    """What the surrogate is made of; each transform returns a changed copy."""

    advantages: Float[Array, "B T"]
    # multiplied into the loss
    weights: Float[Array, "B T"]
    # tokens that count in the loss and its denominator
    mask: Bool[Array, "B T"]
    # added to the surrogate's loss of each token; differentiable where it is made of `Context.logps`
    loss: Float[Array, "B T"]
    # one value a row, averaged over rows by the step
    metrics: dict[str, Array]


@flax.struct.dataclass
class Context:
    """What a transform may look at. Rows need not be whole groups: each carries its group's rewards."""

    batch: Batch
    # log-probs of the policy that is being differentiated, with their gradient
    logps: Float[Array, "B T"]
    # stop-gradient log-probs of the training policy at the rollout's weights
    old_logps: Float[Array, "B T"]
    # λ of this iteration, before its dual step; None where no dual ascent is in the optimiser's chain
    multiplier: Array | None
    # mean reward of the whole iteration's responses
    mean_reward: Float[Array, ""]


LossTransform = Callable[[Terms, Context], Terms]
"""A pure function; `chain` composes them."""

Discrepancy = Callable[..., Array]
"""(*, old_logps, rollout_logps) -> δ [B, T]."""


def initial_terms(batch: Batch) -> Terms:
    """Advantages 0, weights 1, every response token counted, nothing added to its loss."""
    shape = batch.response_mask.shape
    return Terms(jnp.zeros(shape), jnp.ones(shape), batch.response_mask, jnp.zeros(shape), {})


def chain(*transforms: LossTransform) -> LossTransform:
    """Applies transforms from left to right. `chain()` is the identity, and chaining is associative."""

    def apply(terms: Terms, context: Context) -> Terms:
        for transform in transforms:
            terms = transform(terms, context)
        return terms

    return apply


def group_relative_advantages(*, scale_by_std: bool = True) -> LossTransform:
    """Sets every token's advantage to its response's `group_relative` one."""

    def apply(terms: Terms, context: Context) -> Terms:
        batch = context.batch
        advantages = relative_to_group(batch.rewards, batch.group_rewards, scale_by_std=scale_by_std)
        return dataclasses.replace(terms, advantages=jnp.broadcast_to(advantages[:, None], terms.advantages.shape))

    return apply


def drop_zero_variance() -> LossTransform:
    """Takes groups whose rewards are all equal out of the loss and its denominator (paper B, §4.1); never out of δ̄."""

    def apply(terms: Terms, context: Context) -> Terms:
        groups = context.batch.group_rewards
        dropped = jnp.max(groups, axis=1) == jnp.min(groups, axis=1)
        metrics = {**terms.metrics, "dropped_fraction": dropped.astype(jnp.float32)}
        return dataclasses.replace(terms, mask=terms.mask & ~dropped[:, None], metrics=metrics)

    return apply


def discrepancy_penalty(discrepancy: Discrepancy, *, shape: PenaltyShape = linear) -> LossTransform:
    """Subtracts λ · pen(δ) from the advantages (paper A, eqs. 3-4); λ is `dual_ascent`'s.

    Raises:
      ValueError: at trace time, where the optimiser's chain holds no `dual_ascent`.
    """

    def apply(terms: Terms, context: Context) -> Terms:
        if context.multiplier is None:
            raise ValueError("discrepancy_penalty needs a multiplier; put dual_ascent(...) into the optimiser's chain")
        delta = discrepancy(old_logps=context.old_logps, rollout_logps=context.batch.rollout_logps)
        return dataclasses.replace(
            terms, advantages=penalize(terms.advantages, delta, multiplier=context.multiplier, shape=shape)
        )

    return apply
