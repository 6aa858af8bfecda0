"""The model of all peers and the configuration of dcjax's run, and what peers read: weights, prompts and a probe."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import work  # pyrefly: ignore[missing-import]

from dcjax.models import ModelConfig, count_params, forward, init_params, save_hf
from dcjax.recipe.config import Config, WarmStartConfig
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig

MODEL = ModelConfig(
    vocab_size=work.VOCABULARY,
    hidden_size=128,
    intermediate_size=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope_theta=1e6,
    tie_embeddings=False,
    remat="none",
)

PARAMETERS = count_params(MODEL)
"""853,376."""


RAGGED_MEAN, RAGGED_SIGMA = 0.35, 0.8
"""Of the lognormal that ragged lengths are drawn from: the mean, as a share of the limit, and the logarithm's deviation."""


def config(*, slots: int, steps_per_call: int) -> Config:
    """The run that every peer does."""
    return Config(
        model=MODEL,
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(
            prompts=work.PROMPTS,
            group_size=work.GROUP_SIZE,
            temperature=1.0,
            max_prompt_length=work.PROMPT_LENGTH,
            max_response_length=work.RESPONSE_LENGTH,
        ),
        serving=ServingConfig(format="float32", slots=slots, steps_per_call=steps_per_call),
        objective=ObjectiveConfig(algorithm="grpo", eps_low=work.CLIP, eps_high=work.CLIP),
        optimizer=OptimizerConfig(
            learning_rate=work.LEARNING_RATE,
            beta1=work.BETA1,
            beta2=work.BETA2,
            epsilon=work.EPSILON,
            max_grad_norm=work.MAX_GRAD_NORM,
        ),
    )


def draw_lengths(rows: int, *, limit: int) -> np.ndarray:
    """Ragged lengths of responses, 1 to `limit`; always the same ones."""
    logarithm = np.log(RAGGED_MEAN * limit) - RAGGED_SIGMA**2 / 2
    drawn = np.random.default_rng(0).lognormal(logarithm, RAGGED_SIGMA, rows)
    return np.clip(np.round(drawn), 1, limit).astype(np.int32)


def write(folder: Path, lengths: np.ndarray) -> None:
    """Writes the model as a Hugging Face folder, the prompts, responses' lengths, and probe tokens with their logits."""
    generator = np.random.default_rng(0)
    params = init_params(MODEL, jax.random.key(0))
    save_hf(folder / "model", MODEL, params)
    np.save(folder / "prompts.npy", generator.integers(work.VOCABULARY, size=(work.PROMPTS, work.PROMPT_LENGTH)))
    np.save(folder / "lengths.npy", lengths)
    tokens = generator.integers(work.VOCABULARY, size=(8, work.PROMPT_LENGTH + work.RESPONSE_LENGTH))
    np.savez(folder / "probe.npz", tokens=tokens, logits=jax.jit(forward, static_argnums=0)(MODEL, params, tokens))
