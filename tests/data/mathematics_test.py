import logging
import pickle
import re
import shutil
from dataclasses import replace

import pytest

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.data.datasets import SAMPLES
from dcjax.data.mathematics import MathTask
from dcjax.data.problems import FixedProblems, TextProblem
from dcjax.data.store import load_examples
from dcjax.data.task import encode_prompts
from dcjax.data.templates import templates
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.rewards.boxed import integer_reward

TASK = MathTask(data_dir=SAMPLES)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return TASK.build_tokenizer(None)


def test_an_epoch_asks_every_training_question_once(tokenizer):
    problems = TASK.open(tokenizer)
    message = templates["boxed"].message
    examples = load_examples("dapo-math-17k", SAMPLES)
    wanted = {TextProblem(message(each.question), each.answer, each.question) for each in examples}
    assert len(wanted) == 29
    for epoch in range(3):
        assert set(problems.problems("train", 7, 29 * epoch, 29)) == wanted


def test_problems_depend_on_the_arguments_and_nothing_else(tokenizer):
    problems = TASK.open(tokenizer)
    drawn = problems.problems("train", 3, 20, 30)
    assert drawn == [
        problem for start in (20, 30, 40) for problem in TASK.open(tokenizer).problems("train", 3, start, 10)
    ]
    assert drawn != problems.problems("train", 4, 20, 30)


def test_heldout_problems_come_round_in_their_order_whatever_the_seed(tokenizer):
    task = replace(TASK, heldout="amc23", template="dapo")
    problems = task.open(tokenizer)
    golds = [example.answer for example in load_examples("amc23", SAMPLES)]
    assert [problem.answer for problem in problems.problems("heldout", 0, 0, 14)] == golds * 2
    assert [problem.answer for problem in problems.problems("heldout", 9, 5, 3)] == [golds[5], golds[6], golds[0]]
    assert all('"Answer:"' in problem.prompt for problem in problems.heldout)


def test_long_prompts_are_left_out_of_training_and_counted(tokenizer, caplog):
    lengths = [len(problem.prompt.encode()) for problem in TASK.open(tokenizer).train]
    limit = sorted(lengths)[20]
    # aime25's are longer: as for any set that is measured, that is an error and not another set
    heldout = replace(TASK, heldout="minerva", max_prompt_tokens=limit)
    with pytest.raises(ValueError, match=f"task.max_prompt_tokens is {limit}; minerva has a prompt of "):
        heldout.open(tokenizer)
    longest = max(len(problem.prompt.encode()) for problem in TASK.open(tokenizer).heldout)
    with caplog.at_level(logging.INFO, logger="dcjax"):
        problems = replace(TASK, max_prompt_tokens=longest, questions="english_integer").open(tokenizer)
    kept = sum(length <= longest for length in lengths) - 5
    assert max(map(len, encode_prompts(tokenizer, problems.train))) <= longest
    assert len(problems.train) == kept
    told = (
        f"examples 29, english_integer 24, max_prompt_tokens {kept}, subset {kept} (paper B's filter left about 13056)"
    )
    assert any(told in message for message in caplog.messages)


def test_shares_and_lists_of_ids(tokenizer, tmp_path):
    quarter = set(replace(TASK, subset="25%").open(tokenizer).train)
    half = set(replace(TASK, subset="50%").open(tokenizer).train)
    assert quarter < half < set(TASK.open(tokenizer).train) and (len(quarter), len(half)) == (7, 14)
    wanted = load_examples("dapo-math-17k", SAMPLES)[3:5]
    path = tmp_path / "ids"
    path.write_text("\n".join(example.id for example in wanted), encoding="utf-8")
    listed = replace(TASK, index_file=path, questions="english_integer").open(tokenizer).train
    assert [problem.answer for problem in listed] == [example.answer for example in wanted]


def test_nothing_left_to_train_on_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"dapo-math-17k has nothing left to train on: examples 29, .*subset 0"):
        replace(TASK, subset="0.1%").open(tokenizer)


def test_a_missing_copy_says_what_to_put_where(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"put it at {re.escape(str(tmp_path))}/dapo-math-17k.parquet"):
        MathTask(data_dir=tmp_path).open(tokenizer)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dataset": "gsm8k"}, "dataset is 'gsm8k'; it must be one of dapo-math-17k"),
        ({"heldout": "gsm8k"}, "dataset is 'gsm8k'; it must be one of dapo-math-17k"),
        ({"subset": "a quarter"}, "subset is 'a quarter'; it must be all, or a percentage"),
        ({"questions": "french"}, "task.questions is 'french'; it must be one of all, english_integer"),
        ({"template": "plain"}, "task.template is 'plain'; it must be one of boxed, dapo"),
        ({"thinking": False}, "task.thinking is False; it must be one of auto, on, off"),
        ({"answer_start": "So \\boxed{"}, r"task.answer_start is 'So \\boxed{'; it must not hold 'boxed', since the"),
        ({"answer_start": "Answer: "}, "task.answer_start is 'Answer: '; it must not hold 'Answer:', since the answer"),
        ({"max_prompt_tokens": 0}, "task.max_prompt_tokens is 0; it must be at least 1"),
    ],
)
def test_a_bad_field_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        MathTask(**fields)


def test_the_tokenizer_is_the_models_own_where_it_has_one(tmp_path):
    own = byte_tokenizer()
    own.add_tokens(["\\boxed{"])
    own.save_pretrained(tmp_path)
    assert len(TASK.build_tokenizer(tmp_path)) == 259
    assert len(TASK.build_tokenizer(None)) == 258


def test_both_tasks_say_what_a_run_needs_of_them(tokenizer):
    """What trainer and evaluation call; the two share no base class."""
    for task, split_lengths in ((ArithmeticTask(), (13, 45)), (replace(TASK, max_prompt_tokens=500), (500, 0))):
        assert (task.max_prompt_length, task.max_response_length) == split_lengths
        built = task.build_tokenizer(None)
        problems = pickle.loads(pickle.dumps(task)).open(built)
        for split in ("train", "heldout"):
            drawn = problems.problems(split, 0, 5, 3)
            assert len(drawn) == 3
            assert max(map(len, encode_prompts(built, drawn))) <= task.max_prompt_length
            assert task.reward(rf"\boxed{{{drawn[0].answer}}}", drawn[0].answer, finished=True) == 1.0
    assert ArithmeticTask().reward is integer_reward
    assert MathTask(template="dapo").reward is templates["dapo"].reward


def test_the_fingerprint_is_of_what_is_asked_and_in_which_order(tokenizer, tmp_path):
    given = TASK.open(tokenizer).fingerprint
    assert [told.split(" (")[0] for told in given.values()][:2] == ["29 problems", "6 problems"]
    assert TASK.open(tokenizer).fingerprint == given
    names = ("train dapo-math-17k", "heldout aime24", "prompt template")
    assert set(given) == set(names)
    for changed in ({"template": "dapo"}, {"answer_start": "Well, "}):
        assert differing(replace(TASK, **changed).open(tokenizer).fingerprint, given) == {"prompt template"}
    assert differing(TASK.open(templated("[{{ messages[0].content }}]")).fingerprint, given) == {"prompt template"}
    lines = (SAMPLES / "dapo-math-17k.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "dapo-math-17k.jsonl").write_text("\n".join(lines[::-1]), encoding="utf-8")
    shutil.copy(SAMPLES / "aime24.jsonl", tmp_path)
    turned = replace(TASK, data_dir=tmp_path).open(tokenizer).fingerprint
    assert differing(turned, given) == {"train dapo-math-17k"}
    (tmp_path / "dapo-math-17k.jsonl").write_text("\n".join(lines[:20]), encoding="utf-8")
    fewer = replace(TASK, data_dir=tmp_path).open(tokenizer).fingerprint
    assert differing(fewer, given) == {"train dapo-math-17k"}


def test_a_template_that_changes_the_question_is_told_apart_by_the_whole_prompt():
    given = TASK.open(templated("[{{ messages[0].content | upper }}]")).fingerprint
    other = TASK.open(templated("[{{ messages[0].content | lower }}]")).fingerprint
    assert differing(given, other) == {"prompt template"}


def test_the_prompt_is_as_the_task_says_of_thinking_and_of_the_answers_start():
    chat = "{{ messages[0].content }}|{% if enable_thinking is false %}off|{% endif %}"
    problems = replace(TASK, thinking="off", answer_start="Let me see. ").open(templated(chat))
    assert all(problem.prompt.endswith("|off|Let me see. ") for problem in (*problems.train, *problems.heldout))
    with pytest.raises(ValueError, match="has no chat template with enable_thinking"):
        replace(TASK, thinking="off").open(templated("{{ messages[0].content }}"))


def differing(one, other):
    return {name for name in one | other if one.get(name) != other.get(name)}


def templated(chat):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat
    return tokenizer


def test_a_prompt_of_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"^heldout has a problem with an empty prompt; a prompt must have at least one"
    ):
        FixedProblems([TextProblem("1+1=", "2")], [TextProblem("", "3")])
