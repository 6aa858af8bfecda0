"""Weights in int8 or int4 with a scale per group of 32, and activations in bfloat16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Shaped

from dcjax.serving.formats.base import Format
from dcjax.serving.formats.face import KVCacheName
from dcjax.types import Array

GROUP = 32
"""Weights that share a scale: neighbours along the contracted axis."""

SMALLEST_GROUP = 8
"""Weights that share a scale in int8 at least, where groups of `GROUP` do not divide the contracted axis."""


class Groups(NamedTuple):
    """Signed numbers and a scale per group.

    A kernel [K, N] has scales [K / 32, N], experts stacked in front; a table [V, K] has scales [V, K / 32]. In int8 the
    values have the shape of the master. In int4 they are two to a byte along the contracted axis, the first in the low
    nibble: uint8 [K / 2, N] or [V, K / 2]. Scales are bfloat16: there is one for every 32 weights, and in float32 they
    would be a ninth of all bytes of int8, and a fifth of int4's.
    """

    values: Shaped[Array, "*E rows columns"]
    scale: Float[Array, "*E groups channels"]


@dataclass(frozen=True)
class Grouped(Format):
    """Weights from −127 to 127 (int8) or −7 to 7 (int4), symmetric in each group; activations in bfloat16.

    What is stored is `Groups`; in int8 groups are smaller where a width is no multiple of 32. int8 keeps keys and
    values in int8 too, where `serving.kv_cache` is auto.
    """

    bits: Literal[8, 4]

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def own_kv_cache(self) -> KVCacheName:
        return "int8" if self.bits == 8 else "bf16"

    def check_width(self, name: str, width: int) -> None:
        """Raises ValueError for a contracted width that is not a multiple of the smallest groups."""
        least = SMALLEST_GROUP if self.bits == 8 else GROUP
        if width % least:
            raise ValueError(
                f"format {self.name!r} stores groups of {least} weights, but {name} is contracted over {width}; "
                f"that must be a multiple of {least}, or {name!r} in keep"
            )

    def encode(self, rows: Float[Array, "*E V K"]) -> Groups:
        """Quantises symmetrically per group of a row."""
        largest = 2 ** (self.bits - 1) - 1
        groups = rows.reshape(*rows.shape[:-1], -1, math.gcd(rows.shape[-1], GROUP)).astype(jnp.float32)
        scale = (jnp.max(jnp.abs(groups), axis=-1) / largest).astype(jnp.bfloat16)
        # divide by the scale as stored: rounding to bfloat16 makes it at most 1/512 too small, and 127.25 is still 127
        step = scale.astype(jnp.float32)[..., None]
        held = step >= jnp.finfo(jnp.float32).tiny
        values = jnp.round(jnp.where(held, groups / jnp.where(held, step, 1), 0)).astype(jnp.int8).reshape(rows.shape)
        return Groups(values if self.bits == 8 else _two_to_a_byte(values), scale)

    def decode(self, codes: Groups, dtype: jnp.dtype, axis: int) -> jax.Array:
        """value · scale in float32, rounded once to `dtype`.

        That rounding is part of the format: other engines' products with such weights also unpack to the activations'
        16 bits.
        """
        values = jnp.asarray(codes.values) if self.bits == 8 else _from_bytes(codes.values, axis)
        scale = jnp.repeat(codes.scale.astype(jnp.float32), values.shape[axis] // codes.scale.shape[axis], axis)
        return (values.astype(jnp.float32) * scale).astype(dtype)


def _two_to_a_byte(values: Shaped[Array, "*E V K"]) -> Shaped[Array, "*E V K/2"]:
    low, high = jnp.moveaxis(values.reshape(*values.shape[:-1], -1, 2), -1, 0).astype(jnp.uint8)
    return (low & 15) | (high << 4)


def _from_bytes(packed: Array, axis: int) -> jax.Array:
    both = lax.bitcast_convert_type(packed, jnp.int8)
    nibbles = jnp.stack([jnp.right_shift(jnp.left_shift(both, 4), 4), jnp.right_shift(both, 4)], axis)
    shape = list(packed.shape)
    shape[axis] *= 2
    return nibbles.reshape(shape)
