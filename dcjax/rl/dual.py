"""The Lagrange multiplier λ of the discrepancy's constraint, kept and stepped in the optimiser's state."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dcjax.rl.signals import mean_of_last, median_of_last, on_last_update, remember

CALIBRATION_FACTOR = 1.5
"""The calibrated budget as a multiple of the δ̄ that was measured."""

ALARM_MEMORY = 10
"""Iterations over which δ̄ is averaged for the alarm."""

ALARM_RISE = 1.2
"""δ̄ counts as rising where that mean is more than this factor times what it was when λ reached its upper bound."""


class DualAscentState(NamedTuple):
    """λ, its budget, and the δ̄ that they follow; `optax.tree.get` finds `multiplier`, `budget` and `saturated`."""

    multiplier: jax.Array  # float32 [], whatever the params' dtype: in bf16 small steps would be rounded away
    budget: jax.Array  # float32 [], c; 0 while it is being calibrated
    saturated: jax.Array  # int32 [], consecutive iterations with λ at its upper bound while δ̄ rises
    reference: jax.Array  # float32 [], mean δ̄ when λ reached its upper bound; until then, the current mean δ̄
    recent: jax.Array  # float32 [N], δ̄ of the last N iterations, the newest last; 0 for those not yet seen
    count: jax.Array  # int32 [], updates so far


def dual_ascent(
    dual_lr: float,
    *,
    budget: float | Literal["auto"],
    init_value: float,
    min_value: float = 0.0,
    max_value: float = 1.0,
    every: int = 1,
    window: int = 1,
    calibration_steps: int = 10,
    calibration_factor: float = CALIBRATION_FACTOR,
) -> optax.GradientTransformationExtraArgs:
    """λ ← clip(λ + η_λ (δ̄ − c), min, max) at the last update of each iteration; the updates pass through unchanged.

    With the budget "auto", λ is held for the first `calibration_steps` iterations. After them c is set, once and for
    all, to `calibration_factor` × the median of their δ̄.

    `saturated` is an alarm. It counts consecutive iterations in which λ is at `max_value` while the mean of the last
    10 δ̄ is over 1.2 × what it was when λ reached that bound (over the first 10 iterations, if λ began there). The
    penalty then does not close the gap; a count of 10 or more deserves a warning.

    Args:
      dual_lr: η_λ, per unit of δ̄.
      budget: c, the tolerated mean discrepancy (probability), or "auto".
      init_value: λ before the first step.
      min_value: λ's lower bound (ours; the paper's was not recovered).
      max_value: λ's upper bound (ours; the paper's was not recovered).
      every: updates in one training iteration.
      window: iterations over which δ̄ is averaged, including those of the calibration (paper A's dynamic buffer).
      calibration_steps: iterations over which "auto" measures δ̄.
      calibration_factor: the budget of "auto" as a multiple of the median δ̄.

    Returns:
      A transform whose `update` takes `discrepancy`, δ̄ of the whole iteration, and whose state holds `multiplier`,
      `budget` (0 while it is being calibrated) and `saturated`. It may stand anywhere in the chain, but outside
      `dynamic_loss_scale`, which would hide from it the iterations that overflow.

    Raises:
      ValueError: a negative rate or budget, bounds out of order, λ outside them, a count below 1, or a factor that is
        not positive.

    References:
      Paper A (DCMDP), eq. 11. The calibration and the alarm are ours.

    Examples:
      >>> tx = dual_ascent(2.0, budget=0.01, init_value=0.1)
      >>> params = jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for mean_discrepancy in (0.03, 0.01, 0.005):
      ...     _, state = tx.update(params, state, params, discrepancy=mean_discrepancy)
      ...     print(round(float(optax.tree.get(state, "multiplier")), 3))
      0.14
      0.14
      0.13
    """
    counts = {"every": every, "window": window, "calibration_steps": calibration_steps}
    _check_arguments(dual_lr, budget, calibration_factor, counts)
    if not min_value <= init_value <= max_value:
        raise ValueError(f"the initial multiplier {init_value} must lie within [{min_value}, {max_value}]")
    calibration_steps = calibration_steps if budget == "auto" else 0
    memory = max(window, calibration_steps, ALARM_MEMORY)

    def init(params):
        del params
        return DualAscentState(
            multiplier=jnp.asarray(init_value, jnp.float32),
            budget=jnp.asarray(0.0 if budget == "auto" else budget, jnp.float32),
            saturated=jnp.zeros((), jnp.int32),
            reference=jnp.zeros((), jnp.float32),
            recent=jnp.zeros(memory, jnp.float32),
            count=jnp.zeros((), jnp.int32),
        )

    def ascend(state: DualAscentState, recent: jax.Array, seen: jax.Array):
        excess = mean_of_last(recent, seen, window) - state.budget
        stepped = jnp.clip(state.multiplier + dual_lr * excess, min_value, max_value)
        if not calibration_steps:
            return stepped, state.budget
        measured = calibration_factor * median_of_last(recent, seen, calibration_steps)
        return (
            jnp.where(seen > calibration_steps, stepped, state.multiplier),
            jnp.where(seen == calibration_steps, measured, state.budget),
        )

    def watch(state: DualAscentState, multiplier: jax.Array, recent: jax.Array, seen: jax.Array):
        mean = mean_of_last(recent, seen, ALARM_MEMORY)
        arriving = (state.multiplier < max_value) | (seen <= ALARM_MEMORY)
        reference = jnp.where(arriving, mean, state.reference)
        rising = (multiplier >= max_value) & (mean > ALARM_RISE * reference)
        return jnp.where(rising, state.saturated + 1, 0), reference

    def update(updates, state, params=None, *, discrepancy, **extra_args):
        del params, extra_args
        count = state.count + 1
        seen = count // every
        recent = remember(state.recent, jnp.asarray(discrepancy, jnp.float32))
        multiplier, c = ascend(state, recent, seen)
        moved = DualAscentState(multiplier, c, *watch(state, multiplier, recent, seen), recent, count)
        return updates, on_last_update(every, count, moved, state._replace(count=count))

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def _check_arguments(
    dual_lr: float, budget: float | Literal["auto"], calibration_factor: float, counts: dict[str, int]
) -> None:
    if not dual_lr >= 0:
        raise ValueError(f"dual_lr {dual_lr} must be at least 0")
    if budget != "auto" and not budget >= 0:
        raise ValueError(f'budget {budget} must be at least 0, or "auto"')
    if not calibration_factor > 0:
        raise ValueError(f"calibration_factor {calibration_factor} must be above 0")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} {count} must be at least 1")
