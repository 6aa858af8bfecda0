import dataclasses
import inspect
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit

from dcjax.rl import by_response, discrepancy, group_relative, penalties, presets, probability_difference, transforms
from dcjax.rl.advantages import group_rewards
from dcjax.rl.penalties import centred_on_response, penalize
from dcjax.rl.transforms import (
    Context,
    batch_baseline_advantages,
    chain,
    direct_penalty,
    discrepancy_penalty,
    drop_zero_variance,
    group_relative_advantages,
    initial_terms,
    kl_penalty,
    leave_one_out_advantages,
)
from dcjax.types import Batch

REWARDS = np.array([1, 0, 1, 1, 0, 0], np.float32)
LENGTHS = np.array([3, 1, 2, 4, 4, 0])


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return Batch(
        tokens=rng.integers(0, 9, (6, 6)).astype(np.int32),
        attention_mask=np.ones((6, 6), bool),
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


def gap(context):
    return np.abs(np.exp(context.old_logps) - np.exp(context.batch.rollout_logps)) * context.batch.response_mask


def test_the_other_estimators_against_loops(batch, context):
    others = leave_one_out_advantages()(initial_terms(batch), context).advantages
    baseline = batch_baseline_advantages()(initial_terms(batch), context).advantages
    for row, group in enumerate(batch.group_rewards):
        rest = [reward for other, reward in enumerate(group) if other != row % 2]
        np.testing.assert_allclose(others[row], [REWARDS[row] - np.mean(rest)] * 4, atol=1e-7)
        np.testing.assert_allclose(baseline[row], [REWARDS[row] - REWARDS.mean()] * 4, atol=1e-7)


def test_the_penalty_is_the_multiplier_times_the_gap(batch, context):
    before = group_relative_advantages()(initial_terms(batch), context)
    after = discrepancy_penalty(probability_difference)(before, context)
    np.testing.assert_allclose(after.advantages, before.advantages - 0.5 * gap(context), rtol=1e-5, atol=1e-6)
    square = discrepancy_penalty(probability_difference, shape=jnp.square)(before, context)
    np.testing.assert_allclose(
        square.advantages, penalize(before.advantages, gap(context) ** 2, multiplier=0.5), atol=1e-6
    )


def test_a_fixed_multiplier_needs_no_dual_ascent_and_wins_over_it(batch, context):
    expected = -0.25 * gap(context)
    for held in (None, context.multiplier):
        terms = discrepancy_penalty(probability_difference, multiplier=0.25)(
            initial_terms(batch), dataclasses.replace(context, multiplier=held)
        )
        np.testing.assert_allclose(terms.advantages, expected, rtol=1e-6, atol=1e-7)


def test_another_measure_of_the_gap_is_passed_as_a_function(batch, context):
    def square(*, old_logps, rollout_logps, mask):
        return jnp.where(mask, jnp.square(old_logps - rollout_logps), 0)

    terms = discrepancy_penalty(square)(initial_terms(batch), context)
    expected = -0.5 * np.square(context.old_logps - batch.rollout_logps) * batch.response_mask
    np.testing.assert_allclose(terms.advantages, expected, rtol=1e-6)


def test_a_centred_penalty_sums_to_nothing_over_each_response(batch, context):
    penalty = discrepancy_penalty(probability_difference, form=centred_on_response)
    subtracted = np.where(batch.response_mask, -penalty(initial_terms(batch), context).advantages / 0.5, 0)
    for row, length in enumerate(LENGTHS):
        own = gap(context)[row, :length]
        expected = own - own.mean() if length else own
        np.testing.assert_allclose(subtracted[row, :length], expected, atol=1e-6)


def test_a_centred_penalty_is_the_same_in_microbatches(batch, context):
    centred = chain(group_relative_advantages(), discrepancy_penalty(probability_difference, form=centred_on_response))
    advantages = jit(lambda context: centred(initial_terms(context.batch), context).advantages)
    whole = advantages(context)
    # the second group is cut
    for rows in (slice(3), slice(3, 6)):
        part = jax.tree.map(lambda x: np.asarray(x)[rows] if jnp.ndim(x) else x, context)  # noqa: B023
        np.testing.assert_allclose(advantages(part), np.asarray(whole)[rows], atol=1e-6)


def test_the_direct_penalty_is_added_to_the_loss_of_the_live_policy(batch, context):
    terms = chain(group_relative_advantages(), direct_penalty(probability_difference))(initial_terms(batch), context)
    live = np.abs(np.exp(context.logps) - np.exp(batch.rollout_logps)) * batch.response_mask
    np.testing.assert_allclose(terms.loss, 0.5 * live, atol=1e-6)
    np.testing.assert_array_equal(
        terms.advantages, group_relative_advantages()(initial_terms(batch), context).advantages
    )


def test_the_direct_penaltys_gradient_is_of_the_gap_and_none_goes_to_the_sampler(batch, context):
    def total(logps, rollout_logps):
        of = dataclasses.replace(context, logps=logps, batch=dataclasses.replace(batch, rollout_logps=rollout_logps))
        return jnp.sum(direct_penalty(probability_difference, multiplier=2.0)(initial_terms(batch), of).loss)

    to_logps, to_rollout = jit(jax.grad(total, argnums=(0, 1)))(context.logps, batch.rollout_logps)
    p, q = np.exp(context.logps), np.exp(batch.rollout_logps)
    np.testing.assert_allclose(to_logps, 2 * p * np.sign(p - q) * batch.response_mask, rtol=1e-5)
    np.testing.assert_array_equal(to_rollout, np.zeros((6, 4)))


@pytest.mark.parametrize(
    ("kind", "of"),
    [
        ("k1", lambda x: x),
        ("k2", lambda x: x**2 / 2),
        ("k3", lambda x: np.exp(-x) - 1 + x),
    ],
)
def test_the_kl_penalty_against_numpy(batch, context, kind, of):
    reference = np.random.default_rng(2).uniform(-2, 0, (6, 4)).astype(np.float32)
    with_reference = dataclasses.replace(context, reference_logps=np.where(batch.response_mask, reference, np.nan))
    terms = kl_penalty(0.25, kind=kind)(initial_terms(batch), with_reference)
    expected = np.where(batch.response_mask, 0.25 * of(context.logps - reference), 0)
    np.testing.assert_allclose(terms.loss, expected, rtol=1e-4, atol=1e-6)
    sums = (expected / 0.25).sum(1) / np.maximum(LENGTHS, 1)
    np.testing.assert_allclose(terms.metrics["kl/reference"], sums, rtol=1e-4, atol=1e-6)
    twice = chain(kl_penalty(0.25, kind=kind), direct_penalty(probability_difference, multiplier=1.0))
    added = twice(initial_terms(batch), with_reference).loss - terms.loss
    assert float(jnp.abs(added).max()) > 0.01


def test_what_a_penalty_misses_is_said(batch, context):
    bare = dataclasses.replace(context, multiplier=None)
    for penalty in (discrepancy_penalty, direct_penalty):
        with pytest.raises(ValueError, match=rf"{penalty.__name__} .* put dual_ascent\(\.\.\.\) into the optimiser's"):
            penalty(probability_difference)(initial_terms(batch), bare)
        with pytest.raises(ValueError, match=r"multiplier is -1\.0; it must be at least 0"):
            penalty(probability_difference, multiplier=-1.0)
    with pytest.raises(ValueError, match="kl_penalty needs reference_logps"):
        kl_penalty(0.1)(initial_terms(batch), context)
    with pytest.raises(ValueError, match=r"coefficient is -0\.1"):
        kl_penalty(-0.1)


def test_behind_the_estimator_penalties_and_masks_may_stand_in_any_order(batch, context):
    estimator, penalty = group_relative_advantages(), discrepancy_penalty(probability_difference)
    rest = [drop_zero_variance(), penalty, direct_penalty(probability_difference), scale(2.0)]
    expected = chain(estimator, *rest)(initial_terms(batch), context)
    for order in itertools.permutations(rest):
        terms = chain(estimator, *order)(initial_terms(batch), context)
        same(terms, expected)


def test_the_pages_own_transform_runs(batch, context):
    page = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    (source,) = re.findall(r"^def silence_known_tokens.*?(?=\n\n\n)", page, re.DOTALL | re.MULTILINE)
    assert len(source.splitlines()) <= 10
    names = {"dataclasses": dataclasses, "jnp": jnp}
    exec(compile(source, "objectives.md", "exec"), names)
    plain = chain(group_relative_advantages(), discrepancy_penalty(probability_difference))
    silenced = chain(plain, names["silence_known_tokens"](0.5))
    ours, without = silenced(initial_terms(batch), context), plain(initial_terms(batch), context)
    known = np.exp(context.old_logps) > 0.5
    np.testing.assert_array_equal(ours.weights, np.where(known, 0, 1))
    np.testing.assert_array_equal(ours.advantages, without.advantages)
    np.testing.assert_allclose(ours.metrics["silenced"], known.mean(axis=1), rtol=1e-6)


def test_the_page_names_every_transform():
    page = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    factories = [
        name
        for module in (transforms, presets, penalties, discrepancy, by_response)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    assert len(factories) > 20
    assert [name for name in factories if f"`{name}" not in page] == []
