"""What a run is about: where problems come from, how they become tokens, and what rewards the responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from dcjax.data.datasets import Example
from dcjax.rewards.processes import Reward

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "heldout"]


class Problem(Protocol):
    """Something to answer."""

    @property
    def prompt(self) -> str:
        """The text that the policy goes on from."""
        ...

    @property
    def answer(self) -> str:
        """The right answer, for the task's reward."""
        ...


class Problems(Protocol):
    """An endless supply of them."""

    def problems(self, split: Split, seed: int, start: int, count: int) -> Sequence[Problem]:
        """Problems start, ..., start + count - 1 of a split: a pure function of the arguments."""
        ...

    @property
    def golds(self) -> Sequence[Example]:
        """The examples of files whose answers responses are rewarded by. Empty without files."""
        ...

    @property
    def fingerprint(self) -> dict[str, str]:
        """What files they were read from held, by data set: a run goes on with the same. Empty without files."""
        ...


class Task(Protocol):
    """A section of a run's config, from which everything else about its problems follows."""

    @property
    def max_prompt_length(self) -> int:
        """Tokens of the longest prompt."""
        ...

    @property
    def max_response_length(self) -> int:
        """Tokens that a right response may need; 0 where nothing is known of that."""
        ...

    @property
    def reward(self) -> Reward:
        """Judges a response."""
        ...

    def build_tokenizer(self, pretrained: Path | None) -> PreTrainedTokenizerFast:
        """The tokenizer, for a model that starts from the folder `pretrained` if that is not None."""
        ...

    def open(self, tokenizer: PreTrainedTokenizerFast) -> Problems:
        """The problems, read from wherever they are kept."""
        ...


def encode_prompts(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> list[list[int]]:
    """The token ids of each problem's prompt, unpadded, without a beginning-of-sequence token."""
    return encode(tokenizer, [problem.prompt for problem in problems])


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, and no others."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def decode_responses(
    tokenizer: PreTrainedTokenizerFast, responses: Sequence[np.ndarray], finished: Sequence[bool] | np.ndarray
) -> list[str]:
    """The text of each response, without special tokens, and without the token that ended it, special or not.

    Args:
      tokenizer: of the policy.
      responses: int [tokens] each, the end token included.
      finished: whether an end token was generated.
    """
    rows = [row[:-1] if ended else row for row, ended in zip(responses, finished, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
