"""What rewards responses, where, and within which limits."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from dcjax.data.task import Task
from dcjax.recipe.checks import require
from dcjax.rewards.in_process import InProcessRewards, Rewards, load_reward
from dcjax.rewards.pool import RewardPool
from dcjax.rewards.processes import Reward
from dcjax.rewards.shaping import soft_overlong_punishment


@dataclass(frozen=True)
class RewardConfig:
    """What rewards responses, where, and within which limits."""

    function: str | None = None
    """Reward function MODULE:FUNCTION of an installed package that replaces the task's; docs/rewards.md describes its
    arguments. One of your own stands in a recipe: docs/tasks.md."""
    workers: int = 0
    """Number of reward processes per host; 0 computes rewards in the trainer's process, without limits."""
    timeout: float = 2.0
    """Seconds that a worker may spend on one answer; an answer that takes longer scores 0."""
    warm_up: float = 60.0
    """Seconds that the first call in each worker may take, which is made before any answer is scored there.
    A call that takes longer ends the run."""
    memory: int = 1024
    """Memory in MiB by which answers may make a worker grow; an answer that needs more scores 0."""
    overlong_buffer: int = 0
    """Number of tokens before rollout.max_response_length over which the length penalty rises to
    overlong_factor (DAPO's overlong shaping); 0 disables it. Accuracies leave the penalty out."""
    overlong_factor: float = 1.0
    """Largest penalty for a response's length."""

    def __post_init__(self):
        require("reward.", self, {"workers": 0, "memory": 1, "overlong_buffer": 0, "overlong_factor": 0})
        for name in ("timeout", "warm_up"):
            if not (math.isfinite(seconds := getattr(self, name)) and seconds > 0):
                raise ValueError(f"reward.{name} is {seconds}; it must be above 0 seconds")

    def check(self, task: Task, *, max_response_length: int) -> None:
        """Raises ValueError for a task's reward that needs workers and has none, or a buffer longer than a response."""
        unlimited = task.needs_workers and not self.workers and self.function is None
        if unlimited and self.verifier(task) == task.reward:
            raise ValueError(
                "reward.workers is 0; this task's answers may take any time and memory, and need worker processes: "
                "as many as there are cores to spare, 8 say"
            )
        if self.overlong_buffer > max_response_length:
            raise ValueError(
                f"reward.overlong_buffer is {self.overlong_buffer}; "
                f"it must be at most rollout.max_response_length, {max_response_length}"
            )

    def verifier(self, task: Task) -> Reward:
        """The task's reward, or `function`. A subclass that defines this has a verifier of its own.

        Raises:
          ValueError: `function` cannot be imported.
        """
        return task.reward if self.function is None else load_reward(self.function)

    def open(self, verifier: Reward) -> AbstractContextManager[Rewards]:
        """The function in worker processes, or in this one.

        Raises:
          ValueError: workers cannot import it.
        """
        if not self.workers:
            return nullcontext(InProcessRewards(verifier))
        return RewardPool(
            verifier,
            workers=self.workers,
            timeout=self.timeout,
            memory=self.memory * 2**20,
            warm_up=self.warm_up,
        )

    def length_rewards(self, lengths: np.ndarray, *, max_response_length: int) -> np.ndarray:
        """At most 0: DAPO's overlong shaping of responses of these lengths in tokens, float32 [N]."""
        if not self.overlong_buffer:
            return np.zeros(len(lengths), np.float32)
        return soft_overlong_punishment(
            lengths, max_length=max_response_length, buffer=self.overlong_buffer, factor=self.overlong_factor
        )
