r"""How a question is put to a model, and how its answer is found again: named pairs, which are never mixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dcjax.data.chat import Thinking, chat_prompt
from dcjax.data.datasets import DAPO_INSTRUCTIONS
from dcjax.rewards.answers import PLACES, Place, judge
from dcjax.rewards.math import answer_line_reward, math_reward
from dcjax.rewards.processes import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TemplateName = Place


@dataclass(frozen=True)
class Template:
    """The instructions around a question, and how the answer is read from a response."""

    before: str
    after: str
    shown: str
    """An answer where it is asked for, {} standing for it."""
    extract: Callable[[str], str | None]
    """Finds the answer in a response, as written; returns None if there is none."""
    reward: Reward
    """Scores what `extract` finds."""
    system_prompt: str = ""
    """What the system says before the question."""
    thinking: Thinking = "auto"
    """What a chat template is told of thinking."""
    answer_start: str = ""
    """The beginning of the answer, which the model continues."""

    def message(self, question: str) -> str:
        """The question with its instructions."""
        return f"{self.before}{question}{self.after}"

    def show(self, answer: str) -> str:
        """A response of nothing but the answer, where `extract` finds it."""
        return self.shown.replace("{}", answer)

    def prompt(self, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
        """The text that the model continues; as `chat_prompt`.

        Raises:
          ValueError: as `chat_prompt`.
        """
        return chat_prompt(
            tokenizer,
            self.message(question),
            system_prompt=self.system_prompt,
            thinking=self.thinking,
            answer_start=self.answer_start,
        )


def check_answer_start(text: str) -> None:
    """Refuses the start of an answer that holds the place where an answer is read, since only what follows is read.

    Raises:
      ValueError: it does; the message begins with the name of the field, answer_start.
    """
    for place in ("boxed", "fbox", "Answer:", "<answer>"):
        if place in text:
            raise ValueError(
                f"answer_start is {text!r}; it must not hold {place!r}, since the answer is read from what follows it"
            )


templates: dict[TemplateName, Template] = {
    # the instruction that the Qwen models' cards recommend
    "boxed": Template(
        before="",
        after="\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        shown=r"\boxed{{}}",
        extract=PLACES["boxed"],
        reward=math_reward,
    ),
    # as published in DAPO-Math-17k
    "dapo": Template(
        before=DAPO_INSTRUCTIONS[0],
        after=DAPO_INSTRUCTIONS[1],
        shown="Answer: {}",
        extract=PLACES["dapo"],
        reward=answer_line_reward,
    ),
    "tags": Template(
        before="",
        after="\n\nPut your final answer between <answer> and </answer>, and nothing else there.",
        shown="<answer>{}</answer>",
        extract=PLACES["tags"],
        reward=partial(judge, place="tags", comparison="math"),
    ),
    "last_line": Template(
        before="",
        after="\n\nThe last line of your response must be the final answer, and nothing else.",
        shown="{}",
        extract=PLACES["last_line"],
        reward=partial(judge, place="last_line", comparison="math"),
    ),
    # the question says all
    "bare": Template(
        before="", after="", shown="{}", extract=PLACES["bare"], reward=partial(judge, place="bare", comparison="math")
    ),
}
