"""What the training forward multiplies where that is not its parameters and activations as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dcjax.types import Array


def _as_it_is(name: str, leaf: Array) -> Array:
    del name
    return leaf


def _unchanged(x: Array) -> Array:
    return x


def _all_unchanged(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
    return q, k, v


@dataclass(frozen=True)
class Numerics:
    """Roundings of a forward pass, which its backward pass does not see; equal ones share compiled programs."""

    weight: Callable[[str, Array], Array] = _as_it_is
    """(a parameter's name, the parameter, of one layer) -> what is used in its place."""
    rows: Callable[[Array], Array] = _unchanged
    """(activations [..., K]) -> what meets a kernel or the head in their place, perhaps in a wider dtype."""
    attended: Callable[[Array, Array, Array], tuple[Array, ...]] = _all_unchanged
    """(q [B, S, H, D], k [B, S, K, D], v [B, S, K, D]) -> the operands of `causal_attention` in their place."""


MASTERS = Numerics()
"""Nothing is rounded."""
