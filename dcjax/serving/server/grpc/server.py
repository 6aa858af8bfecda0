"""A server's life: it loads, serves, takes newer weights, finishes what runs, and ends.

JetStream's own `JetStreamServer` listens to every interface, keeps its port to itself, and stops its threads before the
requests in them have ended; so the servicer runs in a plain `grpc.aio` server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from jetstream.core.proto import jetstream_pb2_grpc
from prometheus_client import start_http_server

from dcjax.errors import RunError
from dcjax.serving.server import life
from dcjax.serving.server.grpc.driver import Driver, ServedEngine
from dcjax.serving.server.grpc.service import Orchestrator
from dcjax.serving.server.metrics import Metrics
from dcjax.serving.server.served import Served, ServerConfig
from dcjax.serving.server.weights import Reloader, Weights

PING_INTERVAL = 10_000
"""Milliseconds between the pings of a client that waits; gRPC itself takes more than one in five minutes for an attack,
and ends the connection with all of its requests."""

SERVICE = "jetstream_proto.Orchestrator"
"""The name of the service, which health is also asked of by."""


class UnreadableAsEmpty(grpc.aio.ServerInterceptor):
    """Takes a message that cannot be read for an empty one, which `Decode` refuses.

    gRPC itself would answer UNKNOWN, and log tracebacks for each such message: anyone could fill the disk.
    """

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        read = handler.request_deserializer

        def read_or_empty(message: bytes) -> Any:
            try:
                return read(message)
            except DecodeError:
                return read(b"")

        return handler._replace(request_deserializer=read_or_empty)


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
    server = grpc.aio.server(
        maximum_concurrent_rpcs=2 * (served.engine.slots + config.waiting) + 64,
        options=[("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL)],
        interceptors=[UnreadableAsEmpty()],
    )
    port = _listen(server, config)
    engine = ServedEngine(served.engine, prompts=served.prompts)
    driver = Driver(engine, weights, waiting=config.waiting, on_failure=on_failure)
    metrics = Metrics(running=lambda: len(driver.running), slots=served.engine.slots)
    metrics.serves(served.version)
    service = Orchestrator(driver, served.engine, weights, served.contract, served.tokenizer, metrics)
    jetstream_pb2_grpc.add_OrchestratorServicer_to_server(service, server)
    healthy = health.aio.HealthServicer()  # pyrefly: ignore[missing-attribute]
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(driver.stop)
        if config.metrics_port is not None:
            stack.callback(_serve_metrics(config.host, config.metrics_port, metrics))
        if served.newer is not None:
            reloader = Reloader(weights, served.newer, every=config.reload_every, loop=loop, replaced=metrics.reloaded)
            stack.enter_context(reloader)
        await server.start()
        for name in ("", SERVICE):
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        try:
            yield port, at_once
        finally:
            await healthy.enter_graceful_shutdown()
            service.stopping = True
            await life.until(lambda: at_once.is_set() or not service.open, config.grace)
            # calls that have come since are refused rather than cut off
            await server.stop(0 if at_once.is_set() else life.LINGER)


def _listen(server: Any, config: ServerConfig) -> int:
    where = f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}"
    try:
        return server.add_insecure_port(where)
    except RuntimeError:
        raise RunError(f"cannot listen at {where}; the port may be taken, so choose another --port") from None


def _serve_metrics(host: str, port: int, metrics: Metrics) -> Callable[[], None]:
    """Serves them; returns what ends that."""
    try:
        server, _ = start_http_server(port, host, registry=metrics.registry)
    except OSError as error:
        raise RunError(f"cannot listen at {host}:{port} for metrics: {error.strerror}") from None
    return server.shutdown
