import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from dcjax.cli import main
from dcjax.data.arithmetic import build_tokenizer
from dcjax.loop.checkpoint import Checkpoints, Cursor
from dcjax.loop.run_directory import open_run
from dcjax.models import load_hf
from dcjax.recipe.build import build_optimizer, initial_state, starting_params
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.tools.convert import export_run, import_model, inspect_model

pytestmark = pytest.mark.heavy

DATA = Path(__file__).parents[1] / "data"
KINDS = ("qwen3", "qwen3_moe", "qwen2", "llama", "qwen3_yarn")
CONFIG = dataclasses.replace(tiny.CONFIG, model=dataclasses.replace(tiny.DENSE, rope_theta=5e5))


def folder(kind):
    return DATA / f"hf_tiny_{kind}"


@pytest.fixture
def run_command(capfd):
    """Runs `dcjax convert ...`; returns the status, what it printed, and its error line."""

    def run(*arguments):
        capfd.readouterr()
        status = main(["convert", *map(str, arguments)])
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def refusal(run_command):
    """Runs a conversion that must be refused: status 2 and one line, which is returned."""

    def run(*arguments):
        status, output, errors = run_command(*arguments)
        assert status == 2 and output == ""
        lines = [line for line in errors.splitlines() if not line.startswith("tensor ")]
        assert len(lines) == 1 and lines[0].startswith("dcjax: error: "), errors
        return lines[0].removeprefix("dcjax: error: ")

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two checkpoints, whose params differ, and the params of each."""
    directory = tmp_path_factory.mktemp("runs") / "trained"
    config = dataclasses.replace(CONFIG, run_dir=directory)
    mesh = make_mesh(MeshConfig())
    saved = {}
    with open_run(config) as run_dir, Checkpoints(run_dir / "checkpoints", keep=2) as checkpoints:
        build_tokenizer().save_pretrained(run_dir / "tokenizer")
        for step in (3, 7):
            params = jax.tree.map(lambda leaf, step=step: leaf * step, starting_params(config, mesh))
            saved[step] = jax.tree.map(np.asarray, params)
            state = initial_state(config, mesh, build_optimizer(config), params)
            checkpoints.save(state, Cursor(step=step, data_cursor=0, rollout_key=[0, 0]))
    return directory, saved


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_an_import_is_the_same_checkpoint_with_checksums(run_command, tmp_path, kind):
    status, output, errors = run_command("import", folder(kind), tmp_path / "out")
    assert (status, output) == (0, f"imported: {tmp_path / 'out'}\n")
    tensors = len(load_file(folder(kind) / "model.safetensors"))
    assert errors.splitlines()[-1] == f"tensor {tensors}/{tensors}  ETA 0:00"
    assert not inspect_model(folder(kind)).checksums and inspect_model(tmp_path / "out").checksums
    (config, params), (same_config, same) = load_hf(folder(kind)), load_hf(tmp_path / "out")
    assert config == same_config
    assert_same(params, same)
    # what a second import writes is what the first one wrote
    import_model(tmp_path / "out", tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", jnp.bfloat16), ("fp16", np.float16), ("float32", np.float32)])
def test_an_import_converts(run_command, tmp_path, dtype, expected):
    assert run_command("import", folder("qwen3_moe"), tmp_path / "out", "--dtype", dtype)[0] == 0
    original, written = (load_file(path / "model.safetensors") for path in (folder("qwen3_moe"), tmp_path / "out"))
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value.astype(expected))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == jnp.dtype(expected).name
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_damage_is_refused_and_nothing_is_written(refusal, run_command, tmp_path):
    run_command("import", folder("qwen3"), tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    weights = tmp_path / "bad" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 16
    weights.write_bytes(content)
    assert "model.norm.weight is damaged" in refusal("import", tmp_path / "bad", tmp_path / "out")
    weights.write_bytes(content[:-3])
    assert "truncated" in refusal("inspect", tmp_path / "bad")
    weights.unlink()
    assert "no model.safetensors" in refusal("inspect", tmp_path / "bad")
    assert "config.json; give a folder" in refusal("import", tmp_path / "nowhere", tmp_path / "out")
    assert "not an empty folder" in refusal("import", tmp_path / "good", tmp_path / "bad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]


def test_an_import_refuses_what_would_not_load(refusal, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder("qwen3"), source)
    weights = load_file(source / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"].astype(np.float64)}, source / "model.safetensors")
    assert "lm_head.weight is stored as F64" in refusal("import", source, tmp_path / "out", "--dtype", "bf16")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * 1e6}, source / "model.safetensors")
    assert "beyond float16" in refusal("import", source, tmp_path / "out", "--dtype", "fp16")
    assert "invalid choice" in refusal("import", source, tmp_path / "out", "--dtype", "int8")
    assert "ACTION" in refusal()
    assert not (tmp_path / "out").exists()


def test_an_export_is_the_checkpoint_and_its_tokenizer(run_command, trained, tmp_path):
    run_dir, saved = trained
    status, output, _ = run_command("export", run_dir, tmp_path / "newest")
    assert (status, output) == (0, f"exported: {tmp_path / 'newest'} (step 7)\n")
    assert run_command("export", run_dir / "checkpoints" / "3", tmp_path / "third")[0] == 0
    for step, name in ((7, "newest"), (3, "third")):
        config, params = load_hf(tmp_path / name)
        assert config == CONFIG.model
        assert_same(params, saved[step])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "newest")
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    # transformers 4 does not know the name that transformers 5 gives the class
    written = json.loads((tmp_path / "newest" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    fields = json.loads((tmp_path / "newest" / "config.json").read_text())
    assert fields["eos_token_id"] == tokenizer.eos_token_id
    assert fields["pad_token_id"] == tokenizer.pad_token_id


def test_what_transformers_5_writes_is_exported_as_4_reads_it(trained, tmp_path):
    run_dir = shutil.copytree(trained[0], tmp_path / "run")
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<unk>"]})
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(run_dir / "tokenizer")
    before = json.loads((run_dir / "tokenizer" / "tokenizer_config.json").read_text())
    assert before["extra_special_tokens"] == ["<unk>"]
    export_run(run_dir, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    # of 4, extra_special_tokens are named, and the class is not TokenizersBackend
    assert "extra_special_tokens" not in written and written["additional_special_tokens"] == ["<unk>"]
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.extra_special_tokens == ["<unk>"] and again.chat_template == tokenizer.chat_template
    assert again("3+4=<unk>")["input_ids"] == tokenizer("3+4=<unk>")["input_ids"]


def test_a_config_that_both_read_is_exported_as_it_came(trained, tmp_path):
    run_dir = shutil.copytree(trained[0], tmp_path / "run")
    config = run_dir / "tokenizer" / "tokenizer_config.json"
    fields = json.loads(config.read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<unk>"],
        "extra_special_tokens": {},
    }
    config.write_text(json.dumps(fields))
    export_run(run_dir, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == config.read_bytes()


def test_a_tokenizers_damaged_config_is_refused(refusal, tmp_path):
    source = shutil.copytree(folder("qwen3"), tmp_path / "source")
    (source / "tokenizer_config.json").write_text('{"chat_template":')
    assert f"{source / 'tokenizer_config.json'} is damaged" in refusal("import", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_in_bf16_rounds_to_nearest(trained, tmp_path):
    run_dir, saved = trained
    assert export_run(run_dir, tmp_path / "out", dtype="bf16") == 7
    assert_same(load_hf(tmp_path / "out")[1], jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), saved[7]))


def test_exports_of_no_run_are_refused(refusal, trained, tmp_path):
    run_dir, _ = trained
    assert "no run in" in refusal("export", tmp_path / "nowhere", tmp_path / "out")
    assert "no checkpoint of step 4" in refusal("export", run_dir / "checkpoints" / "4", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not an empty folder" in refusal("export", run_dir, tmp_path / "full")
    shutil.copytree(run_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer"))
    told = refusal("export", folder("qwen3"), tmp_path / "out")
    assert f"{folder('qwen3')} is a Hugging Face folder and not a run" in told
    assert "no tokenizer in" in refusal("export", tmp_path / "bare", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "total", "active"),
    # by hand: tables, then per layer norms, attention and MLP; of the MoE's 8 experts 2 are active
    [
        ("qwen3", 2 * 96 * 64 + 64 + 2 * (128 + 64 + 64 * (128 + 64 + 64 + 128) + 3 * 64 * 160), None),
        (
            "qwen3_moe",
            2 * 96 * 64 + 64 + 2 * (128 + 64 + 64 * (128 + 64 + 64 + 128) + 64 * 8 + 8 * 3 * 64 * 48),
            2 * 96 * 64 + 64 + 2 * (128 + 64 + 64 * (128 + 64 + 64 + 128) + 64 * 8 + 2 * 3 * 64 * 48),
        ),
        ("qwen2", 2 * 96 * 64 + 64 + 2 * (128 + 128 + 64 * (64 + 32 + 32 + 64) + 3 * 64 * 160), None),
        ("llama", 96 * 64 + 64 + 2 * (128 + 64 * (64 + 32 + 32 + 64) + 3 * 64 * 160), None),
    ],
)
def test_an_inspection_counts_parameters(run_command, kind, total, active):
    status, output, errors = run_command("inspect", folder(kind), "--json")
    assert (status, errors, output.count("\n")) == (0, "", 1)
    found = json.loads(output)
    original = load_file(folder(kind) / "model.safetensors")
    assert found["parameters"] == total == sum(value.size for value in original.values())
    assert found["active_parameters"] == (active or total)
    assert found["dtypes"] == {"F32": len(original)}
    assert (found["files"], found["checksums"]) == (1, False)
    assert found["bytes"] == (folder(kind) / "model.safetensors").stat().st_size
    assert found["config"]["num_layers"] == 2


def test_an_inspection_is_a_table(run_command):
    status, output, _ = run_command("inspect", folder("qwen3_moe"))
    assert status == 0
    rows = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert rows["architecture"] == "qwen3, 8 experts, 2 per token"
    assert rows["dtypes"] == "F32 (69 tensors)"
    assert rows["checksums"] == "no"
    assert rows["positions"] == "256, RoPE of theta 1e+06, without scaling"
