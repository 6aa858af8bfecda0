"""Serving formats: how weights and activations are stored, and the products that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dcjax.models import moe
from dcjax.models.block import Products
from dcjax.models.cache import quantize_rows
from dcjax.models.layers import dense
from dcjax.types import Array

FormatName = Literal["float32", "bf16", "int8"]


@dataclass(frozen=True)
class Format:
    """What a serving engine stores and computes in."""

    activations: jnp.dtype
    kv_cache: jnp.dtype
    # w8a8: kernels and tables in int8 with a scale per output channel, activations quantised per token at each product
    int8_weights: bool


formats: dict[FormatName, Format] = {
    "float32": Format(jnp.dtype(jnp.float32), jnp.dtype(jnp.float32), int8_weights=False),
    "bf16": Format(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16), int8_weights=False),
    "int8": Format(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8), int8_weights=True),
}


@flax.struct.dataclass
class Int8Matrix:
    """int8 weights with a float32 scale per output channel: columns of a kernel [K, N], rows of a table [V, E].

    Kernels of E experts are stacked in front: [E, K, N], with scales [E, N].
    """

    values: Int[Array, "*E rows columns"]
    scale: Float[Array, "*E channels"]


def quantize_kernel(kernel: Float[Array, "*E K N"]) -> Int8Matrix:
    """Symmetric int8 per column, from the float32 master: scale_n = max_k |w_kn| / 127."""
    values, scale = quantize_rows(kernel.swapaxes(-1, -2))
    return Int8Matrix(values=values.swapaxes(-1, -2), scale=scale)


def quantize_table(table: Float[Array, "V E"]) -> Int8Matrix:
    """Symmetric int8 per row: the output channels of a head, and the rows that an embedding looks up."""
    return Int8Matrix(*quantize_rows(table))


def _int8_product(x: Array, weights: Int8Matrix, contracted: int) -> Array:
    values, scale = quantize_rows(x)
    dims = (((x.ndim - 1,), (contracted,)), ((), ()))
    total = jax.lax.dot_general(values, weights.values, dims, preferred_element_type=jnp.int32)
    return total.astype(jnp.float32) * (scale[..., None] * weights.scale)


def dot(x: Float[Array, "... K"], kernel: Int8Matrix | Float[Array, "K N"]) -> Float[Array, "... N"]:
    """x @ kernel in x's dtype; int8 kernels meet x quantised per token in an int8 × int8 → int32 product."""
    if isinstance(kernel, Int8Matrix):
        return _int8_product(x, kernel, 0).astype(x.dtype)
    return dense(x, kernel)


def grouped_dot(
    rows: Float[Array, "N K"], kernels: Int8Matrix | Float[Array, "E K M"], group_sizes: Int[Array, "E"]
) -> Float[Array, "N M"]:
    """Each row times its group's kernel, in the rows' dtype; int8 kernels meet rows quantised one by one."""
    if not isinstance(kernels, Int8Matrix):
        return moe.grouped_product(rows, kernels, group_sizes, jnp.dtype(jnp.float32)).astype(rows.dtype)
    values, scale = quantize_rows(rows)
    total = moe.grouped_product(values, kernels.values, group_sizes, jnp.dtype(jnp.int32))
    groups = jnp.repeat(jnp.arange(len(group_sizes)), group_sizes, total_repeat_length=len(rows))
    return (total.astype(jnp.float32) * (scale[:, None] * kernels.scale[groups])).astype(rows.dtype)


def lookup(
    table: Int8Matrix | Float[Array, "V E"], tokens: Int[Array, "B S"], dtype: jnp.dtype
) -> Float[Array, "B S E"]:
    """Rows of an embedding table."""
    if isinstance(table, Int8Matrix):
        return (table.values[tokens].astype(jnp.float32) * table.scale[tokens][..., None]).astype(dtype)
    return table[tokens].astype(dtype)


def logits(x: Float[Array, "B E"], table: Int8Matrix | Float[Array, "V E"]) -> Float[Array, "B V"]:
    """x @ tableᵀ, accumulated and returned in float32."""
    if isinstance(table, Int8Matrix):
        return _int8_product(x, table, 1)
    return jax.lax.dot_general(x, table, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


PRODUCTS = Products(dot, grouped_dot)
"""What a layer multiplies with, whatever the kernels are stored in."""
