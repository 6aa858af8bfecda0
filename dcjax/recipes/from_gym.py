"""DC-GRPO of a chat model on data sets of reasoning-gym (`pip install 'dcjax[tasks]'`), int8 rollouts.

    dcjax train from_gym --pretrained FOLDER --task.datasets "chain_sum(min_terms=2, max_terms=2)" leg_counting

Sized for a model of some hundred million parameters and a machine without an accelerator; a larger one needs a mesh.
"""

from pathlib import Path

from dcjax.data.gym import GymTask
from dcjax.recipe.config import CheckpointConfig, Config, EvaluationConfig, WarmStartConfig
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.reward import RewardConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig


def config() -> Config:
    """Groups of equal rewards are dropped, and λ's budget follows the gap that the run begins with."""
    return Config(
        name="from_gym",
        steps=100,
        pretrained=Path("model"),
        task=GymTask(datasets=("chain_sum(min_terms=2, max_terms=2, min_digits=1, max_digits=2)",)),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(prompts=16, group_size=8, max_prompt_length=512, max_response_length=64),
        reward=RewardConfig(workers=2),
        serving=ServingConfig(format="int8", slots=32),
        objective=ObjectiveConfig(budget="auto", zero_variance="drop"),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=5),
        evaluation=EvaluationConfig(every=20, prompts=128),
        checkpoint=CheckpointConfig(every=20, keep=1),
    )
