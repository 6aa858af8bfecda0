"""Finds gold answers that cannot be read, before any response is verified against them."""

from __future__ import annotations

import os
from collections.abc import Iterable

from dcjax.rewards.math import readable
from dcjax.rewards.numbers import read_number
from dcjax.rewards.pool import RewardPool

WORKERS = 4
"""The most processes that read gold answers; there are no more than cores."""


def unreadable(golds: Iterable[str]) -> set[str]:
    """Returns those of the gold answers of which `math_reward` and `answer_line_reward` accept only the same text.

    Numbers take no time; the others are read in a `RewardPool`, which takes some seconds to start, and one that exceeds
    the limits on an answer's time and memory counts as unreadable.

    Raises:
      RuntimeError: the processes could not be started.
    """
    words = sorted({gold for gold in golds if read_number(gold) is None})
    if not words:
        return set()
    with RewardPool(reads, workers=min(WORKERS, os.cpu_count() or 1)) as pool:
        read = pool.score([""] * len(words), words, [True] * len(words))
    return {gold for gold, verdict in zip(words, read, strict=True) if not verdict}


def reads(text: str, gold: str, *, finished: bool) -> float:
    """1.0 if `gold` is `readable`, else 0.0: a reward function, so that a pool can run it."""
    return float(readable(gold))
