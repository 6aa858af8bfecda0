"""Servers of `dcjax serve` on a real port, in this process, and what clients ask of them."""

import asyncio
import contextlib

import grpc
import tiny
from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc
from served import END, T, engine_of, params_of

from dcjax.data.arithmetic import build_tokenizer
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.server.contract import Contract
from dcjax.serving.server.grpc.client import event_loop
from dcjax.serving.server.grpc.server import serving
from dcjax.serving.server.grpc.wire import MAX_METADATA, Answer, Asked
from dcjax.serving.server.served import Served, ServerConfig

CONTRACT = Contract(
    format="float32",
    kv_cache="auto",
    keep=(),
    temperature=0.8,
    top_k=0,
    top_p=1.0,
    max_prompt_length=tiny.PROMPT_LENGTH,
    max_response_length=T,
    end_tokens=(END,),
    run="a run",
    step=7,
)


def small_policy(rehearse=Qwen3Engine.rehearse):
    """A policy that is served by `CONTRACT`, the programs of a protocol compiled."""
    engine = engine_of("float32", max_candidates=0)
    params = params_of(engine)
    rehearse(engine, params)
    return Served("tests", engine, 7, params, build_tokenizer(), CONTRACT, newer=None, prompts=2)


@contextlib.contextmanager
def listening(served, serving=serving, **settings):
    """The port of a server that is stopped at the end; a thread of its that failed fails the test."""
    failures = []

    def result(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, event_loop()).result(timeout=60)

    server = serving(served, ServerConfig(**{"port": 0, **settings}), on_failure=failures.append)
    port, _ = result(server.__aenter__())
    try:
        yield port
    finally:
        result(server.__aexit__(None, None, None))
    assert not failures, failures


def message(prompt, max_tokens=0, **fields):
    """A request of tokens or of text."""
    request = jetstream_pb2.DecodeRequest
    content = (
        {"text_content": request.TextContent(text=prompt)}
        if isinstance(prompt, str)
        else {"token_content": request.TokenContent(token_ids=prompt)}
    )
    return request(max_tokens=max_tokens, **content, **fields)


@contextlib.contextmanager
def connected(port):
    """JetStream's own stub."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_metadata_size", MAX_METADATA)]) as channel:
        yield jetstream_pb2_grpc.OrchestratorStub(channel)


def ask(stub, request, **asked):
    """(text, token ids, answer) of one request."""
    call = stub.Decode(request, metadata=Asked(**asked).to_metadata(), timeout=60)
    samples = [sample for response in call for sample in response.stream_content.samples]
    tokens = [token for sample in samples for token in sample.token_ids]
    return "".join(sample.text for sample in samples), tokens, Answer.from_metadata(call.trailing_metadata())
