"""The KV cache of one layer, as an argument: written in place, read by causal attention, stored wide or in int8."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dcjax.models import layers
from dcjax.models.block import Products, block
from dcjax.models.config import ModelConfig
from dcjax.types import Array

INT8_MAX = 127.0


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer for B sequences of up to C tokens.

    In int8, each token's head vector has its own scale: value ≈ int8 · scale.
    """

    # [B, K, C, D]
    k: jax.Array
    v: jax.Array
    # float32 [B, K, C], None unless the cache is int8
    k_scale: jax.Array | None
    v_scale: jax.Array | None


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> LayerCache:
    """An empty cache; `dtype` int8 adds the scales."""
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    scale = jnp.zeros(shape[:-1], jnp.float32) if dtype == jnp.int8 else None
    return LayerCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), k_scale=scale, v_scale=scale)


def quantize_rows(x: Float[Array, "... D"]) -> tuple[Int[Array, "... D"], Float[Array, "..."]]:
    """Symmetric int8 of each vector along the last axis, with its float32 scale: x ≈ int8 · scale.

    A zero vector gets scale 0.
    """
    wide = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(wide), axis=-1)
    inverse = jnp.where(peak > 0, INT8_MAX / jnp.maximum(peak, jnp.finfo(jnp.float32).tiny), 0.0)
    return jnp.round(wide * inverse[..., None]).astype(jnp.int8), peak / INT8_MAX


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
    (k, k_scale), (v, v_scale) = quantize_rows(k), quantize_rows(v)
    return LayerCache(put(cache.k, k), put(cache.v, v), put(cache.k_scale, k_scale), put(cache.v_scale, v_scale))


def attend(cache: LayerCache, q: Float[Array, "B S H D"], positions: Int[Array, "B S"]) -> Float[Array, "B S H D"]:
    """Softmax attention of queries at `positions` on the cached tokens up to and including their own."""
    visible = jnp.arange(cache.k.shape[2]) <= positions[:, None, None, :, None]
    return layers.attend_grouped(q, cache.k, cache.v, visible, cache.k_scale, cache.v_scale)


def forward_cached(
    config: ModelConfig,
    params,
    x: Float[Array, "B S E"],
    positions: Int[Array, "B S"],
    caches: tuple[LayerCache, ...],
    products: Products,
) -> tuple[Float[Array, "B S E"], tuple[LayerCache, ...], Int[Array, "M B S k"] | None]:
    """Embedded tokens through all layers against their caches: prefill with S tokens, decode with one.

    `params` are unstacked: `params["layers"]` is a sequence of one mapping a layer. Returns normed hidden states, the
    caches, and the experts that the M sparse layers chose.
    """
    rope = layers.rope_table(positions, caches[0].k.shape[2], config.head_dim, config.rope_theta)
    filled, chosen = [], []
    for layer, cache in zip(params["layers"], caches, strict=True):

        def attend_cached(q, k, v, cache=cache):
            written = write(cache, k, v, positions)
            return attend(written, q, positions), written

        x, cache, routing = block(config, layer, x, rope, attend_cached, products)
        filled.append(cache)
        chosen += [] if routing is None else [routing.experts]
    hidden = layers.rms_norm(x, params["norm"], config.rms_norm_eps)
    return hidden, tuple(filled), jnp.stack(chosen) if chosen else None
