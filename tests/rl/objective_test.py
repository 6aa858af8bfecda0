import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcjax.rl import (
    Context,
    chain,
    discrepancy_penalty,
    drop_zero_variance,
    group_relative,
    group_relative_advantages,
    penalize,
    probability_difference,
)
from dcjax.rl.advantages import group_rewards
from dcjax.rl.objective import initial_terms
from dcjax.types import Batch

REWARDS = np.array([1, 0, 1, 1, 0, 0], np.float32)
LENGTHS = np.array([3, 1, 2, 4, 4, 0])


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return Batch(
        tokens=rng.integers(0, 9, (6, 6)).astype(np.int32),
        prompt_mask=np.ones((6, 2), bool),
        response_mask=np.arange(4) < LENGTHS[:, None],
        rollout_logps=rng.uniform(-2, 0, (6, 4)).astype(np.float32),
        temperature=np.ones(6, np.float32),
        rewards=REWARDS,
        group_rewards=np.asarray(group_rewards(REWARDS, group_size=2)),
    )


@pytest.fixture(scope="module")
def context(batch):
    old = np.random.default_rng(1).uniform(-2, 0, (6, 4)).astype(np.float32)
    return Context(
        batch=batch,
        logps=old + np.float32(0.1),
        old_logps=old,
        multiplier=jnp.float32(0.5),
        mean_reward=jnp.mean(batch.rewards),
    )


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def scale(factor):
    return lambda terms, context: dataclasses.replace(terms, weights=terms.weights * factor)


def note(name):
    return lambda terms, context: dataclasses.replace(
        terms, metrics={**terms.metrics, name: jnp.asarray(context.batch.rewards)}
    )


def test_it_starts_from_zero_advantages_unit_weights_and_every_response_token(batch):
    terms = initial_terms(batch)
    np.testing.assert_array_equal(terms.advantages, np.zeros((6, 4)))
    np.testing.assert_array_equal(terms.weights, np.ones((6, 4)))
    np.testing.assert_array_equal(terms.mask, batch.response_mask)
    assert terms.metrics == {}


def test_an_empty_chain_is_the_identity(batch, context):
    terms = initial_terms(batch)
    assert chain()(terms, context) is terms
    f = group_relative_advantages()
    same(chain(chain(), f, chain())(terms, context), f(terms, context))


def test_chaining_is_associative_and_runs_from_left_to_right(batch, context):
    a, b, c = group_relative_advantages(), drop_zero_variance(), discrepancy_penalty(probability_difference)
    terms = initial_terms(batch)
    flat = chain(a, b, c)(terms, context)
    same(chain(chain(a, b), c)(terms, context), flat)
    same(chain(a, chain(b, c))(terms, context), flat)
    same(c(b(a(terms, context), context), context), flat)
    # an estimator sets the advantages: behind the penalty it wipes it out
    backwards = chain(c, a)(terms, context)
    same(backwards.advantages, a(terms, context).advantages)
    assert np.abs(np.asarray(backwards.advantages) - flat.advantages).max() > 0.01


def test_transforms_keep_what_others_wrote(batch, context):
    written = chain(scale(2.0), note("mine"), drop_zero_variance(), scale(3.0))(initial_terms(batch), context)
    assert set(written.metrics) == {"mine", "dropped_fraction"}
    np.testing.assert_array_equal(written.weights, np.full((6, 4), 6.0))


def test_advantages_are_spread_over_a_responses_tokens(batch, context):
    terms = group_relative_advantages()(initial_terms(batch), context)
    expected = np.repeat(np.asarray(group_relative(REWARDS, group_size=2))[:, None], 4, axis=1)
    np.testing.assert_array_equal(terms.advantages, expected)
    centred = group_relative_advantages(scale_by_std=False)(initial_terms(batch), context)
    np.testing.assert_array_equal(centred.advantages[:2], [[0.5] * 4, [-0.5] * 4])
    same(terms.mask, initial_terms(batch).mask)


def test_groups_of_equal_rewards_leave_the_loss_and_its_denominator(batch, context):
    # rewards (1, 0), (1, 1), (0, 0): only the first group stays
    terms = drop_zero_variance()(initial_terms(batch), context)
    np.testing.assert_array_equal(terms.mask[:2], batch.response_mask[:2])
    assert not terms.mask[2:].any()
    assert int(terms.mask.sum()) == LENGTHS[:2].sum()
    np.testing.assert_array_equal(terms.metrics["dropped_fraction"], [0, 0, 1, 1, 1, 1])
    same(terms.advantages, initial_terms(batch).advantages)
    same(terms.weights, initial_terms(batch).weights)


def test_the_penalty_is_the_multiplier_times_the_gap(batch, context):
    before = group_relative_advantages()(initial_terms(batch), context)
    after = discrepancy_penalty(probability_difference)(before, context)
    gap = np.abs(np.exp(context.old_logps) - np.exp(batch.rollout_logps))
    np.testing.assert_allclose(after.advantages, before.advantages - 0.5 * gap, rtol=1e-5, atol=1e-6)
    square = discrepancy_penalty(probability_difference, shape=jnp.square)(before, context)
    np.testing.assert_allclose(square.advantages, penalize(before.advantages, gap**2, multiplier=0.5), atol=1e-6)


def test_another_measure_of_the_gap_is_passed_as_a_function(batch, context):
    def log_difference(*, old_logps, rollout_logps):
        return jnp.abs(old_logps - rollout_logps)

    terms = discrepancy_penalty(log_difference)(initial_terms(batch), context)
    expected = -0.5 * np.abs(context.old_logps - batch.rollout_logps)
    np.testing.assert_allclose(terms.advantages, expected, rtol=1e-6)


def test_a_penalty_without_dual_ascent_says_what_is_missing(batch, context):
    with pytest.raises(ValueError, match=r"put dual_ascent\(\.\.\.\) into the optimiser's chain"):
        discrepancy_penalty(probability_difference)(initial_terms(batch), dataclasses.replace(context, multiplier=None))
