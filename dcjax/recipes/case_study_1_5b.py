"""DC-GRPO of DeepSeek-R1-Distill-Qwen-1.5B in bf16: the model of paper A's case study (arXiv 2606.08779).

Slice: v5p:2x2x1, 4 chips of one host.
Data: DAPO-Math-17K, and AIME24 to be measured by, in data/ (`dcjax data data --download`); the model's folder is
models/DeepSeek-R1-Distill-Qwen-1.5B (or `--pretrained FOLDER`).
Published: no number that we could recover.
Plan, with responses of 4096 tokens on average: at most 42.4 GiB of a chip; an iteration takes at least 48.4 s, of
which decoding 26.0 and the update 22.3; 300 steps are at least 16 chip-hours.
`python experiments/sweeps.py case_study_1_5b` has the sweep of sampling temperatures, with GRPO beside DC-GRPO.
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
    """The case study's own settings were not recovered: these are the paper's for 8B, and what is ours there."""
    return Config(
        name="case_study_1_5b",
        steps=300,
        pretrained=Path("models/DeepSeek-R1-Distill-Qwen-1.5B"),
        task=MathTask(dataset="dapo-math-17k", heldout="aime24", max_prompt_tokens=1024, template="boxed"),
        model=replace(
            presets["deepseek-r1-distill-qwen-1.5b"],
            precision=Precision(compute="bf16", head="bf16"),
            remat="products",
            head_chunk=2048,
        ),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(
            prompts=64, group_size=8, temperature=1.0, top_p=1.0, max_prompt_length=1024, max_response_length=8192
        ),
        reward=RewardConfig(workers=8),
        serving=ServingConfig(format="bf16", slots=512),
        objective=ObjectiveConfig(
            algorithm="dc_grpo", initial_multiplier=0.1, dual_lr=1.0, budget=0.0037, eps_low=0.24, eps_high=0.24
        ),
        # 4 updates of 16 prompts; room for two of the longest responses and a prompt
        optimizer=OptimizerConfig(learning_rate=1e-6, beta1=0.9, beta2=0.95, updates=4, tokens_per_microbatch=17_408),
        # AIME24's 30 problems, 32 samples each, at one temperature throughout the sweep
        evaluation=EvaluationConfig(every=20, prompts=960, temperature=0.7),
        checkpoint=CheckpointConfig(every=20),
        mesh=MeshConfig(fsdp=4),
    )
