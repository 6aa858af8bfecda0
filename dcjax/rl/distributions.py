"""What is computed from both policies' whole distributions in a state: gaps, expected penalties, expected scores.

π trains, μ samples, v runs over the tokens that μ could have drawn in the state of one response token. Each function
takes the distributions of C columns and returns float32 [B, C], so that it may be the `compute` of a `HeadQuantity` or
of a `DistributionGap`; gradients flow through π alone. What ends in `_of_head` needs only the sampler's most probable
tokens H, as an engine behind an interface gives them (`Requirements.sampler_head`), the others its whole distributions
(`Requirements.sampler_distributions`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dcjax.rl.discrepancy import DistributionGap, Signal, magnitude, probability_difference
from dcjax.rl.losses import clamp_log_ratio
from dcjax.rl.penalties import PenaltyShape, linear
from dcjax.types import Array, TokenDistributions

Compute = Callable[[TokenDistributions], Array]
"""(distributions of C columns) -> float32 [B, C]."""

Weight = Callable[[Array], Array]
"""An importance weight of one token as a function of its ratio π/μ, elementwise."""

SMALLEST_TAIL = 1e-6
"""What the policy's probability outside of H is taken for at least, where it is divided by (arXiv 2609.20807)."""


def unweighted(ratio: Array) -> Array:
    """The weight of a loss without importance correction: 1."""
    return jnp.ones_like(ratio)


# --- gaps of whole distributions ---


def total_variation(distributions: TokenDistributions) -> Float[Array, "B C"]:
    """TV = ½ Σ_v |π_v − μ_v|, in [0, 1]: the most by which the probabilities of any set of tokens differ."""
    log_p, log_q = _both(distributions)
    return jnp.sum(magnitude(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1) / 2


def kl_from_sampler(distributions: TokenDistributions) -> Float[Array, "B C"]:
    """KL(μ‖π) = Σ_v μ_v log(μ_v/π_v), in nats; of its gradient, Σ_v (π_v − μ_v) ∇z_v, a step takes π to μ."""
    log_p, log_q = _both(distributions)
    return jnp.sum(_expected(log_q, log_q - log_p), axis=-1)


def kl_to_sampler(distributions: TokenDistributions) -> Float[Array, "B C"]:
    """KL(π‖μ) = Σ_v π_v log(π_v/μ_v), in nats."""
    log_p, log_q = _both(distributions)
    return jnp.sum(_expected(log_p, log_p - log_q), axis=-1)


def most_probable_differs(distributions: TokenDistributions) -> Float[Array, "B C"]:
    """1 where the two policies' most probable tokens are not the same, and 0 elsewhere."""
    log_p, log_q = _both(distributions)
    return (jnp.argmax(log_p, axis=-1) != jnp.argmax(log_q, axis=-1)).astype(jnp.float32)


TOTAL_VARIATION = DistributionGap("total_variation", total_variation)
KL_FROM_SAMPLER = DistributionGap("kl_from_sampler", kl_from_sampler)
KL_TO_SAMPLER = DistributionGap("kl_to_sampler", kl_to_sampler)


# --- the penalty's expectation in the state ---


def expected_penalty(signal: Signal = probability_difference, shape: PenaltyShape = linear) -> Compute:
    """Σ_v μ_v pen(δ_v), what a penalty on the sampled token is on average in its state; under stop-gradient.

    Subtracted from the penalty, it is the baseline of `state_centred_penalty`.

    Args:
      signal: δ of one token, elementwise; `sided` gives it other sides.
      shape: pen, elementwise.
    """

    def compute(distributions: TokenDistributions) -> Float[Array, "B C"]:
        log_p, log_q = jax.lax.stop_gradient(_both(distributions))
        return jnp.sum(_expected(log_q, shape(signal(old_logps=log_p, rollout_logps=log_q))), axis=-1)

    return compute


def expected_penalty_of_head(distributions: TokenDistributions) -> Float[Array, "B C"]:
    """Σ_v μ_v |π_v − μ_v| from the sampler's head H: exact on H, and estimated outside; under stop-gradient.

    Outside of H only the sum of μ is known. It is taken for spread as π is, μ_v = r π_v with r = μ(tail)/π(tail), which
    gives r |1 − r| Σ_{v∉H} π_v², but no more than `head_error_bound`, within which the true sum lies too: so that bound
    is one of the error.
    """
    tail = _tail(distributions)
    ratio = tail.sampler / jnp.maximum(tail.policy, SMALLEST_TAIL)
    outside = ratio * jnp.abs(1 - ratio) * tail.policy_squares
    return tail.on_head(lambda p, q: q * jnp.abs(p - q)) + jnp.minimum(outside, head_error_bound(distributions))


def head_error_bound(distributions: TokenDistributions) -> Float[Array, "B C"]:
    """The most by which `expected_penalty_of_head` can be wrong: μ(tail) · max(max_{v∉H} π_v, min_{v∈H} μ_v).

    No token outside of H has more of μ than the last one within.
    """
    tail = _tail(distributions)
    return tail.sampler * jnp.maximum(tail.policy_largest, tail.sampler_smallest)


# --- the score's expectation in the state ---


def expected_score(weight: Weight = unweighted) -> Compute:
    """C = Σ_v sg(μ_v w(π_v/μ_v)) log π_v, whose gradient is the score's expectation E_μ[w ∇ log π].

    Args:
      weight: w, which multiplies the loss of a token, as a function of its ratio.

    References:
      Score centering (arXiv 2609.20807), with all of the sampler's tokens in its head.
    """

    def compute(distributions: TokenDistributions) -> Float[Array, "B C"]:
        log_p, log_q = _both(distributions)
        mass = jax.lax.stop_gradient(jnp.exp(log_q) * weight(jnp.exp(clamp_log_ratio(log_p - log_q))))
        return jnp.sum(jnp.where(mass > 0, mass * log_p, 0), axis=-1)

    return compute


def expected_score_of_head(weight: Weight = unweighted) -> Compute:
    """C = Σ_{v∈H} sg(m_v − α π_v) log π_v with m = μ w(π/μ), whose gradient estimates E_μ[w ∇ log π].

    Outside of H, μ is taken for r π with r = μ(tail)/π(tail), π(tail) at least `SMALLEST_TAIL`, so that α = r w(1/r).
    As Σ_v π_v ∇ log π_v = 0, that part of the sum is minus its part within H. It is exact where H holds all tokens.

    Args:
      weight: w as in `expected_score`. For clip(·, lo, hi), m = clip(π, lo μ, hi μ) and α = clip(1, lo r, hi r).

    References:
      Score centering (arXiv 2609.20807), eq. 14; NeMo-RL's `compute_score_centering_term`.
    """

    def compute(distributions: TokenDistributions) -> Float[Array, "B C"]:
        tail = _tail(distributions)
        ratio = tail.sampler / jnp.maximum(tail.policy, SMALLEST_TAIL)
        alpha = ratio * weight(1 / jnp.maximum(ratio, jnp.finfo(jnp.float32).tiny))
        log_p, log_q = tail.log_policy, jnp.where(tail.known, tail.log_sampler, 0.0)
        mass = jnp.exp(log_q) * weight(jnp.exp(clamp_log_ratio(log_p - log_q)))
        coefficient = jax.lax.stop_gradient(mass - alpha[..., None] * jnp.exp(log_p))
        return jnp.sum(jnp.where(tail.known, coefficient * log_p, 0), axis=-1)

    return compute


class _Tail(NamedTuple):
    """The sampler's head H, and what is outside of it, at each column."""

    # log-probs of both policies for the tokens of H, [B, C, H]
    log_policy: Array
    log_sampler: Array
    # False where H holds fewer tokens
    known: Array
    # probability outside of H, [B, C]
    policy: Array
    sampler: Array
    # Σ_{v∉H} π_v² and max_{v∉H} π_v, under stop-gradient
    policy_squares: Array
    policy_largest: Array
    # min_{v∈H} μ_v
    sampler_smallest: Array

    def on_head(self, compute: Callable[[Array, Array], Array]) -> Float[Array, "B C"]:
        """The sum over H of a function of π_v and μ_v, under stop-gradient."""
        p, q = (jnp.exp(jnp.where(self.known, x, 0.0)) for x in (self.log_policy, self.log_sampler))
        return jnp.sum(jnp.where(self.known, jax.lax.stop_gradient(compute(p, q)), 0), axis=-1)


def _tail(distributions: TokenDistributions) -> _Tail:
    """The two sides of H, from what the engine recorded."""
    tokens, log_q = distributions.sampler_tokens, distributions.sampler_logps
    if tokens is None or log_q is None:
        raise ValueError("the sampler's most probable tokens are needed; Requirements.sampler_head has them recorded")
    log_p, known = distributions.log_probs, jnp.asarray(tokens) >= 0
    rows, columns = jnp.arange(len(log_p))[:, None, None], jnp.arange(log_p.shape[1])[:, None]
    ids = jnp.where(known, tokens, log_p.shape[-1])
    inside = jnp.zeros(log_p.shape, bool).at[rows, columns, ids].set(True, mode="drop")
    outside = jax.lax.stop_gradient(jnp.where(inside, 0, jnp.exp(log_p)))
    q = jnp.where(known, jnp.exp(log_q), jnp.inf)
    return _Tail(
        log_policy=jnp.take_along_axis(log_p, jnp.where(known, tokens, 0), axis=-1),
        log_sampler=jnp.asarray(log_q),
        known=known,
        policy=jnp.sum(outside, axis=-1),
        # rounding may take the sum above 1
        sampler=jnp.maximum(1 - jnp.sum(jnp.where(known, q, 0), axis=-1), 0),
        policy_squares=jnp.sum(jnp.square(outside), axis=-1),
        policy_largest=jnp.max(outside, axis=-1),
        sampler_smallest=jnp.min(q, axis=-1),
    )


def _both(distributions: TokenDistributions) -> tuple[Float[Array, "B C V"], Float[Array, "B C V"]]:
    """log π, and log μ under stop-gradient."""
    if distributions.sampler_log_probs is None:
        raise ValueError(
            "the sampler's whole distributions are needed; Requirements.sampler_distributions has them computed"
        )
    return distributions.log_probs, jax.lax.stop_gradient(distributions.sampler_log_probs)


def _expected(log_weights: Array, values: Array) -> Array:
    """Terms of an expectation: 0 for tokens of probability 0, whatever their value."""
    weights = jnp.exp(log_weights)
    return jnp.where(weights > 0, weights * values, 0)
