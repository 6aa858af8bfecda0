"""A number format of the reader's own, the one of docs/formats.md: served, split over devices, recorded, probed."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiling import jit
from records import untimed
from served import engine_of, params_of, sample

from dcjax.cli import main
from dcjax.models import logical_axes
from dcjax.models.layers import EXACT
from dcjax.recipe.serving import ServingConfig
from dcjax.reporting.record import read_metrics
from dcjax.serving.formats import CodedMatrix
from dcjax.serving.parallel import serving_mesh
from dcjax.serving.sync import make_sync, stored_parameters
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.sharding.rules import shardings
from dcjax.user_code import CodeFile

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
(SOURCE,) = re.findall(r"```python\n(# small_floats\.py.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("formats") / "small_floats.py"
    path.write_text(SOURCE)
    return CodeFile.read(path).load()


def numbers_of(exponent_bits, mantissa_bits):
    """Of an IEEE-like format of so many bits, by hand: subnormals, then powers of two times 1.m."""
    steps = 2**mantissa_bits
    subnormal = [m / steps for m in range(steps)]
    return np.array(subnormal + [(1 + m / steps) * 2.0**e for e in range(2**exponent_bits - 1) for m in range(steps)])


@pytest.mark.parametrize("bits", [(3, 2), (2, 3)])
def test_each_weight_becomes_the_nearest_of_the_formats_numbers(module, bits):
    format, numbers = module.SmallFloat(*bits), numbers_of(*bits)
    rows = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32) * 10.0 ** np.arange(-2, 3)[:, None]
    table, kernel = jit(lambda rows: (format.store_table(rows), format.store_kernel(rows.T)))(np.float32(rows))
    scale = np.abs(rows).max(1, keepdims=True) / numbers[-1]
    gaps = np.abs(np.abs(rows)[..., None] / scale[..., None] - numbers)
    nearest = np.sign(rows) * numbers[gaps.argmin(-1)] * scale
    decoded = jit(lambda table: table.lookup(jnp.arange(5), jnp.dtype(jnp.float32)))(table)
    # a weight between two numbers may become either
    assert np.mean(np.isclose(decoded, nearest, rtol=1e-5, atol=1e-7)) > 0.99
    assert (np.abs(decoded - rows) <= gaps.min(-1) * scale * (1 + 1e-4) + 1e-6 * np.abs(rows)).all()
    assert len(np.unique(np.abs(np.asarray(decoded[2])))) <= len(numbers)
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    products = jit(lambda x, kernel, table: (kernel.dot(x, EXACT), table.logits(x, EXACT)))(x, kernel, table)
    for product in products:
        np.testing.assert_allclose(product, x @ np.asarray(decoded).T, rtol=1e-4, atol=1e-3)


def test_it_says_how_it_is_stored_and_how_large_it_is(module):
    rows = {row.name: row for row in stored_parameters(tiny.EXPERTS, module.SmallFloat())}
    assert (rows["q_proj"].stored, rows["q_proj"].quantized) == ("e3m2", True)
    # two layers of a byte a weight, and a float32 scale for each of 64 columns
    assert rows["q_proj"].bytes == 2 * (32 * 64 + 4 * 64)
    assert (rows["norm"].stored, rows["router"].stored) == ("bfloat16", "float32")


@pytest.mark.parametrize("model", [tiny.DENSE, tiny.EXPERTS], ids=["dense", "experts"])
def test_it_is_split_over_devices_by_its_masters_axes(module, model):
    training = make_mesh(MeshConfig(fsdp=8))
    masters = jax.device_put(tiny.masters(model), shardings(training, logical_axes(model)))
    whole = make_sync(model, module.SmallFloat())(tiny.masters(model), 1)
    split = make_sync(model, module.SmallFloat(), serving_mesh(training, 2), training)(masters, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), split, whole)
    code, scale = split.weights["layers"][0]["q_proj"].codes
    assert code.sharding.shard_shape(code.shape) == (32, 32) and scale.sharding.shard_shape(scale.shape) == (32,)


@pytest.mark.heavy
@pytest.mark.parametrize("model", [tiny.DENSE, pytest.param(tiny.EXPERTS, marks=pytest.mark.slow)])
def test_an_engine_serves_it(module, model):
    engine = engine_of(module.SmallFloat(), model)
    assert engine.format.name == "e3m2" and engine.kv_cache == jnp.bfloat16
    params = params_of(engine, model)
    assert isinstance(params.weights["embed_tokens"], CodedMatrix)
    rollout = sample(engine, model)
    assert np.isfinite(np.asarray(rollout.rollout_logps)).all() and rollout.response_mask.any()


@pytest.fixture(scope="module")
def run(module, tmp_path_factory):
    """A run that serves it, by the command line."""
    folder = tmp_path_factory.mktemp("run")
    recipe = tiny.write_recipe(folder / "recipe.py", replace(tiny.CONFIG, steps=2))
    source = SOURCE.replace("def config()", "def unused()")
    changed = "import dataclasses\n\noriginal = config\n\n\ndef config():\n    config = original()\n"
    changed += "    serving = dataclasses.replace(config.serving, format=SmallFloat())\n"
    changed += "    return dataclasses.replace(config, serving=serving)\n"
    recipe.write_text(source + recipe.read_text() + changed)
    command = ["train", str(recipe), "--run-dir", str(folder / "run"), "--serving.format.mantissa_bits", "3"]
    assert main(command) == 0
    return folder / "run"


@pytest.mark.slow
def test_a_run_records_it_resumes_and_is_evaluated(run, tmp_path, capfd):
    recorded = json.loads((run / "config.json").read_text())["serving"]["format"]
    assert recorded == {"class": "recipe:SmallFloat", "exponent_bits": 3, "mantissa_bits": 3}
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    assert main(["train", str(tmp_path / "run")]) == 0
    ours, theirs = (untimed(read_metrics(each / "metrics.jsonl")) for each in (run, tmp_path / "run"))
    assert ours == theirs and ours[-1]["dual/discrepancy"] > 0
    capfd.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["policies"]
    assert {row["policy"]: row["format"] for row in rows} == {"deployed": "e3m3", "training": "float32"}
    assert main(["evaluate", str(run), "--format", "int8", "--no-recipe-code"]) == 2


@pytest.mark.slow
def test_it_is_probed(run, tmp_path, capfd):
    assert main(["probe", str(run), "--prompts", "4", "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [stage["name"] for stage in found["stages"]][:3] == ["decode_path", "dtype", "weights"]
    assert found["format"] == "e3m3" and set(found["formats"]) >= {"float32", "int8", "e3m3"}
    assert found["formats"]["e3m3"]["prob_diff_mean"] > found["formats"]["bf16"]["prob_diff_mean"]


def test_a_name_that_is_anothers_is_refused(module):
    class Impostor(module.SmallFloat):
        name = "int8"

    with pytest.raises(ValueError, match="calls itself 'int8', which is another format's name"):
        ServingConfig(format=Impostor())
