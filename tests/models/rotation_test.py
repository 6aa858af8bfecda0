"""The Hadamard rotation against SciPy's matrices, and its identities."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from compiling import jit

from dcjax.models import rotation
from dcjax.models.cache import attend_cached, init_cache
from dcjax.models.config import presets

rotate = jit(rotation.rotate)


@pytest.mark.parametrize(
    ("width", "block"), [(1, 1), (7, 1), (48, 16), (576, 64), (640, 128), (1536, 512), (4096, 512)]
)
def test_blocks_are_multiplied_by_the_orthonormal_matrix(width, block):
    assert rotation.block_of(width) == block
    x = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    matrix = scipy.linalg.hadamard(block) / np.sqrt(block)
    expected = (x.astype(np.float64).reshape(3, -1, block) @ matrix).reshape(3, width)
    np.testing.assert_allclose(rotate(x), expected, atol=2e-6)


def test_a_second_rotation_restores_and_products_stay():
    x, y = np.random.default_rng(1).normal(size=(2, 5, 96)).astype(np.float32)
    np.testing.assert_allclose(rotate(rotate(x)), x, atol=1e-6)
    np.testing.assert_allclose((rotate(x) * rotate(y)).sum(-1), (x * y).sum(-1), atol=1e-5)


def test_the_result_is_float32_whatever_is_rotated():
    x = jnp.ones((2, 8), jnp.bfloat16)
    assert rotate(x).dtype == jnp.float32
    np.testing.assert_allclose(rotate(x), np.full((2, 8), np.sqrt(8)) * (np.arange(8) == 0), atol=1e-6)


def test_int8_keys_with_an_outlier_channel_are_attended_to_nearly_as_in_float32():
    """Without rotation a channel of 60 leaves the others of an int8 key steps of one half: the error is then .034."""
    config, rng = presets["tiny"], np.random.default_rng(2)
    k, v = rng.normal(size=(2, 2, 12, config.num_kv_heads, config.head_dim)).astype(np.float32)
    q = rng.normal(size=(2, 12, config.num_heads, config.head_dim)).astype(np.float32)
    # values of ±1 are exact
    k[..., 3], q[..., 3], v = 60.0, 0.0, np.sign(v)
    positions = np.tile(np.arange(12), (2, 1))

    def attended(dtype):
        return np.asarray(jit(attend_cached)(init_cache(config, 2, 12, jnp.dtype(dtype)), q, k, v, positions)[0])

    assert 0 < np.abs(attended("int8") - attended("float32")).mean() < 0.012
