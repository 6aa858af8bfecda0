"""A line of JSON for each request."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LONGEST_PATH = 200
"""Characters of a path that are logged."""


class RequestLog:
    """Writes a line once a request has ended; the application adds to `request.state.record`.

    Args:
      app: what is logged.
      write: what takes a line.
      prompts: whether prompts are logged too.
    """

    def __init__(self, app: ASGIApp, write: Callable[[str], object], *, prompts: bool):
        self._app, self._write, self._prompts = app, write, prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), None
        record: dict[str, Any] = {}
        scope.setdefault("state", {})["record"] = record

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            seconds = round(time.perf_counter() - began, 6)
            asked = {"method": scope["method"], "path": scope["path"][:LONGEST_PATH]}
            told = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **asked, "status": status}
            if not self._prompts:
                record.pop("prompt", None)
            self._write(json.dumps(told | {"seconds": seconds} | record))
