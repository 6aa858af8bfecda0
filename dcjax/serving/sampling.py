"""Turns logits into a token: temperature, then top-k, then top-p give a distribution, from which tokens are drawn."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, UInt32

from dcjax.keys import as_key
from dcjax.types import Array


@flax.struct.dataclass
class SamplingParams:
    """How each of B rows is sampled. Truncation is Hugging Face's: first top-k, then top-p of what is left."""

    # 0 is greedy
    temperatures: Float[Array, "B"]
    # how many of the most probable tokens are kept; 0 keeps all tokens
    top_ks: Int[Array, "B"]
    # the most probable tokens are kept until they hold this much probability; 1 keeps all tokens
    top_ps: Float[Array, "B"]


@flax.struct.dataclass
class Distribution:
    """The distributions that B tokens are drawn from."""

    # temperature applied, -inf on tokens that cannot be drawn
    logits: Float[Array, "B V"]
    # log of the share of softmax(logits / temperature) that the kept tokens hold: 0 where nothing was cut off
    log_mass: Float[Array, "B"]
    # the kept tokens, the most probable first, padded with -1; all -1 where nothing was cut off
    candidate_tokens: Int[Array, "B K"]
    # whether the token with the largest logit is taken with certainty
    greedy: Bool[Array, "B"]


def distribution(
    logits: Float[Array, "B V"],
    params: SamplingParams,
    *,
    max_candidates: int = 0,
    gather: Callable[[Array], Array] = lambda share: share,
    own: Callable[[Array], Array] = lambda whole: whole,
) -> Distribution:
    """The distribution that each row is sampled from.

    With `max_candidates` K above 0, rows that are truncated keep at most K tokens, whose ids are returned (their top_k
    must lie within 1 to K), and a row's K largest logits are all that is sorted. With 0 none are returned, and whole
    rows are sorted, though only if one of them is truncated. Where devices share the vocabulary, `gather` turns
    this device's share of the rows into whole rows, and `own` takes that share of whole rows.
    """
    greedy = params.temperatures == 0
    scaled = logits / jnp.where(greedy, 1.0, params.temperatures)[:, None]
    truncated = ~greedy & ((params.top_ks > 0) | (params.top_ps < 1))

    def cut(share: Array) -> Distribution:
        scaled = gather(share)
        width = max_candidates or scaled.shape[1]
        values, ids = jax.lax.top_k(scaled, width)
        kept = truncated[:, None] & _kept(values, params.top_ks, params.top_ps)
        # a scatter for each row, so that devices that share the rows need not communicate
        chosen = jax.vmap(lambda ids: jnp.zeros(scaled.shape[1], bool).at[ids].set(True, mode="drop"))(
            jnp.where(kept, ids, scaled.shape[1])
        )
        inside = jnp.where(chosen | ~truncated[:, None], scaled, -jnp.inf)
        mass = jax.nn.logsumexp(inside, axis=-1) - jax.nn.logsumexp(scaled, axis=-1)
        candidate_tokens = jnp.where(kept, ids, -1)[:, :max_candidates].astype(jnp.int32)
        return Distribution(own(inside), jnp.where(truncated, mass, 0.0), candidate_tokens, greedy)

    def whole(scaled: Array) -> Distribution:
        nothing = jnp.full((len(scaled), max_candidates), -1, jnp.int32)
        return Distribution(scaled, jnp.zeros(len(scaled), scaled.dtype), nothing, greedy)

    return jax.lax.cond(jnp.any(truncated), cut, whole, scaled)


def plain(logits: Float[Array, "B V"]) -> Distribution:
    """The whole softmax at temperature 1: what a sampler reports that leaves its own transform out."""
    rows = len(logits)
    nothing = jnp.full((rows, 0), -1, jnp.int32)
    return Distribution(logits, jnp.zeros(rows, logits.dtype), nothing, jnp.zeros(rows, bool))


def _kept(values: Float[Array, "B K"], top_ks: Int[Array, "B"], top_ps: Float[Array, "B"]) -> Array:
    """Which of the tokens, in order of falling logits, are kept: at least the first."""
    width = values.shape[1]
    within = jnp.arange(width) < jnp.where(top_ks > 0, top_ks, width)[:, None]
    probabilities = jax.nn.softmax(jnp.where(within, values, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # rounding may leave a sum of all below 1
    return within & ((before < top_ps[:, None]) | (top_ps >= 1)[:, None])


def gumbel_noise(keys: UInt32[Array, "B 2"], counts: Int[Array, "B"], vocab_size: int) -> Float[Array, "B V"]:
    """Gumbel noise to add to logits before the argmax; row i is drawn with fold_in(keys[i], counts[i])."""

    def draw(key, count):
        return jax.random.gumbel(jax.random.fold_in(as_key(key), count), (vocab_size,))

    return jax.vmap(draw)(keys, counts)


def draw(drawn_from: Distribution, *, noise: Float[Array, "B V"]) -> Int[Array, "B"]:
    """One token for each row, drawn by Gumbel noise."""
    noise = jnp.where(drawn_from.greedy[:, None], 0.0, noise)
    return jnp.argmax(drawn_from.logits + noise, axis=-1).astype(jnp.int32)


def log_probs(drawn_from: Distribution, tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    """Natural logs of the tokens' probabilities, float32: -inf for one that cannot be drawn, 0 in greedy rows.

    The result is NaN where the logits are not finite, in greedy rows too.
    """
    chosen = jnp.take_along_axis(drawn_from.logits, tokens[:, None], axis=-1)[:, 0]
    total = jax.nn.logsumexp(drawn_from.logits, axis=-1)
    return jnp.where(drawn_from.greedy & jnp.isfinite(total), 0.0, chosen - total)


def log_probs_of(drawn_from: Distribution, tokens: Int[Array, "B H"]) -> Float[Array, "B H"]:
    """Natural logs of several tokens' probabilities in each row: -inf for one that cannot be drawn.

    In greedy rows the most probable token has 0, and all others -inf.
    """
    chosen = jnp.take_along_axis(drawn_from.logits, tokens, axis=-1)
    logps = chosen - jax.nn.logsumexp(drawn_from.logits, axis=-1, keepdims=True)
    first = tokens == jnp.argmax(drawn_from.logits, axis=-1)[:, None]
    return jnp.where(drawn_from.greedy[:, None], jnp.where(first, 0.0, -jnp.inf), logps)


def head(logits: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B H"], Int[Array, "B H"]]:
    """Log-probs and ids of the most probable tokens, from a `Distribution`'s logits; 0 and -1 where fewer can be drawn.

    Greedy rows have the whole softmax's.
    """
    values, ids = jax.lax.top_k(logits, count)
    held = values > -jnp.inf
    logps = values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.where(held, logps, 0.0), jnp.where(held, ids, -1).astype(jnp.int32)
