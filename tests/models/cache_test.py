"""The cache of keys and values: against the full forward, and layers looped over against unrolled ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import DENSE, EXPERTS, masters

from dcjax.models import forward
from dcjax.models.block import training_products
from dcjax.models.cache import (
    attend,
    forward_cached,
    init_cache,
    quantize_rows,
    stack_layers,
    write,
)
from dcjax.models.parameters import layer_params
from dcjax.models.rope import Llama3Scaling, YarnScaling

pytestmark = pytest.mark.heavy

PRODUCTS = training_products(DENSE.precision)
PROMPTS, CAPACITY = np.array([6, 1, 4]), 12
ROWS, WIDTH = len(PROMPTS), PROMPTS.max()
NARROW = ["int8", "float8_e4m3fn"]


def one_by_one(stacked, count):
    """What `stack_layers` was given."""
    return tuple(jax.tree.map(lambda leaf, number=number: leaf[number], stacked) for number in range(count))


@functools.partial(jit, static_argnums=(0, 5), static_argnames="looped")
def run(config, params, tokens, positions, caches, choose=None, looped=False):
    """What tokens leave behind, and their logits; layers and caches come and go one by one."""
    if looped:
        params, caches = {**params, "layers": stack_layers(params["layers"])}, stack_layers(caches)
    decoded = forward_cached(config, params, params["embed_tokens"][tokens], positions, caches, PRODUCTS, choose)
    if looped:
        decoded = decoded._replace(caches=one_by_one(decoded.caches, config.num_layers))
    return decoded, decoded.hidden @ params["embed_tokens"].T


@functools.cache
def model(config):
    """Its parameters, with the layers one by one."""
    params = jax.tree.map(np.asarray, masters(config))
    layers = tuple(layer_params(config, params["layers"], number) for number in range(config.num_layers))
    return {**params, "layers": layers}


def empty(config=DENSE, dtype="float32"):
    shapes = jax.eval_shape(lambda: init_cache(config, ROWS, CAPACITY, jnp.dtype(dtype)))
    return tuple(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes) for _ in range(config.num_layers))


TOKENS = np.random.default_rng(0).integers(0, DENSE.vocab_size, (ROWS, CAPACITY)).astype(np.int32)
FRONT = np.broadcast_to(np.arange(WIDTH), (ROWS, WIDTH))


@functools.cache
def full(config=DENSE):
    """Logits of all tokens at once, without a cache."""
    return np.asarray(jit(forward, static_argnums=0)(config, masters(config), TOKENS))


def prefill_and_decode(dtype, config=DENSE):
    """Logits of ragged prompts, prefilled at once with padding on the right, then token by token to the capacity."""
    params = model(config)
    padded = np.where(PROMPTS[:, None] > FRONT, TOKENS[:, :WIDTH], 0)
    decoded, prefilled = run(config, params, padded, FRONT, empty(dtype=dtype))
    logits = np.full((*TOKENS.shape, DENSE.vocab_size), np.nan, np.float32)
    for row, length in enumerate(PROMPTS):
        logits[row, :length] = prefilled[row, :length]
    at = PROMPTS
    while (at < CAPACITY).any():
        # rows that are through feed their last token again, as ended slots do
        position = np.minimum(at, CAPACITY - 1)[:, None]
        decoded, step = run(config, params, np.take_along_axis(TOKENS, position, 1), position, decoded.caches)
        logits[np.arange(ROWS), position[:, 0]] = step[:, 0]
        at = at + 1
    return logits


# prompts end before the length that is scaled, and the capacity is beyond it
LLAMA = dataclasses.replace(DENSE, family="llama", rope_theta=50.0, rope_scaling=Llama3Scaling(4.0, 0.5, 1.5, 8))
YARN = dataclasses.replace(DENSE, rope_theta=50.0, rope_scaling=YarnScaling(4.0, 8, beta_fast=2.0, beta_slow=0.25))


@pytest.mark.parametrize("config", [DENSE, LLAMA, YARN], ids=["plain", "llama3", "yarn"])
def test_prefill_and_decode_equal_the_full_forward(config):
    np.testing.assert_allclose(prefill_and_decode("float32", config), full(config), atol=1e-5)
    if config.rope_scaling is not None:
        assert np.abs(full(config) - full(dataclasses.replace(config, rope_scaling=None)))[:, -1].max() > 1e-2


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [("int8", 1e-4, 0.1), pytest.param("float8_e4m3fn", 1e-3, 0.4, marks=pytest.mark.slow)],
)
def test_a_narrow_cache_is_close_and_not_equal(dtype, least, most):
    error = np.abs(prefill_and_decode(dtype) - full())
    assert least < error.max() < most


def test_what_lies_beyond_a_position_is_not_seen():
    garbage = empty()
    for leaf in jax.tree.leaves(garbage):
        leaf[:, :, WIDTH:] = 1e4
    _, logits = run(DENSE, model(DENSE), TOKENS[:, :WIDTH], FRONT, garbage)
    np.testing.assert_allclose(logits, full()[:, :WIDTH], atol=1e-5)


def test_what_each_layer_leaves_behind_is_returned():
    params = model(DENSE)
    decoded, _ = run(DENSE, params, TOKENS[:, :WIDTH], FRONT, empty())
    assert decoded.experts is None
    assert decoded.residuals.shape == (DENSE.num_layers, ROWS, WIDTH, DENSE.hidden_size)

    def normed(residual):
        wide = np.float64(residual)
        return wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + DENSE.rms_norm_eps) * params["norm"]

    np.testing.assert_allclose(decoded.hidden, normed(decoded.residuals[-1]), atol=1e-5)
    # the first layer's is what the model ends with where the second adds nothing
    silent = params["layers"][1] | {name: np.zeros_like(params["layers"][1][name]) for name in ("o_proj", "down_proj")}
    first, _ = run(DENSE, params | {"layers": (params["layers"][0], silent)}, TOKENS[:, :WIDTH], FRONT, empty())
    np.testing.assert_allclose(first.residuals[-1], decoded.residuals[0], atol=1e-6)
    np.testing.assert_allclose(first.hidden, normed(decoded.residuals[0]), atol=1e-5)


def test_experts_come_back_and_are_chosen_by_whom_is_asked():
    mixed = dataclasses.replace(EXPERTS, mlp_only_layers=(0,))
    given = model(mixed), TOKENS[:, :WIDTH], FRONT, empty(mixed)
    natural, _ = run(mixed, *given)
    assert natural.experts.shape == (1, ROWS, WIDTH, 2)
    asked = []

    def choose(number, probabilities):
        asked.append((number, probabilities.shape))
        return jnp.argsort(-probabilities, axis=-1)[..., 1:3]

    other, _ = run(mixed, *given, choose)
    # by the layer's number among all, of which the first has no router
    assert asked == [(1, (ROWS, WIDTH, 4))]
    np.testing.assert_array_equal(other.experts[..., 0], natural.experts[..., 1])
    assert (np.asarray(other.experts[..., 1]) != np.asarray(natural.experts)[..., 0]).all()
    assert np.abs(np.asarray(other.hidden) - natural.hidden).max() > 1e-3


def later_layers_choose_others(number, probabilities):
    """The most probable experts in layer 0, and their neighbours in the others."""
    return (jnp.argsort(-probabilities, axis=-1)[..., :2] + number) % EXPERTS.num_experts


@pytest.mark.parametrize(
    ("config", "dtype"), [(DENSE, "float32"), (DENSE, "int8"), (EXPERTS, "float32")], ids=["dense", "int8", "experts"]
)
def test_layers_looped_over_are_those_unrolled(config, dtype):
    params, caches = model(config), empty(config, dtype)
    choose = later_layers_choose_others if config.num_experts else None
    # a prefill, and a decoding step at another position in each row
    for tokens, positions in [
        (TOKENS[:, :WIDTH], FRONT),
        (np.take_along_axis(TOKENS, PROMPTS[:, None], 1), PROMPTS[:, None]),
    ]:
        unrolled, _ = run(config, params, tokens, positions, caches, choose)
        looped, _ = run(config, params, tokens, positions, caches, choose, looped=True)
        np.testing.assert_allclose(looped.hidden, unrolled.hidden, atol=1e-5)
        np.testing.assert_allclose(looped.residuals, unrolled.residuals, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, looped.experts, unrolled.experts)
        assert_same_caches(looped.caches, unrolled.caches)
        # what was there before is changed where the tokens are, in every layer
        assert all((np.asarray(old.k) != new.k).any() for old, new in zip(caches, looped.caches, strict=True))
        caches = unrolled.caches
    if config.num_experts:
        assert unrolled.experts.shape == (2, ROWS, 1, 2)


def assert_same_caches(left, right):
    def assert_close(a, b):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # what rounds to an integer may round to its neighbour
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5, atol=1 if a.dtype == jnp.int8 else 1e-5)
        assert (np.asarray(a) == np.asarray(b)).mean() > 0.9 or a.dtype != jnp.int8

    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(assert_close, left, right)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_stacked_has_the_layers_in_front(dtype):
    rng = np.random.default_rng(2)
    layers = jax.tree.map(lambda leaf: rng.integers(-9, 9, leaf.shape).astype(leaf.dtype), empty(dtype=dtype))
    back = one_by_one(jit(stack_layers)(layers), DENSE.num_layers)
    assert jax.tree.structure(back) == jax.tree.structure(layers)
    jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(ours, theirs, strict=True), back, layers)


written = functools.partial(jit, static_argnums=0)(
    lambda dtype, k, v, positions: write(init_cache(DENSE, 2, CAPACITY, jnp.dtype(dtype)), k, v, positions)
)
quantized = jit(quantize_rows, static_argnums=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", *NARROW])
def test_an_empty_cache_has_the_dtype_asked_for_and_scales_only_where_narrow(dtype):
    cache = jax.eval_shape(lambda: init_cache(DENSE, 3, CAPACITY, jnp.dtype(dtype)))
    assert cache.k.shape == cache.v.shape == (3, DENSE.num_kv_heads, CAPACITY, DENSE.head_dim)
    assert cache.k.dtype == cache.v.dtype == dtype
    scales = [] if dtype in NARROW else [None, None]
    assert [scale for scale in (cache.k_scale, cache.v_scale) if scale is None] == scales
    assert dtype not in NARROW or cache.k_scale.shape == cache.v_scale.shape == (3, DENSE.num_kv_heads, CAPACITY)


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_writes_land_at_their_positions_and_nowhere_else(dtype):
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 2, 3, DENSE.num_kv_heads, DENSE.head_dim)).astype(np.float32)
    # the second sequence writes past the capacity, which is dropped
    positions = np.array([[2, 3, 4], [CAPACITY - 1, CAPACITY, CAPACITY + 1]])
    cache = written(dtype, k, v, positions)
    there = np.zeros((2, CAPACITY), bool)
    there[0, 2:5] = there[1, -1] = True
    for held, scale, new in ((cache.k, cache.k_scale, k), (cache.v, cache.v_scale, v)):
        wide = np.asarray(held, np.float32) * (1.0 if scale is None else np.asarray(scale)[..., None])
        wide = wide.swapaxes(1, 2)
        # half a step of the largest number: 1 / 254 of it in int8, 1 / 28 in e4m3, where 14 eighths of 256 are 448
        tolerance = {"float32": 0.0, "int8": np.abs(new).max() / 254, "float8_e4m3fn": np.abs(new).max() / 28}[dtype]
        np.testing.assert_allclose(wide[there], np.concatenate([new[0], new[1, :1]]), atol=tolerance * 1.0001)
        assert (wide[~there] == 0).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_attention_on_a_narrow_cache_is_attention_on_what_it_stands_for(dtype):
    rng = np.random.default_rng(1)
    k, v = rng.normal(size=(2, 2, 3, DENSE.num_kv_heads, DENSE.head_dim)).astype(np.float32)
    q = rng.normal(size=(2, 2, DENSE.num_heads, DENSE.head_dim)).astype(np.float32)
    positions = np.tile(np.arange(3), (2, 1))
    narrow = written(dtype, k, v, positions)
    stands_for = [
        (np.asarray(held[:, :, :3], np.float32) * np.asarray(scale)[:, :, :3, None]).swapaxes(1, 2)
        for held, scale in ((narrow.k, narrow.k_scale), (narrow.v, narrow.v_scale))
    ]
    wide = written("float32", *stands_for, positions)
    at = np.array([[1, 2], [0, 1]])
    attended = jit(attend)
    np.testing.assert_allclose(attended(narrow, q, at), attended(wide, q, at), atol=1e-5)


FLOATS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(max_examples=50)
@given(arrays(np.float32, (3, 4), elements=FLOATS))
def test_rows_in_int8_are_within_half_a_step(x):
    values, scale = (np.asarray(a) for a in quantized(x, jnp.dtype("int8")))
    assert values.dtype == np.int8
    assert scale.dtype == np.float32
    restored = values.astype(np.float64) * scale[:, None]
    # scales below the smallest normal float32 are flushed to zero
    assert (np.abs(restored - x) <= scale[:, None] * 0.5 * (1 + 1e-4) + 1e-35).all()
    # symmetric: −128 is never used, and the largest magnitude of a row is a full 127
    peaks = np.abs(values.astype(int)).max(axis=1)
    assert (peaks[np.abs(x).max(axis=1) > 1e-30] == 127).all()


@settings(max_examples=50)
@given(arrays(np.float32, (3, 4), elements=FLOATS))
def test_rows_in_e4m3_are_the_nearest_of_its_numbers(x):
    values, scale = (np.asarray(a) for a in quantized(x, jnp.dtype("float8_e4m3fn")))
    assert (values.dtype, scale.dtype) == ("float8_e4m3fn", "float32")
    largest = np.abs(x).max(axis=1, keepdims=True)
    np.testing.assert_allclose(scale, largest[:, 0] / 448, rtol=1e-6, atol=1e-35)
    grid = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float64)
    grid = grid[np.isfinite(grid)]
    for row in np.flatnonzero(largest[:, 0] > 1e-30):
        scaled = np.float64(x[row]) * 448 / np.float64(largest[row])
        nearest = np.abs(grid[:, None] - scaled).min(axis=0)
        # a number half-way between two may go either way once scaled in float32
        assert (np.abs(np.float64(values[row]) - scaled) <= nearest + 1e-4).all()
        assert np.abs(np.float64(values[row])).max() == 448


@pytest.mark.parametrize("dtype", NARROW)
def test_a_row_without_a_scale_becomes_zero(dtype):
    # the last row's scale would be no normal float32, and its inverse no finite one
    x = np.array([[0, 0, 0, 0], [0, -2, 0, 0], [0, 1.2e-38, 0, 0]], np.float32)
    values, scale = quantized(x, jnp.dtype(dtype))
    largest = {"int8": 127, "float8_e4m3fn": 448}[dtype]
    np.testing.assert_array_equal(np.asarray(values, np.float32), [[0, 0, 0, 0], [0, -largest, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(scale, [0.0, 2 / largest, 0.0], atol=1e-38)
