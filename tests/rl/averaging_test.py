import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import jit

from dcjax.rl.averaging import averaged_params, params_ema


def trained(tx, params, grads, compiled=True):
    """Params after each update, and the average after each."""
    state, iterates, averages = tx.init(params), [], []

    def step(grad, state, params):
        updates, state = tx.update(grad, state, params)
        return state, optax.apply_updates(params, updates)

    run = jit(step) if compiled else step
    for grad in grads:
        state, params = run(grad, state, params)
        iterates.append(params)
        averages.append(optax.tree.get(state, "ema"))
    return iterates, averages


def test_a_sequence_by_hand():
    # θ: 10 → 9 → 7 → 3; weights 1 | 1/3, 2/3 | 1/7, 2/7, 4/7
    tx = params_ema(0.5)
    _, averages = trained(
        tx, jnp.asarray(10.0), [jnp.asarray(-1.0), jnp.asarray(-2.0), jnp.asarray(-4.0)], compiled=False
    )
    np.testing.assert_allclose(averages, [9, (9 + 2 * 7) / 3, (9 + 2 * 7 + 4 * 3) / 7], rtol=1e-6)


@pytest.mark.parametrize("decay", [0.1, 0.97, 0.99999])
def test_against_the_weighted_sum(decay):
    rng = np.random.default_rng(0)
    tx = optax.chain(optax.adam(0.05), params_ema(decay))
    params = {"w": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32), "b": jnp.zeros(())}
    grads = [jax.tree.map(lambda leaf: np.float32(rng.standard_normal(leaf.shape)), params) for _ in range(30)]
    iterates, averages = trained(tx, params, grads)
    for n in (1, 2, 7, 30):
        weights = np.float64(decay) ** np.arange(n - 1, -1, -1)
        for name in params:
            expected = np.average([np.float64(iterate[name]) for iterate in iterates[:n]], axis=0, weights=weights)
            np.testing.assert_allclose(averages[n - 1][name], expected, rtol=1e-5, atol=1e-6)


def test_before_the_first_update_it_is_the_params():
    params = {"w": jnp.arange(3, dtype=jnp.bfloat16)}
    ema = optax.tree.get(params_ema(0.9).init(params), "ema")
    assert ema["w"].dtype == jnp.float32
    np.testing.assert_array_equal(ema["w"], [0, 1, 2])


def test_it_averages_what_is_stored_and_finer_than_that():
    # in bfloat16, 256 + 1 is 256 and 256 + 2 is 258
    params, tx = jnp.asarray(256.0, jnp.bfloat16), params_ema(0.5)
    grads = [jnp.asarray(1.0, jnp.bfloat16), jnp.asarray(2.0, jnp.bfloat16)]
    # in one program XLA may leave the rounding out
    iterates, averages = trained(tx, params, grads, compiled=False)
    assert [float(iterate) for iterate in iterates] == [256, 258]
    np.testing.assert_allclose(averages, [256, (256 + 2 * 258) / 3], rtol=1e-6)


def test_it_is_read_in_the_dtypes_of_the_params():
    params = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros(())}
    state = optax.chain(optax.adam(0.1), params_ema(0.9)).init(params)
    averaged = averaged_params(state, params)
    assert (averaged["w"].dtype, averaged["b"].dtype) == (jnp.bfloat16, jnp.float32)


def test_a_chain_without_it_says_what_is_missing():
    with pytest.raises(ValueError, match=r"put params_ema\(\.\.\.\) last"):
        averaged_params(optax.adam(0.1).init(jnp.ones(1)), jnp.ones(1))


def test_noise_around_an_optimum_is_averaged_out():
    """Of Σ d^{n−k} θ_k the variance is (1 − d)/(1 + d) of θ's: at .9, a nineteenth."""
    rng = np.random.default_rng(0)
    tx, params = params_ema(0.9), jnp.zeros(2000)
    iterates, averages = trained(tx, params, list(np.diff(rng.standard_normal((80, 2000)), axis=0, prepend=0.0)))
    assert float(jnp.var(iterates[-1])) == pytest.approx(1, rel=0.1)
    assert float(jnp.var(averages[-1])) == pytest.approx(1 / 19, rel=0.1)


def test_without_params_it_cannot_update():
    tx = params_ema(0.9)
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))


@pytest.mark.parametrize("decay", [-0.5, 0.0, 1.0, float("nan")])
def test_a_decay_that_makes_no_average_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay {decay}"):
        params_ema(decay)
