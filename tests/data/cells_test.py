import datetime
import decimal
import math

import pytest

from dcjax.data.cells import plain, question_of, text_of
from dcjax.data.datasets import datasets, normalize_answer

NAN = math.nan
USER = {"role": "user", "content": "Q"}


def refusal(read, cell):
    with pytest.raises(ValueError) as caught:
        read(cell)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


@pytest.mark.parametrize(
    ("cell", "question"),
    [
        ("Wie groß?", "Wie groß?"),
        ("Wie groß?".encode(), "Wie groß?"),
        (b"", ""),
        (None, ""),
        (NAN, ""),
        ([], ""),
        ([" Q "], "Q"),
        ([b"Q"], "Q"),
        (USER, "Q"),
        ({"content": "Q"}, "Q"),
        ({"role": b"user", "content": b"Q"}, "Q"),
        ({"role": "user"}, ""),
        ({"role": "user", "content": NAN}, ""),
        ([USER], "Q"),
        ([{"role": "system", "content": "Be brief."}, USER], "Q"),
        ([{"role": "user", "content": [{"type": "text", "text": "Q"}]}], "Q"),
        ({"role": "user", "content": [{"type": "text", "text": "Q", "image": None}, "R", b"S"]}, "Q\nR\nS"),
        ({"role": "user", "content": []}, ""),
    ],
)
def test_a_question_is_what_a_reader_finds(cell, question):
    assert question_of(cell) == question


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        (b"\xff\xfe", r"is b'\xff\xfe'; it must be text in UTF-8"),
        ((42).to_bytes(4, "little"), r"is b'*\x00\x00\x00'; it must be text in UTF-8"),
        ("half \ud83d", r"is 'half \ud83d'; it must be text in UTF-8"),
        (42, "is 42; it must be text, a user's message, or a chat that ends with one"),
        (True, "is True; it must be text"),
        (datetime.date(2024, 2, 1), "is datetime.date(2024, 2, 1); it must be text"),
        (["Q", "R"], "is ['Q', 'R']; it must be text, a user's message"),
        ([USER, "R"], "a chat that ends with one"),
        ([[USER]], "a chat that ends with one"),
        ({"text": "Q"}, "is {'text': 'Q'}; it must be text, a user's message"),
        ([USER, {"role": "assistant", "content": "A"}], "is {'content': 'A', 'role': 'assistant'}; it must be text"),
        ([{"role": "user", "content": 3}], "is 3; it must be text in UTF-8"),
        ([{"role": "user", "content": [{"type": "image", "text": ""}]}], "it must be a part of type text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "is {'type': 'text'}; it must be a part of type text"),
        ([{"role": "user", "content": [[USER]]}], "it must be a part of type text"),
        (["x" * 10**6] * 10**4, "..."),
    ],
)
def test_what_is_no_question_is_refused_and_quoted(cell, told):
    assert told in refusal(question_of, cell)


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        (b"42", "42"),
        (b" $\\frac12$ ", "\\frac12"),
        (NAN, ""),
        ("nan", "nan"),
        ([b"42", NAN, 3], "42, 3"),
        (decimal.Decimal("27.00"), "27"),
        (decimal.Decimal("1E+2"), "100"),
    ],
)
def test_an_answer_is_what_a_reader_finds(cell, answer):
    assert normalize_answer(cell) == answer


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ({"value": "7"}, "is {'value': '7'}; it must be text, a number or a list of them"),
        ([{"value": "7"}], "is {'value': '7'}; it must be text"),
        ([["1", "2"], ["3"]], "is [['1', '2'], ['3']]; it must be text"),
        (b"\xe9", r"is b'\xe9'; it must be text in UTF-8"),
        ([b"\xe9"], r"is b'\xe9'; it must be text in UTF-8"),
        (False, "is False; it must be text, a finite number"),
        (-math.inf, "is -inf; it must be text, a finite number"),
        (datetime.timedelta(1), "is datetime.timedelta(days=1); it must be text"),
    ],
)
def test_what_is_no_answer_is_refused_and_quoted(cell, told):
    assert told in refusal(normalize_answer, cell)


def test_a_number_of_any_size_is_one():
    assert plain(10**5000) == 10**5000
    assert plain(1e308) == 1e308


@pytest.mark.parametrize("cell", [3, ["text"], USER])
def test_text_is_nothing_else(cell):
    assert "text in UTF-8" in refusal(text_of, cell)


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("olympiadbench", {"question": b"Q", "context": b"Let.", "final_answer": [b"7"]}, ("Let.\n\nQ", "7")),
        ("olympiadbench", {"question": "Q", "context": NAN, "final_answer": ["7"]}, ("Q", "7")),
        ("minerva", {"problem": "Q", "solution": rb"So \boxed{7}."}, ("Q", "7")),
        ("dapo-math-17k", {"prompt": [USER], "reward_model": {"ground_truth": b"7"}}, ("Q", "7")),
    ],
)
def test_every_column_that_becomes_text_is_read_alike(name, row, expected):
    example = datasets[name].example(row)
    assert (example.question, example.answer) == expected


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("olympiadbench", {"question": "Q", "context": ["x"], "final_answer": ["7"]}, "column 'context' is ['x']"),
        ("minerva", {"problem": "Q", "solution": [r"\boxed{7}"]}, r"column 'solution' is ['\\boxed{7}']"),
        ("minerva", {"problem": "Q", "Answer": {"value": "7"}}, "column 'answer' is {'value': '7'}"),
        ("dapo-math-17k", {"prompt": 3, "answer": 7}, "column 'prompt' is 3"),
        ("dapo-math-17k", {"prompt": "Q", "reward_model": {"ground_truth": {}}}, "'reward_model.ground_truth' is {}"),
    ],
)
def test_a_refused_cell_is_named_by_its_column(name, row, told):
    assert told in refusal(datasets[name].example, row)


@pytest.mark.parametrize(
    "row", [{"problem": "Q", "answer": NAN}, {"problem": NAN, "answer": 1}, {"problem": "Q", "solution": NAN}]
)
def test_nan_is_an_empty_cell(row):
    assert datasets["math500"].example(row) is None
