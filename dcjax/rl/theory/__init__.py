"""The papers' statements as functions: each returns the sides of an equation, in float64, for tests and figures."""

from dcjax.rl.theory.bounds import (
    GradientBias,
    StateGaps,
    gradient_bias,
    largest_gap,
    log_linear_policy,
    state_distributions,
    state_gaps,
)
from dcjax.rl.theory.constrained import Optimum, difference_optimum, log_ratio_optimum, ratio_optimum
from dcjax.rl.theory.corrections import CORRECTIONS, Correction, Estimator, Responses, gradient_estimators
from dcjax.rl.theory.first_order import (
    StateUpdate,
    kl_rate,
    penalty_update,
    probability_gap,
    split_update,
    truncated_weights,
)
from dcjax.rl.theory.improvement import Improvement, best_lr, expected_improvement, quadratic_improvement

__all__ = [
    "CORRECTIONS",
    "Correction",
    "Estimator",
    "GradientBias",
    "Improvement",
    "Optimum",
    "Responses",
    "StateGaps",
    "StateUpdate",
    "best_lr",
    "difference_optimum",
    "expected_improvement",
    "gradient_bias",
    "gradient_estimators",
    "kl_rate",
    "largest_gap",
    "log_linear_policy",
    "log_ratio_optimum",
    "penalty_update",
    "probability_gap",
    "quadratic_improvement",
    "ratio_optimum",
    "split_update",
    "state_distributions",
    "state_gaps",
    "truncated_weights",
]
