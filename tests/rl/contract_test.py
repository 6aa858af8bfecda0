"""What every transform of the optimiser's chain keeps to."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dcjax.checkpoint import Checkpoints, LoopState
from dcjax.rl.averaging import params_ema
from dcjax.rl.dual import dual_ascent
from dcjax.rl.learning_rate import Surge, discrepancy_decay, dual_learning_rate, length_decay
from dcjax.rl.loss_scale import dynamic_loss_scale
from dcjax.types import TrainState

UPDATES = 24
EVERY = 2


class Case(NamedTuple):
    make: Callable[[], optax.GradientTransformationExtraArgs]
    read: str
    """A field of the state that moves within the 24 updates."""
    steps_with_iterations: bool = True
    """It moves on the last of an iteration's two updates only."""
    before_adam: bool = False
    """It may stand before Adam as well as after."""


CASES = {
    "dual_ascent": Case(
        lambda: dual_ascent(1.0, budget=0.2, init_value=0.5, every=EVERY), "multiplier", before_adam=True
    ),
    "dual_ascent(auto, window)": Case(
        lambda: dual_ascent(1.0, budget="auto", init_value=0.5, every=EVERY, window=3, calibration_steps=4),
        "budget",
        before_adam=True,
    ),
    "length_decay(given)": Case(lambda: length_decay(5, every=EVERY), "learning_rate_scale"),
    "length_decay(surge)": Case(
        lambda: length_decay(Surge(recent=1, history=3, period_factor=1.2), every=EVERY), "learning_rate_scale"
    ),
    "discrepancy_decay": Case(lambda: discrepancy_decay(window=2, every=EVERY), "learning_rate_scale"),
    "dual_learning_rate": Case(lambda: dual_learning_rate(5.0, budget=0.1, every=EVERY), "learning_rate_scale"),
    "params_ema": Case(lambda: params_ema(0.9), "ema", steps_with_iterations=False),
    "dynamic_loss_scale": Case(
        lambda: dynamic_loss_scale(optax.identity(), growth_interval=3), "loss_scale", steps_with_iterations=False
    ),
}


def cases(having=lambda case: True):
    chosen = {name: case for name, case in CASES.items() if having(case)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


every_case = cases()


def make_params(dtype: Any = jnp.float32):
    return {"w": jnp.linspace(-1, 1, 32, dtype=dtype).reshape(8, 4), "b": jnp.zeros((), dtype)}


def make_inputs():
    """Gradients and the extra arguments of each update, [24, ...]: δ̄ swings, the length triples at iteration 6."""
    rng = np.random.default_rng(0)
    iterations = np.arange(UPDATES) // EVERY
    return {
        "grads": {
            "w": jnp.asarray(rng.standard_normal((UPDATES, 8, 4)), jnp.float32),
            "b": jnp.asarray(rng.standard_normal(UPDATES), jnp.float32),
        },
        "discrepancy": jnp.asarray(0.2 + 0.15 * np.sin(iterations), jnp.float32),
        "response_length": jnp.asarray(np.where(iterations < 5, 10.0, 30.0), jnp.float32),
    }


def update(tx, carry, inputs, **extra_args):
    """One update of (params, state), and the fields and updates to compare."""
    params, state = carry
    extra_args = {name: value for name, value in inputs.items() if name != "grads"} | extra_args
    grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), inputs["grads"], params)
    changes, state = tx.update(grads, state, params, **extra_args)
    return (optax.apply_updates(params, changes), state), changes


def begin(tx, dtype: Any = jnp.float32):
    params = make_params(dtype)
    return params, tx.init(params)


def eagerly(tx, inputs, carry=None, updates=range(UPDATES), **extra_args):
    """(params, state) after each update."""
    carry, seen = begin(tx) if carry is None else carry, []
    for n in updates:
        carry, _ = update(tx, carry, jax.tree.map(lambda x, n=n: x[n], inputs), **extra_args)
        seen.append(carry)
    return seen


def assert_close(actual, expected, rtol=2e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), actual, expected)


def describe(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@every_case
def test_it_moves_and_is_found_by_name(case):
    tx = optax.chain(optax.adam(0.1), case.make())
    first = optax.tree.get(tx.init(make_params()), case.read)
    last = optax.tree.get(eagerly(tx, make_inputs())[-1][1], case.read)
    assert float(optax.tree.norm(optax.tree.sub(last, first))) > 0


@every_case
def test_the_state_is_arrays_that_keep_their_shapes_and_dtypes(case):
    tx = case.make()
    carry = begin(tx)
    leaves = jax.tree.leaves(carry[1])
    assert leaves and all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert describe(eagerly(tx, make_inputs(), updates=[0])[0][1]) == describe(carry[1])


@every_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_keep_their_dtype_and_the_state_is_float32(case, dtype):
    tx = case.make()
    carry = begin(tx, dtype)
    first = jax.tree.map(lambda x: x[0], make_inputs())
    (_, state), changes = update(tx, carry, first)
    assert {leaf.dtype for leaf in jax.tree.leaves(changes)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves((carry[1], state))} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


@every_case
def test_it_is_traced_once_and_computes_the_same(case):
    tx, inputs, traces = optax.chain(optax.adam(0.1), case.make()), make_inputs(), 0

    @partial(jax.jit, donate_argnums=0)
    def step(carry, inputs):
        nonlocal traces
        traces += 1
        return update(tx, carry, inputs)[0]

    carry = begin(tx)
    for n, expected in enumerate(eagerly(tx, inputs)):
        carry = step(carry, jax.tree.map(lambda x, n=n: x[n], inputs))
        assert_close(carry, expected)
    assert traces == 1


@every_case
def test_in_a_scan_it_computes_the_same(case):
    tx, inputs = optax.chain(optax.adam(0.1), case.make()), make_inputs()
    scanned, _ = jax.lax.scan(lambda carry, xs: update(tx, carry, xs), begin(tx), inputs)
    assert_close(scanned, eagerly(tx, inputs)[-1])


@every_case
def test_unknown_extra_arguments_are_ignored(case):
    tx, inputs = case.make(), make_inputs()
    assert_close(eagerly(tx, inputs, unknown="text", value=3.0)[-1], eagerly(tx, inputs)[-1])


@cases(lambda case: case.steps_with_iterations)
def test_it_moves_once_an_iteration(case):
    tx = case.make()
    states = [begin(tx)[1], *(state for _, state in eagerly(tx, make_inputs()))]
    for n in range(0, UPDATES, EVERY):
        first, second = (state._replace(count=jnp.zeros(())) for state in states[n : n + 2])
        jax.tree.map(np.testing.assert_array_equal, first, second)
        assert [int(state.count) for state in states[n : n + 3]] == [n, n + 1, n + 2]


@every_case
def test_after_adam_it_does_to_its_updates_what_it_does_to_any(case):
    inputs = make_inputs()
    adam, alone, chained = optax.adam(0.1), case.make(), optax.chain(optax.adam(0.1), case.make())
    params, states = make_params(), [tx.init(make_params()) for tx in (adam, alone, chained)]
    for n in range(UPDATES):
        grads, extra = inputs["grads"], {"discrepancy": inputs["discrepancy"][n]}
        extra["response_length"] = inputs["response_length"][n]
        grads = jax.tree.map(lambda x, n=n: x[n], grads)
        changes, states[0] = adam.update(grads, states[0], params)
        expected, states[1] = alone.update(changes, states[1], params, **extra)
        changes, states[2] = chained.update(grads, states[2], params, **extra)
        assert_close(changes, expected)
        params = optax.apply_updates(params, changes)


@cases(lambda case: case.before_adam)
def test_before_adam_it_does_the_same_as_after(case):
    inputs = make_inputs()
    before = eagerly(optax.chain(case.make(), optax.adam(0.1)), inputs)[-1]
    after = eagerly(optax.chain(optax.adam(0.1), case.make()), inputs)[-1]
    assert_close(before[0], after[0])
    assert_close(before[1][0], after[1][1])


@every_case
def test_it_survives_a_checkpoint(case, tmp_path):
    tx, inputs = optax.chain(optax.adam(0.1), case.make()), make_inputs()
    half = eagerly(tx, inputs, updates=range(13))[-1]
    whole = TrainState(jnp.asarray(13), half[0], half[1], jnp.zeros(()))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(whole, LoopState(13, 0, [0, 0]))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), whole)
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(13, like)
    jax.tree.map(np.testing.assert_array_equal, restored, whole)
    resumed = eagerly(tx, inputs, (restored.params, restored.opt_state), range(13, UPDATES))[-1]
    jax.tree.map(np.testing.assert_array_equal, resumed, eagerly(tx, inputs)[-1])


@every_case
def test_on_a_mesh_scalars_are_everywhere_and_averages_beside_their_params(case):
    tx, inputs, mesh = optax.chain(optax.adam(0.1), case.make()), make_inputs(), Mesh(jax.devices(), ("fsdp",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = {"w": NamedSharding(mesh, PartitionSpec("fsdp")), "b": everywhere}
    state_places = optax.tree.map_params(
        tx.init,
        lambda _, place: place,
        jax.eval_shape(tx.init, make_params()),
        places,
        transform_non_params=lambda _: everywhere,
    )
    params = jax.device_put(make_params(), places)
    carry = params, jax.jit(tx.init, out_shardings=state_places)(params)
    step = jax.jit(lambda carry, xs: update(tx, carry, xs)[0], out_shardings=(places, state_places), donate_argnums=0)
    for n in range(UPDATES):
        carry = step(carry, jax.tree.map(lambda x, n=n: x[n], inputs))
    for leaf in jax.tree.leaves(carry):
        assert len(leaf.sharding.device_set) == 8
        assert leaf.sharding.is_fully_replicated == (leaf.shape != (8, 4))
    assert_close(carry, eagerly(tx, inputs)[-1])


@every_case
def test_a_donated_state_takes_nothing_else_with_it(case):
    tx, params = case.make(), make_params()
    jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)(tx.init(params))
    # neither the params nor the factory's own constants
    again = jax.tree.leaves((params, tx.init(params)))
    assert not any(leaf.is_deleted() for leaf in again)
