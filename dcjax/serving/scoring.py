"""Teacher forcing through the decode path: the log-probs that the engine gives to the tokens of given responses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from dcjax.arguments import as_sequences
from dcjax.models.parameters import head_name
from dcjax.serving.decoder import NO_EXCESS_PRECISION, Decoder, Prefix, Requests
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.formats import Matrix
from dcjax.serving.rollout import sample_keys
from dcjax.serving.sync import ServingParams
from dcjax.sharding.rules import batch_sharding
from dcjax.sharding.transfer import across
from dcjax.types import Array, Rollout


class DecodeScores(NamedTuple):
    """Scores of N responses, on the host; 0 outside `response_mask`."""

    # natural logs, under the distribution that the engine would sample from
    logps: Float[np.ndarray, "N T"]
    # the residual stream after each layer, from which each token was sampled, of the first responses: as many as the
    # engine decodes at once; None unless requested
    residuals: Float[np.ndarray, "n T L E"] | None


def score_responses(
    engine: Qwen3Engine,
    params: ServingParams,
    rollout: Rollout,
    *,
    key: jax.Array,
    top_k: int = 0,
    top_p: float = 1.0,
    keeps_residuals: bool = False,
) -> DecodeScores:
    """Feeds a rollout's own tokens, one at a time, through prefill and cache, as sampling them would.

    Args:
      engine: the engine, which decodes as many responses at once as it has slots.
      params: from `engine.sync`.
      rollout: the tokens to force, and their temperatures.
      key: the key that the rollout was sampled with, so that a mismatch added on purpose is drawn again.
      top_k: how many of the most probable tokens the scoring distribution keeps; 0 keeps all tokens.
      top_p: how much probability the tokens hold that it keeps; 1 keeps all tokens.
      keeps_residuals: whether to return the residual streams too, which are slots × T × L × E numbers.

    Raises:
      ValueError: the engine does not accept a prompt or a setting, or as `as_sequences`.
    """
    rollout = as_sequences(rollout)
    keys = np.asarray(sample_keys(key, np.arange(len(rollout.tokens))))
    parts, residuals, size = [], None, engine.slots_for(len(keys))
    for start in range(0, len(keys), size):
        rows = np.arange(start, min(start + size, len(keys)))
        # the last batch is filled up, so that one program serves all
        rows = np.resize(rows, size)
        tokens, mask = rollout.tokens[rows], rollout.prompt_mask[rows]
        prompts = [row[: len(real)][real].tolist() for row, real in zip(tokens, mask, strict=True)]
        requests = engine.make_requests(
            keys[rows],
            limits=np.maximum(rollout.response_mask[rows].sum(axis=1), 1),
            temperatures=rollout.temperature[rows],
            top_ks=top_k,
            top_ps=top_p,
            # a response ends where it did, whatever ended it
            stop_tokens=[-1],
        )
        prefix = engine.prefill_many(params, prompts)
        forced = tokens[:, mask.shape[1] :].T
        scored = _score(engine.decoder, keeps_residuals, params, prefix, requests, forced)
        parts.append(np.asarray(scored[0]))
        residuals = jax.device_get(scored[1]) if start == 0 else residuals
    logps = np.concatenate(parts)[: len(keys)]
    return DecodeScores(np.where(rollout.response_mask, logps, 0.0), residuals)


def read_responses(engine: Qwen3Engine, params: ServingParams, rollout: Rollout) -> Float[np.ndarray, "N T"]:
    """The log-probs of `score_responses` at temperature and no truncation, from one pass over each sequence.

    On a CPU it takes a tenth of the time. What the engine rounds is rounded, its cache included; sums are taken in
    other orders, which may turn a rounding. No mismatch is added on purpose.

    Args:
      engine: the engine; a pass takes as many sequences as its prefill has room for, at least one.
      params: from `engine.sync`.
      rollout: the tokens to read, and their temperatures.

    Raises:
      ValueError: as `as_sequences`.
    """
    rollout = as_sequences(rollout)
    decoder, params = engine.for_one_pass(params)
    (tokens, prompt), length = _to_front(rollout), rollout.response_mask.shape[1]
    parts, size = [], max(1, min(len(tokens), decoder.prefill_tokens // tokens.shape[1]))
    for start in range(0, len(tokens), size):
        # the last pass is filled up, so that one program serves all
        rows = np.resize(np.arange(start, min(start + size, len(tokens))), size)
        given = tokens[rows], prompt[rows], rollout.temperature[rows]
        parts.append(np.asarray(_read(decoder, params, *given, length)))
    return np.where(rollout.response_mask, np.concatenate(parts)[: len(tokens)], 0.0)


class ModelScores(NamedTuple):
    """What the served model gives to the tokens of a sequence behind the first; natural logs, at temperature 1."""

    logps: Float[np.ndarray, "S-1"]
    # the most probable tokens in the place of each, and their log-probs
    top_tokens: Int[np.ndarray, "S-1 H"]
    top_logps: Float[np.ndarray, "S-1 H"]


def score_sequence(engine: Qwen3Engine, params: ServingParams, tokens: Sequence[int], top: int) -> ModelScores:
    """Reads a sequence in one pass, with the numerics of `read_responses`.

    Args:
      engine: the engine.
      params: from `engine.sync`.
      tokens: the sequence, as long as a prompt at most.
      top: how many of the most probable tokens are told.

    Raises:
      ValueError: the engine does not accept the sequence.
    """
    padded, _ = engine.padded([tokens])
    decoder, params = engine.for_one_pass(params)
    width = max(engine.width_of(tokens), 2)
    scores = jax.device_get(_read_model(decoder, params, padded[:, :width], top))
    return ModelScores(*(leaf[: len(tokens) - 1] for leaf in scores))


class Reading(NamedTuple):
    """What the sampler's distributions at N responses are made of, on the devices that train."""

    # normed hidden states that each response token was predicted from, in the format's activations
    hidden: Float[jax.Array, "N T E"]
    # the output head as it is served
    head: Matrix


def read_hidden(engine: Qwen3Engine, params: ServingParams, rollout: Rollout, training: Mesh) -> Reading:
    """What the sampler's whole distributions at responses are made of, from one more pass over each sequence.

    Logits are not made here, of which there would be N × T × V; a chunk of the training policy's head makes them of
    its own columns (`Batch.sampler_hidden`, `Batch.sampler_head`). Numerics are those of `read_responses`.

    Args:
      engine: the engine.
      params: from `engine.sync`, those that sampled.
      rollout: the tokens to read.
      training: the mesh that trains; rows are split over it as a batch's are, and the head as its master is.

    Raises:
      ValueError: as `as_sequences`.
    """
    rollout = as_sequences(rollout)
    decoder, weights = engine.for_one_pass(params)
    hidden = _hidden(decoder, weights, *_to_front(rollout), rollout.response_mask.shape[1])
    places = batch_sharding(training), engine.head_shardings(training)
    return Reading(*_moved((hidden, params.weights[head_name(engine.config)]), places, engine.mesh, training))


def lower_reading(engine: Qwen3Engine, params: ServingParams, rows: int) -> Any:
    """The program of `read_hidden` for a number of responses, lowered for abstract params."""
    decoder, weights = engine.for_one_pass(params)
    tokens, prompts = np.zeros((rows, decoder.capacity), np.int32), np.zeros(rows, np.int32)
    return _hidden.lower(decoder, weights, tokens, prompts, decoder.max_response_length)


def _to_front(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row with the real ones in front, and the length of its prompt."""
    order = np.argsort(~np.asarray(rollout.attention_mask), axis=1, kind="stable")
    tokens = np.take_along_axis(np.asarray(rollout.tokens), order, axis=1)
    return tokens, np.asarray(rollout.prompt_mask).sum(axis=1, dtype=np.int32)


def _moved(tree: Any, places: Any, old: Mesh, new: Mesh) -> Any:
    """Arrays on the devices that train."""
    if list(old.devices.flat) == list(new.devices.flat):
        return jax.device_put(tree, jax.tree.broadcast(places, tree))
    return across(tree, jax.tree.broadcast(places, tree))


_hidden = jax.jit(Decoder.hidden, static_argnums=(0, 4), compiler_options=NO_EXCESS_PRECISION)
_read_model = jax.jit(Decoder.read_model, static_argnums=(0, 3), compiler_options=NO_EXCESS_PRECISION)
_read = jax.jit(Decoder.read, static_argnums=(0, 5), compiler_options=NO_EXCESS_PRECISION)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=NO_EXCESS_PRECISION)
def _score(
    decoder: Decoder,
    keeps_residuals: bool,
    params: ServingParams,
    prefix: Prefix,
    requests: Requests,
    forced: Array,
) -> tuple[Array, Array | None]:
    slots = jnp.arange(forced.shape[1])
    state = decoder.start(decoder.empty(len(slots)), slots >= 0, prefix, slots, requests)

    emitted = decoder.follow(params, state, forced, keeps_residuals=keeps_residuals)
    residuals = None if emitted.residuals is None else jnp.moveaxis(emitted.residuals, 2, 0)
    return emitted.logps.T, residuals
