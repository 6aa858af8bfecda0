import dataclasses
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from dcjax.data.arithmetic import build_tokenizer
from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints, Cursor
from dcjax.loop.run_directory import open_run
from dcjax.recipe.build import build_optimizer, initial_state, params_shardings
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.tools.convert import export_run
from dcjax.tools.evaluate import evaluate_source
from dcjax.tools.open_model import open_model
from dcjax.tools.probe.source import load_sources

pytestmark = pytest.mark.heavy

SPLIT = MeshConfig(fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was trained on four devices and served over two, with two checkpoints whose norms are its steps."""
    directory = tmp_path_factory.mktemp("runs") / "trained"
    serving = dataclasses.replace(tiny.CONFIG.serving, tensor=2, format="bf16")
    config = dataclasses.replace(tiny.CONFIG, run_dir=directory, mesh=SPLIT, serving=serving)
    mesh = make_mesh(SPLIT)
    with open_run(config, end_tokens=[1, 16]), Checkpoints(directory / "checkpoints", keep=2) as checkpoints:
        build_tokenizer().save_pretrained(directory / "tokenizer")
        for step in (3, 7):
            # The state takes the buffers that it is given.
            params = jax.tree.map(np.array, tiny.masters(config.model))
            params["norm"] = np.full(config.model.hidden_size, step, np.float32)
            params = jax.device_put(params, params_shardings(config, mesh))
            state = initial_state(config, mesh, build_optimizer(config), params)
            checkpoints.save(state, Cursor(step=step, data_cursor=0, rollout_key=[0, 0]))
    return directory


def norm(params):
    (value,) = set(np.asarray(params["norm"]).tolist())
    return value


def test_a_run_is_opened_at_its_newest_step_on_one_device_whatever_it_was_trained_and_served_on(run):
    model = open_model(run)
    assert (model.name, model.step, model.directory, model.end_tokens) == ("trained", 7, run, [1, 16])
    assert (model.trained_on, model.mesh.size) == (SPLIT, 1)
    assert (model.config.mesh, model.config.serving.tensor) == (MeshConfig(), 1)
    assert model.config.serving.format == "bf16"
    params = model.params()
    assert norm(params) == 7
    assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(params))
    assert model.directory_for("probe") == run / "probe"


def test_one_checkpoint_is_opened_and_another_ones_weights_are_read_beside_it(run):
    model = open_model(run / "checkpoints" / "3")
    assert (model.step, norm(model.params()), norm(model.params(7))) == (3, 3, 7)
    moments, params = model.restore(lambda state: (state.opt_state, state.params), 7)
    assert norm(params) == 7 and jax.tree.leaves(moments)


def test_a_folder_is_opened_with_its_model_among_defaults(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = open_model(Path("folder"))
    assert (model.name, model.step, model.directory, model.end_tokens) == ("folder", None, folder, [1, 4])
    assert (model.config.model.hidden_size, model.trained_on) == (tiny.DENSE.hidden_size, MeshConfig())
    jax.tree.map(np.testing.assert_array_equal, model.params(), tiny.masters(tiny.DENSE))
    assert model.directory_for("probe") == Path("probe")
    with pytest.raises(RunError, match=r"folder is a Hugging Face folder, which has one set of weights$"):
        model.params(7)


@pytest.mark.parametrize("source", ["run", "folder"])
def test_several_devices_share_the_weights(source, request):
    model = open_model(request.getfixturevalue(source), devices=2)
    assert (model.mesh.size, model.config.mesh) == (2, MeshConfig())
    assert len(model.params()["embed_tokens"].sharding.device_set) == 2


@pytest.mark.parametrize("source", ["run", "folder"])
def test_settings_are_replaced_by_those_that_are_given(source, request):
    path = request.getfixturevalue(source)
    config = open_model(path, serving={"format": "fp8", "kv_cache": None, "slots": 3}, evaluation={"prompts": 5}).config
    assert (config.serving.format, config.serving.kv_cache, config.serving.slots) == ("fp8", "auto", 3)
    assert config.evaluation == dataclasses.replace(open_model(path).config.evaluation, prompts=5)
    with pytest.raises(RunError, match=r"^serving\.format is 'int3'; it must be one of float32"):
        open_model(path, serving={"format": "int3"})
    with pytest.raises(RunError, match=r"^evaluation\.prompts is 0; it must be at least 1$"):
        open_model(path, evaluation={"prompts": 0})
    with pytest.raises(RunError, match=r"^mesh\.fsdp is 0; it must be at least 1"):
        open_model(path, devices=0)
    with pytest.raises(RunError, match=r"^mesh\.fsdp is 3, which does not divide"):
        open_model(path, devices=3)


def copied(run, tmp_path, without):
    directory = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(directory / without)
    return directory


OPENERS = {
    "open": open_model,
    "evaluate": evaluate_source,
    "probe": load_sources,
    "export": lambda source: export_run(source, source.with_name("out")),
}


@pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS)
def test_every_tool_refuses_what_is_missing_in_the_same_words(run, opener, tmp_path):
    with pytest.raises(RunError, match=rf"^no run in {tmp_path}/nowhere: it has no config.json; give a directory"):
        opener(tmp_path / "nowhere")
    with pytest.raises(RunError, match=rf"^no checkpoint of step 4 in {run}/checkpoints; there: 3, 7$"):
        opener(run / "checkpoints" / "4")
    bare = copied(run, tmp_path, "tokenizer")
    again = rf"dcjax train {bare} writes the tokenizer again$"
    with pytest.raises(RunError, match=rf"^no tokenizer in {bare}/tokenizer: it must have a tokenizer\.json; {again}"):
        opener(bare)
    shutil.copytree(run / "tokenizer", bare / "tokenizer")
    os.truncate(bare / "tokenizer" / "tokenizer.json", 200)
    with pytest.raises(RunError, match=rf"^{bare}/tokenizer/tokenizer\.json is damaged: it must be JSON \(.*; {again}"):
        opener(bare)
    shutil.copytree(run / "tokenizer", bare / "tokenizer", dirs_exist_ok=True)
    shutil.rmtree(bare / "checkpoints")
    with pytest.raises(RunError, match=rf"^no checkpoint in {bare}/checkpoints; dcjax train writes the first one"):
        opener(bare)


@pytest.mark.parametrize(
    ("tool", "advice"), [("evaluate", "dcjax evaluate --suite takes it"), ("export", "dcjax convert import reads it")]
)
def test_where_only_a_run_will_do_a_folder_is_refused_with_what_takes_it(folder, tool, advice):
    with pytest.raises(RunError, match=rf"^{folder} is a Hugging Face folder and not a run; {advice}$"):
        OPENERS[tool](folder)


def test_a_run_that_was_served_over_several_devices_is_probed_on_one(run):
    (source,) = load_sources(run, prompts=2)
    assert (source.model.config.serving.tensor, source.model.trained_on, len(source.prompts)) == (1, SPLIT, 2)
    assert (source.stale_step, source.weights.version, source.out) == (None, 7, run / "probe")
    (earlier,) = load_sources(run, prompts=2, stale_step=3)
    assert (earlier.stale_step, earlier.weights.version) == (3, 3)
    assert (norm(earlier.weights.params), norm(earlier.weights.stale)) == (7, 3)
