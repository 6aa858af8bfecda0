"""What stands before the application: a limit on bodies, and the token that clients must know."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

DRAINED, PATIENCE = 3, 5.0
"""How many times the largest body, and for how many seconds, is taken in before one is refused."""

OPEN = ("/health",)
"""Paths that need no token."""


class Guard:
    """Refuses requests before they are read.

    Args:
      app: what is guarded.
      largest: bytes of a body at most.
      token: that `Authorization: Bearer` must have; None lets everybody in.
    """

    def __init__(self, app: ASGIApp, *, largest: int, token: str | None):
        self._app, self._largest = app, largest
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._token is not None and scope["path"] not in OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given, self._token):
                await _refuse(
                    send, 401, "a bearer token is needed, and this one is missing or wrong", "invalid_api_key"
                )
                return
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._largest:
            await self._too_large(receive, send)
            return
        taken, began, refused = 0, False, False

        async def counted() -> Message:
            nonlocal taken, refused
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._largest and not began:
                refused = True
                await self._too_large(receive, send)
                return {"type": "http.disconnect"}
            return message

        async def noted(message: Message) -> None:
            nonlocal began
            began = True
            if not refused:
                await send(message)

        await self._app(scope, counted, noted)

    async def _too_large(self, receive: Receive, send: Send) -> None:
        """Takes in some more of the body, behind which most clients look at the answer, and refuses it."""
        left = DRAINED * self._largest
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while left > 0 and (message := await receive()).get("more_body"):
                    left -= len(message["body"])
        await _refuse(send, 413, f"the body is larger than {self._largest} bytes", "too_large")


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    told: Any = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    body = json.dumps(told).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
