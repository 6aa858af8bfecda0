"""Minibatches in microbatches, on devices: rows are taken out of a minibatch, and what they gave is put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dcjax.types import Array, Microbatches, Places

Carry = TypeVar("Carry")


class Microbatch(NamedTuple):
    """The R rows of each of D shares that are computed together."""

    # numbers within the share, [D, R]; -1 where there are fewer, and row 0 stands in
    rows: Array
    # where the rows lie if they are packed
    places: Places | None

    @property
    def present(self) -> Array:
        """False where a row stands in for one that is not there, [D × R]."""
        return (self.rows >= 0).reshape(-1)

    def take(self, tree: Any) -> Any:
        """The microbatch's rows of a minibatch: [B, ...] -> [D × R, ...]."""
        shares = len(self.rows)

        def take(values: Array) -> Array:
            split = values.reshape(shares, -1, *values.shape[1:])
            taken = jax.vmap(lambda values, rows: values[rows])(split, jnp.maximum(self.rows, 0))
            return taken.reshape(-1, *values.shape[1:])

        return jax.tree.map(take, tree)

    def put(self, tree: Any, computed: Any) -> Any:
        """A minibatch with the microbatch's rows replaced: [B, ...], [D × R, ...] -> [B, ...]."""
        shares = len(self.rows)

        def put(values: Array, new: Array) -> Array:
            split = values.reshape(shares, -1, *values.shape[1:])
            rows = jnp.where(self.rows < 0, split.shape[1], self.rows)
            replaced = jax.vmap(lambda values, rows, new: values.at[rows].set(new, mode="drop"))(
                split, rows, new.reshape(shares, -1, *new.shape[1:])
            )
            return replaced.reshape(values.shape)

        return jax.tree.map(put, tree, computed)


class Cut(NamedTuple):
    """One minibatch in microbatches."""

    # how many of them there are, known when traced or not
    count: int | Array
    # as in `Microbatch`, [D, M, R] each
    rows: Array
    places: Places | None

    @classmethod
    def by_rows(cls, rows: int, size: int) -> Cut:
        """As many rows in each, in turn, as they are."""
        return cls(rows // size, np.arange(rows, dtype=np.int32).reshape(1, size, -1).swapaxes(1, 2), None)

    @classmethod
    def packed(cls, microbatches: Microbatches) -> Cut:
        """As many as the share that has most needs; of one minibatch, whose arrays have no axis of updates."""
        most = microbatches.rows.shape[1]
        # a loop that is known to turn once is none, and needs no second copy of the gradients
        return cls(1 if most == 1 else jnp.max(microbatches.count), microbatches.rows, microbatches.places)

    def at(self, number: int | Array) -> Microbatch:
        """One of them."""
        rows, places = jax.tree.map(lambda x: jnp.asarray(x)[:, number], (self.rows, self.places))
        return Microbatch(rows, places)

    def fold(self, step: Callable[[Microbatch, Carry], Carry], start: Carry) -> Carry:
        """(microbatch, carry) -> carry, over all microbatches in order."""
        return jax.lax.fori_loop(0, self.count, lambda number, carry: step(self.at(number), carry), start)

    def empty(self, rows: int, shapes: Any) -> Any:
        """Zeros for a minibatch of so many rows, where a microbatch's rows have these shapes: a tree to `put` into."""
        return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), shapes)
