"""Builds the engine that samples from the sections of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from dcjax.data.chat_task import ChatTask
from dcjax.data.task import Task
from dcjax.errors import RunError
from dcjax.models.config import ModelConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.formats import serving_format
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.parallel import serving_mesh
from dcjax.serving.server.contract import CHAT, Contract
from dcjax.sharding.mesh import MeshConfig, make_mesh, set_aside


def rollout_mesh(serving: ServingConfig, mesh: Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Where the engine runs: on the training mesh's devices, or on those of `devices`, JAX's by default, that only
    serve.

    Raises:
      ValueError: devices that copies of the model cannot share.
    """
    if count := serving.devices:
        mesh = make_mesh(MeshConfig(data=count), set_aside(jax.devices() if devices is None else devices, count)[1])
    return serving_mesh(mesh, serving.tensor)


def contract_of(
    serving: ServingConfig,
    lengths: RolloutConfig,
    task: Task,
    end_tokens: Sequence[int],
    *,
    run: str | None,
    step: int | None,
) -> Contract:
    """How a deployed policy is sampled and asked, and which run it is of."""
    chat = {name: getattr(task, name) for name in CHAT} if isinstance(task, ChatTask) else {}
    return Contract(
        format=serving_format(serving.format).name,
        kv_cache=serving.kv_cache,
        keep=serving.keep,
        temperature=lengths.temperature,
        top_k=lengths.top_k,
        top_p=lengths.top_p,
        max_prompt_length=lengths.max_prompt_length,
        max_response_length=lengths.max_response_length,
        end_tokens=tuple(end_tokens),
        run=run,
        step=step,
        **chat,
    )


def make_engine(
    model: ModelConfig,
    serving: ServingConfig,
    lengths: RolloutConfig,
    mismatch: MismatchConfig,
    mesh: Mesh,
    *,
    end_tokens: Sequence[int],
    records_head: int = 0,
    memory: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Qwen3Engine:
    """The engine that deploys a policy.

    Args:
      model: the architecture.
      serving: numerics and sizes.
      lengths: of prompts and responses, and what is recorded of each token for the trainer.
      mismatch: what is added on purpose.
      mesh: that the policy is trained on.
      end_tokens: ids that end a response.
      records_head: of the most probable tokens, beside each sampled one.
      memory: bytes of each device; None is what it has.
      devices: of the whole run, those that only serve included; None is all of JAX's.

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
            prompts=lengths.prompts,
            max_candidates=lengths.top_k,
            records_experts=lengths.replay_routing,
            records_head=records_head,
            mismatch=mismatch,
            mesh=rollout_mesh(serving, mesh, devices),
            training_mesh=mesh,
            memory=memory,
        )
    except ValueError as error:
        raise RunError(str(error)) from None
