"""The engine that samples: its numerics, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from dcjax.recipe.checks import require, require_choice
from dcjax.serving.formats import Format, FormatName, KVCacheName, formats
from dcjax.serving.in_training import InTraining


@dataclass(frozen=True)
class ServingConfig:
    """The engine that samples."""

    format: FormatName | Format = "int8"
    """Numerics of the deployed policy: float32, bf16 or fp16; int8 or int4 weights in groups of 32, with bf16
    activations; int8_channel or fp8_weight_only, with a scale per output channel; w8a8, w8a8_rotated or fp8 (e4m3),
    which quantise each token's activations too. int8, w8a8 and fp8 have a KV cache in 8 bits.
    In a recipe also a format of one's own: docs/formats.md."""
    kv_cache: KVCacheName = "auto"
    """Storage format of keys and values; auto is the default of the serving format."""
    keep: tuple[str, ...] = ()
    """Names or patterns of weights that are not quantised, for example lm_head or experts_*."""
    in_training: InTraining = "masters"
    """What the trainer's forward pass takes from the serving format, while gradients pass straight through:
    nothing (masters), the weights as they are served (weights), or activations and the KV cache too (all)."""
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
        if isinstance(self.format, str):
            if self.format not in formats:
                raise ValueError(f"serving.format is {self.format!r}; it must be one of {', '.join(formats)}")
        elif not isinstance(self.format, Format):
            raise ValueError(f"serving.format is {self.format!r}; it must be a name or a dcjax.serving.formats.Format")
        elif formats.get(self.format.name, self.format) != self.format:
            raise ValueError(f"serving.format calls itself {self.format.name!r}, which is another format's name")
        for name in ("kv_cache", "in_training"):
            require_choice("serving.", self, name)
