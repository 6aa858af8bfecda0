"""Importance weights π_old/μ: what sampling with the serving engine's numerics is corrected by (paper B, §2.1).

Weights are multiplied into the loss under stop-gradient. None of these changes which tokens count: a weight of 0 takes
a token out of the sum and leaves it in the denominator. Rejection that edits the mask is verl's, in `verl`.
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
    """log ρ under stop-gradient, not clamped: a token's own, or its response's in all of its columns.

    Args:
      old_logps: of the training backend at the rollout's weights.
      rollout_logps: of the serving engine.
      mask: response tokens.
      level: `token`: x_t = old − rollout; `sequence`: Σ_t x_t; `geometric`: (1/T_i) Σ_t x_t, each over response tokens.

    Returns:
      0 outside the mask at the token level, and in rows without a token.

    Raises:
      ValueError: a level of another name.
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
    """ρ = exp(log ρ), log ρ as in `log_importance` and clamped to ±20; 0 outside the mask."""
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
    """TIS: w = min(ρ, C), under stop-gradient; 0 outside the mask.

    Args:
      old_logps: of the training backend at the rollout's weights.
      rollout_logps: of the serving engine.
      mask: response tokens.
      clip_max: C, above 0.
      level: ρ of each `token`, of the response (`sequence`: the product), or its `geometric` mean by token.

    Raises:
      ValueError: a bound that is not above 0, or a level of another name.

    References:
      Paper B (arXiv 2602.01826), §2.1.
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
    """MIS: w = ρ · 1[ρ ≤ C], under stop-gradient; 0 outside the mask. The denominator keeps the tokens of weight 0.

    Args:
      old_logps: of the training backend at the rollout's weights.
      rollout_logps: of the serving engine.
      mask: response tokens.
      clip_max: C, above 0.
      level: ρ of each `token`, of the response (`sequence`: the product), or its `geometric` mean by token.

    Raises:
      ValueError: a bound that is not above 0, or a level of another name.

    References:
      Paper B (arXiv 2602.01826), §2.1.
    """
    _check_clip(clip_max)
    ratios = importance_ratios(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, level=level)
    return _within(ratios, 0.0, clip_max)


@masks("mask")
def icepop_weights(
    *,
    old_logps: Float[Array, "B T"],
    rollout_logps: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    low: float,
    high: float,
) -> Float[Array, "B T"]:
    """w_t = ρ_t · 1[low ≤ ρ_t ≤ high], under stop-gradient; 0 outside the mask. The denominator keeps every token.

    Raises:
      ValueError: bounds out of order, or a negative one.

    References:
      IcePop (Ring-1T, arXiv 2510.18855); its bounds are 0.5 and 5.
    """
    _check_bounds(low, high)
    ratios = importance_ratios(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, level="token")
    return _within(ratios, low, high)


def token_tis(clip_max: float) -> LossTransform:
    """Multiplies each token's weight by min(ρ_t, C). Metric, by row: the share of its tokens with ρ_t > C."""
    return _truncate("token", clip_max)


def sequence_tis(clip_max: float) -> LossTransform:
    """Multiplies each response's weights by min(Π_t ρ_t, C). Metric, by row: 1 where Π_t ρ_t > C."""
    return _truncate("sequence", clip_max)


def geometric_tis(clip_max: float) -> LossTransform:
    """Multiplies each response's weights by min((Π_t ρ_t)^(1/T), C). Metric, by row: 1 where that was above C."""
    return _truncate("geometric", clip_max)


def token_mis(clip_max: float) -> LossTransform:
    """Multiplies each token's weight by ρ_t · 1[ρ_t ≤ C]. Metric, by row: the share of its tokens with ρ_t > C."""
    return _cut_above("token", clip_max)


def sequence_mis(clip_max: float) -> LossTransform:
    """Multiplies each response's weights by ρ · 1[ρ ≤ C], ρ = Π_t ρ_t. Metric, by row: 1 where ρ > C."""
    return _cut_above("sequence", clip_max)


def geometric_mis(clip_max: float) -> LossTransform:
    """Multiplies each response's weights by ρ · 1[ρ ≤ C], ρ = (Π_t ρ_t)^(1/T). Metric, by row: 1 where ρ > C."""
    return _cut_above("geometric", clip_max)


def icepop_mask(low: float, high: float) -> LossTransform:
    """Multiplies each token's weight by ρ_t · 1[low ≤ ρ_t ≤ high]. Metric, by row: the share of its tokens outside."""
    _check_bounds(low, high)
    return _reweight("icepop", "token", lambda ratios: _within(ratios, low, high))


def _truncate(level: str, clip_max: float) -> LossTransform:
    _check_clip(clip_max)
    return _reweight(f"{level}_tis", level, lambda ratios: jnp.minimum(ratios, clip_max))


def _cut_above(level: str, clip_max: float) -> LossTransform:
    _check_clip(clip_max)
    return _reweight(f"{level}_mis", level, lambda ratios: _within(ratios, 0.0, clip_max))


def _reweight(name: str, level: str, bounded: Callable[[Array], Array]) -> LossTransform:
    """A response's ratio is of all its tokens, whatever transforms before this one took out of the loss."""

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


def _within(ratios: Array, low: float, high: float) -> Array:
    return jnp.where((ratios >= low) & (ratios <= high), ratios, 0)


def _check_clip(clip_max: float) -> None:
    if not clip_max > 0:
        raise ValueError(f"clip_max is {clip_max}; it must be above 0")


def _check_bounds(low: float, high: float) -> None:
    if not 0 <= low < high:
        raise ValueError(f"the bounds are {low} and {high}; the lower must be at least 0 and below the upper")
