"""The thread that decodes: it takes samples at any time, gives them slots in their order, and tells what was sampled.

A turn decodes `steps_per_call` tokens in every slot. A sample that waits is prefilled and begins in the turn behind the
one in which a slot came free; one that is cancelled leaves its slot to the next by then.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcjax.serving.decoder import Prefix, Requests
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.server.weights import Weights
from dcjax.serving.server.wire import LENGTH, STOP


@dataclass(frozen=True)
class Scored:
    """A sampled token: natural logs of its probability, and of those of the most probable tokens."""

    token: int
    version: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one turn has sampled for a sample."""

    tokens: tuple[Scored, ...]
    # why it is the last piece; None if more will come
    finish_reason: str | None


@dataclass(eq=False)
class Sample:
    """A sample that is asked for."""

    prompt: tuple[int, ...]
    # of one sample
    request: Requests
    # called in the thread with each piece, and with the exception by which the thread has ended
    told: Callable[[Piece | BaseException], object]
    # how many of the most probable tokens are told
    top: int = 0
    # whether log-probs are the model's own, and not those of what is sampled from
    of_model: bool = False
    length: int = 0
    cancelled: bool = False


class EngineThread:
    """Decodes samples in the order in which they come.

    A context manager: leaving it ends the thread behind its turn; samples that are left hear nothing more.

    Args:
      engine: that prefills and decodes.
      weights: that it does it with, those of the moment.
      waiting: samples that may wait for a slot; more are refused.
      prompts: how many prompts' caches are kept, so that the samples of a prompt share one prefill.
      on_failure: called with what ended the thread, should that happen.
    """

    def __init__(
        self,
        engine: Qwen3Engine,
        weights: Weights,
        *,
        waiting: int,
        prompts: int,
        on_failure: Callable[[BaseException], None],
    ):
        self._engine, self._weights, self._on_failure = engine, weights, on_failure
        self._room, self._kept = engine.slots + waiting, prompts
        self._prefixes: OrderedDict[tuple[int, tuple[int, ...]], Prefix] = OrderedDict()
        self._changed = threading.Condition()
        # all below are changed while it is held, and the slots by the thread alone
        self._waiting: deque[Sample] = deque()
        self._slots: list[Sample | None] = [None] * engine.slots
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> EngineThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    @property
    def running(self) -> int:
        """How many samples there are, those that wait included."""
        return len(self._waiting) + sum(sample is not None for sample in self._slots)

    def submit(self, samples: Sequence[Sample]) -> bool:
        """Takes samples, all or none; returns whether there was room for them to wait."""
        with self._changed:
            if self.running + len(samples) > self._room:
                return False
            self._waiting.extend(samples)
            self._changed.notify()
        return True

    def cancel(self, samples: Sequence[Sample]) -> None:
        """Gives up samples: those that wait at once, those that are decoded behind their turn."""
        with self._changed:
            for sample in samples:
                sample.cancelled = True
            self._waiting = deque(sample for sample in self._waiting if not sample.cancelled)

    def _run(self) -> None:
        state = self._engine.init_decode_state()
        try:
            while True:
                with self._changed:
                    while not (self._stopped or self._waiting or any(self._slots)):
                        self._changed.wait()
                    if self._stopped:
                        return
                    beginning = self._next_in_slots()
                for slot, sample in beginning:
                    state = self._engine.insert(self._prefix(sample.prompt), state, slot, request=sample.request)
                if any(self._slots):
                    asked = any(sample.top or sample.of_model for sample in self._slots if sample is not None)
                    tells = self._engine.most_told if asked else None
                    state, sampled = self._engine.generate(self._weights.params, state, tells)
                    self._tell(sampled.convert_to_numpy())
        except BaseException as error:
            for sample in [*filter(None, self._slots), *self._waiting]:
                sample.told(error)
            self._on_failure(error)

    def _next_in_slots(self) -> list[tuple[int, Sample]]:
        """Frees the slots of those that were cancelled, and gives free ones to those that wait."""
        beginning = []
        for slot, sample in enumerate(self._slots):
            if sample is not None and not sample.cancelled:
                continue
            self._slots[slot] = following = self._waiting.popleft() if self._waiting else None
            if following is not None:
                beginning.append((slot, following))
        return beginning

    def _prefix(self, prompt: tuple[int, ...]) -> Prefix:
        """The caches of a prompt, of the weights of the moment."""
        key = self._weights.version, prompt
        if (prefix := self._prefixes.get(key)) is None:
            width = self._engine.width_of(prompt)
            prefix = self._prefixes[key] = self._engine.prefill_many(self._weights.params, [prompt], width)
        self._prefixes.move_to_end(key)
        while len(self._prefixes) > self._kept:
            self._prefixes.popitem(last=False)
        return prefix

    def _tell(self, sampled: Any) -> None:
        """Hands out what a turn has sampled, and frees the slots of what has ended."""
        valid, tokens = np.asarray(sampled.valid, bool), np.asarray(sampled.tokens)
        for slot, sample in enumerate(self._slots):
            if sample is None or sample.cancelled:
                continue
            new = tokens[slot][valid[slot]]
            sample.length += len(new)
            reason = None
            if len(new) and new[-1] in sample.request.stop_tokens[0]:
                reason = STOP
            elif sample.length >= sample.request.limits[0]:
                reason = LENGTH
            sample.told(Piece(_scored(sample, sampled, slot, len(new)), reason))
            if reason is not None:
                with self._changed:
                    self._slots[slot] = None


def _scored(sample: Sample, sampled: Any, slot: int, count: int) -> tuple[Scored, ...]:
    """The first tokens of a slot in a turn, with the log-probs that the sample asks for."""
    told, tokens = sampled.told, np.asarray(sampled.tokens)[slot, :count].tolist()
    log_probs = (told.logps if sample.of_model else sampled.log_prob)[slot, :count].tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * count
    if sample.top:
        values = told.top_logps if sample.of_model else told.top_sampled_logps
        pairs = zip(told.top_tokens[slot, :count].tolist(), values[slot, :count].tolist(), strict=True)
        # tokens that cannot be drawn are left out
        tops = [
            tuple((token, value) for token, value in zip(ids, logs, strict=True) if value > -math.inf)[: sample.top]
            for ids, logs in pairs
        ]
    versions = sampled.version[slot, :count].tolist()
    return tuple(Scored(*each) for each in zip(tokens, versions, log_probs, tops, strict=True))
