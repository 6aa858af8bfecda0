"""The engine that samples, and how it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from dcjax.errors import RunError
from dcjax.models.config import ModelConfig
from dcjax.recipe.checks import require, require_choice
from dcjax.recipe.rollout import RolloutConfig
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.parallel import serving_mesh
from dcjax.serving.quantize import FormatName, KVCacheName
from dcjax.sharding.mesh import MeshConfig, make_mesh, set_aside


@dataclass(frozen=True)
class ServingConfig:
    """The engine that samples."""

    format: FormatName = "int8"
    """Numerics of the deployed policy: float32, bf16 or fp16; int8 or fp8 (e4m3) weights, activations and KV cache;
    int8_weight_only, fp8_weight_only or int4 (in groups of 32), which quantise only the weights."""
    kv_cache: KVCacheName = "auto"
    """Storage format of keys and values; auto is the default of the serving format."""
    keep: tuple[str, ...] = ()
    """Names or patterns of weights that are not quantised, for example lm_head or experts_*."""
    slots: int = 32
    """Number of samples that are decoded at once."""
    steps_per_call: int = 8
    """Tokens decoded in each slot before finished samples are replaced."""
    prefill_tokens: int = 4096
    """Tokens per prefill pass on each copy of the model, from several prompts or from a part of a long one."""
    tensor: int = 1
    """Devices that share one copy of the model; the number of copies follows from the number of devices."""
    devices: int = 0
    """Devices that only serve: the last ones of each host, equally many on each.
    With 0, the training devices serve too."""

    def __post_init__(self):
        require("serving.", self, {"slots": 1, "steps_per_call": 1, "prefill_tokens": 1, "tensor": 1, "devices": 0})
        require_choice("serving.", self, "format")
        require_choice("serving.", self, "kv_cache")


def rollout_mesh(serving: ServingConfig, mesh: Mesh) -> Mesh:
    """Where the engine runs: on the training mesh's devices, or on those that only serve.

    Raises:
      ValueError: devices that copies of the model cannot share.
    """
    if count := serving.devices:
        mesh = make_mesh(MeshConfig(data=count), set_aside(jax.devices(), count)[1])
    return serving_mesh(mesh, serving.tensor)


def make_engine(
    model: ModelConfig,
    serving: ServingConfig,
    lengths: RolloutConfig,
    mismatch: MismatchConfig,
    mesh: Mesh,
    *,
    end_tokens: Sequence[int],
) -> Qwen3Engine:
    """The engine that deploys a policy.

    Args:
      model: the architecture.
      serving: numerics and sizes.
      lengths: of prompts and responses, and what is recorded of each token for the trainer.
      mismatch: what is added on purpose.
      mesh: that the policy is trained on.
      end_tokens: ids that end a response.

    Raises:
      RunError: the model, the hardware or its memory cannot serve that.
    """
    try:
        return Qwen3Engine(
            model,
            format=serving.format,
            kv_cache=serving.kv_cache,
            keep=serving.keep,
            slots=serving.slots,
            max_prompt_length=lengths.max_prompt_length,
            max_response_length=lengths.max_response_length,
            end_tokens=end_tokens,
            steps_per_call=serving.steps_per_call,
            prefill_tokens=serving.prefill_tokens,
            max_candidates=lengths.top_k,
            records_experts=lengths.replay_routing,
            mismatch=mismatch,
            mesh=rollout_mesh(serving, mesh),
            training_mesh=mesh,
        )
    except ValueError as error:
        raise RunError(str(error)) from None
