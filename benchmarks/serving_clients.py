"""What the benchmarks of `dcjax serve` share: a server in a process of its own, and clients that keep what they see."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
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
from types import ModuleType
from typing import Any

import psutil

from dcjax.serving.server.grpc.wire import Answer

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
    # a serialised DecodeRequest, a body of JSON, or other bytes
    message: bytes
    # or headers
    metadata: Sequence[tuple[str, str | bytes]] = ()
    # cancelled after so many messages of the answer; 0 is soon after it was sent
    parts: int | None = None
    # tokens at most, of a valid one
    limit: int = 0


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
def served(source: Path, *options: str, port: int = 0, killed: bool = False) -> Iterator[Server]:
    """A server of a policy at a port, or at any that is free, which is told to stop at the end, or killed.

    Raises:
      RuntimeError: it does not start or stop in time, its exit status is not 0, or it tells of something else than
        itself.
    """
    command = [sys.executable, "-m", "dcjax", "serve", str(source), "--port", str(port), *options]
    with tempfile.NamedTemporaryFile("r", suffix=".log") as told, open(told.name, "w") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors)
        try:
            yield Server(_port(process, told), psutil.Process(process.pid))
            process.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
            status = process.wait(STOPS_WITHIN)
        finally:
            process.kill()
            process.wait()
        told.seek(0)
        other = [line for line in told.read().splitlines() if line.strip() and not line.startswith(ROUTINE)]
        if status != (-signal.SIGKILL if killed else 0) or other:
            lines = [f"{count} times: {line}" for line, count in Counter(other).most_common(40)]
            raise RuntimeError(f"the server ended with status {status} and told:\n" + "\n".join(lines))


def _port(process: subprocess.Popen, told: Any) -> int:
    until, text = time.monotonic() + STARTS_WITHIN, ""
    while time.monotonic() < until and process.poll() is None:
        text += told.read()
        if found := re.search(r"listening at \w+://.*:(\d+)\n", text):
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(f"the server did not listen within {STARTS_WITHIN:g} s:\n{text[-2000:]}")


# --- clients ---


async def ask_all(protocol: ModuleType, port: int, works: Sequence[Work]) -> list[Seen]:
    """All at once, from one client."""
    async with protocol.connected(port) as client:
        return list(await asyncio.gather(*(protocol.ask(client, work) for work in works)))


_together: Any = None


def _join(barrier: Any) -> None:
    global _together
    _together = barrier


def _client(protocol: str, port: int, works: Sequence[Work]) -> list[Seen]:
    module = importlib.import_module(protocol)
    _together.wait()
    return asyncio.run(ask_all(module, port, works))


def from_processes(protocol: ModuleType, port: int, works: Sequence[Work], clients: int) -> list[Seen]:
    """All at once, from several processes that begin together."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        clients, mp_context=context, initializer=_join, initargs=(context.Barrier(clients),)
    ) as pool:
        shares = [works[number::clients] for number in range(clients)]
        answers = pool.map(_client, [protocol.__name__] * clients, [port] * clients, shares)
        return [seen for share in answers for seen in share]
