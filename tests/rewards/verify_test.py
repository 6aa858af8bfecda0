import pytest
from sympy.core import random

from dcjax.rewards.verify import WARM_UP, equal, warm_up


def test_what_warms_up_is_read():
    warm_up()
    for answer in WARM_UP:
        assert equal(f"{answer} ", answer)


def test_the_gold_answer_comes_first():
    """The comparison is asymmetric: only a gold inequality is turned into an interval."""
    assert equal(r"(2,\infty)", "x>2") and not equal("x>2", r"(2,\infty)")


def test_random_points_are_the_same_whatever_was_drawn_before():
    drawn = []
    for seed in (1, 2):
        random.seed(seed)
        equal.cache_clear()
        assert not equal("x+1", "x+2")
        drawn.append(random.rng.random())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("gold", ["", " ", "{", r"\frac{1}", "七"])
def test_a_gold_answer_that_cannot_be_read_is_an_error(gold):
    with pytest.raises(ValueError, match="which math-verify cannot read; give a number or LaTeX: '7', "):
        equal("7", gold)
