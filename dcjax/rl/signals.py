"""What transforms share that follow one number an iteration: its last values, and when to move on."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

State = TypeVar("State")


def on_last_update(every: int, count: Int[Array, ""], moved: State, held: State) -> State:
    """`moved` where update number `count`, from 1, is the last of an iteration's `every`, and `held` elsewhere."""
    return jax.tree.map(lambda new, old: jnp.where(count % every == 0, new, old), moved, held)


def remember(values: Float[Array, "N"], value: Float[Array, ""]) -> Float[Array, "N"]:
    """The new value comes last; the oldest falls out."""
    return jnp.append(values[1:], value)


def mean_of_last(values: Float[Array, "N"], seen: Int[Array, ""], last: int) -> Float[Array, ""]:
    """Over the `last` newest values, or over all where fewer were seen; what was not yet seen is 0, and 0 for none."""
    return jnp.sum(values[-last:]) / jnp.clip(seen, 1, last)


def median_of_last(values: Float[Array, "N"], seen: Int[Array, ""], last: int) -> Float[Array, ""]:
    """Over the `last` newest values, or over all where fewer were seen; at least one was."""
    held = jnp.minimum(seen, last)
    # those that were not yet seen stand in front, and are sorted to the end
    ordered = jnp.sort(jnp.where(jnp.arange(last) < last - held, jnp.inf, values[-last:]))
    return (ordered[(held - 1) // 2] + ordered[held // 2]) / 2
