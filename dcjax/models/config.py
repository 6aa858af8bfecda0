"""Architectures as data: `ModelConfig`, its numerics, and the presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax

from dcjax.models.rope import Llama3Scaling, RopeScaling, YarnScaling

DtypeName = Literal["float32", "bf16", "fp16"]

DTYPES: dict[DtypeName, jnp.dtype] = {
    "float32": jnp.dtype(jnp.float32),
    "bf16": jnp.dtype(jnp.bfloat16),
    "fp16": jnp.dtype(jnp.float16),
}
"""Dtypes by the names that configurations use."""

Float32Products = Literal["highest", "high", "default"]

PRECISIONS: dict[Float32Products, lax.Precision] = {
    "highest": lax.Precision.HIGHEST,
    "high": lax.Precision.HIGH,
    "default": lax.Precision.DEFAULT,
}
"""JAX's precisions by the names that configurations use."""

Family = Literal["qwen3", "qwen2", "llama"]
AttentionKernel = Literal["auto", "xla", "cudnn", "splash", "ragged"]
Remat = Literal["auto", "none", "products", "full"]

UNROLLED = 3
"""The most layers that the remat auto unrolls, and keeps everything of."""


@dataclass(frozen=True)
class Precision:
    """The dtypes that the training forward and backward compute in. Norms, softmax, router and log-probs are float32
    throughout, and the router's product keeps all bits whatever is chosen here.

    Raises:
      ValueError: a field has an unknown value.
    """

    parameters: DtypeName = "float32"
    """Dtype of fresh parameters, and with them of the optimiser's moments."""
    compute: DtypeName = "float32"
    """Dtype of activations, and of both sides of every product; with fp16 the loss is scaled dynamically."""
    accumulation: DtypeName = "float32"
    """Dtype of sums inside products, forward and backward; gradients of parameters are not rounded further."""
    head: DtypeName = "float32"
    """Dtype of both sides of the product with the output head. Paper B studies float32 here as a remedy for the gap."""
    float32_products: Float32Products = "highest"
    """How training and serving multiply float32 with float32: highest keeps all bits. high and default are faster and
    keep fewer: on a TPU three passes of bf16 or one, on an NVIDIA GPU TF32. CPUs keep all bits in any case."""

    def __post_init__(self):
        for name in ("parameters", "compute", "accumulation", "head"):
            _require_word(f"model.precision.{name}", getattr(self, name), DTYPES)
        _require_word("model.precision.float32_products", self.float32_products, PRECISIONS)

    @property
    def float32(self) -> lax.Precision:
        """`float32_products` as JAX's own type."""
        return PRECISIONS[self.float32_products]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, Qwen or Llama: grouped-query attention, RoPE, SwiGLU or experts, RMSNorm.

    Raises:
      ValueError: a size is not positive, the key-value heads do not divide the heads, the experts' fields do not
        agree, or rope_scaling is of another kind or does not fit rope_theta.
    """

    family: Family = "qwen3"
    """qwen3 normalises queries and keys, and may have experts; qwen2 has biases on queries, keys and values instead;
    llama has neither."""
    vocab_size: int = 32
    """Rows of the embedding table (tokens)."""
    hidden_size: int = 64
    """Width of the residual stream."""
    intermediate_size: int = 192
    """Width of the SwiGLU's hidden layer."""
    num_layers: int = 2
    """Decoder layers."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key-value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int = 16
    """Width of one head; even, as RoPE rotates pairs."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How the rotary frequencies are changed for sequences longer than those of the first training; None leaves them as
    they are. A recipe gives a Llama3Scaling or a YarnScaling of dcjax.models.rope, whose fields may be overridden."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = True
    """Whether the output head is the embedding table."""
    max_position_embeddings: int = 40_960
    """Longest sequence that the model is made for, in tokens; exported, but not enforced here. With YaRN it is made for
    rope_scaling.factor times rope_scaling.original_max_position_embeddings tokens, if that is more."""
    num_experts: int = 0
    """Number of experts in each sparse layer; 0 for a dense model."""
    num_experts_per_tok: int = 8
    """Number of experts that each token is routed to."""
    moe_intermediate_size: int = 768
    """Width of one expert's hidden layer."""
    norm_topk_prob: bool = True
    """Whether the chosen experts' probabilities are divided by their sum."""
    decoder_sparse_step: int = 1
    """Every n-th layer, counted from 1, has experts."""
    mlp_only_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that are always dense."""
    remat: Remat = "products"
    """What the backward pass recomputes. products keeps the results of matrix products and recomputes the rest, and
    full keeps only the input of each layer; both loop over the layers, so that the program does not grow with depth.
    none keeps everything and unrolls the layers, which is the fastest for two or three. auto is none up to three
    layers, and products for more."""
    attention: AttentionKernel = "auto"
    """auto picks by platform: splash (Pallas) on TPU, cudnn on GPU in bf16 and fp16, xla elsewhere. ragged is auto, but
    that sampling on a GPU reads only the filled part of the KV cache, by a Pallas kernel that no GPU has run yet."""
    head_chunk: int = 512
    """Number of columns of a response whose logits are in memory at one time (tokens per sequence)."""
    precision: Precision = field(default_factory=Precision)

    def __post_init__(self):
        _require_word("model.family", self.family, get_args(Family))
        _require_word("model.attention", self.attention, get_args(AttentionKernel))
        _require_word("model.remat", self.remat, get_args(Remat))
        positive = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "decoder_sparse_step",
            "head_chunk",
        )
        for name in (*positive, "num_experts"):
            value, least = getattr(self, name), 0 if name == "num_experts" else 1
            if value < least:
                raise ValueError(f"model.{name} is {value}; it must be at least {least}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"model.{name} is {value}; it must be a finite number above 0")
        self._check_rope_scaling()
        self._check_heads()
        self._check_experts()

    def _check_rope_scaling(self):
        if not isinstance(self.rope_scaling, RopeScaling | None):
            kinds = " or ".join(kind.__name__ for kind in get_args(RopeScaling))
            raise ValueError(f"model.rope_scaling is {self.rope_scaling!r}; it must be None, or a {kinds}")
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise ValueError(f"model.rope_theta is {self.rope_theta}; with YaRN it must be above 1")

    def _check_heads(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}; "
                "each key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; RoPE rotates pairs, so it must be even")

    def _check_experts(self):
        if not self.num_experts:
            return
        if self.family != "qwen3":
            raise ValueError(f"model.num_experts is {self.num_experts}; family {self.family} has none, so it must be 0")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"model.num_experts_per_tok is {self.num_experts_per_tok}; "
                f"it must be at most model.num_experts, {self.num_experts}"
            )
        for layer in self.mlp_only_layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"model.mlp_only_layers names layer {layer}; layers are 0 to {self.num_layers - 1}")

    @property
    def resolved_remat(self) -> Literal["none", "products", "full"]:
        """`remat`, with auto replaced by what it stands for."""
        if self.remat == "auto":
            return "none" if self.num_layers <= UNROLLED else "products"
        return self.remat

    @property
    def longest_sequence(self) -> int:
        """Longest sequence that the model is made for, in tokens.

        With YaRN it may be more than `max_position_embeddings`: the cards of the Qwen models turn YaRN on and leave
        that field as it was.
        """
        if isinstance(self.rope_scaling, YarnScaling):
            scaled = int(self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings)
            return max(self.max_position_embeddings, scaled)
        return self.max_position_embeddings

    @property
    def described_rope(self) -> str:
        """RoPE in words, for messages."""
        scaling = self.rope_scaling
        if scaling is None:
            return f"RoPE of theta {self.rope_theta:g}, without scaling"
        return (
            f"RoPE of theta {self.rope_theta:g}, scaled by {scaling.factor:g} ({scaling.rope_type}) from "
            f"{scaling.original_max_position_embeddings} tokens"
        )

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts."""
        return tuple(
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
            for layer in range(self.num_layers)
        )


def _require_word(name: str, value: str, words) -> None:
    if value not in words:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(words)}")


_TINY = ModelConfig(remat="auto")


_FULL = ModelConfig(
    vocab_size=151_936,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    tie_embeddings=False,
    remat="full",
)


def _published(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int = 8, **others) -> ModelConfig:
    """A full-size model: the settings that most Qwen3 models share, with these sizes."""
    return replace(
        _FULL,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        **others,
    )


def _llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, **others
) -> ModelConfig:
    """The same of the Llama family."""
    shared = {"family": "llama", "head_dim": head_dim, "rms_norm_eps": 1e-5, "tie_embeddings": True}
    return _published(layers, hidden, intermediate, heads, kv_heads, **(shared | others))


def _llama3(layers: int, hidden: int, intermediate: int, head_dim: int, *, factor: float, **others) -> ModelConfig:
    """The same of Llama 3.1 and 3.2, whose RoPE is scaled by `factor`."""
    shared = {
        "vocab_size": 128_256,
        "rope_theta": 5e5,
        "rope_scaling": Llama3Scaling(factor, 1.0, 4.0, original_max_position_embeddings=8192),
        "max_position_embeddings": 131_072,
    }
    return _llama(layers, hidden, intermediate, 32, 8, head_dim, **(shared | others))


presets: dict[str, ModelConfig] = {
    "tiny": _TINY,
    "tiny-moe": replace(_TINY, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96),
    "qwen3-0.6b": _published(28, 1024, 3072, 16, tie_embeddings=True),
    "qwen3-1.7b": _published(28, 2048, 6144, 16, tie_embeddings=True),
    "qwen3-4b": _published(36, 2560, 9728, 32, tie_embeddings=True),
    "qwen3-8b": _published(36, 4096, 12_288, 32),
    "qwen3-14b": _published(40, 5120, 17_408, 40),
    "qwen3-32b": _published(64, 5120, 25_600, 64),
    "qwen3-30b-a3b": _published(48, 2048, 6144, 32, 4, num_experts=128, moe_intermediate_size=768),
    "qwen3-235b-a22b": _published(94, 4096, 12_288, 64, 4, num_experts=128, moe_intermediate_size=1536),
    "deepseek-r1-distill-qwen-1.5b": _published(
        28, 1536, 8960, 12, 2, family="qwen2", rope_theta=1e4, max_position_embeddings=131_072
    ),
    "smollm2-135m": _llama(30, 576, 1536, 9, 3, 64, vocab_size=49_152, rope_theta=1e5, max_position_embeddings=8192),
    "llama-3.2-1b": _llama3(16, 2048, 8192, 64, factor=32.0),
    "llama-3.1-8b": _llama3(32, 4096, 14_336, 128, factor=8.0, tie_embeddings=False),
}
"""Configurations by name; those of released models have the published sizes."""
