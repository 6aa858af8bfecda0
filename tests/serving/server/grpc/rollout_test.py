"""Rollouts through a server on a real port, beside those of the loop in this process."""

import concurrent.futures
import contextlib
import dataclasses

import grpc
import jax
import numpy as np
import pytest
import tiny
from launching import free_port
from listening import listening
from served import END, PROMPTS, TEMPERATURE, G, engine_of, params_of

from dcjax.data.arithmetic import build_tokenizer
from dcjax.errors import Interrupted, RunError
from dcjax.recipe.engine import contract_of
from dcjax.serving.rollout import Sampling
from dcjax.serving.server.grpc.client import Client, Request
from dcjax.serving.server.grpc.rollout import ServedSampling
from dcjax.serving.server.grpc.wire import Asked
from dcjax.serving.server.served import Served

pytestmark = pytest.mark.heavy

SETTINGS = {"samples_per_prompt": G, "temperature": TEMPERATURE}


@pytest.fixture(scope="module", params=[pytest.param("float32", marks=pytest.mark.slow), "int8"])
def served(request):
    engine = engine_of(request.param, max_candidates=0)
    params = params_of(engine)
    contract = contract_of(tiny.CONFIG.serving, tiny.CONFIG.rollout, tiny.CONFIG.task, [END], run="a run", step=7)
    return Served("tests", engine, 7, params, build_tokenizer(), contract, newer=None, prompts=2)


def client_of(port, patience=20.0):
    return Client(f"127.0.0.1:{port}", patience=patience, advice="start it")


def sampled(client, served, version=0):
    sampling = ServedSampling(client, served.engine, PROMPTS, **SETTINGS, key=key())
    parts = list(sampling.as_they_end(version))
    return parts, sampling.rollout()


def key():
    return jax.random.key(1, impl="threefry2x32")


def test_the_rollout_is_that_of_the_loop_in_the_process(served):
    sampling = Sampling(served.engine, served.params, PROMPTS, **SETTINGS, key=key())
    list(sampling.as_they_end(served.params))
    expected = sampling.rollout()
    with listening(served) as port, client_of(port) as client:
        parts, rollout = sampled(client, served, version=7)
    for field in dataclasses.fields(rollout):
        ours, theirs = getattr(rollout, field.name), getattr(expected, field.name)
        if field.name == "rollout_logps":
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        elif field.name in ("candidate_tokens", "experts"):
            assert ours is None and theirs is None
        else:
            np.testing.assert_array_equal(ours, theirs)
    # each sample was handed over once
    numbers = np.concatenate([part.samples for part in parts])
    assert sorted(numbers.tolist()) == list(range(len(PROMPTS) * G))
    for part in parts:
        np.testing.assert_array_equal(part.finished, expected.finished[part.samples])
        for row, response in zip(part.samples, part.responses, strict=True):
            mask = expected.response_mask[row]
            np.testing.assert_array_equal(response, expected.tokens[row, -len(mask) :][mask])


def test_a_server_that_goes_and_comes_back_is_waited_for(served, capfd):
    port = free_port()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(client_of(port))
        waiting = concurrent.futures.ThreadPoolExecutor(1).submit(sampled, client, served)
        with pytest.raises(concurrent.futures.TimeoutError):
            waiting.result(timeout=1)
        with listening(served, port=port):
            _, rollout = waiting.result(timeout=60)
            again = sampled(client, served)[1]
    np.testing.assert_array_equal(rollout.tokens, again.tokens)
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2
    assert f"no samples from the server at 127.0.0.1:{port} (UNAVAILABLE" in told[0] and "start it" in told[0]
    assert told[1] == f"dcjax: the server at 127.0.0.1:{port} answers again"


def test_patience_ends_in_a_status_to_start_again_by(served):
    with client_of(free_port(), patience=0.3) as client, pytest.raises(Interrupted) as ended:
        sampled(client, served)
    assert ended.value.status == 75 and "for 0.3 s (UNAVAILABLE" in str(ended.value)


def test_a_refusal_is_no_reason_to_wait(served):
    wrong = [Request([1] * 99, 5, Asked(seed=1, log_probs=True))]
    with listening(served) as port, client_of(port) as client, pytest.raises(RunError) as refused:
        list(client.sample(wrong))
    assert "refuses a request: INVALID_ARGUMENT: length of a prompt is 99" in str(refused.value)


def test_a_full_server_is_asked_again_until_all_is_answered(served):
    with listening(served, waiting=0) as port, client_of(port) as client:
        rollout = sampled(client, served)[1]
    assert (rollout.response_mask.sum(axis=1) > 0).all()


def test_the_contract_is_read_and_another_service_is_refused(served):
    with listening(served) as port, client_of(port) as client:
        assert client.contract() == served.contract
    strange = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    port = strange.add_insecure_port("127.0.0.1:0")
    strange.start()
    with client_of(port) as client, pytest.raises(RunError, match="UNIMPLEMENTED"):
        client.contract()
    strange.stop(0)


def test_a_reader_that_stops_reading_takes_its_requests_back(served):
    with listening(served, waiting=2) as port, client_of(port) as client:
        many = [Request([5], served.engine.max_response_length, Asked(seed=1, log_probs=True))] * 40
        answers = client.sample(many)
        next(answers)
        answers.close()
        # their slots and places are free
        assert len(sampled(client, served)[1].tokens) == len(PROMPTS) * G
