"""Compares weights as they are served with what their masters give, by a few numbers of each matrix.

A fingerprint of a matrix W [K, N] is x W zᵀ for rows x and z of random signs, the same in every layer and on both
sides: each is a sum over all of W's elements, with the variance ‖W‖², and that of a difference has the variance ‖ΔW‖².
So the mean square of the differences of two fingerprints is an estimate of ‖ΔW‖², whatever W is stored in, and however
devices share it; only these numbers leave them. Products are the format's own, so that it sees what decoding does.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Float

from dcjax.models import ModelConfig
from dcjax.models.parameters import Parameter, parameter_named, parameters
from dcjax.serving.decoder import NO_EXCESS_PRECISION
from dcjax.serving.formats.served import arithmetic
from dcjax.serving.sync import Conversion, ServingParams
from dcjax.sharding.rules import replicated
from dcjax.types import Array, Params

ROWS = 4
"""Random rows on each side of a matrix, whose fingerprint has the square of so many numbers."""


class Deviation(NamedTuple):
    """How far apart one parameter is in one layer, or one of its experts there."""

    name: str
    # None outside the layers
    layer: int | None
    # None where experts do not have slices of their own
    expert: int | None
    # ‖ΔW‖ / ‖W‖, estimated
    size: float

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return self.name + layer + ("" if self.expert is None else f", expert {self.expert}")


class Deviations(NamedTuple):
    """Those that count of all that were compared."""

    # the largest between what is served and what the masters give in the same format
    served: Deviation
    # the largest between what the masters give in the format and the masters themselves, over all layers at once
    format: Deviation


@dataclass(frozen=True)
class Comparison:
    """(masters, what is served, version) -> how far apart they are; equal ones share their programs.

    Args:
      conversion: what a sync makes of a parameter.
      serving: the mesh of what is served.
      training: the mesh of the masters.
    """

    conversion: Conversion
    serving: Mesh
    training: Mesh

    def __call__(self, masters: Params, served: ServingParams, version: int) -> Deviations:
        """Compares all parameters; the version decides on what noise is added on purpose."""
        given = _of_masters(self.conversion, self.training)(masters, version)
        outer, layers = _of_outer(self.conversion.config, self.serving), served.weights["layers"]
        found = outer({name: leaf for name, leaf in served.weights.items() if name != "layers"})
        if isinstance(layers, tuple):
            of_layer = _of_layer(self.conversion.config, self.serving)
            by_layer = [of_layer(layer) for layer in layers]
        else:
            by_layer = _of_stacked(self.conversion.config, self.serving)(layers)
        given, found, by_layer = jax.device_get((given, found, by_layer))
        return _largest(self.conversion.config, given, found, by_layer)

    def compile(self, masters: Params, served: ServingParams) -> None:
        """Compiles its programs for abstract masters and what is served of them."""
        config, layers = self.conversion.config, served.weights["layers"]
        _of_masters(self.conversion, self.training).lower(masters, 0).compile()
        outer = {name: leaf for name, leaf in served.weights.items() if name != "layers"}
        _of_outer(config, self.serving).lower(outer).compile()
        if not isinstance(layers, tuple):
            _of_stacked(config, self.serving).lower(layers).compile()
            return
        for kind in set(config.sparse_layers):
            _of_layer(config, self.serving).lower(layers[config.sparse_layers.index(kind)]).compile()


class _Given(NamedTuple):
    """Of one parameter's masters, with leading axes for its layers and experts."""

    # the fingerprint of what a sync makes of them
    converted: Any
    # and their own
    own: Any
    # ‖W‖
    norm: Any


# --- programs ---


def _program(function: Any, mesh: Mesh) -> Any:
    return jax.jit(function, out_shardings=replicated(mesh), compiler_options=NO_EXCESS_PRECISION)


@cache
def _of_masters(conversion: Conversion, mesh: Mesh) -> Any:
    """(masters, version) -> a `_Given` by name."""
    config = conversion.config

    def of_leaf(parameter: Parameter, leaf: Array, layer: Any, version: Any) -> _Given:
        converted = conversion(parameter.name, layer, leaf, version)
        axes = tuple(range(leaf.ndim - len(parameter.shape), leaf.ndim))
        norm = jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes))
        return _Given(_fingerprint(config, parameter, converted), _own_fingerprint(parameter, leaf), norm)

    def of_all(masters: Params, version: Array) -> dict[str, _Given]:
        given = {}
        for parameter in parameters(config):
            if parameter.layers is None:
                given[parameter.name] = of_leaf(parameter, masters[parameter.name], 0, version)
                continue
            # one layer after another, so that only one is converted at a time
            stacked = jnp.array(parameter.layers), masters["layers"][parameter.name]
            given[parameter.name] = lax.map(lambda of, p=parameter: of_leaf(p, of[1], of[0], version), stacked)
        return given

    return _program(of_all, mesh)


def _of_weights(config: ModelConfig, weights: Mapping[str, Any]) -> dict[str, Array]:
    return {name: _fingerprint(config, parameter_named(config, name), leaf) for name, leaf in weights.items()}


@cache
def _of_outer(config: ModelConfig, mesh: Mesh) -> Any:
    return _program(partial(_of_weights, config), mesh)


# of layers of one kind, one program
_of_layer = _of_outer


@cache
def _of_stacked(config: ModelConfig, mesh: Mesh) -> Any:
    return _program(lambda layers: lax.map(partial(_of_weights, config), layers), mesh)


# --- fingerprints ---


def _signs(name: str, side: int, width: int) -> Float[Array, "rows width"]:
    """Random signs, the same in every program: bits of a hash of each place (MurmurHash3's last step)."""
    bits = jnp.arange(width, dtype=jnp.uint32) + jnp.uint32(zlib.crc32(f"{name} {side}".encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = (bits ^ (bits >> 16)) >> jnp.arange(ROWS, dtype=jnp.uint32)[:, None]
    return 1 - 2 * (bits & 1).astype(jnp.float32)


def _fingerprint(config: ModelConfig, parameter: Parameter, stored: Any) -> Float[Array, "*E numbers"]:
    """Of a parameter as it is served."""
    how, rows = arithmetic(config), _signs(parameter.name, 0, parameter.shape[0])
    if parameter.role in ("wide", "router"):
        return _own_fingerprint(parameter, stored)
    if parameter.role == "table":
        products = stored.logits(_signs(parameter.name, 1, parameter.shape[1]), how)
        return _against(products, rows)

    def of_kernel(kernel: Any) -> Array:
        return _against(kernel.dot(rows, how), _signs(parameter.name, 1, parameter.shape[1]))

    return of_kernel(stored) if parameter.experts is None else jax.vmap(of_kernel)(stored)


def _own_fingerprint(parameter: Parameter, leaf: Array) -> Float[Array, "*E numbers"]:
    """Of an array as it is, [*E, K, N] or [N]."""
    leaf, signs = leaf.astype(jnp.float32), _signs(parameter.name, 0, parameter.shape[0])
    if len(parameter.shape) == 1:
        return _exact(signs, leaf)
    if parameter.role == "table":
        return _against(_exact(leaf, _signs(parameter.name, 1, parameter.shape[1]).T).T, signs)
    return _against(_exact(signs, leaf), _signs(parameter.name, 1, parameter.shape[1]))


def _against(products: Float[Array, "*E rows N"], signs: Float[Array, "rows N"]) -> Float[Array, "*E numbers"]:
    return _exact(products.astype(jnp.float32), signs.T).reshape(*products.shape[:-2], ROWS * ROWS)


def _exact(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


# --- comparison, on the host ---


def _largest(config: ModelConfig, given: dict[str, _Given], found: dict[str, Any], by_layer: Any) -> Deviations:
    served, format = [], []
    for parameter in parameters(config):
        name, layers = parameter.name, parameter.layers
        if layers is None:
            own = found[name]
        elif isinstance(by_layer, list):
            own = np.stack([by_layer[layer][name] for layer in layers])
        else:
            own = by_layer[name]
        converted, masters, norm = given[name]
        sizes = _relative(own - converted, norm)
        # what is no number in the format, where there are masters, deviates without bound
        sizes = np.where(np.isfinite(converted).all(-1) & ~np.isfinite(own).all(-1), np.inf, sizes)
        place = tuple(int(axis) for axis in np.unravel_index(np.nanargmax(np.nan_to_num(sizes, nan=-1)), sizes.shape))
        expert = None if parameter.experts is None else place[-1]
        layer = None if layers is None else layers[place[0]]
        served.append(Deviation(name, layer, expert, float(sizes[place])))
        format.append(Deviation(name, None, None, float(np.sqrt(np.mean(_relative(converted - masters, norm) ** 2)))))
    return Deviations(*(max(found, key=lambda deviation: deviation.size) for found in (served, format)))


def _relative(difference: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """The root mean square of the last axis against the norm; 0 where both are 0."""
    size = np.sqrt(np.mean(np.square(difference, dtype=np.float64), axis=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(size == 0, 0.0, size / norm)
