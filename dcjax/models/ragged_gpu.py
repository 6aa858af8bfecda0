"""`ragged.ragged_attention` for GPUs: a Pallas kernel by way of Triton.

It was compared with attention on the whole cache in interpret mode, and lowered and compiled for CUDA, but not yet run
on a card: `auto` does not choose it. JAX 0.12 calls Pallas' Triton backend deprecated, and still has it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int, Shaped

from dcjax.models.layers import precision_of
from dcjax.models.ragged import LOWEST, cost_of
from dcjax.types import Array

BLOCK = 64
"""Tokens of a block; half as many for float32, of whose products a program's registers hold no more."""
_LEAST = 16  # rows and columns of a product


def ragged_attention(
    q: Float[Array, "B 1 H D"],
    k: Shaped[Array, "B K C D"],
    v: Shaped[Array, "B K C D"],
    lengths: Int[Array, "B"],
    k_scale: Float[Array, "B K C"] | None = None,
    v_scale: Float[Array, "B K C"] | None = None,
    *,
    float32: lax.Precision = lax.Precision.HIGHEST,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B 1 H D"]:
    """As the kernel for TPUs, but that nothing behind a sequence's last token is read, in its last block neither.

    Each sequence and key-value head is a program of its own, and a block, a power of two from 16, its step. Of
    `float32`, `HIGHEST` keeps all bits, and the others are TF32. An fp8 cache needs a card of compute capability 8.9 or
    more, as Triton does not widen e4m3 on others. With `interpret`, JAX computes what the kernel would, anywhere.

    Raises:
      ValueError: the width of a head is no power of two, or less than 16; or a cache in 8 bits has more than 2³¹
        numbers on a device, whose places Pallas counts in 32 bits.
    """
    check_width(q.shape[-1])
    batch, kv_heads, capacity, width = k.shape
    if k.dtype.itemsize == 1 and k.size > 2**31:
        raise ValueError(f"a layer's keys are {k.size} of {k.dtype.name}; ragged attention on a GPU takes {2**31}")
    queries = q.reshape(batch, kv_heads, -1, width)
    groups = queries.shape[2]
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, max(_LEAST, pl.next_power_of_2(groups)) - groups), (0, 0)))
    scales = [] if k_scale is None or v_scale is None else [k_scale, v_scale]
    of_lengths = pl.BlockSpec((None,), lambda row, head: (row,))
    of_queries = pl.BlockSpec((None, None, *queries.shape[2:]), lambda row, head: (row, head, 0, 0))
    of_cache = pl.BlockSpec((None, None, capacity, width), lambda row, head: (row, head, 0, 0))
    of_scales = pl.BlockSpec((None, None, capacity), lambda row, head: (row, head, 0))
    out = pl.pallas_call(
        partial(_kernel, block or 2 * BLOCK // q.dtype.itemsize, precision_of(q.dtype, float32)),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        grid=(batch, kv_heads),
        in_specs=[of_lengths, of_queries, of_cache, of_cache, *[of_scales] * len(scales)],
        out_specs=of_queries,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=cost_of(q, k, v, *scales),
        interpret=interpret,
        name="ragged_attention",
    )(lengths, queries, k, v, *scales)
    return out[:, :, :groups].reshape(q.shape)


def check_width(width: int) -> None:
    """Checks that the kernel takes heads of a width.

    Raises:
      ValueError: it is no power of two, or less than 16.
    """
    if width < _LEAST or width & (width - 1):
        raise ValueError(f"model.head_dim is {width}; ragged attention on a GPU takes powers of two from {_LEAST}")


def _kernel(block: int, precision: lax.Precision | None, lengths: Any, q: Any, k: Any, v: Any, *refs: Any) -> None:
    """One sequence and key-value head: its length, q [R, D], k and v [C, D], their scales [C] if there are any."""
    *scales, out = refs
    # never behind the cache, which would be another's memory
    length, queries = jnp.minimum(lengths[...], k.shape[0]), q[...]
    rows, width = queries.shape
    dot = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def turn(number: Any, so_far: Any) -> Any:
        peak, total, mixed = so_far
        tokens = pl.ds(number * block, block)
        seen = number * block + jnp.arange(block) < length
        # what is not loaded may be anything, also no number
        keys, values = (plgpu.load(x.at[tokens, :], mask=seen[:, None]).astype(queries.dtype) for x in (k, v))
        of_keys, of_values = (plgpu.load(x.at[tokens], mask=seen) for x in scales) if scales else (None, None)
        scores = dot(queries, keys, (((1,), (1,)), ((), ()))) * width**-0.5
        if of_keys is not None:
            scores *= of_keys
        scores = jnp.where(seen, scores, LOWEST)
        highest = jnp.maximum(peak, jnp.max(scores, axis=1, keepdims=True))
        weights, kept = jnp.exp(scores - highest), jnp.exp(peak - highest)
        total = total * kept + jnp.sum(weights, axis=1, keepdims=True)
        if of_values is not None:
            weights = jnp.where(seen, weights * of_values, 0)
        values = jnp.where(seen[:, None], values, jnp.zeros_like(values))
        product = dot(weights.astype(queries.dtype), values, (((1,), (0,)), ((), ())))
        return highest, total, mixed * kept + product

    start = jnp.full((rows, 1), LOWEST), jnp.zeros((rows, 1)), jnp.zeros((rows, width))
    _, total, mixed = lax.fori_loop(0, pl.cdiv(length, block), turn, start)
    out[...] = (mixed / jnp.where(total > 0, total, 1)).astype(out.dtype)
