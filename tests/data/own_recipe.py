"""A recipe of one's own objective, task, verifier and optimiser, for a model's folder `model/` and `words.jsonl`."""

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from dcjax.data.chat import chat_prompt
from dcjax.data.problems import FixedProblems, TextProblem
from dcjax.data.task import Task
from dcjax.recipe.config import CheckpointConfig, Config, EvaluationConfig, WarmStartConfig
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig
from dcjax.rl import chain


def silence_known_tokens(limit):
    """Takes tokens that the policy is sure of already out of the loss, and logs how many there are."""

    def apply(terms, context):
        known = jnp.exp(context.old_logps) > limit
        metrics = terms.metrics | {"silenced": jnp.mean(known, axis=1)}  # one value a row
        return dataclasses.replace(terms, weights=jnp.where(known, 0, terms.weights), metrics=metrics)

    return apply


@dataclass(frozen=True)
class SilenceKnown(ObjectiveConfig):
    """DC-GRPO that leaves out what the policy knows."""

    limit: float = 0.9
    """Probability above which a token counts as known."""

    def build(self, **sizes):
        objective = super().build(**sizes)
        return dataclasses.replace(objective, transform=chain(objective.transform, silence_known_tokens(self.limit)))


def contains(text, gold, *, finished, partial_credit):
    """1 where the response has the answer in it, and part of that where only the case differs."""
    if gold in text:
        return 1.0
    return partial_credit if gold.lower() in text.lower() else 0.0


@dataclass(frozen=True)
class Words(Task):
    """Questions of a JSONL file, asked by the model's chat template."""

    path: Path = Path("words.jsonl")
    """File with {"question": ..., "answer": ...} in each line."""
    heldout: int = 4
    """Number of lines, from the first, that are kept for evaluation."""
    partial_credit: float = 0.5
    """Reward for an answer in the wrong case."""
    max_prompt_length: int = 32
    """Tokens of the longest prompt."""

    @property
    def reward(self):
        return functools.partial(contains, partial_credit=self.partial_credit)

    def solved(self, rewards):
        return rewards >= self.partial_credit

    def open(self, tokenizer):
        def problem(record):
            question = record["question"]
            return TextProblem(chat_prompt(tokenizer, question), record["answer"], question)

        problems = [problem(json.loads(line)) for line in self.path.read_text().splitlines()]
        return FixedProblems(train=problems[self.heldout :], heldout=problems[: self.heldout])


def shrink_noisy_updates(threshold: float) -> optax.GradientTransformation:
    """Halves each update whose norm is above a threshold."""

    def update(updates, state, params=None):
        factor = jnp.where(optax.tree.norm(updates) > threshold, 0.5, 1.0)
        return jax.tree.map(lambda leaf: factor * leaf, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@dataclass(frozen=True)
class Cautious(OptimizerConfig):
    """AdamW that halves large updates."""

    threshold: float = 0.01
    """Global norm of an update above which it is halved."""

    def build(self, objective, *, steps):
        optimizer = super().build(objective, steps=steps)
        descent = optax.chain(optimizer.descent, shrink_noisy_updates(self.threshold))
        return dataclasses.replace(optimizer, descent=descent)


def config() -> Config:
    return Config(
        name="words",
        steps=6,
        pretrained=Path("model"),
        task=Words(),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(prompts=4, group_size=4, max_prompt_length=32, max_response_length=20),
        serving=ServingConfig(slots=8, steps_per_call=4),
        objective=SilenceKnown(limit=0.5, initial_multiplier=0.2),
        optimizer=Cautious(learning_rate=1e-2, tokens_per_microbatch=100),
        evaluation=EvaluationConfig(every=3, prompts=4),
        checkpoint=CheckpointConfig(every=2, keep=4),
    )
