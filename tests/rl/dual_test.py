from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import jit
from hypothesis import given, settings
from hypothesis import strategies as st

from dcjax.rl.dual import dual_ascent


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


@settings(max_examples=25)
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


def oracle(discrepancies, *, rate, budget, start, bound, window, steps=None, factor=None):
    """λ, c and the alarm after each iteration, from plain lists."""
    seen, multiplier, rows = [], start, []
    reference, alarm = None, 0
    c = 0.0 if budget == "auto" else budget
    for discrepancy in discrepancies:
        seen.append(discrepancy)
        if reference is None or multiplier < bound or len(seen) <= 10:
            reference = np.mean(seen[-10:])
        if budget != "auto" or len(seen) > steps:
            multiplier = min(max(multiplier + rate * (np.mean(seen[-window:]) - c), 0.0), bound)
        if budget == "auto" and len(seen) == steps:
            c = factor * np.median(seen)
        alarm = alarm + 1 if multiplier == bound and np.mean(seen[-10:]) > 1.2 * reference else 0
        rows.append((multiplier, c, alarm))
    return np.array(rows).reshape(-1, 3)


def follow(tx, discrepancies):
    """λ, c and the alarm after each iteration, one compiled loop for all of them."""

    def advance(state, discrepancy):
        _, state = tx.update(jnp.ones(1), state, None, discrepancy=discrepancy)
        return state, (state.multiplier, state.budget, state.saturated)

    discrepancies = np.asarray(discrepancies, np.float32)
    rows = jit(lambda: jax.lax.scan(advance, tx.init(jnp.ones(1)), discrepancies)[1])()
    return np.stack([np.asarray(row, np.float64) for row in rows], axis=1)


@pytest.mark.parametrize(
    ("budget", "window", "steps", "start"),
    [
        ("auto", 1, 10, 0.3),
        ("auto", 4, 7, 1.0),
        ("auto", 13, 2, 0.3),
        ("auto", 3, 1, 0.3),
        (0.01, 1, 1, 1.0),
        (0.01, 4, 1, 0.3),
        (0.01, 13, 1, 1.0),
    ],
)
def test_against_lists(budget, window, steps, start):
    rng = np.random.default_rng(window)
    discrepancies = 0.01 * np.exp(rng.standard_normal(90).cumsum() * 0.15)
    tx = dual_ascent(
        5.0, budget=budget, init_value=start, window=window, calibration_steps=steps, calibration_factor=1.25
    )
    expected = oracle(
        discrepancies, rate=5.0, budget=budget, start=start, bound=1.0, window=window, steps=steps, factor=1.25
    )
    np.testing.assert_allclose(follow(tx, discrepancies), expected, rtol=1e-5, atol=1e-6)


def test_a_window_by_hand():
    # means of the last two: 1, .75, .25, .5, over a budget of .5
    tx = dual_ascent(1.0, budget=0.5, init_value=0.0, max_value=10.0, window=2)
    assert trajectory(tx, [1.0, 0.5, 0.0, 1.0]) == [0.5, 0.75, 0.5, 0.5]


def test_a_budget_from_the_first_iterations_by_hand():
    tx = dual_ascent(
        1.0, budget="auto", init_value=0.25, max_value=10.0, every=2, calibration_steps=3, calibration_factor=2.0
    )
    state, seen = tx.init(jnp.ones(1)), []
    for discrepancy in [0.5, 0.125, 0.25, 1.0, 0.25]:
        # only what an iteration's last update gets is measured
        for value in [99.0, discrepancy]:
            _, state = tx.update(jnp.ones(1), state, None, discrepancy=value)
        seen.append((float(optax.tree.get(state, "multiplier")), float(optax.tree.get(state, "budget"))))
    # c = 2 × the median .25, known after three; λ moves from the fourth on, by 1 − .5 and .25 − .5
    assert seen == [(0.25, 0.0), (0.25, 0.0), (0.25, 0.5), (0.75, 0.5), (0.5, 0.5)]


def test_a_median_of_an_even_count_lies_between_the_middle_two():
    tx = dual_ascent(1.0, budget="auto", init_value=0.0, calibration_steps=4, calibration_factor=1.0)
    assert follow(tx, [4.0, 1.0, 3.0, 100.0])[-1, 1] == 3.5


def test_a_given_budget_is_in_the_state_from_the_start():
    state = dual_ascent(1.0, budget=0.25, init_value=0.0).init(jnp.ones(1))
    assert float(optax.tree.get(state, "budget")) == 0.25


def test_the_alarm_by_hand():
    # δ̄ 1 brings λ to its bound at the fourth iteration; δ̄ 2.5 from the eleventh on brings the mean of ten over 1.2
    # at the twelfth; at the fourteenth λ leaves the bound
    tx = dual_ascent(0.25, budget=0.0, init_value=0.0, max_value=1.0)
    alarm = follow(tx, [1.0] * 10 + [2.5] * 3 + [-5.0])[:, 2]
    assert alarm.tolist() == [0] * 11 + [1, 2, 0]


def test_below_the_bound_nothing_is_alarming():
    tx = dual_ascent(0.0, budget=0.0, init_value=0.5)
    assert not follow(tx, np.linspace(0.001, 1.0, 100))[:, 2].any()


@pytest.mark.parametrize("start", [0.1, 1.0])
def test_the_alarm_tells_noise_from_a_rise(start):
    tx = dual_ascent(20.0, budget=0.001, init_value=start)
    rng = np.random.default_rng(0)
    noise = np.exp(0.15 * rng.standard_normal((100, 200)))
    grows = 0.01 * noise * np.linspace(1, 2, 200)
    shrinks = 0.01 * noise * np.linspace(1, 0.5, 200)
    alarm = jit(jax.vmap(lambda curve: jax.lax.scan(partial(_alarm, tx), tx.init(jnp.ones(1)), curve)[1]))
    counts = np.asarray(alarm(np.float32([grows, shrinks, 0.01 * noise]).reshape(300, 200)))
    rising, falling, flat = counts.reshape(3, 100, 200).max(axis=2)
    assert (rising >= 50).all()
    assert (falling < 10).all()
    assert (flat >= 10).mean() < 0.03


def _alarm(tx, state, discrepancy):
    _, state = tx.update(jnp.ones(1), state, None, discrepancy=discrepancy)
    return state, state.saturated


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


def test_in_a_chain_it_leaves_adam_alone_and_is_found_by_name():
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.3, -0.1])
    plain, chained = optax.adam(0.1), optax.chain(optax.adam(0.1), dual_ascent(1.0, budget=0.25, init_value=0.5))
    states = plain.init(params), chained.init(params)
    expected, _ = plain.update(grads, states[0], params)
    updates, state = chained.update(grads, states[1], params, discrepancy=0.375)
    np.testing.assert_array_equal(updates, expected)
    assert float(optax.tree.get(state, "multiplier")) == 0.625


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
        ({"window": 0}, "window 0"),
        ({"calibration_steps": 0}, "calibration_steps 0"),
        ({"calibration_factor": 0.0}, "calibration_factor 0.0"),
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
