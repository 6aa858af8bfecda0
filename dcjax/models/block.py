"""One decoder layer, run by the training forward and by the serving engine.

Products and attention are passed in, so that a quantised engine with a cache runs the same layer with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from dcjax.models.config import DTYPES, ModelConfig, Precision
from dcjax.models.layers import Arithmetic, Rope, apply_rope, dense, rms_norm
from dcjax.models.layout import HIDDEN, ONE_DEVICE, RESIDUAL, Layout
from dcjax.models.moe import Choice, GroupedDot, Routing, grouped_dot, moe
from dcjax.models.numerics import MASTERS, Numerics
from dcjax.types import Array

Dot = Callable[[Array, Any], Array]
"""(x [..., K], kernel of K × N) -> [..., N] in x's dtype. A kernel is an array, or an engine's form of weights."""

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q [B, S, H, D], k [B, S, K, D], v [B, S, K, D]) -> (context [B, S, H, D], cache or None)."""


class Products(NamedTuple):
    """A layer's two products: of all rows with one kernel, and of each row with the kernel of its expert."""

    dot: Dot
    grouped_dot: GroupedDot


PRODUCT = "product"
"""The name by which `jax.checkpoint` finds the results of the training products."""


def training_products(precision: Precision, numerics: Numerics = MASTERS) -> Products:
    """The products of the training forward, computed as `precision` says, of rows as `numerics` rounds them."""
    arithmetic = Arithmetic(DTYPES[precision.accumulation], precision.float32)

    def dot(x: Array, kernel: Array) -> Array:
        return checkpoint_name(dense(numerics.rows(x), kernel, arithmetic).astype(x.dtype), PRODUCT)

    def grouped(rows: Array, kernels: Array, group_sizes: Array) -> Array:
        out = grouped_dot(numerics.rows(rows), kernels, group_sizes, arithmetic)
        return checkpoint_name(out.astype(rows.dtype), PRODUCT)

    return Products(dot, grouped)


def block(
    config: ModelConfig,
    params: Mapping[str, Any],
    x: Float[Array, "B S E"],
    rope: Rope,
    attend: Attend,
    products: Products,
    experts: Choice | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[Float[Array, "B S E"], Any, Routing | None]:
    """Adds attention to the residual stream, and then the SwiGLU or the experts, each of the normed stream.

    Args:
      config: the architecture.
      params: one layer's parameters; the layer has experts if they hold a router.
      x: the residual stream before the layer.
      rope: the rotary angles of the columns, as `rope_table` returns them.
      attend: the attention of the layer, which may write a cache.
      products: the products of the layer.
      experts: imposes another choice of experts than the router's.
      layout: how devices share the layer.

    Returns:
      The residual stream after the layer, the cache that `attend` returned, and the routing, which is None in a layer
      without experts.
    """
    normed = rms_norm(x, params["input_layernorm"], config.rms_norm_eps)
    context, cache = attend(*_heads(config, params, normed, rope, products.dot))
    x = layout.constrain(x + products.dot(context.reshape(*x.shape[:2], -1), params["o_proj"]), RESIDUAL)
    normed = rms_norm(x, params["post_attention_layernorm"], config.rms_norm_eps)
    if "router" in params:
        mixed, routing = moe(config, params, normed, products.grouped_dot, experts, layout.mixture)
        return layout.constrain(x + mixed, RESIDUAL), cache, routing
    gated = jax.nn.silu(products.dot(normed, params["gate_proj"])) * products.dot(normed, params["up_proj"])
    down = products.dot(layout.constrain(gated, HIDDEN), params["down_proj"])
    return layout.constrain(x + down, RESIDUAL), cache, None


def _heads(config: ModelConfig, params: Mapping[str, Any], normed: Array, rope: Rope, dot: Dot):
    """Queries [B, S, H, D], keys and values [B, S, K, D].

    Qwen3 normalises queries and keys, Qwen2 adds biases, and Llama does neither.
    """

    def project(name: str) -> Array:
        projected = dot(normed, params[f"{name}_proj"])
        if config.family == "qwen2":
            projected += params[f"{name}_bias"].astype(projected.dtype)
        return projected.reshape(*normed.shape[:2], -1, config.head_dim)

    def rotate(name: str) -> Array:
        heads = project(name)
        if config.family == "qwen3":
            heads = rms_norm(heads, params[f"{name}_norm"], config.rms_norm_eps)
        return apply_rope(heads, rope)

    return rotate("q"), rotate("k"), project("v")
