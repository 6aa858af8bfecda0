import itertools
import json
import pickle
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcjax.data.arithmetic import ArithmeticTask, Chain, build_tokenizer
from dcjax.data.task import encode_prompts, supervised_batch

SEEDS = st.integers(0, 2**40)
SPLITS = st.sampled_from(["train", "heldout"])
# Large enough that neither split is empty.
TASKS = st.builds(
    lambda low, extra, operand, value: ArithmeticTask(low, low + extra, operand, value),
    st.integers(3, 4),
    st.integers(0, 2),
    st.integers(5, 30),
    st.integers(5, 200),
)
EXAMPLE = Chain(12, (("-", 4), ("-", 4), ("+", 3), ("-", 2), ("-", 4)))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def batch(tokenizer, *, prompt_length=13, response_length=45, **changes):
    arguments = {"seed": 0, "step": 0, "count": 64, "scratchpad_fraction": 0.5}
    demonstrations = ArithmeticTask().demonstrations(**(arguments | changes))
    return supervised_batch(tokenizer, demonstrations, prompt_length=prompt_length, response_length=response_length)


def rows(tokenizer, examples):
    """The (prompt, response) texts of a supervised batch, read off its masks."""
    for tokens, attention_mask, response_mask in zip(*examples.values(), strict=True):
        response = tokens[-response_mask.size :][response_mask]
        prompt = slice(tokens.size - response_mask.size)
        yield (
            tokenizer.decode(tokens[prompt][attention_mask[prompt]]),
            tokenizer.decode(response, skip_special_tokens=True),
        )


def evaluate(expression):
    """An oracle that shares nothing with the task: Python's own arithmetic on checked text."""
    assert re.fullmatch(r"[0-9]+([+-][0-9]+)*", expression)
    return eval(expression)


def test_a_problem_worked_by_hand():
    assert EXAMPLE.prompt == "12-4-4+3-2-4="
    assert EXAMPLE.values == (12, 8, 4, 7, 5, 1)
    assert EXAMPLE.scratchpad == "12-4=8,8-4=4,4+3=7,7-2=5,5-4=1,"
    assert EXAMPLE.answer == "1"
    assert EXAMPLE.boxed == r"\boxed{1}"
    assert EXAMPLE.response(scratchpad=True) == r"12-4=8,8-4=4,4+3=7,7-2=5,5-4=1,\boxed{1}"
    assert EXAMPLE.response(scratchpad=False) == r"\boxed{1}"


@settings(deadline=None, max_examples=100)
@given(TASKS, SPLITS, SEEDS, st.integers(0, 2**31))
def test_every_problem_keeps_the_rules(task, split, seed, index):
    problem = task.problem(split, seed, index)
    assert task.min_operations <= len(problem.steps) <= task.max_operations
    assert all(1 <= operand <= task.max_operand for _, operand in problem.steps)
    assert all(0 <= value <= task.max_value for value in problem.values)
    assert int(problem.answer) == evaluate(problem.prompt.removesuffix("="))
    *equations, rest = problem.scratchpad.split(",")
    assert rest == "" and len(equations) == len(problem.steps)
    for equation in equations:
        expression, value = equation.split("=")
        assert evaluate(expression) == int(value)
    # The rule knows neither seed nor index, so no two seeds can disagree about a prompt.
    assert (zlib.crc32(problem.prompt.encode()) % 10 == 0) == (split == "heldout")


@settings(deadline=None, max_examples=20)
@given(SPLITS, SEEDS, st.integers(0, 1000))
def test_problems_depend_on_the_arguments_and_nothing_else(split, seed, start):
    task = ArithmeticTask()
    problems = task.problems(split, seed, start, 5)
    assert problems == [ArithmeticTask().problem(split, seed, start + i) for i in range(5)]
    assert problems[1:] == task.problems(split, seed, start + 1, 4)


def test_problems_are_the_same_on_every_machine_and_version():
    prompts = [problem.prompt for problem in ArithmeticTask().problems("train", 0, 0, 3)]
    assert prompts == ["13-1-1+6=", "9+2-6-3+1=", "13+3+3-7-4="]


def test_splits_are_disjoint_across_seeds_and_problems_vary():
    task = ArithmeticTask()
    train = {problem.prompt for seed in range(4) for problem in task.problems("train", seed, 0, 500)}
    heldout = {problem.prompt for seed in range(4) for problem in task.problems("heldout", seed, 0, 200)}
    assert not train & heldout
    assert len(train) > 1900 and len(heldout) > 700


def test_every_kind_of_problem_occurs():
    problems = ArithmeticTask().problems("train", 0, 0, 2000)
    assert {problem.start for problem in problems} == set(range(21))
    assert {len(problem.steps) for problem in problems} == {3, 4, 5}
    assert {step for problem in problems for step in problem.steps} == {
        (sign, operand) for sign in "+-" for operand in range(1, 10)
    }
    assert {problem.answer for problem in problems} == {str(value) for value in range(21)}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"min_operations": 0}, "task.min_operations is 0; it must be at least 1"),
        ({"max_operations": 2}, "task.max_operations is 2; it must be at least min_operations, which is 3"),
        ({"max_operand": 0}, "task.max_operand is 0; it must be at least 1"),
        ({"max_value": -3}, "task.max_value is -3; it must be at least 1"),
    ],
)
def test_a_bad_field_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ArithmeticTask(**fields)


def test_a_split_without_problems_is_an_error_and_not_a_hang():
    smallest = ArithmeticTask(min_operations=1, max_operations=1, max_operand=1, max_value=1)
    assert smallest.problem("train", 0, 0).prompt in {"0+1=", "1-1="}
    with pytest.raises(ValueError, match=r"max_value=1.* has no 'heldout' problem"):
        smallest.problem("heldout", 0, 0)


def test_an_unknown_split_and_negative_numbers_are_errors():
    with pytest.raises(ValueError, match="split is 'test'; it must be 'train' or 'heldout'"):
        ArithmeticTask().problem("test", 0, 0)
    with pytest.raises(ValueError, match="non-negative"):
        ArithmeticTask().problem("train", -1, 0)
    with pytest.raises(ValueError, match="non-negative"):
        ArithmeticTask().problem("train", 0, -1)


def all_problems(task):
    """Every problem of a task, by trying every chain: the oracle for its longest ones."""
    signed = [(sign, operand) for sign in "+-" for operand in range(1, task.max_operand + 1)]
    for start in range(task.max_value + 1):
        for operations in range(task.min_operations, task.max_operations + 1):
            for steps in itertools.product(signed, repeat=operations):
                problem = Chain(start, steps)
                if all(0 <= value <= task.max_value for value in problem.values):
                    yield problem


@pytest.mark.parametrize(
    "task",
    [
        ArithmeticTask(1, 3, 1, 10),
        ArithmeticTask(2, 2, 3, 11),
        ArithmeticTask(1, 2, 12, 20),
        ArithmeticTask(2, 3, 4, 8),
        ArithmeticTask(1, 2, 30, 12),
    ],
)
def test_max_lengths_are_those_of_the_longest_problems(task, tokenizer):
    problems = list(all_problems(task))
    prompts = encode_prompts(tokenizer, problems)
    responses = tokenizer([problem.response(scratchpad=True) for problem in problems])["input_ids"]
    assert task.max_prompt_length == max(map(len, prompts))
    assert task.max_response_length == max(map(len, responses)) + 1


def test_max_lengths_of_the_default_task_are_reached(tokenizer):
    task = ArithmeticTask()
    longest = Chain(20, (("-", 1),) * 5)
    assert task.max_prompt_length == 13 == len(encode_prompts(tokenizer, [longest])[0])
    assert task.max_response_length == 45 == len(tokenizer.encode(longest.response(scratchpad=True))) + 1


def test_the_vocabulary(tokenizer):
    assert len(tokenizer) == 19
    assert sorted(tokenizer.get_vocab().values()) == list(range(19))
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == ("<pad>", "<eos>", "<unk>")
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.bos_token is None
    assert len(tokenizer.encode(r"\boxed{")) == 1
    assert tokenizer.encode("a b\n\\é") == [tokenizer.unk_token_id] * 6


VOCABULARY_TEXT = st.lists(st.sampled_from([*"0123456789+-=,}", r"\boxed{"])).map("".join)


@settings(deadline=None, max_examples=200)
@given(VOCABULARY_TEXT, st.integers(0, 3))
def test_decoding_gives_the_text_back(tokenizer, text, padding):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.replace(r"\boxed{", "B"))
    assert tokenizer.decode(ids) == text
    padded = [tokenizer.pad_token_id] * padding + ids + [tokenizer.eos_token_id]
    assert tokenizer.decode(padded, skip_special_tokens=True) == text


# A model folder holds a config.json too, and AutoTokenizer looks at it.
@pytest.mark.parametrize("config", [None, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}])
def test_the_tokenizer_survives_saving(tokenizer, tmp_path, config):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    assert loaded.bos_token is None
    text = EXAMPLE.prompt + EXAMPLE.response(scratchpad=True)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode([0, *loaded.encode(text), 1], skip_special_tokens=True) == text


def test_tasks_problems_and_tokenizers_pickle(tokenizer):
    assert pickle.loads(pickle.dumps(EXAMPLE)) == EXAMPLE
    assert pickle.loads(pickle.dumps(ArithmeticTask())) == ArithmeticTask()
    assert pickle.loads(pickle.dumps(tokenizer)).get_vocab() == tokenizer.get_vocab()


def test_prompts_encode_one_by_one_as_in_a_batch(tokenizer):
    problems = ArithmeticTask().problems("heldout", 0, 0, 8)
    encoded = encode_prompts(tokenizer, problems)
    assert encoded == [tokenizer.encode(problem.prompt) for problem in problems]
    assert [tokenizer.decode(ids) for ids in encoded] == [problem.prompt for problem in problems]


def test_a_supervised_batch_has_its_shapes_and_types(tokenizer):
    examples = batch(tokenizer, count=8, prompt_length=16, response_length=50)
    assert {name: (array.shape, array.dtype) for name, array in examples.items()} == {
        "tokens": ((8, 66), np.int32),
        "attention_mask": ((8, 66), np.bool_),
        "response_mask": ((8, 50), np.bool_),
    }


def test_a_supervised_batch_pads_prompts_left_and_responses_right(tokenizer):
    examples = batch(tokenizer)
    tokens, used, response_mask = examples.values()
    prompt_mask = used[:, :13]
    np.testing.assert_array_equal(used[:, 13:], response_mask)
    assert (np.diff(prompt_mask.astype(int)) >= 0).all() and prompt_mask[:, 12].all()
    assert (np.diff(response_mask.astype(int)) <= 0).all() and response_mask[:, 0].all()
    assert (tokens[~used] == tokenizer.pad_token_id).all()
    assert (tokens[used] != tokenizer.pad_token_id).all()
    last = 13 + response_mask.sum(axis=1) - 1
    assert (tokens[np.arange(64), last] == tokenizer.eos_token_id).all()
    assert (tokens == tokenizer.eos_token_id).sum() == 64


def test_supervised_responses_are_right_and_of_the_train_split(tokenizer):
    prompts = []
    for prompt, response in rows(tokenizer, batch(tokenizer)):
        assert zlib.crc32(prompt.encode()) % 10 != 0
        *equations, box = response.split(",")
        assert box == rf"\boxed{{{evaluate(prompt.removesuffix('='))}}}"
        assert all(evaluate(left) == int(right) for left, right in (part.split("=") for part in equations))
        prompts.append(prompt)
    assert len(set(prompts)) > 60


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_the_fraction_of_scratchpads(tokenizer, fraction):
    examples = batch(tokenizer, count=512, scratchpad_fraction=fraction)
    share = np.mean(["," in response for _, response in rows(tokenizer, examples)])
    assert abs(share - fraction) <= 4 * np.sqrt(fraction * (1 - fraction) / 512)


def test_supervised_batches_are_functions_of_seed_and_step(tokenizer):
    first = batch(tokenizer, seed=3, step=7)
    again = batch(tokenizer, seed=3, step=7)
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["tokens"] != batch(tokenizer, seed=3, step=8)["tokens"]).any()
    assert (first["tokens"] != batch(tokenizer, seed=4, step=7)["tokens"]).any()


def test_the_fraction_of_scratchpads_does_not_change_the_problems(tokenizer):
    none, all_ = batch(tokenizer, scratchpad_fraction=0.0), batch(tokenizer, scratchpad_fraction=1.0)
    assert (none["tokens"][:, :13] == all_["tokens"][:, :13]).all()


def test_demonstrations_are_not_the_prompts_of_reinforcement_learning(tokenizer):
    shown = [prompt for prompt, _ in rows(tokenizer, batch(tokenizer))]
    asked = [problem.prompt for problem in ArithmeticTask().problems("train", 0, 0, 64)]
    assert shown != asked and len(set(shown) & set(asked)) < 8


def test_examples_that_do_not_fit_are_errors(tokenizer):
    with pytest.raises(ValueError, match="prompt_length is 5; a prompt of this task takes"):
        batch(tokenizer, prompt_length=5)
    with pytest.raises(ValueError, match="response_length is 20; a response of this task takes"):
        batch(tokenizer, response_length=20)
    with pytest.raises(ValueError, match=r"scratchpad_fraction is 1\.5; it must be between 0 and 1"):
        batch(tokenizer, scratchpad_fraction=1.5)


def test_importing_the_task_does_not_import_transformers():
    code = "import sys, dcjax.data.arithmetic; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
