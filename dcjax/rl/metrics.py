"""What a step reports of the gaps between policies: the one that samples, the one that trains, and its own past.

Mismatch is old − rollout, staleness is logps − old: the same figures of two gaps, under names that are kept apart. All
are over response tokens; rows without one are left out of every mean, and without any token everything is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import masks
from dcjax.rl.discrepancy import probability_difference
from dcjax.rl.losses import MAX_LOG_RATIO, bounded_exp
from dcjax.rl.masked import masked_max, masked_mean, response_mean, widen
from dcjax.types import Array

PERCENTILES = (50, 90, 99)
"""Of |p − q| over tokens."""
SMALLEST_DIFFERENCE = 1e-8
"""Lower end of the histogram of |p − q|; what is smaller is float32's rounding, and reported as 0."""
BINS = 1024
"""Of the histogram from SMALLEST_DIFFERENCE to 1, equally wide in the logarithm: neighbours differ by 1.8%."""


@masks("mask")
def mismatch_metrics(
    *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """The gap old − rollout, each metric a scalar of at least float32.

    Everything of `gap_metrics`, with p of `old_logps` and q of `rollout_logps`, and of whole responses
    (log ppl(τ) = −Σ_t log π(y_t), paper B, eqs. 7-8), each a mean over responses:

    - `log_ppl_old`, `log_ppl_rollout`: the two policies' log ppl.
    - `log_ppl_abs_diff`: |log ppl_old − log ppl_rollout|.
    - `log_ppl_old_per_token`, `log_ppl_rollout_per_token`, `log_ppl_abs_diff_per_token`: the same with each response's
      figure divided by its length (verl's).

    Args:
      old_logps: log-probs of the sampled tokens under the training backend at the rollout's weights.
      rollout_logps: log-probs that the serving engine sampled them with.
      mask: response tokens.
    """
    old_logps, rollout_logps = _visible(old_logps, mask), _visible(rollout_logps, mask)
    lengths, rows = jnp.maximum(jnp.sum(mask, axis=1), 1), jnp.any(mask, axis=1)
    whole = {
        "log_ppl_old": -jnp.sum(old_logps, axis=1),
        "log_ppl_rollout": -jnp.sum(rollout_logps, axis=1),
        # summed as a difference: the two sums share nearly all of their digits
        "log_ppl_abs_diff": jnp.abs(jnp.sum(old_logps - rollout_logps, axis=1)),
    }
    return gap_metrics(logps=old_logps, reference_logps=rollout_logps, mask=mask) | {
        **{name: masked_mean(responses, rows) for name, responses in whole.items()},
        **{f"{name}_per_token": masked_mean(responses / lengths, rows) for name, responses in whole.items()},
    }


@masks("mask")
def staleness_metrics(
    *, logps: Float[Array, "B T"], old_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """The gap logps − old, opened by an iteration's own updates: `gap_metrics` with p of `logps` and q of `old_logps`.

    Args:
      logps: log-probs under the policy at each minibatch's turn.
      old_logps: as in `mismatch_metrics`.
      mask: response tokens.
    """
    return gap_metrics(logps=logps, reference_logps=old_logps, mask=mask)


@masks("mask")
def gap_metrics(
    *, logps: Float[Array, "B T"], reference_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """How far p is from q, of which the tokens are thought to be samples; ρ = p/q, log ρ clamped to ±20.

    Of staleness the tokens are samples of neither: its k1, k3, χ² and ess are estimates only up to the mismatch.

    - `prob_diff_mean`, `prob_diff_max`: of |p − q| over tokens.
    - `prob_diff_p50`, `prob_diff_p90`, `prob_diff_p99`: its quantiles, by `log_quantiles`.
    - `log_diff_mean`: of |log p − log q| over tokens.
    - `k1`, `k3`: estimates of KL(q‖p): −log ρ and ρ − 1 − log ρ with that log not clamped; token means.
    - `chi2_token`: mean ρ² − 1 over tokens. `chi2_sequence`: the same over responses with ρ = Π_t ρ_t.
    - `ess`: effective share of the tokens as samples of p, (Σρ)² / (n Σρ²), in (0, 1].
    - `tv`: total variation, ½ mean |ρ − 1|. `tv_pinsker`: its bound √(k3 / 2).

    Args:
      logps: log p of the sampled tokens.
      reference_logps: log q of them.
      mask: response tokens.
    """
    logps, reference_logps = _visible(logps, mask), _visible(reference_logps, mask)
    difference = probability_difference(old_logps=logps, rollout_logps=reference_logps)
    log_ratio = logps - reference_logps
    # ρ − 1, which ρ rounded to 1 ± 1e-7 would not give
    excess = jnp.expm1(_clamped(log_ratio))
    k3, largest = masked_mean(excess - log_ratio, mask), masked_max(difference, mask)
    quantiles = jnp.minimum(log_quantiles(difference, mask), largest)
    return {
        "prob_diff_mean": masked_mean(difference, mask),
        "prob_diff_max": largest,
        **{f"prob_diff_p{percent}": value for percent, value in zip(PERCENTILES, quantiles, strict=True)},
        "log_diff_mean": masked_mean(jnp.abs(log_ratio), mask),
        "k1": -masked_mean(log_ratio, mask),
        "k3": k3,
        # ρ² − 1 = (ρ − 1)² + 2 (ρ − 1)
        "chi2_token": masked_mean(jnp.square(excess) + 2 * excess, mask),
        "chi2_sequence": masked_mean(jnp.expm1(2 * _clamped(jnp.sum(log_ratio, axis=1))), jnp.any(mask, axis=1)),
        "ess": _effective_share(bounded_exp(log_ratio), mask),
        "tv": masked_mean(jnp.abs(excess), mask) / 2,
        # a mean of roundings may be below 0
        "tv_pinsker": jnp.sqrt(jnp.maximum(k3, 0) / 2),
    }


@masks("mask")
def budget_metrics(
    *,
    discrepancy: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    budget: Float[Array, ""] | float,
    average: Callable[[Array, Array], Array] = response_mean,
) -> dict[str, Float[Array, ""]]:
    """Where δ stands against its budget c.

    - `discrepancy`: δ̄. `excess`: δ̄ − c, what λ's ascent follows.
    - `over_budget_fraction`: tokens with δ > c.

    Args:
      discrepancy: δ, in whatever unit the budget has.
      mask: response tokens.
      budget: c.
      average: δ and mask to δ̄: `response_mean` (paper A), or `masked_mean` over tokens.
    """
    mean = average(discrepancy, mask)
    over = (discrepancy > budget).astype(mean.dtype)
    return {"discrepancy": mean, "excess": mean - budget, "over_budget_fraction": masked_mean(over, mask)}


@masks("mask")
def log_quantiles(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "quantiles"]:
    """The PERCENTILES of x in [0, 1] over True entries, from a histogram of BINS bins with logarithmic edges.

    Each is the middle of the bin that holds the ⌈percent · n / 100⌉-th smallest entry, so at most .9% from that entry;
    0 where it is below SMALLEST_DIFFERENCE or there are no entries. A histogram adds up over devices and needs no sort.
    """
    density = BINS / -math.log(SMALLEST_DIFFERENCE)
    seen = mask & (x >= SMALLEST_DIFFERENCE)
    above = jnp.log(jnp.where(seen, x, SMALLEST_DIFFERENCE) / SMALLEST_DIFFERENCE)
    # bin 0 is of what is smaller
    bins = jnp.where(seen, jnp.clip(1 + jnp.floor(above * density), 1, BINS), 0).astype(jnp.int32)
    counts = jnp.zeros(BINS + 1, jnp.int32).at[bins.reshape(-1)].add(mask.reshape(-1).astype(jnp.int32))
    cumulative = jnp.cumsum(counts)
    hundreds, rest = jnp.divmod(cumulative[-1], 100)
    # in whole numbers, and such that they stay within int32
    needed = [hundreds * percent + (rest * percent + 99) // 100 for percent in PERCENTILES]
    found = jnp.searchsorted(cumulative, jnp.stack(needed))
    middles = SMALLEST_DIFFERENCE * jnp.exp((jnp.arange(1, BINS + 1) - 0.5) / density)
    return jnp.concatenate([jnp.zeros(1), middles])[found].astype(x.dtype)


def _effective_share(weights: Array, mask: Array) -> Array:
    # the least mean square is e⁻⁴⁰, so that only no token at all gives 0 over 0
    return jnp.square(masked_mean(weights, mask)) / jnp.where(jnp.any(mask), masked_mean(jnp.square(weights), mask), 1)


def _visible(logps: Array, mask: Array) -> Array:
    return jnp.where(mask, widen(logps), 0)


def _clamped(log_ratio: Array) -> Array:
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
