"""From files in the schemas of DAPO-Math-17K and the benchmarks to a trained policy and a table."""

import datetime
import json
import shutil
import socket
import subprocess
import sys
from collections import Counter

import pretend
import pytest
import tiny
from launching import fake_devices
from records import untimed

import dcjax.loop.draw
from dcjax.cli import main
from dcjax.data.datasets import SAMPLES
from dcjax.data.store import load_examples
from dcjax.data.stream import draw
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.loop.run_directory import load_config
from dcjax.models import ModelConfig, save_hf
from dcjax.recipe.build import open_problems
from dcjax.reporting.record import read_metrics, read_transcripts
from dcjax.tools.open_model import open_model

pytestmark = pytest.mark.heavy

STEPS, PROMPTS, G, HELDOUT = 4, 10, 2, 6
EXAMPLES = 29
"""Of the training sample, without duplicates: the third step goes from one epoch into the next."""

RECIPE = f"""
from pathlib import Path

from dcjax.recipe.config import *
from dcjax.data.mathematics import MathTask
from dcjax.models import ModelConfig

def config():
    return Config(
        name="samples",
        steps={STEPS},
        task=MathTask(data_dir=Path({str(SAMPLES)!r}), max_prompt_tokens=512),
        # a random model reads 512 bytes of prompt, and gives 8
        model=ModelConfig(vocab_size=258, hidden_size=16, intermediate_size=16, num_layers=1),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(prompts={PROMPTS}, group_size={G}, max_prompt_length=512, max_response_length=8),
        reward=RewardConfig(workers=1, overlong_buffer=4),
        optimizer=OptimizerConfig(tokens_per_microbatch=1000),
        evaluation=EvaluationConfig(every=2, prompts={HELDOUT}),
        checkpoint=CheckpointConfig(every=1, keep=9),
        serving=ServingConfig(format="float32", slots=20),
    )
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "samples.py"
    path.write_text(RECIPE)
    return path


class Asked:
    """The problems of each rollout."""

    def __init__(self, judging):
        self.rollouts, self._judging = [], judging

    def __call__(self, scorer, tokenizer, problems, **settings):
        self.rollouts.append(problems)
        return self._judging(scorer, tokenizer, problems, **settings)


@pytest.fixture(scope="module")
def asked():
    with pytest.MonkeyPatch.context() as patch:
        asked = Asked(dcjax.loop.draw.RewardCollector)
        patch.setattr(dcjax.loop.draw, "RewardCollector", asked)
        yield asked


@pytest.fixture
def pretending(monkeypatch):
    """Everything but arithmetic: see tests/helpers/pretend.py."""
    pretend.install(monkeypatch)


@pytest.fixture(scope="module")
def finished(recipe, asked, tmp_path_factory):
    """A run that nothing disturbed, without arithmetic, and its problems step by step."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        pretend.install(patch)
        assert main(["train", str(recipe), "--run-dir", str(directory)]) == 0
    return directory, asked.rollouts.copy()


def interrupted_at(step, finished, directory):
    """A copy of the run as it was after a step's checkpoint."""
    shutil.copytree(finished, directory)
    for path in (directory / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return directory


def measured(directory):
    return untimed(read_metrics(directory / "metrics.jsonl"))


def test_a_run_on_the_samples_logs_rewards_and_what_the_pool_stopped(finished):
    directory, _ = finished
    records = measured(directory)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    for record in records[1:]:
        assert [record[f"reward/{name}"] for name in ("timeouts", "memory_kills", "restarts")] == [0, 0, 0]
    # nothing is solved, and for what is longer than 4 of 8 tokens there is punishment
    assert all(-0.75 < record["reward"] < 0 for record in records[1:])
    assert all(record["eval/deployed_accuracy"] == 0 for record in records[::2])
    assert all(sample["reward"] <= 0 for sample in read_transcripts(directory / "samples.jsonl"))


def test_each_example_is_asked_once_an_epoch(finished):
    _, rollouts = finished
    stream = [problem for problems in rollouts for problem in problems]
    assert len(stream) == STEPS * PROMPTS
    assert len(set(stream[:EXAMPLES])) == EXAMPLES
    assert len(set(stream[EXAMPLES:])) == STEPS * PROMPTS - EXAMPLES


def test_a_run_that_resumes_within_an_epoch_asks_the_rest_of_it(pretending, recipe, asked, finished, capfd, tmp_path):
    directory, rollouts = finished
    resumed = interrupted_at(2, directory, tmp_path / "run")
    asked.rollouts.clear()
    capfd.readouterr()
    assert main(["train", str(recipe), "--run-dir", str(resumed), "--reward.workers", "2"]) == 0
    told = "dcjax: dapo-math-17k: examples 29, max_prompt_tokens 29, subset 29 (paper B's filter left about 13056)"
    assert capfd.readouterr().err.splitlines().count(told) == 1
    assert asked.rollouts == rollouts[2:]
    assert measured(resumed) == measured(directory)


def test_other_files_in_the_same_place_are_noticed(recipe, finished, capfd, tmp_path):
    directory, _ = finished
    for name in ("dapo-math-17k", "aime24"):
        lines = (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[: 20 if name == "dapo-math-17k" else None]))
    capfd.readouterr()
    command = ["train", str(recipe), "--run-dir", str(directory), "--task.data_dir", str(tmp_path)]
    assert main(command) == 2
    told = capfd.readouterr().err.splitlines()[-1]
    assert f"{directory} holds a run on other data: train dapo-math-17k: 2" in told and "there 29 problems" in told
    assert "aime24" not in told


def test_accuracies_of_a_run_are_judged_by_its_own_reward(pretending, finished, capfd):
    directory, _ = finished
    capfd.readouterr()
    assert main(["evaluate", str(directory), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [(row["policy"], row["correct"], row["total"]) for row in result["policies"]] == [
        ("deployed", 0, HELDOUT),
        ("training", 0, HELDOUT),
    ]


def test_the_six_benchmarks_of_a_run_are_a_table(pretending, finished, capfd, tmp_path):
    directory, _ = finished
    command = ["evaluate", str(directory), "--suite", "paper", "--data-dir", str(SAMPLES), "--out", str(tmp_path)]
    command += ["--samples", "2", "--problems", "2", "--max-response-length", "8"]
    assert main(command) == 0
    output, errors = capfd.readouterr()
    assert errors.splitlines()[-1].startswith("problem 24/24  policy training  benchmark Olympiad")
    for title in ("AIME24 @2", "AIME25 @2", "AMC23 @2", "MATH-500 @2", "Minerva @2", "Olympiad @2"):
        assert title in output
    assert "deployed (float32)" in output and "Qwen3-8B, bf16: DC-GRPO" in output


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.now(tz) + datetime.timedelta(days=1)


@pytest.fixture
def folder(tmp_path):
    """A model's folder whose chat template tells the date."""
    path, tokenizer = tmp_path / "folder", byte_tokenizer()
    model = ModelConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_layers=1, max_position_embeddings=2048
    )
    save_hf(path, model, tiny.masters(model), token_ids={"bos_token_id": 7})
    (path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [16, 1]}')
    tokenizer.chat_template = "{{ strftime_now('%d.%m.%Y') }} {{ messages[0].content }}"
    tokenizer.save_pretrained(path)
    return path


def test_a_run_whose_template_tells_the_date_goes_on_tomorrow(pretending, recipe, folder, monkeypatch, tmp_path):
    directory = tmp_path / "run"
    command = ["train", str(recipe), "--pretrained", str(folder), "--run-dir", str(directory), "--steps", "1"]
    command += ["--reward.function", "dcjax.rewards.boxed:integer_reward", "--reward.workers", "0"]
    assert main(command) == 0
    started = datetime.datetime.fromisoformat(json.loads((directory / "config.json").read_text())["started"])
    monkeypatch.setattr("dcjax.loop.run_directory.datetime", Tomorrow)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert main(command) == 0
    model = open_model(directory)
    for problem in open_problems(model.config, model.tokenizer).problems("heldout", 0, 0, 3):
        assert problem.prompt.startswith(f"{started:%d.%m.%Y} ")
    # what is exported is still a template, beside what else the folder said
    out = tmp_path / "out"
    assert main(["convert", "export", str(directory), str(out)]) == 0
    assert (out / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()
    generation = {"temperature": 0.6, "eos_token_id": [1, 16], "pad_token_id": 0}
    assert json.loads((out / "generation_config.json").read_text()) == generation
    assert json.loads((out / "config.json").read_text())["bos_token_id"] == 7


@pytest.mark.slow
def test_with_arithmetic_a_random_model_is_punished_for_its_length_and_benchmarked(recipe, capfd, tmp_path):
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run")]) == 0
    records = measured(tmp_path / "run")
    # it solves nothing, and writes up to the limit: all of the overlong punishment
    assert min(record["reward"] for record in records[1:]) == pytest.approx(-1, abs=0.1)
    assert all(record["eval/deployed_accuracy"] == 0 for record in records[::2])
    command = ["evaluate", str(tmp_path / "run"), "--suite", "paper", "--data-dir", str(SAMPLES)]
    assert main([*command, "--samples", "2", "--problems", "2", "--max-response-length", "8"]) == 0
    assert "deployed (float32)" in capfd.readouterr().out


# --- two hosts ---

RECORDING = """
import dataclasses
import os
import signal

from dcjax.recipe.reward import RewardConfig

@dataclasses.dataclass(frozen=True)
class Recorded(RewardConfig):
    def verifier(self, task):
        from dcjax.loop.updater import Updater

        update = Updater.__call__
        if "STOPPED" in os.environ and update.__name__ != "stopped":

            def stopped(self, *arguments):
                # not while samples are drawn, whose iteration would be given up and judged again
                os.kill(os.getpid(), signal.SIGTERM)
                return update(self, *arguments)

            Updater.__call__ = stopped
        return judge

without_record = config

def config():
    return dataclasses.replace(without_record(), reward=Recorded())

def judge(text, gold, *, finished):
    with open(os.environ["JUDGED"], "a") as file:
        file.write(gold + "\\n")
    return float(len(text) % 2)
"""


@pytest.mark.slow
def test_from_one_host_to_two_each_example_is_judged_once(recipe, tmp_path):
    """G responses of each problem of the stream, and one of each held-out problem by each policy and evaluation."""
    recording = tmp_path / "recording.py"
    recording.write_text(recipe.read_text() + RECORDING)
    command = [sys.executable, "-m", "dcjax", "train", str(recording), "--run-dir", str(tmp_path / "run")]
    command += ["--mesh.fsdp", "2"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"

    def run(devices, *options, file, **environment):
        env = fake_devices(devices) | {"JUDGED": str(tmp_path / file)} | environment
        return subprocess.Popen([*command, *options], cwd=tmp_path, env=env)

    assert run(2, file="alone", STOPPED="1").wait(timeout=300) == 75
    assert 0 < max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) < STEPS
    found = ["--distributed.coordinator", coordinator, "--distributed.num_processes", "2", "--distributed.process_id"]
    two = [run(1, *found, str(number), file=f"host-{number}") for number in range(2)]
    assert [host.wait(timeout=300) for host in two] == [0, 0]

    config = load_config(tmp_path / "run")
    train, heldout = (load_examples(name, SAMPLES) for name in (config.task.dataset, config.task.heldout))
    stream = draw(len(train), seed=config.seed, start=0, count=STEPS * PROMPTS)
    evaluations = [step for step in range(STEPS + 1) if step % 2 == 0]
    expected = Counter([train[number].answer for number in stream] * G)
    expected += Counter([example.answer for example in heldout] * 2 * len(evaluations))
    judged = [Counter((tmp_path / name).read_text().split("\n")[:-1]) for name in ("alone", "host-0", "host-1")]
    assert sum(judged, Counter()) == expected
    assert judged[1].total() == judged[2].total() > 0
