"""What was sampled, problem by problem, in files of JSON lines: a killed evaluation resumes after the last line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from dcjax.errors import RunError
from dcjax.reporting.record import named_in_errors

SuitePolicy = Literal["deployed", "training"]
"""The policies that a suite evaluates; the average of the weights is not among them."""


@dataclass(frozen=True)
class Conditions:
    """What the samples of a problem depend on, beside the problem: equal conditions give the same samples."""

    benchmark: str
    policy: SuitePolicy
    weights: int
    """The fingerprint of every bit of the weights."""
    format: str
    """The format that the engine serves."""
    kv_cache: str
    keep: list[str]
    mismatch: dict[str, float]
    """What is added to the deployed policy on purpose."""
    samples: int
    seed: int
    temperature: float
    top_p: float
    max_response_length: int
    stop_tokens: list[int]
    template: str
    thinking: str
    answer_start: str
    chat_template: str | None
    """The `template_digest` of the model's tokenizer."""
    system_prompt: str = ""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the conditions."""
        described = asdict(self)
        if not self.system_prompt:  # of which earlier versions' logs know nothing
            del described["system_prompt"]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SuiteProblem:
    """One problem of a benchmark, as a policy gets it."""

    id: str
    prompt: list[int]
    answer: str


@dataclass(frozen=True)
class ProblemSamples:
    """The samples of one problem; the lists have an item for each sample."""

    problem: str
    """The id of the problem."""
    gold: str
    """The right answer by which the rewards were given."""
    answers: list[str | None]
    """The answers as written; None if a response has none or was cut off."""
    rewards: list[float]
    lengths: list[int]
    """The lengths of the responses (tokens)."""
    finished: list[bool]
    """Whether a response ended by itself."""


class SampleLog:
    """The file of one process, and what all processes' files held when it was opened.

    Args:
      directory: the same for all processes; it is made if it is missing.
      process: the number of this process.

    Raises:
      RunError: a damaged line stands before others; at the end of a file it is what a killed process leaves.
    """

    def __init__(self, directory: Path, process: int):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"samples-{process}.jsonl"
        _drop_torn_line(path)
        self._path, self._done = path, read_samples(directory)
        self._file = open(path, "ab")  # noqa: SIM115 (it lives as long as the log, and `__exit__` closes it)

    def missing(self, conditions: Conditions, problems: Sequence[SuiteProblem]) -> list[SuiteProblem]:
        """The problems that had not been sampled with their right answer when the log was opened."""
        done = self._done.get(conditions.fingerprint, {})
        return [problem for problem in problems if (problem.id, problem.answer) not in done]

    def append(self, conditions: Conditions, sampled: ProblemSamples) -> None:
        """Writes the line of one problem, and flushes it to the operating system."""
        named = {"conditions": conditions.fingerprint, "benchmark": conditions.benchmark, "policy": conditions.policy}
        line = json.dumps(named | {"seed": conditions.seed} | asdict(sampled), allow_nan=False)
        with named_in_errors(self._path):
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_samples(directory: Path) -> dict[str, dict[tuple[str, str], ProblemSamples]]:
    """The lines of all processes: by the fingerprint of their conditions, then by problem and right answer.

    Raises:
      RunError: as `SampleLog`.
    """
    found: dict[str, dict[tuple[str, str], ProblemSamples]] = {}
    for path in sorted(directory.glob("samples-*.jsonl")):
        for record in _records(path):
            # Lines of earlier versions do not say the gold; no gold is empty.
            record.setdefault("gold", "")
            sampled = ProblemSamples(**{name: record[name] for name in ProblemSamples.__annotations__})
            found.setdefault(record["conditions"], {})[sampled.problem, sampled.gold] = sampled
    return found


def _records(path: Path) -> Iterator[dict[str, Any]]:
    # What follows the last newline is still being written, or was when its process was killed.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            yield json.loads(line)
        except ValueError:
            raise RunError(f"{path}, line {number}: not a JSON object; remove the line to sample it anew") from None


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
