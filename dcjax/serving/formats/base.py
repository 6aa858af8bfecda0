"""The base of all formats, and matrices that are decoded to the activations' dtype before they are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from dcjax.models import moe
from dcjax.models.layers import Arithmetic, dense
from dcjax.serving.formats.face import DTYPES, KVCacheName, Matrix, with_kernel_axes
from dcjax.types import Array

_CACHES: dict[KVCacheName, jnp.dtype] = {name: DTYPES[name] for name in ("float32", "bf16", "fp16", "int8", "fp8")}


@dataclass(frozen=True)
class Format:
    """How an engine stores kernels and tables, and what it computes in.

    A subclass that defines `encode` and `decode` is a format: whatever it stores is decoded to the activations' dtype
    before it is multiplied. One that multiplies what is stored defines `store_kernel` and `store_table` instead. A
    frozen dataclass of plain fields in a recipe may be `serving.format`; docs/formats.md has one.
    """

    @property
    def name(self) -> str:
        """What it is called in logs and results."""
        raise NotImplementedError(f"{type(self).__name__} has no name")

    @property
    def activations(self) -> jnp.dtype:
        """The dtype of activations, norms and biases: float32, bfloat16 or float16."""
        return DTYPES["bf16"]

    @property
    def own_kv_cache(self) -> KVCacheName:
        """What keys and values are stored in where `serving.kv_cache` is auto."""
        return next(name for name, dtype in _CACHES.items() if dtype == self.activations)

    @property
    def weights(self) -> str | None:
        """What quantised weights are called in logs and results; None if they are not quantised."""
        return self.name

    @property
    def stored(self) -> str:
        """What weights are stored in, as tables of sizes call it."""
        return self.name

    @property
    def quantizes_activations(self) -> bool:
        """Whether each token is quantised before it meets the weights."""
        return self.weight_only != self

    @property
    def weight_only(self) -> Format:
        """The format of the same weights whose activations are not quantised."""
        return self

    @property
    def fast_when_looped(self) -> bool:
        """Whether decoding takes as long in a loop over layers as it does unrolled, on a CPU."""
        return False

    def check_width(self, name: str, width: int) -> None:
        """Raises ValueError where it cannot store a kernel or table, by its name, of this contracted width."""

    def encode(self, rows: Float[Array, "*E V K"]) -> Any:
        """Float32 masters to a tree of arrays: [*E, V, ...] with the contracted axis last, or [*E, V] without it."""
        raise NotImplementedError(f"format {self.name} does not encode")

    def decode(self, codes: Any, dtype: jnp.dtype, axis: int) -> Float[jax.Array, "*E rows columns"]:
        """What `encode` returned, as numbers of a dtype.

        Args:
          codes: the tree; of a kernel, the last two axes of its arrays are swapped.
          dtype: of the activations that it will meet.
          axis: the contracted axis, −1 of tables and −2 of kernels.
        """
        raise NotImplementedError(f"format {self.name} does not decode")

    def rounded(self, rows: Float[Array, "*E V K"]) -> Float[Array, "*E V K"]:
        """What products multiply by in the place of float32 masters, as float32; the contracted axis is last.

        A format that defines `store_kernel` must define this too to be trained in (`serving.in_training`).
        """
        return self.decode(self.encode(rows.astype(jnp.float32)), self.activations, -1).astype(jnp.float32)

    def rounded_activations(self, x: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """What meets the weights in the place of activations, as float32."""
        return x.astype(jnp.float32)

    def store_table(self, table: Float[Array, "*E V K"]) -> Matrix:
        """A table from its float32 master."""
        return CodedMatrix(self.encode(table), self)

    def store_kernel(self, kernel: Float[Array, "*E K N"]) -> Matrix:
        """A kernel from its float32 master, experts stacked in front."""
        codes = self.encode(kernel.swapaxes(-1, -2))
        return CodedMatrix(jax.tree.map(lambda leaf: with_kernel_axes(leaf, kernel.ndim), codes), self)


@flax.struct.dataclass
class CodedMatrix:
    """What `Format.encode` made of a kernel or table."""

    codes: Any
    format: Format = flax.struct.field(pytree_node=False)

    def dot(self, x: Float[Array, "... K"], arithmetic: Arithmetic) -> Float[Array, "... N"]:
        """x @ kernel, in x's dtype."""
        return dense(x, self.format.decode(self.codes, x.dtype, -2), arithmetic)

    def grouped_dot(
        self, rows: Float[Array, "N K"], group_sizes: Int[Array, "E"], arithmetic: Arithmetic
    ) -> Float[Array, "N M"]:
        """Each row times its group's kernel, in the rows' dtype; kernels are decoded when they are read."""

        def read(codes: Any, dtype: jnp.dtype) -> jax.Array:
            return self.format.decode(codes, dtype, -2)

        return moe.grouped_product(rows, self.codes, group_sizes, arithmetic, read=read).astype(rows.dtype)

    def lookup(self, tokens: Int[Array, "*N"], dtype: jnp.dtype) -> Float[Array, "*N K"]:
        """Rows of a table."""
        return self.format.decode(jax.tree.map(lambda leaf: leaf[tokens], self.codes), dtype, -1)

    def logits(self, x: Float[Array, "B K"], arithmetic: Arithmetic) -> Float[Array, "B V"]:
        """x @ tableᵀ, in the dtype of the sums."""
        table = self.format.decode(self.codes, x.dtype, -1)
        return lax.dot_general(x, table, (((1,), (1,)), ((), ())), **arithmetic.of(x.dtype))


def cache_dtype(format: Format, kv_cache: str) -> jnp.dtype:
    """The dtype of keys and values.

    Raises:
      ValueError: an unknown name.
    """
    name = format.own_kv_cache if kv_cache == "auto" else kv_cache
    if name not in _CACHES:
        raise ValueError(f"kv_cache is {kv_cache!r}; it must be one of auto, {', '.join(_CACHES)}")
    return _CACHES[name]
