"""Accuracy on held-out prompts, of the deployed policy and of the training policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from dcjax.data.task import Problems, decode_responses, encode_prompts
from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.end_tokens import run_end_tokens
from dcjax.loop.judging import Judging, check_golds, open_scorer
from dcjax.loop.run_directory import load_config, locate
from dcjax.recipe.build import abstract_state, make_engine, make_training_engine
from dcjax.recipe.config import Config, on_one_device
from dcjax.reporting.statistics import wilson_interval
from dcjax.rewards.scorer import Scorer
from dcjax.rl.averaging import averaged_params
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.quantize import FormatName, formats
from dcjax.serving.rollout import require_finite, sample_responses
from dcjax.sharding.hosts import total
from dcjax.sharding.mesh import make_mesh
from dcjax.types import Params, Rollout

Policy = Literal["deployed", "training", "deployed_ema"]

HELDOUT_SEED = 0
"""The same held-out prompts and sampling keys for every run and step, so that accuracies are compared in pairs."""


@dataclass(frozen=True)
class Accuracy:
    """How many of one policy's responses were right."""

    policy: Policy
    format: FormatName
    correct: int
    total: int
    accuracy: float
    # 95% Wilson
    interval: tuple[float, float]


@dataclass(frozen=True)
class Evaluation:
    """Both policies at one checkpoint."""

    step: int
    temperature: float
    rows: list[Accuracy]


def make_engines(config: Config, mesh: Mesh, end_tokens: Sequence[int]) -> dict[Policy, Qwen3Engine]:
    """`deployed` in the run's serving format, `training` in the trainer's float32, for masters on this mesh.

    Raises:
      RunError: they cannot be served.
    """
    return {
        "deployed": make_engine(config, mesh, end_tokens),
        "training": make_training_engine(config, mesh, end_tokens),
    }


def open_problems(config: Config, tokenizer: PreTrainedTokenizerFast) -> Problems:
    """The task's problems.

    Raises:
      RunError: their files are missing or cannot be used.
    """
    try:
        return config.task.open(tokenizer)
    except (ValueError, FileNotFoundError) as error:
        raise RunError(str(error)) from None


def responses(tokenizer: PreTrainedTokenizerFast, rollout: Rollout) -> list[str]:
    """The text of each response, as `decode_responses` gives it."""
    width = rollout.response_mask.shape[1]
    rows = zip(rollout.tokens[:, -width:], rollout.response_mask, strict=True)
    return decode_responses(tokenizer, [row[mask] for row, mask in rows], np.asarray(rollout.finished))


def evaluate(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    source: Problems,
    scorer: Scorer,
    engines: dict[Policy, Qwen3Engine],
    params: Params,
    version: int,
) -> list[Accuracy]:
    """One sample of each held-out prompt by each engine, from the same float32 masters; hosts share the scoring.

    A response is right that earns at least 1.

    Raises:
      RunError: a policy whose log-probs are not finite, or a reward that fails.
    """
    settings = config.evaluation
    problems = source.problems("heldout", HELDOUT_SEED, 0, settings.prompts)
    prompts = encode_prompts(tokenizer, problems)
    rows = []
    for policy, engine in engines.items():
        judging = Judging(scorer, tokenizer, problems, samples_per_prompt=1)
        rollout = sample_responses(
            engine,
            engine.sync(params, version),
            prompts,
            samples_per_prompt=1,
            temperature=settings.temperature,
            key=jax.random.key(HELDOUT_SEED),
            on_ended=judging.begin,
        )
        _require_finite(policy, rollout, engine)
        correct = total(int(np.sum(judging.result() >= 1)), engine.mesh)
        interval = wilson_interval(correct, settings.prompts)
        accuracy = correct / settings.prompts
        rows.append(Accuracy(policy, engine.format.name, correct, settings.prompts, accuracy, interval))
    return rows


def _require_finite(policy: Policy, rollout: Rollout, engine: Qwen3Engine) -> None:
    try:
        require_finite(rollout, engine)
    except ValueError as error:
        raise RunError(f"the {policy} policy cannot be evaluated: {error}") from None


def evaluate_source(
    source: Path, *, prompts: int | None = None, temperature: float | None = None, format: str | None = None
) -> Evaluation:
    """Accuracies of a run's newest checkpoint, or of one checkpoint in it; None takes the run's own setting.

    Raises:
      RunError: no such run or checkpoint, a damaged one, or a setting out of range.
    """
    run_dir, step = locate(source)
    config = load_config(run_dir)
    if format is not None and format not in formats:
        raise RunError(f"format is {format!r}; it must be one of {', '.join(formats)}")
    settings = config.evaluation
    try:
        settings = replace(
            settings,
            prompts=settings.prompts if prompts is None else prompts,
            temperature=settings.temperature if temperature is None else temperature,
        )
        serving = replace(config.serving, format=format or config.serving.format)
        config = on_one_device(replace(config, evaluation=settings, serving=serving))
    except ValueError as error:
        raise RunError(str(error)) from None
    mesh = make_mesh(config.mesh)
    checkpoints = Checkpoints(run_dir / "checkpoints")
    if step is None:
        step = checkpoints.latest()
    state, loop = checkpoints.restore(step, abstract_state(config, mesh))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run_dir / "tokenizer")
    engines = make_engines(config, mesh, run_end_tokens(run_dir, config, tokenizer))
    problems = open_problems(config, tokenizer)
    check_golds(config, problems)
    with open_scorer(config) as scorer:
        rows = evaluate(config, tokenizer, problems, scorer, engines, state.params, loop.step)
        if config.optimizer.ema_decay:
            averaged = averaged_params(state.opt_state, state.params)
            deployed: dict[Policy, Qwen3Engine] = {"deployed_ema": engines["deployed"]}
            rows += evaluate(config, tokenizer, problems, scorer, deployed, averaged, loop.step)
    return Evaluation(loop.step, config.evaluation.temperature, rows)
