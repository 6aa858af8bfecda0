"""The thread that decodes: it takes samples at any time, gives them slots in their order, and tells what was sampled.

A sample that waits is prefilled and begins in the turn behind the one in which a slot came free; one that is cancelled
leaves its slot to the next by then.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcjax.serving.continuous import Continuous, Turn
from dcjax.serving.decoder import Requests
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.server.contract import LENGTH, STOP
from dcjax.serving.server.weights import Weights


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
      on_failure: called with what ended the thread, should that happen.
    """

    def __init__(
        self, engine: Qwen3Engine, weights: Weights, *, waiting: int, on_failure: Callable[[BaseException], None]
    ):
        self._batching, self._weights, self._on_failure = Continuous(engine), weights, on_failure
        self._room = engine.slots + waiting
        self._changed = threading.Condition()
        # both are changed while it is held; those that are decoded by the thread alone, by their numbers
        self._waiting: deque[Sample] = deque()
        self._decoded: dict[int, Sample] = {}
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
        return len(self._waiting) + len(self._decoded)

    def submit(self, samples: Sequence[Sample]) -> bool:
        """Takes samples, all or none; returns whether there was room for them to wait.

        Raises:
          RuntimeError: the thread has ended.
        """
        with self._changed:
            if self._stopped:
                raise RuntimeError("the engine's thread has ended")
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
        try:
            while True:
                with self._changed:
                    while not (self._stopped or self._waiting or self._decoded):
                        self._changed.wait()
                    if self._stopped:
                        return
                    self._drop_cancelled()
                self._begin()
                if self._decoded:
                    wants_top = any(sample.top or sample.of_model for sample in self._decoded.values())
                    self._tell(self._batching.turn(self._weights.params, wants_top=wants_top))
        except BaseException as error:
            with self._changed:
                self._stopped, left = True, [*self._decoded.values(), *self._waiting]
            for sample in left:
                sample.told(error)
            self._on_failure(error)

    def _drop_cancelled(self) -> None:
        for number, sample in list(self._decoded.items()):
            if sample.cancelled:
                self._batching.cancel(number)
                del self._decoded[number]

    def _begin(self) -> None:
        """Gives the slots that are free to those that wait."""
        while self._batching.free:
            with self._changed:
                if not self._waiting:
                    return
                sample = self._waiting[0]
            number = self._batching.begin(self._weights.params, sample.prompt, sample.request)
            with self._changed:
                self._decoded[number] = sample
                if not sample.cancelled:  # otherwise it waits no more
                    self._waiting.popleft()

    def _tell(self, turns: dict[int, Turn]) -> None:
        """Hands out what a turn has sampled, and lets go of what has ended."""
        for number, turn in turns.items():
            sample = self._decoded[number]
            sample.length += len(turn.tokens)
            reason = None
            if turn.tokens[-1] in sample.request.stop_tokens[0]:
                reason = STOP
            elif sample.length >= sample.request.limits[0]:
                reason = LENGTH
            if not sample.cancelled:
                sample.told(Piece(_scored(sample, turn), reason))
            if reason is not None:
                with self._changed:
                    del self._decoded[number]


def _scored(sample: Sample, turn: Turn) -> tuple[Scored, ...]:
    """The tokens of a turn, with the log-probs that a sample asks for."""
    log_probs = turn.top.logps if sample.of_model else turn.logps
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(turn.tokens)
    if sample.top:
        values = turn.top.top_logps if sample.of_model else turn.top.top_sampled_logps
        pairs = zip(turn.top.top_tokens.tolist(), values.tolist(), strict=True)
        # tokens that cannot be drawn are left out
        tops = [
            tuple((token, value) for token, value in zip(ids, logs, strict=True) if value > -math.inf)[: sample.top]
            for ids, logs in pairs
        ]
    pairs = zip(turn.tokens.tolist(), log_probs.tolist(), tops, strict=True)
    return tuple(Scored(token, turn.version, log_prob, top) for token, log_prob, top in pairs)
