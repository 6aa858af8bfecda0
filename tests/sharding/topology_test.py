"""Programs of full size, compiled for TPU slices that are not there: what they hold, and what they send."""

import base64
import dataclasses
import math
import re
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dcjax.models import Precision, abstract_params, logical_axes, presets
from dcjax.models.attention import Segments, causal_attention
from dcjax.models.parameters import count_params
from dcjax.models.ragged import ragged_attention
from dcjax.recipe import build
from dcjax.recipe.config import Config, WarmStartConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.serving.engine import Qwen3Engine, _programs
from dcjax.serving.formats import serving_format
from dcjax.serving.parallel import serving_mesh
from dcjax.serving.sync import make_sync, served_shardings, stored_parameters
from dcjax.sharding.mesh import PAPER_A_ROLLOUT, PAPER_A_TRAINING, MeshConfig, make_mesh, over, set_aside
from dcjax.sharding.rules import shardings, with_shardings
from dcjax.sharding.topology import slice_devices
from dcjax.tools.plan.hlo import Program

pytestmark = pytest.mark.heavy

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="no libtpu, which compiles for absent TPUs")
GIB, G, P = 2**30, 8, 1024
NARROW = ["int8", "float8_e4m3fn"]
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"


@needs_libtpu
def test_a_slice_has_its_chips():
    devices = slice_devices("v5p:4x4x4")
    assert len(devices) == 64
    assert {device.platform for device in devices} == {"tpu"}
    assert len({tuple(device.coords) for device in devices}) == 64


@needs_libtpu
@pytest.mark.parametrize(("name", "serving", "tensor"), [("v5e:4x4", 8, 4), ("v5p:4x4x4", 16, 4), ("v5p:4x4x4", 32, 2)])
def test_part_of_every_host_serves_while_the_rest_trains(name, serving, tensor):
    """Such parts are no boxes, which JAX's own arrangement takes for granted."""
    devices = slice_devices(name)
    trains, serves = set_aside(devices, serving)
    mesh = make_mesh(MeshConfig(fsdp=len(trains)), trains)
    engines = serving_mesh(make_mesh(MeshConfig(data=serving), serves), tensor)
    assert {*mesh.devices.flat} | {*engines.devices.flat} == {*devices}
    hosts = {device.process_index for device in devices}
    for host in hosts:
        own = [device for device in devices if device.process_index == host]
        assert [device for device in serves if device in own] == own[-serving // len(hosts) :]


@needs_libtpu
def test_devices_that_hosts_cannot_give_equally_are_refused():
    with pytest.raises(ValueError, match=r"serving.devices is 6; it must be a multiple of the number of processes, 4"):
        set_aside(slice_devices("v5e:4x4"), 6)


@needs_libtpu
@pytest.mark.parametrize("name", ["v5p", "v5p:9x9x9", "abacus:2x2"])
def test_a_slice_that_there_is_not_is_refused_with_examples(name):
    with pytest.raises(ValueError, match=f"TPU slice '{name}'.*v5p:4x4x4 and v5e:4x4"):
        slice_devices(name)


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is there")
def test_without_libtpu_its_name_is_said():
    with pytest.raises(ValueError, match=r"TPU slice 'v5p:4x4x4'.*libtpu is needed"):
        slice_devices("v5p:4x4x4")


def splash(q, k, v, cotangent, segments=None):
    out, back = jax.vjp(lambda *qkv: causal_attention(*qkv, kernel="splash", segments=segments), q, k, v)
    return out, *back(cotangent)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("length", "segmented"), [(4096, False), (8192, True)])
def test_splash_compiles_for_a_tpu_in_memory_linear_in_the_length(length, segmented):
    """Here, since two processes that load libtpu at once may get into each other's way, and a file has one."""
    chip = slice_devices("v5e:2x2")[0]

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))

    q, kv = array(1, length, 16, 128), array(1, length, 8, 128)
    # as many gathered keys as a row's own
    segments = Segments(*[array(1, length, dtype=jnp.int32)] * 3) if segmented else None
    compiled = jax.jit(splash).lower(q, kv, kv, q, segments).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text.count("tpu_custom_call") >= 3  # forward, and backward of q and of k and v
    assert f"{length},{length}" not in text
    # all temporaries of 16 heads together are below one head's float32 scores
    assert memory.temp_size_in_bytes < 4 * length**2


@needs_libtpu
@pytest.mark.slow
def test_float32_keeps_its_bits_in_what_a_tpu_runs():
    """Products of matrices, of rows with their experts' kernels, and of Pallas' attention."""
    model = dataclasses.replace(tiny.EXPERTS, attention="splash")
    config, mesh = dataclasses.replace(tiny.CONFIG, model=model), make_mesh(MeshConfig(), slice_devices("v5e:2x2")[:1])
    step = build.compile_train_step(config, mesh)
    text = step.lower(build.abstract_state(config, mesh), build.abstract_batch(config, mesh)).compile().as_text()
    assert len(re.findall(r" (?:dot|convolution)\(", text)) == text.count("operand_precision={highest,highest}") > 20
    kernels = [base64.b64decode(body) for body in re.findall(r'"body":"([^"]*)"', text)]
    multiplying = [kernel for kernel in kernels if b"matmul" in kernel]
    assert len(multiplying) >= 9  # three of each layer's experts, forward and backward, and attention thrice
    assert all(b"contract_precision<fp32>" in kernel for kernel in multiplying)


def compiled_step(preset, mesh_config, *, rows, tokens=8192):
    """The train step of a preset, `tokens` of each share in a microbatch: bf16 compute, float32 masters and Adam."""
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
        optimizer=OptimizerConfig(tokens_per_microbatch=tokens, updates=1),
        warm_start=WarmStartConfig(batch_size=rows),
        mesh=mesh_config,
    )
    mesh = make_mesh(mesh_config, slice_devices("v5p:4x4x4"))

    batch = build.abstract_batch(config, mesh)
    return build.compile_train_step(config, mesh).lower(build.abstract_state(config, mesh), batch).compile()


def arrived(text):
    """(dtype, elements) of every result of a collective."""
    for found in re.finditer(rf"= (\(?\w+\[.*?) (?:{COLLECTIVES})(?:-start)?\(", text):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
            yield dtype, math.prod(map(int, filter(None, dims.split(","))))


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
    assert memory.temp_size_in_bytes < 3.35 * GIB
    # forward, forward again, and backward of q and of k and v
    assert text.count('custom_call_target="tpu_custom_call"') == 4
    # no scores of 8192 × 8192, and nobody has the whole batch's hidden states
    assert "8192,8192]" not in text
    assert "[32,4096,4096]" not in text
    # what is kept between layers is cut over tensor too
    assert "bf16[36,2,1024,4096]" in text
    assert "bf16[36,2,4096,4096]" not in text
    assert max(elements for _, elements, _ in collectives(text)) <= 151_936 // 4 * 4096
    # each matrix forward, again and twice backward, but down_proj, whose product nobody needs again; the head likewise
    model, tokens = presets["qwen3-8b"], 16 * 8192 // 64
    layers = count_params(model) - 2 * model.vocab_size * model.hidden_size
    down = model.num_layers * model.hidden_size * model.intermediate_size
    operations = 2 * tokens * (4 * layers - down + 4 * model.vocab_size * model.hidden_size)
    assert Program(text).cost.flops["bf16"] == pytest.approx(operations, rel=0.001)


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
    assert memory.temp_size_in_bytes < 22.5 * GIB
    # tokens travel to the embedding's parts, not the table
    assert not any(151_936 in shape or 4 * 151_936 in shape for _, _, shapes in found for shape in shapes)
    # a chip gathers kernels of its own 16 experts, and of half their width
    gathered = {shape for kind, _, shapes in found if kind == "all-gather" for shape in shapes}
    assert not any(128 in shape and shape[-1] in (768, 384, 2048) and len(shape) > 2 for shape in gathered)
    assert any(shape[-3:] == (16, 2048, 384) for shape in gathered)
    # each chip's choices travel, and there is room for twice as many at one in each round
    choices = tokens * k
    journeys = [shapes for kind, _, shapes in found if kind == "ragged-all-to-all"]
    assert len(journeys) >= 4
    assert {math.prod(shape) // 2048 for shapes in journeys for shape in shapes} == {choices, 2 * choices}
    assert f"[{layers},{rows}," not in text


V5E = "v5e:4x4"


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("compute", "stored"), [("float32",) * 2, ("bfloat16",) * 2, *[("bfloat16", n) for n in NARROW]]
)
def test_attention_on_a_cache_compiles_for_a_tpu_in_every_format_and_copies_nothing(kind, compute, stored):
    mesh = Mesh(np.array(slice_devices(kind)[:1]), ("one",))
    everywhere = PartitionSpec()

    def array(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, everywhere))

    cache = array(64, 8, 8192, 128, dtype=stored)
    scales = [array(64, 8, 8192, dtype=jnp.float32)] * 2 if stored in NARROW else []
    args = array(64, 1, 32, 128, dtype=compute), cache, cache, array(64, dtype=jnp.int32), *scales
    attend = jax.shard_map(ragged_attention, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    compiled = jax.jit(attend).lower(*args).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


@needs_libtpu
@pytest.mark.slow
def test_int8_decode_of_8b_on_16_chips_has_one_kv_cache():
    slots, capacity, devices = 128, 8192, 8
    training = make_mesh(MeshConfig(fsdp=16), slice_devices(V5E))
    model = presets["qwen3-8b"]
    sizes = {"max_prompt_length": P, "max_response_length": capacity - P, "end_tokens": [1], "steps_per_call": 8}
    # 16 GB a chip
    engine = Qwen3Engine(
        model, format="w8a8", slots=slots, mesh=serving_mesh(training, devices), memory=16 * 10**9, **sizes
    )
    params = with_shardings(
        jax.eval_shape(make_sync(model, engine.format), abstract_params(model), 0),
        served_shardings(model, engine.format, engine.mesh),
    )
    state = jax.eval_shape(partial(engine.decoder.empty, slots))
    state = with_shardings(state, engine.decoder.state_shardings(state))
    program = _programs(engine.decoder).generate.lower(engine.decoder, params, state, engine.steps_per_call).compile()
    memory, text = program.memory_analysis(), program.as_text()
    # each layer's attention reads what is filled, where it lies
    assert text.count('custom_call_target="tpu_custom_call"') == model.num_layers
    # int8 keys and values with a float32 scale a head, of which a chip has one of eight, for half of the slots
    cache = model.num_layers * 2 * (slots // 2) * capacity * (model.head_dim + 4)
    assert memory.alias_size_in_bytes >= cache
    assert memory.argument_size_in_bytes < cache + 1.0 * GIB
    assert memory.temp_size_in_bytes < 0.25 * GIB
    # what a step sends: its tokens' rows, never weights or a cache, and nothing between the two copies
    sent = collectives(text)
    assert len(sent) >= 4 * model.num_layers
    assert max(elements for _, elements, _ in sent) <= 64 * 151_936
    largest = sorted({elements for kind, elements, _ in sent if kind == "all-reduce"})[-1]
    assert largest <= 64 * model.hidden_size


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    # served copies on as many chips; at most so many times what a chip then holds arrives at it
    ("preset", "devices", "times"),
    [("qwen3-8b", 8, 1.6), ("qwen3-30b-a3b", PAPER_A_ROLLOUT["qwen3-30b-a3b"], 2.5)],
)
def test_sync_between_two_meshes_moves_int8_a_layer_at_a_time(preset, devices, times):
    chips, model, format = slice_devices(V5E), presets[preset], serving_format("w8a8")
    asked = over(PAPER_A_TRAINING[preset], len(chips))
    training = make_mesh(asked, chips)
    serving = serving_mesh(training, devices)
    masters = with_shardings(abstract_params(model), shardings(training, logical_axes(model)))
    sync = make_sync(model, format, serving, training)
    outer = {name: leaf for name, leaf in masters.items() if name != "layers"}
    programs = [(sync.outer.lower(outer, 0), 1)]
    programs += [(run.lower(masters["layers"], 0, 0, 0), sync.kinds.count(kind)) for kind, run in sync.layer.items()]
    received = 0
    for lowered, runs in programs:
        program = lowered.compile()
        assert program.memory_analysis().temp_size_in_bytes < 1.0 * GIB
        text = program.as_text()
        # values travel in 8 bits: what is wider are scales, norms and routers
        assert not any(dtype != "s8" and elements > 2**21 for dtype, elements in arrived(text))
        received += runs * sum(elements for dtype, elements in arrived(text) if dtype == "s8")
    quantized = sum(row.bytes for row in stored_parameters(model, format) if row.quantized)
    assert received < times * quantized / devices
