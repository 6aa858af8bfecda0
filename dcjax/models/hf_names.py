"""Which Hugging Face tensors each array of the params tree is stacked from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from dcjax.models.config import ModelConfig


@dataclass(frozen=True)
class Leaf:
    """One array of the params tree, and the Hugging Face tensors that it is stacked from."""

    path: tuple[str, ...]
    """Keys in the tree."""
    template: str
    """Names of the tensors, with {layer} and {expert} to fill in."""
    matrix: tuple[int, ...]
    """Shape of the part of one layer, or of one expert, in the tree."""
    layers: tuple[int, ...] | None = None
    """The numbers of the layers that have it, in order; None outside the layers."""
    experts: int | None = None
    """The number of experts in a layer; None for arrays that are not of experts."""

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes: layers, experts."""
        layers = None if self.layers is None else len(self.layers)
        return tuple(size for size in (layers, self.experts) if size is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array in the tree."""
        return self.stack + self.matrix

    @property
    def transposed(self) -> bool:
        """Whether the files hold the transpose: kernels are [in, out] in the tree and [out, in] in the files."""
        return self.layers is not None and len(self.matrix) == 2

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the file."""
        return self.matrix[::-1] if self.transposed else self.matrix

    def indices(self) -> Iterator[tuple[int, ...]]:
        """The index of each tensor along the axes of `stack`."""
        return itertools.product(*map(range, self.stack))

    def name(self, index: tuple[int, ...]) -> str:
        """Name of the tensor at an index along the axes of `stack`."""
        layer = self.layers[index[0]] if self.layers is not None else None
        return self.template.format(layer=layer, expert=index[-1] if index else None)


def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
    """The arrays of `init_params`'s tree, each with its Hugging Face names."""
    c = config
    d, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    per_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "self_attn.q_proj": (d, q),
        "self_attn.k_proj": (d, kv),
        "self_attn.v_proj": (d, kv),
        "self_attn.o_proj": (q, d),
    }
    if c.family == "qwen3":
        per_layer |= {"self_attn.q_norm": (c.head_dim,), "self_attn.k_norm": (c.head_dim,)}
    every = tuple(range(c.num_layers))
    table = [Leaf(("embed_tokens",), "model.embed_tokens.weight", (c.vocab_size, d))]
    table += [_layer_leaf(name.split(".")[-1], f"{name}.weight", shape, every) for name, shape in per_layer.items()]
    if c.family == "qwen2":
        widths = {"q": q, "k": kv, "v": kv}
        table += [_layer_leaf(f"{x}_bias", f"self_attn.{x}_proj.bias", (n,), every) for x, n in widths.items()]
    table += [*_dense_leaves(c), *_sparse_leaves(c), Leaf(("norm",), "model.norm.weight", (d,))]
    return (*table, *([] if c.tie_embeddings else [Leaf(("lm_head",), "lm_head.weight", (c.vocab_size, d))]))


def _layer_leaf(key: str, name: str, matrix: tuple[int, ...], layers: tuple[int, ...], experts=None) -> Leaf:
    return Leaf(("layers", key), f"model.layers.{{layer}}.{name}", matrix, layers, experts)


def _dense_leaves(c: ModelConfig) -> list[Leaf]:
    dense = tuple(layer for layer, sparse in enumerate(c.sparse_layers) if not sparse)
    return [_layer_leaf(key, f"mlp.{key}.weight", shape, dense) for key, shape in _mlp(c, c.intermediate_size) if dense]


def _sparse_leaves(c: ModelConfig) -> list[Leaf]:
    sparse = tuple(layer for layer, is_sparse in enumerate(c.sparse_layers) if is_sparse)
    if not sparse:
        return []
    experts = [
        _layer_leaf(f"experts_{key}", f"mlp.experts.{{expert}}.{key}.weight", shape, sparse, c.num_experts)
        for key, shape in _mlp(c, c.moe_intermediate_size)
    ]
    return [_layer_leaf("router", "mlp.gate.weight", (c.hidden_size, c.num_experts), sparse), *experts]


def _mlp(c: ModelConfig, width: int) -> list[tuple[str, tuple[int, int]]]:
    d = c.hidden_size
    return [("gate_proj", (d, width)), ("up_proj", (d, width)), ("down_proj", (width, d))]
