import csv
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcjax.rewards.boxed import MAX_ANSWER_LENGTH
from dcjax.rewards.math import ANSWER_LINE_WINDOW, answer_line_reward, math_reward

with (Path(__file__).parent / "verdicts.tsv").open(encoding="utf-8") as file:
    VERDICTS = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

FRACTIONS = st.fractions(-99, 99, max_denominator=99)


def reward(answer, gold):
    return math_reward(rf"So it is $\boxed{{{answer}}}$.", gold, finished=True)


def line(text, gold="34"):
    return answer_line_reward(text, gold, finished=True)


def latex(fraction):
    sign = "-" if fraction < 0 else ""
    return rf"{sign}\frac{{{abs(fraction.numerator)}}}{{{fraction.denominator}}}"


@pytest.mark.parametrize("category", sorted({row["category"] for row in VERDICTS}))
def test_verdicts_and_the_known_deviations_of_math_verify(category):
    for row in VERDICTS:
        if row["category"] == category:
            text = row["answer"] if category == "response" else rf"\boxed{{{row['answer']}}}"
            assert math_reward(text, row["gold"], finished=True) == float(row["actual"]), row


def test_the_table_of_verdicts_is_whole():
    pairs = [(row["category"], row["answer"], row["gold"]) for row in VERDICTS]
    assert len(pairs) == len(set(pairs)) >= 200
    for row in VERDICTS:
        assert {row["expected"], row["actual"]} <= {"0", "1"}, row
        assert bool(row["note"]) == (row["expected"] != row["actual"]), row


def test_every_deviation_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    for row in VERDICTS:
        if row["note"]:
            assert f"`{row['answer']}`" in page and f"`{row['gold']}`" in page, row


@settings(max_examples=50)
@given(FRACTIONS, FRACTIONS)
def test_fractions_are_equal_when_their_values_are(answer, gold):
    assert reward(latex(answer), latex(gold)) == float(answer == gold)
    assert reward(latex(gold), f"{gold.numerator}/{gold.denominator}") == 1.0


@settings(max_examples=20)
@given(st.sets(st.integers(-99, 99), min_size=2, max_size=5), st.randoms())
def test_sets_have_no_order(elements, draw):
    shuffled = sorted(elements)
    draw.shuffle(shuffled)
    assert (
        reward(r"\{" + ",".join(map(str, shuffled)) + r"\}", r"\{" + ",".join(map(str, sorted(elements))) + r"\}")
        == 1.0
    )


@given(st.integers(), st.integers())
def test_integers_are_equal_when_their_values_are(answer, gold):
    assert reward(f"{answer:+05d}", str(gold)) == float(answer == gold)
    assert reward(str(gold), f"{gold:+05d}") == 1.0


def test_integers_do_not_need_math_verify():
    code = (
        "import sys; from dcjax.rewards.math import *\n"
        r"assert math_reward('\\boxed{ 7 }', '7', finished=True) and not math_reward('x', '1/2', finished=True)"
        "\nassert not any(name in sys.modules for name in ('math_verify', 'sympy', 'jax'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_response_without_its_end_token_earns_nothing():
    assert math_reward(r"\boxed{\frac12}", "0.5", finished=False) == 0.0
    assert answer_line_reward("Answer: 34", "34", finished=False) == 0.0


def test_an_answer_may_have_so_many_characters():
    ones = "+".join("1" * 99)  # 197 characters
    assert reward(ones, "99") == 1.0
    assert reward(ones + " " * (MAX_ANSWER_LENGTH - len(ones)), "99") == 1.0
    assert reward(ones + " " * (MAX_ANSWER_LENGTH - len(ones) + 1), "99") == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        *["2^{2^{2^{2}}}", "2^{1000000}", "2^1000000", "2^{-1000000}", "1000000!", "(3!)!", "3!!"],
        *["7\x00", "\x077", "\ud8007", "7\u202e", "(" * 21 + "7" + ")" * 21, "{" * 21 + "7" + "}" * 21],
    ],
)
def test_what_is_hostile_is_not_looked_at(answer):
    assert reward(answer, "not { readable") == 0.0


@pytest.mark.parametrize("answer", ["2^{2^{2}}", "2^{99999}", "999!", "(3!)", "七", "(" * 20 + "7" + ")" * 20])
def test_what_is_not_hostile_is(answer):
    with pytest.raises(ValueError, match=r"gold is 'not { readable', which math-verify cannot read; give a number or"):
        reward(answer, "not { readable")


def test_a_gold_answer_may_look_hostile():
    assert reward("2^{1000000}", "2^{1000000}") == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "Answer: 34",
        "so\nAnswer: 34\n",
        "Answer: 34.",
        "Answer: $34$",
        "Answer: $34.$",
        "Answer: $$34$$.",
        r"Answer: \(34\)",
        r"Answer: \[34\].",
        r"Answer: $\boxed{34}$",
        r"Answer: \boxed{34}.",
        "**Answer: 34**",
        "**Answer:** 34",
        "**Answer:** **$34$**.",
        "ANSWER:34",
        "answer : 34\r\n",
        "Answer: 33\nAnswer: 34",
        "The Answer: 34",
        r"Answer: $\frac{68}{2}$",
        "Answer: 34" + "\n" * (ANSWER_LINE_WINDOW - len("Answer: 34")),
        "Answer: 3\n" * 100_000 + "Answer: 34",
    ],
)
def test_answer_lines_that_are_right(text):
    assert line(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "34",
            r"\boxed{34}",
            "Answer 34",
            "Answer:",
            "Answer: ",
            "Answer:\n34",
            "Answer: 35",
            "Answer: .34",
            "Answer: $",
        ],
        *[
            "Answer: 34\nAnswer: 33",
            "Answer: 34 or 35",
            r"Answer: 34\boxed{35}",
            r"\boxed{34} Answer: \boxed{",
            "Answer: $$",
        ],
        "Answer: 34" + "\n" * (ANSWER_LINE_WINDOW - len("Answer: 34") + 1),
        "Answer: " + "0" * ANSWER_LINE_WINDOW + "34",
    ],
)
def test_answer_lines_that_are_not(text):
    assert line(text) == 0.0
