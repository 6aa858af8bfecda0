import hashlib
import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.data.datasets import DAPO_INSTRUCTIONS, datasets, find_dataset, normalize_answer
from dcjax.rewards.math import math_reward

DAPO = datasets["dapo-math-17k"]
# rows as the publishers and their mirrors have them, with the question and the answer that a reader finds in them
ROWS = {
    "DAPO as published": (
        "dapo-math-17k",
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"{DAPO_INSTRUCTIONS[0]}How many?{DAPO_INSTRUCTIONS[1]}"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "-12", "style": "rule"},
            "extra_info": {"index": "0a"},
        },
        ("How many?", "-12"),
    ),
    "DAPO processed": ("dapo-math-17k", {"prompt": "How many?", "solution": "1024"}, ("How many?", "1024")),
    "AIME with text": ("aime24", {"id": 60, "problem": "Find $N$.", "answer": "025"}, ("Find $N$.", "25")),
    "AIME in capitals": ("aime24", {"ID": "I-1", "Problem": "Find $N$.", "Answer": 25}, ("Find $N$.", "25")),
    "AIME boxed": ("aime24", {"problem": "Find $N$.", "solution": r"\boxed{025}"}, ("Find $N$.", "25")),
    "AIME25 of a mirror": ("aime25", {"question": "Find $N$.", "answer": "70"}, ("Find $N$.", "70")),
    "AMC with floats": ("amc23", {"id": 0, "question": "How far?", "answer": 27.0}, ("How far?", "27")),
    "AMC by halves": ("amc23", {"id": 0, "problem": "How far?", "answer": 4.5}, ("How far?", "4.5")),
    "MATH-500": (
        "math500",
        {"problem": "Simplify.", "solution": r"so $\boxed{1}$, or $\boxed{2}$", "answer": r"\frac{1}{2}", "level": 3},
        ("Simplify.", r"\frac{1}{2}"),
    ),
    "Minerva's solutions": (
        "minerva",
        {"problem": "What mass?", "solution": r"At first \boxed{2}, then \boxed{\frac{1}{8}}.", "type": "", "idx": 0},
        ("What mass?", r"\frac{1}{8}"),
    ),
    "Minerva's solutions in TeX's own spelling": (
        "minerva",
        {"problem": "What mass?", "solution": r"$\boxed 2$ or $\fbox{3}$"},
        ("What mass?", "3"),
    ),
    "Minerva's answers": ("minerva", {"question": "What mass?", "answer": "4e33"}, ("What mass?", "4e33")),
    "OlympiadBench": (
        "olympiadbench",
        {"question": "Compute $T$.", "context": "Let $T = 7$.", "final_answer": ["$7$"]},
        ("Let $T = 7$.\n\nCompute $T$.", "7"),
    ),
    "OlympiadBench without context": (
        "olympiadbench",
        {"question": "Compute.", "context": None, "final_answer": ["$(1,2)$", "$(3,4)$"]},
        ("Compute.", "(1,2), (3,4)"),
    ),
}


@pytest.mark.parametrize("name, row, expected", ROWS.values(), ids=ROWS)
def test_rows_of_publishers_and_mirrors(name, row, expected):
    example = datasets[name].example(row)
    assert (example.question, example.answer, example.dataset) == (*expected, name)


def test_the_id_is_of_the_question_alone():
    one = DAPO.example({"prompt": "Wie viele?", "solution": "1"})
    assert one.id == hashlib.sha256(b"Wie viele?").hexdigest()[:12]
    assert one.id == DAPO.example({"prompt": " Wie viele? ", "answer": "2"}).id
    assert one.id != DAPO.example({"prompt": "Wie viele!", "solution": "1"}).id


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " ", "solution": "1"},
        {"prompt": [], "solution": "1"},
        {"prompt": [{"role": "user"}], "solution": "1"},
        {"prompt": None, "solution": "1"},
        {"prompt": "How many?", "solution": None},
        {"prompt": "How many?", "reward_model": None},
        {"prompt": "How many?", "reward_model": {"style": "rule"}},
        {"prompt": "How many?", "reward_model": "3"},
    ],
)
def test_a_row_without_question_or_answer_is_no_example(row):
    assert DAPO.example(row) is None


def test_a_context_alone_is_no_question():
    assert datasets["olympiadbench"].example({"question": "", "context": "Let $T = 7$.", "final_answer": ["7"]}) is None


def test_a_solution_without_a_box_is_no_answer():
    assert datasets["minerva"].example({"problem": "What mass?", "solution": "It is 3."}) is None


def test_a_wrong_schema_names_the_columns_found_and_those_wanted():
    message = "math500: no column of the answer among 'problem', 'gold'; it must be one of 'answer', 'solution'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        datasets["math500"].example({"problem": "Simplify.", "gold": "1"})
    with pytest.raises(ValueError, match="no column of the question among 'text'; it must be one of 'prompt'"):
        DAPO.example({"text": "How many?"})


def test_an_unknown_name_is_an_error_that_lists_the_others():
    with pytest.raises(ValueError, match="dataset is 'gsm8k'; it must be one of dapo-math-17k, aime24, aime25, amc23"):
        find_dataset("gsm8k")


@pytest.mark.parametrize(
    "answer, text",
    [
        (27.0, "27"),
        (-3.0, "-3"),
        (0.5, "0.5"),
        ("27.0", "27"),
        ("007", "7"),
        ("000", "0"),
        ("-0", "0"),
        ("1" * 5000, "1" * 5000),
        ("+5", "5"),
        ("-012", "-12"),
        *[(1e20, "100000000000000000000"), (1e16, "10000000000000000"), (3e-05, "0.00003"), (-1.5e-7, "-0.00000015")],
        *[
            (-0.0, "0"),
            (Decimal("1E+3"), "1000"),
            (Decimal("0.10"), "0.10"),
            ([3e-05, 2.0], "0.00003, 2"),
            ("3e-05", "3e-05"),
        ],
        (" $\\frac12$ ", "\\frac12"),
        ("$1$ and $2$", "$1$ and $2$"),
        ("$", "$"),
        ("1.50", "1.50"),
        ("x.0", "x.0"),
        (["$2$", None, "", "3.0"], "2, 3"),
        ([], ""),
        (None, ""),
    ],
)
def test_answers_become_text(answer, text):
    assert normalize_answer(answer) == text


@given(st.integers())
def test_integers_keep_their_value_in_every_spelling(number):
    spellings = [number, str(number), f"${number}$", f" {number}.0", [number]]
    assert {normalize_answer(spelling) for spelling in spellings} == {str(number)}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_stored_as_a_decimal_that_is_read_back_equal_and_verifies(number):
    text = normalize_answer(number)
    assert float(text) == number and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text)
    for spelling in (repr(number), repr(number).replace("e", r"\times10^{") + "}" * ("e" in repr(number))):
        assert math_reward(rf"\boxed{{{spelling}}}", text, finished=True) == 1.0


@given(st.text())
def test_normalizing_twice_changes_nothing_that_is_left(text):
    once = normalize_answer(text)
    assert "$" in once or normalize_answer(once) == once
