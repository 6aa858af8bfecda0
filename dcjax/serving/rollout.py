"""Prompts in, a `Rollout` out: a direct loop over the engine with continuous batching."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from dcjax.serving.engine import Qwen3Engine, make_requests
from dcjax.serving.sync import ServingParams
from dcjax.types import Rollout


def sample_responses(
    engine: Qwen3Engine,
    params: ServingParams,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    temperature: float,
    key: jax.Array,
) -> Rollout:
    """G samples of each prompt, the samples of one prompt next to each other, as host arrays.

    A slot is refilled as soon as a `generate` call returns with its sample ended; no sample waits for the longest.
    Sample i is drawn with fold_in(key, i), so the tokens depend neither on the slots nor on the steps a call.

    Args:
      engine: decodes; its limits set the widths P and T of what is returned.
      params: from `engine.sync`.
      prompts: token ids, 1 to P each.
      samples_per_prompt: G.
      temperature: of every sample; 0 is greedy.
      key: a typed PRNG key.
    """
    total = len(prompts) * samples_per_prompt
    width = engine.max_response_length
    tokens = np.zeros((total, width), np.int32)
    logps = np.zeros((total, width), np.float32)
    versions = np.full((total, width), -1, np.int32)
    lengths = np.zeros(total, np.int32)
    keys = np.asarray(jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(total))))

    prefix = engine.prefill_many(params, prompts)
    state = engine.init_decode_state()
    running = np.full(engine.slots, -1)
    queued = 0
    while True:
        free = np.flatnonzero(running < 0)[: total - queued]
        if len(free):
            state = _start(
                engine,
                prefix,
                state,
                free,
                np.arange(queued, queued + len(free)),
                samples_per_prompt,
                temperature,
                keys,
            )
            running[free] = np.arange(queued, queued + len(free))
            queued += len(free)
        if (running < 0).all():
            break
        state, result = engine.generate(params, state)
        result = result.convert_to_numpy()
        slots, steps = np.nonzero(result.valid)
        samples = running[slots]
        columns = lengths[samples] + steps
        tokens[samples, columns] = result.tokens[slots, steps]
        logps[samples, columns] = result.log_prob[slots, steps]
        versions[samples, columns] = result.version[slots, steps]
        np.add.at(lengths, samples, 1)
        ended = (running >= 0) & ~np.asarray(state.active)
        running[ended] = -1
    return _assemble(engine, prompts, samples_per_prompt, temperature, tokens, logps, versions, lengths)


def _start(engine, prefix, state, free, samples, samples_per_prompt, temperature, keys):
    """Inserts into the free slots; counts are padded to powers of two, so that few programs are compiled."""
    padding = (1 << (len(free) - 1).bit_length()) - len(free)
    samples = np.pad(samples, (0, padding))
    requests = make_requests(
        rows=samples // samples_per_prompt,
        limits=np.full(len(samples), engine.max_response_length),
        temperatures=np.full(len(samples), temperature),
        keys=keys[samples],
    )
    return engine.insert_many(prefix, state, np.pad(free, (0, padding), constant_values=engine.slots), requests)


def _assemble(engine, prompts, samples_per_prompt, temperature, tokens, logps, versions, lengths) -> Rollout:
    prompt_tokens = np.zeros((len(prompts), engine.max_prompt_length), np.int32)
    prompt_mask = np.zeros(prompt_tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        prompt_tokens[row, -len(prompt) :] = prompt
        prompt_mask[row, -len(prompt) :] = True
    last = tokens[np.arange(len(tokens)), lengths - 1]
    return Rollout(
        tokens=np.concatenate([np.repeat(prompt_tokens, samples_per_prompt, axis=0), tokens], axis=1),
        prompt_mask=np.repeat(prompt_mask, samples_per_prompt, axis=0),
        response_mask=np.arange(tokens.shape[1]) < lengths[:, None],
        rollout_logps=logps,
        temperature=np.full(len(tokens), temperature, np.float32),
        versions=versions,
        finished=last == engine.end_token,
    )
