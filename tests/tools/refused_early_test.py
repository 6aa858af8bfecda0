"""What refuses a tool is found before weights are read, which takes minutes for a large model."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny

import dcjax.models.hf
import dcjax.tools.convert
from dcjax.cli import main
from dcjax.data.arithmetic import build_tokenizer
from dcjax.data.datasets import SAMPLES
from dcjax.models import save_hf
from dcjax.tools.open_model import OpenedModel

pytestmark = pytest.mark.heavy

FOLDER = Path(__file__).parents[1] / "data" / "hf_tiny_qwen3"


@pytest.fixture
def refusal(monkeypatch, capfd):
    """Runs a command that must be refused in one line before it has read weights."""

    def read(*arguments, **settings):
        pytest.fail("weights were read")

    monkeypatch.setattr(OpenedModel, "restore", read)
    monkeypatch.setattr(OpenedModel, "params", read)
    monkeypatch.setattr(dcjax.tools.convert, "Checkpoint", read)

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        output, errors = capfd.readouterr()
        assert output == "" and errors.startswith("dcjax: error: ") and errors.count("\n") == 1
        return errors.removeprefix("dcjax: error: ")

    return run


@pytest.mark.parametrize("out", ["file", "file/below", "file/below/it", "/proc/below"])
@pytest.mark.parametrize("command", ["probe", "suite", "export", "import"])
def test_results_that_cannot_be_written(finished_run, refusal, tmp_path, monkeypatch, command, out):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    arguments = {
        "probe": ["probe", finished_run, "--out", out],
        "suite": ["evaluate", finished_run, "--suite", "paper", "--data-dir", SAMPLES, "--out", out],
        "export": ["convert", "export", finished_run, out],
        "import": ["convert", "import", FOLDER, out],
    }[command]
    message = refusal(*arguments)
    assert ("/proc" if out.startswith("/") else str(tmp_path / "file")) in message or message.startswith("file exists")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_suite_of_which_several_benchmarks_are_missing(finished_run, refusal, tmp_path):
    shutil.copy(SAMPLES / "aime24.jsonl", tmp_path)
    message = refusal("evaluate", finished_run, "--suite", "paper", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert message.startswith(f"no copy of aime25, amc23, math500, minerva, olympiadbench in {tmp_path}; dcjax data ")
    assert f"the samples that come with dcjax: --data-dir {SAMPLES}" in message


@pytest.mark.parametrize("command", ["evaluate", "probe"])
def test_a_run_whose_data_are_gone(finished_run, refusal, tmp_path, command):
    shutil.copytree(finished_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    recorded = json.loads(path.read_text())
    recorded["task"] = {"class": "dcjax.data.mathematics:MathTask", "data_dir": "gone"}
    recorded["rollout"]["max_prompt_length"] = 1024
    recorded["optimizer"]["tokens_per_microbatch"] = None
    recorded["reward"]["workers"] = 2
    path.write_text(json.dumps(recorded))
    assert "no copy of dapo-math-17k in " in refusal(command, tmp_path / "run")


def test_one_of_several_formats_that_the_model_cannot_be_served_in(refusal, tmp_path):
    model = dataclasses.replace(tiny.DENSE, intermediate_size=72)
    save_hf(tmp_path / "folder", model, tiny.masters(model))
    build_tokenizer().save_pretrained(tmp_path / "folder")
    (tmp_path / "prompts").write_text("1+2=\n")
    options = ("--formats", "bf16,int4", "--prompts-file", tmp_path / "prompts", "--out", tmp_path / "out")
    assert "down_proj is contracted over 72" in refusal("probe", tmp_path / "folder", *options)
