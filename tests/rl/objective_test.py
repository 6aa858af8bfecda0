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
    MinibatchQuantity,
    Objective,
    PolicyOutputs,
    Requirements,
    chain,
    group_relative_advantages,
    m2po,
    make_train_step,
    policy_gradient,
    scale_by_sequence_ess,
)
from dcjax.rl.transforms import Context
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


SGD = optax.with_extra_args_support(optax.sgd(1.0))


def run(transform, requires, *, provided=None, batch=BATCH, microbatch_size=ROWS, updates=1, tx=SGD):
    """The table after one step of plain gradient descent, and the metrics."""
    step = make_train_step(
        partial(policy, requires=requires if provided is None else provided),
        tx,
        policy_gradient,
        chain(group_relative_advantages(), transform),
        requires=requires,
        group_size=G,
        microbatch_size=microbatch_size,
        updates=updates,
    )
    state = TrainState(jnp.zeros((), jnp.int32), jnp.asarray(TABLE), tx.init(TABLE), jnp.zeros(()))
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


def above_mean(iteration):
    """By token: whether its log-prob is above the mean of all tokens."""
    return iteration.old_logps > jnp.mean(iteration.old_logps)


OF_ITERATION = Requirements(
    quantities=tuple(
        IterationQuantity(compute.__name__, compute) for compute in (median_gap, gap_of_longest, ranks, above_mean)
    )
)


def log_them(terms, context):
    shown = {
        "median": jnp.broadcast_to(context.quantities["median_gap"], terms.mask.shape[:1]),
        "row": context.quantities["gap_of_longest"],
        "token": jnp.sum(context.quantities["ranks"] * context.old_logps, axis=1),
        "mask": jnp.mean(context.quantities["above_mean"], axis=1),
    }
    return dataclasses.replace(terms, metrics=terms.metrics | shown)


@pytest.mark.parametrize(
    ("microbatch_size", "updates"),
    [pytest.param(ROWS, 1, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow), (2, 2)],
)
def test_quantities_of_the_iteration_are_of_all_its_rows_in_every_minibatch(microbatch_size, updates):
    old = np.asarray(policy(TABLE, BATCH).logps)
    gap = np.abs(old - BATCH.rollout_logps)
    rows = np.where(MASK, gap, 0).sum(1)
    order = np.argsort(np.argsort(np.where(MASK, gap, -1).ravel(), kind="stable"), kind="stable").reshape(gap.shape)
    _, metrics = run(log_them, OF_ITERATION, microbatch_size=microbatch_size, updates=updates)
    np.testing.assert_allclose(metrics["median"], np.median(gap[MASK]), rtol=1e-5)
    np.testing.assert_allclose(metrics["row"], np.mean(rows / rows.max()), rtol=1e-5)
    np.testing.assert_allclose(metrics["mask"], np.mean(old > old.mean()), rtol=1e-5)
    np.testing.assert_allclose(metrics["token"], np.mean((order * old).sum(1)), rtol=1e-5)


# --- of a minibatch, at its current parameters ---


BOUND = 1.0
"""By which M2PO drops some tokens of this batch's trust regions."""
M2PO, KEPT = m2po(group_relative_advantages(), BOUND)


def m2po_loop(logps, batch, minibatch):
    """Tokens of these rows that the paper's algorithm drops, one after another."""
    relative = batch.rewards - batch.group_rewards.mean(1)
    moments = {}
    for i in np.flatnonzero(minibatch):
        for t in np.flatnonzero(batch.response_mask[i]):
            gap = float(logps[i, t]) - float(batch.rollout_logps[i, t])
            if relative[i] * gap > 0:
                moments[i, t] = gap**2
    dropped = np.zeros(batch.response_mask.shape, bool)
    while moments and np.mean(list(moments.values())) > BOUND:
        largest = max(moments, key=lambda at: moments[at])
        dropped[largest] = True
        del moments[largest]
    return dropped


def log_dropped(terms, context):
    """By row, the dropped tokens as the digits of one number."""
    dropped = context.batch.response_mask & ~context.quantities["m2po_kept"]
    shown = jnp.sum(dropped * 2.0 ** jnp.arange(T), axis=1) * 8.0 ** context.batch.tokens[:, 0]
    return dataclasses.replace(terms, metrics=terms.metrics | {"dropped": shown})


@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("microbatch_size", [pytest.param(1, marks=pytest.mark.slow), 2, ROWS])
def test_m2po_drops_the_same_tokens_of_the_whole_minibatch_however_it_is_cut(microbatch_size, updates):
    # a row's first token is its number, for the base of its digits
    batch = dataclasses.replace(BATCH, tokens=np.concatenate([np.arange(ROWS)[:, None], BATCH.tokens[:, 1:]], axis=1))
    _, metrics = run(
        chain(M2PO, log_dropped),
        Requirements(quantities=(KEPT,)),
        batch=batch,
        microbatch_size=min(microbatch_size, ROWS // updates),
        updates=updates,
        # so that the second update's parameters are the first's
        tx=optax.with_extra_args_support(optax.sgd(0.0)),
    )
    logps, expected = np.asarray(policy(TABLE, batch).logps), np.zeros((ROWS, T), bool)
    for update in range(updates):
        expected |= m2po_loop(logps, batch, np.arange(ROWS) // G % updates == update)
    assert 0 < expected.sum() < MASK.sum()
    digits = (expected * 2.0 ** np.arange(T)).sum(1) * 8.0 ** np.arange(ROWS)
    assert float(metrics["dropped"]) * ROWS == digits.sum()


def test_a_batch_cut_by_row_would_drop_others():
    """That the test above can fail: each row, or each pair, by itself is another mask."""
    logps = np.asarray(policy(TABLE, BATCH).logps)
    whole = m2po_loop(logps, BATCH, np.ones(ROWS, bool))
    for size in (1, 2):
        parts = sum(m2po_loop(logps, BATCH, np.arange(ROWS) // size == part) for part in range(ROWS // size))
        assert (parts != whole).any()


def test_a_quantity_of_the_minibatch_is_of_its_current_parameters():
    """With two updates: of the first, nothing has been learnt; of the second, as much as staleness measures."""
    mask = BATCH.response_mask

    def learnt(context):
        return jnp.sum(jnp.where(context.batch.response_mask, context.logps - context.old_logps, 0))

    def log_it(terms, context):
        shown = {"learnt": jnp.broadcast_to(context.quantities["learnt"], terms.mask.shape[:1])}
        return dataclasses.replace(terms, metrics=terms.metrics | shown)

    _, metrics = run(
        log_it, Requirements(quantities=(MinibatchQuantity("learnt", learnt),)), updates=2, microbatch_size=2
    )
    # the mean over rows of 0 for one half and the sum for the other
    assert abs(float(metrics["learnt"])) > 1e-3
    np.testing.assert_allclose(2 * metrics["learnt"], -metrics["staleness/k1"] * mask.sum(), rtol=1e-4)


def test_a_quantity_of_the_minibatch_reads_those_of_the_iteration():
    def doubled(context):
        return 2 * context.quantities["median_gap"]

    def log_it(terms, context):
        shown = {"doubled": jnp.broadcast_to(context.quantities["doubled"], terms.mask.shape[:1])}
        return log_them(dataclasses.replace(terms, metrics=terms.metrics | shown), context)

    both = Requirements(quantities=(*OF_ITERATION.quantities, MinibatchQuantity("doubled", doubled)))
    _, metrics = run(log_it, both, microbatch_size=2)
    np.testing.assert_allclose(metrics["doubled"], 2 * metrics["median"], rtol=1e-6)


def test_the_mask_is_the_same_where_the_rows_are_on_several_devices():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("rows",))
    apart = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    context = Context(BATCH, policy(TABLE, BATCH).logps, BATCH.rollout_logps, None, jnp.float32(0.5))
    placed = jax.device_put(context, jax.tree.map(lambda x: apart if x.ndim else None, context))
    kept, ours = (np.asarray(jit(KEPT.compute)(given)) for given in (context, placed))
    np.testing.assert_array_equal(ours, kept)
    assert not kept[MASK].all()


def test_the_optimiser_is_given_the_effective_share_of_the_minibatchs_responses():
    logps = np.asarray(policy(TABLE, BATCH).logps)
    log_weights = np.where(MASK, np.float64(logps) - BATCH.rollout_logps, 0).sum(1)
    weights = np.exp(log_weights - log_weights.max())
    share = weights.sum() ** 2 / (ROWS * (weights**2).sum())
    plain, without = run(untouched, NOTHING)
    scaled, metrics = run(untouched, NOTHING, tx=optax.chain(optax.sgd(1.0), scale_by_sequence_ess()))
    assert 1 / ROWS < share < 0.9 and "ess_scale" not in without
    np.testing.assert_allclose(TABLE - scaled, share**0.5 * (TABLE - plain), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(metrics["ess_scale"], share**0.5, rtol=1e-5)
    np.testing.assert_allclose(metrics["mismatch/ess_sequence"], share, rtol=1e-5)


@pytest.mark.parametrize(("updates", "microbatch_size"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 1)])
def test_the_skew_is_of_the_parameters_of_each_update(updates, microbatch_size):
    _, metrics = run(untouched, NOTHING, updates=updates, microbatch_size=microbatch_size)
    found = {name: float(value) for name, value in metrics.items() if name.startswith("skew/")}
    relative = (REWARDS - BATCH.group_rewards.mean(1)) / (BATCH.group_rewards.std(1, ddof=1) + 1e-6)
    first = MASK & (np.arange(ROWS) // G % updates == 0)[:, None]

    def loss(table):
        return -jnp.sum(jnp.where(first, relative[:, None] * policy(table, BATCH).logps, 0)) / first.sum()

    old = np.asarray(policy(TABLE, BATCH).logps)
    now = np.where(first, old, policy(TABLE - jit(jax.grad(loss))(TABLE), BATCH).logps)
    references = {"engine": BATCH.rollout_logps}
    if updates > 1:
        # where π_old is of the very pass that is differentiated there is no such ratio
        references["policy"] = old
    assert set(found) == {f"skew/{name}_{sign}" for name in references for sign in ("positive", "negative")}
    for name, reference in references.items():
        added = np.where(MASK, -(np.exp(now - reference) - 1) * relative[:, None], 0)
        for word, sign in (("positive", 1), ("negative", -1)):
            expected = added[sign * relative > 0].sum() / MASK.sum()
            assert expected
            np.testing.assert_allclose(found[f"skew/{name}_{word}"], expected, rtol=1e-3, atol=1e-7)


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
    wrong = Requirements(quantities=(MinibatchQuantity("column", lambda context: jnp.zeros(T)),))
    with pytest.raises(ValueError, match=r"the quantity 'column' has the shape \(3,\); it must be \[\], \[B\] or"):
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
