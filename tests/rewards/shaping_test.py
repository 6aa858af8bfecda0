import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.rewards.shaping import soft_overlong_punishment


def test_punishments_of_the_paper():
    """DAPO, eq. 13, with the paper's 20,480 and 4,096 tokens."""
    lengths = np.array([1, 16_384, 16_385, 17_408, 18_432, 20_480, 20_481, 99_999])
    punished = soft_overlong_punishment(lengths, max_length=20_480, buffer=4_096)
    assert punished.dtype == np.float32
    assert punished.tolist() == [0.0, 0.0, -1 / 4096, -0.25, -0.5, -1.0, -1.0, -1.0]


def punishment_by_cases(length, max_length, buffer):
    if length <= max_length - buffer:
        return 0.0
    if length <= max_length:
        return (max_length - buffer - length) / buffer
    return -1.0


@given(st.lists(st.integers(0, 300)), st.integers(1, 200), st.integers(1, 200), st.floats(0.0, 4.0))
def test_the_cases_of_the_equation(lengths, one, other, factor):
    buffer, max_length = sorted((one, other))
    expected = [factor * punishment_by_cases(length, max_length, buffer) for length in lengths]
    actual = soft_overlong_punishment(np.array(lengths, int), max_length=max_length, buffer=buffer, factor=factor)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"buffer": 0}, "buffer is 0; it must be at least 1 and at most max_length, 8"),
        ({"buffer": 9}, "buffer is 9; it must be at least 1 and at most max_length, 8"),
        ({"buffer": 4, "factor": -1.0}, "factor is -1.0; it must not be negative"),
    ],
)
def test_settings_out_of_range_are_told_of(settings, message):
    with pytest.raises(ValueError, match=message):
        soft_overlong_punishment(np.arange(3), max_length=8, **settings)
