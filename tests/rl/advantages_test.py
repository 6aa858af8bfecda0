import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcjax.rl import group_relative, penalize
from dcjax.rl.advantages import group_rewards, relative_to_group

REWARDS = np.array([1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 2], np.float32)


def test_group_relative_by_hand():
    # (1, 0, 0, 1): mean 1/2, sample std √(4·¼ / 3) = 1/√3; all ones: 0; (0, 0, 0, 2): mean ½, std 1
    expected = [0.5 * 3**0.5, -0.5 * 3**0.5, -0.5 * 3**0.5, 0.5 * 3**0.5, 0, 0, 0, 0, -0.5, -0.5, -0.5, 1.5]
    np.testing.assert_allclose(group_relative(REWARDS, group_size=4), expected, atol=3e-6)


def test_without_the_division_rewards_are_only_centred():
    expected = [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, -0.5, -0.5, -0.5, 1.5]
    np.testing.assert_allclose(group_relative(REWARDS, group_size=4, scale_by_std=False), expected, atol=1e-7)


@given(
    st.sampled_from([(3, 2), (1, 5), (2, 4)]).flatmap(
        lambda shape: arrays(np.float32, shape, elements=st.floats(-10, 10, width=16))
    ),
    st.booleans(),
)
def test_group_relative_against_a_loop(rewards, scale_by_std):
    expected = []
    for group in rewards.astype(np.float64):
        mean = sum(group) / len(group)
        std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
        expected += [(r - mean) / (std + 1e-6 if scale_by_std else 1) for r in group]
    ours = group_relative(rewards.reshape(-1), group_size=rewards.shape[1], scale_by_std=scale_by_std)
    # a std near float32's rounding of the mean is noise in either computation
    noisy = (rewards.max(1) - rewards.min(1) < 1e-3).repeat(rewards.shape[1])
    np.testing.assert_allclose(np.asarray(ours)[~noisy], np.array(expected)[~noisy], rtol=1e-3, atol=1e-4)


def test_a_group_of_equal_rewards_has_no_advantage():
    # a third is not exact, and neither is the mean of three of them
    assert np.abs(group_relative(np.full(6, 1 / 3, np.float32), group_size=3)).max() < 0.1
    np.testing.assert_array_equal(group_relative(np.ones(8, np.float32), group_size=4), np.zeros(8))


@pytest.mark.parametrize("size", [1, 0, -4, 5])
def test_a_group_size_that_cannot_be_is_refused_with_both_numbers(size):
    with pytest.raises(ValueError, match=rf"group_size is {size} for 12 responses"):
        group_relative(REWARDS, group_size=size)


def test_rows_may_be_cut_anywhere_when_they_carry_their_groups():
    whole = group_relative(REWARDS, group_size=4)
    groups = group_rewards(REWARDS, group_size=4)
    np.testing.assert_array_equal(groups[5], [1, 1, 1, 1])
    np.testing.assert_array_equal(groups[8:], [[0, 0, 0, 2]] * 4)
    order = np.random.default_rng(0).permutation(12)[:7]
    np.testing.assert_array_equal(relative_to_group(REWARDS[order], groups[order]), whole[order])


A = np.array([[1.0, 1.0, -2.0], [0.5, 0.5, 0.5]], np.float32)
DELTA = np.array([[0.0, 0.25, 0.5], [1.0, 0.125, 0.0]], np.float32)


def test_the_penalty_by_hand():
    expected = [[1.0, 0.5, -3.0], [-1.5, 0.25, 0.5]]
    np.testing.assert_array_equal(penalize(A, DELTA, multiplier=2.0), expected)
    np.testing.assert_array_equal(penalize(A, DELTA, multiplier=jnp.float32(2.0)), expected)


def test_without_a_multiplier_advantages_are_untouched():
    np.testing.assert_array_equal(penalize(A, DELTA, multiplier=0.0), A)


def test_another_shape_of_penalty_is_passed_as_a_function():
    hinge = penalize(A, DELTA, multiplier=4.0, shape=lambda delta: jnp.maximum(delta - 0.25, 0))
    np.testing.assert_array_equal(hinge, [[1.0, 1.0, -3.0], [-2.5, 0.5, 0.5]])


def test_no_gradient_flows_through_the_penalty():
    def total(advantages, delta):
        return jnp.sum(penalize(advantages, delta, multiplier=3.0, shape=jnp.square) ** 2)

    to_advantages, to_delta = jax.grad(total, argnums=(0, 1))(jnp.array(A), jnp.array(DELTA))
    np.testing.assert_array_equal(to_delta, np.zeros_like(DELTA))
    np.testing.assert_allclose(to_advantages, 2 * (A - 3 * DELTA**2), rtol=1e-6)
