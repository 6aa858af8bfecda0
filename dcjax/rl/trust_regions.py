"""Trust regions around the policy that sampled: which tokens this year's methods keep, and with what weight.

p is the training policy's probability of the sampled token at the parameters that are differentiated, q the engine's as
it sampled (`rollout_logps`), r = p/q with log r clamped to ±20, sg the stop-gradient, Ã the advantage as the transforms
before left it: these stand behind estimator and penalties. A dropped token gets the weight 0 and stays in the loss's
denominator. Each belongs with the surrogate that is named; `presets.with_method` puts the two together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dcjax.rl.corrections import reweight_kept
from dcjax.rl.losses import bounded_exp, ratio
from dcjax.rl.masked import zero_outside
from dcjax.rl.objective import MinibatchQuantity
from dcjax.rl.transforms import Context, LossTransform, Terms, initial_terms
from dcjax.types import Array

KL_EPSILON = 1e-8
"""Added to the probabilities of all other tokens in `binary_kl`, as verl does."""


def binary_kl(logps: Float[Array, "*shape"], other_logps: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """KL(a‖b) = a ln(a/b) + (1 − a) ln((1 − a)/(1 − b)) in nats, of the sampled token against all the others.

    Args:
      logps: log a.
      other_logps: log b.
    """
    # 1 − a from log a, with the digits that are lost when a is rounded; rounded log-probs may be above 0
    rest, other_rest = (jnp.maximum(-jnp.expm1(x), 0) + KL_EPSILON for x in (logps, other_logps))
    return jnp.exp(logps) * (logps - other_logps) + rest * (jnp.log(rest) - jnp.log(other_rest))


def dppo_tv(bound: float = 0.15, *, max_ratio: float = 20.0) -> LossTransform:
    """Keeps p − q ≤ δ where Ã > 0 and p − q ≥ −δ elsewhere; w = sg(min(r, C)). For `policy_gradient`.

    Args:
      bound: δ, a probability. verl's recipe has .15; prime-rl had .2 and SkyRL advises it.
      max_ratio: C. 20 is the value that verl's function falls back on; its actor's own is 3, its recipe's 1e4. The
        paper's equations have none.

    References:
      DPPO (arXiv 2602.04879), as verl's `compute_policy_loss_dppo_tv` has it. There q is the recomputed policy's
      probability unless old log-probs are bypassed; the paper's anchor is the engine's, as here.
    """
    _check_bound(bound)

    def keep(logps: Array, rollout_logps: Array, advantages: Array) -> Array:
        gap = jnp.exp(logps) - jnp.exp(rollout_logps)
        return jnp.where(advantages > 0, gap <= bound, gap >= -bound)

    return _keep("dppo_tv", keep, max_ratio)


def dppo_kl(bound: float = 0.05, *, max_ratio: float = 20.0) -> LossTransform:
    """`dppo_tv` with the binary KL(q‖p) ≤ δ in place of |p − q| ≤ δ. For `policy_gradient`.

    The KL has no sign, so a token with Ã > 0 is dropped only where also p > q, and any other only where also p < q.

    Args:
      bound: δ, nats; verl's recipe has .05.
      max_ratio: as in `dppo_tv`.

    References:
      DPPO (arXiv 2602.04879), as verl's `compute_policy_loss_dppo_kl` has it.
    """
    _check_bound(bound)

    def keep(logps: Array, rollout_logps: Array, advantages: Array) -> Array:
        towards = jnp.where(advantages > 0, logps <= rollout_logps, logps >= rollout_logps)
        return towards | (binary_kl(rollout_logps, logps) <= bound)

    return _keep("dppo_kl", keep, max_ratio)


def ipo(bound: float = 0.3, *, coefficient: float = 0.0) -> LossTransform:
    """Keeps |p − q| ≤ ε whatever Ã; −Ã · r on kept tokens, + κ · (log r)² on all of them. For `unit_ratio`.

    The weight is sg(min(r, 1e4)), whose tokens keep their gradient at that cap.

    Args:
      bound: ε, a probability: .3 in prime-rl since September 2026, .1 before.
      coefficient: κ: 0 in prime-rl since September 2026, 1e-3 before, when r had no cap.

    References:
      prime-rl's loss `ipo`; its pull requests 2798 and 3586.
    """
    _check_bound(bound)

    def keep(logps: Array, rollout_logps: Array, advantages: Array) -> Array:
        del advantages
        return jnp.abs(jnp.exp(logps) - jnp.exp(rollout_logps)) <= bound

    masked = _keep("ipo", keep, 1e4)

    def apply(terms: Terms, context: Context) -> Terms:
        terms = masked(terms, context)
        if not coefficient:
            return terms
        squared = jnp.square(_log_ratio(context))
        return dataclasses.replace(terms, loss=terms.loss + coefficient * squared)

    return apply


def kpop(bound: float = 2.0) -> LossTransform:
    """Keeps KL(π_old‖q) ≤ φ and KL(q‖π_old) ≤ φ, both binary; w = sg(π_old/q). For `clipped_surrogate`.

    What is masked depends on the engine's gap alone and not on the parameters that are differentiated.

    Args:
      bound: φ, nats. AReaL's documentation and example have 2; .1 is the least that its authors tried, and what
        prime-rl proposed.

    References:
      KPop (Ring-2.6 report, §3.2.3), as AReaL's `apply_rejection_sampling` has it; AReaL clamps probabilities at 1e-8,
      which shows only in a token that one of the policies gives less than that.
    """
    _check_bound(bound)

    def apply(terms: Terms, context: Context) -> Terms:
        mask = context.batch.response_mask
        old, rollout = zero_outside(context.old_logps, mask), zero_outside(context.batch.rollout_logps, mask)
        kept = jnp.maximum(binary_kl(old, rollout), binary_kl(rollout, old)) <= bound
        return reweight_kept(terms, mask, "kpop", kept=kept, weights=ratio(logps=old, reference_logps=rollout))

    return apply


def drpo(bound: float = 12.5) -> LossTransform:
    """−Ã · r + |Ã| · sg(q) · (r − 1)² / (2ε); nothing is dropped. For `unit_ratio`.

    The gradient is −Ã · r · (1 − sign(Ã(r − 1)) · |p − q| / ε) · ∇log p. As |p − q| ≤ 1, an ε of 12.5 changes it by at
    most 8%; a boundary that tokens reach, as DPPO's, takes an ε of about .15.

    Args:
      bound: ε, a probability; 12.5 in the authors' repository.

    References:
      DRPO (arXiv 2606.09821), as the authors' `_drpo_loss` has it. Beyond log r = ±20 the authors' first term has no
      gradient, and here it keeps the one of the clamped r.
    """
    _check_bound(bound)
    weighted = _keep("drpo", lambda logps, rollout_logps, advantages: jnp.ones(logps.shape, bool), jnp.inf)

    def apply(terms: Terms, context: Context) -> Terms:
        q = jnp.exp(zero_outside(context.batch.rollout_logps, context.batch.response_mask))
        pull = jnp.abs(terms.advantages) * q * jnp.square(bounded_exp(_log_ratio(context)) - 1) / (2 * bound)
        return dataclasses.replace(weighted(terms, context), loss=terms.loss + pull)

    return apply


def m2po(before: LossTransform, bound: float = 0.04) -> tuple[LossTransform, MinibatchQuantity]:
    """Drops the tokens with the largest (log r)² until its mean over what is left of T is ≤ τ. For `unit_ratio`.

    T holds the tokens that move away from the policy that sampled: Ã > 0 and r > 1, or Ã < 0 and r < 1, of the whole
    minibatch; no other is ever dropped. The weight is sg(r). Tokens with equal (log r)² are dropped together.

    Args:
      before: what stands before this in the chain, from which the signs of Ã and the tokens of the loss are taken.
      bound: τ, nats²; the paper has .04 throughout.

    Returns:
      The transform, and the quantity that it reads, which the objective must require.

    References:
      M2PO (arXiv 2510.01161), §5.2 and Algorithm 1. The authors' code clips r at a bound that it solves for; it and
      AReaL choose in each microbatch, and AReaL whatever the sign of Ã, dividing by the tokens kept.
    """
    _check_bound(bound)

    def compute(context: Context) -> Array:
        terms, log_ratio = before(initial_terms(context.batch), context), _log_ratio(context)
        away = terms.mask & (terms.advantages * log_ratio > 0)
        return ~away | (jnp.square(log_ratio) < second_moment_limit(jnp.square(log_ratio), away, bound))

    def apply(terms: Terms, context: Context) -> Terms:
        weights = bounded_exp(jax.lax.stop_gradient(_log_ratio(context)))
        kept = context.quantities["m2po_kept"]
        return reweight_kept(terms, context.batch.response_mask, "m2po", kept=kept, weights=weights)

    return apply, MinibatchQuantity("m2po_kept", compute)


def second_moment_limit(values: Float[Array, "B T"], mask: Bool[Array, "B T"], bound: float) -> Float[Array, ""]:
    """The largest x such that the mean of all values below x is ≤ the bound; infinite where that is so of all of them.

    Args:
      values: at least 0.
      mask: those that are looked at.
      bound: of the mean.
    """
    ordered = jnp.append(jnp.sort(jnp.where(mask, values, jnp.inf).reshape(-1)), jnp.inf)
    # means of the smallest n rise with n, so that those within the bound come first
    means = jnp.cumsum(ordered) / jnp.arange(1, ordered.size + 1)
    return ordered[jnp.sum(means <= bound)]


def _log_ratio(context: Context) -> Float[Array, "B T"]:
    """log r, 0 outside the responses; differentiated through log p, and not clamped."""
    mask = context.batch.response_mask
    return zero_outside(context.logps, mask) - jax.lax.stop_gradient(zero_outside(context.batch.rollout_logps, mask))


def _keep(name: str, keep: Callable[[Array, Array, Array], Array], max_ratio: float) -> LossTransform:
    """Multiplies weights by sg(min(r, max_ratio)) where `keep(log p, log q, Ã)`, and by 0 elsewhere."""

    def apply(terms: Terms, context: Context) -> Terms:
        mask = context.batch.response_mask
        logps = jax.lax.stop_gradient(zero_outside(context.logps, mask))
        rollout_logps = zero_outside(context.batch.rollout_logps, mask)
        weights = jnp.minimum(ratio(logps=logps, reference_logps=rollout_logps), max_ratio)
        return reweight_kept(terms, mask, name, kept=keep(logps, rollout_logps, terms.advantages), weights=weights)

    return apply


def _check_bound(bound: float) -> None:
    if not bound > 0:
        raise ValueError(f"bound is {bound}; it must be above 0")
