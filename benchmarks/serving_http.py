"""Requests to `dcjax serve --protocol http`: valid ones, whole and streamed, and ones that are to be refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx  # which the openai client brings
import numpy as np
from serving_clients import ANSWERS_WITHIN, LEAVES_AFTER, Seen, Work  # pyrefly: ignore[missing-import]
from serving_subject import Subject  # pyrefly: ignore[missing-import]

from dcjax.serving.server.grpc.wire import Answer

SHARES = {
    "long": 0.24,
    "streamed": 0.2,
    "short": 0.15,
    "slow": 0.05,
    "cancelled": 0.11,
    "too large": 0.05,
    "malformed": 0.05,
    "empty": 0.05,
    "not UTF-8": 0.05,
    "hostile": 0.05,
}
"""Kinds of requests, and how many of all they are; slow ones read their streams slowly."""
REFUSED = ("too large", "malformed", "empty", "not UTF-8", "hostile")
REFUSAL, FULL = "REFUSED", "429"
"""Statuses of what cannot be served and is explained, and of what there is no room for."""
STREAM = "streamed"
"""A kind that is streamed and long."""
STREAMED = ("streamed", "slow", "cancelled", "soak")
PATH = "/v1/completions"
SLOWLY = 0.3
"""Seconds that a slow reader waits before each part."""


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a connection of its own for each request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    base = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=base, timeout=ANSWERS_WITHIN, limits=limits, trust_env=False) as client:
        yield client


async def ask(client: httpx.AsyncClient, work: Work) -> Seen:
    """Sends a request as it is, and reads its answer unless it is to be cancelled."""
    seen = Seen(work, began=time.monotonic())
    reading = asyncio.ensure_future(_read(client, work, seen))
    try:
        await asyncio.wait_for(reading, LEAVES_AFTER if work.parts == 0 else None)
    except TimeoutError:
        seen.status = "CANCELLED"
    except (httpx.HTTPError, ValueError) as error:
        seen.status, seen.details = type(error).__name__, str(error)
    seen.seconds = time.monotonic() - seen.began
    return seen


async def _read(client: httpx.AsyncClient, work: Work, seen: Seen) -> None:
    headers = {"content-type": "application/json", **dict(work.metadata)}
    told: dict[str, list[Any]] = {"token_logprobs": [], "weights_versions": []}
    async with client.stream("POST", PATH, content=work.message, headers=headers) as answer:
        if answer.status_code != 200:
            error = json.loads(await answer.aread())["error"]
            explained = answer.status_code in (400, 413) and error["message"] and error["type"]
            seen.status, seen.details = REFUSAL if explained else str(answer.status_code), str(error["message"])
            return
        parts, reason = 0, None
        async for body in _bodies(answer):
            if work.kind == "slow":
                await asyncio.sleep(SLOWLY)
            (choice,) = body["choices"]
            if seen.first is None and choice["token_ids"]:
                seen.first = time.monotonic() - seen.began
            seen.tokens += choice["token_ids"]
            seen.text += choice["text"]
            told["token_logprobs"] += choice["logprobs"]["token_logprobs"]
            told["weights_versions"] += choice["weights_versions"]
            reason, parts = choice["finish_reason"], parts + 1
            if parts == work.parts:
                seen.status = "CANCELLED"
                return
    seen.answer = Answer(
        finish_reason=str(reason), versions=tuple(told["weights_versions"]), log_probs=tuple(told["token_logprobs"])
    )


async def _bodies(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The objects of an answer, one or a stream of them; what does not end as a stream should is an error."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        yield json.loads(await answer.aread())
        return
    last = ""
    async for line in answer.aiter_lines():
        last = line or last
        if line and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
    if last != "data: [DONE]":
        raise ValueError("the stream has no end")


def valid(
    subject: Subject, keys: np.ndarray, number: int, limit: int, version: int = 0, *, kind: str, **of_work: Any
) -> Work:
    """A request for one of the direct samples: of every second prompt as text; `version` is not asked for."""
    sample = number % len(keys)
    row = sample // (len(keys) // len(subject.prompts))
    high, low = keys[sample].tolist()
    asked = {
        "prompt": subject.texts[row] if row % 2 else subject.prompts[row],
        "max_tokens": limit,
        "seed": high << 32 | low,
        "logprobs": 0,
        "return_token_ids": True,
        "stream": kind in STREAMED,
    }
    return Work(number, kind, json.dumps(asked).encode(), limit=limit, **of_work)


def invalid(subject: Subject, number: int, kind: str, draw: random.Random) -> Work:
    """A request that is to be refused."""
    limits, good = subject.model.config.rollout, b'{"prompt": [1], "x": '
    bodies = {
        "too large": [
            json.dumps({"prompt": [1] * (limits.max_prompt_length + 1)}).encode(),
            json.dumps({"prompt": [1], "max_tokens": limits.max_response_length + 1}).encode(),
            json.dumps({"prompt": "1" * 2**20}).encode(),
            b'{"prompt": "' + b"1" * 5 * 2**20 + b'"}',
        ],
        "malformed": [
            b'{"prompt": []}',
            b'{"prompt": [-1]}',
            json.dumps({"prompt": [subject.model.config.model.vocab_size]}).encode(),
            b'{"prompt": [1], "seed": "one"}',
            b'{"prompt": [1], "sneed": 1}',
            b"not JSON",
        ],
        "empty": [b"", b"{}", b"[]", b"null", b'""'],
        "not UTF-8": [b'{"prompt": "\xff\xfe"}', b"\x80\x81", draw.randbytes(100)],
        "hostile": [
            b"[" * 10**5,
            b'{"a":' * 10**5,
            good + b"9" * 10**5 + b"}",
            good + b"1e999999}",
            b'{"prompt": [1], "temperature": NaN}',
            b'{"prompt": [1], "n": 1000000000}',
            b'{"prompt": [1], "stop": [' + b'"a",' * 10**5 + b'"a"]}',
            b'{"prompt": "\\ud800", "temperature": -1}',
        ],
    }
    return Work(number, kind, draw.choice(bodies[kind]))
