"""Gaps that are added on purpose have the size that was asked for, and come again with the key."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dcjax.models import ModelConfig, forward, init_params, token_logps
from dcjax.serving import Qwen3Engine
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.rollout import sample_responses
from dcjax.serving.scoring import score_responses

DENSE = ModelConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, head_dim=8)
MOE = dataclasses.replace(DENSE, num_layers=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
P, T, G, NEVER = 4, 12, 40, 16
PROMPTS = [[1, 2, 4], [5], [6, 7, 8, 9]]
KEY = jax.random.key(1)
FAST_COMPILE = {"xla_backend_optimization_level": 0}
scores = jax.jit(token_logps, static_argnums=0, static_argnames="response_length", compiler_options=FAST_COMPILE)


@functools.cache
def masters_of(config):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        return jnp.array(1 + 0.1 * x if "norm" in path[-1].key else x * leaf.shape[-1] ** -0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_params(config, jax.random.key(0))))


@functools.cache
def make_engine(config=DENSE, **sizes):
    return Qwen3Engine(
        config,
        format="float32",
        slots=G,
        max_prompt_length=P,
        max_response_length=T,
        end_token=NEVER,
        steps_per_call=T,
        records_experts=bool(config.num_experts),
        mismatch=MismatchConfig(**sizes),
    )


@functools.cache
def rollout_of(config=DENSE, version=0, **sizes):
    engine = make_engine(config, **sizes)
    params = engine.sync(masters_of(config), version)
    return sample_responses(engine, params, PROMPTS, samples_per_prompt=G, temperature=1.0, key=KEY)


def scored(rollout, config=DENSE, key=KEY, version=0, **sizes):
    engine = make_engine(config, **sizes)
    return score_responses(engine, engine.sync(masters_of(config), version), rollout, key=key).logps


def trained(config, rollout, **replayed):
    mask = np.concatenate([rollout.prompt_mask, rollout.response_mask], axis=1)
    arguments = {"response_length": T, "temperature": rollout.temperature} | replayed
    return scores(config, masters_of(config), rollout.tokens, mask, **arguments)


@pytest.mark.parametrize("size", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_noise", "logit_noise", "staleness"])
def test_a_size_out_of_range_is_refused(name, size):
    with pytest.raises(ValueError, match=f"mismatch.{name} is {size}; it must be a finite number of at least 0"):
        MismatchConfig(**{name: size})


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match=f"mismatch.routing_flips is {rate}; it must lie within"):
        MismatchConfig(routing_flips=rate)


# --- noise ---


@pytest.mark.parametrize("size", [0.05, pytest.param(0.2, marks=pytest.mark.slow)])
def test_noise_on_logits_moves_log_probs_by_as_much_as_it_should(size):
    # drawn without noise: with it, the tokens would be those that it favours
    rollout = rollout_of()
    delta = scored(rollout, logit_noise=size) - rollout.rollout_logps
    mask = np.concatenate([rollout.prompt_mask, rollout.response_mask], axis=1)
    logits = np.asarray(jax.jit(forward, static_argnums=0)(DENSE, masters_of(DENSE), rollout.tokens, mask), np.float64)
    p = np.exp(logits[:, P - 1 : -1])
    p /= p.sum(axis=-1, keepdims=True)
    own = np.take_along_axis(p, rollout.tokens[:, P:, None], axis=-1)[..., 0]
    # to first order, δ = ε_token − Σ p ε, with ε of the size that was asked for
    standard = delta / (size * np.sqrt(1 - 2 * own + (p**2).sum(axis=-1)))
    count = standard.size
    assert abs(standard.mean()) < 4 / np.sqrt(count) + size
    assert abs(standard.std() - 1) < 4 / np.sqrt(2 * count) + size / 2


def test_noise_on_logits_comes_again_with_its_key_and_with_no_other():
    rollout = rollout_of(logit_noise=0.2)
    np.testing.assert_allclose(scored(rollout, logit_noise=0.2), rollout.rollout_logps, atol=1e-5)
    for other in (scored(rollout), scored(rollout, key=jax.random.key(2), logit_noise=0.2)):
        assert np.median(np.abs(other - rollout.rollout_logps)) > 0.02


def test_noise_on_weights_is_of_the_version():
    rollout = rollout_of(weight_noise=0.02, version=1)
    np.testing.assert_allclose(scored(rollout, weight_noise=0.02, version=1), rollout.rollout_logps, atol=1e-5)
    for other in (scored(rollout, version=1), scored(rollout, weight_noise=0.02, version=2)):
        assert 1e-3 < np.median(np.abs(other - rollout.rollout_logps)) < 0.2


# --- flips ---


@pytest.mark.parametrize("rate", [0.3, *(pytest.param(rate, marks=pytest.mark.slow) for rate in (0.0, 1.0))])
def test_experts_are_flipped_as_often_as_asked_and_the_last_choice_alone(rate):
    rollout = rollout_of(MOE, routing_flips=rate)
    # what the first layer's router thinks does not depend on what was flipped, so one expert more can be asked of it
    wider = dataclasses.replace(MOE, num_experts_per_tok=3)
    ranked = np.asarray(trained(wider, rollout).router.experts[0])
    prefilled, decoded = slice(0, P - 1), slice(P - 1, None)
    chosen = rollout.experts[:, :, 0]
    fed = rollout.prompt_mask[:, :-1]
    np.testing.assert_array_equal(chosen[:, prefilled][fed], ranked[:, prefilled, :2][fed])
    np.testing.assert_array_equal(chosen[:, decoded, 0], ranked[:, decoded, 0])
    flipped = chosen[:, decoded, 1] == ranked[:, decoded, 2]
    np.testing.assert_array_equal(
        chosen[:, decoded, 1], np.where(flipped, ranked[:, decoded, 2], ranked[:, decoded, 1])
    )
    assert flipped.size == len(PROMPTS) * G * T
    assert stats.binomtest(int(flipped.sum()), flipped.size, rate).pvalue > 1e-3
    if rate == 0.3:
        # not the same tokens in both layers: were they, the second would be as likely to be natural where the first is
        replayed = np.asarray(trained(MOE, rollout).router.experts[1])
        assert (rollout.experts[:, decoded, 1] != replayed[:, decoded]).any(axis=-1)[~flipped].any()


def test_flips_make_a_gap_that_their_replay_closes_and_come_again_with_their_key():
    rollout = rollout_of(MOE, routing_flips=0.3)
    np.testing.assert_allclose(scored(rollout, MOE, routing_flips=0.3), rollout.rollout_logps, atol=1e-5)
    experts = np.moveaxis(rollout.experts, 2, 0).astype(np.int32)
    replayed = np.abs(np.asarray(trained(MOE, rollout, experts=experts).logps) - rollout.rollout_logps)
    assert replayed.max() <= 1e-4
    for other in (
        trained(MOE, rollout).logps,
        scored(rollout, MOE),
        scored(rollout, MOE, jax.random.key(2), routing_flips=0.3),
    ):
        assert np.abs(other - rollout.rollout_logps).mean() > 0.01
