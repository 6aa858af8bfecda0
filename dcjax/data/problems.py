"""Problems that are read once and kept: two lists, of which training shuffles one and evaluation walks the other."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from dcjax.data.datasets import Example
from dcjax.data.stream import draw
from dcjax.data.task import Problem, Split

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


@dataclass(frozen=True)
class FixedProblems:
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
    asked = [(_question(each) or each.prompt, each.answer) for each in problems]
    return f"{len(problems)} problems (SHA-256 {_digest(asked)})"


def _question(problem: Problem) -> str | None:
    return getattr(problem, "question", None)


def _digest(value: Sequence) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
