"""Random keys of one named implementation, so that samples do not depend on JAX's default (JAX_DEFAULT_PRNG_IMPL)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import UInt32

from dcjax.types import Array

IMPLEMENTATION = "threefry2x32"


def make_key(seed: int) -> jax.Array:
    """The key of a seed, at least 0."""
    return jax.random.key(seed, impl=IMPLEMENTATION)


def as_key(data: UInt32[Array, "*N 2"]) -> jax.Array:
    """The keys [*N] of raw key data."""
    return jax.random.wrap_key_data(jnp.asarray(data), impl=IMPLEMENTATION)


def require_key(key: jax.Array) -> None:
    """Refuses a key of another implementation.

    Raises:
      ValueError: it is of one; JAX_DEFAULT_PRNG_IMPL may have made it so.
    """
    if (found := str(jax.random.key_impl(key))) != IMPLEMENTATION:
        raise ValueError(f"the key is of {found}; make it by dcjax.keys.make_key(seed), which is of {IMPLEMENTATION}")
