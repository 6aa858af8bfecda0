"""What a step reports of the gaps between the policy that samples, the one that trains, and its own earlier self.

The mismatch is the gap old − rollout and the staleness is the gap logps − old. Both have the same metrics, under
different names. All are over response tokens; rows without a token are left out of every mean, and with no token at
all every metric is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import masks
from dcjax.rl.discrepancy import probability_difference
from dcjax.rl.losses import bounded_exp, clamp_log_ratio
from dcjax.rl.masked import masked_max, masked_mean, response_mean, zero_outside
from dcjax.types import Array

PERCENTILES = (50, 90, 99)
"""The percentiles of |p − q| over tokens that are reported."""
SMALLEST_DIFFERENCE = 1e-8
"""Lower end of the histogram of |p − q|. Smaller differences are float32's rounding, and are reported as 0."""
BAND = (0.999, 1.002)
"""Bounds of ρ that NeMo-RL (ProRL v2.1) puts on a response's geometric mean."""
BINS = 1024
"""Bins of the histogram from SMALLEST_DIFFERENCE to 1, equally wide in the logarithm: neighbours differ by 1.8%."""


@masks("mask")
def mismatch_metrics(
    *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """Metrics of the gap old − rollout, each a scalar of at least float32.

    They are those of `gap_metrics`, with p of `old_logps` and q of `rollout_logps`, and the following of the perplexity
    of whole responses (log ppl(τ) = −Σ_t log π(y_t), paper B, eqs. 7-8), each a mean over responses:

    - `log_ppl_old`, `log_ppl_rollout`: log ppl of the two policies.
    - `log_ppl_abs_diff`: |log ppl_old − log ppl_rollout|.
    - `log_ppl_old_per_token`, `log_ppl_rollout_per_token`, `log_ppl_abs_diff_per_token`: the same with each response's
      figure divided by its length (verl's).

    Args:
      old_logps: log-probs of the sampled tokens under the training backend at the rollout's weights.
      rollout_logps: log-probs that the serving engine sampled them with.
      mask: response tokens.

    Examples:
      >>> old_logps, rollout_logps = jnp.log(jnp.array([[[0.5, 0.9, 0.3]], [[0.4, 0.8, 0.8]]]))
      >>> mask = jnp.array([[True, True, False]])
      >>> metrics = mismatch_metrics(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask)
      >>> {name: round(float(metrics[name]), 4) for name in ("prob_diff_mean", "prob_diff_max", "k3", "ess")}
      {'prob_diff_mean': 0.1, 'prob_diff_max': 0.1, 'k3': 0.017, 'ess': 0.9972}
    """
    old_logps, rollout_logps = zero_outside(old_logps, mask), zero_outside(rollout_logps, mask)
    lengths, rows = jnp.maximum(jnp.sum(mask, axis=1), 1), jnp.any(mask, axis=1)
    whole = {
        "log_ppl_old": -jnp.sum(old_logps, axis=1),
        "log_ppl_rollout": -jnp.sum(rollout_logps, axis=1),
        # differences are summed, not sums subtracted: the two sums share nearly all of their digits
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
    """Metrics of the gap logps − old, which an iteration's own updates open: `gap_metrics` of `logps` and `old_logps`.

    Args:
      logps: log-probs under the policy that each minibatch's update began with.
      old_logps: as in `mismatch_metrics`.
      mask: response tokens.
    """
    return gap_metrics(logps=logps, reference_logps=old_logps, mask=mask)


@masks("mask")
def gap_metrics(
    *, logps: Float[Array, "B T"], reference_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """How far p is from q, where the tokens are assumed to be samples of q; ρ = p/q, log ρ clamped to ±20.

    For staleness they are samples of neither policy: its k1, k3, χ² and ess are estimates only up to the mismatch.

    - `prob_diff_mean`, `prob_diff_max`: of |p − q| over tokens.
    - `prob_diff_p50`, `prob_diff_p90`, `prob_diff_p99`: percentiles of |p − q| over tokens, by `log_quantiles`.
    - `log_diff_mean`: of |log p − log q| over tokens.
    - `k1`, `k3`: estimates of KL(q‖p), the means over tokens of −log ρ and ρ − 1 − log ρ, their log ρ not clamped.
    - `chi2_token`: mean ρ² − 1 over tokens. `chi2_sequence`: the same over responses with ρ = Π_t ρ_t.
    - `ess`: effective sample size for p as a share of the n tokens, (Σρ)² / (n Σρ²), in (0, 1].
    - `tv`: total variation, ½ mean |ρ − 1| over tokens. `tv_pinsker`: its bound √(k3 / 2).
    - `ratio_in_band`: share of tokens with .999 ≤ ρ ≤ 1.002. `response_ratio_in_band`: share of responses of whose
      tokens' ρ the geometric mean is so. `ratio_within_1_percent`, `ratio_within_5_percent`: share of tokens with
      |ρ − 1| ≤ .01 and .05.
    - `ess_sequence`: `sequence_ess` of the responses.

    Args:
      logps: log p of the sampled tokens.
      reference_logps: log q of the sampled tokens.
      mask: response tokens.
    """
    logps, reference_logps = zero_outside(logps, mask), zero_outside(reference_logps, mask)
    difference = probability_difference(old_logps=logps, rollout_logps=reference_logps)
    log_ratio = logps - reference_logps
    # ρ − 1, with the digits that are lost when ρ is rounded
    excess = jnp.expm1(clamp_log_ratio(log_ratio))
    k3, largest = masked_mean(excess - log_ratio, mask), masked_max(difference, mask)
    rows, sums = jnp.any(mask, axis=1), jnp.sum(log_ratio, axis=1)
    mean_excess = jnp.expm1(clamp_log_ratio(sums / jnp.maximum(jnp.sum(mask, axis=1), 1)))
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
        "chi2_sequence": masked_mean(jnp.expm1(2 * clamp_log_ratio(sums)), rows),
        "ess": _effective_sample_share(bounded_exp(log_ratio), mask),
        "tv": masked_mean(jnp.abs(excess), mask) / 2,
        # rounding may take the mean below 0
        "tv_pinsker": jnp.sqrt(jnp.maximum(k3, 0) / 2),
        "ratio_in_band": _share_within(excess, *BAND, mask),
        "ratio_within_1_percent": _share_within(excess, 0.99, 1.01, mask),
        "ratio_within_5_percent": _share_within(excess, 0.95, 1.05, mask),
        "response_ratio_in_band": _share_within(mean_excess, *BAND, rows),
        "ess_sequence": _sequence_ess(sums, rows),
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
      discrepancy: δ, in the unit of the budget.
      mask: response tokens.
      budget: c.
      average: (δ, mask) -> δ̄: `response_mean` (paper A), or `masked_mean` over tokens.
    """
    mean = average(discrepancy, mask)
    over = (discrepancy > budget).astype(mean.dtype)
    return {"discrepancy": mean, "excess": mean - budget, "over_budget_fraction": masked_mean(over, mask)}


@masks("mask")
def log_quantiles(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "quantiles"]:
    """The PERCENTILES of x in [0, 1] over True entries, from a histogram of BINS bins with logarithmic edges.

    Each is the middle of the bin that holds the ⌈percent · n / 100⌉-th smallest entry, and so at most .9% from that
    entry. It is 0 where that entry is below SMALLEST_DIFFERENCE, or where there are no entries. Unlike sorting, a
    histogram only needs a sum over devices.
    """
    density = BINS / -math.log(SMALLEST_DIFFERENCE)
    seen = mask & (x >= SMALLEST_DIFFERENCE)
    above = jnp.log(jnp.where(seen, x, SMALLEST_DIFFERENCE) / SMALLEST_DIFFERENCE)
    # bin 0 holds what is smaller than SMALLEST_DIFFERENCE
    bins = jnp.where(seen, jnp.clip(1 + jnp.floor(above * density), 1, BINS), 0).astype(jnp.int32)
    counts = jnp.zeros(BINS + 1, jnp.int32).at[bins.reshape(-1)].add(mask.reshape(-1).astype(jnp.int32))
    cumulative = jnp.cumsum(counts)
    hundreds, rest = jnp.divmod(cumulative[-1], 100)
    # ⌈percent · n / 100⌉ in integers that do not overflow int32
    needed = [hundreds * percent + (rest * percent + 99) // 100 for percent in PERCENTILES]
    found = jnp.searchsorted(cumulative, jnp.stack(needed))
    middles = SMALLEST_DIFFERENCE * jnp.exp((jnp.arange(1, BINS + 1) - 0.5) / density)
    return jnp.concatenate([jnp.zeros(1), middles])[found].astype(x.dtype)


@masks("mask")
def sequence_ess(
    *, logps: Float[Array, "B T"], reference_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Effective sample size of whole responses as a share of them: (Σw)² / (B Σw²), w_i = Π_t p/q, not clamped.

    B counts the responses that have a token. From 1/B, where one response outweighs all others, to 1, where all weigh
    the same, whatever they weigh; 0 without a token.

    References:
      VCPO (arXiv 2602.17616), §3.2, where it is ρ_ess = ESS / B.
    """
    log_ratio = zero_outside(logps, mask) - zero_outside(reference_logps, mask)
    return _sequence_ess(jnp.sum(log_ratio, axis=1), jnp.any(mask, axis=1))


@masks("mask")
def sign_skew(
    logps: Float[Array, "B T"],
    references: Mapping[str, Float[Array, "B T"]],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> dict[str, Float[Array, "B"]]:
    """What r ≠ 1 adds to the loss −rÃ, by the sign of Ã: sums of −(r − 1)Ã over each response's tokens.

    Args:
      logps: log p at the parameters of the update.
      references: log q by name; r = p/q, log r clamped to ±20.
      advantages: Ã.
      mask: response tokens.

    Returns:
      `NAME_positive` and `NAME_negative` of each reference: of the tokens with Ã > 0, and with Ã < 0.

    References:
      VeXact (arXiv 2605.14220), eq. 5, whose C(r) it sums.
    """
    sums: dict[str, Array] = {}
    for name, reference_logps in references.items():
        log_ratio = zero_outside(logps, mask) - zero_outside(reference_logps, mask)
        added = -jnp.expm1(clamp_log_ratio(log_ratio)) * advantages
        sums[f"{name}_positive"] = jnp.sum(jnp.where(advantages > 0, added, 0), axis=1)
        sums[f"{name}_negative"] = jnp.sum(jnp.where(advantages < 0, added, 0), axis=1)
    return sums


def _share_within(excess: Array, low: float, high: float, mask: Array) -> Array:
    """The share with low ≤ ρ ≤ high, of ρ − 1."""
    return masked_mean(((excess >= low - 1) & (excess <= high - 1)).astype(excess.dtype), mask)


def _sequence_ess(log_weights: Array, rows: Array) -> Array:
    largest = jnp.max(jnp.where(rows, log_weights, -jnp.inf), initial=-jnp.inf)
    # the largest weight becomes 1, so that nothing overflows and the squares' sum is at least 1
    weights = jnp.where(rows, jnp.exp(log_weights - jnp.where(jnp.any(rows), largest, 0)), 0)
    squares = jnp.maximum(jnp.sum(jnp.square(weights)), 1)
    return jnp.square(jnp.sum(weights)) / (squares * jnp.maximum(jnp.sum(rows), 1))


def _effective_sample_share(weights: Array, mask: Array) -> Array:
    # ρ² is at least e⁻⁴⁰, so the denominator is 0 only where there is no token at all
    return jnp.square(masked_mean(weights, mask)) / jnp.where(jnp.any(mask), masked_mean(jnp.square(weights), mask), 1)
