"""Maps the logical axes that models name to the mesh axes that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis -> mesh axes; None means not split."""

RULES: Rules = {
    # activations: outside of experts, the devices that split them are replicas that split the batch
    "batch": ("data", "fsdp", "expert"),
    "sequence": "context",
    # between layers, where they are only kept
    "saved_sequence": ("context", "tensor"),
    # inside attention, where sequences are whole
    "attention_heads": ("tensor", "context"),
    # parameters, and the activations that they make
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "expert_mlp": "tensor",
    # the experts that a router scores, whole on every device
    "choices": None,
}
"""The mesh axes of each logical axis in training."""

SERVING_RULES: Rules = dict.fromkeys(RULES) | {
    "batch": "data",
    **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab", "experts"), "tensor"),
}
"""The mesh axes of each logical axis in serving.

Sequences are split over copies of the model; heads, widths, vocabulary and whole experts over the devices of a copy.
With so few tokens at a time weights stay in place, and only a few rows of activations are reduced.
"""


def partition_spec(logical: PartitionSpec, rules: Rules = RULES) -> PartitionSpec:
    """The mesh axes of an array's logical axes.

    Raises:
      ValueError: a logical axis has no rule, or two axes of one array map to the same mesh axis.
    """
    unknown = [name for name in logical if name is not None and name not in rules]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} has no rule; known are {', '.join(rules)}")
    mapped = [None if name is None else rules[name] for name in logical]
    used = [axis for axes in mapped if axes is not None for axis in ((axes,) if isinstance(axes, str) else axes)]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {tuple(logical)} put one array twice on a mesh axis: {tuple(mapped)}")
    return PartitionSpec(*mapped)


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that split a logical axis.

    Raises:
      ValueError: the logical axis has no rule.
    """
    (axes,) = partition_spec(PartitionSpec(name))
    return (axes,) if isinstance(axes, str) else axes or ()


def split(sizes: Mapping[str, int], name: str) -> int:
    """Into how many parts a mesh with axes of these sizes splits a logical axis.

    Raises:
      ValueError: the logical axis has no rule.
    """
    return math.prod(sizes[axis] for axis in mesh_axes(name))


def shardings(mesh: Mesh | AbstractMesh, logical: Any, rules: Rules = RULES) -> Any:
    """A NamedSharding for each PartitionSpec of logical axes in a tree.

    Raises:
      ValueError: as `partition_spec`.
    """
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes, rules)),
        logical,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def with_shardings(shapes: Any, places: Any) -> Any:
    """Abstract arrays of these shapes with these shardings."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that are whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose rows are split over the mesh axes of "batch"."""
    return NamedSharding(mesh, partition_spec(PartitionSpec("batch")))
