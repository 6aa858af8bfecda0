r"""The data sets of both papers as declarations: what is published, under which columns, and what is stored of it.

The bare question and the answer of each row are stored as text: instructions that a publisher put around the question
are cut off, since the template chooses them (`dcjax.data.templates`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from dcjax.data.cells import plain, question_of, refused, text_of
from dcjax.rewards.boxed import last_box

SAMPLES = Path(__file__).parent / "samples"
"""Hand-written problems in each data set's schema: a `data_dir` for tests and first steps, no benchmark."""

_INTEGER = re.compile(r"([+-]?[0-9]{1,300})(\.0*)?")

DAPO_INSTRUCTIONS = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n",
    '\n\nRemember to put your answer on its own line after "Answer:".',
)
"""The text before and after each question in DAPO-Math-17K as published."""


@dataclass(frozen=True)
class Example:
    """One problem with its right answer."""

    id: str
    """The first 12 hex digits of the SHA-256 of the question's text, which are the same in every mirror."""
    question: str
    """The bare question, without instructions."""
    answer: str
    """The answer as `normalize_answer` returns it."""
    dataset: str
    """A name in `datasets`."""


@dataclass(frozen=True)
class Dataset:
    """What a data set looks like where it is published.

    Columns are tried in order, whatever their case; a dot leads into a struct. The first one present counts.
    """

    name: str
    split: str
    counts: tuple[int, ...]
    """The number of examples without duplicates; several numbers if publishers differ."""
    questions: tuple[str, ...]
    """Columns that may hold the question, which `question_of` reads."""
    answers: tuple[str, ...]
    """Columns that may hold the answer, which `normalize_answer` reads."""
    hub: str
    """Repository on the Hugging Face Hub."""
    licence: str
    citation: str
    files: tuple[str, ...] = ("*.parquet", "*.jsonl")
    """Patterns of its files there."""
    solutions: tuple[str, ...] = ()
    r"""Columns whose last `\boxed{...}` is the answer, if no column of answers is present."""
    context: str | None = None
    """Column of text that stands before the question; its cells may be empty."""
    around: tuple[str, str] = ("", "")
    """Instructions before and after the question, which are cut off."""

    def example(self, row: Mapping[str, Any]) -> Example | None:
        """The example of one row; None if its question or its answer is empty.

        Raises:
          ValueError: the row has no column for one of them, or a cell that is neither empty nor what it should be;
            the column is named.
        """
        columns = {name.lower(): value for name, value in row.items()}
        question = _read(columns, self.column(row, "question"), question_of)
        question = question.removeprefix(self.around[0]).removesuffix(self.around[1]).strip()
        column = self.column(row, "answer")
        answer = _read(columns, column, _boxed if column in self.solutions else normalize_answer)
        if not question or not answer:
            return None
        if self.context is not None and (context := _read(columns, self.context, text_of)):
            question = f"{context}\n\n{question}".strip()
        return Example(example_id(question), question, answer, self.name)

    def columns(self, names: Sequence[str]) -> list[str]:
        """Those of a file's columns that examples are made of; raises as `column`."""
        wanted = {self.column(names, kind).partition(".")[0] for kind in ("question", "answer")} | {self.context}
        return [name for name in names if name.lower() in wanted]

    def column(self, row: Collection[str], kind: str) -> str:
        """The column of a row, or of a schema, that holds its "question" or its "answer".

        Raises:
          ValueError: there is none; the message names the columns found and those wanted.
        """
        wanted = self.questions if kind == "question" else self.answers + self.solutions
        present = {name.lower() for name in row}
        for name in wanted:
            if name.partition(".")[0] in present:
                return name
        raise ValueError(
            f"{self.name}: no column of the {kind} among {', '.join(map(repr, row)) or 'none'}; "
            f"it must be one of {', '.join(map(repr, wanted))}"
        )


def example_id(question: str) -> str:
    """The id of a question, which its text determines."""
    return hashlib.sha256(question.encode()).hexdigest()[:12]


def normalize_answer(answer: Any) -> str:
    r"""An answer as text: 27.0 and "027" -> "27", "$\frac12$" -> r"\frac12", ["$1$", "$2$"] -> "1, 2"; "" for none.

    A float becomes the shortest decimal that is read back as the same float: 3e-05 -> "0.00003".

    Raises:
      ValueError: the answer is a mapping, a list in a list, or anything that `plain` refuses.
    """
    match plain(answer):
        case None:
            return ""
        case str() as text:
            text = text.strip()
            if len(text) > 1 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
                text = text[1:-1].strip()
            whole = _INTEGER.fullmatch(text)
            return str(int(whole[1])) if whole else text
        case [*entries] if not any(isinstance(entry, list | tuple) for entry in entries):
            return ", ".join(filter(None, map(normalize_answer, entries)))
        case int() | float() as number:
            return normalize_answer(f"{Decimal(repr(number)):f}")
    raise refused(answer, "text, a number or a list of them")


def _boxed(solution: Any) -> str:
    return normalize_answer(last_box(text_of(solution)))


def _read(columns: Mapping[str, Any], path: str, take: Callable[[Any], str]) -> str:
    """The cell at `path` as `take` reads it; an error of `take` then names the column."""
    try:
        return take(_value(columns, path))
    except ValueError as error:
        raise ValueError(f"column {path!r} {error}") from None


def _value(columns: Mapping[str, Any], path: str) -> Any:
    """The value at `path` in a row; None if something on the path is not a struct or lacks the field."""
    value: Any = columns
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


_AIME = "American Invitational Mathematics Examination, Mathematical Association of America, {}"

datasets: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="dapo-math-17k",
            split="train",
            counts=(17_398,),
            questions=("prompt",),
            # the first is that of the published schema, the others are of flat ones
            answers=("reward_model.ground_truth", "solution", "answer"),
            around=DAPO_INSTRUCTIONS,
            hub="BytedTsinghua-SIA/DAPO-Math-17k",
            licence="Apache-2.0",
            citation="Yu et al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv 2503.14476",
        ),
        Dataset(
            name="aime24",
            split="test",
            counts=(30,),
            questions=("problem", "question"),
            answers=("answer",),
            solutions=("solution",),
            hub="HuggingFaceH4/aime_2024",
            licence="the problems are of the Mathematical Association of America",
            citation=_AIME.format(2024),
        ),
        Dataset(
            name="aime25",
            split="test",
            counts=(30,),
            questions=("problem", "question"),
            answers=("answer",),
            solutions=("solution",),
            hub="math-ai/aime25",
            licence="the problems are of the Mathematical Association of America",
            citation=_AIME.format(2025),
        ),
        Dataset(
            name="amc23",
            split="test",
            counts=(40,),
            questions=("question", "problem"),
            answers=("answer",),
            hub="math-ai/amc23",
            licence="the problems are of the Mathematical Association of America",
            citation="American Mathematics Competitions 12, Mathematical Association of America, 2022 and 2023",
        ),
        Dataset(
            name="math500",
            split="test",
            counts=(500,),
            questions=("problem", "question"),
            answers=("answer",),
            solutions=("solution",),
            hub="HuggingFaceH4/MATH-500",
            licence="MIT",
            citation="Lightman et al., Let's Verify Step by Step, arXiv 2305.20050; of Hendrycks et al.'s MATH, "
            "arXiv 2103.03874",
        ),
        Dataset(
            name="minerva",
            split="test",
            counts=(272,),
            questions=("question", "problem"),
            answers=("answer",),
            solutions=("solution",),
            hub="math-ai/minervamath",
            licence="the problems are of MIT OpenCourseWare, CC BY-NC-SA 4.0",
            citation="Lewkowycz et al., Solving Quantitative Reasoning Problems with Language Models, arXiv 2206.14858",
        ),
        Dataset(
            name="olympiadbench",
            split="test",
            counts=(674, 675),
            questions=("question", "problem"),
            answers=("final_answer", "answer"),
            context="context",
            hub="Hothan/OlympiadBench",
            # the part that is open-ended competition mathematics in English, without pictures
            files=("*OE_TO_maths_en_COMP*.parquet",),
            licence="Apache-2.0",
            citation="He et al., OlympiadBench, arXiv 2402.14008",
        ),
    )
}


def find_dataset(name: str) -> Dataset:
    """The declaration of a data set.

    Raises:
      ValueError: there is no such data set.
    """
    if name not in datasets:
        raise ValueError(f"dataset is {name!r}; it must be one of {', '.join(datasets)}")
    return datasets[name]
