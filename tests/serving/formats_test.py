import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
from compiling import jit
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcjax.models import ModelConfig, abstract_params, presets
from dcjax.models.cache import quantize_rows
from dcjax.models.layers import EXACT
from dcjax.serving.formats import cache_dtype, formats, served, serving_format, wide_format
from dcjax.serving.formats.face import DTYPES

NARROW = [name for name, format in formats.items() if format.weights is not None]
MATRICES = arrays(np.float32, (4, 32), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False))
GROUP_SIZES = np.array([4, 0, 5], np.int32)

INT8, FP8 = DTYPES["int8"], DTYPES["fp8"]


def store_kernel(kernel, format):
    return format.store_kernel(kernel)


def store_table(table, format):
    return format.store_table(table)


def multiply(x, kernel):
    return kernel.dot(x, EXACT)


def score(x, table):
    return table.logits(x, EXACT)


def multiply_grouped(rows, kernels, group_sizes):
    return kernels.grouped_dot(rows, group_sizes, EXACT)


def look_up(table, tokens, dtype):
    return table.lookup(tokens, dtype)


quantize_kernel, quantize_table = (jit(function, static_argnums=1) for function in (store_kernel, store_table))
dot, logits, grouped_dot = map(jit, (multiply, score, multiply_grouped))
lookup = jit(look_up, static_argnums=2)
unpack = jit(lambda matrix, dtype, axis: matrix.format.decode(matrix.codes, dtype, axis), static_argnums=(1, 2))


def arrays_of(matrix):
    """The values and scales that a matrix stores."""
    return matrix.codes if in_groups(matrix.format) else matrix


def in_groups(format):
    return format.name in ("int8", "int4")


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(9, 64)).astype(np.float32), rng.normal(size=(64, 7)).astype(np.float32)
    # columns of very different sizes: a single scale would lose the small ones
    return x, kernel * 10.0 ** np.arange(-3, 4, dtype=np.float32)


def stands_for(matrix, axis):
    """The float64 numbers that a quantised matrix stores; `axis` is the contracted one."""
    if not in_groups(matrix.format):
        wide = np.asarray(matrix.values).astype(np.float64) * np.expand_dims(np.asarray(matrix.scale, np.float64), axis)
        return rotated(wide, axis) if matrix.format.name == "w8a8_rotated" else wide
    stored, scale = (np.moveaxis(np.asarray(a), axis, -1) for a in matrix.codes)
    a_byte = 2 if matrix.format.name == "int4" else 1
    wide = np.zeros((*stored.shape[:-1], a_byte * stored.shape[-1]))
    for place in np.ndindex(wide.shape):
        *row, k = place
        value = int(stored[(*row, k // a_byte)])
        if a_byte == 2:
            value = (value >> (4 * (k % 2))) & 15
            value = value - 16 if value > 7 else value
        wide[place] = value * float(scale[(*row, k // 32)])
    return np.moveaxis(wide, -1, axis)


def rotated(x, axis=-1):
    """Blocks of a power of two times a Hadamard matrix, as SciPy makes it, in float64."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    block = math.gcd(x.shape[-1], 512)
    turned = x.reshape(*x.shape[:-1], -1, block) @ (scipy.linalg.hadamard(block) / np.sqrt(block))
    return np.moveaxis(turned.reshape(x.shape), -1, axis)


def activations_of(x, format):
    """The float64 numbers that meet the weights: as quantised per token where the format does so."""
    if format.name == "w8a8_rotated":
        return rotated(activations_of(rotated(x), formats["w8a8"]))
    x = np.asarray(x, np.float64)
    if not format.quantizes_activations:
        return x
    largest = 127 if format.weights == "int8" else 448
    scale = np.abs(x).max(-1, keepdims=True).astype(np.float32) / np.float32(largest)
    narrow = (np.float32(x) * (np.float32(1) / scale)).astype(np.float32)
    narrow = np.round(narrow) if format.weights == "int8" else narrow.astype(ml_dtypes.float8_e4m3fn)
    return narrow.astype(np.float64) * scale


def largest_error(format, master, axis):
    """Half a step of the format around each weight of the master."""
    peak = np.abs(master).max(axis, keepdims=True).astype(np.float64)
    if format.name == "w8a8_rotated":
        # the errors of a block's rotated numbers add up to at most √block of one's
        block = math.gcd(master.shape[axis], 512)
        return np.abs(rotated(master, axis)).max(axis, keepdims=True) / 127 / 2 * np.sqrt(block)
    if format.name in ("w8a8", "int8_channel"):
        return peak / 127 / 2
    if format.weights == "fp8":
        # three bits behind the leading one; below 2^-6 of 448 the steps no longer shrink
        return np.maximum(np.abs(master) / 16, peak / 448 * 2.0**-10)
    groups, largest = np.moveaxis(master, axis, -1), {"int8": 127, "int4": 7}[format.name]
    peaks = np.abs(groups.reshape(*groups.shape[:-1], -1, 32)).max(-1)
    # the largest number of a group is held as 127 or 7 times a scale that is rounded to 8 bits
    return np.moveaxis(np.repeat(peaks, 32, -1), -1, axis) / largest / 2 * (1 + 2**-8) + peak * 2**-8


@pytest.mark.parametrize("name", NARROW)
@settings(max_examples=30)
@given(rows=MATRICES)
def test_every_weight_is_within_half_a_step_of_its_channel_or_group(name, rows):
    format = formats[name]
    for quantized, master, axis in (
        (quantize_kernel(rows.T.copy(), format), rows.T, 0),
        (quantize_table(rows, format), rows, 1),
    ):
        restored = stands_for(quantized, axis)
        assert restored.shape == master.shape
        # scales below the smallest normal float32 are flushed to zero
        assert (np.abs(restored - master) <= largest_error(format, master, axis) * (1 + 1e-4) + 1e-34).all()


@pytest.mark.parametrize("name", NARROW)
def test_weights_are_stored_in_their_dtype_with_scales_of_theirs(name, case):
    format, kernel = formats[name], case[1]
    by_name = {"int8": ((64, 7), "int8", (2, 7), "bfloat16"), "int4": ((32, 7), "uint8", (2, 7), "bfloat16")}
    values = "float8_e4m3fn" if format.weights == "fp8" else "int8"
    expected = by_name.get(name, ((64, 7), values, (7,), "float32"))
    matrix = quantize_kernel(kernel, format)
    stored = arrays_of(matrix)
    assert (stored.values.shape, stored.values.dtype, stored.scale.shape, stored.scale.dtype) == expected
    if not in_groups(format):
        largest = 127 if format.weights == "int8" else 448
        turned = rotated(kernel, 0) if name == "w8a8_rotated" else kernel
        np.testing.assert_allclose(matrix.scale, np.abs(turned).max(0) / largest, rtol=1e-6)
        assert matrix.format.quantizes_activations == (name in ("w8a8_rotated", "w8a8", "fp8"))


def test_e4m3_rounds_to_the_nearest_of_its_numbers():
    # 448 is the largest; 17 and 19 lie between 16, 18 and 20, and even significands win; 2^-10 is half the smallest
    table = np.array([[448.0, 17.0, 19.0, -100.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 0.3]], np.float32)
    stored = quantize_table(table, formats["fp8"])
    np.testing.assert_array_equal(
        np.asarray(stored.values, np.float32), [[448, 16, 20, -96, 2.0**-9, 0, 2.0**-8, 0.3125]]
    )
    np.testing.assert_array_equal(stored.scale, [1.0])


def test_nibbles_are_packed_low_first_along_the_contracted_axis():
    row = np.zeros(64, np.float32)
    # group 0 has the scale 1, group 1 the scale 2
    row[:6] = [7, -7, 1, -1, 2.4, 2.6]
    row[62:] = [-14, 4]
    table = quantize_table(row[None], formats["int4"])
    # −7 is 1001, −1 is 1111 in two's complement
    expected = np.zeros(32, np.uint8)
    expected[:3], expected[31] = [0x97, 0xF1, 0x32], 0x29
    np.testing.assert_array_equal(table.codes.values, expected[None])
    np.testing.assert_array_equal(table.codes.scale, [[1.0, 2.0]])
    kernel = quantize_kernel(row[:, None], formats["int4"])
    np.testing.assert_array_equal(kernel.codes.values, expected[:, None])
    np.testing.assert_array_equal(kernel.codes.scale, [[1.0], [2.0]])
    for matrix, axis in ((table, -1), (kernel, -2)):
        restored = np.asarray(unpack(matrix, jnp.dtype(jnp.float32), axis)).ravel()
        np.testing.assert_array_equal(restored[:6], [7, -7, 1, -1, 2, 3])
        np.testing.assert_array_equal(restored[62:], [-14, 4])


def test_int4_is_divided_by_the_rounded_scale():
    # 10 / 7 is 1.4286, in bfloat16 1.4297: 3.573 is 2.501 of the one, and rounds up, and 2.499 of the other
    group = np.zeros((1, 32), np.float32)
    group[0, :2] = [10.0, 3.573]
    matrix = quantize_table(group, formats["int4"])
    assert float(matrix.codes.scale[0, 0]) == 1.4296875
    assert int(matrix.codes.values[0, 0]) == 0x27


@pytest.mark.parametrize("name", NARROW)
def test_products_equal_those_of_what_the_numbers_stand_for(name, case):
    format, (x, kernel) = formats[name], case
    matrix, table = quantize_kernel(kernel, format), quantize_table(kernel.T.copy(), format)
    wide = activations_of(x, format)
    for out, weights in (
        (dot(x, matrix), stands_for(matrix, 0)),
        (dot(x[None], matrix)[0], stands_for(matrix, 0)),
        (logits(x, table), stands_for(table, 1).T),
    ):
        exact = wide @ weights
        # sums in float32, columns of very different sizes
        assert (np.abs(out - exact) <= 2e-6 * (np.abs(wide) @ np.abs(weights))).all()
        assert np.abs(out - np.asarray(x, np.float64) @ kernel).max() > 1e-3


@pytest.mark.parametrize("name", NARROW)
def test_the_products_of_bfloat16_activations_round_only_their_result(name, case):
    format = formats[name]
    x, kernel = case[0].astype(jnp.bfloat16), case[1]
    matrix, table = quantize_kernel(kernel, format), quantize_table(kernel.T.copy(), format)
    weights = stands_for(matrix, 0)
    if in_groups(format):
        weights = weights.astype(ml_dtypes.bfloat16).astype(np.float64)
    exact, size = (f(activations_of(x, format)) @ f(weights) for f in (np.asarray, np.abs))
    out, scores = dot(x, matrix), logits(x, table)
    assert (out.dtype, scores.dtype) == (jnp.bfloat16, jnp.float32)
    assert (np.abs(np.asarray(scores) - exact) <= 2e-6 * size).all()
    assert (np.abs(np.asarray(out, np.float64) - exact) <= 2e-6 * size + np.abs(exact) * 2**-8).all()


@pytest.mark.parametrize("name", NARROW)
def test_experts_are_as_many_kernels(name):
    format, rng = formats[name], np.random.default_rng(3)
    rows, kernels = rng.normal(size=(9, 64)).astype(np.float32), rng.normal(size=(3, 64, 4)).astype(np.float32)
    matrix = quantize_kernel(kernels, format)
    for leaf, one in zip(jax.tree.leaves(matrix), jax.tree.leaves(quantize_kernel(kernels[1], format)), strict=True):
        # a sum over a rotated block may be taken in another order
        np.testing.assert_allclose(np.asarray(leaf)[1], one, rtol=2e-7 if name == "w8a8_rotated" else 0)
    # the second expert has no rows
    out = grouped_dot(rows, matrix, GROUP_SIZES)
    weights, wide = stands_for(matrix, 1), activations_of(rows, format)
    np.testing.assert_allclose(out, np.concatenate([wide[:4] @ weights[0], wide[4:] @ weights[2]]), atol=1e-4)
    assert jax.eval_shape(grouped_dot, rows.astype(jnp.bfloat16), matrix, GROUP_SIZES).dtype == jnp.bfloat16


def test_wide_experts_are_multiplied_in_the_rows_dtype():
    rng = np.random.default_rng(3)
    rows, kernels = rng.normal(size=(9, 6)).astype(np.float32), rng.normal(size=(3, 6, 4)).astype(np.float32)
    np.testing.assert_allclose(
        grouped_dot(rows, quantize_kernel(kernels, formats["float32"]), GROUP_SIZES),
        np.concatenate([rows[:4] @ kernels[0], rows[4:] @ kernels[2]]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", NARROW)
def test_a_channel_of_zeros_stays_zero(name):
    format, kernel = formats[name], np.zeros((32, 3), np.float32)
    kernel[:2, 1] = [2.0, -4.0]
    # scales of numbers this small are no normal float32
    kernel[:, 2] = 1.2e-38
    for matrix, axis in (
        (quantize_kernel(kernel, format), 0),
        (quantize_table(kernel.T.copy(), format), 1),
    ):
        restored = stands_for(matrix, axis)
        assert np.isfinite(restored).all()
        np.testing.assert_allclose(np.moveaxis(restored, axis, 0), kernel, atol=4 / 7 / 2 * 1.01)
    x, matrix = np.ones((3, 32), np.float32), quantize_kernel(kernel, format)
    np.testing.assert_array_equal(np.asarray(dot(x, matrix))[:, [0, 2]], np.zeros((3, 2)))
    # and so does the product of a token of zeros
    np.testing.assert_array_equal(dot(0 * x, matrix), np.zeros((3, 3)))


def test_an_int8_product_is_integer_arithmetic_times_two_scales(case):
    x, kernel = case
    quantized = store_kernel(kernel, formats["w8a8"])
    weights, weight_scale = np.asarray(quantized.values).astype(np.int64), np.asarray(quantized.scale)
    tokens, token_scale = (np.asarray(a) for a in quantize_rows(x, INT8))
    total = np.zeros((9, 7), np.int64)
    for i, j, k in np.ndindex(9, 7, 64):
        total[i, j] += int(tokens[i, k]) * int(weights[k, j])
    assert np.abs(total).max() < 2**24
    expected = total.astype(np.float32) * (token_scale[:, None] * weight_scale)
    np.testing.assert_array_equal(multiply(x, quantized), expected)
    table = store_table(np.ascontiguousarray(kernel.T), formats["w8a8"])
    np.testing.assert_array_equal(score(x, table), expected)


def test_the_sum_of_a_long_product_does_not_saturate():
    # 4096 · 127² is beyond int16 and float32's integers alike
    ones = np.ones((1, 4096), np.float32)
    for name in ("w8a8", "fp8"):
        out = dot(ones, quantize_kernel(ones.T.copy(), formats[name]))
        np.testing.assert_allclose(out, [[4096.0]], rtol=1e-6)


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_programs_multiply_narrow_numbers(name, case):
    """int8 as int8 with int32 sums wherever it is compiled; float8 as float8 where accelerators take it."""
    format, (x, kernel) = formats[name], case
    kernels = np.stack([kernel] * 3)
    calls = {
        multiply: (x, store_kernel(kernel, format)),
        score: (x, store_table(kernel.T.copy(), format)),
        multiply_grouped: (x, store_kernel(kernels, format), GROUP_SIZES),
    }
    for product, arguments in calls.items():
        traced = jax.jit(product).trace(*arguments)
        if name == "w8a8":
            compiled = traced.lower().compile().as_text()
            types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", compiled))
            dots = re.findall(r"= (\w+)\[[^\n]* dot\((%[\w.-]+), (%[\w.-]+)\)", compiled)
            assert [(types[a], types[b], out) for out, a, b in dots] == [("s8", "s8", "s32")], product
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
        dots = re.findall(r"(?:dot_general|ragged_dot).*: \((.*)\) -> (.*)", lowered)
        operand, total = {"w8a8": ("xi8>", "xi32>"), "fp8": ("xf8E4M3FN>", "xf32>")}[name]
        assert dots, product
        assert all(sides.count(operand) == 2 and out.count(total) == 1 for sides, out in dots), product


def test_wide_kernels_are_multiplied_in_the_activations_dtype(case):
    x, kernel = case
    np.testing.assert_allclose(dot(x, quantize_kernel(kernel, formats["float32"])), x @ kernel, rtol=1e-5, atol=1e-4)
    for name, dtype in (("bf16", jnp.bfloat16), ("fp16", jnp.float16)):
        assert jax.eval_shape(dot, x.astype(dtype), store_kernel(kernel, formats[name])).dtype == dtype


def test_logits_of_wide_tables_come_back_in_float32(case):
    x, kernel = case
    table = np.ascontiguousarray(kernel.T)
    np.testing.assert_allclose(logits(x, quantize_table(table, formats["float32"])), x @ kernel, rtol=1e-5, atol=1e-4)
    narrow = [a.astype(jnp.bfloat16) for a in (x, table)]
    scores = logits(narrow[0], quantize_table(table, formats["bf16"]))
    assert scores.dtype == jnp.float32
    # the products of bfloat16 numbers are exact in float32, and so is the accumulation up to rounding
    wide = [np.asarray(a, np.float64) for a in narrow]
    np.testing.assert_allclose(scores, wide[0] @ wide[1].T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NARROW)
def test_looking_up_a_row_undoes_its_scale(name, case):
    table = np.ascontiguousarray(case[1].T)
    tokens = np.array([[0, 6], [3, 3]])
    matrix = quantize_table(table, formats[name])
    rows = lookup(matrix, tokens, jnp.dtype(jnp.float32))
    expected = stands_for(matrix, 1)[tokens].astype(np.float32)
    # a rotation is float32's, and sums
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-6 * np.abs(expected).max() * name.endswith("_rotated"))
    narrow = jax.eval_shape(lambda: matrix.lookup(tokens, jnp.dtype(jnp.bfloat16)))
    assert narrow.dtype == jnp.bfloat16
    wide = quantize_table(table, formats["float32"])
    np.testing.assert_array_equal(lookup(wide, tokens, jnp.dtype(jnp.float32)), table[tokens])


def test_the_formats_store_what_they_are_called():
    stored = {
        name: (f.activations.name, f.weights, f.quantizes_activations, cache_dtype(f, "auto").name)
        for name, f in formats.items()
    }
    assert stored == {
        "float32": ("float32", None, False, "float32"),
        "bf16": ("bfloat16", None, False, "bfloat16"),
        "fp16": ("float16", None, False, "float16"),
        "int8": ("bfloat16", "int8", False, "int8"),
        "int8_channel": ("bfloat16", "int8", False, "bfloat16"),
        "w8a8_rotated": ("bfloat16", "int8", True, "int8"),
        "w8a8": ("bfloat16", "int8", True, "int8"),
        "fp8_weight_only": ("bfloat16", "fp8", False, "bfloat16"),
        "fp8": ("bfloat16", "fp8", True, "float8_e4m3fn"),
        "int4": ("bfloat16", "int4", False, "bfloat16"),
    }
    assert all(format.name == name for name, format in formats.items())


def test_below_each_format_is_one_that_quantises_less():
    below = {name: (f.weight_only.name, wide_format(f.activations).name) for name, f in formats.items()}
    narrow = {
        "int8": ("int8", "bf16"),
        "int8_channel": ("int8_channel", "bf16"),
        "w8a8_rotated": ("int8_channel_rotated", "bf16"),
        "w8a8": ("int8_channel", "bf16"),
        "fp8_weight_only": ("fp8_weight_only", "bf16"),
        "fp8": ("fp8_weight_only", "bf16"),
    }
    wide = {name: (name, name) for name in ("float32", "bf16", "fp16")}
    assert below == wide | narrow | {"int4": ("int4", "bf16")}


def test_a_cache_of_another_dtype_replaces_the_formats_own():
    assert serving_format("int4") is serving_format(formats["int4"]) is formats["int4"]
    assert cache_dtype(formats["int4"], "fp8") == FP8
    assert cache_dtype(formats["int8"], "bf16") == jnp.bfloat16
    with pytest.raises(ValueError, match="format is 'int3'; it must be one of float32, bf16"):
        serving_format("int3")
    with pytest.raises(ValueError, match="kv_cache is 'int4'; it must be one of auto, float32"):
        cache_dtype(formats["int8"], "int4")


@pytest.mark.parametrize("preset", presets)
def test_matrices_are_contracted_but_for_the_router(preset):
    params = abstract_params(presets[preset])
    outer = {name for name, leaf in params.items() if name != "layers" and leaf.ndim == 2}
    layered = {name for name, leaf in params["layers"].items() if leaf.ndim > 2}
    assert set(served.contracted_widths(presets[preset])) == outer | layered - {"router"}


def test_what_is_contracted_is_what_products_sum_over():
    config = ModelConfig(hidden_size=16, intermediate_size=24, num_heads=4, head_dim=6, tie_embeddings=False)
    widths = served.contracted_widths(config)
    assert widths == dict.fromkeys(widths, 16) | {"o_proj": 24, "down_proj": 24}
    assert {"embed_tokens", "lm_head", "q_proj"} <= set(widths)


def check(config, format, platform, *, kv_cache="auto", keep=()):
    served.check_served(config, format, cache_dtype(format, kv_cache), platform, keep)


@pytest.mark.parametrize("name", formats)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_published_sizes_are_served_everywhere_but_fp16_on_a_tpu(name, platform):
    for preset in ("tiny", "tiny-moe", "qwen3-0.6b", "qwen3-30b-a3b", "deepseek-r1-distill-qwen-1.5b"):
        if (name, platform) == ("fp16", "tpu"):
            with pytest.raises(ValueError, match="format 'fp16' is float16, which TPUs do not have"):
                check(presets[preset], formats[name], platform)
        else:
            check(presets[preset], formats[name], platform)


def test_a_float16_cache_is_not_served_on_a_tpu():
    check(presets["tiny"], formats["int8"], "gpu", kv_cache="fp16")
    with pytest.raises(ValueError, match="kv_cache 'fp16' is float16"):
        check(presets["tiny"], formats["int8"], "tpu", kv_cache="fp16")


def test_groups_that_a_width_does_not_fill_are_named():
    config = dataclasses.replace(presets["tiny"], intermediate_size=200)
    check(config, formats["w8a8"], "cpu")
    check(config, formats["int8"], "cpu")
    odd = dataclasses.replace(presets["tiny"], intermediate_size=204)
    for name, refused, least in (("int4", config, 32), ("int8", odd, 8)):
        width = refused.intermediate_size
        with pytest.raises(ValueError, match=f"down_proj is contracted over {width}; .* a multiple of {least}"):
            check(refused, formats[name], "cpu")
        check(refused, formats[name], "cpu", keep=["down_*"])


def test_int8_has_smaller_groups_where_32_do_not_divide_the_width():
    kernel = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
    matrix = quantize_kernel(kernel, formats["int8"])
    assert matrix.codes.scale.shape == (3, 5)
    for group in range(3):
        part = slice(16 * group, 16 * group + 16)
        restored = np.asarray(unpack(matrix, jnp.dtype(jnp.float32), -2))[part]
        # half a step of the group's own largest weight, and the rounding of the scale
        assert (np.abs(restored - kernel[part]) <= np.abs(kernel[part]).max(0) / 127 / 2 * 1.01 + 2e-3).all()
        assert np.abs(restored - kernel[part]).max() > 1e-3


def test_a_sum_that_int32_could_not_hold_is_refused():
    longest = (2**31 - 1) // 127**2
    for width, fits in ((longest, True), (longest + 1, False)):
        config = dataclasses.replace(presets["tiny"], intermediate_size=width)
        check(config, formats["int8_channel"], "cpu")
        if fits:
            check(config, formats["w8a8"], "cpu")
        else:
            with pytest.raises(ValueError, match=f"down_proj is contracted over {width}"):
                check(config, formats["int8"], "cpu")
