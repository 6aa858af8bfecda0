"""Accuracy on held-out prompts, of the deployed policy and of the training policy."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from dcjax.assemble import make_engine
from dcjax.config import Config
from dcjax.data.arithmetic import Problem, encode_prompts
from dcjax.rewards.boxed import integer_reward
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.rollout import sample_responses
from dcjax.statistics import wilson_interval
from dcjax.types import Params, Rollout

HELDOUT_SEED = 0
"""The same held-out prompts and sampling keys for every run and step, so that accuracies are compared in pairs."""


@dataclass(frozen=True)
class Accuracy:
    """How many of so many responses were right."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval."""
        return wilson_interval(self.correct, self.total)


def make_engines(config: Config, mesh: Mesh, tokenizer: PreTrainedTokenizerFast) -> dict[str, Qwen3Engine]:
    """`deployed` in the run's serving format, `training` in the trainer's float32."""
    return {
        "deployed": make_engine(config, config.serving.format, mesh, tokenizer.eos_token_id),
        "training": make_engine(config, "float32", mesh, tokenizer.eos_token_id),
    }


def responses(tokenizer: PreTrainedTokenizerFast, rollout: Rollout) -> list[str]:
    """The text of each response, without special tokens."""
    width = rollout.response_mask.shape[1]
    rows = zip(rollout.tokens[:, -width:], rollout.response_mask, strict=True)
    return tokenizer.batch_decode([row[mask] for row, mask in rows], skip_special_tokens=True)


def score(texts: list[str], problems: list[Problem], rollout: Rollout) -> np.ndarray:
    """Rewards, float32 [B], of G neighbouring responses for each problem."""
    group_size = len(texts) // len(problems)
    golds = [problem.answer for problem in problems for _ in range(group_size)]
    graded = zip(texts, golds, rollout.finished, strict=True)
    return np.array([integer_reward(text, gold, finished=bool(done)) for text, gold, done in graded], np.float32)


def evaluate(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    engines: dict[str, Qwen3Engine],
    params: Params,
    version: int,
) -> dict[str, Accuracy]:
    """One sample of each held-out prompt by each engine, from the same float32 masters."""
    settings = config.evaluation
    problems = config.task.problems("heldout", HELDOUT_SEED, 0, settings.prompts)
    prompts = encode_prompts(tokenizer, problems)
    accuracies = {}
    for name, engine in engines.items():
        rollout = sample_responses(
            engine,
            engine.sync(params, version),
            prompts,
            samples_per_prompt=1,
            temperature=settings.temperature,
            key=jax.random.key(HELDOUT_SEED),
        )
        rewards = score(responses(tokenizer, rollout), problems, rollout)
        accuracies[name] = Accuracy(int(rewards.sum()), len(rewards))
    return accuracies
