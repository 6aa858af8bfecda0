"""How RoPE is scaled for sequences longer than those a model was first trained on, as data.

A scaling keeps the frequencies of pairs that turn often within the first training's sequences, divides those of pairs
that turn seldom by a factor, and blends between the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Llama3Scaling:
    """The scaling of Llama 3.1 and later, as Hugging Face's rope_type llama3 computes it.

    Raises:
      ValueError: a number is out of range.
    """

    rope_type: ClassVar[str] = "llama3"

    factor: float
    """What the lowest frequencies are divided by."""
    low_freq_factor: float
    """Pairs with fewer turns than this in original_max_position_embeddings tokens have their frequency divided."""
    high_freq_factor: float
    """Pairs with more turns than this keep their frequency; in between, the share that is kept grows with the turns."""
    original_max_position_embeddings: int
    """Longest sequence of the training before the scaling, in tokens."""

    def __post_init__(self):
        _check_factor(self)
        _require_above_0(self, "low_freq_factor", "high_freq_factor")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor is {self.low_freq_factor}; "
                f"it must be below high_freq_factor, {self.high_freq_factor}"
            )

    @property
    def amplitude(self) -> float:
        """What sines and cosines are multiplied by."""
        return 1.0

    def multipliers(self, theta: float, head_dim: int) -> np.ndarray:
        """What the frequency of each pair is multiplied by, float64 [head_dim / 2]."""
        wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        turns = self.original_max_position_embeddings / wavelengths
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return _blend(kept, self.factor)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023, arXiv:2309.00071), as Hugging Face's rope_type yarn computes it.

    Raises:
      ValueError: a number is out of range.
    """

    rope_type: ClassVar[str] = "yarn"

    factor: float
    """What the lowest frequencies are divided by."""
    original_max_position_embeddings: int
    """Longest sequence of the training before the scaling, in tokens; the model is made for factor times it."""
    beta_fast: float = 32.0
    """Pairs with more turns than this in original_max_position_embeddings tokens keep their frequency."""
    beta_slow: float = 1.0
    """Pairs with fewer turns than this have their frequency divided; in between, the share that is kept falls linearly
    with the number of the pair."""
    attention_factor: float | None = None
    """What sines and cosines are multiplied by; None for what the factor, or mscale and mscale_all_dim, give."""
    mscale: float | None = None
    """With mscale_all_dim: sines and cosines are multiplied by (0.1 mscale ln factor + 1) / (0.1 mscale_all_dim
    ln factor + 1). None, or either alone, stands for 0.1 ln factor + 1."""
    mscale_all_dim: float | None = None
    """See mscale."""
    truncate: bool = True
    """Whether the numbers of the pairs between which frequencies are blended are rounded outwards to whole ones."""

    def __post_init__(self):
        _check_factor(self)
        _require_above_0(self, "beta_fast", "beta_slow")
        given = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if getattr(self, name) is not None]
        _require_above_0(self, *given)
        if self.beta_slow > self.beta_fast:
            raise ValueError(
                f"model.rope_scaling.beta_slow is {self.beta_slow}; it must be at most beta_fast, {self.beta_fast}"
            )

    @property
    def amplitude(self) -> float:
        """What sines and cosines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def _temperature(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0

    def multipliers(self, theta: float, head_dim: int) -> np.ndarray:
        """What the frequency of each pair is multiplied by, float64 [head_dim / 2]; theta must be above 1."""

        def pair_that_turns(times: float) -> float:
            length = self.original_max_position_embeddings
            return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        # a step instead of a slope where the two are one
        slope = last - first if last != first else 0.001
        return _blend(1 - (np.arange(head_dim // 2) - first) / slope, self.factor)


RopeScaling = Llama3Scaling | YarnScaling


def _blend(kept: np.ndarray, factor: float) -> np.ndarray:
    """1 where a frequency is kept, 1 / factor where it is not, and the mean weighted by the share in between."""
    kept = np.clip(kept, 0, 1)
    return kept + (1 - kept) / factor


def _check_factor(scaling: RopeScaling) -> None:
    if not 1 <= scaling.factor < math.inf:
        raise ValueError(f"model.rope_scaling.factor is {scaling.factor}; it must be a finite number of at least 1")
    if (length := scaling.original_max_position_embeddings) < 1:
        raise ValueError(f"model.rope_scaling.original_max_position_embeddings is {length}; it must be at least 1")


def _require_above_0(scaling: RopeScaling, *names: str) -> None:
    for name in names:
        if not 0 < (value := getattr(scaling, name)) < math.inf:
            raise ValueError(f"model.rope_scaling.{name} is {value}; it must be a finite number above 0")
