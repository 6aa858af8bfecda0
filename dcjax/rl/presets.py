"""The objectives of paper A and one of ours, ready-made. What each is reported to do was seen in runs of a tiny model.

    objective, ascent = dc_grpo(updates=4)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b2=0.95), ascent)
    step = make_train_step(apply_fn, tx, surrogate, objective, ...)

All keep groups of equal rewards, as paper A does; `chain(preset.objective, drop_zero_variance())` drops them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import optax

from dcjax.rl.discrepancy import Discrepancy, probability_difference
from dcjax.rl.dual import dual_ascent
from dcjax.rl.penalties import PenaltyShape, hinge
from dcjax.rl.transforms import (
    LossTransform,
    chain,
    direct_penalty,
    discrepancy_penalty,
    group_relative_advantages,
)

MULTIPLIER = 0.1
"""λ0 of paper A for 8B; it has .05 for 30B-A3B."""
DUAL_LR = 1.0
"""η_λ of paper A."""
BUDGET = 0.0037
"""c of paper A for 8B, a probability; it has .0050 for 30B-A3B."""


class Preset(NamedTuple):
    """What `make_train_step` needs."""

    objective: LossTransform
    # goes last into the optimiser's chain; does nothing where λ is fixed or absent
    ascent: optax.GradientTransformationExtraArgs


def grpo() -> Preset:
    """Ã = A: no penalty, λ = 0.

    Seen: at int8 no penalty beat it. With int4 rollouts and a constant learning rate of 6e-4 the deployed policy ends
    at an accuracy of .58 or .61. Decaying the learning rate gives .82 to .87, and averaging the weights .81, so most of
    that loss is not due to the gap.

    Returns:
      The objective; no ascent.
    """
    return Preset(group_relative_advantages(), _no_ascent())


def dual_grpo(*, multiplier: float = MULTIPLIER, discrepancy: Discrepancy = probability_difference) -> Preset:
    """Ã = A − λ · δ with λ fixed (paper A, eqs. 3-4).

    Seen: harmful at 4 bits, where δ̄ even rises with λ: the penalty lowers the probability of every sampled action
    with a large δ, whether the training policy overrates or underrates it. At λ = .3 accuracy was .245, and .655 with
    token TIS, which removes that bias. Unlike `dc_grpo`'s, this λ does not anneal once the gap is closed.

    Args:
      multiplier: λ.
      discrepancy: δ.

    Returns:
      The objective; no ascent.

    Raises:
      ValueError: λ below 0.
    """
    penalty = discrepancy_penalty(discrepancy, multiplier=multiplier)
    return Preset(chain(group_relative_advantages(), penalty), _no_ascent())


def thresholded_dual_grpo(
    *,
    multiplier: float = MULTIPLIER,
    threshold: float = BUDGET,
    shape: Callable[[float], PenaltyShape] = hinge,
    discrepancy: Discrepancy = probability_difference,
) -> Preset:
    """Ã = A − λ · max(δ − c, 0), or A − λ · δ · 1[δ > c] with `shape=gate`; λ fixed (paper A, §5).

    Seen: it softens the effect of too large a λ, since tokens within the tolerance are not penalised. No penalty on the
    advantage gave a repeatable gain at 4 bits.

    Args:
      multiplier: λ.
      threshold: c, in units of δ.
      shape: `hinge` or `gate`.
      discrepancy: δ.

    Returns:
      The objective; no ascent.

    Raises:
      ValueError: λ or c below 0.
    """
    penalty = discrepancy_penalty(discrepancy, shape=shape(threshold), multiplier=multiplier)
    return Preset(chain(group_relative_advantages(), penalty), _no_ascent())


def dc_grpo(
    *,
    updates: int,
    initial_multiplier: float = MULTIPLIER,
    dual_lr: float = DUAL_LR,
    budget: float | Literal["auto"] = BUDGET,
    max_multiplier: float = 1.0,
    discrepancy: Discrepancy = probability_difference,
) -> Preset:
    """Ã = A − λ · δ, λ ← clip(λ + η_λ (δ̄ − c), 0, max) once per iteration (paper A, eqs. 8-11, with its values for 8B).

    Seen: at int8 λ rises, δ̄ falls under the budget and λ anneals to 0; accuracy is the same as without the penalty. At
    4 bits, where the gap cannot fall under the budget, λ saturates while δ̄ rises, and accuracy collapses (fp4: .055
    against GRPO's .731): watch `dual/multiplier` and `dual/discrepancy` together. The paper reports gains at 8B and 30B
    in bf16 and fp8.

    Args:
      updates: optimiser updates per iteration, as given to `make_train_step` (paper A: 4).
      initial_multiplier: λ before the first step.
      dual_lr: η_λ, per unit of δ̄.
      budget: c, in units of δ, or "auto".
      max_multiplier: λ's upper bound (ours; the paper's was not recovered).
      discrepancy: δ; give `make_train_step` the same one.

    Returns:
      The objective and λ's ascent.

    Raises:
      ValueError: what `dual_ascent` refuses.
    """
    ascent = dual_ascent(dual_lr, budget=budget, init_value=initial_multiplier, max_value=max_multiplier, every=updates)
    return Preset(chain(group_relative_advantages(), discrepancy_penalty(discrepancy)), ascent)


def dc_direct(
    *,
    updates: int,
    initial_multiplier: float = MULTIPLIER,
    dual_lr: float = DUAL_LR,
    budget: float | Literal["auto"] = BUDGET,
    max_multiplier: float = 0.5,
    discrepancy: Discrepancy = probability_difference,
) -> Preset:
    """Ã = A, loss += λ · |p_θ − stop_gradient(μ)| on sampled tokens, λ as in `dc_grpo`. Ours, not the paper's.

    Seen, with a linearly decaying learning rate and ten fresh seeds: it brings the two policies together (δ̄ changes by
    −.0020 ± .0010 at int4 and −.0015 ± .0004 at fp4), and the training policy gains accuracy (+.069 ± .020 and
    +.055 ± .011). The deployed policy gains +.020 ± .011 at int4, about half of it mere sharpening, and nothing at fp4
    (−.005 ± .007). A fixed λ of 1 collapsed on one seed of three, hence the bound.

    Args:
      updates: optimiser updates per iteration, as given to `make_train_step` (paper A: 4).
      initial_multiplier: λ before the first step.
      dual_lr: η_λ, per unit of δ̄.
      budget: c, in units of δ, or "auto".
      max_multiplier: λ's upper bound.
      discrepancy: δ; give `make_train_step` the same one.

    Returns:
      The objective and λ's ascent.

    Raises:
      ValueError: what `dual_ascent` refuses.
    """
    ascent = dual_ascent(dual_lr, budget=budget, init_value=initial_multiplier, max_value=max_multiplier, every=updates)
    return Preset(chain(group_relative_advantages(), direct_penalty(discrepancy)), ascent)


def _no_ascent() -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optax.identity())
