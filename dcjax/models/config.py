"""Architectures as data: `ModelConfig` and the presets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """A Qwen3 dense transformer: QK-norm, grouped-query attention, RoPE, SwiGLU, RMSNorm.

    Raises:
      ValueError: a size that is not positive, or heads that the key-value heads do not divide.
    """

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
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = True
    """The output head is the embedding table."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        for name in sizes:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"model.{name} is {value}; it must be at least 1")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"model.{name} is {value}; it must be a finite number above 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}; "
                "each key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; RoPE rotates pairs, so it must be even")


presets: dict[str, ModelConfig] = {"tiny": ModelConfig()}
"""Configurations by name."""
