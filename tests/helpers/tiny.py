"""The shapes of the whole suite: one dense model, one with experts, one task, one run.

Programs are compiled once for equal shapes, whichever test asks first, so a test departs from these only where that is
what it is about.
"""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.models import ModelConfig, abstract_params
from dcjax.recipe.config import CheckpointConfig, Config, EvaluationConfig, WarmStartConfig
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.plain import to_dict
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig

TASK = ArithmeticTask(min_operations=1, max_operations=2, max_operand=4, max_value=9)

DENSE = ModelConfig(vocab_size=20, hidden_size=32, intermediate_size=64)
"""Two layers; its vocabulary, heads and widths divide by two."""

EXPERTS = replace(DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
"""The same with experts in both layers."""

PROMPT_LENGTH, RESPONSE_LENGTH, SLOTS, STEPS_PER_CALL = 6, 20, 8, 4

SIZES = {
    "slots": SLOTS,
    "max_prompt_length": PROMPT_LENGTH,
    "max_response_length": RESPONSE_LENGTH,
    "steps_per_call": STEPS_PER_CALL,
}
"""Of an engine."""

CONFIG = Config(
    name="tiny",
    steps=8,
    task=TASK,
    model=DENSE,
    warm_start=WarmStartConfig(steps=35, batch_size=32, warmup_steps=5, learning_rate=2e-2),
    rollout=RolloutConfig(
        prompts=4, group_size=4, max_prompt_length=PROMPT_LENGTH, max_response_length=RESPONSE_LENGTH
    ),
    objective=ObjectiveConfig(dual_lr=20.0, budget=0.0014),
    optimizer=OptimizerConfig(tokens_per_microbatch=100, learning_rate=1e-2, warmup_steps=3),
    evaluation=EvaluationConfig(every=2, prompts=16),
    checkpoint=CheckpointConfig(every=2, keep=4),
    serving=ServingConfig(slots=SLOTS, steps_per_call=STEPS_PER_CALL),
)
"""A run that learns, in seconds."""


@functools.cache
def masters(config: ModelConfig, seed: int = 0):
    """Float32 parameters of ordinary sizes, norms about 1; drawn by NumPy, so that nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape)
        return jnp.array(1 + 0.1 * drawn if "norm" in path[-1].key else drawn * leaf.shape[-1] ** -0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def write_recipe(path: Path, config: Config = CONFIG) -> Path:
    """Makes a file from which `dcjax train` takes a config."""
    path.write_text(
        f"from dcjax.recipe.plain import from_dict\n\n\ndef config():\n    return from_dict({to_dict(config)!r})\n"
    )
    return path
