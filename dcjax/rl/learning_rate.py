"""Learning rates that follow what training measures, as factors on Adam's updates.

Each transform stands after Adam, which would normalise the factor away, and outside `dynamic_loss_scale`, which would
hide from it the iterations that overflow. Its state holds `learning_rate_scale`, the factor on the *next* iteration's
updates: read it before the step, like λ. For rates that depend on the step alone, give Adam one of optax's schedules:
`optax.linear_schedule(lr, 0.1 * lr, steps)`, `optax.cosine_decay_schedule(lr, steps, alpha=0.1)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Bool, Float, Int

from dcjax.rl.signals import mean_of_last, median_of_last, on_last_update, remember


@dataclasses.dataclass(frozen=True)
class Surge:
    """What counts as a surge of the mean response length, and the period that follows from it.

    It is detected at the first iteration where the median of the last `recent` lengths exceeds `ratio` × the usual
    length, which is the median of the last `history` lengths. Its onset is estimated as the iteration after the last
    one whose length was at most √ratio × the usual length.

    So `recent` = 3 ignores a single outlier batch. A rise that takes longer than about `history` / 2 iterations to
    multiply the length by `ratio` is growth and not a surge: the usual length follows it. The first iteration that can
    detect a surge is 2 · recent + 1; before it there is no usual length to rise from.

    Raises:
      ValueError: `recent` below 1, a history of fewer than 2 · recent + 1 iterations, a ratio that is not above 1, or a
        period factor that is not above 0.
    """

    ratio: float = 2.0
    """The factor on the usual length above which a length has surged."""
    recent: int = 3
    """Iterations in the recent median."""
    history: int = 24
    """Iterations in the usual length."""
    period_factor: float = 1.8
    """The decay period as a multiple of the onset (paper B's)."""

    def __post_init__(self):
        if not (self.ratio > 1 and self.period_factor > 0):
            raise ValueError(f"ratio {self.ratio} must be above 1 and period_factor {self.period_factor} above 0")
        if not (self.recent >= 1 and self.history > 2 * self.recent):
            raise ValueError(f"recent {self.recent} must be at least 1, and history {self.history} over twice that")


def detect_surge(
    surge: Surge, lengths: Float[Array, "N"], seen: Int[Array, ""]
) -> tuple[Bool[Array, ""], Int[Array, ""]]:
    """Whether there is a surge after `seen` iterations, and the iteration, from 1, that would be its onset.

    Args:
      surge: the definition.
      lengths: mean response lengths of the last N = `surge.history` iterations, the newest last.
      seen: iterations so far, at least 1; where it is below N, the first N − seen lengths are ignored.
    """
    usual = median_of_last(lengths, seen, surge.history)
    surged = median_of_last(lengths, seen, surge.recent) > surge.ratio * usual
    steps = seen - surge.history + 1 + jnp.arange(surge.history)
    calm = (steps >= 1) & (lengths <= math.sqrt(surge.ratio) * usual)
    return surged, jnp.max(jnp.where(calm, steps, 0)) + 1


class LengthDecayState(NamedTuple):
    """How far the halving has come; `optax.tree.get` finds `learning_rate_scale` and `decay_period`."""

    learning_rate_scale: jax.Array  # float32 [], of the next iteration
    decay_period: jax.Array  # int32 [], iterations; 0 until a surge is detected
    lengths: jax.Array  # float32 [N], of the last N iterations, the newest last; N = 1 where the period is given
    count: jax.Array  # int32 [], updates so far


def length_decay(
    decay_period: int | Surge, *, floor: float = 0.1, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Iteration t = 1, 2, … uses max(2^−⌊t / P⌋, floor) × the learning rate: 1, ½, ¼, ⅛, then the floor.

    The period P is given, or it follows from a surge of the response length. In that case the rate is held until the
    surge is detected, and then P = 1.8 × its onset. As t is always counted from iteration 1, the first halving is at
    1.8 × the onset.

    Args:
      decay_period: P in iterations, or the definition of the `Surge` that sets it.
      floor: the smallest factor.
      every: updates in one training iteration.

    Returns:
      A transform that stands after Adam. Its `update` takes `response_length`, the mean of the iteration in tokens,
      unless the period is given. Its state holds `learning_rate_scale` and `decay_period`.

    Raises:
      ValueError: a period or `every` below 1, or a floor outside [0, 1].

    References:
      Paper B (arXiv 2602.01826), section 3.3 and Algorithm 1. The detector is ours.

    Examples:
      The updates of iterations 1 to 5, halved every two iterations, but not below .3:

      >>> tx = length_decay(2, floor=0.3)
      >>> params = updates = jnp.ones(())
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     scaled, state = tx.update(updates, state, params)
      ...     print(round(float(scaled), 2))
      1.0
      0.5
      0.5
      0.3
      0.3
    """
    surge = decay_period if isinstance(decay_period, Surge) else None
    given = 0 if isinstance(decay_period, Surge) else decay_period
    if surge is None and given < 1:
        raise ValueError(f"decay_period {given} must be at least 1")
    _check_arguments(floor=floor, every=every)

    def factor(iteration: Array, period: Array) -> jax.Array:
        halvings = iteration // jnp.maximum(period, 1)
        return jnp.where(period > 0, jnp.maximum(0.5 ** halvings.astype(jnp.float32), floor), 1.0)

    def start():
        period = jnp.asarray(given, jnp.int32)
        lengths = jnp.zeros(1 if surge is None else surge.history, jnp.float32)
        return LengthDecayState(factor(jnp.ones((), jnp.int32), period), period, lengths, jnp.zeros((), jnp.int32))

    def advance(state: LengthDecayState, seen: Array, extra_args: dict[str, Any]):
        period, lengths = state.decay_period, state.lengths
        if surge is not None:
            lengths = remember(lengths, jnp.asarray(extra_args["response_length"], jnp.float32))
            surged, onset = detect_surge(surge, lengths, seen)
            detected = jnp.maximum(jnp.round(surge.period_factor * onset).astype(jnp.int32), 1)
            period = jnp.where((period == 0) & surged, detected, period)
        return state._replace(learning_rate_scale=factor(seen + 1, period), decay_period=period, lengths=lengths)

    return _scale_updates(start, advance, every=every, needs="response_length" if surge else None)


class DiscrepancyDecayState(NamedTuple):
    """How δ̄ compares with its best; `optax.tree.get` finds `learning_rate_scale`."""

    learning_rate_scale: jax.Array  # float32 [], of the next iteration
    best: jax.Array  # float32 [], the smallest mean δ̄ so far; infinite before the first
    recent: jax.Array  # float32 [window], δ̄ of the latest iterations, the newest last
    held: jax.Array  # int32 [], iterations since the last halving
    count: jax.Array  # int32 [], updates so far


def discrepancy_decay(
    *, window: int = 20, tolerance: float = 1.05, floor: float = 0.1, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Halves the learning rate where the mean δ̄ of `window` iterations exceeds `tolerance` × the lowest so far.

    After a halving the window is filled anew, so the next halving is `window` iterations later at the earliest; the
    lowest mean is kept.

    Args:
      window: iterations in the mean.
      tolerance: how many times the lowest mean is tolerated, at least 1.
      floor: the smallest factor.
      every: updates in one training iteration.

    Returns:
      A transform that stands after Adam. Its `update` takes `discrepancy`, δ̄ of the iteration; its state holds
      `learning_rate_scale`.

    Raises:
      ValueError: a window or `every` below 1, a tolerance below 1, or a floor outside [0, 1].

    References:
      Ours; the rule of `optax.contrib.reduce_on_plateau`, with δ̄ in place of the loss.
    """
    if not (window >= 1 and tolerance >= 1):
        raise ValueError(f"window {window} and tolerance {tolerance} must be at least 1")
    _check_arguments(floor=floor, every=every)

    def start():
        return DiscrepancyDecayState(
            learning_rate_scale=jnp.ones((), jnp.float32),
            best=jnp.asarray(jnp.inf, jnp.float32),
            recent=jnp.zeros(window, jnp.float32),
            held=jnp.zeros((), jnp.int32),
            count=jnp.zeros((), jnp.int32),
        )

    def advance(state: DiscrepancyDecayState, seen: Array, extra_args: dict[str, Any]):
        del seen
        discrepancy = jnp.asarray(extra_args["discrepancy"], jnp.float32)
        recent, held = remember(state.recent, discrepancy), state.held + 1
        mean, full = mean_of_last(recent, held, window), held >= window
        halve = full & (mean > tolerance * state.best)
        scale = jnp.where(halve, jnp.maximum(state.learning_rate_scale / 2, floor), state.learning_rate_scale)
        best = jnp.where(full, jnp.minimum(state.best, mean), state.best)
        return state._replace(learning_rate_scale=scale, best=best, recent=recent, held=jnp.where(halve, 0, held))

    return _scale_updates(start, advance, every=every, needs="discrepancy")


class DualLearningRateState(NamedTuple):
    """The multiplier that slows learning down; `optax.tree.get` finds `learning_rate_scale` and `slowdown`."""

    learning_rate_scale: jax.Array  # float32 [], 1 / (1 + slowdown), of the next iteration
    slowdown: jax.Array  # float32 [], s
    count: jax.Array  # int32 [], updates so far


def dual_learning_rate(
    dual_lr: float, *, budget: float, max_slowdown: float = 9.0, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Divides the learning rate by 1 + s; s is 0 at first, and s ← clip(s + η (δ̄ − c), 0, s_max) after each iteration.

    Args:
      dual_lr: η, per unit of δ̄.
      budget: c, the tolerated mean discrepancy (probability).
      max_slowdown: s_max; 9 leaves a tenth of the learning rate.
      every: updates in one training iteration.

    Returns:
      A transform that stands after Adam. Its `update` takes `discrepancy`, δ̄ of the iteration; its state holds
      `learning_rate_scale` and `slowdown`.

    Raises:
      ValueError: a negative rate, budget or bound, or `every` below 1.

    References:
      Ours; dual ascent as in paper A (DCMDP), eq. 11, on the learning rate in place of the penalty.
    """
    if not (dual_lr >= 0 and budget >= 0 and max_slowdown >= 0):
        raise ValueError(f"dual_lr {dual_lr}, budget {budget} and max_slowdown {max_slowdown} must be at least 0")
    _check_arguments(every=every)

    def start():
        return DualLearningRateState(jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))

    def advance(state: DualLearningRateState, seen: Array, extra_args: dict[str, Any]):
        del seen
        excess = jnp.asarray(extra_args["discrepancy"], jnp.float32) - budget
        slowdown = jnp.clip(state.slowdown + dual_lr * excess, 0.0, max_slowdown)
        return state._replace(learning_rate_scale=1 / (1 + slowdown), slowdown=slowdown)

    return _scale_updates(start, advance, every=every, needs="discrepancy")


class SequenceEssState(NamedTuple):
    """The factor on the last update; `optax.tree.get` finds `ess_scale`."""

    ess_scale: jax.Array  # float32 []; 1 before the first update


def scale_by_sequence_ess(base: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Multiplies each update by √min(1, ρ_ess / base), ρ_ess the effective share of the minibatch's whole responses.

    Args:
      base: ρ_ess of on-policy responses, in (0, 1]: 1 for the paper's single-turn tasks, .55 with tools.

    Returns:
      A transform that stands after Adam and its weight decay, as a factor on the learning rate. Its `update` takes
      `sequence_ess`, the minibatch's `metrics.sequence_ess`; its state holds `ess_scale`, the factor that it last used.

    Raises:
      ValueError: a base outside (0, 1].

    References:
      VCPO (arXiv 2602.17616), eq. 5. The bound of 1 is the authors' code's, not the formula's. Their baseline OPOB,
      and their sequence weights, are not part of this.

    Examples:
      >>> tx = scale_by_sequence_ess()
      >>> scaled, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), sequence_ess=jnp.float32(0.25))
      >>> scaled.tolist()
      [0.5, 0.5]
    """
    if not 0 < base <= 1:
        raise ValueError(f"base {base} must lie within (0, 1]")

    def init(params):
        del params
        return SequenceEssState(jnp.ones((), jnp.float32))

    def update(updates, state, params=None, **extra_args):
        del state, params
        if "sequence_ess" not in extra_args:
            raise TypeError("update() needs the extra argument 'sequence_ess', a scalar of the minibatch")
        share = jnp.asarray(extra_args["sequence_ess"], jnp.float32)
        scale = jnp.sqrt(jnp.minimum(share / base, 1.0))
        return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), updates), SequenceEssState(scale)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def learning_rate_scale(opt_state: optax.OptState) -> Float[Array, ""]:
    """The factor on the next iteration's updates: the product over the chain's transforms, 1 if there are none."""
    found = optax.tree.get_all_with_path(opt_state, "learning_rate_scale")
    return math.prod((scale for _, scale in found), start=jnp.ones((), jnp.float32))


def _scale_updates(
    start: Callable[[], Any],
    advance: Callable[[Any, Array, dict[str, Any]], Any],
    *,
    every: int,
    needs: str | None,
) -> optax.GradientTransformationExtraArgs:
    """A transform that multiplies updates by its state's `learning_rate_scale`, which `advance` renews every iteration.

    Args:
      start: returns the first state.
      advance: (state, iterations so far including this one, `update`'s extra arguments) -> the next iteration's state.
      every: updates in one training iteration.
      needs: the extra argument that `update` cannot do without, if there is one.
    """

    def init(params):
        del params
        return start()

    def update(updates, state, params=None, **extra_args):
        del params
        if needs is not None and needs not in extra_args:
            raise TypeError(f"update() needs the extra argument {needs!r}, a scalar of the iteration")
        scaled = jax.tree.map(lambda leaf: (state.learning_rate_scale * leaf).astype(leaf.dtype), updates)
        state = state._replace(count=state.count + 1)
        moved = advance(state, state.count // every, extra_args)
        return scaled, on_last_update(every, state.count, moved, state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def _check_arguments(*, floor: float = 0.0, every: int) -> None:
    if not 0 <= floor <= 1:
        raise ValueError(f"floor {floor} must lie within [0, 1]")
    if every < 1:
        raise ValueError(f"every {every} must be at least 1")
