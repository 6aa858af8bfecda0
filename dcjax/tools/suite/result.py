"""What a suite found: accuracies with intervals, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dcjax.errors import RunError
from dcjax.reporting.statistics import bootstrap_interval, majority_at_k, paired_bootstrap, pass_at_k
from dcjax.tools.suite.log import ProblemSamples, SuitePolicy

RESULT = "suite.json"
"""The name of a result's file, in the directory of the result."""

AVERAGE = "average"
"""Stands in place of a benchmark's name for the average over all benchmarks, in which each counts equally."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems."""

    value: float
    interval: tuple[float, float]
    """The 95% interval over problems."""


@dataclass(frozen=True)
class Score:
    """One policy on one benchmark."""

    benchmark: str
    problems: int
    samples: int
    """How many samples a problem has."""
    accuracy: Estimate
    """avg@k, where k is `samples`."""
    pass_at: dict[int, Estimate]
    """pass@k, by k."""
    majority_at: dict[int, Estimate]
    """maj@k, by k."""
    mean_length: float
    """The mean length of a response (tokens)."""
    unfinished: int
    """How many responses were cut off at the limit."""
    by_problem: dict[str, float]
    """The mean over a problem's samples, by the problem's id."""

    @property
    def unfinished_share(self) -> float:
        """The share of all responses that were cut off at the limit."""
        return self.unfinished / (self.problems * self.samples)


@dataclass(frozen=True)
class PolicyScores:
    """One policy on all benchmarks."""

    policy: SuitePolicy
    format: str
    benchmarks: list[Score]
    average: Estimate


@dataclass(frozen=True)
class SuiteResult:
    """What was measured of one model, and how."""

    name: str
    step: int | None
    suite: str
    settings: dict[str, Any]
    """The settings as `SuiteConfig` and the engine had them."""
    policies: list[PolicyScores]
    notes: list[str]
    """How the evaluation differs from the papers'."""
    unreadable: dict[str, dict[str, str]] = field(default_factory=dict)
    """The golds that cannot be read, by benchmark and problem's id; only the same text counted as right."""

    @property
    def title(self) -> str:
        """`my-run at step 40`"""
        return self.name if self.step is None else f"{self.name} at step {self.step}"


@dataclass(frozen=True)
class Compared:
    """One policy's accuracy minus another's, on the same problems."""

    benchmark: str
    difference: float
    interval: tuple[float, float]
    """The 95% interval of the paired bootstrap."""
    p_value: float


def score_benchmark(benchmark: str, sampled: Sequence[ProblemSamples]) -> Score:
    """The score of a benchmark from the samples of all its problems."""
    correct = np.array([problem.rewards for problem in sampled]) > 0
    samples = correct.shape[1]
    ks = [*(1 << power for power in range((samples - 1).bit_length())), samples]

    def majority(k: int) -> np.ndarray:
        rows = zip(sampled, correct.tolist(), strict=True)
        return np.array([majority_at_k(problem.answers, row, k) for problem, row in rows])

    accuracies = correct.mean(axis=1)
    return Score(
        benchmark=benchmark,
        problems=len(sampled),
        samples=samples,
        accuracy=_estimate(accuracies),
        pass_at={k: _estimate(pass_at_k(correct, k)) for k in ks},
        majority_at={k: _estimate(majority(k)) for k in ks},
        mean_length=float(np.mean([problem.lengths for problem in sampled])),
        unfinished=int(np.sum([np.logical_not(problem.finished) for problem in sampled])),
        by_problem={problem.problem: float(share) for problem, share in zip(sampled, accuracies, strict=True)},
    )


def score_policy(policy: SuitePolicy, format: str, scores: list[Score]) -> PolicyScores:
    """A policy's benchmarks with their average."""
    by_problem = [np.array(list(score.by_problem.values())) for score in scores]
    average = Estimate(float(np.mean([part.mean() for part in by_problem])), bootstrap_interval(by_problem))
    return PolicyScores(policy, format, scores, average)


def _estimate(scores: np.ndarray) -> Estimate:
    return Estimate(float(scores.mean()), bootstrap_interval([scores]))


def compare(ours: SuiteResult, theirs: SuiteResult) -> dict[SuitePolicy, list[Compared]]:
    """By policy, our accuracy minus theirs on each benchmark and on the average.

    Raises:
      RunError: they are not of the same problems.
    """
    return {
        policy.policy: differences(policy, other)
        for policy in ours.policies
        for other in theirs.policies
        if policy.policy == other.policy
    }


def differences(ours: PolicyScores, theirs: PolicyScores) -> list[Compared]:
    """Our accuracy minus theirs on each benchmark and on the average.

    Raises:
      RunError: they are not of the same problems.
    """
    others = {score.benchmark: score for score in theirs.benchmarks}
    parts = {score.benchmark: _paired(score, others.get(score.benchmark)) for score in ours.benchmarks}
    asked = {name: [part] for name, part in parts.items()} | {AVERAGE: list(parts.values())}
    return [Compared(name, **asdict(paired_bootstrap(part))) for name, part in asked.items()]


def _paired(ours: Score, theirs: Score | None) -> np.ndarray:
    if theirs is None or ours.by_problem.keys() != theirs.by_problem.keys():
        shared = len(ours.by_problem.keys() & (theirs.by_problem.keys() if theirs else ()))
        raise RunError(
            f"{ours.benchmark} has {ours.problems} problems here and {theirs.problems if theirs else 0} there, "
            f"{shared} of them the same; compare results on the same problems"
        )
    return np.array([accuracy - theirs.by_problem[problem] for problem, accuracy in ours.by_problem.items()])


def to_json(result: SuiteResult) -> str:
    """One line; all numbers are finite."""
    return json.dumps(asdict(result), allow_nan=False)


def read_result(path: Path) -> SuiteResult:
    """A result from its file, or from the directory that it was written to.

    Raises:
      RunError: there is no such file, or `to_json` did not write it.
    """
    path = path / RESULT if path.is_dir() else path
    try:
        record = json.loads(path.read_text())
        return SuiteResult(**record | {"policies": [_policy(policy) for policy in record["policies"]]})
    except FileNotFoundError:
        raise RunError(f"no result in {path}; give what dcjax evaluate --suite wrote, or its directory") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is not a result of dcjax evaluate --suite: {error}") from None


def _policy(record: dict[str, Any]) -> PolicyScores:
    benchmarks = [_score(score) for score in record["benchmarks"]]
    return PolicyScores(**record | {"benchmarks": benchmarks, "average": _read_estimate(record["average"])})


def _score(record: dict[str, Any]) -> Score:
    read: dict[str, Any] = {
        name: {int(k): _read_estimate(estimate) for k, estimate in record[name].items()}
        for name in ("pass_at", "majority_at")
    }
    return Score(**record | read | {"accuracy": _read_estimate(record["accuracy"])})


def _read_estimate(record: dict[str, Any]) -> Estimate:
    return Estimate(record["value"], tuple(record["interval"]))
