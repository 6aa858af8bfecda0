"""The training policy on rows as they are: the oracle of what packs them, and what a step without packing trains."""

import jax.numpy as jnp

from dcjax.models import token_logps
from dcjax.rl import PolicyOutputs


def score_by_rows(model, params, batch, quantities=None):
    """The `TokenScores` of a batch whose rows keep their padding."""
    return token_logps(
        model,
        params,
        batch.tokens,
        batch.attention_mask,
        response_length=batch.response_mask.shape[1],
        temperature=batch.temperature,
        experts=None if batch.experts is None else jnp.moveaxis(batch.experts, 2, 0).astype(jnp.int32),
        candidate_tokens=batch.candidate_tokens,
        quantities=quantities or {},
    )


def apply_by_rows(model, params, batch):
    """An `apply_fn` of `make_train_step`, once it has a model."""
    scores = score_by_rows(model, params, batch)
    return PolicyOutputs(scores.logps, scores.entropy, {} if scores.router is None else scores.router.metrics)
