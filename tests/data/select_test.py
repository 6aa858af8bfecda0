import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.data.datasets import Example
from dcjax.data.select import is_english_integer, listed, select, share_of


def examples(count):
    return [Example(f"{number:012x}", f"question {number}", str(number), "aime24") for number in range(count)]


PERCENTAGES = st.integers(1, 1000).map(lambda tenths: tenths / 10)


@given(st.integers(0, 300), PERCENTAGES, PERCENTAGES)
def test_smaller_shares_lie_within_larger_ones(count, one, other):
    small, large = sorted((one, other))
    everything = examples(count)
    inner, outer = (share_of(everything, f"{percent}%") for percent in (small, large))
    assert set(inner) <= set(outer) <= set(everything)
    assert len(outer) == round(count * large / 100)
    assert outer == sorted(outer, key=everything.index)


@given(st.permutations(examples(20)))
def test_a_share_does_not_depend_on_the_order_of_the_rows(shuffled):
    assert set(share_of(shuffled, "25%")) == set(share_of(examples(20), "25%"))


def test_shares_are_the_same_on_every_machine_and_even():
    chosen = [int(example.answer) for example in share_of(examples(1000), "25%")]
    assert chosen[:5] == [3, 11, 15, 28, 31]
    # each half has a quarter of its 500, with a standard deviation of 6.8
    assert abs(sum(number < 500 for number in chosen) - 125) < 4 * 6.8


@pytest.mark.parametrize("subset", ["", "25", "0%", "100.5%", "-5%", "half", "ALL", "25 %"])
def test_an_unknown_subset_is_an_error(subset):
    with pytest.raises(ValueError, match=f"subset is {subset!r}; it must be all, or a percentage such as 25% or 2.5%"):
        share_of([], subset)


@pytest.mark.parametrize(
    "question, answer, kept",
    [
        ("How many?", "12", True),
        ("How many?", "-12", True),
        ("How many?", "0.5", False),
        ("How many?", r"\frac12", False),
        ("How many?", "１２", False),
        ("Poincaré's α – how many?", "12", True),
        ("有多少种?", "12", False),
        ("How many in 北京?", "12", False),
        ("How many\uff1f", "12", False),
    ],
)
def test_what_is_english_with_an_integer_answer(question, answer, kept):
    assert is_english_integer(Example("", question, answer, "dapo-math-17k")) == kept


def test_a_list_of_ids_decides_what_is_taken_and_in_which_order(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text(f"{5:012x}\n{2:012x}\n", encoding="utf-8")
    assert [example.answer for example in listed(examples(6), path)] == ["5", "2"]
    with pytest.raises(ValueError, match=re.escape(f"{path} lists '{5:012x}', which is none of the 5 examples' ids")):
        listed(examples(5), path)


@pytest.mark.parametrize("text", ["", "0\n0\n"])
def test_a_list_must_name_examples_once(text, tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="must list at least one id, and none twice"):
        listed([Example("0", "x", "1", "aime24")], path)


def test_a_list_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "ids.txt").write_bytes(b"\xff0\n")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/ids\.txt is not UTF-8"):
        listed(examples(5), tmp_path / "ids.txt")


def chosen(**changes):
    """Of the questions "1", "22", ..., "999999999", the odd ones in Chinese; a prompt is as long as its question."""
    pool = [Example(f"{n:012x}", str(n) * n if n % 2 else "问" * n, str(n), "dapo-math-17k") for n in range(1, 10)]
    settings = {"questions": "all", "index_file": None, "max_length": 100, "subset": "all"}
    lengths = lambda taken: [len(example.question) for example in taken]  # noqa: E731
    left, counts = select(pool, lengths=lengths, **(settings | changes))
    return [int(example.answer) for example in left], list(counts.items())


def test_every_step_of_the_selection_counts_what_it_left(tmp_path):
    assert chosen() == (list(range(1, 10)), [("examples", 9), ("max_prompt_tokens", 9), ("subset", 9)])
    odd, counts = chosen(questions="english_integer", max_length=7)
    assert odd == [1, 3, 5, 7]
    assert counts == [("examples", 9), ("english_integer", 5), ("max_prompt_tokens", 4), ("subset", 4)]
    half, counts = chosen(questions="english_integer", max_length=7, subset="50%")
    assert set(half) < set(odd) and counts[-1] == ("subset", 2)


def test_a_list_stands_in_place_of_the_filter_but_not_of_the_length(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("".join(f"{n:012x}\n" for n in (8, 2, 3)), encoding="utf-8")
    left, counts = chosen(questions="english_integer", index_file=path, max_length=7)
    assert left == [2, 3]
    assert counts == [("examples", 9), ("index_file", 3), ("max_prompt_tokens", 2), ("subset", 2)]
