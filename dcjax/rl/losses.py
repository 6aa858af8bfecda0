"""Policy surrogates: a loss for each token, which an aggregation of `masked` then sums and counts."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.types import Array

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before any exponential, as verl does."""

Surrogate = Callable[..., tuple[Array, Array]]
"""(logps, *, old_logps, advantages, weights, mask), all [B, T], -> losses, 0 outside the mask, and where it clipped."""


def ratio(*, logps: Float[Array, "B T"], reference_logps: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """exp(logps − reference_logps), the difference clamped to ±20."""
    return jnp.exp(jnp.clip(logps - reference_logps, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def clipped_surrogate(
    logps: Float[Array, "B T"],
    *,
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    eps_low: float,
    eps_high: float,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−w · min(r Ã, clip(r, 1 − eps_low, 1 + eps_high) Ã) with r = exp(logps − old_logps).

    Returns:
      Each token's loss, and where the clip took the gradient away.

    References:
      PPO (arXiv 1707.06347), eq. 7; asymmetric bounds from DAPO (arXiv 2503.14476).
    """
    # hidden before anything is computed: behind the sum's mask, 0 · NaN would still reach the gradient
    logps, old_logps, advantages, weights = (jnp.where(mask, x, 0) for x in (logps, old_logps, advantages, weights))
    r = ratio(logps=logps, reference_logps=old_logps)
    free, clipped = r * advantages, jnp.clip(r, 1 - eps_low, 1 + eps_high) * advantages
    return -weights * jnp.minimum(free, clipped), clipped < free


def negative_log_likelihood(
    logps: Float[Array, "B T"], *, weights: Float[Array, "B T"], mask: Bool[Array, "B T"], **unused: Array
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−w · log π: the surrogate of supervised training, which clips nothing."""
    return jnp.where(mask, -weights * logps, 0), jnp.zeros(mask.shape, bool)
