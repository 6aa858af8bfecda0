"""The KV cache of one layer, as an argument: written in place, read by causal attention, stored wide or in 8 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from dcjax.models import layers
from dcjax.models.block import Products, block
from dcjax.models.config import ModelConfig
from dcjax.models.layout import ONE_DEVICE, RESIDUAL, Layout
from dcjax.types import Array

LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
"""What vectors are scaled to in the narrow dtypes; e4m3 has no infinity, and rounds what is larger to NaN."""


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer for B sequences of up to C tokens.

    In int8 and fp8, each token's head vector has its own scale: value ≈ narrow · scale.
    """

    # [B, K, C, D]
    k: jax.Array
    v: jax.Array
    # float32 [B, K, C], None where the cache is wide
    k_scale: jax.Array | None
    v_scale: jax.Array | None


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> LayerCache:
    """An empty cache; int8 and float8_e4m3fn add the scales."""
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    scale = jnp.zeros(shape[:-1], jnp.float32) if dtype in LARGEST else None
    return LayerCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), k_scale=scale, v_scale=scale)


def quantize_rows(x: Float[Array, "... D"], dtype: jnp.dtype) -> tuple[Shaped[Array, "... D"], Float[Array, "..."]]:
    """Symmetric int8 or e4m3 of each vector along the last axis, with its float32 scale: x ≈ narrow · scale.

    The largest magnitude becomes 127 or 448. A vector whose scale is no normal float32, such as zero, becomes zero.
    """
    wide, largest = x.astype(jnp.float32), LARGEST[dtype]
    peak = jnp.max(jnp.abs(wide), axis=-1)
    scale, tiny = peak / largest, jnp.finfo(jnp.float32).tiny
    inverse = jnp.where(scale >= tiny, largest / jnp.maximum(peak, tiny), 0.0)
    scaled = wide * inverse[..., None]
    return (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype), scale


def write(
    cache: LayerCache, k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], positions: Int[Array, "B S"]
) -> LayerCache:
    """Stores S tokens a sequence at their positions (tokens beyond the capacity are dropped)."""
    batch, _, kv_heads, _ = k.shape
    at = (jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None], positions[:, None])

    def put(held: jax.Array, new: Array) -> jax.Array:
        return held.at[at].set(new.swapaxes(1, 2).astype(held.dtype))

    if cache.k_scale is None or cache.v_scale is None:
        return dataclasses.replace(cache, k=put(cache.k, k), v=put(cache.v, v))
    (k, k_scale), (v, v_scale) = quantize_rows(k, cache.k.dtype), quantize_rows(v, cache.v.dtype)
    return LayerCache(put(cache.k, k), put(cache.v, v), put(cache.k_scale, k_scale), put(cache.v_scale, v_scale))


def attend(cache: LayerCache, q: Float[Array, "B S H D"], positions: Int[Array, "B S"]) -> Float[Array, "B S H D"]:
    """Softmax attention of queries at `positions` on the cached tokens up to and including their own."""
    visible = jnp.arange(cache.k.shape[2]) <= positions[:, None, None, :, None]
    return layers.attend_grouped(q, cache.k, cache.v, visible, cache.k_scale, cache.v_scale)


CachedAttention = Callable[[LayerCache, Array, Array, Array, Array], tuple[Array, LayerCache]]
"""`attend_cached`, or what computes the same."""


def attend_cached(
    cache: LayerCache,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    positions: Int[Array, "B S"],
) -> tuple[Float[Array, "B S H D"], LayerCache]:
    """`attend` after `write`, and what was written to."""
    written = write(cache, k, v, positions)
    return attend(written, q, positions), written


class Decoded(NamedTuple):
    """What tokens leave behind on their way through the layers."""

    # normed
    hidden: Float[Array, "B S E"]
    caches: tuple[LayerCache, ...]
    # what the M sparse layers chose; None without experts
    experts: Int[Array, "M B S k"] | None
    # the residual stream behind each of the L layers
    residuals: tuple[Float[Array, "B S E"], ...]


def forward_cached(
    config: ModelConfig,
    params,
    x: Float[Array, "B S E"],
    positions: Int[Array, "B S"],
    caches: tuple[LayerCache, ...],
    products: Products,
    choose: Callable[[int, Float[Array, "B S N"]], Int[Array, "B S k"]] | None = None,
    layout: Layout = ONE_DEVICE,
    attention: CachedAttention = attend_cached,
) -> Decoded:
    """Embedded tokens through all layers against their caches: prefill with S tokens, decode with one.

    `params` are unstacked: `params["layers"]` is a sequence of one mapping a layer. `choose` takes a layer's number and
    its router's probabilities, and returns the experts; the most probable ones where absent. `layout` and `attention`
    say how devices share the work.
    """
    x = layout.constrain(x, RESIDUAL)
    rope = layers.rope_table(positions, caches[0].k.shape[2], config.head_dim, config.rope_theta)
    filled, chosen, residuals = [], [], []
    for number, (layer, cache) in enumerate(zip(params["layers"], caches, strict=True)):

        def attend_here(q, k, v, cache=cache):
            return attention(cache, q, k, v, positions)

        experts = None if choose is None else partial(choose, number)
        x, cache, routing = block(config, layer, x, rope, attend_here, products, experts, layout)
        filled.append(cache)
        residuals.append(x)
        chosen += [] if routing is None else [routing.experts]
    hidden = layers.rms_norm(x, params["norm"], config.rms_norm_eps)
    return Decoded(hidden, tuple(filled), jnp.stack(chosen) if chosen else None, tuple(residuals))
