"""Which benchmarks a suite has, and how they are sampled."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass

from dcjax.data.chat import Thinking
from dcjax.data.datasets import datasets
from dcjax.data.templates import TemplateName, check_answer_start, templates
from dcjax.errors import RunError


@dataclass(frozen=True)
class Benchmark:
    """A data set, with how many samples each of its problems gets."""

    dataset: str
    title: str
    samples: int


SUITES: dict[str, tuple[Benchmark, ...]] = {
    # These are paper A's, in the order of its tables.
    "paper": (
        Benchmark("aime24", "AIME24", 32),
        Benchmark("aime25", "AIME25", 32),
        Benchmark("amc23", "AMC23", 32),
        Benchmark("math500", "MATH-500", 4),
        Benchmark("minerva", "Minerva", 4),
        Benchmark("olympiadbench", "Olympiad", 4),
    ),
}


@dataclass(frozen=True)
class SuiteConfig:
    """How a suite is sampled; the defaults are paper A's.

    Raises:
      RunError: a field is out of range.
    """

    suite: str = "paper"
    """A name in `SUITES`."""
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 1.0
    """The most probable tokens can be drawn, until they hold this much probability; 1 is all tokens."""
    max_response_length: int = 32_768
    """Longest response (tokens), unless the model has too few positions."""
    samples: int | None = None
    """How many samples a problem gets; None is each benchmark's own number."""
    problems: int | None = None
    """How many problems of each benchmark are asked, from the first one on; None is all."""
    template: TemplateName | None = None
    """What surrounds questions and reads answers; None is the template that the run was trained with, or boxed."""
    thinking: Thinking | None = None
    """What the chat template is told of thinking; None is as the run was trained, or auto."""
    answer_start: str | None = None
    """The beginning of each answer, which the model continues; None is as the run was trained, or nothing."""
    seed: int = 0
    """The seed of the samples."""

    def __post_init__(self):
        if self.suite not in SUITES:
            raise RunError(f"suite is {self.suite!r}; it must be one of {', '.join(SUITES)}")
        if self.template is not None and self.template not in templates:
            raise RunError(f"template is {self.template!r}; it must be one of {', '.join(templates)}")
        if self.thinking is not None and self.thinking not in (kinds := typing.get_args(Thinking)):
            raise RunError(f"thinking is {self.thinking!r}; it must be one of {', '.join(kinds)}")
        try:
            check_answer_start(self.answer_start or "")
        except ValueError as error:
            raise RunError(str(error).replace("_", "-", 1)) from None
        for name in ("samples", "problems", "max_response_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RunError(f"{name.replace('_', '-')} is {value}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise RunError(f"temperature is {self.temperature}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise RunError(f"top-p is {self.top_p}; it must lie within (0, 1]")
        if not 0 <= self.seed < 2**63:
            raise RunError(f"seed is {self.seed}; it must be at least 0 and below 2**63")

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """The benchmarks of the suite."""
        return SUITES[self.suite]

    def samples_of(self, benchmark: Benchmark) -> int:
        """How many samples a problem of the benchmark gets."""
        return self.samples or benchmark.samples


def published_counts(benchmark: Benchmark) -> tuple[int, ...]:
    """How many problems a benchmark has; several numbers if publishers differ."""
    return datasets[benchmark.dataset].counts
