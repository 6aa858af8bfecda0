"""What rewards responses, and within which limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dcjax.recipe.checks import require


@dataclass(frozen=True)
class RewardConfig:
    """What rewards responses, where, and within which limits."""

    function: str | None = None
    """Reward function MODULE:FUNCTION that replaces the task's; docs/rewards.md describes its arguments."""
    workers: int = 0
    """Number of reward processes per host; 0 computes rewards in the trainer's process, without limits."""
    timeout: float = 2.0
    """Seconds that a worker may spend on one answer; an answer that takes longer scores 0."""
    warm_up: float = 60.0
    """Seconds that the first call in each worker may take, which is made before any answer is judged there.
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
