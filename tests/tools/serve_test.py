import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import openai
import pytest
import tiny
from launching import fake_devices
from listening import ask, connected, listening, message

from dcjax.cli import main
from dcjax.data.mathematics import MathTask
from dcjax.errors import RunError
from dcjax.loop.run_directory import identity
from dcjax.models import token_logps
from dcjax.recipe.engine import contract_of
from dcjax.serving.server.contract import CONTRACT_FILE, Contract, read_contract
from dcjax.serving.server.served import ServerConfig
from dcjax.tools.convert import export_run, import_model
from dcjax.tools.open_model import open_model
from dcjax.tools.serve import load_served, serve

pytestmark = pytest.mark.heavy

STEPS, EVERY = tiny.CONFIG.steps, tiny.CONFIG.checkpoint.every


def load(source, *, other_format=False, max_prompt_length=None, max_response_length=None, **serving):
    lengths = {"max_prompt_length": max_prompt_length, "max_response_length": max_response_length}
    return load_served(source, serving=serving, lengths=lengths, other_format=other_format)


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "folder"
    export_run(finished_run, folder)
    return folder


def test_a_run_is_served_as_it_was_trained_to_be(finished_run):
    served, rollout = load(finished_run), tiny.CONFIG.rollout
    assert served.contract == Contract(
        format="int8",
        kv_cache="auto",
        keep=(),
        temperature=rollout.temperature,
        top_k=0,
        top_p=1.0,
        max_prompt_length=rollout.max_prompt_length,
        max_response_length=rollout.max_response_length,
        end_tokens=tuple(open_model(finished_run).end_tokens),
        run=identity(finished_run),
        step=STEPS,
    )
    assert (served.engine.format.name, served.engine.slots, served.version) == ("int8", tiny.SLOTS, STEPS)


def test_an_export_carries_the_contract_and_is_served_like_the_run(finished_run, exported, tmp_path):
    trained = load(finished_run)
    assert read_contract(exported) == trained.contract
    asked = replace(trained.contract, system_prompt="Add.", thinking="off", answer_start="It is ")
    folder = shutil.copytree(exported, tmp_path / "asked")
    (folder / CONTRACT_FILE).write_text(asked.to_json())
    served = load(folder)
    assert served.contract == asked and served.newer is None
    for source in (trained, served):
        with listening(source) as port, connected(port) as stub:
            answers = [ask(stub, message("1+2="), seed=seed)[0] for seed in range(10)]
        if source is trained:
            expected = answers
    assert answers == expected
    import_model(exported, tmp_path / "again")
    assert read_contract(tmp_path / "again") == trained.contract


def test_another_folder_is_served_as_asked(folder):
    served = load(folder, format="bf16", slots=2, max_prompt_length=6, max_response_length=10)
    assert (served.contract.format, served.contract.max_response_length) == ("bf16", 10)
    assert served.contract.end_tokens == (1, 4)


@pytest.mark.parametrize("source", ["finished_run", "exported"])
@pytest.mark.parametrize(
    ("option", "value"), [("format", "bf16"), pytest.param("kv_cache", "bf16", marks=pytest.mark.slow)]
)
def test_other_numerics_than_those_trained_for_are_refused_unless_told(source, option, value, request):
    source = request.getfixturevalue(source)
    with pytest.raises(RunError, match="--other-format") as refused:
        load(source, **{option: value})
    assert f"--{option.replace('_', '-')} is {value!r}" in str(refused.value)
    served = load(source, **{option: value}, other_format=True)
    assert getattr(served.contract, option) == value


def test_a_contract_that_is_damaged_is_one_line(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "folder")
    text = (folder / CONTRACT_FILE).read_text()
    for held, told in (
        ({"format": "int8"}, "holds no contract"),
        (json.loads(text) | {"thinking": "maybe"}, "thinking is 'maybe'; it must be one of auto, on, off"),
    ):
        (folder / CONTRACT_FILE).write_text(json.dumps(held))
        with pytest.raises(RunError, match=told):
            load(folder)


def test_a_contract_says_what_chats_were_asked_with_and_older_ones_say_nothing():
    asked = {"system_prompt": "Add.", "thinking": "on", "answer_start": "It is "}
    serving, rollout = tiny.CONFIG.serving, tiny.CONFIG.rollout
    untold, told = (
        contract_of(serving, rollout, task, [1], run=None, step=None) for task in (tiny.CONFIG.task, MathTask(**asked))
    )
    assert told == replace(untold, **asked) and Contract.from_json(told.to_json(), "it") == told
    older = {name: value for name, value in json.loads(told.to_json()).items() if name not in asked}
    assert Contract.from_json(json.dumps(older), "it") == untold


def test_newer_checkpoints_of_a_run_are_served_and_one_checkpoint_is_for_good(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / finished_run.name)
    aside = tmp_path / "aside"
    (run / "checkpoints" / str(STEPS)).rename(aside)
    assert load(finished_run / "checkpoints" / str(STEPS - EVERY)).newer is None
    served = load(run)
    assert (served.version, served.newer(STEPS - EVERY)) == (STEPS - EVERY, None)
    aside.rename(run / "checkpoints" / str(STEPS))
    version, params = served.newer(STEPS - EVERY)
    expected = served.engine.sync(open_model(run).params(), STEPS)
    assert version == STEPS == int(params.version)
    assert jax.tree.all(jax.tree.map(np.array_equal, params.weights, expected.weights))


@pytest.mark.parametrize(
    ("name", "value"), [("port", -1), ("port", 65536), ("metrics_port", 65536), ("waiting", -1), ("grace", -1.0)]
)
def test_a_setting_out_of_range_is_refused_with_its_value(name, value):
    with pytest.raises(RunError, match=f"--{name.replace('_', '-')} is {value}"):
        ServerConfig(**{name: value})


def test_refusals_of_the_command_are_one_line(tmp_path, capfd):
    assert main(["serve", str(tmp_path)]) == 2
    assert "no run in" in capfd.readouterr().err
    assert main(["serve", str(tmp_path), "--protocol", "carrier-pigeon"]) == 2
    assert "carrier-pigeon" in capfd.readouterr().err
    (empty := tmp_path / "token").write_text("\n")
    for arguments, told in (
        (["--token-file", str(empty)], "--token-file is of HTTP; give --protocol http"),
        (["--train-logprobs"], "--train-logprobs is of HTTP; give --protocol http"),
        (["--protocol", "http", "--token-file", str(empty)], "is empty; it must hold the token"),
        (["--protocol", "http", "--metrics-port", "1"], "metrics are at /metrics of --port"),
    ):
        assert main(["serve", str(tmp_path), *arguments]) == 2
        assert told in capfd.readouterr().err


def test_the_training_policy_is_kept_beside_the_served_one_and_replaced_with_it(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    older = STEPS - EVERY
    served = load_served(run, serving={}, lengths={}, protocol="http", train_logprobs=True)
    tokens = np.random.default_rng(0).integers(4, tiny.CONFIG.model.vocab_size, size=13)

    def expected(step):
        model = open_model(run)
        told = {"response_length": len(tokens) - 1, "temperature": np.ones(1, np.float32)}
        forward = jax.jit(lambda params: token_logps(model.config.model, params, tokens[None], **told).logps[0])
        return np.asarray(forward(model.params(step)))

    version, logps = served.trainer(tokens.tolist())
    assert version == older
    np.testing.assert_allclose(logps, expected(older), atol=1e-6)
    shutil.copytree(finished_run / "checkpoints" / str(STEPS), run / "checkpoints" / str(STEPS))
    assert served.newer(older)[0] == STEPS
    version, logps = served.trainer(tokens.tolist())
    assert version == STEPS
    np.testing.assert_allclose(logps, expected(STEPS), atol=1e-6)
    assert not np.allclose(expected(older), expected(STEPS), atol=1e-4)


def test_what_http_needs_is_named_where_it_is_not_installed(finished_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "dcjax.serving.server.http.server", raising=False)
    with pytest.raises(RunError, match=r"uvicorn is needed to serve over HTTP: pip install 'dcjax\[serve\]'"):
        serve(load(finished_run), ServerConfig(port=0), "http", told=print)


def test_http_is_served_until_the_process_is_told_to_stop_and_what_runs_is_finished(finished_run):
    command = [sys.executable, "-m", "dcjax", "serve", str(finished_run), "--port", "0", "--protocol", "http"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=fake_devices(1)) as process:
        try:
            told = []
            while not told or "listening" not in told[-1]:
                told.append(process.stderr.readline())
                assert told[-1], told
            address = f"http://127.0.0.1:{int(told[-1].rpartition(':')[2])}/v1"
            with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
                asked = {"model": finished_run.name, "prompt": "1+2=", "seed": 1}
                whole = client.completions.create(**asked)
                stream = client.completions.create(stream=True, **asked)
                process.send_signal(signal.SIGTERM)
                assert "".join(part.choices[0].text for part in stream) == whole.choices[0].text
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(finished_run):
    command = [sys.executable, "-m", "dcjax", "serve", str(finished_run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=fake_devices(1)) as process:
        try:
            told = []
            while not told or "listening" not in told[-1]:
                told.append(process.stderr.readline())
                assert told[-1], told
            assert f"serving: {finished_run.name} step {STEPS} in int8, {tiny.SLOTS} slots, and newer" in "".join(told)
            with connected(int(told[-1].rpartition(":")[2])) as stub:
                assert len(ask(stub, message("1+2="), seed=1)[1]) > 0
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
