"""The routes: OpenAI's completions, chat and models, the contract, health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from dcjax.serving.server.http.refused import Refused
from dcjax.serving.server.http.service import Choice, Service
from dcjax.serving.server.http.wire import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    ErrorAnswer,
    TrainLogprobs,
    TrainLogprobsRequest,
)
from dcjax.serving.server.http.writing import ChatWriter, CompletionWriter, Writer
from dcjax.serving.server.metrics import Metrics

T = TypeVar("T")

PAGE = Path(__file__).with_name("page.html")
"""A chat box; what it shows of a policy."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
"""The page loads nothing, and talks to this server only."""

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": told}
    for status, told in {
        400: "What cannot be served, and what can.",
        401: "A bearer token is needed; it is missing or wrong.",
        404: "Another model than the one that is served.",
        408: "The body has not come in time.",
        413: "The body is too large.",
        429: "Too many requests wait.",
        503: "The server is stopping.",
        504: "The request took too long.",
    }.items()
}
ANSWERS: dict[int | str, dict[str, Any]] = ERRORS | {
    200: {
        "description": "The answers, as one object, or as server-sent events where `stream` is true.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def make_app(service: Service, metrics: Metrics) -> FastAPI:
    """The application.

    Args:
      service: that serves.
      metrics: that count.
    """
    app = FastAPI(title="dcjax", description="The deployed policy, and log-probs that mean something.")
    created = int(time.time())

    @app.post("/v1/completions", responses=ANSWERS, response_model=None)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        service.check_serving()
        writer = CompletionWriter(service, asked, await service.prompts_of(asked))
        request.state.record["prompt"] = asked.prompt
        return await answered(request, writer, asked)

    @app.post("/v1/chat/completions", responses=ANSWERS, response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        service.check_serving()
        writer = ChatWriter(service, asked, [await service.prompt_of(asked)])
        request.state.record["prompt"] = [message.model_dump() for message in asked.messages]
        return await answered(request, writer, asked)

    @app.post("/v1/train_logprobs", responses=ERRORS)
    async def train_logprobs(asked: TrainLogprobsRequest) -> TrainLogprobs:
        return await service.train_logprobs(asked)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text("utf-8"), headers={"content-security-policy": POLICY})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": service.name, "object": "model", "created": created, "owned_by": "dcjax"}
        return {"object": "list", "data": [model]}

    @app.get("/v1/contract")
    async def contract() -> dict[str, Any]:
        return service.contract()

    @app.get("/health", responses={503: ERRORS[503]}, response_model=None)
    async def health() -> Response:
        service.check_serving()
        return JSONResponse({"status": "serving"})

    @app.get("/metrics", response_class=Response)
    async def metrics_() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def answered(request: Request, writer: Writer, asked: AnyRequest) -> Response:
        record = request.state.record
        record |= {"id": writer.id, "prompt_tokens": sum(map(len, writer.prompts)), "samples": asked.n}
        counted = _counted(service.answers(asked, writer.prompts), metrics, record)
        first = await _unless_left(request, anext(counted))  # so that what cannot be served has a status of its own
        if isinstance(writer, CompletionWriter):
            await _unless_left(request, writer.read_prompts())
        following = _behind(first, counted)
        if asked.stream:
            return StreamingResponse(writer.parts(following), media_type="text/event-stream")
        return JSONResponse(await _unless_left(request, writer.whole(following)))

    def described() -> dict[str, Any]:
        if not app.openapi_schema:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in app.openapi_schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # which is a 400 here
        return app.openapi_schema

    app.openapi = described
    app.add_exception_handler(Refused, _refused)  # pyrefly: ignore[bad-argument-type]
    app.add_exception_handler(RequestValidationError, _invalid)  # pyrefly: ignore[bad-argument-type]
    app.add_exception_handler(HTTPException, _http_error)  # pyrefly: ignore[bad-argument-type]
    return app


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """What comes of some work, which is cancelled where the client goes away meanwhile.

    Raises:
      Refused: it has gone, and nobody hears that.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused(499, "the client has left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _behind(first: Choice, others: AsyncIterator[Choice]) -> AsyncIterator[Choice]:
    yield first
    async for choice in others:
        yield choice


async def _counted(choices: AsyncIterator[Choice], metrics: Metrics, record: dict[str, Any]) -> AsyncIterator[Choice]:
    """The same; once they have ended, or nobody wants them any more, the request is counted."""
    began, outcome, tokens = time.perf_counter(), "cancelled", 0
    try:
        async for choice in choices:
            if not tokens:
                record["first_token_seconds"] = round(time.perf_counter() - began, 6)
                metrics.first_token.observe(record["first_token_seconds"])
            tokens += len(choice.delta.tokens)
            yield choice
            outcome = choice.delta.finish_reason or outcome
    except Refused:
        outcome = "refused"
        raise
    finally:
        record |= {"outcome": outcome, "tokens": tokens}
        metrics.ended(outcome, time.perf_counter() - began, tokens)


def _refused(request: Request, error: Refused) -> JSONResponse:
    return error.answer()


def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first thing that is wrong with a body, quoted."""
    wrong = error.errors()[0]
    # what follows says which of several types was tried
    place = str(wrong["loc"][1]) if len(wrong["loc"]) > 1 else "the body"
    given = "" if "input" not in wrong or wrong["type"] == "missing" else f" (given: {wrong['input']!r})"
    return Refused(400, f"{place}: {wrong['msg']}{given}"[:500], place).answer()


def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    answer = Refused(error.status_code, str(error.detail)).answer()
    answer.headers.update(error.headers or {})
    return answer
