"""Each piece of a layer against NumPy written from its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dcjax.models import layers

FLOAT32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)

rms_norm = jax.jit(layers.rms_norm, static_argnums=2)
product = jax.jit(layers.product, static_argnums=(2, 3))


@functools.partial(jax.jit, static_argnums=(2, 3))
def rotated(x, positions, count, theta):
    return layers.apply_rope(x, layers.rope_table(positions, count, x.shape[-1], theta))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm_by_hand():
    # mean of squares of (3, 4) is 12.5, eps lifts it to 16
    x, scale = np.array([[3, 4]], np.float32), np.array([2, 1], np.float32)
    np.testing.assert_allclose(rms_norm(x, scale, 3.5), [[1.5, 1.0]], rtol=1e-6)


def test_rms_norm_takes_its_statistics_in_float32():
    # 300² overflows float16, and 256 ones lose the last bits of a bfloat16 sum
    x = np.full((1, 256), 300.0, np.float16)
    out = rms_norm(x, np.ones(256, np.float32), 1e-6)
    assert out.dtype == jnp.float16
    np.testing.assert_array_equal(out, np.ones((1, 256)))


def test_rotation_multiplies_complex_pairs():
    batch, length, heads, dim, theta = 2, 5, 3, 8, 100.0
    x = normal(0, batch, length, heads, dim)
    positions = np.array([[0, 1, 2, 3, 4], [0, 0, 7, 8, 9]])
    pairs = x[..., : dim // 2] + 1j * x[..., dim // 2 :]
    angle = positions[..., None, None] * theta ** (-np.arange(dim // 2) * 2 / dim)
    turned = pairs * np.exp(1j * angle)
    out = rotated(x, positions, 10, theta)
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)


def test_rotated_products_depend_on_the_distance_only():
    q, k = normal(1, 1, 1, 1, 16), normal(2, 1, 1, 1, 16)

    def score(query_position, key_position):
        turned = [rotated(x, np.full((1, 1), p), 106, 10_000.0) for x, p in ((q, query_position), (k, key_position))]
        return float(np.sum(np.asarray(turned[0]) * turned[1]))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(4, 9)) > 1e-2


def softmax_attention(q, k, v, mask):
    """One query at a time; None where a query may look nowhere."""
    out = np.zeros_like(q)
    sharing = q.shape[2] // k.shape[2]
    for b, s, h in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(mask[b, 0, s])
        if len(seen) == 0:
            continue
        scores = k[b, seen, h // sharing] @ q[b, s, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights / weights.sum() @ v[b, seen, h // sharing]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_of_grouped_heads_against_a_loop(kv_heads):
    q, k, v = normal(3, 2, 6, 4, 8), normal(4, 2, 6, kv_heads, 8), normal(5, 2, 6, kv_heads, 8)
    # some queries see nothing
    mask = np.random.default_rng(6).random((2, 1, 6, 6)) < 0.4
    mask[0, :, 2] = False
    out = jax.jit(layers.attend_grouped)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, :, None])
    looks = mask[:, 0].any(-1)
    assert not looks.all()
    np.testing.assert_allclose(np.asarray(out)[looks], softmax_attention(q, k, v, mask)[looks], atol=1e-5)
    assert np.isfinite(out).all()


def test_dense_computes_in_the_activations_dtype():
    out = jax.eval_shape(layers.dense, np.ones((2, 3), BF16), np.ones((3, 4), np.float32))
    assert (out.shape, out.dtype) == ((2, 4), jnp.bfloat16)


def test_a_product_sums_in_the_dtype_asked_for_and_rounds_once():
    # 1 + 4096 · 2^-12 is 2, of which bfloat16 sums taken one by one would see nothing
    rows, kernel = np.ones((1, 4097), BF16), np.full((4097, 1), 2.0**-12, np.float32)
    kernel[0] = 1
    assert float(product(rows, kernel, layers.EXACT, FLOAT32)[0, 0]) == 2.0
    assert (
        jax.eval_shape(functools.partial(layers.product, arithmetic=layers.EXACT, out=BF16), rows, kernel).dtype == BF16
    )
    # the output dtype alone rounds: 257 has no bfloat16
    exact, rounded = (
        product(rows[:, :257], np.ones((257, 1), np.float32), layers.EXACT, out) for out in (FLOAT32, BF16)
    )
    assert (float(exact[0, 0]), float(rounded[0, 0])) == (257.0, 256.0)


def test_gradients_of_float32_kernels_are_not_rounded_to_the_activations_dtype():
    x, kernel, weights = normal(7, 64, 8), normal(8, 8, 5), normal(9, 64, 5)
    narrow = x.astype(BF16)

    def loss(x, kernel):
        return jnp.sum(layers.dense(x, kernel).astype(jnp.float32) * weights)

    to_x, to_kernel = jax.jit(jax.grad(loss, argnums=(0, 1)))(narrow, kernel)
    assert (to_x.dtype, to_kernel.dtype) == (BF16, FLOAT32)
    # exactly what bfloat16 sides give in float32 sums, which no bfloat16 number holds
    sides = np.asarray(narrow, np.float64), weights.astype(BF16).astype(np.float64)
    np.testing.assert_allclose(to_kernel, sides[0].T @ sides[1], rtol=1e-5, atol=1e-5)
    assert (np.asarray(to_kernel) != np.asarray(to_kernel).astype(BF16).astype(np.float32)).any()


def test_gradients_of_a_product_are_those_of_matmul():
    x, kernel, weights = normal(7, 6, 8), normal(8, 8, 5), normal(9, 6, 5)

    def loss(x, kernel, multiply):
        return jnp.sum(jnp.tanh(multiply(x, kernel)) * weights)

    @jax.jit
    def gradients(*both):
        return [jax.grad(loss, argnums=(0, 1))(*both, multiply) for multiply in (layers.dense, jnp.matmul)]

    for ours, plain in zip(*gradients(x, kernel), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_a_table_in_float32_is_a_product_with_its_transpose_to_the_bit():
    """Gradients too: runs of before go on as they were."""
    rows, table, weights = normal(7, 1, 400, 64), normal(8, 32, 64), normal(9, 1, 400, 32)

    def gradients(multiply):
        loss = lambda rows, table: jnp.sum(multiply(rows, table) * weights)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(rows, table)

    ours = gradients(lambda rows, table: layers.table_product(rows, table, layers.EXACT, FLOAT32))
    theirs = gradients(lambda rows, table: layers.product(rows, table.T, layers.EXACT, FLOAT32))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_table_in_bf16_has_gradients_on_a_cpu_as_of_float32_sums():
    """They are of what a product with the table's transpose would have, which jaxlib 0.10 does not run there."""
    rows, table, weights = normal(7, 1, 400, 64).astype(BF16), normal(8, 32, 64), normal(9, 1, 400, 32)

    def loss(rows, table):
        return jnp.sum(layers.table_product(rows, table, layers.EXACT, FLOAT32) * weights)

    to_rows, to_table = jax.jit(jax.grad(loss, argnums=(0, 1)))(rows, table)
    assert (to_rows.dtype, to_table.dtype) == (BF16, FLOAT32)
    flat, scaled = (np.asarray(each.astype(BF16), np.float64)[0] for each in (rows, weights))
    np.testing.assert_allclose(to_table, scaled.T @ flat, rtol=1e-5, atol=1e-4)
    exact = scaled @ table.astype(BF16).astype(np.float64)
    np.testing.assert_allclose(np.asarray(to_rows, np.float64)[0], exact, rtol=2**-8, atol=2**-8)


def test_wrong_shapes_are_caught_while_testing():
    with pytest.raises(TypeCheckError):
        layers.rms_norm(np.ones((2, 3), np.float32), np.ones(4, np.float32), 1e-6)
