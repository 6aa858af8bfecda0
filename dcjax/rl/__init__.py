"""What is learned: pure functions over arrays. Imports types only, never models or serving."""

from dcjax.rl.advantages import group_relative, penalize
from dcjax.rl.discrepancy import probability_difference
from dcjax.rl.losses import clipped_surrogate
from dcjax.rl.metrics import mismatch_metrics
from dcjax.rl.objective import (
    Context,
    Terms,
    chain,
    discrepancy_penalty,
    drop_zero_variance,
    group_relative_advantages,
)
from dcjax.rl.step import make_train_step
from dcjax.rl.transforms import dual_ascent, dynamic_loss_scale

__all__ = [
    "Context",
    "Terms",
    "chain",
    "clipped_surrogate",
    "discrepancy_penalty",
    "drop_zero_variance",
    "dual_ascent",
    "dynamic_loss_scale",
    "group_relative",
    "group_relative_advantages",
    "make_train_step",
    "mismatch_metrics",
    "penalize",
    "probability_difference",
]
