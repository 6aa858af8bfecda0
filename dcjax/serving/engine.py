"""`Qwen3Engine`: a JetStream engine that samples, and says with which probability and from which weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt32
from jetstream.engine import engine_api, tokenizer_pb2

from dcjax.models import ModelConfig
from dcjax.models.cache import LayerCache, forward_cached, init_cache
from dcjax.serving import quantize
from dcjax.serving.sync import ServingParams, make_sync
from dcjax.types import Array


@flax.struct.dataclass
class Requests:
    """What N samples ask for."""

    # which row of the prefix each continues
    rows: Int[Array, "N"]
    # tokens to sample at most, the end token included
    limits: Int[Array, "N"]
    # 0 is greedy
    temperatures: Float[Array, "N"]
    # raw PRNG key data; the n-th token of a request is drawn with fold_in(key, n), wherever and whenever it runs
    keys: UInt32[Array, "N 2"]


@flax.struct.dataclass
class Prefix:
    """Prompts prefilled into caches of their own: one row a prompt."""

    caches: tuple[LayerCache, ...]
    # the last prompt token and its position: `generate` feeds it again, so that all sampled tokens come from one place
    tokens: Int[Array, "P"]
    positions: Int[Array, "P"]


@flax.struct.dataclass
class DecodeState:
    """One row a slot."""

    caches: tuple[LayerCache, ...]
    # the token to feed next, and its position
    tokens: Int[Array, "slots"]
    positions: Int[Array, "slots"]
    # tokens sampled so far
    generated: Int[Array, "slots"]
    limits: Int[Array, "slots"]
    temperatures: Float[Array, "slots"]
    keys: UInt32[Array, "slots 2"]
    active: Bool[Array, "slots"]


@flax.struct.dataclass
class SampledTokens(engine_api.ResultTokens):
    """JetStream's result with what a trainer needs beside it: log-probs and weights versions, both [slots, K]."""

    log_prob: Any = None
    version: Any = None

    def copy_to_host_async(self) -> None:
        """Starts the copies of all three arrays."""
        for array in (self.data, self.log_prob, self.version):
            if isinstance(array, jax.Array):
                array.copy_to_host_async()

    def convert_to_numpy(self) -> SampledTokens:
        """The same on the host."""
        return dataclasses.replace(
            self, data=np.asarray(self.data), log_prob=np.asarray(self.log_prob), version=np.asarray(self.version)
        )

    @property
    def tokens(self):
        """int32 [slots, K]; meaningless where not `valid`."""
        return self.data[:, slice(*self.tokens_idx)]

    @property
    def valid(self):
        """int32 [slots, K]: 1 where a token was sampled."""
        return self.data[:, slice(*self.valid_idx)]


class Qwen3Engine(engine_api.Engine):
    """Prefill once a prompt, insert once a sample, generate over slots.

    Args:
      config: the architecture.
      format: serving format: float32, bf16, or int8 (w8a8 with an int8 KV cache).
      slots: samples decoded at once.
      max_prompt_length: longest prompt (tokens).
      max_response_length: longest response (tokens, the end token included).
      end_token: id that ends a response; itself sampled, scored and returned.
      steps_per_call: tokens that one `generate` call decodes in each slot.
      mesh: devices that the engine runs on; one device where None. Params and state are replicated over it.

    Raises:
      ValueError: an unknown format, no slots, a prompt or a request that does not fit, or prefilling on top of an
        existing prefix.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        format: quantize.FormatName,
        slots: int,
        max_prompt_length: int,
        max_response_length: int,
        end_token: int,
        steps_per_call: int = 1,
        mesh: jax.sharding.Mesh | None = None,
    ):
        if format not in quantize.formats:
            raise ValueError(f"format is {format!r}; it must be one of {', '.join(quantize.formats)}")
        for name, size in {"slots": slots, "steps_per_call": steps_per_call}.items():
            _require_within(name, [size], 1)
        self.config, self.format_name, self.format = config, format, quantize.formats[format]
        self.slots, self.steps_per_call, self.end_token = slots, steps_per_call, end_token
        self.max_prompt_length, self.max_response_length = max_prompt_length, max_response_length
        self._mesh = mesh if mesh is not None else jax.sharding.Mesh(jax.devices()[:1], ("data",))
        self._replicated = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        # samples started without a key, which is then their number
        self._unkeyed = 0
        self.sync = make_sync(config, format, self._replicated)
        self._prefill = jax.jit(self._prefill_fn)
        self._insert = jax.jit(_insert_fn, donate_argnames="state")
        self._generate = jax.jit(self._generate_fn, donate_argnames="state")
        # compiled, so that each leaf is a buffer of its own and the state can be donated
        self._empty = jax.jit(self._empty_fn, out_shardings=self._replicated)

    # --- JetStream's interface ---

    def load_params(self, params, version: int = 0) -> ServingParams:
        """Serving params from the trainer's float32 masters: `sync` under JetStream's name."""
        return self.sync(params, version)

    def prefill(self, *, params: ServingParams, existing_prefix=None, padded_tokens, true_length: int) -> Prefix:
        """One prompt, int32 [L] padded on the right, into a Prefix of one row."""
        if existing_prefix is not None:
            raise ValueError("prefilling on top of an existing prefix is not supported; pass the whole prompt")
        _require_within("true_length", [true_length], 1, len(padded_tokens))
        return self.prefill_many(params, [np.asarray(padded_tokens)[:true_length].tolist()])

    def insert(
        self, prefix: Prefix, decode_state: DecodeState, slot: int, request: Requests | None = None
    ) -> DecodeState:
        """Starts a sample of a one-row prefix in `slot`; by default at temperature 1 with a key of its own."""
        _require_within("slot", [slot], 0, self.slots - 1)
        if request is None:
            keys = [[0, self._unkeyed]]
            self._unkeyed += 1
            request = make_requests(rows=[0], limits=[self.max_response_length], temperatures=[1.0], keys=keys)
        return self.insert_many(prefix, decode_state, [slot], request)

    def generate(self, params: ServingParams, decode_state: DecodeState) -> tuple[DecodeState, SampledTokens]:
        """Decodes `steps_per_call` tokens in every slot that is active; `decode_state` is donated."""
        return self._generate(params, state=decode_state)

    def init_decode_state(self) -> DecodeState:
        """All slots empty."""
        return self._empty()

    def get_prefix_destination_sharding(self) -> jax.sharding.Sharding:
        """Replicated over the engine's mesh."""
        return self._replicated

    def get_tokenizer(self) -> tokenizer_pb2.TokenizerParameters:  # pyrefly: ignore[missing-attribute]
        """No vocabulary file of JetStream's kinds; the rollout path never detokenises in the engine."""
        return tokenizer_pb2.TokenizerParameters()  # pyrefly: ignore[missing-attribute]

    @property
    def max_concurrent_decodes(self) -> int:
        return self.slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        return self.max_prompt_length

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self._mesh

    @property
    def colocated_cpus(self) -> None:
        return None

    # --- the same for many at once ---

    def prefill_many(self, params: ServingParams, prompts: Sequence[Sequence[int]]) -> Prefix:
        """P prompts in one call, one row each."""
        _require_within("number of prompts", [len(prompts)], 1)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        _require_within("length of a prompt", lengths, 1, self.max_prompt_length)
        tokens = np.zeros((len(prompts), self.max_prompt_length), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        _require_within("token of a prompt", tokens, 0, self.config.vocab_size - 1)
        return self._prefill(params, tokens, lengths)

    def insert_many(self, prefix: Prefix, decode_state: DecodeState, slots, requests: Requests) -> DecodeState:
        """Starts N samples at once; a slot number beyond the last is ignored (padding). `decode_state` is donated."""
        _require_within("limit of a response", requests.limits, 1, self.max_response_length)
        _require_within("temperature", requests.temperatures, 0)
        return self._insert(prefix, requests, np.asarray(slots, np.int32), state=decode_state)

    # --- compiled programs ---

    def _caches(self, batch: int, capacity: int) -> tuple[LayerCache, ...]:
        return tuple(
            init_cache(self.config, batch, capacity, self.format.kv_cache) for _ in range(self.config.num_layers)
        )

    def _hidden(self, params: ServingParams, tokens, positions, caches):
        x = quantize.lookup(params.weights["embed_tokens"], tokens, self.format.activations)
        hidden, caches, _ = forward_cached(self.config, params.weights, x, positions, caches, quantize.PRODUCTS)
        return hidden, caches

    def _empty_fn(self) -> DecodeState:
        zeros = jnp.zeros(self.slots, jnp.int32)
        return DecodeState(
            caches=self._caches(self.slots, self.max_prompt_length + self.max_response_length),
            tokens=zeros,
            positions=zeros,
            generated=zeros,
            limits=zeros,
            temperatures=jnp.ones(self.slots, jnp.float32),
            keys=jnp.zeros((self.slots, 2), jnp.uint32),
            active=jnp.zeros(self.slots, bool),
        )

    def _prefill_fn(self, params: ServingParams, tokens: Array, lengths: Array) -> Prefix:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        _, caches = self._hidden(params, tokens, positions, self._caches(*tokens.shape))
        last = lengths - 1
        return Prefix(caches=caches, tokens=jnp.take_along_axis(tokens, last[:, None], 1)[:, 0], positions=last)

    def _generate_fn(self, params: ServingParams, state: DecodeState) -> tuple[DecodeState, SampledTokens]:
        state, (tokens, logps, valid) = jax.lax.scan(
            lambda state, _: self._step(params, state), state, length=self.steps_per_call
        )
        steps = self.steps_per_call
        result = SampledTokens(
            data=jnp.concatenate([tokens.T, valid.T.astype(jnp.int32), state.generated[:, None]], axis=1),
            tokens_idx=(0, steps),
            valid_idx=(steps, 2 * steps),
            length_idx=(2 * steps, 2 * steps + 1),
            samples_per_slot=1,
            log_prob=logps.T,
            version=jnp.where(valid.T, params.version, -1),
        )
        return state, result

    def _step(self, params: ServingParams, state: DecodeState):
        hidden, caches = self._hidden(params, state.tokens[:, None], state.positions[:, None], state.caches)
        head = params.weights["embed_tokens" if self.config.tie_embeddings else "lm_head"]
        logits = quantize.logits(hidden[:, 0], head)
        tokens, logps = sample(logits, state.temperatures, state.keys, state.generated)
        tokens = jnp.where(state.active, tokens, state.tokens)
        generated = state.generated + state.active
        ended = (tokens == self.end_token) | (generated >= state.limits)
        following = dataclasses.replace(
            state,
            caches=caches,
            tokens=tokens,
            positions=state.positions + state.active,
            generated=generated,
            active=state.active & ~ended,
        )
        return following, (tokens, jnp.where(state.active, logps, 0.0), state.active)


def _require_within(name: str, values: Any, low: int, high: float | int = math.inf) -> None:
    for value in (np.min(values), np.max(values)):
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"{name} is {value}; this engine takes {bounds}")


def sample(
    logits: Float[Array, "B V"],
    temperatures: Float[Array, "B"],
    keys: UInt32[Array, "B 2"],
    count: Int[Array, "B"],
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token a row from softmax(logits / temperature), and its log-prob in that very distribution, float32.

    Row i is drawn with fold_in(keys[i], count[i]). At temperature 0 the largest logit is taken, with log-prob 0.
    """
    greedy = temperatures == 0
    scaled = logits / jnp.where(greedy, 1.0, temperatures)[:, None]

    def draw(key, n, row):
        return jax.random.categorical(jax.random.fold_in(jax.random.wrap_key_data(key), n), row)

    tokens = jnp.where(greedy, jnp.argmax(logits, axis=-1), jax.vmap(draw)(keys, count, scaled)).astype(jnp.int32)
    logps = jnp.take_along_axis(jax.nn.log_softmax(scaled), tokens[:, None], axis=-1)[:, 0]
    return tokens, jnp.where(greedy, 0.0, logps)


def make_requests(*, rows, limits, temperatures, keys) -> Requests:
    """Requests from host values, each of length N (keys [N, 2])."""
    return Requests(
        rows=np.asarray(rows, np.int32),
        limits=np.asarray(limits, np.int32),
        temperatures=np.asarray(temperatures, np.float32),
        keys=np.asarray(keys, np.uint32),
    )


def _insert_fn(prefix: Prefix, requests: Requests, slots: Array, state: DecodeState) -> DecodeState:
    def place(held, new):
        return held.at[slots].set(new, mode="drop")

    def place_cache(held, new):
        return held.at[slots, :, : new.shape[2]].set(new[requests.rows], mode="drop")

    return DecodeState(
        caches=jax.tree.map(place_cache, state.caches, prefix.caches),
        tokens=place(state.tokens, prefix.tokens[requests.rows]),
        positions=place(state.positions, prefix.positions[requests.rows]),
        generated=place(state.generated, 0),
        limits=place(state.limits, requests.limits),
        temperatures=place(state.temperatures, requests.temperatures),
        keys=place(state.keys, requests.keys),
        active=place(state.active, True),
    )
