"""What clients send and get: OpenAI's completions and chat, with what a policy's own clients need beside them.

Fields are OpenAI's, and vLLM's where OpenAI has none: `top_k`, `stop_token_ids`, `prompt_logprobs`, `return_token_ids`,
`chat_template_kwargs`, `continue_final_message`. `logprobs_mode` is ours. A field that would change what is sampled and
that is not served is refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dcjax.serving.engine import MOST_TOP_LOGPROBS

LogprobsMode = Literal["sampled", "model"]
"""Whose log-probs are told: those of the distribution that a token was drawn from, after temperature and truncation, or
the model's own, at temperature 1 and over all tokens."""

MOST_STOPS, MOST_CHOICES = 16, 64
"""Stop strings or ids, and choices of a prompt, at most."""

Token = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=2**22)]
Top = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """How answers are streamed."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    """Whether one more part, without choices, says how many tokens there were."""


class Asked(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="The name of the policy that is served; any other is refused.")
    max_tokens: int | None = Field(None, ge=1, description="Tokens of a response at most; by default as trained.")
    temperature: Finite | None = Field(None, ge=0, le=100, description="0 is greedy; by default as trained.")
    top_p: Finite | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 are all tokens.")
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="Equal seeds give equal samples.")
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(min_length=1, max_length=MOST_STOPS)] | None = Field(
        None, description="In place of the contract's end tokens."
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs_mode: LogprobsMode = "sampled"
    return_token_ids: bool = False
    user: str | None = Field(None, description="Not looked at.")
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none of them empty."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class CompletionRequest(Asked):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | list[Token]
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[list[Token]], Field(min_length=1)]
    )
    logprobs: int | None = Field(
        None, ge=0, le=MOST_TOP_LOGPROBS, description="How many of the most probable tokens are told."
    )
    echo: bool = Field(False, description="Whether the prompt stands before each answer.")
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MOST_TOP_LOGPROBS, description="The same of the prompt's tokens."
    )
    best_of: int | None = None
    suffix: Literal[""] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of a response at most."""
        return self.max_tokens

    @property
    def top(self) -> int:
        """Of how many of the most probable tokens log-probs are told."""
        return self.logprobs or 0

    @model_validator(mode="after")
    def _as_many_as_asked(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of is {self.best_of}; it must be n, {self.n}: answers are not ranked")
        return self


class Part(BaseModel):
    """A part of a message; only text is read."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: str | None = None

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatTemplateArguments(BaseModel):
    """What the chat template is told; others of its arguments are not taken from clients."""

    model_config = ConfigDict(extra="forbid")

    enable_thinking: bool | None = None


class ChatRequest(Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    chat_template_kwargs: ChatTemplateArguments = Field(
        ChatTemplateArguments(), description="Whether the model thinks; by default as trained."
    )
    continue_final_message: bool = Field(
        False,
        description="Whether the last message, an assistant's, begins the answer; else it begins as trained.",
    )
    add_generation_prompt: bool | None = Field(None, description="False with `continue_final_message`, else true.")
    logprobs: bool = False
    top_logprobs: Top | None = None
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of `max_tokens`.")

    @property
    def limit(self) -> int | None:
        """Tokens of a response at most."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int:
        """Of how many of the most probable tokens log-probs are told."""
        return self.top_logprobs or 0

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is given, and logprobs is false; set it to true")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError(
                f"continue_final_message is true, and the last message is of the {self.messages[-1].role}; it must be "
                "of the assistant"
            )
        if self.add_generation_prompt is self.continue_final_message:
            raise ValueError(
                "add_generation_prompt and continue_final_message are both "
                f"{str(self.continue_final_message).lower()}; one of them is true, the other false"
            )
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


AnyRequest = CompletionRequest | ChatRequest
"""A request for answers."""


class TrainLogprobsRequest(BaseModel):
    """`POST /v1/train_logprobs`."""

    model_config = ConfigDict(extra="forbid")

    token_ids: Annotated[list[Token], Field(min_length=2)]
    """A prompt and its response."""


class TrainLogprobs(BaseModel):
    """What the training policy gives to tokens."""

    logprobs: list[float | None]
    """Natural logs at temperature 1 and over all tokens, as `logprobs_mode` model; of the first nothing is known."""
    weights_version: int


class Error(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """What every status but 200 has for a body."""

    error: Error
