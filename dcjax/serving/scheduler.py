"""Which samples are decoded in which slots: those that wait begin in their order, as slots become free.

A turn fills the slots that are free and decodes `steps_per_call` tokens in all of them. A rollout has all of its
samples wait at once and runs many turns in a call, by `Scheduler`; a server runs one at a time, by
`continuous.Continuous`.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from dcjax.serving.decoder import NO_EXCESS_PRECISION, Decoder, DecodeState, Emitted, Prefix, Requests
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.parallel import EVERYWHERE, named, pinned
from dcjax.serving.sync import ServingParams
from dcjax.types import Array


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
class Queue:
    """N samples, and which of them wait in which order."""

    # their prompts, and the row of each sample's
    prefix: Prefix
    rows: Int[Array, "N"]
    # the settings of each
    requests: Requests
    # the first `waiting` are the numbers of those that wait
    order: Int[Array, "N"]
    waiting: Int[Array, ""] | np.int32


@flax.struct.dataclass
class SchedulerState:
    """The engine's slots, which samples are in them, and what has been sampled."""

    decode: DecodeState
    # the number of the sample in each slot; N if there never was one
    running: Int[Array, "slots"]
    # None where it is not kept
    samples: Samples | None


class Scheduler:
    """Decodes N samples with an engine, each once it waits and a slot is free; more may be added between two calls.

    Args:
      engine: the engine.
      prefix: the samples' prompts.
      rows: the row of the prefix of each sample.
      requests: the settings of each.
    """

    def __init__(self, engine: Qwen3Engine, prefix: Prefix, rows: Int[np.ndarray, "N"], requests: Requests):
        self._engine, self._prefix, self._rows, self._requests = engine, prefix, rows, requests
        total = len(rows)
        self._state = programs(engine.decoder).begin(engine.decoder, engine.slots_for(total), total, True)
        self._waiting: deque[int] = deque()
        self._decoding = np.zeros(total, bool)

    @property
    def samples(self) -> Samples:
        """What has been sampled so far, on the devices."""
        assert self._state.samples is not None
        return self._state.samples

    def wait(self, samples: Sequence[int]) -> None:
        """Samples that begin as soon as those before them have, and a slot is free."""
        self._waiting.extend(samples)

    def advance(self, params: ServingParams, turns: int) -> Int[np.ndarray, "ended"]:
        """Runs so many turns at most, or until nothing is left.

        Returns:
          The samples that have ended meanwhile, in order.
        """
        engine, total = self._engine, len(self._rows)
        queue = queue_of(self._prefix, self._rows, self._requests, self._waiting)
        self._state, begun, running = programs(engine.decoder).decode(
            engine.decoder, engine.steps_per_call, params, queue, np.int32(turns), self._state
        )
        for _ in range(int(begun)):
            self._decoding[self._waiting.popleft()] = True
        decoding = np.zeros(total + 1, bool)
        decoding[np.asarray(running)] = True
        ended = np.flatnonzero(self._decoding & ~decoding[:total])
        self._decoding[ended] = False
        return ended


def queue_of(prefix: Prefix, rows: np.ndarray, requests: Requests, waiting: Iterable[int]) -> Queue:
    """The queue in which some samples wait."""
    order, numbers = np.zeros(len(rows), np.int32), list(waiting)
    order[: len(numbers)] = numbers
    return Queue(prefix, rows, requests, order, np.int32(len(numbers)))


class Programs(NamedTuple):
    """The programs of a scheduler; all states have the same shardings, so that every call runs the same one."""

    begin: Any
    decode: Any
    turn: Any


@cache
def programs(decoder: Decoder) -> Programs:
    """Those of a decoder."""
    everywhere: Any = named(decoder.mesh, EVERYWHERE)
    places = SchedulerState(decoder.state_places, everywhere, everywhere)
    return Programs(
        begin=jax.jit(_begin, static_argnums=(0, 1, 2, 3), out_shardings=places),
        decode=jax.jit(
            decode,
            static_argnums=(0, 1),
            donate_argnums=5,
            compiler_options=NO_EXCESS_PRECISION,
            out_shardings=(places, everywhere, everywhere),
        ),
        turn=jax.jit(
            turn,
            static_argnums=(0, 1),
            donate_argnums=6,
            compiler_options=NO_EXCESS_PRECISION,
            out_shardings=(places, everywhere),
        ),
    )


def _begin(decoder: Decoder, slots: int, total: int, keeps: bool) -> SchedulerState:
    return SchedulerState(
        decode=decoder.empty(slots),
        running=_everywhere(decoder, jnp.full(slots, total, jnp.int32)),
        samples=_everywhere(decoder, _no_samples(decoder, total)) if keeps else None,
    )


def _no_samples(decoder: Decoder, total: int) -> Samples:
    shape = (total, decoder.max_response_length)
    config = decoder.config
    chosen, head = (sum(config.sparse_layers), config.num_experts_per_tok), (*shape, decoder.head)
    return Samples(
        tokens=jnp.zeros(shape, jnp.int32),
        logps=jnp.zeros(shape, jnp.float32),
        versions=jnp.full(shape, -1, jnp.int32),
        log_mass=jnp.zeros(shape, jnp.float32),
        candidate_tokens=jnp.full((*shape, decoder.max_candidates), -1, jnp.int32),
        sampler_tokens=jnp.full(head, -1, jnp.int32) if decoder.head else None,
        sampler_logps=jnp.zeros(head, jnp.float32) if decoder.head else None,
        experts=jnp.zeros((*shape, *chosen), jnp.int16) if decoder.records_experts else None,
        lengths=jnp.zeros(total, jnp.int32),
    )


def _everywhere(decoder: Decoder, tree: Any) -> Any:
    """Places what has been sampled, and which samples are in the slots, whole on every device."""
    return pinned(decoder.mesh, tree, EVERYWHERE)


def decode(
    decoder: Decoder,
    steps_per_call: int,
    params: ServingParams,
    queue: Queue,
    turns: Int[Array, ""],
    state: SchedulerState,
) -> tuple[SchedulerState, Int[Array, ""], Int[Array, "slots"]]:
    """Runs `turns` turns at most; returns how many samples have begun, and which are in the slots, N where none is."""

    def unfinished(carry):
        count, begun, state = carry
        return (count < turns) & ((begun < queue.waiting) | jnp.any(_everywhere(decoder, state.decode.active)))

    def recorded(carry):
        count, begun, state = carry
        begun, state, before, emitted = _turn(decoder, steps_per_call, params, queue, begun, state)
        samples = _record(state.samples, state.running, before, emitted, params.version)
        return count + 1, begun, dataclasses.replace(state, samples=samples)

    _, begun, state = lax.while_loop(unfinished, recorded, (jnp.int32(0), jnp.int32(0), state))
    running = jnp.where(_everywhere(decoder, state.decode.active), state.running, len(queue.rows))
    return state, begun, _everywhere(decoder, running)


def turn(
    decoder: Decoder,
    steps_per_call: int,
    params: ServingParams,
    queue: Queue,
    cancelled: Bool[Array, "N"],
    wants_top: Bool[Array, ""],
    state: SchedulerState,
) -> tuple[SchedulerState, tuple[Int[Array, "slots"], Emitted]]:
    """Gives up the samples that are cancelled, and runs one turn; returns which sample is in each slot, and its tokens.

    Leaves of `Emitted` have a leading axis of tokens; top log-probs mean something where they are wanted.
    """
    active = state.decode.active & ~jnp.asarray(cancelled)[state.running]
    state = dataclasses.replace(state, decode=dataclasses.replace(state.decode, active=active))
    _, state, _, emitted = _turn(decoder, steps_per_call, params, queue, jnp.int32(0), state, wants_top)
    return state, (state.running, emitted)


def _turn(
    decoder: Decoder,
    steps_per_call: int,
    params: ServingParams,
    queue: Queue,
    begun: Array,
    state: SchedulerState,
    wants_top: Array | None = None,
) -> tuple[Array, SchedulerState, Array, Emitted]:
    """Fills the slots that are free, from the place `begun` of the queue on, and decodes.

    Returns:
      The place of the queue behind those that have begun; the state; how many tokens each slot had; and the new ones.
    """
    begun, state = _fill(decoder, queue, begun, state)
    before = state.decode.generated
    decode, emitted = decoder.steps(params, state.decode, steps_per_call, wants_top)
    before, emitted = _everywhere(decoder, (before, emitted))
    return begun, dataclasses.replace(state, decode=decode), before, emitted


def _fill(decoder: Decoder, queue: Queue, begun: Array, state: SchedulerState) -> tuple[Array, SchedulerState]:
    """Starts the next samples of the queue in the slots that are free."""

    def has_room(carry) -> Array:
        begun, state = carry
        return (begun < queue.waiting) & ~jnp.all(state.decode.active)

    def start(carry):
        begun, state = carry
        free = ~_everywhere(decoder, state.decode.active)
        place = begun + jnp.cumsum(free) - 1
        starting = free & (place < queue.waiting)
        sample = jnp.asarray(queue.order)[jnp.minimum(place, len(queue.order) - 1)]
        rows, requests = jax.tree.map(lambda leaf: jnp.asarray(leaf)[sample], (queue.rows, queue.requests))
        started = dataclasses.replace(
            state,
            decode=decoder.start(state.decode, starting, queue.prefix, rows, requests),
            running=jnp.where(starting, sample, state.running),
        )
        return begun + jnp.sum(starting), started

    # a loop of at most one iteration, because a branch would copy the caches
    return lax.while_loop(has_room, start, (begun, state))


def _record(samples: Samples | None, running: Array, before: Array, emitted: Emitted, version: Array) -> Samples:
    """Appends one turn's tokens to the samples that ran in its slots."""
    assert samples is not None
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
