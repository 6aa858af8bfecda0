"""Requests to `dcjax serve` over gRPC: valid ones, ones that are to be refused, and nonsense."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import socket
import time
from functools import partial
from typing import Any

import grpc
import numpy as np
from jetstream.core.proto import jetstream_pb2
from serving_clients import ANSWERS_WITHIN, LEAVES_AFTER, Seen, Work  # pyrefly: ignore[missing-import]
from serving_subject import Subject  # pyrefly: ignore[missing-import]

from dcjax.serving.server.grpc.wire import MAX_METADATA, Answer, Asked

proto: Any = jetstream_pb2

DECODE = "/jetstream_proto.Orchestrator/Decode"
SHARES = {"long": 0.4, "short": 0.3, "cancelled": 0.14, "too large": 0.08, "malformed": 0.08}
"""Kinds of requests, and how many of all they are."""
REFUSED = ("too large", "malformed")
STREAM = "long"
"""A kind that is streamed and long."""
REFUSAL, FULL = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"
"""Statuses of what cannot be served, and of what there is no room for."""

OWN_FAULTS = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Statuses of a server that fails, rather than of a request that does."""


def connected(port: int) -> Any:
    """A connection of its own to the server."""
    options = [("grpc.max_metadata_size", MAX_METADATA), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)


async def ask(channel: Any, work: Work) -> Seen:
    """Sends a request as it is, and reads its answer unless it is to be cancelled."""
    method = channel.unary_stream(DECODE, response_deserializer=proto.DecodeResponse.FromString)
    seen, parts = Seen(work, began=time.monotonic()), 0
    call = method(work.message, metadata=tuple(work.metadata), timeout=ANSWERS_WITHIN)
    try:
        if work.parts == 0:
            await asyncio.sleep(LEAVES_AFTER)
            raise asyncio.CancelledError
        async for message in call:
            (sample,) = message.stream_content.samples
            if seen.first is None and sample.token_ids:
                seen.first = time.monotonic() - seen.began
            seen.tokens += sample.token_ids
            seen.text += sample.text
            parts += 1
            if parts == work.parts:
                raise asyncio.CancelledError
        seen.answer = Answer.from_metadata(await call.trailing_metadata())
    except grpc.aio.AioRpcError as error:
        seen.status, seen.details = error.code().name, error.details() or ""
    except asyncio.CancelledError:
        call.cancel()
        seen.status = "CANCELLED"
    seen.seconds = time.monotonic() - seen.began
    return seen


def valid(subject: Subject, keys: np.ndarray, number: int, limit: int, version: int = 0, **of_work: Any) -> Work:
    """A request for one of the direct samples: of every second prompt as text."""
    sample = number % len(keys)
    row = sample // (len(keys) // len(subject.prompts))
    content: dict[str, Any] = (
        {"text_content": proto.DecodeRequest.TextContent(text=subject.texts[row])}
        if row % 2
        else {"token_content": proto.DecodeRequest.TokenContent(token_ids=subject.prompts[row])}
    )
    high, low = keys[sample].tolist()
    asked = Asked(seed=high << 32 | low, log_probs=True, weights_version=version)
    message = proto.DecodeRequest(max_tokens=limit, **content).SerializeToString()
    return Work(number, message=message, metadata=asked.to_metadata(), limit=limit, **of_work)


def invalid(subject: Subject, number: int, kind: str, draw: random.Random) -> Work:
    """A request that is to be refused."""
    limits, (prompt, metadata) = subject.model.config.rollout, ([1], [])
    tokens, fields = proto.DecodeRequest.TokenContent, {}
    if kind == "too large":
        prompt, fields = draw.choice(
            [([1] * (limits.max_prompt_length + 1), {}), ([1], {"max_tokens": limits.max_response_length + 1})]
        )
    else:
        prompt, metadata = draw.choice(
            [
                ([], []),
                ([subject.model.config.model.vocab_size], []),
                ([-1], []),
                ([1], [("dcjax-sneed", "1")]),
                ([1], [("dcjax-seed", "one")]),
            ]
        )
    message = proto.DecodeRequest(token_content=tokens(token_ids=prompt), **fields).SerializeToString()
    return Work(number, kind, message, metadata)


def nonsense(draw: random.Random, number: int, vocabulary: int) -> Work:
    """A request of random bytes, of random fields, or of random metadata."""
    kind = draw.choice(["bytes", "fields", "metadata"])
    message, metadata = proto.DecodeRequest(token_content={"token_ids": [1]}).SerializeToString(), []
    if kind == "bytes":
        message = draw.randbytes(draw.choice([0, 1, 3, 10, 100, 10_000, 5_000_000 if number == 0 else 50]))
    elif kind == "fields":
        message = random_fields(draw, vocabulary).SerializeToString()
    else:
        metadata = [random_setting(draw) for _ in range(draw.randint(1, 4))]
    return Work(number, kind, message, metadata, parts=draw.choice([None, None, 0, 1]))


def random_fields(draw: random.Random, vocabulary: int) -> Any:
    """A DecodeRequest that is one, whatever it asks for."""
    integer = partial(draw.choice, [0, 1, -1, 5, 2**31 - 1, -(2**31), vocabulary, vocabulary - 1])
    request = proto.DecodeRequest(priority=integer(), max_tokens=integer())
    if draw.random() < 0.2:
        request.session_cache = draw.choice(["a", "\0", "é" * 5000])
    if draw.random() < 0.5:
        request.text_content.text = "".join(
            chr(draw.choice([0, 10, 48, 61, 233, 0x1F600])) for _ in range(length(draw))
        )
    elif draw.random() < 0.9:
        request.token_content.token_ids.extend(integer() for _ in range(length(draw)))
    return request


def length(draw: random.Random) -> int:
    """Of a prompt, mostly one that would do."""
    return draw.choice([0, 1, 2, 3, 10, 14, 1000])


def random_setting(draw: random.Random) -> tuple[str, str | bytes]:
    """A pair of metadata that gRPC sends."""
    names = [field.name.replace("_", "-") for field in dataclasses.fields(Asked)]
    values = [
        "",
        "0",
        "1",
        "-1",
        "nan",
        "inf",
        "1e400",
        "1e-46",
        "0.5",
        "true",
        "1,2",
        ",",
        "1," * 50,
        "9" * 30,
        "9" * 5000,
    ]
    values += ["".join(chr(draw.randint(32, 126)) for _ in range(20)).strip()]
    key = "dcjax-" + draw.choice([*names, "log-probs-bin", "x" * 100])
    return (key, draw.randbytes(20)) if key.endswith("-bin") else (key, draw.choice(values))


def no_http(port: int, draw: random.Random) -> None:
    """Bytes that are no gRPC on a connection of their own, which is closed, or left behind half open for a moment."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        preface = draw.choice([b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
        connection.sendall(preface + draw.randbytes(draw.choice([0, 9, 1000])))
