"""What enters the products of a model in float32: how far the largest channel stands out, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from laboratory import Text  # pyrefly: ignore[missing-import]

from dcjax.models import ModelConfig
from dcjax.models.block import block, training_products
from dcjax.models.cache import attend_cached, init_cache
from dcjax.models.layers import FLOAT32, rms_norm, rope_table
from dcjax.models.parameters import layer_params
from dcjax.tools.probe.gaps import visible
from dcjax.types import Array, Params

WATCHED = {"q_proj": "q, k, v", "o_proj": "o", "gate_proj": "gate, up", "down_proj": "down"}
"""The kernels whose inputs are looked at, and what has the same input."""
WORST = 3
"""Tokens that are named of each product in each layer."""


class Inputs(NamedTuple):
    """What enters a product in float32."""

    # the largest magnitude of each token over its root mean square, and the channel that has it
    ratio: Float[Array, "B S"]
    channel: Int[Array, "B S"]
    # the largest magnitude of each channel over the tokens that are seen
    largest: Float[Array, "K"]


def watch(config: ModelConfig, params: Params, text: Text) -> dict[str, list[Inputs]]:
    """What enters the WATCHED products of each layer, in their order, and the head."""
    x, seen, found = params["embed_tokens"][text.tokens], text.seen(), {}
    for number in range(config.num_layers):
        x, entered = _watched(config, layer_params(config, params["layers"], number), x, seen)
        for name, inputs in entered.items():
            found.setdefault(name, []).append(inputs)
    return found | {"head": [_inputs(rms_norm(x, params["norm"], config.rms_norm_eps), seen)]}


@partial(jax.jit, static_argnums=0)
def _watched(
    config: ModelConfig, weights: Params, x: Float[Array, "B S E"], seen: Bool[Array, "B S"]
) -> tuple[Float[Array, "B S E"], dict[str, Inputs]]:
    """The residual stream after a layer, and what entered its products."""
    names, found = {id(kernel): name for name, kernel in weights.items()}, {}
    trained = training_products(config.precision)
    batch, length = seen.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    rope = rope_table(positions, length, config.head_dim, config.rope_theta, config.rope_scaling)
    cache = init_cache(config, batch, length, FLOAT32)

    def dot(x: Array, kernel: Array) -> Array:
        if (name := names[id(kernel)]) in WATCHED:
            found[name] = _inputs(x, seen)
        return trained.dot(x, kernel)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        return attend_cached(cache, q, k, v, positions, float32=config.precision.float32)

    x, _, _ = block(config, weights, x, rope, attend, trained._replace(dot=dot))
    return x, found


def _inputs(x: Float[Array, "B S K"], seen: Bool[Array, "B S"]) -> Inputs:
    size = jnp.abs(x)
    return Inputs(
        ratio=jnp.max(size, axis=-1) / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1)),
        channel=jnp.argmax(size, axis=-1),
        largest=jnp.max(jnp.where(seen[..., None], size, 0), axis=(0, 1)),
    )


def outliers(
    entered: Mapping[str, Sequence[Inputs]], text: Text, decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:
    """A row for each product and layer: how far the largest channel stands out, which it is, and where it is worst."""
    seen = text.seen()

    def row(product: str, layer: int, inputs: Inputs) -> dict[str, Any]:
        ratio, channel = np.where(seen, inputs.ratio, 0), np.asarray(inputs.channel)
        channels, counts = np.unique(channel[seen], return_counts=True)
        return {
            "product": product,
            "layer": layer,
            "width": len(inputs.largest),
            "mean": float(ratio[seen].mean()),
            "first_token": float(ratio[:, 0].mean()),
            # the channel that is the largest of the most tokens, and of which share of them
            "channel": int(channels[counts.argmax()]),
            "share": float(counts.max() / counts.sum()),
            "worst": _worst(ratio, channel, text, decode),
        }

    return [
        row(product, layer, jax.device_get(inputs))
        for name, product in {**WATCHED, "head": "head"}.items()
        for layer, inputs in enumerate(entered[name])
    ]


def _worst(
    ratio: Float[np.ndarray, "B S"], channel: Int[np.ndarray, "B S"], text: Text, decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:
    """The tokens with the largest ratios, each token with each channel once."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for place in np.argsort(-ratio, axis=None, kind="stable"):
        at = np.unravel_index(place, ratio.shape)
        token, largest = int(text.tokens[at]), int(channel[at])
        where = {"position": int(at[1]), "token": visible(decode([token]))}
        found.setdefault((token, largest), {"ratio": float(ratio[at]), "channel": largest, **where})
        if len(found) == WORST:
            break
    return list(found.values())
