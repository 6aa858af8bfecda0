import numpy as np
import pytest

from dcjax.rewards.in_process import InProcessRewards, load_reward
from dcjax.rewards.math import math_reward

TEXTS, GOLDS, FINISHED = [r"\boxed{7}", r"\boxed{8}", r"\boxed{7}"], ["7", "7", "7"], np.array([True, True, False])


def test_answers_are_scored_here_in_their_order():
    scorer = InProcessRewards(math_reward)
    scores = scorer.submit(TEXTS, GOLDS, FINISHED).result()
    assert scores.dtype == np.float32 and scores.tolist() == [1.0, 0.0, 0.0]
    assert scorer.counters is None


def test_as_many_of_each_are_needed():
    with pytest.raises(ValueError, match="shorter"):
        InProcessRewards(math_reward).submit(TEXTS, GOLDS[:2], FINISHED)


def test_a_reward_is_found_by_its_name():
    assert load_reward("dcjax.rewards.math:math_reward") is math_reward


def test_a_module_that_merely_lies_somewhere_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "my_reward_for_this_test.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="nor in an installed package; a function of your own stands in a recipe"):
        load_reward("my_reward_for_this_test:judge")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere:judge", "nor in an installed package"),
        ("os:system", "nor in an installed package"),
        ("subprocess:run", "nor in an installed package"),
        ("dcjax.rewards.nowhere:judge", "No module named 'dcjax.rewards.nowhere'"),
        ("dcjax.rewards.math:judge", "has no attribute 'judge'"),
        ("dcjax.rewards.math", "is not MODULE:NAME"),
        ("", "is not MODULE:NAME"),
        ("dcjax.rewards.math:ANSWER_LINE_WINDOW", "a int; it must be a function"),
    ],
)
def test_what_is_no_reward_is_quoted_with_what_would_be(name, why):
    with pytest.raises(ValueError, match=r"reward\.function is ") as caught:
        load_reward(name)
    assert repr(name) in str(caught.value) and why in str(caught.value)


def test_verdicts_that_are_no_floats_count_as_numbers():
    rewards = InProcessRewards(lambda text, gold, *, finished: text == gold)
    assert rewards.submit("ab", "aa", [True] * 2).result().tolist() == [1.0, 0.0]
