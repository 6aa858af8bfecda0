"""A server over HTTP on a real port, in this process."""

import asyncio
import contextlib

from dcjax.serving.http.server import serving
from dcjax.serving.server.client import event_loop
from dcjax.serving.server.served import ServerConfig


@contextlib.contextmanager
def http_server(served, **settings):
    """The address of a server that is stopped at the end; a thread of its that failed fails the test."""
    failures = []

    def result(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, event_loop()).result(timeout=60)

    server = serving(served, ServerConfig(**{"port": 0, **settings}), on_failure=failures.append)
    port, _ = result(server.__aenter__())
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        result(server.__aexit__(None, None, None))
    assert not failures, failures
