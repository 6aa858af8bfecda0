"""What a run says of itself before it starts."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from dcjax.errors import RunError
from dcjax.loop import environment
from dcjax.loop.early import training_mesh
from dcjax.loop.environment import describe, outline
from dcjax.models import count_params, presets
from dcjax.recipe.build import build_engine, params_shardings
from dcjax.recipe.engine import rollout_mesh
from dcjax.recipe.serving import ServingConfig
from dcjax.sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.heavy

CONFIG = dataclasses.replace(
    tiny.CONFIG,
    mesh=MeshConfig(fsdp=2, tensor=2),
    model=dataclasses.replace(tiny.DENSE, num_layers=1),
    serving=ServingConfig(format="int8", kv_cache="bf16", slots=4),
)


def described(config):
    mesh = make_mesh(config.mesh)
    return describe(config, mesh, build_engine(config, mesh, [1, 16]))


def test_platform_kernels_precision_and_serving_are_told():
    platform, training, serving = described(CONFIG)
    assert platform == f"platform: cpu (cpu), 8 devices, jax {jax.__version__}"
    assert training.startswith("training: fsdp 2, tensor 2; attention xla; parameters float32, compute float32")
    assert (
        serving
        == "serving: int8, KV cache bfloat16, 4 slots; copies of the model: 4, on 1 devices each; end tokens 1, 16"
    )


def test_experts_and_devices_that_only_serve_are_told():
    serving = dataclasses.replace(CONFIG.serving, tensor=2, devices=4)
    _, training, serves = described(dataclasses.replace(CONFIG, model=presets["tiny-moe"], serving=serving))
    assert "attention xla, experts by blocks of rows;" in training
    assert "copies of the model: 2, on 2 devices of their own each;" in serves


@pytest.mark.parametrize(("free", "short"), [(3 * 2**20, ""), (2**16, ", which is too little")])
def test_what_a_run_will_do_is_told(free, short, tmp_path, monkeypatch):
    optimizer = dataclasses.replace(CONFIG.optimizer, updates=2)
    config = dataclasses.replace(CONFIG, run_dir=tmp_path, optimizer=optimizer)
    mesh = make_mesh(config.mesh)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(environment, "memory_of", lambda device: 2**34)
    iterations, evaluations, checkpoints, memory = outline(config, mesh, 0)
    assert iterations == (
        "iterations: 8, each of 4 prompts with 4 responses: 16 sequences, 416 tokens at most; updates 2"
    )
    assert evaluations == "evaluations: 16 prompts by each policy, at step 0, every 2 steps and the last"
    # float32 weights and two moments; the newest 4 of five
    saved = 12 * count_params(config.model) / 2**20
    assert checkpoints == (
        f"checkpoints: every 2 steps and the last, {saved:.1f} MiB each; the newest 4 are kept, {4 * saved:.1f} MiB of "
        f"{free / 2**20:.1f} MiB that are free{short}"
    )
    # four devices share nearly all
    held = float(memory.split("take ")[1].split(" MiB of a device's 16.0 GiB")[0])
    assert saved / 4 - 0.05 <= held <= saved / 3 + 0.05


def test_a_resumed_run_tells_what_is_left(tmp_path):
    config = dataclasses.replace(CONFIG, run_dir=tmp_path)
    iterations, evaluations, *_ = outline(config, make_mesh(config.mesh), 6)
    assert iterations.startswith("iterations: 2 behind 6, each of ")
    assert "at step 0" not in evaluations


def test_a_kernel_that_the_platform_does_not_run_is_refused():
    with pytest.raises(RunError, match=r"model.attention is 'splash', which does not run on cpu"):
        described(dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, attention="splash")))


def test_devices_that_only_serve_come_behind_those_of_the_mesh():
    config = dataclasses.replace(CONFIG, serving=ServingConfig(devices=4, tensor=4))
    mesh = training_mesh(config)
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3]
    assert [device.id for device in rollout_mesh(config.serving, mesh).devices.flat] == [4, 5, 6, 7]
    assert [device.id for device in rollout_mesh(CONFIG.serving, mesh).devices.flat] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        ({"devices": 5}, "serving.devices is 5, behind 4 of the mesh; 8 were found"),
        ({"devices": 3, "tensor": 2}, "serving.tensor is 2; it must divide the number of devices, 3"),
    ],
)
def test_devices_that_there_are_not_are_refused(serving, message):
    config = dataclasses.replace(CONFIG, serving=ServingConfig(**serving))
    with pytest.raises(ValueError, match=message):
        rollout_mesh(config.serving, training_mesh(config))


def test_what_is_served_apart_is_what_is_served_together():
    """Sync to other devices: the same bits, and none of the masters' devices."""
    mesh = make_mesh(CONFIG.mesh)
    apart = dataclasses.replace(CONFIG, serving=dataclasses.replace(CONFIG.serving, devices=4, tensor=2))
    params = jax.device_put(tiny.masters(CONFIG.model), params_shardings(CONFIG, mesh))
    ours, theirs = (build_engine(each, mesh, [1]).sync(params, 3) for each in (apart, CONFIG))
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert {device.id for device in leaf.devices()} == {4, 5, 6, 7}
        np.testing.assert_array_equal(jax.device_get(leaf), jax.device_get(other))
