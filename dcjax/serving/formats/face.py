"""What a serving format says of itself, and all that the engine, `sync`, scoring and the probe know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from dcjax.models.layers import Arithmetic
from dcjax.types import Array

if TYPE_CHECKING:
    from dcjax.serving.formats.base import Format

KVCacheName = Literal["auto", "float32", "bf16", "fp16", "int8", "fp8"]

DTYPES: dict[str, jnp.dtype] = {
    "float32": jnp.dtype(jnp.float32),
    "bf16": jnp.dtype(jnp.bfloat16),
    "fp16": jnp.dtype(jnp.float16),
    "int8": jnp.dtype(jnp.int8),
    "fp8": jnp.dtype(jnp.float8_e4m3fn),
}
"""Names of dtypes on the command line."""


@runtime_checkable
class Matrix(Protocol):
    """A stored kernel [*E, K, N] or table [V, K], a pytree whose arrays keep the axes of the master.

    Products sum over K, the contracted axis. An array of as many axes as the master has the contracted one too, as it
    is or in groups; one of an axis less, such as a scale per channel, has all the others.
    """

    @property
    def format(self) -> Format:
        """What it is stored in."""
        ...

    def dot(self, x: Float[Array, "... K"], arithmetic: Arithmetic) -> Float[Array, "... N"]:
        """x @ kernel, in x's dtype."""
        ...

    def grouped_dot(
        self, rows: Float[Array, "N K"], group_sizes: Int[Array, "E"], arithmetic: Arithmetic
    ) -> Float[Array, "N M"]:
        """Each row times its group's kernel, in the rows' dtype."""
        ...

    def lookup(self, tokens: Int[Array, "*N"], dtype: jnp.dtype) -> Float[Array, "*N K"]:
        """Rows of a table."""
        ...

    def logits(self, x: Float[Array, "B K"], arithmetic: Arithmetic) -> Float[Array, "B V"]:
        """x @ tableᵀ, in the dtype of the sums."""
        ...


def with_kernel_axes(leaf: Array, ndim: int) -> Array:
    """An array of a table's codes, of which the master has `ndim` axes, as a kernel's: contracted axis before last."""
    return leaf.swapaxes(-1, -2) if leaf.ndim == ndim else leaf


def stored_axes(matrix: Matrix, logical: PartitionSpec, contracted: int) -> Any:
    """The logical axes of each of a matrix's arrays, from those of its master and which of these is contracted."""
    others = PartitionSpec(*(axis for place, axis in enumerate(logical) if place != contracted))
    return jax.tree.map(lambda leaf: logical if leaf.ndim == len(logical) else others, matrix)
