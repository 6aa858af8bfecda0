"""Which examples of a data set are used: by share, language, length or a list of ids. Each step is counted."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from dcjax.data.datasets import Example

PAPER_B_EXAMPLES = 204 * 64
"""Paper B's "about 13k": an epoch of 204 iterations of 64 prompts."""

Questions = Literal["all", "english_integer"]

_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
_CHINESE = re.compile(r"[\u3000-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")
_INTEGER = re.compile(r"-?[0-9]+")


def share_of(examples: Sequence[Example], subset: str) -> list[Example]:
    """A share of the examples, in their order.

    Examples are ranked by a hash of their ids, and the first n · share of them are taken, rounded to the nearest
    number: so smaller shares lie within larger ones, and every mirror of a data set gives the same ones.

    Args:
      examples: the examples to choose from.
      subset: "all", or a percentage above 0 and at most 100: "25%", "2.5%".

    Raises:
      ValueError: `subset` is neither.
    """
    if subset == "all":
        return list(examples)
    matched = _SHARE.fullmatch(subset)
    if not matched or not 0 < (percent := float(matched[1])) <= 100:
        raise ValueError(f"subset is {subset!r}; it must be all, or a percentage such as 25% or 2.5%")
    ranked = sorted(examples, key=lambda example: hashlib.sha256(f"share {example.id}".encode()).digest())
    taken = {example.id for example in ranked[: round(len(ranked) * percent / 100)]}
    return [example for example in examples if example.id in taken]


def is_english_integer(example: Example) -> bool:
    """Whether the question holds no Chinese character and the answer is an integer.

    Only the size of paper B's filter is known ("about 13k"). This one, with prompts of at most 1,024 tokens, is ours.
    """
    return not _CHINESE.search(example.question) and bool(_INTEGER.fullmatch(example.answer))


def listed(examples: Sequence[Example], index_file: Path) -> list[Example]:
    """The examples whose ids a file lists, one per line, in the order of the file.

    Raises:
      ValueError: the file lists an id that no example has, lists one twice, lists none, or is not UTF-8.
    """
    by_id = {example.id: example for example in examples}
    try:
        ids = index_file.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{index_file} is not UTF-8: {error}") from None
    if unknown := [name for name in ids if name not in by_id]:
        raise ValueError(f"{index_file} lists {unknown[0]!r}, which is none of the {len(by_id)} examples' ids")
    if len(set(ids)) < max(len(ids), 1):
        raise ValueError(f"{index_file} must list at least one id, and none twice; it lists {len(ids)}")
    return [by_id[name] for name in ids]


def select(
    examples: Sequence[Example],
    *,
    questions: Questions,
    index_file: Path | None,
    lengths: Callable[[Sequence[Example]], Sequence[int]],
    max_length: int,
    subset: str,
) -> tuple[list[Example], dict[str, int]]:
    """The examples to train on, and how many were left after each step, by its name and in order.

    Args:
      examples: the examples to choose from.
      questions: "all", or "english_integer" for those that `is_english_integer` accepts.
      index_file: a file of ids, which replaces `questions`; None for no list.
      lengths: gives the number of tokens of each example's prompt.
      max_length: examples with longer prompts are left out.
      subset: the share of what the other steps left, as in `share_of`.

    Raises:
      ValueError: as `listed` and `share_of`.
    """
    counts = {"examples": len(examples)}
    if index_file is not None:
        left = listed(examples, index_file)
        counts["index_file"] = len(left)
    elif questions == "english_integer":
        left = [example for example in examples if is_english_integer(example)]
        counts["english_integer"] = len(left)
    else:
        left = list(examples)
    left = [example for example, length in zip(left, lengths(left), strict=True) if length <= max_length]
    counts["max_prompt_tokens"] = len(left)
    left = share_of(left, subset)
    counts["subset"] = len(left)
    return left, counts
