"""GGUF files as `dcjax convert import` reads them: from llama.cpp's names and layouts back to the same checkpoint."""

import json
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from compiling import jit
from gguf_files import Sizes, gguf_bytes, metadata, tensors
from safetensors.numpy import load_file

import dcjax.tools.gguf.config
from dcjax.cli import main
from dcjax.data.tokenizers import load_tokenizer
from dcjax.models import forward, load_hf, read_end_tokens
from dcjax.models.rope import Llama3Scaling, YarnScaling
from dcjax.tools.convert import import_model, inspect_model
from dcjax.tools.gguf.config import read_config
from dcjax.tools.gguf.container import open_container

gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.heavy

DATA = Path(__file__).parents[2] / "data"
ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "llama": "llama"}
run = jit(forward, static_argnums=0)


def permuted(rows, heads):
    """llama.cpp's order of the rows of queries and keys: a pair that is rotated together lies side by side."""
    width = len(rows) // heads
    order = [
        head * width + half * width // 2 + pair
        for head in range(heads)
        for pair in range(width // 2)
        for half in (0, 1)
    ]
    return rows[order]


def llama3_factors(theta, head_dim, scaling):
    """What llama.cpp's converter writes of Llama 3's scaling of RoPE, pair by pair, by the length of its wave."""
    factors = []
    for pair in range(head_dim // 2):
        length = np.float32(2 * np.pi) * np.float32(theta) ** np.float32(2 * pair / head_dim)
        turns = scaling["original_max_position_embeddings"] / length
        if turns > scaling["high_freq_factor"]:
            factors.append(1.0)
        elif turns < scaling["low_freq_factor"]:
            factors.append(scaling["factor"])
        else:
            kept = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
            factors.append(1 / ((1 - kept) / scaling["factor"] + kept))
    return np.array(factors, np.float32)


def write_gguf(kind, path):
    """A checkpoint of tests/data, as llama.cpp's converter writes it, by the names of the package `gguf`."""
    folder = DATA / f"hf_tiny_{kind}"
    fields, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    architecture = ARCHITECTURES[kind]
    number = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, fields["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_rope_freq_base(fields["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_vocab_size(fields["vocab_size"])
    if "head_dim" in fields:
        writer.add_key_length(fields["head_dim"])
        writer.add_value_length(fields["head_dim"])
    if kind == "qwen3_moe":
        writer.add_expert_count(fields["num_local_experts"])
        writer.add_expert_used_count(fields["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(fields["moe_intermediate_size"])
        for layer in range(fields["num_hidden_layers"]):
            for part in ("gate", "up", "down"):
                experts = f"model.layers.{layer}.mlp.experts"
                each = [weights.pop(f"{experts}.{e}.{part}_proj.weight") for e in range(fields["num_local_experts"])]
                weights[f"{experts}.{part}_proj.weight"] = np.stack(each)
    if kind == "llama":
        scaling = fields["rope_parameters"]
        writer.add_tensor("rope_freqs.weight", llama3_factors(scaling["rope_theta"], fields["head_dim"], scaling))
    for name, array in weights.items():
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            array = permuted(array, fields["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*(f"<{number}>" for number in range(fields["vocab_size"] - 3)), "a", "b", "ab"])
    writer.add_token_types([3] * (fields["vocab_size"] - 3) + [1] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(fields["bos_token_id"])
    writer.add_eos_token_id(fields["eos_token_id"])
    writer.add_pad_token_id(fields["pad_token_id"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def run_command(capfd):
    """Runs `dcjax ...`; returns the status, what it printed, and its error lines but for the progress."""

    def run(*arguments):
        capfd.readouterr()
        status = main([*map(str, arguments)])
        output, errors = capfd.readouterr()
        return status, output, [line for line in errors.splitlines() if not line.startswith("tensor ")]

    return run


@pytest.fixture
def refusal(run_command):
    """Runs a command that must be refused: status 2 and one line, which is returned."""

    def run(*arguments):
        status, output, errors = run_command(*arguments)
        assert (status, output, len(errors)) == (2, "", 1) and errors[0].startswith("dcjax: error: "), errors
        return errors[0].removeprefix("dcjax: error: ")

    return run


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_checkpoint_comes_back_from_a_gguf_file(run_command, tmp_path, monkeypatch, kind):
    write_gguf(kind, tmp_path / "model.gguf")
    # the tiny Llama's scaling, as if it were the published one
    monkeypatch.setattr(
        dcjax.tools.gguf.config,
        "PUBLISHED",
        {"low_freq_factor": 1.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 24},
    )
    status, output, errors = run_command("convert", "import", tmp_path / "model.gguf", tmp_path / "out")
    assert (status, output, errors) == (0, f"imported: {tmp_path / 'out'}\n", [])
    original, written = (
        load_file(folder / "model.safetensors") for folder in (DATA / f"hf_tiny_{kind}", tmp_path / "out")
    )
    assert original.keys() == written.keys()
    for name, array in original.items():
        assert array.dtype == written[name].dtype
        np.testing.assert_array_equal(array, written[name], err_msg=name)
    (config, _), (same_config, params) = load_hf(DATA / f"hf_tiny_{kind}"), load_hf(tmp_path / "out")
    assert same_config == config
    assert inspect_model(tmp_path / "out").checksums
    reference = np.load(DATA / f"hf_tiny_{kind}" / "reference.npz")
    tokens = reference["input_ids"]
    logits = np.asarray(run(config, params, tokens, np.ones(tokens.shape, bool)))
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-4, rtol=0)
    assert read_end_tokens(tmp_path / "out") == read_end_tokens(DATA / f"hf_tiny_{kind}")
    fields = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert fields == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture
def model(tmp_path):
    """Writes a file, of a tiny model that some keys and tensors change; returns its path."""

    def write(architecture="qwen2", added=None, **changes):
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(metadata(architecture, **changes), tensors(architecture) | (added or {})))
        return path

    return write


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "float32"])
def test_the_command_writes_a_folder_that_loads(run_command, tmp_path, model, dtype):
    path = model("llama", tokenizer__ggml__eot_token_id=1)
    assert run_command("convert", "import", path, tmp_path / "out", "--dtype", dtype)[0] == 0
    config, params = load_hf(tmp_path / "out")
    assert (config.family, config.precision.parameters, config.tie_embeddings) == ("llama", dtype, True)
    table = np.frombuffer(tensors("llama")["token_embd.weight"].data, "<f4").reshape(-1, Sizes().hidden)
    np.testing.assert_array_equal(params["embed_tokens"], table.astype(params["embed_tokens"].dtype))
    assert read_end_tokens(tmp_path / "out") == [0, 1]
    assert load_tokenizer(tmp_path / "out")("ab<end>").tokens() == ["ab", "<end>"]
    # what an import has written can be imported
    assert run_command("convert", "import", tmp_path / "out", tmp_path / "again")[0] == 0
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_an_inspection_says_what_a_file_holds(run_command, model):
    path = model("qwen3")
    status, output, errors = run_command("convert", "inspect", path)
    assert (status, errors) == (0, [])
    rows = dict(line.split(maxsplit=1) for line in output.splitlines())
    count = sum(len(tensor.data) // 4 for tensor in tensors("qwen3").values())
    assert rows == {
        "architecture": "qwen3",
        "layers": "1 of width 8",
        "heads": "2 of width 4, 1 for keys and values",
        "positions": "64, RoPE of theta 10000, without scaling",
        "vocabulary": "17, tied head",
        "parameters": f"{count:,}, active {count:,}",
        "dtypes": "F32 (13 tensors)",
        "files": f"1, {path.stat().st_size:,} bytes",
        "checksums": "no",
    }
    told = json.loads(run_command("convert", "inspect", path, "--json")[1])
    assert told["dtypes"] == {"F32": 13} and told["config"]["family"] == "qwen3"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general.architecture": None}, "has no general.architecture"),
        (
            {"general.architecture": "gemma3"},
            "general.architecture is 'gemma3'; it must be one of those supported, llama",
        ),
        ({"general.architecture": 3}, "general.architecture is 3"),
        ({"general.type": "adapter"}, "general.type is 'adapter'; it must be model"),
        ({"split.count": 2}, "split.count is 2; it must be 1; join the parts first, with llama.cpp's"),
        ({"qwen2.block_count": None}, "has no qwen2.block_count; it must be an integer"),
        ({"qwen2.block_count": "1"}, "qwen2.block_count is '1'"),
        ({"qwen2.block_count": 0}, "num_hidden_layers is 0"),
        ({"qwen2.block_count": 2}, "describes: 12 missing (blk.1.attn_norm.weight, "),
        ({"qwen2.block_count": 2**31 - 1}, "num_hidden_layers is 2147483647"),
        ({"qwen2.embedding_length": 16}, "has shape [17, 8]; by its metadata it must be [17, 16]"),
        ({"qwen2.attention.head_count": 0}, "num_attention_heads is 0"),
        ({"qwen2.attention.head_count": [2, 2]}, "qwen2.attention.head_count is array([2, 2]"),
        ({"qwen2.attention.head_count_kv": 3}, "not a multiple of"),
        ({"qwen2.attention.key_length": 3}, "even"),
        ({"qwen2.attention.value_length": 8}, "qwen2.attention.value_length is 8; it must be 4, the width of a head"),
        ({"qwen2.rope.dimension_count": 2}, "qwen2.rope.dimension_count is 2; it must be 4"),
        ({"qwen2.attention.layer_norm_rms_epsilon": None}, "has no qwen2.attention.layer_norm_rms_epsilon"),
        ({"qwen2.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan; it must be a finite number"),
        ({"qwen2.attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps is -1.0"),
        ({"qwen2.rope.freq_base": float("inf")}, "qwen2.rope.freq_base is inf"),
        ({"qwen2.rope.freq_base": 0.0}, "rope_theta is 0.0"),
        ({"qwen2.vocab_size": 16}, "token_embd.weight has shape [17, 8]; by its metadata it must be [16, 8]"),
        ({"qwen2.context_length": 0}, "max_position_embeddings is 0"),
        ({"qwen2.expert_count": 4}, "qwen2.expert_count is 4; it must be 0"),
        ({"qwen2.rope.scaling.type": "longrope"}, "qwen2.rope.scaling.type is 'longrope'; it must be none or yarn"),
        ({"qwen2.rope.scaling.factor": 2.0}, "qwen2.rope.scaling.factor is 2.0; it must be 1: linear scaling"),
        ({"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 2.0}, "has no qwen2.rope.scaling.original"),
        (
            {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.yarn_attn_factor": 1.0},
            "attn_factor is 1.0; it must be",
        ),
        ({"qwen2.rope.scale_linear": 2.0}, "qwen2.rope.scale_linear is 2.0; it must be absent"),
        ({"qwen2.attention.sliding_window": 64}, "qwen2.attention.sliding_window is 64; it must be absent"),
        ({"qwen2.logit_scale": 2.0}, "qwen2.logit_scale is 2.0; it must be absent: what it says is not supported"),
        ({"qwen2.pooling_type": 3}, "qwen2.pooling_type is 3; it must be absent"),
        ({"qwen2." + "x\n" * 9999: 3}, "\\nx\\n is 3; it must be absent"),
    ],
)
def test_settings_that_are_not_supported_are_refused_in_one_line(refusal, tmp_path, model, changes, said):
    assert said in refusal("convert", "import", model(**changes), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


PUBLISHED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def scaled(head_dim, **changes):
    """Changes of a model to Llama 3's scaling, with other numbers than the published ones."""
    return {"rope_freqs.weight": gguf_files.f32(llama3_factors(5e5, head_dim, {"factor": 8.0, **PUBLISHED, **changes}))}


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_scaling_of_llama_3_follows_from_its_factors(tmp_path, factor, head_dim):
    sizes = Sizes(head_dim=head_dim)
    path = tmp_path / "model.gguf"
    fields = metadata("llama", sizes, llama__rope__freq_base=5e5)
    path.write_bytes(gguf_bytes(fields, tensors("llama", sizes) | scaled(head_dim, factor=factor)))
    config = read_config(open_container(path))
    assert config.rope_scaling == Llama3Scaling(factor, 1.0, 4.0, 8192)
    assert config.rope_theta == 5e5
    import_model(path, tmp_path / "out")
    assert load_hf(tmp_path / "out")[0].rope_scaling == config.rope_scaling
    path.write_bytes(
        gguf_bytes(fields, tensors("llama", sizes) | {"rope_freqs.weight": gguf_files.f32(np.ones(head_dim // 2))})
    )
    assert read_config(open_container(path)).rope_scaling is None


@pytest.mark.parametrize(
    "changes",
    [
        {"low_freq_factor": 2.0},
        {"high_freq_factor": 8.0},
        {"original_max_position_embeddings": 4096},
        {"factor": 0.5},
        {"factor": float("inf")},
        {"factor": float("nan")},
    ],
)
def test_other_factors_of_rope_are_refused(refusal, tmp_path, changes):
    sizes = Sizes(head_dim=64)
    path = tmp_path / "model.gguf"
    fields = metadata("llama", sizes, llama__rope__freq_base=5e5)
    path.write_bytes(gguf_bytes(fields, tensors("llama", sizes) | scaled(64, **changes)))
    said = refusal("convert", "import", path, tmp_path / "out")
    assert "rope_freqs.weight divides RoPE's frequencies by [1.0, 1.0, " in said


def test_factors_of_rope_of_another_shape_or_beside_yarn_are_refused(refusal, tmp_path, model):
    for factors in (np.ones(3), np.ones((1, 2))):
        path = model("llama", {"rope_freqs.weight": gguf_files.f32(factors)})
        assert "it must be of type F32 and shape [2]" in refusal("convert", "import", path, tmp_path / "out")
    path = model("llama", {"rope_freqs.weight": gguf_files.f32(np.ones(2))}, **{"llama.rope.scaling.type": "yarn"})
    assert "it must be none, as the file has rope_freqs" in refusal("convert", "import", path, tmp_path / "out")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_yarn_is_read(model, architecture):
    prefix = f"{architecture}.rope.scaling"
    scaling = {f"{prefix}.type": "yarn", f"{prefix}.factor": 4.0, f"{prefix}.original_context_length": 32768}
    config = read_config(open_container(model(architecture, **scaling)))
    assert config.rope_scaling == YarnScaling(4.0, 32768)
    betas = {f"{prefix}.yarn_beta_fast": 16.0, f"{prefix}.yarn_beta_slow": 2.0, f"{prefix}.finetuned": True}
    config = read_config(open_container(model(architecture, **scaling, **betas)))
    assert config.rope_scaling == YarnScaling(4.0, 32768, beta_fast=16.0, beta_slow=2.0)
    for key, value in ((f"{prefix}.type", "none"), (f"{prefix}.type", None), (f"{prefix}.factor", 1.0)):
        config = read_config(open_container(model(architecture, **(scaling | {f"{prefix}.factor": 1.0, key: value}))))
        assert config.rope_scaling == (YarnScaling(1.0, 32768) if key.endswith("factor") else None)


def test_what_belongs_to_another_architecture_is_refused(refusal, tmp_path, model):
    path = model("qwen2", {"rope_freqs.weight": gguf_files.f32(np.ones(2))})
    assert "describes: 1 unexpected (rope_freqs.weight)" in refusal("convert", "import", path, tmp_path / "out")
    path = model("llama", {"blk.0.attn_q.bias": gguf_files.f32(np.zeros(8))})
    assert "describes: 1 unexpected (blk.0.attn_q.bias)" in refusal("convert", "import", path, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.gguf", "renamed.GGUF", "other.bin"])
def test_a_file_of_another_kind_is_refused(refusal, tmp_path, name):
    (tmp_path / name).write_bytes((DATA / "hf_tiny_qwen2" / "model.safetensors").read_bytes())
    for action in (["import", tmp_path / name, tmp_path / "out"], ["inspect", tmp_path / name]):
        assert f"{tmp_path / name} is no GGUF file: it begins with b'" in refusal("convert", *action)


def test_a_file_that_is_not_there_is_said_to_be_missing(refusal, tmp_path):
    assert f"no file {tmp_path / 'x.gguf'}" in refusal("convert", "import", tmp_path / "x.gguf", tmp_path / "out")


def test_a_gguf_file_must_be_imported_before_it_is_used(refusal, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = model()
    advice = f"{path} is a GGUF file; import it first: dcjax convert import {path} FOLDER"
    for source in (path, tmp_path):
        for command in ("probe", "evaluate"):
            assert advice in refusal(command, source)
        assert advice in refusal("train", "quickstart", "name=x", "--pretrained", source)
        assert advice in refusal("convert", "export", source, tmp_path / "out")
    assert advice in refusal("convert", "import", tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text((DATA / "hf_tiny_qwen2" / "config.json").read_text())
    assert advice in refusal("convert", "inspect", tmp_path)


def test_the_default_of_a_file_that_says_little_is_llama_cpps(model):
    config = read_config(
        open_container(
            model(**{f"qwen2.{key}": None for key in ("attention.key_length", "rope.freq_base")}, qwen2__vocab_size=17)
        )
    )
    assert (config.head_dim, config.rope_theta, config.vocab_size, config.rms_norm_eps) == (4, 1e4, 17, 1e-5)
