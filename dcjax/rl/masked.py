"""Masked reductions. What a mask hides never reaches a sum, so that NaN on padding stays there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.types import Array

Aggregation = Callable[[Array, Array], "LossSum"]
"""(losses [B, T], mask [B, T]) -> the sum and its denominator."""


class LossSum(NamedTuple):
    """A sum and what to divide it by, kept apart so that microbatches and devices combine exactly."""

    total: Float[Array, ""]
    denominator: Float[Array, ""]


def masked_sum(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | None = None) -> Array:
    """Σ x over True entries."""
    return jnp.sum(jnp.where(mask, x, 0), axis=axis)


def masked_mean(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | None = None) -> Array:
    """Mean of x over True entries; 0 where there are none."""
    return masked_sum(x, mask, axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def masked_max(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Largest x among True entries, for x ≥ 0; 0 where there are none."""
    return jnp.max(jnp.where(mask, x, 0))


def response_mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """(1/N) Σ_i (1/T_i) Σ_t x_it: the mean over the N responses that have a token of the mean over their T_i tokens."""
    return masked_mean(masked_mean(x, mask, axis=1), jnp.any(mask, axis=1))


def token_mean(losses: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> LossSum:
    """DAPO's aggregation: every token of the minibatch weighs the same."""
    return LossSum(masked_sum(losses, mask), jnp.sum(mask).astype(losses.dtype))
