"""The KV cache of a layer: written in place, read by causal attention, stored in 16 or 32 bits or quantised to 8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Shaped

from dcjax.models import layers, ragged, ragged_gpu
from dcjax.models.attention import CachedKernel
from dcjax.models.block import Products, block
from dcjax.models.config import ModelConfig
from dcjax.models.layout import ONE_DEVICE, RESIDUAL, Layout
from dcjax.models.rotation import rotate
from dcjax.types import Array

LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
"""The largest magnitude in each 8-bit dtype, to which vectors are scaled; e4m3 turns anything larger into NaN."""


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer for B sequences of up to C tokens.

    In int8 and fp8, each token's head vector has its own scale: value ≈ narrow · scale. In int8 keys are rotated first,
    and queries with them, since a few channels of keys are far larger than the others. Values have no such channels,
    and fp8 keeps small numbers beside large ones.
    """

    # [B, K, C, D]; `stack_layers` adds a leading axis of layers
    k: jax.Array
    v: jax.Array
    # float32 [B, K, C], likewise; None unless the cache is in 8 bits
    k_scale: jax.Array | None
    v_scale: jax.Array | None


Caches = tuple[LayerCache, ...] | LayerCache
"""One cache per layer, or those of all layers as `stack_layers` stacks them."""


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> LayerCache:
    """An empty cache, with scales if `dtype` is int8 or float8_e4m3fn."""
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    scale = jnp.zeros(shape[:-1], jnp.float32) if dtype in LARGEST else None
    return LayerCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), k_scale=scale, v_scale=scale)


def quantize_rows(x: Float[Array, "... D"], dtype: jnp.dtype) -> tuple[Shaped[Array, "... D"], Float[Array, "..."]]:
    """Quantises each vector along the last axis to int8 or e4m3, with a float32 scale: x ≈ narrow · scale.

    The largest magnitude becomes 127 or 448. A vector whose scale is not a normal float32, such as the
    zero vector, becomes zero.
    """
    wide, largest = x.astype(jnp.float32), LARGEST[dtype]
    peak = jnp.max(jnp.abs(wide), axis=-1)
    scale, tiny = peak / largest, jnp.finfo(jnp.float32).tiny
    inverse = jnp.where(scale >= tiny, largest / jnp.maximum(peak, tiny), 0.0)
    scaled = wide * inverse[..., None]
    return (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype), scale


def write(
    cache: LayerCache,
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    positions: Int[Array, "B S"],
    layer: Int[Array, ""] | None = None,
) -> LayerCache:
    """Stores S tokens of each sequence at their positions; tokens beyond the capacity are dropped.

    `layer` is the number of this layer in a cache that holds several.
    """
    batch, _, kv_heads, _ = k.shape
    of_layer = () if layer is None else (layer,)
    at = (*of_layer, jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None], positions[:, None])

    def put(held: jax.Array, new: Array) -> jax.Array:
        return held.at[at].set(new.swapaxes(1, 2).astype(held.dtype))

    if cache.k_scale is None or cache.v_scale is None:
        return dataclasses.replace(cache, k=put(cache.k, k), v=put(cache.v, v))
    (k, k_scale), (v, v_scale) = quantize_rows(k, cache.k.dtype), quantize_rows(v, cache.v.dtype)
    return LayerCache(put(cache.k, k), put(cache.v, v), put(cache.k_scale, k_scale), put(cache.v_scale, v_scale))


def attend(
    cache: LayerCache,
    q: Float[Array, "B S H D"],
    positions: Int[Array, "B S"],
    *,
    kernel: CachedKernel = "xla",
    float32: lax.Precision = lax.Precision.HIGHEST,
) -> Float[Array, "B S H D"]:
    """Softmax attention of queries at `positions` on the cached tokens up to and including their own.

    The ragged kernels are for a single query a sequence; several, as in prefill, are computed by XLA.
    """
    if kernel != "xla" and q.shape[1] == 1:
        attention = {"ragged_tpu": ragged, "ragged_gpu": ragged_gpu}[kernel].ragged_attention
        lengths = positions[:, 0] + 1
        return attention(q, cache.k, cache.v, lengths, cache.k_scale, cache.v_scale, float32=float32)
    visible = jnp.arange(cache.k.shape[2]) <= positions[:, None, None, :, None]
    return layers.attend_grouped(q, cache.k, cache.v, visible, cache.k_scale, cache.v_scale, float32=float32)


CachedAttention = Callable[..., tuple[Array, LayerCache]]
"""`attend_cached`, or a function that computes the same."""


def attend_cached(
    cache: LayerCache,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    positions: Int[Array, "B S"],
    layer: Int[Array, ""] | None = None,
    *,
    kernel: CachedKernel = "xla",
    float32: lax.Precision = lax.Precision.HIGHEST,
) -> tuple[Float[Array, "B S H D"], LayerCache]:
    """`write` followed by `attend`; returns the attention's result and the new cache.

    For a cache in int8 queries and keys are rotated alike, which leaves their products as they are.
    """
    if cache.k.dtype == jnp.int8:
        q, k = rotate(q).astype(q.dtype), rotate(k)
    written = write(cache, k, v, positions, layer)
    own = written if layer is None else jax.tree.map(lambda leaf: leaf[layer], written)
    return attend(own, q, positions, kernel=kernel, float32=float32), written


def stack_layers(layers: Sequence[Any]) -> Any:
    """Stacks the weights or caches of layers of one kind into a tree whose leaves have a leading axis of layers.

    `forward_cached` loops over stacked layers, so that a program's size does not grow with the depth.
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


class Decoded(NamedTuple):
    """The results of running tokens through the layers."""

    # after the last norm
    hidden: Float[Array, "B S E"]
    # stacked if the caches passed in were
    caches: Caches
    # the experts that the M sparse layers chose; None without experts
    experts: Int[Array, "M B S k"] | None
    # the residual stream after each of the L layers
    residuals: Float[Array, "L B S E"]


def forward_cached(
    config: ModelConfig,
    params,
    x: Float[Array, "B S E"],
    positions: Int[Array, "B S"],
    caches: Caches,
    products: Products,
    choose: Callable[[Any, Float[Array, "B S N"]], Int[Array, "B S k"]] | None = None,
    layout: Layout = ONE_DEVICE,
    attention: CachedAttention = attend_cached,
) -> Decoded:
    """Runs embedded tokens through all layers with their caches: S tokens in prefill, one in decoding.

    `params["layers"]` and `caches` either hold one element per layer, and the layers are unrolled, or are both stacked
    by `stack_layers`, and the layers are looped over. `choose` takes a layer's number and its router's probabilities,
    and returns the experts; if None, the most probable ones are chosen. `layout` and `attention` determine how devices
    share the work.
    """
    stacked = isinstance(caches, LayerCache)
    capacity = (caches if isinstance(caches, LayerCache) else caches[0]).k.shape[-2]
    rope = layers.rope_table(positions, capacity, config.head_dim, config.rope_theta, config.rope_scaling)

    def layer(x: Array, weights: Mapping[str, Any], cache: LayerCache, number: Any):
        def attend_here(q, k, v):
            of_layer = [number] if stacked else []
            return attention(cache, q, k, v, positions, *of_layer, float32=config.precision.float32)

        experts = None if choose is None else partial(choose, number)
        x, cache, routing = block(config, weights, x, rope, attend_here, products, experts, layout)
        return x, cache, None if routing is None else routing.experts

    x = layout.constrain(x, RESIDUAL)
    if isinstance(caches, LayerCache):
        x, caches, experts, residuals = _looped(layer, x, params["layers"], caches)
    else:
        x, caches, experts, residuals = _unrolled(layer, x, params["layers"], caches)
    return Decoded(layers.rms_norm(x, params["norm"], config.rms_norm_eps), caches, experts, residuals)


def _unrolled(layer: Callable, x: Array, weights: Sequence[Any], caches: tuple[LayerCache, ...]):
    filled, chosen, residuals = [], [], []
    for number, (own, cache) in enumerate(zip(weights, caches, strict=True)):
        x, cache, experts = layer(x, own, cache, number)
        filled.append(cache)
        residuals.append(x)
        chosen += [] if experts is None else [experts]
    return x, tuple(filled), jnp.stack(chosen) if chosen else None, jnp.stack(residuals)


def _looped(layer: Callable, x: Array, weights: Any, caches: LayerCache):
    def turn(carry, inputs):
        # the caches of all layers are carried, so that each is written in place
        x, caches, experts = layer(carry[0], inputs[0], carry[1], inputs[1])
        return (x, caches), (experts, x)

    (x, caches), (experts, residuals) = lax.scan(turn, (x, caches), (weights, jnp.arange(len(caches.k))))
    return x, caches, experts, residuals
