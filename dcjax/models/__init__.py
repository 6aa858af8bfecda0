"""The network: its architecture, parameters, forward pass and file formats. Imports nothing of rl, serving or data."""

from dcjax.models.config import ModelConfig, Precision, presets
from dcjax.models.hf import load_hf
from dcjax.models.hf_config import read_config, read_end_tokens, read_max_new_tokens
from dcjax.models.hf_save import save_hf
from dcjax.models.packed import packed_logps
from dcjax.models.parameters import abstract_params, count_params, logical_axes
from dcjax.models.scores import TokenScores, token_logps
from dcjax.models.transformer import forward, init_params

__all__ = [
    "ModelConfig",
    "Precision",
    "TokenScores",
    "abstract_params",
    "count_params",
    "forward",
    "init_params",
    "load_hf",
    "logical_axes",
    "packed_logps",
    "presets",
    "read_config",
    "read_end_tokens",
    "read_max_new_tokens",
    "save_hf",
    "token_logps",
]
