"""The architecture of a GGUF file, from its metadata, as a Hugging Face folder would say it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dcjax.models.config import ModelConfig
from dcjax.models.hf_config import parse_config
from dcjax.models.hf_files import quote
from dcjax.models.rope import Llama3Scaling
from dcjax.tools.gguf.container import Container

KINDS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
"""The architectures that are read, and Hugging Face's names of them."""

TABLE = "token_embd.weight"
HEAD = "output.weight"
FACTORS = "rope_freqs.weight"
"""What llama.cpp divides the rotary frequencies by: Llama 3's scaling, which no other metadata holds."""

PUBLISHED: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The scaling of Llama 3.1, 3.2 and 3.3, beside its factor. Only their ratios can be told from what is divided by."""

_BETAS = ("beta_fast", "beta_slow")

_KNOWN = (
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    *(f"rope.scaling.yarn_{beta}" for beta in _BETAS),
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
)
"""The keys of an architecture that are read. Any other says that the model computes what none of these does."""


def read_config(container: Container) -> ModelConfig:
    """The architecture that a GGUF file describes.

    llama.cpp normalises the probabilities of a Qwen3-MoE's chosen experts, and has experts in all of its layers; the
    head is tied where the file has none.

    Raises:
      ValueError: the file is no model, is one part of several, or is of an architecture, or has a setting, that is not
        supported; or a value is missing, of the wrong type or out of range; the message is one line.
    """
    architecture = container.text("general.architecture")
    if architecture not in KINDS:
        raise container.refuse("general.architecture", f"one of those supported, {', '.join(KINDS)}")
    if container.text("general.type", "model") != "model":
        raise container.refuse("general.type", "model; adapters and projectors are not read")
    if container.integer("split.count", 1) > 1:
        raise container.refuse("split.count", "1; join the parts first, with llama.cpp's llama-gguf-split --merge")
    known = {f"{architecture}.{name}" for name in _KNOWN}
    for key in container.metadata:
        if key.startswith(f"{architecture}.") and key not in known:
            raise container.refuse(key, "absent: what it says is not supported")
    return parse_config(_fields(container, architecture), str(container.path))


def _fields(container: Container, architecture: str) -> dict[str, Any]:
    """The fields of config.json."""

    def size(name: str, default: int | None = None) -> int:
        return container.integer(f"{architecture}.{name}", default)

    hidden, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", hidden // max(heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if size(name, head_dim) != head_dim:
            raise container.refuse(f"{architecture}.{name}", f"{head_dim}, the width of a head")
    theta = container.number(f"{architecture}.rope.freq_base", 10_000.0)
    fields = {
        "model_type": KINDS[architecture],
        "vocab_size": size("vocab_size", _rows(container)),
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": container.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(container, architecture, theta, head_dim),
        "tie_word_embeddings": HEAD not in container.tensors,
    }
    experts = size("expert_count", 0)
    if experts and architecture != "qwen3moe":
        raise container.refuse(f"{architecture}.expert_count", f"0; {architecture} with experts is not supported")
    if architecture == "qwen3moe":
        fields |= {
            "num_experts": experts,
            "num_experts_per_tok": size("expert_used_count"),
            "moe_intermediate_size": size("expert_feed_forward_length"),
            "norm_topk_prob": True,
        }
    return fields


def _rows(container: Container) -> int:
    """The number of rows of the embedding table."""
    if TABLE not in container.tensors:
        raise ValueError(f"{container.path} has no tensor {TABLE}; it must have the model's weights")
    return container.tensors[TABLE].shape[0]


def _rope_scaling(container: Container, architecture: str, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The field rope_scaling: of Llama 3 from the factors of the frequencies, of YaRN from the metadata."""
    prefix = f"{architecture}.rope.scaling"
    # llama.cpp's own default
    kind = container.text(f"{prefix}.type", "linear")
    factor = container.number(f"{prefix}.factor", 0.0) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise container.refuse(f"{prefix}.type", "none or yarn, the ones supported")
    if kind == "linear" and factor != 1:
        raise container.refuse(f"{prefix}.factor", "1: linear scaling of positions is not supported")
    if FACTORS in container.tensors and architecture == "llama":
        if kind == "yarn":
            raise container.refuse(f"{prefix}.type", f"none, as the file has {FACTORS}")
        return _llama3_scaling(container, theta, head_dim)
    if kind != "yarn":
        return None
    given = {beta: container.number(key) for beta in _BETAS if (key := f"{prefix}.yarn_{beta}") in container.metadata}
    original = container.integer(f"{prefix}.original_context_length")
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **given}


def _llama3_scaling(container: Container, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's scaling, whose factor is the largest of the factors, if the others follow from it as published."""
    stored = container.tensors[FACTORS]
    if stored.kind.name != "F32" or stored.shape != (head_dim // 2,):
        raise ValueError(
            f"{container.path}: {FACTORS} is of type {stored.kind.name} and shape {list(stored.shape)}; "
            f"it must be of type F32 and shape [{head_dim // 2}]"
        )
    factors = stored.data.view("<f4")
    if (factors == 1).all():
        return None
    if theta > 0 and 1 < (factor := float(factors.max())) < math.inf:
        scaling = Llama3Scaling(factor, **PUBLISHED)
        # the converter computes in float32
        if np.allclose(1 / factors, scaling.multipliers(theta, head_dim), rtol=1e-3, atol=0):
            return {"rope_type": scaling.rope_type, "factor": factor, **PUBLISHED}
    raise ValueError(
        f"{container.path}: {FACTORS} divides RoPE's frequencies by {quote(factors.tolist())}; these must be 1, or "
        f"follow from the largest and rope_theta {theta:g} as in Llama 3.1, with {PUBLISHED}"
    )
