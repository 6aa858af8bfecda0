from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcjax.rl.advantages import (
    batch_baseline,
    group_relative,
    group_rewards,
    leave_one_out,
    relative_to_group,
    relative_to_mean,
    relative_to_others,
)

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


def test_leave_one_out_by_hand():
    # (1, 0, 0, 1): the others of a 1 have mean ⅓, those of a 0 have ⅔; (0, 0, 0, 2): 2 − 0 and 0 − ⅔
    expected = [2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0, 0, 0, -2 / 3, -2 / 3, -2 / 3, 2]
    np.testing.assert_allclose(leave_one_out(REWARDS, group_size=4), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(leave_one_out(REWARDS[:2], group_size=2), [1, -1])


def test_the_batch_baseline_by_hand():
    # eight over twelve
    np.testing.assert_allclose(batch_baseline(REWARDS), REWARDS - 2 / 3, rtol=1e-6)


@given(arrays(np.float32, (3, 4), elements=st.floats(-10, 10, width=16)))
def test_leave_one_out_against_a_loop(rewards):
    expected = []
    for group in rewards.astype(np.float64):
        for i, reward in enumerate(group):
            others = [other for j, other in enumerate(group) if j != i]
            expected.append(reward - sum(others) / len(others))
    ours = leave_one_out(rewards.reshape(-1), group_size=4)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@given(arrays(np.float32, (2, 5), elements=st.floats(-10, 10, width=16)))
def test_leaving_one_out_stretches_the_centred_rewards(rewards):
    centred = group_relative(rewards.reshape(-1), group_size=5, scale_by_std=False)
    np.testing.assert_allclose(leave_one_out(rewards.reshape(-1), group_size=5), centred * 5 / 4, rtol=1e-4, atol=1e-4)


def dr_grpo(rewards, *, group_size):
    return group_relative(rewards, group_size=group_size, scale_by_std=False)


GROUPED = pytest.mark.parametrize("estimate", [group_relative, dr_grpo, leave_one_out])


@GROUPED
@given(rewards=arrays(np.float32, 12, elements=st.integers(0, 3)), seed=st.integers(0, 99))
def test_permuting_a_group_permutes_its_advantages(estimate, rewards, seed):
    rng = np.random.default_rng(seed)
    order = np.concatenate([start + rng.permutation(4) for start in (0, 4, 8)])
    shuffled = estimate(rewards[order], group_size=4)
    np.testing.assert_allclose(shuffled, estimate(rewards, group_size=4)[order], rtol=1e-4, atol=1e-5)


@GROUPED
@given(rewards=arrays(np.float32, 8, elements=st.integers(-3, 3)), shift=st.integers(-50, 50))
def test_what_all_rewards_share_is_no_advantage(estimate, rewards, shift):
    moved = estimate(rewards + np.float32(shift), group_size=4)
    np.testing.assert_allclose(moved, estimate(rewards, group_size=4), rtol=1e-4, atol=1e-5)


@GROUPED
@pytest.mark.parametrize("reward", [1 / 3, 0.1, -7.3, 1e4])
def test_equal_rewards_give_exactly_no_advantage(estimate, reward):
    # the mean of three thirds rounds; over a deviation of 0 that would be an advantage
    np.testing.assert_array_equal(estimate(np.full(12, reward, np.float32), group_size=3), np.zeros(12))


def test_rows_that_carry_their_groups_or_the_mean_may_be_cut_anywhere():
    groups = group_rewards(REWARDS, group_size=4)
    rows = np.random.default_rng(0).permutation(12)[:7]
    ours = relative_to_others(REWARDS[rows], groups[rows])
    np.testing.assert_array_equal(ours, leave_one_out(REWARDS, group_size=4)[rows])
    ours = relative_to_mean(REWARDS[rows], mean_reward=jnp.mean(REWARDS))
    np.testing.assert_array_equal(ours, batch_baseline(REWARDS)[rows])


@pytest.mark.parametrize("size", [1, 0, 5])
def test_leaving_one_out_needs_others(size):
    with pytest.raises(ValueError, match=rf"group_size is {size} for 12 responses"):
        leave_one_out(REWARDS, group_size=size)


@pytest.mark.parametrize(
    "estimate", [*(partial(f, group_size=4) for f in (group_relative, dr_grpo, leave_one_out)), batch_baseline]
)
def test_advantages_are_float32_or_wider(estimate):
    half = estimate(jnp.asarray(REWARDS, jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, estimate(REWARDS))
    with jax.enable_x64(True):
        assert estimate(REWARDS.astype(np.float64)).dtype == np.float64
