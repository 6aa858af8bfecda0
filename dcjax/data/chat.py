"""Chat templates: a message as a user's turn, with or without thinking, and which day it is to them."""

from __future__ import annotations

import copy
import hashlib
import json
import string
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Thinking = Literal["auto", "on", "off"]
"""Whether a chat template is told enable_thinking=True or False, as Qwen3's takes it; `auto` says nothing."""

# A line of its own, of which Jinja leaves nothing, so that what stands in the first line of a template stays there.
_DATED = """\
{%%- macro strftime_now(format) -%%}
{%%- set told = namespace(text=format) -%%}
{%%- for directive, value in %r.items() -%%}
{%%- set told.text = told.text.replace(directive, value) -%%}
{%%- endfor -%%}
{{- told.text -}}
{%%- endmacro %%}
"""


def dated(tokenizer: PreTrainedTokenizerFast, moment: datetime) -> PreTrainedTokenizerFast:
    """A tokenizer to whose chat template it is always the same moment, in place of now.

    Args:
      tokenizer: it is left as it is, so that it can be saved.
      moment: what `strftime_now` tells the template.

    Returns:
      A shallow copy, or the tokenizer itself if its chat template does not ask for the date.
    """
    if "strftime_now" not in str(given := tokenizer.chat_template):
        return tokenizer
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
    before = _DATED % {directive: moment.strftime(directive) for directive in directives}
    named = {name: before + text for name, text in given.items()} if isinstance(given, dict) else before + given
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = named
    return tokenizer


def template_digest(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """16 hexadecimal digits that name the text of the chat template, or of all of several; None without one."""
    if tokenizer.chat_template is None:
        return None
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()[:16]


def chat_prompt(
    tokenizer: PreTrainedTokenizerFast,
    message: str,
    *,
    system_prompt: str = "",
    thinking: Thinking = "auto",
    answer_start: str = "",
) -> str:
    """The text that a model continues: the message as a user's turn, or bare if the tokenizer has no chat template.

    Args:
      tokenizer: of the model.
      message: what the user says.
      system_prompt: a system's turn before it; "" is none, which leaves a template its own.
      thinking: what the chat template is told of `enable_thinking`.
      answer_start: the beginning of the answer, which the model continues (an assistant prefill).

    Raises:
      ValueError: the chat template cannot be rendered, leaves a message out, or does not know of thinking.
    """
    if thinking != "auto" and not knows_thinking(tokenizer):
        raise ValueError(
            f"thinking is {thinking!r}; {_name(tokenizer)} has no chat template with enable_thinking, so it must be "
            "'auto'"
        )
    if tokenizer.chat_template is None:
        return f"{system_prompt}\n\n{message}{answer_start}" if system_prompt else message + answer_start
    turns = {"system": system_prompt, "user": message} if system_prompt else {"user": message}
    prompt = _render(tokenizer, turns, thinking)
    for role, text in turns.items():
        if text not in prompt and prompt == _render(tokenizer, turns | {role: f"?{text}"}, thinking):
            raise ValueError(
                f"the chat template of {_name(tokenizer)} leaves a {role}'s message out: it renders {prompt[:60]!r}; "
                "it must put the messages into the prompt"
            )
    return prompt + answer_start


def knows_thinking(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the chat template asks for `enable_thinking`."""
    return "enable_thinking" in str(tokenizer.chat_template)


def render_chat(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, str]], thinking: Thinking) -> str:
    """The text of a conversation up to where the model answers, by its chat template.

    Args:
      tokenizer: of the model, with a chat template.
      messages: the turns, with `role` and `content`.
      thinking: what the chat template is told of `enable_thinking`.

    Raises:
      Exception: whatever the template raises, which is a program.
    """
    told: dict[str, Any] = {} if thinking == "auto" else {"enable_thinking": thinking == "on"}
    return cast(str, tokenizer.apply_chat_template([*messages], add_generation_prompt=True, tokenize=False, **told))


def _render(tokenizer: PreTrainedTokenizerFast, turns: dict[str, str], thinking: Thinking) -> str:
    try:
        return render_chat(tokenizer, [{"role": role, "content": text} for role, text in turns.items()], thinking)
    except Exception as error:  # a template is a program: it may raise anything
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the chat template of {_name(tokenizer)} cannot be rendered: {type(error).__name__}: {said}; "
            f"it must render one turn of a {' and one of a '.join(turns)}"
        ) from None


def _name(tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.name_or_path) or "the tokenizer"
