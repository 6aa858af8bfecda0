"""Causal self-attention of the training forward, by one of three kernels.

All compute softmax(q kᵀ / √D) v under the same mask; they differ in rounding and in memory. `xla` stores all S × S
attention weights. `cudnn` (GPU) and `splash` (Pallas, TPU) store only blocks of them, in the forward and in the
backward pass, but for packed rows `cudnn` stores an S × S mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from dcjax.models.config import AttentionKernel
from dcjax.models.layers import attend_grouped, pad_columns, round_up
from dcjax.types import Array

Kernel = Literal["xla", "cudnn", "splash"]
"""The kernels that `auto` chooses among."""

# the platforms, by JAX's names, and the dtypes that the blockwise kernels support
_BLOCKED: dict[Kernel, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cudnn": (("gpu", "cuda"), ("bfloat16", "float16")),
    "splash": (("tpu",), ("bfloat16", "float32")),  # its compiler, Mosaic, does not support float16
}
_LANES = 128  # splash requires blocks of keys that are multiples of a TPU's lanes
_BLOCK = 512  # queries and keys in one step of splash: 1 MiB of float32 scores, well within a TPU core's own memory


def choose(kernel: AttentionKernel, platform: str, dtype: DTypeLike) -> Kernel:
    """The kernel that `kernel` means on JAX's `platform` ("cpu", "gpu" or "cuda", "tpu") for q, k, v of `dtype`.

    `auto` is splash on TPU in bf16 and float32, cudnn on GPU in bf16 and fp16, xla elsewhere. cuDNN itself
    checks the width of a head when it is called: it must be a multiple of 8 and at most 256, or 128 before Hopper.

    Raises:
      ValueError: the kernel does not run on the platform, or not in the dtype.
    """
    name = jnp.dtype(dtype).name
    supported = [kind for kind, (platforms, dtypes) in _BLOCKED.items() if platform in platforms and name in dtypes]
    if kernel == "auto":
        return supported[0] if supported else "xla"
    if kernel == "xla" or kernel in supported:
        return kernel
    platforms, dtypes = _BLOCKED[kernel]
    raise ValueError(
        f"model.attention is {kernel!r}, which does not run on {platform} in {name}; it runs on "
        f"{' or '.join(platforms)} in {' or '.join(dtypes)}, and auto and xla run everywhere"
    )


def causal_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    kernel: AttentionKernel,
    float32: lax.Precision = lax.Precision.HIGHEST,
    segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S H D"]:
    """softmax(q kᵀ / √D) v in q's dtype: a query sees the keys at or before its own column.

    Rows hold real tokens first and padding last, so causal order alone hides padding from real tokens. With
    `segment_ids` a query sees its own segment only. Padding is segment 0, a segment like the others: every query sees
    at least itself, and every row of the result is finite.

    `auto` is resolved for JAX's default platform at trace time. A named kernel is used as it is, so that a program for
    a TPU can be compiled on a host without one; `choose` checks beforehand whether a platform supports a kernel.
    """
    chosen = choose(kernel, jax.default_backend(), q.dtype) if kernel == "auto" else kernel
    if chosen == "cudnn":  # cuDNN takes only 16-bit dtypes, to which `float32` does not apply
        return _cudnn(q, k, v, segment_ids)
    return {"xla": _xla, "splash": _splash}[chosen](q, k, v, segment_ids, float32)


def _xla(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"] | None,
    float32: lax.Precision,
) -> Float[Array, "B S H D"]:
    length = q.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if segment_ids is not None:
        mask &= _same_segment(segment_ids)
    return attend_grouped(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, :, None], float32=float32)


def _cudnn(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"] | None,
) -> Float[Array, "B S H D"]:
    length, mask = q.shape[1], None
    if segment_ids is not None:
        # cuDNN refuses a mask of odd length in training
        q, k, v, segment_ids = (pad_columns(x, 2) for x in (q, k, v, segment_ids))
        mask = _same_segment(segment_ids)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    return out[:, :length]


def _splash(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"] | None,
    float32: lax.Precision,
) -> Float[Array, "B S H D"]:
    # A Pallas call is not partitioned by jit: this computes on one device's arrays, and sharded ones need shard_map
    # around it, over batch and heads.
    length = q.shape[1]
    block = min(_BLOCK, round_up(length, _LANES))
    # the kernel does not scale the scores; the factor is rarely a power of two, so q is scaled in float32, rounded once
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    # the added columns come last, so causal order hides them from all others
    q_heads, k_heads, v_heads = (pad_columns(x, block).swapaxes(1, 2) for x in (scaled, k, v))
    ids = None
    if segment_ids is not None:
        padded = pad_columns(segment_ids, block)
        ids = splash_attention.SegmentIds(q=padded, kv=padded)
    attend = jax.vmap(_splash_kernel(q.shape[2], q_heads.shape[2], block))
    if q.dtype == jnp.float32:
        attend = _with_float32_precision(float32, attend)
    return attend(q_heads, k_heads, v_heads, ids).swapaxes(1, 2)[:, :length]


def _with_float32_precision(float32: lax.Precision, function: Callable[..., Array]) -> Callable[..., Array]:
    """The function with this precision for its products, forward and backward, which set no precision themselves."""
    # Mosaic supports only these two precisions
    name = "default" if float32 == lax.Precision.DEFAULT else "highest"

    @jax.custom_vjp
    def at_precision(*operands):
        with jax.default_matmul_precision(name):
            return function(*operands)

    def forward(*operands):
        with jax.default_matmul_precision(name):
            return jax.vjp(function, *operands)

    def backward(back, gradient):
        with jax.default_matmul_precision(name):
            return back(gradient)

    at_precision.defvjp(forward, backward)
    return at_precision


def _splash_kernel(heads: int, length: int, block: int) -> Callable[..., Any]:
    """(q [H, S, D], k [K, S, D], v [K, S, D], SegmentIds of [S] or None) -> [H, S, D]; finds H / K from k's shape."""
    # one backward kernel for k and v and one for q: the fused one keeps a dq for each block of keys, quadratic in S
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads)
    return splash_attention.make_splash_mha_single_device(mask, block_sizes=sizes)


def _same_segment(segment_ids: Int[Array, "B S"]) -> Bool[Array, "B 1 S S"]:
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
