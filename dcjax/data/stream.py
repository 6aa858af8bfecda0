"""An endless shuffled stream of examples, in which example number `cursor` is a function of (seed, cursor) alone.

Nothing but the cursor is kept between draws, so a run resumes exactly where it stopped, on any number of hosts: each
takes its slice of the numbers.
"""

from __future__ import annotations

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of 0..size - 1, int64. It is made of PCG64's raw bits, which no
    version of NumPy changes."""
    order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(size), kind="stable")
    order.setflags(write=False)
    return order


def draw(size: int, *, seed: int, start: int, count: int) -> list[int]:
    """Which of `size` examples the stream's numbers start, start + 1, ..., start + count - 1 are.

    Numbers k · size up to (k + 1) · size - 1 are epoch k: each example once, in an order of the epoch's own.

    Raises:
      ValueError: there are no examples, or a number is negative.
    """
    if size < 1 or min(seed, start, count) < 0:
        raise ValueError(
            f"size is {size}, seed {seed}, start {start}, count {count}; "
            "there must be an example, and no number may be negative"
        )
    return [int(epoch_order(size, seed, cursor // size)[cursor % size]) for cursor in range(start, start + count)]
