"""What tasks have in common that put questions to a chat model: instructions, system prompt, thinking, length."""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace

from dcjax.data.chat import Thinking
from dcjax.data.task import Task
from dcjax.data.templates import Template, TemplateName, check_answer_start, templates


@dataclass(frozen=True)
class ChatTask(Task):
    """A task whose questions become a user's message, by the model's chat template where it has one.

    Raises:
      ValueError: a field is out of range.
    """

    template: TemplateName = "boxed"
    """Prompt template: the instructions around a question, and where the answer is read from a response."""
    system_prompt: str = ""
    """What the system says before the question; "" leaves the chat template its own."""
    thinking: Thinking = "auto"
    """What the model's chat template is told: enable_thinking=True (on), enable_thinking=False (off), as Qwen3's takes
    it, or nothing (auto)."""
    answer_start: str = ""
    """Text that every answer begins with (an assistant prefill). It is part of the prompt: neither trained on nor
    judged."""
    max_prompt_tokens: int = 1024
    """Training problems with longer prompts, template included, are left out."""

    def __post_init__(self) -> None:
        for name, kind in (("template", TemplateName), ("thinking", Thinking)):
            check_choice(name, getattr(self, name), kind)
        try:
            check_answer_start(self.answer_start)
        except ValueError as error:
            raise ValueError(f"task.{error}") from None
        if self.max_prompt_tokens < 1:
            raise ValueError(f"task.max_prompt_tokens is {self.max_prompt_tokens}; it must be at least 1")

    @property
    def max_prompt_length(self) -> int:
        """Tokens of the longest prompt."""
        return self.max_prompt_tokens

    @property
    def needs_workers(self) -> bool:
        """True: verifiers may take any time and memory."""
        return True

    @property
    def asked(self) -> Template:
        """The template, with what this task adds to it."""
        return replace(
            templates[self.template],
            system_prompt=self.system_prompt,
            thinking=self.thinking,
            answer_start=self.answer_start,
        )


def check_choice(name: str, value: str, kind: object) -> None:
    """Raises ValueError for a field of a task that is none of the texts of a Literal."""
    if value not in typing.get_args(kind):
        raise ValueError(f"task.{name} is {value!r}; it must be one of {', '.join(typing.get_args(kind))}")
