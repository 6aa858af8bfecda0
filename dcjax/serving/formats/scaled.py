"""Weights in 8 bits, int8 or e4m3, with a scale per output channel, multiplied as they are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Shaped

from dcjax.models import moe
from dcjax.models.cache import quantize_rows
from dcjax.models.layers import Arithmetic
from dcjax.models.rotation import rotate
from dcjax.serving.formats.base import Format
from dcjax.serving.formats.face import DTYPES, KVCacheName, with_kernel_axes
from dcjax.types import Array

INT8, BF16 = DTYPES["int8"], DTYPES["bf16"]

LONGEST_INT32_SUM = (2**31 - 1) // 127**2
"""Products of two int8 numbers whose sum is sure to fit an int32."""

Multiply = Callable[[Array, Array, Arithmetic], Array]
"""(rows [N, K], values of weights, arithmetic) -> [N, M]; the values are cast to the rows' dtype."""


@flax.struct.dataclass
class ScaledMatrix:
    """Narrow weights with a float32 scale per output channel: columns of a kernel [K, N], rows of a table [V, K].

    Kernels of E experts are stacked in front: [E, K, N], with scales [E, N]. Where the format rotates, what is stored
    is rotated along the contracted axis.
    """

    values: Shaped[Array, "*E rows columns"]
    scale: Float[Array, "*E channels"]
    format: Scaled = flax.struct.field(pytree_node=False)

    def dot(self, x: Float[Array, "... K"], arithmetic: Arithmetic) -> Float[Array, "... N"]:
        """x @ kernel in x's dtype; products of int8 with int8 are summed in int32."""
        rows = self._scaled(x.reshape(-1, x.shape[-1]), self.scale[None], _along(0), arithmetic)
        return rows.astype(x.dtype).reshape(*x.shape[:-1], -1)

    def grouped_dot(
        self, rows: Float[Array, "N K"], group_sizes: Int[Array, "E"], arithmetic: Arithmetic
    ) -> Float[Array, "N M"]:
        """Each row times its group's kernel, in the rows' dtype; sums as in `dot`."""

        def multiply(rows: Array, kernels: Any, arithmetic: Arithmetic) -> Array:
            return moe.grouped_product(
                rows, kernels, group_sizes, arithmetic, read=lambda kernel, dtype: kernel.astype(dtype)
            )

        groups = jnp.repeat(jnp.arange(len(group_sizes)), group_sizes, total_repeat_length=len(rows))
        return self._scaled(rows, self.scale[groups], multiply, arithmetic).astype(rows.dtype)

    def lookup(self, tokens: Int[Array, "*N"], dtype: jnp.dtype) -> Float[Array, "*N K"]:
        """Rows of a table."""
        rows = self.values[tokens].astype(jnp.float32) * self.scale[tokens][..., None]
        return (rotate(rows) if self.format.rotates else rows).astype(dtype)

    def logits(self, x: Float[Array, "B K"], arithmetic: Arithmetic) -> Float[Array, "B V"]:
        """x @ tableᵀ in float32."""
        return self._scaled(x, self.scale[None], _along(1), arithmetic)

    def _scaled(
        self, x: Float[Array, "N K"], scale: Float[Array, "#N M"], multiply: Multiply, arithmetic: Arithmetic
    ) -> Float[Array, "N M"]:
        """The float32 product of x and weights with this scale; every product of two quantised numbers is exact."""
        turned = rotate(x) if self.format.rotates else x
        if not self.format.quantizes_activations:
            return multiply(turned.astype(x.dtype), self.values, arithmetic) * scale
        rows, row_scale = quantize_rows(turned, self.values.dtype)
        total = _narrow_product(rows, self.values, multiply, arithmetic)
        return total.astype(jnp.float32) * (row_scale[:, None] * scale)


@dataclass(frozen=True)
class Scaled(Format):
    """Weights in int8 or e4m3; activations in bfloat16, or each token quantised like the weights before it meets them.

    Float8 is accepted on hardware without float8 products: its numbers are multiplied exactly in a wider dtype.
    """

    dtype: Literal["int8", "fp8"]
    quantizes_activations: bool = True
    """Whether each token is quantised like the weights before it meets them (w8a8)."""
    rotates: bool = False
    """Whether weights, and activations that meet them, are rotated before they are quantised (QuaRot)."""

    @property
    def name(self) -> str:
        names = {"int8": ("int8_channel", "w8a8"), "fp8": ("fp8_weight_only", "fp8")}[self.dtype]
        return names[self.quantizes_activations] + ("_rotated" if self.rotates else "")

    @property
    def own_kv_cache(self) -> KVCacheName:
        return self.dtype if self.quantizes_activations else "bf16"

    @property
    def weights(self) -> str:
        return self.dtype

    @property
    def stored(self) -> str:
        return DTYPES[self.dtype].name

    @property
    def weight_only(self) -> Scaled:
        return dataclasses.replace(self, quantizes_activations=False)

    @property
    def fast_when_looped(self) -> bool:
        return self.dtype == "int8" and self.quantizes_activations

    def check_width(self, name: str, width: int) -> None:
        """Raises ValueError for a contracted width over which an int32 sum could overflow."""
        if self.dtype == "int8" and self.quantizes_activations and width > LONGEST_INT32_SUM:
            raise ValueError(
                f"format {self.name!r} sums in int32, but {name} is contracted over {width}; "
                f"that must be at most {LONGEST_INT32_SUM}, or the format int8"
            )

    def rounded(self, rows: Float[Array, "*E V K"]) -> Float[Array, "*E V K"]:
        """value · scale in float32, turned back where the format rotates."""
        return self._there_and_back(rows)

    def rounded_activations(self, x: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """value · scale of each token, if they are quantised."""
        return self._there_and_back(x) if self.quantizes_activations else x.astype(jnp.float32)

    def _there_and_back(self, rows: Float[Array, "... K"]) -> Float[Array, "... K"]:
        values, scale = quantize_rows(rotate(rows) if self.rotates else rows, DTYPES[self.dtype])
        wide = values.astype(jnp.float32) * scale[..., None]
        return rotate(wide) if self.rotates else wide

    def store_table(self, table: Float[Array, "*E V K"]) -> ScaledMatrix:
        """Quantises symmetrically per row: a head's output channels, an embedding's tokens."""
        values, scale = quantize_rows(rotate(table) if self.rotates else table, DTYPES[self.dtype])
        return ScaledMatrix(values, scale, self)

    def store_kernel(self, kernel: Float[Array, "*E K N"]) -> ScaledMatrix:
        """Quantises symmetrically per column."""
        table = self.store_table(kernel.swapaxes(-1, -2))
        return dataclasses.replace(table, values=with_kernel_axes(table.values, kernel.ndim))


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
