import jax.numpy as jnp
import numpy as np
import pytest

from dcjax.rl.signals import mean_of_last, median_of_last, on_last_update, remember


@pytest.mark.parametrize("last", [1, 2, 5, 8])
def test_means_and_medians_of_what_was_seen(last):
    rng, values, seen = np.random.default_rng(last), jnp.zeros(8), []
    for n in range(1, 20):
        seen.append(np.float32(rng.uniform(1, 9)))
        values = remember(values, jnp.asarray(seen[-1]))
        np.testing.assert_allclose(mean_of_last(values, jnp.asarray(n), last), np.mean(seen[-last:]), rtol=1e-6)
        np.testing.assert_allclose(median_of_last(values, jnp.asarray(n), last), np.median(seen[-last:]), rtol=1e-6)


def test_a_mean_of_nothing_is_zero():
    assert float(mean_of_last(jnp.zeros(3), jnp.asarray(0), 2)) == 0


def test_a_state_moves_on_the_last_update():
    seen = [float(on_last_update(3, jnp.asarray(n), jnp.asarray(1.0), jnp.asarray(0.0))) for n in range(1, 8)]
    assert seen == [0, 0, 1, 0, 0, 1, 0]
