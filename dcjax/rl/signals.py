"""For optax transforms that follow one number per iteration: its latest values, and when an iteration ends."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

State = TypeVar("State")


def on_last_update(every: int, count: Int[Array, ""], moved: State, held: State) -> State:
    """`moved` if update number `count`, from 1, is the last of its iteration's `every` updates; otherwise `held`."""
    return jax.tree.map(lambda new, old: jnp.where(count % every == 0, new, old), moved, held)


def remember(values: Float[Array, "N"], value: Float[Array, ""]) -> Float[Array, "N"]:
    """The values with the new one at the end and without the oldest."""
    return jnp.append(values[1:], value)


def mean_of_last(values: Float[Array, "N"], seen: Int[Array, ""], last: int) -> Float[Array, ""]:
    """Mean of the `last` newest values, or of the `seen` ones if fewer; values not yet seen are 0. 0 if none was."""
    return jnp.sum(values[-last:]) / jnp.clip(seen, 1, last)


def median_of_last(values: Float[Array, "N"], seen: Int[Array, ""], last: int) -> Float[Array, ""]:
    """Median of the `last` newest values, or of the `seen` ones if fewer; `seen` is at least 1."""
    held = jnp.minimum(seen, last)
    # values not yet seen are at the front, and as infinities they are sorted to the end
    ordered = jnp.sort(jnp.where(jnp.arange(last) < last - held, jnp.inf, values[-last:]))
    return (ordered[(held - 1) // 2] + ordered[held // 2]) / 2
