"""Advantages: how much better a response is than the others of its group or its batch."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float

from dcjax.rl.masked import widen
from dcjax.types import Array

STD_EPSILON = 1e-6
"""Added to a group's standard deviation, as verl does."""


def group_rewards(rewards: Float[Array, "B"], *, group_size: int) -> Float[Array, "B G"]:
    """The rewards of each row's whole group; rows of one prompt are neighbours.

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
    """`group_relative` for rows that each carry the rewards of their group."""
    rewards, groups = widen(rewards), widen(groups)
    # the mean of equal rewards may be rounded, and divided by a deviation of 0 that rounding would be an advantage:
    # after this shift equal rewards are exactly 0
    rewards, groups = rewards - groups[:, 0], groups - groups[:, :1]
    centred = rewards - jnp.mean(groups, axis=1)
    return centred / (jnp.std(groups, axis=1, ddof=1) + STD_EPSILON) if scale_by_std else centred


def group_relative(rewards: Float[Array, "B"], *, group_size: int, scale_by_std: bool = True) -> Float[Array, "B"]:
    """GRPO: A_i = (R_i − mean R) / (std R + 1e-6) within each group, with the sample standard deviation (ddof 1).

    Args:
      rewards: one per response; the G responses of one prompt are neighbours.
      group_size: G, at least 2.
      scale_by_std: False leaves the division out (Dr.GRPO).

    Returns:
      One advantage per response, at least float32; 0 for a whole group of equal rewards.

    Raises:
      ValueError: a group of one, or rows that the group size does not divide.

    References:
      GRPO (arXiv 2402.03300), section 4.1; Dr.GRPO (arXiv 2503.20783), section 3.2.

    Examples:
      Two prompts with four responses each; the second prompt's rewards are all equal:

      >>> rewards = jnp.array([1.0, 0, 0, 0, 1, 1, 1, 1])
      >>> [round(advantage, 3) for advantage in group_relative(rewards, group_size=4).tolist()]
      [1.5, -0.5, -0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    """
    return relative_to_group(rewards, group_rewards(rewards, group_size=group_size), scale_by_std=scale_by_std)


def relative_to_others(rewards: Float[Array, "B"], groups: Float[Array, "B G"]) -> Float[Array, "B"]:
    """`leave_one_out` for rows that each carry the rewards of their group."""
    rewards, groups = widen(rewards), widen(groups)
    # the row itself is in the sum too, where it adds exactly 0
    return jnp.sum(rewards[:, None] - groups, axis=1) / (groups.shape[1] - 1)


def leave_one_out(rewards: Float[Array, "B"], *, group_size: int) -> Float[Array, "B"]:
    """RLOO: A_i = R_i − mean of the other G − 1 rewards of its group.

    Args:
      rewards: one per response; the G responses of one prompt are neighbours.
      group_size: G, at least 2.

    Returns:
      One advantage per response, at least float32; 0 for a whole group of equal rewards.

    Raises:
      ValueError: a group of one, or rows that the group size does not divide.

    References:
      RLOO (arXiv 2402.14740), section 3; the estimator of paper B.

    Examples:
      >>> leave_one_out(jnp.array([1.0, 0, 0, 1, 1, 1]), group_size=3).tolist()
      [1.0, -0.5, -0.5, 0.0, 0.0, 0.0]
    """
    return relative_to_others(rewards, group_rewards(rewards, group_size=group_size))


def relative_to_mean(rewards: Float[Array, "B"], *, mean_reward: Float[Array, ""]) -> Float[Array, "B"]:
    """`batch_baseline` for rows that are only a part of the batch."""
    return widen(rewards) - mean_reward


def batch_baseline(rewards: Float[Array, "B"]) -> Float[Array, "B"]:
    """REINFORCE with the batch's mean as its baseline: A_i = R_i − mean of all the iteration's rewards.

    Args:
      rewards: one per response, of the whole iteration.

    Returns:
      One advantage per response, at least float32.

    References:
      Williams, Simple statistical gradient-following algorithms (1992), reinforcement baselines.
    """
    return relative_to_mean(rewards, mean_reward=jnp.mean(widen(rewards)))
