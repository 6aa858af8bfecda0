"""Converts between Hugging Face's config.json, in its old and its new style, and `ModelConfig`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from dcjax.models.config import DTYPES, DtypeName, ModelConfig
from dcjax.models.hf_files import quote, read_json_object
from dcjax.models.rope import RopeScaling
from dcjax.paths import local_path

GENERATION_CONFIG = "generation_config.json"
MAX_CONFIG_BYTES = 1 << 20
"""Largest config.json or generation_config.json that is read, in bytes."""
MAX_SIZE = 2**31
"""Largest value accepted for any one size."""
MAX_LAYERS = 4096
"""Largest number of layers."""
MAX_EXPERTS = 2**18
"""Largest number of experts, over all layers together."""
MAX_END_TOKENS = 256
"""Largest number of end tokens in one file."""

SUPPORTED = "qwen3, qwen3_moe, qwen2 and llama"
_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_SCALINGS = {kind.rope_type: kind for kind in get_args(RopeScaling)}

# fields that are not carried over from another config.json: they describe that model, or how its weights were stored
_NOT_CARRIED = (
    "quantization_config",
    "layer_types",
    "max_window_layers",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "transformers_version",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)

_ABSENT: Any = object()


class _Fields:
    """The values of one config.json, each checked as it is taken.

    Raises:
      ValueError: from every method, a value that is missing without a default or is of the wrong kind.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where

    def refuse(self, name: str, right: str) -> ValueError:
        """The error for a value, saying what would be right."""
        if name not in self.values:
            return ValueError(f"{self.where} has no {name}; it must be {right}")
        return ValueError(f"{self.where}: {name} is {quote(self.values[name])}; it must be {right}")

    def get(self, name: str, default: Any) -> Any:
        """The value, or `default` if it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: Any = _ABSENT, *, most: int = MAX_SIZE) -> int:
        value = self.get(name, default)
        # a bool is an int to Python
        if type(value) is not int or not 1 <= value <= most:
            raise self.refuse(name, f"an integer from 1 to {most}")
        return value

    def number(self, name: str, default: Any = _ABSENT) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.refuse(name, "a finite number above 0")
        return float(value)

    def flag(self, name: str, default: Any = _ABSENT) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.refuse(name, "true or false")
        return value

    def below(self, name: str) -> _Fields:
        """The fields of an object; none if it is absent or null."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.refuse(name, "an object or null")
        return _Fields(value, f"{self.where}: {name}")

    def token_ids(self, name: str, vocab_size: int) -> list[int]:
        """The ids that a field holds, one or a list of them; no ids if it is absent or null."""
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        if len(ids) > MAX_END_TOKENS or not all(type(each) is int and 0 <= each < vocab_size for each in ids):
            right = f"a token of the vocabulary, 0 to {vocab_size - 1}, or a list of at most {MAX_END_TOKENS}"
            raise self.refuse(name, right)
        return ids

    def require(self, name: str, expected: Any) -> None:
        """Checks that a field is absent, null, or the only value that is supported."""
        value = self.get(name, expected)
        if type(value) is not type(expected) or value != expected:
            raise self.refuse(name, f"{expected!r}, the only one supported" if expected is not False else "false")


def read_config(path: Path | str) -> ModelConfig:
    """The architecture in a Hugging Face folder's config.json.

    Both styles are read: num_experts, rope_theta and rope_scaling, and num_local_experts and rope_parameters. Fields of
    `ModelConfig` that config.json does not have (remat, attention, head_chunk, precision) keep their defaults. Only
    head_dim, tie_word_embeddings, norm_topk_prob, decoder_sparse_step and mlp_only_layers may be absent, and of a
    Llama, whose early files lack some, num_key_value_heads, rms_norm_eps and rope_theta; they then have the defaults of
    `transformers`.

    Args:
      path: the folder.

    Raises:
      ValueError: the architecture is not Qwen3, Qwen3-MoE, Qwen2 or Llama with full attention, RoPE is scaled in
        another way than llama3's and YaRN's, the weights are quantised, or a field is missing, of the wrong type or out
        of range; the message is one line, which quotes the value.
      FileNotFoundError: the folder has no config.json.
    """
    return parse_config(*read_fields(local_path(path)))


def parse_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that the fields of a config.json describe, as `read_config`.

    Args:
      values: the fields.
      where: the path that they are from, for error messages.

    Raises:
      ValueError: as `read_config`.
    """
    return _to_config(_Fields(values, where))


def read_end_tokens(path: Path | str) -> list[int]:
    """The ids that a folder's config.json and generation_config.json name as ends of a response, ascending.

    The list is empty if neither file names one; then only the tokenizer's end token ends a response.

    Args:
      path: the folder.

    Raises:
      ValueError: an eos_token_id is neither an id of config.json's vocabulary nor a list of them, or a file is damaged;
        the message is one line, which quotes the value.
      FileNotFoundError: the folder has no config.json, or a file is a dangling link.
    """
    values, where = read_fields(Path(path))
    vocab_size = _Fields(values, where).integer("vocab_size")
    ends = set(end_tokens_in(values, where, vocab_size=vocab_size))
    return sorted(ends | set(_generation_fields(Path(path)).token_ids("eos_token_id", vocab_size)))


def read_max_new_tokens(path: Path | str) -> int | None:
    """The longest response (tokens) that a folder's generation_config.json names; None if it names none.

    Raises:
      ValueError: it is no integer from 1, or the file is damaged; the message is one line, which quotes the value.
      FileNotFoundError: the file is a dangling link.
    """
    fields = _generation_fields(Path(path))
    return None if fields.get("max_new_tokens", None) is None else fields.integer("max_new_tokens")


def _generation_fields(folder: Path) -> _Fields:
    """The fields of generation_config.json; none if the folder lacks it."""
    file = folder / GENERATION_CONFIG
    # a dangling link is an incomplete download, not a model that lacks the file
    return _Fields(read_json_object(file, MAX_CONFIG_BYTES) if os.path.lexists(file) else {}, str(file))


def end_tokens_in(values: Mapping[str, Any], where: str, *, vocab_size: int, name: str = "eos_token_id") -> list[int]:
    """The ids that one file names as ends of a response; an empty list if the field is absent or null.

    Args:
      values: the fields of the file.
      where: its path, for error messages.
      vocab_size: the size of the model's vocabulary, which all ids must be below.
      name: the name of the field, which holds one id or a list of them.

    Raises:
      ValueError: the field holds anything else, such as a bool, or an id that the vocabulary does not have.
    """
    return _Fields(values, where).token_ids(name, vocab_size)


def read_fields(folder: Path) -> tuple[dict[str, Any], str]:
    """All fields of config.json, and its path for error messages.

    Raises:
      ValueError: it is not a JSON object, it is longer than `MAX_CONFIG_BYTES`, or there is a GGUF file in its place.
      FileNotFoundError: the folder has no config.json.
    """
    path = folder / "config.json"
    try:
        return read_json_object(path, MAX_CONFIG_BYTES), str(path)
    except (FileNotFoundError, NotADirectoryError):
        if advice := gguf_advice(folder):
            raise ValueError(advice) from None
        raise FileNotFoundError(f"no {path}; give a folder with a Hugging Face checkpoint") from None


def gguf_advice(path: Path) -> str | None:
    """What to do with a path that is a GGUF file, or a folder with one; None if it is neither."""
    files = [path] if path.is_file() and path.suffix.lower() == ".gguf" else sorted(path.glob("*.gguf"))
    return f"{files[0]} is a GGUF file; import it first: dcjax convert import {files[0]} FOLDER" if files else None


def _to_config(fields: _Fields) -> ModelConfig:
    kind = fields.get("model_type", _ABSENT)
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise fields.refuse("model_type", f"one of those supported, {SUPPORTED}")
    _check_supported(fields, kind)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    # the defaults of transformers: for head_dim, a fixed number for Qwen3, and hidden_size over heads for the others
    head_dim = 128 if kind == "qwen3" else max(hidden // heads, 1)
    kv_heads, eps, theta = (heads, 1e-6, 1e4) if kind == "llama" else (_ABSENT,) * 3
    sizes: dict[str, Any] = {
        "family": "qwen3" if kind == "qwen3_moe" else kind,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", kv_heads),
        "head_dim": fields.integer("head_dim", head_dim),
        "rope_scaling": _rope_scaling(fields),
        "rope_theta": _rope_theta(fields, theta),
        "rms_norm_eps": fields.number("rms_norm_eps", eps),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
    }
    if kind == "qwen3_moe":
        sizes |= _experts(fields, sizes["num_layers"])
    try:
        return ModelConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{fields.where}: {error}") from None


def _check_supported(fields: _Fields, kind: str) -> None:
    if fields.get("quantization_config", None) is not None:
        raise fields.refuse("quantization_config", "absent: quantised weights are not read, only float32, bf16, fp16")
    if fields.get("transformers_weights", None) is not None:
        raise fields.refuse("transformers_weights", "absent: weights are read from model.safetensors or its index")
    fields.require("hidden_act", "silu")
    fields.require("use_sliding_window", False)
    fields.require("use_mrope", False)
    if kind != "qwen2":
        fields.require("attention_bias", False)
    if kind == "llama":
        fields.require("mlp_bias", False)
        fields.require("pretraining_tp", 1)
    if _turns_partly(fields):
        raise fields.refuse("partial_rotary_factor", "1, the only one supported")
    kinds = fields.get("layer_types", [])
    if not isinstance(kinds, list) or any(layer != "full_attention" for layer in kinds):
        raise fields.refuse("layer_types", "full_attention in every layer, the only one supported")


def _rope_theta(fields: _Fields, default: Any) -> float:
    """The base of RoPE, from either style; where a file has it more than once, all must agree."""
    places = {f"{style}.": fields.below(style) for style in ("rope_parameters", "rope_scaling")} | {"": fields}
    thetas = {
        f"{place}rope_theta": given.number("rope_theta")
        for place, given in places.items()
        if given.get("rope_theta", None) is not None
    }
    theta = next(iter(thetas.values())) if thetas else fields.number("rope_theta", default)
    for name, other in thetas.items():
        if other != theta:
            raise ValueError(f"{fields.where}: {name} is {other}; it must be {theta:g}, as {next(iter(thetas))} is")
    return theta


def _rope_scaling(fields: _Fields) -> RopeScaling | None:
    """How RoPE is scaled, from either style; if a file has both, they must agree."""
    scalings = [_scaling(fields, style) for style in ("rope_parameters", "rope_scaling") if fields.get(style, {})]
    if len(set(scalings)) > 1:
        raise fields.refuse("rope_scaling", "as rope_parameters is, or absent")
    if not scalings or scalings[0] is None:
        return None
    # outside the scaling's own fields, transformers takes it for the scaling's all the same
    length = scalings[0].original_max_position_embeddings
    if fields.get("original_max_position_embeddings", length) != length:
        raise fields.refuse("original_max_position_embeddings", f"{length}, as the scaling of RoPE has it")
    return scalings[0]


def _scaling(fields: _Fields, style: str) -> RopeScaling | None:
    given = fields.below(style)
    kind = given.get("rope_type", given.get("type", "default"))
    scaling = _SCALINGS.get(kind) if isinstance(kind, str) else None
    described = () if scaling is None else dataclasses.fields(scaling)
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | {each.name for each in described}
    if (scaling is None and kind != "default") or set(given.values) - known or _turns_partly(given):
        raise fields.refuse(style, f"null, or of rope_type default, {' or '.join(_SCALINGS)} with their fields only")
    if scaling is None:
        return None
    readers = {"original_max_position_embeddings": given.integer, "truncate": given.flag}
    values = {
        each.name: readers.get(each.name, given.number)(each.name)
        for each in described
        if each.default is dataclasses.MISSING or given.get(each.name, None) is not None
    }
    try:
        return scaling(**values)
    except ValueError as error:
        raise ValueError(f"{fields.where}: {error}") from None


def _turns_partly(fields: _Fields) -> bool:
    """Whether RoPE turns a part of each head only."""
    return fields.get("partial_rotary_factor", 1) != 1


def _experts(fields: _Fields, num_layers: int) -> dict[str, Any]:
    name = "num_local_experts" if fields.get("num_experts", None) is None else "num_experts"
    count = fields.integer(name, most=MAX_EXPERTS // num_layers)
    if fields.get("num_local_experts", count) != count:
        raise fields.refuse("num_local_experts", f"{count}, as num_experts is")
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < num_layers for layer in dense):
        raise fields.refuse("mlp_only_layers", f"a list of layers from 0 to {num_layers - 1}")
    return {
        "num_experts": count,
        "num_experts_per_tok": fields.integer("num_experts_per_tok"),
        "moe_intermediate_size": fields.integer("moe_intermediate_size"),
        "norm_topk_prob": fields.flag("norm_topk_prob", False),
        "decoder_sparse_step": fields.integer("decoder_sparse_step", 1),
        "mlp_only_layers": tuple(sorted(set(dense))),
    }


def to_fields(config: ModelConfig, dtype: DtypeName, carried: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json, in both styles, for `transformers` from 4.51 and for vLLM.

    Args:
      config: the architecture.
      dtype: the dtype of the weights in the files.
      carried: another config.json's fields, of which token ids and fields unknown to dcjax are kept.
    """
    kind = "qwen3_moe" if config.num_experts else config.family
    fields = {name: value for name, value in carried.items() if name not in _NOT_CARRIED}
    fields |= {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": DTYPES[dtype].name,
        "torch_dtype": DTYPES[dtype].name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": config.family == "qwen2",
        "attention_dropout": 0.0,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _scaling_fields(config.rope_scaling),
        "rope_parameters": {"rope_theta": config.rope_theta} | _scaling_fields(config.rope_scaling),
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "use_sliding_window": False,
    }
    if kind == "llama":
        fields |= {"mlp_bias": False, "pretraining_tp": 1}
    if config.num_experts:
        fields |= {
            "num_experts": config.num_experts,
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": config.decoder_sparse_step,
            "mlp_only_layers": list(config.mlp_only_layers),
        }
    return fields


def _scaling_fields(scaling: RopeScaling | None) -> dict[str, Any]:
    """The fields of a scaling, but for those that have their defaults, some of which older readers do not know."""
    if scaling is None:
        return {"rope_type": "default"}
    values = {
        each.name: getattr(scaling, each.name)
        for each in dataclasses.fields(scaling)
        if getattr(scaling, each.name) != each.default
    }
    return {"rope_type": scaling.rope_type} | values
