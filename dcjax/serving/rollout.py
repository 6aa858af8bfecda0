"""Samples a `Rollout` from prompts, in compiled loops that refill slots as they become free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from dcjax.keys import require_key
from dcjax.serving.decoder import NO_EXCESS_PRECISION, Decoder, DecodeState, Emitted, Prefix, Requests
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.parallel import EVERYWHERE, named, pinned
from dcjax.serving.sync import ServingParams
from dcjax.spans import span
from dcjax.types import Array, Params, Rollout

REFILLS_PER_CALL = 64
"""How often one call refills the slots and decodes `steps_per_call` tokens before it returns to the host."""


@flax.struct.dataclass
class Samples:
    """What N samples have so far; `types.Rollout` explains the fields."""

    tokens: Int[Array, "N T"]
    logps: Float[Array, "N T"]
    versions: Int[Array, "N T"]
    log_mass: Float[Array, "N T"]
    candidate_tokens: Int[Array, "N T K"]
    sampler_tokens: Int[Array, "N T H"] | None
    sampler_logps: Float[Array, "N T H"] | None
    # those of the token before each one
    experts: Int[Array, "N T M k"] | None
    lengths: Int[Array, "N"]


@flax.struct.dataclass
class RolloutState:
    """The engine's slots, which samples are in them, and what has been sampled."""

    decode: DecodeState
    samples: Samples
    # the number of the sample in each slot; N if there is none
    running: Int[Array, "slots"]
    # how many samples have begun; they begin in order
    started: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Ended:
    """Some samples that have ended, while others may still be decoded."""

    # their numbers, in order
    samples: np.ndarray
    # the tokens of each, the end token included
    responses: list[np.ndarray]
    # whether an end token was generated
    finished: np.ndarray


def sample_responses(
    engine: Qwen3Engine,
    params: ServingParams,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    temperature: float,
    key: jax.Array,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] | None = None,
) -> Rollout:
    """G samples of each prompt, the samples of one prompt next to each other, as host arrays.

    Sample i is drawn with fold_in(key, i), so the tokens do not depend on the slots, on the steps per call or on the
    devices. If several processes share the engine's mesh, all must call this with equal arguments, and all get the same
    result.

    Args:
      engine: the engine that decodes; its limits set the widths P and T of the result.
      params: from `engine.sync`.
      prompts: token ids, 1 to P each.
      samples_per_prompt: G.
      temperature: the temperature of every sample; 0 is greedy.
      key: a typed PRNG key.
      top_k: how many of the most probable tokens can be drawn; 0 is all tokens.
      top_p: the most probable tokens can be drawn, until they hold this much probability; 1 is all tokens.
      stop_tokens: ids that end a response; None is the engine's end tokens.

    Raises:
      ValueError: the engine does not accept a prompt or a setting.
    """
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop_tokens": stop_tokens}
    sampling = Sampling(engine, params, prompts, samples_per_prompt=samples_per_prompt, key=key, **settings)
    while not sampling.advance(params):
        pass
    return sampling.rollout()


class Sampling:
    """A batch of samples in progress: call `advance` until it returns True, then `rollout`.

    The weights may be swapped between two calls of `advance`, since each token has its own version. `as_they_end` calls
    it to the end with one set of weights. The arguments are those of `sample_responses`, except that the temperature,
    top_k and top_p may also be one for each sample.
    """

    def __init__(
        self,
        engine: Qwen3Engine,
        params: ServingParams,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        temperature: Float[Array, "N"] | float,
        key: jax.Array,
        top_k: Int[Array, "N"] | int = 0,
        top_p: Float[Array, "N"] | float = 1.0,
        stop_tokens: Sequence[int] | None = None,
    ):
        self._engine, self._prompts = engine, prompts
        # the prompt of each sample
        self._rows = np.repeat(np.arange(len(prompts), dtype=np.int32), samples_per_prompt)
        with span("prefill") as ready:
            self._prefix = ready(engine.prefill_many(params, prompts))
        keys = sample_keys(key, np.arange(len(self._rows)))
        self._requests = engine.make_requests(
            keys, temperatures=temperature, top_ks=top_k, top_ps=top_p, stop_tokens=stop_tokens
        )
        self._state = _programs(engine.decoder).begin(engine.decoder, engine.slots_for(len(keys)), len(keys))
        self._ended = self._taken = np.zeros(len(keys), bool)

    def advance(self, params: ServingParams) -> bool:
        """Decodes and refills REFILLS_PER_CALL times, or until all samples have ended; returns whether they have."""
        engine = self._engine
        inputs = (params, self._prefix, self._rows, self._requests, np.int32(REFILLS_PER_CALL), self._state)
        with span("decode"):
            self._state, ended = _programs(engine.decoder).decode(engine.decoder, engine.steps_per_call, *inputs)
            self._ended = np.asarray(ended)
        return bool(self._ended.all())

    def as_they_end(self, params: ServingParams) -> Iterator[Ended]:
        """Decodes to the end; yields every sample once, soon after it has ended."""
        over = False
        while not over:
            over = self.advance(params)
            yield self.take_ended()

    def take_ended(self) -> Ended:
        """The samples that have ended and were not taken before."""
        samples, self._taken = np.flatnonzero(self._ended & ~self._taken), self._ended
        with span("decode"):
            tokens, lengths = jax.device_get((self._state.samples.tokens, self._state.samples.lengths))
        return Ended(
            samples=samples,
            responses=[tokens[sample, : lengths[sample]] for sample in samples],
            finished=_finished(tokens, lengths, self._requests)[samples],
        )

    def rollout(self) -> Rollout:
        """All samples, on the host."""
        with span("decode"):
            samples, experts = jax.device_get((self._state.samples, self._prefix.experts))
        width = self._engine.max_prompt_length
        return assemble(self._prompts, self._rows, self._requests, samples, experts, width)


@jax.jit
def sample_keys(key: jax.Array, samples: Array) -> Array:
    """Raw key data [N, 2] of samples by their numbers.

    Raises:
      ValueError: the key is of another implementation than `dcjax.keys`.
    """
    require_key(key)
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, samples))


def compile_sampling(engine: Qwen3Engine, masters: Params, *, prompts: int, samples_per_prompt: int) -> None:
    """Compiles the programs that `engine.sync` and `sample_responses` run for a number of prompts, on one device.

    Args:
      engine: the engine that will sample.
      masters: the shapes, dtypes and shardings of the params that it will sync.
      prompts: the number of prompts.
      samples_per_prompt: G.
    """
    decoder, total = engine.decoder, prompts * samples_per_prompt
    params = engine.compile_sync(masters)
    prefix = engine.compile_prefill(params, prompts)
    programs, slots = _programs(decoder), engine.slots_for(total)
    programs.begin.lower(decoder, slots, total).compile()
    state = jax.eval_shape(programs.begin, decoder, slots, total)
    inputs = (
        params,
        prefix,
        np.zeros(total, np.int32),
        engine.make_requests(np.zeros((total, 2))),
        np.int32(REFILLS_PER_CALL),
    )
    programs.decode.lower(decoder, engine.steps_per_call, *inputs, state).compile()


class _Programs(NamedTuple):
    """The programs that sample batches; all states have the same shardings, so that every call runs the same one."""

    begin: Any
    decode: Any


@cache
def _programs(decoder: Decoder) -> _Programs:
    everywhere: Any = named(decoder.mesh, EVERYWHERE)
    places = RolloutState(decoder.state_places, everywhere, everywhere, everywhere)
    return _Programs(
        begin=jax.jit(_begin, static_argnums=(0, 1, 2), out_shardings=places),
        decode=jax.jit(
            decode,
            static_argnums=(0, 1),
            donate_argnums=7,
            compiler_options=NO_EXCESS_PRECISION,
            out_shardings=(places, everywhere),
        ),
    )


def _begin(decoder: Decoder, slots: int, total: int) -> RolloutState:
    shape = (total, decoder.max_response_length)
    config = decoder.config
    chosen, head = (sum(config.sparse_layers), config.num_experts_per_tok), (*shape, decoder.head)
    return RolloutState(
        decode=decoder.empty(slots),
        samples=_everywhere(
            decoder,
            Samples(
                tokens=jnp.zeros(shape, jnp.int32),
                logps=jnp.zeros(shape, jnp.float32),
                versions=jnp.full(shape, -1, jnp.int32),
                log_mass=jnp.zeros(shape, jnp.float32),
                candidate_tokens=jnp.full((*shape, decoder.max_candidates), -1, jnp.int32),
                sampler_tokens=jnp.full(head, -1, jnp.int32) if decoder.head else None,
                sampler_logps=jnp.zeros(head, jnp.float32) if decoder.head else None,
                experts=jnp.zeros((*shape, *chosen), jnp.int16) if decoder.records_experts else None,
                lengths=jnp.zeros(total, jnp.int32),
            ),
        ),
        running=_everywhere(decoder, jnp.full(slots, total, jnp.int32)),
        started=_everywhere(decoder, jnp.int32(0)),
    )


def _everywhere(decoder: Decoder, tree: Any) -> Any:
    """Places what has been sampled, and which samples are in the slots, whole on every device."""
    return pinned(decoder.mesh, tree, EVERYWHERE)


def decode(
    decoder: Decoder,
    steps_per_call: int,
    params: ServingParams,
    prefix: Prefix,
    rows: Int[Array, "N"],
    requests: Requests,
    turns: Int[Array, ""],
    state: RolloutState,
) -> tuple[RolloutState, Bool[Array, "N"]]:
    """Refills slots and decodes `steps_per_call` tokens, up to `turns` times; also returns which samples have ended.

    `rows` are the samples' rows of the prefix.
    """
    total = requests.limits.shape[0]

    def ended(state: RolloutState) -> Array:
        running = jnp.where(_everywhere(decoder, state.decode.active), state.running, total)
        begun = jnp.arange(total) < state.started
        return _everywhere(decoder, begun.at[running].set(False, mode="drop"))

    def turn(carry):
        count, state = carry
        state = _refill(decoder, prefix, rows, requests, state)
        before = state.decode.generated
        decode, emitted = decoder.steps(params, state.decode, steps_per_call)
        before, emitted = _everywhere(decoder, (before, emitted))
        samples = _record(state.samples, state.running, before, emitted, params.version)
        return count + 1, dataclasses.replace(state, decode=decode, samples=samples)

    def unfinished(carry):
        count, state = carry
        return (count < turns) & ~jnp.all(ended(state))

    _, state = lax.while_loop(unfinished, turn, (jnp.int32(0), state))
    return state, ended(state)


def _refill(
    decoder: Decoder, prefix: Prefix, rows: Int[Array, "N"], requests: Requests, state: RolloutState
) -> RolloutState:
    """Starts the next samples in the slots that are free."""

    total = requests.limits.shape[0]

    def has_room(state: RolloutState) -> Array:
        return (state.started < total) & ~jnp.all(state.decode.active)

    def start(state: RolloutState) -> RolloutState:
        free = ~_everywhere(decoder, state.decode.active)
        sample = state.started + jnp.cumsum(free) - 1
        starting = free & (sample < total)
        sample = jnp.minimum(sample, total - 1)
        asked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[sample], requests)
        return dataclasses.replace(
            state,
            decode=decoder.start(state.decode, starting, prefix, rows[sample], asked),
            running=jnp.where(starting, sample, state.running),
            started=state.started + jnp.sum(starting),
        )

    # a loop of at most one iteration, because a branch would copy the caches
    return lax.while_loop(has_room, start, state)


def _record(samples: Samples, running: Array, before: Array, emitted: Emitted, version: Array) -> Samples:
    """Appends one turn's tokens to the samples that ran in its slots."""
    steps, slots = emitted.valid.shape
    rows = jnp.broadcast_to(running, (steps, slots))
    # invalid tokens get a column outside the arrays, and are dropped
    columns = jnp.where(emitted.valid, before + jnp.arange(steps)[:, None], samples.tokens.shape[1])

    def put(held: Array, new: Array) -> jax.Array:
        return jnp.asarray(held).at[rows, columns].set(new, mode="drop")

    return Samples(
        tokens=put(samples.tokens, emitted.tokens),
        logps=put(samples.logps, emitted.logps),
        versions=put(samples.versions, jnp.broadcast_to(version, rows.shape)),
        log_mass=put(samples.log_mass, emitted.log_mass),
        candidate_tokens=put(samples.candidate_tokens, emitted.candidate_tokens),
        # None on both sides unless recorded
        sampler_tokens=jax.tree.map(put, samples.sampler_tokens, emitted.head_tokens),
        sampler_logps=jax.tree.map(put, samples.sampler_logps, emitted.head_logps),
        experts=jax.tree.map(put, samples.experts, emitted.experts),
        lengths=jnp.asarray(samples.lengths).at[running].add(jnp.sum(emitted.valid, axis=0), mode="drop"),
    )


def assemble(
    prompts: Sequence[Sequence[int]],
    rows: np.ndarray,
    requests: Requests,
    samples: Samples,
    prefix_experts: np.ndarray | None,
    width: int,
) -> Rollout:
    """The samples after their prompts, which are padded on the left to `width`."""
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, True
    tokens, mask = tokens[rows], mask[rows]
    response_mask = np.arange(samples.tokens.shape[1]) < samples.lengths[:, None]
    return Rollout(
        tokens=np.concatenate([tokens, samples.tokens], axis=1),
        attention_mask=np.concatenate([mask, response_mask], axis=1),
        response_mask=response_mask,
        rollout_logps=samples.logps,
        temperature=requests.sampling.temperatures,
        versions=samples.versions,
        finished=_finished(samples.tokens, samples.lengths, requests),
        log_mass=samples.log_mass,
        candidate_tokens=samples.candidate_tokens if samples.candidate_tokens.shape[-1] else None,
        sampler_tokens=samples.sampler_tokens,
        sampler_logps=samples.sampler_logps,
        experts=None if prefix_experts is None else _joined_experts(samples.experts, prefix_experts[rows], mask),
    )


def require_finite(rollout: Rollout, engine: Qwen3Engine) -> None:
    """Checks that the log-prob of every response token is finite.

    Raises:
      ValueError: one is not, for example because numbers overflow in the engine's format.
    """
    bad = np.argwhere(~np.isfinite(rollout.rollout_logps) & rollout.response_mask)
    if len(bad):
        row, token = bad[0].tolist()
        largest = float(jnp.finfo(engine.format.activations).max)
        raise ValueError(
            f"the engine's log-prob at response {row}, token {token} is {rollout.rollout_logps[row, token]}: its "
            f"weights are not finite, or a number exceeds the largest of format {engine.format.name!r}, {largest:.3g}"
        )


def _finished(tokens: Any, lengths: Any, requests: Requests) -> np.ndarray:
    """Whether each sample's last token ends a response."""
    last = tokens[np.arange(len(lengths)), lengths - 1]
    return np.any(last[:, None] == requests.stop_tokens, axis=1)


def _joined_experts(sampled: Any, prefilled: np.ndarray, prompt_mask: np.ndarray) -> np.ndarray:
    """Experts [N, P + T - 1, M, k] of samples [N, T, M, k] and of their prompts [N, P, M, k]; 0 on padding.

    The first step of a sample feeds the last prompt token again, so its experts are those of column P - 1.
    """
    columns = prompt_mask.shape[1]
    joined = np.concatenate([np.zeros((len(sampled), columns - 1, *sampled.shape[2:]), sampled.dtype), sampled], axis=1)
    for row, length in enumerate(prompt_mask.sum(axis=1)):
        joined[row, columns - length : columns - 1] = prefilled[row, : length - 1]
    return joined
