"""Converts the trainer's float32 masters into serving params, in compiled programs."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from dcjax.keys import make_key
from dcjax.models import ModelConfig, abstract_params
from dcjax.models.parameters import Parameter, head_name, parameter_named, parameters, take_layer
from dcjax.serving.formats import Format, stored_axes, wide_format
from dcjax.serving.formats.served import kept_wide
from dcjax.serving.parallel import COPIES, named
from dcjax.sharding.rules import RULES, SERVING_RULES, Rules, shardings
from dcjax.sharding.transfer import across
from dcjax.types import Array, Params


@flax.struct.dataclass
class ServingParams:
    """What `Qwen3Engine` decodes with: weights in the serving format, one element per layer, and their version.

    If an engine loops over its layers, they are stacked by `models.cache.stack_layers`.
    """

    weights: Params
    version: Int[Array, ""]


@dataclass(frozen=True)
class Conversion:
    """What a sync makes of each parameter of the trainer's.

    Raises:
      ValueError: a pattern of `keep` matches nothing, or the noise is negative or not finite.
    """

    config: ModelConfig
    format: Format
    # as of `make_sync`
    keep: tuple[str, ...] = ()
    weight_noise: float = 0.0
    rounded_masters: bool = False

    def __post_init__(self):
        if not 0 <= self.weight_noise < math.inf:
            raise ValueError(f"weight_noise is {self.weight_noise}; it must be a finite number of at least 0")
        kept_wide(self.config, self.keep)

    def __call__(self, name: str, layer: int | Array, leaf: Array, version: int | Array) -> Any:
        """A parameter as it is served, from its float32 master in one layer; `layer` is 0 outside of layers.

        Raises:
          ValueError: the model has no parameter of this name.
        """
        role, format = parameter_named(self.config, name).role, self.format
        if role == "router":
            # routers are float32 in every format
            return jnp.array(leaf, jnp.float32, copy=True)
        if role == "wide":
            # `copy`, because casting float32 to float32 returns the master's own buffer, which the train step donates
            return jnp.array(leaf, format.activations, copy=True)
        if self.rounded_masters:
            # to the bits of a bfloat16; XLA may leave out a cast there and back
            leaf = lax.reduce_precision(leaf, exponent_bits=8, mantissa_bits=7)
        if self.weight_noise:
            leaf = leaf + self.weight_noise * _unit_noise(leaf, version, name, layer)
        stores = wide_format(format.activations) if name in kept_wide(self.config, self.keep) else format
        return (stores.store_table if role == "table" else stores.store_kernel)(leaf)


@dataclass(frozen=True)
class Sync:
    """(masters, version) -> ServingParams: one compiled program for a layer of each kind, and one for the rest.

    Layers are converted one after another, so that only one layer's intermediate arrays exist at a time.
    """

    # what is made of each parameter
    conversion: Conversion
    # whether each layer has experts
    kinds: tuple[bool, ...]
    # (masters without layers, version) -> ServingParams without layers
    outer: Any
    # by kind: (stacked masters, number of the layer, its rank among those of its kind, version) -> the layer's weights
    layer: Mapping[bool, Any]

    def __call__(self, params: Params, version: int | Int[Array, ""]) -> ServingParams:
        outer = self.outer({name: leaf for name, leaf in params.items() if name != "layers"}, version)
        layers = tuple(
            self.layer[kind](params["layers"], number, self.kinds[:number].count(kind), version)
            for number, kind in enumerate(self.kinds)
        )
        return dataclasses.replace(outer, weights={**outer.weights, "layers": layers})

    def compile(self, params: Params) -> None:
        """Compiles its programs for masters of these shapes, dtypes and shardings; only if they are served in place."""
        for _, lower, _ in self.lowered(params):
            lower().compile()

    def lowered(self, params: Params) -> Iterator[tuple[str, Callable[[], Any], int]]:
        """The name of each program, what lowers it for masters of these shapes, and how often a sync runs it."""
        outer = {name: leaf for name, leaf in params.items() if name != "layers"}
        yield "sync", lambda: self.outer.lower(outer, 0), 1
        for kind, program in self.layer.items():
            name = "sync of a layer" + (" with experts" if kind else "")
            yield name, partial(program.lower, params["layers"], 0, 0, 0), self.kinds.count(kind)


def make_sync(
    config: ModelConfig,
    format: Format,
    serving: Mesh | None = None,
    training: Mesh | None = None,
    *,
    keep: Sequence[str] = (),
    weight_noise: float = 0.0,
    rounded_masters: bool = False,
) -> Sync:
    """Makes the function that casts and quantises the trainer's masters, and moves them to where they are served.

    Equal arguments give the same `Sync`, so that engines that are alike share its programs.

    Everything is quantised from the float32 masters, unless a rounded copy is asked for: on the masters' devices, and
    only the result is transferred. Nothing is donated and no output shares a buffer with the masters, so the train step
    may donate them afterwards.

    Args:
      config: the architecture.
      format: the serving format.
      serving: the mesh of the serving params; None is JAX's default device.
      training: the mesh of the masters, if they are on one. If its devices are not those of the serving mesh in the
        same order, a transfer follows each program.
      keep: patterns (`fnmatch`) of names of kernels and tables that stay in the activations' dtype.
      weight_noise: a controlled mismatch: normal noise added to kernels and tables before anything else, its standard
        deviation in units of each one's root mean square; other noise in each version.
      rounded_masters: a controlled mismatch: kernels and tables are taken from a copy that is rounded to bfloat16.

    Raises:
      ValueError: a pattern matches nothing, the noise is negative or not finite, or the serving mesh does not divide
        the model. The function returned raises it for a parameter that the model does not have.
    """
    return _make_sync(Conversion(config, format, tuple(keep), weight_noise, rounded_masters), serving, training)


@cache
def _make_sync(convert: Conversion, serving: Mesh | None, training: Mesh | None) -> Sync:
    config, format, keep = convert.config, convert.format, convert.keep
    kinds = config.sparse_layers

    def sync_outer(params: Params, version: Array) -> ServingParams:
        weights = {name: convert(name, 0, leaf, version) for name, leaf in params.items()}
        return ServingParams(weights, jnp.asarray(version, jnp.int32))

    def sync_layer(kind: bool, stacked: Params, number: Array, rank: Array, version: Array) -> Params:
        masters = take_layer(config, stacked, kind, number, rank)
        return {name: convert(name, number, leaf, version) for name, leaf in masters.items()}

    def outside(served: ServingParams) -> ServingParams:
        return dataclasses.replace(served, weights={n: leaf for n, leaf in served.weights.items() if n != "layers"})

    def of_kind(kind: bool) -> Callable[[ServingParams], Params]:
        return lambda served: served.weights["layers"][kinds.index(kind)]

    compiled = _compiler(config, format, serving, training, keep)
    return Sync(
        conversion=convert,
        kinds=kinds,
        outer=compiled(sync_outer, outside),
        layer={kind: compiled(partial(sync_layer, kind), of_kind(kind)) for kind in set(kinds)},
    )


def _compiler(
    config: ModelConfig, format: Format, serving: Mesh | None, training: Mesh | None, keep: Sequence[str]
) -> Callable[[Callable[..., Any], Callable[[ServingParams], Any]], Callable[..., Any]]:
    """(conversion of masters, its part of ServingParams) -> the conversion, compiled, with results where they go."""
    if serving is None:
        return lambda convert, part: jax.jit(convert)
    on_serving = served_shardings(config, format, serving, keep)
    if training is None:
        return lambda convert, part: jax.jit(convert, out_shardings=part(on_serving))
    on_training = _fitting_shardings(config, format, training, RULES, keep)
    if list(training.devices.flat) != list(serving.devices.flat):

        def transferred(convert, part):
            quantized = jax.jit(convert, out_shardings=part(on_training))
            return lambda *arguments: across(quantized(*arguments), part(on_serving))

        return transferred
    # every device first gets a share of what its copy of the model needs, and then gathers the rest from other copies;
    # left to itself, XLA would gather everything on every device
    shared = _fitting_shardings(config, format, serving, {**SERVING_RULES, "embed": COPIES}, keep)

    def resharded(convert, part):
        def sync(*arguments):
            converted = convert(*arguments)
            for places in (on_training, shared):
                converted = lax.with_sharding_constraint(converted, part(places))
            return converted

        return jax.jit(sync, out_shardings=part(on_serving))

    return resharded


def _unit_noise(leaf: Float[Array, "*shape"], version, name: str, layer) -> Float[Array, "*shape"]:
    """Normal noise with the leaf's own root mean square, which version, name and layer determine."""
    key = make_key(0)
    for part in (version, zlib.crc32(name.encode()), layer):
        key = jax.random.fold_in(key, part)
    size = jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32))))
    return size * jax.random.normal(key, leaf.shape, jnp.float32)


def abstract_serving(config: ModelConfig, format: Format, keep: Sequence[str] = ()) -> ServingParams:
    """Shapes and dtypes of `ServingParams`; errors are those of `make_sync`.

    It is traced once for equal arguments; callers share the tree, and must not change it.
    """
    return _abstract_serving(config, format, tuple(keep))


@cache
def _abstract_serving(config: ModelConfig, format: Format, keep: tuple[str, ...]) -> Any:
    return jax.eval_shape(make_sync(config, format, keep=keep), abstract_params(config), 0)


def served_axes(config: ModelConfig, format: Format, keep: Sequence[str] = ()) -> ServingParams:
    """The logical axes of each array of `ServingParams`, for `sharding.rules.shardings`: those of its master.

    A scale lacks the contracted axis, or in int4 has it in groups. Errors are those of `make_sync`.
    """
    served: Any = abstract_serving(config, format, keep)

    def axes(name: str, stored: Any) -> Any:
        parameter = parameter_named(config, name)
        logical = PartitionSpec(*(axis for axis in parameter.stacked_axes if axis != "layers"))
        contracted = parameter.contracted_axis
        return logical if contracted is None else stored_axes(stored, logical, len(logical) + contracted)

    layers = tuple({name: axes(name, stored) for name, stored in layer.items()} for layer in served.weights["layers"])
    outer = {name: axes(name, stored) for name, stored in served.weights.items() if name != "layers"}
    return dataclasses.replace(served, weights={**outer, "layers": layers}, version=PartitionSpec())


def served_shardings(
    config: ModelConfig, format: Format, mesh: Mesh | AbstractMesh, keep: Sequence[str] = ()
) -> ServingParams:
    """The sharding of each array of `ServingParams` on a serving mesh.

    Raises:
      ValueError: the mesh does not divide an array or the heads of the cache; or as `make_sync`.
    """
    shapes = abstract_serving(config, format, keep)
    placed = shardings(mesh, served_axes(config, format, keep), SERVING_RULES)
    sizes = {"key-value heads": ((config.num_kv_heads,), named(mesh, PartitionSpec("kv_heads")))}
    for (path, leaf), place in zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(placed), strict=True):
        sizes[jax.tree_util.keystr(path, simple=True, separator=".")] = leaf.shape, place
    for what, (shape, place) in sizes.items():
        for size, axis in zip(shape, place.spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"serving.{axis} is {mesh.shape[axis]}, which does not divide the {size} of {what} {shape}; "
                    "choose one that does"
                )
    return placed


def _fitting_shardings(
    config: ModelConfig, format: Format, mesh: Mesh, rules: Rules, keep: Sequence[str]
) -> ServingParams:
    """The sharding of each array by the rules; an array that the mesh does not divide is whole on every device."""

    def fitting(leaf: Any, place: NamedSharding) -> NamedSharding:
        parts = (math.prod(mesh.shape[axis] for axis in np.atleast_1d(axes)) if axes else 1 for axes in place.spec)
        divides = all(size % count == 0 for size, count in zip(leaf.shape, parts, strict=False))
        return place if divides else NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(
        fitting, abstract_serving(config, format, keep), shardings(mesh, served_axes(config, format, keep), rules)
    )


def head_shardings(config: ModelConfig, format: Format, training: Mesh, keep: Sequence[str] = ()) -> Any:
    """The sharding of each array of the output head, as it is served, on the mesh of the masters."""
    return _fitting_shardings(config, format, training, RULES, keep).weights[head_name(config)]


class StoredParameter(NamedTuple):
    """How the engine stores one of the trainer's parameters, over all layers that have it."""

    name: str
    shape: tuple[int, ...]
    # as `Format.stored` says, or the name of a dtype
    stored: str
    # as stored, scales included
    bytes: int
    float32_bytes: int
    quantized: bool


def stored_parameters(config: ModelConfig, format: Format, keep: Sequence[str] = ()) -> list[StoredParameter]:
    """How each parameter is stored and in how many bytes, from abstract shapes; errors are those of `make_sync`."""
    served = abstract_serving(config, format, keep).weights

    def stored(parameter: Parameter) -> StoredParameter:
        name = parameter.name
        parts = [served[name]] if name in served else [layer[name] for layer in served["layers"] if name in layer]
        is_matrix = parameter.contracted_axis is not None
        return StoredParameter(
            name=name,
            shape=parameter.stacked_shape,
            stored=parts[0].format.stored if is_matrix else parts[0].dtype.name,
            bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts)),
            float32_bytes=4 * parameter.size,
            quantized=is_matrix and parts[0].format.weights is not None,
        )

    return sorted(map(stored, parameters(config)))
