"""int4 weights with a scale per group of 32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, UInt8

from dcjax.serving.formats.base import Format
from dcjax.types import Array

GROUP = 32
"""Weights that share a scale: neighbours along the contracted axis."""


class Packed(NamedTuple):
    """Numbers from −7 to 7, two to a byte along the contracted axis (the first in the low nibble), a scale per group.

    A kernel [K, N] has bytes [K / 2, N] and scales [K / 32, N], experts stacked in front; a table [V, K] has bytes
    [V, K / 2] and scales [V, K / 32]. Scales are bfloat16: there is one for every 32 weights, and in float32 they
    would be a fifth of all bytes.
    """

    values: UInt8[Array, "*E rows columns"]
    scale: Float[Array, "*E groups channels"]


@dataclass(frozen=True)
class Int4(Format):
    """Weights in int4, activations in bfloat16."""

    @property
    def name(self) -> str:
        return "int4"

    def check_width(self, name: str, width: int) -> None:
        """Raises ValueError for a contracted width that is not a multiple of the groups."""
        if width % GROUP:
            raise ValueError(
                f"format {self.name!r} stores groups of {GROUP} weights, but {name} is contracted over {width}; "
                f"that must be a multiple of {GROUP}, or {name!r} in keep"
            )

    def encode(self, rows: Float[Array, "*E V K"]) -> Packed:
        """Quantises symmetrically per group of a row."""
        groups = rows.reshape(*rows.shape[:-1], -1, GROUP).astype(jnp.float32)
        scale = (jnp.max(jnp.abs(groups), axis=-1) / 7).astype(jnp.bfloat16)
        # divide by the scale as stored: rounding to bfloat16 makes it at most 1/256 too small, and 7.03 is still 7
        step = scale.astype(jnp.float32)[..., None]
        held = step >= jnp.finfo(jnp.float32).tiny
        values = jnp.round(jnp.where(held, groups / jnp.where(held, step, 1), 0)).astype(jnp.int8)
        low, high = jnp.moveaxis(values.reshape(*rows.shape[:-1], -1, 2), -1, 0).astype(jnp.uint8)
        return Packed((low & 15) | (high << 4), scale)

    def decode(self, codes: Packed, dtype: jnp.dtype, axis: int) -> jax.Array:
        """value · scale in float32, rounded once to `dtype`.

        That rounding is part of the format: other engines' int4 products also unpack to the activations' 16 bits.
        """
        both = lax.bitcast_convert_type(codes.values, jnp.int8)
        nibbles = jnp.stack([jnp.right_shift(jnp.left_shift(both, 4), 4), jnp.right_shift(both, 4)], axis)
        shape = list(codes.values.shape)
        shape[axis] *= 2
        scale = jnp.repeat(codes.scale.astype(jnp.float32), GROUP, axis)
        return (nibbles.reshape(shape).astype(jnp.float32) * scale).astype(dtype)
