import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcjax.rl.dual import dual_ascent
from dcjax.rl.loss_scale import dynamic_loss_scale


def scaled(inner=None, **settings):
    tx = dynamic_loss_scale(optax.adam(0.1) if inner is None else inner, **settings)
    params = {"w": jnp.ones(3), "b": jnp.zeros(())}
    return tx, params, tx.init(params)


FINE = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array(0.5)}


def test_finite_gradients_go_through_the_inner_transform_as_they_are():
    tx, params, state = scaled()
    plain = optax.adam(0.1)
    expected, inner = plain.update(FINE, plain.init(params), params)
    changes, state = jax.jit(tx.update)(FINE, state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), changes, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.inner, inner)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("where", ["w", "b"])
def test_one_gradient_out_of_range_leaves_everything_but_the_scale(bad, where):
    tx, params, state = scaled(init_value=1024.0, factor=4.0)
    _, state = tx.update(FINE, state, params)
    broken = FINE | {where: FINE[where].at[..., 0].set(bad) if where == "w" else jnp.array(bad)}
    changes, after = jax.jit(tx.update)(broken, state, params)
    assert all((np.asarray(change) == 0).all() for change in jax.tree.leaves(changes))
    jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)
    assert (float(after.loss_scale), int(after.finite)) == (256.0, 0)


def test_the_scale_by_hand():
    tx, params, state = scaled(init_value=4.0, growth_interval=2, factor=2.0)
    bad, seen = FINE | {"b": jnp.array(np.inf)}, []
    for gradient in (FINE, FINE, FINE, bad, bad, bad, bad, bad, FINE, FINE):
        _, state = tx.update(gradient, state, params)
        seen.append(float(state.loss_scale))
    # it grows after two in a row, is never below 1, and starts to count again after a change
    assert seen == [4, 8, 8, 4, 2, 1, 1, 1, 1, 2]


def test_a_scale_that_cannot_grow_stays():
    tx, params, state = scaled(init_value=2.0**127, growth_interval=1)
    _, state = tx.update(FINE, state, params)
    assert float(state.loss_scale) == 2.0**127


def test_the_scale_is_float32_whatever_the_parameters():
    tx, *_ = scaled()
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    _, state = tx.update({"w": jnp.ones(3, jnp.bfloat16)}, tx.init(params), params)
    assert (state.loss_scale.dtype, state.finite.dtype) == (jnp.float32, jnp.int32)


def test_extra_arguments_reach_the_inner_transform():
    tx, params, state = scaled(dual_ascent(1.0, budget=0.0, init_value=0.25))
    _, state = tx.update(FINE, state, params, discrepancy=0.5, unknown=1)
    assert float(optax.tree.get(state, "multiplier")) == 0.75


@pytest.mark.parametrize("settings", [{"init_value": 0.5}, {"growth_interval": 0}, {"factor": 1.0}])
def test_a_scale_that_makes_no_sense_is_refused(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"{name} {value}"):
        scaled(**settings)
