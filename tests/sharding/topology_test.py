"""Train steps of full size, compiled for TPU slices that are not there: what they hold, and what they send."""

import dataclasses
import math
import re
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from dcjax import assemble
from dcjax.config import Config, OptimizerConfig, RolloutConfig, WarmStartConfig
from dcjax.models import Precision, presets
from dcjax.sharding.mesh import PAPER_A_TRAINING, MeshConfig, make_mesh, over
from dcjax.sharding.topology import slice_devices
from dcjax.types import Batch

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="no libtpu, which compiles for absent TPUs")
GIB, G, P = 2**30, 8, 1024
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"


@needs_libtpu
def test_a_slice_has_its_chips():
    devices = slice_devices("v5p:4x4x4")
    assert len(devices) == 64
    assert {device.platform for device in devices} == {"tpu"}
    assert len({tuple(device.coords) for device in devices}) == 64


@needs_libtpu
@pytest.mark.parametrize("name", ["v5p", "v5p:9x9x9", "abacus:2x2"])
def test_a_slice_that_there_is_not_is_refused_with_examples(name):
    with pytest.raises(ValueError, match=f"TPU slice '{name}'.*v5p:4x4x4 and v5e:4x4"):
        slice_devices(name)


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is there")
def test_without_libtpu_its_name_is_said():
    with pytest.raises(ValueError, match=r"TPU slice 'v5p:4x4x4'.*libtpu is needed"):
        slice_devices("v5p:4x4x4")


def compiled_step(preset, mesh_config, *, rows, tokens=8192):
    """The train step of a preset, `rows` × `tokens` in one microbatch: bf16 compute, float32 masters and Adam."""
    model = dataclasses.replace(
        presets[preset],
        attention="splash",
        remat="full",
        head_chunk=1024,
        precision=Precision(compute="bf16", head="bf16"),
    )
    config = Config(
        model=model,
        rollout=RolloutConfig(prompts=rows // G, group_size=G, max_prompt_length=P, max_response_length=tokens - P),
        optimizer=OptimizerConfig(microbatch_size=rows, updates=1),
        warm_start=WarmStartConfig(batch_size=rows),
    )
    mesh = make_mesh(mesh_config, slice_devices("v5p:4x4x4"))

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    response = tokens - P
    batch = Batch(
        tokens=array(jnp.int32, tokens),
        prompt_mask=array(jnp.bool, P),
        response_mask=array(jnp.bool, response),
        rollout_logps=array(jnp.float32, response),
        temperature=array(jnp.float32),
        rewards=array(jnp.float32),
        group_rewards=array(jnp.float32, G),
    )
    return assemble.compile_train_step(config, mesh).lower(assemble.abstract_state(config, mesh), batch).compile()


def collectives(text):
    """(kind, elements of its largest result, its shapes) of each collective in a program; loops' bodies once."""
    found = []
    for kind_of in re.finditer(rf"= (\(?\w+\[.*?) ({COLLECTIVES})(?:-start)?\(", text):
        shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", kind_of[1])]
        found.append((kind_of[2], max(map(math.prod, shapes), default=1), shapes))
    return found


@needs_libtpu
@pytest.mark.slow
def test_the_8b_step_on_64_chips():
    step = compiled_step("qwen3-8b", MeshConfig(fsdp=16, tensor=4), rows=16)
    memory, text = step.memory_analysis(), step.as_text()
    assert memory.argument_size_in_bytes < 1.44 * GIB
    assert memory.temp_size_in_bytes < 4.56 * GIB
    # forward, forward again, and backward of q and of k and v
    assert text.count('custom_call_target="tpu_custom_call"') == 4
    # no scores of 8192 × 8192, and nobody has the whole batch's hidden states
    assert "8192,8192]" not in text
    assert "[16,8192,4096]" not in text
    # what is kept between layers is cut over tensor too
    assert "bf16[36,1,2048,4096]" in text
    assert "bf16[36,1,8192,4096]" not in text
    assert max(elements for _, elements, _ in collectives(text)) <= 151_936 // 4 * 4096


@needs_libtpu
@pytest.mark.slow
def test_the_30b_step_of_paper_a_on_64_chips():
    rows, tokens, layers, k = 32, 8192, 48, 8
    mesh = over(PAPER_A_TRAINING["qwen3-30b-a3b"], 64)
    assert mesh == MeshConfig(fsdp=4, tensor=2, expert=8)
    step = compiled_step("qwen3-30b-a3b", mesh, rows=rows)
    text, found = step.as_text(), collectives(step.as_text())
    memory = step.memory_analysis()
    assert memory.argument_size_in_bytes < 7.3 * GIB
    # of which room for every choice of eight chips, 2 GiB a copy, is most
    assert memory.temp_size_in_bytes < 22.5 * GIB
    # tokens travel to the embedding's parts, not the table
    assert not any(151_936 in shape or 4 * 151_936 in shape for _, _, shapes in found for shape in shapes)
    # a chip gathers kernels of its own 16 experts, and of half their width
    gathered = {shape for kind, _, shapes in found if kind == "all-gather" for shape in shapes}
    assert not any(128 in shape and shape[-1] in (768, 384, 2048) and len(shape) > 2 for shape in gathered)
    assert any(shape[-3:] == (16, 2048, 384) for shape in gathered)
    # each chip's choices travel, and there is room for all of eight chips at one
    choices = tokens * k
    journeys = [shapes for kind, _, shapes in found if kind == "ragged-all-to-all"]
    assert len(journeys) >= 4
    assert {math.prod(shape) // 2048 for shapes in journeys for shape in shapes} == {choices, 8 * choices}
    assert f"[{layers},{rows}," not in text
