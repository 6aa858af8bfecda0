r"""How a question is put to a model, and how its answer is found again: named pairs, which are never mixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from dcjax.data.datasets import DAPO_INSTRUCTIONS
from dcjax.rewards.boxed import last_box
from dcjax.rewards.math import answer_line, answer_line_reward, math_reward
from dcjax.rewards.processes import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TemplateName = Literal["boxed", "dapo"]


@dataclass(frozen=True)
class Template:
    """The instructions around a question, and how the answer is read from a response."""

    before: str
    after: str
    extract: Callable[[str], str | None]
    """Finds the answer in a response, as written; returns None if there is none."""
    reward: Reward
    """Scores what `extract` finds."""

    def message(self, question: str) -> str:
        """The question with its instructions."""
        return f"{self.before}{question}{self.after}"

    def prompt(self, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
        """The text that the model continues: the message as a user's turn, or bare without a chat template."""
        message = self.message(question)
        if tokenizer.chat_template is None:
            return message
        turn = [{"role": "user", "content": message}]
        return cast(str, tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))


templates: dict[TemplateName, Template] = {
    # the instruction that the Qwen models' cards recommend
    "boxed": Template(
        before="",
        after="\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        extract=last_box,
        reward=math_reward,
    ),
    # as published in DAPO-Math-17k
    "dapo": Template(
        before=DAPO_INSTRUCTIONS[0],
        after=DAPO_INSTRUCTIONS[1],
        extract=answer_line,
        reward=answer_line_reward,
    ),
}
