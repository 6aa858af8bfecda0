"""Prints the table of corrections in docs/theory.md: how wrong each leaves the policy gradient. Not a recipe.

Every policy is a table of free logits for responses of three tokens from a vocabulary of four: 64 responses and 84
parameters, all enumerated. Of each of 200 pairs the logits are c · normal, c log-uniform in [.5, 5]; a response is
right, R = 1, with a probability that is uniform in [.1, .9] for the pair; and μ ∝ π · exp(s · t), t of Student's
distribution with 2 degrees of freedom, since gaps have heavy tails. The pairs of all gaps are the same but for s.
The last column is of one pair made by hand: a single token, of three.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from statistics import mean
from typing import NamedTuple

import numpy as np

from dcjax.rl.theory import CORRECTIONS, gradient_estimators, log_linear_policy, state_distributions
from dcjax.rl.theory.corrections import uncorrected

KINDS, STEPS, PAIRS = 4, 3, 200
NOISES = {"int8": 0.0015, "int4": 0.055, "large": 0.5}
"""s of each gap: the mean gaps of the quickstart's model in int8 and int4, and one as of a run that is lost."""


class Pair(NamedTuple):
    """Two policies and a reward; `scores` are of the one that is trained."""

    policy: list[np.ndarray]
    behaviour: list[np.ndarray]
    scores: list[np.ndarray]
    rewards: np.ndarray

    @property
    def mean_gap(self) -> float:
        """E_μ |π − μ| of a token."""
        before = state_distributions(self.behaviour)[:-1]
        tables = zip(before, self.policy, self.behaviour, strict=True)
        return float(np.mean([np.sum(d[:, None] * q * np.abs(p - q)) for d, p, q in tables]))


class Outcome(NamedTuple):
    """What one correction makes of the gradient of one pair."""

    bias: float  # ‖E g − ∇J‖ / ‖∇J‖
    variance: float  # E‖g − E g‖², on-policy's being 1
    cosine: float  # of E g and ∇J; NaN where g is always 0


def pairs(noise: float) -> Iterator[Pair]:
    """The family with s = `noise`."""
    rng = np.random.default_rng(0)
    sizes = [KINDS ** (step + 1) for step in range(STEPS)]
    blocks = np.split(np.eye(sum(sizes)), np.cumsum(sizes)[:-1])
    features = [block.reshape(-1, KINDS, sum(sizes)) for block in blocks]
    for _ in range(PAIRS):
        scale = np.exp(rng.uniform(np.log(0.5), np.log(5)))
        policy, scores = log_linear_policy(features, scale * rng.normal(size=sum(sizes)))
        moved = [table * np.exp(noise * rng.standard_t(2, size=table.shape)) for table in policy]
        behaviour = [table / table.sum(axis=1, keepdims=True) for table in moved]
        rewards = np.where(rng.random(KINDS**STEPS) < rng.uniform(0.1, 0.9), 1.0, 0.0)
        yield Pair(policy, behaviour, scores, rewards)


def three_tokens() -> Pair:
    """Rewards 0, ½ and 1; each policy is nearly sure of the middle, and μ takes for bad what π takes for good."""
    behaviour = np.array([[0.02, 0.9798, 0.0002]])
    policy, scores = log_linear_policy([np.eye(3)[None]], np.log(behaviour[0, ::-1]))
    return Pair(policy, [behaviour], scores, np.array([0.0, 0.5, 1.0]))


def outcomes(pair: Pair) -> dict[str, Outcome]:
    """By the correction's name."""
    policy, behaviour, scores, rewards = pair
    known = {"policy": policy, "scores": scores, "rewards": rewards}
    on_policy = gradient_estimators(behaviour=policy, corrections={"": uncorrected}, **known)[""]
    gradient, length, found = on_policy.mean, np.linalg.norm(on_policy.mean), {}
    for name, (expected, variance) in gradient_estimators(
        behaviour=behaviour, corrections=CORRECTIONS, **known
    ).items():
        cosine = expected @ gradient / (np.linalg.norm(expected) * length) if np.any(expected) else np.nan
        bias = np.linalg.norm(expected - gradient) / length
        found[name] = Outcome(float(bias), variance / on_policy.variance, float(cosine))
    return found


def table() -> str:
    """In Markdown: one row a correction, four columns a gap, and the mean gaps in a line."""
    families = {gap: list(pairs(noise)) for gap, noise in NOISES.items()}
    results = {gap: [outcomes(pair) for pair in family] for gap, family in families.items()}
    by_hand = outcomes(three_tokens())
    columns = [f"{gap}: {head}" for gap in NOISES for head in ("bias", "variance", "descends", "worst cosine")]
    columns.append("by hand: cosine")
    lines = ["| correction | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name in CORRECTIONS:
        cells = [cell for gap in NOISES for cell in _cells([result[name] for result in results[gap]])]
        lines.append(f"| {name} | " + " | ".join([*cells, _short(by_hand[name].cosine)]) + " |")
    families["by hand"] = [three_tokens()]
    gaps = [f"{gap} {_short(mean(pair.mean_gap for pair in family))}" for gap, family in families.items()]
    return "\n".join([*lines, "", f"Mean gaps: {', '.join(gaps)}."])


def _cells(found: list[Outcome]) -> list[str]:
    biases, variances, cosines = np.array(found).T
    idle = np.mean(np.isnan(cosines))
    return [
        *(f"{_short(np.median(values))} ({_short(np.quantile(values, 0.9))})" for values in (biases, variances)),
        f"{np.mean(cosines < 0):.1%}" + (f", idle {idle:.1%}" if idle else ""),
        _short(np.nanmin(cosines)),
    ]


def _short(value: float) -> str:
    """Three significant digits without a leading zero; rounding errors are 0."""
    if abs(value) < 1e-9:
        return "0"
    if value >= 1000:
        return f"{value:,.0f}"
    return re.sub(r"\b0\.", ".", f"{value:.3g}") if abs(value) >= 1e-4 else "< .0001"


if __name__ == "__main__":
    summary, details = (__doc__ or "").split("\n", 1)
    argparse.ArgumentParser(description=summary, epilog=details).parse_args()
    print(table())
