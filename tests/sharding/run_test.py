"""Whole iterations on meshes of eight devices against one device: what is sampled, and what is learnt of it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from records import untimed
from stepping import Stepper

from dcjax.recipe.config import WarmStartConfig
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig
from dcjax.rewards.pool import Pending
from dcjax.serving.mismatch import MismatchConfig
from dcjax.sharding.mesh import MeshConfig

pytestmark = pytest.mark.slow
ITERATIONS = 3
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    seed=3,
    steps=ITERATIONS,
    # what every mesh divides
    model=dataclasses.replace(tiny.DENSE, vocab_size=24, num_heads=8, num_kv_heads=8, head_dim=8),
    warm_start=WarmStartConfig(steps=0),
    rollout=RolloutConfig(prompts=4, group_size=4, max_prompt_length=6, max_response_length=16),
    # Adam's first steps are signs where gradients exceed epsilon: a large one keeps rounding from deciding them
    optimizer=OptimizerConfig(learning_rate=1e-2, epsilon=1e-3, tokens_per_microbatch=60),
    objective=ObjectiveConfig(initial_multiplier=0.3, dual_lr=20.0, budget=0.0014),
    serving=ServingConfig(format="float32", slots=8, steps_per_call=4),
)
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2}
ONE = MeshConfig()
MODELS = {
    "dense": CONFIG.model,
    "experts": dataclasses.replace(CONFIG.model, **EXPERTS),
}


class Lengths:
    """Rewards differ within groups, by the length of what a random model says, so that iterations change parameters."""

    counters, asks = None, ()

    def submit(self, texts, golds, finished, known):
        return Pending.of([float(len(text) % 2) for text in texts])


WHOLE = {
    "objective": dataclasses.replace(CONFIG.objective, penalty_form="state_centred", score_centering=True),
    "mismatch": MismatchConfig(weight_noise=0.05),
}
"""What reads the sampler's whole distributions, which are others than the trainer's."""


@functools.cache
def run(model, mesh=ONE, async_level=0, whole=False, **serving):
    """The tokens of three iterations, their metrics, and the state behind them."""
    config = dataclasses.replace(
        CONFIG,
        **(WHOLE if whole else {}),
        model=MODELS[model],
        mesh=mesh,
        rollout=dataclasses.replace(CONFIG.rollout, async_level=async_level),
        serving=dataclasses.replace(CONFIG.serving, **serving),
    )
    sampled, measured = [], []
    trainer = Stepper(config, Lengths())
    state, loop = trainer.begin()
    with trainer.sampler:
        for _ in range(ITERATIONS):
            state, loop, metrics, drawn = trainer.iterate(state, loop)
            sampled.append(drawn.rollout.tokens)
            # how full bins are depends on how many devices share the rows
            assert 0 < metrics.pop("columns_filled") <= 1
            measured += untimed([metrics])
    return np.array(sampled), measured, jax.device_get(state)


@pytest.mark.parametrize(
    ("model", "mesh", "tensor"),
    [
        ("dense", MeshConfig(data=2, fsdp=2, tensor=2), 2),
        ("experts", MeshConfig(tensor=2, expert=4), 4),
        ("dense", MeshConfig(data=8), 1),
        ("dense", MeshConfig(fsdp=8), 8),
        ("dense", MeshConfig(tensor=8), 8),
        ("dense", MeshConfig(context=8), 2),
        ("dense", MeshConfig(fsdp=4, context=2), 4),
        ("experts", MeshConfig(expert=8), 8),
        ("experts", MeshConfig(fsdp=2, tensor=2, expert=2), 1),
        ("experts", MeshConfig(data=2, expert=2, context=2), 2),
    ],
)
def test_three_iterations_are_those_of_one_device(model, mesh, tensor):
    (tokens, metrics, state), (expected, measured, alone) = run(model, mesh, tensor=tensor), run(model)
    np.testing.assert_array_equal(tokens, expected)
    assert min(each["grad_norm"] for each in measured) > 0.1
    for ours, theirs in zip(metrics, measured, strict=True):
        # a gap is a difference of log-probs, whose own error it has
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(each.params) for each in (state, alone)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "mesh", "serving"),
    [
        ("dense", MeshConfig(data=2, fsdp=2, tensor=2), {"tensor": 2}),
        ("experts", MeshConfig(tensor=2, expert=4), {"tensor": 4}),
        ("dense", MeshConfig(fsdp=4, context=2), {"tensor": 1}),
        ("dense", MeshConfig(fsdp=2, tensor=2), {"tensor": 2, "devices": 4}),
    ],
)
def test_so_they_are_with_the_samplers_whole_distributions(model, mesh, serving):
    (tokens, metrics, state), (expected, measured, alone) = (
        run(model, mesh, whole=True, **serving),
        run(model, whole=True),
    )
    np.testing.assert_array_equal(tokens, expected)
    for ours, theirs in zip(metrics, measured, strict=True):
        assert theirs["distribution/total_variation"] > 0.005
        # whole distributions say on average what the sampled tokens do
        assert theirs["mismatch/tv"] == pytest.approx(theirs["distribution/total_variation"], rel=0.5)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(each.params) for each in (state, alone)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rollouts_differ_between_iterations_and_between_models():
    """That equal tokens say something."""
    dense, experts = run("dense")[0], run("experts")[0]
    assert (dense[0] != dense[1]).any() and (dense != experts).any()


def test_devices_of_their_own_serve_alike():
    apart = run("dense", MeshConfig(fsdp=2, tensor=2), tensor=2, devices=4)
    np.testing.assert_array_equal(apart[0], run("dense")[0])


def test_what_is_sampled_ahead_on_devices_of_their_own_is_what_one_device_would():
    apart = run("dense", MeshConfig(fsdp=2, tensor=2), async_level=1, tensor=2, devices=4)
    together = run("dense", async_level=1)
    np.testing.assert_array_equal(apart[0], together[0])
    # the first two are of the same weights, in turns the second is not
    np.testing.assert_array_equal(together[0][0], run("dense")[0][0])
    assert (together[0][1] != run("dense")[0][1]).any()
