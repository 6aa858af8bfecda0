"""A run that begins at the imported model, and folders that are written of both."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from launching import fake_devices
from transformers import AutoTokenizer

from dcjax.data.chat import chat_prompt
from dcjax.models import load_hf, save_hf
from dcjax.tools.open_model import open_model

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[1] / "data" / "own_recipe.py"
QUESTIONS = {"What is the capital of France?": "Paris", "Name the largest ocean.": "Pacific"}
RATE = 1e-4


def dcjax(*arguments):
    subprocess.run([sys.executable, "-m", "dcjax", *map(str, arguments)], check=True, env=fake_devices(1))


def assert_equal_bits(these, those):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(*(np.asarray(x).view(np.int32) for x in (a, b))), these, those
    )


def assert_speaks_as(folder, out):
    """Both have one tokenizer and one chat template."""
    spelt = []
    for each in (folder, out):
        tokenizer = AutoTokenizer.from_pretrained(each)
        spelt.append([tokenizer(chat_prompt(tokenizer, text))["input_ids"] for text in QUESTIONS])
    assert spelt[0] == spelt[1]


def test_what_is_loaded_is_saved_and_imported_again_to_the_bit(folder, scratch):
    config, params = load_hf(folder)
    save_hf(scratch / "saved", config, params, tokenizer_from=folder)
    dcjax("convert", "import", scratch / "saved", scratch / "again")
    for out in (scratch / "saved", scratch / "again"):
        read_config, read = load_hf(out)
        assert read_config == config
        assert_equal_bits(read, params)
        assert_speaks_as(folder, out)


def test_a_run_begins_at_the_model_and_what_it_made_of_it_is_exported(folder, scratch):
    """The first update of Adam moves no weight by more than the learning rate."""
    words, run, out = scratch / "words.jsonl", scratch / "run", scratch / "exported"
    words.write_text("\n".join(json.dumps({"question": text, "answer": told}) for text, told in QUESTIONS.items()))
    sizes = {
        "task.max_prompt_length": 48,
        "task.heldout": 1,
        "rollout.prompts": 1,
        "rollout.group_size": 2,
        "rollout.max_prompt_length": 48,
        "rollout.max_response_length": 16,
        "serving.slots": 2,
        "evaluation.prompts": 1,
        "optimizer.tokens_per_microbatch": 128,
        "optimizer.learning_rate": RATE,
    }
    settings = [f"{name}={value}" for name, value in sizes.items()]
    dcjax("train", RECIPE, "--run-dir", run, "--pretrained", folder, f"task.path={words}", "steps=1", *settings)
    (measured,) = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if "mismatch/prob_diff_mean" in row]
    assert 0 < measured["mismatch/prob_diff_mean"] < 0.1
    config, params = load_hf(folder)
    assert_equal_bits(open_model(run / "checkpoints" / "0").params(), params)
    dcjax("convert", "export", run, out)
    read_config, read = load_hf(out)
    assert read_config == config
    assert_equal_bits(read, open_model(run).params())
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), read, params))
    assert all(0 < largest < 1.01 * RATE for largest in moved)
    assert_speaks_as(folder, out)
