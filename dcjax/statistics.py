"""Confidence intervals of measured accuracies."""

import math


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a binomial proportion: the p with |p̂ − p| ≤ z·√(p(1 − p)/n), p̂ = correct/total.

    Unlike p̂ ± z·√(p̂(1 − p̂)/n) it keeps inside [0, 1] and has a width at p̂ = 0 and p̂ = 1, which held-out
    sets of a few hundred prompts do reach.

    Args:
      correct: successes, 0 ≤ correct ≤ total.
      total: independent trials, at least 1.
      z: two-sided normal quantile; the default covers 95%.

    Returns:
      (lower, upper), shares in [0, 1].

    Raises:
      ValueError: if `total` is not positive, or `correct` is outside [0, total].

    References:
      E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if total < 1:
        raise ValueError(f"total is {total}: an interval needs at least one trial")
    if not 0 <= correct <= total:
        raise ValueError(f"correct is {correct}, which is outside [0, {total}]")
    share = correct / total
    shrink = 1.0 / (1.0 + z * z / total)
    centre = shrink * (share + z * z / (2 * total))
    half_width = shrink * z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    # At the ends the bound is exactly 0 or 1, which the difference of two rounded numbers would miss.
    lower = 0.0 if correct == 0 else centre - half_width
    upper = 1.0 if correct == total else centre + half_width
    return lower, upper
