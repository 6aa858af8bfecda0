"""The transformer: parameters declared in Flax Linen, and hidden states and logits as pure functions of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Integer, Shaped

from dcjax.arguments import as_integers, as_mask
from dcjax.models import layers
from dcjax.models.block import PRODUCT, block, training_products
from dcjax.models.config import DTYPES, ModelConfig
from dcjax.models.layout import LOGITS, ONE_DEVICE, RESIDUAL, SAVED, TABLE, Layout
from dcjax.models.moe import router_metrics
from dcjax.types import Array, Params

DENSE = ("gate_proj", "up_proj", "down_proj")
"""Parameters of the layers without experts."""

SPARSE = ("router", "experts_gate_proj", "experts_up_proj", "experts_down_proj")
"""Parameters of the layers with experts."""


class Layers(nn.Module):
    """The parameters of all layers, each leaf stacked over the layers that have it, with named axes."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        c = self.config
        sparse = sum(c.sparse_layers)
        declared = self._attention()
        if sparse < c.num_layers:
            declared |= self._mlp(c.num_layers - sparse)
        if sparse:
            declared |= self._experts(sparse)
        dtype = DTYPES[c.precision.parameters]
        return {
            name: self.param(name, nn.with_logical_partitioning(init, ("layers", *axes)), shape, dtype)
            for name, (init, shape, axes) in declared.items()
        }

    @property
    def _residual_scale(self) -> float:
        # projections into the residual stream start smaller in deeper stacks (GPT-2), so its variance does not grow
        return (2 * self.config.num_layers) ** -0.5

    def _attention(self) -> dict:
        c, norm = self.config, nn.initializers.ones_init()
        widths = {"q": c.num_heads * c.head_dim, "k": c.num_kv_heads * c.head_dim, "v": c.num_kv_heads * c.head_dim}
        axes = {"q": "heads", "k": "kv_heads", "v": "kv_heads"}
        declared = {
            "input_layernorm": (norm, (c.num_layers, c.hidden_size), ("embed",)),
            "o_proj": self._kernel(
                c.num_layers, (widths["q"], c.hidden_size), ("heads", "embed"), self._residual_scale
            ),
            "post_attention_layernorm": (norm, (c.num_layers, c.hidden_size), ("embed",)),
        }
        for name, width in widths.items():
            declared[f"{name}_proj"] = self._kernel(c.num_layers, (c.hidden_size, width), ("embed", axes[name]))
            if c.family == "qwen2":
                declared[f"{name}_bias"] = (nn.initializers.zeros_init(), (c.num_layers, width), (axes[name],))
        if c.family == "qwen3":
            declared |= {f"{name}_norm": (norm, (c.num_layers, c.head_dim), ("head_dim",)) for name in "qk"}
        return declared

    def _mlp(self, count: int) -> dict:
        wide, into, out = self.config.intermediate_size, ("embed", "mlp"), ("mlp", "embed")
        return {
            "gate_proj": self._kernel(count, (self.config.hidden_size, wide), into),
            "up_proj": self._kernel(count, (self.config.hidden_size, wide), into),
            "down_proj": self._kernel(count, (wide, self.config.hidden_size), out, self._residual_scale),
        }

    def _experts(self, count: int) -> dict:
        c, into, out = self.config, ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
        widen = (c.num_experts, c.hidden_size, c.moe_intermediate_size)
        narrow = (c.num_experts, c.moe_intermediate_size, c.hidden_size)
        return {
            "router": self._kernel(count, (c.hidden_size, c.num_experts), ("embed", "choices")),
            "experts_gate_proj": self._kernel(count, widen, into),
            "experts_up_proj": self._kernel(count, widen, into),
            "experts_down_proj": self._kernel(count, narrow, out, self._residual_scale),
        }

    def _kernel(self, count: int, shape: tuple[int, ...], axes: tuple[str, ...], scale: float = 1.0):
        return nn.initializers.normal(scale * shape[-2] ** -0.5), (count, *shape), axes


class Transformer(nn.Module):
    """The model as a Flax module: `apply({"params": params}, tokens, ...)` is `hidden_states`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, *args, **kwargs):
        return hidden_states(self.config, self.parameters(), *args, **kwargs)

    @nn.compact
    def parameters(self) -> Params:
        """Declares all parameters."""
        c, dtype = self.config, DTYPES[self.config.precision.parameters]
        table = nn.with_logical_partitioning(nn.initializers.normal(c.hidden_size**-0.5), ("vocab", "embed"))
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        params = {
            "embed_tokens": self.param("embed_tokens", table, (c.vocab_size, c.hidden_size), dtype),
            "layers": Layers(c, name="layers")(),
            "norm": self.param("norm", ones, (c.hidden_size,), dtype),
        }
        if not c.tie_embeddings:
            params["lm_head"] = self.param("lm_head", table, (c.vocab_size, c.hidden_size), dtype)
        return params


def _boxed_init(config: ModelConfig, key):
    return Transformer(config).init(key, method="parameters")["params"]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters in `precision.parameters`, each leaf of `layers` stacked over the layers that have it."""
    return nn.unbox(_boxed_init(config, key))


@cache
def logical_axes(config: ModelConfig) -> Params:
    """The tree of `init_params`, at each leaf a PartitionSpec of logical axes for `sharding.rules` to map.

    It is traced once per config; callers share the tree, and must not change it.
    """
    return nn.get_partition_spec(jax.eval_shape(lambda: _boxed_init(config, jax.random.key(0))))


@cache
def abstract_params(config: ModelConfig) -> Params:
    """The tree of `init_params` as shapes and dtypes; nothing is allocated, and no device is used.

    It is traced once per config; callers share the tree, and must not change it.
    """
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def count_params(config: ModelConfig) -> int:
    """Number of parameters, from abstract shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def layer_params(kinds: Sequence[bool], stacked: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """One layer's parameters, taken from the stacked ones of layers of these kinds (True for layers with experts)."""
    return take_layer(stacked, kinds[layer], layer, sum(kind == kinds[layer] for kind in kinds[:layer]))


def take_layer(
    stacked: Mapping[str, Any], sparse: bool, layer: int | Int[Array, ""], rank: int | Int[Array, ""]
) -> dict[str, Any]:
    """As `layer_params`, for numbers that may be traced: the layer's own, and its rank among the layers of its kind."""
    others = DENSE if sparse else SPARSE
    return {
        name: leaf[rank if name in DENSE + SPARSE else layer] for name, leaf in stacked.items() if name not in others
    }


def head_kernel(config: ModelConfig, params: Params):
    """The output head as a table [V, E], which is the embedding table if they are tied."""
    return params["embed_tokens" if config.tie_embeddings else "lm_head"]


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

    Raises:
      ValueError: both a mask and segments were given, ids are not integers or, unless traced, not in the vocabulary,
        or a mask holds anything other than False and True, or 0 and 1.
    """
    tokens, attention_mask, segment_ids = checked_inputs(config, tokens, attention_mask, segment_ids)
    experts = None if experts is None else as_integers("experts", experts)
    if segment_ids is not None:
        positions = _segment_positions(segment_ids)
        return _run(config, params, tokens, positions, segment_ids > 0, segment_ids, experts, layout)
    columns = jnp.arange(tokens.shape[1])[None]
    if attention_mask is None:
        return _run(config, params, tokens, columns, jnp.ones(tokens.shape, bool), None, experts, layout)
    # causal order alone hides padding that comes after all real tokens, in every kernel
    to = _compact_columns(attention_mask)
    rows = jnp.arange(len(to))[:, None]
    tokens = jnp.zeros_like(tokens).at[rows, to].set(tokens)
    if experts is not None:
        experts = jnp.zeros_like(experts).at[:, rows, to].set(experts)
    real = columns < jnp.sum(attention_mask, axis=1, keepdims=True)
    hidden, record = _run(config, params, tokens, columns, real, None, experts, layout)
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


def _run(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "#B S"],
    real: Bool[Array, "B S"],
    segment_ids: Int[Array, "B S"] | None,
    experts: Int[Array, "M B S k"] | None,
    layout: Layout,
) -> tuple[Float[Array, "B S E"], RouterRecord | None]:
    """`_run_columns`, after appending padding until the layout divides the number of columns."""
    pad, length = partial(layers.pad_columns, multiple=layout.column_multiple), tokens.shape[1]
    tokens, positions, real, segment_ids = jax.tree.map(pad, (tokens, positions, real, segment_ids))
    experts = None if experts is None else jax.vmap(pad)(experts)
    hidden, record = _run_columns(config, params, tokens, positions, real, segment_ids, experts, layout)
    if record is not None:
        record = dataclasses.replace(record, experts=record.experts[:, :, :length])
    return hidden[:, :length], record


def _run_columns(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "#B S"],
    real: Bool[Array, "B S"],
    segment_ids: Int[Array, "B S"] | None,
    experts: Int[Array, "M B S k"] | None,
    layout: Layout,
) -> tuple[Float[Array, "B S E"], RouterRecord | None]:
    """Embedding, scanned layers, last norm. One iteration of the scan is the shortest repeating run of layer kinds."""
    kinds, products = config.sparse_layers, training_products(config.precision)
    period = _period(kinds)
    rope = layers.rope_table(positions, tokens.shape[1], config.head_dim, config.rope_theta)

    def attend(q, k, v):
        how = {"kernel": config.attention, "float32": config.precision.float32}
        return layout.attention(q, k, v, segment_ids=segment_ids, **how), None

    def layer(x, weights, imposed):
        # XLA applies the first constraint on a value, and the input of a layer is what is kept for the backward pass
        whole = layout.constrain(layout.constrain(x, SAVED), RESIDUAL)
        x, _, routing = block(config, weights, whole, rope, attend, products, imposed, layout)
        return layout.constrain(x, SAVED), None if routing is None else (routing.experts, router_metrics(routing, real))

    if config.remat != "none":
        kept = {"products": jax.checkpoint_policies.save_only_these_names(PRODUCT), "full": None}
        layer = jax.checkpoint(layer, prevent_cse=False, policy=kept[config.remat])

    def turn(x, inputs):
        stacked, imposed = inputs
        routed = []
        for number in range(period):
            chosen = imposed[len(routed)] if kinds[number] and imposed is not None else None
            x, record = layer(x, layer_params(kinds[:period], stacked, number), chosen)
            routed += [] if record is None else [record]
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *routed) if routed else None

    x = layout.constrain(layout.lookup(params["embed_tokens"], tokens, DTYPES[config.precision.compute]), SAVED)
    turns = config.num_layers // period
    dealt = jax.tree.map(lambda leaf: leaf.reshape(turns, -1, *leaf.shape[1:]), (params["layers"], experts))
    x, routed = jax.lax.scan(turn, x, dealt, unroll=config.remat == "none")
    record = None
    if routed is not None:
        chosen, metrics = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), routed)
        record = RouterRecord(chosen, {name: jnp.mean(rows, axis=0) for name, rows in metrics.items()})
    return layers.rms_norm(layout.constrain(x, RESIDUAL), params["norm"], config.rms_norm_eps), record


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
    config: ModelConfig, params: Params, hidden: Float[Array, "... E"], layout: Layout = ONE_DEVICE
) -> Float[Array, "... V"]:
    """float32 logits of hidden states: both sides in `precision.head`, and sums in `precision.accumulation`."""
    rows = hidden.astype(DTYPES[config.precision.head])
    # constrained where it is used, so that its gradient is divided too, chunk by chunk
    table = layout.constrain(head_kernel(config, params), TABLE)
    arithmetic = layers.Arithmetic(DTYPES[config.precision.accumulation], config.precision.float32)
    out = layers.product(rows, table.T, arithmetic, jnp.dtype(jnp.float32))
    return layout.constrain(out, LOGITS)
