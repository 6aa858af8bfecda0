"""δ: how far the training policy is from the policy that sampled (paper A, eq. 2).

The three signals below are two-sided and per token; `measure` turns them into the other sides and levels. They compare
the probabilities of the sampled token; a `DistributionGap` compares those of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import masks
from dcjax.rl.losses import clamp_log_ratio
from dcjax.rl.masked import masked_mean, zero_outside
from dcjax.types import Array, Batch, TokenDistributions

Signal = Callable[..., Array]
"""(*, old_logps, rollout_logps) -> the absolute gap of each token, of their shape."""

Discrepancy = Callable[..., Array]
"""(*, old_logps, rollout_logps, mask) -> δ [B, T], 0 outside the mask. Each of the three signals is a discrepancy."""

LEVELS = ("token", "sequence")
SIDES = ("two", "one", "signed")


@masks("mask")
def probability_difference(
    *,
    old_logps: Float[Array, "*shape"],
    rollout_logps: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """δ = |exp(old_logps) − exp(rollout_logps)|, in [0, 1], at least float32.

    Args:
      old_logps: log-probs of the sampled tokens under the training backend at the rollout's weights.
      rollout_logps: log-probs that the serving engine sampled them with.
      mask: response tokens; δ is 0 elsewhere, whatever the log-probs are there. None means every token.

    References:
      Paper A (DCMDP), eq. 2, probability-difference signal.

    Examples:
      >>> old_logps, rollout_logps = jnp.log(jnp.array([[[0.5, 0.9, 0.3]], [[0.4, 0.9, 0.8]]]))
      >>> mask = jnp.array([[True, True, False]])
      >>> delta = probability_difference(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask)
      >>> [round(value, 3) for value in delta[0].tolist()]
      [0.1, 0.0, 0.0]
    """
    old_logps, rollout_logps = zero_outside(old_logps, mask), zero_outside(rollout_logps, mask)
    return magnitude(jnp.exp(old_logps) - jnp.exp(rollout_logps))


@masks("mask")
def probability_ratio(
    *,
    old_logps: Float[Array, "*shape"],
    rollout_logps: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """δ = |exp(old_logps − rollout_logps) − 1|, the difference clamped to ±20; at least float32.

    Args:
      old_logps: as in `probability_difference`.
      rollout_logps: as in `probability_difference`.
      mask: as in `probability_difference`.

    References:
      Paper A (DCMDP), eq. 2, probability-ratio signal.
    """
    log_ratio = zero_outside(old_logps, mask) - zero_outside(rollout_logps, mask)
    # exp(x) − 1 would lose the digits of a small gap
    return magnitude(jnp.expm1(clamp_log_ratio(log_ratio)))


@masks("mask")
def log_probability_difference(
    *,
    old_logps: Float[Array, "*shape"],
    rollout_logps: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """δ = |old_logps − rollout_logps|, at least float32 and not clamped.

    Args:
      old_logps: as in `probability_difference`.
      rollout_logps: as in `probability_difference`.
      mask: as in `probability_difference`.

    References:
      Paper A (DCMDP), eq. 2, log-probability-difference signal.
    """
    return magnitude(zero_outside(old_logps, mask) - zero_outside(rollout_logps, mask))


def sided(signal: Signal, sides: str) -> Signal:
    """The signal d with other sides: d, d · 1[p > q] or d · sign(p − q), as `measure` has them.

    Raises:
      ValueError: unknown sides.
    """
    _require_choice("sides", sides, SIDES)
    if sides == "two":
        return signal

    def apply(*, old_logps: Array, rollout_logps: Array) -> Array:
        delta = signal(old_logps=old_logps, rollout_logps=rollout_logps)
        return jnp.where(old_logps > rollout_logps, delta, -delta if sides == "signed" else 0)

    return apply


def measure(signal: Signal, *, level: str = "token", sides: str = "two") -> Discrepancy:
    """A discrepancy that is the signal at another level or with other sides.

    With d = signal: two-sided d, one-sided d · 1[p > q], signed d · sign(p − q), where p is of `old_logps` and q of
    `rollout_logps`. At the sequence level δ is the mean of that over the response, (1/T_i) Σ_t, on each of its tokens.

    Args:
      signal: one of the three, or your own.
      level: "token" or "sequence".
      sides: "two", "one" (only where the training policy overrates the token) or "signed".

    Returns:
      (*, old_logps, rollout_logps, mask) -> δ [B, T], 0 outside the mask.

    Raises:
      ValueError: an unknown level or sides.

    References:
      Paper A (DCMDP), eq. 2; one-sided as in its figure 7.
    """
    _require_choice("level", level, LEVELS)
    of_token = sided(signal, sides)

    @masks("mask")
    def apply(
        *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T"]:
        old_logps, rollout_logps = zero_outside(old_logps, mask), zero_outside(rollout_logps, mask)
        return _at_level(of_token(old_logps=old_logps, rollout_logps=rollout_logps), mask, level)

    return apply


@dataclass(frozen=True)
class DistributionGap:
    """A δ of whole distributions: of all tokens that the sampler could have drawn in a state, not of the one it drew.

    An objective whose δ it is gets it as the quantity of this name, which the model's head computes where the sampler's
    distributions are known (`Requirements.sampler_distributions`).

    Raises:
      ValueError: an unknown level.
    """

    name: str
    """The key in `Context.quantities`, and in `Context.old_quantities` at the rollout's weights."""
    compute: Callable[[TokenDistributions], Array]
    """(distributions of C columns) -> float32 [B, C]."""
    level: str = "token"
    """"token", or "sequence": the mean over the response, on each of its tokens."""

    def __post_init__(self) -> None:
        _require_choice("level", self.level, LEVELS)

    def of_tokens(self, values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
        """δ, 0 outside the mask, from what `compute` gave for each response token."""
        return _at_level(zero_outside(values, mask), mask, self.level)


def discrepancy_of(
    discrepancy: Discrepancy | DistributionGap,
    logps: Float[Array, "B T"],
    batch: Batch,
    quantities: Mapping[str, Array],
) -> Float[Array, "B T"]:
    """δ of each token between a policy and the one that sampled, 0 outside of responses.

    Args:
      discrepancy: which δ.
      logps: log-probs of the sampled tokens under the policy.
      batch: what was sampled.
      quantities: by name, what the model's head computed of the policy.
    """
    mask = batch.response_mask
    if isinstance(discrepancy, DistributionGap):
        return discrepancy.of_tokens(quantities[discrepancy.name], mask)
    rollout_logps = jax.lax.stop_gradient(batch.rollout_logps)
    return discrepancy(old_logps=logps, rollout_logps=rollout_logps, mask=mask)


def _at_level(delta: Array, mask: Array, level: str) -> Array:
    if level == "sequence":
        delta = masked_mean(delta, mask, axis=1)[:, None]
    return jnp.where(mask, delta, 0)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def magnitude(gap: Array) -> Array:
    """|x|, whose derivative at 0 is 0."""
    # JAX's derivative of |x| at 0 is 1, with which the direct penalty would push even where there is no gap
    return jnp.where(gap == 0, 0, jnp.abs(gap))
