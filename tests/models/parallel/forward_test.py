"""One train step on meshes of eight devices against one device, and how its activations are cut."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import random_batch
from compiling import UNOPTIMISED
from jax.experimental.pallas import tpu as pltpu

from dcjax.models import ModelConfig, init_params, presets
from dcjax.models.attention import Segments, causal_attention
from dcjax.models.parallel.forward import check_model, mesh_layout
from dcjax.recipe import build
from dcjax.recipe.build import build_optimizer
from dcjax.recipe.config import Config
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.serving.formats import formats
from dcjax.serving.parallel import serving_mesh
from dcjax.serving.sync import served_shardings
from dcjax.sharding.mesh import PAPER_A_ROLLOUT, PAPER_A_TRAINING, MeshConfig, make_mesh, over

pytestmark = pytest.mark.heavy

# a dense layer, then one with experts
MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=72,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    tie_embeddings=False,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    decoder_sparse_step=2,
    head_chunk=4,
)
ROWS, G, P, T = 8, 4, 4, 7
# columns that a forward pass is fed
FED = P + T - 1
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(fsdp=8),
    "tensor 8": MeshConfig(tensor=8),
    "expert 8": MeshConfig(expert=8),
    "context 8": MeshConfig(context=8),
    "data 2 × fsdp 2 × tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 2 × tensor 2 × expert 2": MeshConfig(fsdp=2, tensor=2, expert=2),
    "tensor 2 × expert 4": MeshConfig(tensor=2, expert=4),
    "data 2 × expert 2 × context 2": MeshConfig(data=2, expert=2, context=2),
    "tensor 2 × context 2": MeshConfig(tensor=2, context=2),
    "tensor 2 × expert 2 × context 2": MeshConfig(tensor=2, expert=2, context=2),
}
CONFIG = Config(
    model=MODEL,
    rollout=RolloutConfig(prompts=ROWS // G, group_size=G),
    objective=ObjectiveConfig(initial_multiplier=0.3, dual_lr=2.0, budget=0.01, zero_variance="drop"),
    # Adam's first step is a sign where gradients exceed epsilon: a large one keeps rounding from deciding it
    optimizer=OptimizerConfig(learning_rate=1e-2, epsilon=1e-2),
)


BATCH = random_batch(
    [1, 0, 0, 1, 0, 1, 0.5, 0], vocab_size=MODEL.vocab_size, group_size=G, prompt_length=P, response_length=T
)


def train_one_step(mesh_config):
    """State and metrics after a step, and the text of its program."""
    config = dataclasses.replace(CONFIG, mesh=mesh_config)
    mesh, tx, batch = make_mesh(mesh_config), build_optimizer(config), config.packing()(BATCH)
    masters = jax.device_get(jax.jit(partial(init_params, MODEL))(jax.random.key(0)))
    params = jax.device_put(masters, build.params_shardings(config, mesh))
    state = build.initial_state(config, mesh, tx, params)
    step = build.compile_train_step(config, mesh).lower(state, batch).compile(UNOPTIMISED)
    return *jax.device_get(step(state, batch)), step.as_text()


@pytest.fixture(scope="module")
def alone():
    return train_one_step(MeshConfig())


EVERYDAY = "tensor 2 × expert 2 × context 2"
"""The axes that train_step_test.py does not have."""


@pytest.mark.parametrize(
    "name", [name if name == EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_a_step_is_that_of_one_device_and_its_activations_are_cut(alone, name):
    state, metrics, _ = alone
    ours, measured, text = train_one_step(MESHES[name])

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    # λ is in the optimiser's state, and so are the gradients: Adam's first moment is 0.1 of them
    jax.tree.map(close, (ours, measured), (state, metrics))
    assert abs(optax.tree.get(state.opt_state, "multiplier") - 0.3) > 0.01
    mu = optax.tree.get(state.opt_state, "mu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), optax.tree.get(ours.opt_state, "mu"), mu)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(mu)) > 1e-5
    assert_activations_are_cut(MESHES[name], text)


def assert_activations_are_cut(mesh, text):
    """Between an MLP's products each device has its columns and widths only, and no device has them all."""
    held = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    bins = dataclasses.replace(CONFIG, mesh=mesh).packing().bins
    columns, width = bins.columns // 2 // mesh.context, MODEL.intermediate_size // mesh.tensor
    assert (2, columns, width) in held
    # of three axes: rows, columns and these widths, cut or whole
    whole = bins.columns // 2, MODEL.intermediate_size
    inner = [shape for shape in held if len(shape) == 3 and shape[1] in (columns, whole[0])]
    activations = [shape for shape in inner if shape[2] in (width, whole[1])]
    assert max(map(math.prod, activations)) == 2 * columns * width


@pytest.mark.parametrize(
    ("kernel", "mesh"),
    [
        ("xla", MeshConfig(tensor=2, context=4)),
        ("xla", MeshConfig(data=2, context=2, fsdp=2)),
        ("xla", MeshConfig(tensor=4, fsdp=2)),
        ("splash", MeshConfig(tensor=2, context=4)),
        pytest.param("splash", MeshConfig(data=2, context=2, fsdp=2), marks=pytest.mark.slow),
        pytest.param("splash", MeshConfig(tensor=4, fsdp=2), marks=pytest.mark.slow),
    ],
)
def test_attention_on_a_mesh_is_that_of_one_device(kernel, mesh):
    """With two key-value heads for eight devices too, and with several sequences in a row."""
    q, k, v = (np.random.default_rng(heads).normal(size=(4, 16, heads, 8)).astype(np.float32) for heads in (8, 2, 2))
    ids = np.repeat([[1, 2, 0], [1, 2, 0], [1, 1, 1], [1, 2, 3]], [5, 8, 3], axis=1).astype(np.int32)

    def with_gradients(attend, kernel, *arrays):
        out, back = jax.vjp(lambda *qkv: attend(*qkv, kernel=kernel, segments=Segments(ids)), *arrays)
        return out, *back(jnp.cos(out))

    with pltpu.force_tpu_interpret_mode(True):
        shared = jax.jit(partial(with_gradients, mesh_layout(make_mesh(mesh)).attention, kernel))(q, k, v)
    expected = jax.jit(partial(with_gradients, causal_attention, "xla"))(q, k, v)
    for ours, theirs in zip(shared, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
    ("model", "mesh", "message"),
    [
        ({}, {"tensor": 2, "context": 8}, r"mesh\.tensor × mesh\.context is 16, which .* the 8 query heads"),
        ({"hidden_size": 30}, {"fsdp": 4}, r"mesh\.fsdp is 4, which does not divide the 30 embed of params"),
        ({"num_experts": 6}, {"expert": 4}, r"mesh\.expert is 4, .* the 6 experts of params layers\.experts_gate_proj"),
        ({"vocab_size": 45}, {"tensor": 2}, r"mesh\.tensor is 2, .* the 45 vocab of params embed_tokens"),
        ({"hidden_size": 31, "num_experts": 8}, {"tensor": 2}, r"mesh\.tensor is 2, .* the 31 columns of the residual"),
    ],
)
def test_a_mesh_that_does_not_divide_a_model_is_refused_with_both_numbers(model, mesh, message):
    sizes = dataclasses.asdict(MeshConfig(**mesh))
    check_model(MODEL, dataclasses.asdict(MeshConfig()))
    with pytest.raises(ValueError, match=message):
        check_model(dataclasses.replace(MODEL, **model), sizes)


@pytest.mark.parametrize("preset", ["qwen3-8b", "qwen3-30b-a3b"])
def test_paper_a_layouts_divide_their_models(preset):
    check_model(presets[preset], dataclasses.asdict(over(PAPER_A_TRAINING[preset], 64)))
    if preset in PAPER_A_ROLLOUT:
        rollout = serving_mesh(make_mesh(MeshConfig(data=8)), PAPER_A_ROLLOUT[preset])
        assert served_shardings(presets[preset], formats["int8"], rollout)
