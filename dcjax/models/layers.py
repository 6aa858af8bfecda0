"""The maths of one layer, as pure functions shared by the training forward and the serving engine.

Matrix products and attention are passed in, so that a quantised engine runs the same layer with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from dcjax.models.config import ModelConfig
from dcjax.types import Array

Dot = Callable[[Array, Any], Array]
"""(x [..., K], kernel of K × N) -> [..., N] in x's dtype. A kernel is an array, or what an engine's dot reads."""

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q [B, S, H, D], k [B, S, K, D], v [B, S, K, D]) -> (context [B, S, H, D], cache or None)."""

Rope = tuple[Array, Array]
"""cos and sin, float32 [B, S, 1, D / 2]."""


def dense(x: Float[Array, "... K"], kernel: Float[Array, "K N"]) -> Float[Array, "... N"]:
    """x @ kernel in x's dtype, as one product of two matrices."""
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[-1])


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean x² + eps) · scale; statistics in float32, result in x's dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def rope_table(positions: Int[Array, "B S"], length: int, head_dim: int, theta: float) -> Rope:
    """Rotary angles of each position below `length`: position · theta^(-2i / head_dim) for pair i.

    Sines and cosines are taken of `length` positions once and looked up, not taken again wherever they are used.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    return jnp.cos(angles)[positions][:, :, None], jnp.sin(angles)[positions][:, :, None]


def apply_rope(x: Float[Array, "B S H D"], rope: Rope) -> Float[Array, "B S H D"]:
    """Rotates pairs (x_i, x_{i + D/2}), Qwen's half-split layout; float32 inside, result in x's dtype."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal_mask(attention_mask: Bool[Array, "B S"]) -> Bool[Array, "B 1 S S"]:
    """True where a query may look: not ahead, and not at padding."""
    length = attention_mask.shape[1]
    return jnp.tril(jnp.ones((length, length), bool))[None, None] & attention_mask[:, None, None, :]


def attend_grouped(
    q: Float[Array, "B S H D"],
    k: Shaped[Array, "B K C D"],
    v: Shaped[Array, "B K C D"],
    mask: Bool[Array, "B 1 #G #S C"],
    k_scale: Float[Array, "B K C"] | None = None,
    v_scale: Float[Array, "B K C"] | None = None,
) -> Float[Array, "B S H D"]:
    """softmax(q kᵀ / √D) v, the H / K query heads of a key-value head merged into the rows of one product.

    Scores and softmax are float32, products of q's dtype. An int8 k or v comes with a scale per token, which multiplies
    scores and weights, so that the integers are never widened to a second copy of a cache.
    """
    batch, length, _, head_dim = q.shape
    kv_heads, context = k.shape[1:3]
    rows = (
        q.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    )
    scores = jnp.einsum("bkrd,bkcd->bkrc", rows, k.astype(q.dtype), preferred_element_type=jnp.float32) * head_dim**-0.5
    if k_scale is not None:
        scores *= k_scale[:, :, None]
    grouped = scores.reshape(batch, kv_heads, -1, length, context)
    weights = jax.nn.softmax(jnp.where(mask, grouped, jnp.finfo(jnp.float32).min), axis=-1).reshape(scores.shape)
    if v_scale is not None:
        weights *= v_scale[:, :, None]
    attended = jnp.einsum("bkrc,bkcd->bkrd", weights.astype(q.dtype), v.astype(q.dtype))
    return attended.reshape(batch, kv_heads, -1, length, head_dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Bool[Array, "B 1 S S"],
) -> Float[Array, "B S H D"]:
    """Softmax attention of H query heads on K key-value heads; rows that may look nowhere come back finite."""
    return attend_grouped(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, :, None])


def block(
    config: ModelConfig,
    params: Mapping[str, Any],
    x: Float[Array, "B S E"],
    rope: Rope,
    attend: Attend,
    dot: Dot = dense,
) -> tuple[Float[Array, "B S E"], Any]:
    """One Qwen3 decoder layer: x + attention(norm x), then + SwiGLU(norm x); and the cache that `attend` returned."""
    batch, length, _ = x.shape
    normed = rms_norm(x, params["input_layernorm"], config.rms_norm_eps)

    def heads(name: str) -> Array:
        return dot(normed, params[name]).reshape(batch, length, -1, config.head_dim)

    q = apply_rope(rms_norm(heads("q_proj"), params["q_norm"], config.rms_norm_eps), rope)
    k = apply_rope(rms_norm(heads("k_proj"), params["k_norm"], config.rms_norm_eps), rope)
    context, cache = attend(q, k, heads("v_proj"))
    x = x + dot(context.reshape(batch, length, -1), params["o_proj"])
    normed = rms_norm(x, params["post_attention_layernorm"], config.rms_norm_eps)
    gated = jax.nn.silu(dot(normed, params["gate_proj"])) * dot(normed, params["up_proj"])
    return x + dot(gated, params["down_proj"]), cache
