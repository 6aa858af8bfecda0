"""A trial of a recipe: the same run, so small that it takes minutes on what is there."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from typing import Any

from dcjax.data.datasets import SAMPLES
from dcjax.errors import RunError
from dcjax.models.config import DTYPES, ModelConfig
from dcjax.models.layers import round_up
from dcjax.models.parallel.forward import check_model
from dcjax.models.parameters import count_params, parameters
from dcjax.recipe.build import PastParams, objective_of, optimizer_of
from dcjax.recipe.config import Config
from dcjax.recipe.plain import flatten, to_dict
from dcjax.recipe.rollout import IN_PROCESS
from dcjax.sharding.mesh import MeshConfig
from dcjax.sharding.rules import split

STEPS, WARM_START_STEPS, WARM_START_BATCH = 2, 10, 8
PROMPTS, GROUP_SIZE, RESPONSE_LENGTH, HELDOUT = 4, 4, 64, 8
SAMPLES_PROMPT_LENGTH = 512
"""Tokens that hold every prompt of `SAMPLES`, even one a byte."""
SLOTS, PREFILL_TOKENS = 16, 1024
LAYERS, WIDTH, MLP_WIDTH, KV_HEADS, VOCABULARY = 2, 128, 256, 2, 512
EXPERT_WIDTH, EXPERTS, CHOSEN_EXPERTS = 128, 8, 2
"""Of a model with random weights that is too large."""
SHARE = 8
"""A model with random weights is too large where its training state takes more than one part in so many of memory."""


@dataclass(frozen=True)
class Available:
    """What a trial may use."""

    devices: int
    """Of all processes."""
    memory: int
    """Of each device, bytes."""
    cores: int
    """Of each host."""
    processes: int = 1
    data: bool = True
    """Whether the files of the recipe's task are there."""
    pretrained: ModelConfig | None = None
    """The architecture in the recipe's folder of weights; None where there is no folder."""
    tokens: int = 0
    """Of the tokenizer that the task has without a folder, where there is none."""


def shrink(config: Config, available: Available) -> Config:
    """The config with what takes long, or what is not there, made smaller: a pure function.

    Nothing grows, except that slots are a multiple of the copies of the model. A section of a reader's own is changed
    in those fields that it shares with the built-in one.
    """
    model = available.pretrained or config.model
    mesh, serving_devices = _devices(config, model, available)
    serving, shares = _serving(config, model, mesh, serving_devices), split(asdict(mesh), "batch")
    task = config.task if available.data else _on_samples(config.task)
    # microbatches follow from the lengths, which are smaller and may be overridden
    optimizer = _with(config.optimizer, tokens_per_microbatch=None)
    optimizer = _at_most(optimizer, updates=_largest_divisor(config.optimizer.updates, PROMPTS))
    prompts, group_size = _samples(config, optimizer.updates, shares, available.processes)
    may_run_ahead = serving_devices or math.prod(asdict(mesh).values()) == 1
    rollout = _at_most(
        dataclasses.replace(config.rollout, engine=IN_PROCESS, prompts=prompts, group_size=group_size),
        async_level=config.rollout.async_level if may_run_ahead else 0,
        max_prompt_length=task.max_prompt_length,
        max_response_length=max(RESPONSE_LENGTH, task.max_response_length),
    )
    return dataclasses.replace(
        config,
        steps=min(config.steps, STEPS),
        pretrained=None if available.pretrained is None else config.pretrained,
        task=task,
        model=_fitting_model(config, mesh, serving.tensor, available),
        warm_start=_warm_start(config.warm_start, shares),
        rollout=rollout,
        reward=_at_most(config.reward, workers=available.cores, overlong_buffer=rollout.max_response_length // 4),
        serving=serving,
        optimizer=optimizer,
        evaluation=_at_most(config.evaluation, every=STEPS, prompts=max(HELDOUT, available.processes)),
        checkpoint=_at_most(config.checkpoint, every=STEPS, keep=1),
        mesh=mesh,
    )


def changes(recipe: Config, shrunk: Config, config: Config) -> list[str]:
    """What `shrink` changed, a line each as `rollout.prompts 64 -> 4`.

    Args:
      recipe: what it was given.
      shrunk: what it returned.
      config: that with fields of the user's, of which the lines do not tell. Nor do they tell of an architecture that
        `pretrained` replaces.
    """
    before, after, final = (flatten(to_dict(each)) for each in (recipe, shrunk, config))
    names = [name for name, value in after.items() if value != before[name] and value == final[name]]
    if config.pretrained is not None:
        names = [name for name in names if not name.startswith("model.")]
    return [f"{name} {before[name]} -> {after[name]}" for name in names]


def check_fits(config: Config, available: Available) -> None:
    """Refuses a model whose training state alone takes more memory than there is.

    Args:
      config: with the architecture of the folder that it starts from, if it does.
      available: what there is.

    Raises:
      RunError: it does not fit.
    """
    needed = _state_bytes(config, config.mesh)
    if needed <= available.memory:
        return
    what, advice = "the model", "choose a smaller model"
    if config.pretrained is not None:
        what, advice = str(config.pretrained), "give --pretrained a smaller model, or None for random weights"
    raise RunError(
        f"{what} has {count_params(config.model):,} parameters, of which weights, gradients and "
        f"moments take {needed / 2**30:.1f} GiB of a device that has {available.memory / 2**30:.1f}; {advice}"
    )


def _state_bytes(config: Config, mesh: MeshConfig) -> int:
    """Bytes on each device of weights, gradients, two moments, and past or averaged weights, about."""
    past, sizes = PastParams.needed_by(config), asdict(mesh)
    copies = 4 + past.reference + past.history + (optimizer_of(config).ema_decay > 0)
    on_a_device = sum(
        each.size // math.prod(split(sizes, axis) for axis in each.stacked_axes) for each in parameters(config.model)
    )
    return copies * DTYPES[config.model.precision.parameters].itemsize * on_a_device


def _fitting_model(config: Config, mesh: MeshConfig, tensor: int, available: Available) -> ModelConfig:
    """The recipe's architecture; where it is too large, one of its kind: fewer and narrower layers and fewer heads of
    the same width and grouping, dense where they were dense, and with experts where they had some.

    Args:
      config: the recipe.
      mesh: that it trains on.
      tensor: devices that share a copy of the model in serving.
      available: what there is.
    """
    model = config.model
    if _state_bytes(config, mesh) * SHARE <= available.memory:
        return model
    multiple = math.lcm(64, *asdict(mesh).values(), tensor)
    kv_heads = min(model.num_kv_heads, math.lcm(KV_HEADS, mesh.tensor * mesh.context, tensor))
    layers = min(model.num_layers, max(LAYERS, model.decoder_sparse_step))
    tokens = max(VOCABULARY, available.tokens, config.rollout.top_k, objective_of(config).requires.sampler_head)
    smaller = dataclasses.replace(
        _at_most(
            model,
            vocab_size=round_up(tokens, multiple),
            hidden_size=round_up(WIDTH, multiple),
            intermediate_size=round_up(MLP_WIDTH, multiple),
        ),
        num_layers=layers,
        # dense layers are named by their numbers
        mlp_only_layers=tuple(number for number in model.mlp_only_layers if number < layers),
        num_kv_heads=kv_heads,
        num_heads=model.num_heads // model.num_kv_heads * kv_heads,
    )
    if not model.num_experts:
        return smaller
    smaller = _at_most(
        smaller,
        moe_intermediate_size=round_up(EXPERT_WIDTH, multiple),
        num_experts_per_tok=CHOSEN_EXPERTS,
        num_experts=round_up(EXPERTS, math.lcm(mesh.expert, tensor)),
    )
    return smaller if any(smaller.sparse_layers) else dataclasses.replace(smaller, mlp_only_layers=())


def _warm_start(section: Any, shares: int) -> Any:
    """The warm start's section; without steps it is of no account, and stays."""
    if not section.steps:
        return section
    return _at_most(section, steps=WARM_START_STEPS, batch_size=round_up(WARM_START_BATCH, shares))


def _devices(config: Config, model: ModelConfig, available: Available) -> tuple[MeshConfig, int]:
    """The mesh, and how many devices only serve: as many as there are and divide the model, of each axis a divisor."""
    sizes, serving = asdict(config.mesh), config.serving.devices
    training = math.prod(sizes.values())
    if training + serving > available.devices:
        # equally many of each process, and at least one of each trains
        own = available.devices // available.processes
        serving = min(own - 1, max(1, own * serving // (training + serving))) * available.processes if serving else 0
    for name in ("data", "fsdp", "context", "expert", "tensor"):
        while math.prod(sizes.values()) > available.devices - serving and sizes[name] > 1:
            sizes[name] = _largest_divisor(sizes[name], sizes[name] - 1)
    # first each axis by itself, then those that split the same heads together
    for others in (dict.fromkeys(sizes, 1), sizes):
        for name in ("fsdp", "expert", "tensor", "context"):
            while sizes[name] > 1 and not _divides(model, others | {name: sizes[name]}):
                sizes[name] = _largest_divisor(sizes[name], sizes[name] - 1)
    return MeshConfig(**sizes), serving


def _divides(model: ModelConfig, sizes: dict[str, int]) -> bool:
    try:
        check_model(model, sizes)
    except ValueError:
        return False
    return True


def _serving(config: Config, model: ModelConfig, mesh: MeshConfig, devices: int) -> Any:
    """The serving section on devices of its own, or, with 0, on those of the mesh; they share what they divide."""
    count = devices or math.prod(asdict(mesh).values())
    shared = (model.num_kv_heads, model.vocab_size, model.intermediate_size, model.num_experts)
    tensor = math.gcd(config.serving.tensor, count, *shared)
    slots = round_up(min(config.serving.slots, SLOTS), count // tensor)
    section = dataclasses.replace(config.serving, devices=devices, tensor=tensor, slots=slots)
    return _at_most(section, prefill_tokens=PREFILL_TOKENS)


def _samples(config: Config, updates: int, shares: int, processes: int) -> tuple[int, int]:
    """Prompts an iteration and responses a prompt: the fewest responses that divide as they must."""
    prompts, group_size = config.rollout.prompts, config.rollout.group_size
    sizes = (
        (number, of_each)
        for number in range(updates, prompts + 1, updates)
        for of_each in range(min(GROUP_SIZE, group_size), group_size + 1)
        if number >= min(PROMPTS, prompts) and not number % processes and not number * of_each // updates % shares
    )
    return min(sizes, key=math.prod, default=(prompts, group_size))


def _on_samples(task: Any) -> Any:
    """The task on the hand-written samples, all of them."""
    return _at_most(
        _with(task, data_dir=SAMPLES, subset="all", index_file=None), max_prompt_tokens=SAMPLES_PROMPT_LENGTH
    )


def _with(section: Any, **values: Any) -> Any:
    """The section with these values in those of the fields that it has."""
    names = {field.name for field in dataclasses.fields(section)}
    return dataclasses.replace(section, **{name: value for name, value in values.items() if name in names})


def _at_most(section: Any, **bounds: int) -> Any:
    """The section with these bounds in those of the fields that it has, and that hold a larger number."""
    fields = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    larger = {name for name in bounds if isinstance(value := fields.get(name), int) and value > bounds[name]}
    return dataclasses.replace(section, **{name: bounds[name] for name in larger})


def _largest_divisor(number: int, bound: int) -> int:
    """The largest divisor of a number that is at most this."""
    return next(divisor for divisor in range(min(number, bound), 0, -1) if not number % divisor)
