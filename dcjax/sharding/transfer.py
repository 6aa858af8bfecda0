"""From some devices to others."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dcjax.sharding.mesh import OWN, by_host


def across(tree: Any, places: Any) -> Any:
    """Arrays on other devices of the same hosts.

    JAX moves arrays between disjoint devices within a process only. Where there are several, each host first gets the
    whole of what it may need, divided over its old devices, and hands it to its new ones.

    Args:
      tree: of arrays with a NamedSharding each.
      places: a NamedSharding for each, on a mesh of other devices.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, places)
    whole = jax.device_put(tree, jax.tree.map(_each_host, tree))
    return jax.tree.map(_handed_over, whole, places)


def _each_host(leaf: jax.Array) -> NamedSharding:
    """Whole on every host, in as many parts as it has devices, where a dimension divides into these."""
    assert isinstance(leaf.sharding, NamedSharding)
    hosts = by_host(leaf.sharding.mesh.devices.flat)
    divided = (place for place, size in enumerate(leaf.shape) if size % hosts.shape[OWN] == 0)
    place = next(divided, None)
    return NamedSharding(hosts, PartitionSpec() if place is None else PartitionSpec(*[None] * place, OWN))


def _handed_over(leaf: jax.Array, place: NamedSharding) -> jax.Array:
    """Of an array placed by `_each_host`, what this host's devices of another mesh hold."""
    assert isinstance(leaf.sharding, NamedSharding)
    own = NamedSharding(leaf.sharding.mesh.local_mesh, leaf.sharding.spec)
    held = jax.make_array_from_single_device_arrays(leaf.shape, own, [shard.data for shard in leaf.addressable_shards])
    return jax.make_array_from_callback(leaf.shape, place, lambda index: held[index])
