"""What a run is about: where problems come from, how they become tokens, and what rewards the responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dcjax.data.datasets import Example
from dcjax.data.tokenizers import byte_tokenizer, load_tokenizer
from dcjax.rewards.processes import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "heldout"]


class Problem(Protocol):
    """Something to answer. It may also have a `record`, for a reward that asks for it."""

    @property
    def prompt(self) -> str:
        """The text that the policy continues."""
        ...

    @property
    def answer(self) -> str:
        """The right answer, for the task's reward."""
        ...


class Demonstration(NamedTuple):
    """A problem with a right response, to be imitated in a warm start."""

    prompt: str
    response: str
    """Without the token that ends it."""


class Problems(Protocol):
    """An endless supply of problems; `dcjax.data.problems.FixedProblems` is one from two lists.

    A class that inherits from this one must define `problems`. The rest has the defaults below.
    """

    def problems(self, split: Split, seed: int, start: int, count: int) -> Sequence[Problem]:
        """Problems start, ..., start + count - 1 of a split: a pure function of the arguments."""
        ...

    @property
    def golds(self) -> Sequence[Example]:
        """The examples of files whose answers responses are rewarded by. Empty without files."""
        return ()

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the files held that problems were read from: a run resumes with the same. Empty without files."""
        return {}

    def demonstrations(
        self, *, seed: int, step: int, count: int, scratchpad_fraction: float
    ) -> Sequence[Demonstration]:
        """What the warm start imitates at one of its steps: a pure function of the arguments.

        Args:
          seed: of the run.
          step: of the warm start, from 1.
          count: how many are wanted.
          scratchpad_fraction: the probability of each to have step-by-step reasoning, where the task knows such.

        Returns:
          As many as are wanted, or none where there are no solutions to imitate.
        """
        return ()


@runtime_checkable
class Curriculum(Protocol):
    """What `Problems` may be too: problems of training that change with success.

    Where it stands is a dict of JSON's values, empty at first, which the run's checkpoints hold.
    """

    def at(self, progress: dict[str, Any]) -> Problems:
        """The problems there."""
        ...

    def after(self, progress: dict[str, Any], attempted: Sequence[tuple[Problem, float]]) -> dict[str, Any]:
        """Where it stands after an iteration.

        Args:
          progress: where it stood.
          attempted: the problems, and the share of right responses to each (`Task.solved`).
        """
        ...

    def levels(self, progress: dict[str, Any]) -> dict[str, float]:
        """What is logged of it, by name."""
        ...


class Task(Protocol):
    """The `task` section of a recipe: a frozen dataclass from which everything about a run's problems follows.

    A class that inherits from this one must define `max_prompt_length`, `reward` and `open`. The rest has the defaults
    below, or stands in the class alike where it does not inherit. docs/tasks.md has a complete example.
    """

    @property
    def max_prompt_length(self) -> int:
        """Tokens of the longest prompt."""
        ...

    @property
    def max_response_length(self) -> int:
        """Tokens that a right response may need; 0, the default, where that is not known."""
        return 0

    @property
    def reward(self) -> Reward:
        """The function that scores a response, unless the reward section replaces it."""
        ...

    @property
    def needs_workers(self) -> bool:
        """Whether its reward may take any time and memory, so that only worker processes may run it."""
        return False

    def check_files(self) -> None:
        """Looks whether the files that `open` reads are there, without reading them; the default knows of none.

        Raises:
          FileNotFoundError: some are missing; the message names all of them, and says what to put where.
        """
        return None

    def open(self, tokenizer: PreTrainedTokenizerFast) -> Problems:
        """The problems, read from wherever they are kept.

        Raises:
          FileNotFoundError: a file is missing; the message says what to put where.
          ValueError: a file or a field cannot be used.
        """
        ...

    def build_tokenizer(self, pretrained: Path | None) -> PreTrainedTokenizerFast:
        """The tokenizer: of the Hugging Face folder that the model starts from, or one of bytes where there is none.

        Raises:
          ValueError: as `load_tokenizer`.
        """
        return byte_tokenizer() if pretrained is None else load_tokenizer(pretrained)

    def solved(self, rewards: np.ndarray) -> np.ndarray:
        """Which responses count as right in an evaluation, bool [N], by their rewards, float32 [N]: at least 1."""
        return rewards >= 1


def encode_prompts(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> list[list[int]]:
    """The token ids of each problem's prompt, unpadded, without a beginning-of-sequence token."""
    return encode(tokenizer, [problem.prompt for problem in problems])


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, and no others."""
    # transformers takes no empty list
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []


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


def supervised_batch(
    tokenizer: PreTrainedTokenizerFast,
    demonstrations: Sequence[Demonstration],
    *,
    prompt_length: int,
    response_length: int,
) -> dict[str, np.ndarray]:
    """Demonstrations as arrays: prompts padded on the left, and responses, with their end token, on the right.

    Args:
      tokenizer: of the policy; its own end token is appended to each response.
      demonstrations: B of them.
      prompt_length: P, tokens.
      response_length: T, tokens; every response begins in column P of S = P + T.

    Returns:
      tokens: int32 [B, S].
      attention_mask: bool [B, S], true on the tokens of prompts and responses.
      response_mask: bool [B, T], true on response tokens including the end token.

    Raises:
      ValueError: a prompt or a response is longer than its length.
    """
    prompts = encode(tokenizer, [each.prompt for each in demonstrations])
    responses = encode(tokenizer, [each.response for each in demonstrations])
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokens = np.full((len(prompts), prompt_length + response_length), padding, np.int32)
    attention_mask = np.zeros(tokens.shape, np.bool_)
    response_mask = np.zeros((len(prompts), response_length), np.bool_)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        response = [*response, tokenizer.eos_token_id]
        _check_fits("prompt", prompt, prompt_length)
        _check_fits("response", response, response_length)
        first = prompt_length - len(prompt)
        both = slice(first, prompt_length + len(response))
        tokens[row, both], attention_mask[row, both] = prompt + response, True
        response_mask[row, : len(response)] = True
    return {"tokens": tokens, "attention_mask": attention_mask, "response_mask": response_mask}


def _check_fits(name: str, tokens: list[int], length: int) -> None:
    if len(tokens) > length:
        raise ValueError(f"{name}_length is {length}; a {name} of this task takes {len(tokens)} tokens")
