import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from dcjax.models import ModelConfig, abstract_params, forward, load_hf, presets, read_config, save_hf
from dcjax.models.config import DTYPES
from dcjax.models.hf import Checkpoint
from dcjax.models.hf_config import to_fields
from dcjax.models.hf_files import open_tensors
from dcjax.models.rope import Llama3Scaling, YarnScaling
from dcjax.sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.heavy

DATA = Path(__file__).parents[1] / "data"
KINDS = ("qwen3", "qwen3_moe", "qwen2", "llama", "qwen3_yarn")
SCALED = ("llama", "qwen3_yarn")
FOLDERS = {kind: DATA / f"hf_tiny_{kind}" for kind in KINDS}

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_theta": 1e6,
    "tie_embeddings": False,
    "max_position_embeddings": 256,
}
LLAMA = {"rope_theta": 100.0, "rms_norm_eps": 1e-5, "tie_embeddings": True, "max_position_embeddings": 96}
YARN = {"rope_theta": 100.0, "max_position_embeddings": 96}
CONFIGS = {
    "qwen3": ModelConfig(**SIZES, head_dim=32),
    "qwen3_moe": ModelConfig(**SIZES, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48),
    "qwen2": ModelConfig(**SIZES, head_dim=16, family="qwen2"),
    "llama": ModelConfig(**SIZES | LLAMA, head_dim=16, family="llama", rope_scaling=Llama3Scaling(4.0, 1.0, 3.0, 24)),
    "qwen3_yarn": ModelConfig(
        **SIZES | YARN, head_dim=32, rope_scaling=YarnScaling(6.0, 16, beta_fast=2.0, beta_slow=0.25, truncate=False)
    ),
}

# a dense layer between sparse ones, a tied head, and sizes that are all different
MIXED = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=10,
    mlp_only_layers=(2,),
)

run = jit(forward, static_argnums=0)
loaded = functools.cache(lambda kind: load_hf(FOLDERS[kind]))


@functools.cache
def random_params(config, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = abstract_params(config)
    return jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape).astype(DTYPES[dtype])), shapes)


def logits_of(config, params, tokens, mask):
    """By one program for a config, whatever the number of tokens."""
    length = tokens.shape[1]
    columns = 22 if config.rope_scaling is None else 40
    padded, mask = (np.pad(x, ((0, 0), (0, columns - length))) for x in (tokens, mask))
    return np.asarray(run(config, params, padded, mask))[:, :length]


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.fixture
def copy(tmp_path):
    """A copy of a reference folder, whose config and tensors a test may change."""

    def make(kind="qwen3", *, config=None, tensors=None, metadata=None):
        folder = tmp_path / "copy"
        folder.mkdir(exist_ok=True)
        fields = json.loads((FOLDERS[kind] / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not Ellipsis}))
        weights = load_file(FOLDERS[kind] / "model.safetensors") | (tensors or {})
        weights = {name: value for name, value in weights.items() if value is not None}
        save_file(weights, folder / "model.safetensors", metadata)
        return folder

    return make


def refusal(folder, **options):
    """The one line that `load_hf` refuses a folder with."""
    with pytest.raises(ValueError) as caught:
        load_hf(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


# --- architectures


@pytest.mark.parametrize("style", ["config.json", "config_classic.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_styles_of_config_are_the_same_architecture(tmp_path, kind, style):
    shutil.copy(FOLDERS[kind] / style, tmp_path / "config.json")
    assert read_config(tmp_path) == CONFIGS[kind]


@functools.cache
def old_llama():
    """A Llama's config.json without the fields that the first ones lack."""
    left_out = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters")
    return {"model_type": "llama"} | {
        name: value
        for name, value in json.loads((FOLDERS["qwen2"] / "config_classic.json").read_text()).items()
        if name not in (*left_out, "model_type", "architectures", "layer_types")
    }


def test_absent_fields_of_a_llama_are_what_transformers_takes_them_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(old_llama()))
    ours, theirs = read_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert ours.family == "llama"
    assert (ours.num_kv_heads, ours.head_dim) == (4, 16) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.rms_norm_eps, ours.rope_theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"attention_bias": True}, "attention_bias is True; it must be false"),
        ({"mlp_bias": True}, "mlp_bias is True; it must be false"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2; it must be 1"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ],
)
def test_a_llama_of_another_kind_is_refused(tmp_path, fields, expected):
    (tmp_path / "config.json").write_text(json.dumps(old_llama() | fields))
    assert expected in refusal(tmp_path)


def test_an_absent_head_dim_is_what_transformers_takes_it_for(copy):
    assert read_config(copy("qwen2")).head_dim == 64 // 4
    assert read_config(copy("qwen3_moe", config={"head_dim": ...})).head_dim == 64 // 4
    assert read_config(copy("qwen3", config={"head_dim": ...})).head_dim == 128


YARN_FIELDS = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3_FIELDS = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS = "llama3 or yarn"


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("qwen3", {"model_type": "mistral"}, "model_type is 'mistral'; it must be one of those supported, qwen3"),
        ("qwen3", {"model_type": ...}, "has no model_type"),
        ("qwen3", {"model_type": ["qwen3"]}, "model_type is ['qwen3']"),
        (
            "qwen3",
            {"transformers_weights": "consolidated.safetensors"},
            "is 'consolidated.safetensors'; it must be abs",
        ),
        ("qwen3", {"rope_parameters": {"rope_type": "default"}}, "has no rope_theta"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters is"),
        ("qwen3", {"rope_parameters": [1, 2]}, "rope_parameters is [1, 2]"),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta is 'big'"),
        ("qwen3", {"rope_theta": 1e4}, "rope_theta is 10000.0; it must be 1e+06"),
        ("qwen3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ("qwen3", {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling is"),
        ("qwen3", {"rope_scaling": 0}, "rope_scaling is 0; it must be an object or null"),
        ("qwen3", {"rope_scaling": {"rope_theta": 1e4}}, "rope_scaling.rope_theta is 10000.0; it must be 1e+06, as"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be 1"),
        ("llama", {"rope_scaling": {"rope_type": "default"}}, "it must be as rope_parameters is, or absent"),
        ("qwen3", {"rope_scaling": YARN_FIELDS}, "it must be as rope_parameters is, or absent"),
        ("llama", {"original_max_position_embeddings": 32}, "original_max_position_embeddings is 32; it must be 24"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"use_sliding_window": 0}, "use_sliding_window is 0"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ("qwen2", {"use_mrope": True}, "use_mrope is True"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"quantization_config": {"quant_method": "awq"}}, "quantization_config is {'quant_method': 'awq'}"),
        ("qwen3", {"hidden_size": ...}, "has no hidden_size; it must be an integer"),
        ("qwen3", {"hidden_size": True}, "hidden_size is True"),
        ("qwen3", {"hidden_size": "64"}, "hidden_size is '64'"),
        ("qwen3", {"hidden_size": 64.0}, "hidden_size is 64.0"),
        ("qwen3", {"hidden_size": -64}, "hidden_size is -64"),
        ("qwen3", {"hidden_size": 0}, "hidden_size is 0"),
        ("qwen3", {"hidden_size": None}, "hidden_size is None"),
        ("qwen3", {"hidden_size": {"a": [1]}}, "hidden_size is {'a': [1]}"),
        ("qwen3", {"vocab_size": 2**31 + 1}, "vocab_size is 2147483649"),
        ("qwen3", {"vocab_size": 10**400}, "vocab_size is 1000"),
        ("qwen3", {"vocab_size": 2**31, "hidden_size": 2**31}, "at most 10000000000000 are read"),
        ("qwen3", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; it must be an integer from 1 to 4096"),
        ("qwen3", {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ("qwen3", {"rms_norm_eps": False}, "rms_norm_eps is False"),
        ("qwen3", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ("qwen3", {"num_key_value_heads": 3}, "num_heads 4 is not a multiple"),
        ("qwen3", {"head_dim": 31}, "head_dim is 31"),
        ("qwen3_moe", {"num_local_experts": ...}, "has no num_local_experts"),
        ("qwen3_moe", {"num_experts": 4}, "num_local_experts is 8; it must be 4"),
        ("qwen3_moe", {"num_local_experts": 10**6}, "num_local_experts is 1000000"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, "mlp_only_layers is [2]"),
        ("qwen3_moe", {"mlp_only_layers": {"0": 1}}, "mlp_only_layers is {'0': 1}"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_its_field(copy, kind, fields, expected):
    assert expected in refusal(copy(kind, config=fields))


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters", "both"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "qwen2", "llama"])
def test_every_family_may_have_every_scaling_in_every_style(copy, kind, style):
    """A null is a field that is absent, and the kind may be called `type`, as on the cards of Qwen2.5."""
    others = {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5}
    for fields, expected in (
        (YARN_FIELDS, YarnScaling(4.0, 64)),
        (YARN_FIELDS | others | {"truncate": False}, YarnScaling(4.0, 64, 16.0, 2.0, 1.5, 1.0, 0.5, truncate=False)),
        (YARN_FIELDS | {"beta_fast": None, "partial_rotary_factor": 1.0}, YarnScaling(4.0, 64)),
        (LLAMA3_FIELDS | {"factor": 32}, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
    ):
        written = {"rope_theta": fields["rope_theta"], "rope_parameters": ..., "original_max_position_embeddings": ...}
        classic = {"type" if name == "rope_type" else name: value for name, value in fields.items()}
        written |= {"rope_scaling": classic} if style != "rope_parameters" else {"rope_scaling": None}
        written |= {"rope_parameters": fields} if style != "rope_scaling" else {}
        config = read_config(copy(kind, config=written))
        assert (config.rope_scaling, config.rope_theta) == (expected, fields["rope_theta"])


@pytest.mark.parametrize(
    ("fields", "changes", "expected"),
    [
        *(
            (
                YARN_FIELDS,
                {"rope_type": kind},
                f"must be null, or of rope_type default, {SCALINGS} with their fields only",
            )
            for kind in ("linear", "dynamic", "longrope", "proportional", ["yarn"], 7)
        ),
        (YARN_FIELDS, {"low_freq_factor": 1.0}, SCALINGS),
        (YARN_FIELDS, {"partial_rotary_factor": 0.5}, SCALINGS),
        (LLAMA3_FIELDS, {"beta_fast": 32}, SCALINGS),
        (YARN_FIELDS, {"factor": None}, "rope_parameters: factor is None; it must be a finite number"),
        (YARN_FIELDS, {"factor": "4"}, "rope_parameters: factor is '4'; it must be a finite number"),
        (YARN_FIELDS, {"factor": True}, "rope_parameters: factor is True"),
        (YARN_FIELDS, {"factor": 0.5}, "model.rope_scaling.factor is 0.5; it must be a finite number of at least 1"),
        (YARN_FIELDS, {"original_max_position_embeddings": 16.0}, "original_max_position_embeddings is 16.0; it must"),
        (YARN_FIELDS, {"original_max_position_embeddings": ...}, "has no original_max_position_embeddings; it must be"),
        (YARN_FIELDS, {"beta_slow": 64}, "model.rope_scaling.beta_slow is 64.0; it must be at most beta_fast"),
        (YARN_FIELDS, {"attention_factor": 0}, "attention_factor is 0; it must be a finite number above 0"),
        (YARN_FIELDS, {"truncate": 1}, "truncate is 1; it must be true or false"),
        (YARN_FIELDS, {"rope_theta": 1}, "model.rope_theta is 1.0; with YaRN it must be above 1"),
        (LLAMA3_FIELDS, {"low_freq_factor": ...}, "has no low_freq_factor; it must be a finite number"),
        (LLAMA3_FIELDS, {"low_freq_factor": 5}, "model.rope_scaling.low_freq_factor is 5.0; it must be below"),
    ],
)
def test_a_scaling_that_is_not_supported_is_refused_by_its_field(copy, fields, changes, expected):
    changed = {name: value for name, value in (fields | changes).items() if value is not Ellipsis}
    assert expected in refusal(copy("qwen3", config={"rope_parameters": changed}))


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        Llama3Scaling(8.0, 1.0, 4.0, 64),
        YarnScaling(4.0, 64),
        YarnScaling(4.0, 64, 16.0, 2.0, attention_factor=1.5, mscale=1.0, mscale_all_dim=0.5, truncate=False),
    ],
)
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_a_written_scaling_is_read_again_whatever_was_carried(tmp_path, family, scaling):
    config = dataclasses.replace(MIXED, num_experts=0, mlp_only_layers=(), family=family, rope_scaling=scaling)
    carried = {"rope_scaling": {"type": "linear"}, "rope_parameters": YARN_FIELDS, "rope_theta": 7.0}
    carried |= {
        "original_max_position_embeddings": 3,
        "partial_rotary_factor": 0.5,
        "mlp_bias": True,
        "pretraining_tp": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(to_fields(config, "float32", carried)))
    ours, theirs = read_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert ours == dataclasses.replace(config, num_experts_per_tok=8, moe_intermediate_size=768)
    rope = {name: value for name, value in theirs.rope_parameters.items() if name not in ("rope_type", "rope_theta")}
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert (scaling is None and rope == {}) or type(scaling)(**rope) == scaling


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "Expecting value"),
        (b"[1, 2]", "not a JSON object"),
        (b"{" + b'"a":{' * 100_000, "recursion"),
        (b'{"rms_norm_eps": NaN}', "NaN is not JSON"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' twice"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "limit"),
        (b"\xff\xfe{}", "utf-8"),
        (b" " * (2**20 + 1), "longer than"),
    ],
)
def test_a_config_that_is_no_proper_json_is_refused(copy, text, expected):
    folder = copy()
    (folder / "config.json").write_bytes(text)
    assert expected in refusal(folder)


PUBLISHED = {
    "qwen3-30b-a3b": """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false,
        "vocab_size": 151936}""",
    "deepseek-r1-distill-qwen-1.5b": """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536,
        "initializer_range": 0.02, "intermediate_size": 8960, "max_position_embeddings": 131072,
        "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "use_mrope": false,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "smollm2-135m": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
        "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 49152}""",
    "llama-3.2-1b": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true,
        "vocab_size": 128256}""",
    "llama-3.1-8b": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
        "vocab_size": 128256}""",
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_configs_are_the_presets(tmp_path, name):
    (tmp_path / "config.json").write_text(PUBLISHED[name])
    assert read_config(tmp_path) == dataclasses.replace(presets[name], remat=ModelConfig().remat)


# --- loading


@pytest.mark.parametrize("padding", ["", "left_", "right_"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, padding):
    config, params = loaded(kind)
    reference = np.load(FOLDERS[kind] / "reference.npz")
    tokens = reference[f"{padding}input_ids"]
    mask = reference[f"{padding}attention_mask"].astype(bool) if padding else np.ones(tokens.shape, bool)
    logits = logits_of(config, params, tokens, mask)
    np.testing.assert_allclose(logits[mask], reference[f"{padding}logits"][mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", SCALED)
def test_without_its_scaling_a_model_is_another(kind):
    """Else the vectors would show nothing of it."""
    config, params = loaded(kind)
    tokens = np.load(FOLDERS[kind] / "reference.npz")["input_ids"]
    assert tokens.shape[1] > config.rope_scaling.original_max_position_embeddings
    everything = np.ones(tokens.shape, bool)
    plain = jit(forward, static_argnums=0)(dataclasses.replace(config, rope_scaling=None), params, tokens, everything)
    assert np.abs(plain - logits_of(config, params, tokens, everything))[:, -5:].max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind):
    config, params = loaded(kind)
    reference = np.load(FOLDERS[kind] / "reference.npz")
    prompt, expected = reference["greedy_prompt"], reference["greedy_tokens"]
    start, length = prompt.shape[1], prompt.shape[1] + expected.shape[1]
    tokens = np.zeros((len(prompt), length), np.int32)
    tokens[:, :start] = prompt
    for column in range(start, length):
        # causal: the zeros after a column do not reach it
        logits = logits_of(config, params, tokens, np.ones(tokens.shape, bool))
        tokens[:, column] = logits[:, column - 1].argmax(-1)
    np.testing.assert_array_equal(tokens[:, start:], expected)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_dtype_rounds_each_tensor_to_nearest(dtype):
    _, params = load_hf(FOLDERS["qwen3_moe"], dtype=dtype)
    written = load_file(FOLDERS["qwen3_moe"] / "model.safetensors")
    expert = written["model.layers.1.mlp.experts.5.down_proj.weight"].T.astype(DTYPES[dtype])
    np.testing.assert_array_equal(np.asarray(params["layers"]["experts_down_proj"][1, 5]), expert)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {DTYPES[dtype]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_holds_the_same_params_in_parts(kind):
    config, whole = loaded(kind)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
    same_config, parts = load_hf(FOLDERS[kind], mesh=mesh)
    assert same_config == config
    assert_same_bits(whole, parts)
    assert parts["layers"]["q_proj"].addressable_shards[0].data.size == whole["layers"]["q_proj"].size // 4
    assert parts["embed_tokens"].addressable_shards[0].data.size == whole["embed_tokens"].size // 4
    if kind == "qwen3_moe":
        experts = parts["layers"]["experts_up_proj"]
        assert experts.addressable_shards[0].data.size <= experts.size // 4


def test_a_mesh_reads_each_part_once(monkeypatch):
    parts = {}
    read = Checkpoint.read

    def recorded(self, parameter, index, dtype):
        array = read(self, parameter, index, dtype)
        parts.setdefault(parameter.path, []).append(array.size)
        return array

    monkeypatch.setattr(Checkpoint, "read", recorded)
    _, params = load_hf(FOLDERS["qwen3_moe"], mesh=make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2)))
    assert {path: sum(sizes) for path, sizes in parts.items()} == {
        tuple(key.key for key in keys): leaf.size for keys, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert len(parts["layers", "q_proj"]) == 4 and len(parts["layers", "experts_up_proj"]) >= 4


@pytest.mark.parametrize(
    ("kind", "axes", "expected"),
    [
        ("qwen3", {"tensor": 7}, r"params embed_tokens of shape (96, 64): mesh.tensor 7 does not divide dimension 0"),
        ("qwen3", {"fsdp": 5}, r"params embed_tokens of shape (96, 64): mesh.fsdp 5 does not divide dimension 1"),
        ("qwen3_moe", {"expert": 3}, "gate_proj of shape (2, 8, 64, 48): mesh.expert 3 does not divide dimension 1"),
    ],
)
def test_a_mesh_that_divides_no_dimension_is_refused_by_leaf_and_axis(kind, axes, expected):
    assert expected in refusal(FOLDERS[kind], mesh=make_mesh(MeshConfig(**axes)))


def test_a_checkpoint_of_mixed_dtypes_keeps_each_leafs(copy):
    written = load_file(FOLDERS["qwen3"] / "model.safetensors")
    norms = {
        name: value.astype(np.float16) for name, value in written.items() if name.endswith("input_layernorm.weight")
    }
    _, params = load_hf(copy(tensors=norms))
    assert params["layers"]["input_layernorm"].dtype == np.float16
    assert params["layers"]["q_proj"].dtype == np.float32
    assert load_hf(copy(tensors=norms), dtype="bf16")[1]["layers"]["input_layernorm"].dtype == jnp.bfloat16


def test_layers_of_different_dtypes_need_a_dtype(copy):
    name = "model.layers.1.mlp.up_proj.weight"
    one = {name: load_file(FOLDERS["qwen3"] / "model.safetensors")[name].astype(np.float16)}
    message = refusal(copy(tensors=one))
    assert f"{name} as float16" in message and "give a dtype" in message
    assert load_hf(copy(tensors=one), dtype="float32")[1]["layers"]["up_proj"].dtype == np.float32


EMBEDDING = "model.embed_tokens.weight"
TABLE = np.ones((96, 64), np.float32)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"model.norm.weight": None}, "of the 25 tensors that config.json describes: 1 missing (model.norm.weight)"),
        ({"model.layers.0.mlp.up.weight": TABLE}, "1 unexpected (model.layers.0.mlp.up.weight)"),
        ({"x\n" * 900: TABLE}, "1 unexpected (x"),
        ({"model.norm.weight": np.ones(63, np.float32)}, "model.norm.weight has shape [63]; by config.json it must be"),
        ({"model.layers.1.mlp.up_proj.weight": np.ones((64, 160), np.float32)}, "must be [160, 64]"),
        ({"model.norm.weight": np.ones(64, np.float64)}, "model.norm.weight is stored as F64; supported are F32"),
        ({"model.norm.weight": np.ones(64, np.int8)}, "model.norm.weight is stored as I8"),
        ({EMBEDDING: np.where(np.arange(6144) == 77, np.nan, 1).reshape(96, 64).astype(np.float32)}, EMBEDDING),
        ({"lm_head.weight": TABLE * np.inf}, "lm_head.weight has an infinity or a NaN"),
        ({"model.norm.weight": np.full(64, -np.inf, np.float16)}, "model.norm.weight has an infinity"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(copy, tensors, expected):
    assert expected in refusal(copy(tensors=tensors))


def test_missing_and_unexpected_tensors_are_counted(copy):
    folder = copy(config={"num_hidden_layers": 4096, "layer_types": None}, tensors={"a": TABLE, "b": TABLE})
    message = refusal(folder)
    assert f"of the {3 + 11 * 4096} tensors" in message and "2 unexpected (a, b)" in message
    assert f"{11 * 4094} missing (model.layers.2.input_layernorm.weight, model.layers.3" in message


def test_old_rotary_buffers_are_no_weights(copy):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32) for i in range(2)}
    assert_same_bits(load_hf(copy(tensors=buffers))[1], loaded("qwen3")[1])


def test_a_value_beyond_the_asked_dtype_is_refused(copy):
    folder = copy(tensors={"model.norm.weight": np.full(64, 1e6, np.float32)})
    assert "model.norm.weight has values beyond the range of float16" in refusal(folder, dtype="fp16")
    assert load_hf(folder, dtype="bf16")[1]["norm"].dtype == jnp.bfloat16


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(copy):
    written = load_file(FOLDERS["qwen3"] / "model.safetensors")
    tied = {"lm_head.weight": written[EMBEDDING]}
    config, params = load_hf(copy(config={"tie_word_embeddings": True}, tensors=tied))
    assert config.tie_embeddings and "lm_head" not in params
    another = written[EMBEDDING].copy()
    another[95, 63] = np.nextafter(another[95, 63], 1)
    message = refusal(copy(config={"tie_word_embeddings": True}, tensors={"lm_head.weight": another}))
    assert "lm_head.weight is not model.embed_tokens.weight bit for bit" in message


# --- folders


def test_a_folder_without_weights_says_what_was_looked_for(copy, tmp_path):
    folder = copy()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors or model\.safetensors\.index\.json in "):
        load_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert "convert them to safetensors" in refusal(folder)
    for nowhere in (tmp_path / "nowhere", folder / "pytorch_model.bin"):
        with pytest.raises(FileNotFoundError, match=r"config\.json; give a folder"):
            load_hf(nowhere)


def test_a_file_that_cannot_be_opened_is_not_said_to_be_absent(copy, monkeypatch):
    folder = copy()

    def denied(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("dcjax.models.hf_files.open", denied, raising=False)
    with pytest.raises(PermissionError, match=r"model\.safetensors"):
        open_tensors(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "BOOL"])
def test_dtypes_that_are_no_weights_are_refused_by_name(copy, dtype):
    folder = copy()
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    # a byte a value: the shape stays, a second tensor takes the rest of the bytes
    entry = header["model.norm.weight"]
    (start, stop), (size,) = entry["data_offsets"], entry["shape"]
    header["model.norm.weight"] = {"dtype": dtype, "shape": [size], "data_offsets": [start, start + size]}
    rest = {"dtype": "U8", "shape": [stop - start - size], "data_offsets": [start + size, stop]}
    header["model.layers.0.self_attn.rotary_emb.inv_freq"] = rest
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    for asked in (None, "bf16"):
        message = refusal(folder, dtype=asked)
        assert f"model.norm.weight is stored as {dtype}; supported are F32, BF16, F16" in message


def test_links_as_in_a_cache_are_followed(copy, tmp_path):
    folder = copy()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / f"blob-{file.name}")
        file.symlink_to(Path("..") / "blobs" / f"blob-{file.name}")
    assert_same_bits(load_hf(folder)[1], loaded("qwen3")[1])


@pytest.fixture
def shards(tmp_path):
    """A sharded folder, and a function that rewrites its index with changes."""
    folder = tmp_path / "shards"
    save_hf(folder, *loaded("qwen3"), max_shard_bytes=100_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def rewrite(**placed):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | placed}))
        return folder

    return rewrite


@pytest.mark.parametrize(
    ("name", "place", "expected"),
    [
        ("lm_head.weight", "../shards/model-00001-of-00006.safetensors", "must be a safetensors file in the same"),
        ("lm_head.weight", "/etc/model.safetensors", "must be a safetensors file in the same folder"),
        ("lm_head.weight", "config.json", "must be a safetensors file"),
        ("lm_head.weight", 7, "names the file 7"),
        ("lm_head.weight", "model-00001-of-00006.safetensors", "places 'lm_head.weight' in model-00001"),
        ("another.weight", "model-00001-of-00006.safetensors", "it is in none of them"),
    ],
)
def test_an_index_that_leads_astray_is_refused(shards, name, place, expected):
    folder = shards()
    assert len(list(folder.glob("*.safetensors"))) == 6
    assert_same_bits(load_hf(folder)[1], loaded("qwen3")[1])
    assert expected in refusal(shards(**{name: place}))


def test_an_index_of_missing_files_and_of_tensors_twice_is_refused(shards):
    folder = shards()
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00006\.safetensors, which"):
        load_hf(folder)
    shutil.copy(first, second)
    assert "is in model-00001-of-00006.safetensors and again in model-00002" in refusal(folder)
    second.write_bytes(kept)
    assert_same_bits(load_hf(folder)[1], loaded("qwen3")[1])


@pytest.mark.parametrize("present", [True, False], ids=["shards", "no shards"])
def test_a_single_file_beside_an_index_of_others_is_refused_with_both_names(shards, present):
    folder = shards()
    shutil.copy(FOLDERS["qwen3"] / "model.safetensors", folder)
    for file in [] if present else list(folder.glob("model-*-of-*")):
        file.unlink()
    message = refusal(folder)
    assert f"{folder} has model.safetensors beside model.safetensors.index.json" in message
    assert "model-00001-of-00006.safetensors" in message and "move the others out" in message
    (folder / "model.safetensors").unlink()
    if present:
        assert_same_bits(load_hf(folder)[1], loaded("qwen3")[1])


def test_a_single_file_beside_shards_without_an_index_is_refused(shards):
    folder = shards()
    shutil.copy(FOLDERS["qwen3"] / "model.safetensors", folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "has model.safetensors beside model-00001-of-00006.safetensors" in refusal(folder)


def test_an_index_may_name_the_single_file(copy):
    """As MLX writes them."""
    folder = copy()
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_bits(load_hf(folder)[1], loaded("qwen3")[1])
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no .*model\.safetensors, which model\.safetensors\.index\.json names"
    ):
        load_hf(folder)


def test_files_that_no_loader_takes_by_itself_are_let_be(shards):
    folder = shards()
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "model-00007-of-00007.safetensors"):
        (folder / name).write_bytes(b"no weights")
    (folder / "model.safetensors.index.fp16.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert_same_bits(load_hf(folder)[1], loaded("qwen3")[1])


# --- saving


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", KINDS)
def test_export_and_import_keep_every_bit(tmp_path, kind, dtype):
    config, params = load_hf(FOLDERS[kind], dtype=dtype)
    save_hf(tmp_path / "out", config, params)
    again_config, again = load_hf(tmp_path / "out")
    assert again_config == config
    assert_same_bits(params, again)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as ours:
        theirs = load_file(FOLDERS[kind] / "model.safetensors")
        assert set(ours.keys()) == set(theirs)
        assert ours.metadata()["format"] == "pt"
        checksums = json.loads(ours.metadata()["dcjax.crc32"])
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours.get_tensor(name), value.astype(DTYPES[dtype]))
            assert checksums[name] == f"{zlib.crc32(value.astype(DTYPES[dtype]).tobytes()):08x}"


def test_a_mixture_of_dense_and_sparse_layers_has_hugging_faces_names(tmp_path):
    save_hf(tmp_path / "out", MIXED, random_params(MIXED))
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = {"model.embed_tokens.weight", "model.norm.weight"}
    for i in range(4):
        expected |= {f"model.layers.{i}.{name}_layernorm.weight" for name in ("input", "post_attention")}
        parts = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        expected |= {f"model.layers.{i}.self_attn.{name}.weight" for name in parts}
        owners = ["mlp"] if i == 2 else [f"mlp.experts.{e}" for e in range(3)]
        expected |= {f"model.layers.{i}.{o}.{n}_proj.weight" for o in owners for n in ("gate", "up", "down")}
        expected |= set() if i == 2 else {f"model.layers.{i}.mlp.gate.weight"}
    assert set(written) == expected
    stacked = random_params(MIXED)["layers"]
    np.testing.assert_array_equal(
        written["model.layers.3.mlp.experts.1.up_proj.weight"], stacked["experts_up_proj"][2, 1].T
    )
    np.testing.assert_array_equal(written["model.layers.2.mlp.down_proj.weight"], stacked["down_proj"][0].T)
    config, params = load_hf(tmp_path / "out")
    assert config == MIXED
    assert_same_bits(params, random_params(MIXED))


def test_params_on_a_mesh_are_written_as_those_of_one_device(tmp_path):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
    config, whole = loaded("qwen3_moe")
    save_hf(tmp_path / "one", config, whole)
    save_hf(tmp_path / "mesh", config, load_hf(FOLDERS["qwen3_moe"], mesh=mesh)[1])
    save_hf(tmp_path / "host", config, jax.tree.map(np.asarray, whole))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "mesh", "host")]
    assert files[0] == files[1] == files[2]


def test_a_sharded_export_is_complete_and_says_so_in_its_index(tmp_path):
    seen = []
    save_hf(tmp_path / "out", *loaded("qwen3_moe"), max_shard_bytes=100_000, told=lambda *step: seen.append(step))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    original = load_file(FOLDERS["qwen3_moe"] / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in original.values())
    found = {}
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "out" / file)
        assert sum(value.nbytes for value in tensors.values()) <= 100_000
        assert all(index["weight_map"][name] == file for name in tensors)
        found |= tensors
    assert found.keys() == original.keys() == index["weight_map"].keys()
    assert all(np.array_equal(found[name], value) for name, value in original.items())
    assert seen == [(i + 1, len(original)) for i in range(len(original))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_config_is_read_by_transformers(tmp_path, kind):
    save_hf(tmp_path / "out", *loaded(kind), tokenizer_from=FOLDERS[kind])
    ours, theirs = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "out", FOLDERS[kind]))
    assert ours.architectures == theirs.architectures
    for name in ("eos_token_id", "pad_token_id", "rms_norm_eps", "rope_parameters", "dtype", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    # and the old style's names, for older versions and vLLM
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    classic = json.loads((FOLDERS[kind] / "config_classic.json").read_text())
    left_out = {"transformers_version", "layer_types", "max_window_layers"}
    assert {name: fields.get(name) for name in classic.keys() - left_out} == {
        name: classic[name] for name in classic.keys() - left_out
    }


def test_tokenizer_files_and_unknown_fields_are_carried_over(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "pytorch_model.bin"):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text('{"bos_token_id": 3, "eos_token_id": [7, 5], "top_k": 20}')
    carried = {
        "eos_token_id": [5, 7],
        "bos_token_id": 3,
        "novelty": {"a": 1},
        "hidden_size": 9999,
        "layer_types": ["x"],
    }
    (source / "config.json").write_text(json.dumps(carried | {"quantization_config": {}}))
    save_hf(tmp_path / "out", *loaded("qwen3"), tokenizer_from=source, token_ids={"bos_token_id": 4})
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["eos_token_id"], fields["bos_token_id"], fields["novelty"]) == ([5, 7], 4, {"a": 1})
    assert fields["hidden_size"] == 64 and "quantization_config" not in fields and "layer_types" not in fields
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 4, "eos_token_id": [7, 5], "top_k": 20}
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_a_flipped_bit_of_an_export_is_noticed(tmp_path):
    save_hf(tmp_path / "out", *loaded("qwen3"))
    file = tmp_path / "out" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    # tensors of one dtype lie in the order of their names
    assert "model.norm.weight is damaged, its checksum is" in refusal(tmp_path / "out")


def test_two_exports_are_the_same_bytes(tmp_path):
    config, params = loaded("qwen3")
    for number in range(6):
        save_hf(tmp_path / str(number), config, params, dtype="bf16")
    assert len({(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(6)}) == 1


def test_all_files_of_an_export_are_for_whom_new_files_are(tmp_path):
    save_hf(tmp_path / "out", *loaded("qwen3"), max_shard_bytes=100_000)
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    script = f"""
import resource, signal
from dcjax.models import load_hf, save_hf
loaded = load_hf({str(FOLDERS["qwen3"])!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_hf({str(tmp_path / "out")!r}, *loaded)
except OSError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "model.safetensors cannot be written" in told and "File too large" in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for place in (tmp_path / "out", tmp_path / "out" / "mine.txt"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            save_hf(place, *loaded("qwen3"))
    (tmp_path / "empty").mkdir()
    save_hf(tmp_path / "empty", *loaded("qwen3"))
    assert (tmp_path / "empty").stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o777


def test_a_save_that_fails_leaves_nothing(tmp_path):
    config, params = loaded("qwen3")
    for dtype, bad, expected in [(None, np.nan, "not finite|NaN"), ("fp16", 1e6, "beyond float16")]:
        with pytest.raises(ValueError, match=f"lm_head.weight has .*({expected})"):
            save_hf(tmp_path / "out", config, params | {"lm_head": params["lm_head"].at[3, 3].set(bad)}, dtype=dtype)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_hf(tmp_path / "out", config, params, tokenizer_from=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_is_killed_leaves_no_folder(tmp_path):
    script = f"""
import os
from dcjax.models import load_hf, save_hf
loaded = load_hf({str(FOLDERS["qwen3"])!r})
save_hf({str(tmp_path / "out")!r}, *loaded, told=lambda done, _: done == 20 and os.kill(os.getpid(), 9))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert not (tmp_path / "out").exists()
    save_hf(tmp_path / "out", *loaded("qwen3"))
    assert_same_bits(load_hf(tmp_path / "out")[1], loaded("qwen3")[1])


def test_params_of_another_architecture_are_not_written(tmp_path):
    config, params = loaded("qwen3")
    with pytest.raises(ValueError, match=r"params norm is of shape \(65,\); by the config it must be of shape \(64,\)"):
        save_hf(tmp_path / "out", config, params | {"norm": jnp.ones(65)})
    with pytest.raises(
        ValueError, match=r"params embed_tokens is absent; by the config it must be of shape \(96, 64\)"
    ):
        save_hf(tmp_path / "out", config, {"norm": params["norm"]})
    with pytest.raises(ValueError, match=r"params lm_head is of shape \(96, 64\); by the config it must be absent"):
        save_hf(tmp_path / "out", dataclasses.replace(config, tie_embeddings=True), params)
    with pytest.raises(ValueError, match="params norm is int32"):
        save_hf(tmp_path / "out", config, params | {"norm": jnp.ones(64, jnp.int32)})


# --- memory, and PyTorch

MEMORY = """
import sys, threading, time
from dcjax.models import load_hf, save_hf
import jax
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
jax.numpy.zeros(3).block_until_ready()
before, peak, running = anonymous(), [0], [True]
def watch():
    while running[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
loaded = load_hf(sys.argv[1])
after_load, peak[0] = peak[0], 0
save_hf(sys.argv[1] + ".again", *loaded, max_shard_bytes=50_000_000)
running[0] = False
thread.join()
print(after_load - before, peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("half", [True, False])
def test_the_host_holds_the_params_and_one_leaf(tmp_path, half):
    # 300 MB in bf16: a table of 50 MB, and seven leaves of up to 67 MB; or half as much
    vocab, layers = (12_288, 4) if half else (24_576, 8)
    config = ModelConfig(
        vocab_size=vocab, hidden_size=1024, intermediate_size=4096, num_layers=layers, num_heads=8, head_dim=128
    )
    rng = np.random.default_rng(0)
    shapes = abstract_params(config)
    params = jax.tree.map(lambda leaf: np.resize(rng.normal(size=4099).astype(jnp.bfloat16), leaf.shape), shapes)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert 270e6 < total * (2 if half else 1) < 330e6
    save_hf(tmp_path / "large", config, params)
    environment = os.environ | {"XLA_FLAGS": ""}
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "large")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loading, saving = map(int, ran.stdout.split())
    assert total * 0.9 < loading < total + largest + 50e6, (loading, total, largest)
    # the params are there already; a tensor, its transpose and what XLA copies come on top
    assert saving < total + 2 * largest + 50e6, (saving, total, largest)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_the_same_model_in_transformers(tmp_path, kind):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config, params = loaded(kind)
    save_hf(tmp_path / "out", config, params, max_shard_bytes=200_000, tokenizer_from=FOLDERS[kind])
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    reference = np.load(FOLDERS[kind] / "reference.npz")
    with torch.no_grad():
        logits = model(torch.tensor(reference["input_ids"], dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-5, rtol=0)
    ours = logits_of(config, params, reference["input_ids"], np.ones(reference["input_ids"].shape, bool))
    np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=0)
