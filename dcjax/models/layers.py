"""The parts of a layer, as pure functions shared by the training forward and the serving engine."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int, Shaped

from dcjax.models.rope import RopeScaling
from dcjax.types import Array

Rope = tuple[Array, Array]
"""cos and sin, float32 [B or 1, S, 1, D / 2]; YaRN multiplies both by a number."""


FLOAT32 = jnp.dtype(jnp.float32)


class Arithmetic(NamedTuple):
    """How products are computed."""

    # dtype of the sums
    accumulate: jnp.dtype = FLOAT32
    # precision of products of float32 with float32, whose operands hardware would otherwise round to fewer bits
    float32: lax.Precision = lax.Precision.HIGHEST

    def of(self, dtype: jnp.dtype) -> dict[str, Any]:
        """Keyword arguments of JAX's products for two operands of this dtype."""
        return {"precision": precision_of(dtype, self.float32), "preferred_element_type": self.accumulate}


def precision_of(dtype: jnp.dtype, float32: lax.Precision) -> lax.Precision | None:
    """The precision of a product of two operands of `dtype`: `float32` if that is float32, else None, JAX's default."""
    return float32 if dtype == FLOAT32 else None


EXACT = Arithmetic()
"""Sums are in float32, and products of float32 keep all bits."""


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(
    rows: Float[Array, "*N K"], kernel: Float[Array, "K M"], arithmetic: Arithmetic, out: jnp.dtype
) -> Float[Array, "*N M"]:
    """rows @ kernel, both in the rows' dtype, returned in `out`.

    Its gradients are products of the same kind: both sides in the rows' dtype, the same arithmetic. The gradient of a
    float32 kernel is not rounded to the rows' dtype on the way, as it would be if the casts were differentiated.
    """
    return jnp.matmul(rows, kernel.astype(rows.dtype), **arithmetic.of(rows.dtype)).astype(out)


def _product_forward(rows, kernel, arithmetic, out):
    return product(rows, kernel, arithmetic, out), (rows, kernel)


def _product_backward(arithmetic, out, saved, gradient):
    rows, kernel = saved
    gradient = gradient.astype(rows.dtype)
    to_rows = jnp.matmul(gradient, kernel.astype(rows.dtype).T, **arithmetic.of(rows.dtype))
    # the row axes are not merged into one: a mesh may split two of them, but could not split the merged one
    merged = tuple(range(rows.ndim - 1))
    to_kernel = jnp.tensordot(rows, gradient, (merged, merged), **arithmetic.of(rows.dtype))
    return to_rows.astype(rows.dtype), to_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


def table_product(
    rows: Float[Array, "*N K"], table: Float[Array, "M K"], arithmetic: Arithmetic, out: jnp.dtype
) -> Float[Array, "*N M"]:
    """rows @ tableᵀ, otherwise as `product`, which it is unless the rows are bf16.

    In bf16 the table's gradient is computed as the table lies. XLA on CPUs makes one product of another one's
    transpose, which jaxlib 0.10 then cannot run in bf16 ("Unsupported element type for DotThunk").
    """
    if rows.dtype == jnp.bfloat16:
        return _table_product(rows, table, arithmetic, out)
    return product(rows, table.T, arithmetic, out)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _table_product(
    rows: Float[Array, "*N K"], table: Float[Array, "M K"], arithmetic: Arithmetic, out: jnp.dtype
) -> Float[Array, "*N M"]:
    return jnp.matmul(rows, table.astype(rows.dtype).T, **arithmetic.of(rows.dtype)).astype(out)


def _table_product_forward(rows, table, arithmetic, out):
    return _table_product(rows, table, arithmetic, out), (rows, table)


def _table_product_backward(arithmetic, out, saved, gradient):
    rows, table = saved
    gradient = gradient.astype(rows.dtype)
    to_rows = jnp.matmul(gradient, table.astype(rows.dtype), **arithmetic.of(rows.dtype))
    merged = tuple(range(rows.ndim - 1))
    to_table = jnp.tensordot(gradient, rows, (merged, merged), **arithmetic.of(rows.dtype))
    return to_rows.astype(rows.dtype), to_table.astype(table.dtype)


_table_product.defvjp(_table_product_forward, _table_product_backward)


def dense(
    x: Float[Array, "... K"], kernel: Float[Array, "K N"], arithmetic: Arithmetic = EXACT
) -> Float[Array, "... N"]:
    """x @ kernel in x's dtype."""
    return product(x, kernel, arithmetic, x.dtype)


def lookup(table: Float[Array, "V E"], tokens: Int[Array, "B S"], dtype: jnp.dtype) -> Float[Array, "B S E"]:
    """The tokens' rows of a table."""
    return table[tokens].astype(dtype)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean x² + eps) · scale; statistics in float32, result in x's dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def rope_table(
    positions: Int[Array, "B S"], length: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Rope:
    """Rotary angles of each position below `length`: position · theta^(-2i / head_dim) for pair i, unless scaled.

    Sines and cosines are computed once for `length` positions and then looked up, rather than computed at each use.
    """
    frequencies, amplitude = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim), 1.0
    if scaling is not None:
        frequencies *= scaling.multipliers(theta, head_dim).astype(np.float32)
        amplitude = scaling.amplitude
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    cos, sin = amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)
    return cos[positions][:, :, None], sin[positions][:, :, None]


def apply_rope(x: Float[Array, "B S H D"], rope: Rope) -> Float[Array, "B S H D"]:
    """Rotates pairs (x_i, x_{i + D/2}), Hugging Face's half-split layout; float32 inside, result in x's dtype."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scores(
    rows: Float[Array, "B K R D"], keys: Float[Array, "B K C D"], float32: lax.Precision
) -> Float[Array, "B K R C"]:
    """rows · keys in float32. The gradient of the scores is rounded to the operands' dtype, as are the others."""
    return jnp.einsum("bkrd,bkcd->bkrc", rows, keys, **Arithmetic(FLOAT32, float32).of(rows.dtype))


def _scores_backward(float32, saved, gradient):
    rows, keys = saved
    gradient, precision = gradient.astype(rows.dtype), precision_of(rows.dtype, float32)
    to_rows = jnp.einsum("bkrc,bkcd->bkrd", gradient, keys, precision=precision)
    return to_rows, jnp.einsum("bkrc,bkrd->bkcd", gradient, rows, precision=precision)


_scores.defvjp(lambda rows, keys, float32: (_scores(rows, keys, float32), (rows, keys)), _scores_backward)


def attend_grouped(
    q: Float[Array, "B S H D"],
    k: Shaped[Array, "B K C D"],
    v: Shaped[Array, "B K C D"],
    mask: Bool[Array, "#B 1 #G #S C"],
    k_scale: Float[Array, "B K C"] | None = None,
    v_scale: Float[Array, "B K C"] | None = None,
    *,
    float32: lax.Precision = lax.Precision.HIGHEST,
) -> Float[Array, "B S H D"]:
    """softmax(q kᵀ / √D) v, where the H / K query heads of a key-value head become the rows of one product.

    Scores and softmax are float32, and the operands of products are in q's dtype; `float32` is the precision of
    products of float32. An int8 or fp8 k or v comes with a scale per token, which multiplies the scores or the weights,
    so that a cache is never copied to a wider dtype.
    """
    batch, length, _, head_dim = q.shape
    kv_heads, context = k.shape[1:3]
    rows = (
        q.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    )
    scores = _scores(rows, k.astype(q.dtype), float32) * head_dim**-0.5
    if k_scale is not None:
        scores *= k_scale[:, :, None]
    grouped = scores.reshape(batch, kv_heads, -1, length, context)
    weights = jax.nn.softmax(jnp.where(mask, grouped, jnp.finfo(jnp.float32).min), axis=-1).reshape(scores.shape)
    if v_scale is not None:
        weights *= v_scale[:, :, None]
    precision = precision_of(q.dtype, float32)
    attended = jnp.einsum("bkrc,bkcd->bkrd", weights.astype(q.dtype), v.astype(q.dtype), precision=precision)
    return attended.reshape(batch, kv_heads, -1, length, head_dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def pad_columns(x: Shaped[Array, "B S ..."], multiple: int) -> Shaped[jax.Array, "B padded ..."]:
    """Appends columns of zeros until there are a multiple of `multiple`."""
    extra = round_up(x.shape[1], multiple) - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple
