import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import threading
import time
import urllib.request

import grpc
import jax
import numpy as np
import psutil
import pytest
import tiny
from grpc_health.v1 import health_pb2, health_pb2_grpc
from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc
from launching import free_port
from listening import CONTRACT as CONTRACT_OF_TESTS
from listening import ask, connected, listening, message, small_policy
from served import END, PROMPTS, SLOTS

from dcjax.data.arithmetic import build_tokenizer
from dcjax.data.task import decode_responses
from dcjax.errors import RunError
from dcjax.serving.rollout import sample_responses
from dcjax.serving.server import life
from dcjax.serving.server.contract import Contract
from dcjax.serving.server.grpc import server, service
from dcjax.serving.server.grpc.driver import ServedEngine
from dcjax.serving.server.grpc.wire import CONTRACT, Asked

pytestmark = pytest.mark.heavy

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def served():
    return small_policy()


@pytest.fixture(scope="module")
def port(served):
    with listening(served) as port:
        yield port


@pytest.fixture
def stub(port):
    with connected(port) as stub:
        yield stub


@pytest.fixture
def gate(monkeypatch):
    """No turn is taken unless it is open."""
    opened, generate = threading.Event(), ServedEngine.generate

    def gated(self, params, decode_state):
        assert opened.wait(30)
        return generate(self, params, decode_state)

    monkeypatch.setattr(ServedEngine, "generate", gated)
    yield opened
    opened.set()


def folded(key, number):
    high, low = jax.random.key_data(jax.random.fold_in(key, number)).tolist()
    return high << 32 | low


def code_of(call):
    with contextlib.suppress(grpc.RpcError):
        list(call)
    return call.code()


def drawn(served, temperature=0.8):
    """What the direct loop samples, and the seeds that name each of its samples."""
    key = jax.random.key(5, impl="threefry2x32")
    rollout = sample_responses(
        served.engine, served.params, PROMPTS, samples_per_prompt=8, temperature=temperature, key=key
    )
    prompts = [prompt for prompt in PROMPTS for _ in range(8)]
    return prompts, [folded(key, number) for number in range(len(prompts))], rollout


def test_a_server_that_stops_finishes_what_it_has_begun_to_read(served, monkeypatch):
    reading, prompt_of = threading.Event(), service.Orchestrator._prompt

    async def slow(*given):
        reading.set()
        await asyncio.sleep(1.5 * life.LINGER)
        return await prompt_of(*given)

    monkeypatch.setattr(service.Orchestrator, "_prompt", slow)
    with concurrent.futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        with listening(served) as port:
            stub = stack.enter_context(connected(port))
            asked = pool.submit(ask, stub, message([5, 6], max_tokens=2), seed=1, stop_token_ids=(0,))
            assert reading.wait(30)
        assert len(asked.result()[1]) == 2


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_samples_are_those_of_the_direct_loop(served, stub, temperature):
    prompts, seeds, rollout = drawn(served, temperature)

    def one(prompt, seed):
        return ask(stub, message(prompt), seed=seed, temperature=temperature, log_probs=True)

    # three times as many requests as slots
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as clients:
        answers = list(clients.map(one, prompts, seeds))
    for row, (_, tokens, answer) in enumerate(answers):
        length = int(rollout.response_mask[row].sum())
        assert tokens == rollout.tokens[row, tiny.PROMPT_LENGTH :][:length].tolist()
        np.testing.assert_allclose(answer.log_probs, rollout.rollout_logps[row, :length], atol=1e-5)
        assert answer.versions == (7,) * length
        assert answer.finish_reason == ("stop" if rollout.finished[row] else "length")
    # some end, and their end token has come with its log-prob
    assert {answer.finish_reason for _, _, answer in answers} == ({"stop", "length"} if temperature else {"length"})


def test_text_is_answered_to_text_without_the_end_token(served, stub):
    answers = [ask(stub, message("1+2="), seed=seed) for seed in range(30)]
    for text, tokens, answer in answers:
        (expected,) = decode_responses(TOKENIZER, [np.array(tokens)], [answer.finish_reason == "stop"])
        assert text == expected
        assert (tokens[-1] == END) == (answer.finish_reason == "stop")
    assert {answer.finish_reason for _, _, answer in answers} == {"stop", "length"}
    prompt = TOKENIZER.encode("1+2=", add_special_tokens=False)
    assert ask(stub, message(prompt), seed=4)[1] == answers[4][1]


def test_a_client_of_jetstream_that_knows_no_metadata_is_served_by_the_contract(port):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = jetstream_pb2_grpc.OrchestratorStub(channel).Decode(message([1, 2, 4], max_tokens=5), timeout=60)
        tokens = [token for part in call for token in part.stream_content.samples[0].token_ids]
        assert 1 <= len(tokens) <= 5
        assert not any("log-probs" in key for key, _ in call.trailing_metadata())


def test_requests_without_a_seed_differ(stub):
    assert len({tuple(ask(stub, message([5]))[1]) for _ in range(8)}) > 1


def test_limit_and_stop_tokens_of_a_request(stub):
    _, tokens, answer = ask(stub, message([5], max_tokens=3), seed=1, stop_token_ids=(19,), temperature=0.0)
    assert (len(tokens), answer.finish_reason) == (3, "length")
    _, ended, answer = ask(stub, message([5]), seed=1, stop_token_ids=(tokens[1], 19), temperature=0.0)
    assert (ended, answer.finish_reason) == (tokens[: tokens.index(tokens[1]) + 1], "stop")


@pytest.mark.parametrize(
    ("request_", "metadata", "told"),
    [
        (jetstream_pb2.DecodeRequest(), [], "must have text_content or token_content"),
        (message([]), [], "length of a prompt is 0; this engine takes 1 to 6"),
        (message(""), [], "length of a prompt is 0"),
        (message([1] * 7), [], "length of a prompt is 7; this engine takes 1 to 6"),
        (message("1" * 3000), [], "length of a prompt is 3000"),
        (message([20]), [], "token of a prompt is 20; this engine takes 0 to 19"),
        (message([-1]), [], "token of a prompt is -1"),
        (message([1], max_tokens=-1), [], "limit of a response is -1; this engine takes 1 to 20"),
        (message([1], max_tokens=21), [], "limit of a response is 21"),
        (message([1], session_cache="mine"), [], "session_cache is 'mine'"),
        (message([1]), [("dcjax-temperature", "nan")], "temperature is nan"),
        (message([1]), [("dcjax-temperature", "-1")], "temperature is -1"),
        (message([1]), [("dcjax-top-p", "0")], "top_p is 0"),
        (message([1]), [("dcjax-top-k", str(2**70 // 2**51))], "top_k is 524288"),
        (message([1]), [("dcjax-top-k", "99999999999999999999")], "top_k"),
        (message([1]), [("dcjax-stop-token-ids", "1,2,3,4,5,6,7")], "number of stop tokens is 7"),
        (message([1]), [("dcjax-colour", "red")], "'dcjax-colour' is unknown"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_value(stub, request_, metadata, told):
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Decode(request_, metadata=metadata, timeout=60))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert told in refused.value.details()


def test_bytes_that_are_no_request_do_no_harm(port, stub):
    before = ask(stub, message([5]), seed=1)
    rng = np.random.default_rng(0)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        decode = channel.unary_stream("/jetstream_proto.Orchestrator/Decode")
        for size in [1, 7, 100, 5000]:
            with pytest.raises(grpc.RpcError):
                list(decode(rng.bytes(size), timeout=60))
    assert ask(stub, message([5]), seed=1) == before


def test_more_than_may_wait_are_refused_and_none_else(served, gate):
    with listening(served, waiting=2) as port, connected(port) as stub:
        calls = [stub.Decode(message([5]), metadata=Asked(seed=1).to_metadata()) for _ in range(SLOTS + 5)]
        futures = concurrent.futures.ThreadPoolExecutor(len(calls))
        codes = [futures.submit(code_of, call) for call in calls]
        done, _ = concurrent.futures.wait(codes, 20, concurrent.futures.FIRST_COMPLETED)
        assert {future.result() for future in done} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        gate.set()
        counted = [future.result(timeout=30) for future in codes]
    assert counted.count(grpc.StatusCode.OK) == SLOTS + 2
    assert counted.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 3


def gauge(port, name):
    """The value of one of Prometheus' metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    (value,) = (line.removeprefix(name) for line in lines if line.startswith(f"{name} "))
    return float(value)


def wait_until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to pass within 10 s")


def test_cancelled_requests_give_their_places_up_whether_they_run_or_wait(served, gate):
    metrics = free_port()
    with listening(served, waiting=SLOTS, metrics_port=metrics) as port, connected(port) as stub:
        # half of them are decoded, and half wait
        left = [stub.Decode(message([5])) for _ in range(2 * SLOTS)]
        wait_until(lambda: gauge(metrics, "dcjax_waiting") == SLOTS)
        for call in left:
            call.cancel()
        wait_until(lambda: gauge(metrics, "dcjax_running") == 0)
        gate.set()
        with concurrent.futures.ThreadPoolExecutor(2 * SLOTS) as clients:
            answers = list(clients.map(lambda seed: ask(stub, message([5]), seed=seed), [1] * (2 * SLOTS)))
        assert len({tuple(tokens) for _, tokens, _ in answers}) == 1
        assert gauge(metrics, 'dcjax_requests_total{outcome="cancelled"}') == 2 * SLOTS


def test_newer_weights_are_served_without_dropping_a_request(served, monkeypatch):
    others = served.engine.sync(tiny.masters(tiny.DENSE, seed=3), 9)
    generate, turns = ServedEngine.generate, itertools.count(1)
    begun, loaded = threading.Event(), threading.Event()

    def second_waits_for_weights(self, params, decode_state):
        if next(turns) == 2:
            begun.set()
            assert loaded.wait(30)
        return generate(self, params, decode_state)

    monkeypatch.setattr(ServedEngine, "generate", second_waits_for_weights)

    def newer(version):
        return (9, others) if begun.is_set() and version < 9 else None

    following, metrics = dataclasses.replace(served, newer=newer), free_port()
    asked = {"seed": 1, "temperature": 0.0, "log_probs": True, "stop_token_ids": (19,)}
    with listening(following, reload_every=0.0, metrics_port=metrics) as port, connected(port) as stub:
        with concurrent.futures.ThreadPoolExecutor(2) as clients:
            running = clients.submit(ask, stub, message([5]), **asked)
            assert begun.wait(30)
            waiting = clients.submit(ask, stub, message([5]), **asked, weights_version=9)
            wait_until(lambda: gauge(metrics, "dcjax_weights_version") == 9)
            loaded.set()
            before, after = running.result(timeout=30), waiting.result(timeout=30)
        assert gauge(metrics, "dcjax_reloads_total") == 1
    steps = served.engine.steps_per_call
    assert before[2].versions == (7,) * steps + (9,) * (len(before[1]) - steps)
    assert set(after[2].versions) == {9}
    # which is what each set of weights samples alone
    for (_, tokens, _), params in ((before, served.params), (after, others)):
        rollout = sample_responses(
            served.engine, params, [[5]], samples_per_prompt=1, temperature=0.0, key=jax.random.key(0)
        )
        count = steps if params is served.params else len(tokens)
        assert tokens[:count] == rollout.tokens[0, tiny.PROMPT_LENGTH :][:count].tolist()


def test_weights_that_never_come_are_refused_in_time(served, monkeypatch):
    monkeypatch.setattr(service, "PATIENCE", 0.1)
    with listening(served) as port, connected(port) as stub, pytest.raises(grpc.RpcError) as refused:
        ask(stub, message([5]), weights_version=8)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "weights of version 7 are served" in refused.value.details()


def test_a_newer_checkpoint_that_is_damaged_is_said_once_and_the_old_weights_are_served_on(served, capfd):
    def damaged(version):
        raise RunError("checkpoint 9 is damaged")

    following = dataclasses.replace(served, newer=damaged)
    with listening(following, reload_every=0.0) as port, connected(port) as stub:
        for seed in range(20):
            assert set(ask(stub, message([5]), seed=seed)[2].versions) == {7}
    assert capfd.readouterr().err == "dcjax: checkpoint 9 is damaged; version 7 is served on\n"


def test_a_server_that_stops_finishes_what_runs_and_refuses_what_comes(served, gate):
    with concurrent.futures.ThreadPoolExecutor(2 * SLOTS) as clients, contextlib.ExitStack() as stack:
        metrics = free_port()
        with listening(served, metrics_port=metrics) as port:
            stub = stack.enter_context(connected(port))
            codes = [clients.submit(code_of, stub.Decode(message([5]))) for _ in range(2 * SLOTS)]
            wait_until(lambda: gauge(metrics, "dcjax_waiting") == SLOTS)
            late = threading.Timer(0.3, lambda: refused.append(code_of(stub.Decode(message([5])))) or gate.set())
            refused = []
            late.start()
        late.join()
        assert [future.result(timeout=30) for future in codes] == [grpc.StatusCode.OK] * (2 * SLOTS)
    assert refused == [grpc.StatusCode.UNAVAILABLE]


def test_a_server_has_its_time_to_finish_and_no_more(served, gate):
    with concurrent.futures.ThreadPoolExecutor(1) as clients, contextlib.ExitStack() as stack:
        metrics = free_port()
        with listening(served, grace=0.3, metrics_port=metrics) as port:
            stub = stack.enter_context(connected(port))
            code = clients.submit(code_of, stub.Decode(message([5])))
            wait_until(lambda: gauge(metrics, "dcjax_running") == 1)
            threading.Timer(2, gate.set).start()
        assert code.result(timeout=30) != grpc.StatusCode.OK


def test_health_is_told_by_both_protocols_and_the_contract_beside(port, stub):
    call = stub.HealthCheck.with_call(jetstream_pb2.HealthCheckRequest(), timeout=60)
    assert call[0].is_live
    assert Contract.from_json(dict(call[1].trailing_metadata())[CONTRACT], "it") == CONTRACT_OF_TESTS
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for name in ("", "jetstream_proto.Orchestrator"):
            told = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
            assert told.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.slow
def test_a_client_that_pings_while_it_waits_is_not_taken_for_an_attacker(served, gate, monkeypatch):
    monkeypatch.setattr(server, "PING_INTERVAL", 1000)
    often = [("grpc.keepalive_time_ms", 3000), ("grpc.http2.max_pings_without_data", 0)]
    with listening(served) as port, grpc.insecure_channel(f"127.0.0.1:{port}", options=often) as channel:
        call = jetstream_pb2_grpc.OrchestratorStub(channel).Decode(message([5]))
        # by itself, gRPC's server ends the connection at the fifth ping
        threading.Timer(22, gate.set).start()
        calls = concurrent.futures.ThreadPoolExecutor(1)
        assert calls.submit(code_of, call).result(timeout=60) == grpc.StatusCode.OK


def test_only_this_machine_reaches_it_unless_told_otherwise(port):
    addresses = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections()
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
    }
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}


def test_a_port_that_is_taken_is_one_line(served, port):
    with pytest.raises(RunError, match=f"cannot listen at 127.0.0.1:{port}"), listening(served, port=port):
        pass


def test_a_thread_that_fails_is_told_and_kills_nobody(served, monkeypatch):
    def broken(self, params, decode_state):
        raise RuntimeError("no such device")

    monkeypatch.setattr(ServedEngine, "generate", broken)
    fails = pytest.raises(AssertionError, match="no such device")
    with fails, listening(served, grace=0.1) as port, connected(port) as stub:
        call = stub.Decode(message([5]), timeout=1)
        assert code_of(call) == grpc.StatusCode.DEADLINE_EXCEEDED


def test_metrics_count_what_was_served(served):
    metrics = free_port()
    with listening(served, metrics_port=metrics) as port, connected(port) as stub:
        answers = [ask(stub, message([5]), seed=seed) for seed in range(20)]
        with pytest.raises(grpc.RpcError):
            ask(stub, message([]))
        reasons = [answer.finish_reason for _, _, answer in answers]
        for reason in ("stop", "length"):
            assert gauge(metrics, f'dcjax_requests_total{{outcome="{reason}"}}') == reasons.count(reason)
        assert gauge(metrics, 'dcjax_requests_total{outcome="refused"}') == 1
        assert gauge(metrics, "dcjax_tokens_total") == sum(len(tokens) for _, tokens, _ in answers)
        assert gauge(metrics, "dcjax_first_token_seconds_count") == 20
        assert gauge(metrics, "dcjax_weights_version") == 7
