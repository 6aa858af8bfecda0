"""What is measured beside the library's formats: other roundings, two formats in one model, and SmoothQuant.

All of it is arithmetic alone: numbers are rounded as a format would, and then held and multiplied in wider dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from dcjax.models import ModelConfig
from dcjax.models.cache import attend_cached
from dcjax.models.layers import Arithmetic, apply_rope, rope_table
from dcjax.models.rotation import rotate
from dcjax.serving.formats import CodedMatrix, Format, Matrix
from dcjax.types import Array, Params

RANGES = [1 - 0.02 * step for step in range(25)]
"""Of the range of a group's numbers, the shares that a scale of least squares is chosen from."""


@dataclass(frozen=True)
class Rounding:
    """(x [..., K]) -> float32 numbers of that shape: integers times a scale in each group of neighbours."""

    bits: int = 8
    group: int | None = None
    """Neighbours that share a scale, in bfloat16; a row's last group may be smaller. None is the row, in float32."""
    block: int = 1
    """Neighbours that are rotated together before, and back after; at most the power of two that divides K."""
    asymmetric: bool = False
    """Whether a group's numbers lie between its least and its largest, both stored, and not around zero."""
    least_squares: bool = False
    """Whether a scale is the one of RANGES with the smallest squared error; else none of the numbers is cut off."""

    def bits_each(self, width: int) -> float:
        """Bits of a number in a row of this width, its share of the scale included."""
        of_scale = 32 / width if self.group is None else 16 / self.group
        return self.bits + of_scale * (1 + self.asymmetric)

    def __call__(self, x: Float[Array, "... K"]) -> Float[jax.Array, "... K"]:
        width = x.shape[-1]
        group = self.group or width
        turned = self._turned(x.astype(jnp.float32))
        # the last group is filled with its last number, which changes neither its least nor its largest
        padded = jnp.pad(turned, [(0, 0)] * (x.ndim - 1) + [(0, -width % group)], mode="edge")
        groups = padded.reshape(*x.shape[:-1], -1, group)
        held = self._best(groups) if self.least_squares else self._held(groups, 1.0)
        return self._turned(held.reshape(padded.shape)[..., :width])

    def _turned(self, x: Array) -> jax.Array:
        block = math.gcd(self.block, x.shape[-1])
        return rotate(x.reshape(*x.shape[:-1], -1, block)).reshape(x.shape)

    def _held(self, groups: Float[Array, "... G"], share: float | Array) -> jax.Array:
        """The numbers of groups as they are stored, if a scale covers this share of their range."""
        if self.asymmetric:
            low, high = (of(groups, axis=-1, keepdims=True) for of in (jnp.min, jnp.max))
            least, most = 0, 2**self.bits - 1
        else:
            low, high = 0.0, jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
            most = 2 ** (self.bits - 1) - 1
            least = -most
        low, scale = self._stored(share * low), self._stored(share * (high - low) / most)
        codes = jnp.round((groups - low) / jnp.where(scale > 0, scale, 1))
        return jnp.clip(codes, least, most) * scale + low

    def _stored(self, scale: Array | float) -> jax.Array:
        return jnp.asarray(scale, jnp.float32 if self.group is None else jnp.bfloat16).astype(jnp.float32)

    def _best(self, groups: Float[Array, "... G"]) -> jax.Array:
        def error(held: Array) -> jax.Array:
            return jnp.sum(jnp.square(held - groups), axis=-1, keepdims=True)

        def better(best: Array, share: Array) -> tuple[jax.Array, None]:
            held = self._held(groups, share)
            return jnp.where(error(held) < error(best), held, best), None

        return lax.scan(better, self._held(groups, RANGES[0]), jnp.array(RANGES[1:]))[0]


@dataclass(frozen=True)
class Simulated(Format):
    """Weights and the activations that meet them rounded in any way; None leaves them in bfloat16."""

    of_weights: Rounding | None
    of_activations: Rounding | None = None

    @property
    def name(self) -> str:
        return f"{self.of_weights} by {self.of_activations}"

    @property
    def decodes(self) -> bool:
        """Whether weights are decoded to bfloat16, as `int8` and `int4` do it; else products are exact, as `w8a8`'s."""
        return self.of_activations is None and self.of_weights is not None and self.of_weights.group is not None

    def encode(self, rows: Float[Array, "*E V K"]) -> Array:
        """Rounds each row."""
        held = rows.astype(jnp.bfloat16) if self.of_weights is None else self.of_weights(rows)
        return held.astype(jnp.bfloat16 if self.decodes else jnp.float32)

    def decode(self, codes: Any, dtype: jnp.dtype, axis: int) -> jax.Array:
        """The numbers as they are held."""
        return jnp.asarray(codes, dtype)

    def store_table(self, table: Float[Array, "*E V K"]) -> SimulatedMatrix:
        """Rounds each row."""
        return SimulatedMatrix(self.encode(table), self, self.of_activations)

    def store_kernel(self, kernel: Float[Array, "*E K N"]) -> SimulatedMatrix:
        """Rounds each column."""
        return SimulatedMatrix(self.encode(kernel.swapaxes(-1, -2)).swapaxes(-1, -2), self, self.of_activations)


@flax.struct.dataclass
class SimulatedMatrix(CodedMatrix):
    """Rounded numbers, which are multiplied with activations that are rounded too, where the format does so."""

    of_activations: Rounding | None = flax.struct.field(pytree_node=False)

    def dot(self, x: Float[Array, "... K"], arithmetic: Arithmetic) -> Float[Array, "... N"]:
        """x @ kernel, in x's dtype."""
        return super().dot(self._rounded(x), arithmetic).astype(x.dtype)

    def grouped_dot(
        self, rows: Float[Array, "N K"], group_sizes: Int[Array, "E"], arithmetic: Arithmetic
    ) -> Float[Array, "N M"]:
        """Each row times its group's kernel, in the rows' dtype."""
        return super().grouped_dot(self._rounded(rows), group_sizes, arithmetic).astype(rows.dtype)

    def logits(self, x: Float[Array, "B K"], arithmetic: Arithmetic) -> Float[Array, "B V"]:
        """x @ tableᵀ, in the dtype of the sums."""
        return super().logits(self._rounded(x), arithmetic)

    def _rounded(self, x: Array) -> Array:
        return x.astype(self.codes.dtype) if self.of_activations is None else self.of_activations(x)


@flax.struct.dataclass
class Mixed:
    """A kernel or table in two formats, of which one program reads either."""

    wide: Matrix
    narrow: Matrix
    narrowed: Bool[Array, ""]

    @property
    def format(self) -> Format:
        """The one that is looked at."""
        return self.narrow.format

    def dot(self, x: Float[Array, "... K"], arithmetic: Arithmetic) -> Float[Array, "... N"]:
        """x @ kernel, in x's dtype."""
        return self._read(lambda matrix: matrix.dot(x, arithmetic))

    def grouped_dot(
        self, rows: Float[Array, "N K"], group_sizes: Int[Array, "E"], arithmetic: Arithmetic
    ) -> Float[Array, "N M"]:
        """Each row times its group's kernel, in the rows' dtype."""
        return self._read(lambda matrix: matrix.grouped_dot(rows, group_sizes, arithmetic))

    def lookup(self, tokens: Int[Array, "*N"], dtype: jnp.dtype) -> Float[Array, "*N K"]:
        """Rows of a table."""
        return self._read(lambda matrix: matrix.lookup(tokens, dtype))

    def logits(self, x: Float[Array, "B K"], arithmetic: Arithmetic) -> Float[Array, "B V"]:
        """x @ tableᵀ, in the dtype of the sums."""
        return self._read(lambda matrix: matrix.logits(x, arithmetic))

    def _read(self, use: Any) -> Any:
        return lax.cond(self.narrowed, lambda: use(self.narrow), lambda: use(self.wide))


@dataclass(frozen=True)
class RoundedCache:
    """`attend_cached` on a bfloat16 cache, to which keys and values come rounded; None leaves them as they are."""

    keys: Rounding | None = None
    values: Rounding | None = None
    before_rope: ModelConfig | None = None
    """The model, if its RoPE comes after keys are rounded, when they are read."""

    def __call__(self, cache: Any, q: Array, k: Array, v: Array, positions: Array, layer: Array, **how: Any) -> Any:
        if self.keys is not None:
            rounded = self.keys(k) if (of := self.before_rope) is None else _before_rope(of, self.keys, k, positions)
            k = rounded.astype(k.dtype)
        if self.values is not None:
            v = self.values(v).astype(v.dtype)
        return attend_cached(cache, q, k, v, positions, layer, **how)


def _before_rope(
    config: ModelConfig, rounding: Rounding, k: Float[Array, "B S K D"], positions: Int[Array, "B S"]
) -> Float[Array, "B S K D"]:
    cos, sin = rope_table(positions, k.shape[1], config.head_dim, config.rope_theta, config.rope_scaling)
    # 1 but for YaRN, which makes keys longer
    size = cos**2 + sin**2
    return apply_rope(rounding(apply_rope(k.astype(jnp.float32), (cos / size, -sin / size))), (cos, sin))


@partial(jax.jit, static_argnums=0)
def smoothed(config: ModelConfig, params: Params, largest: Mapping[str, Float[Array, "L K"]]) -> Params:
    """SmoothQuant (arXiv 2211.10438), α = .5: the same function, in which inputs and weights are of like sizes.

    What enters a kernel is divided by a number for each channel, and the kernel is multiplied by it. What is divided is
    the norm before q, k, v and before gate, up, and the kernel of up before down; o and the head stay as they are.

    Args:
      config: a dense architecture.
      params: float32 masters.
      largest: of what enters "q_proj", "gate_proj" and "down_proj", the largest magnitude in each layer and channel.
    """
    layers = dict(params["layers"])
    for source, kernels in (
        ("input_layernorm", ("q_proj", "k_proj", "v_proj")),
        ("post_attention_layernorm", ("gate_proj", "up_proj")),
        ("up_proj", ("down_proj",)),
    ):
        of_weights = jnp.max(jnp.stack([jnp.max(jnp.abs(layers[name]), axis=-1) for name in kernels]), axis=0)
        of_inputs = largest[kernels[0]]
        held = (of_inputs > 0) & (of_weights > 0)
        factor = jnp.where(held, jnp.sqrt(of_inputs / jnp.where(held, of_weights, 1)), 1)
        layers |= {name: layers[name] * factor[..., None] for name in kernels}
        layers[source] = layers[source] / (factor[:, None] if source == "up_proj" else factor)
    return {**params, "layers": layers}
