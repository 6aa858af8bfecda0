import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcjax.models import ModelConfig, forward, init_params
from dcjax.models.block import training_products
from dcjax.models.cache import attend, forward_cached, init_cache, quantize_rows, write
from dcjax.models.transformer import layer_params

CONFIG = ModelConfig(vocab_size=17, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, head_dim=8)
PRODUCTS = training_products(CONFIG.precision)
PROMPTS, CAPACITY = [6, 1, 4], 12
NARROW = ["int8", "float8_e4m3fn"]


def unstack(params):
    unstacked = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(CONFIG.num_layers)]
    return {**params, "layers": unstacked}


@jax.jit
def run(params, tokens, positions, caches):
    decoded = forward_cached(CONFIG, params, params["embed_tokens"][tokens], positions, caches, PRODUCTS)
    return decoded.hidden @ params["embed_tokens"].T, decoded.caches


@pytest.fixture(scope="module")
def model():
    params = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, CAPACITY)).astype(np.int32)
    return params, tokens, np.asarray(jax.jit(forward, static_argnums=0)(CONFIG, params, tokens))


def prefill_and_decode(params, tokens, dtype):
    """Logits of ragged prompts, prefilled at once with padding on the right, then token by token to the capacity."""
    params, lengths = unstack(params), np.array(PROMPTS)
    caches = tuple(init_cache(CONFIG, len(lengths), CAPACITY, jnp.dtype(dtype)) for _ in range(CONFIG.num_layers))
    width = lengths.max()
    padded = np.where(np.arange(width) < lengths[:, None], tokens[:, :width], 0)
    prefilled, caches = run(params, padded, np.broadcast_to(np.arange(width), padded.shape), caches)
    logits = np.full((*tokens.shape, CONFIG.vocab_size), np.nan, np.float32)
    for row, length in enumerate(lengths):
        logits[row, :length] = prefilled[row, :length]
    at = lengths
    while (at < CAPACITY).any():
        # rows that are through feed their last token again, as ended slots do
        position = np.minimum(at, CAPACITY - 1)[:, None]
        step, caches = run(params, np.take_along_axis(tokens, position, 1), position, caches)
        logits[np.arange(len(at)), position[:, 0]] = step[:, 0]
        at = at + 1
    return logits


def test_prefill_and_decode_equal_the_full_forward(model):
    params, tokens, full = model
    np.testing.assert_allclose(prefill_and_decode(params, tokens, "float32"), full, atol=1e-5)


@pytest.mark.parametrize(("dtype", "least", "most"), [("int8", 1e-4, 0.1), ("float8_e4m3fn", 1e-3, 0.4)])
def test_a_narrow_cache_is_close_and_not_equal(model, dtype, least, most):
    params, tokens, full = model
    error = np.abs(prefill_and_decode(params, tokens, dtype) - full)
    assert least < error.max() < most


def test_what_lies_beyond_a_position_is_not_seen(model):
    params, tokens, full = model
    caches = tuple(init_cache(CONFIG, 3, CAPACITY, jnp.dtype("float32")) for _ in range(CONFIG.num_layers))
    garbage = jax.tree.map(lambda leaf: leaf.at[:, :, 5:].set(1e4), caches)
    logits, _ = run(unstack(params), tokens[:, :5], np.tile(np.arange(5), (3, 1)), garbage)
    np.testing.assert_allclose(logits, full[:, :5], atol=1e-5)


MOE = dataclasses.replace(CONFIG, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=(0,))


def decoded_by(config, params, tokens, choose=None):
    """All tokens at once through empty caches."""
    layers = [layer_params(config.sparse_layers, params["layers"], number) for number in range(config.num_layers)]

    @jax.jit
    def run(params, tokens):
        caches = tuple(init_cache(config, 3, CAPACITY, jnp.dtype("float32")) for _ in layers)
        positions = jnp.tile(jnp.arange(CAPACITY), (3, 1))
        return forward_cached(config, params, params["embed_tokens"][tokens], positions, caches, PRODUCTS, choose)

    return run({**params, "layers": layers}, tokens)


def test_what_each_layer_leaves_behind_is_returned(model):
    params, tokens, _ = model
    decoded = decoded_by(CONFIG, params, tokens)
    assert decoded.experts is None and len(decoded.residuals) == CONFIG.num_layers
    last = np.float64(decoded.residuals[-1])
    normed = last / np.sqrt((last**2).mean(axis=-1, keepdims=True) + CONFIG.rms_norm_eps) * np.asarray(params["norm"])
    np.testing.assert_allclose(decoded.hidden, normed, atol=1e-5)
    # the first layer's is what a model of it alone ends with
    shallow = dataclasses.replace(CONFIG, num_layers=1)
    first = decoded_by(shallow, params | {"layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}, tokens)
    np.testing.assert_allclose(first.residuals[0], decoded.residuals[0], atol=1e-6)


def test_experts_come_back_and_are_chosen_by_whom_is_asked(model):
    _, tokens, _ = model
    params = jax.jit(init_params, static_argnums=0)(MOE, jax.random.key(0))
    natural = decoded_by(MOE, params, tokens)
    assert natural.experts.shape == (1, 3, CAPACITY, 2)
    asked = []

    def choose(number, probabilities):
        asked.append((number, probabilities.shape))
        return jnp.argsort(-probabilities, axis=-1)[..., 1:3]

    other = decoded_by(MOE, params, tokens, choose)
    # by the layer's number among all, of which the first has no router
    assert asked == [(1, (3, CAPACITY, 4))]
    np.testing.assert_array_equal(other.experts[..., 0], natural.experts[..., 1])
    assert (np.asarray(other.experts[..., 1]) != np.asarray(natural.experts)[..., 0]).all()
    assert np.abs(other.hidden - natural.hidden).max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", *NARROW])
def test_an_empty_cache_has_the_dtype_asked_for_and_scales_only_where_narrow(dtype):
    cache = init_cache(CONFIG, 3, CAPACITY, jnp.dtype(dtype))
    assert cache.k.shape == cache.v.shape == (3, CONFIG.num_kv_heads, CAPACITY, CONFIG.head_dim)
    assert cache.k.dtype == cache.v.dtype == dtype
    scales = [] if dtype in NARROW else [None, None]
    assert [scale for scale in (cache.k_scale, cache.v_scale) if scale is None] == scales
    assert dtype not in NARROW or cache.k_scale.shape == cache.v_scale.shape == (3, CONFIG.num_kv_heads, CAPACITY)


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_writes_land_at_their_positions_and_nowhere_else(dtype):
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 2, 3, CONFIG.num_kv_heads, CONFIG.head_dim)).astype(np.float32)
    # the second sequence writes past the capacity, which is dropped
    positions = np.array([[2, 3, 4], [CAPACITY - 1, CAPACITY, CAPACITY + 1]])
    cache = write(init_cache(CONFIG, 2, CAPACITY, jnp.dtype(dtype)), k, v, positions)
    written = np.zeros((2, CAPACITY), bool)
    written[0, 2:5] = written[1, -1] = True
    for held, scale, new in ((cache.k, cache.k_scale, k), (cache.v, cache.v_scale, v)):
        wide = np.asarray(held, np.float32) * (1.0 if scale is None else np.asarray(scale)[..., None])
        wide = wide.swapaxes(1, 2)
        # half a step of the largest number: 1 / 254 of it in int8, 1 / 28 in e4m3, where 14 eighths of 256 are 448
        tolerance = {"float32": 0.0, "int8": np.abs(new).max() / 254, "float8_e4m3fn": np.abs(new).max() / 28}[dtype]
        np.testing.assert_allclose(wide[written], np.concatenate([new[0], new[1, :1]]), atol=tolerance * 1.0001)
        assert (wide[~written] == 0).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_attention_on_a_narrow_cache_is_attention_on_what_it_stands_for(dtype):
    rng = np.random.default_rng(1)
    k, v = rng.normal(size=(2, 2, 5, CONFIG.num_kv_heads, CONFIG.head_dim)).astype(np.float32)
    q = rng.normal(size=(2, 2, CONFIG.num_heads, CONFIG.head_dim)).astype(np.float32)
    positions = np.tile(np.arange(5), (2, 1))
    narrow = write(init_cache(CONFIG, 2, 5, jnp.dtype(dtype)), k, v, positions)
    stands_for = [
        (held.astype(jnp.float32) * scale[..., None]).swapaxes(1, 2)
        for held, scale in ((narrow.k, narrow.k_scale), (narrow.v, narrow.v_scale))
    ]
    wide = write(init_cache(CONFIG, 2, 5, jnp.dtype("float32")), *stands_for, positions)
    at = np.array([[1, 4], [0, 2]])
    np.testing.assert_allclose(attend(narrow, q, at), attend(wide, q, at), atol=1e-5)


FLOATS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(max_examples=50)
@given(arrays(np.float32, (3, 4), elements=FLOATS))
def test_rows_in_int8_are_within_half_a_step(x):
    values, scale = (np.asarray(a) for a in quantize_rows(x, jnp.dtype("int8")))
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
    values, scale = (np.asarray(a) for a in quantize_rows(x, jnp.dtype("float8_e4m3fn")))
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
    x = jnp.array([[0.0, 0.0], [0.0, -2.0], [0.0, 1.2e-38]])
    values, scale = quantize_rows(x, jnp.dtype(dtype))
    largest = {"int8": 127, "float8_e4m3fn": 448}[dtype]
    np.testing.assert_array_equal(np.asarray(values, np.float32), [[0, 0], [0, -largest], [0, 0]])
    np.testing.assert_allclose(scale, [0.0, 2 / largest, 0.0], atol=1e-38)
