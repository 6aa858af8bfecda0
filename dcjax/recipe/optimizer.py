"""From a `Config` to its optimiser: one optax chain that holds λ, the learning rate and the average too."""

from __future__ import annotations

from functools import cache

import optax

from dcjax.recipe.config import Config, what_is_compiled
from dcjax.rl.averaging import params_ema
from dcjax.rl.dual import dual_ascent
from dcjax.rl.learning_rate import Surge, discrepancy_decay, dual_learning_rate, length_decay
from dcjax.rl.loss_scale import dynamic_loss_scale


def make_schedule(config: Config) -> optax.Schedule:
    """Learning rate by optimiser update: linear warm-up, then constant, or down to the floor by the last update."""
    optimizer = config.optimizer
    rate, warmup = optimizer.learning_rate, optimizer.warmup_steps
    left = max(config.steps * optimizer.updates - warmup, 1)
    after = {
        "linear": optax.linear_schedule(rate, rate * optimizer.decay_floor, left),
        "cosine": optax.cosine_decay_schedule(rate, left, alpha=optimizer.decay_floor),
    }.get(optimizer.decay, optax.constant_schedule(rate))
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Gradient clip, AdamW, what follows the gap or the length, λ's dual ascent, and the average of the parameters.

    The same one for configs of the same program, whose steps are then compiled once.
    """
    return _make_optimizer(what_is_compiled(config))


@cache
def _make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    optimizer = config.optimizer
    descent = optax.chain(
        optax.clip_by_global_norm(optimizer.max_grad_norm),
        optax.adamw(
            make_schedule(config),
            b1=optimizer.beta1,
            b2=optimizer.beta2,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        ),
    )
    transforms = [scale_loss(config, descent), *_reaction(config), *_ascent(config)]
    if optimizer.ema_decay:
        transforms.append(params_ema(optimizer.ema_decay))
    return optax.with_extra_args_support(optax.chain(*transforms))


def scale_loss(config: Config, descent: optax.GradientTransformation) -> optax.GradientTransformation:
    """Gradients in fp16 need a scaled loss; λ stays outside, since an overflow says nothing about the gap."""
    return dynamic_loss_scale(descent) if config.model.precision.compute == "fp16" else descent


def _reaction(config: Config) -> list[optax.GradientTransformation]:
    """What moves the learning rate by what training measures."""
    optimizer = config.optimizer
    common = {"floor": optimizer.decay_floor, "every": optimizer.updates}
    if optimizer.decay == "period":
        return [length_decay(optimizer.decay_period, **common)]
    if optimizer.decay == "length":
        return [length_decay(Surge(ratio=optimizer.surge_ratio, history=optimizer.surge_history), **common)]
    if optimizer.decay == "discrepancy":
        return [discrepancy_decay(**common)]
    if optimizer.decay == "dual":
        budget = config.objective.budget
        assert not isinstance(budget, str)
        slowest = 1 / optimizer.decay_floor - 1
        return [
            dual_learning_rate(optimizer.decay_dual_lr, budget=budget, max_slowdown=slowest, every=optimizer.updates)
        ]
    return []


def _ascent(config: Config) -> list[optax.GradientTransformation]:
    objective = config.objective
    if not objective.has_ascent:
        return []
    return [
        dual_ascent(
            objective.dual_lr,
            budget=objective.budget,
            init_value=objective.initial_multiplier,
            max_value=objective.max_multiplier,
            every=config.optimizer.updates,
            window=objective.budget_window,
        )
    ]
