"""Objectives that read the sampler's distributions, from their settings to what a step is given."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from stepping import Stepper

from dcjax.recipe import build
from dcjax.recipe.config import Config
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.recipe.serving import ServingConfig
from dcjax.rewards.in_process import InProcessRewards
from dcjax.rl import dc_grpo_centred, hinge
from dcjax.serving.mismatch import MismatchConfig
from dcjax.sharding.mesh import MeshConfig

GAPS = {"total_variation", "kl_from_sampler", "kl_to_sampler", "most_probable_differs"}


def requires(**settings):
    return build.objective_of(Config(objective=ObjectiveConfig(**settings))).requires


def test_what_an_objective_requires_decides_how_the_sampler_is_known():
    assert requires() == requires(penalty_form="centred") and not requires().sampler_distributions
    for settings, own, head in (
        ({"penalty_form": "state_centred"}, {"expected_penalty"}, 0),
        ({"score_centering": True}, {"expected_score"}, 0),
        ({"algorithm": "dc_direct", "signal": "total_variation"}, set(), 0),
        ({"algorithm": "grpo", "distribution_metrics": True}, set(), 0),
        ({"score_centering": True, "sampler_head": 4}, {"expected_score"}, 4),
        ({"penalty_form": "state_centred", "sampler_head": 4}, {"expected_penalty", "expected_penalty_error_bound"}, 4),
    ):
        found = requires(**settings)
        assert (found.sampler_distributions, found.sampler_head) == (not head, head)
        # whole distributions are measured wherever they are known
        assert set(found.of_head) == own | (set() if head else GAPS)
        assert set(found.of_old_head) == set(found.of_head) - {"expected_score"}


REFUSED = {
    "penalty_form is state_centred, and objective.algorithm grpo, which has no": {
        "algorithm": "grpo",
        "penalty_form": "state_centred",
    },
    "penalty_form is state_centred, and objective.algorithm dc_direct, which has no": {
        "algorithm": "dc_direct",
        "penalty_form": "state_centred",
    },
    "penalty_form is state_centred, so objective.level must be token, not sequence": {
        "penalty_form": "state_centred",
        "level": "sequence",
    },
    "signal is kl_to_sampler, so objective.sides must be two, not one": {"signal": "kl_to_sampler", "sides": "one"},
    "signal is total_variation, the same for all tokens of a state": {
        "signal": "total_variation",
        "penalty_form": "state_centred",
    },
    "penalty_form is state_centred with 4 tokens, so objective.signal must be probability, not ratio": {
        "signal": "ratio",
        "penalty_form": "state_centred",
        "sampler_head": 4,
    },
    "sampler_head is 4, which nothing reads": {"sampler_head": 4},
    "sampler_head is -1; it must be at least 0": {"sampler_head": -1},
    "score_centering is True and objective.correction sequence_tis, whose weights": {
        "score_centering": True,
        "correction": "sequence_tis",
    },
    "score_centering is True, so objective.method must be None, not ipo": {"score_centering": True, "method": "ipo"},
    "score_centering is True and objective.surrogate gspo, whose ratio is of responses": {
        "score_centering": True,
        "surrogate": "gspo",
    },
    "distribution_metrics is True, so objective.sampler_head must be 0, not 3": {
        "distribution_metrics": True,
        "score_centering": True,
        "sampler_head": 3,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_meaning_is_refused_with_what_would_have(message):
    with pytest.raises(ValueError) as error:
        ObjectiveConfig(**REFUSED[message])
    assert f"objective.{message}" in str(error.value)


def test_a_sampler_that_cannot_be_known_is_refused():
    centred, head = ObjectiveConfig(penalty_form="state_centred"), ObjectiveConfig(score_centering=True, sampler_head=4)
    server = RolloutConfig(engine="grpc://127.0.0.1:9000")
    for objective in (centred, head):
        with pytest.raises(ValueError, match=r"rollout\.engine is grpc://127.0.0.1:9000, and this objective requires"):
            Config(objective=objective, rollout=server)
    for name in ("logit_noise", "routing_flips"):
        with pytest.raises(ValueError, match=rf"mismatch\.{name} is 0\.1, which is drawn for each token"):
            Config(objective=centred, mismatch=MismatchConfig(**{name: 0.1}))
    Config(objective=head, mismatch=MismatchConfig(logit_noise=0.1))
    with pytest.raises(ValueError, match=r"objective\.sampler_head is 400; the vocabulary has 32 tokens"):
        Config(objective=dataclasses.replace(head, sampler_head=400))
    with pytest.raises(ValueError, match="head is 4; it is for the linear penalty on the probability difference"):
        dc_grpo_centred(updates=1, shape=hinge(0.1), head=4)


def test_experts_on_several_devices_cannot_round_activations_as_one_does():
    serving = ServingConfig(format="w8a8", in_training="all")
    experts = dataclasses.replace(tiny.CONFIG, model=tiny.EXPERTS, serving=serving)
    with pytest.raises(ValueError, match=r"serving\.in_training is all, and the mesh has 2 devices"):
        dataclasses.replace(experts, mesh=MeshConfig(fsdp=2))
    dataclasses.replace(experts, mesh=MeshConfig(fsdp=2), serving=dataclasses.replace(serving, in_training="weights"))
    with pytest.raises(ValueError, match=r"serving\.keep has o_proj, and serving\.format w8a8 quantises activations"):
        dataclasses.replace(tiny.CONFIG, serving=dataclasses.replace(serving, keep=("o_proj",)))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("objective", "serving"),
    [
        ({"penalty_form": "state_centred", "score_centering": True}, {"format": "int4"}),
        pytest.param(
            {"penalty_form": "state_centred", "score_centering": True, "sampler_head": 5},
            {"format": "int4", "in_training": "weights"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"algorithm": "dc_direct", "signal": "kl_from_sampler"},
            {"format": "w8a8", "in_training": "all"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_iteration_of_a_run_is_given_what_its_objective_requires(objective, serving):
    config = dataclasses.replace(
        tiny.CONFIG,
        objective=ObjectiveConfig(**objective),
        serving=dataclasses.replace(tiny.CONFIG.serving, **serving),
        warm_start=dataclasses.replace(tiny.CONFIG.warm_start, steps=2),
    )
    trainer = Stepper(config, InProcessRewards(config.task.reward))
    with trainer.sampler:
        state, cursor = trainer.begin()
        described = build.abstract_batch(config, trainer.mesh)
        state, cursor, metrics, sampled = trainer.iterate(state, cursor)
    rollout = sampled.rollout
    if head := config.objective.sampler_head:
        assert sampled.reading is None and rollout.sampler_tokens.shape[-1] == head
        assert described.sampler_tokens.shape == rollout.sampler_tokens.shape
        assert metrics["centred/error_bound"] >= 0
        return
    assert rollout.sampler_tokens is None
    for ours, theirs in zip(
        jax.tree.leaves((described.sampler_hidden, described.sampler_head)),
        jax.tree.leaves(sampled.reading),
        strict=True,
    ):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    # Σ_v |π_v − μ_v| / 2 on average over states is about the sampled tokens' ½ |ρ − 1|
    if serving.get("in_training") == "all":
        assert metrics["distribution/total_variation"] < 1e-3 > metrics["mismatch/tv"]
    else:
        ratio = metrics["mismatch/tv"] / metrics["distribution/total_variation"]
        assert 0.5 < ratio < 2 and metrics["distribution/total_variation"] > 0.01
        assert 0 < metrics["distribution/most_probable_differs"] < 0.5
        np.testing.assert_allclose(metrics["distribution/kl_from_sampler"], metrics["mismatch/k3"], rtol=1.0, atol=1e-4)
