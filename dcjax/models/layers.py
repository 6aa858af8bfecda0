"""The maths of one layer, as pure functions shared by the training forward and the serving engine.

Matrix products and attention are passed in, so that a quantised engine runs the same layer with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dcjax.models.config import ModelConfig
from dcjax.types import Array

Dot = Callable[[Array, Any], Array]
"""(x [..., K], kernel of K × N) -> [..., N] in x's dtype. A kernel is an array, or what an engine's dot reads."""

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q [B, S, H, D], k [B, S, K, D], v [B, S, K, D]) -> (context [B, S, H, D], cache or None)."""

Rope = tuple[Array, Array]
"""cos and sin, float32 [B, S, 1, D / 2]."""


def dense(x: Float[Array, "... K"], kernel: Float[Array, "K N"]) -> Float[Array, "... N"]:
    """x @ kernel in x's dtype."""
    return x @ kernel.astype(x.dtype)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean x² + eps) · scale; statistics in float32, result in x's dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def rope_table(positions: Int[Array, "B S"], head_dim: int, theta: float) -> Rope:
    """Rotary angles of each position: position · theta^(-2i / head_dim) for pair i."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B S H D"], rope: Rope) -> Float[Array, "B S H D"]:
    """Rotates pairs (x_i, x_{i + D/2}), Qwen's half-split layout; float32 inside, result in x's dtype."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal_mask(attention_mask: Bool[Array, "B S"]) -> Bool[Array, "B 1 S S"]:
    """True where a query may look: not ahead, and not at padding."""
    length = attention_mask.shape[1]
    return jnp.tril(jnp.ones((length, length), bool))[None, None] & attention_mask[:, None, None, :]


def attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Bool[Array, "B 1 S S"],
) -> Float[Array, "B S H D"]:
    """Softmax attention of H query heads on K key-value heads; rows that may look nowhere come back finite."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


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
