"""The device mesh: which devices train, which only serve, and which belong to one host."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from dcjax.errors import RunError


@dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis; their product is how many are used.

    Raises:
      ValueError: an axis is below 1.
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


@cache
def start_devices() -> None:
    """Makes JAX look for its devices, as it does by itself where it first needs one.

    On a machine without a TPU, libtpu complains on standard error that it finds none, where it is installed; that is
    not shown.

    Raises:
      RunError: the platform that JAX_PLATFORMS asks for has no device, or another process holds it.
    """
    with contextlib.nullcontext() if _has_tpu() else hidden_standard_error():
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:  # JAX asserts that one of the platforms is there
            asked = os.environ.get("JAX_PLATFORMS")
            reason = (str(error).strip() or "there is none").splitlines()[0].rstrip(".")
            raise RunError(
                f"no device could be used: {reason}; JAX_PLATFORMS is {asked!r}, without which JAX takes what is there"
            ) from None


def _has_tpu() -> bool:
    """Whether Linux lists TPU chips among its devices."""
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


@contextlib.contextmanager
def hidden_standard_error() -> Iterator[None]:
    """Discards what libraries write to standard error's file descriptor, from C++ that cannot be configured."""
    sys.stderr.flush()
    standard_error = os.dup(2)
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the first of `devices`, by default all of JAX's; its axes are named as in `MeshConfig`.

    If these are a whole TPU slice, or a corner of one, the axes follow its links; otherwise devices stay in order,
    those of a host next to each other.

    Raises:
      ValueError: there are fewer devices than the axes' product.
      RunError: as `start_devices`.
    """
    start_devices()
    sizes, names = astuple(config), tuple(field.name for field in fields(config))
    devices = jax.devices() if devices is None else devices
    needed, available = math.prod(sizes), len(devices)
    if needed > available:
        asked = ", ".join(f"mesh.{name} {size}" for name, size in zip(names, sizes, strict=True) if size > 1)
        raise ValueError(f"{asked} needs {needed} devices; {available} found, so the product must be at most that")
    used = devices[:needed]
    if used[0].platform == "tpu" and not _is_box(used):
        arranged = np.reshape(used, sizes)
    else:
        # an axis of 8 on a torus of 4 × 4 × 4 takes one of the torus's axes and half of another
        arranged = create_device_mesh(sizes, used, allow_split_physical_axes=True)
    return Mesh(arranged, names, axis_types=(AxisType.Auto,) * len(names))


def _is_box(chips: Sequence[jax.Device]) -> bool:
    """Whether the chips fill a box in the corner of their slice, the only shape that JAX arranges."""
    places = {tuple(chip.coords) for chip in chips}
    return len(places) == math.prod(max(along) + 1 for along in zip(*places, strict=True))


def memory_of(device: jax.Device) -> int:
    """Bytes that a process may use on a device; those of a CPU share the machine's."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return device.memory_stats()["bytes_limit"]


HOSTS, OWN = "hosts", "own"
"""The axes of `by_host`."""


def by_host(devices: Iterable[jax.Device]) -> Mesh:
    """The devices as a mesh of hosts (processes) by devices of a host; all hosts must have equally many."""
    return Mesh(_rows_of_hosts(devices), (HOSTS, OWN), axis_types=(AxisType.Auto,) * 2)


def _rows_of_hosts(devices: Iterable[jax.Device]) -> np.ndarray:
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    hosts = len({device.process_index for device in ordered})
    return np.reshape(np.array(ordered, object), (hosts, -1))


def set_aside(devices: Sequence[jax.Device], count: int) -> tuple[list[jax.Device], list[jax.Device]]:
    """The devices that train, and `count` that only serve: the last ones of each host, equally many.

    Raises:
      ValueError: `count` is not a multiple of the number of hosts.
    """
    hosts = _rows_of_hosts(devices)
    own, rest = divmod(count, len(hosts))
    if rest:
        raise ValueError(f"serving.devices is {count}; it must be a multiple of the number of processes, {len(hosts)}")
    trains = hosts.shape[1] - own
    return list(hosts[:, :trains].flat), list(hosts[:, trains:].flat)


PAPER_A_TRAINING = {"qwen3-8b": MeshConfig(), "qwen3-30b-a3b": MeshConfig(tensor=2, expert=8)}
"""The meshes on which paper A (arXiv:2606.08779) trains presets; `over` gives fsdp the devices that remain."""

PAPER_A_ROLLOUT = {"qwen3-30b-a3b": 4}
"""How many devices share a copy of the model in paper A's rollouts, `serving.tensor`."""


def over(config: MeshConfig, devices: int) -> MeshConfig:
    """The mesh on this many devices: fsdp takes those that the other axes leave.

    Raises:
      ValueError: the product of the other axes does not divide the devices.
    """
    others = math.prod(astuple(config)) // config.fsdp
    if devices % others:
        raise ValueError(
            f"devices is {devices}; it must be a multiple of {others}, the product of the mesh axes other than fsdp"
        )
    return replace(config, fsdp=devices // others)
