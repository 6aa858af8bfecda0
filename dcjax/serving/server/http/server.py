"""The server over HTTP: the engine's thread, the application behind its guard, and newer weights."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn

from dcjax.errors import RunError
from dcjax.serving.server import life
from dcjax.serving.server.http.app import make_app
from dcjax.serving.server.http.engine_thread import EngineThread
from dcjax.serving.server.http.guard import Guard
from dcjax.serving.server.http.log import RequestLog
from dcjax.serving.server.http.service import Service
from dcjax.serving.server.metrics import Metrics
from dcjax.serving.server.served import Served, ServerConfig
from dcjax.serving.server.weights import Reloader, Weights

LARGEST_BODY = 2**22
"""Bytes of a request's body, at most."""


class _Uvicorn(uvicorn.Server):
    """Signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
    thread = EngineThread(served.engine, weights, waiting=config.waiting, on_failure=on_failure)
    metrics = Metrics(running=lambda: thread.running, slots=served.engine.slots)
    metrics.serves(served.version)
    service = Service(served.name, served.engine, thread, weights, served.contract, served.tokenizer, served.trainer)
    guard = Guard(make_app(service, metrics), largest=LARGEST_BODY, seconds=config.request_seconds, token=config.token)
    app = RequestLog(guard, _write if config.log != "none" else lambda line: None, prompts=config.log == "prompts")
    times = {"timeout_keep_alive": 30, "timeout_graceful_shutdown": 1}
    server = _Uvicorn(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", **times))
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
            await life.until(lambda: at_once.is_set() or not guard.open, config.grace)
            if not at_once.is_set():
                await asyncio.sleep(life.LINGER)  # requests that have come since are refused rather than cut off
            server.should_exit, server.force_exit = True, at_once.is_set()
            await running


def _write(line: str) -> None:
    print(line, flush=True)


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
