"""Moves arrays from some devices to others."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dcjax.sharding.mesh import HOSTS, by_host


def across(tree: Any, places: Any) -> Any:
    """Moves arrays to other devices of the same hosts.

    They are first resharded on their old devices as they will be on the new ones, whole on each host; then each part
    goes from one device to another of the same host. JAX itself moves arrays between disjoint devices only within one
    process, and through the host's memory unless they are sharded alike on both.

    Args:
      tree: arrays, each with a NamedSharding.
      places: a NamedSharding for each array, on a mesh of other devices.
    """
    arranged = jax.device_put(tree, jax.tree.map(_on_each_host, tree, places))
    return jax.tree.map(_handed_over, arranged, places)


def _on_each_host(leaf: jax.Array, place: NamedSharding) -> NamedSharding:
    """`place` on each host's old devices; whole on each of them if it does not divide their number."""
    assert isinstance(leaf.sharding, NamedSharding)
    rows = by_host(leaf.sharding.mesh.devices.flat).devices
    first, *others = place.mesh.axis_names
    parts = [place.mesh.shape[axis] for axis in others]
    if rows.shape[1] % math.prod(parts) or first in jax.tree.leaves(tuple(place.spec)):
        return NamedSharding(by_host(rows.flat), PartitionSpec())
    devices = np.reshape(rows, (len(rows), -1, *parts))
    return NamedSharding(Mesh(devices, (HOSTS, first, *others), axis_types=(AxisType.Auto,) * devices.ndim), place.spec)


def _handed_over(leaf: jax.Array, place: NamedSharding) -> jax.Array:
    """The array in `place`, from the parts that other devices of this host hold."""
    shape = leaf.shape
    held = {_bounds(shard.index, shape): shard.data for shard in leaf.addressable_shards}

    def part(index: Any) -> jax.Array:
        # if no device holds exactly this part, each holds the whole array
        exact = held.get(_bounds(index, shape))
        return leaf.addressable_data(0)[index] if exact is None else exact

    indices = place.addressable_devices_indices_map(shape)
    parts = [jax.device_put(part(index), device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(shape, place, parts)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
