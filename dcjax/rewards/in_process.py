"""What rewards are asked of: a pool of worker processes, or this process itself."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
from jaxtyping import Bool

from dcjax.rewards.pool import Pending, RewardPool
from dcjax.rewards.processes import Reward, Score, asked_for, describe, score
from dcjax.user_code import find


@dataclass(frozen=True)
class InProcessRewards:
    """Scores answers here and at once, without limits: for rewards that are cheap whatever the text."""

    reward: Reward
    counters: None = None
    """It has no limits whose effects could be counted."""

    @functools.cached_property
    def asks(self) -> tuple[str, ...]:
        """What the reward is to be told beside its arguments."""
        return asked_for(self.reward)

    def submit(
        self,
        texts: Sequence[str],
        golds: Sequence[str],
        finished: Sequence[bool] | Bool[np.ndarray, "N"],
        known: Sequence[Mapping[str, Any]] | None = None,
    ) -> Pending:
        """Like `RewardPool.submit`, but the rewards are computed before it returns."""
        known = [{}] * len(texts) if known is None else known
        answers = zip(texts, golds, map(bool, finished), known, strict=True)
        with _interrupts_noted() as interrupts:
            return Pending.of([self._score(*answer, interrupts) for answer in answers])

    def _score(
        self, text: str, gold: str, finished: bool, known: Mapping[str, Any], interrupts: list[int]
    ) -> Score | str:
        try:
            return score(self.reward, text, gold, finished, known)
        except BaseException as error:
            if interrupts:
                raise KeyboardInterrupt from error
            return describe(error, self.reward)


@contextlib.contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """A list that gets a number for each interrupt from the keyboard, which a reward's own exceptions are told from."""
    interrupts: list[int] = []
    handler: Any = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        handler(number, frame)

    # other threads are not interrupted, and a process that ignores the signal is not either
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield interrupts
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, handler)


Rewards = RewardPool | InProcessRewards
"""Where a run's rewards come from."""


def load_reward(name: str) -> Reward:
    """The function MODULE:FUNCTION of dcjax or of an installed package.

    Raises:
      ValueError: there is none.
    """
    try:
        reward = find(name, recipe=None)
    except ValueError as error:
        raise ValueError(
            f"reward.function is {name!r}: {error}; a function of your own stands in a recipe (docs/tasks.md)"
        ) from None
    if not callable(reward):
        raise ValueError(f"reward.function is {name!r}, a {type(reward).__name__}; it must be a function")
    return reward
