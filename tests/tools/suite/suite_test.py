import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
from datetime import datetime
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from launching import fake_devices

import dcjax.tools.open_model
import dcjax.tools.suite.answers
import dcjax.tools.suite.suite
from dcjax.cli import main
from dcjax.data.arithmetic import build_tokenizer
from dcjax.data.datasets import SAMPLES, Example
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints, Cursor
from dcjax.loop.run_directory import open_run
from dcjax.models import ModelConfig, init_params, save_hf
from dcjax.recipe.build import build_optimizer, initial_state, starting_params
from dcjax.recipe.config import Config
from dcjax.recipe.serving import ServingConfig
from dcjax.rewards.pool import Pending, RewardPool
from dcjax.sharding.mesh import make_mesh
from dcjax.tools.open_model import open_model
from dcjax.tools.suite.answers import to_problems
from dcjax.tools.suite.benchmarks import SUITES, Benchmark, SuiteConfig
from dcjax.tools.suite.log import read_samples
from dcjax.tools.suite.result import read_result
from dcjax.tools.suite.suite import _unlike_published, evaluate_suite
from dcjax.tools.suite.tables import to_markdown, write_result

pytestmark = pytest.mark.heavy

MODEL = ModelConfig(vocab_size=258, hidden_size=32, intermediate_size=64, num_layers=1, max_position_embeddings=160)
STOPS = [70, 71, 72, 80, 90]
# four of them are in a call of the engine, so that one program serves all
PROBLEMS = {"aime24": 8, "amc23": 4}
SAMPLES_EACH, LIMIT = 4, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model, six of whose tokens end a response."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_hf(path, MODEL, init_params(MODEL, jax.random.key(0)))
    byte_tokenizer().save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": STOPS}))
    return path


def examples_of(dataset, data_dir):
    questions = [f"{dataset}: what is {number} modulo 3?" for number in range(PROBLEMS[dataset])]
    return [
        Example(f"{dataset}-{number}", question, str(number % 3), dataset) for number, question in enumerate(questions)
    ]


@pytest.fixture(scope="module", autouse=True)
def small_suite():
    """Two benchmarks with problems whose answers are 0, 1 and 2, as are those that samples are read as."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "small", tuple(Benchmark(name, name.upper(), SAMPLES_EACH) for name in PROBLEMS))
        patch.setattr(dcjax.tools.suite.suite, "load_examples", examples_of)
        patch.setattr(dcjax.tools.suite.suite, "require_files", lambda names, data_dir, option: None)
        patch.setattr(dcjax.tools.suite.answers, "responses", read_as_boxes)
        patch.setattr(dcjax.tools.suite.answers, "SAMPLES_A_CALL", 4 * SAMPLES_EACH)
        patch.setattr(dcjax.tools.suite.suite, "RewardPool", PoolInProcess)
        yield


class PoolInProcess:
    """A RewardPool without its processes, which take seconds to start."""

    def __init__(self, reward, *, workers):
        self._reward = reward

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, texts, golds, finished, known=None):
        answers = zip(texts, golds, finished, strict=True)
        scores = [self._reward(text, gold, finished=ended) for text, gold, ended in answers]
        return Pending.of(scores)


def read_as_boxes(tokenizer, rollout):
    width = rollout.response_mask.shape[1]
    sums = np.where(rollout.response_mask, rollout.tokens[:, -width:], 0).sum(axis=1)
    return [rf"so \boxed{{{number % 3}}}" for number in sums]


class Calls:
    """How many prompts each call of the engine had; call number `fatal` does not come back."""

    def __init__(self, sample_responses):
        self.prompts, self.fatal, self._sample_responses = [], None, sample_responses

    def __call__(self, engine, params, prompts, **settings):
        if len(self.prompts) == self.fatal:
            raise KeyboardInterrupt
        self.prompts.append(len(prompts))
        return self._sample_responses(engine, params, prompts, **settings)


@pytest.fixture
def calls(monkeypatch):
    calls = Calls(dcjax.tools.suite.answers.sample_responses)
    monkeypatch.setattr(dcjax.tools.suite.answers, "sample_responses", calls)
    return calls


def small(**settings):
    return SuiteConfig(suite="small", **{"max_response_length": LIMIT} | settings)


def evaluated(source, out, *, slots=4, devices=1, **settings):
    """With float32 both policies run the same program."""
    serving = {"slots": slots, "devices": devices, "format": "float32"}
    result, directory = evaluate_suite(source, small(**settings), data_dir=SAMPLES, out=out, **serving)
    assert directory == out
    return result


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """What one uninterrupted evaluation found, and its directory; looked at, not changed."""
    out = tmp_path_factory.mktemp("whole")
    return evaluated(folder, out), out


def lines(directory):
    """What is logged, whatever the order and whichever process logged it."""
    return sorted(line for path in directory.glob("samples-*.jsonl") for line in path.read_text().splitlines())


def test_both_policies_are_asked_every_problem_of_every_benchmark(whole):
    result, directory = whole
    assert (result.name, result.step, result.suite) == ("tiny", None, "small")
    assert [(row.policy, row.format) for row in result.policies] == [
        ("deployed", "float32"),
        ("training", "float32"),
    ]
    for row in result.policies:
        assert [(score.benchmark, score.problems, score.samples) for score in row.benchmarks] == [
            ("aime24", 8, 4),
            ("amc23", 4, 4),
        ]
        assert list(row.benchmarks[0].by_problem) == [f"aime24-{number}" for number in range(8)]
    assert result.settings["template"] == "boxed" and result.settings["max_response_length"] == LIMIT
    logged = [json.loads(line) for line in lines(directory)]
    assert len(logged) == 2 * 12


def test_a_sample_is_right_if_it_ended_with_the_right_answer(whole):
    """Otherwise the tests below would compare zeros."""
    result, directory = whole
    logged = [json.loads(line) for line in lines(directory)]
    for record in logged:
        gold = str(int(record["problem"].split("-")[1]) % 3)
        assert record["rewards"] == [float(answer == gold) for answer in record["answers"]]
        assert [answer is None for answer in record["answers"]] == [not ended for ended in record["finished"]]
        cut = [length for length, ended in zip(record["lengths"], record["finished"], strict=True) if not ended]
        assert set(cut) <= {LIMIT}
    ended = [ended for record in logged for ended in record["finished"]]
    assert 0.1 < np.mean(ended) < 0.9
    assert sum(row.benchmarks[0].unfinished + row.benchmarks[1].unfinished for row in result.policies) == ended.count(
        False
    )
    assert 0 < result.policies[1].average.value < 1


def test_notes_tell_what_is_not_as_published(whole):
    result, _ = whole
    told = "not as published (problems × samples of each): AIME24 8 × 4, not 30 × 4; AMC23 4 × 4, not 40 × 4"
    assert result.notes == [told]


def test_only_what_is_not_as_published_is_named_in_one_line():
    # of Olympiad another publisher's copy, with a problem more
    whole = dict(zip(SUITES["paper"], (30, 30, 40, 500, 272, 675), strict=True))
    assert _unlike_published(SuiteConfig(), whole) == []
    told = "not as published (problems × samples of each): "
    aime = SUITES["paper"][0]
    assert _unlike_published(SuiteConfig(), whole | {aime: 1}) == [told + "AIME24 1 × 32, not 30 × 32"]
    assert _unlike_published(SuiteConfig(samples=4), whole) == [
        told + "AIME24 30 × 4, not 30 × 32; AIME25 30 × 4, not 30 × 32; AMC23 40 × 4, not 40 × 32"
    ]
    (line,) = _unlike_published(SuiteConfig(samples=1), dict.fromkeys(whole, 1))
    assert line.count(" 1 × 1, not ") == 6 and line.endswith("; Olympiad 1 × 1, not 674 × 4")


# the second time, four problems were being scored
@pytest.mark.parametrize(("fatal", "logged"), [(2, 8), (4, 12)])
def test_an_interrupted_evaluation_goes_on_without_sampling_anything_twice(
    whole, folder, calls, fatal, logged, tmp_path
):
    result, directory = whole
    calls.fatal = fatal
    with pytest.raises(KeyboardInterrupt):
        evaluated(folder, tmp_path)
    assert len(lines(tmp_path)) == logged
    calls.prompts.clear()
    calls.fatal = None
    assert evaluated(folder, tmp_path) == result
    assert sum(calls.prompts) == 24 - logged
    assert lines(tmp_path) == lines(directory)
    calls.fatal = 0
    calls.prompts.clear()
    assert evaluated(folder, tmp_path) == result


def test_samples_that_were_drawn_from_no_distribution_are_neither_scored_nor_logged(folder, monkeypatch, tmp_path):
    sample = dcjax.tools.suite.answers.sample_responses

    def overflowing(*arguments, **settings):
        rollout = sample(*arguments, **settings)
        return dataclasses.replace(rollout, rollout_logps=np.full_like(rollout.rollout_logps, np.nan))

    monkeypatch.setattr(dcjax.tools.suite.answers, "sample_responses", overflowing)
    with pytest.raises(RunError, match=r"log-prob at response 0, token 0 is nan: .* format 'float32'"):
        evaluated(folder, tmp_path)
    assert lines(tmp_path) == []


@pytest.mark.slow
def test_samples_depend_neither_on_the_slots_nor_on_the_devices(whole, folder, tmp_path):
    result, _ = whole
    assert evaluated(folder, tmp_path, slots=16, devices=2) == result


@pytest.fixture
def one_gold(monkeypatch):
    """Changes the gold of the first problem of AMC23."""

    def change(gold):
        def with_gold(dataset, data_dir):
            first, *rest = examples_of(dataset, data_dir)
            return [dataclasses.replace(first, answer=gold) if dataset == "amc23" else first, *rest]

        monkeypatch.setattr(dcjax.tools.suite.suite, "load_examples", with_gold)

    return change


def test_a_gold_that_cannot_be_read_is_reported_and_a_gold_that_was_mended_is_judged_by(
    whole, folder, calls, one_gold, capsys, tmp_path
):
    one_gold(r"A \cap B")
    result = evaluated(folder, tmp_path)
    errors = capsys.readouterr().err
    assert errors.startswith(
        "dcjax: amc23: gold 'A \\\\cap B' of amc23-0 cannot be read\ndcjax: 1 of 12 golds cannot be read:"
    )
    assert result.unreadable == {"amc23": {"amc23-0": r"A \cap B"}}
    assert all(row.benchmarks[1].by_problem["amc23-0"] == 0 for row in result.policies)
    files = write_result(result, tmp_path)
    assert read_result(tmp_path) == result
    told = (
        "- amc23: 1 of 4 golds cannot be read; only their own text is right, and any other answer counts as wrong: 'A"
    )
    assert told in files["table"].read_text()

    calls.prompts.clear()
    one_gold("0")
    assert evaluated(folder, tmp_path) == whole[0]
    # the batch of the problem, of both policies
    assert calls.prompts == [4, 4]


def test_samples_of_a_part_are_those_of_the_whole(whole, folder, tmp_path):
    _, directory = whole
    evaluated(folder, tmp_path, problems=4)
    assert set(lines(tmp_path)) < set(lines(directory)) and len(lines(tmp_path)) == 16


def test_other_settings_are_sampled_anew_beside_what_is_there(folder, calls, tmp_path):
    first = evaluated(folder, tmp_path, problems=4)
    calls.prompts.clear()
    other = evaluated(folder, tmp_path, problems=4, seed=1)
    assert sum(calls.prompts) == 16
    assert len(lines(tmp_path)) == 32
    assert len(read_samples(tmp_path)) == 8
    assert other.policies != first.policies


def test_what_other_hosts_logged_is_merged(whole, folder, calls, tmp_path):
    result, directory = whole
    logged = (directory / "samples-0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "samples-1.jsonl").write_text("".join(logged[:8]))
    (tmp_path / "samples-2.jsonl").write_text("".join(logged[16:]))
    assert evaluated(folder, tmp_path) == result
    assert calls.prompts == [4, 4]
    assert lines(tmp_path) == lines(directory)


@pytest.mark.slow
def test_responses_are_cut_where_the_model_has_no_more_positions(folder, tmp_path):
    result = evaluated(folder, tmp_path, problems=1, max_response_length=32_768)
    cut = result.settings["max_response_length"]
    assert cut < MODEL.max_position_embeddings
    told = f"responses are cut at {cut} tokens, not 32,768: the model has 160 positions, and the longest prompt takes "
    assert f"{told}{160 - cut}" in result.notes
    lengths = [length for line in lines(tmp_path) for length in json.loads(line)["lengths"]]
    assert max(lengths) <= cut


def test_a_folders_published_end_tokens_end_responses(folder):
    model = open_model(folder)
    assert model.end_tokens == [model.tokenizer.eos_token_id, *STOPS]


# --- runs ---


def make_run(directory, tokenizer, end_tokens=()):
    """A run of a random model with one checkpoint."""
    config = Config(model=MODEL, run_dir=directory, serving=ServingConfig(format="float32", slots=4))
    mesh = make_mesh(config.mesh)
    with open_run(config, end_tokens=end_tokens), Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
        state = initial_state(config, mesh, build_optimizer(config), starting_params(config, mesh))
        checkpoints.save(state, Cursor(step=3, data_cursor=0, rollout_key=[0, 0]))
    tokenizer.save_pretrained(directory / "tokenizer")
    return directory


def test_a_run_is_evaluated_in_its_own_format_and_its_results_lie_in_it(tmp_path):
    run = make_run(tmp_path / "run", byte_tokenizer())
    result, directory = evaluate_suite(run, small(problems=4), data_dir=SAMPLES)
    assert directory == run / "suite" / "3"
    assert (result.title, result.policies[0].format) == ("run at step 3", "float32")
    again, _ = evaluate_suite(run / "checkpoints" / "3", small(problems=4), data_dir=SAMPLES)
    assert again == result


def test_a_runs_ends_are_those_that_were_recorded_or_its_tokenizers(tmp_path):
    assert open_model(make_run(tmp_path / "run", byte_tokenizer(), [1, *STOPS])).end_tokens == [1, *STOPS]
    assert open_model(make_run(tmp_path / "older", byte_tokenizer())).end_tokens == [1]


def test_a_run_whose_tokenizer_cannot_spell_the_problems_is_refused(tmp_path):
    run = make_run(tmp_path / "run", build_tokenizer())
    with pytest.raises(RunError, match="the tokenizer of run cannot spell problem aime24-0 of aime24"):
        evaluate_suite(run, small(), data_dir=SAMPLES)


# --- how problems are put ---


def chatting(folder, tmp_path, template):
    """The same model with a chat template."""
    path = shutil.copytree(folder, tmp_path / "chatting")
    (path / "chat_template.jinja").write_text(template)
    return path


def test_thinking_and_a_start_of_the_answer_are_put_into_the_prompts(folder, tmp_path, monkeypatch):
    # as long as without it, so that nothing is compiled
    told = "{{ messages[0].content[4:] }}{% if enable_thinking is false %}!{% endif %}"
    path, prompts = chatting(folder, tmp_path, told), []
    monkeypatch.setattr(
        dcjax.tools.suite.suite,
        "to_problems",
        lambda model, *given: prompts.append(found := to_problems(model, *given)) or found,
    )
    result = evaluated(path, tmp_path / "out", thinking="off", answer_start="So ")
    texts = [byte_tokenizer().decode(problem.prompt) for part in prompts for problem in part]
    assert len(texts) == 12 and all(text.endswith("!So ") for text in texts)
    assert (result.settings["thinking"], result.settings["answer_start"]) == ("off", "So ")
    assert ", template boxed, thinking off, answers begin with 'So ', seed 0" in to_markdown(result)


def test_samples_of_another_chat_template_are_not_taken_and_those_of_another_day_are(
    folder, calls, tmp_path, monkeypatch
):
    # as long as without it, so that nothing is compiled
    path = chatting(folder, tmp_path, "{{ messages[0].content }}{{ strftime_now('%Y')[4:] }}")
    first = evaluated(path, tmp_path / "out", problems=4)
    calls.prompts.clear()
    monkeypatch.setattr(dcjax.tools.open_model, "datetime", SimpleNamespace(now=lambda: datetime(2124, 2, 3)))
    assert evaluated(path, tmp_path / "out", problems=4) == first and not calls.prompts
    (path / "chat_template.jinja").write_text("{{ messages[0].content | upper }}")
    other = evaluated(path, tmp_path / "out", problems=4)
    assert sum(calls.prompts) == 16
    templates = {each.settings["chat_template"] for each in (first, other)}
    assert len(templates) == 2 and evaluated(folder, tmp_path / "bare", problems=1).settings["chat_template"] is None


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ nosuch.a }}{{ enable_thinking }}", "cannot be rendered: UndefinedError"),
        ("{{ messages[0].content }}", "^thinking is 'off'; .*chatting has no chat template with enable_thinking"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused_before_anything_is_sampled(folder, tmp_path, template, told):
    with pytest.raises(RunError, match=told):
        evaluated(chatting(folder, tmp_path, template), tmp_path / "out", thinking="off")


# --- the command ---


def test_the_command_prints_the_table_and_writes_the_files(whole, folder, capfd, tmp_path):
    _, directory = whole
    command = ["evaluate", str(folder), "--suite", "small", "--max-response-length", str(LIMIT), "--format", "float32"]
    assert main([*command, "--out", str(directory)]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    assert output.startswith("# tiny: suite small\n") and "| training (float32) |" in output
    assert re.search(r"plot: +.*suite.png\n$", output)
    assert output.startswith((directory / "suite.md").read_text())
    assert main([*command, "--out", str(directory), "--json", "--against", str(directory)]) == 0
    assert json.loads(capfd.readouterr().out)["name"] == "tiny"
    assert "## tiny less tiny" in (directory / "suite.md").read_text()


@pytest.mark.parametrize(
    ("options", "right"),
    [
        (["--suite", "papers"], "suite is 'papers'; it must be one of paper"),
        (["--suite", "small", "--prompts", "3"], "--prompts is 3; it counts held-out prompts"),
        (["--samples", "3"], "--samples is 3; it needs --suite"),
        (["--suite", "small", "--against", "nowhere"], "no result in nowhere"),
        (["--suite", "small", "--format", "int3"], "serving.format is 'int3'"),
        (["--suite", "small", "--slots", "0"], "serving.slots is 0"),
        (["--suite", "small", "--devices", "99"], "mesh.fsdp 99 needs 99 devices"),
        (["--suite", "small", "--devices", "3"], "mesh.fsdp is 3, which does not divide"),
        (["--suite", "small", "--process-id", "1"], "distributed.coordinator is not given"),
        (["--suite", "small", "--slots", "999999999"], "slots would fit"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(options, right, folder, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(folder), *options]) == 2
    output, errors = capfd.readouterr()
    assert output == "" and errors.startswith("dcjax: error: ") and errors.count("\n") == 1
    assert right in errors


@pytest.fixture
def published_data(monkeypatch, tmp_path):
    """The sample files in the published schemas, prepared by TFDS, and responses as they are."""
    from dcjax.data.store import load_examples
    from dcjax.loop.evaluate import responses

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dcjax.tools.suite.suite, "load_examples", load_examples)
    monkeypatch.setattr(dcjax.tools.suite.answers, "responses", responses)
    monkeypatch.setattr(dcjax.tools.suite.suite, "RewardPool", RewardPool)


PAPER = ["--suite", "paper", "--data-dir", str(SAMPLES), "--samples", "2", "--problems", "3"]
PAPER += ["--max-response-length", "8"]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A random model with positions for any of the sample files' problems."""
    path = tmp_path_factory.mktemp("models") / "roomy"
    model = dataclasses.replace(MODEL, max_position_embeddings=4096)
    save_hf(path, model, init_params(model, jax.random.key(0)))
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.slow
def test_two_hosts_find_what_one_finds(published_data, roomy, tmp_path):
    assert main(["evaluate", str(roomy), *PAPER, "--out", str(tmp_path / "one")]) == 0
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [sys.executable, "-m", "dcjax", "evaluate", str(roomy), *PAPER, "--out", str(tmp_path / "two")]
    command += ["--coordinator", coordinator, "--num-processes", "2", "--process-id"]
    hosts = [subprocess.Popen([*command, str(host)], env=fake_devices(1)) for host in range(2)]
    assert [host.wait(timeout=300) for host in hosts] == [0, 0]
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    counts = [path.read_text().count("\n") for path in sorted((tmp_path / "two").glob("samples-*.jsonl"))]
    assert sum(counts) == 36 and min(counts) >= 6
    assert json.loads((tmp_path / "two" / "suite.json").read_text()) == json.loads(
        (tmp_path / "one" / "suite.json").read_text()
    )
