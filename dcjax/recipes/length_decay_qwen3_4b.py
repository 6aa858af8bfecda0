"""RLOO of Qwen3-4B-Base in bf16 with a learning rate that length decay halves: paper B (arXiv 2602.01826).

Slice: v5p:2x2x4, 16 chips, sharded by FSDP as in the paper, over 8 chips, of which there are two copies.
Data: DAPO-Math-17K's English questions with integer answers, which is our reading of the paper's filter ("about 13k"),
and AIME24 to be measured by, in data/ (`dcjax data data --download`); the model's folder is models/Qwen3-4B-Base (or
`--pretrained FOLDER`).
Published: stable with a period of 204 iterations (one epoch) or 125, measured on AIME24; the collapse, near step 300 at
a constant rate, is only delayed by one of 250.
Plan, with responses of 4096 tokens on average: at most 63.8 GiB of a chip; an iteration takes at least 100.9 s, of
which decoding 77.8 and the update 23.0; 600 steps are at least 269 chip-hours.
`python experiments/sweeps.py length_decay_qwen3_4b` has every baseline of the paper as overrides.
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
        name="length_decay_qwen3_4b",
        steps=600,
        pretrained=Path("models/Qwen3-4B-Base"),
        task=MathTask(
            dataset="dapo-math-17k",
            heldout="aime24",
            questions="english_integer",
            max_prompt_tokens=1024,
            template="boxed",
        ),
        model=replace(
            presets["qwen3-4b"],
            precision=Precision(compute="bf16", head="bf16"),
            remat="products",
            head_chunk=2048,
        ),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(
            prompts=64, group_size=16, temperature=1.0, max_prompt_length=1024, max_response_length=8192
        ),
        reward=RewardConfig(workers=8),
        serving=ServingConfig(format="bf16", slots=512),
        objective=ObjectiveConfig(algorithm="grpo", estimator="rloo", zero_variance="drop", eps_low=0.2, eps_high=0.28),
        # on-policy: one update of all prompts; room for two of the longest responses and a prompt
        optimizer=OptimizerConfig(
            learning_rate=1e-6,
            decay="period",
            decay_period=204,
            decay_floor=0.1,
            weight_decay=0.01,
            max_grad_norm=1.0,
            tokens_per_microbatch=17_408,
        ),
        # AIME24's 30 problems, 32 samples each
        evaluation=EvaluationConfig(every=20, prompts=960, temperature=1.0),
        checkpoint=CheckpointConfig(every=20),
        mesh=MeshConfig(data=2, fsdp=8),
    )
