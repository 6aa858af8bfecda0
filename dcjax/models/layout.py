"""How devices share a forward pass.

Models name the logical axes of their arrays; `models.parallel` maps these to a mesh, and passes the result in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from dcjax.models.attention import causal_attention
from dcjax.models.layers import lookup
from dcjax.models.moe import Mixture, mix
from dcjax.types import Array

RESIDUAL = ("batch", "sequence", None)
"""Axes of hidden states, [B, S, E]."""
SAVED = ("batch", "saved_sequence", None)
"""Axes of hidden states between layers, which are kept for the backward pass."""
HIDDEN = ("batch", "sequence", "mlp")
"""Axes of an MLP's hidden activations, [B, S, F]."""
LOGITS = ("batch", "sequence", "vocab")
"""Axes of logits, [B, S, V]."""
TABLE = ("vocab", "embed")
"""Axes of the embedding and of the head."""


class Layout(NamedTuple):
    """How devices share a forward pass; the default is one device."""

    constrain: Callable[[Array, tuple[str | None, ...]], Array] = lambda x, axes: x
    """(x, logical axis of each dimension) -> x, split along those axes."""
    attention: Callable[..., Array] = causal_attention
    """`causal_attention`, or a function that computes the same."""
    lookup: Callable[[Array, Array, jnp.dtype], Array] = lookup
    """`layers.lookup`, or a function that computes the same."""
    mixture: Mixture = mix
    """`moe.mix`, or a function that computes the same."""
    column_multiple: int = 1
    """Sequences are padded to a multiple of this (tokens)."""
    shares: int = 1
    """Parts of a batch's rows that devices hold."""


ONE_DEVICE = Layout()
