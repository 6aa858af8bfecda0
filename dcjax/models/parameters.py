"""The table of a model's parameters: all that initialisation, sharding, files and serving formats know about them.

A parameter is added here, in one line, and used in `block`; everything else follows from the table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import jax
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Int

from dcjax.models.config import DTYPES, ModelConfig
from dcjax.types import Array, Params

Role = Literal["kernel", "table", "wide", "router"]
"""What a serving format does with a parameter.

Kernels [..., K, N] are contracted over K and tables [V, E] over E: both are quantised. Parameters of role
"wide" stay in the activations' dtype, and the router stays in float32.
"""


@dataclass(frozen=True)
class Parameter:
    """One array of the params tree, which stacks the slices of all its layers, and within a layer of all its experts.

    A slice is one tensor in Hugging Face's files.
    """

    name: str
    """Its key in the tree; no two parameters of a model share a name."""
    shape: tuple[int, ...]
    """Shape of a slice."""
    axes: tuple[str, ...]
    """Logical axes of a slice, which `sharding.rules` maps to a mesh."""
    initial: float | Literal["ones", "zeros"]
    """Fresh values: these, or normal ones of this standard deviation."""
    hf_name: str
    """Hugging Face's name of a slice, with {layer} and {expert} to fill in."""
    role: Role
    layers: tuple[int, ...] | None = None
    """The numbers of the layers that have it, ascending: all layers, those with experts, or those without.
    None outside the layers."""
    experts: int | None = None
    """The number of experts in a layer; None unless each expert has its own slice."""

    @property
    def path(self) -> tuple[str, ...]:
        """Keys from the root of the tree."""
        return (self.name,) if self.layers is None else ("layers", self.name)

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading axes: layers, experts."""
        layers = None if self.layers is None else len(self.layers)
        return tuple(size for size in (layers, self.experts) if size is not None)

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape of the array in the tree."""
        return self.stack + self.shape

    @property
    def stacked_axes(self) -> tuple[str, ...]:
        """Logical axes of the array in the tree."""
        layers, experts = () if self.layers is None else ("layers",), () if self.experts is None else ("experts",)
        return layers + experts + self.axes

    @property
    def size(self) -> int:
        """Number of elements of the array in the tree."""
        return math.prod(self.stacked_shape)

    @property
    def initializer(self) -> initializers.Initializer:
        """(key, shape, dtype) -> fresh values."""
        if isinstance(self.initial, str):
            return {"ones": initializers.ones, "zeros": initializers.zeros}[self.initial]
        return initializers.normal(self.initial)

    @property
    def contracted_axis(self) -> int | None:
        """The axis that products sum over: −2 of kernels, −1 of tables; None for what no format quantises."""
        return {"kernel": -2, "table": -1}.get(self.role)

    @property
    def transposed(self) -> bool:
        """Whether the files hold the transpose: kernels are [in, out] in the tree and [out, in] in the files."""
        return self.role in ("kernel", "router")

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of a slice in the files."""
        return self.shape[::-1] if self.transposed else self.shape

    def indices(self) -> Iterator[tuple[int, ...]]:
        """The index of each slice along the axes of `stack`."""
        return itertools.product(*map(range, self.stack))

    def tensor_name(self, index: tuple[int, ...]) -> str:
        """Hugging Face's name of the slice at an index along the axes of `stack`."""
        layer = None if self.layers is None else self.layers[index[0]]
        return self.hf_name.format(layer=layer, expert=index[-1] if index else None)

    def tensor_names(self) -> Iterator[str]:
        """Hugging Face's names of all slices, in the order of `indices`."""
        return map(self.tensor_name, self.indices())


def head_name(config: ModelConfig) -> str:
    """The name of the parameter that makes logits: the embedding's if they are tied."""
    return "embed_tokens" if config.tie_embeddings else "lm_head"


@cache
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """The parameters of a model.

    Flax draws fresh values by a parameter's place in this order, among those of the layers and among the others.
    """
    c = config
    sparse = tuple(layer for layer, has_experts in enumerate(c.sparse_layers) if has_experts)
    dense = tuple(layer for layer, has_experts in enumerate(c.sparse_layers) if not has_experts)
    return (
        _table(c, "embed_tokens", "model.embed_tokens.weight"),
        *_attention(c, tuple(range(c.num_layers))),
        *(_mlp(c, dense) if dense else ()),
        *(_experts(c, sparse) if sparse else ()),
        Parameter("norm", (c.hidden_size,), ("embed",), "ones", "model.norm.weight", "wide"),
        *(() if c.tie_embeddings else (_table(c, "lm_head", "lm_head.weight"),)),
    )


def _attention(c: ModelConfig, layers: tuple[int, ...]) -> Iterator[Parameter]:
    d, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield _vector("input_layernorm", d, "embed", "ones", "input_layernorm.weight", layers)
    yield _kernel("o_proj", (q, d), ("heads", "embed"), "self_attn.o_proj.weight", layers, _residual_scale(c))
    yield _vector("post_attention_layernorm", d, "embed", "ones", "post_attention_layernorm.weight", layers)
    for x, width, heads in (("q", q, "heads"), ("k", kv, "kv_heads"), ("v", kv, "kv_heads")):
        yield _kernel(f"{x}_proj", (d, width), ("embed", heads), f"self_attn.{x}_proj.weight", layers)
        if c.family == "qwen2":
            yield _vector(f"{x}_bias", width, heads, "zeros", f"self_attn.{x}_proj.bias", layers)
    if c.family == "qwen3":
        yield _vector("q_norm", c.head_dim, "head_dim", "ones", "self_attn.q_norm.weight", layers)
        yield _vector("k_norm", c.head_dim, "head_dim", "ones", "self_attn.k_norm.weight", layers)


def _mlp(c: ModelConfig, layers: tuple[int, ...]) -> Iterator[Parameter]:
    d, wide, scale = c.hidden_size, c.intermediate_size, _residual_scale(c)
    yield _kernel("gate_proj", (d, wide), ("embed", "mlp"), "mlp.gate_proj.weight", layers)
    yield _kernel("up_proj", (d, wide), ("embed", "mlp"), "mlp.up_proj.weight", layers)
    yield _kernel("down_proj", (wide, d), ("mlp", "embed"), "mlp.down_proj.weight", layers, scale)


def _experts(c: ModelConfig, layers: tuple[int, ...]) -> Iterator[Parameter]:
    d, wide, scale = c.hidden_size, c.moe_intermediate_size, _residual_scale(c)
    into, out, hf_name = ("embed", "expert_mlp"), ("expert_mlp", "embed"), "mlp.experts.{expert}"
    each = partial(_kernel, layers=layers, experts=c.num_experts)
    yield _kernel("router", (d, c.num_experts), ("embed", "choices"), "mlp.gate.weight", layers, role="router")
    yield each("experts_gate_proj", (d, wide), into, f"{hf_name}.gate_proj.weight")
    yield each("experts_up_proj", (d, wide), into, f"{hf_name}.up_proj.weight")
    yield each("experts_down_proj", (wide, d), out, f"{hf_name}.down_proj.weight", scale=scale)


def _residual_scale(c: ModelConfig) -> float:
    # projections into the residual stream start smaller in deeper stacks (GPT-2), so its variance does not grow
    return (2 * c.num_layers) ** -0.5


def _table(c: ModelConfig, name: str, hf_name: str) -> Parameter:
    return Parameter(name, (c.vocab_size, c.hidden_size), ("vocab", "embed"), c.hidden_size**-0.5, hf_name, "table")


def _vector(
    name: str, width: int, axis: str, initial: Literal["ones", "zeros"], hf_name: str, layers: tuple[int, ...]
) -> Parameter:
    return Parameter(name, (width,), (axis,), initial, f"model.layers.{{layer}}.{hf_name}", "wide", layers)


def _kernel(
    name: str,
    shape: tuple[int, int],
    axes: tuple[str, str],
    hf_name: str,
    layers: tuple[int, ...],
    scale: float = 1.0,
    *,
    role: Role = "kernel",
    experts: int | None = None,
) -> Parameter:
    deviation = scale * shape[0] ** -0.5
    return Parameter(name, shape, axes, deviation, f"model.layers.{{layer}}.{hf_name}", role, layers, experts)


@cache
def _by_name(config: ModelConfig) -> Mapping[str, Parameter]:
    return {parameter.name: parameter for parameter in parameters(config)}


def parameter_named(config: ModelConfig, name: str) -> Parameter:
    """The parameter of a model that has this name.

    Raises:
      ValueError: there is none.
    """
    named = _by_name(config)
    if name not in named:
        raise ValueError(f"this model has no parameter {name!r}; it has {', '.join(named)}")
    return named[name]


def parameter_tree(config: ModelConfig, value: Callable[[Parameter], Any]) -> Params:
    """The tree of `init_params`, with the value of this function at each parameter."""
    tree: Params = {"layers": {}}
    for parameter in parameters(config):
        (tree if parameter.layers is None else tree["layers"])[parameter.name] = value(parameter)
    return tree


@cache
def logical_axes(config: ModelConfig) -> Params:
    """The tree of `init_params`, at each leaf a PartitionSpec of logical axes for `sharding.rules` to map.

    Callers share the tree, and must not change it.
    """
    return parameter_tree(config, lambda parameter: PartitionSpec(*parameter.stacked_axes))


@cache
def abstract_params(config: ModelConfig) -> Params:
    """The tree of `init_params` as shapes and dtypes; nothing is allocated, and no device is used.

    Callers share the tree, and must not change it.
    """
    dtype = DTYPES[config.precision.parameters]
    return parameter_tree(config, lambda parameter: jax.ShapeDtypeStruct(parameter.stacked_shape, dtype))


def count_params(config: ModelConfig) -> int:
    """Number of parameters: of elements of all arrays."""
    return sum(parameter.size for parameter in parameters(config))


def active_params(config: ModelConfig) -> int:
    """Number of parameters that one token passes through: of a layer's experts only `num_experts_per_tok`."""
    return sum(
        parameter.size // (parameter.experts or 1) * (config.num_experts_per_tok if parameter.experts else 1)
        for parameter in parameters(config)
    )


def layer_params(config: ModelConfig, stacked: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The parameters of one layer, from those of all layers (`params["layers"]`).

    Raises:
      ValueError: the model has no parameter of one of these names.
    """
    kinds = config.sparse_layers
    return take_layer(config, stacked, kinds[layer], layer, kinds[:layer].count(kinds[layer]))


def take_layer(
    config: ModelConfig,
    stacked: Mapping[str, Any],
    sparse: bool,
    layer: int | Int[Array, ""],
    rank: int | Int[Array, ""],
) -> dict[str, Any]:
    """As `layer_params`, for numbers that may be traced: the layer's own, and its rank among the layers of its kind.

    `sparse` is that kind: whether the layer has experts.
    """
    first = config.sparse_layers.index(sparse)
    owners = {name: parameter_named(config, name).layers or () for name in stacked}
    return {
        name: leaf[layer if len(owners[name]) == config.num_layers else rank]
        for name, leaf in stacked.items()
        if first in owners[name]
    }
