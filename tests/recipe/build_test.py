"""From a config to what it describes: training that starts from a Hugging Face folder, and the numerics of a policy."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pretend
import pytest
import tiny

from dcjax.cli import main
from dcjax.errors import RunError
from dcjax.models import ModelConfig, Precision, load_hf, read_config
from dcjax.recipe import build
from dcjax.recipe.architecture import with_pretrained_model
from dcjax.recipe.build import build_optimizer
from dcjax.recipe.config import Config
from dcjax.recipe.plain import to_dict
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig
from dcjax.reporting.record import read_metrics
from dcjax.serving.mismatch import MismatchConfig
from dcjax.sharding.mesh import make_mesh

pytestmark = pytest.mark.heavy

DATA = Path(__file__).parents[1] / "data"
NUMERICS = {"remat": "full", "attention": "xla", "head_chunk": 7, "precision": Precision(compute="bf16")}


@pytest.mark.parametrize("name", ["hf_tiny_qwen3", "hf_tiny_qwen3_moe", "hf_tiny_qwen2", "hf_tiny_llama"])
def test_the_architecture_is_the_folders_and_the_numerics_are_the_recipes(name):
    recipe = Config(model=ModelConfig(num_layers=5, **NUMERICS), pretrained=DATA / name)
    model = with_pretrained_model(recipe).model
    assert model == dataclasses.replace(read_config(DATA / name), **NUMERICS)
    assert model.num_layers == 2


def test_without_a_folder_the_config_is_as_it_was():
    assert with_pretrained_model(Config()) == Config()


def test_training_starts_from_the_weights_in_the_folder():
    config = with_pretrained_model(Config(pretrained=DATA / "hf_tiny_qwen3_moe"))
    params = build.starting_params(config, make_mesh(config.mesh))
    jax.tree.map(np.testing.assert_array_equal, params, load_hf(DATA / "hf_tiny_qwen3_moe")[1])
    narrow = dataclasses.replace(
        config, model=dataclasses.replace(config.model, precision=Precision(parameters="bf16"))
    )
    leaves = jax.tree.leaves(build.starting_params(narrow, make_mesh(config.mesh)))
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}


def test_sequences_longer_than_the_folders_model_is_made_for_are_refused():
    long = dataclasses.replace(Config().rollout, max_response_length=10**6)
    with pytest.raises(RunError, match=r"length 1000000, 1000013 tokens; the model is made for 256 \(RoPE"):
        with_pretrained_model(Config(pretrained=DATA / "hf_tiny_qwen3", rollout=long))


def test_a_folder_without_a_supported_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    with pytest.raises(RunError, match="model_type is 'mistral'"):
        with_pretrained_model(Config(pretrained=tmp_path))


def test_damaged_weights_are_refused(tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(DATA / "hf_tiny_qwen3", folder)
    config = with_pretrained_model(Config(pretrained=folder))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(RunError, match=r"model\.safetensors"):
        build.starting_params(config, make_mesh(config.mesh))


def test_a_pretrained_folder_comes_back_from_json():
    config = Config(pretrained=Path("some/where"))
    assert to_dict(config)["pretrained"] == "some/where"


def run_from_folder(tmp_path, compute):
    """Trains a step from a folder and exports what it began with again; the metrics of the last step."""
    config = dataclasses.replace(
        tiny.CONFIG,
        steps=1,
        model=ModelConfig(precision=Precision(compute=compute)),
        warm_start=dataclasses.replace(tiny.CONFIG.warm_start, steps=0),
    )
    recipe = tiny.write_recipe(tmp_path / "recipe.py", config)
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", str(recipe), "--pretrained", str(DATA / "hf_tiny_qwen3_moe"), "--run-dir", str(run)]) == 0
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["model"]["num_experts"] == 8
    # with no warm start, step 0 is what was read
    assert main(["convert", "export", str(run / "checkpoints" / "0"), str(out)]) == 0
    jax.tree.map(np.testing.assert_array_equal, load_hf(out)[1], load_hf(DATA / "hf_tiny_qwen3_moe")[1])
    return read_metrics(run / "metrics.jsonl")[-1]


def test_a_run_starts_from_a_folder_and_is_exported_again(tmp_path, monkeypatch):
    pretend.install(monkeypatch)
    assert run_from_folder(tmp_path, "float32")["step"] == 1


def test_a_run_resumes_without_the_folder_that_it_started_from(tmp_path, monkeypatch):
    pretend.install(monkeypatch)
    recipe = tiny.write_recipe(tmp_path / "recipe.py", dataclasses.replace(tiny.CONFIG, steps=1))
    folder, run = tmp_path / "folder", tmp_path / "run"
    shutil.copytree(DATA / "hf_tiny_qwen3", folder)
    begun = ["train", str(recipe), "--run-dir", str(run), "warm_start.steps=0", "--pretrained"]
    assert main([*begun, str(folder)]) == 0
    folder.rename(tmp_path / "moved")
    assert main(["train", str(run)]) == 0
    assert main([*begun, str(tmp_path / "moved")]) == 0
    shutil.rmtree(run / "checkpoints" / "1")
    assert main([*begun, str(tmp_path / "gone")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "fp16"])
def test_so_it_does_with_the_folders_experts(tmp_path, compute):
    last = run_from_folder(tmp_path, compute)
    assert last["router/load_balance"] >= 1
    assert ("loss_scale" in last) == (compute == "fp16")


@pytest.mark.parametrize("compute", ["float32", "bf16", "fp16"])
def test_only_half_precision_scales_its_loss(compute):
    config = Config(model=ModelConfig(precision=Precision(compute=compute)))
    state = build_optimizer(config).init({"w": np.zeros(2, np.float32)})
    assert (optax.tree.get(state, "loss_scale") is not None) == (compute == "fp16")


def test_a_step_whose_gradients_overflowed_has_no_gradient_norm():
    metrics = {"loss": np.float32(1.5), "grad_norm": np.float32(np.inf), "overflow": np.float32(1)}
    assert build.metrics_to_host(metrics) == {"loss": 1.5, "overflow": 1.0}
    metrics |= {"grad_norm": np.float32(2), "overflow": np.float32(0)}
    assert build.metrics_to_host(metrics) == {"loss": 1.5, "grad_norm": 2.0, "overflow": 0.0}


def abstract(**changes):
    config = Config(model=ModelConfig(vocab_size=19, hidden_size=16, intermediate_size=16, num_layers=1), **changes)
    return build.abstract_state(config, make_mesh(config.mesh))


def test_only_serving_weights_that_lag_keep_past_parameters():
    plain, stale = abstract(), abstract(mismatch=MismatchConfig(staleness=3))
    assert plain.history == ()
    assert not any("history" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(plain))
    assert stale.history == (plain.params,) * 3
    assert dataclasses.replace(stale, history=()) == plain


def test_the_training_engine_is_float32_with_nothing_added():
    config = Config(
        model=ModelConfig(vocab_size=19, hidden_size=32, intermediate_size=32, num_layers=1),
        serving=ServingConfig(format="int4", kv_cache="int8", keep=("embed_tokens",)),
        mismatch=MismatchConfig(logit_noise=0.1, weight_noise=0.1),
        rollout=RolloutConfig(top_k=4),
    )
    mesh = make_mesh(config.mesh)
    deployed, training = build.build_engine(config, mesh, [3]), build.build_training_engine(config, mesh, [3])
    assert (deployed.format.name, deployed.kv_cache.name) == ("int4", "int8")
    assert deployed.decoder.mismatch.logit_noise == config.mismatch.logit_noise
    assert (training.format.name, training.kv_cache.name) == ("float32", "float32")
    assert training.decoder.mismatch == MismatchConfig()
    assert training.decoder.max_candidates == deployed.decoder.max_candidates == 4
    params = tiny.masters(config.model)
    served = training.sync(params, 0).weights["embed_tokens"].codes
    np.testing.assert_array_equal(served, params["embed_tokens"])
    # noise on weights is drawn anew for each version
    first, second = (deployed.sync(params, version).weights["layers"][0]["q_proj"] for version in (0, 1))
    assert (np.asarray(first.codes.scale) != np.asarray(second.codes.scale)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serving": ServingConfig(slots=10**9)}, "slots would fit"),
        ({"serving": ServingConfig(keep=("nonesuch",))}, "nonesuch"),
        (
            {"mismatch": MismatchConfig(routing_flips=0.5)},
            "mismatch.routing_flips is 0.5; it needs a model with experts",
        ),
        ({"rollout": RolloutConfig(replay_routing=True), "pretrained": DATA / "hf_tiny_qwen3"}, "model with experts"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(changes, message):
    config = with_pretrained_model(Config(**changes))
    with pytest.raises(RunError, match=message):
        build.build_engine(config, make_mesh(config.mesh), [3])


def test_routing_of_a_pretrained_model_can_be_replayed():
    rollout = RolloutConfig(replay_routing=True, top_k=20)
    config = with_pretrained_model(Config(rollout=rollout, pretrained=DATA / "hf_tiny_qwen3_moe"))
    engine = build.build_engine(config, make_mesh(config.mesh), [3])
    assert engine.decoder.records_experts and engine.decoder.max_candidates == 20


@pytest.mark.slow
def test_gradients_of_all_layers_are_in_memory_little_more_than_once():
    """Beside their sums, and whatever the loop over microbatches copies; it was 3.9 times the parameters."""
    model = dataclasses.replace(tiny.DENSE, hidden_size=128, intermediate_size=512, num_layers=8)
    config = dataclasses.replace(tiny.CONFIG, model=model)
    mesh = make_mesh(config.mesh)
    state, batch = build.abstract_state(config, mesh), build.abstract_batch(config, mesh)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    program = build.compile_train_step(config, mesh).lower(state, batch).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2.3 * held


@pytest.mark.parametrize(("layers", "resolved"), [(1, "none"), (3, "none"), (4, "products"), (30, "products")])
def test_small_models_keep_all_for_the_backward_pass_and_deeper_ones_the_products(layers, resolved):
    model = dataclasses.replace(Config().model, num_layers=layers)
    assert (model.remat, model.resolved_remat) == ("auto", resolved)
    assert dataclasses.replace(model, remat="full").resolved_remat == "full"
