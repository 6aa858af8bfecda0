"""What the network computes. Imports nothing of rl, serving or data."""

from dcjax.models.config import ModelConfig, presets
from dcjax.models.transformer import count_params, forward, init_params, logical_axes, token_logps

__all__ = ["ModelConfig", "count_params", "forward", "init_params", "logical_axes", "presets", "token_logps"]
