"""What chips can do at most: TPUs by the names that libtpu gives slices, and GPUs.

Sources: Cloud TPU's pages of system architecture (cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x, read in November
2026). They give the links of a chip together and both ways; one link's share, one way, is that over twice the links.
Memory is in GiB, as the compiler takes it. The pages have no int8 of v5p and tpu7x, for which twice bf16 stands, and no
fp8 of v5e, whose products are taken for bf16's, as those of v5p and v6e are.

A100 80GB SXM, H100 SXM, H200 SXM and HGX B200 as in published tables of NVIDIA's datasheets: peaks without sparsity;
NVLink, given both ways, halved; memory, given in GB, which a card reports as about as many GiB. An A100 has no fp8,
whose products are taken for bf16's. Between nodes each GPU has one InfiniBand adapter, as in NVIDIA's DGX: 200 Gb/s of
an A100's, 400 Gb/s of the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcjax.errors import RunError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A kind of chip."""

    name: str
    devices: int
    """That JAX sees of one chip."""
    peak: float
    """Operations a second in bf16."""
    peak_int8: float
    peak_fp8: float
    hbm: int
    """Bytes of memory."""
    bandwidth: float
    """Bytes a second of its memory."""
    links: int
    """To neighbours: two for each axis of the torus. Of a GPU one, to a switch."""
    link: float
    """Bytes a second of one link, one way."""
    node: int = 0
    """GPUs that a switch connects; 0 of a TPU."""
    network: float = 0.0
    """Bytes a second that arrive at a GPU from other nodes."""
    peak_float32: float = 0.0
    """Operations a second in float32 with all its bits; 0 stands for six passes of bf16."""

    @property
    def platform(self) -> str:
        """By JAX's name."""
        return "gpu" if self.node else "tpu"

    def peak_of(self, dtype: str) -> float:
        """Operations a second in products of a dtype, by XLA's name."""
        if dtype in ("f32", "f64"):
            return self.peak_float32 or self.peak / 6
        if dtype.startswith("f8"):
            return self.peak_fp8
        return self.peak_int8 if dtype in ("s8", "u8", "s4", "u4") else self.peak


def _gpu(name: str, peak: float, narrow: float, fp8: float, gib: int, rates: Sequence[float], wide: float) -> Chip:
    """A GPU of whose rates, in GB/s, the first is its memory's, then NVLink's and its adapter's."""
    bandwidth, link, network = (rate * 1e9 for rate in rates)
    return Chip(name, 1, peak, narrow, fp8, gib * GIB, bandwidth, 1, link, 8, network, wide)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 1, 197e12, 393e12, 197e12, 16 * GIB, 819e9, 4, 400e9 / 8),
        Chip("v5p", 1, 459e12, 918e12, 459e12, 95 * GIB, 2765e9, 6, 1200e9 / 12),
        Chip("v6e", 1, 918e12, 1836e12, 918e12, 32 * GIB, 1638e9, 4, 800e9 / 8),
        Chip("tpu7x", 2, 2307e12, 4614e12, 4614e12, 192 * GIB, 7380e9, 6, 1200e9 / 12),
        _gpu("a100", 312e12, 624e12, 312e12, 80, (2039, 300, 25), 19.5e12),
        _gpu("h100", 989e12, 1979e12, 1979e12, 80, (3350, 450, 50), 67e12),
        _gpu("h200", 989e12, 1979e12, 1979e12, 141, (4800, 450, 50), 67e12),
        _gpu("b200", 2250e12, 4500e12, 4500e12, 180, (8000, 900, 50), 75e12),
    )
}


def chip_of(topology: str) -> Chip:
    """The kind of chip of a slice such as v5p:4x4x4, or of GPUs such as h100:16.

    Raises:
      RunError: there is none of that name.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        slices, gpus = (
            ", ".join(kind for kind, chip in CHIPS.items() if chip.platform == platform) for platform in ("tpu", "gpu")
        )
        raise RunError(
            f"--topology is {topology!r}; it must be a kind and a shape, such as v5p:4x4x4, of {slices}, or a kind and "
            f"a number of GPUs, such as h100:16, of {gpus}"
        )
    return CHIPS[name]


def gpus_of(topology: str) -> int:
    """The number of GPUs of h100:16.

    Raises:
      RunError: it is not a number, or below 1.
    """
    count = topology.partition(":")[2]
    if not (count.isascii() and count.isdigit() and int(count)):
        raise RunError(f"--topology is {topology!r}; it must be a kind and a number of GPUs, such as h100:16")
    return int(count)
