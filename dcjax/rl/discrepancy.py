"""δ: how far the training policy is from the policy that sampled (paper A, eq. 2).

The three signals below are two-sided and of each token; `measure` makes the other sides and levels of them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import masks
from dcjax.rl.losses import MAX_LOG_RATIO
from dcjax.rl.masked import masked_mean, widen
from dcjax.types import Array

Signal = Callable[..., Array]
"""(*, old_logps, rollout_logps) -> |gap| of each token, [B, T]."""

Discrepancy = Callable[..., Array]
"""(*, old_logps, rollout_logps, mask) -> δ [B, T], 0 outside the mask. Each of the three signals is one."""

LEVELS = ("token", "sequence")
SIDES = ("two", "one", "signed")


@masks("mask")
def probability_difference(
    *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"], mask: Bool[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """δ = |exp(old_logps) − exp(rollout_logps)|, in [0, 1], at least float32.

    Args:
      old_logps: log-probs of the sampled tokens under the training backend at the rollout's weights.
      rollout_logps: log-probs that the serving engine sampled them with.
      mask: response tokens; δ is 0 elsewhere, whatever stands there. None is every token.

    References:
      Paper A (DCMDP), eq. 2, probability-difference signal.
    """
    old_logps, rollout_logps = _visible(old_logps, mask), _visible(rollout_logps, mask)
    return _magnitude(jnp.exp(old_logps) - jnp.exp(rollout_logps))


@masks("mask")
def probability_ratio(
    *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"], mask: Bool[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """δ = |exp(old_logps − rollout_logps) − 1|, the difference clamped to ±20; at least float32.

    Args:
      old_logps: as in `probability_difference`, and so are the others.
      rollout_logps: see there.
      mask: see there.

    References:
      Paper A (DCMDP), eq. 2, probability-ratio signal.
    """
    log_ratio = _visible(old_logps, mask) - _visible(rollout_logps, mask)
    # exp(x) − 1 loses the digits of a small gap
    return _magnitude(jnp.expm1(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)))


@masks("mask")
def log_probability_difference(
    *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"], mask: Bool[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """δ = |old_logps − rollout_logps|, at least float32 and not clamped.

    Args:
      old_logps: as in `probability_difference`, and so are the others.
      rollout_logps: see there.
      mask: see there.

    References:
      Paper A (DCMDP), eq. 2, log-probability-difference signal.
    """
    return _magnitude(_visible(old_logps, mask) - _visible(rollout_logps, mask))


def measure(signal: Signal, *, level: str = "token", sides: str = "two") -> Discrepancy:
    """The signal at another level or with other sides.

    With d = signal: two-sided d, one-sided d · 1[p > q], signed d · sign(p − q), where p is of `old_logps` and q of
    `rollout_logps`. A sequence's δ is (1/T_i) Σ_t of that over its response, and every token of the response has it.

    Args:
      signal: one of the three, or a reader's own.
      level: "token" or "sequence".
      sides: "two", "one" (only what the training policy overrates) or "signed".

    Returns:
      (*, old_logps, rollout_logps, mask) -> δ [B, T], 0 outside the mask.

    Raises:
      ValueError: a level or sides other than these.

    References:
      Paper A (DCMDP), eq. 2; one-sided as in its figure 7.
    """
    for name, value, choices in (("level", level, LEVELS), ("sides", sides, SIDES)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")

    @masks("mask")
    def apply(
        *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T"]:
        old_logps, rollout_logps = _visible(old_logps, mask), _visible(rollout_logps, mask)
        delta = signal(old_logps=old_logps, rollout_logps=rollout_logps)
        if sides != "two":
            delta = jnp.where(old_logps > rollout_logps, delta, -delta if sides == "signed" else 0)
        if level == "sequence":
            delta = masked_mean(delta, mask, axis=1)[:, None]
        return jnp.where(mask, delta, 0)

    return apply


def _magnitude(gap: Array) -> Array:
    # JAX's derivative of |x| at 0 is 1: where there is no gap, the direct penalty would push all the same
    return jnp.where(gap == 0, 0, jnp.abs(gap))


def _visible(logps: Array, mask: Array | None) -> Array:
    """At least float32, and 0 on padding: behind a mask of the result, 0 · NaN would still reach the gradient."""
    return widen(logps) if mask is None else jnp.where(mask, widen(logps), 0)
