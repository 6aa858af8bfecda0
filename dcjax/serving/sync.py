"""From the trainer's float32 masters to serving params, in one compiled program."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from dcjax.models import ModelConfig, abstract_params, logical_axes
from dcjax.models.transformer import layer_params
from dcjax.serving.quantize import (
    Format,
    PackedMatrix,
    QuantizedMatrix,
    kept_wide,
    quantize_kernel,
    quantize_table,
    role_of,
)
from dcjax.types import Array, Params


@flax.struct.dataclass
class ServingParams:
    """What `Qwen3Engine` decodes with: weights in the serving format, layers unstacked, and their version."""

    weights: Params
    version: Int[Array, ""]


def make_sync(
    config: ModelConfig,
    format: Format,
    sharding: Any = None,
    *,
    keep: Sequence[str] = (),
    weight_noise: float = 0.0,
) -> Callable[[Params, int], ServingParams]:
    """A jitted (masters, version) -> ServingParams.

    Everything is quantised from the float32 masters, never from a rounded copy. Nothing is donated and no output shares
    a buffer with the masters, so the train step may donate them afterwards.

    Args:
      config: the architecture.
      format: the serving format.
      sharding: where the serving params go, one sharding for all or a tree of them (`served_axes`); the masters'
        default device where None.
      keep: patterns (`fnmatch`) of names of kernels and tables that stay in the activations' dtype.
      weight_noise: a controlled mismatch: normal noise added to kernels and tables before anything else, its standard
        deviation in units of each one's root mean square; other noise in each version.

    Raises:
      ValueError: a pattern that matches nothing, a noise that is not a size, or, from the function returned, a
        parameter that no rule knows.
    """
    if not 0 <= weight_noise < math.inf:
        raise ValueError(f"weight_noise is {weight_noise}; it must be a finite number of at least 0")
    kept = kept_wide(config, keep)

    def convert(path, leaf, version):
        name, layer = path[-1].key, path[1].idx if len(path) > 1 else 0
        role = role_of(name)
        if role == "router":
            # the choice of experts is float32 in every format
            return jnp.array(leaf, jnp.float32, copy=True)
        if role != "wide" and weight_noise:
            leaf = leaf + weight_noise * _unit_noise(leaf, version, name, layer)
        if role == "wide" or format.weights is None or name in kept:
            # `copy`: casting float32 to float32 changes nothing, and the train step donates the masters' buffers
            return jnp.array(leaf, format.activations, copy=True)
        return (quantize_table if role == "table" else quantize_kernel)(leaf, format)

    def sync(params: Params, version) -> ServingParams:
        kinds = config.sparse_layers
        unstacked = tuple(layer_params(kinds, params["layers"], layer) for layer in range(config.num_layers))
        weights = jax.tree_util.tree_map_with_path(
            lambda path, leaf: convert(path, leaf, version), {**params, "layers": unstacked}
        )
        return ServingParams(weights=weights, version=jnp.asarray(version, jnp.int32))

    return jax.jit(sync, out_shardings=sharding)


def _unit_noise(leaf: Float[Array, "*shape"], version, name: str, layer: int) -> Float[Array, "*shape"]:
    """Normal noise of the leaf's own root mean square, the same whenever version, name and layer are."""
    key = jax.random.key(0)
    for part in (version, zlib.crc32(name.encode()), layer):
        key = jax.random.fold_in(key, part)
    size = jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32))))
    return size * jax.random.normal(key, leaf.shape, jnp.float32)


def served_axes(config: ModelConfig, format: Format, keep: Sequence[str] = ()) -> ServingParams:
    """The logical axes of each array of `ServingParams`, for `sharding.rules.shardings`: those of the master it is of.

    A scale lacks the contracted axis, or in int4 has it in groups. Errors as of `make_sync`.
    """
    named = logical_axes(config)
    served: Any = jax.eval_shape(make_sync(config, format, keep=keep), abstract_params(config), 0)

    def axes(path, leaf: Any) -> Any:
        name = path[-1].key
        logical = named[name] if name in named else PartitionSpec(*named["layers"][name][1:])
        if not isinstance(leaf, QuantizedMatrix | PackedMatrix):
            return logical
        contracted = len(logical) - (1 if role_of(name) == "table" else 2)
        per_channel = PartitionSpec(*(axis for place, axis in enumerate(logical) if place != contracted))
        scale = logical if isinstance(leaf, PackedMatrix) else per_channel
        return jax.tree.unflatten(jax.tree.structure(leaf), [logical, scale])

    weights = jax.tree_util.tree_map_with_path(
        axes, served.weights, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix | PackedMatrix)
    )
    return dataclasses.replace(served, weights=weights, version=PartitionSpec())


class StoredParameter(NamedTuple):
    """What one of the trainer's parameters is to the engine, all layers that have it together."""

    name: str
    shape: tuple[int, ...]
    # int4, or a dtype
    stored: str
    # scales included
    bytes: int
    float32_bytes: int
    quantized: bool


def stored_parameters(config: ModelConfig, format: Format, keep: Sequence[str] = ()) -> list[StoredParameter]:
    """How each parameter is stored and in how many bytes, from abstract shapes; errors as of `make_sync`."""
    masters = abstract_params(config)
    served = jax.eval_shape(make_sync(config, format, keep=keep), masters, 0).weights
    outer = {name: (leaf, [served[name]]) for name, leaf in masters.items() if name != "layers"}
    layered = {
        name: (leaf, [layer[name] for layer in served["layers"] if name in layer])
        for name, leaf in masters["layers"].items()
    }
    return [_stored(name, leaf.shape, parts) for name, (leaf, parts) in sorted((outer | layered).items())]


def _stored(name: str, shape: tuple[int, ...], parts: list) -> StoredParameter:
    first = parts[0]
    quantized = isinstance(first, QuantizedMatrix | PackedMatrix)
    return StoredParameter(
        name=name,
        shape=shape,
        stored="int4" if isinstance(first, PackedMatrix) else (first.values if quantized else first).dtype.name,
        bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts)),
        float32_bytes=4 * math.prod(shape),
        quantized=quantized,
    )
