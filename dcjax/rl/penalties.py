"""What the discrepancy costs: shapes of pen(δ), and the penalised advantage (paper A, eqs. 3-4 and 8-10)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import masks
from dcjax.rl.masked import masked_mean
from dcjax.types import Array

PenaltyShape = Callable[[Array], Array]
"""δ [B, T] -> pen(δ) [B, T]."""

PenaltyForm = Callable[[Array, Array], Array]
"""(pen(δ) [B, T], response mask [B, T]) -> what is subtracted from the advantage, before λ."""


def linear(discrepancy: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """pen(δ) = δ."""
    return discrepancy


def shifted(budget: float) -> PenaltyShape:
    """pen(δ) = δ − c, the Lagrangian read literally: tokens under the budget are rewarded.

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
      Paper A (DCMDP), §5, threshold-based truncation; of its two readings, the continuous one.
    """
    _require_tolerance("threshold", threshold)
    return lambda discrepancy: jnp.maximum(discrepancy - threshold, 0)


def gate(threshold: float) -> PenaltyShape:
    """pen(δ) = δ · 1[δ > c].

    Raises:
      ValueError: a threshold that is negative or not a number.

    References:
      Paper A (DCMDP), §5, threshold-based truncation; of its two readings, the one that jumps.
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
    """pen_t − (1/T_i) Σ_s pen_s over the response's tokens: it moves credit within a response, and sums to 0 there.

    Centring on the response and not on its group needs nothing but the row itself. A group's mean penalty does not
    exist where rows are cut into microbatches: with one update an iteration, the pass that yields a row's `old_logps`
    is the one that is differentiated, before the rest of the group has been seen. A sequence-level δ leaves nothing.
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
      advantages: A, already spread over tokens.
      discrepancy: δ.
      multiplier: λ.
      shape: pen.

    Returns:
      Ã.

    References:
      Paper A (DCMDP), eqs. 3-4 and 8-10.
    """
    return advantages - multiplier * jax.lax.stop_gradient(shape(discrepancy))
