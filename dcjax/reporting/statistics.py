"""Accuracies from several samples a problem, and what can be said of them: intervals, differences, p-values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from dcjax.arguments import as_mask

DRAWS = 10_000
"""Of a bootstrap."""


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


def pass_at_k(correct: Bool[np.ndarray, "P n"], k: int) -> Float[np.ndarray, "P"]:
    """The chance that one of k samples is right, without bias from n ≥ k samples: 1 − C(n − c, k) / C(n, k).

    Args:
      correct: of P problems with n samples each; c of a problem's are right.
      k: 1 is the mean accuracy, avg@n.

    Raises:
      ValueError: `k` is outside [1, n].

    References:
      M. Chen et al., Evaluating large language models trained on code (2021), arXiv:2107.03374, equation 1.
    """
    right = as_mask("correct", correct)
    samples = right.shape[1]
    _require_k(k, samples)
    wrong = samples - right.sum(axis=1)
    return 1 - np.array([math.comb(int(count), k) / math.comb(samples, k) for count in wrong])


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """The chance that the answer which most of k samples give is right, without bias from n ≥ k samples: maj@k.

    The mean over all subsets of k samples. Where answers tie, each of them is taken equally often; None does not vote,
    and where nobody votes nothing is right. Right answers are one answer, however they are spelt.

    Args:
      answers: of one problem, n of them.
      correct: which of them are right.
      k: size of the vote.

    Raises:
      ValueError: `k` is outside [1, n].
    """
    samples = len(answers)
    _require_k(k, samples)
    right = sum(correct)
    votes = zip(answers, correct, strict=True)
    wrong = Counter(answer for answer, is_right in votes if not is_right and answer is not None)
    silent = samples - right - wrong.total()
    won = 0.0
    for most in range(1, min(right, k) + 1):
        shared = sum(
            ways * math.comb(silent, k - most - cast) / (1 + ties)
            for (cast, ties), ways in _ballots(list(wrong.values()), most, k - most).items()
        )
        won += math.comb(right, most) * shared
    return won / math.comb(samples, k)


def _ballots(counts: list[int], most: int, room: int) -> Counter[tuple[int, int]]:
    """In how many ways answers that are given so often get at most `most` votes each, and at most `room` together.

    By how many votes that makes together, and how many answers have just `most`.
    """
    ballots = Counter({(0, 0): 1})
    for count in counts:
        longer: Counter[tuple[int, int]] = Counter()
        for (cast, ties), ways in ballots.items():
            for votes in range(min(count, most, room - cast) + 1):
                longer[cast + votes, ties + (votes == most)] += ways * math.comb(count, votes)
        ballots = longer
    return ballots


def _require_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}; of {samples} samples a problem it must lie within 1 and {samples}")


def bootstrap_interval(scores: Sequence[Float[np.ndarray, "P"]], *, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean over sets of problems of each set's mean score.

    The Bayesian bootstrap over problems, with half a problem more at either end, 0 and 1, in each set. Where scores are
    0 or 1, that is Jeffreys' interval; a resampling of the problems alone covers as little as 80% where nearly all of
    30 are solved, and has no width where all are. Coverage by simulation: docs/evaluation.md.

    Args:
      scores: of each set's problems, in [0, 1].
      seed: of the draws.

    References:
      D. B. Rubin, The Bayesian bootstrap, Annals of Statistics 9 (1981).
      L. D. Brown, T. T. Cai and A. DasGupta, Interval estimation for a binomial proportion, Statistical Science (2001).
    """
    lower, upper = _interval(_bootstrap(scores, [(0.0, 1.0)] * len(scores), seed))
    # at the ends as Brown, Cai and DasGupta
    return (
        0.0 if all(not part.any() for part in scores) else lower,
        1.0 if all((part == 1).all() for part in scores) else upper,
    )


@dataclass(frozen=True)
class Difference:
    """Of two policies on the same problems."""

    difference: float
    # 95%
    interval: tuple[float, float]
    # two-sided; below .05 where the interval leaves out 0
    p_value: float


def paired_bootstrap(differences: Sequence[Float[np.ndarray, "P"]], *, seed: int = 0) -> Difference:
    """What two policies differ by, in the mean over sets of problems of each set's mean difference of scores.

    As `bootstrap_interval`, the ends being the largest difference of a set either way; the p-value is twice the share
    of the draws on the other side of 0.

    Args:
      differences: of each set's problems, one score less the other.
      seed: of the draws.
    """
    reaches = [float(np.abs(part).max()) for part in differences]
    draws = _bootstrap(differences, [(-reach, reach) for reach in reaches], seed)
    rarer = min((draws <= 0).sum(), (draws >= 0).sum())
    return Difference(
        difference=float(np.mean([part.mean() for part in differences])),
        interval=_interval(draws),
        p_value=min(1.0, 2 * (1 + int(rarer)) / (1 + DRAWS)),
    )


def bootstrap_weights(problems: int, generator: np.random.Generator) -> Float[np.ndarray, "draws W"]:
    """Dirichlet weights of a set's W = problems + 2 scores, the last two being its ends: 1 a problem, 1/2 an end."""
    of_problems = generator.standard_exponential((DRAWS, problems))
    of_ends = generator.standard_gamma(0.5, (DRAWS, 2))
    weights = np.concatenate([of_problems, of_ends], axis=1)
    return weights / weights.sum(axis=1, keepdims=True)


def _bootstrap(
    parts: Sequence[Float[np.ndarray, "P"]], ends: Sequence[tuple[float, float]], seed: int
) -> Float[np.ndarray, "draws"]:
    """Draws of the mean over parts of a part's mean."""
    generator = np.random.default_rng(seed)
    drawn = [
        bootstrap_weights(len(part), generator) @ np.append(part, both) for part, both in zip(parts, ends, strict=True)
    ]
    return np.mean(drawn, axis=0)


def _interval(draws: Float[np.ndarray, "draws"]) -> tuple[float, float]:
    lower, upper = np.quantile(draws, [0.025, 0.975])
    return float(lower), float(upper)
