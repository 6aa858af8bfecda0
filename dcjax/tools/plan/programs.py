"""The programs of a run, compiled for devices that are not there."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dcjax.errors import RunError
from dcjax.models.attention import choose
from dcjax.models.config import DTYPES
from dcjax.models.parallel.experts import ROOM, ROUNDS
from dcjax.recipe import build
from dcjax.recipe.config import Config
from dcjax.recipe.engine import make_engine
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.scoring import lower_reading
from dcjax.tools.plan.hlo import Cost, Program
from dcjax.types import Batch, Rollout

EXPERT_KERNELS = ("ragged-dot", "tgmm")
"""Parts of the names of the kernels that multiply rows by their experts' matrices."""


@dataclass(frozen=True)
class Planned:
    """One program, on one device."""

    name: str
    runs: float
    """In one iteration."""
    compile_seconds: float
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    """What exists only while it runs."""
    cost: Cost
    refused: str | None = None
    """Why it does not compile, in the compiler's words; None where it does."""

    @property
    def peak_bytes(self) -> int:
        """What it holds at most, arguments included; outputs that take the place of arguments count once."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes


def for_tpu(config: Config) -> Config:
    """`for_platform` of a TPU."""
    return for_platform(config, "tpu")


def for_platform(config: Config, platform: str) -> Config:
    """The config with what is chosen by platform chosen for one that this machine does not have, by JAX's name.

    Raises:
      ValueError: the attention kernel that it names does not run there.
    """
    compute = DTYPES[config.training_forward()[0].precision.compute]
    attention = choose(config.model.attention, platform, compute)
    config = replace(config, model=replace(config.model, attention=attention))
    optimizer: Any = config.optimizer
    if optimizer.tokens_per_microbatch is not None:
        return config
    columns = config.packing(platform).bins.columns
    return replace(config, optimizer=replace(optimizer, tokens_per_microbatch=columns))


def engine_for(config: Config, mesh: Mesh, devices: Sequence[jax.Device]) -> Qwen3Engine:
    """The engine that deploys the policy; its memory is what the plan is about, and not checked here.

    Raises:
      RunError: devices that copies of the model cannot share.
    """
    lengths, added = config.rollout, config.mismatch
    head = build.objective_of(config).requires.sampler_head
    return make_engine(
        config.model,
        config.serving,
        lengths,
        added,
        mesh,
        end_tokens=[0],
        records_head=head,
        memory=2**62,
        devices=devices,
    )


def compile_programs(
    config: Config,
    mesh: Mesh,
    engine: Qwen3Engine,
    mean_response: float,
    told: Callable[[str], None],
    only: Collection[str] | None = None,
) -> Iterator[Planned]:
    """Compiles the programs of an iteration, one after the other.

    Args:
      config: from `for_tpu`.
      mesh: of training.
      engine: from `engine_for`.
      mean_response: tokens of a response.
      told: called with the name of each program before it is compiled.
      only: the names of those to compile; None is all.
    """
    for name, compiled in _programs(config, mesh, engine, mean_response):
        if only is None or name in only:
            told(name)
            yield compiled()


def _programs(
    config: Config, mesh: Mesh, engine: Qwen3Engine, mean_response: float
) -> Iterator[tuple[str, Callable[[], Planned]]]:
    """The name of each program, and what compiles it."""
    rollout, serving = config.rollout, config.serving
    state, batch = build.abstract_state(config, mesh), build.abstract_batch(config, mesh)
    step: Any = build.compile_train_step(config, mesh)
    counting = {
        "unknown_trips": microbatches(config, mean_response),
        "attended": attended(config, mean_response),
        "kernel_fill": _routed(min(config.mesh.expert, ROOM)),
        # as all experts are chosen as often
        "named_trips": {ROUNDS: 1.0},
    }
    yield "train_step", lambda: _planned("train_step", lambda: step.lower(state, batch), 1, **counting)
    for name, lower, runs in engine.lowered_sync(state.params):
        yield name, partial(_planned, name, lower, runs)
    params = engine.abstract_params()
    routed = _routed(serving.tensor)
    prefill = partial(engine.lower_prefill, params, rollout.prompts)
    yield "prefill", lambda: _planned("prefill", prefill, 1, kernel_fill=routed)
    turns = rollout.sequences * mean_response / (serving.slots * serving.steps_per_call)
    filled = min(cached(config, mean_response) / engine.decoder.capacity, 1.0)
    fill = {"ragged_attention": filled} | routed
    yield "decode", lambda: _planned("decode", lambda: engine.lower_generate(params), turns, kernel_fill=fill)
    if build.reads_sampler(config):
        read = partial(lower_reading, engine, params, rollout.sequences)
        yield "read", lambda: _planned("read", read, 1, kernel_fill=routed)


def _routed(room: int) -> dict[str, float]:
    """The share of their rows that experts' kernels multiply where these have room for so many times what arrives."""
    return dict.fromkeys(EXPERT_KERNELS, 1 / room)


def response_lengths(config: Config, mean_response: float) -> np.ndarray:
    """The responses that a plan takes for granted, float64 [rows]: in tokens, spread evenly about their mean, from 1 or
    to the longest that there may be, and in no order."""
    rows, longest = config.rollout.sequences, config.rollout.max_response_length
    spread = min(mean_response - 1, longest - mean_response)
    lengths = np.linspace(mean_response - spread, mean_response + spread, rows).round()
    return np.random.default_rng(0).permutation(lengths)


def cached(config: Config, mean_response: float) -> float:
    """Tokens that a slot's cache holds on average over all steps of decoding, with responses of `response_lengths`."""
    lengths = response_lengths(config, mean_response)
    return config.rollout.max_prompt_length + float(np.square(lengths).sum() / lengths.sum()) / 2


def microbatches(config: Config, mean_response: float) -> float:
    """How often a device computes a microbatch in one update, with responses of `response_lengths`."""
    rollout, rows = config.rollout, config.rollout.sequences
    width = rollout.max_response_length
    response = np.arange(width) < response_lengths(config, mean_response)[:, None]
    mask = np.concatenate([np.ones((rows, rollout.max_prompt_length), bool), response], axis=1)
    zeros = np.zeros((rows, width), np.float32)
    sampled = Rollout(
        tokens=mask.astype(np.int32),
        attention_mask=mask,
        response_mask=response,
        rollout_logps=zeros,
        temperature=np.ones(rows, np.float32),
        versions=zeros.astype(np.int32),
        finished=np.ones(rows, bool),
        log_mass=zeros,
    )
    packed = config.packing()(Batch.of(sampled, rewards=np.zeros(rows, np.float32), group_size=rollout.group_size))
    assert packed.microbatches is not None
    return float(np.asarray(packed.microbatches.count).max(axis=0).mean())


def attended(config: Config, mean_response: float) -> float:
    """Keys that a column of a microbatch sees on average, with responses of `response_lengths`; padding sees none.

    A response's column sees its prompt and what precedes it of the response; a prompt is computed once for its group.
    """
    rollout, packing = config.rollout, config.packing()
    prompt, lengths = rollout.max_prompt_length - 1, response_lengths(config, mean_response)
    pairs = rollout.prompts * prompt**2 / 2 + (lengths * (prompt + lengths / 2)).sum()
    computed = microbatches(config, mean_response) * packing.bins.columns * packing.shares * packing.updates
    return pairs / computed


def _planned(name: str, lower: Callable[[], Any], runs: float, **counting: Any) -> Planned:
    """Compiles a program, and reads what it holds and does; `counting` are arguments of `hlo.Program`."""
    began = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        first, held = _refusal(str(error))
        if not held:
            raise RunError(f"{name} does not compile: {first}") from error
        return Planned(name, runs, time.perf_counter() - began, held, 0, 0, Cost(), first)
    took, memory = time.perf_counter() - began, compiled.memory_analysis()
    return Planned(
        name=name,
        runs=runs,
        compile_seconds=took,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        cost=Program(compiled.as_text(), **counting).cost,
    )


def _refusal(told: str) -> tuple[str, int]:
    """The line in which the compiler says why it stops, and the bytes that a program would hold, where it is that."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])", told)
    if "Ran out of memory" not in told or used is None:
        return lines[0], 0
    held = float(used[1]) * 2.0 ** (10 * (1 + "KMGT".index(used[2])))
    return next(line for line in lines if used[0] in line), int(held)
