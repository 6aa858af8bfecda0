"""A server's life, whatever it speaks: it serves until it is told to stop, and finishes what runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import traceback
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from dcjax.errors import RunError
from dcjax.serving.server.served import Served, ServerConfig

LINGER = 1.0
"""Seconds in which a server that stops still refuses requests."""


Serving = Callable[..., AbstractAsyncContextManager[tuple[int, asyncio.Event]]]
"""(served, config, on_failure=) -> a server of one protocol, as a context of its port and of an event.

At its end requests that run are finished, unless the event is set. `on_failure` is called with what ended the engine.
"""


def run_server(serving: Serving, served: Served, config: ServerConfig, ready: Callable[[int], None]) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what runs; a second signal ends it at once.

    Args:
      serving: by which protocol.
      served: what is served.
      config: how.
      ready: called with the port once requests are taken.

    Raises:
      RunError: the address cannot be listened at, or the engine has failed.
    """
    asyncio.run(_run(serving, served, config, ready))


async def _run(serving: Serving, served: Served, config: ServerConfig, ready: Callable[[int], None]) -> None:
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        loop.call_soon_threadsafe(stopping.set)

    async with serving(served, config, on_failure=fail) as (port, stop):
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        ready(port)
        await stopping.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if failures:
            stop.set()
    if failures:
        traceback.print_exception(failures[0])
        raise RunError(f"the engine has failed: {type(failures[0]).__name__}: {failures[0]}")


async def until(condition: Callable[[], bool], seconds: float) -> None:
    """Waits for it, at most so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)
