"""Experts split over devices: every row travels to the device of its expert and back, however many choose the same.

Nothing is dropped: what a device receives has room for every row of all devices. Rows travel as slices, one for each
(sender, expert), and land sorted by expert, so that nothing is sorted again on arrival.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Shaped

from dcjax.models.moe import GroupedDot, SwiGLU, mix_rows, swiglu
from dcjax.types import Array


class Axes(NamedTuple):
    """Names of the mesh axes that split kernels of E × D × F; each may have one device only."""

    expert: str
    embed: str
    width: str


class Slices(NamedTuple):
    """Who sends which rows where: int32 [P, P · e], of sender p the slices in order of receiver, e for each."""

    # first row on the sender
    starts: Array
    sizes: Array
    # first row on the receiver
    places: Array

    def back(self) -> Slices:
        """The same rows on their way back."""
        return Slices(_turned(self.places), _turned(self.sizes), _turned(self.starts))


def _turned(table: Int[Array, "P slices"]) -> Int[Array, "P slices"]:
    devices = len(table)
    return table.reshape(devices, devices, -1).swapaxes(0, 1).reshape(devices, -1)


def outward(counts: Int[Array, "P E"]) -> Slices:
    """To the owners of experts: device p has counts[p, e] rows for e, sorted, and device d owns the d-th E / P of them.

    A receiver's rows lie sorted by expert, those for one expert in the order of their senders.
    """
    devices, experts = counts.shape
    starts = jnp.cumsum(counts, axis=1) - counts
    totals = jnp.sum(counts, axis=0).reshape(devices, experts // devices)
    first_of_expert = (jnp.cumsum(totals, axis=1) - totals).reshape(-1)
    return Slices(starts, counts, first_of_expert + jnp.cumsum(counts, axis=0) - counts)


def mix_sharded(
    axes: Axes,
    num_experts: int,
    grouped_dot: GroupedDot,
    x: Float[Array, "b s D"],
    experts: Int[Array, "b s k"],
    weights: Float[Array, "b s k"],
    kernels: tuple[Array, Array, Array],
) -> Float[Array, "b s d"]:
    """`moe.mix` of one device's tokens, inside shard_map: its share of the result's columns, in float32.

    Args:
      axes: how the kernels are split.
      num_experts: of all devices.
      grouped_dot: the three products.
      x: this device's tokens, the same ones along `axes.width`.
      experts: their choices among all experts.
      weights: of the choices.
      kernels: this device's part of gate and up [E, D, F] and down [E, F, D]. Experts and their widths stay where they
        are; the rest is gathered in x's dtype.
    """
    gate, up, down = kernels
    whole = (
        gather(gate, x.dtype, axes.embed, 1),
        gather(up, x.dtype, axes.embed, 1),
        gather(down, x.dtype, axes.embed, 2),
    )
    through = partial(swiglu, whole, grouped_dot)
    if lax.axis_size(axes.expert) > 1:
        through = partial(_through_owners, axes.expert, through)
    partial_sums = mix_rows(x, experts, weights, num_experts, through)
    return lax.psum_scatter(partial_sums, axes.width, scatter_dimension=2, tiled=True)


def _through_owners(
    axis: str, through: SwiGLU, rows: Float[Array, "N D"], counts: Int[Array, "E"]
) -> Float[Array, "N D"]:
    """The rows' outputs, computed where their experts are; counts are of this device's rows."""
    everyone = lax.all_gather(counts, axis)
    devices, experts = everyone.shape
    slices = outward(everyone)
    owned = jnp.sum(everyone, axis=0).reshape(devices, experts // devices)[lax.axis_index(axis)]
    received = exchange(rows, slices, devices * len(rows), axis)
    return exchange(through(received, owned), slices.back(), len(rows), axis)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(kernel: Float[Array, "..."], dtype: jnp.dtype, axis: str, dimension: int) -> Float[Array, "..."]:
    """The kernel whole along a mesh axis, rounded to `dtype` on its way; its gradient is summed in its own dtype."""
    # back in its own dtype, so that the gradient that comes back is not rounded
    return lax.all_gather(kernel.astype(dtype), axis, axis=dimension, tiled=True).astype(kernel.dtype)


gather.defvjp(
    lambda kernel, dtype, axis, dimension: (gather(kernel, dtype, axis, dimension), None),
    lambda dtype, axis, dimension, _, gradient: (
        lax.psum_scatter(gradient, axis, scatter_dimension=dimension, tiled=True),
    ),
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange(rows: Shaped[Array, "N D"], slices: Slices, room: int, axis: str) -> Shaped[Array, "room D"]:
    """What a device has after all sent their slices of rows along a mesh axis; 0 where nothing arrived.

    A ragged all-to-all where the platform has one. CPUs do not, and there everybody gathers all rows.
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
    # seen from the receiver: `places` are the slices' first rows on their senders, which come in order
    places, sizes, starts = (table[me] for table in slices.back())
    senders = jnp.arange(len(places)) // (len(places) // len(slices.sizes))
    row = jnp.arange(room)[:, None]
    inside = (places <= row) & (row < places + sizes)
    source = jnp.sum(jnp.where(inside, senders * len(rows) + starts + row - places, 0), axis=1)
    return jnp.where(jnp.any(inside, axis=1)[:, None], everything[source], 0)
