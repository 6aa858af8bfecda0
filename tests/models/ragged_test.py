"""Decode attention that reads what is filled, in interpret mode: against attention on the whole cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from dcjax.models import attention, cache, layers, ragged
from dcjax.serving import parallel

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


def close(found, expected, lengths, kind):
    """To float32's rounding, or two of bf16's, of results and of weights near 1; empty slots are zero."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert not found[lengths == 0].any()
    error = 2 * 2.0**-8 if KINDS[kind][0] == "bfloat16" else 2e-6
    np.testing.assert_allclose(found[lengths > 0], expected[lengths > 0], atol=error, rtol=error)


@pytest.mark.parametrize(
    ("kind", "kv_heads", "groups", "capacity"),
    [(kind, 2, 3, capacity) for kind in KINDS for capacity in CAPACITIES]
    + [(kind, *heads, 20) for kind in ("float32", "int8") for heads in [(1, 4), (3, 1)]],
)
def test_it_is_attention_on_what_is_filled(kind, kv_heads, groups, capacity):
    args = case(kind, kv_heads, groups, capacity)
    found = interpreted(partial(ragged.ragged_attention, block=BLOCK), *args)
    assert found.dtype == args[0].dtype
    close(found, reference(*args), args[3], kind)


def test_what_lies_behind_a_sequence_is_not_read():
    q, k, v, lengths, *_ = case("float32", 2, 2, 24)
    behind = jnp.arange(24) >= BLOCK * -(-lengths[:, None] // BLOCK)
    garbage = [jnp.where(behind[:, None, :, None], jnp.nan, x) for x in (k, v)]
    found = interpreted(partial(ragged.ragged_attention, block=BLOCK), q, *garbage, lengths)
    close(found, reference(q, k, v, lengths, None, None), lengths, "float32")


def test_rounding_is_that_of_the_format():
    """Operands are rounded to bf16 as without the kernel: both are as far from what float32 gives."""
    q, k, v, lengths, k_scale, v_scale = case("int8", 2, 3, 24)
    exact = reference(q.astype(jnp.float32), k, v, lengths, k_scale, v_scale)
    found = interpreted(partial(ragged.ragged_attention, block=BLOCK), q, k, v, lengths, k_scale, v_scale)
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
        ("auto", "tpu", "bfloat16", "ragged"),
        ("splash", "tpu", "float32", "ragged"),
        ("xla", "tpu", "bfloat16", "xla"),
        ("auto", "tpu", "float16", "xla"),
        ("auto", "cpu", "float32", "xla"),
        ("cudnn", "gpu", "bfloat16", "xla"),
    ],
)
def test_it_is_chosen_where_splash_is(kernel, platform, dtype, expected):
    assert attention.choose_cached(kernel, platform, dtype) == expected


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_devices_attend_with_their_own_heads_and_slots(kind):
    """Four devices: two copies of the model, of two halves of its heads."""
    q, k, v, lengths, k_scale, v_scale = case(kind, 2, 2, 24)
    held = cache.LayerCache(k, v, k_scale, v_scale)
    positions = np.maximum(lengths - 1, 0)[:, None]
    rng = np.random.default_rng(1)
    new = [jnp.asarray(rng.normal(size=(BATCH, 1, 2, WIDTH)), q.dtype) for _ in range(2)]
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), (parallel.COPIES, parallel.WITHIN))
    attend = parallel.serving_layout(mesh, "ragged")[1]
    found, written = interpreted(partial(attend, float32=jax.lax.Precision.HIGHEST), held, q, *new, positions)
    expected, same = jax.jit(cache.attend_cached)(held, q, *new, positions)
    close(found, expected, positions[:, 0] + 1, kind)
    jax.tree.map(np.testing.assert_array_equal, written, same)
