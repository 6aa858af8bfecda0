"""A run as data: frozen, validated when built. Recipes return a `Config`; the command line overrides its fields."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.data.mathematics import MathTask
from dcjax.models.config import ModelConfig, presets
from dcjax.models.parallel.forward import check_model
from dcjax.paths import localize
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.quantize import FormatName, KVCacheName
from dcjax.sharding.hosts import DistributedConfig
from dcjax.sharding.mesh import MeshConfig
from dcjax.sharding.rules import split


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
    top_k: int = 0
    """How many of the most probable tokens can be sampled; 0 is all. They are recorded, and the trainer's distribution
    is over the same ones."""
    top_p: float = 1.0
    """The most probable tokens can be sampled, of those that top_k leaves, until they hold so much; needs a top_k."""
    replay_routing: bool = False
    """The trainer's tokens go to the experts that the sampler's went to, not to those of its own choice."""
    async_level: int = 0
    """How many iterations sampling may run ahead of training, which is how stale its weights are (iterations); with
    serving.devices both go on at the same time. 0 is in turns."""
    max_prompt_length: int = 13
    """Longest prompt (tokens)."""
    max_response_length: int = 48
    """Longest response (tokens, the end token included)."""

    def __post_init__(self):
        _require(
            "rollout.",
            self,
            {
                "prompts": 1,
                "group_size": 2,
                "top_k": 0,
                "async_level": 0,
                "max_prompt_length": 1,
                "max_response_length": 1,
            },
        )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"rollout.temperature is {self.temperature}; training needs one above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p is {self.top_p}; it must lie within (0, 1]")
        if self.top_p < 1 and not self.top_k:
            raise ValueError(
                f"rollout.top_p is {self.top_p} without rollout.top_k: the trainer replays the truncation from the "
                "tokens that it left, of which there may then be a vocabulary; set rollout.top_k too, to 64, say"
            )

    @property
    def sequences(self) -> int:
        """Responses an iteration."""
        return self.prompts * self.group_size


@dataclass(frozen=True)
class RewardConfig:
    """What judges responses, where, and within which limits."""

    function: str | None = None
    """MODULE:FUNCTION in place of the task's reward; docs/rewards.md says what it takes."""
    workers: int = 0
    """Processes of each host that judge; 0 judges in the trainer's own, without limits."""
    timeout: float = 2.0
    """Seconds that one answer may take in a worker; one that takes more scores 0."""
    warm_up: float = 60.0
    """Seconds that the reward's first call in a worker may take, which is made before any answer is judged there; one
    that takes more ends the run."""
    memory: int = 1024
    """MiB that answers may add to a worker; one that takes more scores 0."""
    overlong_buffer: int = 0
    """The last tokens before rollout.max_response_length that cost a response reward, all of them overlong_factor
    (DAPO's overlong shaping); 0 is none. Accuracies are without it."""
    overlong_factor: float = 1.0
    """The most that a response's length can cost."""

    def __post_init__(self):
        _require("reward.", self, {"workers": 0, "memory": 1, "overlong_buffer": 0, "overlong_factor": 0})
        for name in ("timeout", "warm_up"):
            if not (math.isfinite(seconds := getattr(self, name)) and seconds > 0):
                raise ValueError(f"reward.{name} is {seconds}; it must be above 0 seconds")


@dataclass(frozen=True)
class ServingConfig:
    """The engine that samples."""

    format: FormatName = "int8"
    """Numerics of the deployed policy: float32, bf16, fp16; int8 and fp8 (e4m3): weights, activations and KV cache;
    their weights alone; int4: weights alone, in groups of 32."""
    kv_cache: KVCacheName = "auto"
    """What keys and values are stored in; auto is the format's own."""
    keep: tuple[str, ...] = ()
    """Names of weights that stay in the activations' dtype, lm_head or experts_*, say."""
    slots: int = 32
    """Samples decoded at once."""
    steps_per_call: int = 8
    """Tokens that are decoded in each slot before ended samples are replaced."""
    prefill_tokens: int = 4096
    """Tokens in one pass of the prefill on each copy of the model, of several prompts or of a piece of a long one."""
    tensor: int = 1
    """Devices that share one copy of the model; there are as many copies as the devices make."""
    devices: int = 0
    """Devices that only serve, each host's last ones and equally many of each; 0 serves on the mesh's own."""

    def __post_init__(self):
        _require("serving.", self, {"slots": 1, "steps_per_call": 1, "prefill_tokens": 1, "tensor": 1, "devices": 0})
        _require_choice("serving.", self, "format")
        _require_choice("serving.", self, "kv_cache")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The policy objective; docs/objectives.md has each part's formula."""

    algorithm: Literal["grpo", "dual_grpo", "thresholded_dual_grpo", "dc_grpo", "dc_direct"] = "dc_grpo"
    """grpo has no penalty on the gap between the policies; dual_grpo has one with a fixed multiplier λ, and so has
    thresholded_dual_grpo, over a threshold; dc_grpo (paper A) moves λ by dual ascent; dc_direct differentiates gaps."""
    estimator: Literal["grpo", "dr_grpo", "rloo", "reinforce"] = "grpo"
    """Advantages: relative to the group's mean and deviation, its mean alone, the others' mean, or the batch's mean."""
    surrogate: Literal["clip", "gspo", "cispo", "policy_gradient"] = "clip"
    """Of each token: PPO's clip, GSPO's by sequence, CISPO's clipped weight, or the plain policy gradient."""
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"] = (
        "token_mean"
    )
    """How tokens' losses are averaged: DAPO's, GRPO's as published, by sum, or by sum over the longest response."""
    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """Groups whose rewards are all equal: keep them (paper A), drop them from the loss (paper B), or sample others."""
    signal: Literal["probability", "ratio", "log_probability"] = "probability"
    """δ: |p − q|, |p / q − 1|, or |log p − log q|."""
    level: Literal["token", "sequence"] = "token"
    """δ of each token, or its mean over the response."""
    sides: Literal["two", "one", "signed"] = "two"
    """δ counts either way, only where the training policy overrates, or with its sign."""
    penalty: Literal["linear", "shifted", "hinge", "gate"] = "linear"
    """δ, δ − c, max(δ − c, 0), or δ where it exceeds c; thresholded_dual_grpo takes hinge where this is linear."""
    penalty_form: Literal["as_published", "centred"] = "as_published"
    """Each token's own penalty, or less its mean over the response."""
    initial_multiplier: float = 0.1
    """λ before the first step, or the fixed one."""
    dual_lr: float = 1.0
    """η_λ: what λ gains per iteration and unit of (mean gap − budget)."""
    budget: float | Literal["auto"] = 0.0037
    """c: the tolerated mean δ; auto is 1.5 × the median of the first ten iterations', λ being held meanwhile."""
    budget_window: int = 1
    """Iterations whose mean gap λ follows."""
    discrepancy_mean: Literal["response", "token"] = "response"
    """The mean gap: over responses of the mean over their tokens, or over all tokens."""
    max_multiplier: float = 1.0
    """Upper bound of λ (ours; the paper's was not recovered)."""
    correction: Literal[
        "none",
        "token_tis",
        "sequence_tis",
        "geometric_tis",
        "token_mis",
        "sequence_mis",
        "geometric_mis",
        "icepop",
    ] = "none"
    """Importance weights π_old / μ: truncated (TIS) or masked (MIS), by token, sequence, geometric mean; or IcePop."""
    correction_bound: float = 2.0
    """Upper bound of the importance weight; IcePop's lower one is its inverse."""
    kl_coefficient: float = 0.0
    """Of the KL to the policy that RL started from; 0 is none, as in both papers."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators of the KL."""
    eps_low: float = 0.2
    """The policy ratio is clipped below at 1 − eps_low."""
    eps_high: float = 0.28
    """The policy ratio is clipped above at 1 + eps_high."""
    dual_clip: float | None = None
    """Bounds the loss of a bad token that became likely at −Ã times this, above 1; none where absent."""

    def __post_init__(self):
        names = ["initial_multiplier", "dual_lr", "max_multiplier", "kl_coefficient", "eps_low", "eps_high"]
        if not isinstance(self.budget, str):
            names.append("budget")
        elif self.budget != "auto":
            raise ValueError(f"objective.budget is {self.budget!r}; it must be a number or auto")
        _require("objective.", self, {**dict.fromkeys(names, 0), "budget_window": 1})
        for name, kind in typing.get_type_hints(type(self)).items():
            if typing.get_origin(kind) is Literal:
                _require_choice("objective.", self, name)
        if self.initial_multiplier > self.max_multiplier:
            raise ValueError(
                f"objective.initial_multiplier is {self.initial_multiplier}; "
                f"it must be at most objective.max_multiplier, {self.max_multiplier}"
            )
        for name in ("correction_bound", "dual_clip"):
            if (bound := getattr(self, name)) is not None and not 1 < bound < math.inf:
                raise ValueError(f"objective.{name} is {bound}; it must be a finite number above 1")
        if self.budget == "auto" and (self.penalty != "linear" or not self.has_ascent):
            raise ValueError(
                f"objective.budget is auto, which {self.algorithm} with the penalty {self.penalty} cannot take: "
                "a threshold or a fixed multiplier needs a number"
            )

    @property
    def has_ascent(self) -> bool:
        """Whether λ moves."""
        return self.algorithm in ("dc_grpo", "dc_direct")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and how an iteration is cut into updates."""

    learning_rate: float = 1e-6
    """After the warm-up."""
    warmup_steps: int = 0
    """Updates of linear warm-up."""
    decay: Literal["constant", "linear", "cosine", "period", "length", "discrepancy", "dual"] = "constant"
    """To decay_floor over the run, linearly or as a cosine; by halves every decay_period iterations; the same with the
    period set by the surge of response length (paper B); by halves when the gap grows; or by dual ascent on the gap."""
    decay_floor: float = 0.1
    """Share of the learning rate that is left at the end."""
    surge_ratio: float = 2.0
    """How many times the usual length counts as a surge, for decay length."""
    surge_history: int = 24
    """Iterations whose median is the usual length, for decay length."""
    decay_period: int = 204
    """Iterations between halvings, for decay period (paper B's for 4B)."""
    decay_dual_lr: float = 100.0
    """What the divisor of the learning rate gains per iteration and unit of (mean gap − budget), for decay dual."""
    ema_decay: float = 0.0
    """Of the moving average of the parameters, per update; 0 keeps none. It is evaluated, and can be exported."""
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
        names = ("learning_rate", "warmup_steps", "beta1", "beta2", "epsilon", "weight_decay", "decay_floor")
        names += ("decay_dual_lr", "ema_decay")
        ones = dict.fromkeys(("updates", "microbatch_size", "decay_period"), 1)
        _require("optimizer.", self, {**dict.fromkeys(names, 0), **ones, "surge_history": 7})
        if not 1 < self.surge_ratio < math.inf:
            raise ValueError(f"optimizer.surge_ratio is {self.surge_ratio}; it must be a finite number above 1")
        _require_choice("optimizer.", self, "decay")
        if self.decay_floor > 1:
            raise ValueError(f"optimizer.decay_floor is {self.decay_floor}; it must lie within [0, 1]")
        for name in ("beta1", "beta2", "ema_decay"):
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
    """Where everything is written; paths are local, and "~" is the home directory."""
    pretrained: Path | None = None
    """Hugging Face folder whose architecture and weights training starts from, and whose end tokens end a response; of
    the model's fields only remat, attention, head_chunk and precision then count."""
    task: ArithmeticTask | MathTask = field(default_factory=ArithmeticTask)
    model: ModelConfig = presets["tiny"]
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self):
        localize(self)
        _require("", self, {"steps": 0, "seed": 0})
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}; it must be below 2**63")
        if not self.name or set(self.name) & set("/\\\0") or self.name in (".", ".."):
            raise ValueError(f"name is {self.name!r}; it names a folder under runs/")
        self._check_lengths()
        self._check_reward()
        self._check_sampling()
        self._check_divisions()
        self._check_decay()

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

    def _check_reward(self):
        if isinstance(self.task, MathTask) and not (self.reward.workers or self.reward.function):
            raise ValueError(
                "reward.workers is 0; this task's answers may take any time and memory, and need worker processes: "
                "as many as there are cores to spare, 8 say"
            )
        if self.reward.overlong_buffer > (longest := self.rollout.max_response_length):
            raise ValueError(
                f"reward.overlong_buffer is {self.reward.overlong_buffer}; "
                f"it must be at most rollout.max_response_length, {longest}"
            )

    def _check_sampling(self):
        if (ahead := self.rollout.async_level) and (staleness := self.mismatch.staleness):
            raise ValueError(
                f"rollout.async_level is {ahead} and mismatch.staleness {staleness}; both say how old the weights are "
                "that sample, so set one of them"
            )
        if ahead and not self.serving.devices and (size := math.prod(dataclasses.asdict(self.mesh).values())) > 1:
            raise ValueError(
                f"rollout.async_level is {ahead} on the {size} devices of the mesh; sampling needs devices of its own "
                "there, serving.devices"
            )
        if self.pretrained is not None:
            # the folder's architecture counts, which the engine checks
            return
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
        minibatch, micro = self.rollout.sequences // updates, self.optimizer.microbatch_size
        if minibatch % micro:
            raise ValueError(
                f"a minibatch of {minibatch} sequences does not divide into optimizer.microbatch_size {micro}"
            )
        sizes = dataclasses.asdict(self.mesh)
        if math.prod(sizes.values()) > 1 and self.pretrained is None:
            check_model(self.model, sizes)
        shards = split(sizes, "batch")
        if micro % shards or self.warm_start.batch_size % shards:
            raise ValueError(
                f"optimizer.microbatch_size {micro} and warm_start.batch_size {self.warm_start.batch_size} "
                f"must be multiples of mesh.data × mesh.fsdp × mesh.expert, {shards}"
            )

    def _check_decay(self):
        if self.optimizer.decay == "discrepancy" and self.objective.sides == "signed":
            raise ValueError(
                "optimizer.decay is discrepancy, which needs a gap without a sign; objective.sides is signed"
            )
        if self.optimizer.decay != "dual":
            return
        if isinstance(self.objective.budget, str):
            raise ValueError("optimizer.decay is dual and objective.budget is auto; this decay needs a number")
        if self.optimizer.decay_floor == 0:
            raise ValueError("optimizer.decay_floor is 0; it must be above 0 where optimizer.decay is dual")

    @property
    def directory(self) -> Path:
        """`run_dir`, or runs/NAME."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name


def on_one_device(config: Config) -> Config:
    """The same run where nothing is shared."""
    serving = dataclasses.replace(config.serving, tensor=1, devices=0)
    return dataclasses.replace(config, mesh=MeshConfig(), serving=serving)


FREE_TO_CHANGE_ON_RESUME = (
    "run_dir",
    "checkpoint",
    "mesh",
    "serving.tensor",
    "serving.devices",
    "distributed",
    "task.data_dir",
    "reward.workers",
)
"""Fields that do not change what a run computes: it may be resumed under others."""


def what_is_compiled(config: Config) -> Config:
    """The same for configs whose train steps are the same program: fields at their defaults that are not in it."""
    scheduled = config.optimizer.decay in ("linear", "cosine")
    return dataclasses.replace(
        config,
        name=Config.name,
        steps=config.steps if scheduled else 0,
        seed=Config.seed,
        run_dir=None,
        evaluation=EvaluationConfig(),
        checkpoint=CheckpointConfig(),
    )


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
        choices = typing.get_args(kinds[name]) or (kinds[name],)
        if dataclasses.is_dataclass(choices[0]):
            # of several sections the one that has all these fields; the first where none has
            fits = [choice for choice in choices if set(value) <= set(typing.get_type_hints(choice))]
            return from_dict(value, (fits or choices)[0])
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
    names = [name for name in ours | theirs if not {name, name.split(".")[0]} & set(FREE_TO_CHANGE_ON_RESUME)]
    pairs = {name: (ours.get(name), theirs.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
