"""What every transform of the optimiser's chain keeps to."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import jit
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dcjax.loop.checkpoint import Checkpoints, Cursor
from dcjax.rl.averaging import params_ema
from dcjax.rl.dual import dual_ascent
from dcjax.rl.learning_rate import (
    Surge,
    discrepancy_decay,
    dual_learning_rate,
    length_decay,
    scale_by_sequence_ess,
)
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
    "scale_by_sequence_ess": Case(lambda: scale_by_sequence_ess(0.5), "ess_scale", steps_with_iterations=False),
    "params_ema": Case(lambda: params_ema(0.9), "ema", steps_with_iterations=False),
    "dynamic_loss_scale": Case(
        lambda: dynamic_loss_scale(optax.identity(), growth_interval=3), "loss_scale", steps_with_iterations=False
    ),
}


def cases(having=lambda case: True):
    return pytest.mark.parametrize("name", [name for name, case in CASES.items() if having(case)])


every_case = cases()


@cache
def behind_adam(name):
    return optax.chain(optax.adam(0.1), CASES[name].make())


def make_params(dtype: Any = jnp.float32):
    return {"w": jnp.array(np.linspace(-1, 1, 32).reshape(8, 4), dtype), "b": jnp.array(0, dtype)}


def make_inputs():
    """Gradients and the extra arguments of each update, [24, ...].

    δ̄ swings, the length triples at iteration 6, the effective share falls.
    """
    rng = np.random.default_rng(0)
    iterations = np.arange(UPDATES) // EVERY
    inputs = {
        "grads": {"w": rng.standard_normal((UPDATES, 8, 4)), "b": rng.standard_normal(UPDATES)},
        "discrepancy": 0.2 + 0.15 * np.sin(iterations),
        "response_length": np.where(iterations < 5, 10.0, 30.0),
        "sequence_ess": np.linspace(1, 0.1, UPDATES),
    }
    return jax.tree.map(np.float32, inputs)


def update(tx, carry, inputs, **extra_args):
    """One update of (params, state), and its updates to compare."""
    params, state = carry
    extra_args = {name: value for name, value in inputs.items() if name != "grads"} | extra_args
    grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), inputs["grads"], params)
    changes, state = tx.update(grads, state, params, **extra_args)
    return (optax.apply_updates(params, changes), state), changes


def begin(tx, dtype: Any = jnp.float32):
    params = make_params(dtype)
    return params, tx.init(params)


def begin_all():
    return {name: begin(behind_adam(name)) for name in CASES}


def update_all(carries, inputs):
    return {name: update(behind_adam(name), carry, inputs)[0] for name, carry in carries.items()}


def follow(step, carry, updates=range(UPDATES)):
    """(params, state) after each update."""
    inputs, seen = make_inputs(), []
    for n in updates:
        carry = step(carry, jax.tree.map(lambda x, n=n: x[n], inputs))
        seen.append(jax.device_get(carry))
    return seen


@cache
def compiled():
    """The step of all cases, (params, state) of each after each update, and how often it was traced."""
    traces = []

    @partial(jit, donate_argnums=0)
    def step(carries, inputs):
        traces.append(1)
        return update_all(carries, inputs)

    return step, follow(step, begin_all()), len(traces)


def seen(name):
    _, carries, _ = compiled()
    return [carry[name] for carry in carries]


def assert_close(actual, expected, rtol=2e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), actual, expected)


def describe(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@every_case
def test_it_moves_and_is_found_by_name(name):
    states = begin(behind_adam(name))[1], seen(name)[-1][1]
    first, last = (jax.tree.leaves(optax.tree.get(state, CASES[name].read)) for state in states)
    assert first and any((a != b).any() for a, b in zip(first, last, strict=True))


@every_case
def test_the_state_is_arrays_that_keep_their_shapes_and_dtypes(name):
    tx = CASES[name].make()
    carry = begin(tx)
    leaves = jax.tree.leaves(carry[1])
    assert leaves and all(isinstance(leaf, jax.Array) for leaf in leaves)
    first = jax.tree.map(lambda x: x[0], make_inputs())
    assert describe(jax.eval_shape(partial(update, tx), carry, first)[0][1]) == describe(carry[1])


@every_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_keep_their_dtype_and_the_state_is_float32(name, dtype):
    tx = CASES[name].make()
    carry = jax.eval_shape(lambda: begin(tx, dtype))
    first = jax.tree.map(lambda x: x[0], make_inputs())
    (_, state), changes = jax.eval_shape(partial(update, tx), carry, first)
    assert {leaf.dtype for leaf in jax.tree.leaves(changes)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves((carry[1], state))} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


def test_they_are_traced_once():
    assert compiled()[2] == 1


def test_in_a_scan_they_compute_the_same():
    scanned, _ = jit(lambda: jax.lax.scan(lambda *xs: (update_all(*xs), None), begin_all(), make_inputs()))()
    assert_close(jax.device_get(scanned), compiled()[1][-1])


@every_case
def test_unknown_extra_arguments_are_ignored(name):
    tx = CASES[name].make()
    carry, first = begin(tx), jax.tree.map(lambda x: x[0], make_inputs())
    plain, ours = (
        jax.make_jaxpr(partial(update, tx, **unknown))(carry, first)
        for unknown in ({}, {"unknown": "text", "value": 3.0})
    )
    assert str(ours) == str(plain)


@cases(lambda case: case.steps_with_iterations)
def test_it_moves_once_an_iteration(name):
    states = [state[1] for _, state in [begin(behind_adam(name)), *seen(name)]]
    for n in range(0, UPDATES, EVERY):
        first, second = (state._replace(count=np.zeros(())) for state in states[n : n + 2])
        jax.tree.map(np.testing.assert_array_equal, first, second)
        assert [int(state.count) for state in states[n : n + 3]] == [n, n + 1, n + 2]


@cases(lambda case: case.before_adam)
def test_before_adam_it_does_the_same_as_after(name):
    tx = optax.chain(CASES[name].make(), optax.adam(0.1))
    before = follow(jit(lambda carry, xs: update(tx, carry, xs)[0]), begin(tx))[-1]
    after = seen(name)[-1]
    assert_close(before[0], after[0])
    assert_close(before[1][0], after[1][1])


def test_they_survive_a_checkpoint(tmp_path):
    """Of one run that has them all."""
    step, expected, _ = compiled()
    params, states = ({name: carry[part] for name, carry in expected[12].items()} for part in (0, 1))
    whole = TrainState(*jax.tree.map(jnp.asarray, (13, params, states, 0.0)))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(whole, Cursor(13, 0, [0, 0]))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), whole)
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(13, like)
    jax.tree.map(np.testing.assert_array_equal, restored, whole)
    carries = {name: (restored.params[name], restored.opt_state[name]) for name in CASES}
    resumed = follow(step, carries, range(13, UPDATES))[-1]
    jax.tree.map(np.testing.assert_array_equal, resumed, expected[-1])


def test_on_a_mesh_scalars_are_everywhere_and_averages_beside_their_params():
    mesh = Mesh(jax.devices(), ("fsdp",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = {"w": NamedSharding(mesh, PartitionSpec("fsdp")), "b": everywhere}

    def state_places(tx):
        return optax.tree.map_params(
            tx.init,
            lambda _, place: place,
            jax.eval_shape(tx.init, make_params()),
            places,
            transform_non_params=lambda _: everywhere,
        )

    placed = {name: (places, state_places(behind_adam(name))) for name in CASES}
    step = jit(update_all, out_shardings=placed, donate_argnums=0)
    carries, inputs = jax.device_put(begin_all(), placed), make_inputs()
    for n in range(UPDATES):
        carries = step(carries, jax.tree.map(lambda x, n=n: x[n], inputs))
    for leaf in jax.tree.leaves(carries):
        assert len(leaf.sharding.device_set) == 8
        assert leaf.sharding.is_fully_replicated == (leaf.shape != (8, 4))
    assert_close(jax.device_get(carries), compiled()[1][-1])


@every_case
def test_a_donated_state_takes_nothing_else_with_it(name):
    tx, params = CASES[name].make(), make_params()
    for leaf in jax.tree.leaves(tx.init(params)):
        # what donation does
        leaf.delete()
    # neither the params nor the factory's own constants
    again = jax.tree.leaves((params, tx.init(params)))
    assert not any(leaf.is_deleted() for leaf in again)
