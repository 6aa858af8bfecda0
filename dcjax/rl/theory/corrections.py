"""What answers to the mismatch make of the policy gradient: expectation and variance of one response's estimate.

Policies are tables over all responses, as in `bounds`. A response y drawn from μ gives g(y) = Σ_t c_t ∇ log π(y_t|s_t),
at the parameters that sampled it, so that π_θ = π_old and clips of π_θ/π_old do nothing. A correction is a function of
`Responses` that returns the coefficients c; without any, c = A. In the formulas p = π(y_t|s_t), q = μ(y_t|s_t), r = p/q
and A = R − E_μ R, the group-relative advantage of an infinite group. Dividing A by a standard deviation or g by the
number of tokens multiplies all alike, since responses are equally long. A dropped token has c = 0.

The sources are those of docs/objectives.md; nothing here is shared with the transforms that it describes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Real
from scipy.special import rel_entr

from dcjax.rl.theory.bounds import Tables, Vectors, state_distributions

Coefficients = Float64[np.ndarray, "R T"]


class Responses(NamedTuple):
    """What a correction may look at: the tokens of all V**T responses."""

    policy: Float64[np.ndarray, "R T"]  # p
    behaviour: Float64[np.ndarray, "R T"]  # q, above 0
    advantages: Float64[np.ndarray, "R 1"]  # A

    @property
    def ratios(self) -> Float64[np.ndarray, "R T"]:
        """r = p/q of each token."""
        return self.policy / self.behaviour

    @property
    def sequence_ratios(self) -> Float64[np.ndarray, "R 1"]:
        """Π_t r of each response."""
        return self.ratios.prod(axis=1, keepdims=True)


class Estimator(NamedTuple):
    """Moments of one response's estimate g."""

    mean: Float64[np.ndarray, "P"]  # E g
    variance: float  # E‖g − E g‖²


Correction = Callable[[Responses], Coefficients]


def gradient_estimators(
    *,
    policy: Tables,
    behaviour: Tables,
    scores: Vectors,
    rewards: Real[np.ndarray, "R"],
    corrections: Mapping[str, Correction],
) -> dict[str, Estimator]:
    """E_{y~μ}[g] and E_{y~μ}‖g − E g‖² under each correction, by enumeration.

    With μ = π and without a correction, E g = ∇J = E_{y~π}[R ∇ log π(y)], the gradient of the trained policy's reward;
    the reward of μ, which is what is deployed, is not looked at.

    Args:
      policy: π, which is trained.
      behaviour: μ, which samples; above 0 everywhere.
      scores: ∇_θ log π(a|s), as `log_linear_policy` returns them.
      rewards: R(y) of each of the V**T responses, the first token most significant.
      corrections: by any names, as in `CORRECTIONS`.

    Returns:
      The moments, by the same names.

    Raises:
      ValueError: tables that do not fit together, rows that are not distributions, rewards of another number than
        responses, or a response that is never sampled.
    """
    probabilities = state_distributions(behaviour)[-1]
    rewards = np.asarray(rewards, np.float64)
    if state_distributions(policy)[-1].shape != probabilities.shape or rewards.shape != probabilities.shape:
        raise ValueError(
            f"policy, behaviour and rewards are of {len(policy)} steps, {len(behaviour)} steps and {rewards.size} "
            f"responses; behaviour has {probabilities.size} responses, and all must be of the same"
        )
    if not np.all(probabilities > 0):
        raise ValueError(
            f"behaviour samples response {int(np.argmin(probabilities))} with probability 0; ratios to it take more"
        )
    advantages = (rewards - probabilities @ rewards)[:, None]
    responses = Responses(_by_response(policy), _by_response(behaviour), advantages)
    token_scores, found = _by_response(scores), {}
    for name, correction in corrections.items():
        estimates = np.einsum("rt,rtp->rp", correction(responses), token_scores)
        mean = probabilities @ estimates
        found[name] = Estimator(mean, float(probabilities @ np.sum((estimates - mean) ** 2, axis=1)))
    return found


def _by_response(tables: Tables | Vectors) -> np.ndarray:
    """[R, T, …]: the entries of each response's tokens; those who share a prefix are next to each other."""
    steps, kinds = len(tables), tables[0].shape[1]
    entries = [table.reshape(-1, *table.shape[2:]) for table in tables]
    return np.stack([np.repeat(entry, kinds ** (steps - 1 - t), axis=0) for t, entry in enumerate(entries)], axis=1)


def uncorrected(responses: Responses) -> Coefficients:
    """c = A: REINFORCE, and GRPO's surrogate at π_θ = π_old, where its clip does nothing."""
    return np.broadcast_to(responses.advantages, responses.policy.shape)


def token_tis(responses: Responses, *, clip_max: float) -> Coefficients:
    """c = A · min(r, C)."""
    return responses.advantages * np.minimum(responses.ratios, clip_max)


def token_mis(responses: Responses, *, clip_max: float) -> Coefficients:
    """c = A · r · 1[r ≤ C]."""
    return icepop(responses, low=0.0, high=clip_max)


def icepop(responses: Responses, *, low: float, high: float) -> Coefficients:
    """c = A · r · 1[low ≤ r ≤ high]."""
    return _kept(responses, (responses.ratios >= low) & (responses.ratios <= high))


def sequence_tis(responses: Responses, *, clip_max: float) -> Coefficients:
    """c = A · min(Π_t r, C); with C = ∞, E g = ∇J."""
    return uncorrected(responses) * np.minimum(responses.sequence_ratios, clip_max)


def sequence_mis(responses: Responses, *, clip_max: float) -> Coefficients:
    """c = A · Π_t r · 1[Π_t r ≤ C]."""
    ratios = responses.sequence_ratios
    return uncorrected(responses) * np.where(ratios <= clip_max, ratios, 0)


def geometric_tis(responses: Responses, *, clip_max: float) -> Coefficients:
    """c = A · min((Π_t r)^(1/T), C)."""
    return uncorrected(responses) * np.minimum(_geometric(responses), clip_max)


def dppo_tv(responses: Responses, *, bound: float, max_ratio: float = 20.0) -> Coefficients:
    """c = A · min(r, C) where A > 0 and p − q ≤ δ, or A ≤ 0 and p − q ≥ −δ."""
    gaps = responses.policy - responses.behaviour
    kept = np.where(responses.advantages > 0, gaps <= bound, gaps >= -bound)
    return np.where(kept, token_tis(responses, clip_max=max_ratio), 0)


def dppo_kl(responses: Responses, *, bound: float, max_ratio: float = 20.0) -> Coefficients:
    """c = A · min(r, C) where the binary KL(q‖p) ≤ δ, or A > 0 and p ≤ q, or A ≤ 0 and p ≥ q."""
    p, q, _ = responses
    kept = (_binary_kl(q, p) <= bound) | np.where(responses.advantages > 0, p <= q, p >= q)
    return np.where(kept, token_tis(responses, clip_max=max_ratio), 0)


def ipo(responses: Responses, *, bound: float, coefficient: float = 0.0) -> Coefficients:
    """c = A · r · 1[|p − q| ≤ ε] − 2κ log r: minus the derivative of −A r on kept tokens + κ (log r)² on all."""
    kept = np.abs(responses.policy - responses.behaviour) <= bound
    return _kept(responses, kept) - 2 * coefficient * np.log(responses.ratios)


def kpop(responses: Responses, *, bound: float) -> Coefficients:
    """c = A · r where the binary KL(p‖q) ≤ φ and KL(q‖p) ≤ φ."""
    p, q, _ = responses
    return _kept(responses, (_binary_kl(p, q) <= bound) & (_binary_kl(q, p) <= bound))


def drpo(responses: Responses, *, bound: float) -> Coefficients:
    """c = r · (A − |A| (p − q)/ε): minus the derivative of −A r + |A| q (r − 1)²/(2ε) by log p."""
    p, q, advantages = responses
    return responses.ratios * (advantages - np.abs(advantages) * (p - q) / bound)


def m2po(responses: Responses, *, bound: float) -> Coefficients:
    """c = A · r, without the largest (log r)² of T, so that its mean over what is left of T is ≤ τ.

    T: A > 0 and r > 1, or A < 0 and r < 1. The source takes the mean over a minibatch; here it is that of an infinite
    one, an expectation under μ, so that a token is dropped if its (log r)² is above a fixed limit. Equal values, of
    which an infinite batch would drop a part, are dropped together.
    """
    logs = np.log(responses.ratios)
    squares, away = logs**2, responses.advantages * logs > 0
    chances = np.broadcast_to(responses.behaviour.prod(axis=1, keepdims=True), logs.shape)[away]
    order = np.argsort(squares[away])
    ordered, chances = squares[away][order], chances[order]
    # means of the smallest rise with their number, so that those within the bound come first
    within = np.cumsum(ordered * chances) / np.cumsum(chances) <= bound
    limit = ordered[~within].min(initial=np.inf)
    return _kept(responses, ~away | (squares < limit))


def opsm(responses: Responses, *, bound: float) -> Coefficients:
    """c = A, but 0 where A < 0 and mean_t(log q − log p) > δ: importance weights are no part of it."""
    dropped = (responses.advantages < 0) & (-np.log(_geometric(responses)) > bound)
    return np.where(dropped, 0, uncorrected(responses))


def vexact(responses: Responses, *, bound: float, max_ratio: float = 2.0) -> Coefficients:
    """c = A · min(r, C) in responses with mean_t(r − 1 − log r) ≤ τ."""
    k3 = np.mean(responses.ratios - 1 - np.log(responses.ratios), axis=1, keepdims=True)
    return np.where(k3 <= bound, token_tis(responses, clip_max=max_ratio), 0)


def seq_mask_tis(responses: Responses, *, low: float, high: float) -> Coefficients:
    """c = A · r in responses with low ≤ (Π_t r)^(1/T) ≤ high."""
    return _kept(responses, (_geometric(responses) >= low) & (_geometric(responses) <= high))


def _kept(responses: Responses, kept: Bool[np.ndarray, "R #T"]) -> Coefficients:
    return np.where(kept, responses.advantages * responses.ratios, 0)


def _geometric(responses: Responses) -> Float64[np.ndarray, "R 1"]:
    return responses.sequence_ratios ** (1 / responses.policy.shape[1])


def _binary_kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KL(a‖b) in nats, of the token against all others."""
    return rel_entr(a, b) + rel_entr(1 - a, 1 - b)


CORRECTIONS: dict[str, Correction] = {
    "none": uncorrected,
    "token weights": partial(token_tis, clip_max=np.inf),
    "sequence weights": partial(sequence_tis, clip_max=np.inf),
    "token TIS": partial(token_tis, clip_max=2.0),
    "sequence TIS": partial(sequence_tis, clip_max=2.0),
    "geometric TIS": partial(geometric_tis, clip_max=2.0),
    "token MIS": partial(token_mis, clip_max=2.0),
    "sequence MIS": partial(sequence_mis, clip_max=2.0),
    "IcePop": partial(icepop, low=0.5, high=5.0),
    "DPPO-TV": partial(dppo_tv, bound=0.15),
    "DPPO-KL": partial(dppo_kl, bound=0.05),
    "IPO": partial(ipo, bound=0.3),
    "IPO, squared": partial(ipo, bound=0.1, coefficient=1e-3),
    "KPop": partial(kpop, bound=2.0),
    "DRPO": partial(drpo, bound=12.5),
    "M2PO": partial(m2po, bound=0.04),
    "OPSM": partial(opsm, bound=1e-4),
    "VeXact": partial(vexact, bound=0.001),
    "seq-mask-tis": partial(seq_mask_tis, low=0.999, high=1.002),
}
"""By name, with their sources' thresholds; the first three take none."""
