"""Theorem B.1 of paper A: the best policy of one state when its distance from q has a quadratic budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from scipy.optimize import root_scalar
from scipy.special import lambertw

HALVINGS = 120
"""Bisections of ν's interval: enough for the last bit of float64, even where ν is far closer to its bound than to 0."""

LOG_BETA_RANGE = 25.0
"""log β is searched within ± this of the log of the advantages' range."""

BRANCH_POINT = float(np.nextafter(np.exp(-1), 0))
"""The largest κ that is used: W₀'s branch point is at −1/e, where scipy returns NaN."""

SUM_TOLERANCE = 1e-9
"""How far Σ q may be from 1."""


class Optimum(NamedTuple):
    """The best policy within the budget, and the multipliers that certify it."""

    policy: Float64[np.ndarray, "A"]
    beta: float  # of the penalty ½ Σ m²; advantage units
    nu: float  # of Σ π = 1; advantage units
    spent: float  # Σ m² of `policy`: the budget, to rounding


def difference_optimum(
    *, advantages: Float[np.ndarray, "A"], q: Float[np.ndarray, "A"], budget: float, one_sided: bool = False
) -> Optimum:
    """max_π Σ π A subject to Σ m² = ε, m = π − q:  π = max(0, q + (A − ν)/β).

    KKT, with β > 0, π ≥ 0, Σ π = 1 and slack s_a = ν + β m_a − A_a: s_a ≥ 0, and s_a = 0 where π_a > 0.
    One-sided, m = max(π − q, 0): an action with A < ν has π = 0, one with A = ν has π anywhere in [0, q],
    and one with A > ν follows the formula. Tied marginal actions share what is left in proportion to q.

    Args:
      advantages: A, one per action.
      q: the reference policy, every probability positive.
      budget: ε > 0, below what the greedy policy spends.
      one_sided: only π > q counts.

    Returns:
      The global optimum: the problem is convex.

    Raises:
      ValueError: shapes that differ, values that are not finite, q not a positive distribution, or a budget
        that cannot be active (equal advantages, too small for float64, or more than the greedy policy spends).

    References:
      Paper A (DCMDP), Theorem B.1, probability difference; figures 6 and 7.
    """
    advantages, q = _checked(advantages, q, budget)
    return _quadratic_optimum(advantages, q, np.ones_like(q), budget, one_sided)


def ratio_optimum(
    *,
    advantages: Float[np.ndarray, "A"],
    q: Float[np.ndarray, "A"],
    budget: float,
    weighted: bool = False,
    one_sided: bool = False,
) -> Optimum:
    """max_π Σ π A subject to Σ m² = ε, m = π/q − 1:  π = max(0, q + q²(A − ν)/β).

    Weighted, the budget is E_q[m²] = Σ q m² and the formula's q² becomes q.
    KKT, with β > 0, π ≥ 0, Σ π = 1 and slack s_a = ν + β m_a/q_a − A_a (weighted: ν + β m_a − A_a): s_a ≥ 0,
    and s_a = 0 where π_a > 0. One-sided, m = max(π/q − 1, 0), as in `difference_optimum`.

    Args:
      advantages: A, one per action.
      q: the reference policy, every probability positive.
      budget: ε > 0, below what the greedy policy spends.
      weighted: the sum is an expectation under q; False is the plain sum over actions.
      one_sided: only π > q counts.

    Returns:
      The global optimum: the problem is convex.

    Raises:
      ValueError: as `difference_optimum`.

    References:
      Paper A (DCMDP), Theorem B.1, probability ratio; figures 6 and 7.
    """
    advantages, q = _checked(advantages, q, budget)
    return _quadratic_optimum(advantages, q, q if weighted else q**2, budget, one_sided)


def log_ratio_optimum(*, advantages: Float[np.ndarray, "A"], q: Float[np.ndarray, "A"], budget: float) -> Optimum:
    """max_π Σ π A subject to Σ m² = ε, m = log(π/q):  π = q exp(−W₀(−κ)), κ = q(A − ν)/β.

    KKT, with β > 0 and Σ π = 1: A_a − ν = β m_a/π_a for every action, that is m e^{−m} = κ, which has a solution
    for κ ≤ 1/e; π > 0 by itself. The penalty is convex in π_a up to e·q_a (m = 1, the branch point) and concave
    above, so the second-order condition of a single action holds on the branch W₀ only. A budget up to 1 keeps
    every |m| under 1: the problem is then convex and this is its global optimum. Above 1 it is the best policy
    with π ≤ e·q, and a policy on the other branch may be better.

    Args:
      advantages: A, one per action.
      q: the reference policy, every probability positive.
      budget: ε > 0.

    Returns:
      The optimum with every action on W₀.

    Raises:
      ValueError: as `difference_optimum`, or a budget above 1 that takes an action to e·q.

    References:
      Paper A (DCMDP), Theorem B.1, log-probability difference; figure 6. Corless et al. (1996) for W₀.
    """
    advantages, q = _checked(advantages, q, budget)

    def solve(centred: np.ndarray, beta: float) -> Optimum:
        def policy(nu: float) -> np.ndarray:
            # beyond the branch point the best policy with π ≤ e·q stays at e·q, which keeps the search for β monotone
            return q * np.exp(-lambertw(-np.minimum(q * (centred - nu) / beta, BRANCH_POINT)).real)

        nu = _sum_to_one(policy, centred)
        return Optimum(policy(nu), beta, nu, float(np.sum(np.log(policy(nu) / q) ** 2)))

    optimum = _activate(solve, advantages, budget)
    kappa = q * (advantages - optimum.nu) / optimum.beta
    if np.any(kappa >= BRANCH_POINT):
        raise ValueError(
            f"budget {budget} takes action {int(np.argmax(kappa))} to e·q, where the log penalty stops being convex "
            "and W₀ ends; a budget of at most 1 never does"
        )
    return optimum


def _checked(advantages: np.ndarray, q: np.ndarray, budget: float) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64."""
    advantages, q = np.asarray(advantages, np.float64), np.asarray(q, np.float64)
    if not (advantages.ndim == 1 and advantages.shape == q.shape and np.all(np.isfinite(advantages))):
        raise ValueError(f"advantages {advantages.tolist()} must be finite, one for each of q {q.tolist()}")
    if not (np.all(q > 0) and abs(q.sum() - 1) <= SUM_TOLERANCE):
        raise ValueError(f"q {q.tolist()} sums to {q.sum():.12g}; it must be positive and sum to 1")
    if not budget > 0:
        raise ValueError(f"budget {budget} must be above 0: at 0 the policy is q, whatever the advantages")
    if np.ptp(advantages) == 0:
        raise ValueError(f"advantages are all {advantages[0]}: q is optimal and no budget is active")
    return advantages, q


def _quadratic_optimum(
    advantages: np.ndarray, q: np.ndarray, scale: np.ndarray, budget: float, one_sided: bool
) -> Optimum:
    """The optimum for the budget Σ (π − q)²/scale, where each π moves by scale · (A − ν)/β."""
    policy_at = _one_sided_policy if one_sided else _two_sided_policy

    def solve(centred: np.ndarray, beta: float) -> Optimum:
        policy, nu = policy_at(centred, q, scale / beta)
        moved = np.maximum(policy - q, 0) if one_sided else policy - q
        return Optimum(policy, beta, nu, float(np.sum(moved**2 / scale)))

    return _activate(solve, advantages, budget)


def _two_sided_policy(advantages: np.ndarray, q: np.ndarray, rate: np.ndarray) -> tuple[np.ndarray, float]:
    """π = max(0, q + rate · (A − ν)), and ν."""

    def policy(nu: float) -> np.ndarray:
        return np.maximum(0, q + rate * (advantages - nu))

    nu = _sum_to_one(policy, advantages)
    return policy(nu), nu


def _one_sided_policy(advantages: np.ndarray, q: np.ndarray, rate: np.ndarray) -> tuple[np.ndarray, float]:
    """0 where A < ν, q + rate · (A − ν) where A > ν, and what is left to 1 where A = ν; and ν."""

    def above(nu: float) -> np.ndarray:
        return np.where(advantages > nu, q + rate * (advantages - nu), 0)

    nu = _sum_to_one(above, advantages)
    # Σ falls by q at ν = A: where it jumps over 1, ν is that A and the action takes the rest
    nearest = float(advantages[np.argmin(np.abs(advantages - nu))])
    marginal = advantages == nearest
    left, room = 1 - above(nearest).sum(), q[marginal].sum()
    if 0 <= left <= room:
        return np.where(marginal, q * left / room, above(nearest)), nearest
    return above(nu), nu


def _sum_to_one(policy: Callable[[float], np.ndarray], advantages: np.ndarray) -> float:
    """ν by bisection: Σ π(ν) decreases, is at least 1 just below the least advantage and at most 1 at the largest."""
    low, high = float(advantages.min()), float(advantages.max())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if policy(middle).sum() >= 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _activate(solve: Callable[[np.ndarray, float], Optimum], advantages: np.ndarray, budget: float) -> Optimum:
    """The optimum at the β that spends the whole budget; what is spent decreases with β."""
    # from the largest advantage, near which ν lies when β is small: there float64 is finest
    ceiling, unit = advantages.max(), float(np.ptp(advantages))

    def at(log_beta: float) -> Optimum:
        return solve(advantages - ceiling, unit * np.exp(log_beta))

    def excess(log_beta: float) -> float:
        return float(np.log(max(at(log_beta).spent, np.finfo(np.float64).tiny) / budget))

    most, least = at(-LOG_BETA_RANGE).spent, at(LOG_BETA_RANGE).spent
    if budget >= most:
        raise ValueError(f"budget {budget} is too large to be active: it must be below {most:.6g}")
    if budget <= least:
        raise ValueError(f"budget {budget} is too small for float64: it must be above {least:.6g}")
    found = root_scalar(excess, bracket=(-LOG_BETA_RANGE, LOG_BETA_RANGE), method="brentq", xtol=1e-14)
    optimum = at(found.root)
    return optimum._replace(nu=optimum.nu + float(ceiling))
