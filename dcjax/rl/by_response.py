"""Whole responses that are left out for how far the policies are apart on them, by their mean over the response.

q is the engine's probability, π the policy that is differentiated, ρ = π_old/q; none of it is differentiated. A dropped
response gets the weight 0 and stays in the loss's denominator. Means are over all tokens of the response. All go with
`clipped_surrogate`, or any other; `presets.with_method` puts them behind an objective.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dcjax.rl.corrections import check_bounds, importance_ratios, log_importance, reweight_kept
from dcjax.rl.losses import kl_estimate
from dcjax.rl.masked import masked_mean
from dcjax.rl.transforms import Context, LossTransform, Terms

SEQ_MASK_LOW = 0.999
"""The lower bound of NeMo-RL's band."""


def opsm(bound: float = 1e-4) -> LossTransform:
    """Drops tokens with Ã < 0 of responses with mean_t(log q − log π) > δ: off-policy sequence masking.

    That is a geometric mean of π/q below e^−δ. Whole responses are dropped where all tokens share an advantage.

    Args:
      bound: δ, nats a token, at least 0. DeepSeek gives no value; 1e-4 is slime's, and TRL's example is .5.

    References:
      DeepSeek-V3.2 (arXiv 2512.02556), eqs. 8-9. slime takes its own recomputed log-probs for q unless told otherwise,
      so that with one update an iteration nothing is ever dropped there.
    """
    if not bound >= 0:
        raise ValueError(f"bound is {bound}; it must be at least 0")

    def apply(terms: Terms, context: Context) -> Terms:
        batch = context.batch
        mean = log_importance(
            old_logps=context.logps, rollout_logps=batch.rollout_logps, mask=batch.response_mask, level="geometric"
        )
        kept = (terms.advantages >= 0) | (-mean <= bound)
        return reweight_kept(terms, batch.response_mask, "opsm", kept=kept, weights=jnp.ones(()))

    return apply


def vexact(bound: float = 0.001, *, max_ratio: float = 2.0) -> LossTransform:
    """Drops responses with mean_t(ρ − 1 − log ρ) > τ; w = min(ρ, C) of each token: rejection and truncation.

    Args:
      bound: τ, nats a token.
      max_ratio: C.

    References:
      VeXact (arXiv 2605.14220), §4.2, known to us from two others' notes: that the criterion is the mean over tokens is
      inferred from verl's `seq_mean_k3`. verl's preset `decoupled_k3_rs_token_tis` has a τ of .01, and takes rejected
      responses out of the denominator.
    """
    if not (bound > 0 and max_ratio > 0):
        raise ValueError(f"the bounds are {bound} and {max_ratio}; both must be above 0")

    def apply(terms: Terms, context: Context) -> Terms:
        batch, mask = context.batch, context.batch.response_mask
        # of policies that sampled the tokens: k3 of KL(q‖π_old) has x = log q − log π_old
        k3 = kl_estimate(logps=batch.rollout_logps, reference_logps=context.old_logps, mask=mask, kind="k3")
        kept = jax.lax.stop_gradient(masked_mean(k3, mask, axis=1))[:, None] <= bound
        ratios = importance_ratios(
            old_logps=context.old_logps, rollout_logps=batch.rollout_logps, mask=mask, level="token"
        )
        return reweight_kept(terms, mask, "vexact", kept=kept, weights=jnp.minimum(ratios, max_ratio))

    return apply


def seq_mask_tis(high: float = 1.002, *, low: float = SEQ_MASK_LOW) -> LossTransform:
    """Drops responses whose geometric mean of ρ is outside [low, high]; w = ρ of each token, not truncated.

    Args:
      high: the upper bound.
      low: the lower bound.

    References:
      NeMo-RL's `seq-mask-tis` (ProRL v2.1).
    """
    check_bounds(low, high)

    def apply(terms: Terms, context: Context) -> Terms:
        mask = context.batch.response_mask
        gap = {"old_logps": context.old_logps, "rollout_logps": context.batch.rollout_logps, "mask": mask}
        means = log_importance(**gap, level="geometric")
        kept = (means >= jnp.log(low)) & (means <= jnp.log(high))
        return reweight_kept(terms, mask, "seq_mask_tis", kept=kept, weights=importance_ratios(**gap, level="token"))

    return apply
