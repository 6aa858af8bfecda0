"""Mismatch of a known kind and size between the policies, so that an experiment varies one cause at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MismatchConfig:
    """Mismatch that is added to the serving policy on purpose, beside its own numerics.

    Raises:
      ValueError: a size is out of range.
    """

    weight_noise: float = 0.0
    """Standard deviation of normal noise added to each weight matrix, relative to its root mean square;
    sampled again for each version of the weights."""
    logit_noise: float = 0.0
    """Standard deviation of normal noise added to each logit before the temperature, for each token."""
    routing_flips: float = 0.0
    """Share of decoded tokens for which a sparse layer replaces the last expert it chose by the next."""
    rounded_masters: bool = False
    """Quantise kernels and tables from a copy of the weights that is rounded to bfloat16, in place of the float32
    masters."""
    raw_logps: bool = False
    """Report log-probs of the whole softmax at temperature 1, whatever temperature, top-k and top-p sample with."""
    staleness: int = 0
    """RL iterations by which the serving weights lag behind; the gap then includes those updates."""

    def __post_init__(self):
        for name in ("weight_noise", "logit_noise", "staleness"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"mismatch.{name} is {value}; it must be a finite number of at least 0")
        if not 0 <= self.routing_flips <= 1:
            raise ValueError(f"mismatch.routing_flips is {self.routing_flips}; it must lie within [0, 1]")


NO_MISMATCH = MismatchConfig()
"""The settings with which nothing is added."""
