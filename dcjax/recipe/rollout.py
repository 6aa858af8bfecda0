"""What is sampled in one iteration of RL."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dcjax.recipe.checks import require

IN_PROCESS = "in_process"


@dataclass(frozen=True)
class RolloutConfig:
    """What is sampled in one RL iteration."""

    prompts: int = 32
    """Prompts per RL iteration."""
    group_size: int = 8
    """Responses per prompt (G); at least 2, because advantages are relative to the group."""
    temperature: float = 1.0
    """Sampling temperature; the trainer divides its own logits by it too."""
    top_k: int = 0
    """Sample only from the k most probable tokens; 0 samples from all.
    The candidate tokens are recorded, and the trainer's distribution is restricted to the same tokens."""
    top_p: float = 1.0
    """Sample only from the most probable of the top_k tokens, whose probabilities add up to this.
    A value below 1 needs a top_k."""
    replay_routing: bool = False
    """Route each token in the trainer to the experts that the sampler chose for it."""
    async_level: int = 0
    """Number of iterations by which sampling may run ahead of training: the bound on its weights' staleness.
    0 alternates the two; with serving.devices they run at the same time."""
    engine: str = IN_PROCESS
    """What samples: in_process, or a server of `dcjax serve RUN` by its address, grpc://HOST:PORT.
    A server takes its weights from the run's checkpoints, so they are as old as checkpoint.every lets them become."""
    patience: float = 600.0
    """Seconds that a server may be away before the run ends, with status 75, to be resumed later."""
    max_prompt_length: int = 13
    """Maximum prompt length in tokens."""
    max_response_length: int = 48
    """Maximum response length in tokens, including the end token."""

    def __post_init__(self):
        require(
            "rollout.",
            self,
            {
                "prompts": 1,
                "group_size": 2,
                "top_k": 0,
                "async_level": 0,
                "patience": 0,
                "max_prompt_length": 1,
                "max_response_length": 1,
            },
        )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"rollout.temperature is {self.temperature}; training needs one above 0")
        self._check_engine()
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p is {self.top_p}; it must lie within (0, 1]")
        if self.top_p < 1 and not self.top_k:
            raise ValueError(
                f"rollout.top_p is {self.top_p} without rollout.top_k: the trainer replays the truncation from the "
                "tokens that it left, of which there may then be a vocabulary; set rollout.top_k too, to 64, say"
            )

    def _check_engine(self):
        if self.engine == IN_PROCESS:
            return
        host, _, port = self.engine.removeprefix("grpc://").rpartition(":")
        if not (self.engine.startswith("grpc://") and host and port.isascii() and port.isdigit()):
            raise ValueError(
                f"rollout.engine is {self.engine!r}; it must be {IN_PROCESS} or the address of a server, such as "
                "grpc://127.0.0.1:9000"
            )
        for name in ("top_k", "replay_routing"):
            if value := getattr(self, name):
                raise ValueError(
                    f"rollout.{name} is {value}, and rollout.engine {self.engine}: a server does not record what that "
                    f"needs; leave rollout.{name} out, or sample {IN_PROCESS}"
                )

    @property
    def sequences(self) -> int:
        """Responses an iteration."""
        return self.prompts * self.group_size
