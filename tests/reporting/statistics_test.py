import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dcjax.reporting.statistics import (
    bootstrap_interval,
    bootstrap_weights,
    majority_at_k,
    paired_bootstrap,
    pass_at_k,
    welch_interval,
    wilson_interval,
)


def test_half_of_ten_by_hand():
    # z = 2, n = 10, p̂ = 1/2: centre 1/2, half width 2·√(1/40 + 1/100)/(1 + 4/10).
    lower, upper = wilson_interval(5, 10, z=2.0)
    half_width = 2 * math.sqrt(0.035) / 1.4
    assert lower == pytest.approx(0.5 - half_width, abs=1e-15)
    assert upper == pytest.approx(0.5 + half_width, abs=1e-15)


def test_published_value():
    # 81 of 263: the worked example of Newcombe (1998), method 3: 0.2553 to 0.3662.
    lower, upper = wilson_interval(81, 263)
    assert (round(lower, 4), round(upper, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize("total", [1, 7, 300])
def test_ends_are_exact(total):
    # At p̂ = 0 the interval is [0, z²/(n + z²)], at p̂ = 1 its mirror image.
    z = 1.959964
    width = z * z / (total + z * z)
    assert wilson_interval(0, total) == (0.0, pytest.approx(width))
    assert wilson_interval(total, total) == (pytest.approx(1 - width), 1.0)


@pytest.mark.parametrize(("correct", "total"), [(1, 3), (30, 128), (299, 300)])
def test_bounds_solve_the_score_equation(correct, total):
    z = 1.959964
    for bound in wilson_interval(correct, total):
        assert 0 < bound < 1
        assert abs(correct / total - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / total))


def test_counts_that_are_no_proportion_raise():
    with pytest.raises(ValueError, match="total is 0"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="correct is 11"):
        wilson_interval(11, 10)
    with pytest.raises(ValueError, match="correct is -1"):
        wilson_interval(-1, 10)


# --- several samples a problem ---


@settings(max_examples=50)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_pass_at_k_is_the_share_of_all_subsets_of_k_samples_with_a_right_one(correct, k):
    subsets = list(itertools.combinations(range(6), k))
    expected = [np.mean([any(row[i] for i in subset) for subset in subsets]) for row in correct]
    np.testing.assert_allclose(pass_at_k(np.array(correct), k), expected, rtol=0, atol=1e-12)


def test_pass_at_1_is_the_mean_accuracy():
    correct = np.random.default_rng(0).random((5, 32)) < 0.3
    np.testing.assert_allclose(pass_at_k(correct, 1), correct.mean(axis=1), rtol=0, atol=1e-12)


def vote(answers):
    """The share of the right answer, "7", in a vote."""
    counts = Counter(answer for answer in answers if answer is not None)
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    return winners.count("7") / len(winners) if winners else 0.0


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["7", "8", "9", "10", None]), min_size=1, max_size=8), st.data())
def test_majority_at_k_is_the_mean_vote_over_all_subsets_of_k_samples(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    expected = np.mean([vote(subset) for subset in itertools.combinations(answers, k)])
    assert majority_at_k(answers, [answer == "7" for answer in answers], k) == pytest.approx(expected, abs=1e-12)


def test_a_vote_by_hand():
    # of 7 7 8 8 -: a tie; of three samples the five subsets 77x win, the five 88x lose, 78- are ties of four
    answers = ["7", "7", "8", "8", None]
    right = [answer == "7" for answer in answers]
    assert majority_at_k(answers, right, 5) == 0.5
    assert majority_at_k(answers, right, 3) == pytest.approx((3 * 1 + 3 * 0 + 4 * 0.5) / 10)


def test_right_answers_are_one_answer_however_they_are_spelt():
    assert majority_at_k(["1/2", "0.5", "3", "3", "3", "2/4", "0.50"], [True, True, *[False] * 3, True, True], 7) == 1.0
    assert majority_at_k([None, None], [False, False], 2) == 0.0


@pytest.mark.parametrize("k", [0, 5])
def test_k_lies_within_the_samples(k):
    with pytest.raises(ValueError, match=f"k is {k}; with 4 samples per problem it must be between 1 and 4"):
        pass_at_k(np.zeros((2, 4), bool), k)
    with pytest.raises(ValueError, match=f"k is {k}; with 4 samples"):
        majority_at_k(["1"] * 4, [True] * 4, k)


# --- intervals over problems ---


@pytest.mark.parametrize(("solved", "problems"), [(3, 30), (28, 30), (150, 272)])
def test_of_zeros_and_ones_the_interval_is_jeffreys(solved, problems):
    expected = stats.beta.ppf([0.025, 0.975], solved + 0.5, problems - solved + 0.5)
    found = bootstrap_interval([np.arange(problems) < solved])
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.005)


def test_the_interval_has_a_width_where_all_or_no_problems_are_solved():
    lower, upper = bootstrap_interval([np.ones(30)])
    assert upper == 1.0 and lower == pytest.approx(stats.beta.ppf(0.025, 30.5, 0.5), abs=0.005)
    lower, upper = bootstrap_interval([np.zeros(30)])
    assert lower == 0.0 and upper == pytest.approx(stats.beta.ppf(0.975, 0.5, 30.5), abs=0.005)


def test_an_average_of_two_sets_varies_less_than_either():
    rng = np.random.default_rng(0)
    parts = [rng.beta(0.5, 0.5, 100), rng.beta(0.5, 0.5, 100)]
    widths = [np.diff(bootstrap_interval([part])) for part in parts]
    lower, upper = bootstrap_interval(parts)
    assert upper - lower == pytest.approx(np.hypot(*widths)[0] / 2, rel=0.05)
    assert (lower + upper) / 2 == pytest.approx(np.mean(parts), abs=0.005)


def test_intervals_are_of_their_seed():
    scores = [np.random.default_rng(0).random(40)]
    assert bootstrap_interval(scores, seed=1) == bootstrap_interval(scores, seed=1)
    assert bootstrap_interval(scores, seed=1) != bootstrap_interval(scores, seed=2)


def coverage(problems, samples, mean, spread, runs):
    """How often the interval holds the mean of the law that problems are of: their accuracies are of a beta law."""
    rng = np.random.default_rng(0)
    accuracies = rng.beta(mean * spread, (1 - mean) * spread, (runs, problems))
    scores = rng.binomial(samples, accuracies) / samples
    with_ends = np.concatenate([scores, np.zeros((runs, 1)), np.ones((runs, 1))], axis=1)
    draws = bootstrap_weights(problems, np.random.default_rng(0)) @ with_ends.T
    lower, upper = np.quantile(draws, [0.025, 0.975], axis=0)
    assert (lower[0], upper[0]) == pytest.approx(bootstrap_interval([scores[0]]))
    return np.mean((lower <= mean) & (mean <= upper))


@pytest.mark.parametrize(("problems", "samples", "mean"), [(30, 32, 0.6), (40, 32, 0.9), (272, 4, 0.5)])
def test_the_interval_covers_the_mean_of_the_law_95_times_of_100(problems, samples, mean):
    # three standard errors of 800 runs beside the 2% that are allowed
    assert coverage(problems, samples, mean, spread=1.0, runs=800) == pytest.approx(0.95, abs=0.02 + 0.023)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("mean", [0.1, 0.4, 0.6, 0.9, 0.95])
@pytest.mark.parametrize(("problems", "samples"), [(30, 32), (40, 32), (272, 4), (500, 4)])
def test_the_interval_covers_within_2_percent_on_each_benchmarks_size(problems, samples, mean, spread):
    found = coverage(problems, samples, mean, spread, runs=5000)
    print(f"{problems} problems, {samples} samples, mean {mean}, spread {spread}: {found:.3f}")
    assert found == pytest.approx(0.95, abs=0.02 + 0.009)


# --- two policies on the same problems ---


def test_a_difference_is_paired_by_problem():
    """Problems differ far more than the policies do, which independent samples could not tell apart."""
    rng = np.random.default_rng(0)
    ours = rng.beta(0.5, 0.5, 272)
    theirs = ours - 0.02 + 0.02 * rng.standard_normal(272)
    found = paired_bootstrap([ours - theirs])
    assert found.difference == pytest.approx(0.02, abs=0.004)
    assert 0.015 < found.interval[0] < found.difference < found.interval[1] < 0.025
    assert found.p_value < 0.001


def test_a_difference_is_about_the_t_tests_where_many_problems_are_nearly_normal():
    difference = np.random.default_rng(4).normal(0.01, 0.15, 500)
    found, expected = paired_bootstrap([difference]), stats.ttest_1samp(difference, 0.0)
    np.testing.assert_allclose(found.interval, expected.confidence_interval(0.95), rtol=0, atol=0.001)
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.2)


def test_equal_policies_do_not_differ():
    found = paired_bootstrap([np.zeros(30), np.zeros(40)])
    assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_the_p_value_is_below_5_percent_where_the_interval_leaves_out_0():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.05, 0.1):
        for _ in range(20):
            found = paired_bootstrap([rng.choice([-0.5, 0.0, 0.25, 0.5], 30) + shift])
            leaves_out = not found.interval[0] <= 0 <= found.interval[1]
            assert leaves_out == (found.p_value < 0.05) or abs(found.p_value - 0.05) < 0.002


def test_differences_of_two_sets_are_averaged_by_set_not_by_problem():
    found = paired_bootstrap([np.full(30, 0.2), np.full(500, 0.0)])
    assert found.difference == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("problems", "samples"), [(30, 32), (40, 32), (272, 4), (500, 4)])
@pytest.mark.parametrize("mean", [0.6, 0.9])
def test_equal_policies_are_told_apart_5_times_of_100(problems, samples, mean):
    rng, runs = np.random.default_rng(0), 400
    accuracies = rng.beta(mean, 1 - mean, (runs, problems))
    # each policy solves some problems better than the other does, and as many worse
    swapped = np.where(rng.random((runs, problems)) < 0.2, rng.permuted(accuracies, axis=1), accuracies)
    ours, theirs = (rng.binomial(samples, law) / samples for law in (accuracies, swapped))
    told = [paired_bootstrap([row]).p_value < 0.05 for row in ours - theirs]
    assert np.mean(told) <= 0.07 + 0.03


def test_difference_of_means_by_hand():
    # Means 2 and 6, variances 1 and 4 of three values each: s² = 1/3 + 4/3, ν = (5/3)² / ((1/9 + 16/9) / 2) = 50/17.
    lower, upper = welch_interval([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    half_width = stats.t.ppf(0.975, 50 / 17) * math.sqrt(5 / 3)
    assert (lower, upper) == (pytest.approx(4 - half_width), pytest.approx(4 + half_width))
    assert welch_interval([0.0, 0.0], [1.0, 1.0]) == (1.0, 1.0)
