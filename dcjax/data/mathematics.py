"""The task of the papers: published problems in mathematics, answered in words, and scored by their last answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcjax.data.chat_task import ChatTask, check_choice
from dcjax.data.datasets import Example, find_dataset
from dcjax.data.problems import FixedProblems, TextProblem
from dcjax.data.select import PAPER_B_EXAMPLES, Questions, select, share_of
from dcjax.data.sources import require_files
from dcjax.data.task import encode_prompts
from dcjax.data.templates import templates
from dcjax.paths import localize
from dcjax.rewards.processes import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MathTask(ChatTask):
    """Problems of one data set for training, and of another to be measured by.

    Raises:
        ValueError: a field is out of range.
    """

    dataset: str = "dapo-math-17k"
    """Data set to train on."""
    heldout: str = "aime24"
    """Data set on which held-out accuracy is measured."""
    data_dir: Path = Path("data")
    """Directory with local copies of both data sets."""
    subset: str = "all"
    """Share of the training problems: all, 25% or 2.5%; smaller subsets are contained in larger ones."""
    questions: Questions = "all"
    """All, or those in English with an integer answer: with prompts of at most 1,024 tokens, our reading of paper B's
    filter."""
    index_file: Path | None = None
    """File with the ids of the training problems, one per line, which replaces `questions`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        localize(self, "task.")
        find_dataset(self.dataset)
        find_dataset(self.heldout)
        share_of((), self.subset)
        check_choice("questions", self.questions, Questions)

    @property
    def reward(self) -> Reward:
        """The template's."""
        return templates[self.template].reward

    def check_files(self) -> None:
        """Looks for the copies of both data sets; raises as `require_files`."""
        require_files([self.dataset, self.heldout], self.data_dir, option="--task.data_dir")

    def open(self, tokenizer: PreTrainedTokenizerFast) -> FixedProblems:
        """Reads both data sets, and prepares them where that is still to be done; logs how many problems are left.

        Raises:
          FileNotFoundError: there is no copy of one of them; says what to put where.
          ValueError: a copy of another schema, nothing left to train on, a held-out prompt that is too long, or a chat
            template that cannot be used.
        """
        from dcjax.data.store import load_examples

        def prompt_lengths(examples: Sequence[Example]) -> list[int]:
            return [len(ids) for ids in encode_prompts(tokenizer, self._problems(tokenizer, examples))]

        train, counts = select(
            load_examples(self.dataset, self.data_dir),
            questions=self.questions,
            index_file=self.index_file,
            lengths=prompt_lengths,
            max_length=self.max_prompt_tokens,
            subset=self.subset,
        )
        steps = ", ".join(f"{name} {left:,}" for name, left in counts.items())
        _log.info("%s: %s (paper B's filter left about %d)", self.dataset, steps, PAPER_B_EXAMPLES)
        if not train:
            raise ValueError(f"{self.dataset} has nothing left to train on: {steps}")
        heldout = load_examples(self.heldout, self.data_dir)
        if (longest := max(prompt_lengths(heldout))) > self.max_prompt_tokens:
            raise ValueError(
                f"task.max_prompt_tokens is {self.max_prompt_tokens}; {self.heldout} has a prompt of {longest}"
            )
        return FixedProblems(
            self._problems(tokenizer, train),
            self._problems(tokenizer, heldout),
            names=(f"train {self.dataset}", f"heldout {self.heldout}"),
            golds=[*train, *heldout],
        )

    def _problems(self, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[TextProblem]:
        prompt = self.asked.prompt
        return [TextProblem(prompt(tokenizer, each.question), each.answer, each.question) for each in examples]
