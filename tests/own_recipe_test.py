"""A recipe outside the checkout whose sections are the reader's own: trained, killed, resumed, opened by every tool."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from launching import ended, processes
from records import untimed

from dcjax.cli import main
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.run_directory import load_config
from dcjax.models import ModelConfig, init_params, load_hf, save_hf
from dcjax.recipe.build import abstract_state
from dcjax.reporting.record import read_metrics
from dcjax.sharding.mesh import make_mesh

pytestmark = pytest.mark.heavy

RECIPE = Path(__file__).parent / "data" / "own_recipe.py"
CHAT = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
OVERRIDES = ["--objective.limit", "0.004", "--task.partial_credit", "0.25"]

KILLED = """
import os, signal, sys
from dcjax.cli import main
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.logs import RunLog

write, save = RunLog.write, Checkpoints.save

def write_until_killed(self, step, *values):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, step, *values)

def save_at_once(self, *values):
    save(self, *values)
    self.wait()

RunLog.write, Checkpoints.save = write_until_killed, save_at_once
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the recipe, its model and its questions lie."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "tokenizer")
    model = ModelConfig(vocab_size=260, hidden_size=32, intermediate_size=64)
    params = init_params(model, jax.random.key(0))
    save_hf(folder / "model", model, params, tokenizer_from=folder / "tokenizer")
    lines = ({"question": f"letter {number}?", "answer": chr(97 + number)} for number in range(12))
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(RECIPE, folder / "mine.py")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "mine.py", "--run-dir", "run", *OVERRIDES]) == 0
    return folder / "run"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run whose recipe has another original, which may be changed."""
    shutil.copytree(run, tmp_path / "copied")
    original = tmp_path / "mine.py"
    shutil.copy(RECIPE, original)
    rewrite(tmp_path / "copied", lambda config: config["recipe"].update(path=str(original)))
    return tmp_path / "copied"


def rewrite(run, change):
    path = run / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def final_state(run):
    config = load_config(run)
    return jax.device_get(
        Checkpoints(run / "checkpoints").restore(6, abstract_state(config, make_mesh(config.mesh)))[0]
    )


def without_times(run):
    return untimed(read_metrics(run / "metrics.jsonl"))


def test_its_own_fields_are_set_and_its_own_parts_do_their_work(run):
    config = json.loads((run / "config.json").read_text())
    assert config["objective"]["class"] == "recipe:SilenceKnown" and config["objective"]["limit"] == 0.004
    assert config["task"] == {
        "class": "recipe:Words",
        "path": "words.jsonl",
        "heldout": 4,
        "partial_credit": 0.25,
        "max_prompt_length": 32,
    }
    assert (run / "recipe.py").read_bytes() == RECIPE.read_bytes()
    records = read_metrics(run / "metrics.jsonl")
    assert all(0 < record["silenced"] < 1 for record in records[1:])
    assert {round(16 * record["reward"], 2) % 0.25 for record in records[1:]} == {0}
    assert len({record["dual/multiplier"] for record in records[1:]}) == 6
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert all(sample["prompt"].startswith("<letter ") and sample["prompt"].endswith("?>:") for sample in samples)


def test_help_explains_its_own_fields_beside_ours(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit):
        main(["train", "mine.py", "--help"])
    shown = capfd.readouterr().out
    for text in (
        "--objective.limit FLOAT",
        "Probability above which a token counts as known. (default: 0.5)",
        "--optimizer.threshold FLOAT",
        "--task.partial_credit FLOAT",
        "--objective.dual_lr FLOAT",
    ):
        assert text in shown


def assert_goes_on_to_the_same_bits(directory, run):
    assert Checkpoints(directory / "checkpoints").latest() == 2
    assert main(["train", str(directory)]) == 0
    assert without_times(directory) == without_times(run)
    jax.tree.map(np.testing.assert_array_equal, final_state(directory), final_state(run))


def test_it_resumes_to_the_same_bits_from_another_directory(run, tmp_path, elsewhere):
    stopped = shutil.copytree(run, tmp_path / "stopped")
    for later in (4, 6):
        shutil.rmtree(stopped / "checkpoints" / str(later))
    assert_goes_on_to_the_same_bits(stopped, run)


@pytest.mark.slow
def test_it_is_killed_and_resumes_to_the_same_bits_from_another_directory(run, folder, tmp_path, elsewhere):
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, "train", "mine.py", "--run-dir", str(killed), *OVERRIDES]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == -signal.SIGKILL
    assert_goes_on_to_the_same_bits(killed, run)


def test_it_is_evaluated_exported_and_reloaded_from_another_directory(run, elsewhere, capfd):
    assert main(["evaluate", str(run), "--json"]) == 0
    output, errors = capfd.readouterr()
    records = read_metrics(run / "metrics.jsonl")
    accuracies = {row["policy"]: row["accuracy"] for row in json.loads(output)["policies"]}
    assert accuracies == {name: records[-1][f"eval/{name}_accuracy"] for name in ("deployed", "training")}
    code = f"runs the code of recipe:Cautious, recipe:SilenceKnown, recipe:Words in {run / 'recipe.py'}"
    assert errors.splitlines()[0] == f"dcjax: {code}"
    assert main(["convert", "export", str(run), "exported"]) == 0
    exported = load_hf(Path("exported"))[1]
    jax.tree.map(np.testing.assert_array_equal, exported, final_state(run).params)
    assert main(["report", str(run)]) == 0


@pytest.mark.slow
def test_it_is_probed_from_another_directory(run, elsewhere, tmp_path, capfd):
    assert main(["probe", str(run), "--prompts", "4", "--out", str(tmp_path / "probe"), "--json"]) == 0
    assert "int8" in json.loads(capfd.readouterr().out)["formats"]


@pytest.mark.slow
def test_two_processes_train_it(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    with processes("mine.py", tmp_path / "two", "--mesh.fsdp", "2", *OVERRIDES) as started:
        assert [ended(process, within=300) for process in started] == [(0, []), (0, [])]
    assert len(read_metrics(tmp_path / "two" / "metrics.jsonl")) == 7
    assert (tmp_path / "two" / "recipe.py").read_bytes() == RECIPE.read_bytes()


# --- the file outside has changed ---


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "report"])
def test_a_recipe_that_was_edited_after_the_run_is_named_and_the_copy_is_used(copied, capfd, command):
    original = copied.parent / "mine.py"
    original.write_text("raise AssertionError('executed')\n")
    arguments = {
        "train": ["train", str(copied)],
        "evaluate": ["evaluate", str(copied)],
        "export": ["convert", "export", str(copied), str(copied.parent / "out")],
        "report": ["report", str(copied)],
    }[command]
    assert main(arguments) == 0
    line = f"{original} has changed since this run began; the run's own settings and copy, {copied / 'recipe.py'}, are"
    assert line in capfd.readouterr().err


def test_an_edited_recipe_resumes_its_run_with_the_copy(copied, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    original = copied.parent / "mine.py"
    original.write_text(original.read_text().replace("partial_credit: float = 0.5", "partial_credit: float = 0.75"))
    assert main(["train", str(original), "--run-dir", str(copied), *OVERRIDES]) == 0
    assert "has changed since this run began" in capfd.readouterr().err
    assert (copied / "recipe.py").read_bytes() == RECIPE.read_bytes()
    # an override that is another run's is refused as ever
    assert main(["train", str(original), "--run-dir", str(copied), "--objective.limit", "0.5"]) == 2
    assert "objective.limit 0.5 (there 0.004)" in capfd.readouterr().err


def test_a_copy_that_was_changed_is_refused(copied, capfd):
    (copied / "recipe.py").write_text("raise AssertionError('executed')\n")
    assert main(["evaluate", str(copied)]) == 2
    assert "recipe.py is not the recipe that the run began with: its SHA-256 is" in capfd.readouterr().err
    (copied / "recipe.py").unlink()
    assert main(["evaluate", str(copied)]) == 2
    assert "recipe.py is gone, which config.json names; put it back from" in capfd.readouterr().err


# --- whose code runs ---


@pytest.mark.parametrize("command", ["evaluate", "probe", "export", "train"])
def test_code_of_a_run_can_be_refused(run, tmp_path, capfd, command):
    arguments = {"export": ["convert", "export", str(run), str(tmp_path / "out")]}.get(command, [command, str(run)])
    assert main([*arguments, "--no-recipe-code"]) == 2
    line = "names code outside dcjax, recipe:Cautious, recipe:SilenceKnown, recipe:Words, which --no-recipe-code does"
    errors = capfd.readouterr().err
    assert line in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "hostile",
    [
        {"task": {"class": "os:system"}},
        {"objective": {"class": "subprocess:Popen", "args": "touch executed"}},
        {"optimizer": {"class": "dcjax.user_code:CodeFile", "path": "x", "source": "y"}},
        {"model": {"class": "recipe:Words"}},
        {"reward": {"class": "dcjax.recipe.reward:RewardConfig", "function": "os:system"}},
    ],
)
def test_a_hostile_config_is_refused_in_one_line(finished_run, tmp_path, monkeypatch, capfd, hostile):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, "run")
    rewrite(Path("run"), lambda config: config.update(hostile))
    monkeypatch.setattr(os, "system", lambda *given: pytest.fail("executed"))
    assert main(["evaluate", "run"]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert errors[-1].startswith("dcjax: error: ") and not any("Traceback" in line for line in errors)
    assert not (tmp_path / "executed").exists()


def test_a_run_of_built_in_sections_executes_nothing_of_its_directory(finished_run, tmp_path, monkeypatch, capfd):
    shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "run" / "recipe.py").write_text("raise AssertionError('executed')\n")
    monkeypatch.chdir(tmp_path / "run")
    assert main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--no-recipe-code"]) == 0
    assert "runs the code" not in capfd.readouterr().err
