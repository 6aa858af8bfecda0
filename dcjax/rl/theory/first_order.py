"""What the published penalty does to one state, to first order: the expected update of its logits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64


def probability_gap(*, policy: Float[np.ndarray, "A"], behaviour: Float[np.ndarray, "A"]) -> Float64[np.ndarray, "A"]:
    """δ = |π − μ| of every action, whether sampled or not.

    Args:
      policy: π, the training policy.
      behaviour: μ, what the serving engine samples from.

    References:
      Paper A (DCMDP), eq. 2.
    """
    return np.abs(np.asarray(policy, np.float64) - behaviour)


def truncated_weights(
    *, policy: Float[np.ndarray, "A"], behaviour: Float[np.ndarray, "A"], clip_max: float
) -> Float64[np.ndarray, "A"]:
    """Token TIS, w = min(π/μ, C), of every action.

    Args:
      policy: π.
      behaviour: μ, positive.
      clip_max: C; infinity truncates nothing.

    Raises:
      ValueError: a C that is not above 0.

    References:
      Paper B, section 2.1.
    """
    if not clip_max > 0:
        raise ValueError(f"clip_max {clip_max} must be above 0")
    return np.minimum(np.asarray(policy, np.float64) / behaviour, clip_max)


def penalty_update(
    *,
    policy: Float[np.ndarray, "A"],
    behaviour: Float[np.ndarray, "A"],
    discrepancy: Float[np.ndarray, "A"],
    multiplier: float,
    weights: Float[np.ndarray, "A"] | None = None,
) -> Float64[np.ndarray, "A"]:
    """E_{a~μ}[−λ w_a δ_a ∇_z log π_a] = −λ (μ⊙w⊙δ − (μ·(w⊙δ)) π), z the logits of π.

    The gradient that the penalty −λδ in the advantage adds to one state's logits, at π_θ = π_old, where the
    surrogate's ratio is 1 and nothing is clipped. Every sample lowers its own logit, whether π or μ is the larger.
    Without weights and with one δ for all actions it is λδ (π − μ), exactly ascent on KL(μ‖π). With
    w = π/μ it is the gradient of −λ Σ π δ at fixed δ, which is 0 where δ is the same for all actions.

    Args:
      policy: π.
      behaviour: μ.
      discrepancy: δ, under stop-gradient; |π − μ| in the published form.
      multiplier: λ.
      weights: w, importance weights under stop-gradient; none is w = 1.

    Returns:
      The direction in which gradient ascent moves the logits; it sums to 0.

    Raises:
      ValueError: π or μ not a distribution.

    References:
      Paper A (DCMDP), eqs. 3-4, under sampling from μ; weights from paper B, section 2.1. The analysis is ours.
    """
    policy, behaviour = _distribution(policy, "policy"), _distribution(behaviour, "behaviour")
    pushed = behaviour * discrepancy * (1.0 if weights is None else weights)
    return -multiplier * (pushed - pushed.sum() * policy)


class StateUpdate(NamedTuple):
    """The two parts of the expected update of one state's logits; their sum is the update."""

    within: Float64[np.ndarray, "A"]
    """μ ⊙ (a − ā): what tells the state's actions apart."""
    drift: Float64[np.ndarray, "A"]
    """ā (μ − π): towards μ if the state's mean advantage ā = Σ_v μ_v a_v is above 0, and away from it below."""


def split_update(
    *,
    policy: Float[np.ndarray, "A"],
    behaviour: Float[np.ndarray, "A"],
    advantages: Float[np.ndarray, "A"],
) -> StateUpdate:
    """E_{a~μ}[a ∇_z log π] = μ ⊙ a − (μ·a) π = μ ⊙ (a − ā) + ā (μ − π), z the logits of π.

    The first part is that of the centred advantages a − ā; the second has the rate −ā ‖π − μ‖² of KL(μ‖π), so that a
    penalty, whose mean is below 0, drives the policies apart by it.

    Args:
      policy: π.
      behaviour: μ.
      advantages: a of every action, such as −λδ of the published penalty.

    Raises:
      ValueError: π or μ not a distribution.

    References:
      The analysis is ours, of paper A (DCMDP), eqs. 3-4; score centering (arXiv 2609.20807) takes out the second part.
    """
    policy, behaviour = _distribution(policy, "policy"), _distribution(behaviour, "behaviour")
    mean = float(behaviour @ advantages)
    return StateUpdate(behaviour * (np.asarray(advantages, np.float64) - mean), mean * (behaviour - policy))


def kl_rate(
    *, policy: Float[np.ndarray, "A"], behaviour: Float[np.ndarray, "A"], update: Float[np.ndarray, "A"]
) -> float:
    """⟨∇_z KL(μ‖π), update⟩ = (π − μ)·update: above 0, the update drives π away from μ.

    Args:
      policy: π.
      behaviour: μ.
      update: the direction in which the logits of π move.

    Returns:
      The change of KL(μ‖π), in nats, per unit of learning rate.

    Raises:
      ValueError: π or μ not a distribution.
    """
    return float((_distribution(policy, "policy") - _distribution(behaviour, "behaviour")) @ update)


def _distribution(probabilities: np.ndarray, name: str) -> np.ndarray:
    """In float64."""
    probabilities = np.asarray(probabilities, np.float64)
    if not (np.all(probabilities >= 0) and abs(probabilities.sum() - 1) <= 1e-9):
        raise ValueError(
            f"{name} {probabilities.tolist()} sums to {probabilities.sum():.12g}; it must be a distribution"
        )
    return probabilities
