"""Attention of a single new token on a cache whose sequences are of many lengths: a Pallas kernel for TPUs.

Keys and values are read where they lie, in the cache's dtype, in blocks of tokens. Blocks behind a sequence's last
token are neither read nor computed, so that a step reads what is filled, and not what there is room for. The softmax is
computed block by block, with a running maximum (Milakov and Gimelshein, arXiv:1805.02867).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int, Shaped

from dcjax.models.layers import precision_of
from dcjax.types import Array

BLOCK = 256
"""Tokens of a block. Larger ones are read faster, but more of a sequence's last one is empty."""
_LANES = 128  # a number for each row is kept in all lanes of a register
LOWEST = float(jnp.finfo(jnp.float32).min)
"""The score of a token that is not seen, whose weight is then 0."""


def ragged_attention(
    q: Float[Array, "B 1 H D"],
    k: Shaped[Array, "B K C D"],
    v: Shaped[Array, "B K C D"],
    lengths: Int[Array, "B"],
    k_scale: Float[Array, "B K C"] | None = None,
    v_scale: Float[Array, "B K C"] | None = None,
    *,
    float32: lax.Precision = lax.Precision.HIGHEST,
    block: int = BLOCK,
) -> Float[Array, "B 1 H D"]:
    """`layers.attend_grouped` of one query for each sequence, on its first `lengths` tokens, in q's dtype.

    Scores, softmax and sums are float32, operands of products are in q's dtype, and scales multiply scores and weights,
    as there; the results differ by the order of sums, and in that weights are rounded before they are divided by their
    sum. A sequence of length 0 gives zeros.
    """
    (batch, *_, width), (_, kv_heads, capacity, _) = q.shape, k.shape
    block = min(block, capacity)
    blocks = pl.cdiv(capacity, block)
    queries = q.reshape(batch, kv_heads, -1, width)

    def whole(row: Any, number: Any, lengths: Any) -> tuple[Any, ...]:
        del number, lengths
        return row, 0, 0, 0

    held = partial(held_block, block)
    scales = [] if k_scale is None or v_scale is None else [k_scale, v_scale]
    of_queries = pl.BlockSpec((1, *queries.shape[1:]), whole)
    of_cache = pl.BlockSpec((1, kv_heads, block, width), lambda *at: (at[0], 0, held(*at), 0))
    of_scales = pl.BlockSpec((1, kv_heads, block), lambda *at: (at[0], 0, held(*at)))
    rows = queries.shape[1:3]
    out = pl.pallas_call(
        partial(_kernel, block, capacity, precision_of(q.dtype, float32)),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, blocks),
            in_specs=[of_queries, of_cache, of_cache, *[of_scales] * len(scales)],
            out_specs=of_queries,
            scratch_shapes=[
                pltpu.VMEM((*rows, _LANES), jnp.float32),
                pltpu.VMEM((*rows, _LANES), jnp.float32),
                pltpu.VMEM((*rows, width), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=cost_of(q, k, v, *scales),
        name="ragged_attention",
    )(lengths, queries, k, v, *scales)
    return out.reshape(q.shape)


def cost_of(q: Float[Array, "B 1 H D"], k: Shaped[Array, "B K C D"], *others: Array) -> pl.CostEstimate:
    """Of attention on a full cache: keys `k`, and values and scales, the `others`."""
    scores = q.size // q.shape[-1] * k.shape[2]
    return pl.CostEstimate(
        flops=4 * scores * q.shape[-1],
        transcendentals=scores,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, q, k, *others)),
    )


def held_block(block: int, row: Any, number: Any, lengths: Any) -> Any:
    """Which block of a row's tokens is held at a place of the grid: behind the last one that is filled, still that, so
    that nothing more is read."""
    return jnp.minimum(number, jnp.maximum(lengths[row] - 1, 0) // block)


def _kernel(
    block: int, capacity: int, precision: lax.Precision | None, lengths: Any, q: Any, k: Any, v: Any, *refs: Any
) -> None:
    """One block of one sequence: q [1, K, G, D], k and v [1, K, block, D], their scales [1, K, block] if there are any.

    Scratch holds the largest score so far, the sum of weights relative to it, and the weighted sum of values.
    """
    *scales, out, peak, total, mixed = refs
    row, number = pl.program_id(0), pl.program_id(1)
    length, start = lengths[row], number * block

    @pl.when(number == 0)
    def _():
        peak[...] = jnp.full_like(peak, LOWEST)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    @pl.when(start < length)
    def _():
        queries = q[0]
        dot = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        scores = dot(queries, k[0].astype(queries.dtype), (((2,), (2,)), ((0,), (0,)))) * queries.shape[-1] ** -0.5
        if scales:
            scores *= scales[0][0][:, None]
        seen = start + lax.broadcasted_iota(jnp.int32, scores.shape, 2) < length
        scores = jnp.where(seen, scores, LOWEST)
        before = peak[..., :1]
        highest = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
        weights, kept = jnp.exp(scores - highest), jnp.exp(before - highest)
        peak[...] = jnp.broadcast_to(highest, peak.shape)
        total[...] = total[...] * kept + jnp.sum(weights, axis=-1, keepdims=True)
        if scales:
            weights *= scales[1][0][:, None]
        values = v[0].astype(queries.dtype)
        if capacity % block:
            # what lies behind the cache's end may be anything, also no number
            weights = jnp.where(seen, weights, 0)
            tokens = start + lax.broadcasted_iota(jnp.int32, values.shape, 1)
            values = jnp.where(tokens < length, values, jnp.zeros_like(values))
        product = dot(weights.astype(queries.dtype), values, (((2,), (1,)), ((0,), (0,))))
        mixed[...] = mixed[...] * kept + product

    @pl.when(number == pl.num_programs(1) - 1)
    def _():
        divisor = total[..., :1]
        out[0] = (mixed[...] / jnp.where(divisor > 0, divisor, 1)).astype(out.dtype)
