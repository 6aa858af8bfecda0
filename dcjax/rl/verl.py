"""verl's rollout correction, as verl computes it, for runs and metrics that are compared with verl's.

Option and metric names are verl's (docs/algo/rollout_corr.md of January 2026; the `rollout_rs` levels `token`,
`sequence` and `geometric` and the veto are of December 2025). What differs from the rest of this library:

- Rejection edits the response mask, and with it the loss's denominator. Paper B's masking (`corrections`) keeps it.
- Responses without a token count in means over rows, with a mean log-prob, log-ratio or weight of 0.
- Means are sums divided by count + 1e-8. Standard deviation and effective sample size are of weights clamped to the
  bounds.
- `log_ppl_abs_diff` is per token; perplexities and `k3_kl` are not clamped, and may be infinite.
- `seq-mean-token-sum-norm` is not divided by the number of responses.
- k3 is bounded by 10 as a penalty.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.arguments import masks
from dcjax.rl.corrections import log_importance
from dcjax.rl.losses import MAX_LOG_RATIO, bounded_exp, clamp_log_ratio, kl_estimate
from dcjax.rl.masked import Aggregation, LossSum, masked_sum
from dcjax.rl.transforms import Context, LossTransform, Terms
from dcjax.types import Array, Metrics

EPSILON = 1e-8
"""Added to the denominators of verl's means."""

MAX_K3 = 10.0

RATIO_OPTIONS = ("token", "sequence", "geometric")
DIVERGENCE_OPTIONS = tuple(
    f"{level}_{kind}"
    for level, kinds in {
        "token": ("k1", "k2", "k3"),
        "seq_sum": ("k1", "k2", "k3"),
        "seq_mean": ("k1", "k2", "k3"),
        "seq_max": ("k2", "k3"),
    }.items()
    for kind in kinds
)


class Bound(NamedTuple):
    """One rejection option, which keeps lower ≤ its statistic ≤ upper. Bounds of k1 are given as those of a ratio."""

    option: str
    lower: float
    upper: float


def parse_bounds(options: str, thresholds: str) -> tuple[Bound, ...]:
    """A bound for each option: of "token_k1,seq_max_k2" with the thresholds "0.5_2.0,0.3", for example.

    Raises:
      ValueError: an unknown option, another number of thresholds, or bounds that are not positive and in order.
    """
    names, given = options.split(","), thresholds.split(",")
    if len(names) != len(given):
        raise ValueError(f"rollout_rs {options!r} needs as many thresholds as options, not {thresholds!r}")
    return tuple(_bound(name.strip(), threshold) for name, threshold in zip(names, given, strict=True))


def _bound(option: str, threshold: str) -> Bound:
    if option not in RATIO_OPTIONS + DIVERGENCE_OPTIONS:
        allowed = ", ".join(RATIO_OPTIONS + DIVERGENCE_OPTIONS)
        raise ValueError(f"rollout_rs is {option!r}; it must be one of {allowed}")
    try:
        numbers = [float(number) for number in threshold.split("_")]
    except ValueError:
        numbers = []
    one_sided = option.endswith(("k2", "k3"))
    in_order = len(numbers) < 2 or numbers[0] < numbers[-1]
    if not (1 <= len(numbers) <= 2 - one_sided and in_order and all(0 < number < math.inf for number in numbers)):
        form = "u" if one_sided else "u or lower_upper"
        raise ValueError(f"the threshold of {option} is {threshold!r}; it must be {form}, positive")
    if one_sided:
        return Bound(option, 0.0, numbers[0])
    return Bound(option, numbers[0] if len(numbers) == 2 else 1 / numbers[0], numbers[-1])


@dataclasses.dataclass(frozen=True)
class Correction:
    """The options of verl's `rollout_correction`.

    Raises:
      ValueError: when built, an unknown option or an impossible threshold.
    """

    # importance weights: token, sequence or None
    rollout_is: str | None = None
    # C, at which the weights are truncated
    rollout_is_threshold: float = 2.0
    # rejection options, comma-separated; a token is kept where every option keeps it
    rollout_rs: str | None = None
    # one per option: "u" or, for ratios and k1, "lower_upper"; for these "u" alone means (1/u, u)
    rollout_rs_threshold: str | None = None
    # a response that has a token with π_old/μ below this is rejected
    rollout_token_veto_threshold: float | None = None
    # π_old is not recomputed: the policy being differentiated stands in for it
    bypass_mode: bool = False

    def __post_init__(self) -> None:
        if self.rollout_is not in (None, "token", "sequence"):
            raise ValueError(f"rollout_is is {self.rollout_is!r}; it must be token, sequence or None")
        if not self.rollout_is_threshold > 0:
            raise ValueError(f"rollout_is_threshold is {self.rollout_is_threshold}; it must be above 0")
        if (self.rollout_rs is None) != (self.rollout_rs_threshold is None):
            raise ValueError(
                f"rollout_rs is {self.rollout_rs!r}, its threshold {self.rollout_rs_threshold!r}; give both or neither"
            )
        veto = self.rollout_token_veto_threshold
        if veto is not None and not veto > 0:
            raise ValueError(f"rollout_token_veto_threshold is {veto}; it must be above 0, or None")
        # parses them, so that errors are raised here
        _ = self.bounds

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """`rollout_rs` with its thresholds."""
        if self.rollout_rs is None or self.rollout_rs_threshold is None:
            return ()
        return parse_bounds(self.rollout_rs, self.rollout_rs_threshold)


_GEOMETRIC = Correction(rollout_rs="seq_mean_k1", rollout_rs_threshold="0.999_1.001")
_K3 = Correction(rollout_rs="seq_mean_k3", rollout_rs_threshold="0.01")

PRESETS: dict[str, Correction] = {
    "disabled": Correction(),
    "decoupled_token_is": Correction(rollout_is="token"),
    "decoupled_seq_is": Correction(rollout_is="sequence"),
    "decoupled_seq_is_rs": Correction(rollout_is="sequence", rollout_rs="seq_sum_k1", rollout_rs_threshold="0.5_2.0"),
    "decoupled_geo_rs": _GEOMETRIC,
    "decoupled_geo_rs_seq_tis": dataclasses.replace(_GEOMETRIC, rollout_is="sequence"),
    "decoupled_geo_rs_token_tis": dataclasses.replace(_GEOMETRIC, rollout_is="token"),
    "decoupled_k3_rs": _K3,
    "decoupled_k3_rs_seq_tis": dataclasses.replace(_K3, rollout_is="sequence"),
    "decoupled_k3_rs_token_tis": dataclasses.replace(_K3, rollout_is="token"),
    "bypass_pg_is": Correction(rollout_is="sequence", bypass_mode=True),
    "bypass_pg_geo_rs": dataclasses.replace(_GEOMETRIC, bypass_mode=True),
    "bypass_pg_geo_rs_seq_tis": dataclasses.replace(_GEOMETRIC, rollout_is="sequence", bypass_mode=True),
    "bypass_pg_geo_rs_token_tis": dataclasses.replace(_GEOMETRIC, rollout_is="token", bypass_mode=True),
}
"""verl's presets by their names there. `bypass_pg` ones need `policy_gradient` and `seq_mean_token_sum`.

verl's `bypass_ppo_clip` presets are missing: they clip π_θ/μ, and a surrogate here is given π_old. verl's
`decoupled_token_icepop` is `corrections.icepop_mask(0.5, 5.0)`.
"""


def rollout_correction(correction: Correction) -> LossTransform:
    """Multiplies the weights and takes rejected tokens out of the loss and its denominator.

    Weights are computed over the whole response mask, whatever is rejected. Per-row metric: `verl/masked_fraction`, the
    share of the row's tokens that were rejected.
    """

    def apply(terms: Terms, context: Context) -> Terms:
        batch = context.batch
        policy = context.logps if correction.bypass_mode else context.old_logps
        weights, mask, _ = correct(
            old_logps=policy,
            rollout_logps=batch.rollout_logps,
            mask=batch.response_mask,
            correction=correction,
        )
        rejected = _mean((batch.response_mask & ~mask).astype(jnp.float32), batch.response_mask, axis=1)
        metrics = {**terms.metrics, "verl/masked_fraction": rejected}
        return dataclasses.replace(terms, weights=terms.weights * weights, mask=terms.mask & mask, metrics=metrics)

    return apply


@masks("mask")
def correct(
    *,
    old_logps: Float[Array, "B T"],
    rollout_logps: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    correction: Correction,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Metrics]:
    """Weights, the mask after rejection, and all of verl's metrics of a whole batch, named `rollout_corr/…`.

    Returns:
      weights: 1 where `rollout_is` is None; 0 outside the mask.
      mask: the tokens that neither rejection nor veto takes out.
      metrics: scalars.
    """
    gap = {"old_logps": old_logps, "rollout_logps": rollout_logps, "mask": mask}
    weights, kept, metrics = mask.astype(jnp.float32), mask, {}
    if correction.rollout_is is not None:
        weights, observed = importance_weights(
            **gap, level=correction.rollout_is, threshold=correction.rollout_is_threshold
        )
        metrics |= observed
    if correction.bounds:
        kept, observed = rejection_mask(**gap, bounds=correction.bounds)
        metrics |= observed
    if correction.rollout_token_veto_threshold is not None:
        passed, observed = veto_mask(**gap, threshold=correction.rollout_token_veto_threshold)
        kept, metrics = kept & passed, metrics | observed
    metrics |= offpolicy_metrics(**gap)
    return weights, kept, {f"rollout_corr/{name}": value for name, value in metrics.items()}


@masks("mask")
def importance_weights(
    *,
    old_logps: Float[Array, "B T"],
    rollout_logps: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    level: str,
    threshold: float,
    batch_normalize: bool = False,
) -> tuple[Float[Array, "B T"], Metrics]:
    """min(ρ, C), with ρ of the token or response as in `corrections`, and metrics `rollout_is_…` of ρ itself.

    Args:
      old_logps: log-probs of the training backend at the rollout's weights.
      rollout_logps: log-probs of the serving engine.
      mask: response tokens.
      level: `token` or `sequence`.
      threshold: C.
      batch_normalize: divides by the batch's mean weight, over tokens or over the responses that have one.
    """
    log_ratio = log_importance(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, level=level)
    metrics = _ratio_metrics("rollout_is", log_ratio, mask, Bound(level, 1 / threshold, threshold))
    weights = jnp.where(mask, jnp.minimum(bounded_exp(log_ratio), threshold), 0)
    if batch_normalize:
        rows, occupied = _mean(weights, mask, axis=1), jnp.any(mask, axis=1)
        mean = _mean(weights, mask) if level == "token" else _mean(rows, occupied)
        mean = jnp.where(mean > EPSILON, mean, 1)
        weights, metrics = weights / mean, {**metrics, "rollout_is_batch_norm_factor": mean}
    return weights, metrics


@masks("mask")
def rejection_mask(
    *,
    old_logps: Float[Array, "B T"],
    rollout_logps: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    bounds: tuple[Bound, ...],
) -> tuple[Bool[Array, "B T"], Metrics]:
    """The tokens that every bound keeps, and metrics `rollout_rs_…` of each bound's statistic.

    The statistics, x = log π_old − log μ clamped to ±20:

    - `token`, `sequence`, `geometric`: ρ = exp(x_t), exp(Σ x), exp(mean x).
    - `…_k1`: −x, bounded by log lower and log upper, so that asymmetric bounds are of μ/π_old and not of π_old/μ.
    - `…_k2`: x²/2. - `…_k3`: exp(x) − 1 − x.
    - `token_…`: per token; `seq_sum_…`, `seq_mean_…`, `seq_max_…`: over a response, which is kept or rejected whole.
    """
    kept, metrics = mask, {}
    for bound in bounds:
        judge = _judge_ratio if bound.option in RATIO_OPTIONS else _judge_divergence
        keeps, observed = judge(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, bound=bound)
        kept, metrics = kept & keeps, metrics | observed
    rejected = mask & ~kept
    return kept, {
        **metrics,
        "rollout_rs_masked_fraction": _share(rejected, mask),
        "rollout_rs_seq_masked_fraction": _share(jnp.any(rejected, axis=1)),
    }


@masks("mask")
def veto_mask(
    *,
    old_logps: Float[Array, "B T"],
    rollout_logps: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    threshold: float,
) -> tuple[Bool[Array, "B T"], Metrics]:
    """Rejects each response that has a token whose π_old/μ, not clamped, is below the threshold."""
    log_ratio = log_importance(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, level="token")
    catastrophic = mask & (log_ratio < math.log(threshold))
    vetoed = jnp.any(catastrophic, axis=1)
    return mask & ~vetoed[:, None], {
        "rollout_is_veto_fraction": _share(vetoed),
        "rollout_is_catastrophic_token_fraction": _share(catastrophic, mask),
    }


@masks("mask")
def offpolicy_metrics(
    *, old_logps: Float[Array, "B T"], rollout_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Metrics:
    """Perplexities of both policies, KL and χ² of the gap, over all rows; x = log π_old − log μ.

    verl raises for a batch without a token; here its perplexity is 1 and its gap 0.
    """
    x = log_importance(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, level="token")
    training, rollout = (-_mean(logps, mask, axis=1) for logps in (old_logps, rollout_logps))
    diff = training - rollout
    return {
        "training_ppl": jnp.mean(jnp.exp(training)),
        "training_log_ppl": jnp.mean(training),
        "rollout_ppl": jnp.mean(jnp.exp(rollout)),
        "rollout_log_ppl": jnp.mean(rollout),
        "kl": _mean(-x, mask),
        "k3_kl": _mean(jnp.exp(x) - x - 1, mask),
        "log_ppl_diff": jnp.mean(diff),
        "log_ppl_abs_diff": jnp.mean(jnp.abs(diff)),
        "log_ppl_diff_max": jnp.max(diff),
        "log_ppl_diff_min": jnp.min(diff),
        "ppl_ratio": jnp.mean(jnp.exp(diff)),
        "chi2_token": _mean(bounded_exp(x) ** 2 - 1, mask),
        "chi2_seq": jnp.mean(bounded_exp(masked_sum(x, mask, axis=1)) ** 2) - 1,
    }


@masks("mask")
def kl_penalty(
    *, logps: Float[Array, "B T"], reference_logps: Float[Array, "B T"], mask: Bool[Array, "B T"], kind: str
) -> Float[Array, "B T"]:
    """`losses.kl_estimate`, with k3 bounded by 10."""
    estimate = kl_estimate(logps=logps, reference_logps=reference_logps, mask=mask, kind=kind)
    return jnp.minimum(estimate, MAX_K3) if kind == "k3" else estimate


def seq_mean_token_sum_norm(loss_scale_factor: int) -> Aggregation:
    """Σ_it ℓ_it / H, whatever the number of responses; over microbatches, the mean of their values.

    Raises:
      ValueError: a factor below 1.
    """
    if loss_scale_factor < 1:
        raise ValueError(f"loss_scale_factor is {loss_scale_factor}; it must be at least 1 token")

    @masks("mask")
    def aggregate(losses: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> LossSum:
        total = masked_sum(losses, mask)
        return LossSum(total, jnp.full_like(total, loss_scale_factor))

    return aggregate


def _mean(x: Array, mask: Array, axis: int | None = None) -> Array:
    return masked_sum(x, mask, axis) / (jnp.sum(mask, axis=axis) + EPSILON)


_REDUCTIONS = {
    "seq_sum": lambda values, mask: masked_sum(values, mask, axis=1),
    "seq_mean": lambda values, mask: _mean(values, mask, axis=1),
    "seq_max": lambda values, mask: jnp.max(jnp.where(mask, values, 0), axis=1),
}


def _std(rows: Array) -> Array:
    """The sample standard deviation over rows; 0 if there is only one."""
    return jnp.std(rows, ddof=1) if rows.shape[0] > 1 else jnp.zeros_like(rows[0])


def _clamped_std(x: Array, mask: Array, lower: float, upper: float) -> Array:
    clamped = jnp.clip(x, lower, upper)
    variance = _mean(clamped**2, mask) - _mean(clamped, mask) ** 2
    return jnp.where(jnp.sum(mask) > 1, jnp.sqrt(jnp.maximum(variance, 0)), 0)


def _share(condition: Array, mask: Array | None = None) -> Array:
    """The share of True entries, among those of the mask or among all."""
    condition = condition.astype(jnp.float32)
    return jnp.mean(condition) if mask is None else _mean(condition, mask)


def _judge_ratio(*, old_logps: Array, rollout_logps: Array, mask: Array, bound: Bound) -> tuple[Array, Metrics]:
    log_ratio = log_importance(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, level=bound.option)
    ratios = bounded_exp(log_ratio)
    return (ratios >= bound.lower) & (ratios <= bound.upper), _ratio_metrics("rollout_rs", log_ratio, mask, bound)


def _ratio_metrics(prefix: str, log_ratio: Array, mask: Array, bound: Bound) -> Metrics:
    """Metrics of ρ before truncation. Extremes and shares are over tokens or, if ρ is a response's, over all rows."""
    _, lower, upper = bound
    ratios = bounded_exp(log_ratio)
    rows = _mean(ratios, mask, axis=1)
    clamped = jnp.clip(ratios, lower, upper)
    normalized = clamped / (_mean(clamped, mask) + EPSILON)
    metrics = {
        "mean": _mean(ratios, mask),
        "std": _clamped_std(ratios, mask, lower, upper),
        "eff_sample_size": 1 / _mean(normalized**2, mask),
        "seq_mean": jnp.mean(rows),
        "seq_std": _std(rows),
        "seq_max": jnp.max(rows),
        "seq_min": jnp.min(rows),
        "seq_max_deviation": jnp.max(jnp.abs(rows - 1)),
        "seq_fraction_high": _share(rows > upper),
        "seq_fraction_low": _share(rows < lower),
        **(_token_extremes(ratios, mask, bound) if bound.option == "token" else _row_extremes(log_ratio, bound)),
    }
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def _token_extremes(ratios: Array, mask: Array, bound: Bound) -> Metrics:
    return {
        "max": jnp.max(jnp.where(mask, ratios, -jnp.inf)),
        "min": jnp.min(jnp.where(mask, ratios, jnp.inf)),
        "ratio_fraction_high": _share(ratios > bound.upper, mask),
        "ratio_fraction_low": _share(ratios < bound.lower, mask),
    }


def _row_extremes(log_ratio: Array, bound: Bound) -> Metrics:
    rows = log_ratio[:, 0]
    return {
        # verl clamps the largest but not the smallest
        "max": jnp.exp(jnp.minimum(jnp.max(rows), MAX_LOG_RATIO)),
        "min": jnp.exp(jnp.min(rows)),
        "ratio_fraction_high": _share(rows > math.log(bound.upper)),
        "ratio_fraction_low": _share(rows < math.log(bound.lower)),
    }


def _judge_divergence(*, old_logps: Array, rollout_logps: Array, mask: Array, bound: Bound) -> tuple[Array, Metrics]:
    level, kind = bound.option.rsplit("_", 1)
    x = log_importance(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask, level="token")
    x = clamp_log_ratio(x)
    values = {"k1": -x, "k2": x**2 / 2, "k3": jnp.exp(x) - 1 - x}[kind]
    if kind == "k1":
        bound = Bound(bound.option, math.log(bound.lower), math.log(bound.upper))
    if level == "token":
        rows, statistic = _mean(values, mask, axis=1), values
    else:
        rows = _REDUCTIONS[level](values, mask)
        statistic = jnp.broadcast_to(rows[:, None], values.shape)
    keeps = (statistic >= bound.lower) & (statistic <= bound.upper)
    # shares are of tokens or, where a response is judged whole, of responses
    units, counted = (statistic, mask) if level == "token" else (rows, jnp.any(mask, axis=1))
    metrics = {
        "mean": _mean(statistic, mask),
        "max": jnp.max(jnp.where(counted, units, -jnp.inf)),
        "min": jnp.min(jnp.where(counted, units, jnp.inf)),
        "std": _clamped_std(statistic, mask, bound.lower, bound.upper),
        "fraction_high": _share(units > bound.upper, counted),
        "fraction_low": _share(units < bound.lower, counted),
        "masked_fraction": _share(~keeps, mask),
        **_row_metrics(rows, mask, mask & ~keeps, bound, two_sided=kind == "k1"),
    }
    return keeps, {f"rollout_rs_{bound.option}_{name}": value for name, value in metrics.items()}


def _row_metrics(rows: Array, mask: Array, rejected: Array, bound: Bound, *, two_sided: bool) -> Metrics:
    """Metrics over the rows that have a token."""
    occupied = jnp.any(mask, axis=1)
    centred = jnp.where(occupied, rows - _mean(rows, occupied), 0)
    metrics = {
        "seq_mean": _mean(rows, occupied),
        "seq_std": jnp.sqrt(jnp.sum(centred**2) / jnp.maximum(jnp.sum(occupied) - 1, 1)),
        "seq_max": jnp.max(jnp.where(occupied, rows, -jnp.inf)),
        "seq_min": jnp.min(jnp.where(occupied, rows, jnp.inf)),
        "seq_max_deviation": jnp.max(jnp.where(occupied, jnp.abs(rows), 0)),
        "seq_fraction_high": _share(rows > bound.upper, occupied),
        "seq_masked_fraction": _share(jnp.any(rejected, axis=1), occupied),
    }
    return metrics | ({"seq_fraction_low": _share(rows < bound.lower, occupied)} if two_sided else {})
