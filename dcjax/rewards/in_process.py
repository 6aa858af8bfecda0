"""What rewards are asked of: a pool of worker processes, or this process itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from dcjax.rewards.pool import Pending, RewardPool
from dcjax.rewards.processes import Reward, score
from dcjax.user_code import find


@dataclass(frozen=True)
class InProcessRewards:
    """Scores answers here and at once, without limits: for rewards that are cheap whatever the text."""

    reward: Reward
    counters: None = None
    """It has no limits whose effects could be counted."""

    def submit(
        self, texts: Sequence[str], golds: Sequence[str], finished: Sequence[bool] | Bool[np.ndarray, "N"]
    ) -> Pending:
        """Like `RewardPool.submit`, but the rewards are computed before it returns."""
        answers = zip(texts, golds, map(bool, finished), strict=True)
        return Pending.of([self._score(*answer) for answer in answers])

    def _score(self, text: str, gold: str, finished: bool) -> float | Exception:
        try:
            return score(self.reward, text, gold, finished)
        except Exception as error:
            return error


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
