"""What an objective requires is provided by the step, or refused by name."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import jit

from dcjax.rl import (
    HeadQuantity,
    IterationQuantity,
    Objective,
    PolicyOutputs,
    Requirements,
    chain,
    group_relative_advantages,
    make_train_step,
    policy_gradient,
)
from dcjax.types import Batch, TokenDistributions, TrainState

GROUPS, G, P, T, V = 4, 2, 2, 3, 5
ROWS = GROUPS * G
RNG = np.random.default_rng(0)
TABLE, DEPLOYED = RNG.normal(size=(2, V, V)).astype(np.float32)
MASK = np.arange(T) < RNG.integers(1, T + 1, (ROWS, 1))
REWARDS = RNG.integers(0, 2, ROWS).astype(np.float32)
BATCH = Batch(
    tokens=RNG.integers(0, V, (ROWS, P + T)).astype(np.int32),
    attention_mask=np.concatenate([np.ones((ROWS, P), bool), MASK], axis=1),
    response_mask=MASK,
    rollout_logps=RNG.uniform(-2, 0, (ROWS, T)).astype(np.float32),
    temperature=np.ones(ROWS, np.float32),
    rewards=REWARDS,
    group_rewards=np.repeat(REWARDS.reshape(GROUPS, G), G, axis=0),
)


def distributions_of(table, batch):
    return TokenDistributions(jax.nn.log_softmax(table[batch.tokens[:, P - 1 : -1]]), batch.tokens[:, P:], None)


NOTHING = Requirements()


def policy(table, batch, *, requires=NOTHING):
    """A bigram: the logits are one row of a table."""
    found = distributions_of(table, batch)
    logps = jnp.take_along_axis(found.log_probs, found.targets[..., None], axis=-1)[..., 0]
    quantities = {name: compute(found) for name, compute in requires.of_head.items()}
    return PolicyOutputs(logps, jnp.zeros_like(logps), {}, quantities)


def add_to_loss(name):
    return lambda terms, context: dataclasses.replace(terms, loss=terms.loss + context.quantities[name])


def run(transform, requires, *, provided=None, batch=BATCH, microbatch_size=ROWS, updates=1):
    """The table after one step of plain gradient descent, and the metrics."""
    step = make_train_step(
        partial(policy, requires=requires if provided is None else provided),
        optax.with_extra_args_support(optax.sgd(1.0)),
        policy_gradient,
        chain(group_relative_advantages(), transform),
        requires=requires,
        group_size=G,
        microbatch_size=microbatch_size,
        updates=updates,
    )
    state = TrainState(jnp.zeros((), jnp.int32), jnp.asarray(TABLE), optax.sgd(1.0).init(TABLE), jnp.zeros(()))
    state, metrics = jit(step)(state, batch)
    return np.asarray(state.params), metrics


def total_variation(distributions):
    """½ Σ_v |π_v − μ_v| against the deployed policy, whose distribution the head is closed over here."""
    deployed = jnp.exp(jax.nn.log_softmax(DEPLOYED))[BATCH.tokens[:, P - 1 : -1]]
    return jnp.sum(jnp.abs(jnp.exp(distributions.log_probs) - deployed), axis=-1) / 2


def score_centre(distributions):
    """Σ_v sg(μ_v) log π_v, of which score centering makes its correction."""
    deployed = jnp.exp(jax.nn.log_softmax(DEPLOYED))[BATCH.tokens[:, P - 1 : -1]]
    return jnp.sum(deployed * distributions.log_probs, axis=-1)


@pytest.mark.parametrize("compute", [total_variation, score_centre])
def test_a_quantity_of_the_head_is_differentiated_without_the_step_knowing_it(compute):
    """Both fit as they are: what `score centering` and whole distributions need is what an objective requires."""
    plain, _ = run(lambda terms, context: terms, NOTHING)
    found, _ = run(add_to_loss("mine"), Requirements(quantities=(HeadQuantity("mine", compute),)))
    expected = jax.grad(lambda table: jnp.sum(jnp.where(MASK, compute(distributions_of(table, BATCH)), 0)) / MASK.sum())
    np.testing.assert_allclose(plain - found, expected(TABLE), rtol=1e-4, atol=1e-6)


def median_gap(iteration):
    gap = jnp.abs(iteration.old_logps - iteration.batch.rollout_logps)
    return jnp.nanmedian(jnp.where(iteration.batch.response_mask, gap, jnp.nan))


def gap_of_longest(iteration):
    """By row: the sum of its gaps over that of the row with the largest."""
    gap = jnp.where(iteration.batch.response_mask, jnp.abs(iteration.old_logps - iteration.batch.rollout_logps), 0)
    return jnp.sum(gap, axis=1) / jnp.max(jnp.sum(gap, axis=1))


def ranks(iteration):
    """By token: its place among all tokens of the iteration, by gap."""
    gap = jnp.where(iteration.batch.response_mask, jnp.abs(iteration.old_logps - iteration.batch.rollout_logps), -1.0)
    return jnp.argsort(jnp.argsort(gap.reshape(-1))).reshape(gap.shape).astype(jnp.float32)


OF_ITERATION = Requirements(
    quantities=tuple(IterationQuantity(compute.__name__, compute) for compute in (median_gap, gap_of_longest, ranks))
)


def log_them(terms, context):
    shown = {
        "median": jnp.broadcast_to(context.quantities["median_gap"], terms.mask.shape[:1]),
        "row": context.quantities["gap_of_longest"],
        "token": jnp.sum(context.quantities["ranks"] * context.old_logps, axis=1),
    }
    return dataclasses.replace(terms, metrics=terms.metrics | shown)


@pytest.mark.parametrize(("microbatch_size", "updates"), [(ROWS, 1), (2, 1), (2, 2)])
def test_quantities_of_the_iteration_are_of_all_its_rows_in_every_minibatch(microbatch_size, updates):
    old = np.asarray(policy(TABLE, BATCH).logps)
    gap = np.abs(old - BATCH.rollout_logps)
    rows = np.where(MASK, gap, 0).sum(1)
    order = np.argsort(np.argsort(np.where(MASK, gap, -1).ravel(), kind="stable"), kind="stable").reshape(gap.shape)
    _, metrics = run(log_them, OF_ITERATION, microbatch_size=microbatch_size, updates=updates)
    np.testing.assert_allclose(metrics["median"], np.median(gap[MASK]), rtol=1e-5)
    np.testing.assert_allclose(metrics["row"], np.mean(rows / rows.max()), rtol=1e-5)
    np.testing.assert_allclose(metrics["token"], np.mean((order * old).sum(1)), rtol=1e-5)


def untouched(terms, context):
    return terms


def test_what_is_required_and_not_there_is_refused_by_name():
    tv = Requirements(quantities=(HeadQuantity("tv", total_variation),))
    for requires, message in (
        (Requirements(reference_logps=True), "requires reference_logps; the TrainState has no reference policy"),
        (Requirements(candidate_tokens=True), "requires candidate_tokens; the batch has none"),
        (tv, "requires the quantity 'tv'; apply_fn does not compute it"),
    ):
        with pytest.raises(ValueError, match=message):
            run(untouched, requires, provided=NOTHING)
    wrong = Requirements(quantities=(IterationQuantity("pairs", lambda iteration: jnp.zeros((ROWS, ROWS))),))
    with pytest.raises(ValueError, match=r"the quantity 'pairs' has the shape \(8, 8\); it must be \[\], \[B\] or"):
        run(untouched, wrong)


def test_two_quantities_cannot_have_one_name():
    with pytest.raises(ValueError, match="two required quantities are called 'tv'"):
        Requirements(quantities=(HeadQuantity("tv", total_variation), IterationQuantity("tv", ranks)))


def test_an_objective_of_a_transform_alone_is_clipped_grpo_with_a_token_mean():
    objective = Objective(group_relative_advantages())
    assert optax.tree.get(objective.ascent.init(TABLE), "multiplier") is None
    losses, clipped = objective.surrogate(
        np.log([[1.3, 0.7]]).astype(np.float32),
        old_logps=np.zeros((1, 2), np.float32),
        advantages=np.array([[1.0, -1.0]], np.float32),
        weights=np.ones((1, 2), np.float32),
        mask=np.ones((1, 2), bool),
    )
    np.testing.assert_allclose(losses, [[-1.28, 0.8]], rtol=1e-6)
    assert clipped.all()
