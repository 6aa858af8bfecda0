"""Masked reductions. Entries outside the mask never enter a sum, so NaN on padding does no harm."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import masks
from dcjax.types import Array

Aggregation = Callable[[Array, Array], "LossSum"]
"""(losses [B, T], mask [B, T]) -> the sum of the losses and its denominator; both add up what each row gives alone."""


class LossSum(NamedTuple):
    """A sum and its denominator, not yet divided, so that the sums of microbatches and devices combine exactly."""

    total: Float[Array, ""]
    denominator: Float[Array, ""]


def widen(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """At least float32: half precision is widened, float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@masks("mask")
def zero_outside(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"] | None) -> Float[Array, "*shape"]:
    """x, at least float32, with 0 outside the mask; None masks nothing.

    Padding is zeroed before anything is computed from it: where only the result is masked, a NaN on padding would
    still reach the gradient, as 0 · NaN.
    """
    return widen(x) if mask is None else jnp.where(mask, widen(x), 0)


@masks("mask")
def masked_sum(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | None = None) -> Array:
    """Sum of x over True entries."""
    return jnp.sum(zero_outside(x, mask), axis=axis)


@masks("mask")
def masked_mean(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | None = None) -> Array:
    """Mean of x over True entries; 0 where there are none."""
    return masked_sum(x, mask, axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


@masks("mask")
def masked_max(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Largest x among True entries, for x ≥ 0; 0 where there are none."""
    return jnp.max(jnp.where(mask, x, 0))


@masks("mask")
def response_mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """(1/N) Σ_i (1/T_i) Σ_t x_it: the mean over the N responses that have a token of the mean over their T_i tokens."""
    return masked_mean(masked_mean(x, mask, axis=1), jnp.any(mask, axis=1))


@masks("mask")
def token_mean(losses: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> LossSum:
    """Σ_it ℓ_it / Σ_i T_i: every token of the minibatch weighs the same (DAPO, arXiv 2503.14476, eq. 8)."""
    total = masked_sum(losses, mask)
    return LossSum(total, jnp.sum(mask).astype(total.dtype))


@masks("mask")
def seq_mean_token_mean(losses: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> LossSum:
    """(1/N) Σ_i (1/T_i) Σ_t ℓ_it: every response weighs the same (GRPO, arXiv 2402.03300, eq. 3).

    N counts the responses that have a token.
    """
    return _over_responses(jnp.sum(masked_mean(losses, mask, axis=1)), mask)


@masks("mask")
def seq_mean_token_sum(losses: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> LossSum:
    """(1/N) Σ_i Σ_t ℓ_it: losses are summed over whole responses. N counts the responses that have a token."""
    return _over_responses(masked_sum(losses, mask), mask)


def seq_mean_token_sum_norm(horizon: int) -> Aggregation:
    """(1/N) Σ_i (1/H) Σ_t ℓ_it: the sum over each response, divided by the same length for all of them.

    Args:
      horizon: H, tokens; the longest response that the sampler allows.

    Returns:
      The aggregation; its N counts the responses that have a token.

    Raises:
      ValueError: a horizon below 1.

    References:
      Dr.GRPO (arXiv 2503.20783), section 3.2 and its listing 1.
    """
    if horizon < 1:
        raise ValueError(f"horizon is {horizon}; it must be at least 1 token")

    @masks("mask")
    def aggregate(losses: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> LossSum:
        total, responses = seq_mean_token_sum(losses, mask)
        return LossSum(total / horizon, responses)

    return aggregate


def _over_responses(total: Array, mask: Array) -> LossSum:
    return LossSum(total, jnp.sum(jnp.any(mask, axis=1)).astype(total.dtype))
