"""What a request asks for, checked, as samples of the engine's thread; and what comes of it, piece by piece."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from dcjax.data.chat import Thinking, knows_thinking, render_chat
from dcjax.data.task import encode
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.scoring import ModelScores, score_sequence
from dcjax.serving.server.contract import Contract
from dcjax.serving.server.http.answers import Answer, Delta
from dcjax.serving.server.http.engine_thread import EngineThread, Piece, Sample
from dcjax.serving.server.http.refused import Refused
from dcjax.serving.server.http.wire import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    TrainLogprobs,
    TrainLogprobsRequest,
)
from dcjax.serving.server.served import Trainer
from dcjax.serving.server.weights import Weights

SYSTEM = ("system", "developer")
"""The roles of a message that takes the place of the contract's system prompt."""

MOST_SAMPLES = 256
"""Prompts × n of one request, at most."""


@dataclass(frozen=True)
class Choice:
    """What one turn adds to one of a request's answers."""

    index: int
    delta: Delta


class Service:
    """Serves requests by the engine's thread.

    Args:
      name: of the policy, which requests name as their model.
      engine: that decodes.
      thread: in which it does.
      weights: that are served.
      contract: what requests get that do not ask for anything else.
      tokenizer: of the policy.
      trainer: the training policy; None where it is not kept.
    """

    def __init__(
        self,
        name: str,
        engine: Qwen3Engine,
        thread: EngineThread,
        weights: Weights,
        contract: Contract,
        tokenizer: PreTrainedTokenizerFast,
        trainer: Trainer | None,
    ):
        self.name, self._engine, self._thread = name, engine, thread
        self._weights, self._contract, self._tokenizer = weights, contract, tokenizer
        self._trainer = trainer
        # characters that a prompt can have: no token stands for more of them than it is written with
        self._longest_text = engine.max_prompt_length * max(map(len, tokenizer.get_vocab()))
        self._backend = tokenizer.backend_tokenizer
        # one prompt is read at a time
        self._reading = asyncio.Lock()
        # whether new requests are refused, while those that run are finished
        self.stopping = False

    def check_serving(self) -> None:
        """Before anything is begun.

        Raises:
          Refused: the server is stopping.
        """
        if self.stopping:
            raise Refused(503, "the server is stopping", code="stopping")

    @property
    def running(self) -> int:
        """How many samples there are."""
        return self._thread.running

    def contract(self) -> dict[str, Any]:
        """What is served now, and what log-probs mean."""
        step = None if self._contract.step is None else self._weights.version
        told = dataclasses.asdict(dataclasses.replace(self._contract, step=step))
        return told | {
            "model": self.name,
            "weights_version": self._weights.version,
            "chat": self._tokenizer.chat_template is not None,
            "train_logprobs": self._trainer is not None,
        }

    def text_of(self, token: int) -> str:
        """A token as text, special or not."""
        return self._backend.decode([token], skip_special_tokens=False)

    def text_of_all(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones too."""
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    async def prompts_of(self, asked: CompletionRequest) -> list[list[int]]:
        """The token ids of a completion's prompts; texts are encoded beside the event loop.

        Raises:
          Refused: a text is too long, whatever it is encoded to.
        """
        match asked.prompt:
            case str(text):
                return await self._encoded([text])
            case [str(), *_] as texts:
                return await self._encoded([str(text) for text in texts])
            case [list(), *_] as prompts:
                return [list(prompt) for prompt in prompts if isinstance(prompt, list)]
            case tokens:
                return [[token for token in tokens if isinstance(token, int)]]

    async def prompt_of(self, asked: ChatRequest) -> list[int]:
        """The token ids of a conversation, by the tokenizer's chat template, as the policy was trained unless it asks.

        Raises:
          Refused: there is none, or it does not take the conversation.
        """
        if self._tokenizer.chat_template is None:
            raise Refused(400, f"{self.name} has no chat template; use /v1/completions", "messages")
        messages = [{"role": message.role, "content": message.text} for message in asked.messages]
        start = messages.pop()["content"] if asked.continue_final_message else self._contract.answer_start
        if self._contract.system_prompt and not any(message["role"] in SYSTEM for message in messages):
            messages.insert(0, {"role": "system", "content": self._contract.system_prompt})
        self._check_length(sum(len(message["content"]) for message in messages) + len(start), "messages")
        thinking = self._thinking(asked.chat_template_kwargs.enable_thinking)
        try:
            text = await asyncio.to_thread(render_chat, self._tokenizer, messages, thinking)
        except Exception as error:  # a template raises what it likes
            raise Refused(400, f"the chat template does not take these messages: {error}"[:500], "messages") from None
        return (await self._encoded([text + start]))[0]

    def _thinking(self, enabled: bool | None) -> Thinking:
        """What the chat template is told.

        Raises:
          Refused: it is asked for, and the template knows nothing of it.
        """
        if enabled is None:
            return self._contract.thinking
        if not knows_thinking(self._tokenizer):
            raise Refused(400, f"the chat template of {self.name} knows no enable_thinking", "chat_template_kwargs")
        return "on" if enabled else "off"

    async def _encoded(self, texts: list[str]) -> list[list[int]]:
        for text in texts:
            self._check_length(len(text), "prompt")
        return await asyncio.to_thread(encode, self._tokenizer, texts)

    def _check_length(self, length: int, param: str) -> None:
        if length > self._longest_text:
            raise Refused(
                400,
                f"{param} has {length} characters; this policy takes up to {self._engine.max_prompt_length} tokens, "
                f"which hold at most {self._longest_text}",
                param,
                "context_length_exceeded",
            )

    async def answers(self, asked: AnyRequest, prompts: Sequence[Sequence[int]]) -> AsyncIterator[Choice]:
        """What is sampled for each prompt, n answers of each side by side, as it comes.

        Leaving the iterator gives up what has not ended.

        Raises:
          Refused: the request cannot be served, or too many wait.
          RuntimeError: the engine has failed.
        """
        told: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()
        put = partial(asyncio.get_running_loop().call_soon_threadsafe, told.put_nowait)
        samples = []
        for number, request in enumerate(self._requests(asked, prompts)):
            greedy = float(request.sampling.temperatures[0]) == 0
            sample = Sample(
                prompt=tuple(prompts[number // asked.n]),
                request=request,
                told=lambda piece, number=number: put((number, piece)),
                top=asked.top,
                of_model=greedy or asked.logprobs_mode == "model",
            )
            samples.append(sample)
        answers = [Answer(self._shown, asked.stops) for _ in samples]
        self._submit(samples)
        left = len(samples)
        try:
            while left:
                number, piece = await told.get()
                if isinstance(piece, BaseException):
                    raise RuntimeError("the engine has failed") from piece
                if samples[number].cancelled:  # it has ended by a stop string
                    continue
                delta = answers[number].push(piece)
                if delta.finish_reason is not None:
                    left -= 1
                    self._thread.cancel([samples[number]])
                yield Choice(number, delta)
        finally:
            self._thread.cancel(samples)

    def _shown(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=True)

    def _submit(self, samples: list[Sample]) -> None:
        if not self._thread.submit(samples):
            raise Refused(
                429, f"{self.running} samples run or wait already; try again later", code="rate_limit_exceeded"
            )

    def _requests(self, asked: AnyRequest, prompts: Sequence[Sequence[int]]) -> list[Any]:
        """The settings of each sample.

        Raises:
          Refused: the engine does not serve that.
        """
        if asked.model not in (None, self.name):
            raise Refused(404, f"model is {asked.model!r}; {self.name!r} is served", "model", "model_not_found")
        if (count := len(prompts) * asked.n) > MOST_SAMPLES:
            raise Refused(400, f"{len(prompts)} prompts x n {asked.n} are {count} samples; at most {MOST_SAMPLES}", "n")
        contract, seed = self._contract, secrets.randbits(64) if asked.seed is None else asked.seed % 2**64
        numbers = (np.arange(count, dtype=np.uint64) + np.uint64(seed)).astype(np.uint64)
        keys = np.stack([numbers >> np.uint64(32), numbers & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32)
        try:
            self._engine.padded(prompts)  # which checks them
            return [
                self._engine.make_requests(
                    key[None],
                    limits=asked.limit or contract.max_response_length,
                    temperatures=contract.temperature if asked.temperature is None else asked.temperature,
                    top_ks=contract.top_k if asked.top_k is None else max(asked.top_k, 0),
                    top_ps=contract.top_p if asked.top_p is None else asked.top_p,
                    stop_tokens=contract.end_tokens if asked.stop_token_ids is None else asked.stop_token_ids,
                )
                for key in keys
            ]
        except ValueError as error:
            raise Refused(400, str(error)) from None

    async def score(self, prompt: Sequence[int], top: int) -> ModelScores:
        """What the model gives to a prompt's tokens behind the first, read beside the thread that decodes."""
        async with self._reading:
            scores = await asyncio.to_thread(
                score_sequence, self._engine, self._weights.params, prompt, self._engine.most_top_logprobs
            )
        return ModelScores(scores.logps, scores.top_tokens[:, :top], scores.top_logps[:, :top])

    async def train_logprobs(self, asked: TrainLogprobsRequest) -> TrainLogprobs:
        """What the training policy gives to a prompt and its response, read beside the thread that decodes.

        Raises:
          Refused: it is not kept, or there are too many tokens, or what are none.
        """
        if self._trainer is None:
            raise Refused(404, "the training policy is not kept; start the server with --train-logprobs")
        tokens, engine = asked.token_ids, self._engine
        if len(tokens) > (most := engine.max_prompt_length + engine.max_response_length):
            raise Refused(400, f"there are {len(tokens)} tokens; at most {most} are read", "token_ids")
        if (wrong := max(tokens)) >= engine.config.vocab_size:
            raise Refused(400, f"token {wrong} is none of the {engine.config.vocab_size}", "token_ids")
        async with self._reading:
            version, logprobs = await asyncio.to_thread(self._trainer, tokens)
        return TrainLogprobs(logprobs=[None, *logprobs], weights_version=version)
