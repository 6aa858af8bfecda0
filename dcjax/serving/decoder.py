"""The serving policy as pure functions: prefill of prompts, one decoded token in every slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float, Int, UInt32

from dcjax.models import ModelConfig
from dcjax.models.cache import Caches, Decoded, LayerCache, forward_cached, init_cache
from dcjax.models.layers import round_up
from dcjax.serving import parallel, quantize, sampling
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.parallel import CACHE, COPIES, EVERYWHERE, ROWS, SCORES, SHARED_CACHE, named, pinned, serving_layout
from dcjax.serving.sampling import SamplingParams
from dcjax.serving.sync import ServingParams
from dcjax.types import Array

NOISE_AHEAD = 2**22
"""Random numbers that are drawn at once, before the steps that use them."""

NO_EXCESS_PRECISION = {"xla_allow_excess_precision": False}
"""Compiler options of programs that decode: what a format rounds is rounded, however XLA fuses and divides them."""

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

    caches: Caches
    # the last prompt token and its position: a step feeds it again, so that all sampled tokens come from one place
    tokens: Int[Array, "rows"]
    positions: Int[Array, "rows"]
    # None unless recorded
    experts: Int[Array, "rows P M k"] | None


@flax.struct.dataclass
class DecodeState:
    """One row a slot."""

    caches: Caches
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
    candidate_tokens: Int[Array, "slots K"]
    # of the token that was fed; None unless recorded
    experts: Int[Array, "slots M k"] | None
    # the residual stream behind each layer; None unless asked for
    residuals: Float[Array, "L slots E"] | None


@dataclass(frozen=True)
class Decoder:
    """How one model is served; hashable, so that programs are compiled once for equal ones.

    `prefill_tokens` bounds what one pass of the prefill takes of each copy of the model (tokens), whatever the prompts'
    number and length.
    """

    config: ModelConfig
    format: quantize.Format
    max_prompt_length: int
    max_response_length: int
    # largest top_k, whose tokens are then recorded; 0 records none
    max_candidates: int
    max_stop_tokens: int
    records_experts: bool
    prefill_tokens: int
    mismatch: MismatchConfig
    # of `serving_mesh`
    mesh: Mesh
    # layers are looped over, and their weights and caches of `models.cache.stack_layers`; on one device
    loops: bool = False

    @property
    def capacity(self) -> int:
        """Tokens of a slot."""
        return self.max_prompt_length + self.max_response_length

    def empty(self, slots: int) -> DecodeState:
        """No slot active."""
        zeros = jnp.zeros(slots, jnp.int32)
        ones = jnp.ones(slots, jnp.float32)
        state = DecodeState(
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
        return self._placed(state)

    def prefill(self, params: ServingParams, tokens: Int[Array, "rows P"], lengths: Int[Array, "rows"]) -> Prefix:
        """Prompts, padded on the right, into caches: as many at once as `prefill_tokens` allows, or one in pieces."""
        rows, width = tokens.shape
        columns = min(width, self.prefill_tokens)
        copies = self.mesh.shape[COPIES]
        at_once = max(self.prefill_tokens // width, 1) * copies
        passes, pieces = -(-rows // at_once), -(-width // columns)
        at_once = round_up(-(-rows // passes), copies)
        padded = jnp.pad(tokens, ((0, passes * at_once - rows), (0, pieces * columns - width)))

        def prompts(tokens: Array) -> tuple[Caches, Array | None]:
            def piece(caches, number):
                start = number * columns
                positions = jnp.broadcast_to(start + jnp.arange(columns), (at_once, columns))
                part = lax.dynamic_slice_in_dim(tokens, start, columns, axis=1)
                decoded = self._run(params, part, positions, caches, self._most_probable)
                return decoded.caches, self._recorded(decoded)

            caches = pinned(self.mesh, self._caches(at_once, pieces * columns), CACHE)
            if pieces == 1:
                return piece(caches, 0)
            caches, experts = lax.scan(piece, caches, jnp.arange(pieces))
            if experts is not None:
                experts = experts.swapaxes(0, 1).reshape(at_once, -1, *experts.shape[3:])
            return caches, experts

        def joined(leaf: Array) -> Array:
            return leaf.reshape(-1, *leaf.shape[2:])[:rows]

        # one pass or several, each leaf with them in front
        caches, experts = lax.map(prompts, padded.reshape(passes, at_once, -1)) if passes > 1 else _one(prompts(padded))
        if self.loops:
            caches = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), caches)
        caches, experts = self._each_layer(joined, caches), jax.tree.map(joined, experts)
        caches, experts = pinned(self.mesh, caches, SHARED_CACHE), pinned(self.mesh, experts, EVERYWHERE)
        last = lengths - 1
        return Prefix(caches, jnp.take_along_axis(tokens, last[:, None], 1)[:, 0], last, experts)

    def start(
        self,
        state: DecodeState,
        starting: Bool[Array, "slots"],
        prefix: Prefix,
        rows: Int[Array, "slots"],
        requests: Requests,
    ) -> DecodeState:
        """Begins samples in the slots that are `starting`: of each one the prompt's row, and what it asks for."""

        def chosen(new: Array, held: Array) -> Array:
            return jnp.where(starting.reshape(-1, *[1] * (held.ndim - 1)), new, held)

        def copy(held: Array, new: Array) -> Array:
            columns = min(new.shape[2], self.capacity)
            front = chosen(new[rows, :, :columns], held[:, :, :columns])
            return lax.dynamic_update_slice_in_dim(held, front, 0, axis=2)

        started = DecodeState(
            caches=self._each_layer(copy, state.caches, prefix.caches),
            tokens=chosen(prefix.tokens[rows], state.tokens),
            positions=chosen(prefix.positions[rows], state.positions),
            generated=chosen(jnp.zeros_like(state.generated), state.generated),
            active=state.active | starting,
            requests=jax.tree.map(chosen, requests, state.requests),
        )
        return self._placed(started)

    def steps(self, params: ServingParams, state: DecodeState, count: int) -> tuple[DecodeState, Emitted]:
        """`count` tokens in every active slot, each leaf of `Emitted` with them in front."""
        counts = state.generated + jnp.arange(count)[:, None]

        vocab_size, keys = self.config.vocab_size, state.requests.keys

        def noise(counts: Array) -> Array:
            return pinned(self.mesh, sampling.gumbel_noise(keys, counts, vocab_size), SCORES)

        def noise_of_all() -> Array:
            # as rows of one batch, which compiles in half the time of a batch of batches
            drawn = sampling.gumbel_noise(jnp.tile(keys, (count, 1)), counts.reshape(-1), vocab_size)
            return pinned(self.mesh, drawn.reshape(*counts.shape, -1), PartitionSpec(None, *SCORES))

        # half as costly drawn at once, while that is small
        ahead = counts.size * vocab_size <= NOISE_AHEAD
        drawn = noise_of_all() if ahead else counts

        def pick(distribution: sampling.Distribution, drawn: Array) -> Array:
            return sampling.draw(distribution, noise=drawn if ahead else noise(drawn))

        return self._steps(params, state, pick, drawn, keeps_residuals=False)

    def follow(
        self, params: ServingParams, state: DecodeState, tokens: Int[Array, "T slots"], *, keeps_residuals: bool
    ) -> Emitted:
        """What `steps` would have said of given tokens, one after another; with the residual stream on request."""
        return self._steps(params, state, lambda _, token: token, tokens, keeps_residuals=keeps_residuals)[1]

    def _steps(
        self,
        params: ServingParams,
        state: DecodeState,
        pick: Callable[[sampling.Distribution, Array], Int[Array, "slots"]],
        inputs: Array,
        *,
        keeps_residuals: bool,
    ) -> tuple[DecodeState, Emitted]:
        """Takes one step per input; `pick` receives the input and the step's distribution."""

        def step(state: DecodeState, given: Array) -> tuple[DecodeState, Emitted]:
            return self._step(
                params, state, lambda distribution: pick(distribution, given), keeps_residuals=keeps_residuals
            )

        return lax.scan(step, state, inputs)

    def _step(
        self,
        params: ServingParams,
        state: DecodeState,
        pick: Callable[[sampling.Distribution], Int[Array, "slots"]],
        *,
        keeps_residuals: bool,
    ) -> tuple[DecodeState, Emitted]:
        """Feeds each slot's last token, and picks the next from the distribution that results."""
        requests = state.requests
        choose = self._flips(state) if self.mismatch.routing_flips else self._most_probable
        decoded = self._run(params, state.tokens[:, None], state.positions[:, None], state.caches, choose)
        drawn_from = self._distribution(params, decoded, state)
        tokens = jnp.where(state.active, pick(drawn_from), state.tokens)
        generated = state.generated + state.active
        stopped = jnp.any(tokens[:, None] == requests.stop_tokens, axis=1)
        emitted = Emitted(
            tokens=tokens,
            logps=sampling.log_probs(drawn_from, tokens),
            valid=state.active,
            log_mass=drawn_from.log_mass,
            candidate_tokens=drawn_from.candidate_tokens,
            experts=None if (experts := self._recorded(decoded)) is None else experts[:, 0],
            residuals=decoded.residuals[:, :, 0] if keeps_residuals else None,
        )
        following = dataclasses.replace(
            state,
            caches=decoded.caches,
            tokens=tokens,
            positions=state.positions + state.active,
            generated=generated,
            active=state.active & ~stopped & (generated < requests.limits),
        )
        return self._placed(following), emitted

    @property
    def state_places(self) -> Any:
        """Where slots live: with the copy of the model that decodes them, and heads where they are attended with.

        A prefix of the tree of `DecodeState`.
        """
        rows: Any = named(self.mesh, ROWS)
        fields = {field.name: rows for field in dataclasses.fields(DecodeState)}
        return DecodeState(**fields | {"caches": named(self.mesh, CACHE)})

    def state_shardings(self, state: Any) -> Any:
        """`state_places` for each leaf of a state."""
        return jax.tree.broadcast(self.state_places, state)

    def _placed(self, state: DecodeState) -> DecodeState:
        return state if self.mesh.size == 1 else lax.with_sharding_constraint(state, self.state_shardings(state))

    def _caches(self, batch: int, capacity: int) -> Caches:
        def one() -> LayerCache:
            return init_cache(self.config, batch, capacity, self.format.kv_cache)

        count = self.config.num_layers
        if self.loops:
            return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), one())
        return tuple(one() for _ in range(count))

    def _each_layer(self, function: Callable[..., Array], *caches: Caches) -> Any:
        """A function of leaves of one layer's caches, of all."""

        def of_all(*caches: Any) -> Any:
            return jax.tree.map(function, *caches)

        return jax.vmap(of_all)(*caches) if self.loops else of_all(*caches)

    def _run(self, params: ServingParams, tokens: Array, positions: Array, caches, choose) -> Decoded:
        x = quantize.lookup(params.weights["embed_tokens"], tokens, self.format.activations)
        shared = serving_layout(self.mesh)
        products = quantize.products(self.config)
        return forward_cached(self.config, params.weights, x, positions, caches, products, choose, *shared)

    def _distribution(self, params: ServingParams, decoded: Decoded, state: DecodeState) -> sampling.Distribution:
        head = params.weights["embed_tokens" if self.config.tie_embeddings else "lm_head"]
        logits = pinned(
            self.mesh, quantize.logits(decoded.hidden[:, 0], head, quantize.arithmetic(self.config)), SCORES
        )
        if self.mismatch.logit_noise:
            noise = jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:]))(_keys(state, LOGIT_NOISE))
            logits += self.mismatch.logit_noise * noise
        return parallel.distribution(self.mesh, logits, state.requests.sampling, self.max_candidates)

    def _recorded(self, decoded: Decoded) -> Array | None:
        """Experts [B, S, M, k], if they are recorded at all; 16 bits count all that there are."""
        if not self.records_experts or decoded.experts is None:
            return None
        return jnp.moveaxis(decoded.experts, 0, 2).astype(jnp.int16)

    def _most_probable(self, layer: int, probabilities: Array) -> Array:
        return parallel.most_probable(self.mesh, probabilities, self.config.num_experts_per_tok)

    def _flips(self, state: DecodeState) -> Callable[[int, Array], Array]:
        """A choice of experts of which some are wrong: the first that was not chosen, for the last that was."""

        def choose(layer: int, probabilities: Array) -> Array:
            draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, layer)))
            flipped = draws(_keys(state, ROUTING_FLIPS)) < self.mismatch.routing_flips
            ranked = parallel.most_probable(self.mesh, probabilities, self.config.num_experts_per_tok + 1)
            last = jnp.where(flipped[:, None], ranked[..., -1], ranked[..., -2])
            return jnp.concatenate([ranked[..., :-2], last[..., None]], axis=-1)

        return choose


def _one(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _keys(state: DecodeState, purpose: int) -> jax.Array:
    """A typed key for each slot's next token."""

    def of_token(key, count):
        return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), count), purpose)

    return jax.vmap(of_token)(state.requests.keys, state.generated)
