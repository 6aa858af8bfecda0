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
from dcjax.models.parameters import Parameter, parameters
from dcjax.serving.decoder import NO_EXCESS_PRECISION
from dcjax.serving.formats.served import arithmetic
from dcjax.serving.sync import Conversion, ServingParams
from dcjax.sharding.rules import replicated
from dcjax.types import Array, Params

ROWS = 4
"""Random rows on each side of a matrix."""
NUMBERS = ROWS * ROWS
"""Of a fingerprint; a vector has so many random rows on its one side."""


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
        config, layers = self.conversion.config, served.weights["layers"]
        given = _of_masters(self.conversion, self.training)(masters, version)
        outer = {name: leaf for name, leaf in served.weights.items() if name != "layers"}
        parts = [_of_weights(config, self.serving)(outer)]
        if isinstance(layers, tuple):
            parts += [_of_weights(config, self.serving)(layer) for layer in layers]
        else:
            parts.append(_of_stacked(config, self.serving)(layers))
        given, *parts = jax.device_get([given, *parts])
        found = np.concatenate([part.reshape(-1, NUMBERS) for part in parts])
        return _largest(config, found[_slices(config).served], *np.split(given, [NUMBERS, 2 * NUMBERS], axis=1))

    def compile(self, masters: Params, served: ServingParams) -> None:
        """Compiles its programs for abstract masters and what is served of them."""
        config, layers = self.conversion.config, served.weights["layers"]
        _of_masters(self.conversion, self.training).lower(masters, 0).compile()
        outer = {name: leaf for name, leaf in served.weights.items() if name != "layers"}
        _of_weights(config, self.serving).lower(outer).compile()
        if not isinstance(layers, tuple):
            _of_stacked(config, self.serving).lower(layers).compile()
            return
        for kind in set(config.sparse_layers):
            _of_weights(config, self.serving).lower(layers[config.sparse_layers.index(kind)]).compile()


# --- programs: each returns a row for each slice, a parameter in one layer and of one expert ---


def _program(function: Any, mesh: Mesh) -> Any:
    return jax.jit(function, out_shardings=replicated(mesh), compiler_options=NO_EXCESS_PRECISION)


@cache
def _of_masters(conversion: Conversion, mesh: Mesh) -> Any:
    """(masters, version) -> rows of what a sync makes of them, of themselves and of ‖W‖, a parameter after another."""
    config = conversion.config

    def of_leaf(parameter: Parameter, leaf: Array, layer: Any, version: Any) -> Float[Array, "slices columns"]:
        converted = _fingerprint(config, parameter, conversion(parameter.name, layer, leaf, version))
        own = _own_fingerprint(parameter, leaf)
        axes = tuple(range(leaf.ndim - len(parameter.shape), leaf.ndim))
        norm = jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)).reshape(-1, 1)
        return jnp.concatenate([converted, own, norm], axis=1)

    def of_all(masters: Params, version: Array) -> Float[Array, "slices columns"]:
        rows = []
        for parameter in parameters(config):
            if parameter.layers is None:
                rows.append(of_leaf(parameter, masters[parameter.name], 0, version))
                continue
            # one layer after another, so that only one is converted at a time
            stacked = jnp.array(parameter.layers), masters["layers"][parameter.name]
            of_layers = lax.map(lambda of, p=parameter: of_leaf(p, of[1], of[0], version), stacked)
            rows.append(of_layers.reshape(-1, of_layers.shape[-1]))
        return jnp.concatenate(rows)

    return _program(of_all, mesh)


def _fingerprints(config: ModelConfig, weights: Mapping[str, Any]) -> Float[Array, "slices numbers"]:
    """Of what is served outside of layers, or in one layer, in the order of the model's parameters."""
    held = [parameter for parameter in parameters(config) if parameter.name in weights]
    return jnp.concatenate([_fingerprint(config, parameter, weights[parameter.name]) for parameter in held])


@cache
def _of_weights(config: ModelConfig, mesh: Mesh) -> Any:
    return _program(partial(_fingerprints, config), mesh)


@cache
def _of_stacked(config: ModelConfig, mesh: Mesh) -> Any:
    return _program(lambda layers: lax.map(partial(_fingerprints, config), layers), mesh)


# --- fingerprints ---


def _signs(name: str, side: int, width: int, count: int) -> Float[Array, "count width"]:
    """Random signs, the same in every program: bits of a hash of each place (MurmurHash3's last step)."""
    bits = jnp.arange(width, dtype=jnp.uint32) + jnp.uint32(zlib.crc32(f"{name} {side}".encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = (bits ^ (bits >> 16)) >> jnp.arange(count, dtype=jnp.uint32)[:, None]
    return 1 - 2 * (bits & 1).astype(jnp.float32)


def _fingerprint(config: ModelConfig, parameter: Parameter, stored: Any) -> Float[Array, "slices numbers"]:
    """Of a parameter as it is served."""
    if parameter.role in ("wide", "router"):
        return _own_fingerprint(parameter, stored)
    how, (rows, columns) = arithmetic(config), _sides(parameter)
    if parameter.role == "table":
        return _against(stored.logits(columns, how), rows)
    if parameter.experts is None:
        return _against(stored.dot(rows, how), columns)
    return _against(jax.vmap(lambda kernel: kernel.dot(rows, how))(stored), columns)


def _own_fingerprint(parameter: Parameter, leaf: Array) -> Float[Array, "slices numbers"]:
    """Of an array as it is, [*E, K, N] or [N]."""
    leaf = leaf.astype(jnp.float32)
    if len(parameter.shape) == 1:
        return _exact(_signs(parameter.name, 0, parameter.shape[0], NUMBERS), leaf)[None]
    rows, columns = _sides(parameter)
    if parameter.role == "table":
        return _against(_exact(leaf, columns.T).T, rows)
    return _against(_exact(rows, leaf), columns)


def _sides(parameter: Parameter) -> tuple[Float[Array, "rows K"], Float[Array, "rows N"]]:
    """The random signs on both sides of a matrix [K, N]."""
    first, last = (_signs(parameter.name, side, width, ROWS) for side, width in enumerate(parameter.shape))
    return first, last


def _against(products: Float[Array, "*E rows N"], signs: Float[Array, "rows N"]) -> Float[Array, "slices numbers"]:
    return _exact(products.astype(jnp.float32), signs.T).reshape(-1, NUMBERS)


def _exact(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


# --- comparison, on the host ---


class _Slices(NamedTuple):
    """The slices of a model's parameters, one parameter after another."""

    # name, layer and expert of each
    places: list[tuple[str, int | None, int | None]]
    # which row each has among those that are served, one layer after another
    served: np.ndarray
    # where each parameter's begin
    starts: list[int]


@cache
def _slices(config: ModelConfig) -> _Slices:
    places, starts = [], []
    for parameter in parameters(config):
        starts.append(len(places))
        layers = (None,) if parameter.layers is None else parameter.layers
        experts = (None,) if parameter.experts is None else range(parameter.experts)
        places += [(parameter.name, layer, expert) for layer in layers for expert in experts]
    # stable, so that a layer's keep their order
    order = sorted(range(len(places)), key=lambda row: -1 if places[row][1] is None else places[row][1])
    return _Slices(places, np.argsort(order), starts)


def _largest(
    config: ModelConfig, found: np.ndarray, converted: np.ndarray, masters: np.ndarray, norms: np.ndarray
) -> Deviations:
    """The largest deviations of rows of all slices."""
    slices = _slices(config)
    # what is no number, where in the same format it should be, deviates without bound
    garbled = ~np.isfinite(found).all(axis=1) & np.isfinite(converted).all(axis=1)
    served, counts = _squares(found, converted, norms), np.diff([*slices.starts, len(norms)])
    served[garbled] = np.inf
    format = np.add.reduceat(_squares(converted, masters, norms), slices.starts) / counts
    worst, widest = int(served.argmax()), int(format.argmax())
    return Deviations(
        Deviation(*slices.places[worst], float(np.sqrt(served[worst]))),
        Deviation(slices.places[slices.starts[widest]][0], None, None, float(np.sqrt(format[widest]))),
    )


def _squares(ours: np.ndarray, theirs: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Each row's mean square difference, of the square of its norm; 0 where either is no number."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        relative = np.where(ours == theirs, 0.0, (ours - theirs) / norms).astype(np.float64)
        return np.nan_to_num(np.mean(np.square(relative), axis=1), posinf=np.inf)
