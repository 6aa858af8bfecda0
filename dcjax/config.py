"""A run as data: frozen, validated when built. Recipes return a `Config`; the command line overrides its fields."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.models.config import ModelConfig, presets
from dcjax.serving.quantize import FormatName
from dcjax.sharding.mesh import MeshConfig


def _require(section: str, config: Any, at_least: dict[str, float]) -> None:
    """Raises ValueError for the first field below its bound, or not a finite number."""
    for name, bound in at_least.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= bound):
            raise ValueError(f"{section}{name} is {value}; it must be at least {bound}")


def _require_choice(section: str, config: Any, name: str) -> None:
    """Raises ValueError for a word that is not one of the field's Literal."""
    choices = typing.get_args(typing.get_type_hints(type(config))[name])
    if (value := getattr(config, name)) not in choices:
        raise ValueError(f"{section}{name} is {value!r}; it must be one of {', '.join(choices)}")


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised training on generated examples, before RL."""

    steps: int = 400
    """Optimiser updates; 0 starts RL from fresh parameters."""
    batch_size: int = 128
    """Examples an update."""
    learning_rate: float = 8e-3
    """Peak of the schedule: linear warm-up, then cosine to a tenth."""
    warmup_steps: int = 50
    """Updates of linear warm-up."""
    early_scratchpads: float = 0.8
    """Share of examples that reason step by step in the first 80% of the updates."""
    late_scratchpads: float = 0.15
    """The same share in the last 20%: the model can reason but rarely does."""

    def __post_init__(self):
        _require("warm_start.", self, {"steps": 0, "batch_size": 1, "learning_rate": 0, "warmup_steps": 0})
        for name in ("early_scratchpads", "late_scratchpads"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"warm_start.{name} is {value}; it must lie within [0, 1]")


@dataclass(frozen=True)
class RolloutConfig:
    """What is sampled in one RL iteration."""

    prompts: int = 32
    """Prompts an iteration."""
    group_size: int = 8
    """Responses a prompt (G); at least 2, since advantages are relative to the group."""
    temperature: float = 1.0
    """Sampling temperature; the trainer applies it to its own logits too."""
    max_prompt_length: int = 13
    """Longest prompt (tokens)."""
    max_response_length: int = 48
    """Longest response (tokens, the end token included)."""

    def __post_init__(self):
        _require(
            "rollout.",
            self,
            {"prompts": 1, "group_size": 2, "max_prompt_length": 1, "max_response_length": 1},
        )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"rollout.temperature is {self.temperature}; training needs one above 0")

    @property
    def sequences(self) -> int:
        """Responses an iteration."""
        return self.prompts * self.group_size


@dataclass(frozen=True)
class ServingConfig:
    """The engine that samples."""

    format: FormatName = "int8"
    """Numerics of the deployed policy: float32; bf16; int8 (w8a8 per channel with an int8 KV cache)."""
    slots: int = 32
    """Samples decoded at once."""
    steps_per_call: int = 8
    """Tokens that one call decodes in each slot, before ended samples are replaced."""

    def __post_init__(self):
        _require("serving.", self, {"slots": 1, "steps_per_call": 1})
        _require_choice("serving.", self, "format")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The policy objective."""

    algorithm: Literal["dc_grpo", "grpo"] = "dc_grpo"
    """dc_grpo penalises the gap between the two policies with a multiplier by dual ascent; grpo has no penalty."""
    initial_multiplier: float = 0.1
    """λ before the first step."""
    dual_lr: float = 1.0
    """η_λ: what λ gains per iteration and unit of (mean gap − budget)."""
    budget: float = 0.0037
    """c: the tolerated mean |p_train − p_infer| (probability)."""
    max_multiplier: float = 1.0
    """Upper bound of λ (ours; the paper's was not recovered)."""
    zero_variance: Literal["keep", "drop"] = "keep"
    """Groups whose rewards are all equal: keep them in the loss (paper A) or drop them (paper B)."""
    eps_low: float = 0.2
    """The policy ratio is clipped below at 1 − eps_low."""
    eps_high: float = 0.28
    """The policy ratio is clipped above at 1 + eps_high."""

    def __post_init__(self):
        names = ("initial_multiplier", "dual_lr", "budget", "max_multiplier", "eps_low", "eps_high")
        _require("objective.", self, dict.fromkeys(names, 0))
        _require_choice("objective.", self, "algorithm")
        _require_choice("objective.", self, "zero_variance")
        if self.initial_multiplier > self.max_multiplier:
            raise ValueError(
                f"objective.initial_multiplier is {self.initial_multiplier}; "
                f"it must be at most objective.max_multiplier, {self.max_multiplier}"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and how an iteration is cut into updates."""

    learning_rate: float = 1e-6
    """Constant after the warm-up."""
    warmup_steps: int = 0
    """Updates of linear warm-up."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    epsilon: float = 1e-8
    """Adam's epsilon (ours; the papers' was not recovered)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    updates: int = 1
    """Optimiser updates an iteration, each on its share of the prompts."""
    microbatch_size: int = 16
    """Sequences in one forward and backward pass."""

    def __post_init__(self):
        names = ("learning_rate", "warmup_steps", "beta1", "beta2", "epsilon", "weight_decay")
        _require("optimizer.", self, {**dict.fromkeys(names, 0), "updates": 1, "microbatch_size": 1})
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be below 1")
        if not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm is {self.max_grad_norm}; it must be above 0")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = 10
    """RL steps between checkpoints; the first and the last step are always saved."""
    keep: int = 3
    """Newest checkpoints kept."""

    def __post_init__(self):
        _require("checkpoint.", self, {"every": 1, "keep": 1})


@dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on held-out prompts, of the deployed and of the training policy."""

    every: int = 10
    """RL steps between evaluations; the first and the last step are always evaluated."""
    prompts: int = 512
    """Held-out prompts, one sample each."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""

    def __post_init__(self):
        _require("evaluation.", self, {"every": 1, "prompts": 1, "temperature": 0})


@dataclass(frozen=True)
class Config:
    """One run: a warm start, then RL with rollouts from the serving engine."""

    name: str = "run"
    """Names the run directory, runs/NAME, unless run_dir does."""
    steps: int = 100
    """RL iterations."""
    seed: int = 0
    """Of parameters, problems and samples."""
    run_dir: Path | None = None
    """Where everything is written."""
    pretrained: Path | None = None
    """Hugging Face folder whose architecture and weights training starts from; of the model's fields only remat,
    attention, head_chunk and precision then count."""
    task: ArithmeticTask = field(default_factory=ArithmeticTask)
    model: ModelConfig = presets["tiny"]
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        _require("", self, {"steps": 0, "seed": 0})
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}; it must be below 2**63")
        if not self.name or set(self.name) & set("/\\\0") or self.name in (".", ".."):
            raise ValueError(f"name is {self.name!r}; it names a folder under runs/")
        self._check_lengths()
        self._check_divisions()

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

    def _check_divisions(self):
        prompts, updates = self.rollout.prompts, self.optimizer.updates
        if prompts % updates:
            raise ValueError(f"rollout.prompts {prompts} do not divide into optimizer.updates {updates} minibatches")
        minibatch, micro = self.rollout.sequences // updates, self.optimizer.microbatch_size
        if minibatch % micro:
            raise ValueError(
                f"a minibatch of {minibatch} sequences does not divide into optimizer.microbatch_size {micro}"
            )
        devices = math.prod(dataclasses.astuple(self.mesh))
        if self.model.num_experts and devices > 1:
            raise ValueError(
                f"model.num_experts is {self.model.num_experts} on a mesh of {devices} devices; "
                "experts are not split over devices yet, so every axis of the mesh must be 1"
            )
        shards = self.mesh.data * self.mesh.fsdp
        if micro % shards or self.warm_start.batch_size % shards:
            raise ValueError(
                f"optimizer.microbatch_size {micro} and warm_start.batch_size {self.warm_start.batch_size} "
                f"must be multiples of mesh.data × mesh.fsdp, {shards}"
            )

    @property
    def directory(self) -> Path:
        """`run_dir`, or runs/NAME."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name


WHERE_NOT_WHAT = ("run_dir", "checkpoint", "mesh")
"""Fields that do not change what a run computes: it may be resumed under others."""


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, as in config.json."""

    def plain(value):
        if isinstance(value, Path):
            return str(value)
        # JSON has no tuples
        return list(value) if isinstance(value, tuple) else value

    def convert(items):
        return {name: plain(value) for name, value in items}

    return dataclasses.asdict(config, dict_factory=convert)


def from_dict(nested: dict[str, Any], kind: type = Config) -> Any:
    """The Config that `to_dict` wrote.

    Raises:
      ValueError: an unknown field, or a value out of range.
    """
    kinds = typing.get_type_hints(kind)
    if unknown := set(nested) - set(kinds):
        raise ValueError(f"{kind.__name__} has no field {sorted(unknown)[0]!r}")

    def convert(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(kinds[name]):
            return from_dict(value, kinds[name])
        if name in ("run_dir", "pretrained") and value is not None:
            return Path(value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: convert(name, value) for name, value in nested.items()})


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields in which two `to_dict`s describe different runs: name -> (ours, theirs)."""
    ours, theirs = flatten(ours), flatten(theirs)
    names = [name for name in ours | theirs if name.split(".")[0] not in WHERE_NOT_WHAT]
    pairs = {name: (ours.get(name), theirs.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
