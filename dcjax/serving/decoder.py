"""The serving policy as pure functions: prefill of prompts, one decoded token in every slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, UInt32

from dcjax.models import ModelConfig
from dcjax.models.cache import Decoded, LayerCache, forward_cached, init_cache
from dcjax.serving import quantize, sampling
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.sampling import SamplingParams
from dcjax.serving.sync import ServingParams
from dcjax.types import Array

NOISE_AHEAD = 2**22
"""Random numbers that are drawn at once, before the steps that use them."""

LOGIT_NOISE, ROUTING_FLIPS = 1, 2
"""Folded into a token's key, for random numbers beside those that it is drawn with."""


@flax.struct.dataclass
class Requests:
    """What N samples ask for."""

    # tokens to sample at most, the end token included
    limits: Int[Array, "N"]
    sampling: SamplingParams
    # ids that end a response, -1 behind them; themselves sampled, scored and returned
    stop_tokens: Int[Array, "N M"]
    # raw PRNG key data; the n-th token of a request is drawn with fold_in(key, n), wherever and whenever it runs
    keys: UInt32[Array, "N 2"]


@flax.struct.dataclass
class Prefix:
    """Prompts prefilled into caches of their own: one row a prompt."""

    caches: tuple[LayerCache, ...]
    # the last prompt token and its position: a step feeds it again, so that all sampled tokens come from one place
    tokens: Int[Array, "rows"]
    positions: Int[Array, "rows"]
    # None unless recorded
    experts: Int[Array, "rows P M k"] | None


@flax.struct.dataclass
class DecodeState:
    """One row a slot."""

    caches: tuple[LayerCache, ...]
    # the token to feed next, and its position
    tokens: Int[Array, "slots"]
    positions: Int[Array, "slots"]
    # tokens sampled so far
    generated: Int[Array, "slots"]
    active: Bool[Array, "slots"]
    requests: Requests


@flax.struct.dataclass
class Emitted:
    """One token of every slot, with what a trainer has to know of it; meaningless where not `valid`."""

    tokens: Int[Array, "slots"]
    # of the distribution that was sampled from
    logps: Float[Array, "slots"]
    valid: Bool[Array, "slots"]
    # of `sampling.Distribution`
    log_mass: Float[Array, "slots"]
    support: Int[Array, "slots K"]
    # of the token that was fed; None unless recorded
    experts: Int[Array, "slots M k"] | None
    # the residual stream behind each layer; None unless asked for
    residuals: Float[Array, "L slots E"] | None


@dataclass(frozen=True)
class Decoder:
    """How one model is served; hashable, so that programs are compiled once for equal ones.

    `prefill_tokens` bounds what one pass of the prefill takes (tokens), whatever the prompts' number and length.
    """

    config: ModelConfig
    format: quantize.Format
    max_prompt_length: int
    max_response_length: int
    # largest top_k, whose tokens are then recorded; 0 records none
    max_support: int
    max_stop_tokens: int
    records_experts: bool
    prefill_tokens: int
    mismatch: MismatchConfig

    @property
    def capacity(self) -> int:
        """Tokens of a slot."""
        return self.max_prompt_length + self.max_response_length

    def empty(self, slots: int) -> DecodeState:
        """No slot active."""
        zeros = jnp.zeros(slots, jnp.int32)
        ones = jnp.ones(slots, jnp.float32)
        return DecodeState(
            caches=self._caches(slots, self.capacity),
            tokens=zeros,
            positions=zeros,
            generated=zeros,
            active=jnp.zeros(slots, bool),
            requests=Requests(
                limits=zeros,
                sampling=SamplingParams(temperatures=ones, top_ks=zeros, top_ps=ones),
                stop_tokens=jnp.full((slots, self.max_stop_tokens), -1, jnp.int32),
                keys=jnp.zeros((slots, 2), jnp.uint32),
            ),
        )

    def prefill(self, params: ServingParams, tokens: Int[Array, "rows P"], lengths: Int[Array, "rows"]) -> Prefix:
        """Prompts, padded on the right, into caches: as many at once as `prefill_tokens` allows, or one in pieces."""
        rows, width = tokens.shape
        columns = min(width, self.prefill_tokens)
        at_once = max(self.prefill_tokens // width, 1)
        passes, pieces = -(-rows // at_once), -(-width // columns)
        at_once = -(-rows // passes)
        padded = jnp.pad(tokens, ((0, passes * at_once - rows), (0, pieces * columns - width)))

        def prompts(tokens: Array) -> tuple[tuple[LayerCache, ...], Array | None]:
            def piece(caches, number):
                start = number * columns
                positions = jnp.broadcast_to(start + jnp.arange(columns), (at_once, columns))
                part = lax.dynamic_slice_in_dim(tokens, start, columns, axis=1)
                decoded = self._run(params, part, positions, caches, None)
                return decoded.caches, self._recorded(decoded)

            caches = self._caches(at_once, pieces * columns)
            if pieces == 1:
                return piece(caches, 0)
            caches, experts = lax.scan(piece, caches, jnp.arange(pieces))
            if experts is not None:
                experts = experts.swapaxes(0, 1).reshape(at_once, -1, *experts.shape[3:])
            return caches, experts

        if passes == 1:
            filled = prompts(padded)
        else:
            filled = lax.map(prompts, padded.reshape(passes, at_once, -1))
            filled = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), filled)
        caches, experts = jax.tree.map(lambda leaf: leaf[:rows], filled)
        last = lengths - 1
        return Prefix(caches, jnp.take_along_axis(tokens, last[:, None], 1)[:, 0], last, experts)

    def start(
        self, state: DecodeState, slot: Int[Array, ""], prefix: Prefix, row: Int[Array, ""], request: Requests
    ) -> DecodeState:
        """Begins the sample that `request` (without its first axis) asks for, of the prompt in `row`, in a slot."""

        def copy(held: Array, new: Array) -> Array:
            one = lax.dynamic_index_in_dim(new, row)[:, :, : self.capacity]
            return lax.dynamic_update_slice(held, one, (slot, *[0] * (held.ndim - 1)))

        def put(held: Array, new: Array | int | bool) -> Array:
            return jnp.asarray(held).at[slot].set(new)

        return DecodeState(
            caches=jax.tree.map(copy, state.caches, prefix.caches),
            tokens=put(state.tokens, prefix.tokens[row]),
            positions=put(state.positions, prefix.positions[row]),
            generated=put(state.generated, 0),
            active=put(state.active, True),
            requests=jax.tree.map(put, state.requests, request),
        )

    def steps(self, params: ServingParams, state: DecodeState, count: int) -> tuple[DecodeState, Emitted]:
        """`count` tokens in every active slot, each leaf of `Emitted` with them in front."""
        counts = state.generated + jnp.arange(count)[:, None]

        def noise(counts: Array) -> Array:
            return sampling.gumbel_noise(state.requests.keys, counts, self.config.vocab_size)

        def step(state: DecodeState, drawn: Array) -> tuple[DecodeState, Emitted]:
            return self.step(params, state, partial(sampling.draw, noise=drawn if ahead else noise(drawn)))

        # half as costly drawn at once, while that is small
        ahead = counts.size * self.config.vocab_size <= NOISE_AHEAD
        return lax.scan(step, state, jax.vmap(noise)(counts) if ahead else counts)

    def step(
        self,
        params: ServingParams,
        state: DecodeState,
        pick: Callable[[sampling.Distribution], Int[Array, "slots"]],
        *,
        keeps_residuals: bool = False,
    ) -> tuple[DecodeState, Emitted]:
        """Feeds each slot's last token, and picks the next from the distribution that results."""
        requests = state.requests
        decoded = self._run(params, state.tokens[:, None], state.positions[:, None], state.caches, self._flips(state))
        drawn_from = self._distribution(params, decoded, state)
        tokens = jnp.where(state.active, pick(drawn_from), state.tokens)
        generated = state.generated + state.active
        stopped = jnp.any(tokens[:, None] == requests.stop_tokens, axis=1)
        emitted = Emitted(
            tokens=tokens,
            logps=sampling.log_probs(drawn_from, tokens),
            valid=state.active,
            log_mass=drawn_from.log_mass,
            support=drawn_from.support,
            experts=None if (experts := self._recorded(decoded)) is None else experts[:, 0],
            residuals=jnp.stack(decoded.residuals)[:, :, 0] if keeps_residuals else None,
        )
        following = dataclasses.replace(
            state,
            caches=decoded.caches,
            tokens=tokens,
            positions=state.positions + state.active,
            generated=generated,
            active=state.active & ~stopped & (generated < requests.limits),
        )
        return following, emitted

    def _caches(self, batch: int, capacity: int) -> tuple[LayerCache, ...]:
        return tuple(
            init_cache(self.config, batch, capacity, self.format.kv_cache) for _ in range(self.config.num_layers)
        )

    def _run(self, params: ServingParams, tokens: Array, positions: Array, caches, choose) -> Decoded:
        x = quantize.lookup(params.weights["embed_tokens"], tokens, self.format.activations)
        return forward_cached(self.config, params.weights, x, positions, caches, quantize.PRODUCTS, choose)

    def _distribution(self, params: ServingParams, decoded: Decoded, state: DecodeState) -> sampling.Distribution:
        head = params.weights["embed_tokens" if self.config.tie_embeddings else "lm_head"]
        logits = quantize.logits(decoded.hidden[:, 0], head)
        if self.mismatch.logit_noise:
            noise = jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:]))(_keys(state, LOGIT_NOISE))
            logits += self.mismatch.logit_noise * noise
        return sampling.distribution(logits, state.requests.sampling, max_support=self.max_support)

    def _recorded(self, decoded: Decoded) -> Array | None:
        """Experts [B, S, M, k], if they are recorded at all; 16 bits count all that there are."""
        if not self.records_experts or decoded.experts is None:
            return None
        return jnp.moveaxis(decoded.experts, 0, 2).astype(jnp.int16)

    def _flips(self, state: DecodeState) -> Callable[[int, Array], Array] | None:
        """A choice of experts of which some are wrong: the first that was not chosen, for the last that was."""
        if not self.mismatch.routing_flips:
            return None

        def choose(layer: int, probabilities: Array) -> Array:
            draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, layer)))
            flipped = draws(_keys(state, ROUTING_FLIPS)) < self.mismatch.routing_flips
            _, ranked = lax.top_k(probabilities, self.config.num_experts_per_tok + 1)
            last = jnp.where(flipped[:, None], ranked[..., -1], ranked[..., -2])
            return jnp.concatenate([ranked[..., :-2], last[..., None]], axis=-1)

        return choose


def _keys(state: DecodeState, purpose: int) -> jax.Array:
    """A typed key for each slot's next token."""

    def of_token(key, count):
        return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), count), purpose)

    return jax.vmap(of_token)(state.requests.keys, state.generated)
