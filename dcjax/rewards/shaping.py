"""Rewards that depend on a response's length."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int


def soft_overlong_punishment(
    lengths: Int[np.ndarray, "N"], *, max_length: int, buffer: int, factor: float = 1.0
) -> Float32[np.ndarray, "N"]:
    """The penalty that is added to the rewards of long responses, between −factor and 0.

    factor · clip((max_length − buffer − length) / buffer, −1, 0): 0 up to max_length − buffer tokens, −factor from
    max_length on, linear in between (DAPO, arXiv:2503.14476, eq. 13, where factor is 1, max_length
    20,480 and buffer 4,096).

    Args:
      lengths: the number of tokens of each response.
      max_length: how many tokens a response may have.
      buffer: how many tokens before `max_length` the penalty begins.
      factor: the largest penalty.

    Raises:
      ValueError: a setting is out of range.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer is {buffer}; it must be at least 1 and at most max_length, {max_length}")
    if not factor >= 0:
        raise ValueError(f"factor is {factor}; it must not be negative")
    return (factor * np.clip((max_length - buffer - lengths) / buffer, -1.0, 0.0)).astype(np.float32)
