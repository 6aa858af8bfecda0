"""Theorem 3.1 and Lemma B.5 of paper B, both sides of each, by enumeration of every response.

A response has T tokens from a vocabulary of V. The state at step t (from 0) is the prefix of t tokens, numbered in
base V with the first token most significant, so that action a leads from state i to state i·V + a. A policy is T
tables, `policy[t]` of shape [V**t, V]; there are V**T responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Real
from scipy.special import softmax

Tables = Sequence[np.ndarray]
"""float64 [V**t, V] for t = 0 .. T − 1: probabilities of the actions in every state."""

Vectors = Sequence[np.ndarray]
"""float64 [V**t, V, P] for t = 0 .. T − 1: a vector with P entries, one per parameter, for every action and state."""


class StateGaps(NamedTuple):
    """Both sides of Lemma B.5, for t = 0 .. T."""

    distances: Float64[np.ndarray, "T+1"]  # ‖d_t^π − d_t^μ‖₁
    bounds: Float64[np.ndarray, "T+1"]  # 2 t Δ_max


class GradientBias(NamedTuple):
    """Both sides of Theorem 3.1, and what they are made of."""

    gradient: Float64[np.ndarray, "P"]  # ∇J, responses drawn from π
    actual: Float64[np.ndarray, "P"]  # ∇J_actual, responses drawn from μ
    distance: float  # ‖∇J_actual − ∇J‖₂
    bound: float  # 2 B Δ_max T²
    score_bound: float  # B, the largest ‖∇ log π(a|s)‖₂
    largest_gap: float  # Δ_max


def log_linear_policy(
    features: Vectors, parameters: Float[np.ndarray, "P"]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """π(a|s) ∝ exp(φ(s, a)·θ), and its scores ∇_θ log π(a|s) = φ(s, a) − E_π[φ(s, ·)].

    Args:
      features: φ of each step; one-hot in (s, a) they make a free table of logits.
      parameters: θ.

    Returns:
      Probabilities and scores of each step.
    """
    policy = [softmax(phi @ np.asarray(parameters, np.float64), axis=-1) for phi in features]
    return policy, [phi - (pi[..., None] * phi).sum(1, keepdims=True) for phi, pi in zip(features, policy, strict=True)]


def state_distributions(policy: Tables) -> list[np.ndarray]:
    """d_t(s) for t = 0 .. T: d_0 = 1 on the empty prefix, d_{t+1}(s·a) = d_t(s) π(a|s); d_T is of responses.

    Raises:
      ValueError: tables that do not fit together, or rows that are not distributions.
    """
    _check_tables(policy)
    distributions = [np.ones(1)]
    for table in policy:
        distributions.append((distributions[-1][:, None] * table).ravel())
    return distributions


def largest_gap(*, policy: Tables, behaviour: Tables) -> float:
    """Δ_max = max over states of ½ ‖π(·|s) − μ(·|s)‖₁, reachable or not.

    Raises:
      ValueError: policies of different shapes.
    """
    if [table.shape for table in policy] != [table.shape for table in behaviour]:
        raise ValueError(f"policy has {len(policy)} steps, behaviour {len(behaviour)}; their tables must be alike")
    return max(float(np.abs(p - q).sum(axis=1).max()) / 2 for p, q in zip(policy, behaviour, strict=True))


def state_gaps(*, policy: Tables, behaviour: Tables) -> StateGaps:
    """‖d_t^π − d_t^μ‖₁ ≤ 2 t Δ_max, both sides, t from 0.

    Args:
      policy: π.
      behaviour: μ.

    Returns:
      The distances and their bounds for t = 0 .. T.

    Raises:
      ValueError: tables that do not fit together, or rows that are not distributions.

    References:
      Paper B, Lemma B.5.
    """
    gap = largest_gap(policy=policy, behaviour=behaviour)
    pairs = zip(state_distributions(policy), state_distributions(behaviour), strict=True)
    distances = np.array([np.abs(p - q).sum() for p, q in pairs])
    return StateGaps(distances, 2 * gap * np.arange(len(distances)))


def gradient_bias(
    *, policy: Tables, behaviour: Tables, scores: Vectors, rewards: Real[np.ndarray, "R"]
) -> GradientBias:
    """‖∇J_actual − ∇J‖₂ ≤ 2 B Δ_max T², both sides.

    ∇J = E_{y~π}[R(y) Σ_t ∇ log π(y_t|s_t)]; ∇J_actual is the same with y~μ. Nothing is divided by T.

    Args:
      policy: π, the training policy.
      behaviour: μ, the policy that samples.
      scores: ∇_θ log π(a|s), as `log_linear_policy` returns them.
      rewards: R(y) of each of the V**T responses, 0 or 1.

    Returns:
      Both gradients, both sides of the bound, B and Δ_max.

    Raises:
      ValueError: tables that do not fit together, rows that are not distributions, or rewards other than 0 and 1.

    References:
      Paper B, Theorem 3.1.
    """
    rewards = np.asarray(rewards, np.float64)
    responses = state_distributions(policy)[-1].size
    if rewards.shape != (responses,) or not np.all((rewards == 0) | (rewards == 1)):
        raise ValueError(f"rewards must be 0 or 1 for each of the {responses} responses, not {rewards.tolist()}")
    gap = largest_gap(policy=policy, behaviour=behaviour)
    gradient = _policy_gradient(policy, scores, rewards)
    actual = _policy_gradient(behaviour, scores, rewards)
    score_bound = max(float(np.linalg.norm(score, axis=-1).max()) for score in scores)
    return GradientBias(
        gradient,
        actual,
        distance=float(np.linalg.norm(actual - gradient)),
        bound=2 * score_bound * gap * len(policy) ** 2,
        score_bound=score_bound,
        largest_gap=gap,
    )


def _policy_gradient(sampler: Tables, scores: Vectors, rewards: np.ndarray) -> np.ndarray:
    """E_{y~sampler}[R(y) Σ_t score(s_t, y_t)]: each score is weighted by the rewarded responses that go through it."""
    rewarded = state_distributions(sampler)[-1] * rewards
    through = [rewarded.reshape(*score.shape[:2], -1).sum(-1) for score in scores]
    parts = [np.einsum("sa,sap->p", weight, score) for weight, score in zip(through, scores, strict=True)]
    return np.sum(parts, axis=0)


def _check_tables(policy: Tables) -> None:
    kinds = policy[0].shape[-1]
    for step, table in enumerate(policy):
        if table.shape != (kinds**step, kinds):
            raise ValueError(f"the table of step {step} is {table.shape}; it must be {(kinds**step, kinds)}")
        sums = table.sum(axis=1)
        if not (np.all(table >= 0) and np.all(np.abs(sums - 1) <= 1e-9)):
            raise ValueError(
                f"step {step} has a row that sums to {sums[np.argmax(np.abs(sums - 1))]:.12g} or is negative; each "
                "must be a distribution"
            )
