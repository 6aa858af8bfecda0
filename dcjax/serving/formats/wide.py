"""Formats that quantise nothing: float32, bfloat16, float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dcjax.serving.formats.base import Format
from dcjax.serving.formats.face import DTYPES
from dcjax.types import Array


@dataclass(frozen=True)
class Wide(Format):
    """Weights and activations in one dtype."""

    dtype: Literal["float32", "bf16", "fp16"]

    @property
    def name(self) -> str:
        return self.dtype

    @property
    def activations(self) -> jnp.dtype:
        return DTYPES[self.dtype]

    @property
    def weights(self) -> None:
        return None

    @property
    def stored(self) -> str:
        return self.activations.name

    def encode(self, rows: Float[Array, "*E V K"]) -> jax.Array:
        # `copy`: casting float32 to float32 changes nothing, and the train step donates the masters' buffers
        return jnp.array(rows, self.activations, copy=True)

    def decode(self, codes: Array, dtype: jnp.dtype, axis: int) -> jax.Array:
        return jnp.asarray(codes, dtype)
