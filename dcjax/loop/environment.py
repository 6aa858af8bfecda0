"""What a run computes on and with, and what it will do, in words."""

from __future__ import annotations

import math
import shutil

import jax
from jax.sharding import Mesh

from dcjax.errors import RunError
from dcjax.models.attention import choose
from dcjax.models.config import DTYPES
from dcjax.recipe.build import abstract_state
from dcjax.recipe.config import Config
from dcjax.recipe.rollout import IN_PROCESS
from dcjax.serving.engine import Qwen3Engine
from dcjax.sharding.mesh import memory_of


def describe(config: Config, mesh: Mesh, engine: Qwen3Engine) -> list[str]:
    """A line each for the platform, the kernels and precision of training, and serving.

    Raises:
      RunError: an attention kernel that the platform cannot run.
    """
    device, precision = mesh.devices.flat[0], config.training_forward()[0].precision
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    try:
        attention = choose(config.model.attention, device.platform, DTYPES[precision.compute])
    except ValueError as error:
        raise RunError(str(error)) from None
    experts = {"cpu": "blocks of rows"}.get(device.platform, "ragged_dot")
    kernels = f"attention {attention}" + (f", experts by {experts}" if config.model.num_experts else "")
    copies, within = engine.mesh.devices.shape
    apart = "" if set(engine.mesh.devices.flat) == set(mesh.devices.flat) else " of their own"
    devices = f"{jax.device_count()} devices{processes}"
    rounded = "" if (what := config.serving.in_training) == "masters" else f", {what} in the trainer's forward too"
    ends = ", ".join(map(str, engine.end_tokens))
    rollouts = "" if config.rollout.engine == IN_PROCESS else f"; rollouts from {config.rollout.engine}"
    return [
        f"platform: {device.device_kind} ({device.platform}), {devices}, jax {jax.__version__}",
        f"training: {axes}; {kernels}; parameters {precision.parameters}, compute {precision.compute}, "
        f"sums {precision.accumulation}, head {precision.head}, "
        f"float32 products of precision {precision.float32_products}",
        f"serving: {engine.format.name}{rounded}, KV cache {engine.kv_cache.name}, {engine.slots} slots; "
        f"copies of the model: {copies}, on {within} devices{apart} each; end tokens {ends}{rollouts}",
    ]


def outline(config: Config, mesh: Mesh, done: int) -> list[str]:
    """A line each for iterations, evaluations, checkpoints and memory of what is left of a run.

    Args:
      config: of the run, whose directory exists.
      mesh: that it trains on.
      done: iterations that it goes on behind.
    """
    rollout, evaluation, checkpoint = config.rollout, config.evaluation, config.checkpoint
    tokens = rollout.sequences * (rollout.max_prompt_length + rollout.max_response_length)
    leaves = jax.tree.leaves(abstract_state(config, mesh))
    saved = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    kept = min(checkpoint.keep, 1 + -(-config.steps // checkpoint.every))
    free, memory = shutil.disk_usage(config.directory).free, memory_of(mesh.devices.flat[0])
    short = "" if saved * kept <= free else ", which is too little"
    behind, first = (f" behind {done}", "") if done else ("", "at step 0, ")
    return [
        f"iterations: {config.steps - done}{behind}, each of {rollout.prompts} prompts with {rollout.group_size} "
        f"responses: {rollout.sequences} sequences, {tokens:,} tokens at most; updates {config.optimizer.updates}",
        f"evaluations: {evaluation.prompts} prompts by each policy, {first}every {evaluation.every} steps and the last",
        f"checkpoints: every {checkpoint.every} steps and the last, {_size(saved)} each; the newest {kept} are kept, "
        f"{_size(saved * kept)} of {_size(free)} that are free{short}",
        f"memory: weights and optimizer state take {_size(held)} of a device's {_size(memory)}, beside gradients and "
        "what serves",
    ]


def _size(count: int) -> str:
    """Bytes in words: 1.2 MiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
