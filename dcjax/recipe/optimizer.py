"""The optimiser: the built-in section, and the one optax chain that holds λ, the learning rate and the average too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import optax

from dcjax.models.config import DtypeName
from dcjax.recipe.checks import require, require_choice
from dcjax.rl.averaging import params_ema
from dcjax.rl.learning_rate import (
    Surge,
    discrepancy_decay,
    dual_learning_rate,
    length_decay,
    scale_by_sequence_ess,
)
from dcjax.rl.loss_scale import dynamic_loss_scale
from dcjax.rl.objective import Objective

NO_REACTION = optax.with_extra_args_support(optax.identity())
"""The reaction of a learning rate that follows nothing but the step."""


@dataclass(frozen=True)
class Optimizer:
    """How parameters descend: what an optimizer section of a recipe returns. dcjax adds the rest to the chain.

    `descent` stands in a dynamic loss scale where the policy computes in fp16; behind `reaction` follow λ's ascent and
    the moving average.
    """

    descent: optax.GradientTransformation
    """Gradients to updates: clipping, Adam, the schedule."""
    learning_rate: optax.Schedule
    """The learning rate by optimiser update, as it is logged; a `learning_rate_scale` in the state multiplies it."""
    reaction: optax.GradientTransformationExtraArgs = NO_REACTION
    """Updates to updates by what training measures: `update` is given `discrepancy`, δ̄, and `response_length`, tokens,
    of the iteration, and `sequence_ess`, a share, of the minibatch."""
    ema_decay: float = 0.0
    """Decay per update of the moving average of the weights; 0 keeps no average."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and how an iteration is cut into updates."""

    learning_rate: float = 1e-6
    """Learning rate after warm-up."""
    warmup_steps: int = 0
    """Number of updates of linear learning-rate warm-up."""
    decay: Literal["constant", "linear", "cosine", "period", "length", "discrepancy", "dual"] = "constant"
    """constant; linear or cosine, to decay_floor; halved every decay_period iterations (period), with a
    period set by the surge in response length (length, paper B), or when the gap grows (discrepancy); or dual."""
    decay_floor: float = 0.1
    """Lower bound of the decayed learning rate, as a share of learning_rate."""
    surge_ratio: float = 2.0
    """With decay length, response length this many times its usual value counts as a surge."""
    surge_history: int = 24
    """With decay length, the usual length is the median over this many iterations."""
    decay_period: int = 204
    """With decay period, the number of iterations between halvings (default: paper B's, for 4B)."""
    decay_dual_lr: float = 100.0
    """With decay dual, the divisor of the learning rate grows by this value times (mean gap − budget)
    in each iteration."""
    ess_base: float | None = None
    """Scales each update by the square root of min(1, effective share of its whole responses / this), VCPO's rule; 1 is
    the paper's, None leaves updates as they are."""
    ema_decay: float = 0.0
    """Decay per update of the moving average of the weights, which is evaluated and can be exported;
    0 keeps no average."""
    beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    beta2: float = 0.95
    """Decay rate of Adam's second moment."""
    epsilon: float = 1e-8
    """Adam's epsilon (our choice; we could not recover the papers')."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped."""
    updates: int = 1
    """Optimiser updates per iteration; each uses an equal share of the prompts."""
    tokens_per_microbatch: int | None = None
    """Tokens that a device, or several that share rows, computes in one forward and backward pass, at most. By default
    chosen from the longest prompt and response, and for the platform."""

    def __post_init__(self):
        names = ("learning_rate", "warmup_steps", "beta1", "beta2", "epsilon", "weight_decay", "decay_floor")
        names += ("decay_dual_lr", "ema_decay")
        ones = dict.fromkeys(("updates", "decay_period"), 1)
        require("optimizer.", self, {**dict.fromkeys(names, 0), **ones, "surge_history": 7})
        if not 1 < self.surge_ratio < math.inf:
            raise ValueError(f"optimizer.surge_ratio is {self.surge_ratio}; it must be a finite number above 1")
        require_choice("optimizer.", self, "decay")
        if self.decay_floor > 1:
            raise ValueError(f"optimizer.decay_floor is {self.decay_floor}; it must lie within [0, 1]")
        for name in ("beta1", "beta2", "ema_decay"):
            if getattr(self, name) >= 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be below 1")
        if self.ess_base is not None and not 0 < self.ess_base <= 1:
            raise ValueError(f"optimizer.ess_base is {self.ess_base}; it must lie within (0, 1], or be None")
        if not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm is {self.max_grad_norm}; it must be above 0")

    def schedule(self, steps: int) -> optax.Schedule:
        """Learning rate by optimiser update: linear warm-up, then constant, or to the floor at the run's end.

        A subclass that defines this has a schedule of its own.

        Args:
          steps: RL iterations of the run.
        """
        # Equal rates are one object, whatever the length of the run, so that steps built with it are compiled once.
        decay = self.decay if self.decay in ("linear", "cosine") else "constant"
        left = max(steps * self.updates - self.warmup_steps, 1) if decay != "constant" else 0
        return _schedule(decay, self.learning_rate, self.warmup_steps, self.decay_floor, left)

    def build(self, objective: Objective, *, steps: int) -> Optimizer:
        """Gradient clip and AdamW by `schedule`, and what follows the gap or the response length.

        Args:
          objective: whose gap and budget a decay may follow.
          steps: RL iterations of the run.

        Raises:
          ValueError: a decay that the objective does not fit.
        """
        self._check_decay(objective)
        return _assemble(self, self.schedule(steps), objective.budget)

    def _check_decay(self, objective: Objective) -> None:
        if self.decay == "discrepancy" and objective.signed:
            raise ValueError(
                "optimizer.decay is discrepancy, which needs a gap without a sign; the objective's is signed"
            )
        if self.decay != "dual":
            return
        if objective.budget is None:
            raise ValueError("optimizer.decay is dual, which needs a number for the objective's budget; it has none")
        if self.decay_floor == 0:
            raise ValueError("optimizer.decay_floor is 0; it must be above 0 where optimizer.decay is dual")

    def reaction(self, budget: float | None) -> optax.GradientTransformationExtraArgs:
        """What moves the learning rate by what training measures, as `decay` and `ess_base` say."""
        decay = self._reacting_decay(budget)
        return decay if self.ess_base is None else optax.chain(decay, scale_by_sequence_ess(self.ess_base))

    def _reacting_decay(self, budget: float | None) -> optax.GradientTransformationExtraArgs:
        common = {"floor": self.decay_floor, "every": self.updates}
        if self.decay == "period":
            return length_decay(self.decay_period, **common)
        if self.decay == "length":
            return length_decay(Surge(ratio=self.surge_ratio, history=self.surge_history), **common)
        if self.decay == "discrepancy":
            return discrepancy_decay(**common)
        if self.decay == "dual":
            assert budget is not None
            slowest = 1 / self.decay_floor - 1
            return dual_learning_rate(self.decay_dual_lr, budget=budget, max_slowdown=slowest, every=self.updates)
        return NO_REACTION


@cache
def _schedule(decay: str, rate: float, warmup: int, floor: float, left: int) -> optax.Schedule:
    after = {
        "linear": partial(optax.linear_schedule, rate, rate * floor, left),
        "cosine": partial(optax.cosine_decay_schedule, rate, left, alpha=floor),
        "constant": partial(optax.constant_schedule, rate),
    }[decay]
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after()], [warmup])


@cache
def _assemble(settings: OptimizerConfig, schedule: optax.Schedule, budget: float | None) -> Optimizer:
    descent = optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(
            schedule,
            b1=settings.beta1,
            b2=settings.beta2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        ),
    )
    return Optimizer(descent, schedule, reaction=settings.reaction(budget), ema_decay=settings.ema_decay)


@cache
def chain_with(
    optimizer: Optimizer, ascent: optax.GradientTransformationExtraArgs, compute: DtypeName
) -> optax.GradientTransformationExtraArgs:
    """One optax chain: the optimizer's descent and reaction, λ's dual ascent, and the average.

    Equal arguments give the same object, so that steps built with it are compiled once.

    Args:
      optimizer: of the recipe.
      ascent: the objective's.
      compute: what the model computes in; fp16 needs a scaled loss.
    """
    transforms = [scale_loss(optimizer.descent, compute), optimizer.reaction, ascent]
    if optimizer.ema_decay:
        transforms.append(params_ema(optimizer.ema_decay))
    return optax.with_extra_args_support(optax.chain(*transforms))


def scale_loss(descent: optax.GradientTransformation, compute: DtypeName) -> optax.GradientTransformation:
    """Gradients in fp16 need a scaled loss; λ stays outside, since an overflow says nothing about the gap."""
    return dynamic_loss_scale(descent) if compute == "fp16" else descent
