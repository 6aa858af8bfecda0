"""Samples from a server: the same rollouts as the loop in the process, over gRPC."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import grpc
from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc

from dcjax.errors import Interrupted, RunError
from dcjax.serving.server.contract import Contract
from dcjax.serving.server.grpc.wire import CONTRACT, MAX_METADATA, Answer, Asked

proto: Any = jetstream_pb2

IN_FLIGHT = 256
"""Requests that a client has at the server at once; others wait here."""

RETRY_AFTER = 0.2
"""Seconds until a request is sent again that the server could not take."""

_CHANNEL = [
    ("grpc.max_metadata_size", MAX_METADATA),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.FAILED_PRECONDITION)
"""Statuses of a server that is gone, or about to go, or that has waited in vain for weights as new as asked for."""


@dataclass(frozen=True)
class Request:
    """One sample to take."""

    prompt: Sequence[int]
    max_tokens: int
    asked: Asked


@dataclass(frozen=True)
class Response:
    """One sample."""

    tokens: list[int]
    """The end token included."""
    answer: Answer


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all clients in the process, in a thread of its own; gRPC fails where one of several loops ends."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="grpc", daemon=True).start()
    return loop


class Client:
    """A connection to a server, which may be away for a while: then what is not answered is asked again.

    Equal seeds give equal samples, so that asking twice changes nothing.

    Args:
      address: host and port.
      patience: seconds without any answer after which it gives up.
      advice: what to do about a server that does not answer.
    """

    def __init__(self, address: str, *, patience: float, advice: str):
        self._address, self._patience, self._advice = address, patience, advice
        self._loop = event_loop()
        # since when the server has not answered; None while it does
        self._lost: float | None = None

    def __enter__(self) -> Client:
        self._channel = asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result()
        self._stub: Any = jetstream_pb2_grpc.OrchestratorStub(self._channel)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._channel.close(None), self._loop).result()

    def sample(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Response]]]:
        """Samples that have ended, with their requests' numbers, until all have; an empty list now and then meanwhile.

        Raises:
          Interrupted: the server was away for longer than the patience.
          RunError: it refuses a request.
        """
        ended: queue.Queue[tuple[int, Response]] = queue.Queue()
        asking, left = asyncio.run_coroutine_threadsafe(self._all(requests, ended), self._loop), len(requests)
        try:
            while left:
                batch = _taken(ended, seconds=0.5)
                left -= len(batch)
                if not batch and asking.done():
                    asking.result()
                yield batch
        finally:
            asking.cancel()

    def contract(self) -> Contract:
        """What the server serves.

        Raises:
          Interrupted: the server does not answer.
          RunError: it is no server of dcjax.
        """
        answer = asyncio.run_coroutine_threadsafe(self._patiently(self._health), self._loop).result()
        try:
            return Contract.from_json(answer.get(CONTRACT, ""), f"the answer of {self._address}")
        except ValueError as error:
            raise RunError(str(error)) from None

    async def _connect(self) -> Any:
        return grpc.aio.insecure_channel(self._address, options=_CHANNEL)

    async def _all(self, requests: Sequence[Request], ended: queue.Queue[tuple[int, Response]]) -> None:
        room = asyncio.Semaphore(IN_FLIGHT)

        async def one(number: int, request: Request) -> None:
            async with room:
                ended.put((number, await self._patiently(lambda: self._decode(request))))

        try:
            async with asyncio.TaskGroup() as group:
                for number, request in enumerate(requests):
                    group.create_task(one(number, request))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _decode(self, request: Request) -> Response:
        content = proto.DecodeRequest.TokenContent(token_ids=request.prompt)
        message = proto.DecodeRequest(token_content=content, max_tokens=request.max_tokens)
        call, tokens = self._stub.Decode(message, metadata=request.asked.to_metadata()), []
        async for part in call:
            tokens += part.stream_content.samples[0].token_ids
        answer = Answer.from_metadata(await call.trailing_metadata())
        if not len(tokens) == len(answer.versions) == len(answer.log_probs or ()):
            raise ValueError(f"the answer has {len(tokens)} tokens and {len(answer.versions)} versions")
        return Response(tokens, answer)

    async def _health(self) -> dict[str, Any]:
        call = self._stub.HealthCheck(proto.HealthCheckRequest())
        await call
        return dict(await call.trailing_metadata())

    async def _patiently(self, ask: Any) -> Any:
        """What `ask` returns, as soon as the server can answer it.

        Raises:
          Interrupted: it was away for longer than the patience.
          RunError: it refuses.
        """
        while True:
            try:
                answered = await ask()
                self._found()
                return answered
            except grpc.aio.AioRpcError as error:
                told = f"{error.code().name}: {error.details()}"
                if error.code() in _LOST:
                    self._missed(told)
                elif error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                    # full, and so at work
                    self._found()
                else:
                    raise RunError(f"the server at {self._address} refuses a request: {told}") from None
            except ValueError as error:
                raise RunError(f"the server at {self._address}: {error}") from None
            await asyncio.sleep(RETRY_AFTER)

    def _found(self) -> None:
        if self._lost is not None:
            print(f"dcjax: the server at {self._address} answers again", file=sys.stderr)
        self._lost = None

    def _missed(self, told: str) -> None:
        now = time.monotonic()
        if self._lost is None:
            self._lost = now
            print(
                f"dcjax: no samples from the server at {self._address} ({told}); waiting {self._patience:g} s for it: "
                f"{self._advice}",
                file=sys.stderr,
            )
        elif now - self._lost > self._patience:
            raise Interrupted(
                f"no samples from the server at {self._address} for {self._patience:g} s ({told}); {self._advice}, "
                "and the same command goes on"
            )


def _taken(ended: queue.Queue[tuple[int, Response]], *, seconds: float) -> list[tuple[int, Response]]:
    """All that is there, after waiting for the first."""
    batch = []
    try:
        batch.append(ended.get(timeout=seconds))
        while True:
            batch.append(ended.get_nowait())
    except queue.Empty:
        return batch
