"""Answers as OpenAI writes them: whole, or in parts as they come."""

from __future__ import annotations

import itertools
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, Generic, TypeVar

from dcjax.serving.scoring import ModelScores
from dcjax.serving.server.http.answers import Delta
from dcjax.serving.server.http.engine_thread import Scored
from dcjax.serving.server.http.service import Choice, Service
from dcjax.serving.server.http.wire import Asked, ChatRequest, CompletionRequest
from dcjax.serving.server.text import TextStream

LAST = "data: [DONE]\n\n"
"""The end of a stream."""


A = TypeVar("A", bound=Asked)


class Writer(ABC, Generic[A]):
    """Writes the answers to one request.

    Args:
      service: that serves it.
      asked: the request.
      prompts: its prompts, as token ids.
    """

    prefix: str
    whole_object: str
    part_object: str

    def __init__(self, service: Service, asked: A, prompts: Sequence[Sequence[int]]):
        self._service, self._asked, self.prompts = service, asked, prompts
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._head = {
            "id": self.id,
            "created": int(time.time()),
            "model": service.name,
        }
        self._sampled = 0

    @abstractmethod
    def whole_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        """An answer."""

    @abstractmethod
    def part_choice(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        """What is new of an answer."""

    async def whole(self, choices: AsyncIterator[Choice]) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        answers = [Delta() for _ in range(len(self.prompts) * self._asked.n)]
        async for choice in choices:
            answers[choice.index].extend(choice.delta)
        self._sampled = sum(len(answer.tokens) for answer in answers)
        written = [self._completed(self.whole_choice(index, answer), answer) for index, answer in enumerate(answers)]
        return self._head | {"object": self.whole_object, "choices": written, "usage": self._usage()}

    async def parts(self, choices: AsyncIterator[Choice]) -> AsyncIterator[str]:
        """The events of a response that is streamed."""
        begun: set[int] = set()
        async for choice in choices:
            self._sampled += len(choice.delta.tokens)
            written = self.part_choice(choice.index, choice.delta, first=choice.index not in begun)
            begun.add(choice.index)
            yield self._event([self._completed(written, choice.delta)])
        if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
            yield self._event([], usage=self._usage())
        yield LAST

    def _event(self, choices: list[dict[str, Any]], **others: Any) -> str:
        body = self._head | {"object": self.part_object, "choices": choices} | others
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def _completed(self, choice: dict[str, Any], delta: Delta) -> dict[str, Any]:
        """A choice with its end, and with its token ids and their weights where they are asked for."""
        choice["finish_reason"] = delta.finish_reason
        if self._asked.return_token_ids:
            choice["token_ids"] = [scored.token for scored in delta.tokens]
            choice["weights_versions"] = [scored.version for scored in delta.tokens]
            choice["prompt_token_ids"] = list(self.prompts[choice["index"] // self._asked.n])
        return choice

    def _usage(self) -> dict[str, int]:
        read = sum(map(len, self.prompts))
        return {"prompt_tokens": read, "completion_tokens": self._sampled, "total_tokens": read + self._sampled}

    def _top(self, pairs: Sequence[tuple[int, float]]) -> dict[str, float]:
        """The most probable tokens by their text; of equal texts the more probable one."""
        told: dict[str, float] = {}
        for token, log_prob in pairs:
            told.setdefault(self._service.text_of(token), log_prob)
        return told


class CompletionWriter(Writer[CompletionRequest]):
    """Of `/v1/completions`."""

    prefix, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, asked: CompletionRequest, prompts: Sequence[Sequence[int]]):
        super().__init__(service, asked, prompts)
        # of each prompt, where they are asked for
        self._scores: list[ModelScores] | None = None

    async def read_prompts(self) -> None:
        """Has the model read the prompts, where log-probs of their tokens are asked for."""
        asked = self._asked
        wanted = [asked.prompt_logprobs, asked.logprobs if asked.echo else None]
        given = [top for top in wanted if top is not None]
        if given:
            self._scores = [await self._service.score(prompt, max(given)) for prompt in self.prompts]

    def whole_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return self._choice(index, delta, first=True)

    def part_choice(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        return self._choice(index, delta, first=first)

    def _choice(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        asked, prompt = self._asked, self.prompts[index // self._asked.n]
        text, log_probs = delta.text, None if asked.logprobs is None else self._log_probs(delta)
        if asked.echo:
            before = self._service.text_of_all(prompt)
            text = before + text if first else text
            if log_probs is not None:
                log_probs["text_offset"] = [offset + len(before) for offset in log_probs["text_offset"]]
                log_probs = (
                    _joined(self._prompt_log_probs(index, asked.logprobs or 0), log_probs) if first else log_probs
                )
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": log_probs}
        if asked.prompt_logprobs is not None and first:
            told = self._prompt_log_probs(index, asked.prompt_logprobs)
            choice["prompt_logprobs"] = told
        return choice

    def _log_probs(self, delta: Delta) -> dict[str, list[Any]]:
        return {
            "tokens": [self._service.text_of(scored.token) for scored in delta.tokens],
            "token_logprobs": [scored.log_prob for scored in delta.tokens],
            "top_logprobs": [self._top(scored.top) for scored in delta.tokens],
            "text_offset": delta.offsets,
        }

    def _prompt_log_probs(self, index: int, top: int) -> dict[str, list[Any]]:
        """The same of the prompt's tokens; of the first nothing is known."""
        assert self._scores is not None
        number = index // self._asked.n
        prompt, scores = self.prompts[number], self._scores[number]
        texts = [self._service.text_of(token) for token in prompt]
        pairs = [
            list(zip(ids[:top].tolist(), logs[:top].tolist(), strict=True))
            for ids, logs in zip(scores.top_tokens, scores.top_logps, strict=True)
        ]
        # a character of several tokens stands where the last of them does, as in answers
        stream = TextStream(self._service.text_of_all)
        pieces = [stream.push([token], last=place == len(prompt) - 1) for place, token in enumerate(prompt)]
        offsets = list(itertools.accumulate(map(len, pieces[:-1]), initial=0))
        return {
            "tokens": texts,
            "token_logprobs": [None, *scores.logps.tolist()],
            "top_logprobs": [None, *map(self._top, pairs)],
            "text_offset": offsets,
        }


class ChatWriter(Writer[ChatRequest]):
    """Of `/v1/chat/completions`."""

    prefix, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._log_probs(delta)}

    def part_choice(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        new = {"role": "assistant", "content": delta.text} if first else {"content": delta.text}
        return {"index": index, "delta": new, "logprobs": self._log_probs(delta)}

    def _log_probs(self, delta: Delta) -> dict[str, list[Any]] | None:
        return {"content": [self._scored(scored) for scored in delta.tokens]} if self._asked.logprobs else None

    def _scored(self, scored: Scored) -> dict[str, Any]:
        top = [self._token(token, log_prob) for token, log_prob in scored.top]
        return self._token(scored.token, scored.log_prob) | {"top_logprobs": top}

    def _token(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self._service.text_of(token)
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode("utf-8", errors="replace"))}


def _joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: values + second[name] for name, values in first.items()}
