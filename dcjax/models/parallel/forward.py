"""How the devices of a mesh share a model's forward and backward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from dcjax.models.attention import Segments, causal_attention
from dcjax.models.config import AttentionKernel, ModelConfig
from dcjax.models.layout import ONE_DEVICE, SAVED, Layout
from dcjax.models.moe import GroupedDot, Routing
from dcjax.models.parallel.experts import Axes, mix_sharded
from dcjax.models.parameters import parameters
from dcjax.sharding.rules import mesh_axes, partition_spec, split
from dcjax.types import Array


def check_model(config: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Checks that a mesh with axes of these sizes divides a model.

    Raises:
      ValueError: it does not divide the query heads, the residual stream of a model with experts, or a parameter.
    """
    _check_divides("query heads", config.num_heads, sizes, "attention_heads")
    if config.num_experts:
        # devices that share the experts' widths each keep the sums of some columns of the residual stream
        _check_divides("columns of the residual stream", config.hidden_size, sizes, "expert_mlp")
    for parameter in parameters(config):
        for size, name in zip(parameter.stacked_shape, parameter.stacked_axes, strict=True):
            _check_divides(f"{name} of params {'.'.join(parameter.path)}", size, sizes, name)


def _check_divides(what: str, size: int, sizes: Mapping[str, int], name: str) -> None:
    if size % (parts := split(sizes, name)):
        asked = " × ".join(f"mesh.{axis}" for axis in mesh_axes(name))
        raise ValueError(f"{asked} is {parts}, which does not divide the {size} {what}; choose one that does")


def mesh_layout(mesh: Mesh) -> Layout:
    """The layout of `sharding.rules` on a mesh, for training and for scoring.

    XLA partitions products and the operations between them, given constraints on activations. Attention and experts run
    per device (shard_map), since XLA partitions neither Pallas calls nor loops over experts.
    """
    if mesh.size == 1:
        return ONE_DEVICE

    def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(PartitionSpec(*axes))))

    return Layout(
        constrain=constrain,
        attention=partial(_attention, mesh),
        lookup=partial(_lookup, mesh),
        mixture=partial(_mixture, mesh),
        column_multiple=split(mesh.shape, "saved_sequence"),
        shares=split(mesh.shape, "batch"),
    )


def _attention(
    mesh: Mesh,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *scales: Float[Array, "B S K 1"],
    kernel: AttentionKernel,
    float32: lax.Precision = lax.Precision.HIGHEST,
    segments: Segments | None = None,
) -> Float[Array, "B S H D"]:
    """`causal_attention` on a mesh: each device computes its rows and heads, over whole sequences. Columns that are
    gathered are counted through the device's rows.

    Where sequences are split, an all-to-all trades columns for heads, there and back (DeepSpeed-Ulysses,
    arXiv:2309.14509). Key-value heads are repeated if they are too few to be split.
    """
    shards = split(mesh.shape, "attention_heads")
    repeats = shards // math.gcd(shards, k.shape[2])
    operands = (q, *(jnp.repeat(x, repeats, axis=2) for x in (k, v, *scales)))
    heads = partition_spec(PartitionSpec("batch", None, "attention_heads", None))
    attend = jax.shard_map(
        lambda segments, *operands: causal_attention(*operands, kernel=kernel, float32=float32, segments=segments),
        mesh=mesh,
        in_specs=(partition_spec(PartitionSpec("batch", None)), *(heads for _ in operands)),
        out_specs=heads,
        check_vma=False,
    )
    return attend(segments, *operands)


def _lookup(
    mesh: Mesh, table: Float[Array, "V E"], tokens: Int[Array, "B S"], dtype: jnp.dtype
) -> Float[Array, "B S E"]:
    """`layers.lookup` on a mesh: the table stays in place, tokens travel to its parts, and the rows found come back."""
    vocab, embed = parts = partition_spec(PartitionSpec("vocab", "embed"))

    def find(table: Array, tokens: Array) -> Array:
        everyone = lax.all_gather(tokens, embed, tiled=True) - lax.axis_index(vocab) * len(table)
        here = (everyone >= 0) & (everyone < len(table))
        found = jnp.where(here[..., None], table[jnp.where(here, everyone, 0)], 0).astype(dtype)
        # one part of the vocabulary has each token; each device keeps its share of the columns, and all of the width
        kept = lax.psum_scatter(found, vocab, scatter_dimension=1, tiled=True)
        return lax.all_to_all(kept, embed, split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        find,
        mesh=mesh,
        in_specs=(parts, partition_spec(PartitionSpec("batch", "sequence"))),
        out_specs=partition_spec(PartitionSpec(*SAVED)),
        check_vma=False,
    )(table, tokens)


def _mixture(
    mesh: Mesh,
    x: Float[Array, "B S D"],
    routing: Routing,
    weights: Float[Array, "B S k"],
    kernels: tuple[Array, Array, Array],
    grouped_dot: GroupedDot,
) -> Float[Array, "B S D"]:
    """`moe.mix` on a mesh: each device has its own tokens and its part of the kernels."""
    into = partition_spec(PartitionSpec("experts", "embed", "expert_mlp"))
    out = partition_spec(PartitionSpec("experts", "expert_mlp", "embed"))
    tokens = partition_spec(PartitionSpec("batch", "sequence", None))
    mix = jax.shard_map(
        partial(mix_sharded, Axes(*into), mesh.axis_names, routing.probabilities.shape[-1], grouped_dot),
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, (into, into, out)),
        out_specs=partition_spec(PartitionSpec("batch", "sequence", "expert_mlp")),
        check_vma=False,
    )
    return mix(x, routing.experts, weights, kernels)
