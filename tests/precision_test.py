"""What hardware is asked to do with float32 times float32, read off every program that multiplies."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from served import DENSE, EXPERTS, engine_of

from dcjax.models import Precision, abstract_params, forward
from dcjax.models.attention import causal_attention
from dcjax.recipe import build
from dcjax.serving import engine as engines
from dcjax.serving import scheduler, scoring
from dcjax.serving.parallel import serving_mesh
from dcjax.sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.heavy

FLOAT32 = ("f32", "f32")


def asked(traced):
    """(dtypes of both sides, precisions asked for) of the products of a program, lowered for a CPU and for a GPU."""
    found = set()
    for platform in ("cpu", "cuda"):
        for line in traced.lower(lowering_platforms=(platform,)).as_text().splitlines():
            if re.search(r"= (stablehlo\.(dot_general|convolution)|\"chlo\.ragged_dot\")", line):
                sides = tuple(re.findall(r"tensor<(?:\d+x)*(\w+)>", line.rsplit(" : ", 1)[1])[:2])
                asks = re.findall(r"\b(DEFAULT|HIGHEST|HIGH)\b", line)
                assert len(asks) in (0, 2)
                found.add((sides, *(set(asks) or {"DEFAULT"})))
    return found


def config_of(model, **precision):
    return dataclasses.replace(tiny.CONFIG, model=dataclasses.replace(model, precision=Precision(**precision)))


def mesh_of(**axes):
    sizes = MeshConfig(**axes)
    return make_mesh(sizes, jax.devices()[: max(1, np.prod(list(axes.values()), dtype=int))])


def train_step(config, mesh):
    step = build.compile_train_step(config, mesh)
    return step.trace(build.abstract_state(config, mesh), build.abstract_batch(config, mesh))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


MESHES = [
    (DENSE, {}),
    (EXPERTS, {}),
    slow(DENSE, {"fsdp": 2, "tensor": 2}),
    slow(EXPERTS, {"fsdp": 2, "expert": 2, "tensor": 2}),
]


@pytest.mark.parametrize(("model", "axes"), MESHES)
def test_training_multiplies_float32_with_all_bits(model, axes):
    config = dataclasses.replace(config_of(model), mesh=MeshConfig(**axes))
    assert asked(train_step(config, mesh_of(**axes))) == {(FLOAT32, "HIGHEST")}


def test_training_in_bf16_asks_so_of_what_is_float32_only():
    """Of the head, then, and of the router."""
    found = asked(train_step(config_of(EXPERTS, compute="bf16"), mesh_of()))
    assert found == {(FLOAT32, "HIGHEST"), (("bf16", "bf16"), "DEFAULT")}


def test_fewer_bits_are_a_choice_but_for_the_router():
    found = asked(train_step(config_of(EXPERTS, float32_products="default"), mesh_of()))
    assert found == {(FLOAT32, "HIGHEST"), (FLOAT32, "DEFAULT")}
    assert asked(train_step(config_of(DENSE, float32_products="default"), mesh_of())) == {(FLOAT32, "DEFAULT")}


def test_all_logits_are_of_all_bits():
    params, tokens = abstract_params(DENSE), jax.ShapeDtypeStruct((2, 5), jnp.int32)
    assert asked(jax.jit(forward, static_argnums=0).trace(DENSE, params, tokens)) == {(FLOAT32, "HIGHEST")}


def serving_programs(engine, masters):
    """All that multiplies: prompts, tokens of one request at a time, samples of a rollout, and given tokens."""
    decoder, total = engine.decoder, 4
    served = jax.eval_shape(engine.sync, masters, 0)
    tokens, lengths = np.zeros((total, tiny.PROMPT_LENGTH), np.int32), np.ones(total, np.int32)
    yield engines._prefill.trace(decoder, served, tokens, lengths)
    slots = jax.eval_shape(lambda: decoder.empty(engine.slots))
    yield engines._programs(decoder).generate.trace(decoder, served, slots, engine.steps_per_call)
    prefix = jax.eval_shape(decoder.prefill, served, tokens, lengths)
    requests = engine.make_requests(np.zeros((total, 2)))
    programs, steps = scheduler.programs(decoder), engine.steps_per_call
    queue = scheduler.queue_of(prefix, np.zeros(total, np.int32), requests, range(total))
    state = jax.eval_shape(programs.begin, decoder, total, total, True)
    yield programs.decode.trace(decoder, steps, served, queue, np.int32(1), state)
    # samples that come one by one, whose log-probs may be told
    telling = dataclasses.replace(decoder, top_logprobs=3)
    state = jax.eval_shape(programs.begin, telling, total, total, False)
    asked = np.zeros(total, bool), np.bool_(True)
    yield scheduler.programs(telling).turn.trace(telling, steps, served, queue, *asked, state)
    yield scoring._score.trace(decoder, False, served, prefix, requests, np.zeros((3, total), np.int32))


BF16, ROUTER = ("bf16", "bf16"), (FLOAT32, "HIGHEST")
MULTIPLIED = {
    "float32": {(FLOAT32, "HIGHEST")},
    "bf16": {(BF16, "DEFAULT"), ROUTER},
    "w8a8": {(("i8", "i8"), "DEFAULT"), (BF16, "DEFAULT"), ROUTER},
}


@pytest.mark.parametrize(
    ("format", "devices"),
    [
        ("float32", 1),
        *(slow(format, devices) for format in MULTIPLIED for devices in (1, 4) if (format, devices) != ("float32", 1)),
    ],
)
def test_an_engine_multiplies_float32_with_all_bits_and_what_is_narrower_as_it_is(format, devices):
    mesh = serving_mesh(mesh_of(data=devices), min(devices, 2))
    engine = engine_of(format, EXPERTS, mesh=mesh)
    for program in serving_programs(engine, abstract_params(EXPERTS)):
        assert asked(program) == MULTIPLIED[format]


def test_an_engine_takes_the_choice_of_fewer_bits():
    config = config_of(DENSE, float32_products="high").model
    for program in serving_programs(engine_of("float32", config), abstract_params(config)):
        assert asked(program) == {(FLOAT32, "HIGH")}


@pytest.mark.parametrize(
    ("chosen", "hears"), [("highest", "HIGHEST"), slow("high", "HIGHEST"), slow("default", "DEFAULT")]
)
def test_the_kernel_for_tpus_multiplies_float32_so_too(chosen, hears):
    """Forward and backward; it knows all bits and one pass of bf16. What is bf16 keeps the kernel's own precision."""

    def splash(q, k, v, float32):
        out, back = jax.vjp(lambda *qkv: causal_attention(*qkv, kernel="splash", float32=float32), q, k, v)
        return back(out)

    def heard(dtype):
        q = jax.ShapeDtypeStruct((1, 128, 2, 16), dtype)
        text = str(jax.make_jaxpr(splash, static_argnums=3)(q, q, q, Precision(float32_products=chosen).float32))
        products = text.split("dot_general[")[1:]
        assert len(products) >= 8
        return {tuple(re.findall(r"Precision\.(\w+)", product)) for product in products}

    assert heard(jnp.float32) == {(hears, hears)}
    assert heard(jnp.bfloat16) == {()}
