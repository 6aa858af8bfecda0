"""Penalties on the discrepancy: shapes of pen(δ), and the penalised advantage (paper A, eqs. 3-4 and 8-10)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import masks
from dcjax.rl.masked import masked_mean
from dcjax.types import Array

PenaltyShape = Callable[[Array], Array]
"""δ -> pen(δ), elementwise."""

PenaltyForm = Callable[[Array, Array], Array]
"""(pen(δ) [B, T], response mask [B, T]) -> the penalty that, times λ, is subtracted from the advantage, [B, T]."""


def linear(discrepancy: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """pen(δ) = δ."""
    return discrepancy


def shifted(budget: float) -> PenaltyShape:
    """pen(δ) = δ − c, the Lagrangian taken literally: tokens under the budget are rewarded.

    Raises:
      ValueError: a budget that is negative or not a number.
    """
    _require_tolerance("budget", budget)
    return lambda discrepancy: discrepancy - budget


def hinge(threshold: float) -> PenaltyShape:
    """pen(δ) = max(δ − c, 0).

    Raises:
      ValueError: a threshold that is negative or not a number.

    References:
      Paper A (DCMDP), §5, threshold-based truncation; the continuous one of its two readings.
    """
    _require_tolerance("threshold", threshold)
    return lambda discrepancy: jnp.maximum(discrepancy - threshold, 0)


def gate(threshold: float) -> PenaltyShape:
    """pen(δ) = δ · 1[δ > c].

    Raises:
      ValueError: a threshold that is negative or not a number.

    References:
      Paper A (DCMDP), §5, threshold-based truncation; the discontinuous one of its two readings.
    """
    _require_tolerance("threshold", threshold)
    return lambda discrepancy: jnp.where(discrepancy > threshold, discrepancy, 0)


def _require_tolerance(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} is {value}; it must be at least 0")


@masks("mask")
def as_published(penalty: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Each token's own penalty."""
    del mask
    return penalty


@masks("mask")
def centred_on_response(penalty: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """pen_t − (1/T_i) Σ_s pen_s over the response's tokens: it moves credit within a response, and sums to 0 over it.

    Centring on the response needs only the row itself. The mean penalty of a group is not known where rows are cut into
    microbatches: with one update per iteration, the pass that yields a row's `old_logps` is the one that is
    differentiated, before the rest of the group has been computed. A sequence-level δ centres to 0.
    """
    return penalty - masked_mean(penalty, mask, axis=1)[:, None]


def penalize(
    advantages: Float[Array, "B T"],
    discrepancy: Float[Array, "B T"],
    *,
    multiplier: Float[Array, ""] | float,
    shape: PenaltyShape = linear,
) -> Float[Array, "B T"]:
    """Ã_it = A_it − λ · pen(δ_it), the penalty under stop-gradient.

    Args:
      advantages: A of each token.
      discrepancy: δ.
      multiplier: λ.
      shape: pen.

    Returns:
      Ã.

    References:
      Paper A (DCMDP), eqs. 3-4 and 8-10.

    Examples:
      >>> advantages, discrepancy = jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 0.5]])
      >>> penalize(advantages, discrepancy, multiplier=0.5).tolist()
      [[1.0, 0.75]]
      >>> penalize(advantages, discrepancy, multiplier=0.5, shape=hinge(0.25)).tolist()
      [[1.0, 0.875]]
    """
    return advantages - multiplier * jax.lax.stop_gradient(shape(discrepancy))
