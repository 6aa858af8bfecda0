"""Experts split over devices: every row travels to the device of its expert and back, however many choose the same one.

Nothing is dropped: where a device receives more than `ROOM` times its even share, rows travel in several rounds. They
travel as slices, one for each (sender, expert), and land sorted by expert, so that nothing is sorted again on arrival.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Shaped

from dcjax.models.branches import sum_of
from dcjax.models.moe import GroupedDot, mix_rows, swiglu
from dcjax.types import Array

ROOM = 2
"""Times its even share of the rows that a device has room for in one round.

Buffers are written and read whole, whatever arrives: with room for the worst, eight chips move four times as much.
"""

ROUNDS = "rounds_of_experts"
"""The name of the rounds' loop in a program."""


class Axes(NamedTuple):
    """Names of the mesh axes that split kernels of E × D × F; an axis may have size 1."""

    expert: str
    embed: str
    width: str


class Slices(NamedTuple):
    """Which rows travel where: int32 [P, P · e], where row p has the slices of sender p, e for each receiver."""

    # first row on the sender
    starts: Array
    sizes: Array
    # first row on the receiver
    places: Array

    def back(self) -> Slices:
        """The same rows on their way back."""
        return Slices(_swap_ends(self.places), _swap_ends(self.sizes), _swap_ends(self.starts))

    def window(self, first: Array, room: int) -> Slices:
        """What of the slices lies in `room` rows of the receivers from a first one on, which is there row 0."""
        begin = jnp.clip(self.places - first, 0, room)
        end = jnp.clip(self.places + self.sizes - first, 0, room)
        return Slices(self.starts + jnp.clip(first - self.places, 0, self.sizes), end - begin, begin)


def _swap_ends(table: Int[Array, "P slices"]) -> Int[Array, "P slices"]:
    """The table with senders and receivers exchanged."""
    devices = len(table)
    return table.reshape(devices, devices, -1).swapaxes(0, 1).reshape(devices, -1)


def outward(counts: Int[Array, "P E"]) -> Slices:
    """The slices that travel to the owners of the experts: device d owns the d-th E / P of them.

    Device p sends counts[p, e] rows to expert e, and its rows are sorted by expert. A receiver's rows are sorted by
    expert too, those for one expert in the order of their senders.
    """
    devices, experts = counts.shape
    starts = jnp.cumsum(counts, axis=1) - counts
    totals = jnp.sum(counts, axis=0).reshape(devices, experts // devices)
    first_of_expert = (jnp.cumsum(totals, axis=1) - totals).reshape(-1)
    return Slices(starts, counts, first_of_expert + jnp.cumsum(counts, axis=0) - counts)


def mix_sharded(
    axes: Axes,
    everyone: tuple[str, ...],
    num_experts: int,
    grouped_dot: GroupedDot,
    x: Float[Array, "b s D"],
    experts: Int[Array, "b s k"],
    weights: Float[Array, "b s k"],
    kernels: tuple[Array, Array, Array],
) -> Float[Array, "b s d"]:
    """`moe.mix` of one device's tokens, inside shard_map; returns its share of the result's columns, in float32.

    Args:
      axes: how the kernels are split.
      everyone: all axes of the mesh.
      num_experts: the number of experts on all devices.
      grouped_dot: the product with each of the three kernels.
      x: this device's tokens, the same ones along `axes.width`.
      experts: their choices among all experts.
      weights: the weights of the choices.
      kernels: this device's part of gate and up [E, D, F] and down [E, F, D]. Experts and their widths stay in place;
        the rest is gathered in x's dtype.
    """
    gate, up, down = kernels
    whole = (
        gather(gate, x.dtype, axes.embed, 1),
        gather(up, x.dtype, axes.embed, 1),
        gather(down, x.dtype, axes.embed, 2),
    )
    through = partial(swiglu, whole, grouped_dot)
    if lax.axis_size(axes.expert) > 1:
        through = partial(_through_owners, axes.expert, everyone, whole, grouped_dot)
    partial_sums = mix_rows(x, experts, weights, num_experts, through)
    return lax.psum_scatter(partial_sums, axes.width, scatter_dimension=2, tiled=True)


def _through_owners(
    axis: str,
    everyone: tuple[str, ...],
    kernels: tuple[Array, Array, Array],
    grouped_dot: GroupedDot,
    rows: Float[Array, "N D"],
    counts: Int[Array, "E"],
) -> Float[Array, "N D"]:
    """The rows' outputs, computed where their experts are; `counts` is how many of these rows each expert has."""
    all_counts = lax.all_gather(counts, axis)
    devices, experts = all_counts.shape
    owned = jnp.sum(all_counts, axis=0).reshape(devices, experts // devices)[lax.axis_index(axis)]
    room = min(ROOM, devices) * len(rows)
    # the same on all devices of the mesh, which take part in each other's collectives
    rounds = lax.pmax(-(-jnp.sum(owned) // room), everyone)

    def compute(tables, number, rows, *kernels):
        slices, owned = tables
        first = number * room
        within = slices.window(first, room)
        ends = jnp.clip(jnp.cumsum(owned) - first, 0, room)
        received = exchange(rows, within, room, axis)
        outputs = swiglu(kernels, grouped_dot, received, jnp.diff(ends, prepend=0))
        return exchange(outputs, within.back(), len(rows), axis)

    with jax.named_scope(ROUNDS):
        return sum_of(compute, rounds, (outward(all_counts), owned), rows, *kernels)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(kernel: Float[Array, "..."], dtype: jnp.dtype, axis: str, dimension: int) -> Float[Array, "..."]:
    """The kernel gathered along a mesh axis, in `dtype` while it travels; its gradient is summed in its own dtype."""
    # cast back to its own dtype, so that its gradient is not rounded
    return lax.all_gather(kernel.astype(dtype), axis, axis=dimension, tiled=True).astype(kernel.dtype)


gather.defvjp(
    lambda kernel, dtype, axis, dimension: (gather(kernel, dtype, axis, dimension), None),
    lambda dtype, axis, dimension, _, gradient: (
        lax.psum_scatter(gradient, axis, scatter_dimension=dimension, tiled=True),
    ),
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange(rows: Shaped[Array, "N D"], slices: Slices, room: int, axis: str) -> Shaped[Array, "room D"]:
    """The rows that a device has after all have sent their slices along a mesh axis; 0 where nothing arrived.

    It is a ragged all-to-all where the platform has one. CPUs do not, and there each device gathers all rows.
    """
    return lax.platform_dependent(
        rows, *slices, cpu=partial(_by_gathering, room, axis), default=partial(_ragged, room, axis)
    )


def _exchange_backward(room, axis, saved, gradient):
    slices, count = saved
    return exchange(gradient, slices.back(), count, axis), None


exchange.defvjp(
    lambda rows, slices, room, axis: (exchange(rows, slices, room, axis), (slices, len(rows))), _exchange_backward
)


def _ragged(room: int, axis: str, rows: Array, *tables: Array) -> Array:
    slices, me = Slices(*tables), lax.axis_index(axis)
    out = jnp.zeros((room, rows.shape[1]), rows.dtype)
    starts, sizes, places = (table[me] for table in slices)
    return lax.ragged_all_to_all(rows, out, starts, sizes, places, slices.back().sizes[me], axis_name=axis)


def _by_gathering(room: int, axis: str, rows: Array, *tables: Array) -> Array:
    slices, me = Slices(*tables), lax.axis_index(axis)
    everything = lax.all_gather(rows, axis, tiled=True)
    # this device as the receiver: a slice's first row is `places` here and `starts` on its sender; senders are in order
    places, sizes, starts = (table[me] for table in slices.back())
    senders = jnp.arange(len(places)) // (len(places) // len(slices.sizes))
    row = jnp.arange(room)[:, None]
    inside = (places <= row) & (row < places + sizes)
    source = jnp.sum(jnp.where(inside, senders * len(rows) + starts + row - places, 0), axis=1)
    return jnp.where(jnp.any(inside, axis=1)[:, None], everything[source], 0)
