"""Statistics of accuracies from several samples per problem: intervals, paired differences and p-values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from dcjax.arguments import as_mask

DRAWS = 10_000
"""Number of draws of a bootstrap."""


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a binomial proportion: the p with |p̂ − p| ≤ z·√(p(1 − p)/n), p̂ = correct/total.

    Unlike p̂ ± z·√(p̂(1 − p̂)/n), it stays within [0, 1] and has a positive width at p̂ = 0 and p̂ = 1, which occur with
    held-out sets of a few hundred prompts.

    Args:
      correct: successes, 0 ≤ correct ≤ total.
      total: independent trials, at least 1.
      z: two-sided normal quantile; the default covers 95%.

    Returns:
      (lower, upper), proportions in [0, 1].

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
    # At the ends the bound is exactly 0 or 1, which the difference of two rounded numbers may miss.
    lower = 0.0 if correct == 0 else centre - half_width
    upper = 1.0 if correct == total else centre + half_width
    return lower, upper


def pass_at_k(correct: Bool[np.ndarray, "P n"], k: int) -> Float[np.ndarray, "P"]:
    """Unbiased estimates of the probability that at least one of k samples is right: 1 − C(n − c, k) / C(n, k).

    Args:
      correct: which of the n ≥ k samples of each of P problems are right; c of a problem's samples are.
      k: number of samples; at 1 the result is the mean accuracy, avg@n.

    Returns:
      One estimate per problem.

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
    """maj@k of one problem: an unbiased estimate of the probability that a majority vote of k samples is right.

    It is the mean over all subsets of k of the n ≥ k samples. Of answers that tie, each wins equally often. A sample
    without an answer, None, does not vote, and a subset without votes is wrong. All right answers count as one answer,
    however they are written.

    Args:
      answers: the answers of the n samples.
      correct: which of them are right.
      k: number of samples in a vote.

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
    for votes in range(1, min(right, k) + 1):
        # The other k - votes samples are wrong or silent, and each tie with a wrong answer takes a share of the win.
        wins_among_others = sum(
            subsets * math.comb(silent, k - votes - wrong_votes) / (1 + ties)
            for (wrong_votes, ties), subsets in _count_wrong_subsets(list(wrong.values()), votes, k - votes).items()
        )
        won += math.comb(right, votes) * wins_among_others
    return won / math.comb(samples, k)


def _count_wrong_subsets(counts: list[int], max_votes: int, max_total: int) -> Counter[tuple[int, int]]:
    """Counts the subsets of the wrong samples in which no answer has more than `max_votes` votes.

    Args:
      counts: how many samples give each wrong answer.
      max_votes: the most votes that one answer may have.
      max_total: the most votes that all answers may have together.

    Returns:
      The number of subsets, by their total of votes and by how many answers have exactly `max_votes`.
    """
    subsets = Counter({(0, 0): 1})
    for count in counts:
        extended: Counter[tuple[int, int]] = Counter()
        for (total, ties), ways in subsets.items():
            for votes in range(min(count, max_votes, max_total - total) + 1):
                extended[total + votes, ties + (votes == max_votes)] += ways * math.comb(count, votes)
        subsets = extended
    return subsets


def _require_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}; with {samples} samples per problem it must be between 1 and {samples}")


def bootstrap_interval(scores: Sequence[Float[np.ndarray, "P"]], *, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean, over sets of problems, of each set's mean score.

    This is the Bayesian bootstrap over problems, with half a problem of score 0 and half a problem of score 1 added to
    each set. If all scores are 0 or 1, it is Jeffreys' interval. Resampling the problems alone would cover as little as
    80% if nearly all of 30 problems are solved, and would have no width if all are. docs/evaluation.md has the coverage
    by simulation.

    Args:
      scores: for each set, the scores of its problems in [0, 1].
      seed: random seed of the draws.

    Returns:
      (lower, upper).

    References:
      D. B. Rubin, The Bayesian bootstrap, Annals of Statistics 9 (1981).
      L. D. Brown, T. T. Cai and A. DasGupta, Interval estimation for a binomial proportion, Statistical Science (2001).
    """
    lower, upper = _interval(_bootstrap(scores, [(0.0, 1.0)] * len(scores), seed))
    # At the ends the bound is 0 or 1, as Brown, Cai and DasGupta recommend.
    return (
        0.0 if all(not part.any() for part in scores) else lower,
        1.0 if all((part == 1).all() for part in scores) else upper,
    )


@dataclass(frozen=True)
class Difference:
    """How two policies differ on the same problems."""

    difference: float
    """The mean difference of their scores."""
    interval: tuple[float, float]
    """The 95% interval of the difference."""
    p_value: float
    """Two-sided; below 0.05 if the interval excludes 0."""


def paired_bootstrap(differences: Sequence[Float[np.ndarray, "P"]], *, seed: int = 0) -> Difference:
    """The difference of two policies: the mean, over sets of problems, of each set's mean difference of scores.

    The bootstrap is that of `bootstrap_interval`, except that the two half problems have plus and minus the largest
    absolute difference in the set. The p-value is twice the share of the draws on the rarer side of 0.

    Args:
      differences: for each set and each of its problems, the first policy's score minus the second's.
      seed: random seed of the draws.
    """
    largest = [float(np.abs(part).max()) for part in differences]
    draws = _bootstrap(differences, [(-end, end) for end in largest], seed)
    rarer_side = min((draws <= 0).sum(), (draws >= 0).sum())
    return Difference(
        difference=float(np.mean([part.mean() for part in differences])),
        interval=_interval(draws),
        p_value=min(1.0, 2 * (1 + int(rarer_side)) / (1 + DRAWS)),
    )


def paired_t(differences: Sequence[float]) -> Difference:
    """The mean of paired differences with Student's 95% interval and two-sided p-value.

    Args:
      differences: at least two. Where all are equal, the interval has no width, and p is 0, or 1 where they are 0.
    """
    from scipy import stats

    values = np.asarray(differences, np.float64)
    mean, error = float(values.mean()), float(stats.sem(values))
    half_width = error * float(stats.t.ppf(0.975, len(values) - 1))
    p_value = 2 * float(stats.t.sf(abs(mean) / error, len(values) - 1)) if error else float(mean == 0)
    return Difference(mean, (mean - half_width, mean + half_width), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those below α keeps the chance of any false rejection below α.

    References:
      S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def welch_interval(first: Sequence[float], last: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of mean(last) − mean(first) by Welch's t, as of independent values with variances of their own.

    Args:
      first: at least two values, the mean rewards of some iterations, say.
      last: likewise.

    Returns:
      (lower, upper); without a width where neither side varies.

    References:
      B. L. Welch, The generalization of 'Student's' problem, Biometrika 34 (1947).
    """
    from scipy import stats

    if len({*first}) == len({*last}) == 1:
        return last[0] - first[0], last[0] - first[0]
    lower, upper = stats.ttest_ind(last, first, equal_var=False).confidence_interval(0.95)
    return float(lower), float(upper)


def bootstrap_weights(problems: int, generator: np.random.Generator) -> Float[np.ndarray, "draws W"]:
    """Dirichlet weights of W = problems + 2 scores, with parameter 1 per problem and 1/2 for the two ends."""
    problem_weights = generator.standard_exponential((DRAWS, problems))
    end_weights = generator.standard_gamma(0.5, (DRAWS, 2))
    weights = np.concatenate([problem_weights, end_weights], axis=1)
    return weights / weights.sum(axis=1, keepdims=True)


def _bootstrap(
    parts: Sequence[Float[np.ndarray, "P"]], ends: Sequence[tuple[float, float]], seed: int
) -> Float[np.ndarray, "draws"]:
    """Draws of the mean, over parts, of the weighted mean of each part and its two ends."""
    generator = np.random.default_rng(seed)
    part_draws = [
        bootstrap_weights(len(part), generator) @ np.append(part, part_ends)
        for part, part_ends in zip(parts, ends, strict=True)
    ]
    return np.mean(part_draws, axis=0)


def _interval(draws: Float[np.ndarray, "draws"]) -> tuple[float, float]:
    lower, upper = np.quantile(draws, [0.025, 0.975])
    return float(lower), float(upper)
