"""One train step on meshes of eight devices against one device, and how its activations are cut."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import tpu as pltpu

from dcjax import assemble
from dcjax.config import Config, ObjectiveConfig, OptimizerConfig, RolloutConfig
from dcjax.models import ModelConfig, init_params
from dcjax.models.attention import causal_attention
from dcjax.optimizer import make_optimizer
from dcjax.sharding.layout import mesh_layout
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.types import Batch

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
# what a forward pass is fed, padded to 8 × 2
FED, PADDED = P + T - 1, 16
FAST_COMPILE = {"xla_backend_optimization_level": 0}
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
}
CONFIG = Config(
    model=MODEL,
    rollout=RolloutConfig(prompts=ROWS // G, group_size=G),
    objective=ObjectiveConfig(initial_multiplier=0.3, dual_lr=2.0, budget=0.01, zero_variance="drop"),
    # Adam's first step is a sign where gradients exceed epsilon: a large one keeps rounding from deciding it
    optimizer=OptimizerConfig(learning_rate=1e-2, epsilon=1e-2, microbatch_size=ROWS, updates=1),
)


def make_batch():
    rng = np.random.default_rng(0)
    rewards = np.array([1, 0, 0, 1, 0, 1, 0.5, 0], np.float32)
    mask = np.arange(T) < rng.integers(1, T + 1, (ROWS, 1))
    return Batch(
        tokens=rng.integers(0, MODEL.vocab_size, (ROWS, P + T)).astype(np.int32),
        prompt_mask=np.arange(P) >= rng.integers(0, P, (ROWS, 1)),
        response_mask=mask,
        rollout_logps=np.where(mask, rng.uniform(-3, -0.5, (ROWS, T)), 0).astype(np.float32),
        temperature=np.ones(ROWS, np.float32),
        rewards=rewards,
        group_rewards=np.repeat(rewards.reshape(-1, G), G, axis=0),
    )


BATCH = make_batch()


def train_one_step(mesh_config):
    """State and metrics after a step, and the text of its program."""
    mesh, tx = make_mesh(mesh_config), make_optimizer(CONFIG)
    masters = jax.device_get(jax.jit(partial(init_params, MODEL))(jax.random.key(0)))
    params = jax.device_put(masters, assemble.params_shardings(CONFIG, mesh))
    state = assemble.initial_state(CONFIG, mesh, tx, params)
    step = assemble.compile_train_step(CONFIG, mesh).lower(state, BATCH).compile(FAST_COMPILE)
    return *jax.device_get(step(state, BATCH)), step.as_text()


@pytest.fixture(scope="module")
def alone():
    return train_one_step(MeshConfig())


@pytest.mark.parametrize("name", MESHES)
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
    """Between an MLP's products each device has its rows, columns and widths only, and no device has them all."""
    held = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    columns = -(-FED // (mesh.context * mesh.tensor)) * mesh.tensor
    rows, width = ROWS // (mesh.data * mesh.fsdp * mesh.expert), MODEL.intermediate_size // mesh.tensor
    assert (rows, columns, width) in held
    whole = ROWS * FED * MODEL.intermediate_size
    activations = [shape for shape in held if len(shape) == 3 and shape[2] in (width, MODEL.intermediate_size)]
    assert max(np.prod(shape) for shape in activations if shape[:2] != (1, MODEL.hidden_size)) < whole / 4


@pytest.mark.parametrize("kernel", ["xla", "splash"])
@pytest.mark.parametrize(
    "mesh", [MeshConfig(tensor=2, context=4), MeshConfig(data=2, context=2, fsdp=2), MeshConfig(tensor=4, fsdp=2)]
)
def test_attention_on_a_mesh_is_that_of_one_device(kernel, mesh):
    """With two key-value heads for eight devices too, and with several sequences in a row."""
    q, k, v = (np.random.default_rng(heads).normal(size=(4, 16, heads, 8)).astype(np.float32) for heads in (8, 2, 2))
    ids = np.repeat([[1, 2, 0], [1, 2, 0], [1, 1, 1], [1, 2, 3]], [5, 8, 3], axis=1).astype(np.int32)

    def with_gradients(attend, *arrays):
        out, back = jax.vjp(lambda *qkv: attend(*qkv, kernel=kernel, segment_ids=ids), *arrays)
        return out, *back(jnp.cos(out))

    with pltpu.force_tpu_interpret_mode(True):
        shared = jax.jit(partial(with_gradients, mesh_layout(make_mesh(mesh)).attention))(q, k, v)
    expected = jax.jit(partial(with_gradients, partial(causal_attention)))(q, k, v) if kernel == "xla" else None
    if expected is None:
        xla = partial(
            with_gradients, lambda *qkv, kernel, segment_ids: causal_attention(*qkv, kernel="xla", segment_ids=ids)
        )
        expected = jax.jit(xla)(q, k, v)
    for ours, theirs in zip(shared, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_heads_that_the_mesh_does_not_divide_are_refused():
    layout = mesh_layout(make_mesh(MeshConfig(tensor=2, context=4)))
    arrays = [np.zeros((1, 8, heads, 4), np.float32) for heads in (12, 4, 4)]
    with pytest.raises(ValueError, match=r"12 query heads .* mesh\.tensor × mesh\.context, 8"):
        layout.attention(*arrays, kernel="xla")
