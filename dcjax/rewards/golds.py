"""Gold answers that cannot be read, found before anything is judged by them, and within the limits of an answer."""

from __future__ import annotations

import os
from collections.abc import Iterable

from dcjax.rewards.math import readable
from dcjax.rewards.numbers import read_number
from dcjax.rewards.pool import RewardPool

WORKERS = 4
"""Processes that read them, where there are as many cores."""


def unreadable(golds: Iterable[str]) -> set[str]:
    """Those of which only their own text is right by `math_reward` and `answer_line_reward`.

    Numbers take no time; the others are read in a `RewardPool`, which takes some seconds to start, and one that exceeds
    the limits of an answer counts as unreadable.

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
    """Whether `gold` is `readable`, as a reward."""
    return float(readable(gold))
