"""Some of an iteration's responses for people to read, with what both policies give to their tokens."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dcjax.allocator import return_freed_memory
from dcjax.loop.draw import Sampled
from dcjax.loop.evaluate import responses
from dcjax.loop.setup import Setup
from dcjax.recipe.forward import score
from dcjax.reporting.record import TokenProbabilities
from dcjax.serving.server.text import TextStream
from dcjax.types import Rollout, TrainState

TRANSCRIPTS = 4
"""Prompts whose first response is kept at each evaluation."""

TOKENS = 512
"""Of each of these, from its beginning, whose probabilities are kept."""


def transcribe(setup: Setup, state: TrainState, sampled: Sampled) -> list[dict[str, Any]]:
    """The first responses to some prompts, as `Transcripts.write` takes them.

    Args:
      setup: of the run.
      state: before the iteration's update.
      sampled: the iteration's responses; every process calls with the same. Log-probs of the training policy that are
        not finite are told as they are, since the update that follows ends the run with the whole batch.
    """
    rows = np.arange(len(sampled.problems))[:TRANSCRIPTS] * sampled.group_size
    rollout = jax.tree.map(lambda leaf: leaf[rows], sampled.rollout)
    tokens = _tokens(setup, state, rollout)
    texts = responses(setup.tokenizer, rollout)
    return [
        {
            "prompt": sampled.problems[row // sampled.group_size].prompt,
            "response": text,
            "reward": float(sampled.rewards[row]),
            "parts": sampled.scores.parts_of(row),
            "finished": bool(rollout.finished[index]),
            "policy_version": int(rollout.versions[index, 0]),
            "tokens": tokens[index],
        }
        for index, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]


def _tokens(setup: Setup, state: TrainState, rollout: Rollout) -> list[list[TokenProbabilities]]:
    """Those of each response, with what both policies gave to them."""
    # whose log-probs are the step's old ones
    params = state.history[0] if setup.config.rollout.async_level else state.params
    probabilities = np.exp(score(setup.config, setup.mesh, params, rollout, replays=rollout).logps)
    return_freed_memory()
    return [_told(setup, rollout, probabilities, row) for row in range(len(rollout.tokens))]


def _told(setup: Setup, rollout: Rollout, probabilities: np.ndarray, row: int) -> list[TokenProbabilities]:
    """The first tokens of a response; one that is only the beginning of a character has no text."""
    mask, stream = rollout.response_mask[row], TextStream(lambda ids: str(setup.tokenizer.decode(ids)))
    tokens = rollout.tokens[row, -len(mask) :][mask].tolist()
    pairs = zip(probabilities[row][mask].tolist(), np.exp(rollout.rollout_logps[row][mask]).tolist(), strict=True)
    return [
        TokenProbabilities(stream.push([token], last=number == len(tokens)), train, sampler)
        for number, (token, (train, sampler)) in enumerate(zip(tokens[:TOKENS], pairs, strict=False), start=1)
    ]
