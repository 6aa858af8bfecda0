"""One model's policies, and the log-probs that each gives to the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from dcjax.errors import RunError
from dcjax.models import ModelConfig, token_logps
from dcjax.models.layers import round_up
from dcjax.models.numerics import MASTERS, Numerics
from dcjax.models.parallel.forward import mesh_layout
from dcjax.recipe.build import build_engine
from dcjax.recipe.config import Config
from dcjax.serving.decoder import NO_EXCESS_PRECISION
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.rollout import sample_responses
from dcjax.serving.scoring import DecodeScores, read_responses, score_responses
from dcjax.serving.sync import ServingParams
from dcjax.sharding.mesh import make_mesh
from dcjax.sharding.rules import batch_sharding, split
from dcjax.tools.probe.gaps import Logps
from dcjax.tools.probe.ladder import Served
from dcjax.types import Array, Params, Rollout


class Weights(NamedTuple):
    """The trainer's weights, and those that are served."""

    params: Params
    stale: Params | None
    """Earlier weights, if those are served; None if `params` are."""
    version: int
    """The version of the served weights, which noise on them depends on."""


class Scored(NamedTuple):
    """The training policy's log-probs of a rollout's tokens, and its experts."""

    logps: Logps
    experts: Int[np.ndarray, "B S-1 M k"] | None
    """The experts that its tokens went to, laid out as `Rollout.experts`; None if the model has none."""


class Chunks(NamedTuple):
    """What one pass of the training forward computes at a time."""

    sequences: int
    """On each share of the devices."""
    head: int
    """Columns of a response whose logits exist at one time: `model.head_chunk`."""


class Policies:
    """One model's training policy and engines for its served ones, each made once.

    Args:
      config: the settings of the run, on one device; each policy has its own serving and mismatch.
      end_tokens: the ids that end a response.
    """

    def __init__(self, config: Config, end_tokens: Sequence[int]):
        self.config, self._end_tokens, self._mesh = config, end_tokens, make_mesh(config.mesh)
        self._engines: dict[Served, Qwen3Engine] = {}

    def engine(self, served: Served) -> Qwen3Engine:
        """What serves a policy.

        Raises:
          RunError: the model, the hardware or its memory cannot serve it.
        """
        served = replace(served, stale=False)
        if served not in self._engines:
            # One prompt is in each pass of the prefill: its cache's roundings then do not depend on those beside it.
            most = min(self.config.serving.prefill_tokens, self.config.rollout.max_prompt_length)
            serving = replace(self.config.serving, format=served.format, kv_cache=served.kv_cache, prefill_tokens=most)
            config = replace(self.config, serving=serving, mismatch=served.mismatch)
            self._engines[served] = build_engine(config, self._mesh, self._end_tokens)
        return self._engines[served]

    def sample(self, served: Served, weights: Weights, prompts: Sequence[Sequence[int]], key: jax.Array) -> Rollout:
        """One response to each prompt.

        Raises:
          RunError: a prompt does not fit, or the policy cannot be served.
        """
        engine, rollout = self.engine(served), self.config.rollout
        settings = {"temperature": rollout.temperature, "top_k": rollout.top_k, "top_p": rollout.top_p}
        try:
            return sample_responses(
                engine, _synced(engine, served, weights), prompts, samples_per_prompt=1, key=key, **settings
            )
        except ValueError as error:
            raise RunError(str(error)) from None

    def score(
        self,
        served: Served,
        weights: Weights,
        rollout: Rollout,
        key: jax.Array,
        *,
        keeps_residuals: bool = False,
        truncates: bool = False,
    ) -> DecodeScores:
        """Log-probs at the rollout's temperatures, and the residual stream if it is kept.

        They are over the whole softmax, or if it `truncates` over what the sampler's top-k and top-p leave of it.

        Raises:
          RunError: the model, the hardware or its memory cannot serve the policy, or a log-prob is not finite.
        """
        engine = self.engine(served)
        params, settings = _synced(engine, served, weights), self.config.rollout
        top_k, top_p = (settings.top_k, settings.top_p) if truncates else (0, 1.0)
        scores = score_responses(
            engine, params, rollout, key=key, top_k=top_k, top_p=top_p, keeps_residuals=keeps_residuals
        )
        _require_finite(f"format {served.format.name}", scores.logps)
        return scores

    def read(self, served: Served, weights: Weights, rollout: Rollout) -> Logps:
        """As `score` without truncation, from one pass over each sequence; errors are the same."""
        engine = self.engine(served)
        logps = read_responses(engine, _synced(engine, served, weights), rollout)
        _require_finite(f"format {served.format.name}", logps)
        return logps

    def train(
        self,
        params: Params,
        rollout: Rollout,
        *,
        temperature: Array,
        replays: Rollout | None = None,
        mesh: Mesh | None = None,
        chunks: Chunks | None = None,
    ) -> Scored:
        """The training forward's log-probs and experts, over the whole softmax or the candidates of `replays`.

        If `replays` has experts, the forward uses them in place of its own choice. `chunks` are the run's own if None.

        Raises:
          RunError: a log-prob is not finite.
        """
        config, width = self.config, rollout.response_mask.shape[1]
        mesh = self._mesh if mesh is None else mesh
        mask = np.asarray(rollout.attention_mask)
        inputs = (rollout.tokens, mask, temperature, replays and replays.experts, replays and replays.candidate_tokens)
        chunks = self.chunks(mask.shape[1]) if chunks is None else chunks
        model, numerics = config.training_forward()
        model, forward = replace(model, head_chunk=chunks.head), _compiled_forward(numerics != MASTERS)
        shares = split(mesh.shape, "batch")
        parts, size = [], min(shares * chunks.sequences, round_up(len(mask), shares))
        for start in range(0, len(mask), size):
            # The last batch is filled up, so that one program serves all.
            rows = np.resize(np.arange(start, len(mask))[:size], size)
            batch = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], inputs)
            batch = jax.device_put(batch, batch_sharding(mesh))
            parts.append(jax.device_get(forward(model, numerics, width, mesh, params, *batch)))
        logps, experts = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(mask)], *parts)
        logps = np.where(rollout.response_mask, logps, 0.0)
        _require_finite("the trainer", logps)
        return Scored(logps, experts)

    def chunks(self, width: int) -> Chunks:
        """The run's own for sequences of so many tokens: as many as a microbatch of whole rows has room for."""
        return Chunks(max(1, self.config.packing().bins.columns // width), self.config.model.head_chunk)


def _synced(engine: Qwen3Engine, served: Served, weights: Weights) -> ServingParams:
    return engine.sync(weights.stale if served.stale else weights.params, weights.version)


def _require_finite(what: str, logps: Logps) -> None:
    if len(bad := np.argwhere(~np.isfinite(logps))):
        raise RunError(f"{what} gives log-prob {logps[tuple(bad[0])]} at response, token {tuple(bad[0].tolist())}")


@cache
def _compiled_forward(rounds: bool) -> Any:
    """The training forward, compiled as a run's step is."""
    options = NO_EXCESS_PRECISION if rounds else None
    return jax.jit(_training_forward, static_argnums=(0, 1, 2, 3), compiler_options=options)


def _training_forward(
    model: ModelConfig,
    numerics: Numerics,
    width: int,
    mesh: Mesh,
    params: Params,
    tokens,
    mask,
    temperature,
    experts,
    candidate_tokens,
):
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
    return scores.logps, None if scores.router is None else jnp.moveaxis(scores.router.experts, 0, 2)
