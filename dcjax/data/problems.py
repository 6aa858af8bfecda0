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


@dataclass(frozen=True)
class TextProblem:
    """A prompt, and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class FixedProblems:
    """Training problems, drawn epoch by epoch in shuffled orders, and held-out ones, which come round in their own.

    Raises:
      ValueError: there is none for training, or none held out.
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

    def problems(self, split: Split, seed: int, start: int, count: int) -> list[Problem]:
        """Problems start, ..., start + count - 1 of a split: a pure function of the arguments.

        Of n held-out problems, number i is the (i mod n)-th, whatever the seed: k · n of them are k samples of each.
        """
        if split == "train":
            return [self.train[number] for number in draw(len(self.train), seed=seed, start=start, count=count)]
        return [self.heldout[number % len(self.heldout)] for number in range(start, start + count)]

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """How many problems of each kind there are, and a SHA-256 of them in their order."""
        return dict(zip(self.names, map(_describe, (self.train, self.heldout)), strict=True))


def _describe(problems: Sequence[Problem]) -> str:
    digest = hashlib.sha256(json.dumps([(each.prompt, each.answer) for each in problems]).encode()).hexdigest()
    return f"{len(problems)} problems (SHA-256 {digest[:16]})"
