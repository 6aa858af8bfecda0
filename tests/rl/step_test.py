"""The step against re-implementations: plain JAX for the transformer, NumPy with analytic gradients for a bigram."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from by_rows import apply_by_rows
from compiling import jit
from jax.extend.core import jaxprs_in_params

from dcjax.models import forward
from dcjax.rl import (
    chain,
    clipped_surrogate,
    discrepancy_penalty,
    drop_zero_variance,
    dual_ascent,
    dynamic_loss_scale,
    group_relative_advantages,
    make_train_step,
    probability_difference,
)
from dcjax.rl.masked import LossSum
from dcjax.types import Batch, TrainState

pytestmark = pytest.mark.heavy

MODEL = dataclasses.replace(tiny.DENSE, remat="none")
VOCABULARY = 16
"""Tokens that occur: few, so that responses share them."""
GROUPS, G, P, T = 4, 4, 4, 6
ROWS = GROUPS * G
LOW, HIGH = 0.1, 0.15
LAMBDA, DUAL_LR, BUDGET = 0.5, 2.0, 0.01
slow = partial(pytest.param, marks=pytest.mark.slow)
surrogate = partial(clipped_surrogate, eps_low=LOW, eps_high=HIGH)
penalty, drop_equal = discrepancy_penalty(probability_difference), drop_zero_variance()


def ascent(**changes):
    return dual_ascent(**({"dual_lr": DUAL_LR, "budget": BUDGET, "init_value": LAMBDA, "max_value": 10.0} | changes))


def make_batch(old_logps_of):
    """Ragged prompts and responses; the second group's rewards are all equal; log-probs near the policy's own."""
    rng = np.random.default_rng(0)
    rewards = np.array([1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0.5, 0, 0, 1], np.float32)
    tokens = rng.integers(0, VOCABULARY, (ROWS, P + T)).astype(np.int32)
    prompt_mask = np.arange(P) >= rng.integers(0, P, (ROWS, 1))
    response_mask = np.arange(T) < rng.integers(1, T + 1, (ROWS, 1))
    batch = Batch(
        tokens=tokens,
        attention_mask=np.concatenate([prompt_mask, response_mask], axis=1),
        response_mask=response_mask,
        rollout_logps=np.zeros((ROWS, T), np.float32),
        temperature=np.repeat(np.array([1.0, 0.8, 1.0, 1.3], np.float32), G),
        rewards=rewards,
        group_rewards=np.repeat(rewards.reshape(GROUPS, G), G, axis=0),
    )
    rollout = np.asarray(old_logps_of(batch)) + rng.normal(0, 0.2, (ROWS, T)).astype(np.float32)
    return dataclasses.replace(batch, rollout_logps=np.where(batch.response_mask, rollout, 0))


def fresh_state(params, tx):
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.zeros(()))


def advantages_of(batch, multiplier, delta):
    rewards, group = np.float64(batch.rewards), np.float64(batch.group_rewards)
    relative = (rewards - group.mean(1)) / (group.std(1, ddof=1) + 1e-6)
    return relative[:, None] - multiplier * delta


def mean_of_responses(x, mask):
    return np.mean([row[kept].mean() for row, kept in zip(x, mask, strict=True) if kept.any()])


# --- an iteration as a plain loop ---


@partial(jit, static_argnums=0)
def plain_policy(policy, params, batch):
    return policy(params, batch)


@partial(jit, static_argnums=0)
def plain_loss(policy, params, batch, old_logps, advantages, mask):
    def loss(params):
        logps, entropy, _ = policy(params, batch)
        r = jnp.exp(logps - old_logps)
        losses = -jnp.minimum(r * advantages, jnp.clip(r, 1 - LOW, 1 + HIGH) * advantages)
        return jnp.sum(jnp.where(mask, losses, 0)) / jnp.sum(mask), (logps, entropy)

    return jax.value_and_grad(loss, has_aux=True)(params)


def plain_iteration(policy, params, batch, *, updates=1, learning_rate, drop=False):
    """One training iteration, a Python loop over updates, every one on its whole minibatch; metrics in NumPy."""
    mask = batch.response_mask
    old = np.asarray(plain_policy(policy, params, batch)[0])
    delta = np.abs(np.exp(np.float64(old)) - np.exp(np.float64(batch.rollout_logps)))
    advantages = advantages_of(batch, LAMBDA, delta).astype(np.float32)
    counted = mask & (np.ptp(batch.group_rewards, axis=1) > 0)[:, None] if drop else mask
    losses, norms, logps, entropies = [], [], np.zeros((ROWS, T)), np.zeros((ROWS, T))
    for update in range(updates):
        # whole groups, dealt in turn
        mine = (np.arange(ROWS) // G % updates == update)[:, None]
        (loss, (now, entropy)), grads = plain_loss(policy, params, batch, old, advantages, counted & mine)
        losses.append(float(loss))
        grads = jax.device_get(grads)
        norms.append(np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads))))
        logps, entropies = np.where(mine, now, logps), np.where(mine, entropy, entropies)
        params = jax.tree.map(lambda p, g: np.asarray(p) - learning_rate * g, params, grads)
    r = np.exp(logps - old)
    clipped = np.where(advantages > 0, r > 1 + HIGH, r < 1 - LOW)
    gap, moved = np.float64(old) - batch.rollout_logps, logps - old
    mean_gap = mean_of_responses(delta, mask)
    metrics = {
        "loss": np.mean(losses),
        "grad_norm": np.mean(norms),
        "grad_norm_smoothed": np.mean(norms),
        "reward": batch.rewards.mean(),
        "response_length": mask.sum() / ROWS,
        "entropy": entropies[mask].mean(),
        "dual/discrepancy": mean_gap,
        "dual/multiplier": LAMBDA,
        "mismatch/prob_diff_mean": delta[mask].mean(),
        "mismatch/prob_diff_max": delta[mask].max(),
        "mismatch/k3": (np.exp(gap) - 1 - gap)[mask].mean(),
        "mismatch/log_ppl_abs_diff": np.mean(np.abs(np.where(mask, gap, 0).sum(1))),
    }
    if drop:
        metrics["dropped_fraction"] = 1 / GROUPS
    else:
        metrics["clip_fraction"] = clipped[mask].mean()
    if updates > 1:
        metrics["staleness/prob_diff_mean"] = np.abs(np.exp(logps) - np.exp(old))[mask].mean()
        metrics["staleness/k3"] = (np.exp(moved) - 1 - moved)[mask].mean()
    return params, LAMBDA + DUAL_LR * (mean_gap - BUDGET), metrics


def check(state, metrics, expected, *, tolerance):
    params, multiplier, expected_metrics = expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), state.params, params)
    np.testing.assert_allclose(optax.tree.get(state.opt_state, "multiplier"), multiplier, rtol=1e-5)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=0, atol=tolerance)
    assert int(state.step) == 1


# --- the transformer ---


def plain_transformer(params, batch):
    logits = forward(MODEL, params, batch.tokens, batch.attention_mask)[:, P - 1 : -1]
    distribution = jax.nn.log_softmax(logits / batch.temperature[:, None, None])
    logps = jnp.take_along_axis(distribution, batch.tokens[:, P:, None], axis=-1)[..., 0]
    return logps, -jnp.sum(jnp.exp(distribution) * distribution, axis=-1), {}


@pytest.mark.parametrize(
    ("updates", "drop", "microbatch_size"),
    [(2, True, 4), slow(4, False, 2), *(slow(1, False, microbatch_size) for microbatch_size in (2, 4, 8, 16))],
)
def test_an_iteration_of_the_transformer_is_the_plain_loops(updates, drop, microbatch_size):
    params, learning_rate = tiny.masters(MODEL), 1.0 if updates > 1 else 0.1
    batch = make_batch(lambda batch: plain_policy(plain_transformer, params, batch)[0])
    expected = plain_iteration(
        plain_transformer, params, batch, updates=updates, learning_rate=learning_rate, drop=drop
    )
    tx = optax.chain(optax.sgd(learning_rate), ascent(every=updates))
    transforms = [group_relative_advantages(), *([drop_equal] if drop else []), penalty]
    step = make_train_step(
        partial(apply_by_rows, MODEL),
        tx,
        surrogate,
        chain(*transforms),
        group_size=G,
        microbatch_size=microbatch_size,
        updates=updates,
    )
    state, metrics = jit(step)(fresh_state(params, tx), batch)
    # the policy has moved far enough between updates for the clip to bite
    assert updates == 1 or metrics["clip_fraction"] > 0.05
    check(state, metrics, expected, tolerance=1e-5 if updates > 1 else 1e-6)


# --- a bigram: logits are one row of a table, so that gradients are written by hand ---


def bigram(table, batch):
    logits = table[batch.tokens[:, P - 1 : -1]] / batch.temperature[:, None, None]
    distribution = jax.nn.log_softmax(logits)
    logps = jnp.take_along_axis(distribution, batch.tokens[:, P:, None], axis=-1)[..., 0]
    traces.append(batch.tokens.shape)
    return logps, -jnp.sum(jnp.exp(distribution) * distribution, axis=-1), {"observed": batch.rewards * 3}


traces = []
TABLE = np.random.default_rng(2).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)


@pytest.fixture(scope="module")
def pairs():
    """A batch for the bigram."""
    return make_batch(lambda batch: plain_policy(bigram, TABLE, batch)[0])


def bigram_optimizer(learning_rate=0.5, *, updates=1, loss_scale=None, dual=True):
    descent = optax.sgd(learning_rate)
    if loss_scale is not None:
        descent = dynamic_loss_scale(descent, init_value=loss_scale, growth_interval=2)
    return optax.chain(descent, ascent(every=updates) if dual else optax.identity())


@functools.cache
def compiled(*transforms, policy=bigram, microbatch_size=2, updates=1, ahead=False, **optimizer):
    """A step of the bigram that takes its learning rate too."""

    def step(learning_rate, state, batch):
        return make_train_step(
            policy,
            bigram_optimizer(learning_rate, updates=updates, **optimizer),
            surrogate,
            chain(group_relative_advantages(), *transforms),
            group_size=G,
            microbatch_size=microbatch_size,
            updates=updates,
            ahead=ahead,
        )(state, batch)

    return jit(step)


def bigram_step(*transforms, learning_rate=0.5, loss_scale=None, dual=True, **settings):
    # only the first state depends on where the scale begins
    optimizer = {"loss_scale": loss_scale and 1.0, "dual": dual}
    step = compiled(*transforms, **settings, **optimizer)
    tx = bigram_optimizer(updates=settings.get("updates", 1), loss_scale=loss_scale, dual=dual)
    return partial(step, np.float32(learning_rate)), fresh_state(TABLE, tx)


@pytest.mark.parametrize("microbatch_size", [2, slow(4), slow(8), 16])
def test_one_update_is_that_of_the_whole_batch_whatever_the_microbatch_size(pairs, microbatch_size):
    step, state = bigram_step(penalty, microbatch_size=microbatch_size)
    state, metrics = step(state, pairs)
    check(state, metrics, plain_iteration(bigram, TABLE, pairs, learning_rate=0.5), tolerance=1e-6)
    assert not any(name.startswith("staleness") for name in metrics)


@pytest.mark.parametrize("updates", [2, slow(4)])
def test_several_updates_share_old_log_probs_and_one_step_of_the_multiplier(pairs, updates):
    step, state = bigram_step(penalty, updates=updates, learning_rate=20.0)
    state, metrics = step(state, pairs)
    # the policy has moved far enough between updates for the clip to bite
    assert metrics["clip_fraction"] > 0.05
    check(state, metrics, plain_iteration(bigram, TABLE, pairs, updates=updates, learning_rate=20.0), tolerance=1e-5)


def bigram_update(batch, mask, advantages, learning_rate=0.5):
    """On-policy: Σ −Ã ∇log π / N, with ∇log π = (onehot − p) / temperature, in float64."""
    grad = np.zeros(TABLE.shape)
    for row, column in zip(*np.nonzero(mask), strict=True):
        previous, token = batch.tokens[row, P - 1 + column], batch.tokens[row, P + column]
        temperature = np.float64(batch.temperature[row])
        p = np.exp(TABLE[previous] / temperature)
        p /= p.sum()
        grad[previous] -= advantages[row, column] * ((np.arange(len(p)) == token) - p) / temperature
    return TABLE - learning_rate * grad / max(mask.sum(), 1)


def bigram_gap(batch):
    logps = np.float64(plain_policy(bigram, TABLE, batch)[0])
    return np.abs(np.exp(logps) - np.exp(np.float64(batch.rollout_logps)))


def test_the_gradient_by_hand(pairs):
    advantages = advantages_of(pairs, LAMBDA, bigram_gap(pairs))
    step, state = bigram_step(penalty)
    state, metrics = step(state, pairs)
    expected = bigram_update(pairs, pairs.response_mask, advantages)
    np.testing.assert_allclose(state.params, expected, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], -advantages[pairs.response_mask].mean(), rtol=1e-4)


def test_the_end_token_gets_its_gradient_and_its_penalty(pairs):
    # one response's last token is sampled with another probability; nothing else changes
    row = 2
    last = int(pairs.response_mask[row].sum()) - 1
    rollout = pairs.rollout_logps.copy()
    rollout[row, last] = np.log(0.999)
    other = dataclasses.replace(pairs, rollout_logps=rollout)
    step, state = bigram_step(penalty)
    (before, plain), (after, penalised) = step(state, pairs), step(state, other)
    change = bigram_gap(other) - bigram_gap(pairs)
    assert change[row, last] > 0.1
    assert np.count_nonzero(change) == 1
    # −Ã/N grows by λ·Δδ/N
    expected = LAMBDA * change[row, last] / pairs.response_mask.sum()
    np.testing.assert_allclose(penalised["loss"] - plain["loss"], expected, rtol=1e-3)
    previous = pairs.tokens[row, P - 1 + last]
    moved = np.abs(np.asarray(after.params - before.params)).max(axis=1)
    assert moved[previous] > 1e-4
    assert (np.delete(moved, previous) < 1e-7).all()


def test_dropped_groups_leave_the_loss_but_not_the_mean_gap(pairs):
    # make the dropped group's gap the largest
    rollout = np.where(pairs.response_mask, pairs.rollout_logps, 0)
    rollout[G : 2 * G] = np.log(0.999) * pairs.response_mask[G : 2 * G]
    batch = dataclasses.replace(pairs, rollout_logps=rollout)
    kept = np.ones((ROWS, 1), bool)
    kept[G : 2 * G] = False
    gap = bigram_gap(batch)
    step, state = bigram_step(drop_equal, penalty)
    state, metrics = step(state, batch)
    everywhere = mean_of_responses(gap, batch.response_mask)
    assert everywhere > 1.5 * mean_of_responses(gap, batch.response_mask & kept)
    np.testing.assert_allclose(metrics["dual/discrepancy"], everywhere, rtol=1e-4)
    expected = LAMBDA + DUAL_LR * (everywhere - BUDGET)
    np.testing.assert_allclose(optax.tree.get(state.opt_state, "multiplier"), expected, rtol=1e-4)
    advantages = advantages_of(batch, LAMBDA, gap)
    np.testing.assert_allclose(state.params, bigram_update(batch, batch.response_mask & kept, advantages), atol=1e-6)
    assert float(metrics["dropped_fraction"]) == 0.25


def test_the_multiplier_in_use_is_the_one_before_its_step(pairs):
    step, state = bigram_step(penalty)
    gap = mean_of_responses(bigram_gap(pairs), pairs.response_mask)
    for iteration in range(3):
        # the same policy each time
        state, metrics = step(dataclasses.replace(state, params=jnp.array(TABLE)), pairs)
        expected = LAMBDA + iteration * DUAL_LR * (gap - BUDGET)
        np.testing.assert_allclose(metrics["dual/multiplier"], expected, rtol=1e-5)
        advantages = advantages_of(pairs, expected, bigram_gap(pairs))
        np.testing.assert_allclose(metrics["loss"], -advantages[pairs.response_mask].mean(), rtol=1e-4, atol=1e-6)


def test_grpo_is_dc_grpo_with_a_multiplier_that_is_zero(pairs):
    (step, state), (dc_step, dc_state) = bigram_step(dual=False), bigram_step(penalty)
    grpo, plain = step(state, pairs)
    opt_state = optax.tree.set(dc_state.opt_state, multiplier=jnp.zeros(()))
    dc_grpo, zero = dc_step(dataclasses.replace(dc_state, opt_state=opt_state), pairs)
    assert optax.tree.get(grpo.opt_state, "multiplier") is None
    np.testing.assert_allclose(grpo.params, dc_grpo.params, rtol=0, atol=1e-7)
    # what the ascent logs of itself
    assert set(zero) - set(plain) == {
        "dual/budget",
        "dual/excess",
        "dual/over_budget_fraction",
        "dual/saturated",
    }
    assert float(plain["dual/multiplier"]) == 0
    for name, value in plain.items():
        np.testing.assert_allclose(zero[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    # the two policies do differ
    assert float(zero["dual/discrepancy"]) > 1e-3


@pytest.mark.parametrize("updates", [2, slow(4)])
def test_the_first_update_of_an_iteration_is_not_stale(pairs, updates):
    # only the first minibatch has response tokens, so that the metric is of the first update alone
    first = (np.arange(ROWS) // G % updates == 0)[:, None]
    step, state = bigram_step(penalty, updates=updates, learning_rate=20.0)
    _, metrics = step(state, dataclasses.replace(pairs, response_mask=pairs.response_mask & first))
    assert float(metrics["staleness/prob_diff_mean"]) < 1e-7
    assert float(metrics["clip_fraction"]) == 0
    _, metrics = step(state, pairs)
    assert float(metrics["staleness/prob_diff_mean"]) > 1e-3


@pytest.mark.parametrize("updates", [1, 2])
def test_the_multiplier_moves_once_an_iteration_by_the_gap_of_all_responses(pairs, updates):
    step, state = bigram_step(penalty, updates=updates, learning_rate=20.0 if updates > 1 else 0.5)
    state, metrics = step(state, pairs)
    gap = mean_of_responses(bigram_gap(pairs), pairs.response_mask)
    np.testing.assert_allclose(metrics["dual/discrepancy"], gap, rtol=1e-4)
    expected = LAMBDA + DUAL_LR * (gap - BUDGET)
    np.testing.assert_allclose(optax.tree.get(state.opt_state, "multiplier"), expected, rtol=1e-5)


def executions(jaxpr, primitive):
    """How often a run of the program would execute it."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += equation.primitive.name == primitive
        total += times * sum(executions(inner, primitive) for inner in jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize(("updates", "passes"), [(1, 1), (2, 2), (4, 2)])
def test_old_log_probs_cost_a_second_pass_only_with_several_updates(pairs, updates, passes):
    def counted(table, batch):
        # of no other use, and gone from no program
        ones = jax.lax.population_count(batch.tokens[:, P:])
        logps, *rest = bigram(table, batch)
        return logps + 0 * ones, *rest

    tx = bigram_optimizer(updates=updates)
    step = make_train_step(counted, tx, surrogate, penalty, group_size=G, microbatch_size=2, updates=updates)
    program = jax.make_jaxpr(step)(fresh_state(TABLE, tx), pairs)
    assert executions(program.jaxpr, "population_count") == passes * ROWS // 2


@pytest.mark.parametrize("updates", [1, 2])
def test_a_second_iteration_traces_nothing_again(pairs, updates):
    step, state = bigram_step(penalty, updates=updates)
    state, _ = step(state, pairs)
    traced = len(traces)
    step(state, pairs)
    assert len(traces) == traced > 0


def test_the_order_of_groups_and_of_rows_in_them_does_not_matter(pairs):
    step, state = bigram_step(penalty)
    (expected, plain), order = step(state, pairs), np.random.default_rng(0).permutation(ROWS)
    shuffled, metrics = step(state, jax.tree.map(lambda x: x[order], pairs))
    np.testing.assert_allclose(shuffled.params, expected.params, atol=1e-6)
    for name, value in plain.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_batch_without_a_response_token_moves_only_the_multiplier(pairs):
    step, state = bigram_step(penalty)
    empty = dataclasses.replace(pairs, response_mask=np.zeros((ROWS, T), bool))
    after, metrics = step(state, empty)
    np.testing.assert_array_equal(after.params, TABLE)
    assert np.isfinite(list(metrics.values())).all()
    np.testing.assert_allclose(optax.tree.get(after.opt_state, "multiplier"), LAMBDA - DUAL_LR * BUDGET, rtol=1e-6)


def test_when_every_group_is_dropped_parameters_stay(pairs):
    step, state = bigram_step(drop_equal, penalty)
    after, metrics = step(
        state, dataclasses.replace(pairs, rewards=np.ones(ROWS, "f"), group_rewards=np.ones((ROWS, G), "f"))
    )
    np.testing.assert_array_equal(after.params, TABLE)
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), float(metrics["dropped_fraction"])) == (0, 0, 1)
    assert float(metrics["dual/discrepancy"]) > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_step_ignores_log_probs_that_are_not_finite_on_padding(pairs, bad):
    step, state = bigram_step(penalty)
    expected, plain = step(state, pairs)
    rollout = np.where(pairs.response_mask, pairs.rollout_logps, bad).astype(np.float32)
    after, metrics = step(state, dataclasses.replace(pairs, rollout_logps=rollout))
    assert {name: float(x) for name, x in metrics.items()} == {name: float(x) for name, x in plain.items()}
    np.testing.assert_array_equal(after.params, expected.params)


def test_the_smoothed_gradient_norm_starts_at_the_first_and_moves_by_a_tenth(pairs):
    step, state = bigram_step(penalty)
    smoothed = None
    for iteration in range(3):
        state, metrics = step(state, pairs)
        norm = float(metrics["grad_norm"])
        smoothed = norm if smoothed is None else 0.9 * smoothed + 0.1 * norm
        np.testing.assert_allclose(metrics["grad_norm_smoothed"], smoothed, rtol=1e-5)
        assert float(state.grad_norm_smoothed) == float(metrics["grad_norm_smoothed"])
        assert int(state.step) == iteration + 1


@pytest.mark.parametrize("updates", [1, 2])
def test_a_log_prob_of_the_trainers_that_is_not_finite_is_found_by_its_place(pairs, updates):
    row, column = 6, int(pairs.response_mask[6].sum()) - 1
    # a token that nothing else follows, so that its logits alone can be broken
    tokens = pairs.tokens.copy()
    tokens[tokens == 5] = 4
    tokens[row, P - 1 + column] = 5
    batch = dataclasses.replace(pairs, tokens=tokens)
    step, state = bigram_step(penalty, updates=updates)
    assert int(step(state, batch)[1]["nonfinite_at"]) == -1
    broken = TABLE.copy()
    broken[5] = np.nan
    state = dataclasses.replace(state, params=jnp.array(broken))
    assert divmod(int(step(state, batch)[1]["nonfinite_at"]), T) == (row, column)


def test_a_loss_scale_changes_nothing_that_is_finite(pairs):
    def run(loss_scale):
        step, state = bigram_step(penalty, updates=2, loss_scale=loss_scale)
        return step(state, pairs)

    (expected, plain), (one, unscaled), (after, metrics) = run(None), run(1.0), run(2.0**15)
    assert (float(metrics.pop("loss_scale")), float(metrics.pop("overflow"))) == (2.0**15, 0)
    # a power of two scales without rounding: in one program every bit is the same
    for name in plain:
        np.testing.assert_array_equal(metrics[name], unscaled[name], err_msg=name)
    np.testing.assert_array_equal(after.params, one.params)
    # the program without a scale is another; staleness is what is left where it subtracts numbers near 1
    np.testing.assert_allclose(after.params, expected.params, rtol=1e-6, atol=1e-7)
    for name in plain:
        if not name.startswith("staleness/"):
            np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-6, err_msg=name)
    # it grew after two updates
    assert float(optax.tree.get(after.opt_state, "loss_scale")) == 2.0**16


def test_gradients_that_overflow_move_the_multiplier_and_the_scale_alone(pairs):
    def overflowing(table, batch):
        # half precision takes the scaled gradient, which is beyond its 65,504
        return bigram(table.astype(jnp.float16).astype(jnp.float32), batch)

    step, state = bigram_step(penalty, policy=overflowing, loss_scale=2.0**20)
    after, metrics = step(state, pairs)
    np.testing.assert_array_equal(after.params, TABLE)
    assert float(metrics["overflow"]) == 1
    assert not np.isfinite(metrics["grad_norm"])
    assert float(metrics["grad_norm_smoothed"]) == 0
    assert np.isfinite([value for name, value in metrics.items() if name != "grad_norm"]).all()
    assert float(optax.tree.get(after.opt_state, "loss_scale")) == 2.0**19
    assert float(optax.tree.get(after.opt_state, "multiplier")) != LAMBDA
    # it comes down until gradients fit, and then trains
    for _ in range(12):
        after, metrics = step(after, pairs)
    assert float(metrics["overflow"]) == 0
    assert np.abs(after.params - TABLE).max() > 1e-3
    assert float(after.grad_norm_smoothed) > 0


def test_the_policys_own_metrics_are_means_over_all_rows(pairs):
    step, state = bigram_step(penalty)
    _, metrics = step(state, pairs)
    np.testing.assert_allclose(metrics["observed"], 3 * pairs.rewards.mean(), rtol=1e-6)


def test_microbatches_are_added_up_in_float32_for_narrow_parameters_too(pairs):
    """256 and fifteen ones: added one by one in bfloat16 they are 256."""

    def policy(params, batch):
        logps = params * batch.temperature[:, None].astype(params.dtype) * jnp.ones((1, T), params.dtype)
        return logps.astype(jnp.float32), jnp.zeros(logps.shape), {}

    def itself(logps, **_):
        return logps, jnp.zeros(logps.shape, bool)

    def of_first_tokens(losses, mask):
        return LossSum(jnp.sum(losses[:, 0]), jnp.ones(()))

    tx = optax.with_extra_args_support(optax.sgd(1.0))
    step = make_train_step(policy, tx, itself, chain(), aggregate=of_first_tokens, group_size=1, microbatch_size=1)
    batch = dataclasses.replace(pairs, temperature=np.array([256] + [1] * (ROWS - 1), np.float32))
    state, _ = jit(step)(fresh_state(jnp.zeros((), jnp.bfloat16), tx), batch)
    # divided by the sixteen ones of the denominator
    assert float(state.params) == -float(jnp.bfloat16(271 / 16))


def test_a_penalty_without_dual_ascent_is_refused_while_tracing(pairs):
    step = make_train_step(
        bigram, optax.with_extra_args_support(optax.sgd(1.0)), surrogate, penalty, group_size=G, microbatch_size=4
    )
    with pytest.raises(ValueError, match="dual_ascent"):
        jax.eval_shape(step, fresh_state(TABLE, optax.sgd(1.0)), pairs)


@pytest.mark.parametrize("updates", [slow(1), 2])
def test_past_parameters_move_up_by_one_an_iteration(pairs, updates):
    step, state = bigram_step(penalty, updates=updates)
    first = jnp.copy(state.params)
    state = dataclasses.replace(state, history=(first + 2, first + 1))
    after, _ = step(state, pairs)
    for kept, expected in zip(after.history, (first + 1, first), strict=True):
        np.testing.assert_array_equal(kept, expected)
    assert np.abs(after.params - first).max() > 1e-3
    # they are kept, and otherwise not looked at
    plain, _ = step(dataclasses.replace(state, history=()), pairs)
    assert plain.history == ()
    np.testing.assert_array_equal(plain.params, after.params)


@pytest.mark.parametrize("updates", [1, slow(2)])
def test_ahead_of_the_trainer_mismatch_is_of_the_policy_that_sampled_and_staleness_what_was_learnt_since(
    pairs, updates
):
    step, state = bigram_step(penalty, updates=updates, ahead=True)
    before = jnp.array(TABLE)
    now = before + 0.1 * np.random.default_rng(1).normal(size=TABLE.shape).astype(np.float32)
    old, logps = (plain_policy(bigram, params, pairs)[0] for params in (before, now))
    # an engine without any mismatch, two iterations behind
    exact = dataclasses.replace(pairs, rollout_logps=np.asarray(old))
    _, metrics = step(dataclasses.replace(state, params=now, history=(before, now - 1)), exact)
    assert float(metrics["mismatch/prob_diff_max"]) < 1e-6
    assert float(metrics["dual/discrepancy"]) < 1e-6
    moved = np.abs(np.exp(logps) - np.exp(old))[pairs.response_mask].mean()
    assert moved > 1e-3
    if updates == 1:
        np.testing.assert_allclose(metrics["staleness/prob_diff_mean"], moved, rtol=1e-5)
    assert float(metrics["staleness/prob_diff_mean"]) > 1e-3
