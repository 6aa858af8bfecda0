"""Engines of `tiny`'s sizes and what they sampled, shared by the tests of serving: equal ones share their programs."""

import functools
from dataclasses import replace

import jax
import tiny
from compiling import jit

from dcjax.models import token_logps
from dcjax.serving import Qwen3Engine
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.rollout import sample_responses

DENSE, EXPERTS = tiny.DENSE, tiny.EXPERTS
OTHER = replace(DENSE, family="qwen2", tie_embeddings=False)
"""Of the other family, with a head of its own."""

MIXED = replace(EXPERTS, mlp_only_layers=(0,))
"""A dense layer, then one with experts."""

P, T, SLOTS, STEPS = tiny.PROMPT_LENGTH, tiny.RESPONSE_LENGTH, tiny.SLOTS, tiny.STEPS_PER_CALL
END, G = 3, 8
PROMPTS = [[1, 2, 4], [5], [6, 7, 8, 9, 10, 1]]
TEMPERATURE = 0.8


@functools.cache
def engine_of(format="float32", config=DENSE, *, mismatch=(), **changes):
    """It serves both kinds of truncation, and records what it can; `mismatch` as pairs."""
    sizes = (
        tiny.SIZES | {"end_tokens": (END,), "max_candidates": 6, "records_experts": bool(config.num_experts)} | changes
    )
    return Qwen3Engine(config, format=format, mismatch=MismatchConfig(**dict(mismatch)), **sizes)


@functools.cache
def params_of(engine, config=DENSE, version=7):
    """Weights that an engine serves."""
    return engine.sync(tiny.masters(config), version)


def sample(engine, config=DENSE, *, seed=1, temperature=TEMPERATURE, version=7, **settings):
    """G samples of each prompt."""
    return sample_responses(
        engine,
        params_of(engine, config, version),
        PROMPTS,
        samples_per_prompt=G,
        temperature=temperature,
        key=jax.random.key(seed),
        **settings,
    )


@functools.cache
def rollout_of(format="float32", config=DENSE, **settings):
    """What the engine of a format sampled; not to be changed."""
    return sample(engine_of(format, config), config, **settings)


scores = jit(token_logps, static_argnums=0, static_argnames="response_length")


def trained_scores(config, rollout, params=None, **replayed):
    """Teacher forcing through the training forward."""
    mask = rollout.attention_mask
    arguments = {"response_length": T, "temperature": rollout.temperature} | replayed
    return scores(config, tiny.masters(config) if params is None else params, rollout.tokens, mask, **arguments)
