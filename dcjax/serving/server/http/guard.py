"""What stands before the application: the token that clients must know, and limits on bodies and on time."""

from __future__ import annotations

import asyncio
import contextlib
import hmac

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dcjax.serving.server.http.refused import Refused

DRAINED, PATIENCE = 3, 5.0
"""How many times the largest body, and for how many seconds, is taken in before one is refused."""

BODY_SECONDS = 30.0
"""Seconds in which a body must have come."""

OPEN = ("/health", "/")
"""Paths that need no token."""


class Guard:
    """Refuses requests before they are read, and ends those that take too long.

    Args:
      app: what is guarded.
      largest: bytes of a body at most.
      seconds: that a request may take.
      token: that `Authorization: Bearer` must have; None lets everybody in.
    """

    def __init__(self, app: ASGIApp, *, largest: int, seconds: float, token: str | None):
        self._app, self._largest, self._seconds = app, largest, seconds
        self._token = None if token is None else token.encode()
        # requests that are open: read, waiting, decoded, or written
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self.open += 1
        try:
            await self._let_through(scope, receive, send)
        finally:
            self.open -= 1

    async def _let_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        passing = _Passing(scope, receive, send, self._largest)
        if self._token is not None and scope["path"] not in OPEN and not self._knows(scope):
            refused = Refused(401, "a bearer token is needed; it is missing or wrong", code="invalid_api_key")
            await passing.refuse(refused)
            return
        if passing.declared > self._largest:
            await passing.too_large()
            return
        try:
            async with asyncio.timeout(self._seconds):
                await self._app(scope, passing.receive, passing.send)
        except TimeoutError:
            await passing.give_up(f"the request took longer than {self._seconds:g} s, and was given up")

    def _knows(self, scope: Scope) -> bool:
        kind, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(given, self._token or b"")


class _Passing:
    """One request on its way through."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, largest: int):
        self._scope, self._receive, self._send, self._largest = scope, receive, send, largest
        self._taken, self._read, self._refused = 0, False, False
        # None until the answer has begun; then whether it is a stream of events
        self._streams: bool | None = None
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS

    @property
    def declared(self) -> int:
        """Bytes that the body is said to have."""
        length = dict(self._scope["headers"]).get(b"content-length", b"0")
        return int(length[:20]) if length.isdigit() else 0

    async def receive(self) -> Message:
        """What comes of the body, and what comes behind it."""
        if self._read:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            return await self._end(Refused(408, f"the body has not come within {BODY_SECONDS:g} s", code="timeout"))
        self._read = not message.get("more_body")
        self._taken += len(message.get("body", b""))
        if self._taken > self._largest and self._streams is None:
            await self.too_large()
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        """The application's answer, unless the request has been refused."""
        if self._refused:
            return
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
        await self._send(message)

    async def too_large(self) -> None:
        """Takes in some more of the body, behind which most clients look at the answer, and refuses it."""
        left = DRAINED * self._largest
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while left > 0 and (message := await self._receive()).get("more_body"):
                    left -= len(message["body"])
        await self._end(Refused(413, f"the body is larger than {self._largest} bytes", code="too_large"))

    async def give_up(self, why: str) -> None:
        """Says so where that is still possible: as an answer, or as the last event of a stream."""
        refused = Refused(504, why, code="timeout")
        if self._streams is None:
            await self.refuse(refused)
        elif self._streams:
            event = b"data: " + bytes(refused.answer().body) + b"\n\n"
            with contextlib.suppress(TimeoutError):  # who does not read will not read that either
                async with asyncio.timeout(PATIENCE):
                    await self._send({"type": "http.response.body", "body": event})

    async def refuse(self, refused: Refused) -> None:
        """Answers, and hangs up."""
        answer: JSONResponse = refused.answer()
        answer.headers["connection"] = "close"
        await answer(self._scope, self._receive, self._send)

    async def _end(self, refused: Refused) -> Message:
        self._refused = True
        await self.refuse(refused)
        return {"type": "http.disconnect"}
