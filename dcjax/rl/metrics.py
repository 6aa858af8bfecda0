"""What a step reports of the mismatch between the policy that trains and the one that sampled."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.rl.discrepancy import probability_difference
from dcjax.rl.losses import ratio
from dcjax.rl.masked import masked_max, masked_mean, masked_sum
from dcjax.types import Array


def mismatch_metrics(
    *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """The gap old − rollout on response tokens, each metric a float32 scalar; rows without a token are left out.

    - `prob_diff_mean`, `prob_diff_max`: of |p − q| over tokens.
    - `log_diff_mean`: of |log p − log q| over tokens.
    - `k1`, `k3`: estimates of KL(μ‖π_old) from samples of μ: −log r and r − 1 − log r, r = p/q; token means.
    - `log_ppl_abs_diff`: |Σ_t log p − Σ_t log q|, mean over responses (paper B, eqs. 7-8).
    - `log_ppl_abs_diff_per_token`: the same with each response's difference divided by its length (verl's).
    """
    delta = probability_difference(old_logps=old_logps, rollout_logps=rollout_logps)
    log_ratio = old_logps - rollout_logps
    log_ppl_diff = jnp.abs(masked_sum(log_ratio, mask, axis=1))
    lengths, rows = jnp.sum(mask, axis=1), jnp.any(mask, axis=1)
    return {
        "prob_diff_mean": masked_mean(delta, mask),
        "prob_diff_max": masked_max(delta, mask),
        "log_diff_mean": masked_mean(jnp.abs(log_ratio), mask),
        "k1": masked_mean(-log_ratio, mask),
        "k3": masked_mean(ratio(logps=old_logps, reference_logps=rollout_logps) - 1 - log_ratio, mask),
        "log_ppl_abs_diff": masked_mean(log_ppl_diff, rows),
        "log_ppl_abs_diff_per_token": masked_mean(log_ppl_diff / jnp.maximum(lengths, 1), rows),
    }


def staleness_metrics(
    *, logps: Float[Array, "B T"], old_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """The gap opened by an iteration's own updates, logps − old; names as in `mismatch_metrics`."""
    log_ratio = logps - old_logps
    return {
        "prob_diff_mean": masked_mean(jnp.abs(jnp.exp(logps) - jnp.exp(old_logps)), mask),
        "k3": masked_mean(ratio(logps=logps, reference_logps=old_logps) - 1 - log_ratio, mask),
    }
