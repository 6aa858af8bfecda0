"""A server's life: it loads, serves, takes newer weights, finishes what runs, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import traceback
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn

from dcjax.errors import RunError
from dcjax.serving.http.app import make_app
from dcjax.serving.http.engine_thread import EngineThread
from dcjax.serving.http.guard import Guard
from dcjax.serving.http.service import Service
from dcjax.serving.server.metrics import Metrics
from dcjax.serving.server.served import Served, ServerConfig
from dcjax.serving.server.weights import Reloader, Weights

LARGEST_BODY = 2**24
"""Bytes of a request's body, at most."""

LINGER = 1.0
"""Seconds in which a server that stops still refuses requests."""


class _Uvicorn(uvicorn.Server):
    """Signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(served: Served, config: ServerConfig, ready: Callable[[int], None]) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what runs; a second signal ends it at once.

    Args:
      served: what is served.
      config: how.
      ready: called with the port once requests are taken.

    Raises:
      RunError: the address cannot be listened at, or the engine has failed.
    """
    asyncio.run(_run(served, config, ready))


async def _run(served: Served, config: ServerConfig, ready: Callable[[int], None]) -> None:
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


@contextlib.asynccontextmanager
async def serving(
    served: Served, config: ServerConfig, *, on_failure: Callable[[BaseException], None]
) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A server that takes requests; at the end those that run are finished, unless the event is set.

    Yields:
      The port, and the event.

    Raises:
      RunError: the address cannot be listened at.
    """
    loop, at_once = asyncio.get_running_loop(), asyncio.Event()
    weights = Weights(served.version, served.params)
    listening = _listen(config)
    thread = EngineThread(served.engine, weights, waiting=config.waiting, prompts=served.prompts, on_failure=on_failure)
    metrics = Metrics(running=lambda: thread.running, slots=served.engine.slots)
    metrics.serves(served.version)
    service = Service(served.name, served.engine, thread, weights, served.contract, served.tokenizer)
    app = Guard(make_app(service, metrics), largest=LARGEST_BODY, token=config.token)
    server = _Uvicorn(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=30))
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(thread)
        if served.newer is not None:
            reloader = Reloader(weights, served.newer, every=config.reload_every, loop=loop, replaced=metrics.reloaded)
            stack.enter_context(reloader)
        running = asyncio.create_task(server.serve(sockets=[listening]))
        while not (server.started or running.done()):
            await asyncio.sleep(0.01)
        try:
            yield listening.getsockname()[1], at_once
        finally:
            service.stopping = True
            await _until(lambda: at_once.is_set() or not service.running, config.grace)
            if not at_once.is_set():
                await asyncio.sleep(LINGER)  # requests that have come since are refused rather than cut off
            server.should_exit, server.force_exit = True, at_once.is_set()
            await running


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)


def _listen(config: ServerConfig) -> socket.socket:
    """The socket that requests come to."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
    except OSError as error:
        listening.close()
        where = f"{config.host}:{config.port}"
        raise RunError(f"cannot listen at {where}: {error.strerror}; choose another --port or --host") from None
    return listening
