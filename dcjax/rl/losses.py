"""Policy surrogates: a loss for each token, which an aggregation from `masked` then sums."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import masks
from dcjax.rl.masked import masked_mean, widen, zero_outside
from dcjax.types import Array

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before they are exponentiated, as verl does."""

Surrogate = Callable[..., tuple[Array, Array]]
"""(logps, *, old_logps, advantages, weights, mask), all [B, T] -> losses, 0 outside the mask; where it clips."""


def ratio(*, logps: Float[Array, "B T"], reference_logps: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """exp(logps − reference_logps), the difference clamped to ±20."""
    return bounded_exp(widen(logps) - reference_logps)


def bounded_exp(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exponential of a log-ratio clamped to ±20."""
    return jnp.exp(clamp_log_ratio(log_ratio))


def clamp_log_ratio(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The log-ratio clamped to ±20, outside which its gradient is 0."""
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


@masks("mask")
def clipped_surrogate(
    logps: Float[Array, "B T"],
    *,
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−w · min(r Ã, clip(r, 1 − eps_low, 1 + eps_high) Ã) with r = exp(logps − old_logps).

    Args:
      logps: log-probs of the policy that is being differentiated.
      old_logps: log-probs of the policy before the iteration's updates.
      advantages: Ã.
      weights: w, the importance weights.
      mask: tokens that count.
      eps_low: how far r may fall below 1.
      eps_high: how far r may rise above 1.
      dual_clip: c; where Ã < 0, the loss before weighting is at most −Ã·c. None leaves it unbounded.

    Returns:
      Each token's loss, and where a clip removes its gradient.

    Raises:
      ValueError: a dual clip that is not above 1.

    References:
      PPO (arXiv 1707.06347), eq. 7; asymmetric bounds from DAPO (arXiv 2503.14476), eq. 10; dual clip from
      arXiv 1912.09729, eq. 5.

    Examples:
      The policy now gives the first token 1.5 times its old probability, and the second the old one:

      >>> logps, old_logps = jnp.log(jnp.array([[[0.6, 0.5]], [[0.4, 0.5]]]))
      >>> ones, mask = jnp.ones((1, 2)), jnp.array([[True, True]])
      >>> losses, clipped = clipped_surrogate(
      ...     logps, old_logps=old_logps, advantages=ones, weights=ones, mask=mask, eps_low=0.2, eps_high=0.28
      ... )
      >>> [round(loss, 3) for loss in losses[0].tolist()], clipped[0].tolist()
      ([-1.28, -1.0], [True, False])
    """
    logps, old_logps, advantages, weights = _zero_padding(mask, logps, old_logps, advantages, weights)
    r = ratio(logps=logps, reference_logps=old_logps)
    losses, clipped = _pessimistic(r, advantages, eps_low=eps_low, eps_high=eps_high)
    if dual_clip is not None:
        if not dual_clip > 1:
            raise ValueError(f"dual_clip is {dual_clip}; it must be above 1, or None")
        beyond = (advantages < 0) & (losses > -advantages * dual_clip)
        losses, clipped = jnp.where(beyond, -advantages * dual_clip, losses), clipped | beyond
    return weights * losses, clipped


@masks("mask")
def gspo(
    logps: Float[Array, "B T"],
    *,
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    eps_low: float,
    eps_high: float,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−w · min(s Ã, clip(s, 1 − eps_low, 1 + eps_high) Ã), s_it = sg(s_i) · exp(logp_it − sg(logp_it)).

    s_i = exp((1/T_i) Σ_t (logps − old_logps)) is the response's ratio. Every token's s_it has that value but a gradient
    of its own; under `seq_mean_token_mean` these add up to the gradient of s_i. Advantages may differ between tokens.

    Returns:
      Each token's loss, and where the clip removes its gradient.

    References:
      GSPO (arXiv 2507.18071), eqs. 5-7 and, for the gradient per token, eqs. 13-14.
    """
    logps, old_logps, advantages, weights = _zero_padding(mask, logps, old_logps, advantages, weights)
    response = jax.lax.stop_gradient(masked_mean(logps - old_logps, mask, axis=1))[:, None]
    s = bounded_exp(response + (logps - jax.lax.stop_gradient(logps)))
    losses, clipped = _pessimistic(s, advantages, eps_low=eps_low, eps_high=eps_high)
    return weights * losses, clipped


@masks("mask")
def cispo(
    logps: Float[Array, "B T"],
    *,
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    eps_low: float,
    eps_high: float,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−w · sg(clip(r, 1 − eps_low, 1 + eps_high)) · Ã · logps with r = exp(logps − old_logps).

    Clipping the ratio bounds a token's gradient but never removes it.

    Returns:
      Each token's loss, and where the ratio is clipped.

    References:
      CISPO (MiniMax-M1, arXiv 2506.13585), eqs. 4-5.
    """
    logps, old_logps, advantages, weights = _zero_padding(mask, logps, old_logps, advantages, weights)
    r = jax.lax.stop_gradient(ratio(logps=logps, reference_logps=old_logps))
    bounded = jnp.clip(r, 1 - eps_low, 1 + eps_high)
    return -weights * bounded * advantages * logps, bounded != r


@masks("mask")
def policy_gradient(
    logps: Float[Array, "B T"],
    *,
    advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    **unused: Array,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−w · Ã · logps, REINFORCE; nothing is clipped.

    References:
      Williams (1992), eq. 4.
    """
    logps, advantages, weights = _zero_padding(mask, logps, advantages, weights)
    return -weights * advantages * logps, jnp.zeros(mask.shape, bool)


@masks("mask")
def unit_ratio(
    logps: Float[Array, "B T"],
    *,
    advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    **unused: Array,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−w · Ã · exp(logps − sg(logps)): the value −w · Ã with REINFORCE's gradient; nothing is clipped.

    With w = sg(r), r = exp(logps − any reference), it is −Ã · r, value and gradient.
    """
    logps = zero_outside(logps, mask)
    ones = jnp.exp(logps - jax.lax.stop_gradient(logps))
    return policy_gradient(ones, advantages=advantages, weights=weights, mask=mask)


@masks("mask")
def negative_log_likelihood(
    logps: Float[Array, "B T"], *, weights: Float[Array, "B T"], mask: Bool[Array, "B T"], **unused: Array
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−w · logps, the loss of supervised training as a surrogate; nothing is clipped."""
    logps, weights = _zero_padding(mask, logps, weights)
    return -weights * logps, jnp.zeros(mask.shape, bool)


@masks("mask")
def kl_estimate(
    *, logps: Float[Array, "B T"], reference_logps: Float[Array, "B T"], mask: Bool[Array, "B T"], kind: str
) -> Float[Array, "B T"]:
    """Estimates KL(π‖π_ref) from tokens that π sampled, with x = logps − reference_logps.

    - `k1`: x. Unbiased, but useless as a loss: the mean of its gradient is 0.
    - `k2`: x²/2. Biased, but the mean of its gradient is the KL's gradient.
    - `k3`: exp(−x) − 1 + x ≥ 0, the exponent clamped to ±20. Unbiased.
    - `abs`: |x|.

    Returns:
      Each token's estimate, through which gradients flow; 0 outside the mask.

    Raises:
      ValueError: an unknown kind.

    References:
      J. Schulman, Approximating KL divergence (2020); k3 as a loss in GRPO (arXiv 2402.03300), eq. 4.
    """
    if kind not in KL_ESTIMATORS:
        raise ValueError(f"the KL estimate is {kind!r}; it must be one of {', '.join(KL_ESTIMATORS)}")
    logps, reference_logps = _zero_padding(mask, logps, reference_logps)
    return KL_ESTIMATORS[kind](logps - reference_logps)


KL_ESTIMATORS: dict[str, Callable[[Array], Array]] = {
    "k1": lambda x: x,
    "k2": lambda x: x**2 / 2,
    # both terms are clamped alike, so that beyond the bound neither the value nor the gradient grows
    "k3": lambda x: bounded_exp(-x) - 1 + clamp_log_ratio(x),
    "abs": jnp.abs,
}


def _zero_padding(mask: Array, *arrays: Array) -> tuple[Array, ...]:
    return tuple(zero_outside(x, mask) for x in arrays)


def _pessimistic(r: Array, advantages: Array, *, eps_low: float, eps_high: float) -> tuple[Array, Array]:
    """−min(r Ã, clip(r) Ã), and where the clipped side is the minimum."""
    unclipped, clipped = r * advantages, jnp.clip(r, 1 - eps_low, 1 + eps_high) * advantages
    return -jnp.minimum(unclipped, clipped), clipped < unclipped
