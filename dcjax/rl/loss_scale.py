"""The loss scale that keeps float16 gradients in range, kept in the optimiser's state."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class LossScaleState(NamedTuple):
    """The scale of the next loss, and the state of the transform that it guards."""

    loss_scale: jax.Array  # float32 []
    finite: jax.Array  # int32 [], finite updates since the scale last changed
    inner: optax.OptState


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    init_value: float = 2.0**15,
    growth_interval: int = 2000,
    factor: float = 2.0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps float16 gradients in range: the loss is multiplied by `loss_scale`, and its gradients are divided by it.

    `make_train_step` does both. Where gradients overflow, neither the parameters nor the inner state change, and the
    scale is divided by `factor` (but stays at least 1). After `growth_interval` consecutive updates with finite
    gradients, it is multiplied by `factor`.

    Args:
      inner: the transform that receives the gradients, already divided by the scale.
      init_value: the first scale.
      growth_interval: updates without an overflow after which the scale grows.
      factor: what the scale is multiplied or divided by, above 1.

    Returns:
      A transform whose state holds `loss_scale`.

    Raises:
      ValueError: a scale below 1, an interval below 1, or a factor that is not above 1.

    References:
      Micikevicius et al., Mixed Precision Training (arXiv 1710.03740), section 3.2.
    """
    if not (init_value >= 1 and growth_interval >= 1 and factor > 1):
        raise ValueError(
            f"init_value {init_value} and growth_interval {growth_interval} must be at least 1, factor {factor} above 1"
        )
    guarded = optax.with_extra_args_support(inner)

    def init(params):
        return LossScaleState(jnp.asarray(init_value, jnp.float32), jnp.zeros((), jnp.int32), guarded.init(params))

    def update(updates, state, params=None, **extra_args):
        is_finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates)]).all()
        changes, moved = guarded.update(updates, state.inner, params, **extra_args)
        changes = jax.tree.map(lambda change: jnp.where(is_finite, change, 0), changes)
        kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), moved, state.inner)
        finite = jnp.where(is_finite, state.finite + 1, 0)
        grown = state.loss_scale * jnp.where(finite == growth_interval, factor, 1.0)
        # a scale that would leave float32's own range stays as it is
        grown = jnp.where(jnp.isfinite(grown), grown, state.loss_scale)
        scale = jnp.where(is_finite, grown, jnp.maximum(state.loss_scale / factor, 1.0))
        return changes, LossScaleState(scale, finite % growth_interval, kept)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]
