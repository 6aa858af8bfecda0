"""Decode attention that reads what is filled, in interpret mode: against attention on the whole cache."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from dcjax.models import attention, cache, layers, presets, ragged, ragged_gpu
from dcjax.serving import parallel
from dcjax.serving.formats import formats
from dcjax.serving.formats.served import check_served

pytestmark = pytest.mark.heavy

BATCH, WIDTH, BLOCK = 6, 16, 8
# a block and a half, whole blocks, less than a block
CAPACITIES = [20, 24, 5]
KINDS = {
    "float32": ("float32", "float32"),
    "bf16": ("bfloat16", "bfloat16"),
    "int8": ("bfloat16", "int8"),
    "int8 beside float32": ("float32", "int8"),
    "fp8": ("bfloat16", "float8_e4m3fn"),
}


def case(kind, kv_heads, groups, capacity):
    """Queries, keys and values, scales of a narrow cache, and lengths from 1 to the capacity; one slot is empty."""
    compute, stored = (jnp.dtype(name) for name in KINDS[kind])
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(BATCH, 1, kv_heads * groups, WIDTH)), compute)
    k, v = (jnp.asarray(rng.normal(size=(BATCH, kv_heads, capacity, WIDTH)), jnp.float32) for _ in range(2))
    lengths = np.array([1, capacity, 0, capacity // 2, min(BLOCK, capacity), capacity - 1], np.int32)
    if stored not in cache.LARGEST:
        return q, k.astype(stored), v.astype(stored), lengths, None, None
    (k, k_scale), (v, v_scale) = cache.quantize_rows(k, stored), cache.quantize_rows(v, stored)
    return q, k, v, lengths, k_scale, v_scale


def reference(q, k, v, lengths, k_scale, v_scale):
    visible = jnp.arange(k.shape[2]) < lengths[:, None, None, None, None]
    return layers.attend_grouped(q, k, v, visible, k_scale, v_scale)


def interpreted(function, *args):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return jax.jit(function)(*args)


def on_tpu(*args):
    return interpreted(partial(ragged.ragged_attention, block=BLOCK), *args)


def on_gpu(*args):
    return jax.jit(partial(ragged_gpu.ragged_attention, block=BLOCK, interpret=True))(*args)


each_kernel = pytest.mark.parametrize("ragged_attention", [on_tpu, on_gpu])


def close(found, expected, lengths, kind):
    """To float32's rounding, or two of bf16's, of results and of weights near 1; empty slots are zero."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert not found[lengths == 0].any()
    error = 2 * 2.0**-8 if KINDS[kind][0] == "bfloat16" else 2e-6
    np.testing.assert_allclose(found[lengths > 0], expected[lengths > 0], atol=error, rtol=error)


@each_kernel
@pytest.mark.parametrize(
    ("kind", "kv_heads", "groups", "capacity"),
    [
        pytest.param(kind, 2, 3, capacity, marks=[] if (row + column) % 3 == 0 else pytest.mark.slow)
        for row, kind in enumerate(KINDS)
        for column, capacity in enumerate(CAPACITIES)
    ]
    + [(kind, *heads, 20) for kind, heads in [("float32", (1, 4)), ("int8", (3, 1))]],
)
def test_it_is_attention_on_what_is_filled(ragged_attention, kind, kv_heads, groups, capacity):
    args = case(kind, kv_heads, groups, capacity)
    found = ragged_attention(*args)
    assert found.dtype == args[0].dtype
    close(found, reference(*args), args[3], kind)


@pytest.mark.parametrize(("ragged_attention", "step"), [(on_tpu, BLOCK), (on_gpu, 1)])
def test_what_lies_behind_a_sequence_is_not_read(ragged_attention, step):
    q, k, v, lengths, *_ = case("float32", 2, 2, 24)
    behind = jnp.arange(24) >= step * -(-lengths[:, None] // step)
    garbage = [jnp.where(behind[:, None, :, None], jnp.nan, x) for x in (k, v)]
    found = ragged_attention(q, *garbage, lengths)
    close(found, reference(q, k, v, lengths, None, None), lengths, "float32")


def test_scales_behind_a_sequence_are_not_used_on_a_gpu():
    q, k, v, lengths, *scales = case("int8", 2, 2, 24)
    behind = (jnp.arange(24) >= lengths[:, None])[:, None]
    found = on_gpu(q, k, v, lengths, *(jnp.where(behind, jnp.nan, x) for x in scales))
    close(found, reference(q, k, v, lengths, *scales), lengths, "int8")


def test_a_length_beyond_the_capacity_is_the_capacity_on_a_gpu():
    q, k, v, *_ = case("float32", 2, 2, 20)
    full, beyond = (np.full(BATCH, length, np.int32) for length in (20, 23))
    np.testing.assert_array_equal(on_gpu(q, k, v, beyond), on_gpu(q, k, v, full))


@each_kernel
def test_rounding_is_that_of_the_format(ragged_attention):
    """Operands are rounded to bf16 as without the kernel: both are as far from what float32 gives."""
    q, k, v, lengths, k_scale, v_scale = case("int8", 2, 3, 24)
    exact = reference(q.astype(jnp.float32), k, v, lengths, k_scale, v_scale)
    found = ragged_attention(q, k, v, lengths, k_scale, v_scale)
    errors = [
        np.abs(np.asarray(x, np.float32) - exact)[lengths > 0].mean()
        for x in (found, reference(q, k, v, lengths, k_scale, v_scale))
    ]
    assert 0.7 < errors[0] / errors[1] < 1.4
    assert errors[0] > 1e-4


def blocks_read(lengths, capacity, block):
    """How many blocks of each sequence are fetched: one more wherever the index changes along the grid."""
    places = np.arange(-(-capacity // block))
    indices = np.array([[ragged.held_block(block, row, at, lengths) for at in places] for row in range(len(lengths))])
    return 1 + (np.diff(indices, axis=1) != 0).sum(axis=1)


@pytest.mark.parametrize("fill", [0.1, 0.3, 1.0])
def test_a_step_reads_the_filled_part_and_at_most_a_block_more_of_each_slot(fill):
    slots, capacity = 128, 8192
    drawn = np.random.default_rng(0).lognormal(np.log(fill * capacity) - 0.32, 0.8, slots)
    lengths = np.clip(drawn, 1, capacity).astype(np.int32) if fill < 1 else np.full(slots, capacity, np.int32)
    read = blocks_read(lengths, capacity, ragged.BLOCK) * ragged.BLOCK
    assert (read >= lengths).all() and (read < lengths + ragged.BLOCK).all()
    assert read.sum() <= 1.15 * lengths.sum() + slots * ragged.BLOCK


@pytest.mark.parametrize(
    ("kernel", "platform", "dtype", "expected"),
    [
        ("auto", "tpu", "bfloat16", "ragged_tpu"),
        ("splash", "tpu", "float32", "ragged_tpu"),
        ("ragged", "tpu", "float32", "ragged_tpu"),
        ("xla", "tpu", "bfloat16", "xla"),
        ("auto", "tpu", "float16", "xla"),
        ("auto", "cpu", "float32", "xla"),
        ("cudnn", "gpu", "bfloat16", "xla"),
        ("auto", "gpu", "bfloat16", "xla"),
        ("splash", "gpu", "bfloat16", "xla"),
        ("ragged", "gpu", "float16", "ragged_gpu"),
        ("ragged", "cuda", "float32", "ragged_gpu"),
    ],
)
def test_it_is_chosen_where_splash_is_and_where_it_is_named(kernel, platform, dtype, expected):
    assert attention.choose_cached(kernel, platform, dtype) == expected


def test_it_is_refused_where_it_does_not_run():
    model = dataclasses.replace(presets["tiny"], attention="ragged")
    with pytest.raises(ValueError) as refusal:
        check_served(model, formats["fp16"], jnp.dtype("float16"), "cpu")
    assert str(refusal.value) == (
        "model.attention is 'ragged', which does not run on cpu in float16; it runs on tpu in bfloat16 or float32, and "
        "on gpu or cuda in bfloat16 or float16 or float32, and auto and xla run everywhere"
    )
    check_served(model, formats["fp16"], jnp.dtype("float16"), "gpu")
    check_served(
        dataclasses.replace(model, head_dim=24, attention="auto"), formats["bf16"], jnp.dtype("bfloat16"), "gpu"
    )
    for width in (24, 8):
        with pytest.raises(
            ValueError, match=f"model.head_dim is {width}; ragged attention on a GPU takes powers of two"
        ):
            check_served(dataclasses.replace(model, head_dim=width), formats["bf16"], jnp.dtype("bfloat16"), "gpu")


@pytest.mark.parametrize("kind", KINDS)
def test_it_lowers_for_a_gpu_in_every_format_and_copies_nothing(kind):
    """Of a cache that no block divides and 7 queries share, and of a large one."""
    compute, stored = KINDS[kind]
    for capacity, groups in [(8191, 7), (2**17, 1)]:
        keys = jax.ShapeDtypeStruct((64, 2, capacity, 128), stored)
        q = jax.ShapeDtypeStruct((64, 1, 2 * groups, 128), compute)
        scales = [jax.ShapeDtypeStruct(keys.shape[:3], "float32")] * 2 if keys.dtype in cache.LARGEST else []
        args = q, keys, keys, jax.ShapeDtypeStruct((64,), "int32"), *scales
        text = lowered(ragged_gpu.ragged_attention, *args)
        assert text.count("__gpu$xla.gpu.triton") == 1
        made = [line for line in text.splitlines() if f"{capacity}x128x" in line and "stablehlo." in line]
        assert [re.search(r"stablehlo\.\w+", line)[0] for line in made] == ["stablehlo.custom_call"]


def test_a_cache_whose_places_overflow_is_refused():
    q, lengths = jax.ShapeDtypeStruct((64, 1, 2, 128), "bfloat16"), jax.ShapeDtypeStruct((64,), "int32")
    keys, scales = jax.ShapeDtypeStruct((64, 2, 2**18, 128), "int8"), jax.ShapeDtypeStruct((64, 2, 2**18), "float32")
    with pytest.raises(ValueError, match="keys are 4294967296 of int8; ragged attention on a GPU takes 2147483648"):
        jax.eval_shape(ragged_gpu.ragged_attention, q, keys, keys, lengths, scales, scales)


def lowered(function, *args):
    """A program for one H100."""
    mesh = AbstractMesh((1,), ("one",), abstract_device=AbstractDevice("NVIDIA H100", None, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("kind", "precision", "expected"),
    [("float32", "HIGHEST", {"HIGHEST"}), ("float32", "DEFAULT", {"DEFAULT"}), ("int8", "HIGHEST", set())],
)
def test_products_for_a_gpu_have_the_asked_precision_and_float32_sums(kind, precision, expected):
    attend = partial(ragged_gpu.ragged_attention, float32=jax.lax.Precision[precision])
    text = str(jax.make_jaxpr(attend)(*case(kind, 2, 3, 24)))
    products = re.findall(r"dot_general\[\n(.*?)\n *\]", text, re.DOTALL)
    assert len(products) == 2
    for product in products:
        assert "preferred_element_type=float32" in product
        assert set(re.findall(r"Precision\.(\w+)", product)) == expected


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("float32", "ragged_gpu"),
        ("int8", "ragged_tpu"),
        pytest.param("float32", "ragged_tpu", marks=pytest.mark.slow),
        pytest.param("int8", "ragged_gpu", marks=pytest.mark.slow),
    ],
)
def test_devices_attend_with_their_own_heads_and_slots(kind, kernel, monkeypatch):
    """Four devices: two copies of the model, of two halves of its heads."""
    q, k, v, lengths, k_scale, v_scale = case(kind, 2, 2, 24)
    held = cache.LayerCache(k, v, k_scale, v_scale)
    positions = np.maximum(lengths - 1, 0)[:, None]
    rng = np.random.default_rng(1)
    new = [jnp.asarray(rng.normal(size=(BATCH, 1, 2, WIDTH)), q.dtype) for _ in range(2)]
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), (parallel.COPIES, parallel.WITHIN))
    attend = partial(parallel.serving_layout(mesh, kernel)[1], float32=jax.lax.Precision.HIGHEST)
    if kernel == "ragged_gpu":
        monkeypatch.setattr(ragged_gpu, "ragged_attention", partial(ragged_gpu.ragged_attention, interpret=True))
        found, written = jax.jit(attend)(held, q, *new, positions)
    else:
        found, written = interpreted(attend, held, q, *new, positions)
    expected, same = jax.jit(cache.attend_cached)(held, q, *new, positions)
    close(found, expected, positions[:, 0] + 1, kind)
    jax.tree.map(np.testing.assert_array_equal, written, same)
