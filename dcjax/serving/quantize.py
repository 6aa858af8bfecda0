"""Serving formats: how weights and activations are stored, and the products that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Shaped, UInt8

from dcjax.models import ModelConfig, moe
from dcjax.models.block import Products
from dcjax.models.cache import quantize_rows
from dcjax.models.layers import EXACT, Arithmetic, dense
from dcjax.models.parameters import parameters
from dcjax.types import Array

FormatName = Literal["float32", "bf16", "fp16", "int8_weight_only", "int8", "fp8_weight_only", "fp8", "int4"]
KVCacheName = Literal["auto", "float32", "bf16", "fp16", "int8", "fp8"]

FLOAT32, BF16, FP16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)
INT8, FP8 = jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)


@dataclass(frozen=True)
class Format:
    """The dtypes that a serving engine stores and computes in."""

    name: FormatName
    activations: jnp.dtype
    # None is the activations' dtype. int8 and fp8 (e4m3) have a scale per output channel, int4 one per 32 weights
    weights: Literal["int8", "fp8", "int4"] | None
    # each token is quantised like the weights before it meets them (w8a8)
    quantizes_activations: bool
    kv_cache: jnp.dtype


formats: dict[FormatName, Format] = {
    "float32": Format("float32", FLOAT32, None, False, FLOAT32),
    "bf16": Format("bf16", BF16, None, False, BF16),
    "fp16": Format("fp16", FP16, None, False, FP16),
    "int8_weight_only": Format("int8_weight_only", BF16, "int8", False, BF16),
    "int8": Format("int8", BF16, "int8", True, INT8),
    "fp8_weight_only": Format("fp8_weight_only", BF16, "fp8", False, BF16),
    "fp8": Format("fp8", BF16, "fp8", True, FP8),
    "int4": Format("int4", BF16, "int4", False, BF16),
}

_KV_CACHES: dict[KVCacheName, jnp.dtype] = {"float32": FLOAT32, "bf16": BF16, "fp16": FP16, "int8": INT8, "fp8": FP8}


def serving_format(name: str, kv_cache: str = "auto") -> Format:
    """The format of this name, with its own KV cache or one of another dtype.

    Raises:
      ValueError: one of the names is unknown.
    """
    if name not in formats:
        raise ValueError(f"format is {name!r}; it must be one of {', '.join(formats)}")
    if kv_cache == "auto":
        return formats[name]
    if kv_cache not in _KV_CACHES:
        raise ValueError(f"kv_cache is {kv_cache!r}; it must be one of auto, {', '.join(_KV_CACHES)}")
    return dataclasses.replace(formats[name], kv_cache=_KV_CACHES[kv_cache])


def contracted_widths(config: ModelConfig) -> dict[str, int]:
    """The length of the axis that products sum over, for each kernel and table of the model."""
    axes = {"kernel": -2, "table": -1}
    return {each.name: each.shape[axes[each.role]] for each in parameters(config) if each.role in axes}


def kept_wide(config: ModelConfig, keep: Sequence[str]) -> set[str]:
    """The kernels and tables whose names match one of these patterns (in the syntax of `fnmatch`).

    Raises:
      ValueError: a pattern matches none of the model's kernels and tables.
    """
    names = contracted_widths(config)
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"keep has {pattern!r}, which matches no kernel or table of this model: {', '.join(names)}"
            )
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in keep)}


def check_served(config: ModelConfig, format: Format, platform: str, keep: Sequence[str] = ()) -> None:
    """Checks that this model can be served in a format on a platform ("cpu", "gpu", "tpu").

    Float8 is accepted on hardware without float8 products: its numbers are multiplied exactly in a wider dtype.

    Raises:
      ValueError: float16 is asked for on a TPU, which has none; a contracted width is not a multiple of int4's groups;
        a product is so long that its int32 sum could overflow; or a pattern of `keep` matches nothing.
    """
    if platform == "tpu" and FP16 in (format.activations, format.kv_cache):
        what = f"format {format.name!r}" if format.activations == FP16 else "kv_cache 'fp16'"
        raise ValueError(f"{what} is float16, which TPUs do not have; bf16 has the same size")
    kept = kept_wide(config, keep)
    for name, width in contracted_widths(config).items():
        if name in kept:
            continue
        if format.weights == "int4" and width % GROUP:
            raise ValueError(
                f"format {format.name!r} stores groups of {GROUP} weights, but {name} is contracted over {width}; "
                f"that must be a multiple of {GROUP}, or {name!r} in keep"
            )
        if format.weights == "int8" and format.quantizes_activations and width > _LONGEST_INT32_SUM:
            raise ValueError(
                f"format {format.name!r} sums in int32, but {name} is contracted over {width}; "
                f"that must be at most {_LONGEST_INT32_SUM}, or the format int8_weight_only"
            )


_LONGEST_INT32_SUM = (2**31 - 1) // 127**2


@flax.struct.dataclass
class QuantizedMatrix:
    """int8 or e4m3 weights with a float32 scale per output channel: columns of a kernel [K, N], rows of a table [V, E].

    Kernels of E experts are stacked in front: [E, K, N], with scales [E, N].
    """

    values: Shaped[Array, "*E rows columns"]
    scale: Float[Array, "*E channels"]
    # whether products quantise the activations too
    quantizes_activations: bool = flax.struct.field(pytree_node=False)


GROUP = 32
"""Weights that share a scale in int4: neighbours along the contracted axis."""


@flax.struct.dataclass
class PackedMatrix:
    """int4 weights −7 to 7, two to a byte along the contracted axis (the first in the low nibble), a scale per group.

    A kernel [K, N] has bytes [K / 2, N] and scales [K / 32, N], experts stacked in front; a table [V, E] has bytes
    [V, E / 2] and scales [V, E / 32]. Scales are bfloat16: there is one for every 32 weights, and in float32 they
    would be a fifth of all bytes.
    """

    values: UInt8[Array, "*E rows columns"]
    scale: Float[Array, "*E groups channels"]


Matrix = QuantizedMatrix | PackedMatrix


def quantize_kernel(kernel: Float[Array, "*E K N"], format: Format) -> Matrix:
    """Quantises a float32 master symmetrically per column, or per group of a column."""
    rows = quantize_table(kernel.swapaxes(-1, -2), format)
    if isinstance(rows, PackedMatrix):
        return PackedMatrix(rows.values.swapaxes(-1, -2), rows.scale.swapaxes(-1, -2))
    return dataclasses.replace(rows, values=rows.values.swapaxes(-1, -2))


def quantize_table(table: Float[Array, "*E V K"], format: Format) -> Matrix:
    """Quantises symmetrically per row, or per group of a row: a head's output channels, an embedding's tokens."""
    if format.weights == "int4":
        return _pack(table)
    values, scale = quantize_rows(table, INT8 if format.weights == "int8" else FP8)
    return QuantizedMatrix(values, scale, format.quantizes_activations)


def _pack(rows: Float[Array, "*E V K"]) -> PackedMatrix:
    groups = rows.reshape(*rows.shape[:-1], -1, GROUP).astype(jnp.float32)
    scale = (jnp.max(jnp.abs(groups), axis=-1) / 7).astype(jnp.bfloat16)
    # divide by the scale as stored: rounding to bfloat16 makes it at most 1/256 too small, and 7.03 still rounds to 7
    step = scale.astype(jnp.float32)[..., None]
    held = step >= jnp.finfo(jnp.float32).tiny
    values = jnp.round(jnp.where(held, groups / jnp.where(held, step, 1), 0)).astype(jnp.int8)
    low, high = jnp.moveaxis(values.reshape(*rows.shape[:-1], -1, 2), -1, 0).astype(jnp.uint8)
    return PackedMatrix((low & 15) | (high << 4), scale)


def unpack(matrix: PackedMatrix, dtype: jnp.dtype, axis: int) -> Float[jax.Array, "*E rows columns"]:
    """value · scale in float32, rounded once to `dtype`; `axis` is the contracted one, −2 of kernels, −1 of tables.

    That rounding is part of the format: other engines' int4 products also unpack to the activations' 16 bits.
    """
    both = lax.bitcast_convert_type(matrix.values, jnp.int8)
    nibbles = jnp.stack([jnp.right_shift(jnp.left_shift(both, 4), 4), jnp.right_shift(both, 4)], axis)
    shape = list(matrix.values.shape)
    shape[axis] *= 2
    scale = jnp.repeat(matrix.scale.astype(jnp.float32), GROUP, axis)
    return (nibbles.reshape(shape).astype(jnp.float32) * scale).astype(dtype)


Multiply = Callable[[Array, Array, Arithmetic], Array]
"""(rows [N, K], values of weights, arithmetic) -> [N, M]; the values are cast to the rows' dtype."""


def _scaled(
    x: Float[Array, "N K"],
    weights: QuantizedMatrix,
    scale: Float[Array, "#N M"],
    multiply: Multiply,
    arithmetic: Arithmetic,
) -> Float[Array, "N M"]:
    """The float32 product of x and weights with this scale; every product of two quantised numbers is exact."""
    if not weights.quantizes_activations:
        return multiply(x, weights.values, arithmetic) * scale
    rows, row_scale = quantize_rows(x, weights.values.dtype)
    total = _narrow_product(rows, weights.values, multiply, arithmetic)
    return total.astype(jnp.float32) * (row_scale[:, None] * scale)


def _narrow_product(rows: Array, values: Array, multiply: Multiply, arithmetic: Arithmetic) -> Array:
    if rows.dtype == INT8:
        return multiply(rows, values, arithmetic._replace(accumulate=jnp.dtype(jnp.int32)))

    def narrow(rows, values):
        return multiply(rows, values, arithmetic)

    def widened(rows, values):
        # bfloat16 holds every e4m3 number, and float32 every product of two; XLA would compute float8 in float32, four
        # times as slowly
        return multiply(rows.astype(BF16), values, arithmetic)

    return lax.platform_dependent(rows, values, cpu=widened, default=narrow)


def _along(contracted: int) -> Multiply:
    def multiply(rows, values, arithmetic):
        dims = (((1,), (contracted,)), ((), ()))
        return lax.dot_general(rows, values.astype(rows.dtype), dims, **arithmetic.of(rows.dtype))

    return multiply


def dot(
    x: Float[Array, "... K"], kernel: Matrix | Float[Array, "K N"], arithmetic: Arithmetic = EXACT
) -> Float[Array, "... N"]:
    """x @ kernel in x's dtype; products of int8 with int8 are summed in int32."""
    if isinstance(kernel, QuantizedMatrix):
        rows = _scaled(x.reshape(-1, x.shape[-1]), kernel, kernel.scale[None], _along(0), arithmetic)
        return rows.astype(x.dtype).reshape(*x.shape[:-1], -1)
    return dense(x, unpack(kernel, x.dtype, -2) if isinstance(kernel, PackedMatrix) else kernel, arithmetic)


def grouped_dot(
    rows: Float[Array, "N K"],
    kernels: Matrix | Float[Array, "E K M"],
    group_sizes: Int[Array, "E"],
    arithmetic: Arithmetic = EXACT,
) -> Float[Array, "N M"]:
    """Each row times its group's kernel, in the rows' dtype; sums as in `dot`."""

    def multiply(rows: Array, kernels: Any, arithmetic: Arithmetic) -> Array:
        return moe.grouped_product(rows, kernels, group_sizes, arithmetic, read=_read_kernels)

    if not isinstance(kernels, QuantizedMatrix):
        return multiply(rows, kernels, arithmetic).astype(rows.dtype)
    groups = jnp.repeat(jnp.arange(len(group_sizes)), group_sizes, total_repeat_length=len(rows))
    return _scaled(rows, kernels, kernels.scale[groups], multiply, arithmetic).astype(rows.dtype)


def _read_kernels(kernels: PackedMatrix | jax.Array, dtype: jnp.dtype) -> jax.Array:
    return unpack(kernels, dtype, -2) if isinstance(kernels, PackedMatrix) else kernels.astype(dtype)


def lookup(table: Matrix | Float[Array, "V E"], tokens: Int[Array, "B S"], dtype: jnp.dtype) -> Float[Array, "B S E"]:
    """Rows of an embedding table."""
    if isinstance(table, PackedMatrix):
        return unpack(PackedMatrix(table.values[tokens], table.scale[tokens]), dtype, -1)
    if isinstance(table, QuantizedMatrix):
        return (table.values[tokens].astype(jnp.float32) * table.scale[tokens][..., None]).astype(dtype)
    return table[tokens].astype(dtype)


def logits(
    x: Float[Array, "B E"], table: Matrix | Float[Array, "V E"], arithmetic: Arithmetic = EXACT
) -> Float[Array, "B V"]:
    """x @ tableᵀ in the dtype of the sums."""
    if isinstance(table, QuantizedMatrix):
        return _scaled(x, table, table.scale[None], _along(1), arithmetic)
    return _along(1)(x, unpack(table, x.dtype, -1) if isinstance(table, PackedMatrix) else table, arithmetic)


def arithmetic(config: ModelConfig) -> Arithmetic:
    """An engine's arithmetic: sums are float32, whatever dtype the model is trained in."""
    return EXACT._replace(float32=config.precision.float32)


def products(config: ModelConfig) -> Products:
    """The products of a layer whose kernels are stored in any format."""
    how = arithmetic(config)
    return Products(partial(dot, arithmetic=how), partial(grouped_dot, arithmetic=how))
