import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiling import jit
from jax.sharding import NamedSharding, PartitionSpec

from dcjax.models import abstract_params, logical_axes, presets
from dcjax.models.cache import forward_cached, init_cache
from dcjax.models.layers import EXACT
from dcjax.serving.formats import CodedMatrix, cache_dtype, formats
from dcjax.serving.formats.grouped import Groups
from dcjax.serving.formats.scaled import ScaledMatrix
from dcjax.serving.formats.served import products
from dcjax.serving.parallel import serving_mesh
from dcjax.serving.sync import make_sync, stored_parameters
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.sharding.rules import shardings

CONFIG = tiny.DENSE
ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1)
MOE = tiny.EXPERTS
MODELS = {
    "tiny": presets["tiny"],
    "untied": dataclasses.replace(CONFIG, tie_embeddings=False),
    "qwen2": dataclasses.replace(CONFIG, family="qwen2"),
    "moe": MOE,
    "mixed": dataclasses.replace(MOE, mlp_only_layers=(0,)),
}
KERNELS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
EXPERTS = {"experts_gate_proj", "experts_up_proj", "experts_down_proj"}
NORMS = {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"}
NARROW = [name for name, format in formats.items() if format.weights is not None]
SLOW = pytest.mark.slow
# what is served has its arithmetic in formats_test, in every format
EVERY_DAY = ("float32", "bf16", "int8", "w8a8", "int4")
GROUPED = ("int8", "int4")
"""Formats of weights that share a scale in groups of 32."""


def of(names):
    """Those formats, of which some are every day's."""
    return pytest.mark.parametrize(
        "name", [name if name in EVERY_DAY else pytest.param(name, marks=SLOW) for name in names]
    )


def arrays_of(leaf):
    """What is inside a matrix: values and scales, or one wide array."""
    return leaf.codes if isinstance(leaf, CodedMatrix) else leaf


quantised_kernel = jit(lambda kernel, format: arrays_of(format.store_kernel(kernel)), static_argnums=1)
quantised_table = jit(lambda table, format: arrays_of(format.store_table(table)), static_argnums=1)


def draw(config):
    return jax.tree.map(jnp.array, jax.device_get(tiny.masters(config)))


@pytest.fixture(scope="module")
def masters():
    return draw(CONFIG)


@pytest.fixture(scope="module")
def served(masters):
    return functools.cache(lambda name: make_sync(CONFIG, formats[name])(masters, 5))


def leaf_pairs(weights, masters, kinds=(False,) * CONFIG.num_layers):
    """(name, serving leaf, NumPy master) of every weight; `kinds` says which layers have experts."""
    for name in sorted(set(weights) - {"layers"}):
        yield name, arrays_of(weights[name]), np.asarray(masters[name])
    for i, layer in enumerate(weights["layers"]):
        for name in sorted(layer):
            of_kind = name in EXPERTS | {"router", "gate_proj", "up_proj", "down_proj"}
            row = kinds[:i].count(kinds[i]) if of_kind else i
            yield name, arrays_of(layer[name]), np.asarray(masters["layers"][name][row])


@of(formats)
def test_layers_are_unstacked_and_none_is_lost(served, masters, name):
    weights = served(name).weights
    assert set(weights) == set(masters) == {"embed_tokens", "norm", "layers"}
    assert len(weights["layers"]) == CONFIG.num_layers
    assert all(set(layer) == KERNELS | NORMS for layer in weights["layers"])


@of(formats)
def test_the_version_is_an_int32_scalar(served, name):
    assert (int(served(name).version), served(name).version.dtype) == (5, jnp.int32)


def test_float32_is_bit_for_bit_the_masters_in_buffers_of_its_own(served, masters):
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(masters)}
    for name, leaf, master in leaf_pairs(served("float32").weights, masters):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(leaf).view(np.uint32), master.view(np.uint32), err_msg=name)
        assert leaf.unsafe_buffer_pointer() not in pointers


@pytest.mark.parametrize(
    "name", ["float32", "int8", pytest.param("bf16", marks=SLOW), pytest.param("int4", marks=SLOW)]
)
def test_the_masters_may_be_donated_afterwards(name):
    masters = draw(CONFIG)
    served = make_sync(CONFIG, formats[name])(masters, 0)
    before = jax.device_get(jax.tree.leaves(served))
    moved = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)(masters)
    jax.block_until_ready(moved)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(masters))
    for leaf, kept in zip(jax.tree.leaves(served), before, strict=True):
        np.testing.assert_array_equal(leaf, kept)


@of(["bf16", "fp16"])
def test_sixteen_bits_are_the_rounded_masters(served, masters, name):
    dtype = formats[name].activations
    for weight, leaf, master in leaf_pairs(served(name).weights, masters):
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, master.astype(dtype), err_msg=weight)


@of(NARROW)
def test_weights_are_quantised_from_the_masters_and_not_from_a_rounded_copy(served, masters, name):
    format, seen, apart = formats[name], 0, np.zeros(2, int)
    for weight, leaf, master in leaf_pairs(served(name).weights, masters):
        if master.ndim < 2:
            assert leaf.dtype == jnp.bfloat16
            np.testing.assert_array_equal(leaf, master.astype(jnp.bfloat16), err_msg=weight)
            continue
        seen += 1
        quantised = quantised_table if weight == "embed_tokens" else quantised_kernel
        expected, rounded = quantised(master, format), quantised(master.astype(jnp.bfloat16).astype(np.float32), format)
        # within another jit the last bit of a division may differ: a value at a rounding boundary moves by one
        scales = [np.asarray(matrix.scale, np.float64) for matrix in (leaf, expected, rounded)]
        np.testing.assert_allclose(scales[0], scales[1], rtol=2**-8 if format.name in GROUPED else 1e-6)
        values = [np.asarray(matrix.values).view(np.uint8) for matrix in (leaf, expected, rounded)]
        assert np.count_nonzero(values[0] != values[1]) <= 0.01 * master.size
        apart += [np.count_nonzero(values[0] != other) for other in values[1:]]
    assert seen == 1 + CONFIG.num_layers * len(KERNELS)
    assert apart[0] < apart[1]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", formats)
def test_every_kernel_and_table_is_in_the_format_and_nothing_else(model, name):
    config, format = MODELS[model], formats[name]
    weights = jax.eval_shape(make_sync(config, format), abstract_params(config), 0).weights
    masters = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(config))
    for weight, leaf, master in leaf_pairs(weights, masters, config.sparse_layers):
        if weight in KERNELS | EXPERTS | {"embed_tokens", "lm_head"} and format.weights is not None:
            shape, axis = list(master.shape), -1 if weight in ("embed_tokens", "lm_head") else -2
            assert isinstance(leaf, Groups if name in GROUPED else ScaledMatrix), weight
            shape[axis] //= 2 if name == "int4" else 1
            assert leaf.values.shape == tuple(shape)
            del shape[axis]
            assert name in GROUPED or leaf.scale.shape == tuple(shape)
        else:
            assert leaf.shape == master.shape
            assert leaf.dtype == (jnp.float32 if weight == "router" else format.activations), weight


@pytest.mark.parametrize("name", ["float32", pytest.param("int8", marks=SLOW), "int4"])
def test_experts_are_those_of_their_layer_and_routers_the_masters(name):
    config, format = MODELS["mixed"], formats[name]
    masters = draw(config)
    weights = make_sync(config, format)(masters, 0).weights
    # the first layer has no experts
    experts, router = arrays_of(weights["layers"][1]["experts_up_proj"]), weights["layers"][1]["router"]
    assert router.dtype == jnp.float32
    np.testing.assert_array_equal(router, masters["layers"]["router"][0])
    master = np.asarray(masters["layers"]["experts_up_proj"][0])
    if name == "float32":
        np.testing.assert_array_equal(experts, master)
    else:
        # the width is that of one group
        expected = np.abs(master).max(1, keepdims=True) / {"int8": 127, "int4": 7}[name]
        np.testing.assert_allclose(np.asarray(experts.scale, np.float32), expected, rtol=2**-8)


def hidden_of(config, format, masters):
    weights = make_sync(config, format)(masters, 0).weights
    tokens = np.arange(10).reshape(2, 5)
    positions = np.broadcast_to(np.arange(5), tokens.shape)

    @jit
    def run(weights):
        caches = tuple(init_cache(config, 2, 5, cache_dtype(format, "auto")) for _ in range(config.num_layers))
        x = weights["embed_tokens"].lookup(tokens, format.activations)
        hidden = forward_cached(config, weights, x, positions, caches, products(config)).hidden
        return hidden, weights.get("lm_head", weights["embed_tokens"]).logits(hidden[:, -1], EXACT)

    return run(weights)


@pytest.mark.parametrize(
    "names",
    # what is left out differs from these in what is stored, not in its products
    [
        ("bf16", "int8", "w8a8", "int4"),
        pytest.param(("bf16", "int8", "w8a8", "fp8", "fp8_weight_only", "int4"), marks=SLOW),
    ],
)
def test_every_format_computes_about_what_float32_does(names):
    config = dataclasses.replace(MODELS["mixed"], tie_embeddings=False)
    masters = draw(config)
    exact = np.asarray(hidden_of(config, formats["float32"], masters)[1])
    error = {}
    for name in names:
        hidden, logits = hidden_of(config, formats[name], masters)
        assert (hidden.dtype, logits.dtype) == (formats[name].activations, jnp.float32)
        error[name] = float(np.abs(np.asarray(logits) - exact).mean() / np.abs(exact).mean())
    assert max(error.values()) == error["int4"] < 0.5
    rising = [error[name] for name in ("bf16", "int8", "w8a8", "fp8") if name in names]
    assert rising[0] > 0 and rising == sorted(set(rising)) and rising[-1] < 0.25


def test_serving_params_go_where_they_are_asked_to(masters):
    mesh = serving_mesh(make_mesh(MeshConfig(data=8)))
    everywhere = NamedSharding(mesh, PartitionSpec())
    sharded = jax.device_put(masters["embed_tokens"], NamedSharding(mesh, PartitionSpec(None, "data")))
    rest = jax.device_put({k: v for k, v in masters.items() if k != "embed_tokens"}, everywhere)
    served = make_sync(CONFIG, formats["float32"], mesh)(rest | {"embed_tokens": sharded}, 1)
    assert all(leaf.sharding.is_equivalent_to(everywhere, leaf.ndim) for leaf in jax.tree.leaves(served))
    np.testing.assert_array_equal(served.weights["embed_tokens"].codes, masters["embed_tokens"])


def test_what_is_kept_stays_in_the_activations_dtype():
    config = dataclasses.replace(MODELS["mixed"], tie_embeddings=False)
    masters = draw(config)
    weights = make_sync(config, formats["int4"], keep=["lm_head", "experts_*"])(masters, 0).weights
    for name, leaf, master in leaf_pairs(weights, masters, config.sparse_layers):
        if name == "lm_head" or name in EXPERTS:
            np.testing.assert_array_equal(leaf, master.astype(jnp.bfloat16))
        else:
            assert isinstance(leaf, Groups) == (name in KERNELS | {"embed_tokens"})


@pytest.mark.parametrize("pattern", ["lm_head", "experts_*", "head", "norm", "router"])
def test_a_pattern_that_keeps_nothing_is_an_error(pattern):
    # tied, dense; norms and the router are no matter of the format
    for call in (make_sync, stored_parameters):
        with pytest.raises(ValueError, match=f"keep has '{pattern}'.*embed_tokens".replace("*'", "[*]'")):
            call(CONFIG, formats["int8"], keep=["embed_*", pattern])


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_a_parameter_that_the_model_does_not_have_is_an_error(masters, name):
    sync = make_sync(CONFIG, formats[name])
    with pytest.raises(ValueError, match="this model has no parameter 'adapter'"):
        sync({**masters, "adapter": jnp.ones((4, 4))}, 0)
    with pytest.raises(ValueError, match="this model has no parameter 'q_lora'"):
        sync({**masters, "layers": masters["layers"] | {"q_lora": jnp.ones((CONFIG.num_layers, 4, 4))}}, 0)


def test_noise_has_its_size_in_every_matrix_of_every_layer_and_is_nowhere_else():
    config = dataclasses.replace(
        MODELS["mixed"], hidden_size=64, intermediate_size=128, moe_intermediate_size=64, vocab_size=64
    )
    masters = draw(config)
    # layers of very different sizes: each has noise in units of its own
    layers = {
        name: leaf * np.float32(10.0) ** np.arange(len(leaf), dtype=np.float32).reshape(-1, *[1] * (leaf.ndim - 1))
        for name, leaf in jax.device_get(masters["layers"]).items()
    }
    masters["layers"] = layers
    weights = make_sync(config, formats["float32"], weight_noise=0.1)(masters, 4).weights
    draws = []
    for name, leaf, master in leaf_pairs(weights, masters, config.sparse_layers):
        if name not in KERNELS | EXPERTS | {"embed_tokens"}:
            np.testing.assert_array_equal(leaf, master)
            continue
        noise = (np.asarray(leaf) - master).ravel() / np.sqrt(np.mean(np.square(master, dtype=np.float64)))
        assert abs(noise.std() / 0.1 - 1) < 4 / np.sqrt(2 * noise.size)
        assert abs(noise.mean() / 0.1) < 4 / np.sqrt(noise.size)
        draws.append(noise[:1000])
    # no two of them share their noise
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.2


@pytest.fixture(scope="module")
def noisy():
    """Masters of one layer, and their sync in float32 with noise."""
    return draw(ONE_LAYER), make_sync(ONE_LAYER, formats["float32"], weight_noise=0.1)


def test_noise_differs_between_versions_and_is_reproducible(noisy):
    masters, sync = noisy
    first, again, later = (sync(masters, version).weights["layers"][0]["q_proj"].codes for version in (3, 3, 4))
    fresh = make_sync(ONE_LAYER, formats["float32"], weight_noise=0.1)(masters, 3).weights["layers"][0]["q_proj"].codes
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, fresh)
    master = masters["layers"]["q_proj"][0]
    assert abs(np.corrcoef((first - master).ravel(), (later - master).ravel())[0, 1]) < 0.2


@pytest.mark.parametrize("name", ["int8", pytest.param("int4", marks=SLOW)])
def test_noise_comes_before_quantisation(noisy, name):
    masters, sync = noisy
    table = sync(masters, 2).weights["embed_tokens"].codes
    stored = arrays_of(make_sync(ONE_LAYER, formats[name], weight_noise=0.1)(masters, 2).weights["embed_tokens"])
    expected = quantised_table(table, formats[name])
    np.testing.assert_allclose(
        *(np.asarray(matrix.scale, np.float32) for matrix in (stored, expected)),
        rtol=2**-8,
    )


def test_without_noise_the_program_draws_nothing(masters):
    programs = [str(jax.make_jaxpr(make_sync(CONFIG, formats["int8"], weight_noise=x))(masters, 0)) for x in (0.0, 0.1)]
    assert ["random" in program for program in programs] == [False, True]


@pytest.mark.parametrize("size", [-0.1, float("nan"), float("inf")])
def test_noise_that_is_not_a_size_is_an_error(size):
    with pytest.raises(ValueError, match=f"weight_noise is {size}"):
        make_sync(CONFIG, formats["bf16"], weight_noise=size)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", formats)
def test_the_report_says_what_is_stored(model, name):
    config, masters = MODELS[model], abstract_params(MODELS[model])
    served = jax.eval_shape(make_sync(config, formats[name]), masters, 0).weights
    rows = {row.name: row for row in stored_parameters(config, formats[name])}
    leaves = {key: leaf for key, leaf in {**masters, **masters["layers"]}.items() if key != "layers"}
    assert {key: (row.shape, row.float32_bytes) for key, row in rows.items()} == {
        key: (leaf.shape, 4 * leaf.size) for key, leaf in leaves.items()
    }
    assert sum(row.bytes for row in rows.values()) == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(served)
    )
    words = {"int8": "int8", "fp8": "float8_e4m3fn", "int4": "int4", None: formats[name].activations.name}
    assert rows["q_proj"].stored == rows["embed_tokens"].stored == words[formats[name].weights]
    assert rows["norm"].stored == formats[name].activations.name
    assert {row.name for row in rows.values() if row.quantized} == (
        set() if name not in NARROW else set(rows) & (KERNELS | EXPERTS | {"embed_tokens", "lm_head"})
    )


@pytest.mark.parametrize(("name", "most"), [("int8", 0.27), ("w8a8_rotated", 0.27), ("fp8", 0.27), ("int4", 0.16)])
def test_quantised_tensors_of_a_published_model_are_as_small_as_they_should_be(name, most):
    rows = [row for row in stored_parameters(presets["qwen3-0.6b"], formats[name]) if row.quantized]
    share = sum(row.bytes for row in rows) / sum(row.float32_bytes for row in rows)
    # bits of a weight over 32, and of the scales: one in 1024 to 3072 weights, or bfloat16 for 32
    exact = {"int8": 8 / 32 + 16 / 32 / 32, "int4": 4 / 32 + 16 / 32 / 32}
    assert exact.get(name, 8 / 32) <= share < most


def test_the_report_shows_what_is_kept():
    rows = {row.name: row for row in stored_parameters(MOE, formats["int4"], keep=["experts_*"])}
    assert {name for name in EXPERTS if rows[name].stored == "bfloat16" and not rows[name].quantized} == EXPERTS
    assert rows["router"].stored == "float32"
    # 2 layers of 32 × 64 nibbles, and a bfloat16 scale for 32 of them
    assert rows["q_proj"].bytes == 2 * (32 * 64 // 2 + 64 * 2)


# --- from the trainer's mesh to a serving one ---


@pytest.mark.parametrize(
    ("model", "name"),
    [("tiny", "int8"), ("moe", "int4")]
    + [
        pytest.param(*cell, marks=SLOW)
        for cell in [("tiny", "bf16"), ("tiny", "int4"), ("moe", "bf16"), ("moe", "int8")]
    ],
)
def test_served_parameters_are_split_as_their_masters_axes_say(name, model):
    config, format = dataclasses.replace(MODELS[model], hidden_size=64, intermediate_size=128), formats[name]
    training, serving = make_mesh(MeshConfig(fsdp=8)), serving_mesh(make_mesh(MeshConfig(fsdp=8)), 4)
    config = dataclasses.replace(config, num_heads=8, num_kv_heads=4, head_dim=16, moe_intermediate_size=128)
    masters = jax.device_put(draw(config), shardings(training, logical_axes(config)))
    whole = make_sync(config, format)(jax.device_get(masters), 3)
    split = make_sync(config, format, serving, training)(masters, 3)
    assert jax.tree.structure(split) == jax.tree.structure(whole)
    for ours, expected in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        # a scale's last bit may depend on how its maximum was found
        np.testing.assert_allclose(np.float32(ours), np.float32(expected), rtol=1e-2, atol=1)
    layer = split.weights["layers"][0]
    for weight, axis in (("q_proj", -1), ("o_proj", -2), ("k_proj", -1)):
        for leaf in jax.tree.leaves(layer[weight]):
            cut = [n // m for n, m in zip(leaf.shape, leaf.sharding.shard_shape(leaf.shape), strict=True)]
            # the scale of an output channel has no contracted axis to cut
            expected = [4 if place == leaf.ndim + axis else 1 for place in range(leaf.ndim)]
            assert cut == (expected if leaf.ndim == 2 else [4 if axis == -1 else 1]), weight
