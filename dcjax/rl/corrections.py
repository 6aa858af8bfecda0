"""Importance weights π_old/μ, which correct for sampling with the serving engine's numerics (paper B, §2.1).

Weights are multiplied into the loss under stop-gradient. They do not change which tokens count: a token of weight 0 is
out of the loss's sum but still in its denominator. Rejection sampling that edits the mask is verl's, in `verl`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import masks
from dcjax.rl.losses import bounded_exp
from dcjax.rl.masked import masked_mean, masked_sum, widen
from dcjax.rl.transforms import Context, LossTransform, Terms
from dcjax.types import Array


@masks("mask")
def log_importance(
    *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"], mask: Bool[Array, "B T"], level: str
) -> Float[Array, "B T"]:
    """log ρ under stop-gradient, not clamped: of each token, or of its response, which all of its tokens then have.

    Args:
      old_logps: log-probs of the training backend at the rollout's weights.
      rollout_logps: log-probs of the serving engine.
      mask: response tokens.
      level: `token`: x_t = old − rollout; `sequence`: Σ_t x_t; `geometric`: (1/T_i) Σ_t x_t; sums are over the
        response's tokens.

    Returns:
      log ρ; 0 in rows without a token and, at the token level, outside the mask.

    Raises:
      ValueError: an unknown level.
    """
    log_ratio = jax.lax.stop_gradient(jnp.where(mask, widen(old_logps) - rollout_logps, 0))
    if level == "token":
        return log_ratio
    if level not in ("sequence", "geometric"):
        raise ValueError(f"level is {level!r}; it must be token, sequence or geometric")
    reduce = masked_sum if level == "sequence" else masked_mean
    return jnp.broadcast_to(reduce(log_ratio, mask, axis=1)[:, None], mask.shape)


@masks("mask")
def importance_ratios(
    *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"], mask: Bool[Array, "B T"], level: str
) -> Float[Array, "B T"]:
    """ρ, the exponential of `log_importance` clamped to ±20; 0 outside the mask."""
    log_ratio = log_importance(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, level=level)
    return jnp.where(mask, bounded_exp(log_ratio), 0)


@masks("mask")
def truncated_importance_weights(
    *,
    old_logps: Float[Array, "B T"],
    rollout_logps: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip_max: float,
    level: str = "token",
) -> Float[Array, "B T"]:
    """Truncated importance sampling (TIS): w = min(ρ, C), under stop-gradient; 0 outside the mask.

    Args:
      old_logps: log-probs of the training backend at the rollout's weights.
      rollout_logps: log-probs of the serving engine.
      mask: response tokens.
      clip_max: C, above 0.
      level: whether ρ is of each `token`, the response's product of them (`sequence`), or their `geometric` mean.

    Raises:
      ValueError: a bound that is not above 0, or an unknown level.

    References:
      Paper B (arXiv 2602.01826), §2.1.

    Examples:
      The training policy gives the first token twice the probability that it was sampled with, and the second token
      half of it; the third is padding:

      >>> old_logps, rollout_logps = jnp.log(jnp.array([[[0.8, 0.2, 0.5]], [[0.4, 0.4, 0.5]]]))
      >>> gap = {"old_logps": old_logps, "rollout_logps": rollout_logps, "mask": jnp.array([[True, True, False]])}
      >>> [round(weight, 3) for weight in truncated_importance_weights(**gap, clip_max=1.5)[0].tolist()]
      [1.5, 0.5, 0.0]

      Over the whole response the two ratios cancel:

      >>> weights = truncated_importance_weights(**gap, clip_max=1.5, level="sequence")
      >>> [round(weight, 3) for weight in weights[0].tolist()]
      [1.0, 1.0, 0.0]
    """
    _check_clip(clip_max)
    ratios = importance_ratios(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, level=level)
    return jnp.minimum(ratios, clip_max)


@masks("mask")
def masked_importance_weights(
    *,
    old_logps: Float[Array, "B T"],
    rollout_logps: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip_max: float,
    level: str = "token",
) -> Float[Array, "B T"]:
    """Masked importance sampling (MIS): w = ρ · 1[ρ ≤ C], under stop-gradient; 0 outside the mask.

    Tokens of weight 0 still count in the loss's denominator.

    Args:
      old_logps: log-probs of the training backend at the rollout's weights.
      rollout_logps: log-probs of the serving engine.
      mask: response tokens.
      clip_max: C, above 0.
      level: whether ρ is of each `token`, the response's product of them (`sequence`), or their `geometric` mean.

    Raises:
      ValueError: a bound that is not above 0, or an unknown level.

    References:
      Paper B (arXiv 2602.01826), §2.1.

    Examples:
      The training policy gives the first token twice the probability that it was sampled with, and the second token
      half of it; the third is padding:

      >>> old_logps, rollout_logps = jnp.log(jnp.array([[[0.8, 0.2, 0.5]], [[0.4, 0.4, 0.5]]]))
      >>> gap = {"old_logps": old_logps, "rollout_logps": rollout_logps, "mask": jnp.array([[True, True, False]])}
      >>> [round(weight, 3) for weight in masked_importance_weights(**gap, clip_max=1.5)[0].tolist()]
      [0.0, 0.5, 0.0]
    """
    _check_clip(clip_max)
    ratios = importance_ratios(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, level=level)
    return _zero_unless_within(ratios, 0.0, clip_max)


@masks("mask")
def icepop_weights(
    *,
    old_logps: Float[Array, "B T"],
    rollout_logps: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    low: float,
    high: float,
) -> Float[Array, "B T"]:
    """IcePop: w_t = ρ_t · 1[low ≤ ρ_t ≤ high], under stop-gradient; 0 outside the mask.

    Tokens of weight 0 still count in the loss's denominator.

    Raises:
      ValueError: a negative bound, or bounds out of order.

    References:
      IcePop (Ring-1T, arXiv 2510.18855); its bounds are 0.5 and 5.
    """
    check_bounds(low, high)
    ratios = importance_ratios(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, level="token")
    return _zero_unless_within(ratios, low, high)


def token_tis(clip_max: float) -> LossTransform:
    """Multiplies each token's weight by min(ρ_t, C). Per-row metric: the share of its tokens with ρ_t > C."""
    return _truncate("token", clip_max)


def sequence_tis(clip_max: float) -> LossTransform:
    """Multiplies each response's weights by min(Π_t ρ_t, C). Per-row metric: 1 where Π_t ρ_t > C."""
    return _truncate("sequence", clip_max)


def geometric_tis(clip_max: float) -> LossTransform:
    """Multiplies each response's weights by min((Π_t ρ_t)^(1/T), C). Per-row metric: 1 where that mean is above C."""
    return _truncate("geometric", clip_max)


def token_mis(clip_max: float) -> LossTransform:
    """Multiplies each token's weight by ρ_t · 1[ρ_t ≤ C]. Per-row metric: the share of its tokens with ρ_t > C."""
    return _mask_above("token", clip_max)


def sequence_mis(clip_max: float) -> LossTransform:
    """Multiplies each response's weights by ρ · 1[ρ ≤ C], ρ = Π_t ρ_t. Per-row metric: 1 where ρ > C."""
    return _mask_above("sequence", clip_max)


def geometric_mis(clip_max: float) -> LossTransform:
    """Multiplies each response's weights by ρ · 1[ρ ≤ C], ρ = (Π_t ρ_t)^(1/T). Per-row metric: 1 where ρ > C."""
    return _mask_above("geometric", clip_max)


def icepop_mask(low: float, high: float) -> LossTransform:
    """Multiplies each token's weight by ρ_t · 1[low ≤ ρ_t ≤ high]. Per-row metric: the share of tokens outside."""
    check_bounds(low, high)
    return _reweight("icepop", "token", lambda ratios: _zero_unless_within(ratios, low, high))


@masks("mask")
def reweight_kept(terms: Terms, mask: Array, name: str, *, kept: Array, weights: Array) -> Terms:
    """Multiplies weights by `weights` where `kept`, and by 0 elsewhere. Per-row metric: the share of tokens dropped.

    Args:
      terms: as they stand.
      mask: response tokens.
      name: of the metric, `name/dropped_fraction`.
      kept: bool, broadcast to [B, T].
      weights: w, broadcast to [B, T]; nothing of it is differentiated.
    """
    kept = jnp.broadcast_to(kept, mask.shape)
    weights = jnp.where(kept, jax.lax.stop_gradient(weights), 0)
    metrics = {**terms.metrics, f"{name}/dropped_fraction": masked_mean((~kept).astype(jnp.float32), mask, axis=1)}
    return dataclasses.replace(terms, weights=terms.weights * weights, metrics=metrics)


def _truncate(level: str, clip_max: float) -> LossTransform:
    _check_clip(clip_max)
    return _reweight(f"{level}_tis", level, lambda ratios: jnp.minimum(ratios, clip_max))


def _mask_above(level: str, clip_max: float) -> LossTransform:
    _check_clip(clip_max)
    return _reweight(f"{level}_mis", level, lambda ratios: _zero_unless_within(ratios, 0.0, clip_max))


def _reweight(name: str, level: str, bounded: Callable[[Array], Array]) -> LossTransform:
    """Multiplies weights by `bounded(ρ)`. A response's ρ is over all its tokens, even those no longer in the loss."""

    def apply(terms: Terms, context: Context) -> Terms:
        batch = context.batch
        mask = batch.response_mask
        ratios = importance_ratios(
            old_logps=context.old_logps, rollout_logps=batch.rollout_logps, mask=mask, level=level
        )
        weights = bounded(ratios)
        clipped = masked_mean((weights != ratios).astype(jnp.float32), mask, axis=1)
        metrics = {**terms.metrics, f"{name}/clipped_fraction": clipped}
        return dataclasses.replace(terms, weights=terms.weights * weights, metrics=metrics)

    return apply


def _zero_unless_within(ratios: Array, low: float, high: float) -> Array:
    return jnp.where((ratios >= low) & (ratios <= high), ratios, 0)


def _check_clip(clip_max: float) -> None:
    if not clip_max > 0:
        raise ValueError(f"clip_max is {clip_max}; it must be above 0")


def check_bounds(low: float, high: float) -> None:
    """Raises ValueError unless the bounds of a ratio are at least 0 and in order."""
    if not 0 <= low < high:
        raise ValueError(f"the bounds are {low} and {high}; the lower must be at least 0 and below the upper")
