"""The device mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is how many are used.

    Raises:
      ValueError: an axis below 1.
    """

    data: int = 1
    """Replicas that split the batch and keep whole parameters (devices)."""
    fsdp: int = 1
    """Devices that split the batch and the parameters."""
    tensor: int = 1
    """Devices that split heads, MLP width and vocabulary."""
    expert: int = 1
    """Devices that split the experts of an MoE."""
    context: int = 1
    """Devices that split long sequences."""

    def __post_init__(self):
        for field, size in zip(fields(self), astuple(self), strict=True):
            if size < 1:
                raise ValueError(f"mesh.{field.name} is {size}; it must be at least 1")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the first of `devices`, all of JAX's where None; axes named as in `MeshConfig`.

    Raises:
      ValueError: fewer devices than the axes' product.
    """
    sizes, names = astuple(config), tuple(field.name for field in fields(config))
    devices = jax.devices() if devices is None else devices
    needed, available = math.prod(sizes), len(devices)
    if needed > available:
        asked = ", ".join(f"mesh.{name} {size}" for name, size in zip(names, sizes, strict=True) if size > 1)
        raise ValueError(f"{asked} needs {needed} devices; {available} found, so the product must be at most that")
    # an axis of 8 on a torus of 4 × 4 × 4 takes one of the torus's axes and half of another
    arranged = create_device_mesh(sizes, devices[:needed], allow_split_physical_axes=True)
    return Mesh(arranged, names, axis_types=(AxisType.Auto,) * len(names))


PAPER_A_TRAINING = {"qwen3-8b": MeshConfig(), "qwen3-30b-a3b": MeshConfig(tensor=2, expert=8)}
"""How paper A (arXiv:2606.08779) divides presets in training; `over` gives fsdp the devices that remain."""

PAPER_A_ROLLOUT = {"qwen3-30b-a3b": 4}
"""Devices that share a copy of the model in its rollouts, `serving.tensor`."""


def over(config: MeshConfig, devices: int) -> MeshConfig:
    """The mesh on that many devices: fsdp takes those that its other axes leave.

    Raises:
      ValueError: devices that the other axes do not divide.
    """
    others = math.prod(astuple(config)) // config.fsdp
    if devices % others:
        raise ValueError(f"{devices} devices do not divide by mesh axes other than fsdp, whose product is {others}")
    return replace(config, fsdp=devices // others)
