"""What a run's responses are judged by, and how they are while others are still sampled."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from transformers import PreTrainedTokenizerFast

from dcjax.config import Config
from dcjax.data.task import Problem, decode_responses
from dcjax.distributed import share
from dcjax.errors import RunError
from dcjax.rewards.pool import Pending, RewardError, RewardPool
from dcjax.rewards.scorer import InProcess, Scorer, load_reward
from dcjax.serving.rollout import Ended


def open_scorer(config: Config) -> AbstractContextManager[Scorer]:
    """The run's reward in its worker processes, or in this one.

    Raises:
      RunError: `reward.function` cannot be used.
    """
    settings = config.reward
    try:
        reward = config.task.reward if settings.function is None else load_reward(settings.function)
        if not settings.workers:
            return nullcontext(InProcess(reward))
        return RewardPool(reward, workers=settings.workers, timeout=settings.timeout, memory=settings.memory * 2**20)
    except ValueError as error:
        raise RunError(str(error)) from None


class Judging:
    """The scores of one rollout, begun as its samples end: of this process's share of the problems.

    Args:
      scorer: judges them.
      tokenizer: turns them into text.
      problems: of all processes.
      samples_per_prompt: as of the rollout.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerFast,
        problems: Sequence[Problem],
        *,
        samples_per_prompt: int,
    ):
        mine = share(len(problems))
        self._scorer, self._tokenizer = scorer, tokenizer
        self._first = mine.start * samples_per_prompt
        self._golds = [problem.answer for problem in problems[mine] for _ in range(samples_per_prompt)]
        self._begun: list[tuple[list[int], Pending]] = []

    def begin(self, ended: Ended) -> None:
        """Begins with samples that have ended."""
        places = ended.samples - self._first
        mine = np.flatnonzero((places >= 0) & (places < len(self._golds)))
        if not len(mine):
            return
        rows = places[mine].tolist()
        finished = ended.finished[mine]
        texts = decode_responses(self._tokenizer, [ended.responses[number] for number in mine], finished)
        scores = self._scorer.submit(texts, [self._golds[row] for row in rows], finished)
        self._begun.append((rows, scores))

    def result(self) -> np.ndarray:
        """Waits for the scores of all samples; float32, in their order, of this process's share.

        Raises:
          RunError: the reward raised on one of them.
        """
        scores = np.zeros(len(self._golds), np.float32)
        try:
            for rows, part in self._begun:
                scores[rows] = part.result()
        except RewardError as error:
            *_, last = str(error).strip().splitlines()
            raise RunError(f"the reward function failed: {last}; a reward returns a number for every text") from error
        return scores
