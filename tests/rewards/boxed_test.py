import logging
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import math_verify
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.rewards.boxed import MAX_ANSWER_LENGTH, boxed_answer, integer_reward, last_box

BRACE_TEXT = st.lists(st.sampled_from([r"\boxed{", "{", "}", "\\", "7", "-", " "])).map("".join)


def reward(text, gold="7"):
    return integer_reward(text, gold, finished=True)


def verified_directly(content, gold):
    """math-verify's own opinion, with its defaults and nothing in between."""
    return math_verify.verify(math_verify.parse(rf"\boxed{{{gold}}}"), math_verify.parse(rf"\boxed{{{content}}}"))


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{7}", "7"),
        (r"so it is \boxed{7}.", "7"),
        (r"\boxed{7} or \boxed{8}", "8"),
        (r"\boxed{1+\boxed{7}+2}", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{}", ""),
        (r"\boxed{ 7 }", " 7 "),
        (r"\\boxed{7}", "7"),
        (r"\boxed{7}}}}", "7"),
        ("\\boxed{7\n}", "7\n"),
        ("", None),
        ("7", None),
        (r"\boxed 7", None),
        (r"\boxed {7}", None),
        ("boxed{7}", None),
        (r"\fbox{7}", None),
        (r"\boxed{7", None),
        (r"\boxed{", None),
        (r"\boxed{{7}", None),
        (r"\boxed{7\}", None),
        (r"\boxed{7} then \boxed{8", None),
    ],
)
def test_the_content_of_the_last_box(text, content):
    assert boxed_answer(text) == content


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed {7}", "7"),
        ("\\boxed \n\t{7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\fbox {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1+\fbox{7}+2}", "7"),
        (r"\fbox{1} and \boxed{7}", "7"),
        (r"\boxed 7", "7"),
        ("\\boxed\n7\n", "7"),
        (r"\boxed -0.5 m", "-0.5"),
        (r"\boxed 1/2$", "1/2"),
        (r"\boxed{\boxed 7}", "7"),
        (r"\boxed 7. So", "7."),
        (r"\boxed{7} in a \boxed form", "7"),
        (r"\boxed{7} in \boxed.", "7"),
        (r"\boxed{7} in \boxedform{8}", "7"),
        (r"\boxed 7x", None),
        (r"\boxed7", None),
        (r"\boxed x", None),
        (r"\boxed", None),
        (r"\fbox ", None),
        (r"\boxed ...", None),
        ("boxed{7}", None),
        (r"\boxed {7", None),
        (r"\boxed " + "7" * (MAX_ANSWER_LENGTH + 1), None),
    ],
)
def test_the_last_box_however_it_is_written(text, content):
    assert last_box(text) == content


@settings(deadline=None)
@given(BRACE_TEXT)
def test_where_a_box_is_written_exactly_both_find_it(text):
    if r"\boxed{" in text:
        assert last_box(text) == boxed_answer(text)


@pytest.mark.parametrize("text", [r"\boxed {7}", r"\boxed 7", "\\boxed\n{7}", r"\fbox{7}"])
def test_a_box_that_is_not_written_exactly_earns_nothing_of_integers(text):
    assert reward(text) == 0.0


def test_contents_up_to_the_longest():
    assert boxed_answer(rf"\boxed{{{'7' * MAX_ANSWER_LENGTH}}}") == "7" * MAX_ANSWER_LENGTH
    assert boxed_answer(rf"\boxed{{{'7' * (MAX_ANSWER_LENGTH + 1)}}}") is None


@settings(deadline=None)
@given(BRACE_TEXT, st.text(alphabet="0123456789+- ", max_size=20), st.text(alphabet="0} ", max_size=9))
def test_a_box_is_found_after_anything(before, content, after):
    text = rf"{before}\boxed{{{content}}}{after}"
    assert boxed_answer(text) == content


@settings(deadline=None)
@given(BRACE_TEXT)
def test_what_is_found_is_balanced_and_in_the_last_box(text):
    content = boxed_answer(text)
    if content is not None:
        assert text.rpartition(r"\boxed{")[2].startswith(content + "}")
        assert r"\boxed{" not in content
        braces = content.replace(r"\\", "").replace(r"\{", "").replace(r"\}", "")
        assert braces.count("{") == braces.count("}")


@pytest.mark.parametrize(
    "unit",
    [
        r"\boxed ",
        r"\boxed 7",
        r"\fbox{",
        " ",
        r"\boxed{",
        "{",
        "}",
        "\\",
        r"\boxed",
        r"\boxed{7}",
        r"\boxed{{",
        "\\b",
        "a",
        "7",
        "\\boxed{\n",
    ],
)
@pytest.mark.parametrize("ending", ["", "}", r"\boxed{", r"\boxed{7}"])
def test_two_megabytes_of_anything_take_no_time(unit, ending):
    text = unit * (2_000_000 // len(unit)) + ending
    began = time.process_time()
    boxed_answer(text)
    last_box(text)
    integer_reward(text, "8", finished=True)
    # A few milliseconds in truth. What is quadratic takes hours, and what recurses overflows the stack.
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize("content", ["7", "007", "+7", "+007", "0" * (MAX_ANSWER_LENGTH - 1) + "7"])
def test_integers_equal_to_seven(content):
    assert reward(rf"3+4=7,\boxed{{{content}}}") == 1.0


@pytest.mark.parametrize(
    "content",
    [
        *["8", "-7", "70", "77", "", "+", "-", "+-7", "--7", "- 7", " 7", "7 ", "7\n", "7\n7", "7\x00"],
        *["7.0", "7.", "7e0", "0x7", "0_7", "7,", "7_8", r"7\%", "{7}", "x", "x=7", "7=7", "seven"],
        *["14/2", r"\frac{14}{2}", "0" * MAX_ANSWER_LENGTH + "7"],
        "\N{FULLWIDTH DIGIT SEVEN}",
        "\N{ARABIC-INDIC DIGIT SEVEN}",
        "\N{DEVANAGARI DIGIT SEVEN}",
        "\N{SUPERSCRIPT SEVEN}",
        "\N{ROMAN NUMERAL SEVEN}",
        "\N{FULLWIDTH PLUS SIGN}7",
        "7\N{ZERO WIDTH SPACE}",
    ],
)
def test_anything_else_is_not_seven(content):
    assert reward(rf"\boxed{{{content}}}") == 0.0


@pytest.mark.parametrize("content", ["0", "-0", "+0", "00"])
def test_integers_equal_to_zero(content):
    assert reward(rf"\boxed{{{content}}}", gold="0") == 1.0
    assert reward(rf"\boxed{{{content}}}", gold="7") == 0.0


def test_negative_and_long_integers():
    assert reward(r"\boxed{-12}", gold="-12") == 1.0
    assert reward(r"\boxed{12}", gold="-12") == 0.0
    assert reward("\\boxed{\N{MINUS SIGN}12}", gold="-12") == 0.0
    long = "1" + "0" * (MAX_ANSWER_LENGTH - 1)
    assert reward(rf"\boxed{{{long}}}", gold=long) == 1.0
    assert reward(rf"\boxed{{{long[:-1]}1}}", gold=long) == 0.0  # equal as a float, and as a decimal of 15 digits


def test_the_question_in_the_box_earns_nothing_although_it_verifies():
    assert verified_directly("12-4", gold="8")
    assert reward(r"\boxed{12-4}", gold="8") == 0.0
    for problem in ArithmeticTask().problems("train", 0, 0, 3):
        question = problem.prompt.removesuffix("=")
        assert verified_directly(question, gold=problem.answer)
        assert reward(rf"\boxed{{{question}}}", gold=problem.answer) == 0.0


def test_only_the_last_box_counts():
    assert reward(r"\boxed{7} no, \boxed{8}") == 0.0
    assert reward(r"\boxed{8} no, \boxed{7}") == 1.0
    assert reward(r"\boxed{7} no, \boxed{8") == 0.0
    assert reward("the answer is 7") == 0.0


def test_a_response_without_its_end_token_earns_nothing():
    assert integer_reward(r"\boxed{7}", "7", finished=False) == 0.0


def test_right_responses_of_the_task_earn_one():
    for split in ("train", "heldout"):
        for problem in ArithmeticTask().problems(split, 1, 0, 20):
            for scratchpad in (False, True):
                assert reward(problem.response(scratchpad), problem.answer) == 1.0
                assert reward(problem.response(scratchpad), str(int(problem.answer) + 1)) == 0.0


@settings(deadline=None, max_examples=100)
@given(st.integers(-(10**40), 10**40), st.integers(-(10**40), 10**40))
def test_equality_is_that_of_integers(answer, gold):
    assert reward(rf"\boxed{{{answer}}}", str(gold)) == float(answer == gold)
    assert reward(rf"\boxed{{{gold}}}", str(gold)) == 1.0


def test_a_gold_answer_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="gold is '', which math-verify cannot read; give a number"):
        reward(r"\boxed{7}", gold="")


def test_it_works_outside_the_main_thread():
    answers = [str(900_000 + i) for i in range(64)]  # none remembered
    with ThreadPoolExecutor(4) as pool:
        right = list(pool.map(lambda answer: reward(rf"\boxed{{{answer}}}", answer), answers))
        wrong = list(pool.map(lambda answer: reward(rf"\boxed{{{answer}}}", "7" + answer), answers))
    assert right == [1.0] * 64 and wrong == [0.0] * 64


def test_it_pickles_for_worker_processes():
    assert pickle.loads(pickle.dumps(integer_reward)) is integer_reward


def test_math_verify_stays_quiet(caplog, capfd):
    with caplog.at_level(logging.WARNING):
        reward(r"\boxed{123457}", "123456")
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_importing_rewards_does_not_import_math_verify():
    code = "import sys, dcjax.rewards.boxed; sys.exit('math_verify' in sys.modules or 'sympy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
