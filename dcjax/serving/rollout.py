"""Samples a `Rollout` from prompts, in compiled loops that refill slots as they become free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dcjax.keys import require_key
from dcjax.serving.decoder import Requests
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.scheduler import Samples, Scheduler, programs, queue_of
from dcjax.serving.sync import ServingParams
from dcjax.spans import span
from dcjax.types import Array, Params, Rollout

REFILLS_PER_CALL = 64
"""How often one call refills the slots and decodes `steps_per_call` tokens before it returns to the host."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """Some samples that have ended, while others may still be decoded."""

    # their numbers, in order
    samples: np.ndarray
    # the tokens of each, the end token included
    responses: list[np.ndarray]
    # whether an end token was generated
    finished: np.ndarray


def sample_responses(
    engine: Qwen3Engine,
    params: ServingParams,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    temperature: float,
    key: jax.Array,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] | None = None,
) -> Rollout:
    """G samples of each prompt, the samples of one prompt next to each other, as host arrays.

    Sample i is drawn with fold_in(key, i), so the tokens do not depend on the slots, on the steps per call or on the
    devices. If several processes share the engine's mesh, all must call this with equal arguments, and all get the same
    result.

    Args:
      engine: the engine that decodes; its limits set the widths P and T of the result.
      params: from `engine.sync`.
      prompts: token ids, 1 to P each.
      samples_per_prompt: G.
      temperature: the temperature of every sample; 0 is greedy.
      key: a typed PRNG key.
      top_k: how many of the most probable tokens can be drawn; 0 is all tokens.
      top_p: the most probable tokens can be drawn, until they hold this much probability; 1 is all tokens.
      stop_tokens: ids that end a response; None is the engine's end tokens.

    Raises:
      ValueError: the engine does not accept a prompt or a setting.
    """
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop_tokens": stop_tokens}
    sampling = Sampling(engine, params, prompts, samples_per_prompt=samples_per_prompt, key=key, **settings)
    while not sampling.advance(params):
        pass
    return sampling.rollout()


class Sampling:
    """A batch of samples in progress: call `advance` until it returns True, then `rollout`.

    The weights may be swapped between two calls of `advance`, since each token has its own version. `as_they_end` calls
    it to the end with one set of weights. The arguments are those of `sample_responses`, except that the temperature,
    top_k and top_p may also be one for each sample.
    """

    def __init__(
        self,
        engine: Qwen3Engine,
        params: ServingParams,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        temperature: Float[Array, "N"] | float,
        key: jax.Array,
        top_k: Int[Array, "N"] | int = 0,
        top_p: Float[Array, "N"] | float = 1.0,
        stop_tokens: Sequence[int] | None = None,
    ):
        self._engine, self._prompts = engine, prompts
        # the prompt of each sample
        self._rows = np.repeat(np.arange(len(prompts), dtype=np.int32), samples_per_prompt)
        with span("prefill") as ready:
            self._prefix = ready(engine.prefill_many(params, prompts))
        keys = sample_keys(key, np.arange(len(self._rows)))
        self._requests = engine.make_requests(
            keys, temperatures=temperature, top_ks=top_k, top_ps=top_p, stop_tokens=stop_tokens
        )
        self._scheduler = Scheduler(engine, self._prefix, self._rows, self._requests)
        self._scheduler.wait(range(len(keys)))
        self._left = len(keys)
        self._ended: list[int] = []

    def advance(self, params: ServingParams) -> bool:
        """Decodes and refills REFILLS_PER_CALL times, or until all samples have ended; returns whether they have."""
        with span("decode"):
            ended = self._scheduler.advance(params, REFILLS_PER_CALL)
        self._ended += ended.tolist()
        self._left -= len(ended)
        return not self._left

    def as_they_end(self, params: ServingParams) -> Iterator[Ended]:
        """Decodes to the end; yields every sample once, soon after it has ended."""
        over = False
        while not over:
            over = self.advance(params)
            yield self.take_ended()

    def take_ended(self) -> Ended:
        """The samples that have ended and were not taken before."""
        samples, self._ended = np.array(sorted(self._ended), np.int64), []
        with span("decode"):
            tokens, lengths = jax.device_get((self._scheduler.samples.tokens, self._scheduler.samples.lengths))
        return Ended(
            samples=samples,
            responses=[tokens[sample, : lengths[sample]] for sample in samples],
            finished=_finished(tokens, lengths, self._requests)[samples],
        )

    def rollout(self) -> Rollout:
        """All samples, on the host."""
        with span("decode"):
            samples, experts = jax.device_get((self._scheduler.samples, self._prefix.experts))
        width = self._engine.max_prompt_length
        return assemble(self._prompts, self._rows, self._requests, samples, experts, width)


@jax.jit
def sample_keys(key: jax.Array, samples: Array) -> Array:
    """Raw key data [N, 2] of samples by their numbers.

    Raises:
      ValueError: the key is of another implementation than `dcjax.keys`.
    """
    require_key(key)
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, samples))


def compile_sampling(engine: Qwen3Engine, masters: Params, *, prompts: int, samples_per_prompt: int) -> None:
    """Compiles the programs that `engine.sync` and `sample_responses` run for a number of prompts, on one device.

    Args:
      engine: the engine that will sample.
      masters: the shapes, dtypes and shardings of the params that it will sync.
      prompts: the number of prompts.
      samples_per_prompt: G.
    """
    decoder, total = engine.decoder, prompts * samples_per_prompt
    params = engine.compile_sync(masters)
    prefix = engine.compile_prefill(params, prompts)
    compiled, slots, numbers = programs(decoder), engine.slots_for(total), np.zeros(total, np.int32)
    compiled.begin.lower(decoder, slots, total, True).compile()
    state = jax.eval_shape(compiled.begin, decoder, slots, total, True)
    queue = queue_of(prefix, numbers, engine.make_requests(np.zeros((total, 2))), range(total))
    compiled.decode.lower(decoder, engine.steps_per_call, params, queue, np.int32(REFILLS_PER_CALL), state).compile()


def assemble(
    prompts: Sequence[Sequence[int]],
    rows: np.ndarray,
    requests: Requests,
    samples: Samples,
    prefix_experts: np.ndarray | None,
    width: int,
) -> Rollout:
    """The samples after their prompts, which are padded on the left to `width`."""
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, True
    tokens, mask = tokens[rows], mask[rows]
    response_mask = np.arange(samples.tokens.shape[1]) < samples.lengths[:, None]
    return Rollout(
        tokens=np.concatenate([tokens, samples.tokens], axis=1),
        attention_mask=np.concatenate([mask, response_mask], axis=1),
        response_mask=response_mask,
        rollout_logps=samples.logps,
        temperature=requests.sampling.temperatures,
        versions=samples.versions,
        finished=_finished(samples.tokens, samples.lengths, requests),
        log_mass=samples.log_mass,
        candidate_tokens=samples.candidate_tokens if samples.candidate_tokens.shape[-1] else None,
        sampler_tokens=samples.sampler_tokens,
        sampler_logps=samples.sampler_logps,
        experts=None if prefix_experts is None else _joined_experts(samples.experts, prefix_experts[rows], mask),
    )


def require_finite(rollout: Rollout, engine: Qwen3Engine) -> None:
    """Checks that the log-prob of every response token is finite.

    Raises:
      ValueError: one is not, for example because numbers overflow in the engine's format.
    """
    bad = np.argwhere(~np.isfinite(rollout.rollout_logps) & rollout.response_mask)
    if len(bad):
        row, token = bad[0].tolist()
        largest = float(jnp.finfo(engine.format.activations).max)
        raise ValueError(
            f"the engine's log-prob at response {row}, token {token} is {rollout.rollout_logps[row, token]}: its "
            f"weights are not finite, or a number exceeds the largest of format {engine.format.name!r}, {largest:.3g}"
        )


def _finished(tokens: Any, lengths: Any, requests: Requests) -> np.ndarray:
    """Whether each sample's last token ends a response."""
    last = tokens[np.arange(len(lengths)), lengths - 1]
    return np.any(last[:, None] == requests.stop_tokens, axis=1)


def _joined_experts(sampled: Any, prefilled: np.ndarray, prompt_mask: np.ndarray) -> np.ndarray:
    """Experts [N, P + T - 1, M, k] of samples [N, T, M, k] and of their prompts [N, P, M, k]; 0 on padding.

    The first step of a sample feeds the last prompt token again, so its experts are those of column P - 1.
    """
    columns = prompt_mask.shape[1]
    joined = np.concatenate([np.zeros((len(sampled), columns - 1, *sampled.shape[2:]), sampled.dtype), sampled], axis=1)
    for row, length in enumerate(prompt_mask.sum(axis=1)):
        joined[row, columns - length : columns - 1] = prefilled[row, : length - 1]
    return joined
