"""A task from a file of one's own: questions and answers in the columns of a .jsonl or .parquet file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcjax.data.cells import plain, question_of, text_of
from dcjax.data.chat_task import ChatTask, check_choice
from dcjax.data.datasets import Example, example_id, normalize_answer
from dcjax.data.problems import FixedProblems, TextProblem
from dcjax.data.sources import KINDS, read_rows
from dcjax.data.task import encode
from dcjax.data.templates import templates
from dcjax.paths import localize
from dcjax.rewards.answers import Comparison, check_gold, judge
from dcjax.rewards.boxed import last_box
from dcjax.rewards.processes import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileTask(ChatTask):
    """Questions and answers of one file, put by the model's chat template.

    A whole row is the `record` of its problem, for a reward function that asks for it (docs/tasks.md).

    Raises:
      ValueError: a field is out of range.
    """

    path: Path | None = None
    """File with a problem per row: .jsonl or .parquet."""
    heldout_path: Path | None = None
    """File of the same columns with the problems that are measured by; without it, `heldout_share` are set aside."""
    heldout_share: float = 0.1
    """Share of the questions that are set aside, by a hash of their text: the same ones in every run."""
    question: str = "question"
    """Column of the question: a text, a user's message, or a chat that ends with one. A dot leads into a struct."""
    answer: str = "answer"
    """Column of the right answer; "" if there is none, for a reward function that reads the record."""
    answer_after: str = ""
    r"""Text in that column behind whose last occurrence the answer stands, such as #### in GSM8K. Without it, and with
    the comparison `math`, the last \boxed{...} is the answer, if the column has one."""
    solution: str = ""
    """Column of a right response, which a warm start imitates; "" if there is none."""
    comparison: Comparison = "math"
    """When an answer is right: `math` (equal by math-verify), `exact` (the same text), `integer`, `choice` (the letter
    of an option) or `regex` (the right answer is a regular expression)."""
    max_prompt_tokens: int = 512
    """Problems with longer prompts, template included, are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        localize(self, "task.")
        check_choice("comparison", self.comparison, Comparison)
        for name in ("path", "heldout_path"):
            if (path := getattr(self, name)) is not None and path.suffix not in KINDS:
                raise ValueError(f"task.{name} is {str(path)!r}; it must end in {' or '.join(KINDS)}")
        if not 0 < self.heldout_share < 1:
            raise ValueError(f"task.heldout_share is {self.heldout_share}; it must lie within (0, 1)")
        if not self.question:
            raise ValueError("task.question is ''; it must name the column of the question")

    @property
    def reward(self) -> Reward:
        """The comparison of what stands where the template asks for the answer."""
        if self.comparison == "math":
            return templates[self.template].reward
        return partial(judge, place=self.template, comparison=self.comparison)

    def check_files(self) -> None:
        """Looks for the files.

        Raises:
          FileNotFoundError: one is missing, or none is named.
        """
        if self.path is None:
            raise FileNotFoundError(
                "task.path is not given; it must name a .jsonl or .parquet file: --task.path problems.jsonl"
            )
        for name, path in (("path", self.path), ("heldout_path", self.heldout_path)):
            if path is not None and not path.is_file():
                raise FileNotFoundError(f"task.{name} is {path}; there is no such file")

    def open(self, tokenizer: PreTrainedTokenizerFast) -> FixedProblems:
        """Reads the files; logs how many problems are left.

        Raises:
          FileNotFoundError: as `check_files`.
          ValueError: a file that is not of its kind, lacks a column, or has a cell that is not what it should be; no
            problem left in one of the splits; or a chat template that cannot be used.
        """
        self.check_files()
        train = self._problems(tokenizer, self.path)
        if self.heldout_path is None:
            heldout = [each for each in train if self._is_heldout(each)]
            names = (f"train {self.path}", f"heldout {self.path}")
        else:
            heldout = self._problems(tokenizer, self.heldout_path)
            names = (f"train {self.path}", f"heldout {self.heldout_path}")
        measured = {each.question for each in heldout}
        train = [each for each in train if each.question not in measured]
        _log.info("%s: %d problems to train on, %d held out", self.path, len(train), len(heldout))
        if not (train and heldout):
            raise ValueError(
                f"{self.path} leaves {len(train)} problems to train on and {len(heldout)} held out; each must be at "
                "least 1: change task.heldout_share, or give task.heldout_path"
            )
        return FixedProblems(train, heldout, names=names, golds=self._golds([*train, *heldout]))

    def _is_heldout(self, problem: TextProblem) -> bool:
        digest = hashlib.sha256(f"held out {problem.question}".encode()).digest()
        return int.from_bytes(digest[:8]) < self.heldout_share * 2**64

    def _golds(self, problems: list[TextProblem]) -> list[Example]:
        """The answers that math-verify has to read."""
        if self.comparison != "math" or not self.answer or self.path is None:
            return []
        texts = ((problem.question or "", problem.answer) for problem in problems)
        return [Example(example_id(question), question, answer, self.path.name) for question, answer in texts]

    def _problems(self, tokenizer: PreTrainedTokenizerFast, path: Path | None) -> list[TextProblem]:
        """The problems of a file in its order, each row once."""
        problems, seen, left_out = [], set(), Counter[str]()
        for number, row in enumerate(read_rows(path or Path()), start=1):
            written = json.dumps(row, default=repr, sort_keys=True)
            try:
                problem = self._problem(row)
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from None
            if problem is None or written in seen:
                left_out["repeated" if written in seen else "without a question or an answer"] += 1
                continue
            seen.add(written)
            problems.append(problem)
        prompts = [self.asked.prompt(tokenizer, problem.question or "") for problem in problems]
        fits = [len(ids) <= self.max_prompt_tokens for ids in encode(tokenizer, prompts)]
        left_out[f"longer than task.max_prompt_tokens, {self.max_prompt_tokens}"] = fits.count(False)
        if told := [f"{count} rows {why}" for why, count in left_out.items() if count]:
            _log.info("%s: left out %s", path, ", ".join(told))
        pairs = zip(problems, prompts, fits, strict=True)
        return [replace(problem, prompt=prompt) for problem, prompt, fit in pairs if fit]

    def _problem(self, row: Mapping[str, Any]) -> TextProblem | None:
        """The problem of a row, its prompt still to be made; None for a row without a question or an answer."""
        question = question_of(self._cell(row, "question"))
        answer = self._answer(row)
        if not question or not (answer or not self.answer):
            return None
        solution = text_of(self._cell(row, "solution")) if self.solution else ""
        return TextProblem("", answer, question, solution or None, record=dict(row))

    def _answer(self, row: Mapping[str, Any]) -> str:
        if not self.answer:
            return ""
        cell = self._cell(row, "answer")
        if self.comparison == "math":
            text = normalize_answer(cell)
        else:
            text = "" if (cell := plain(cell)) is None else str(cell).strip()
        if self.answer_after:
            text = text.rpartition(self.answer_after)[2].strip()
        elif self.comparison == "math":
            text = normalize_answer(last_box(text) or text)
        if text:
            check_gold(text, self.comparison)
        return text

    def _cell(self, row: Mapping[str, Any], field: str) -> Any:
        path = getattr(self, field)
        value: Any = row
        for name in path.split("."):
            if not (isinstance(value, Mapping) and name in value):
                raise ValueError(
                    f"no column {path!r} among {', '.join(map(repr, row)) or 'none'}; task.{field} must name one"
                )
            value = value[name]
        return value
