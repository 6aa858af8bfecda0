from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from hypothesis import given, settings
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


def dr_grpo(rewards, *, group_size):
    return group_relative(rewards, group_size=group_size, scale_by_std=False)


ESTIMATORS = {"grpo": group_relative, "dr_grpo": dr_grpo, "rloo": leave_one_out}
GROUPED = pytest.mark.parametrize("name", ESTIMATORS)


@partial(jit, static_argnums=1)
def run(rewards, group_size=4):
    """Every estimator in one program."""
    return {name: estimate(rewards, group_size=group_size) for name, estimate in ESTIMATORS.items()} | {
        "baseline": batch_baseline(rewards)
    }


def test_group_relative_by_hand():
    # (1, 0, 0, 1): mean 1/2, sample std √(4·¼ / 3) = 1/√3; all ones: 0; (0, 0, 0, 2): mean ½, std 1
    expected = [0.5 * 3**0.5, -0.5 * 3**0.5, -0.5 * 3**0.5, 0.5 * 3**0.5, 0, 0, 0, 0, -0.5, -0.5, -0.5, 1.5]
    np.testing.assert_allclose(run(REWARDS)["grpo"], expected, atol=3e-6)


def test_without_the_division_rewards_are_only_centred():
    expected = [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, -0.5, -0.5, -0.5, 1.5]
    np.testing.assert_allclose(run(REWARDS)["dr_grpo"], expected, atol=1e-7)


@pytest.mark.parametrize("group_size", [2, 4, 6])
@settings(max_examples=40)
@given(rewards=arrays(np.float32, 12, elements=st.floats(-10, 10, width=16)))
def test_against_loops(group_size, rewards):
    centred, scaled, others = [], [], []
    for group in rewards.astype(np.float64).reshape(-1, group_size):
        mean = sum(group) / len(group)
        std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
        centred += [r - mean for r in group]
        scaled += [(r - mean) / (std + 1e-6) for r in group]
        others += [
            r - sum(group[:i].tolist() + group[i + 1 :].tolist()) / (len(group) - 1) for i, r in enumerate(group)
        ]
    ours = jax.device_get(run(rewards, group_size))
    # a std near float32's rounding of the mean is noise in either computation
    noisy = (np.ptp(rewards.reshape(-1, group_size), axis=1) < 1e-3).repeat(group_size)
    np.testing.assert_allclose(ours["grpo"][~noisy], np.array(scaled)[~noisy], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours["dr_grpo"], centred, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours["rloo"], others, rtol=1e-5, atol=1e-5)
    stretched = ours["dr_grpo"] * group_size / (group_size - 1)
    np.testing.assert_allclose(ours["rloo"], stretched, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 0, -4, 5])
def test_a_group_size_that_cannot_be_is_refused_with_both_numbers(size):
    with pytest.raises(ValueError, match=rf"group_size is {size} for 12 responses"):
        group_relative(REWARDS, group_size=size)


def test_rows_that_carry_their_groups_or_the_mean_may_be_cut_anywhere():
    groups = group_rewards(REWARDS, group_size=4)
    np.testing.assert_array_equal(groups[5], [1, 1, 1, 1])
    np.testing.assert_array_equal(groups[8:], [[0, 0, 0, 2]] * 4)
    rows = np.random.default_rng(0).permutation(12)[:7]

    @jit
    def cut(rewards, groups, mean):
        return {
            "grpo": relative_to_group(rewards, groups),
            "rloo": relative_to_others(rewards, groups),
            "baseline": relative_to_mean(rewards, mean_reward=mean),
        }

    whole = run(REWARDS)
    for name, ours in cut(REWARDS[rows], groups[rows], jnp.asarray(REWARDS.mean())).items():
        np.testing.assert_array_equal(ours, whole[name][rows], err_msg=name)


def test_leave_one_out_by_hand():
    # (1, 0, 0, 1): the others of a 1 have mean ⅓, those of a 0 have ⅔; (0, 0, 0, 2): 2 − 0 and 0 − ⅔
    expected = [2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0, 0, 0, -2 / 3, -2 / 3, -2 / 3, 2]
    np.testing.assert_allclose(run(REWARDS)["rloo"], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(run(REWARDS, 2)["rloo"][:2], [1, -1])


def test_the_batch_baseline_by_hand():
    # eight over twelve
    np.testing.assert_allclose(run(REWARDS)["baseline"], REWARDS - 2 / 3, rtol=1e-6)


@settings(max_examples=40)
@given(rewards=arrays(np.float32, 12, elements=st.integers(0, 3)), seed=st.integers(0, 99))
def test_permuting_a_group_permutes_its_advantages(rewards, seed):
    rng = np.random.default_rng(seed)
    order = np.concatenate([start + rng.permutation(4) for start in (0, 4, 8)])
    plain, shuffled = run(rewards), run(rewards[order])
    for name in ESTIMATORS:
        np.testing.assert_allclose(shuffled[name], plain[name][order], rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(rewards=arrays(np.float32, 12, elements=st.integers(-3, 3)), shift=st.integers(-50, 50))
def test_what_all_rewards_share_is_no_advantage(rewards, shift):
    plain, moved = run(rewards), run(rewards + np.float32(shift))
    for name in ESTIMATORS:
        np.testing.assert_allclose(moved[name], plain[name], rtol=1e-4, atol=1e-5)


@GROUPED
@pytest.mark.parametrize("reward", [1, 1 / 3, 0.1, -7.3, 1e4])
def test_equal_rewards_give_exactly_no_advantage(name, reward):
    # the mean of three thirds rounds; over a deviation of 0 that would be an advantage
    np.testing.assert_array_equal(run(np.full(12, reward, np.float32), 3)[name], np.zeros(12))


@pytest.mark.parametrize("size", [1, 0, 5])
def test_leaving_one_out_needs_others(size):
    with pytest.raises(ValueError, match=rf"group_size is {size} for 12 responses"):
        leave_one_out(REWARDS, group_size=size)


@pytest.mark.parametrize(
    "estimate", [*(partial(f, group_size=4) for f in (group_relative, dr_grpo, leave_one_out)), batch_baseline]
)
def test_advantages_are_float32_or_wider(estimate):
    assert jax.eval_shape(estimate, jnp.asarray(REWARDS, jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert jax.eval_shape(estimate, REWARDS.astype(np.float64)).dtype == np.float64


def test_half_precision_is_widened_before_anything_is_computed():
    jax.tree.map(np.testing.assert_array_equal, run(jnp.asarray(REWARDS, jnp.bfloat16)), run(REWARDS))
