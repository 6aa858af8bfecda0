"""Tasks from files: rows against problems worked by hand, what is refused, and what is held out."""

import dataclasses
import functools
import hashlib
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from dcjax.data.files import FileTask
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.rewards.answers import judge
from dcjax.rewards.math import math_reward

ROWS = [{"question": f"What is {number} + 1?", "answer": number + 1, "level": number % 3} for number in range(60)]


@pytest.fixture
def opened(tmp_path):
    """(rows, fields) -> the problems of a task from a JSONL of these rows."""

    def open_(rows, name="problems.jsonl", **fields):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return FileTask(path=path, **fields).open(byte_tokenizer())

    return open_


def held_out(question, share=0.1):
    digest = hashlib.sha256(f"held out {question}".encode()).hexdigest()
    return int(digest[:16], 16) / 2**64 < share


def test_rows_become_problems_by_the_named_columns(opened):
    rows = [{"q": {"text": row["question"]}, "a": row["answer"], "why": "because"} for row in ROWS]
    problems = opened(rows, question="q.text", answer="a", solution="why", template="bare")
    everything = {each.question: each for each in (*problems.train, *problems.heldout)}
    assert len(everything) == 60
    one = everything["What is 7 + 1?"]
    assert (one.prompt, one.answer, one.solution) == ("What is 7 + 1?", "8", "because")
    assert one.record == {"q": {"text": "What is 7 + 1?"}, "a": 8, "why": "because"}


def test_a_hash_of_the_question_says_what_is_held_out(opened):
    problems = opened(ROWS)
    assert [each.question for each in problems.heldout] == [
        row["question"] for row in ROWS if held_out(row["question"])
    ]
    assert not {each.question for each in problems.heldout} & {each.question for each in problems.train}
    # whatever else is in the file, and in whatever order
    assert {each.question for each in opened(ROWS[::-1][:40]).heldout} <= {each.question for each in problems.heldout}


def test_a_file_of_its_own_is_held_out_and_not_trained_on(opened, tmp_path):
    other = tmp_path / "test.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    problems = opened(ROWS, heldout_path=other)
    assert [each.answer for each in problems.heldout] == ["1", "2", "3", "4", "5"]
    assert len(problems.train) == 55


def test_parquet_and_jsonl_are_the_same_task(opened, tmp_path):
    path = tmp_path / "problems.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    ours, theirs = FileTask(path=path).open(byte_tokenizer()), opened(ROWS)
    assert ours.train == theirs.train
    assert ours.heldout == theirs.heldout
    assert list(ours.fingerprint.values()) == list(theirs.fingerprint.values())


@pytest.mark.parametrize(
    "cell, fields, answer",
    [
        ("He has 3.\n#### 1,200", {"answer_after": "####"}, "1,200"),
        (r"so \boxed{4}, and \boxed{\frac12}", {}, r"\frac12"),
        ("$27.0$", {}, "27"),
        ("$27.0$", {"comparison": "exact"}, "$27.0$"),
        (3.5, {"comparison": "exact"}, "3.5"),
        (" b ", {"comparison": "choice"}, "b"),
    ],
)
def test_answers_are_read_as_the_comparison_needs(opened, cell, fields, answer):
    problems = (
        opened([*ROWS[:30], {"question": "the one", "answer": cell}], heldout_share=0.5, **fields)
        if (fields.get("comparison") != "choice")
        else opened([{"question": f"{n}?", "answer": cell} for n in range(20)], heldout_share=0.5, **fields)
    )
    found = [each.answer for each in (*problems.train, *problems.heldout) if each.question in ("the one", "3?")]
    assert found == [answer]


def test_what_is_left_out_is_counted(opened, caplog):
    rows = [*ROWS, ROWS[0], {"question": "", "answer": 1}, {"question": "no answer", "answer": None}]
    with caplog.at_level(logging.INFO, "dcjax"):
        opened([*rows, {"question": "x" * 600, "answer": 1}])
    told = caplog.text
    assert "left out 1 rows repeated, 2 rows without a question or an answer" in told
    assert "1 rows longer than task.max_prompt_tokens, 512" in told


def test_rewards_follow_from_template_and_comparison():
    assert FileTask().reward is math_reward
    for_choice = FileTask(template="last_line", comparison="choice").reward
    assert isinstance(for_choice, functools.partial)
    assert for_choice.func is judge
    assert for_choice("I think\n(B)", "B", finished=True) == 1.0


def test_other_records_are_other_data(opened):
    changed = [row | {"level": 7} for row in ROWS]
    assert opened(ROWS).fingerprint != opened(changed).fingerprint


def test_answers_may_be_missing_where_the_reward_reads_the_record(opened):
    problems = opened([{"question": row["question"]} for row in ROWS], answer="")
    assert {each.answer for each in problems.train} == {""}
    assert not problems.golds


@pytest.mark.parametrize(
    "rows, fields, told",
    [
        ([{"q": "a"}], {}, "row 1: no column 'question' among 'q'; task.question must name one"),
        ([{"question": "a", "answer": {"b": 1}}], {"answer": "answer.c"}, "no column 'answer.c' among 'question', 'a"),
        ([{"question": "a", "answer": "two"}], {"comparison": "integer"}, "row 1: the answer is 'two'; for comparison"),
        ([{"question": 3, "answer": 1}], {}, "row 1: is 3; it must be text, a user's message"),
        (ROWS[:1], {}, "leaves 1 problems to train on and 0 held out; each must be at least 1"),
        ([], {}, "leaves 0 problems to train on and 0 held out"),
    ],
)
def test_what_a_file_must_not_hold_is_quoted(opened, rows, fields, told):
    with pytest.raises(ValueError) as refused:
        opened(rows, **fields)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"path": "a.csv"}, "task.path is 'a.csv'; it must end in .parquet or .jsonl"),
        ({"comparison": "vibes"}, "task.comparison is 'vibes'; it must be one of math, exact, integer, choice, regex"),
        ({"template": "chatty"}, "task.template is 'chatty'; it must be one of boxed, dapo, tags, last_line, bare"),
        ({"heldout_share": 1.0}, "task.heldout_share is 1.0; it must lie within"),
        ({"question": ""}, "task.question is ''; it must name the column"),
        ({"answer_start": "<answer>"}, "task.answer_start is '<answer>'; it must not hold '<answer>'"),
    ],
)
def test_fields_out_of_range_are_quoted(fields, told):
    with pytest.raises(ValueError) as refused:
        FileTask(**fields)
    assert told in str(refused.value)


def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"task\.path is not given; it must name"):
        FileTask().check_files()
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        FileTask(path=tmp_path / "none.jsonl").check_files()
    (tmp_path / "some.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match=r"task\.heldout_path is"):
        dataclasses.replace(FileTask(), path=tmp_path / "some.jsonl", heldout_path=tmp_path / "no.jsonl").check_files()
