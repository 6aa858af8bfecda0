"""DC-GRPO of a chat model on a file of one's own: questions and answers in a .jsonl or .parquet, int8 rollouts.

    dcjax train from_file --pretrained FOLDER --task.path problems.jsonl --task.question problem --task.answer solution

Sized for a model of some hundred million parameters and a machine without an accelerator; a larger one needs a mesh.
"""

from pathlib import Path

from dcjax.data.files import FileTask
from dcjax.recipe.config import CheckpointConfig, Config, EvaluationConfig, WarmStartConfig
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.reward import RewardConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig


def config() -> Config:
    """Groups of equal rewards are dropped, and λ's budget follows the gap that the run begins with."""
    return Config(
        name="from_file",
        steps=100,
        pretrained=Path("model"),
        task=FileTask(),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(prompts=16, group_size=4, max_prompt_length=512, max_response_length=256),
        reward=RewardConfig(workers=2),
        serving=ServingConfig(format="int8", slots=32),
        objective=ObjectiveConfig(budget="auto", zero_variance="drop"),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=5),
        evaluation=EvaluationConfig(every=20, prompts=64),
        checkpoint=CheckpointConfig(every=20, keep=1),
    )
