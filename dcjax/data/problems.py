"""Problems that are read once and kept: two lists, of which training shuffles one and evaluation walks the other."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcjax.data.datasets import Example
from dcjax.data.stream import draw
from dcjax.data.task import Demonstration, Problem, Problems, Split

TEMPLATE = "prompt template"
"""What surrounds the questions in prompts is called so where a run is compared with its data."""


@dataclass(frozen=True)
class TextProblem:
    """A prompt, and the answer to it."""

    prompt: str
    answer: str
    question: str | None = None
    """What is asked, as it stands in the prompt, where the rest of the prompt is a template; None where that is not
    known. A run that is resumed tells by it whether questions or the template have changed."""
    solution: str | None = None
    """A right response, without the token that ends it, which a warm start imitates; None where there is none."""
    record: Mapping[str, Any] | None = None
    """What else belongs to it, for a reward that takes the keyword `record`."""


@dataclass(frozen=True)
class FixedProblems(Problems):
    """Training problems, drawn epoch by epoch in shuffled orders, and held-out ones, which come round in their own.

    Raises:
      ValueError: there is none for training, or none held out, or a prompt is empty.
    """

    train: Sequence[Problem]
    heldout: Sequence[Problem]
    names: tuple[str, str] = ("train", "heldout")
    """What the two are called where a run is compared with its data."""
    golds: Sequence[Example] = ()
    """The examples of files that the problems of both splits were made of; empty where the answers are no golds."""

    def __post_init__(self) -> None:
        for name, problems in zip(self.names, (self.train, self.heldout), strict=True):
            if not problems:
                raise ValueError(f"{name} has no problem; there must be at least one")
            if not all(problem.prompt for problem in problems):
                raise ValueError(f"{name} has a problem with an empty prompt; a prompt must have at least one token")

    def problems(self, split: Split, seed: int, start: int, count: int) -> list[Problem]:
        """Problems start, ..., start + count - 1 of a split: a pure function of the arguments.

        Of n held-out problems, number i is the (i mod n)-th, whatever the seed: k · n of them are k samples of each.
        """
        if split == "train":
            return [self.train[number] for number in draw(len(self.train), seed=seed, start=start, count=count)]
        return [self.heldout[number % len(self.heldout)] for number in range(start, start + count)]

    def demonstrations(self, *, seed: int, step: int, count: int, scratchpad_fraction: float) -> list[Demonstration]:
        """Training problems that have a solution, epoch by epoch in shuffled orders; none where none has one."""
        solved = self._solved
        if not solved:
            return []
        return [solved[number] for number in draw(len(solved), seed=seed, start=(step - 1) * count, count=count)]

    @functools.cached_property
    def _solved(self) -> list[Demonstration]:
        pairs = ((problem.prompt, getattr(problem, "solution", None)) for problem in self.train)
        return [Demonstration(prompt, solution) for prompt, solution in pairs if solution is not None]

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """How many problems of each kind there are, with a SHA-256 of their questions and answers in their order.

        Where questions are known apart from their prompts, `TEMPLATE` has a SHA-256 of what surrounds them there.
        """
        described = dict(zip(self.names, map(_describe, (self.train, self.heldout)), strict=True))
        asked = [(each.prompt, question) for each in (*self.train, *self.heldout) if (question := _question(each))]
        # a prompt that does not hold its question as it is stands there whole
        around = sorted({prompt.replace(question, "\0", 1) for prompt, question in asked})
        return described | ({TEMPLATE: f"SHA-256 {_digest(around)}"} if around else {})


def _describe(problems: Sequence[Problem]) -> str:
    asked = [(_question(each) or each.prompt, each.answer, *_besides(each)) for each in problems]
    return f"{len(problems)} problems (SHA-256 {_digest(asked)})"


def _besides(problem: Problem) -> list[Any]:
    """What a problem has beside its question and its answer."""
    return [each for name in ("solution", "record") if (each := getattr(problem, name, None)) is not None]


def _question(problem: Problem) -> str | None:
    return getattr(problem, "question", None)


def _digest(value: Sequence) -> str:
    return hashlib.sha256(json.dumps(value, default=repr).encode()).hexdigest()[:16]
