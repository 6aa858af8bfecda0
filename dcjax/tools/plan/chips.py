"""What chips can do at most, by the names that libtpu gives slices.

Sources: Cloud TPU's pages of system architecture (cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x, read in November
2026). They give the links of a chip together and both ways; one link's share, one way, is that over twice the links.
Memory is in GiB, as the compiler takes it. The pages have no int8 of v5p and tpu7x, for which twice bf16 stands, and no
fp8 of v5e, whose products are taken for bf16's, as those of v5p and v6e are.
"""

from __future__ import annotations

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
    """To neighbours: two for each axis of the torus."""
    link: float
    """Bytes a second of one link, one way."""

    def peak_of(self, dtype: str) -> float:
        """Operations a second in products of a dtype, by XLA's name; float32 with all its bits takes six passes."""
        if dtype in ("f32", "f64"):
            return self.peak / 6
        if dtype.startswith("f8"):
            return self.peak_fp8
        return self.peak_int8 if dtype in ("s8", "u8", "s4", "u4") else self.peak


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 1, 197e12, 393e12, 197e12, 16 * GIB, 819e9, 4, 400e9 / 8),
        Chip("v5p", 1, 459e12, 918e12, 459e12, 95 * GIB, 2765e9, 6, 1200e9 / 12),
        Chip("v6e", 1, 918e12, 1836e12, 918e12, 32 * GIB, 1638e9, 4, 800e9 / 8),
        Chip("tpu7x", 2, 2307e12, 4614e12, 4614e12, 192 * GIB, 7380e9, 6, 1200e9 / 12),
    )
}


def chip_of(topology: str) -> Chip:
    """The kind of chip of a slice such as v5p:4x4x4.

    Raises:
      RunError: there is none of that name.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise RunError(
            f"--topology is {topology!r}; it must be a kind and a shape, such as v5p:4x4x4, of {', '.join(CHIPS)}"
        )
    return CHIPS[name]
