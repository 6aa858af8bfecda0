"""Teacher forcing through the decode path against what the engine itself said, in every format."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcjax.models import ModelConfig, init_params
from dcjax.serving import Qwen3Engine
from dcjax.serving.quantize import formats
from dcjax.serving.rollout import sample_responses
from dcjax.serving.scoring import score_responses

DENSE = ModelConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, head_dim=8)
MOE = dataclasses.replace(DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
UNTIED = dataclasses.replace(DENSE, family="qwen2", tie_embeddings=False)
P, T, END, G, SLOTS = 6, 8, 3, 4, 8
PROMPTS = [[1, 2, 4], [5], [6, 7, 8, 9, 10, 1]]
TEMPERATURE, KEY = 0.8, jax.random.key(1)


@functools.cache
def masters_of(config):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        return jnp.array(1 + 0.1 * x if "norm" in path[-1].key else x * leaf.shape[-1] ** -0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_params(config, jax.random.key(0))))


@functools.cache
def served(format, config=DENSE, slots=SLOTS, **changes):
    """An engine and the weights it serves."""
    sizes = {"max_prompt_length": P, "max_response_length": T, "end_token": END, "steps_per_call": 4}
    engine = Qwen3Engine(config, format=format, slots=slots, **sizes, **changes)
    return engine, engine.sync(masters_of(config), 7)


@functools.cache
def rollout_of(format, config=DENSE, **changes):
    settings = {"samples_per_prompt": G, "temperature": TEMPERATURE, "key": KEY}
    return sample_responses(*served(format, config, **changes), PROMPTS, **settings)


def assert_scored_as_sampled(format, config=DENSE, **changes):
    rollout = rollout_of(format, config, **changes)
    scored = score_responses(*served(format, config, **changes), rollout, key=KEY)
    assert scored.residuals is None
    real = rollout.response_mask
    # both ends of some responses: the first token, and the end token
    assert real[:, 0].all() and rollout.finished.any()
    assert (scored.logps[~real] == 0).all()
    # prompts are prefilled beside others: in 16 bits a sum may round the other way, and a scale with it
    tolerance = 1e-5 if format == "float32" and changes.get("kv_cache", "auto") == "auto" else 0.02
    assert np.abs(scored.logps - rollout.rollout_logps)[real].max() <= tolerance
    shifted = np.roll(scored.logps, 1, axis=1)
    assert np.abs(shifted - rollout.rollout_logps)[real].max() > 10 * tolerance


SELDOM = ("fp16", "int8_weight_only", "fp8_weight_only")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in formats]
)
def test_in_every_format_log_probs_are_those_of_its_own_decode_path(name):
    assert_scored_as_sampled(name)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_experts_are_scored_as_they_were_sampled(name):
    assert_scored_as_sampled(name, MOE)


def test_so_are_other_architectures():
    assert_scored_as_sampled("fp8", UNTIED)


@pytest.mark.parametrize("kv_cache", [pytest.param("fp16", marks=pytest.mark.slow), "int8", "fp8"])
def test_and_other_caches(kv_cache):
    assert_scored_as_sampled("float32", kv_cache=kv_cache)
    # the cache alone makes a gap
    assert not np.array_equal(
        rollout_of("float32", kv_cache=kv_cache).rollout_logps, rollout_of("float32").rollout_logps
    )


def test_the_formats_are_further_from_the_masters_the_narrower_they_are():
    rollout = rollout_of("float32")

    def gap(name):
        logps = score_responses(*served(name), rollout, key=KEY).logps
        return np.abs(np.exp(logps) - np.exp(rollout.rollout_logps))[rollout.response_mask].mean()

    gaps = [gap(name) for name in ("float32", "bf16", "int8", "fp8", "int4")]
    assert gaps == sorted(gaps) and gaps[0] < 1e-6 < 1e-4 < gaps[1]


def test_scores_do_not_depend_on_how_many_are_scored_at_once():
    rollout = rollout_of("float32")
    scored = score_responses(*served("float32", slots=5), rollout, key=KEY)
    np.testing.assert_allclose(scored.logps, rollout.rollout_logps, atol=1e-5)


def test_the_last_residual_leads_to_the_logits_that_were_drawn_from():
    rollout, (engine, params) = rollout_of("float32"), served("float32")
    scored = score_responses(engine, params, rollout, key=KEY, keeps_residuals=True)
    layers, real = scored.residuals, rollout.response_mask
    assert layers.shape == (*real.shape, DENSE.num_layers, DENSE.hidden_size)
    x = np.float64(layers[..., -1, :])
    weights = jax.device_get(masters_of(DENSE))
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + DENSE.rms_norm_eps) * weights["norm"]
    logits = normed @ weights["embed_tokens"].T / TEMPERATURE
    logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    own = np.take_along_axis(logps, rollout.tokens[:, P:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(own[real], rollout.rollout_logps[real], atol=1e-4)


def test_scores_of_a_truncated_distribution_are_the_whole_ones_over_what_is_left():
    rollout, (engine, params) = rollout_of("float32"), served("float32")
    real = rollout.response_mask
    cut = score_responses(engine, params, rollout, key=KEY, top_k=5).logps[real]
    whole = rollout.rollout_logps[real]
    inside = np.isfinite(cut)
    # a token that could not be drawn has no probability
    assert 0 < (~inside).sum() < inside.sum() and (cut[~inside] == -np.inf).all()
    assert (cut[inside] > whole[inside]).all()
    narrower = score_responses(engine, params, rollout, key=KEY, top_k=5, top_p=0.5).logps[real]
    assert (narrower == -np.inf).sum() > (~inside).sum()
    assert (narrower[np.isfinite(narrower)] >= cut[np.isfinite(narrower)] - 1e-6).all()
