"""The engine that samples: its numerics, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from dcjax.recipe.checks import require, require_choice
from dcjax.serving.quantize import FormatName, KVCacheName


@dataclass(frozen=True)
class ServingConfig:
    """The engine that samples."""

    format: FormatName = "int8"
    """Numerics of the deployed policy: float32, bf16 or fp16; int8 or fp8 (e4m3) weights, activations and KV cache;
    int8_weight_only, fp8_weight_only or int4 (in groups of 32), which quantise only the weights."""
    kv_cache: KVCacheName = "auto"
    """Storage format of keys and values; auto is the default of the serving format."""
    keep: tuple[str, ...] = ()
    """Names or patterns of weights that are not quantised, for example lm_head or experts_*."""
    slots: int = 32
    """Number of samples that are decoded at once."""
    steps_per_call: int = 8
    """Tokens decoded in each slot before finished samples are replaced."""
    prefill_tokens: int = 4096
    """Tokens per prefill pass on each copy of the model, from several prompts or from a part of a long one."""
    tensor: int = 1
    """Devices that share one copy of the model; the number of copies follows from the number of devices."""
    devices: int = 0
    """Devices that only serve: the last ones of each host, equally many on each.
    With 0, the training devices serve too."""

    def __post_init__(self):
        require("serving.", self, {"slots": 1, "steps_per_call": 1, "prefill_tokens": 1, "tensor": 1, "devices": 0})
        require_choice("serving.", self, "format")
        require_choice("serving.", self, "kv_cache")
