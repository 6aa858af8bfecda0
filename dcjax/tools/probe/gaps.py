"""How far apart the log-probs of two policies are, and where; all arrays are on the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from dcjax.arguments import masks
from dcjax.rl.metrics import mismatch_metrics
from dcjax.types import Array, Rollout

WORST = 10
"""How many of the worst tokens are shown."""
CONTEXT = 24
"""How many tokens are shown before each of them; a third as many are shown after it."""
FIGURES = (
    *("prob_diff_mean", "prob_diff_p50", "prob_diff_p90", "prob_diff_p99", "prob_diff_max"),
    *("k3", "log_ppl_abs_diff", "log_ppl_abs_diff_per_token"),
)
"""The figures of a gap, named by `mismatch_metrics`, which says what each is."""
Gap = dict[str, float]
"""The FIGURES of one gap, by name."""
Logps = Float[Array, "B T"]


@dataclass(frozen=True)
class Stage:
    """What one source adds: the gap to the policy before, and to the trainer."""

    name: str
    detail: str
    own: Gap
    cumulative: Gap


_metrics = jax.jit(mismatch_metrics)


@masks("mask")
def gap(*, old_logps: Logps, rollout_logps: Logps, mask: Bool[Array, "B T"]) -> Gap:
    """The FIGURES of the gap between two policies' log-probs of the same tokens."""
    measured = jax.device_get(_metrics(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask))
    return {name: float(measured[name]) for name in FIGURES}


@masks("mask")
def decompose(trained: Logps, policies: Sequence[tuple[str, str, Logps]], mask: Bool[Array, "B T"]) -> list[Stage]:
    """A stage for each policy: name, detail and log-probs, in the order of the ladder."""
    stages, before = [], trained
    for name, detail, logps in policies:
        own = gap(old_logps=before, rollout_logps=logps, mask=mask)
        cumulative = gap(old_logps=trained, rollout_logps=logps, mask=mask)
        stages.append(Stage(name, detail, own, cumulative))
        before = logps
    return stages


@masks("mask")
def bucketed(
    difference: Float[np.ndarray, "B T"], of: Float[np.ndarray, "B T"], edges: Sequence[float], mask: np.ndarray
) -> list[dict[str, float]]:
    """δ in buckets of `of`, each from one edge up to but not including the next; empty buckets are left out."""
    place = np.digitize(of, edges[1:-1])
    rows = []
    for bucket, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = difference[mask & (place == bucket)]
        if len(inside):
            figures = {"prob_diff_mean": float(inside.mean()), "prob_diff_max": float(inside.max())}
            rows.append({"from": low, "to": high, "tokens": len(inside)} | figures)
    return rows


def position_edges(length: int) -> list[int]:
    """0, 1, 2, 4, ... until a response of `length` tokens is covered."""
    return [0, *(2**power for power in range(max(length - 1, 0).bit_length() + 1))]


@masks("mask")
def by_layer(
    residuals: Float[np.ndarray, "N T L E"], reference: Float[np.ndarray, "N T L E"], mask: Bool[np.ndarray, "N T"]
) -> list[dict[str, float]]:
    """‖x − r‖ / ‖r‖ of the residual stream after each layer, both norms over all tokens of the mask at once."""

    def norm(x: np.ndarray) -> float:
        return float(np.linalg.norm(x[mask].astype(np.float64)))

    rows = []
    for layer in range(reference.shape[2]):
        x, r = (values[:, :, layer].astype(np.float32) for values in (residuals, reference))
        rows.append({"layer": layer, "relative_error": norm(x - r) / norm(r)})
    return rows


def worst_tokens(
    rollout: Rollout, *, old_logps: Logps, rollout_logps: Logps, decode: Callable[[list[int]], str], count: int = WORST
) -> list[dict[str, Any]]:
    """The tokens with the largest δ, in their context; characters that do not print are escaped."""
    mask, width = np.asarray(rollout.response_mask), rollout.response_mask.shape[1]
    old, sampled = np.exp(old_logps), np.exp(rollout_logps)
    difference = np.where(mask, np.abs(old - sampled), -1.0)
    rows = []
    for place in np.argsort(-difference, axis=None, kind="stable")[: min(count, int(mask.sum()))]:
        row, position = divmod(int(place), width)
        real = np.asarray(rollout.attention_mask[row])
        at = len(real) - width + position
        before, behind = (
            np.asarray(rollout.tokens[row])[part][real[part]] for part in (slice(at), slice(at + 1, None))
        )
        pieces = {
            "before": before[-CONTEXT:],
            "token": np.asarray(rollout.tokens[row])[[at]],
            "behind": behind[: CONTEXT // 3],
        }
        rows.append(
            {"response": row, "position": position}
            | {name: visible(decode(ids.tolist())) for name, ids in pieces.items()}
            | {"trained": float(old[row, position]), "sampled": float(sampled[row, position])}
            | {"prob_diff": float(difference[row, position])}
        )
    return rows


def visible(text: str) -> str:
    """The text with escapes for what does not print: control characters, marks of direction, halves of surrogates."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def changed_experts(trained: Int[np.ndarray, "B S k M"], sampled: np.ndarray, fed: Bool[np.ndarray, "B S"]) -> Gap:
    """The shares of the fed tokens that any sparse layer, and that the mean sparse layer, sent to other experts."""
    changed = np.any(np.sort(trained, axis=-1) != np.sort(sampled, axis=-1), axis=-1)[fed]
    return {"any_layer": float(changed.any(axis=-1).mean()), "mean_layer": float(changed.mean())}
