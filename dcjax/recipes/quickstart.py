"""DC-GRPO on chained arithmetic: a tiny Qwen3 in float32, sampled by an int8 engine. Minutes on a laptop."""

from dcjax.recipe.config import Config
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig


def config() -> Config:
    """Zero-variance groups are dropped (paper B); paper-exact dc_grpo keeps them.

    The gap of int8 falls under this budget, and the penalty loses nothing (docs/findings.md, A4). The gap of int4 does
    not: set `objective.budget=auto` beside `serving.format=int4`.
    """
    return Config(
        name="quickstart",
        steps=80,
        objective=ObjectiveConfig(dual_lr=20.0, budget=0.0015, zero_variance="drop"),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5),
    )
