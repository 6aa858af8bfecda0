"""The transformer: parameters declared in Flax Linen, and hidden states and logits as pure functions of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Integer, Shaped

from dcjax.arguments import as_integers, as_mask
from dcjax.models import layers
from dcjax.models.attention import Segments
from dcjax.models.block import PRODUCT, block, training_products
from dcjax.models.config import DTYPES, ModelConfig
from dcjax.models.layout import LOGITS, ONE_DEVICE, RESIDUAL, SAVED, TABLE, Layout
from dcjax.models.moe import router_metrics
from dcjax.models.numerics import MASTERS, Numerics
from dcjax.models.parameters import head_name, layer_params, parameters
from dcjax.types import Array, Params


class Layers(nn.Module):
    """The parameters of all layers, each leaf stacked over the layers that have it, with named axes."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return _declare(self, in_layers=True)


class Transformer(nn.Module):
    """The model as a Flax module: `apply({"params": params}, tokens, ...)` is `hidden_states`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, *args, **kwargs):
        return hidden_states(self.config, self.parameters(), *args, **kwargs)

    @nn.compact
    def parameters(self) -> Params:
        """Declares all parameters."""
        return _declare(self, in_layers=False) | {"layers": Layers(self.config, name="layers")()}


def _declare(module: Layers | Transformer, in_layers: bool) -> dict[str, Any]:
    """Declares the parameters of the layers or the others, in the table's order."""
    dtype = DTYPES[module.config.precision.parameters]
    declared = {}
    for parameter in parameters(module.config):
        if (parameter.layers is not None) == in_layers:
            initializer = nn.with_logical_partitioning(parameter.initializer, parameter.stacked_axes)
            declared[parameter.name] = module.param(parameter.name, initializer, parameter.stacked_shape, dtype)
    return declared


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters in `precision.parameters`, each leaf of `layers` stacked over the layers that have it."""
    return nn.unbox(Transformer(config).init(key, method="parameters")["params"])


def rounded_head(config: ModelConfig, params: Params, numerics: Numerics) -> Params:
    """The parameters with the output head that `logits` multiplies by; rounded once for all calls of it."""
    name = head_name(config)
    return {**params, name: numerics.weight(name, params[name])}


def head_kernel(config: ModelConfig, params: Params):
    """The output head as a table [V, E], which is the embedding table if they are tied."""
    return params[head_name(config)]


@flax.struct.dataclass
class RouterRecord:
    """How the M sparse layers routed B × S tokens."""

    # chosen experts of each token, most probable first
    experts: Int[Array, "M B S k"]
    # `moe.router_metrics` by name, each [B]: means over the sparse layers
    metrics: dict[str, Array]


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Integer[Array, "B S"],
    attention_mask: Shaped[Array, "B S"] | None = None,
    *,
    segment_ids: Integer[Array, "B S"] | None = None,
    experts: Integer[Array, "M B S k"] | None = None,
    layout: Layout = ONE_DEVICE,
    numerics: Numerics = MASTERS,
) -> tuple[Float[Array, "B S E"], RouterRecord | None]:
    """Normed hidden states in `precision.compute`, and a record of the routing if the model has experts.

    Args:
      config: the architecture.
      params: as `init_params` lays them out.
      tokens: ids; padding may be anywhere.
      attention_mask: True, or 1, on real tokens; all True where absent. Positions count real tokens only.
      segment_ids: which of several sequences packed into a row a token belongs to: adjacent tokens with the same
        number, from 1, are one sequence, and 0 is padding. Positions restart in each sequence. It replaces
        `attention_mask`.
      experts: the choice of experts to impose on each sparse layer instead of its router's own (routing replay);
        weights are still the router's.
      layout: how devices share the work.
      numerics: what is rounded.

    Raises:
      ValueError: both a mask and segments were given, ids are not integers or, unless traced, not in the vocabulary,
        or a mask holds anything other than False and True, or 0 and 1.
    """
    tokens, attention_mask, segment_ids = checked_inputs(config, tokens, attention_mask, segment_ids)
    experts = None if experts is None else as_integers("experts", experts)
    places = jnp.arange(tokens.shape[1])[None]
    if segment_ids is not None:
        columns = Columns(tokens, _segment_positions(segment_ids), Segments(segment_ids), experts)
        return _run(config, params, columns, segment_ids > 0, layout, numerics)
    if attention_mask is None:
        columns = Columns(tokens, places, None, experts)
        return _run(config, params, columns, jnp.ones(tokens.shape, bool), layout, numerics)
    # causal order alone hides padding that comes after all real tokens, in every kernel
    to = _compact_columns(attention_mask)
    rows = jnp.arange(len(to))[:, None]
    tokens = jnp.zeros_like(tokens).at[rows, to].set(tokens)
    if experts is not None:
        experts = jnp.zeros_like(experts).at[:, rows, to].set(experts)
    real = places < jnp.sum(attention_mask, axis=1, keepdims=True)
    hidden, record = _run(config, params, Columns(tokens, places, None, experts), real, layout, numerics)
    if record is not None:
        record = dataclasses.replace(record, experts=record.experts[:, rows, to])
    return jnp.take_along_axis(hidden, to[..., None], axis=1), record


def checked_inputs(
    config: ModelConfig,
    tokens: Integer[Array, "B S"],
    attention_mask: Shaped[Array, "B S"] | None,
    segment_ids: Integer[Array, "B S"] | None,
) -> tuple[Array, Bool[Array, "B S"] | None, Array | None]:
    """The arguments of `hidden_states`, checked, with a mask of booleans; ids of padding may be anything."""
    if attention_mask is not None and segment_ids is not None:
        raise ValueError("attention_mask and segment_ids were both given; padding is segment 0, so leave out the mask")
    mask = None if attention_mask is None else as_mask("attention_mask", attention_mask)
    segments = None if segment_ids is None else as_integers("segment_ids", segment_ids)
    real = mask if segments is None else segments > 0
    return as_integers("tokens", tokens, 0, config.vocab_size - 1, where=real), mask, segments


def _compact_columns(mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """The new place of each column when a row's real tokens move to the front and its padding to the back, in order."""
    real = jnp.cumsum(mask, axis=1)
    return jnp.where(mask, real, real[:, -1:] + jnp.cumsum(~mask, axis=1)) - 1


def _segment_positions(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    columns = jnp.arange(segment_ids.shape[1])
    starts = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), jnp.diff(segment_ids, axis=1) != 0], axis=1)
    return columns - jax.lax.cummax(jnp.where(starts, columns, 0), axis=1)


class Columns(NamedTuple):
    """The inputs of `run_columns`, in which padding comes after all real tokens or is segment 0."""

    tokens: Int[Array, "B S"]
    positions: Int[Array, "#B S"]
    # if several sequences are packed into a row
    segments: Segments | None
    # if they are imposed
    experts: Int[Array, "M B S k"] | None

    def padded(self, multiple: int) -> Columns:
        """With padding appended until `multiple` divides the number of columns."""
        pad = partial(layers.pad_columns, multiple=multiple)
        return Columns(
            tokens=pad(self.tokens),
            positions=pad(self.positions),
            segments=None if self.segments is None else self.segments.padded(multiple),
            experts=None if self.experts is None else jax.vmap(pad)(self.experts),
        )


def _run(
    config: ModelConfig,
    params: Params,
    columns: Columns,
    real: Bool[Array, "B S"],
    layout: Layout,
    numerics: Numerics,
) -> tuple[Float[Array, "B S E"], RouterRecord | None]:
    """`run_columns` on rows of real tokens, after appending padding until the layout divides the number of columns."""
    length = columns.tokens.shape[1]
    real = layers.pad_columns(real, layout.column_multiple)

    def sum_tokens(values: Array) -> Array:
        return jnp.sum(jnp.where(real.reshape(*real.shape, *[1] * (values.ndim - 2)), values, 0), axis=1)

    padded = columns.padded(layout.column_multiple)
    hidden, record = run_columns(
        config, params, padded, sum_tokens, layout, positions=padded.tokens.shape[1], numerics=numerics
    )
    if record is not None:
        record = dataclasses.replace(record, experts=record.experts[:, :, :length])
    return hidden[:, :length], record


def run_columns(
    config: ModelConfig,
    params: Params,
    columns: Columns,
    sum_tokens: Callable[[Array], Array],
    layout: Layout,
    *,
    positions: int,
    numerics: Numerics = MASTERS,
) -> tuple[Float[Array, "B S E"], RouterRecord | None]:
    """Embedding, scanned layers, last norm. One iteration of the scan is the shortest repeating run of layer kinds.

    Args:
      config: the architecture.
      params: as `init_params` lays them out.
      columns: what is computed; the layout divides their number.
      sum_tokens: [B, S, ...] -> [rows, ...]: the sum over the tokens of each row, for the metrics of routers.
      layout: how devices share the work.
      positions: all of `columns.positions` are below this.
      numerics: what is rounded.
    """
    kinds, products = config.sparse_layers, training_products(config.precision, numerics)
    period = _period(kinds)
    rope = layers.rope_table(columns.positions, positions, config.head_dim, config.rope_theta, config.rope_scaling)

    def attend(q, k, v):
        how = {"kernel": config.attention, "float32": config.precision.float32}
        return layout.attention(*numerics.attended(q, k, v), segments=columns.segments, **how), None

    def layer(number, x, stacked, imposed):
        # XLA applies the first constraint on a value, and the input of a layer is what is kept for the backward pass
        whole = layout.constrain(layout.constrain(x, SAVED), RESIDUAL)
        # taken here, where it is recomputed: what is taken outside of it would be kept, a second copy of the parameters
        weights = stacked if period == 1 else layer_params(config, stacked, number)
        weights = {name: numerics.weight(name, leaf) for name, leaf in weights.items()}
        x, _, routing = block(config, weights, whole, rope, attend, products, imposed, layout)
        record = None if routing is None else (routing.experts, router_metrics(routing, sum_tokens))
        return layout.constrain(x, SAVED), record

    unrolled = config.resolved_remat == "none"
    if not unrolled:
        kept = {"products": jax.checkpoint_policies.save_only_these_names(PRODUCT), "full": None}
        layer = jax.checkpoint(layer, prevent_cse=False, policy=kept[config.resolved_remat], static_argnums=0)

    def turn(x, inputs):
        stacked, imposed = inputs
        routed = []
        for number in range(period):
            chosen = imposed[len(routed)] if kinds[number] and imposed is not None else None
            x, record = layer(number, x, stacked, chosen)
            routed += [] if record is None else [record]
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *routed) if routed else None

    table = numerics.weight("embed_tokens", params["embed_tokens"])
    embedded = layout.lookup(table, columns.tokens, DTYPES[config.precision.compute])
    turns = config.num_layers // period

    def deal(tree):
        return jax.tree.map(lambda leaf: leaf.reshape(turns, -1, *leaf.shape[1:]), tree)

    # XLA on CPUs copies what is reshaped
    stacked = params["layers"] if period == 1 else deal(params["layers"])
    inputs = stacked, deal(columns.experts)
    x, routed = jax.lax.scan(turn, layout.constrain(embedded, SAVED), inputs, unroll=unrolled)
    record = None
    if routed is not None:
        chosen, metrics = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), routed)
        record = RouterRecord(chosen, {name: jnp.mean(rows, axis=0) for name, rows in metrics.items()})
    norm = numerics.weight("norm", params["norm"])
    return layers.rms_norm(layout.constrain(x, RESIDUAL), norm, config.rms_norm_eps), record


def _period(kinds: Sequence[bool]) -> int:
    """Length of the shortest run of kinds that gives the whole stack when it is repeated."""
    return next(n for n in range(1, len(kinds) + 1) if list(kinds) == list(kinds[:n]) * (len(kinds) // n))


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Integer[Array, "B S"],
    attention_mask: Shaped[Array, "B S"] | None = None,
    *,
    segment_ids: Integer[Array, "B S"] | None = None,
    experts: Integer[Array, "M B S k"] | None = None,
) -> Float[Array, "B S V"]:
    """Next-token logits in float32, of all columns at once; arguments and errors are those of `hidden_states`."""
    hidden, _ = hidden_states(config, params, tokens, attention_mask, segment_ids=segment_ids, experts=experts)
    return logits(config, params, hidden)


def logits(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "... E"],
    layout: Layout = ONE_DEVICE,
    numerics: Numerics = MASTERS,
) -> Float[Array, "... V"]:
    """float32 logits of hidden states: both sides in `precision.head`, and sums in `precision.accumulation`.

    Of the numerics it is given the rows; the head is to be `rounded_head`'s.
    """
    rows = numerics.rows(hidden.astype(DTYPES[config.precision.head]))
    # constrained where it is used, so that its gradient is divided too, chunk by chunk
    table = layout.constrain(head_kernel(config, params), TABLE)
    arithmetic = layers.Arithmetic(DTYPES[config.precision.accumulation], config.precision.float32)
    out = layers.table_product(rows, table, arithmetic, jnp.dtype(jnp.float32))
    return layout.constrain(out, LOGITS)
