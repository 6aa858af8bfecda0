"""How the devices of a serving mesh share the engine's work: copies of the model, each on some of the devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from dcjax.models.attention import CachedKernel
from dcjax.models.cache import CachedAttention, LayerCache, attend_cached
from dcjax.models.layout import ONE_DEVICE, Layout
from dcjax.models.moe import GroupedDot, Routing, mix_rows, swiglu
from dcjax.serving import sampling
from dcjax.serving.sampling import SamplingParams
from dcjax.sharding.rules import SERVING_RULES, partition_spec
from dcjax.types import Array

COPIES, WITHIN = "data", "tensor"
"""The axes of a serving mesh: copies of the model, and devices that share one."""

CACHE = PartitionSpec("batch", "kv_heads")
"""Axes of a layer's cache, [B, K, C, ...]."""

SHARED_CACHE = PartitionSpec(None, "kv_heads")
"""The same for the caches of prompts, which every copy of the model has in full."""

ROWS = PartitionSpec("batch")
"""Axes of arrays with one row for each sequence, [B, ...]."""

SCORES = PartitionSpec("batch", "vocab")
"""Axes of logits, [B, V]."""

EVERYWHERE = PartitionSpec()
"""Axes of arrays that every device has whole."""


def serving_mesh(mesh: Mesh, tensor: int = 1) -> Mesh:
    """Arranges the devices of a mesh, in order, as copies of the model on `tensor` neighbouring devices each.

    Raises:
      ValueError: `tensor` does not divide the number of devices.
    """
    if tensor < 1 or mesh.size % tensor:
        raise ValueError(f"serving.tensor is {tensor}; it must divide the number of devices, {mesh.size}")
    return Mesh(mesh.devices.reshape(-1, tensor), (COPIES, WITHIN), axis_types=(AxisType.Auto,) * 2)


def named(mesh: Mesh | AbstractMesh, axes: PartitionSpec) -> NamedSharding:
    """The sharding of an array with these logical axes on a serving mesh."""
    return NamedSharding(mesh, partition_spec(axes, SERVING_RULES))


def pinned(mesh: Mesh, tree: Any, axes: PartitionSpec) -> Any:
    """Constrains arrays with these logical axes to their sharding on a serving mesh."""
    return tree if mesh.size == 1 else lax.with_sharding_constraint(tree, named(mesh, axes))


def serving_layout(mesh: Mesh, kernel: CachedKernel) -> tuple[Layout, CachedAttention]:
    """How a layer's parts run on a serving mesh, and its attention on the cache by a kernel.

    XLA partitions products and the operations between them, given constraints on activations. Attention and experts run
    per device (shard_map): a cache is written in place, and XLA does not partition loops over experts.
    """
    if mesh.size == 1:
        return ONE_DEVICE, partial(attend_cached, kernel=kernel)

    def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
        return pinned(mesh, x, PartitionSpec(*axes))

    return Layout(constrain=constrain, mixture=partial(_mixture, mesh)), partial(_attend, mesh, kernel)


def _attend(
    mesh: Mesh,
    kernel: CachedKernel,
    cache: LayerCache,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    positions: Int[Array, "B S"],
    *,
    float32: lax.Precision,
) -> tuple[Float[Array, "B S H D"], LayerCache]:
    """`attend_cached` on a mesh: each device has the sequences of its copy and its share of the heads."""
    held, rows = partition_spec(CACHE, SERVING_RULES), partition_spec(ROWS, SERVING_RULES)
    heads = partition_spec(PartitionSpec("batch", None, "heads"), SERVING_RULES)
    return jax.shard_map(
        partial(attend_cached, kernel=kernel, float32=float32),
        mesh=mesh,
        in_specs=(held, heads, heads, heads, rows),
        out_specs=(heads, held),
        check_vma=False,
    )(cache, q, k, v, positions)


def _mixture(
    mesh: Mesh,
    x: Float[Array, "B S D"],
    routing: Routing,
    weights: Float[Array, "B S k"],
    kernels: tuple[Any, Any, Any],
    grouped_dot: GroupedDot,
) -> Float[Array, "B S D"]:
    """`moe.mix` on a mesh: all devices of a copy have its tokens, and each adds the outputs of its own experts."""
    rows = partition_spec(ROWS, SERVING_RULES)
    of_experts = partition_spec(PartitionSpec("experts"), SERVING_RULES)
    return jax.shard_map(
        partial(_own_experts, grouped_dot, routing.probabilities.shape[-1] // mesh.shape[WITHIN]),
        mesh=mesh,
        in_specs=(rows, rows, rows, of_experts),
        out_specs=rows,
        check_vma=False,
    )(x, routing.experts, weights, kernels)


def most_probable(mesh: Mesh, probabilities: Float[Array, "B S E"], count: int) -> Int[Array, "B S k"]:
    """The most probable experts; each copy chooses for its own rows, where XLA would gather all rows."""

    def choose(probabilities: Array) -> Array:
        return lax.top_k(probabilities, count)[1]

    if mesh.size == 1:
        return choose(probabilities)
    rows = partition_spec(ROWS, SERVING_RULES)
    return jax.shard_map(choose, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(probabilities)


def distribution(
    mesh: Mesh, logits: Float[Array, "B V"], params: SamplingParams, max_candidates: int
) -> sampling.Distribution:
    """`sampling.distribution` on a mesh: each copy has its own rows, gathered whole only if some are truncated."""
    if mesh.size == 1:
        return sampling.distribution(logits, params, max_candidates=max_candidates)
    shares: Any = partition_spec(SCORES, SERVING_RULES)
    rows: Any = partition_spec(ROWS, SERVING_RULES)
    width = logits.shape[1] // mesh.shape[WITHIN]
    divided = partial(
        sampling.distribution,
        max_candidates=max_candidates,
        gather=lambda share: lax.all_gather(share, WITHIN, axis=1, tiled=True),
        own=lambda whole: lax.dynamic_slice_in_dim(whole, lax.axis_index(WITHIN) * width, width, axis=1),
    )
    placed = sampling.Distribution(shares, rows, rows, rows)
    return jax.shard_map(divided, mesh=mesh, in_specs=(shares, rows), out_specs=placed, check_vma=False)(logits, params)


def head(mesh: Mesh, drawn_from: sampling.Distribution, count: int) -> tuple[Float[Array, "B H"], Int[Array, "B H"]]:
    """`sampling.head` on a mesh: each copy has its own rows, which it gathers whole."""
    if mesh.size == 1:
        return sampling.head(drawn_from.logits, count)
    shares, rows = partition_spec(SCORES, SERVING_RULES), partition_spec(ROWS, SERVING_RULES)

    def of_rows(logits: Array) -> tuple[Array, Array]:
        return sampling.head(lax.all_gather(logits, WITHIN, axis=1, tiled=True), count)

    return jax.shard_map(of_rows, mesh=mesh, in_specs=shares, out_specs=rows, check_vma=False)(drawn_from.logits)


def _own_experts(
    grouped_dot: GroupedDot,
    count: int,
    x: Float[Array, "b S D"],
    experts: Int[Array, "b S k"],
    weights: Float[Array, "b S k"],
    kernels: tuple[Any, Any, Any],
) -> Float[Array, "b S D"]:
    """The part of the `count` experts that are here; choices of others are sorted after theirs and weigh nothing."""
    chosen = experts - lax.axis_index(WITHIN) * count
    here = (chosen >= 0) & (chosen < count)

    def through(rows: Array, sizes: Array) -> Array:
        # a product's results for rows after the last group are meaningless, and could be NaN
        computed = (jnp.arange(len(rows)) < jnp.sum(sizes))[:, None]
        return jnp.where(computed, swiglu(kernels, grouped_dot, rows, sizes), 0)

    mixed = mix_rows(x, jnp.where(here, chosen, count), jnp.where(here, weights, 0), count, through)
    return lax.psum(mixed, WITHIN)
