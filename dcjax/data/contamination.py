"""Sanity checks: evaluation questions that training has seen, and gold answers that their verifier refuses."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dcjax.data.datasets import Example
from dcjax.rewards.golds import unreadable
from dcjax.rewards.math import math_reward

NGRAM = 13
"""How many consecutive words shared with a training question count as overlap (GPT-3, arXiv 2005.14165, appendix C)."""

# a Chinese character is a word of its own: there are no spaces between them
_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+")


@dataclass(frozen=True)
class Overlap:
    """What an evaluation set shares with a training set: pairs of ids (training, evaluation), sorted."""

    dataset: str
    examples: int
    exact: tuple[tuple[str, str], ...]
    """The questions have the same words."""
    ngram: tuple[tuple[str, str], ...]
    """The questions share at least one n-gram of words, and are not the same."""

    @property
    def share(self) -> float:
        """The share of the evaluation examples that are in any pair."""
        return len({evaluation for _, evaluation in self.exact + self.ngram}) / self.examples


def words(text: str) -> list[str]:
    """The words of a text, without case, punctuation and LaTeX's signs; characters are normalised (NFKC)."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def find_overlap(train: Sequence[Example], evaluation: Sequence[Example], *, n: int = NGRAM) -> Overlap:
    """Finds the questions of an evaluation set that a training set shares, as a whole or in n consecutive words.

    Args:
      train: the training examples.
      evaluation: the evaluation examples, at least one, all of one data set.
      n: how many consecutive words count as overlap; shorter questions overlap only if they are the same.
    """
    whole, parts = defaultdict(set), defaultdict(set)
    for example in evaluation:
        question = words(example.question)
        whole[tuple(question)].add(example.id)
        for gram in _ngrams(question, n):
            parts[gram].add(example.id)
    exact, ngram = set(), set()
    for example in train:
        question = words(example.question)
        exact |= {(example.id, other) for other in whole.get(tuple(question), ())}
        ngram |= {(example.id, other) for gram in _ngrams(question, n) for other in parts.get(gram, ())}
    return Overlap(evaluation[0].dataset, len(evaluation), tuple(sorted(exact)), tuple(sorted(ngram - exact)))


def _ngrams(question: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(question[start : start + n]) for start in range(len(question) - n + 1))


@dataclass(frozen=True)
class Golds:
    """The examples of a data set whose gold answers prevent fair scores."""

    unreadable: tuple[Example, ...]
    """Only the same text is right, and no other spelling of it."""
    refused: tuple[Example, ...]
    """Not even the same text in a box is right, so no response can score: too long, or with unmatched braces."""


def check_golds(examples: Sequence[Example]) -> Golds:
    r"""The gold answers that `math_reward` cannot read, and those that it scores 0 when they come back in `\boxed{}`.

    Raises:
      RuntimeError: as `dcjax.rewards.golds.unreadable`.
    """
    names = unreadable(example.answer for example in examples)
    return Golds(
        tuple(example for example in examples if example.answer in names),
        tuple(example for example in examples if not math_reward(box(example.answer), example.answer, finished=True)),
    )


def box(answer: str) -> str:
    """The answer in a box, as a response gives it."""
    return rf"\boxed{{{answer}}}"
