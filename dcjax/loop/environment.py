"""What a run computes on and with, in words."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from dcjax.errors import RunError
from dcjax.models.attention import choose
from dcjax.models.config import DTYPES
from dcjax.recipe.config import Config
from dcjax.recipe.rollout import IN_PROCESS
from dcjax.serving.engine import Qwen3Engine


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
