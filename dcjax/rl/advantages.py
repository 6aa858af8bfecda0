"""Group-relative advantages, and the discrepancy penalty on them (paper A, eqs. 3-4 and 8-10)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dcjax.types import Array

STD_EPSILON = 1e-6
"""Added to a group's standard deviation, as verl does."""

PenaltyShape = Callable[[Array], Array]
"""δ [B, T] -> pen(δ) [B, T]."""


def group_rewards(rewards: Float[Array, "B"], *, group_size: int) -> Float[Array, "B G"]:
    """Each row's whole group: rows of one prompt are neighbours.

    Raises:
      ValueError: a group of one, or rows that the group size does not divide.
    """
    if group_size < 2 or rewards.shape[0] % group_size:
        raise ValueError(
            f"group_size is {group_size} for {rewards.shape[0]} responses; it must be at least 2 and divide them"
        )
    return jnp.repeat(rewards.reshape(-1, group_size), group_size, axis=0)


def relative_to_group(
    rewards: Float[Array, "B"], groups: Float[Array, "B G"], *, scale_by_std: bool = True
) -> Float[Array, "B"]:
    """`group_relative` for rows that carry their groups along."""
    centred = rewards - jnp.mean(groups, axis=1)
    return centred / (jnp.std(groups, axis=1, ddof=1) + STD_EPSILON) if scale_by_std else centred


def group_relative(rewards: Float[Array, "B"], *, group_size: int, scale_by_std: bool = True) -> Float[Array, "B"]:
    """GRPO: A_i = (R_i − mean R) / (std R + 1e-6) within each group, with the sample standard deviation (ddof 1).

    Args:
      rewards: one a response; the G responses of one prompt are neighbours.
      group_size: G, at least 2.
      scale_by_std: False leaves the division out (Dr.GRPO).

    Raises:
      ValueError: a group of one, or rows that the group size does not divide.
    """
    return relative_to_group(rewards, group_rewards(rewards, group_size=group_size), scale_by_std=scale_by_std)


def linear(discrepancy: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """pen(δ) = δ."""
    return discrepancy


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

    References:
      Paper A (DCMDP), eqs. 3-4 and 8-10.
    """
    return advantages - multiplier * jax.lax.stop_gradient(shape(discrepancy))
