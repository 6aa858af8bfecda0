import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcjax.models.cache import quantize_rows
from dcjax.serving import quantize

MATRICES = arrays(np.float32, (4, 6), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False))


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(5, 48)).astype(np.float32), rng.normal(size=(48, 7)).astype(np.float32)
    # columns of very different sizes: a single scale would lose the small ones
    return x, kernel * 10.0 ** np.arange(-3, 4, dtype=np.float32)


def integers(matrix):
    return np.asarray(matrix.values).astype(np.int64), np.asarray(matrix.scale)


@settings(max_examples=50)
@given(MATRICES)
def test_every_weight_is_within_half_a_step_of_its_channel(weights):
    for quantized, axis in ((quantize.quantize_kernel(weights), 0), (quantize.quantize_table(weights), 1)):
        values, scale = integers(quantized)
        assert quantized.values.dtype == jnp.int8
        assert quantized.scale.dtype == jnp.float32
        assert values.shape == weights.shape
        assert scale.shape == (weights.shape[1 - axis],)
        step = np.expand_dims(scale.astype(np.float64), axis)
        # scales below the smallest normal float32 are flushed to zero
        assert (np.abs(values * step - weights) <= step / 2 * (1 + 1e-4) + 1e-35).all()
        np.testing.assert_allclose(scale, np.abs(weights).max(axis) / 127, rtol=1e-6, atol=1e-35)


def test_int8_experts_are_as_many_int8_kernels():
    rng = np.random.default_rng(3)
    rows, kernels = rng.normal(size=(9, 6)).astype(np.float32), rng.normal(size=(3, 6, 4)).astype(np.float32)
    quantized = quantize.quantize_kernel(kernels)
    assert (quantized.values.shape, quantized.scale.shape) == ((3, 6, 4), (3, 4))
    # the second expert has no rows
    out = quantize.grouped_dot(rows, quantized, np.array([4, 0, 5], np.int32))
    one_by_one = [quantize.dot(rows[:4], quantize.quantize_kernel(kernels[0]))]
    one_by_one.append(quantize.dot(rows[4:], quantize.quantize_kernel(kernels[2])))
    np.testing.assert_allclose(out, np.concatenate(one_by_one), rtol=1e-6)
    wide = quantize.grouped_dot(rows, kernels, np.array([4, 0, 5], np.int32))
    np.testing.assert_allclose(
        wide, np.concatenate([rows[:4] @ kernels[0], rows[4:] @ kernels[2]]), rtol=1e-5, atol=1e-5
    )


def test_a_channel_of_zeros_stays_zero():
    kernel = np.array([[0.0, 2.0, 0.0], [0.0, -4.0, -0.0]], np.float32)
    quantized = quantize.quantize_kernel(kernel)
    np.testing.assert_array_equal(quantized.values, [[0, 64, 0], [0, -127, 0]])
    np.testing.assert_allclose(quantized.scale, [0, 4 / 127, 0])
    x = np.ones((3, 2), np.float32)
    np.testing.assert_array_equal(np.asarray(quantize.dot(x, quantized))[:, [0, 2]], np.zeros((3, 2)))
    # and so does the product of a token of zeros
    np.testing.assert_array_equal(quantize.dot(0 * x, quantized), np.zeros((3, 3)))


def test_an_int8_product_is_integer_arithmetic_times_two_scales(case):
    x, kernel = case
    quantized = quantize.quantize_kernel(kernel)
    weights, weight_scale = integers(quantized)
    tokens, token_scale = (np.asarray(a) for a in quantize_rows(x))
    total = np.zeros((5, 7), np.int64)
    for i, j, k in np.ndindex(5, 7, 48):
        total[i, j] += int(tokens[i, k]) * int(weights[k, j])
    assert np.abs(total).max() < 2**24
    expected = total.astype(np.float32) * (token_scale[:, None] * weight_scale)
    np.testing.assert_array_equal(quantize.dot(x, quantized), expected)
    table = quantize.quantize_table(np.ascontiguousarray(kernel.T))
    np.testing.assert_array_equal(quantize.logits(x, table), expected)


def test_the_sum_of_a_long_product_does_not_saturate():
    # 4096 · 127² is beyond int16 and float32's integers alike
    ones = np.ones((1, 4096), np.float32)
    out = quantize.dot(ones, quantize.quantize_kernel(ones.T.copy()))
    np.testing.assert_allclose(out, [[4096.0]], rtol=1e-6)


def test_an_int8_product_is_close_to_the_wide_one_channel_by_channel(case):
    x, kernel = case
    exact = x @ kernel
    error = np.abs(np.asarray(quantize.dot(x, quantize.quantize_kernel(kernel))) - exact)
    assert (error / np.abs(exact).max(0) < 0.02).all()
    assert error.max() > 0


def test_wide_kernels_are_multiplied_in_the_activations_dtype(case):
    x, kernel = case
    np.testing.assert_allclose(quantize.dot(x, kernel), x @ kernel, rtol=1e-5, atol=1e-4)
    narrow = quantize.dot(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    assert quantize.dot(jnp.asarray(x, jnp.bfloat16), quantize.quantize_kernel(kernel)).dtype == jnp.bfloat16


def test_logits_come_back_in_float32_from_every_format(case):
    x, kernel = case
    table = np.ascontiguousarray(kernel.T)
    np.testing.assert_allclose(quantize.logits(x, table), x @ kernel, rtol=1e-5, atol=1e-4)
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in (x, table)]
    logits = quantize.logits(*narrow)
    assert logits.dtype == quantize.logits(narrow[0], quantize.quantize_table(table)).dtype == jnp.float32
    # the products of bfloat16 numbers are exact in float32, and so is the accumulation up to rounding
    wide = [np.asarray(a, np.float64) for a in narrow]
    np.testing.assert_allclose(logits, wide[0] @ wide[1].T, rtol=1e-5, atol=1e-4)


def test_looking_up_a_row_undoes_its_scale(case):
    table = np.ascontiguousarray(case[1].T)
    tokens = np.array([[0, 6], [3, 3]])
    rows = quantize.lookup(quantize.quantize_table(table), tokens, jnp.dtype(jnp.float32))
    values, scale = integers(quantize.quantize_table(table))
    np.testing.assert_array_equal(rows, values[tokens].astype(np.float32) * scale[tokens][..., None])
    np.testing.assert_array_equal(quantize.lookup(table, tokens, jnp.dtype(jnp.float32)), table[tokens])
    assert quantize.lookup(table, tokens, jnp.dtype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_formats_store_what_they_are_called():
    stored = {name: (f.activations.name, f.kv_cache.name, f.int8_weights) for name, f in quantize.formats.items()}
    assert stored["float32"] == ("float32", "float32", False)
    assert stored["bf16"] == ("bfloat16", "bfloat16", False)
    assert stored["int8"] == ("bfloat16", "int8", True)
