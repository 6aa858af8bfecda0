"""The data that crosses rooms: what a rollout yields, what a step consumes, what training carries.

Letters in shapes: B sequences (prompts × G), G samples of one prompt, P prompt columns, T response columns,
S = P + T, D shares of a batch's rows that devices hold. Prompts are padded on the left and responses on the right,
so that column P is every row's first response token.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array | np.ndarray
"""An array on the host or on devices: a batch starts on the host and is consumed on devices."""

Params = Any
"""A pytree of arrays, as `dcjax.models.init_params` lays it out."""

Metrics = dict[str, Array]
"""Scalars by the names of `metrics.jsonl`."""


@flax.struct.dataclass
class Sequences:
    """Prompts with their responses, and what the distribution was that the responses were sampled from."""

    tokens: Int[Array, "B S"]
    # True on every token that is not padding
    attention_mask: Bool[Array, "B S"]
    # True on the tokens that the model wrote, the end token included
    response_mask: Bool[Array, "B T"]
    # float32, natural log, of the serving engine's own numerics at `temperature`; 0 outside `response_mask`
    rollout_logps: Float[Array, "B T"]
    # the sampler's temperature, which the trainer applies to its own logits too
    temperature: Float[Array, "B"]
    # tokens that could be drawn, -1 behind them, or all -1 where all could; None where the engine records none. The
    # trainer's distribution is over the same ones
    candidate_tokens: Int[Array, "B T K"] | None = flax.struct.field(default=None, kw_only=True)
    # experts that the M sparse layers chose for all tokens but the last, and choose again in training; None where the
    # engine records none
    experts: Int[Array, "B S-1 M k"] | None = flax.struct.field(default=None, kw_only=True)
    # the sampler's most probable tokens at each response token, and their log-probs under the distribution that it
    # drew from; None where the engine records none
    sampler_tokens: Int[Array, "B T H"] | None = flax.struct.field(default=None, kw_only=True)
    sampler_logps: Float[Array, "B T H"] | None = flax.struct.field(default=None, kw_only=True)
    # the sampler's normed hidden states that each response token was predicted from, in its activations' dtype; None
    # where they were not read
    sampler_hidden: Float[Array, "B T E"] | None = flax.struct.field(default=None, kw_only=True)

    @property
    def prompt_mask(self) -> Bool[Array, "B P"]:
        """True on the tokens of prompts."""
        return self.attention_mask[:, : self.tokens.shape[1] - self.response_mask.shape[1]]


@flax.struct.dataclass
class Rollout(Sequences):
    """Sampled responses, with the log-probs of the distribution that they were sampled from."""

    # weights version that produced each token; -1 outside `response_mask`
    versions: Int[Array, "B T"]
    # whether an end token was sampled within the limit
    finished: Bool[Array, "B"]
    # log of the share of the whole softmax that the tokens held which could be drawn; 0 where all could
    log_mass: Float[Array, "B T"]


class Bins(NamedTuple):
    """The size of one device's share of a forward and backward pass that packs rows: the same in every pass."""

    # of all bins together, an even number, F
    columns: int
    # of each bin but the last, which may be narrower, W
    width: int
    # columns for the prompts that the responses of a bin attend to, X
    gathered: int
    # rows at most, R
    rows: int
    # how often bins may be halved for short rows; what is halved stays a whole number
    halvings: int = 0
    # whether rows of one prompt in one bin read it from the same gathered columns
    shared: bool = False

    @property
    def number(self) -> int:
        """Of bins, N."""
        return -(-self.columns // self.width)

    def halved(self, times: int) -> Bins:
        """Bins of a half, a quarter, ... of the width in the same columns."""
        return self._replace(width=self.width >> times, gathered=self.gathered >> times)


@flax.struct.dataclass
class Places:
    """Where the tokens of R rows lie in the F columns of their bins.

    A row has two parts: its prompt without the last token, and its response, whose columns hold the tokens that precede
    those of the response: the prompt's last, and all of the response but its last. Rows of the same prompt share it.
    """

    # the first column of a row's response
    responses: Int[Array, "*shares R"]
    # the first column of its prompt, -1 where that is empty
    prompts: Int[Array, "*shares R"]
    # the first of the N × X gathered columns, those of its bin, that its response finds the prompt in
    gathered: Int[Array, "*shares R"]
    # False where the microbatch has fewer rows, and another stands in for one
    present: Bool[Array, "*shares R"]
    # how often the bins are halved
    halvings: Int[Array, "*shares"]


@flax.struct.dataclass
class Microbatches:
    """How the minibatches of an iteration are cut into microbatches.

    Each of D devices, or groups of them, has a share of a minibatch's rows, and cuts it into at most M microbatches of
    at most R rows. All of them compute as many microbatches as the one that needs most.
    """

    # microbatches that have rows
    count: Int[Array, "D updates"]
    # numbers within the share, -1 where there are fewer rows
    rows: Int[Array, "D updates M R"]
    places: Places
    # of each row of a share, the number that it had in the batch before packing moved it; None where none may move
    order: Int[Array, "D updates rows"] | None = None


@flax.struct.dataclass
class Batch(Sequences):
    """What one training iteration consumes. Rows may be cut anywhere: each carries its whole group's rewards."""

    rewards: Float[Array, "B"]
    group_rewards: Float[Array, "B G"]
    # how a whole iteration is cut; None cuts rows as they come
    microbatches: Microbatches | None = flax.struct.field(default=None, kw_only=True)
    # of the rows of a microbatch, [D, R] each; None where they are not packed
    places: Places | None = flax.struct.field(default=None, kw_only=True)
    # what makes logits of `sampler_hidden`: the sampler's output head as it is served, one for all rows
    sampler_head: Any = flax.struct.field(default=None, kw_only=True)

    @classmethod
    def of(cls, sequences: Sequences, *, rewards: Array, group_size: int) -> Batch:
        """Sequences with their rewards, the `group_size` responses of a prompt side by side.

        Raises:
          ValueError: rewards that do not divide into groups.
        """
        if len(rewards) % group_size:
            raise ValueError(f"{len(rewards)} rewards do not divide into groups of {group_size} responses")
        groups = np.repeat(np.asarray(rewards).reshape(-1, group_size), group_size, axis=0)
        shared = {field.name: getattr(sequences, field.name) for field in dataclasses.fields(Sequences)}
        return cls(**shared, rewards=rewards, group_rewards=groups)


@flax.struct.dataclass
class TokenDistributions:
    """Both policies' distributions at C response columns, as one chunk of the model's head computes them."""

    # the training policy's, float32, natural log, over the tokens that the sampler could draw; very low for the others
    log_probs: Float[Array, "B C V"]
    # the sampled tokens
    targets: Int[Array, "B C"]
    # as in `Sequences`
    candidate_tokens: Int[Array, "B C K"] | None
    # those that the sampler drew from, likewise; None where they are not known as a whole
    sampler_log_probs: Float[Array, "B C V"] | None = None
    # as in `Sequences`
    sampler_tokens: Int[Array, "B C H"] | None = None
    sampler_logps: Float[Array, "B C H"] | None = None


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. λ and the learning rate's state live in `opt_state`."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    # moving average (.9) of the gradient norm, paper B figure 3
    grad_norm_smoothed: Float[Array, ""]
    # parameters of a policy to stay close to, which no step changes; None where the objective has none
    reference: Params | None = None
    # parameters before each of the last iterations, oldest first: as many as the serving weights lag behind
    history: tuple[Params, ...] = ()
