import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import jit

from dcjax.rl.advantages import group_rewards
from dcjax.rl.discrepancy import log_probability_difference
from dcjax.rl.penalties import gate
from dcjax.rl.presets import dc_direct, dc_grpo, dual_grpo, grpo, thresholded_dual_grpo
from dcjax.rl.transforms import Context, initial_terms
from dcjax.types import Batch

REWARDS = np.array([1, 0, 1, 1], np.float32)
MASK = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], bool)


@pytest.fixture(scope="module")
def context():
    rng = np.random.default_rng(0)
    batch = Batch(
        tokens=np.zeros((4, 5), np.int32),
        attention_mask=np.ones((4, 5), bool),
        response_mask=MASK,
        rollout_logps=rng.uniform(-2, 0, (4, 3)).astype(np.float32),
        temperature=np.ones(4, np.float32),
        rewards=REWARDS,
        group_rewards=np.asarray(group_rewards(REWARDS, group_size=2)),
    )
    old = rng.uniform(-2, 0, (4, 3)).astype(np.float32)
    return Context(batch, old - np.float32(0.1), old, None, jnp.mean(REWARDS))


def gap(context, logps=None):
    p = context.old_logps if logps is None else logps
    return np.where(MASK, np.abs(np.exp(p) - np.exp(context.batch.rollout_logps)), 0)


def run(preset, context, multiplier=None):
    context = dataclasses.replace(context, multiplier=None if multiplier is None else jnp.float32(multiplier))
    return jit(lambda context: preset.transform(initial_terms(context.batch), context))(context)


def test_each_preset_is_its_formula(context):
    plain = np.asarray(run(grpo(), context).advantages)
    np.testing.assert_allclose(plain[:2, 0], [0.5**0.5, -(0.5**0.5)], atol=1e-5)
    np.testing.assert_array_equal(plain[2:], np.zeros((2, 3)))
    delta, close = gap(context), {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(run(dual_grpo(), context).advantages, plain - 0.1 * delta, **close)
    np.testing.assert_allclose(run(dual_grpo(multiplier=0.7), context).advantages, plain - 0.7 * delta, **close)
    hinged = run(thresholded_dual_grpo(threshold=0.2), context).advantages
    np.testing.assert_allclose(hinged, plain - 0.1 * np.maximum(delta - 0.2, 0), **close)
    gated = run(thresholded_dual_grpo(threshold=0.2, shape=gate), context).advantages
    np.testing.assert_allclose(gated, plain - 0.1 * delta * (delta > 0.2), **close)
    np.testing.assert_allclose(run(dc_grpo(updates=1), context, 0.3).advantages, plain - 0.3 * delta, **close)
    direct = run(dc_direct(updates=1), context, 0.3)
    np.testing.assert_array_equal(direct.advantages, plain)
    np.testing.assert_allclose(direct.loss, 0.3 * gap(context, context.logps), **close)


def test_another_discrepancy_goes_in(context):
    terms = run(dual_grpo(multiplier=1.0, discrepancy=log_probability_difference), context)
    expected = np.where(MASK, np.abs(context.old_logps - context.batch.rollout_logps), 0)
    np.testing.assert_allclose(run(grpo(), context).advantages - terms.advantages, expected, atol=1e-6)


@pytest.mark.parametrize("preset", [dc_grpo, dc_direct])
@pytest.mark.parametrize("updates", [1, 4])
def test_the_ascent_has_the_papers_settings_and_moves_once_an_iteration(preset, updates):
    tx = preset(updates=updates).ascent
    params, state = jnp.zeros(2), tx.init(jnp.zeros(2))
    assert float(optax.tree.get(state, "multiplier")) == np.float32(0.1)
    for update in range(updates):
        assert float(optax.tree.get(state, "multiplier")) == np.float32(0.1), update
        changes, state = tx.update(params + 1, state, params, discrepancy=jnp.float32(0.0137))
        np.testing.assert_array_equal(changes, [1, 1])
    # 0.1 + 1.0 · (0.0137 − 0.0037)
    np.testing.assert_allclose(optax.tree.get(state, "multiplier"), 0.11, rtol=1e-5)
    _, state = tx.update(params, state, params, discrepancy=jnp.float32(1e6))
    for _ in range(updates):
        _, state = tx.update(params, state, params, discrepancy=jnp.float32(1e6))
    assert float(optax.tree.get(state, "multiplier")) == {dc_grpo: 1.0, dc_direct: 0.5}[preset]


@pytest.mark.parametrize("preset", [grpo, dual_grpo, thresholded_dual_grpo])
def test_a_fixed_multiplier_leaves_the_optimisers_chain_as_it_is(preset):
    tx = optax.chain(optax.sgd(1.0), preset().ascent)
    state = tx.init(jnp.zeros(2))
    assert optax.tree.get(state, "multiplier") is None
    assert jax.tree.leaves(state) == []
    changes, _ = tx.update(jnp.ones(2), state, jnp.zeros(2), discrepancy=jnp.float32(1))
    np.testing.assert_array_equal(changes, [-1, -1])


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"multiplier is -0\.1"):
        dual_grpo(multiplier=-0.1)
    with pytest.raises(ValueError, match=r"threshold is -1\.0"):
        thresholded_dual_grpo(threshold=-1.0)
    with pytest.raises(ValueError, match="initial multiplier"):
        dc_direct(updates=1, initial_multiplier=0.6)
