"""What a served policy is: the contract between those who trained it and those who sample from it."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path

from dcjax.data.chat import Thinking

CONTRACT_FILE = "dcjax.json"
"""The file that holds the contract in a Hugging Face folder which dcjax has exported."""

CHAT = ("system_prompt", "thinking", "answer_start")
"""The fields of a contract that are of a `ChatTask`."""

STOP, LENGTH = "stop", "length"
"""Reasons to finish a response: an end token was sampled, or the limit was reached."""


@dataclass(frozen=True)
class Contract:
    """How a policy was sampled while it was trained, and so how it should be served."""

    format: str
    """The serving format's name."""
    kv_cache: str
    """The format that keys and values are stored in; auto is the serving format's own."""
    keep: tuple[str, ...]
    """Patterns of the names of weights that are not quantised."""
    temperature: float
    top_k: int
    top_p: float
    max_prompt_length: int
    """In tokens."""
    max_response_length: int
    """In tokens, the end token included."""
    end_tokens: tuple[int, ...]
    """Ids that end a response."""
    run: str | None = None
    """The identity of the training run; None for weights of which none is known."""
    step: int | None = None
    """The step of the checkpoint."""
    system_prompt: str = ""
    """What the system said in chats that the policy was trained in; "" left the chat template its own."""
    thinking: Thinking = "auto"
    """What the chat template was told of `enable_thinking`."""
    answer_start: str = ""
    """Text that every answer began with, and that was part of its prompt."""

    def __post_init__(self):
        if self.thinking not in (kinds := typing.get_args(Thinking)):
            raise ValueError(f"thinking is {self.thinking!r}; it must be one of {', '.join(kinds)}")

    def differences(self, theirs: Contract) -> str:
        """What differs in words, ours first; nothing if all is equal."""
        fields = (
            (field.name, getattr(self, field.name), getattr(theirs, field.name)) for field in dataclasses.fields(self)
        )
        return ", ".join(f"{name} {our!r} and {their!r}" for name, our, their in fields if our != their)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> Contract:
        """What `to_json` wrote; `where` is named where it is something else.

        Raises:
          ValueError: it is no contract.
        """
        try:
            held = json.loads(text)
            return cls(**held | {"keep": tuple(held["keep"]), "end_tokens": tuple(held["end_tokens"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{where} holds no contract of dcjax: {' '.join(str(error).split())[:200]}") from None


def read_contract(folder: Path) -> Contract | None:
    """The contract in a Hugging Face folder; None where it has none.

    Raises:
      ValueError: what it has is no contract.
      OSError: it cannot be read.
    """
    path = folder / CONTRACT_FILE
    return Contract.from_json(path.read_text(), str(path)) if path.exists() else None
