"""Faults that load and nonsense have found."""

import asyncio
import logging

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from jetstream.core.proto import jetstream_pb2
from served import P, engine_of

from dcjax.data.arithmetic import build_tokenizer
from dcjax.serving.server.grpc import service
from dcjax.serving.server.grpc.server import UnreadableAsEmpty
from dcjax.serving.server.metrics import Metrics

pytestmark = pytest.mark.heavy


async def answers(interceptors, messages):
    """What gRPC's own health service answers to messages, as they are; or the status instead."""
    server = grpc.aio.server(interceptors=interceptors)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    found = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        for message in messages:
            try:
                found.append(await check(message, timeout=30))
            except grpc.aio.AioRpcError as error:
                found.append(error.code().name)
    await server.stop(None)
    return found


def test_messages_that_cannot_be_read_leave_no_traceback_in_the_log(caplog):
    known, unknown = (health_pb2.HealthCheckRequest(service=name).SerializeToString() for name in ("", "other"))
    serves = health_pb2.HealthCheckResponse(status="SERVING").SerializeToString()
    messages = [b"\xff", known, b"\x0a\x7f", unknown]
    with caplog.at_level(logging.DEBUG, "grpc"):
        assert asyncio.run(answers([UnreadableAsEmpty()], messages)) == [serves, serves, serves, "NOT_FOUND"]
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        # which is what it is for
        assert asyncio.run(answers([], messages)) == ["UNKNOWN", serves, "UNKNOWN", "NOT_FOUND"]
        assert [record.levelname for record in caplog.records if "DecodeError" in record.message] == ["ERROR"] * 2


class Context:
    """Of a call that has no metadata; what it is refused with is raised."""

    def invocation_metadata(self):
        return ()

    async def abort(self, code, details):
        raise grpc.aio.AbortError(code, details)


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(monkeypatch):
    encoded = []

    def encode(tokenizer, texts):
        encoded.extend(len(text) for text in texts)
        return [[0] * len(text) for text in texts]

    monkeypatch.setattr(service, "encode", encode)
    metrics = Metrics(running=lambda: 0, slots=1)
    server = service.Orchestrator(None, engine_of(), None, None, build_tokenizer(), metrics)

    async def refusal(length):
        content = jetstream_pb2.DecodeRequest.TextContent(text="1" * length)
        async for _ in server.Decode(jetstream_pb2.DecodeRequest(text_content=content), Context()):
            pass

    # its longest token is \\boxed{
    for length, told in [(7 * P, f"is {7 * P}; this engine takes 1 to {P}"), (7 * P + 1, f"is {7 * P + 1} characters")]:
        with pytest.raises(grpc.aio.AbortError) as refused:
            asyncio.run(refusal(length))
        assert told in refused.value.args[1] and refused.value.args[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert encoded == [7 * P]
