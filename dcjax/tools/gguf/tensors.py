"""The weights of a GGUF file as tensors of a Hugging Face folder: renamed, dequantised, rows back in their order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from dcjax.models.config import DTYPES, DtypeName, ModelConfig
from dcjax.models.hf import check_tensors
from dcjax.models.hf_save import Pending
from dcjax.models.parameters import Parameter, parameters
from dcjax.tools.gguf.config import FACTORS, HEAD, TABLE
from dcjax.tools.gguf.container import Container, StoredTensor, ggml

READ = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
)
"""The types of tensors that are read, by llama.cpp's names."""

CHUNK = 1 << 22
"""Number of weights that are dequantised at a time."""

_NAMES = {
    "embed_tokens": TABLE,
    "norm": "output_norm.weight",
    "lm_head": HEAD,
    "input_layernorm": "blk.{layer}.attn_norm.weight",
    "post_attention_layernorm": "blk.{layer}.ffn_norm.weight",
    "q_proj": "blk.{layer}.attn_q.weight",
    "k_proj": "blk.{layer}.attn_k.weight",
    "v_proj": "blk.{layer}.attn_v.weight",
    "o_proj": "blk.{layer}.attn_output.weight",
    "q_bias": "blk.{layer}.attn_q.bias",
    "k_bias": "blk.{layer}.attn_k.bias",
    "v_bias": "blk.{layer}.attn_v.bias",
    "q_norm": "blk.{layer}.attn_q_norm.weight",
    "k_norm": "blk.{layer}.attn_k_norm.weight",
    "gate_proj": "blk.{layer}.ffn_gate.weight",
    "up_proj": "blk.{layer}.ffn_up.weight",
    "down_proj": "blk.{layer}.ffn_down.weight",
    "router": "blk.{layer}.ffn_gate_inp.weight",
    "experts_gate_proj": "blk.{layer}.ffn_gate_exps.weight",
    "experts_up_proj": "blk.{layer}.ffn_up_exps.weight",
    "experts_down_proj": "blk.{layer}.ffn_down_exps.weight",
}
"""llama.cpp's names of parameters; the experts of a layer are one tensor [experts, out, in]."""


def pending_tensors(container: Container, config: ModelConfig, dtype: DtypeName | None) -> list[Pending]:
    """The tensors of a Hugging Face folder, each read from the file and dequantised only when it is written.

    Args:
      container: the file.
      config: its architecture.
      dtype: to convert to. None keeps float16 and bfloat16 where all layers have it, and is float32 elsewhere, so that
        nothing is rounded that was not when the file was made.

    Raises:
      ValueError: the file does not have the tensors of the architecture, in its shapes, and no others, or has one of a
        type that is not read.
    """
    wanted = {name: shape for parameter in parameters(config) for name, shape in _stored_as(parameter)}
    in_config = {FACTORS} if config.family == "llama" else set()
    found = {name: tensor.shape for name, tensor in container.tensors.items() if name not in in_config}
    check_tensors(container.path, "its metadata", wanted, found)
    for name in wanted:
        if (kind := container.tensors[name].kind.name) not in READ:
            raise ValueError(f"{container.path}: {name} is of type {kind}; those read are {', '.join(READ)}")
    return [pending for parameter in parameters(config) for pending in _pending(container, config, parameter, dtype)]


def _stored_as(parameter: Parameter) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of the tensors of the file that hold a parameter: one of each layer."""
    shape = parameter.tensor_shape if parameter.experts is None else (parameter.experts, *parameter.tensor_shape)
    for layer in parameter.layers or (None,):
        yield _NAMES[parameter.name].format(layer=layer), shape


def _pending(
    container: Container, config: ModelConfig, parameter: Parameter, dtype: DtypeName | None
) -> Iterator[Pending]:
    layers = [container.tensors[name] for name, _ in _stored_as(parameter)]
    as_dtype = DTYPES[dtype or _exact({tensor.kind.name for tensor in layers})]
    # the only architecture whose rotary pairs llama.cpp has side by side
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if config.family == "llama" else {}
    for index, name in zip(parameter.indices(), parameter.tensor_names(), strict=True):
        layer, *expert = index or (0,)
        read = partial(_read, layers[layer], tuple(expert), as_dtype, heads.get(parameter.name))
        yield Pending(name, as_dtype, parameter.tensor_shape, read)


def _exact(kinds: set[str]) -> DtypeName:
    """The narrowest dtype that holds all values of tensors of these types."""
    return "fp16" if kinds == {"F16"} else "bf16" if kinds == {"BF16"} else "float32"


def _read(tensor: StoredTensor, expert: tuple[int, ...], dtype: np.dtype, heads: int | None) -> np.ndarray:
    """One tensor, or that of one expert, dequantised; with heads, the rows of each in the order of rotated halves."""
    dequantize = ggml().quants.dequantize
    blocks, shape = tensor.data[expert], tensor.shape[len(expert) :]
    rows = blocks.reshape(-1, blocks.shape[-1])
    array = np.empty((len(rows), shape[-1]), dtype)
    step = max(1, CHUNK // shape[-1])
    # an overflow, or a block's infinite scale, is reported with the tensor's name once all is read
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), step):
            array[start : start + step] = dequantize(rows[start : start + step], tensor.kind)
    if heads is not None:
        pairs = array.reshape(heads, -1, 2, shape[-1])
        array = pairs.swapaxes(1, 2)
    return array.reshape(shape)
