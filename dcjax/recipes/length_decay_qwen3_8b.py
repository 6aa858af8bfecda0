"""RLOO of Qwen3-8B-Base in bf16 with a learning rate that length decay halves: paper B (arXiv 2602.01826).

Slice: v5p:4x4x4, 64 chips, sharded by FSDP as in the paper, over 16 chips, of which there are four copies.
Data: DAPO-Math-17K's English questions with integer answers, which is our reading of the paper's filter ("about 13k"),
and AIME24 to be measured by, in data/ (`dcjax data data --download`); the model's folder is models/Qwen3-8B-Base (or
`--pretrained FOLDER`).
Published: stable with a period of 160 iterations or 100, measured on AIME24; with 204 it declines.
Plan, with responses of 4096 tokens on average: at most 57.6 GiB of a chip; an iteration takes at least 29.3 s, of
which decoding 19.4 and the update 9.9; 600 steps are at least 312 chip-hours.
`python experiments/sweeps.py length_decay_qwen3_8b` has every baseline of the paper as overrides.
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
    """Ours, since the paper does not state them: steps, Adam's decay rates and epsilon, the template, how losses are
    averaged, how many samples AIME24 is measured by, and how the slice samples."""
    return Config(
        name="length_decay_qwen3_8b",
        steps=600,
        pretrained=Path("models/Qwen3-8B-Base"),
        task=MathTask(
            dataset="dapo-math-17k",
            heldout="aime24",
            questions="english_integer",
            max_prompt_tokens=1024,
            template="boxed",
        ),
        model=replace(
            presets["qwen3-8b"],
            precision=Precision(compute="bf16", head="bf16"),
            remat="products",
            head_chunk=2048,
        ),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(
            prompts=64, group_size=16, temperature=1.0, max_prompt_length=1024, max_response_length=8192
        ),
        reward=RewardConfig(workers=8),
        serving=ServingConfig(format="bf16", slots=1024, tensor=4),
        objective=ObjectiveConfig(algorithm="grpo", estimator="rloo", zero_variance="drop", eps_low=0.2, eps_high=0.28),
        # on-policy: one update of all prompts; room for one of the longest responses, half another and their prompts
        optimizer=OptimizerConfig(
            learning_rate=1e-6,
            decay="period",
            decay_period=160,
            decay_floor=0.1,
            weight_decay=0.01,
            max_grad_norm=1.0,
            tokens_per_microbatch=13_312,
        ),
        # AIME24's 30 problems, 32 samples each
        evaluation=EvaluationConfig(every=20, prompts=960, temperature=1.0),
        checkpoint=CheckpointConfig(every=20),
        mesh=MeshConfig(data=4, fsdp=16),
    )
