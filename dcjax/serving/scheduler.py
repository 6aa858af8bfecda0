"""Which samples are decoded in which slots: those that wait begin in their order, as slots become free.

A rollout has all of its samples wait at once, and decodes many turns in a call. More may be added between two calls.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

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
class SchedulerState:
    """The engine's slots, which samples are in them, and what has been sampled."""

    decode: DecodeState
    samples: Samples
    # the number of the sample in each slot; N if there is none
    running: Int[Array, "slots"]


class Scheduler:
    """Decodes N samples with an engine, each once it waits and a slot is free.

    Args:
      engine: the engine.
      prefix: the samples' prompts.
      rows: the row of the prefix of each sample.
      requests: the settings of each.
    """

    def __init__(self, engine: Qwen3Engine, prefix: Prefix, rows: Int[np.ndarray, "N"], requests: Requests):
        self._engine, self._prefix, self._rows, self._requests = engine, prefix, rows, requests
        total = len(rows)
        self._state = programs(engine.decoder).begin(engine.decoder, engine.slots_for(total), total)
        self._waiting: deque[int] = deque()
        self._decoding = np.zeros(total, bool)

    @property
    def samples(self) -> Samples:
        """What has been sampled so far, on the devices."""
        return self._state.samples

    def wait(self, samples: Sequence[int]) -> None:
        """Samples that begin as soon as those before them have, and a slot is free."""
        self._waiting.extend(samples)

    def advance(self, params: ServingParams, turns: int) -> Int[np.ndarray, "ended"]:
        """Fills free slots and decodes `steps_per_call` tokens, so many times at most or until nothing is left.

        Returns:
          The samples that have ended meanwhile, in order.
        """
        engine, total = self._engine, len(self._rows)
        queue = np.zeros(total, np.int32)
        queue[: len(self._waiting)] = self._waiting
        inputs = (params, self._prefix, self._rows, self._requests, queue, np.int32(len(self._waiting)))
        self._state, begun, running = programs(engine.decoder).decode(
            engine.decoder, engine.steps_per_call, *inputs, np.int32(turns), self._state
        )
        for _ in range(int(begun)):
            self._decoding[self._waiting.popleft()] = True
        decoding = np.zeros(total + 1, bool)
        decoding[np.asarray(running)] = True
        ended = np.flatnonzero(self._decoding & ~decoding[:total])
        self._decoding[ended] = False
        return ended


class Programs(NamedTuple):
    """The programs of a scheduler; all states have the same shardings, so that every call runs the same one."""

    begin: Any
    decode: Any


@cache
def programs(decoder: Decoder) -> Programs:
    """Those of a decoder."""
    everywhere: Any = named(decoder.mesh, EVERYWHERE)
    places = SchedulerState(decoder.state_places, everywhere, everywhere)
    return Programs(
        begin=jax.jit(_begin, static_argnums=(0, 1, 2), out_shardings=places),
        decode=jax.jit(
            decode,
            static_argnums=(0, 1),
            donate_argnums=9,
            compiler_options=NO_EXCESS_PRECISION,
            out_shardings=(places, everywhere, everywhere),
        ),
    )


def _begin(decoder: Decoder, slots: int, total: int) -> SchedulerState:
    shape = (total, decoder.max_response_length)
    config = decoder.config
    chosen, head = (sum(config.sparse_layers), config.num_experts_per_tok), (*shape, decoder.head)
    return SchedulerState(
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
    queue: Int[Array, "N"],
    waiting: Int[Array, ""],
    turns: Int[Array, ""],
    state: SchedulerState,
) -> tuple[SchedulerState, Int[Array, ""], Int[Array, "slots"]]:
    """Fills slots from the queue, of which the first `waiting` are samples, and decodes `steps_per_call` tokens.

    It does so `turns` times at most, and returns how many samples have begun, and which are in the slots, N where none
    is. `rows` are the samples' rows of the prefix.
    """

    def turn(carry):
        count, begun, state = carry
        begun, state = _fill(decoder, prefix, rows, requests, queue, waiting, begun, state)
        before = state.decode.generated
        decode, emitted = decoder.steps(params, state.decode, steps_per_call)
        before, emitted = _everywhere(decoder, (before, emitted))
        samples = _record(state.samples, state.running, before, emitted, params.version)
        return count + 1, begun, dataclasses.replace(state, decode=decode, samples=samples)

    def unfinished(carry):
        count, begun, state = carry
        return (count < turns) & ((begun < waiting) | jnp.any(_everywhere(decoder, state.decode.active)))

    _, begun, state = lax.while_loop(unfinished, turn, (jnp.int32(0), jnp.int32(0), state))
    running = jnp.where(_everywhere(decoder, state.decode.active), state.running, len(rows))
    return state, begun, _everywhere(decoder, running)


def _fill(
    decoder: Decoder,
    prefix: Prefix,
    rows: Int[Array, "N"],
    requests: Requests,
    queue: Int[Array, "N"],
    waiting: Int[Array, ""],
    begun: Int[Array, ""],
    state: SchedulerState,
) -> tuple[Int[Array, ""], SchedulerState]:
    """Starts the next samples of the queue in the slots that are free."""

    def has_room(carry) -> Array:
        begun, state = carry
        return (begun < waiting) & ~jnp.all(state.decode.active)

    def start(carry):
        begun, state = carry
        free = ~_everywhere(decoder, state.decode.active)
        place = begun + jnp.cumsum(free) - 1
        starting = free & (place < waiting)
        sample = jnp.asarray(queue)[jnp.minimum(place, len(queue) - 1)]
        asked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[sample], requests)
        started = dataclasses.replace(
            state,
            decode=decoder.start(state.decode, starting, prefix, jnp.asarray(rows)[sample], asked),
            running=jnp.where(starting, sample, state.running),
        )
        return begun + jnp.sum(starting), started

    # a loop of at most one iteration, because a branch would copy the caches
    return lax.while_loop(has_room, start, (begun, state))


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
