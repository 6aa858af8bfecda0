"""What the papers report, in percent."""

from __future__ import annotations

from dataclasses import dataclass

BENCHMARKS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")
"""The columns of paper A's tables."""


@dataclass(frozen=True)
class Published:
    """One row of paper A (arXiv:2606.08779): avg@32 of the first three benchmarks and avg@4 of the others, T = 0.7."""

    model: str
    rollouts: str
    """The format that rollouts were deployed in; training was in bf16."""
    algorithm: str
    scores: tuple[float, ...]
    """The scores by benchmark, in the order of `BENCHMARKS`."""

    @property
    def name(self) -> str:
        """`Qwen3-8B, bf16: GRPO`"""
        return f"{self.model}, {self.rollouts}: {self.algorithm}"

    @property
    def average(self) -> float:
        """The mean over the benchmarks."""
        return sum(self.scores) / len(self.scores)


PUBLISHED = (
    # These are the main results.
    Published("Qwen3-8B", "bf16", "GRPO", (58.8, 40.0, 90.4, 93.7, 51.0, 70.1)),
    Published("Qwen3-8B", "bf16", "DC-GRPO", (63.2, 52.5, 91.8, 94.2, 50.1, 74.4)),
    Published("Qwen3-30B-A3B", "bf16", "GRPO", (60.2, 43.6, 91.4, 95.5, 52.0, 71.3)),
    Published("Qwen3-30B-A3B", "bf16", "DC-GRPO", (66.8, 49.1, 91.9, 95.8, 52.9, 74.5)),
    # Rollouts of these were in fp8.
    Published("Qwen3-8B", "fp8", "GRPO", (53.2, 35.2, 89.5, 92.9, 50.0, 67.4)),
    Published("Qwen3-8B", "fp8", "DC-GRPO", (55.0, 44.1, 90.2, 94.4, 54.0, 70.9)),
    Published("Qwen3-30B-A3B", "fp8", "GRPO", (52.4, 37.5, 87.3, 93.8, 49.6, 70.5)),
    Published("Qwen3-30B-A3B", "fp8", "DC-GRPO", (56.6, 41.2, 91.8, 94.0, 50.5, 72.0)),
)
