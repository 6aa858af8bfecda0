"""Where an answer stands and when it is right: tables worked by hand, and hostile texts."""

import itertools
import time

import pytest

from dcjax.data.templates import templates
from dcjax.rewards.answers import COMPARISONS, LONGEST, PLACES, check_gold, judge


@pytest.mark.parametrize(
    "place, text, answer",
    [
        ("tags", "<answer>1</answer> no: <answer> 2 </answer>.", "2"),
        ("tags", "<answer>1</answer> then <answer>2", None),
        ("tags", "</answer>3<answer>", None),
        ("tags", "<answer></answer>", None),
        ("tags", "<answer><answer>4</answer></answer>", "4"),
        ("last_line", "first\n  42  \n\n", "42"),
        ("last_line", "42", "42"),
        ("last_line", "\n \n", None),
        ("bare", "  a\nb ", "a\nb"),
        ("bare", "", None),
        ("boxed", r"\boxed{1} \boxed{2}", "2"),
        ("dapo", "Answer: 7", "7"),
        ("bare", "x" * (LONGEST + 1), None),
        ("last_line", "1\n" + "x" * (LONGEST + 1), None),
    ],
)
def test_an_answer_is_found_where_it_should_stand(place, text, answer):
    assert PLACES[place](text) == answer


@pytest.mark.parametrize(
    "comparison, answer, gold, right",
    [
        ("math", r"\frac{1}{2}", "0.5", True),
        ("math", "8", "9", False),
        ("exact", " a  b\nc", "a b c", True),
        ("exact", "A b c", "a b c", False),
        ("integer", "**$1,234$**", "1234", True),
        ("integer", "+007.", "7", True),
        ("integer", "-3", "-3", True),
        ("integer", "12,34", "1234", False),
        ("integer", "3-0", "3", False),
        ("integer", "7.0", "7", False),
        ("integer", "٧", "7", False),
        ("choice", "(b)", "B", True),
        ("choice", "B. twelve", "b", True),
        ("choice", "**C**", "C", True),
        ("choice", r"\text{D}", "D", True),
        ("choice", "Because", "B", False),
        ("choice", "A", "B", False),
        ("choice", "", "B", False),
        ("regex", "ab12", r"[a-z]+\d+", True),
        ("regex", "ab12!", r"[a-z]+\d+", False),
    ],
)
def test_answers_are_compared_as_the_table_says(comparison, answer, gold, right):
    assert COMPARISONS[comparison](answer, gold) is right


@pytest.mark.parametrize("place, comparison", list(itertools.product(PLACES, COMPARISONS)))
def test_each_place_goes_with_each_comparison(place, comparison):
    shown = templates[place].show("B" if comparison == "choice" else "7")
    gold = "B" if comparison == "choice" else "7"
    assert judge(shown, gold, finished=True, place=place, comparison=comparison) == 1.0
    assert judge(shown, gold, finished=False, place=place, comparison=comparison) == 0.0
    assert judge("", gold, finished=True, place=place, comparison=comparison) == 0.0


@pytest.mark.parametrize(
    "gold, comparison, told",
    [
        ("twelve", "integer", "the answer is 'twelve'; for comparison 'integer' it must be an integer in digits"),
        ("because", "choice", "it must be the letter of an option, such as B"),
        ("(", "regex", "it must be a regular expression"),
    ],
)
def test_golds_that_no_response_could_give_are_refused(gold, comparison, told):
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        check_gold(gold, comparison)


HOSTILE = [
    "<answer>" * 100_000,
    "<answer>" + "9" * 1_000_000 + "</answer>",
    "\\boxed{" * 100_000,
    "Answer: " * 50_000,
    "(" * 200_000,
    "\n" * 300_000,
    "B" + ")" * 100_000,
    "$*`" * 100_000,
    "1,000" * 60_000,
    "\ud800\0<answer>\ud800</answer>",
]


@pytest.mark.parametrize("comparison", ["exact", "integer", "choice"])
def test_hostile_text_is_wrong_and_cheap(comparison):
    """Bounds are far above what these take, and far below what quadratic work would."""
    for text, place in itertools.product(HOSTILE, PLACES):
        began = time.process_time()
        assert judge(text, "7", finished=True, place=place, comparison=comparison) == 0.0
        assert time.process_time() - began < 2
