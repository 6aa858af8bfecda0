"""The training policy's log-probs of given responses, outside the step that trains on them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from dcjax.models import ModelConfig, token_logps
from dcjax.models.layers import round_up
from dcjax.models.numerics import MASTERS, Numerics
from dcjax.models.parallel.forward import mesh_layout
from dcjax.recipe.config import Config
from dcjax.serving.decoder import NO_EXCESS_PRECISION
from dcjax.sharding.hosts import place
from dcjax.sharding.rules import batch_sharding, replicated, split
from dcjax.types import Array, Params, Rollout


class Scored(NamedTuple):
    """The training policy's log-probs of a rollout's tokens, and its experts; on the host."""

    # natural logs, 0 outside the response mask; not finite where the params make them so
    logps: Float[np.ndarray, "B T"]
    # that its tokens went to, laid out as `Rollout.experts`; None if the model has none
    experts: Int[np.ndarray, "B S-1 M k"] | None


class Chunks(NamedTuple):
    """What one pass of the training forward computes at a time."""

    # on each share of the devices
    sequences: int
    # columns of a response whose logits exist at one time: `model.head_chunk`
    head: int

    @classmethod
    def of_run(cls, config: Config, width: int) -> Chunks:
        """A run's own for sequences of so many tokens: as many as a microbatch of whole rows has room for."""
        return cls(max(1, config.packing().bins.columns // width), config.model.head_chunk)


def score(
    config: Config,
    mesh: Mesh,
    params: Params,
    rollout: Rollout,
    *,
    replays: Rollout | None = None,
    chunks: Chunks | None = None,
) -> Scored:
    """Log-probs and experts of a run's training forward, at the rollout's temperatures.

    Args:
      config: of the run.
      mesh: the devices that have the params; every process calls with the same rollout, and gets all of its scores.
      params: the masters.
      rollout: B responses, on the host.
      replays: whose experts the forward uses in place of its own choice, and whose candidates it normalises over in
        place of the whole softmax; either where it has them.
      chunks: the run's own if None.
    """
    mask, shares = np.asarray(rollout.attention_mask), split(mesh.shape, "batch")
    inputs = (
        *(rollout.tokens, mask, rollout.temperature),
        *(replays and replays.experts, replays and replays.candidate_tokens),
    )
    chunks = Chunks.of_run(config, mask.shape[1]) if chunks is None else chunks
    model, numerics = config.training_forward()
    model, forward = replace(model, head_chunk=chunks.head), _compiled(numerics != MASTERS)
    parts, size = [], min(shares * chunks.sequences, round_up(len(mask), shares))
    for start in range(0, len(mask), size):
        # the last batch is filled up, so that one program serves all
        rows = np.resize(np.arange(start, len(mask))[:size], size)
        batch = place(jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], inputs), batch_sharding(mesh))
        width = rollout.response_mask.shape[1]
        parts.append(jax.device_get(forward(model, numerics, width, mesh, params, *batch)))
    logps, experts = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(mask)], *parts)
    logps = np.where(rollout.response_mask, logps, 0.0)
    return Scored(logps, experts)


@cache
def _compiled(rounds: bool) -> Any:
    """The training forward, compiled as a run's step is."""
    options = NO_EXCESS_PRECISION if rounds else None
    return jax.jit(_forward, static_argnums=(0, 1, 2, 3), compiler_options=options)


def _forward(
    model: ModelConfig,
    numerics: Numerics,
    width: int,
    mesh: Mesh,
    params: Params,
    tokens: Array,
    mask: Array,
    temperature: Array,
    experts: Array | None,
    candidate_tokens: Array | None,
) -> tuple[Array, Array | None]:
    imposed = None if experts is None else jnp.moveaxis(experts, 2, 0).astype(jnp.int32)
    scores = token_logps(
        model,
        params,
        tokens,
        mask,
        response_length=width,
        temperature=temperature,
        experts=imposed,
        candidate_tokens=candidate_tokens,
        layout=mesh_layout(mesh),
        numerics=numerics,
    )
    found = scores.logps, None if scores.router is None else jnp.moveaxis(scores.router.experts, 0, 2)
    # each process reads them whole
    return jax.lax.with_sharding_constraint(found, replicated(mesh))
