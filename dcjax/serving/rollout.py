"""Prompts in, a `Rollout` out: a direct loop over the engine with continuous batching."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from dcjax.serving.engine import DecodeState, Prefix, Qwen3Engine, SampledTokens, make_requests
from dcjax.serving.sync import ServingParams
from dcjax.types import Array, Rollout


def sample_responses(
    engine: Qwen3Engine,
    params: ServingParams,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    temperature: float,
    key: jax.Array,
    first_sample: int = 0,
) -> Rollout:
    """G samples of each prompt, the samples of one prompt next to each other, as host arrays.

    A slot is refilled as soon as a `generate` call returns with its sample ended; no sample waits for the longest.
    Sample i is drawn with fold_in(key, first_sample + i), so the tokens depend neither on the slots, nor on the steps
    a call, nor on how many hosts share the prompts.

    Args:
      engine: decodes; its limits set the widths P and T of what is returned.
      params: from `engine.sync`.
      prompts: token ids, 1 to P each.
      samples_per_prompt: G.
      temperature: of every sample; 0 is greedy.
      key: a typed PRNG key.
      first_sample: number of the first sample among those of all hosts.

    Raises:
      ValueError: a prompt that the engine does not take.
    """
    prefix = engine.prefill_many(params, prompts)
    keys = _sample_keys(key, first_sample + np.arange(len(prompts) * samples_per_prompt))
    queue = _Queue(engine, prefix, samples_per_prompt, temperature, np.asarray(keys))
    responses = _Responses(queue.total, engine.max_response_length)
    state = engine.init_decode_state()
    # the sample in each slot; -1 is none
    running = np.full(engine.slots, -1)
    while True:
        state = queue.refill(state, running)
        if (running < 0).all():
            break
        state, result = engine.generate(params, state)
        responses.add(running, result.convert_to_numpy())
        running[~np.asarray(state.active)] = -1
    return _assemble(engine, prompts, samples_per_prompt, temperature, responses)


@jax.jit
def _sample_keys(key: jax.Array, samples: Array) -> Array:
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, samples))


class _Queue:
    """Samples not started yet, in order."""

    def __init__(
        self, engine: Qwen3Engine, prefix: Prefix, samples_per_prompt: int, temperature: float, keys: np.ndarray
    ):
        self.total = len(keys)
        self._engine, self._prefix, self._started = engine, prefix, 0
        self._samples_per_prompt, self._temperature = samples_per_prompt, temperature
        self._keys = keys

    def refill(self, state: DecodeState, running: np.ndarray) -> DecodeState:
        """Starts samples in the free slots and notes them in `running`."""
        free = np.flatnonzero(running < 0)[: self.total - self._started]
        if not len(free):
            return state
        samples = np.arange(self._started, self._started + len(free))
        running[free] = samples
        self._started += len(free)
        # counts are padded to powers of two, so that few programs are compiled; slots beyond the last are ignored
        padding = (1 << (len(free) - 1).bit_length()) - len(free)
        samples = np.pad(samples, (0, padding))
        requests = make_requests(
            rows=samples // self._samples_per_prompt,
            limits=np.full(len(samples), self._engine.max_response_length),
            temperatures=np.full(len(samples), self._temperature),
            keys=self._keys[samples],
        )
        slots = np.pad(free, (0, padding), constant_values=self._engine.slots)
        return self._engine.insert_many(self._prefix, state, slots, requests)


class _Responses:
    """What was sampled so far, one row a sample."""

    def __init__(self, total: int, width: int):
        self.tokens = np.zeros((total, width), np.int32)
        self.logps = np.zeros((total, width), np.float32)
        self.versions = np.full((total, width), -1, np.int32)
        self.lengths = np.zeros(total, np.int32)

    def add(self, running: np.ndarray, result: SampledTokens) -> None:
        """Appends one call's tokens to the samples that ran in its slots."""
        slots, steps = np.nonzero(result.valid)
        samples = running[slots]
        at = (samples, self.lengths[samples] + steps)
        self.tokens[at] = result.tokens[slots, steps]
        self.logps[at] = result.log_prob[slots, steps]
        self.versions[at] = result.version[slots, steps]
        np.add.at(self.lengths, samples, 1)


def _assemble(
    engine: Qwen3Engine,
    prompts: Sequence[Sequence[int]],
    samples_per_prompt: int,
    temperature: float,
    responses: _Responses,
) -> Rollout:
    prompt_tokens = np.zeros((len(prompts), engine.max_prompt_length), np.int32)
    prompt_mask = np.zeros(prompt_tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        prompt_tokens[row, -len(prompt) :] = prompt
        prompt_mask[row, -len(prompt) :] = True
    rows = np.arange(len(responses.tokens))
    return Rollout(
        tokens=np.concatenate([np.repeat(prompt_tokens, samples_per_prompt, axis=0), responses.tokens], axis=1),
        prompt_mask=np.repeat(prompt_mask, samples_per_prompt, axis=0),
        response_mask=np.arange(responses.tokens.shape[1]) < responses.lengths[:, None],
        rollout_logps=responses.logps,
        temperature=np.full(len(rows), temperature, np.float32),
        versions=responses.versions,
        finished=responses.tokens[rows, responses.lengths - 1] == engine.end_token,
    )
