import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit

from dcjax.rl.signals import mean_of_last, median_of_last, on_last_update, remember


@pytest.mark.parametrize("last", [1, 2, 5, 8])
def test_means_and_medians_of_what_was_seen(last):
    seen = np.random.default_rng(last).uniform(1, 9, 19).astype(np.float32)

    def advance(values, new):
        n, value = new
        values = remember(values, value)
        return values, (mean_of_last(values, n, last), median_of_last(values, n, last))

    means, medians = jit(lambda: jax.lax.scan(advance, jnp.zeros(8), (jnp.arange(1, 20), seen))[1])()
    held = [seen[max(0, n - last) : n] for n in range(1, 20)]
    np.testing.assert_allclose(means, [np.mean(values) for values in held], rtol=1e-6)
    np.testing.assert_allclose(medians, [np.median(values) for values in held], rtol=1e-6)


def test_a_mean_of_nothing_is_zero():
    assert float(mean_of_last(jnp.zeros(3), jnp.asarray(0), 2)) == 0


def test_a_state_moves_on_the_last_update():
    seen = [float(on_last_update(3, jnp.asarray(n), jnp.asarray(1.0), jnp.asarray(0.0))) for n in range(1, 8)]
    assert seen == [0, 0, 1, 0, 0, 1, 0]
