"""The complete files of the documentation, run as a reader would run them."""

import re
from pathlib import Path

import jax
import pytest
import tiny

from dcjax.cli import main
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.models import ModelConfig, init_params, save_hf
from dcjax.reporting.record import read_metrics

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
FILES = re.compile(r"^```python\n(# (\w+\.py): dcjax train ([^\n]*)\n.*?)^```$", re.DOTALL | re.MULTILINE)
SMALL = {
    "steps": 2,
    "warm_start.steps": 2,
    "warm_start.batch_size": 8,
    "rollout.prompts": 4,
    "rollout.group_size": 4,
    "evaluation.prompts": 4,
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "serving.slots": 8,
    "serving.steps_per_call": 4,
}
"""A run of seconds."""

OF_ARITHMETIC = {
    **{
        f"task.{name}": getattr(tiny.TASK, name)
        for name in ("min_operations", "max_operations", "max_operand", "max_value")
    },
    "model.vocab_size": tiny.DENSE.vocab_size,
    "rollout.max_prompt_length": tiny.PROMPT_LENGTH,
    "rollout.max_response_length": tiny.RESPONSE_LENGTH,
    "evaluation.prompts": tiny.CONFIG.evaluation.prompts,
}
"""And with the embedded task one whose samples are drawn by the programs of `finished_run`."""


def files():
    return [match for page in PAGES for match in FILES.findall(page.read_text())]


def test_the_pages_have_a_complete_file_each():
    assert {name for _, name, _ in files()} == {
        "halved.py",
        "known_tokens.py",
        "mine.py",
        "restarts.py",
        "reversal.py",
        "small_floats.py",
        "sums.py",
    }


def make_chat_model(folder):
    """A tiny model's folder, with a tokenizer of bytes and a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}:"
    tokenizer.save_pretrained("tokenizer")
    config = ModelConfig(vocab_size=260, hidden_size=32, intermediate_size=64)
    save_hf(folder, config, init_params(config, jax.random.key(0)), tokenizer_from=Path("tokenizer"))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "name", "command"), [pytest.param(*each, id=each[1]) for each in files()])
def test_a_file_of_the_documentation_trains(source, name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(source)
    match name:
        case "reversal.py":
            sizes = SMALL
        case "sums.py":
            sizes = SMALL | {"warm_start.steps": 0}
            make_chat_model(Path("FOLDER"))
        case _:
            sizes = SMALL | OF_ARITHMETIC
    overrides = [f"{field}={value}" for field, value in sizes.items()]
    assert main(["train", *command.split(), "--run-dir", "run", *overrides]) == 0
    (metrics,) = Path().glob("run*/metrics.jsonl")  # a trial has a folder of its own
    records = read_metrics(metrics)
    assert [record["step"] for record in records] == [0, 1, 2]
    assert ("silenced" in records[-1]) == (name == "known_tokens.py")
