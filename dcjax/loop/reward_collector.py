"""The rewards of a run's responses: where they come from, and how they are collected while others are sampled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from dcjax.data.datasets import Example
from dcjax.data.task import Problem, Problems, decode_responses
from dcjax.data.templates import templates
from dcjax.errors import RunError
from dcjax.recipe.config import Config
from dcjax.rewards.golds import unreadable
from dcjax.rewards.in_process import Rewards
from dcjax.rewards.pool import Pending, RewardError
from dcjax.rewards.processes import CORRECT, Reward
from dcjax.sharding.hosts import gather, is_main, of_all_processes, share
from dcjax.user_code import refusals_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dcjax.serving.rollout import Ended

TOLD = 20
"""Golds that cannot be read, of a run, that are named."""


def open_rewards(config: Config) -> AbstractContextManager[Rewards]:
    """The run's reward in its worker processes, or in this one; nothing is started before it is entered.

    Raises:
      RunError: the reward cannot be used.
    """
    with refusals_of(config.reward, config.task):
        return config.reward.open(_verifier(config))


def _verifier(config: Config) -> Reward:
    with refusals_of(config.reward, config.task):
        verifier = config.reward.verifier(config.task)
    if not callable(verifier):
        raise RunError(
            f"the reward of {type(config.reward).__qualname__} and {type(config.task).__qualname__} is {verifier!r}, "
            f"a {type(verifier).__name__}; it must be a function"
        )
    return verifier


def check_golds(config: Config, problems: Problems) -> None:
    """Names the golds that a run's reward cannot read, before anything is sampled; as `tell_unreadable`.

    Raises:
      RunError: the reward cannot be used, or as `tell_unreadable`.
    """
    tell_unreadable(problems.golds, _verifier(config))


def tell_unreadable(golds: Sequence[Example], reward: Reward) -> list[Example]:
    """The golds of which a template's reward knows no other spelling; told of on standard error, on process 0 only.

    Args:
      golds: examples whose answers responses will be rewarded by.
      reward: of the run; where it is a user's own, nothing is known of what it reads, and the list is empty.

    Raises:
      RunError: the processes that read them could not be started.
    """
    if not is_main() or reward not in [template.reward for template in templates.values()]:
        return []
    try:
        texts = unreadable(example.answer for example in golds)
    except RuntimeError as error:
        raise RunError(one_line(error)) from None
    found = [example for example in golds if example.answer in texts]
    for example in found[:TOLD]:
        print(f"dcjax: {example.dataset}: gold {example.answer!r} of {example.id} cannot be read", file=sys.stderr)
    if found:
        more = f" ({len(found) - TOLD} more are not listed; dcjax data lists all)" if len(found) > TOLD else ""
        print(
            f"dcjax: {len(found)} of {len(golds)} golds cannot be read{more}: of these only their own text is right, "
            "and any other spelling scores 0",
            file=sys.stderr,
        )
    return found


def one_line(error: RuntimeError) -> str:
    """What a pool says, without the traceback that follows."""
    return str(error).splitlines()[0]


def tell_timeouts(timeouts: int, answers: int) -> None:
    """Tells, on standard error, of a batch of which most answers took too long: its rewards say nothing."""
    if 2 * timeouts > answers:
        print(
            f"dcjax: {timeouts} of {answers} answers took longer than an answer may (reward.timeout) and score 0; "
            "allow more time, or fewer workers on busy cores",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class Scores:
    """The rewards of N responses, and of those that consist of parts, each part by its name; NaN where one has none."""

    rewards: Float32[np.ndarray, "N"]
    parts: dict[str, Float32[np.ndarray, "N"]] = field(default_factory=dict)

    @property
    def graded(self) -> Float32[np.ndarray, "N"]:
        """What accuracies are told by (`Task.solved`): the part `CORRECT`, or the reward of an answer without one."""
        correct = self.parts.get(CORRECT, self.rewards)
        return np.where(np.isnan(correct), self.rewards, correct)

    def of_rows(self, rows: np.ndarray) -> Self:
        """Those of some responses."""
        return type(self)(self.rewards[rows], {name: part[rows] for name, part in self.parts.items()})

    @classmethod
    def joined(cls, scores: Sequence[Scores]) -> Self:
        """One after the other."""
        names = {name for each in scores for name in each.parts}
        return cls(
            np.concatenate([each.rewards for each in scores]),
            {name: np.concatenate([each.part(name) for each in scores]) for name in sorted(names)},
        )

    def part(self, name: str) -> Float32[np.ndarray, "N"]:
        """A part; NaN where none of the rewards has it."""
        return self.parts.get(name, np.full(len(self.rewards), np.nan, np.float32))

    def of_all_processes(self, mesh: Mesh) -> Self:
        """Those of all processes, in order, on each of them; mesh as for `gather`."""
        names = {name for each in of_all_processes({"names": list(self.parts)}, mesh) for name in each["names"]}
        rewards, parts = gather((self.rewards, {name: self.part(name) for name in sorted(names)}), mesh)
        return type(self)(rewards, parts)

    def parts_of(self, row: int) -> dict[str, float]:
        """The parts of one reward, by name."""
        return {name: float(part[row]) for name, part in sorted(self.parts.items()) if not np.isnan(part[row])}

    def part_means(self) -> dict[str, float]:
        """The mean of each part over the responses that have it, by the names of metrics.jsonl; none if no one has."""
        there = {name: part[~np.isnan(part)] for name, part in sorted(self.parts.items())}
        return {f"reward_parts/{name}": float(np.mean(part)) for name, part in there.items() if len(part)}


class RewardCollector:
    """The scores of one rollout, begun as its samples end: of this process's share of the problems.

    Args:
      rewards: of responses, as `open_rewards` gives them.
      tokenizer: turns them into text.
      problems: of all processes.
      samples_per_prompt: as of the rollout.
    """

    def __init__(
        self,
        rewards: Rewards,
        tokenizer: PreTrainedTokenizerFast,
        problems: Sequence[Problem],
        *,
        samples_per_prompt: int,
    ):
        mine = share(len(problems))
        self._rewards, self._tokenizer = rewards, tokenizer
        self._first = mine.start * samples_per_prompt
        self._asked = [problem for problem in problems[mine] for _ in range(samples_per_prompt)]
        self._begun: list[tuple[list[int], Pending]] = []

    def submit(self, ended: Ended) -> None:
        """Begins to reward samples that have ended."""
        places = ended.samples - self._first
        mine = np.flatnonzero((places >= 0) & (places < len(self._asked)))
        if not len(mine):
            return
        rows = places[mine].tolist()
        finished = ended.finished[mine]
        texts = decode_responses(self._tokenizer, [ended.responses[number] for number in mine], finished)
        asked = [self._asked[row] for row in rows]
        known = [{name: getattr(problem, name, None) for name in self._rewards.asks} for problem in asked]
        scores = self._rewards.submit(texts, [problem.answer for problem in asked], finished, known)
        self._begun.append((rows, scores))

    def result(self) -> Scores:
        """Waits for the scores of all samples, in their order, of this process's share.

        Raises:
          RunError: the reward raised on one of them, is not finite, or takes too long at its first call.
        """
        scores = Scores.joined([Scores(np.zeros(0, np.float32)), *(self._result(*part) for part in self._begun)])
        tell_timeouts(sum(part.timeouts for _, part in self._begun), len(scores.rewards))
        # every sample has ended once
        order = np.argsort([row for rows, _ in self._begun for row in rows])
        return scores.of_rows(order)

    def _result(self, rows: list[int], part: Pending) -> Scores:
        try:
            return Scores(part.result(), part.parts)
        except RewardError as error:
            response = self._first + rows[error.answer]
            raise RunError(
                f"the reward function failed on response {response}: {error.told}; a reward returns a number, or its "
                "parts by name, for every text"
            ) from error
        except RuntimeError as error:
            raise RunError(one_line(error)) from error
