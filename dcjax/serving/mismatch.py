"""A gap between the policies of known kind and size, so that an experiment turns one knob at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MismatchConfig:
    """What is added to the serving policy's own numerics.

    Raises:
      ValueError: a size out of range.
    """

    weight_noise: float = 0.0
    """Normal noise on each weight that is multiplied with, in units of its tensor's root mean square; drawn anew for
    each version of the weights."""
    logit_noise: float = 0.0
    """Standard deviation of normal noise on each logit, before the temperature; drawn anew for each token."""
    routing_flips: float = 0.0
    """How often a sparse layer takes the next expert for the last of those it chose (share of decoded tokens)."""
    staleness: int = 0
    """RL iterations by which the serving weights lag behind; the gap then holds what those changed, too."""

    def __post_init__(self):
        for name in ("weight_noise", "logit_noise", "staleness"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"mismatch.{name} is {value}; it must be a finite number of at least 0")
        if not 0 <= self.routing_flips <= 1:
            raise ValueError(f"mismatch.routing_flips is {self.routing_flips}; it must lie within [0, 1]")


NO_MISMATCH = MismatchConfig()
"""Nothing is added."""
