"""Optax transforms with extra arguments: the state of a constraint, carried where the optimiser's is."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class DualAscentState(NamedTuple):
    """λ and where we are in the iteration."""

    multiplier: jax.Array  # float32 [], whatever the params' dtype: in bf16 it would never move
    count: jax.Array  # int32 [], updates so far


def dual_ascent(
    dual_lr: float,
    *,
    budget: float,
    init_value: float,
    min_value: float = 0.0,
    max_value: float = 1.0,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """λ ← clip(λ + η_λ (δ̄ − c), min, max) on the last of each iteration's updates; the updates pass through unchanged.

    Args:
      dual_lr: η_λ, per unit of δ̄.
      budget: c, the tolerated mean discrepancy (probability).
      init_value: λ before the first step.
      min_value: lower bound of λ (ours; the paper's was not recovered).
      max_value: upper bound of λ (ours; the paper's was not recovered).
      every: updates in one training iteration.

    Returns:
      A transform whose `update` takes `discrepancy`, δ̄ of the whole iteration, and whose state holds `multiplier`.

    Raises:
      ValueError: a negative rate or budget, bounds out of order, λ outside them, or `every` below 1.

    References:
      Paper A (DCMDP), eq. 11.
    """
    if not (dual_lr >= 0 and budget >= 0 and every >= 1):
        raise ValueError(f"dual_lr {dual_lr} and budget {budget} must be at least 0, every {every} at least 1")
    if not min_value <= init_value <= max_value:
        raise ValueError(f"the initial multiplier {init_value} must lie within [{min_value}, {max_value}]")

    def init(params):
        del params
        return DualAscentState(jnp.asarray(init_value, jnp.float32), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, discrepancy, **extra_args):
        del params, extra_args
        count = state.count + 1
        excess = jnp.asarray(discrepancy, jnp.float32) - budget
        stepped = jnp.clip(state.multiplier + dual_lr * excess, min_value, max_value)
        return updates, DualAscentState(jnp.where(count % every == 0, stepped, state.multiplier), count)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]
