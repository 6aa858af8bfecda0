"""Batches of random tokens, for tests of the training step."""

import dataclasses

import numpy as np

from dcjax.types import Batch


def random_batch(rewards, *, vocab_size, group_size, prompt_length, response_length):
    """A batch with one row for each reward: prompts and responses of random lengths, at temperature 1.

    Equal arguments give equal batches.
    """
    rng = np.random.default_rng(0)
    rewards = np.asarray(rewards, np.float32)
    rows = len(rewards)
    mask = np.arange(response_length) < rng.integers(1, response_length + 1, (rows, 1))
    return Batch(
        tokens=rng.integers(0, vocab_size, (rows, prompt_length + response_length)).astype(np.int32),
        attention_mask=np.concatenate(
            [np.arange(prompt_length) >= rng.integers(0, prompt_length, (rows, 1)), mask], axis=1
        ),
        response_mask=mask,
        rollout_logps=np.where(mask, rng.uniform(-3, -0.5, (rows, response_length)), 0).astype(np.float32),
        temperature=np.ones(rows, np.float32),
        rewards=rewards,
        group_rewards=np.repeat(rewards.reshape(-1, group_size), group_size, axis=0),
    )


def grouped_batch(rows, *, group_size, vocab_size, prompt_length, response_length):
    """A `random_batch` whose groups have a prompt in common, with random rewards."""
    rewards = np.random.default_rng(1).integers(0, 2, rows)
    sizes = {"group_size": group_size, "prompt_length": prompt_length, "response_length": response_length}
    batch = random_batch(rewards, vocab_size=vocab_size, **sizes)
    tokens, mask = batch.tokens.copy(), batch.attention_mask.copy()
    for of_rows in (tokens, mask):
        of_rows[:, :prompt_length] = np.repeat(of_rows[::group_size, :prompt_length], group_size, axis=0)
    return dataclasses.replace(batch, tokens=tokens, attention_mask=mask)
