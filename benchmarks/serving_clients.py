"""What the benchmarks of `dcjax serve` share: a server in a process of its own, and clients that keep what they see."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from jetstream.core.proto import jetstream_pb2

from dcjax.serving.server.grpc.wire import MAX_METADATA, Answer

proto: Any = jetstream_pb2

DECODE = "/jetstream_proto.Orchestrator/Decode"
STARTS_WITHIN, ANSWERS_WITHIN, STOPS_WITHIN = 180.0, 300.0, 90.0
"""Seconds until a server listens, until a request counts as lost, and until a server that is told to stop has ended."""
LEAVES_AFTER = 0.05
"""Seconds until a request is cancelled that shall not wait for its first tokens."""
ROUTINE = ("serving: ", "platform: ", "compiling ")
"""Beginnings of what a server tells of itself."""


@dataclass(frozen=True)
class Work:
    """One request to send."""

    number: int
    kind: str
    # a serialised DecodeRequest, or other bytes
    message: bytes
    metadata: Sequence[tuple[str, str | bytes]] = ()
    # cancelled after so many messages of the answer; 0 is soon after it was sent
    parts: int | None = None


@dataclass
class Seen:
    """What became of one request."""

    work: Work
    status: str = "OK"
    details: str = ""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    answer: Answer | None = None
    # when it was sent, by the clock that processes share, and from then to the first tokens and to the end (s)
    began: float = 0.0
    first: float | None = None
    seconds: float = 0.0


# --- the server ---


@dataclass(frozen=True)
class Server:
    """A `dcjax serve` that takes requests."""

    port: int
    process: psutil.Process

    def cpu(self) -> float:
        """CPU-seconds of all its threads so far."""
        times = self.process.cpu_times()
        return times.user + times.system

    def rss(self) -> float:
        """Its resident memory (MiB)."""
        return self.process.memory_info().rss / 2**20


@contextlib.contextmanager
def served(source: Path, *options: str) -> Iterator[Server]:
    """A server of a policy at a free port, which is told to stop at the end.

    Raises:
      RuntimeError: it does not start or stop in time, its exit status is not 0, or it tells of something else than
        itself.
    """
    command = [sys.executable, "-m", "dcjax", "serve", str(source), "--port", "0", *options]
    with tempfile.NamedTemporaryFile("r", suffix=".log") as told, open(told.name, "w") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors)
        try:
            yield Server(_port(process, told), psutil.Process(process.pid))
            process.send_signal(signal.SIGTERM)
            status = process.wait(STOPS_WITHIN)
        finally:
            process.kill()
            process.wait()
        told.seek(0)
        other = [line for line in told.read().splitlines() if line.strip() and not line.startswith(ROUTINE)]
        if status or other:
            lines = [f"{count} times: {line}" for line, count in Counter(other).most_common(40)]
            raise RuntimeError(f"the server ended with status {status} and told:\n" + "\n".join(lines))


def _port(process: subprocess.Popen, told: Any) -> int:
    until, text = time.monotonic() + STARTS_WITHIN, ""
    while time.monotonic() < until and process.poll() is None:
        text += told.read()
        if found := re.search(r"listening at grpc://.*:(\d+)\n", text):
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(f"the server did not listen within {STARTS_WITHIN:g} s:\n{text[-2000:]}")


# --- clients ---


def open_channel(port: int) -> Any:
    """A connection of its own to the server."""
    options = [("grpc.max_metadata_size", MAX_METADATA), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)


async def ask(channel: Any, work: Work) -> Seen:
    """Sends a request as it is, and reads its answer unless it is to be cancelled."""
    method = channel.unary_stream(DECODE, response_deserializer=proto.DecodeResponse.FromString)
    seen, parts = Seen(work, began=time.monotonic()), 0
    call = method(work.message, metadata=tuple(work.metadata), timeout=ANSWERS_WITHIN)
    try:
        if work.parts == 0:
            await asyncio.sleep(LEAVES_AFTER)
            raise asyncio.CancelledError
        async for message in call:
            (sample,) = message.stream_content.samples
            if seen.first is None and sample.token_ids:
                seen.first = time.monotonic() - seen.began
            seen.tokens += sample.token_ids
            seen.text += sample.text
            parts += 1
            if parts == work.parts:
                raise asyncio.CancelledError
        seen.answer = Answer.from_metadata(await call.trailing_metadata())
    except grpc.aio.AioRpcError as error:
        seen.status, seen.details = error.code().name, error.details() or ""
    except asyncio.CancelledError:
        call.cancel()
        seen.status = "CANCELLED"
    seen.seconds = time.monotonic() - seen.began
    return seen


async def ask_all(port: int, works: Sequence[Work]) -> list[Seen]:
    """All at once, over one connection."""
    async with open_channel(port) as channel:
        return list(await asyncio.gather(*(ask(channel, work) for work in works)))


_together: Any = None


def _join(barrier: Any) -> None:
    global _together
    _together = barrier


def _client(port: int, works: Sequence[Work]) -> list[Seen]:
    _together.wait()
    return asyncio.run(ask_all(port, works))


def from_processes(port: int, works: Sequence[Work], clients: int) -> list[Seen]:
    """All at once, from several processes that begin together."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        clients, mp_context=context, initializer=_join, initargs=(context.Barrier(clients),)
    ) as pool:
        shares = [works[number::clients] for number in range(clients)]
        return [seen for share in pool.map(_client, [port] * clients, shares) for seen in share]
