"""The step that `assemble` compiles: one device against eight, where everything lives, and what donation takes away."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import random_batch
from compiling import UNOPTIMISED

from dcjax.models import ModelConfig, init_params
from dcjax.recipe import build
from dcjax.recipe.build import build_optimizer
from dcjax.recipe.config import Config
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig
from dcjax.serving.formats import formats
from dcjax.serving.sync import make_sync
from dcjax.sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.heavy

MODEL = ModelConfig(vocab_size=16, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4, head_dim=8)
ROWS, G, P, T = 16, 4, 4, 6
# a step is run a few times, so that compiling it is what takes time
MESHES = {"one": MeshConfig(), "data 2 × fsdp 4": MeshConfig(data=2, fsdp=4)}


def make_config(mesh):
    return Config(
        model=MODEL,
        rollout=RolloutConfig(prompts=ROWS // G, group_size=G),
        objective=ObjectiveConfig(initial_multiplier=0.3, dual_lr=2.0, budget=0.01, zero_variance="drop"),
        # Adam's first step is a sign where gradients exceed epsilon: a large one keeps rounding from deciding it
        optimizer=OptimizerConfig(learning_rate=1e-2, epsilon=1e-2, updates=2),
        mesh=mesh,
    )


@pytest.fixture(scope="module")
def batch():
    rewards = [1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0.5, 0, 0, 1]
    return random_batch(rewards, vocab_size=MODEL.vocab_size, group_size=G, prompt_length=P, response_length=T)


@pytest.fixture(scope="module")
def masters():
    return jax.device_get(jax.jit(partial(init_params, MODEL))(jax.random.key(0)))


@dataclasses.dataclass
class Trained:
    """Two iterations on a mesh, and what was seen on the way."""

    mesh: jax.sharding.Mesh
    step: object
    before: object
    served: object
    after: object
    metrics: list


@pytest.fixture(scope="module")
def trained(batch, masters):
    def train(config):
        mesh, tx = make_mesh(config.mesh), build_optimizer(config)
        params = jax.device_put(jax.tree.map(jnp.array, masters), build.params_shardings(config, mesh))
        before = state = build.initial_state(config, mesh, tx, params)
        served = make_sync(MODEL, formats["float32"])(state.params, 0)
        packed, metrics = config.packing()(batch), []
        step = build.compile_train_step(config, mesh).lower(state, packed).compile(UNOPTIMISED)
        for _ in range(2):
            state, measured = step(state, packed)
            metrics.append(jax.device_get(measured))
        return Trained(mesh, step, before, served, state, metrics)

    return {name: train(make_config(mesh)) for name, mesh in MESHES.items()}


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_eight_devices_train_as_one_does(trained, masters, name):
    one, many = trained["one"], trained[name]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=2e-6),
        one.after.params,
        many.after.params,
    )
    multipliers = [float(optax.tree.get(run.after.opt_state, "multiplier")) for run in (one, many)]
    assert multipliers[0] == pytest.approx(multipliers[1], abs=1e-6)
    assert abs(multipliers[0] - 0.3) > 0.01
    for ours, theirs in zip(one.metrics, many.metrics, strict=True):
        assert set(ours) == set(theirs)
        for metric, value in ours.items():
            np.testing.assert_allclose(theirs[metric], value, rtol=2e-4, atol=1e-6, err_msg=metric)
        np.testing.assert_allclose(theirs["loss"], ours["loss"], rtol=0, atol=1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), one.after.params, masters)
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("name", MESHES)
def test_parameters_and_moments_are_really_split(trained, name):
    """Every array with an axis named embed is cut along it into `fsdp` parts, before and after training."""
    state, fsdp = trained[name].after, MESHES[name].fsdp
    axes = jax.tree.leaves(build.logical_axes(MODEL), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
    for tree in (state.params, adam.mu, adam.nu):
        held = whole = 0
        for leaf, names in zip(jax.tree.leaves(tree), axes, strict=True):
            expected = tuple(
                size // fsdp if name == "embed" else size for name, size in zip(names, leaf.shape, strict=True)
            )
            shards = leaf.addressable_shards
            assert len(shards) == trained[name].mesh.size
            assert {shard.data.shape for shard in shards} == {expected}
            held, whole = held + shards[0].data.size, whole + leaf.size
        # all but the norms of heads
        assert held == (whole - 2 * 8) // fsdp + 2 * 8
    for scalar in (state.step, optax.tree.get(state.opt_state, "multiplier")):
        assert {shard.data.shape for shard in scalar.addressable_shards} == {()}


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


@pytest.mark.parametrize("name", MESHES)
def test_the_state_is_donated_and_serving_params_made_from_it_survive(trained, masters, name):
    run = trained[name]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((run.before.params, run.before.opt_state)))
    weights = run.served.weights
    np.testing.assert_array_equal(weights["embed_tokens"].codes, masters["embed_tokens"])
    np.testing.assert_array_equal(weights["norm"], masters["norm"])
    for i, layer in enumerate(weights["layers"]):
        for leaf_name, leaf in layer.items():
            (served,) = jax.tree.leaves(leaf)
            np.testing.assert_array_equal(served, masters["layers"][leaf_name][i])


def test_the_same_run_twice_is_the_same_bit_for_bit(trained, batch, masters):
    config = make_config(MESHES["one"])
    mesh, tx, packed = make_mesh(config.mesh), build_optimizer(config), config.packing()(batch)
    state = build.initial_state(config, mesh, tx, jax.tree.map(jnp.array, masters))
    for _ in range(2):
        state, _ = trained["one"].step(state, packed)
    jax.tree.map(np.testing.assert_array_equal, state.params, trained["one"].after.params)


@pytest.mark.parametrize("name", MESHES)
def test_the_abstract_state_describes_the_real_one(trained, name):
    described = build.abstract_state(make_config(MESHES[name]), trained[name].mesh)
    real = trained[name].after
    assert jax.tree.structure(described) == jax.tree.structure(real)
    for ours, theirs in zip(jax.tree.leaves(described), jax.tree.leaves(real), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


EXPERTS = dataclasses.replace(MODEL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "format", "how"),
    [
        (MODEL, "int8_channel", "weights"),
        (MODEL, "w8a8", "all"),
        (EXPERTS, "w8a8", "weights"),
        (EXPERTS, "int8", "all"),
    ],
    ids=lambda value: value if isinstance(value, str) else "experts" if value.num_experts else "dense",
)
def test_eight_devices_train_in_a_served_format_as_one_does(batch, model, format, how):
    """Scales are of whole channels and tokens, however these are split."""
    found = {}
    for name, mesh_config in MESHES.items():
        config = dataclasses.replace(
            make_config(mesh_config), model=model, serving=ServingConfig(format=format, in_training=how)
        )
        mesh, tx = make_mesh(config.mesh), build_optimizer(config)
        params = jax.device_put(masters_of(model), build.params_shardings(config, mesh))
        state = build.initial_state(config, mesh, tx, params)
        state, metrics = build.compile_train_step(config, mesh)(state, config.packing()(batch))
        found[name] = jax.device_get((state.params, metrics))
    (one, ours), (many, theirs) = found.values()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    for metric in ("grad_norm", "mismatch/k1", "entropy"):
        np.testing.assert_allclose(theirs[metric], ours[metric], rtol=2e-3, err_msg=metric)


def masters_of(model):
    return jax.device_get(jax.jit(partial(init_params, model))(jax.random.key(0)))
