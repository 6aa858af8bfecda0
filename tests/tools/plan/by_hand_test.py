"""The hand counts of `dcjax plan` for GPUs: against arithmetic written out here, arrays, and a compiled step."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from dcjax.cli import main
from dcjax.cli.train import config_of
from dcjax.models.config import Precision
from dcjax.recipe import build
from dcjax.recipe.engine import make_engine
from dcjax.serving.mismatch import NO_MISMATCH
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.tools.plan import by_hand
from dcjax.tools.plan.chips import CHIPS
from dcjax.tools.plan.hlo import Collective, Program
from dcjax.tools.plan.plan import Place, make_plan, seconds_of
from dcjax.tools.plan.programs import attended, for_platform, microbatches

BF16, FLOAT32 = 2, 4
MEAN = 10.0


def run_of(model, mesh, *, tensor=1, slots=8, format="bf16", devices=None, **optimizer):
    model = replace(model, remat="full", precision=Precision(compute="bf16", head="bf16"), attention="cudnn")
    config = replace(
        tiny.CONFIG,
        model=model,
        mesh=mesh,
        serving=replace(tiny.CONFIG.serving, format=format, tensor=tensor, slots=slots),
        optimizer=replace(tiny.CONFIG.optimizer, **optimizer),
    )
    config = for_platform(config, "gpu")
    by_hand.check(config, devices or mesh.data * mesh.fsdp * mesh.tensor * mesh.expert)
    return by_hand.Sizes(config, "gpu", devices or mesh.data * mesh.fsdp * mesh.tensor * mesh.expert, MEAN)


def sent(planned):
    return {(one.kind, one.op): one.bytes * one.times for one in planned.cost.collectives}


# tiny.DENSE: 20 tokens, width 32, MLP 64, 2 layers, 4 heads and 2 of keys and values, each 16 wide, tied tables
QKV, OUT, MLP = 32 * (64 + 32 + 32), 64 * 32, 3 * 32 * 64
NORMS = 2 * 32 + 2 * 16
TABLE = 20 * 32


def test_the_train_step_of_a_dense_model_on_fsdp_2_and_tensor_2():
    # two halves of 50 columns each; one update of 16 rows, 8 on each share
    run = run_of(tiny.DENSE, MeshConfig(fsdp=2, tensor=2))
    step, columns = by_hand.train_step(run), 100
    microbatches = run.microbatches
    assert microbatches >= 8 * MEAN / columns
    # heads, MLP and vocabulary are halved by tensor, and E by fsdp; norms of heads are whole, others halved by fsdp
    held = 2 * ((QKV + OUT + MLP) / 4 + 2 * 32 / 2 + 2 * 16) + TABLE / 4 + 32 / 2
    assert by_hand.params_bytes(run) == held * FLOAT32
    matrices = 2 * (QKV + OUT + MLP) / 2
    last = 2 * 64 * 32 / 2
    # forward, again and twice backward, but the last product of a layer; attention's products with all of a masked bin:
    # two, two and five; the head's 50 columns are one chunk, which nothing computes again
    keys = by_hand.keys(run)
    assert keys == run.bins.width + run.bins.gathered == 20 + 10
    layers = 2 * columns * (4 * matrices - last)
    attention = 2 * 9 * 2 * columns * keys * 64 / 2
    head = 3 * 2 * columns * TABLE / 2
    assert step.cost.flops == {"bf16": pytest.approx(microbatches * (layers + attention + head))}
    # half of what a device multiplies arrives at it, forward and backward, and half of the gradients
    gathered = 2 * ((QKV + OUT + MLP) / 2 + NORMS)
    found = sent(step)
    assert found.pop(("all-gather", "weights of layers")) == pytest.approx(microbatches * 2 * gathered * BF16 / 2)
    assert found.pop(("reduce-scatter", "gradients of layers")) == pytest.approx(microbatches * gathered * FLOAT32 / 2)
    assert found.pop(("all-gather", "weights of head")) == pytest.approx(microbatches * 2 * TABLE / 2 * BF16 / 2)
    assert found.pop(("reduce-scatter", "gradients of head")) == pytest.approx(microbatches * TABLE / 2 * FLOAT32 / 2)
    # behind attention and MLP, forward, again and backward, each once the stream, of which half is gathered before
    stream = columns * 32 * BF16
    assert found.pop(("all-reduce", "activations")) == pytest.approx(microbatches * 2 * 3 * 2 * stream)
    assert found.pop(("all-gather", "activations")) == pytest.approx(microbatches * 2 * 3 * stream / 2)
    assert not found
    # gradients twice, the cast parameters, the inputs of two layers, and a layer at work or the head
    saved = 2 * columns * 32 / 2 * BF16
    widths = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 32)
    masks = columns * (20 + 10) * (1 + BF16)
    layer = columns * widths * BF16 + masks + (QKV + OUT + MLP) / 2 * (BF16 + FLOAT32)
    scored = 3 * columns * 10 * FLOAT32 + TABLE / 2 * (BF16 + FLOAT32) + columns * 32 * (BF16 + FLOAT32)
    assert step.temp_bytes == round(held * (2 * FLOAT32 + BF16) + saved + max(layer, scored))


def test_the_train_step_of_experts_on_fsdp_2_and_expert_2_with_a_pass_for_log_probs():
    # four experts of width 32, a token takes two; two updates need the log-probs first
    run = run_of(tiny.EXPERTS, MeshConfig(fsdp=2, expert=2), updates=2)
    step, columns, layers = by_hand.train_step(run), 100, 2
    attention_kernels, router, expert = QKV + OUT, 32 * 4, 3 * 32 * 32
    shared = layers * (attention_kernels + router + 2 * 32) / 2 + layers * 2 * 16 + TABLE / 2 + 32 / 2
    assert by_hand.params_bytes(run) == (shared + layers * 4 * expert / 4) * FLOAT32
    matrices = layers * (attention_kernels + 2 * expert)
    attention = 2 * 11 * layers * columns * by_hand.keys(run) * 64
    head = 4 * 2 * columns * TABLE
    once = 2 * columns * matrices * 5 + attention + head
    assert step.cost.flops["bf16"] == pytest.approx(run.microbatches * once)
    assert step.cost.flops["f32"] == pytest.approx(run.microbatches * 2 * columns * layers * router * 5)
    found = sent(step)
    gathered = layers * (attention_kernels + router + NORMS + 2 * expert)
    assert found["all-gather", "weights of layers"] == pytest.approx(run.microbatches * 3 * gathered * BF16 / 2)
    # to the experts and back, in four passes, of which half of the choices cross
    choices = columns * 2 * 32 * BF16
    assert found["all-to-all", "choices of experts"] == pytest.approx(run.microbatches * 4 * layers * 2 * choices / 2)
    # of what the experts' axis does not divide, each has a copy
    assert found["all-reduce", "gradients of replicas"] == pytest.approx(run.microbatches * shared * FLOAT32)


def test_decoding_reads_weights_and_all_that_a_cache_has_room_for():
    run = run_of(tiny.DENSE, MeshConfig(fsdp=4), tensor=2, format="w8a8")
    decode, rows, capacity, steps = by_hand.decode(run), 8 / 2, 6 + 20, 4
    matrices = 2 * (QKV + OUT + MLP) / 2 + TABLE / 2
    assert decode.cost.flops["s8"] == steps * 2 * rows * matrices
    assert decode.cost.flops["bf16"] == steps * 4 * rows * 2 * 64 / 2 * capacity
    assert decode.runs == 16 * MEAN / (8 * steps)
    # a byte and a float32 scale for each of two layers' keys and values, of one head each
    a_token = 2 * 2 * (16 + FLOAT32)
    assert by_hand.cache_bytes(run) == rows * capacity * a_token
    # int8 with a scale for each output, beside norms in bf16
    scales = 2 * (64 + 32 + 32 + 32 + 64 + 64 + 32) + 20
    weights = matrices + scales / 2 * FLOAT32 + 2 * (2 * 32 + 2 * 16) * BF16
    logits = rows * 10 * FLOAT32
    assert decode.cost.bytes == pytest.approx(steps * (weights + rows * capacity * a_token + 6 * logits))
    # after attention, after the MLP, and of the embedding: each once the stream
    assert sent(decode) == {("all-reduce", "activations"): steps * (2 * 2 + 1) * rows * 32 * BF16}


def test_a_sync_gathers_what_a_device_does_not_have_of_what_it_serves():
    # a quarter of each matrix on each device of four, and half of it, or all, served
    for tensor, arriving in ((2, 1 / 2), (1, 3 / 4)):
        run = run_of(tiny.DENSE, MeshConfig(fsdp=4), tensor=tensor)
        assert sent(by_hand.sync(run)) == {("all-gather", "serving weights"): arriving * by_hand.serving_bytes(run)}
    assert not sent(by_hand.sync(run_of(tiny.DENSE, MeshConfig(data=2, tensor=2), tensor=2)))


def test_a_step_of_few_slots_reads_the_experts_that_it_takes():
    few, many = (run_of(tiny.EXPERTS, MeshConfig(), slots=slots) for slots in (1, 64))
    others = 2 * (QKV + OUT + NORMS) * BF16 + 2 * 32 * 4 * FLOAT32 + TABLE * BF16
    experts = 2 * 4 * 3 * 32 * 32 * BF16
    assert by_hand.read_weights(few) == pytest.approx(others + experts / 2)
    assert by_hand.read_weights(many) == pytest.approx(others + experts)


def on_one(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model", "mesh", "tensor"),
    [(tiny.DENSE, MeshConfig(data=2, fsdp=2, tensor=2), 2), (tiny.EXPERTS, MeshConfig(fsdp=2, tensor=2, expert=2), 1)],
    ids=["dense", "experts"],
)
def test_what_is_held_are_the_bytes_of_arrays(model, mesh, tensor):
    run = run_of(model, mesh, tensor=tensor, devices=8, ema_decay=0.9)
    config, devices = replace(run.config, model=replace(run.model, attention="auto")), make_mesh(mesh)
    params = build.starting_params(config, devices)
    assert by_hand.params_bytes(run) == on_one(params)
    tx = build.build_optimizer(config)
    state = build.initial_state(config, devices, tx, params, build.PastParams.needed_by(config))
    # beside counters
    assert by_hand.optimiser_bytes(run) == pytest.approx(on_one(state.opt_state), abs=100)
    assert by_hand.optimiser_bytes(run) >= 3 * by_hand.params_bytes(run)
    engine = make_engine(config.model, config.serving, config.rollout, NO_MISMATCH, devices, end_tokens=[0])
    assert by_hand.cache_bytes(run) == on_one(engine.init_decode_state().caches)
    shapes = engine.abstract_params().weights
    placed = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(shapes)]
    assert by_hand.serving_bytes(run) == sum(np.prod(shape) * size for shape, size in placed)
    prompts = engine.abstract_prompts(config.rollout.prompts)
    placed = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(prompts)]
    assert by_hand.prompts_bytes(run) == sum(np.prod(shape) * size for shape, size in placed)


def test_a_collective_takes_what_crosses_between_nodes_and_what_comes_by_nvlink():
    chip = CHIPS["h100"]
    nodes = [(number // 8,) for number in range(16)]

    def seconds(kind, members):
        return seconds_of(Collective(kind, 15e9, len(members), members, 2, ""), chip, nodes)

    assert seconds("all-gather", tuple(range(8))) == pytest.approx(2 * 15e9 / 450e9)
    assert seconds("all-gather", (0,)) == 0
    # 8 GB are of the other node: 1 GB comes by each adapter, 20 ms, and the other 14 by NVLink
    assert seconds("all-gather", tuple(range(16))) == pytest.approx(2 * max(1e9 / 50e9, 14e9 / 450e9))
    # each its own 8 GB
    assert seconds("all-to-all", tuple(range(16))) == pytest.approx(2 * 8e9 / 50e9)
    assert seconds("all-reduce", (0, 8)) == pytest.approx(2 * 15e9 / 50e9)


def test_a_plan_for_gpus_says_that_it_is_an_estimate(tmp_path, capsys):
    config = replace(tiny.CONFIG, mesh=MeshConfig(fsdp=4))
    recipe = tiny.write_recipe(tmp_path / "recipe.py", config)
    assert main(["plan", str(recipe), "--topology", "h100:4", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert held["compiled"] is False and held["fits"] and held["chips"] == 4
    assert list(held["programs"]) == ["train_step", "sync", "prefill", "decode"]
    assert main(["plan", str(recipe), "--topology", "a100:4"]) == 0
    text = capsys.readouterr().out
    assert "a100:4: 4 chips; a chip has 312 TFLOP/s in bf16, 80.0 GiB at 2039 GB/s, NVLink of 300 GB/s" in text
    assert "estimated by hand, not compiled" in text and text.count(" yes ") == 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--topology", "h100:x"], "--topology is 'h100:x'; it must be a kind and a number of GPUs, such as h100:16"),
        (["--topology", "h100:0"], "--topology is 'h100:0'; it must be"),
        (["--topology", "h900:8"], "such as h100:16, of a100, h100, h200, b200"),
        (["--topology", "h100:4"], "the mesh is one device: 1 devices, and h100:4 has 4; mesh.fsdp=4 would fill it"),
        (["--topology", "h100:8", "mesh.tensor=8"], "mesh.tensor × mesh.context is 8, which does not divide the 4"),
        (["--topology", "h100:4", "mesh.fsdp=4", "serving.tensor=3"], "serving.tensor is 3; it must divide"),
        (
            ["--topology", "h100:4", "mesh.fsdp=4", "objective.score_centering=true"],
            "the objective reads the sampler's distributions, which is not counted by hand for GPUs",
        ),
        (
            ["--topology", "h100:4", "mesh.fsdp=4", "serving.in_training=weights"],
            "serving.in_training is weights, which is not counted by hand for GPUs",
        ),
        (["--topology", "h100:4", "mesh.fsdp=4", "serving.slots=6"], "slots is 6; it must be a multiple of the 4"),
        (["--topology", "h100:4", "mesh.fsdp=4", "serving.tensor=4"], "serving.tensor is 4, which does not divide the"),
        (["--topology", "h100:1", "model.attention=splash"], "model.attention is 'splash', which does not run on gpu"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(arguments, told, tmp_path, capsys):
    recipe = tiny.write_recipe(tmp_path / "recipe.py")
    assert main(["plan", str(recipe), *arguments]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_does_not_fit_on_gpus_is_told_what_would(tmp_path, capsys):
    config = replace(tiny.CONFIG, serving=replace(tiny.CONFIG.serving, slots=2**26))
    recipe = tiny.write_recipe(tmp_path / "recipe.py", config)
    assert main(["plan", str(recipe), "--topology", "h100:1"]) == 3
    output, errors = capsys.readouterr()
    assert "an iteration is not reckoned, as the run does not fit" in output
    (override,) = [word for word in errors.split() if word.startswith("serving.slots=")][-1:]
    slots = int(override.partition("=")[2])
    fits = [
        make_plan(
            replace(config, serving=replace(config.serving, slots=count)), "h100:1", mean_response=MEAN, told=print
        ).fits
        for count in (slots, 2 * slots)
    ]
    assert fits == [True, False]


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.skipif(find_spec("libtpu") is None, reason="no libtpu, which compiles for absent TPUs")
def test_hand_counts_of_8b_are_those_of_its_compiled_step():
    # with 11,776 columns, the recipe's own, activations are counted 30% too high: docs/plan.md
    fields = ["mesh.data=1", "mesh.fsdp=64", "model.remat=full", "model.head_chunk=512"]
    fields.append("optimizer.tokens_per_microbatch=17408")
    config, _ = config_of([str(Path(__file__).parents[3] / "dcjax/recipes/dcmdp_qwen3_8b.py"), *fields])
    mean = config.rollout.max_response_length / 2
    place = Place.of(config, "v5p:4x4x4")
    config, mesh = place.config, place.mesh
    step = build.compile_train_step(config, mesh)
    compiled = step.lower(build.abstract_state(config, mesh), build.abstract_batch(config, mesh)).compile()
    memory = compiled.memory_analysis()
    # what exists at one time at most; the compiler lays it out in half as much memory again, of which holes are left
    living = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    held = place.kinds([SimpleNamespace(planned=SimpleNamespace(name="train_step", temp_bytes=living))])
    run = by_hand.Sizes(config, "tpu", 64, mean)
    counted = by_hand.kinds(run)
    assert {kind: counted[kind] / size for kind, size in held.items()} == pytest.approx(
        dict.fromkeys(held, 1), rel=0.15
    )
    told = {"unknown_trips": microbatches(config, mean), "attended": attended(config, mean)}
    operations = Program(compiled.as_text(), **told).cost.flops["bf16"]
    # splash makes seven products backward where a hand counts five
    assert by_hand.train_step(run).cost.flops["bf16"] == pytest.approx(operations, rel=0.05)
