"""The serving policy as pure functions: prefill of prompts, and decoding of one token in every slot."""

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

from dcjax.keys import as_key
from dcjax.models import ModelConfig
from dcjax.models.attention import CachedKernel, choose_cached
from dcjax.models.cache import Caches, Decoded, LayerCache, forward_cached, init_cache
from dcjax.models.layers import round_up
from dcjax.models.parameters import head_name
from dcjax.serving import parallel, sampling
from dcjax.serving.formats import Format
from dcjax.serving.formats.served import arithmetic, products
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.parallel import CACHE, COPIES, EVERYWHERE, ROWS, SCORES, SHARED_CACHE, named, pinned, serving_layout
from dcjax.serving.sampling import SamplingParams
from dcjax.serving.sync import ServingParams
from dcjax.types import Array

NOISE_AHEAD = 2**22
"""The most random numbers that are drawn at once, ahead of the steps that use them."""

NO_EXCESS_PRECISION = {"xla_allow_excess_precision": False}
"""Compiler options of programs that decode: what a format rounds is rounded, however XLA fuses or splits it."""

LOGIT_NOISE, ROUTING_FLIPS = 1, 2
"""Numbers folded into a token's key, for random numbers other than those that draw the token."""


@flax.struct.dataclass
class Requests:
    """The settings of N samples."""

    # tokens to sample at most, the end token included
    limits: Int[Array, "N"]
    sampling: SamplingParams
    # ids that end a response, padded with -1; end tokens themselves are sampled, scored and returned
    stop_tokens: Int[Array, "N M"]
    # raw PRNG key data; the n-th token of a request is drawn with fold_in(key, n), wherever and whenever it runs
    keys: UInt32[Array, "N 2"]


@flax.struct.dataclass
class Prefix:
    """Prompts prefilled into caches of their own, one row for each prompt."""

    caches: Caches
    # the last prompt token and its position: decoding feeds it again, so that it computes every token that is sampled
    tokens: Int[Array, "rows"]
    positions: Int[Array, "rows"]
    # None unless recorded
    experts: Int[Array, "rows P M k"] | None


@flax.struct.dataclass
class DecodeState:
    """The state of all slots, one row for each."""

    caches: Caches
    # the token to feed next, and its position
    tokens: Int[Array, "slots"]
    positions: Int[Array, "slots"]
    # tokens sampled so far
    generated: Int[Array, "slots"]
    active: Bool[Array, "slots"]
    requests: Requests


@flax.struct.dataclass
class TopLogprobs:
    """What the model itself gives to a sampled token and to its most probable ones, beside what was sampled from."""

    # natural logs, at temperature 1 and over all tokens
    logps: Float[Array, "slots"]
    # the model's most probable tokens, and their log-probs under the model and under what was sampled from
    top_tokens: Int[Array, "slots H"]
    top_logps: Float[Array, "slots H"]
    top_sampled_logps: Float[Array, "slots H"]


@flax.struct.dataclass
class Emitted:
    """One token from every slot, with what training needs to know about it; meaningless where not `valid`."""

    tokens: Int[Array, "slots"]
    # natural logs, under the distribution that was sampled from; the plain softmax's where `mismatch.raw_logps` is on
    logps: Float[Array, "slots"]
    valid: Bool[Array, "slots"]
    # both as in `sampling.Distribution`, the mass of what `logps` are of
    log_mass: Float[Array, "slots"]
    candidate_tokens: Int[Array, "slots K"]
    # the most probable tokens of the distribution that was sampled from, and their log-probs: -1 and 0 behind the last
    # that could be drawn; None unless recorded
    head_tokens: Int[Array, "slots H"] | None
    head_logps: Float[Array, "slots H"] | None
    # those of the token that was fed; None unless recorded
    experts: Int[Array, "slots M k"] | None
    # the residual stream after each layer; None unless requested
    residuals: Float[Array, "L slots E"] | None
    # None unless asked for
    top: TopLogprobs | None


@dataclass(frozen=True)
class Decoder:
    """How one model is served; hashable, so that equal decoders share compiled programs.

    `prefill_tokens` is the most tokens that one pass of the prefill runs through each copy of the model, whatever the
    number and length of the prompts.
    """

    config: ModelConfig
    format: Format
    # of keys and values
    kv_cache: jnp.dtype
    max_prompt_length: int
    max_response_length: int
    # largest top_k, whose tokens are then recorded; 0 records none
    max_candidates: int
    max_stop_tokens: int
    records_experts: bool
    prefill_tokens: int
    mismatch: MismatchConfig
    # as `serving_mesh` makes it
    mesh: Mesh
    # how many of the most probable tokens are recorded with their log-probs, whatever the truncation; 0 records none
    head: int = 0
    # of how many of the model's most probable tokens log-probs can be emitted, beside those of each sampled one
    top_logprobs: int = 0
    # whether layers are looped over, with weights and caches from `models.cache.stack_layers`; only on one device
    loops: bool = False

    @property
    def capacity(self) -> int:
        """How many tokens a slot holds."""
        return self.max_prompt_length + self.max_response_length

    @property
    def attention(self) -> CachedKernel:
        """The kernel by which a token attends to its slot's cache."""
        return choose_cached(self.config.attention, self.mesh.devices.flat[0].platform, self.format.activations)

    def empty(self, slots: int) -> DecodeState:
        """A state in which no slot is active."""
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
        """Prefills prompts, padded on the right: as many at once as `prefill_tokens` allows, or each in pieces."""
        rows = len(tokens)

        def joined(leaf: Array) -> Array:
            return leaf.reshape(-1, *leaf.shape[2:])[:rows]

        # each leaf has a leading axis of passes
        caches, experts = self._in_passes(params, (tokens,), self._recorded, lambda caches, experts: (caches, experts))
        if self.loops:
            caches = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), caches)
        caches, experts = self._each_layer(joined, caches), jax.tree.map(joined, experts)
        caches, experts = pinned(self.mesh, caches, SHARED_CACHE), pinned(self.mesh, experts, EVERYWHERE)
        last = lengths - 1
        return Prefix(caches, jnp.take_along_axis(tokens, last[:, None], 1)[:, 0], last, experts)

    def _in_passes(
        self,
        params: ServingParams,
        rows: tuple[Array, ...],
        record: Callable[[Decoded], Any],
        finish: Callable[..., Any],
    ) -> Any:
        """Runs rows of tokens through the layers, as many at once as `prefill_tokens` allows, or each in pieces.

        Args:
          params: of this decoder.
          rows: tokens [rows, S], padded on the right, and other arrays by row.
          record: what is kept of a piece, a tree of arrays by token, [B, columns, ...].
          finish: (caches of a pass, what was recorded of all its tokens, its other rows ...) -> what the pass gives.

        Returns:
          What each pass gives, with a leading axis of passes; the last one is filled up with rows of zeros.
        """
        count, width = rows[0].shape
        columns = min(width, self.prefill_tokens)
        copies = self.mesh.shape[COPIES]
        at_once = max(self.prefill_tokens // width, 1) * copies
        passes, pieces = -(-count // at_once), -(-width // columns)
        at_once = round_up(-(-count // passes), copies)

        def one_pass(rows: tuple[Array, ...]) -> Any:
            tokens, *others = rows

            def piece(caches, number):
                start = number * columns
                positions = jnp.broadcast_to(start + jnp.arange(columns), (at_once, columns))
                part = lax.dynamic_slice_in_dim(tokens, start, columns, axis=1)
                decoded = self._run(params, part, positions, caches, self._most_probable)
                return decoded.caches, record(decoded)

            caches = pinned(self.mesh, self._caches(at_once, pieces * columns), CACHE)
            if pieces == 1:
                return finish(*piece(caches, 0), *others)
            caches, recorded = lax.scan(piece, caches, jnp.arange(pieces))
            recorded = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(at_once, -1, *x.shape[3:]), recorded)
            return finish(caches, recorded, *others)

        def padded(leaf: Array, columns: int) -> Array:
            return jnp.pad(
                leaf, ((0, passes * at_once - count), (0, columns), *[(0, 0)] * (leaf.ndim - 2))[: leaf.ndim]
            )

        tokens, *others = rows
        given = (padded(tokens, pieces * columns - width), *(padded(leaf, 0) for leaf in others))
        if passes == 1:
            return _with_leading_axis(one_pass(given))
        return lax.map(one_pass, jax.tree.map(lambda x: x.reshape(passes, at_once, *x.shape[1:]), given))

    def start(
        self,
        state: DecodeState,
        starting: Bool[Array, "slots"],
        prefix: Prefix,
        rows: Int[Array, "slots"],
        requests: Requests,
    ) -> DecodeState:
        """Begins samples in the slots that are `starting`, each with its prompt's row of `prefix` and its request."""

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

    def steps(
        self, params: ServingParams, state: DecodeState, count: int, wants_top: Bool[Array, ""] | None = None
    ) -> tuple[DecodeState, Emitted]:
        """Decodes `count` tokens in every active slot; each leaf of `Emitted` has a leading axis of tokens.

        `wants_top` is whether top log-probs are computed; where they are not, zeros are emitted. What is sampled is
        the same, since it is one program.
        """
        counts = state.generated + jnp.arange(count)[:, None]

        vocab_size, keys = self.config.vocab_size, state.requests.keys

        def noise(counts: Array) -> Array:
            return pinned(self.mesh, sampling.gumbel_noise(keys, counts, vocab_size), SCORES)

        def noise_of_all() -> Array:
            # as rows of one batch, which compiles in half the time of a batch of batches
            drawn = sampling.gumbel_noise(jnp.tile(keys, (count, 1)), counts.reshape(-1), vocab_size)
            return pinned(self.mesh, drawn.reshape(*counts.shape, -1), PartitionSpec(None, *SCORES))

        # drawing all noise at once halves its cost, as long as there is not too much of it
        ahead = counts.size * vocab_size <= NOISE_AHEAD
        drawn = noise_of_all() if ahead else counts

        def pick(distribution: sampling.Distribution, drawn: Array) -> Array:
            return sampling.draw(distribution, noise=drawn if ahead else noise(drawn))

        return self._steps(params, state, pick, drawn, wants_top, keeps_residuals=False)

    def follow(
        self, params: ServingParams, state: DecodeState, tokens: Int[Array, "T slots"], *, keeps_residuals: bool
    ) -> Emitted:
        """What `steps` would have emitted for given tokens, fed one by one; with residual streams on request."""
        return self._steps(params, state, lambda _, token: token, tokens, None, keeps_residuals=keeps_residuals)[1]

    def hidden(
        self, params: ServingParams, tokens: Int[Array, "rows S"], starts: Int[Array, "rows"], length: int
    ) -> Float[Array, "rows length E"]:
        """The normed hidden states that predict the `length` tokens of each row from its start on.

        What is rounded, the cache included, is what `follow` rounds; sums are of other shapes.
        """

        def of_responses(caches: Caches, hidden: Array, starts: Array) -> Array:
            columns = jnp.minimum(starts[:, None] + jnp.arange(length), tokens.shape[1] - 1)
            return jnp.take_along_axis(hidden, columns[..., None] - 1, axis=1)

        # rows that fill up a pass have any columns
        read = self._in_passes(params, (tokens, starts), lambda decoded: decoded.hidden, of_responses)
        return read.reshape(-1, *read.shape[2:])[: len(tokens)]

    def read(
        self,
        params: ServingParams,
        tokens: Int[Array, "rows S"],
        starts: Int[Array, "rows"],
        temperatures: Float[Array, "rows"],
        length: int,
    ) -> Float[Array, "rows length"]:
        """Log-probs of the `length` tokens of each row from its start on, of the whole softmax, by `hidden`."""
        before = self.hidden(params, tokens, starts, length)
        rows, columns = len(tokens), jnp.minimum(starts[:, None] + jnp.arange(length), tokens.shape[1] - 1)
        targets = jnp.take_along_axis(tokens, columns, axis=1)
        softmax = SamplingParams(temperatures, jnp.zeros(rows, jnp.int32), jnp.ones(rows))

        def column(of_one: tuple[Array, Array]) -> Array:
            hidden, targets = of_one
            logits = self._head(params, hidden)
            return sampling.log_probs(parallel.distribution(self.mesh, logits, softmax, 0), targets)

        return lax.map(column, (before.swapaxes(0, 1), targets.T)).T

    def read_model(
        self, params: ServingParams, tokens: Int[Array, "1 S"], top: int
    ) -> tuple[Float[Array, "S-1"], Int[Array, "S-1 H"], Float[Array, "S-1 H"]]:
        """What the model gives to each token of a sequence behind the first, and its `top` most probable ones there."""
        length = tokens.shape[1] - 1
        before = self.hidden(params, tokens, jnp.ones(1, jnp.int32), length)[0]

        def column(of_one: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            hidden, target = of_one
            model = sampling.plain(self._head(params, hidden[None]))
            logps, most_probable = parallel.head(self.mesh, model, max(top, 1))
            return sampling.log_probs(model, target[None])[0], most_probable[0, :top], logps[0, :top]

        return lax.map(column, (before, tokens[0, 1:]))

    def _steps(
        self,
        params: ServingParams,
        state: DecodeState,
        pick: Callable[[sampling.Distribution, Array], Int[Array, "slots"]],
        inputs: Array,
        wants_top: Array | None,
        *,
        keeps_residuals: bool,
    ) -> tuple[DecodeState, Emitted]:
        """Takes one step per input; `pick` receives the input and the step's distribution."""

        def step(state: DecodeState, given: Array) -> tuple[DecodeState, Emitted]:
            def picked(distribution: sampling.Distribution) -> Array:
                return pick(distribution, given)

            return self._step(params, state, picked, wants_top, keeps_residuals=keeps_residuals)

        return lax.scan(step, state, inputs)

    def _step(
        self,
        params: ServingParams,
        state: DecodeState,
        pick: Callable[[sampling.Distribution], Int[Array, "slots"]],
        wants_top: Array | None,
        *,
        keeps_residuals: bool,
    ) -> tuple[DecodeState, Emitted]:
        """Feeds each slot's last token, and picks the next from the distribution that results."""
        requests = state.requests
        choose = self._flips(state) if self.mismatch.routing_flips else self._most_probable
        decoded = self._run(params, state.tokens[:, None], state.positions[:, None], state.caches, choose)
        logits = self._logits(params, decoded, state)
        drawn_from = parallel.distribution(self.mesh, logits, requests.sampling, self.max_candidates)
        reported = sampling.plain(logits) if self.mismatch.raw_logps else drawn_from
        tokens = jnp.where(state.active, pick(drawn_from), state.tokens)
        head_logps, head_tokens = (None, None) if not self.head else parallel.head(self.mesh, drawn_from, self.head)
        generated = state.generated + state.active
        stopped = jnp.any(tokens[:, None] == requests.stop_tokens, axis=1)
        emitted = Emitted(
            tokens=tokens,
            logps=sampling.log_probs(reported, tokens),
            valid=state.active,
            log_mass=reported.log_mass,
            candidate_tokens=drawn_from.candidate_tokens,
            head_tokens=head_tokens,
            head_logps=head_logps,
            experts=None if (experts := self._recorded(decoded)) is None else experts[:, 0],
            residuals=decoded.residuals[:, :, 0] if keeps_residuals else None,
            top=None if wants_top is None else lax.cond(wants_top, self._top, self._no_top, logits, drawn_from, tokens),
        )
        active = state.active & ~stopped & (generated < requests.limits)
        following = dataclasses.replace(
            state,
            caches=decoded.caches,
            tokens=tokens,
            # a slot that has ended reads its first token alone
            positions=jnp.where(active, state.positions + 1, 0),
            generated=generated,
            active=active,
        )
        return self._placed(following), emitted

    def _top(self, logits: Array, drawn_from: sampling.Distribution, tokens: Array) -> TopLogprobs:
        model = sampling.plain(logits)
        logps, top = parallel.head(self.mesh, model, self.top_logprobs)
        return TopLogprobs(sampling.log_probs(model, tokens), top, logps, sampling.log_probs_of(drawn_from, top))

    def _no_top(self, logits: Array, drawn_from: sampling.Distribution, tokens: Array) -> TopLogprobs:
        several = jnp.zeros((len(tokens), self.top_logprobs), jnp.float32)
        return TopLogprobs(jnp.zeros(len(tokens), jnp.float32), several.astype(jnp.int32), several, several)

    @property
    def state_places(self) -> Any:
        """The shardings of a `DecodeState`, as a prefix of its tree.

        Slots are on the copy of the model that decodes them, and heads on the devices that attend with them.
        """
        rows: Any = named(self.mesh, ROWS)
        fields = {field.name: rows for field in dataclasses.fields(DecodeState)}
        return DecodeState(**fields | {"caches": named(self.mesh, CACHE)})

    def state_shardings(self, state: Any) -> Any:
        """The sharding of each leaf of a state, from `state_places`."""
        return jax.tree.broadcast(self.state_places, state)

    def _placed(self, state: DecodeState) -> DecodeState:
        return state if self.mesh.size == 1 else lax.with_sharding_constraint(state, self.state_shardings(state))

    def prompt_caches(self, rows: int) -> Caches:
        """What `prefill` leaves of so many prompts, empty."""
        pieces = -(-self.max_prompt_length // self.prefill_tokens)
        return self._caches(rows, pieces * min(self.max_prompt_length, self.prefill_tokens))

    def no_prompts(self, rows: int) -> Prefix:
        """Room for so many prompts, of which `put_prompt` fills a row."""
        numbers = jnp.zeros(rows, jnp.int32)
        return Prefix(pinned(self.mesh, self.prompt_caches(rows), SHARED_CACHE), numbers, numbers, None)

    def put_prompt(self, prompts: Prefix, row: Int[Array, ""], new: Prefix) -> Prefix:
        """`prompts` with the only row of `new` in place of one of its rows; what was there behind it is never read."""

        def put(held: Array, new: Array) -> Array:
            return lax.dynamic_update_slice(held, new, (row, *[0] * (held.ndim - 1)))

        return Prefix(
            pinned(self.mesh, self._each_layer(put, prompts.caches, new.caches), SHARED_CACHE),
            put(prompts.tokens, new.tokens),
            put(prompts.positions, new.positions),
            None,
        )

    def _caches(self, batch: int, capacity: int) -> Caches:
        def one() -> LayerCache:
            return init_cache(self.config, batch, capacity, self.kv_cache)

        count = self.config.num_layers
        if self.loops:
            return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), one())
        return tuple(one() for _ in range(count))

    def _each_layer(self, function: Callable[..., Array], *caches: Caches) -> Any:
        """Applies a function of the leaves of one layer's caches to the caches of all layers."""

        def of_all(*caches: Any) -> Any:
            return jax.tree.map(function, *caches)

        return jax.vmap(of_all)(*caches) if self.loops else of_all(*caches)

    def _run(self, params: ServingParams, tokens: Array, positions: Array, caches, choose) -> Decoded:
        x = params.weights["embed_tokens"].lookup(tokens, self.format.activations)
        shared = serving_layout(self.mesh, self.attention)
        return forward_cached(self.config, params.weights, x, positions, caches, products(self.config), choose, *shared)

    def _logits(self, params: ServingParams, decoded: Decoded, state: DecodeState) -> Float[Array, "slots V"]:
        logits = self._head(params, decoded.hidden[:, 0])
        if self.mismatch.logit_noise:
            noise = jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:]))(_keys(state, LOGIT_NOISE))
            logits += self.mismatch.logit_noise * noise
        return logits

    def _head(self, params: ServingParams, hidden: Float[Array, "rows E"]) -> Float[Array, "rows V"]:
        head = params.weights[head_name(self.config)]
        return pinned(self.mesh, head.logits(hidden, arithmetic(self.config)), SCORES)

    def _recorded(self, decoded: Decoded) -> Array | None:
        """Experts [B, S, M, k] if they are recorded, else None; int16 holds the number of any expert."""
        if not self.records_experts or decoded.experts is None:
            return None
        return jnp.moveaxis(decoded.experts, 0, 2).astype(jnp.int16)

    def _most_probable(self, layer: int, probabilities: Array) -> Array:
        return parallel.most_probable(self.mesh, probabilities, self.config.num_experts_per_tok)

    def _flips(self, state: DecodeState) -> Callable[[int, Array], Array]:
        """A choice of experts that is wrong for some tokens: the next expert takes the place of the last one chosen."""

        def choose(layer: int, probabilities: Array) -> Array:
            draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, layer)))
            flipped = draws(_keys(state, ROUTING_FLIPS)) < self.mismatch.routing_flips
            ranked = parallel.most_probable(self.mesh, probabilities, self.config.num_experts_per_tok + 1)
            last = jnp.where(flipped[:, None], ranked[..., -1], ranked[..., -2])
            return jnp.concatenate([ranked[..., :-2], last[..., None]], axis=-1)

        return choose


def _with_leading_axis(tree: Any) -> Any:
    """The tree with an axis of size 1 in front of each leaf's axes."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _keys(state: DecodeState, purpose: int) -> jax.Array:
    """A typed key for each slot's next token."""

    def of_token(key, count):
        return jax.random.fold_in(jax.random.fold_in(as_key(key), count), purpose)

    return jax.vmap(of_token)(state.requests.keys, state.generated)
