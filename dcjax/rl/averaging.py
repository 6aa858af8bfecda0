"""A moving average of the parameters, carried where the optimiser's state is; often the better policy to deploy."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dcjax.types import Params


class ParamsEmaState(NamedTuple):
    """The average, which can be deployed at any time."""

    ema: Params  # float32, a pytree shaped like the params; the params themselves before the first update
    count: jax.Array  # int32 [], updates so far


def params_ema(decay: float) -> optax.GradientTransformationExtraArgs:
    """ema_n = Σ_{k≤n} d^{n−k} θ_k / Σ_{k≤n} d^{n−k}, θ_k the params after update k; the updates pass through unchanged.

    The average is over trained params only: its weights sum to one from the first update on, so there is no bias to
    divide out, and the params before any update, θ_0, have no weight after it. Params are averaged as they are stored,
    rounded to their dtype.

    It must be the last transform of the chain, outside `dynamic_loss_scale` too: a transform behind it would change
    updates that are already in the average.

    Args:
      decay: d, per update; the average reaches back over about 1 / (1 − d) updates.

    Returns:
      A transform whose `update` needs `params`, and whose state holds `ema`.

    Raises:
      ValueError: a decay outside (0, 1); when updating, no params.

    References:
      Polyak and Juditsky, Acceleration of stochastic approximation by averaging (1992). The weights are those of Kingma
      and Ba, Adam (arXiv 1412.6980), section 3.
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay {decay} must lie between 0 and 1, both excluded")

    def init(params):
        # copied even where they are float32 already: the params' own buffers may be donated
        ema = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
        return ParamsEmaState(ema, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("params_ema averages the params after the update: call update(updates, state, params)")
        count = state.count + 1
        # (1 − d) / (1 − dⁿ), without cancellation where dⁿ is near 1
        weight = (1 - decay) / -jnp.expm1(count * math.log(decay))
        ema = jax.tree.map(
            lambda mean, leaf: mean + weight * (leaf.astype(jnp.float32) - mean),
            state.ema,
            optax.apply_updates(params, updates),
        )
        return updates, ParamsEmaState(ema, count)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def average_of(opt_state: optax.OptState) -> Params:
    """The moving average in an optimiser's state, float32.

    Raises:
      ValueError: the chain holds no `params_ema`.
    """
    if (ema := optax.tree.get(opt_state, "ema")) is None:
        raise ValueError("there is no average of the params; put params_ema(...) last into the optimiser's chain")
    return ema


def averaged_params(opt_state: optax.OptState, params: Params) -> Params:
    """The moving average in an optimiser's state, in the dtypes of `params`.

    Raises:
      ValueError: the chain holds no `params_ema`.
    """
    return optax.tree.cast_like(average_of(opt_state), params)
