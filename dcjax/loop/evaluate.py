"""Accuracy on held-out prompts, of the deployed policy and of the training policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from dcjax.allocator import return_freed_memory
from dcjax.data.task import decode_responses, encode_prompts
from dcjax.errors import RunError
from dcjax.keys import make_key
from dcjax.loop.reward_collector import RewardCollector
from dcjax.loop.setup import Setup
from dcjax.recipe.build import PolicyName, optimizer_of
from dcjax.reporting.statistics import wilson_interval
from dcjax.rl.averaging import averaged_params
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.rollout import Sampling, require_finite
from dcjax.serving.sync import ServingParams
from dcjax.sharding.hosts import total
from dcjax.types import Params, Rollout, TrainState
from dcjax.user_code import refusals_of

HELDOUT_SEED = 0
"""The same held-out prompts and sampling keys for every run and step, so that accuracies are compared in pairs."""


@dataclass(frozen=True)
class Accuracy:
    """How many of one policy's responses were right."""

    policy: PolicyName
    format: str
    correct: int
    total: int
    accuracy: float
    # 95% Wilson
    interval: tuple[float, float]


def responses(tokenizer: PreTrainedTokenizerFast, rollout: Rollout) -> list[str]:
    """The text of each response, as `decode_responses` gives it."""
    width = rollout.response_mask.shape[1]
    rows = zip(rollout.tokens[:, -width:], rollout.response_mask, strict=True)
    return decode_responses(tokenizer, [row[mask] for row, mask in rows], np.asarray(rollout.finished))


def evaluate(setup: Setup, engines: Mapping[PolicyName, Qwen3Engine], params: Params, version: int) -> list[Accuracy]:
    """One sample of each held-out prompt by each engine, from the same float32 masters; hosts share the scoring.

    Which rewards, or correctness parts of rewards, make a response right, the task says (`Task.solved`).

    Raises:
      RunError: a policy whose log-probs are not finite, or a reward that fails.
    """
    settings = setup.config.evaluation
    problems = setup.problems.problems("heldout", HELDOUT_SEED, 0, settings.prompts)
    prompts = encode_prompts(setup.tokenizer, problems)
    rows = []
    for policy, engine in engines.items():
        collector = RewardCollector(setup.rewards, setup.tokenizer, problems, samples_per_prompt=1)
        # the serving weights of one engine go before those of the next are made
        rollout = _sample(engine, engine.sync(params, version), prompts, settings.temperature, collector)
        return_freed_memory()
        _require_finite(policy, rollout, engine)
        graded = collector.result().graded
        with refusals_of(setup.config.task):
            solved = setup.config.task.solved(graded)
        correct = total(int(np.sum(solved)), engine.mesh)
        interval = wilson_interval(correct, settings.prompts)
        accuracy = correct / settings.prompts
        rows.append(Accuracy(policy, engine.format.name, correct, settings.prompts, accuracy, interval))
    return rows


def _sample(
    engine: Qwen3Engine,
    serving: ServingParams,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    collector: RewardCollector,
) -> Rollout:
    """One response to each prompt, which the collector gets as it ends."""
    sampling = Sampling(
        engine, serving, prompts, samples_per_prompt=1, temperature=temperature, key=make_key(HELDOUT_SEED)
    )
    for ended in sampling.as_they_end(serving):
        collector.submit(ended)
    return sampling.rollout()


def evaluate_state(setup: Setup, state: TrainState) -> dict[str, float]:
    """Held-out accuracies by the names of metrics.jsonl: of both policies, and of the average where one is kept."""
    rows = evaluate(setup, setup.engines, state.params, int(state.step))
    measured = {f"eval/{row.policy}_accuracy": row.accuracy for row in rows}
    if optimizer_of(setup.config).ema_decay:
        averaged = evaluate_average(setup, averaged_params(state.opt_state, state.params), int(state.step))
        measured |= {f"eval/{row.policy.removesuffix('_ema')}_accuracy_ema": row.accuracy for row in averaged}
    return measured | {"eval/prompts": setup.config.evaluation.prompts}


def evaluate_average(setup: Setup, average: Params, version: int) -> list[Accuracy]:
    """The accuracies of both engines with the moving average of the parameters."""
    engines: dict[PolicyName, Qwen3Engine] = {
        "deployed_ema": setup.engines["deployed"],
        "training_ema": setup.engines["training"],
    }
    return evaluate(setup, engines, average, version)


def _require_finite(policy: PolicyName, rollout: Rollout, engine: Qwen3Engine) -> None:
    try:
        require_finite(rollout, engine)
    except ValueError as error:
        raise RunError(f"the {policy} policy cannot be evaluated: {error}") from None
