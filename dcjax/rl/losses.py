"""Policy surrogates: a loss for each token, which an aggregation of `masked` then sums and counts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import masks
from dcjax.rl.masked import masked_mean, widen
from dcjax.types import Array

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before any exponential, as verl does."""

Surrogate = Callable[..., tuple[Array, Array]]
"""(logps, *, old_logps, advantages, weights, mask), all [B, T], -> losses, 0 outside the mask, and where it clipped."""


def ratio(*, logps: Float[Array, "B T"], reference_logps: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """exp(logps − reference_logps), the difference clamped to ±20."""
    return bounded_exp(widen(logps) - reference_logps)


def bounded_exp(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """exp of a log-ratio clamped to ±20."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


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
      logps: of the policy being differentiated.
      old_logps: of the policy before the iteration's updates.
      advantages: Ã.
      weights: w, importance weights.
      mask: tokens that count.
      eps_low: how far r may fall below 1.
      eps_high: how far r may rise above 1.
      dual_clip: c: where Ã < 0, the loss before weighting is at most −Ã·c. None leaves it unbounded.

    Returns:
      Each token's loss, and where a clip took the gradient away.

    Raises:
      ValueError: a dual clip that is not above 1.

    References:
      PPO (arXiv 1707.06347), eq. 7; asymmetric bounds from DAPO (arXiv 2503.14476), eq. 10; dual clip from
      arXiv 1912.09729, eq. 5.
    """
    logps, old_logps, advantages, weights = _shown(mask, logps, old_logps, advantages, weights)
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

    s_i = exp((1/T_i) Σ_t (logps − old_logps)) is the response's ratio: every token has its value, and a gradient of its
    own, which under `seq_mean_token_mean` adds up to that of s_i. Advantages may differ between tokens.

    Returns:
      Each token's loss, and where the clip took the gradient away.

    References:
      GSPO (arXiv 2507.18071), eqs. 5-7 and, for the gradient by token, eqs. 13-14.
    """
    logps, old_logps, advantages, weights = _shown(mask, logps, old_logps, advantages, weights)
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

    A ratio that is clipped bounds a token's gradient, and takes none away.

    Returns:
      Each token's loss, and where the ratio was clipped.

    References:
      CISPO (MiniMax-M1, arXiv 2506.13585), eqs. 4-5.
    """
    logps, old_logps, advantages, weights = _shown(mask, logps, old_logps, advantages, weights)
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
    """−w · Ã · logps: REINFORCE, which clips nothing.

    References:
      Williams (1992), eq. 4.
    """
    logps, advantages, weights = _shown(mask, logps, advantages, weights)
    return -weights * advantages * logps, jnp.zeros(mask.shape, bool)


@masks("mask")
def negative_log_likelihood(
    logps: Float[Array, "B T"], *, weights: Float[Array, "B T"], mask: Bool[Array, "B T"], **unused: Array
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """−w · log π: the surrogate of supervised training, which clips nothing."""
    logps, weights = _shown(mask, logps, weights)
    return -weights * logps, jnp.zeros(mask.shape, bool)


@masks("mask")
def kl_estimate(
    *, logps: Float[Array, "B T"], reference_logps: Float[Array, "B T"], mask: Bool[Array, "B T"], kind: str
) -> Float[Array, "B T"]:
    """Estimates KL(π‖π_ref) from tokens that π sampled; x = logps − reference_logps.

    - `k1`: x. Unbiased; as a loss its gradient says nothing, its mean being 0.
    - `k2`: x²/2. Biased; its gradient is the KL's.
    - `k3`: exp(−x) − 1 + x ≥ 0, the exponent clamped to ±20. Unbiased.
    - `abs`: |x|.

    Returns:
      Each token's estimate, with its gradient; 0 outside the mask.

    Raises:
      ValueError: a kind of another name.

    References:
      J. Schulman, Approximating KL divergence (2020); k3 as a loss in GRPO (arXiv 2402.03300), eq. 4.
    """
    if kind not in KL_ESTIMATORS:
        raise ValueError(f"the KL estimate is {kind!r}; it must be one of {', '.join(KL_ESTIMATORS)}")
    logps, reference_logps = _shown(mask, logps, reference_logps)
    return KL_ESTIMATORS[kind](logps - reference_logps)


KL_ESTIMATORS: dict[str, Callable[[Array], Array]] = {
    "k1": lambda x: x,
    "k2": lambda x: x**2 / 2,
    # one clamp for both terms: past it neither value nor gradient grows
    "k3": lambda x: bounded_exp(-x) - 1 + jnp.clip(x, -MAX_LOG_RATIO, MAX_LOG_RATIO),
    "abs": jnp.abs,
}


def _shown(mask: Array, *arrays: Array) -> tuple[Array, ...]:
    # hidden before anything is computed: behind the sum's mask, 0 · NaN would still reach the gradient
    return tuple(jnp.where(mask, widen(x), 0) for x in arrays)


def _pessimistic(r: Array, advantages: Array, *, eps_low: float, eps_high: float) -> tuple[Array, Array]:
    """−min(r Ã, clip(r) Ã), and where the clip decided."""
    free, clipped = r * advantages, jnp.clip(r, 1 - eps_low, 1 + eps_high) * advantages
    return -jnp.minimum(free, clipped), clipped < free
