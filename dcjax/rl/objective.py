"""An objective as a value: the functions that a training step is made of, and what they need to be given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import flax.struct
import optax
from jaxtyping import Float

from dcjax.rl.discrepancy import Discrepancy, DistributionGap, probability_difference
from dcjax.rl.losses import Surrogate, clipped_surrogate
from dcjax.rl.masked import Aggregation, response_mean, token_mean
from dcjax.rl.transforms import Context, LossTransform
from dcjax.types import Array, Batch, TokenDistributions

PPO_CLIP: Surrogate = functools.partial(clipped_surrogate, eps_low=0.2, eps_high=0.28)
"""The clipped ratio with DAPO's bounds."""

NO_ASCENT = optax.with_extra_args_support(optax.identity())
"""The ascent of an objective whose λ is fixed or absent."""


@dataclass(frozen=True)
class HeadQuantity:
    """A value of each response token that depends on the policy's whole distribution there: an entropy, a tail's mass.

    It is computed where the model's head is, for `ModelConfig.head_chunk` columns at a time, and again in the backward
    pass, so that an array of [B, T, V] never exists. Gradients flow through it.
    """

    name: str
    """The key in `Context.quantities`."""
    compute: Callable[[TokenDistributions], Array]
    """(distributions of C columns) -> float32 [B, C]."""
    old: bool = False
    """Whether it is wanted at the rollout's weights too, in `Context.old_quantities`, as `old_logps` are."""


@flax.struct.dataclass
class Iteration:
    """All responses of one training iteration, before any update, those of a prompt side by side."""

    batch: Batch
    # log-probs of the training policy at the rollout's weights
    old_logps: Float[Array, "B T"]
    # log-probs of the policy that RL started from; None where the state keeps none
    reference_logps: Float[Array, "B T"] | None


@dataclass(frozen=True)
class IterationQuantity:
    """A scalar, or a value of each row or token, that depends on other rows of the iteration: a quantile, a mean.

    It is computed once, before the first gradient, and not differentiated. `old_logps` then take a pass of their own.
    """

    name: str
    """The key in `Context.quantities`."""
    compute: Callable[[Iteration], Array]
    """(iteration) -> [], [B] or [B, T]; a loss transform sees the scalar, or its own rows."""


@dataclass(frozen=True)
class MinibatchQuantity:
    """A scalar, or a value of each row or token, that depends on the whole minibatch at its current parameters.

    It is computed once an update, before its gradient, and not differentiated: the same for every microbatch, however
    the minibatch is cut. The log-probs take a pass of their own. Rows stand in any order; each carries its group's
    rewards.
    """

    name: str
    """The key in `Context.quantities`."""
    compute: Callable[[Context], Array]
    """(context of all the minibatch's rows, in any order) -> [], [B] or [B, T]; a loss transform sees the scalar, or
    its own rows. Of the quantities, that context has the iteration's and those of the head that are `old`."""


@dataclass(frozen=True)
class Requirements:
    """What an objective needs beside rewards and the log-probs of sampled tokens.

    Raises:
      ValueError: two quantities of one name.
    """

    reference_logps: bool = False
    """`Context.reference_logps`: the state keeps the policy that RL started from."""
    candidate_tokens: bool = False
    """`Batch.candidate_tokens`: rollouts record the tokens that could be drawn (`rollout.top_k`)."""
    mixed_groups: bool = False
    """Groups of equal rewards are replaced by others while sampling (DAPO's dynamic sampling, arXiv 2503.14476)."""
    quantities: tuple[HeadQuantity | IterationQuantity | MinibatchQuantity, ...] = ()
    """`Context.quantities`."""
    sampler_distributions: bool = False
    """`TokenDistributions.sampler_log_probs`: rollouts are read once more by the engine, which is in this process."""
    sampler_head: int = 0
    """How many of the sampler's most probable tokens rollouts record, for `TokenDistributions.sampler_tokens`."""

    def __post_init__(self) -> None:
        names = [quantity.name for quantity in self.quantities]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two required quantities are called {repeated[0]!r}; each needs a name of its own")

    @classmethod
    def joined(cls, *several: Requirements) -> Requirements:
        """All of them together; a quantity that several have counts once.

        Raises:
          ValueError: two that differ have one name.
        """
        quantities = dict.fromkeys(quantity for one in several for quantity in one.quantities)
        return cls(
            reference_logps=any(one.reference_logps for one in several),
            candidate_tokens=any(one.candidate_tokens for one in several),
            mixed_groups=any(one.mixed_groups for one in several),
            quantities=tuple(quantities),
            sampler_distributions=any(one.sampler_distributions for one in several),
            sampler_head=max((one.sampler_head for one in several), default=0),
        )

    @classmethod
    def of(cls, discrepancy: Discrepancy | DistributionGap) -> Requirements:
        """What a δ needs."""
        if not isinstance(discrepancy, DistributionGap):
            return cls()
        quantity = HeadQuantity(discrepancy.name, discrepancy.compute, old=True)
        return cls(quantities=(quantity,), sampler_distributions=True)

    @property
    def of_old_head(self) -> list[str]:
        """The names of those that are wanted at the rollout's weights."""
        return [each.name for each in self.quantities if isinstance(each, HeadQuantity) and each.old]

    @property
    def of_head(self) -> Mapping[str, Callable[[TokenDistributions], Array]]:
        """The functions of the quantities that the model's head computes, by name."""
        return {each.name: each.compute for each in self.quantities if isinstance(each, HeadQuantity)}

    @property
    def of_iteration(self) -> Mapping[str, Callable[[Iteration], Array]]:
        """The functions of the quantities that are computed once an iteration, by name."""
        return {each.name: each.compute for each in self.quantities if isinstance(each, IterationQuantity)}

    @property
    def of_minibatch(self) -> Mapping[str, Callable[[Context], Array]]:
        """The functions of the quantities that are computed once an update, by name."""
        return {each.name: each.compute for each in self.quantities if isinstance(each, MinibatchQuantity)}


NO_REQUIREMENTS = Requirements()


@dataclass(frozen=True)
class Objective:
    """What is optimised. The functions of `dcjax.rl.presets` return it, and so does an objective section of a recipe.

    objective = dc_grpo(updates=4)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b2=0.95), objective.ascent)
    step = make_train_step(apply_fn, tx, objective.surrogate, objective.transform, requires=objective.requires, ...)
    """

    transform: LossTransform
    """What turns rewards and log-probs into advantages, weights, a mask and losses: one transform, or a `chain`."""
    surrogate: Surrogate = PPO_CLIP
    """The loss of each token."""
    aggregate: Aggregation = token_mean
    """How the losses of tokens are summed, and what the sum is divided by."""
    discrepancy: Discrepancy | DistributionGap = probability_difference
    """δ, whose mean the optimiser and the metrics get; where there is a penalty, the penalty's own."""
    mean_discrepancy: Callable[[Array, Array], Array] = response_mean
    """(δ [B, T], mask [B, T]) -> δ̄ []."""
    ascent: optax.GradientTransformationExtraArgs = NO_ASCENT
    """λ's dual ascent, for the end of the optimiser's chain."""
    budget: float | None = None
    """c, the tolerated δ̄; None where there is none, or where it is measured."""
    signed: bool = False
    """Whether δ may be negative, which learning rates that follow δ̄ cannot take."""
    requires: Requirements = NO_REQUIREMENTS
    """What else the training step must provide."""
