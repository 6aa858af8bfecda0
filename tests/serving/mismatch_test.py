"""Gaps that are added on purpose have the size that was asked for, and come again with the key."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from scipy import stats
from served import DENSE, EXPERTS, PROMPTS, G, P, T, engine_of, params_of, sample, trained_scores
from tiny import masters

from dcjax.models import forward
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.scoring import score_responses

pytestmark = pytest.mark.heavy

# no token that can be sampled: every response runs to its limit
NEVER = [DENSE.vocab_size]
SEEDS = (1, 2, 3)


@functools.cache
def rollout_of(seed=1, config=DENSE, version=0, **sizes):
    engine = engine_of("float32", config, mismatch=tuple(sizes.items()))
    return sample(engine, config, seed=seed, temperature=1.0, version=version, stop_tokens=NEVER)


def scored(rollout, config=DENSE, seed=1, version=0, **sizes):
    engine = engine_of("float32", config, mismatch=tuple(sizes.items()))
    params = params_of(engine, config, version)
    return score_responses(engine, params, rollout, key=jax.random.key(seed)).logps


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


logits_of = jit(forward, static_argnums=0)


@pytest.mark.parametrize("size", [0.05, pytest.param(0.2, marks=pytest.mark.slow)])
def test_noise_on_logits_moves_log_probs_by_as_much_as_it_should(size):
    def in_units(seed):
        # drawn without noise: with it, the tokens would be those that it favours
        rollout = rollout_of(seed)
        delta = scored(rollout, seed=seed, logit_noise=size) - rollout.rollout_logps
        mask = rollout.attention_mask
        logits = np.asarray(logits_of(DENSE, masters(DENSE), rollout.tokens, mask), np.float64)
        p = np.exp(logits[:, P - 1 : -1])
        p /= p.sum(axis=-1, keepdims=True)
        own = np.take_along_axis(p, rollout.tokens[:, P:, None], axis=-1)[..., 0]
        # to first order, δ = ε_token − Σ p ε, with ε of the size that was asked for
        return delta / (size * np.sqrt(1 - 2 * own + (p**2).sum(axis=-1)))

    standard = np.concatenate([in_units(seed) for seed in SEEDS])
    count = standard.size
    assert count == len(SEEDS) * len(PROMPTS) * G * T
    assert abs(standard.mean()) < 4 / np.sqrt(count) + size
    assert abs(standard.std() - 1) < 4 / np.sqrt(2 * count) + size / 2


def test_noise_on_logits_comes_again_with_its_key_and_with_no_other():
    rollout = rollout_of(logit_noise=0.05)
    np.testing.assert_allclose(scored(rollout, logit_noise=0.05), rollout.rollout_logps, atol=1e-5)
    for other in (scored(rollout), scored(rollout, seed=2, logit_noise=0.05)):
        assert np.median(np.abs(other - rollout.rollout_logps)) > 0.02


def test_noise_on_weights_is_of_the_version():
    rollout = rollout_of(weight_noise=0.02, version=1)
    np.testing.assert_allclose(scored(rollout, weight_noise=0.02, version=1), rollout.rollout_logps, atol=1e-5)
    for other in (scored(rollout, version=1), scored(rollout, weight_noise=0.02, version=2)):
        assert 1e-3 < np.median(np.abs(other - rollout.rollout_logps)) < 0.2


def test_masters_are_rounded_as_numpy_rounds_them_before_they_are_quantised():
    """Bit for bit what an engine without the knob makes of masters that were rounded on the host."""

    def rounded(path, leaf):
        name = path[-1].key
        return leaf if "norm" in name or name == "router" else np.asarray(leaf).astype(jnp.bfloat16).astype(np.float32)

    for config in (DENSE, EXPERTS):
        on_host = jax.tree_util.tree_map_with_path(rounded, masters(config))
        expected = engine_of("int8", config).sync(on_host, 7)
        found = params_of(engine_of("int8", config, mismatch=(("rounded_masters", True),)), config)
        jax.tree.map(np.testing.assert_array_equal, found.weights, expected.weights)
        plain = params_of(engine_of("int8", config), config)
        moved = jax.tree.map(lambda x, y: float(np.mean(np.asarray(x) != np.asarray(y))), plain, found)
        assert max(jax.tree.leaves(moved.weights)) > 0.1


@pytest.mark.parametrize("top_k", [0, 5])
def test_raw_log_probs_are_of_the_whole_softmax_at_temperature_one_and_samples_are_the_same(top_k):
    raw, plain = (
        sample(engine_of("float32", DENSE, mismatch=mismatch), temperature=0.5, top_k=top_k)
        for mismatch in ((("raw_logps", True),), ())
    )
    np.testing.assert_array_equal(raw.tokens, plain.tokens)
    np.testing.assert_array_equal(raw.candidate_tokens, plain.candidate_tokens)
    logits = np.asarray(logits_of(DENSE, masters(DENSE), raw.tokens, raw.attention_mask), np.float64)[:, P - 1 : -1]
    logits -= logits.max(axis=-1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    own = np.take_along_axis(logps, raw.tokens[:, P:, None], axis=-1)[..., 0]
    mask = raw.response_mask
    np.testing.assert_allclose(raw.rollout_logps[mask], own[mask], atol=1e-4)
    assert not raw.log_mass.any()
    assert np.abs(plain.rollout_logps - raw.rollout_logps)[mask].mean() > 0.1


# --- flips ---


@pytest.mark.parametrize("rate", [0.3, *(pytest.param(rate, marks=pytest.mark.slow) for rate in (0.0, 1.0))])
def test_experts_are_flipped_as_often_as_asked_and_the_last_choice_alone(rate):
    # what the first layer's router thinks does not depend on what was flipped, so one expert more can be asked of it
    wider = dataclasses.replace(EXPERTS, num_experts_per_tok=3)
    prefilled, decoded = slice(0, P - 1), slice(P - 1, None)

    def flips(rollout):
        ranked = np.asarray(trained_scores(wider, rollout).router.experts[0])
        chosen = rollout.experts[:, :, 0]
        fed = rollout.prompt_mask[:, :-1]
        np.testing.assert_array_equal(chosen[:, prefilled][fed], ranked[:, prefilled, :2][fed])
        np.testing.assert_array_equal(chosen[:, decoded, 0], ranked[:, decoded, 0])
        flipped = chosen[:, decoded, 1] == ranked[:, decoded, 2]
        np.testing.assert_array_equal(
            chosen[:, decoded, 1], np.where(flipped, ranked[:, decoded, 2], ranked[:, decoded, 1])
        )
        return flipped

    rollouts = [rollout_of(seed, EXPERTS, routing_flips=rate) for seed in SEEDS]
    flipped = np.concatenate([flips(rollout) for rollout in rollouts])
    assert flipped.size == len(SEEDS) * len(PROMPTS) * G * T
    assert stats.binomtest(int(flipped.sum()), flipped.size, rate).pvalue > 1e-3
    if rate == 0.3:
        # not the same tokens in both layers: were they, the second would be as likely to be natural where the first is
        replayed = np.asarray(trained_scores(EXPERTS, rollouts[0]).router.experts[1])
        natural = ~flipped[: len(replayed)]
        assert (rollouts[0].experts[:, decoded, 1] != replayed[:, decoded]).any(axis=-1)[natural].any()


def test_flips_make_a_gap_that_their_replay_closes_and_come_again_with_their_key():
    rollout = rollout_of(config=EXPERTS, routing_flips=0.3)
    np.testing.assert_allclose(scored(rollout, EXPERTS, routing_flips=0.3), rollout.rollout_logps, atol=1e-5)
    experts = np.moveaxis(rollout.experts, 2, 0).astype(np.int32)
    replayed = np.asarray(trained_scores(EXPERTS, rollout, experts=experts).logps)
    assert np.abs(replayed - rollout.rollout_logps).max() <= 1e-4
    for other in (
        np.asarray(trained_scores(EXPERTS, rollout).logps),
        scored(rollout, EXPERTS, seed=2, routing_flips=0.3),
    ):
        assert np.abs(other - rollout.rollout_logps).mean() > 0.01
