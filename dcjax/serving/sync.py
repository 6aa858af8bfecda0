"""From the trainer's float32 masters to serving params, in one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Int

from dcjax.models import ModelConfig
from dcjax.models.transformer import layer_params
from dcjax.serving.quantize import FormatName, formats, quantize_kernel, quantize_table
from dcjax.types import Array, Params


@flax.struct.dataclass
class ServingParams:
    """What `Qwen3Engine` decodes with: weights in the serving format, layers unstacked, and their version."""

    weights: Params
    version: Int[Array, ""]


def make_sync(
    config: ModelConfig, format: FormatName, sharding: jax.sharding.Sharding | None = None
) -> Callable[[Params, int], ServingParams]:
    """A jitted (masters, version) -> ServingParams.

    Everything is quantised from the float32 masters, never from a rounded copy. Nothing is donated and no output shares
    a buffer with the masters, so the train step may donate them afterwards.

    Args:
      config: the architecture.
      format: the serving format.
      sharding: where the serving params go; the masters' default device where None.
    """
    chosen = formats[format]
    # `copy`, because casting float32 to float32 changes nothing, and the train step donates the masters' buffers
    cast = partial(jnp.array, dtype=chosen.activations, copy=True)

    def convert(path, leaf):
        name = path[-1].key
        if name == "router":
            # the choice of experts is float32 in every format
            return jnp.array(leaf, jnp.float32, copy=True)
        if not chosen.int8_weights or leaf.ndim < 2:
            return cast(leaf)
        return quantize_table(leaf) if name in ("embed_tokens", "lm_head") else quantize_kernel(leaf)

    def sync(params: Params, version) -> ServingParams:
        kinds = config.sparse_layers
        unstacked = tuple(layer_params(kinds, params["layers"], layer) for layer in range(config.num_layers))
        weights = jax.tree_util.tree_map_with_path(convert, {**params, "layers": unstacked})
        return ServingParams(weights=weights, version=jnp.asarray(version, jnp.int32))

    return jax.jit(sync, out_shardings=sharding)
