import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcjax.data.datasets import normalize_answer
from dcjax.rewards import verify
from dcjax.rewards.boxed import MAX_ANSWER_LENGTH
from dcjax.rewards.math import ANSWER_LINE_WINDOW, _is_hostile, answer_line_reward, math_reward, readable
from dcjax.rewards.numbers import read_number
from dcjax.rewards.spelling import spell

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


# inputs from published data and reports, with the verdict that a reader would give
FIELD = [
    *[
        ("5.", "5.", 1),
        ("np.arcsin(10/13)", "np.arcsin(10/13)", 1),
        ("-1./3", "-1./3", 1),
        (r"-\frac{1}{3}", "-1./3", 1),
    ],
    *[("-1.5", "-3./2", 1), (r"A \cap B", r"A \cap B", 1), (r"A\cap B", r"A \cap B", 1), (r"A \cup B", r"A \cap B", 0)],
    *[(r"\|v\|", r"\|v\|", 1), (r"4.5\times10^{33}", "4.5e33", 1), ("4.5e33", r"4.5\times 10^{33}", 1)],
    *[
        ("24e", "3e8", 0),
        ("24e", "4.5e33", 0),
        (r"3\times10^{8}", "3e8", 1),
        ("0.00003", 3e-05, 1),
        ("10^{16}", 1e16, 1),
    ],
    *[("27", 27.0, 1), ("0.3", 0.1 + 0.2, 1), (r"5\times10^{-324}", 5e-324, 1), ("10^{300}", 1e300, 1)],
    *[(r"2\times10^{-19}", "10^{-19}", 0), (r"1.6\times10^{-20}", r"1.6\times10^{-19}", 0)],
    *[(r"1.6\times10^{-19}", "1.6e-19", 1), ("0.0000012", "0.0000014", 0), (r"\frac{1}{m}", r"\frac{1}{m} t", 0)],
    *[(r"\frac{t}{m}", r"\frac{1}{m} t", 1), ("14.0-1.0i", "14-i", 1)],
]


@pytest.mark.parametrize("answer, gold, right", FIELD)
def test_answers_and_golds_of_the_field(answer, gold, right):
    assert reward(answer, normalize_answer(gold)) == right


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        # small numbers within something else, and numbers that are no literals
        *[(r"\{2\times10^{-19}\}", r"\{10^{-19}\}", 0), (r"(2\times10^{-19},1)", r"(10^{-19},1)", 0)],
        *[(r"[2\times10^{-19},1)", r"[10^{-19},1)", 0), (r"x=2\times10^{-19}", "x=10^{-19}", 0)],
        *[(r"(1.6\times10^{-19},1)", "(1.6e-19,1)", 1), (r"x=1.6\times10^{-19}", "x=1.6e-19", 1)],
        *[(r"\sqrt{3}\times10^{-19}", r"\sqrt{2}\times10^{-19}", 0), (r"\pi\times10^{-9}", r"\pi\times10^{-8}", 0)],
        *[(r"2^{1/2}\times10^{-19}", r"\sqrt{2}\times10^{-19}", 1), ("0.00000141", r"\sqrt{2}\times10^{-6}", 0)],
        *[("3.14159265e-10", r"\pi\times10^{-10}", 1), (r"1.41421356\times10^{30}", r"\sqrt{2}\times10^{30}", 1)],
        (r"\begin{pmatrix}2\times10^{-19}\\1\end{pmatrix}", r"\begin{pmatrix}10^{-19}\\1\end{pmatrix}", 0),
        # e, a number's exponent or Euler's
        *[
            ("1.5e3x", "1500x", 1),
            ("(1e3,2)", "(1000,2)", 1),
            ("2e-3", "-3+2e", 1),
            ("2e-3", "0.002", 1),
            ("e", "e^1", 1),
        ],
        # letters at the end
        *[("3", "3t", 0), ("3t", "t3", 1), ("3", "3ab", 0), ("3ab", "3ba", 1), (r"\frac{1}{2} t", r"\frac{1}{2}", 0)],
        *[
            ("5 m", "5", 1),
            ("5 cm", "5", 1),
            ("5", "5 m", 0),
            ("5th", "5", 1),
            ("m", "m g h", 0),
            ("mgh", "m g h", 1),
            ("2", "2 a x", 0),
            ("a+b", "( a + b )", 1),
            ("2.3", "2.3 e 2", 0),
            (r"x^{2}\text{ m}", "x^{2}", 1),
        ],
        # i after a digit and alone
        *[("3-1i", "3-i", 1), (r"3+i\cdot4", "3+4i", 1)],
        # nothing is equal to what divides by zero, but its own text
        *[(r"\frac{5}{0}", r"\frac{5}{0}", 1), (r"\frac{5}{0}", r"\frac{4}{0}", 0), ("0.5", r"\frac{5}{0}", 0)],
    ],
)
def test_more_of_the_kind(answer, gold, right):
    assert reward(answer, gold) == right


GOLDS = [row["gold"] for row in VERDICTS] + [gold for _, gold, _ in FIELD if isinstance(gold, str)]


@pytest.mark.parametrize(
    "gold", sorted({*GOLDS, "{", "\\", r"\frac{1}", "七", "2^{1000000}", "(" * 30 + ")" * 30, "\u202e7"})
)
def test_identical_text_is_right(gold):
    boxed = rf"\boxed{{{gold}}}"
    # braces without a match are no box
    expected = 0.0 if gold in ("{", "\\") else 1.0
    assert math_reward(boxed, gold, finished=True) == expected


@pytest.mark.parametrize("gold", ["A \\cap B", r"\|v\|", "np.arcsin(10/13)", "2^{1000000}", r"\frac{5}{0}", "{", ""])
def test_of_golds_that_cannot_be_read_no_other_spelling_is_right(gold):
    assert not readable(gold)
    assert [reward(answer, gold) for answer in ("1", "x", "{}", r"\frac{1}{2}")] == [0.0] * 4


@pytest.mark.parametrize("gold", ["5.", "-1./3", "4.5e33", "1e999999999999", r"\frac{1}{m} t", "14-i", "x>2", r"50\%"])
def test_golds_that_can_be_read(gold):
    assert readable(gold)


@pytest.mark.parametrize(
    "text",
    [
        *[
            r"\boxed {42}",
            r"so \boxed 42",
            r"\boxed 42 is it",
            "\\boxed\n{42}",
            r"\fbox{42}",
            r"$\boxed 42$",
            r"\(\boxed 42\)",
        ],
        *["\\boxed\n  42\n", r"\boxed 42. It", r"\boxed{42}, and so \boxed is full", r"\boxed{41} \fbox {42}"],
    ],
)
def test_boxes_however_they_are_written(text):
    assert math_reward(text, "42", finished=True) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        *["2^{2^{2^{2}}}", "2^{1000000}", "2^1000000", "2^{-1000000}", "1000000!", "(3!)!", "3!!"],
        *["2^{1e6}", "2^3e8", "2^(1000000)", r"2^{3\times10^{8}}", "10^{10^{10}}", "1e6!", "(1.5E+07)!", "(10^{6})!"],
        *["7\x00", "\x077", "\ud8007", "7\u202e", "(" * 21 + "7" + ")" * 21, "{" * 21 + "7" + "}" * 21],
    ],
)
def test_what_is_hostile_is_not_looked_at(answer, monkeypatch):
    monkeypatch.setattr(verify, "equal", None)
    assert reward(answer, "x") == 0.0
    assert not readable(answer) and reward("x", answer) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "2^{2^{2}}",
        "2^{99999}",
        "999!",
        "(3!)",
        "七",
        "(" * 20 + "7" + ")" * 20,
        r"x^2+3\times10^{8}",
        "2^{1e5}x",
        "1e9x",
    ],
)
def test_what_is_not_hostile_is(answer, monkeypatch):
    looked_at = []
    monkeypatch.setattr(verify, "equal", lambda *texts: looked_at.append(texts) or texts[0] == texts[1])
    assert reward(answer, "y") == 0.0 and looked_at[-1] == (answer, "y")


@pytest.mark.parametrize(
    "unit", ["9", "1e", "1.", "10^", "{10", "^{", "9e", "(", "1e9", "e", "3 t", r"\frac", r"\boxed "]
)
def test_telling_what_is_hostile_and_what_is_a_number_takes_no_time(unit):
    texts = [unit * (length // len(unit)) for length in (MAX_ANSWER_LENGTH, 1000)]
    began = time.process_time()
    for text in texts:
        _is_hostile(text)
        read_number(text)
        spell(text, text)
    assert time.process_time() - began < 0.5


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
        *[
            "Answer:\n34",
            "Answer:\n\n34\n",
            "**Answer:**\n34",
            "Answer: `$34$`",
            "Answer: `34`.",
            "Answer:\n$34$\nAnswer:",
        ],
        *[
            "Answer:\n$$\n34\n$$",
            "Answer:\n\\[\n34\n\\]\n",
            "Answer:\n\\boxed{34}",
            r"Answer: \fbox{34}",
            r"Answer: \boxed 34",
        ],
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
            "Answer:\n35",
            "Answer: 35",
            "Answer: .34",
            "Answer: $",
        ],
        *[
            "Answer: 34\nAnswer: 33",
            "Answer: 34 or 35",
            "Answer: $$34$$ or $$35$$",
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
