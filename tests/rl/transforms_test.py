import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.rl import dual_ascent, dynamic_loss_scale


def trajectory(tx, discrepancies, params=None):
    """λ after each update."""
    params = jnp.zeros(2) if params is None else params
    state, seen = tx.init(params), []
    for discrepancy in discrepancies:
        _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params, discrepancy=discrepancy)
        seen.append(float(optax.tree.get(state, "multiplier")))
    return seen


def test_a_sequence_by_hand():
    # λ0 .5, η 2, c .25: +2·.25, +2·0, −2·.25, −2·.125, each step from the last
    tx = dual_ascent(2.0, budget=0.25, init_value=0.5, max_value=10.0)
    assert trajectory(tx, [0.5, 0.25, 0.0, 0.125]) == [1.0, 1.0, 0.5, 0.25]


def test_the_start_is_the_initial_value():
    state = dual_ascent(2.0, budget=0.25, init_value=0.5).init({"w": jnp.zeros(3)})
    assert (float(state.multiplier), int(state.count)) == (0.5, 0)


def test_it_stops_at_its_bounds_and_comes_back_at_once():
    tx = dual_ascent(1.0, budget=0.5, init_value=0.5, min_value=0.25, max_value=1.0)
    # a wound-up integrator would need the overshoot back before it moved
    assert trajectory(tx, [1.0, 1.0, 1.0, 0.25, 0.0, 0.0, 0.0, 0.75]) == [1.0, 1.0, 1.0, 0.75, 0.25, 0.25, 0.25, 0.5]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_it_steps_once_an_iteration_on_the_last_update(every):
    tx = dual_ascent(1.0, budget=0.0, init_value=0.0, max_value=100.0, every=every)
    seen = trajectory(tx, [1.0] * (3 * every))
    assert seen == [float((update + 1) // every) for update in range(3 * every)]


@given(
    st.lists(st.floats(0, 1, width=32), max_size=20),
    st.floats(0, 5, width=32),
    st.floats(0, 1, width=32),
    st.floats(0, 1, width=32),
    st.integers(1, 4),
)
def test_against_projected_gradient_ascent(discrepancies, rate, budget, start, every):
    """max_λ λ (δ̄ − c) by gradient steps, projected to [.125, .875], one an iteration."""
    start = 0.125 + 0.75 * start
    tx = dual_ascent(rate, budget=budget, init_value=start, min_value=0.125, max_value=0.875, every=every)
    multiplier, expected = np.float64(start), []
    for update, discrepancy in enumerate(discrepancies):
        if update % every == every - 1:
            multiplier = min(max(multiplier + rate * (discrepancy - budget), 0.125), 0.875)
        expected.append(multiplier)
    np.testing.assert_allclose(trajectory(tx, discrepancies), expected, atol=1e-4)


def test_it_stays_float32_whatever_the_parameters_are():
    params = {"w": jnp.zeros(3, jnp.bfloat16)}
    tx = dual_ascent(1.0, budget=0.5, init_value=1.0, max_value=10.0)
    # 2⁻¹⁰ above one is lost in bfloat16
    discrepancy = jnp.bfloat16(0.5) + jnp.float32(2**-10)
    state = tx.init(params)
    _, state = tx.update(params, state, params, discrepancy=discrepancy)
    assert state.multiplier.dtype == jnp.float32
    assert float(state.multiplier) == 1 + 2**-10
    _, state = tx.update(params, state, params, discrepancy=jnp.bfloat16(1.0))
    assert state.multiplier.dtype == jnp.float32


def test_updates_pass_through_unchanged():
    tx = dual_ascent(1.0, budget=0.1, init_value=0.1)
    updates = {"w": jnp.arange(3, dtype=jnp.bfloat16), "b": [jnp.ones(())]}
    passed, _ = tx.update(updates, tx.init(updates), None, discrepancy=1.0)
    assert jax.tree.structure(passed) == jax.tree.structure(updates)
    jax.tree.map(np.testing.assert_array_equal, passed, updates)
    assert passed["w"].dtype == jnp.bfloat16


def test_other_extra_arguments_are_ignored():
    tx = dual_ascent(1.0, budget=0.0, init_value=0.0)
    _, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), None, discrepancy=0.5, value=3.0, response_length=9)
    assert float(state.multiplier) == 0.5


def test_in_a_chain_it_leaves_adam_alone_and_is_found_by_name():
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.3, -0.1])
    plain, chained = optax.adam(0.1), optax.chain(optax.adam(0.1), dual_ascent(1.0, budget=0.25, init_value=0.5))
    states = plain.init(params), chained.init(params)
    expected, _ = plain.update(grads, states[0], params)
    updates, state = chained.update(grads, states[1], params, discrepancy=0.375)
    np.testing.assert_array_equal(updates, expected)
    assert float(optax.tree.get(state, "multiplier")) == 0.625


def test_it_is_jitted_once_and_computes_the_same():
    traces = 0
    tx = dual_ascent(2.0, budget=0.25, init_value=0.5, max_value=10.0, every=2)

    @jax.jit
    def update(state, discrepancy):
        nonlocal traces
        traces += 1
        return tx.update(jnp.ones(1), state, None, discrepancy=discrepancy)[1]

    state = jax.device_put(tx.init(jnp.ones(1)))
    expected = trajectory(tx, [0.5, 0.5, 0.0, 0.0])
    for discrepancy, multiplier in zip([0.5, 0.5, 0.0, 0.0], expected, strict=True):
        state = update(state, jnp.float32(discrepancy))
        assert float(state.multiplier) == multiplier
    assert traces == 1


def test_without_the_discrepancy_it_cannot_update():
    tx = dual_ascent(1.0, budget=0.1, init_value=0.1)
    with pytest.raises(TypeError, match="discrepancy"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dual_lr": -0.5}, "dual_lr -0.5"),
        ({"budget": -0.01}, "budget -0.01"),
        ({"every": 0}, "every 0"),
        ({"init_value": 1.5}, r"multiplier 1.5 must lie within \[0.0, 1.0\]"),
        ({"init_value": 0.05, "min_value": 0.1}, r"multiplier 0.05 must lie within \[0.1, 1.0\]"),
        ({"min_value": 0.5, "max_value": 0.2}, r"within \[0.5, 0.2\]"),
        ({"dual_lr": float("nan")}, "dual_lr nan"),
        ({"budget": float("nan")}, "budget nan"),
        ({"init_value": float("nan")}, "multiplier nan"),
    ],
)
def test_values_out_of_range_are_quoted(arguments, message):
    dual_lr = arguments.pop("dual_lr", 1.0)
    with pytest.raises(ValueError, match=message):
        dual_ascent(dual_lr, **({"budget": 0.1, "init_value": 0.1} | arguments))


# --- the loss scale ---


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
