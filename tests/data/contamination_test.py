import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcjax.data.contamination import Golds, box, check_golds, find_overlap, words
from dcjax.data.datasets import SAMPLES, Example, datasets
from dcjax.data.sources import find_files, read_examples
from dcjax.rewards.math import math_reward


def examples(*questions, dataset="aime24", answer="1"):
    return [Example(f"{dataset}-{number}", text, answer, dataset) for number, text in enumerate(questions)]


def samples(name):
    return read_examples(datasets[name], find_files(datasets[name], SAMPLES))[0]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Find $x_1$, the ROOT!", ["find", "x", "1", "the", "root"]),
        (r"\frac{3}{4}", ["frac", "3", "4"]),
        ("求2个数ab", ["求", "2", "个", "数", "ab"]),
        ("ﬁve １２", ["five", "12"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_overlap_worked_by_hand():
    train = examples("a b c d e", "x y z", "Q R S T", "m n", dataset="dapo-math-17k")
    evaluation = examples("A, b: c d e?", "0 x y z 0", "s t u v", "m n o")
    overlap = find_overlap(train, evaluation, n=3)
    assert (overlap.dataset, overlap.examples) == ("aime24", 4)
    assert overlap.exact == (("dapo-math-17k-0", "aime24-0"),)
    assert overlap.ngram == (("dapo-math-17k-1", "aime24-1"),)
    assert overlap.share == 0.5
    # two words of the last question were seen, and of the third
    looser = find_overlap(train, evaluation, n=2)
    assert {other for _, other in looser.ngram} == {"aime24-1", "aime24-2", "aime24-3"} and looser.share == 1.0


TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=6).map(" ".join), min_size=1, max_size=5)


@settings(max_examples=50)
@given(TEXTS, TEXTS, st.integers(1, 4))
def test_overlap_is_that_of_comparing_every_pair(train, evaluation, n):
    def grams(text):
        return {text.split()[start : start + n].__str__() for start in range(len(text.split()) - n + 1)}

    exact, ngram = set(), set()
    for i, one in enumerate(train):
        for j, other in enumerate(evaluation):
            if one.split() == other.split():
                exact.add((f"math500-{i}", f"aime24-{j}"))
            elif grams(one) & grams(other):
                ngram.add((f"math500-{i}", f"aime24-{j}"))
    overlap = find_overlap(examples(*train, dataset="math500"), examples(*evaluation), n=n)
    assert (set(overlap.exact), set(overlap.ngram)) == (exact, ngram)


def test_the_samples_hold_one_question_twice_and_one_alike():
    found = {name: find_overlap(samples("dapo-math-17k"), samples(name)) for name in datasets}
    assert {name: len(overlap.exact) for name, overlap in found.items() if overlap.exact} == {
        "dapo-math-17k": 29,
        "amc23": 1,
    }
    assert {name: len(overlap.ngram) for name, overlap in found.items() if overlap.ngram} == {"aime24": 1}


@pytest.mark.parametrize("name", datasets)
def test_no_gold_answer_of_the_samples_is_right_for_its_neighbour(name):
    golds = samples(name)
    for one, other in zip(golds, golds[1:] + golds[:1], strict=True):
        assert not math_reward(box(one.answer), other.answer, finished=True), (one.answer, other.answer)


def test_golds_that_cannot_be_read_and_golds_that_nobody_can_give():
    one, other, third = *examples("x", answer=r"A \cap B"), *examples("y", answer="1"), *examples("z", answer="(" * 301)
    assert check_golds([one, other, third]) == Golds(unreadable=(one, third), refused=(third,))
    assert check_golds([other]) == Golds((), ())
