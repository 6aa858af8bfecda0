"""δ: how far the training policy is from the policy that sampled, token by token (paper A, eq. 2)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float

from dcjax.types import Array


def probability_difference(
    *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """δ = |exp(old_logps) − exp(rollout_logps)|, in [0, 1], at least float32.

    Args:
      old_logps: log-probs of the sampled tokens under the training backend at the rollout's weights.
      rollout_logps: log-probs that the serving engine sampled them with.

    References:
      Paper A (DCMDP), eq. 2, probability-difference signal.
    """
    return jnp.abs(jnp.exp(old_logps) - jnp.exp(rollout_logps))
