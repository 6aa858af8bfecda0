"""What a forward pass asks of the devices that share it.

Models name the axes of their arrays; who has a mesh (`models.parallel`) says where they are, and passes it in.
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
"""Axes of hidden states between layers, which the backward pass finds kept."""
HIDDEN = ("batch", "sequence", "mlp")
"""Axes of what is between an MLP's products, [B, S, F]."""
LOGITS = ("batch", "sequence", "vocab")
TABLE = ("vocab", "embed")
"""Axes of the embedding and of the head."""


class Layout(NamedTuple):
    """How a forward pass is shared; the default is one device."""

    constrain: Callable[[Array, tuple[str | None, ...]], Array] = lambda x, axes: x
    """(x, logical axis of each dimension) -> x, split as they say."""
    attention: Callable[..., Array] = causal_attention
    """`causal_attention`, or what computes the same."""
    lookup: Callable[[Array, Array, jnp.dtype], Array] = lookup
    """`layers.lookup`, or what computes the same."""
    mixture: Mixture = mix
    """`moe.mix`, or what computes the same."""
    column_multiple: int = 1
    """Sequences are padded to a multiple of this (tokens)."""


ONE_DEVICE = Layout()
