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

from dcjax.models.attention import causal_attention, choose

pytestmark = pytest.mark.heavy

KERNELS = ["xla", "cudnn", "splash"]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def case(batch, length, heads, kv_heads, head_dim):
    """q, k, v, and a cotangent of the result."""
    shapes = [(batch, length, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    return [normal(seed, *shape) for seed, shape in enumerate(shapes)]


def packed(*rows):
    """segment_ids from (segment, columns) pairs."""
    return np.array([[segment for segment, columns in row for _ in range(columns)] for row in rows], np.int32)


def oracle(q, k, v, cotangent, segment_ids=None):
    """The result and its gradients of q, k, v, one head at a time, in float64."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale, sharing = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        at, shared = np.s_[b, :, h], np.s_[b, :, h // sharing]
        scores = q[at] @ k[shared].T * scale
        for i, j in np.ndindex(*scores.shape):
            if j > i or (segment_ids is not None and segment_ids[b, i] != segment_ids[b, j]):
                scores[i, j] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[at] = weights @ v[shared]
        dweights = cotangent[at] @ v[shared].T
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * scale
        dq[at] = dscores @ k[shared]
        dk[shared] += dscores.T @ q[at]
        dv[shared] += weights.T @ cotangent[at]
    return out, dq, dk, dv


@partial(jit, static_argnames="kernel")
def with_gradients(kernel, q, k, v, cotangent, segment_ids=None):
    out, back = jax.vjp(lambda *qkv: causal_attention(*qkv, kernel=kernel, segment_ids=segment_ids), q, k, v)
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

        def served_by_xla(q, k, v, *, mask, implementation, **kwargs):
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
    segment_ids = packed([(1, 300), (2, 700), (0, 30)]) if segmented else None
    expected = with_gradients("xla", *arrays, segment_ids)
    with pltpu.force_tpu_interpret_mode(True):
        assert_close(with_gradients("splash", *arrays, segment_ids), expected)


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
    assert auto == xla != str(with_gradients.trace("xla", *arrays, np.ones((2, 11), np.int32)).jaxpr)


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
from dcjax.models.attention import causal_attention
try:
    jax.devices("cuda")
except RuntimeError:
    sys.exit(77)

def run(kernel, dtype, segment_ids, *arrays):
    q, k, v, cotangent = (jnp.asarray(x, dtype) for x in arrays)
    attend = lambda *qkv: causal_attention(*qkv, kernel=kernel, segment_ids=segment_ids)
    out, back = jax.vjp(attend, q, k, v)
    return [np.asarray(x, np.float64) for x in (out, *back(cotangent))]

ids = jnp.asarray(np.repeat([[1, 2, 3, 0]], [70, 130, 40, 17], axis=1))
for kv_heads in (1, 2, 4):
    random = np.random.default_rng(kv_heads)
    arrays = [random.normal(size=(1, 257, heads, 64)) for heads in (4, kv_heads, kv_heads, 4)]
    arrays = [np.asarray(x, jnp.bfloat16) for x in arrays]
    for segment_ids in (None, ids):
        with jax.default_matmul_precision("highest"):
            expected = run("xla", jnp.float32, segment_ids, *arrays)
        for mine, theirs in zip(run("cudnn", jnp.bfloat16, segment_ids, *arrays), expected):
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
