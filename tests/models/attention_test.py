"""The three attention kernels against one float64 loop; splash runs in Pallas' interpreter, cuDNN where a GPU is."""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention

from dcjax.models.attention import Segments, _skip_blocks, causal_attention, choose

pytestmark = pytest.mark.heavy

KERNELS = ["xla", "cudnn", "splash"]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def case(batch, length, heads, kv_heads, head_dim):
    """q, k, v, and a cotangent of the result."""
    shapes = [(batch, length, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    return [normal(seed, *shape) for seed, shape in enumerate(shapes)]


def numbers(*rows):
    """Integers from (number, columns) pairs."""
    return np.array([[number for number, columns in row for _ in range(columns)] for row in rows], np.int32)


def packed(*rows):
    """Segments from (segment, columns) pairs."""
    return Segments(numbers(*rows))


def oracle(q, k, v, cotangent, segments=None):
    """The result and its gradients of q, k, v, one head at a time, in float64."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale, sharing, (rows, length) = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2], q.shape[:2]
    for b, h in np.ndindex(rows, q.shape[2]):
        keys, seen = visible(b, length, segments)
        at, keys = np.s_[b, :, h], (*keys, h // sharing)
        scores = np.where(seen, q[at] @ k[keys].T * scale, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[at] = weights @ v[keys]
        dweights = cotangent[at] @ v[keys].T
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * scale
        dq[at] = dscores @ k[keys]
        np.add.at(dk, keys, dscores.T @ q[at])
        np.add.at(dv, keys, weights.T @ cotangent[at])
    return out, dq, dk, dv


def visible(b, length, segments):
    """The rows and columns of row b's keys, and which of them each of its queries sees."""
    keys, seen = (np.full(length, b), np.arange(length)), np.tril(np.ones((length, length), bool))
    if segments is None:
        return keys, seen
    ids = segments.ids[b]
    seen &= ids[:, None] == ids
    if segments.gathered is None:
        return keys, seen
    places = np.divmod(segments.gathered[b], length)
    keys = tuple(np.concatenate(both) for both in zip(places, keys, strict=True))
    return keys, np.concatenate([ids[:, None] == segments.gathered_ids[b], seen], axis=1)


@partial(jit, static_argnames="kernel")
def with_gradients(kernel, q, k, v, cotangent, segments=None):
    out, back = jax.vjp(lambda *qkv: causal_attention(*qkv, kernel=kernel, segments=segments), q, k, v)
    return out, *back(cotangent)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Each kernel in a form that a CPU runs: cuDNN's call served by XLA, splash interpreted."""
    if request.param == "splash":
        # `True` is the interpreter that knows batched grids; JAX's simulator of a TPU, the default here, does not
        with pltpu.force_tpu_interpret_mode(True):
            yield "splash"
        return
    if request.param == "cudnn":
        real = jax.nn.dot_product_attention

        def served_by_xla(q, k, v, *, mask=None, implementation, **kwargs):
            assert implementation == "cudnn"
            assert mask is None or q.shape[1] % 2 == 0, "cuDNN takes no mask of odd length in training"
            return real(q, k, v, mask=mask, implementation="xla", **kwargs)

        monkeypatch.setattr(jax.nn, "dot_product_attention", served_by_xla)
    yield request.param


def assert_close(got, expected, atol=2e-5):
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float64), theirs, atol=atol, rtol=0)


def test_result_and_gradients_of_grouped_heads(kernel):
    arrays = case(2, 11, 4, 2, 8)
    assert_close(with_gradients(kernel, *arrays), oracle(*arrays))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kernel", "kv_heads"),
    [
        ("xla", 1),
        ("splash", 1),
        ("xla", 4),
        *(pytest.param(*c, marks=SLOW) for c in [("splash", 4), ("cudnn", 1), ("cudnn", 4)]),
    ],
    indirect=["kernel"],
)
def test_result_and_gradients_of_heads_that_share_one_or_nothing(kernel, kv_heads):
    arrays = case(2, 11, 4, kv_heads, 8)
    assert_close(with_gradients(kernel, *arrays), oracle(*arrays))


def test_result_and_gradients_of_segments_and_padding(kernel):
    arrays = case(2, 11, 4, 2, 8)
    ids = packed([(1, 4), (2, 1), (3, 3), (0, 3)], [(1, 11)])
    assert_close(with_gradients(kernel, *arrays, ids), oracle(*arrays, ids))


@pytest.mark.parametrize("segmented", [True, pytest.param(False, marks=SLOW)])
def test_splash_meets_xla_over_several_blocks(segmented):
    arrays = case(1, 1030, 2, 1, 16)
    segments = packed([(1, 300), (2, 700), (0, 30)]) if segmented else None
    assert_splash_meets_xla(arrays, segments)


def assert_splash_meets_xla(arrays, segments):
    """Of padding, splash lets a block see itself only; to xla, that of each block is a segment of its own."""
    expected = with_gradients("xla", *arrays, segments and apart(segments))
    with pltpu.force_tpu_interpret_mode(True):
        assert_close(with_gradients("splash", *arrays, segments), expected)


def apart(segments, block=512):
    ids = segments.ids
    return segments.replace(ids=np.where(ids == 0, -2 - np.arange(ids.shape[1], dtype=np.int32) // block, ids))


# segments 1 and 2 are prompts, which the others of both rows read; segment 5 has another one's only column to read
GATHERED = Segments(
    numbers([(1, 3), (3, 4), (5, 1), (0, 3)], [(2, 1), (3, 6), (4, 4)]),
    np.array([[0, 1, 2, 11, 0, 0], [11, 0, 1, 2, 4, 11]], np.int32),
    np.array([[3, 3, 3, 5, -1, -1], [3, 4, 4, 4, -1, -1]], np.int32),
)


def test_result_and_gradients_of_keys_that_are_gathered_from_all_rows(kernel):
    """Several segments read a key, some keys are read by none, and a row's own come behind them."""
    arrays = case(2, 11, 4, 2, 8)
    assert_close(with_gradients(kernel, *arrays, GATHERED), oracle(*arrays, GATHERED))


def test_splash_gathers_over_several_blocks():
    """A prompt of 200 columns is read by two of three responses, the last of them over the edge of a block."""
    arrays = case(1, 1030, 2, 1, 16)
    gathered = np.concatenate([np.arange(200), np.arange(200), np.zeros(140)])[None].astype(np.int32)
    ids = numbers([(1, 200), (2, 250), (3, 300), (4, 200), (0, 80)])
    segments = Segments(ids, gathered, numbers([(2, 200), (4, 200), (-1, 140)]))
    assert_splash_meets_xla(arrays, segments)


def causal_kernel(length, more, block):
    mask = splash_attention.CausalMask((length, length + more), offset=more)
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask]),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(sizes, block)),
    )


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 8))])
def test_splash_skips_exactly_the_blocks_in_which_nothing_is_seen(seed):
    """Forward and backward; where a block is skipped, one is held that is at hand or comes next."""
    block, rng = 128, np.random.default_rng(seed)
    prompts, responses = np.arange(1, rng.integers(2, 5)), np.arange(4, 8)
    ids = np.repeat([*prompts, *responses], rng.integers(1, 300, len(prompts) + len(responses)))
    ids = np.pad(ids, (0, -len(ids) % block))
    gathered = np.repeat(responses, rng.integers(1, 200, len(responses)))
    key_ids = np.concatenate([gathered, np.full(-len(gathered) % block, -1), ids])
    length, more = len(ids), len(key_ids) - len(ids)
    kernel = causal_kernel(length, more, block)
    _skip_blocks(kernel, block, jnp.array(ids), jnp.array(key_ids))
    sees = (ids[:, None] == key_ids) & np.tril(np.ones((length, length + more), bool), more)
    expected = sees.reshape(length // block, block, -1, block).any(axis=(1, 3))
    assert not expected.all()
    for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        np.testing.assert_array_equal(info.block_mask[0] > 0, expected)
    for info in (kernel.fwd_mask_info, kernel.dq_mask_info):
        assert_held(info.data_next[0], expected)
    assert_held(kernel.dkv_mask_info.data_next[0].T, expected.T)


def assert_held(blocks, needed):
    for held, row in zip(np.asarray(blocks), needed, strict=True):
        np.testing.assert_array_equal(held[row], np.flatnonzero(row))
        assert set(held.tolist()) == set(np.flatnonzero(row).tolist())


def test_later_tokens_change_nothing_earlier(kernel):
    q, k, v, cotangent = case(2, 11, 4, 2, 8)
    before = with_gradients(kernel, q, k, v, cotangent)[0]
    changed = [np.concatenate([x[:, :7], 3 * x[:, 7:] + 1], axis=1) for x in (q, k, v)]
    after = with_gradients(kernel, *changed, cotangent)[0]
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before - after)[:, 7:].min(axis=(0, 2, 3)).all()


def test_segments_are_rows_of_their_own(kernel):
    arrays = case(2, 11, 4, 2, 8)
    together = with_gradients(kernel, *arrays, packed([(1, 5), (2, 6)], [(1, 5), (2, 6)]))
    for columns in (np.s_[:5], np.s_[5:]):
        # with nothing behind it that any gradient comes from
        width = len(range(11)[columns])
        alone = [np.pad(x[:, columns], ((0, 0), (0, 11 - width), (0, 0), (0, 0))) for x in arrays]
        expected = [x[:, :width] for x in with_gradients(kernel, *alone)]
        assert_close([x[:, columns] for x in together], expected, atol=2e-6)


def test_padding_neither_sees_nor_is_seen_and_is_finite(kernel):
    q, k, v, cotangent = case(2, 11, 4, 2, 8)
    cotangent[:, 5:] = 0
    ids = packed([(1, 5), (0, 6)], [(1, 2), (2, 3), (0, 6)])
    clean = with_gradients(kernel, q, k, v, cotangent, ids)
    for x in (q, k, v):
        x[:, 5:] *= 1e4
    loud = with_gradients(kernel, q, k, v, cotangent, ids)
    for a, b in zip(clean, loud, strict=True):
        np.testing.assert_array_equal(a[:, :5], b[:, :5])
        assert np.isfinite(b).all()
    assert not np.concatenate([x[:, 5:].ravel() for x in loud[1:]]).any()


def test_rows_of_padding_only_are_finite(kernel):
    arrays = case(2, 11, 4, 2, 8)
    assert_close(with_gradients(kernel, *arrays, packed([(0, 11)], [(0, 11)])), oracle(*arrays))


def test_bf16_within_its_rounding(kernel):
    arrays = [x.astype(jnp.bfloat16) for x in case(2, 11, 4, 2, 8)]
    got = with_gradients(kernel, *arrays)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    for mine, theirs in zip(got, oracle(*arrays), strict=True):
        error = np.linalg.norm(np.asarray(mine, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < 2**-7


def test_xla_is_jax_dot_product_attention():
    q, k, v, cotangent = case(2, 11, 4, 2, 8)
    expected = jax.jit(partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla"))(q, k, v)
    np.testing.assert_allclose(with_gradients("xla", q, k, v, cotangent)[0], expected, atol=2e-6)


def test_auto_is_xla_here():
    arrays = case(2, 11, 4, 2, 8)
    auto, xla = (str(with_gradients.trace(kernel, *arrays).jaxpr) for kernel in ("auto", "xla"))
    assert auto == xla != str(with_gradients.trace("xla", *arrays, packed([(1, 11)], [(1, 11)])).jaxpr)


TABLE = {
    ("cpu", "float32"): ("xla", ()),
    ("cpu", "bfloat16"): ("xla", ()),
    ("cpu", "float16"): ("xla", ()),
    ("gpu", "float32"): ("xla", ()),
    ("gpu", "bfloat16"): ("cudnn", ("cudnn",)),
    ("gpu", "float16"): ("cudnn", ("cudnn",)),
    ("cuda", "float32"): ("xla", ()),
    ("cuda", "bfloat16"): ("cudnn", ("cudnn",)),
    ("cuda", "float16"): ("cudnn", ("cudnn",)),
    ("tpu", "float32"): ("splash", ("splash",)),
    ("tpu", "bfloat16"): ("splash", ("splash",)),
    ("tpu", "float16"): ("xla", ()),
}
"""(platform, dtype) -> what auto means there, and what runs besides xla."""


@pytest.mark.parametrize(("platform", "dtype"), TABLE)
def test_what_each_platform_and_dtype_runs(platform, dtype):
    auto, able = TABLE[platform, dtype]
    assert choose("auto", platform, dtype) == auto
    assert choose("ragged", platform, dtype) == auto
    assert choose("xla", platform, dtype) == "xla"
    for kernel in ("cudnn", "splash"):
        if kernel in able:
            assert choose(kernel, platform, jnp.dtype(dtype)) == kernel
        else:
            with pytest.raises(ValueError, match=f"'{kernel}', which does not run on {platform} in {dtype}; it runs"):
                choose(kernel, platform, dtype)


def test_what_a_refusal_says():
    with pytest.raises(ValueError) as refusal:
        choose("cudnn", "gpu", jnp.float32)
    assert str(refusal.value) == (
        "model.attention is 'cudnn', which does not run on gpu in float32; "
        "it runs on gpu or cuda in bfloat16 or float16, and auto and xla run everywhere"
    )


ON_A_GPU = """
import sys, jax, jax.numpy as jnp, numpy as np
from dcjax.models.attention import Segments, causal_attention
try:
    jax.devices("cuda")
except RuntimeError:
    sys.exit(77)

def run(kernel, dtype, segments, *arrays):
    q, k, v, cotangent = (jnp.asarray(x, dtype) for x in arrays)
    attend = lambda *qkv: causal_attention(*qkv, kernel=kernel, segments=segments)
    out, back = jax.vjp(attend, q, k, v)
    return [np.asarray(x, np.float64) for x in (out, *back(cotangent))]

ids = jnp.asarray(np.repeat([[1, 2, 3, 0]], [70, 130, 40, 17], axis=1))
gathered = Segments(ids, jnp.arange(70)[None], jnp.repeat(jnp.array([[2, 3]]), 35, axis=1))
for kv_heads in (1, 2, 4):
    random = np.random.default_rng(kv_heads)
    arrays = [random.normal(size=(1, 257, heads, 64)) for heads in (4, kv_heads, kv_heads, 4)]
    arrays = [np.asarray(x, jnp.bfloat16) for x in arrays]
    for segments in (None, Segments(ids), gathered):
        with jax.default_matmul_precision("highest"):
            expected = run("xla", jnp.float32, segments, *arrays)
        for mine, theirs in zip(run("cudnn", jnp.bfloat16, segments, *arrays), expected):
            assert np.linalg.norm(mine - theirs) < 2**-6 * np.linalg.norm(theirs)
"""


@pytest.mark.skipif(
    not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)), reason="JAX has no CUDA plugin here"
)
def test_cudnn_meets_xla_on_a_gpu():
    # in a process of its own: the tests' own JAX sees the CPU only
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("JAX finds no GPU")
    assert done.returncode == 0, done.stderr
