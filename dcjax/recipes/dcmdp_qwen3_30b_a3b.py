"""DC-GRPO of Qwen3-30B-A3B in bf16: the main result of paper A (arXiv 2606.08779) with experts.

Slice: v5p:4x4x4, 64 chips, as tensor 2 × expert 8 and rollouts on tensor 4, as in the paper; FSDP has the rest.
Data: DAPO-Math-17K, and AIME24 to be measured by, in data/ (`dcjax data data --download`); the model's folder is
models/Qwen3-30B-A3B (or `--pretrained FOLDER`).
Published, avg@32 of AIME24, AIME25 and AMC23, avg@4 of MATH-500, Minerva and OlympiadBench, and their mean:
66.8 49.1 91.9 95.8 52.9 74.5 | 71.8, against GRPO's 60.2 43.6 91.4 95.5 52.0 71.3 | 69.0.
Plan, with responses of 4096 tokens on average: at most 30.4 GiB of a chip; an iteration takes at least 25.1 s, of
which decoding 11.6 and the update 13.3; 300 steps are at least 134 chip-hours.
`python experiments/sweeps.py dcmdp_qwen3_30b_a3b` has GRPO, and fp8 and int8 rollouts, as overrides.
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
    """Ours, since the paper does not state them: steps, weight decay, Adam's epsilon, the gradient's norm, the template
    and how many samples are drawn at once. The clip range, 0.24, is from one summary of the paper; DAPO's is 0.2, 0.28.
    """
    return Config(
        name="dcmdp_qwen3_30b_a3b",
        steps=300,
        pretrained=Path("models/Qwen3-30B-A3B"),
        task=MathTask(dataset="dapo-math-17k", heldout="aime24", max_prompt_tokens=1024, template="boxed"),
        model=replace(presets["qwen3-30b-a3b"], precision=Precision(compute="bf16", head="bf16"), head_chunk=2048),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(
            prompts=64, group_size=8, temperature=1.0, top_p=1.0, max_prompt_length=1024, max_response_length=8192
        ),
        reward=RewardConfig(workers=8),
        serving=ServingConfig(format="bf16", slots=512, tensor=4),
        objective=ObjectiveConfig(
            algorithm="dc_grpo", initial_multiplier=0.05, dual_lr=1.0, budget=0.005, eps_low=0.24, eps_high=0.24
        ),
        # 4 updates of 16 prompts, four responses of two chips: room for two or three of them and a prompt or two
        optimizer=OptimizerConfig(learning_rate=1e-6, beta1=0.9, beta2=0.95, updates=4, tokens_per_microbatch=12_288),
        # AIME24's 30 problems, 32 samples each
        evaluation=EvaluationConfig(every=20, prompts=960, temperature=0.7),
        checkpoint=CheckpointConfig(every=20),
        mesh=MeshConfig(fsdp=4, tensor=2, expert=8),
    )
