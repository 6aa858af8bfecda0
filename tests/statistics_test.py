import math

import pytest

from dcjax.statistics import wilson_interval


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
