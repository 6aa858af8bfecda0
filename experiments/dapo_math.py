"""DC-GRPO of Qwen3-8B on DAPO-Math-17K with paper A's hyper-parameters, sampled by an int8 engine, on 8 devices.

It expects the model's folder at models/Qwen3-8B (or `--pretrained FOLDER`), and DAPO-Math-17K and AIME24 in data/
(`dcjax data data --download`, or `--task.data_dir DIR`).
"""

from dataclasses import replace
from pathlib import Path

from dcjax.data.mathematics import MathTask
from dcjax.models.config import Precision, presets
from dcjax.recipe.config import CheckpointConfig, Config, EvaluationConfig, WarmStartConfig
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.reward import RewardConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig
from dcjax.sharding.mesh import MeshConfig


def config() -> Config:
    """Paper A deploys bf16 and fp8; int8, the mesh and the number of steps are ours."""
    return Config(
        name="dapo_math",
        steps=300,
        pretrained=Path("models/Qwen3-8B"),
        task=MathTask(dataset="dapo-math-17k", heldout="aime24", max_prompt_tokens=1024, template="boxed"),
        model=replace(presets["qwen3-8b"], head_chunk=512, precision=Precision(compute="bf16")),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(prompts=64, group_size=8, max_prompt_length=1024, max_response_length=8192),
        reward=RewardConfig(workers=8),
        serving=ServingConfig(format="int8", slots=256),
        objective=ObjectiveConfig(
            algorithm="dc_grpo", initial_multiplier=0.1, dual_lr=1.0, budget=0.0037, eps_low=0.24, eps_high=0.24
        ),
        optimizer=OptimizerConfig(learning_rate=1e-6, beta1=0.9, beta2=0.95, updates=4),
        # AIME24's 30 problems, 32 samples each
        evaluation=EvaluationConfig(every=20, prompts=960, temperature=0.7),
        checkpoint=CheckpointConfig(every=20),
        mesh=MeshConfig(fsdp=8),
    )
