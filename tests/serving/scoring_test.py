"""Teacher forcing through the decode path against what the engine itself said, in every format."""

import jax
import numpy as np
import pytest
from served import DENSE, MIXED, OTHER, TEMPERATURE, P, engine_of, params_of, rollout_of, sample
from tiny import masters

from dcjax.serving.formats import formats
from dcjax.serving.scoring import read_responses, score_responses

pytestmark = pytest.mark.heavy

KEY = jax.random.key(1)
SLOW = pytest.mark.slow


def scored_by(engine, rollout, config=DENSE, **settings):
    return score_responses(engine, params_of(engine, config), rollout, key=KEY, **settings)


def assert_scored_as_sampled(format, config=DENSE, **changes):
    engine = engine_of(format, config, **changes)
    rollout = sample(engine, config) if changes else rollout_of(format, config)
    scored = scored_by(engine, rollout, config)
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


EVERY_DAY = ("float32", "int8")


@pytest.mark.parametrize("name", [name if name in EVERY_DAY else pytest.param(name, marks=SLOW) for name in formats])
def test_in_every_format_log_probs_are_those_of_its_own_decode_path(name):
    assert_scored_as_sampled(name)


@pytest.mark.parametrize("name", ["int8", pytest.param("int4", marks=SLOW)])
def test_experts_are_scored_as_they_were_sampled(name):
    assert_scored_as_sampled(name, MIXED)


@pytest.mark.parametrize("name", ["float32", pytest.param("fp8", marks=SLOW)])
def test_so_are_other_architectures(name):
    assert_scored_as_sampled(name, OTHER)


@SLOW
@pytest.mark.parametrize("kv_cache", ["fp16", "int8", "fp8"])
def test_and_other_caches(kv_cache):
    assert_scored_as_sampled("float32", kv_cache=kv_cache)


@pytest.mark.parametrize("kv_cache", [pytest.param("fp16", marks=SLOW), "int8", pytest.param("fp8", marks=SLOW)])
def test_a_narrow_cache_alone_makes_a_gap(kv_cache):
    rollout, engine = rollout_of(), engine_of("float32", kv_cache=kv_cache)
    gap = np.abs(np.exp(scored_by(engine, rollout).logps) - np.exp(rollout.rollout_logps))[rollout.response_mask]
    assert 1e-5 < gap.mean() < 0.02


@pytest.mark.parametrize(
    "names", [("float32", "int8", "int4"), pytest.param(("float32", "bf16", "int8", "fp8", "int4"), marks=SLOW)]
)
def test_the_formats_are_further_from_the_masters_the_narrower_they_are(names):
    rollout = rollout_of()

    def gap(name):
        logps = scored_by(engine_of(name), rollout).logps
        return np.abs(np.exp(logps) - np.exp(rollout.rollout_logps))[rollout.response_mask].mean()

    gaps = [gap(name) for name in names]
    assert gaps == sorted(gaps) and gaps[0] < 1e-6 < 1e-4 < gaps[1]


def test_scores_do_not_depend_on_how_many_are_scored_at_once():
    rollout = rollout_of()
    scored = scored_by(engine_of("float32", slots=5), rollout)
    np.testing.assert_allclose(scored.logps, rollout.rollout_logps, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "prefill_tokens"),
    # a pass of many sequences, of a few, and of one; layers are looped over, and with experts they are not
    [
        pytest.param("float32", DENSE, 4096, marks=SLOW),
        pytest.param("float32", MIXED, 100, marks=SLOW),
        ("int8", DENSE, 1),
        pytest.param("fp8", MIXED, 4096, marks=SLOW),
    ],
)
def test_one_pass_over_whole_sequences_gives_the_log_probs_of_one_token_after_another(name, config, prefill_tokens):
    engine, rollout = engine_of(name, config, prefill_tokens=prefill_tokens), rollout_of("float32", config)
    read, scored = read_responses(engine, params_of(engine, config), rollout), scored_by(engine, rollout, config).logps
    real = rollout.response_mask
    assert (read[~real] == 0).all()
    # where a sum rounds otherwise, so may a number that is quantised
    tolerance = {"float32": 1e-5, "int8": 0.02, "fp8": 0.3}[name]
    assert np.abs(read - scored)[real].max() <= tolerance
    assert np.abs(np.roll(read, 1, axis=1) - scored)[real].max() > 3 * tolerance


def test_the_last_residual_leads_to_the_logits_that_were_drawn_from():
    rollout, engine = rollout_of(), engine_of()
    layers = scored_by(engine, rollout, keeps_residuals=True).residuals
    # of as many as are decoded at once
    tokens, real, expected = (
        values[: engine.slots] for values in (rollout.tokens, rollout.response_mask, rollout.rollout_logps)
    )
    assert layers.shape == (*real.shape, DENSE.num_layers, DENSE.hidden_size)
    x = np.float64(layers[..., -1, :])
    weights = jax.device_get(masters(DENSE))
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + DENSE.rms_norm_eps) * weights["norm"]
    logits = normed @ weights["embed_tokens"].T / TEMPERATURE
    logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    own = np.take_along_axis(logps, tokens[:, P:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(own[real], expected[real], atol=1e-4)


def test_scores_of_a_truncated_distribution_are_the_whole_ones_over_what_is_left():
    rollout, engine = rollout_of(), engine_of()
    real = rollout.response_mask
    cut = scored_by(engine, rollout, top_k=5).logps[real]
    whole = rollout.rollout_logps[real]
    inside = np.isfinite(cut)
    # a token that could not be drawn has no probability
    assert 0 < (~inside).sum() < inside.sum() and (cut[~inside] == -np.inf).all()
    assert (cut[inside] > whole[inside]).all()
    narrower = scored_by(engine, rollout, top_k=5, top_p=0.5).logps[real]
    assert (narrower == -np.inf).sum() > (~inside).sum()
    assert (narrower[np.isfinite(narrower)] >= cut[np.isfinite(narrower)] - 1e-6).all()
