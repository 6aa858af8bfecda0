"""The server over a real port, asked by OpenAI's own client and by hand."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import openai
import pytest
import tiny
from listening import CONTRACT, listening, small_policy
from served import END, PROMPTS, SLOTS, T

from dcjax.data.arithmetic import build_tokenizer
from dcjax.serving.continuous import Continuous, rehearse
from dcjax.serving.rollout import sample_responses
from dcjax.serving.scoring import score_sequence
from dcjax.serving.server import life
from dcjax.serving.server.http import guard
from dcjax.serving.server.http.server import LARGEST_BODY, serving
from dcjax.serving.server.http.service import Service
from dcjax.serving.server.http.wire import ChatRequest
from dcjax.serving.server.http.writing import CompletionWriter
from dcjax.serving.server.served import Served

pytestmark = pytest.mark.heavy

TOKENIZER = build_tokenizer()


@contextlib.contextmanager
def http_server(served, **settings):
    """The address of a server."""
    with listening(served, serving, **settings) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def served():
    return small_policy(rehearse)


@pytest.fixture(scope="module")
def address(served):
    with http_server(served) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def complete(client, prompt, **asked):
    """Asks with the fields that OpenAI has not in `extra_body`, as its users do."""
    extra = {name: asked.pop(name) for name in ("top_k", "logprobs_mode", "stop_token_ids") if name in asked}
    return client.completions.create(
        model="tests", prompt=prompt, extra_body={"return_token_ids": True, **extra}, **{"max_tokens": T} | asked
    )


def drawn(served, temperature, seed=5):
    """What the direct loop samples of each prompt, and the seeds by which a server samples the same."""
    key = jax.random.key(seed, impl="threefry2x32")
    rollout = sample_responses(
        served.engine, served.params, PROMPTS, samples_per_prompt=4, temperature=temperature, key=key
    )
    seeds = []
    for number in range(len(PROMPTS) * 4):
        high, low = jax.random.key_data(jax.random.fold_in(key, number)).tolist()
        seeds.append(high << 32 | low)
    return rollout, seeds


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_samples_are_those_of_the_direct_loop(served, client, temperature):
    rollout, seeds = drawn(served, temperature)

    def one(number):
        prompt, seed = PROMPTS[number // 4], seeds[number]
        return complete(client, prompt, seed=seed, temperature=temperature, logprobs=0)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(len(seeds))))
    for number, answer in enumerate(answers):
        (choice,) = answer.choices
        mask = rollout.response_mask[number]
        expected = rollout.tokens[number, -T:][mask].tolist()
        assert choice.token_ids == expected
        if temperature:
            np.testing.assert_allclose(choice.logprobs.token_logprobs, rollout.rollout_logps[number][mask], atol=1e-5)
        assert choice.finish_reason == ("stop" if rollout.finished[number] else "length")
        assert set(choice.weights_versions) == {7}
        assert answer.usage.completion_tokens == len(expected)


def test_a_stream_says_what_a_whole_answer_does(client):
    asked = {"prompt": PROMPTS[0], "n": 3, "seed": 11, "logprobs": 3}
    whole = complete(client, **asked)
    parts = list(complete(client, stream=True, stream_options={"include_usage": True}, **asked))
    assert parts[-1].usage == whole.usage and parts[-1].choices == []
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts[:-1] if part.choices[0].index == choice.index]
        assert len(mine) > 1
        assert "".join(part.text for part in mine) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            told = [value for part in mine for value in getattr(part.logprobs, name)]
            assert told == getattr(choice.logprobs, name)
        assert [part.finish_reason for part in mine][-1] == choice.finish_reason
    # the samples of a request have seeds that follow each other
    assert complete(client, PROMPTS[0], seed=13).choices[0].token_ids == whole.choices[2].token_ids


def test_log_probs_are_of_what_was_sampled_from_or_of_the_model(served, client):
    asked = {"prompt": PROMPTS[1], "seed": 3, "temperature": 0.5, "top_p": 0.9, "logprobs": 5}
    sampled, model = (complete(client, logprobs_mode=mode, **asked).choices[0] for mode in ("sampled", "model"))
    assert sampled.token_ids == model.token_ids
    whole = [*PROMPTS[1], *sampled.token_ids]
    room = tiny.PROMPT_LENGTH
    scores = score_sequence(served.engine, served.params, whole[:room], 5)
    own = scores.logps[len(PROMPTS[1]) - 1 :]
    np.testing.assert_allclose(model.logprobs.token_logprobs[: len(own)], own, atol=1e-5)
    # truncated at .9 and sharpened: what could be drawn sums to one
    for top, log_prob, chosen in zip(
        sampled.logprobs.top_logprobs, sampled.logprobs.token_logprobs, sampled.logprobs.tokens, strict=True
    ):
        assert top[chosen] == log_prob
        assert sum(np.exp(list(top.values()))) <= 1 + 1e-5
        if len(top) < 5:
            assert sum(np.exp(list(top.values()))) == pytest.approx(1, abs=1e-4)
    greedy = complete(client, PROMPTS[1], temperature=0, logprobs=1).choices[0].logprobs
    assert all(
        [*top.values()] == [value] for top, value in zip(greedy.top_logprobs, greedy.token_logprobs, strict=True)
    )


def test_an_echo_has_the_prompts_own_log_probs(served, client):
    text = "2-4="
    prompt = TOKENIZER(text)["input_ids"]
    choice = complete(client, text, echo=True, logprobs=2, max_tokens=1, temperature=0).choices[0]
    assert choice.text.startswith(text)
    expected = score_sequence(served.engine, served.params, prompt, 2)
    told = choice.logprobs
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    np.testing.assert_allclose(told.token_logprobs[1 : len(prompt)], expected.logps, atol=1e-6)
    assert len(told.tokens) == len(prompt) + 1
    offsets = [
        choice.text[begin:].startswith(token) for begin, token in zip(told.text_offset, told.tokens, strict=True)
    ]
    assert all(offsets[: len(prompt)])
    # the model reads its own greedy answer as the most probable one
    again = complete(client, [*prompt, *choice.token_ids], echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
    assert again.token_logprobs[len(prompt)] == pytest.approx(told.token_logprobs[-1], abs=1e-5)


def test_a_stop_string_ends_an_answer_and_frees_its_slot(client):
    whole = complete(client, PROMPTS[2], seed=1, temperature=2.0).choices[0]
    stop = whole.text[4:6]
    cut = complete(client, PROMPTS[2], seed=1, temperature=2.0, stop=["no such text", stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def ask(address, path="/v1/completions", body=None, headers=None, method=None):
    """(status, body) of a request by hand."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"content-type": "application/json", **(headers or {})})
    request.method = method or request.get_method()
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({}, 400, "prompt: Field required"),
        ({"prompt": 5}, 400, "prompt: "),
        ({"prompt": []}, 400, "length of a prompt is 0"),
        ({"prompt": [[]]}, 400, "length of a prompt is 0"),
        ({"prompt": [1] * 100}, 400, "length of a prompt is 100; this engine takes 1 to"),
        ({"prompt": [10**6]}, 400, "token of a prompt is 1000000"),
        ({"prompt": "1" * 10**6}, 400, "prompt has 1000000 characters"),
        ({"prompt": "1+1=", "max_tokens": 10**6}, 400, "limit of a response is 1000000"),
        (
            {"prompt": "1+1=", "temperature": -1},
            400,
            "temperature: Input should be greater than or equal to 0 (given: -1)",
        ),
        (b'{"prompt": "1+1=", "temperature": NaN}', 400, "temperature: "),
        ({"prompt": "1+1=", "n": 10**9}, 400, "n: "),
        ({"prompt": ["1+1="] * 50, "n": 50}, 400, "50 prompts x n 50 are 2500 samples; at most 256"),
        ({"prompt": "1+1=", "logit_bias": {"1": 5}}, 400, "logit_bias: "),
        ({"prompt": "1+1=", "frequency_penalty": 1}, 400, "frequency_penalty: "),
        ({"prompt": "1+1=", "temprature": 1}, 400, "temprature: Extra inputs are not permitted"),
        ({"prompt": "1+1=", "model": "gpt"}, 404, "model is 'gpt'; 'tests' is served"),
        (b"", 400, "Field required"),
        (b"{", 400, "JSON"),
        (b'{"prompt": "\xff"}', 400, ""),
        (b"[" * 10**5, 400, ""),
        (b'{"prompt": ' + b"1" * 10**5 + b"}", 400, ""),
    ],
)
def test_what_cannot_be_served_is_said(address, body, status, told):
    code, answer = ask(address, body=body)
    assert (code, set(answer["error"])) == (status, {"message", "type", "param", "code"})
    assert told in answer["error"]["message"]


def test_a_chat_needs_a_template(address):
    body = {"messages": [{"role": "user", "content": "1+1="}]}
    code, answer = ask(address, "/v1/chat/completions", body)
    assert code == 400 and "tests has no chat template; use /v1/completions" in answer["error"]["message"]


def test_a_chat_is_a_completion_of_its_template(served):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}="
    chatting = Served("tests", served.engine, 7, served.params, tokenizer, CONTRACT, newer=None, prompts=2)
    with http_server(chatting) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        messages = [{"role": "user", "content": [{"type": "text", "text": "12-4"}]}]
        asked = {"model": "tests", "seed": 5, "max_tokens": 12, "n": 2}
        text = client.completions.create(prompt="12-4=", logprobs=2, **asked)
        chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **asked)
        parts = list(client.chat.completions.create(messages=messages, stream=True, **asked))
        for written, said in zip(text.choices, chat.choices, strict=True):
            assert said.message.content == written.text
            assert [each.logprob for each in said.logprobs.content] == written.logprobs.token_logprobs
            assert [each.token for each in said.logprobs.content] == written.logprobs.tokens
            streamed = [part.choices[0].delta for part in parts if part.choices[0].index == said.index]
            assert streamed[0].role == "assistant"
            assert "".join(delta.content for delta in streamed) == written.text
        with pytest.raises(openai.BadRequestError, match="top_logprobs is given, and logprobs is false"):
            client.chat.completions.create(messages=messages, top_logprobs=2, **asked)


# which turn it is, what it says, and whether the model is told to think
TURNS = (
    "{% for message in messages %}{{ {'system': 0, 'user': 1, 'assistant': 2}[message.role] }}{{ message.content }}+"
    "{% endfor %}{{ 5 if enable_thinking is undefined else 6 if enable_thinking else 4 }}="
)
USER, BEGUN = {"role": "user", "content": "33"}, {"role": "assistant", "content": "88"}


@pytest.mark.parametrize(
    ("asked", "as_trained", "untold"),
    [
        ({}, "099+133+4=77", "133+5="),
        ({"messages": [{"role": "system", "content": ""}, USER]}, "0+133+4=77", "0+133+5="),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "099+133+6=77", "133+6="),
        ({"messages": [USER, BEGUN], "continue_final_message": True}, "099+133+4=88", "133+5=88"),
        ({"messages": [USER, BEGUN]}, "099+133+288+4=77", "133+288+5="),
    ],
)
def test_a_chat_is_put_as_the_policy_was_trained_unless_it_asks_otherwise(served, asked, as_trained, untold):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TURNS
    trained = dataclasses.replace(CONTRACT, system_prompt="99", thinking="off", answer_start="77")
    for contract, expected in ((trained, as_trained), (CONTRACT, untold)):
        service = Service("tests", served.engine, None, None, contract, tokenizer, None)
        prompt = asyncio.run(service.prompt_of(ChatRequest.model_validate({"messages": [USER]} | asked)))
        assert tokenizer.decode(prompt) == expected


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"chat_template_kwargs": {"enable_thinking": True}}, "the chat template of tests knows no enable_thinking"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "Extra inputs are not permitted (given: '{{ 1 }}')"),
        ({"continue_final_message": True}, "the last message is of the user; it must be of the assistant"),
        ({"add_generation_prompt": False}, "add_generation_prompt and continue_final_message are both false"),
    ],
)
def test_what_a_chat_cannot_ask_for(served, asked, told):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}="
    with http_server(dataclasses.replace(served, tokenizer=tokenizer)) as address:
        code, answer = ask(address, "/v1/chat/completions", {"messages": [USER], **asked})
    assert code == 400 and told in answer["error"]["message"]


def test_who_knows_no_token_is_refused(served):
    with http_server(served, token="secret") as address:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            assert ask(address, "/v1/models", headers=headers)[0] == 401
        assert ask(address, "/v1/models", headers={"authorization": "Bearer secret"})[0] == 200
        assert ask(address, "/health") == (200, {"status": "serving"})


def test_bodies_have_a_limit_whether_they_say_their_length_or_not(address, monkeypatch):
    # what a client goes on to send is taken in for a second, not for five
    monkeypatch.setattr(guard, "PATIENCE", 1.0)
    large = b'{"prompt": "' + b"1" * LARGEST_BODY + b'"}'
    assert ask(address, body=large)[0] == 413
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        try:
            for _ in range(LARGEST_BODY // 0x80000 + 1):
                connection.sendall(b"80000\r\n" + b"1" * 0x80000 + b"\r\n")
        except OSError:
            pass  # it hangs up
        connection.settimeout(30)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_must_come_in_time(address, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with sent(address, b'{"prompt": ', length=100) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_an_answer_must_come_in_time_streamed_or_not(served, monkeypatch):
    turn = Continuous.turn

    def slow(*given, **asked):
        time.sleep(0.2)
        return turn(*given, **asked)

    monkeypatch.setattr(Continuous, "turn", slow)
    with http_server(served, request_seconds=0.3) as address:
        asked = {"prompt": PROMPTS[0], "seed": 3, "stop_token_ids": [0], "max_tokens": T}
        code, answer = ask(address, body=asked)
        assert (code, answer["error"]["code"]) == (504, "timeout")
        with sent(address, json.dumps(asked | {"stream": True}).encode()) as connection:
            told = b"".join(iter(lambda: connection.recv(1000), b"")).decode()
        assert "took longer than 0.3 s, and was given up" in told and "[DONE]" not in told
        poll(lambda: metric(address, "dcjax_running"), lambda found: found == 0)


def test_a_server_that_stops_finishes_what_it_has_begun_to_read(served, monkeypatch):
    reading, prompts_of = threading.Event(), Service.prompts_of

    async def slow(*given):
        reading.set()
        await asyncio.sleep(1.5 * life.LINGER)
        return await prompts_of(*given)

    monkeypatch.setattr(Service, "prompts_of", slow)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with http_server(served) as address:
            asked = pool.submit(
                ask, address, body={"prompt": "1+1=", "seed": 3, "max_tokens": 2, "stop_token_ids": [0]}
            )
            assert reading.wait(30)
        code, answer = asked.result()
    assert (code, answer["usage"]["completion_tokens"]) == (200, 2)


def test_a_server_that_stops_waits_for_who_does_not_read_no_longer_than_it_may(served, monkeypatch):
    # more than a connection holds back
    monkeypatch.setattr(CompletionWriter, "part_choice", lambda *given, **more: {"index": 0, "text": "x" * 10**7})
    # its line comes when the connection is given up, in a test to come
    with http_server(served, grace=0.3, log="none") as address:
        held = sent(address, json.dumps({"prompt": PROMPTS[0], "stream": True, "stop_token_ids": [0]}).encode())
        assert held.recv(20).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
    assert time.monotonic() - began < 10
    held.close()


def sent(address, body, length=None):
    """A connection on which a request has been written by hand, or some of one."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
    connection.sendall(head + str(length or len(body)).encode() + b"\r\n\r\n" + body)
    return connection


def metric(address, name):
    """A metric's value."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        (line,) = [line for line in answer.read().decode().splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def test_a_line_is_logged_for_each_request_without_its_prompt_unless_told_otherwise(served, capfd):
    for log in ("requests", "prompts", "none"):
        with http_server(served, log=log) as address:
            assert ask(address, body={"prompt": "1+1=", "seed": 3, "max_tokens": 2, "stop_token_ids": [0]})[0] == 200
            ask(address, "/" + "x" * 300)
        lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        assert len(lines) == (0 if log == "none" else 2)
        if lines:
            one, wrong = lines
            assert (one["status"], one["outcome"], one["prompt_tokens"], one["tokens"]) == (200, "length", 4, 2)
            assert one["seconds"] >= one["first_token_seconds"] > 0
            assert one.get("prompt") == ("1+1=" if log == "prompts" else None)
            assert (wrong["status"], len(wrong["path"])) == (404, 200)


def test_the_training_policy_tells_its_own_log_probs_where_it_is_kept(served, address):
    given = []

    def trainer(tokens):
        given.append(tokens)
        return 9, [-0.5] * (len(tokens) - 1)

    code, answer = ask(address, "/v1/train_logprobs", {"token_ids": [1, 2]})
    assert code == 404 and "--train-logprobs" in answer["error"]["message"]
    most = tiny.PROMPT_LENGTH + T
    with http_server(dataclasses.replace(served, trainer=trainer)) as address:
        assert ask(address, "/v1/contract")[1]["train_logprobs"]
        told = ask(address, "/v1/train_logprobs", {"token_ids": [1, 2, 3]})
        assert told == (200, {"logprobs": [None, -0.5, -0.5], "weights_version": 9})
        for tokens, wrong in (([1] * (most + 1), f"at most {most}"), ([1, 10**6], "token 1000000 is none of the")):
            code, answer = ask(address, "/v1/train_logprobs", {"token_ids": tokens})
            assert code == 400 and wrong in answer["error"]["message"]
    assert given == [[1, 2, 3]]


def test_the_page_loads_nothing_from_elsewhere(address):
    with urllib.request.urlopen(f"{address}/", timeout=30) as answer:
        page, policy = answer.read().decode(), answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert not re.search(r"https?://|\bsrc=|\bhref=|innerHTML|@import|url\(", page)


@pytest.fixture
def gate(monkeypatch):
    """No sample begins unless it is open."""
    opened, begin = threading.Event(), Continuous.begin

    def gated(self, *given):
        assert opened.wait(30)
        return begin(self, *given)

    monkeypatch.setattr(Continuous, "begin", gated)
    yield opened
    opened.set()


def test_more_than_can_wait_are_refused_and_those_who_leave_make_room(served, gate):
    with http_server(served, waiting=2) as address:

        def leave_behind(n):
            return sent(address, json.dumps({"prompt": PROMPTS[0], "n": n}).encode())

        held = leave_behind(SLOTS)
        waiting = leave_behind(2)
        code = poll(lambda: ask(address, body={"prompt": PROMPTS[0]}), lambda found: found[0] == 429)
        assert "samples run or wait already" in code[1]["error"]["message"]
        waiting.close()
        gate.set()
        assert poll(lambda: ask(address, body={"prompt": PROMPTS[0]}), lambda found: found[0] == 200)
        held.close()


def test_who_leaves_in_the_midst_of_a_stream_frees_the_slot_behind_the_turn(served, monkeypatch):
    turns, turn = threading.Semaphore(1), Continuous.turn

    def counted(*given, **asked):
        assert turns.acquire(timeout=30)
        return turn(*given, **asked)

    monkeypatch.setattr(Continuous, "turn", counted)
    with http_server(served) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:

        def running():
            return metric(address, "dcjax_running")

        # no end token, so that it would go on for five turns
        stream = complete(client, PROMPTS[0], seed=3, stream=True, stop_token_ids=[0], max_tokens=T)
        assert next(iter(stream)).choices[0].finish_reason is None
        assert running() == 1
        stream.close()
        turns.release(2)
        poll(running, lambda found: found == 0)


def poll(get, wanted, seconds=20.0):
    """The first answer that is wanted."""
    until = time.monotonic() + seconds
    while not wanted(found := get()):
        assert time.monotonic() < until, found
        time.sleep(0.05)
    return found


def test_a_contract_models_metrics_and_a_description(served, address, client):
    _, contract = ask(address, "/v1/contract")
    assert (contract["format"], contract["temperature"], contract["weights_version"]) == ("float32", 0.8, 7)
    assert contract["end_tokens"] == [END]
    assert [model.id for model in client.models.list()] == ["tests"]
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        assert "dcjax_tokens_total" in answer.read().decode()
    _, described = ask(address, "/openapi.json")
    assert set(described["paths"]["/v1/completions"]["post"]["responses"]) == {
        *map(str, (200, 400, 401, 404, 408, 413, 429, 503, 504))
    }
    assert ask(address, "/nowhere")[0] == 404
    assert ask(address, "/v1/completions", method="GET")[0] == 405


@pytest.mark.slow
def test_whatever_its_description_allows_or_not_is_answered(address, tmp_path):
    checks = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "unsupported_method")
    asked = ("--max-examples", "200", "--checks", ",".join(checks))
    command = ["-m", "schemathesis.cli", "run", f"{address}/openapi.json", *asked]
    fuzzed = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
    assert fuzzed.returncode == 0, fuzzed.stdout[-4000:]
    assert "Tested: 8" in fuzzed.stdout
    assert ask(address, "/health")[0] == 200
