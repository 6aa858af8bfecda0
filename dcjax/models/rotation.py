"""The Hadamard rotation, which spreads an outlier over its neighbours before numbers are quantised.

Quantised vectors have one scale, and one number that is far larger than the others takes all their bits. Rotated, no
number stands out, and two vectors that are rotated alike keep their product (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from dcjax.types import Array

LARGEST_BLOCK = 512
"""Neighbours that are rotated together at most, so that what devices share a vector by is still whole blocks."""

LARGEST_MATRIX = 128
"""Rows of the largest matrix that blocks are multiplied by."""


def block_of(width: int) -> int:
    """How many neighbours of a vector of this width are rotated together: the largest power of two that divides it."""
    return min(width & -width, LARGEST_BLOCK)


def rotate(x: Float[Array, "... D"]) -> Float[jax.Array, "... D"]:
    """Each block of the last axis times the orthonormal Hadamard matrix of its size, in float32.

    The matrix is symmetric, so that a second rotation restores the vector. A block of one number stays as it is.
    A large matrix is the Kronecker product of two smaller ones, by which blocks are multiplied one after the other.

    Example:
      >>> rotate(jnp.array([0.0, 8.0, 0.0, 0.0])).tolist()
      [4.0, -4.0, 4.0, -4.0]
    """
    wide, block = x.astype(jnp.float32), block_of(x.shape[-1])
    inner = min(block, LARGEST_MATRIX)
    turned = wide.reshape(*x.shape[:-1], -1, block // inner, inner)
    turned = jnp.einsum("...ab,bj->...aj", turned, _hadamard(inner), precision=lax.Precision.HIGHEST)
    if block > inner:
        turned = jnp.einsum("...aj,ai->...ij", turned, _hadamard(block // inner), precision=lax.Precision.HIGHEST)
    return (turned * block**-0.5).reshape(x.shape)


def _hadamard(size: int) -> Float[np.ndarray, "size size"]:
    """±1, by Sylvester's construction: the sign is the parity of the bits that both indices have."""
    index = np.arange(size)
    return 1.0 - 2.0 * (np.bitwise_count(index[:, None] & index) % 2).astype(np.float32)
