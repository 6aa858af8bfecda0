"""Appendix A of paper B: what one step of biased, noisy gradient ascent gains, and at which learning rate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Improvement(NamedTuple):
    """The three terms of eq. 13; their sum bounds E[J(θ_{k+1})] − J(θ_k) from below."""

    signal: float  # η (1 − Lη/2) ‖∇J‖²
    alignment: float  # η (1 − Lη) ⟨∇J, bias⟩
    noise: float  # −(Lη²/2) (variance + ‖bias‖²)

    @property
    def total(self) -> float:
        """The right-hand side of eq. 13."""
        return self.signal + self.alignment + self.noise


def expected_improvement(
    *, gradient: Float[np.ndarray, "P"], bias: Float[np.ndarray, "P"], variance: float, lr: float, curvature: float
) -> Improvement:
    """η(1 − Lη/2)‖∇J‖² + η(1 − Lη)⟨∇J, bias⟩ − (Lη²/2)(variance + ‖bias‖²), for θ ← θ + ηg.

    Args:
      gradient: ∇J(θ).
      bias: E[g] − ∇J(θ).
      variance: E‖g − E[g]‖², summed over coordinates.
      lr: η.
      curvature: L, the largest of −∇²J; on a quadratic with curvature L the bound is an equality.

    Returns:
      The bound's three terms.

    Raises:
      ValueError: a negative variance, or a curvature that is not above 0.

    References:
      Paper B, appendix A, eq. 13.
    """
    _check(variance, curvature)
    return Improvement(
        signal=float(lr * (1 - curvature * lr / 2) * (gradient @ gradient)),
        alignment=float(lr * (1 - curvature * lr) * (gradient @ bias)),
        noise=float(-curvature * lr**2 / 2 * (variance + bias @ bias)),
    )


def best_lr(
    *, gradient: Float[np.ndarray, "P"], bias: Float[np.ndarray, "P"], variance: float, curvature: float
) -> float:
    """η* = (‖∇J‖² + ⟨∇J, bias⟩) / (L (‖∇J + bias‖² + variance)): it maximises eq. 13, and at 2η* nothing is gained.

    Args:
      gradient: ∇J(θ).
      bias: E[g] − ∇J(θ).
      variance: E‖g − E[g]‖², summed over coordinates.
      curvature: L.

    Returns:
      η*, at least 0; 0 where the bias outweighs the gradient, and every step loses.

    Raises:
      ValueError: as `expected_improvement`, or a g that is always 0.

    References:
      Paper B, appendix A, eq. 13, differentiated by η.
    """
    _check(variance, curvature)
    second_moment = float((gradient + bias) @ (gradient + bias) + variance)
    if second_moment == 0:
        raise ValueError("gradient + bias and variance are all 0: no step moves, so none is best")
    return max(0.0, float(gradient @ gradient + gradient @ bias) / (curvature * second_moment))


def quadratic_improvement(
    *,
    parameters: Float[np.ndarray, "P"],
    estimates: Float[np.ndarray, "N P"],
    probabilities: Float[np.ndarray, "N"],
    lr: float,
    curvature: float,
) -> float:
    """E[J(θ + ηg)] − J(θ) for J(θ) = −(L/2)‖θ‖², by summing over the finitely many values of g.

    Args:
      parameters: θ; ∇J(θ) = −Lθ.
      estimates: the values of g, one per row.
      probabilities: of each row.
      lr: η.
      curvature: L.

    Returns:
      The left-hand side of eq. 13.

    Raises:
      ValueError: probabilities that do not sum to 1, or a curvature that is not above 0.

    References:
      Paper B, appendix A.
    """
    _check(0.0, curvature)
    if not (np.all(probabilities >= 0) and abs(probabilities.sum() - 1) <= 1e-9):
        raise ValueError(f"probabilities sum to {probabilities.sum():.12g}; they must be a distribution")
    after = -curvature / 2 * np.sum((parameters + lr * estimates) ** 2, axis=1)
    return float(probabilities @ after + curvature / 2 * (parameters @ parameters))


def _check(variance: float, curvature: float) -> None:
    if not (variance >= 0 and curvature > 0):
        raise ValueError(f"variance {variance} must be at least 0 and curvature {curvature} above 0")
