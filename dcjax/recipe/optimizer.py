"""The optimiser: one optax chain that holds λ, the learning rate and the average too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import optax

from dcjax.models.config import DtypeName
from dcjax.recipe.checks import require, require_choice
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.rl.averaging import params_ema
from dcjax.rl.dual import dual_ascent
from dcjax.rl.learning_rate import Surge, discrepancy_decay, dual_learning_rate, length_decay
from dcjax.rl.loss_scale import dynamic_loss_scale

SCHEDULED = ("linear", "cosine")
"""Decays that end with the run."""


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
    microbatch_size: int = 16
    """Sequences per forward and backward pass."""

    def __post_init__(self):
        names = ("learning_rate", "warmup_steps", "beta1", "beta2", "epsilon", "weight_decay", "decay_floor")
        names += ("decay_dual_lr", "ema_decay")
        ones = dict.fromkeys(("updates", "microbatch_size", "decay_period"), 1)
        require("optimizer.", self, {**dict.fromkeys(names, 0), **ones, "surge_history": 7})
        if not 1 < self.surge_ratio < math.inf:
            raise ValueError(f"optimizer.surge_ratio is {self.surge_ratio}; it must be a finite number above 1")
        require_choice("optimizer.", self, "decay")
        if self.decay_floor > 1:
            raise ValueError(f"optimizer.decay_floor is {self.decay_floor}; it must lie within [0, 1]")
        for name in ("beta1", "beta2", "ema_decay"):
            if getattr(self, name) >= 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be below 1")
        if not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm is {self.max_grad_norm}; it must be above 0")


def make_schedule(optimizer: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by optimiser update: linear warm-up, then constant, or to the floor at the run's end."""
    rate, warmup = optimizer.learning_rate, optimizer.warmup_steps
    left = max(steps * optimizer.updates - warmup, 1)
    after = {
        "linear": optax.linear_schedule(rate, rate * optimizer.decay_floor, left),
        "cosine": optax.cosine_decay_schedule(rate, left, alpha=optimizer.decay_floor),
    }.get(optimizer.decay, optax.constant_schedule(rate))
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def make_optimizer(
    optimizer: OptimizerConfig, objective: ObjectiveConfig, *, steps: int, compute: DtypeName
) -> optax.GradientTransformationExtraArgs:
    """One optax chain: gradient clip, AdamW, what follows the gap or the length, λ's dual ascent, and the average.

    Equal settings give the same object, so that steps built with it are compiled once.

    Args:
      optimizer: its settings.
      objective: of which the dual ascent is made.
      steps: RL iterations, by which a scheduled decay ends.
      compute: what the model computes in; fp16 needs a scaled loss.
    """
    return _make_optimizer(optimizer, objective, steps if optimizer.decay in SCHEDULED else 0, compute)


@cache
def _make_optimizer(
    optimizer: OptimizerConfig, objective: ObjectiveConfig, steps: int, compute: DtypeName
) -> optax.GradientTransformationExtraArgs:
    descent = optax.chain(
        optax.clip_by_global_norm(optimizer.max_grad_norm),
        optax.adamw(
            make_schedule(optimizer, steps),
            b1=optimizer.beta1,
            b2=optimizer.beta2,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        ),
    )
    transforms = [scale_loss(descent, compute), *_reaction(optimizer, objective), *_ascent(optimizer, objective)]
    if optimizer.ema_decay:
        transforms.append(params_ema(optimizer.ema_decay))
    return optax.with_extra_args_support(optax.chain(*transforms))


def scale_loss(descent: optax.GradientTransformation, compute: DtypeName) -> optax.GradientTransformation:
    """Gradients in fp16 need a scaled loss; λ stays outside, since an overflow says nothing about the gap."""
    return dynamic_loss_scale(descent) if compute == "fp16" else descent


def _reaction(optimizer: OptimizerConfig, objective: ObjectiveConfig) -> list[optax.GradientTransformation]:
    """What moves the learning rate by what training measures."""
    common = {"floor": optimizer.decay_floor, "every": optimizer.updates}
    if optimizer.decay == "period":
        return [length_decay(optimizer.decay_period, **common)]
    if optimizer.decay == "length":
        return [length_decay(Surge(ratio=optimizer.surge_ratio, history=optimizer.surge_history), **common)]
    if optimizer.decay == "discrepancy":
        return [discrepancy_decay(**common)]
    if optimizer.decay == "dual":
        budget = objective.budget
        assert not isinstance(budget, str)
        slowest = 1 / optimizer.decay_floor - 1
        return [
            dual_learning_rate(optimizer.decay_dual_lr, budget=budget, max_slowdown=slowest, every=optimizer.updates)
        ]
    return []


def _ascent(optimizer: OptimizerConfig, objective: ObjectiveConfig) -> list[optax.GradientTransformation]:
    if not objective.has_ascent:
        return []
    return [
        dual_ascent(
            objective.dual_lr,
            budget=objective.budget,
            init_value=objective.initial_multiplier,
            max_value=objective.max_multiplier,
            every=optimizer.updates,
            window=objective.budget_window,
        )
    ]
