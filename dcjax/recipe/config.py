"""A run as data: frozen, validated when built. Recipes return a `Config`; the command line overrides its fields.

`task`, `objective`, `optimizer` and `reward` may be frozen dataclasses of a reader's own: `dcjax.recipe.sections`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import jax

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.data.task import Task
from dcjax.models.attention import resolve
from dcjax.models.config import DTYPES, ModelConfig, presets
from dcjax.models.numerics import Numerics
from dcjax.paths import localize
from dcjax.recipe.checks import require
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.reward import RewardConfig
from dcjax.recipe.rollout import IN_PROCESS, RolloutConfig
from dcjax.recipe.sections import (
    ObjectiveSection,
    OptimizerSection,
    RewardSection,
    build_objective,
    build_optimizer,
    check_sections,
)
from dcjax.recipe.serving import ServingConfig
from dcjax.rl.objective import Objective
from dcjax.rl.packing import Packing
from dcjax.serving.formats import cache_dtype, serving_format
from dcjax.serving.in_training import training_numerics
from dcjax.serving.mismatch import MismatchConfig
from dcjax.sharding.hosts import DistributedConfig
from dcjax.sharding.mesh import MeshConfig
from dcjax.sharding.rules import split


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised training on generated examples, before RL."""

    steps: int = 400
    """Number of optimiser updates; with 0, RL starts from randomly initialised or pretrained weights."""
    batch_size: int = 128
    """Examples per update."""
    learning_rate: float = 8e-3
    """Peak learning rate: linear warm-up, then cosine decay to a tenth of the peak."""
    warmup_steps: int = 50
    """Number of updates of linear learning-rate warm-up."""
    early_scratchpads: float = 0.8
    """Share of examples with step-by-step reasoning in the first 80% of the updates."""
    late_scratchpads: float = 0.15
    """Share of examples with step-by-step reasoning in the last 20% of the updates.
    A low share leaves a model that can reason but rarely does."""

    def __post_init__(self):
        require("warm_start.", self, {"steps": 0, "batch_size": 1, "learning_rate": 0, "warmup_steps": 0})
        for name in ("early_scratchpads", "late_scratchpads"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"warm_start.{name} is {value}; it must lie within [0, 1]")


@dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on held-out prompts, of the deployed and of the training policy."""

    every: int = 10
    """RL steps between evaluations; the first and the last step are always evaluated."""
    prompts: int = 512
    """Number of held-out prompts, with one sample each."""
    temperature: float = 1.0
    """Sampling temperature of evaluations; 0 is greedy."""

    def __post_init__(self):
        require("evaluation.", self, {"every": 1, "prompts": 1, "temperature": 0})


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = 10
    """RL steps between checkpoints; the first and the last step are always saved."""
    keep: int = 3
    """Number of newest checkpoints to keep."""

    def __post_init__(self):
        require("checkpoint.", self, {"every": 1, "keep": 1})


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics and the report go besides the run's directory."""

    wandb: str | None = None
    """Project of Weights & Biases. WANDB_MODE=offline keeps it on this machine."""
    mlflow: str | None = None
    """Experiment of MLflow, at MLFLOW_TRACKING_URI."""


@dataclass(frozen=True)
class Config:
    """One run: a warm start, then RL with rollouts from the serving engine."""

    name: str = "run"
    """Name of the run; it is written to runs/NAME unless run_dir is set."""
    steps: int = 100
    """Number of RL iterations."""
    seed: int = 0
    """Random seed for initialisation, problem order and sampling."""
    run_dir: Path | None = None
    """Directory that everything is written to. It must be a local path; "~" is the home directory."""
    pretrained: Path | None = None
    """Hugging Face folder that gives the architecture, the initial weights and the tokens that end a response.
    Of the model section, only remat, attention, head_chunk and precision are then used."""
    task: Task = field(default_factory=ArithmeticTask)
    model: ModelConfig = presets["tiny"]
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardSection = field(default_factory=RewardConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    objective: ObjectiveSection = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerSection = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    self_checks: bool = True
    """End the run where it finds served weights, samples, ratios or normalisers that cannot be right."""

    def __post_init__(self):
        localize(self)
        require("", self, {"steps": 0, "seed": 0})
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}; it must be below 2**63")
        if not self.name or set(self.name) & set("/\\\0") or self.name in (".", ".."):
            raise ValueError(f"name is {self.name!r}; it names a folder under runs/")
        check_sections(self)
        self._check_lengths()
        self.reward.check(self.task, max_response_length=self.rollout.max_response_length)
        self._check_sampling()
        self._check_divisions()
        self._check_objective()
        self._check_in_training()

    def _check_lengths(self):
        for which in ("prompt", "response"):
            limit, needed = (
                getattr(self.rollout, f"max_{which}_length"),
                getattr(self.task, f"max_{which}_length"),
            )
            if limit < needed:
                raise ValueError(
                    f"rollout.max_{which}_length is {limit}; this task's longest {which} needs {needed} tokens"
                )

    def _check_sampling(self):
        ahead, staleness = self.rollout.async_level, self.mismatch.staleness
        if ahead and staleness:
            raise ValueError(
                f"rollout.async_level is {ahead} and mismatch.staleness {staleness}; both say how old the weights are "
                "that sample, so set one of them"
            )
        if staleness and self.rollout.engine != IN_PROCESS:
            raise ValueError(
                f"mismatch.staleness is {staleness}, and rollout.engine {self.rollout.engine}; a server serves the "
                "newest checkpoint, so set checkpoint.every instead"
            )
        if ahead and not self.serving.devices and (size := math.prod(dataclasses.asdict(self.mesh).values())) > 1:
            raise ValueError(
                f"rollout.async_level is {ahead} on the {size} devices of the mesh; sampling needs devices of its own "
                "there, serving.devices"
            )
        if self.pretrained is not None:
            # the folder's architecture counts, which the engine checks
            return
        check_positions(self.model, self.rollout)
        top_k, tokens = self.rollout.top_k, self.model.vocab_size
        if top_k > tokens:
            raise ValueError(f"rollout.top_k is {top_k}; the vocabulary has {tokens} tokens")
        if self.rollout.replay_routing and not self.model.num_experts:
            raise ValueError(
                "rollout.replay_routing is True; it needs a model with experts, and model.num_experts is 0"
            )

    def _check_divisions(self):
        prompts, updates = self.rollout.prompts, self.optimizer.updates
        if prompts % updates:
            raise ValueError(f"rollout.prompts {prompts} do not divide into optimizer.updates {updates} minibatches")
        shares, minibatch = split(dataclasses.asdict(self.mesh), "batch"), self.rollout.sequences // updates
        if minibatch % shares or self.warm_start.batch_size % shares:
            raise ValueError(
                f"the {minibatch} sequences of a minibatch, and warm_start.batch_size {self.warm_start.batch_size}, "
                f"must be multiples of mesh.data × mesh.fsdp × mesh.expert, {shares}"
            )
        # for its checks, which are the same everywhere; JAX's platform is not known before hosts have found each other
        self.packing("cpu")

    def _check_objective(self):
        objective = build_objective(
            self.objective,
            updates=self.optimizer.updates,
            max_response_length=self.rollout.max_response_length,
        )
        if objective.requires.candidate_tokens and not self.rollout.top_k:
            raise ValueError("rollout.top_k is 0; this objective requires candidate tokens, so it must be at least 1")
        self._check_sampler(objective)
        build_optimizer(self.optimizer, objective, steps=self.steps)

    def _check_in_training(self) -> None:
        """Refuses a forward that could not round as the engine does."""
        format, devices = serving_format(self.serving.format), math.prod(dataclasses.asdict(self.mesh).values())
        quantizes = self.serving.in_training == "all" and format.quantizes_activations
        if quantizes and self.model.num_experts and devices > 1:
            raise ValueError(
                f"serving.in_training is all, and the mesh has {devices} devices: they share the rows that experts "
                f"multiply, of which the format {format.name} quantises each as a whole; train in weights"
            )
        if self.pretrained is None:
            self.training_forward()

    def _check_sampler(self, objective: Objective) -> None:
        """Refuses a sampler whose distributions cannot be known."""
        requires, engine = objective.requires, self.rollout.engine
        if (requires.sampler_distributions or requires.sampler_head) and engine != IN_PROCESS:
            raise ValueError(
                f"rollout.engine is {engine}, and this objective requires more of the sampler's distributions than the "
                f"log-probs of sampled tokens, which a server does not give; sample {IN_PROCESS}"
            )
        for name in ("logit_noise", "routing_flips"):
            if requires.sampler_distributions and (value := getattr(self.mismatch, name)):
                raise ValueError(
                    f"mismatch.{name} is {value}, which is drawn for each token as it is sampled, and this objective "
                    "requires the sampler's distributions, which are read once more; leave it at 0"
                )
        if requires.sampler_head > self.model.vocab_size and self.pretrained is None:
            raise ValueError(
                f"objective.sampler_head is {requires.sampler_head}; the vocabulary has {self.model.vocab_size} tokens"
            )

    def training_forward(self) -> tuple[ModelConfig, Numerics]:
        """The architecture with the precision of the trainer's forward pass, and what that pass rounds.

        Raises:
          ValueError: the model cannot be trained in the serving format, as of `training_numerics`.
        """
        serving = self.serving
        format = serving_format(serving.format)
        kv_cache = cache_dtype(format, serving.kv_cache)
        return training_numerics(self.model, format, kv_cache, serving.keep, serving.in_training)

    def packing(self, platform: str | None = None) -> Packing:
        """How the sequences of RL share microbatches, on a platform by JAX's name; None stands for the default one."""
        rows, updates = self.rollout.sequences, self.optimizer.updates
        return self._packing(rows, platform, group_size=self.rollout.group_size, updates=updates)

    def warm_start_packing(self) -> Packing:
        """How the examples of the warm start share microbatches."""
        return self._packing(self.warm_start.batch_size, None, group_size=1, updates=1)

    def _packing(self, rows: int, platform: str | None, *, group_size: int, updates: int) -> Packing:
        sizes, compute = dataclasses.asdict(self.mesh), DTYPES[self.model.precision.compute]
        if self.serving.in_training == "all":
            compute = serving_format(self.serving.format).activations
        platform = jax.default_backend() if platform is None else platform
        try:
            return Packing.fitting(
                prompt_length=self.rollout.max_prompt_length,
                response_length=self.rollout.max_response_length,
                rows=rows,
                group_size=group_size,
                tokens_per_microbatch=self.optimizer.tokens_per_microbatch,
                updates=updates,
                shares=split(sizes, "batch"),
                column_multiple=split(sizes, "saved_sequence"),
                platform=platform,
                masked=resolve(self.model.attention, platform, compute) != "splash",
            )
        except ValueError as error:
            raise ValueError(f"optimizer.{error}") from None

    @property
    def directory(self) -> Path:
        """`run_dir`, or runs/NAME."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name


def check_positions(model: ModelConfig, rollout: RolloutConfig) -> None:
    """Refuses sequences that are longer than a model is made for.

    Raises:
      ValueError: the longest prompt and response together have more tokens than the model has positions.
    """
    prompt, response = rollout.max_prompt_length, rollout.max_response_length
    if (needed := prompt + response) > (positions := model.longest_sequence):
        raise ValueError(
            f"rollout.max_prompt_length is {prompt} and rollout.max_response_length {response}, {needed} tokens; "
            f"the model is made for {positions} ({model.described_rope}), so shorten them"
        )


def on_one_device(config: Config) -> Config:
    """The same run where nothing is shared."""
    serving = dataclasses.replace(config.serving, tensor=1, devices=0)
    return dataclasses.replace(config, mesh=MeshConfig(), serving=serving)
