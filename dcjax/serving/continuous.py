"""Continuous batching: samples that come at any time, each with its prompt, a turn after another.

A turn is the one of a rollout (`scheduler.turn`), so that a sample is that of its key, whoever is beside it.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from dcjax.serving.decoder import Decoder, Prefix, Requests, TopLogprobs
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.parallel import EVERYWHERE, SHARED_CACHE, named
from dcjax.serving.scheduler import SchedulerState, programs, queue_of
from dcjax.serving.sync import ServingParams


class Turn(NamedTuple):
    """What one turn has sampled for one sample, on the host: K tokens, with natural logs of their probabilities."""

    tokens: Int[np.ndarray, "K"]
    # of the weights that sampled them
    version: int
    # under what was sampled from
    logps: Float[np.ndarray, "K"]
    # under the model, and those of its most probable tokens; meaningless unless asked for
    top: TopLogprobs


class Continuous:
    """Decodes with an engine, whose slots are given to samples as they come.

    As many prompts' caches are kept as there are slots, so that samples of one prompt share its prefill. One program
    runs all turns, those that tell log-probs of the `engine.most_top_logprobs` most probable tokens too: which one
    decodes a sample must not depend on what its neighbours ask for.

    Args:
      engine: the engine; there must be memory for one prompt a slot beside the slots.
    """

    def __init__(self, engine: Qwen3Engine):
        self._engine = engine
        self._decoder = dataclasses.replace(engine.decoder, top_logprobs=engine.most_top_logprobs)
        slots = engine.slots
        self._state: SchedulerState = programs(self._decoder).begin(self._decoder, slots, slots, False)
        self._prompts = _Prompts(engine)
        self._free, self._waiting = deque(range(slots)), deque[int]()
        self._cancelled = np.zeros(slots, bool)
        self._rows = np.zeros(slots, np.int32)
        self._requests: Requests = jax.tree.map(np.array, engine.make_requests(np.zeros((slots, 2))))

    @property
    def free(self) -> int:
        """How many samples can begin."""
        return len(self._free)

    def begin(self, params: ServingParams, prompt: Sequence[int], request: Requests) -> int:
        """Begins a sample in the next turn; returns the number that it has until it ends.

        Args:
          params: by which the prompt is prefilled, unless it was before.
          prompt: token ids.
          request: of one sample, from `engine.make_requests`.

        Raises:
          ValueError: the engine does not accept the prompt.
          IndexError: no slot is free.
        """
        row = self._prompts.row(params, tuple(prompt))
        number = self._free.popleft()
        self._rows[number] = row
        for held, new in zip(jax.tree.leaves(self._requests), jax.tree.leaves(request), strict=True):
            held[number] = new[0]
        self._waiting.append(number)
        return number

    def cancel(self, number: int) -> None:
        """Gives up a sample, so that its slot is free in the next turn."""
        if number in self._waiting:
            self._waiting.remove(number)
        else:
            self._cancelled[number] = True
        self._free.append(number)

    def turn(self, params: ServingParams, *, wants_top: bool = False) -> dict[int, Turn]:
        """Decodes `steps_per_call` tokens of every sample at most; the numbers of those that end are free behind it.

        Args:
          params: of this turn; they may be others than those of the last.
          wants_top: whether to tell the model's own log-probs, and its most probable tokens.

        Returns:
          What was sampled, by the samples' numbers; each ends by one of its request's stop tokens, or its limit.
        """
        queue = queue_of(self._prompts.caches, self._rows, self._requests, self._waiting)
        self._waiting.clear()
        cancelled, self._cancelled = self._cancelled, np.zeros_like(self._cancelled)
        self._state, (running, emitted) = programs(self._decoder).turn(
            self._decoder, self._engine.steps_per_call, params, queue, cancelled, np.bool_(wants_top), self._state
        )
        told = (
            running,
            self._state.decode.active,
            params.version,
            emitted.valid,
            emitted.tokens,
            emitted.logps,
            emitted.top,
        )
        running, active, version, valid, *sampled = jax.device_get(told)
        turns = {}
        for slot in np.flatnonzero(valid[0]):
            count = int(valid[:, slot].sum())
            tokens, *log_probs = jax.tree.map(lambda leaf, slot=slot, count=count: leaf[:count, slot], sampled)
            turns[number := int(running[slot])] = Turn(tokens, int(version), *log_probs)
            if not active[slot]:
                self._free.append(number)
        return turns


def rehearse(engine: Qwen3Engine, params: ServingParams) -> None:
    """Runs the programs that continuous batching needs once, so that none is compiled while a sample waits."""
    batching, request, length = Continuous(engine), engine.make_requests([[0, 0]], limits=1), 0
    while length < engine.max_prompt_length:
        length = engine.width_of([0] * (length + 1))
        batching.begin(params, [0] * length, request)
        batching.turn(params)


class _Prompts:
    """The caches of the newest prompts, a row for each, on the devices."""

    def __init__(self, engine: Qwen3Engine):
        self._engine = engine
        self.caches: Prefix = _programs(engine.decoder).empty(engine.decoder, engine.slots)
        self._unused = deque(range(engine.slots))
        # those used longest ago first
        self._rows: OrderedDict[tuple[int, tuple[int, ...]], int] = OrderedDict()

    def row(self, params: ServingParams, prompt: tuple[int, ...]) -> int:
        """The row of a prompt, as these weights have read it."""
        key = int(params.version), prompt
        if (row := self._rows.get(key)) is None:
            engine = self._engine
            new = engine.prefill_many(params, [prompt], engine.width_of(prompt))
            row = self._unused.popleft() if self._unused else self._rows.popitem(last=False)[1]
            self.caches = _programs(engine.decoder).put(engine.decoder, self.caches, np.int32(row), new)
            self._rows[key] = row
        self._rows.move_to_end(key)
        return row


class _Programs(NamedTuple):
    empty: Any
    put: Any


@cache
def _programs(decoder: Decoder) -> _Programs:
    caches, everywhere = named(decoder.mesh, SHARED_CACHE), named(decoder.mesh, EVERYWHERE)
    places: Any = Prefix(caches, everywhere, everywhere, None)  # pyrefly: ignore[bad-argument-type]
    return _Programs(
        empty=jax.jit(Decoder.no_prompts, static_argnums=(0, 1), out_shardings=places),
        put=jax.jit(Decoder.put_prompt, static_argnums=0, donate_argnums=1, out_shardings=places),
    )
