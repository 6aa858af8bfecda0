"""JetStream's Driver around `Qwen3Engine`: its threads and queues, with what its own methods lose put back.

The Driver hands prompts, prefixes and params from thread to thread without looking into them. So a prompt is the `Call`
that it belongs to, and a prefix keeps its call beside the caches; that is how a sample finds its settings.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from dcjax.serving.decoder import DecodeState, Prefix, Requests
from dcjax.serving.engine import Qwen3Engine, SampledTokens
from dcjax.serving.jetstream import Thread, import_orchestrator
from dcjax.serving.server.contract import LENGTH, STOP
from dcjax.serving.server.grpc.wire import Answer
from dcjax.serving.server.text import TextStream
from dcjax.serving.server.weights import Weights

orchestrator: Any = import_orchestrator()


@dataclass(eq=False)
class Call:
    """One request, which JetStream takes for its own `DecodeRequest`, and what has been sampled for it."""

    prompt: list[int]
    # of one sample
    request: Requests
    # whether tokens are answered, and not text
    tokens_only: bool
    # whether log-probs are answered
    log_probs_wanted: bool
    text: TextStream
    max_tokens: int
    session_cache: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    # whether nobody waits for it any more
    cancelled: Callable[[], bool] = lambda: False

    def take(self, tokens: Sequence[int], log_probs: Sequence[float], versions: Sequence[int]) -> Any:
        """Appends what was sampled in one turn; returns JetStream's sample of it."""
        self.tokens += tokens
        self.log_probs += log_probs
        self.versions += versions
        if tokens and tokens[-1] in self.request.stop_tokens[0]:
            self.finish_reason = STOP
        elif len(self.tokens) >= self.max_tokens:
            self.finish_reason = LENGTH
        if self.tokens_only:
            return orchestrator.ReturnSample(text=[], token_ids=list(tokens))
        # the end token is no part of the text, special or not
        shown = tokens[:-1] if self.finish_reason == STOP else tokens
        piece = self.text.push(shown, last=self.finish_reason is not None)
        return orchestrator.ReturnSample(text=[piece], token_ids=list(tokens))

    def answer(self) -> Answer:
        """What is told once the response has ended."""
        assert self.finish_reason is not None
        log_probs = tuple(self.log_probs) if self.log_probs_wanted else None
        return Answer(self.finish_reason, tuple(self.versions), log_probs)


@dataclass
class Prefilled:
    """A prompt's caches, until its sample is started, and the call that they are for."""

    prefix: Prefix | None
    call: Call


class ServedEngine:
    """The members of an engine that the Driver uses: `Qwen3Engine`'s, where prompts are calls and params `Weights`.

    The newest prompts' caches are kept, as many as the engine was made for, so that the samples of a group share one
    prefill.

    Args:
      engine: what prefills and decodes.
      prompts: how many prompts' caches are kept.
    """

    samples_per_slot = 1

    def __init__(self, engine: Qwen3Engine, *, prompts: int):
        self.engine, self._prompts = engine, prompts
        self._prefixes: OrderedDict[tuple[int, tuple[int, ...]], Prefix] = OrderedDict()
        # whether all that was sampled has been handed out, and whether nothing more will be
        self._handed_out, self.stopped = threading.Event(), False
        self._handed_out.set()
        # slots that have become free, and the Driver's queue of them once it has one
        self._freed: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.slots: queue.Queue[int] | None = None

    @property
    def max_prefill_length(self) -> int:
        """Longest prompt (tokens)."""
        return self.engine.max_prompt_length

    @property
    def max_concurrent_decodes(self) -> int:
        """The number of slots. The Driver reads this before it refills slots in each turn, and asserts behind that not
        all are free.

        So here it waits until it is known which samples have ended, and gives their slots back, never in between. Left
        to itself, the Driver would decode up to eight turns ahead in slots whose samples have ended.
        """
        while not self._handed_out.wait(1.0) and not self.stopped:
            pass
        while self.slots is not None and not self._freed.empty():
            self.slots.put_nowait(self._freed.get())
        return self.engine.slots

    def free(self, slot: int) -> None:
        """A slot's sample has ended or is not wanted any more; for any thread."""
        self._freed.put(slot)

    def handed_out(self) -> None:
        """What a turn has sampled has reached those who asked for it; for any thread."""
        self._handed_out.set()

    def get_tokenizer(self) -> None:
        """None: text becomes tokens before the Driver has it, and tokens text in `Driver`."""

    def build_tokenizer(self, metadata: None) -> None:
        """None: texts are encoded before they get here."""
        return metadata

    def init_decode_state(self) -> DecodeState:
        """As the engine's."""
        return self.engine.init_decode_state()

    def prefill(self, *, params: Weights, padded_tokens: Call, true_length: int) -> Prefilled:
        """The caches of a call's prompt; none where it was cancelled meanwhile."""
        del true_length
        call, version, served = padded_tokens, params.version, params.params
        if call.cancelled():
            return Prefilled(None, call)
        key = version, tuple(call.prompt)
        if (prefix := self._prefixes.get(key)) is None:
            width = self.engine.width_of(call.prompt)
            prefix = self._prefixes[key] = self.engine.prefill_many(served, [call.prompt], width)
        self._prefixes.move_to_end(key)
        while len(self._prefixes) > self._prompts:
            self._prefixes.popitem(last=False)
        return Prefilled(prefix, call)

    def insert(self, prefix: Prefilled, decode_state: DecodeState, slot: int) -> DecodeState:
        """Starts the call's sample in a slot; where it was cancelled, the slot stays as it was."""
        if prefix.prefix is None or prefix.call.cancelled():
            return decode_state
        return self.engine.insert(prefix.prefix, decode_state, slot, request=prefix.call.request)

    def generate(self, params: Weights, decode_state: DecodeState) -> tuple[DecodeState, SampledTokens]:
        """One turn, with the weights of the moment."""
        self._handed_out.clear()
        return self.engine.generate(params.params, decode_state)


class Driver(orchestrator.Driver):
    """JetStream's threads of prefill, transfer and generation, and a detokenize thread that keeps all that is sampled.

    Args:
      engine: that prefills and decodes, alternately.
      weights: that it does it with.
      waiting: calls that may wait for a slot; more are refused.
      on_failure: called if a thread fails.
    """

    def __init__(
        self, engine: ServedEngine, weights: Weights, *, waiting: int, on_failure: Callable[[BaseException], None]
    ):
        self._engine, self._room = engine, engine.engine.slots + waiting
        self.running: set[Any] = set()
        # which the constructor takes its threads from
        orchestrator.JetThread = partial(Thread, on_failure=on_failure)
        super().__init__(
            prefill_engines=[engine],
            generate_engines=[engine],
            prefill_params=[weights],
            generate_params=[weights],
            interleaved_mode=True,
        )

    def place_request_on_prefill_queue(self, request: Any) -> None:
        """Admits a request, where JetStream's queue has no limit.

        Raises:
          queue.Full: too many wait.
        """
        if len(self.running) >= self._room:
            raise queue.Full
        call = request.prefill_content
        call.cancelled = request.return_channel.cancelled
        self.running.add(call)
        super().place_request_on_prefill_queue(request)

    def stop(self) -> None:
        self._engine.stopped = True
        super().stop()

    def leave(self, call: Call) -> None:
        """A call is over. One that was cancelled while it waited takes no place in the queue any more."""
        self.running.discard(call)
        backlog = self._prefill_backlog
        if call.finish_reason is None:
            with backlog.mutex:
                backlog.queue = deque(one for one in backlog.queue if one is None or one.prefill_content is not call)

    def _process_prefill_content(
        self, request: Any, tokenizer: None, is_bos: bool, max_prefill_length: int
    ) -> tuple[Call, int]:
        """The call; JetStream's own would cut long prompts at their beginning, and tell the length from before."""
        del tokenizer, is_bos, max_prefill_length
        call = request.prefill_content
        return call, len(call.prompt)

    def _generate_thread(self, idx: int) -> None:
        self._engine.slots = self._generate_slots[idx]
        super()._generate_thread(idx)

    def _detokenize_thread(self, idx: int) -> None:
        """Hands out what each turn has sampled, end tokens, log-probs and versions included, and frees slots.

        JetStream's own drops them, learns only in the next turn that a sample has ended, and decodes for those who have
        left.
        """
        backlog, requests = self._detokenize_backlogs[idx], {}
        while self.live and (item := backlog.get()) is not None:
            number, what = item
            if not isinstance(what, SampledTokens):
                # what a request's slot samples from the next turn on is its own
                requests[number] = what
                continue
            sampled = what.convert_to_numpy()
            for slot, request in list(requests.items()):
                if request.return_channel.cancelled() or _tell(request, sampled, slot):
                    del requests[slot]
                    self._engine.free(slot)
            self._engine.handed_out()


def _tell(request: Any, sampled: SampledTokens, slot: int) -> bool:
    """Hands a request what was sampled for it; returns whether it has ended."""
    valid = np.asarray(sampled.valid[slot], bool)
    # a slot that ended early has valid tokens first
    tokens, log_probs, versions = (
        np.asarray(values)[slot][valid].tolist() for values in (sampled.tokens, sampled.log_prob, sampled.version)
    )
    call = request.prefill_content
    request.enqueue_samples([call.take(tokens, log_probs, versions)])
    if call.finish_reason is None:
        return False
    request.return_channel.close()
    return True


def text_stream(tokenizer: PreTrainedTokenizerFast) -> TextStream:
    """A stream that decodes by the run's own tokenizer, without special tokens."""
    backend = tokenizer.backend_tokenizer
    return TextStream(lambda tokens: backend.decode(tokens, skip_special_tokens=True))
