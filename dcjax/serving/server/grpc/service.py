"""JetStream's gRPC service with what its messages lack: settings, limits, log-probs and versions."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import numpy as np
from jetstream.core.proto import jetstream_pb2
from transformers import PreTrainedTokenizerFast

from dcjax.data.task import encode
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.server.contract import Contract
from dcjax.serving.server.grpc.driver import Call, Driver, orchestrator, text_stream
from dcjax.serving.server.grpc.wire import CONTRACT, Asked
from dcjax.serving.server.metrics import Metrics
from dcjax.serving.server.weights import Weights

proto: Any = jetstream_pb2

PATIENCE = 60.0
"""Seconds that a request waits for weights as new as it asks for."""


class Orchestrator(orchestrator.LLMOrchestrator):
    """JetStream's servicer: it queues calls and streams their samples; this checks them, and says how they ended.

    Args:
      driver: that runs the calls.
      weights: that the driver serves.
      contract: what requests get that do not ask for anything else.
      tokenizer: of the policy.
      metrics: that count.
    """

    def __init__(
        self,
        driver: Driver,
        engine: Qwen3Engine,
        weights: Weights,
        contract: Contract,
        tokenizer: PreTrainedTokenizerFast,
        metrics: Metrics,
    ):
        super().__init__(driver)
        self._engine, self._weights, self._contract = engine, weights, contract
        self._tokenizer, self._metrics = tokenizer, metrics
        # characters that a prompt can have: no token stands for more of them than it is written with, except where a
        # tokenizer has one for whole words that it does not know
        self._longest_text = engine.max_prompt_length * max(map(len, tokenizer.get_vocab()))
        # whether new calls are refused, while those that are open are finished
        self.stopping = False
        # calls that are open: read, waiting, decoded, or written
        self.open = 0

    async def Decode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Streams one sample; its trailing metadata are a `wire.Answer`.

        The statuses beside OK: INVALID_ARGUMENT for what cannot be served, RESOURCE_EXHAUSTED where too many wait,
        FAILED_PRECONDITION where weights are older than asked for, and UNAVAILABLE once the server stops.
        """
        began, outcome, call, answered = time.perf_counter(), "cancelled", None, False
        self.open += 1
        try:
            call = await self._admitted(request, context)
            async for response in super().Decode(call, context):
                if not answered:
                    answered = True
                    self._metrics.first_token.observe(time.perf_counter() - began)
                yield response
            context.set_trailing_metadata(tuple(call.answer().to_metadata()))
            outcome = call.answer().finish_reason
        except grpc.aio.AbortError:
            outcome = "refused"
            raise
        finally:
            self.open -= 1
            if call is not None:
                self._driver.leave(call)
            self._metrics.ended(outcome, time.perf_counter() - began, 0 if call is None else len(call.tokens))

    async def HealthCheck(self, request: Any, context: Any) -> Any:
        """Whether it serves; the trailing metadata have the contract, with the step that is served now."""
        now = None if self._contract.step is None else self._weights.version
        context.set_trailing_metadata(((CONTRACT, dataclasses.replace(self._contract, step=now).to_json()),))
        return await super().HealthCheck(request, context)

    async def _admitted(self, request: Any, context: Any) -> Call:
        """The call of a request that can be served; others are refused."""
        if self.stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
        try:
            asked = Asked.from_metadata(context.invocation_metadata() or ())
            call = self._call(request, await self._prompt(request), asked)
            await self._weights.reach(asked.weights_version, PATIENCE)
            return call
        except ValueError as error:
            status, told = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except TimeoutError:
            status = grpc.StatusCode.FAILED_PRECONDITION
            told = f"weights of version {self._weights.version} are served, and newer ones were asked for"
        # which raises
        return await context.abort(status, told)

    async def _prompt(self, request: Any) -> Sequence[int]:
        """The token ids of a prompt; a text is encoded beside the event loop.

        Raises:
          ValueError: there is none, or its text is too long, whatever it is encoded to: encoding four megabytes would
            take seconds and a gigabyte, and other texts would wait.
        """
        match request.WhichOneof("content"):
            case "token_content":
                return request.token_content.token_ids
            case "text_content":
                text = request.text_content.text
                if len(text) > self._longest_text:
                    raise ValueError(
                        f"length of a prompt is {len(text)} characters; this engine takes up to "
                        f"{self._engine.max_prompt_length} tokens, which hold at most {self._longest_text}"
                    )
                return (await asyncio.to_thread(encode, self._tokenizer, [text]))[0]
        raise ValueError("the request has no content that can be read; it must have text_content or token_content")

    def _call(self, request: Any, prompt: Sequence[int], asked: Asked) -> Call:
        """A request with all of its settings.

        Raises:
          ValueError: the engine does not serve that.
        """
        if request.session_cache:
            raise ValueError(
                f"session_cache is {request.session_cache[:80]!r}; sessions are not kept, so leave it empty"
            )
        self._engine.padded([prompt])  # which checks it
        limit, contract = request.max_tokens or self._contract.max_response_length, self._contract
        seed = secrets.randbits(64) if asked.seed is None else asked.seed
        sample = self._engine.make_requests(
            np.array([[seed >> 32, seed & 0xFFFFFFFF]], np.uint32),
            limits=limit,
            temperatures=contract.temperature if asked.temperature is None else asked.temperature,
            top_ks=contract.top_k if asked.top_k is None else asked.top_k,
            top_ps=contract.top_p if asked.top_p is None else asked.top_p,
            stop_tokens=contract.end_tokens if asked.stop_token_ids is None else asked.stop_token_ids,
        )
        return Call(
            prompt=list(prompt),
            request=sample,
            tokens_only=request.WhichOneof("content") == "token_content",
            log_probs_wanted=asked.log_probs,
            text=text_stream(self._tokenizer),
            max_tokens=limit,
        )

    # --- what JetStream's Decode asks of a request, and makes of samples ---

    def _get_prefill_content(self, request: Call) -> tuple[Call, bool]:
        return request, request.tokens_only

    def should_buffer_response(self, response: Any) -> bool:
        """False: pieces of text never end within a character."""
        return False

    def process_server_side_tokenization_response(self, response: Any, buffered_response_list: Any) -> Any:
        """The samples as they are; JetStream's own would take a text such as <0x41> for a byte."""
        content = proto.DecodeResponse.StreamContent
        samples = [content.Sample(text=sample.text[0], token_ids=sample.token_ids) for sample in response]
        return proto.DecodeResponse(stream_content=content(samples=samples))
