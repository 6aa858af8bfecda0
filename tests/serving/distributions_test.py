"""The sampler's whole distributions: what is read of a rollout, and the most probable tokens that it records."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from served import DENSE, MIXED, OTHER, PROMPTS, TEMPERATURE, G, P, T, engine_of, params_of, rollout_of, sample
from tiny import masters

from dcjax.models import forward, token_logps
from dcjax.models.layers import EXACT
from dcjax.serving import scoring
from dcjax.serving.scoring import read_hidden
from dcjax.sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.heavy

ONE = make_mesh(MeshConfig())
SLOW = pytest.mark.slow


def log_probs_of(reading, rollout):
    """Of all tokens, at the rollout's temperature, [N, T, V]."""
    logits = jax.vmap(lambda hidden: reading.head.logits(hidden, EXACT))(reading.hidden)
    return np.asarray(jax.nn.log_softmax(logits / rollout.temperature[:, None, None]))


def targets_of(rollout):
    return rollout.tokens[:, -rollout.response_mask.shape[1] :]


@pytest.mark.parametrize("format", ["float32", "int8", *(pytest.param(name, marks=SLOW) for name in ("int4", "fp8"))])
@pytest.mark.parametrize("config", [DENSE, pytest.param(MIXED, marks=SLOW), pytest.param(OTHER, marks=SLOW)])
def test_a_reading_is_of_the_distributions_that_were_sampled_from(format, config):
    engine, rollout = engine_of(format, config), rollout_of(format, config)
    reading = read_hidden(engine, params_of(engine, config), rollout, ONE)
    assert reading.hidden.shape == (len(rollout.tokens), T, config.hidden_size)
    assert reading.hidden.dtype == engine.format.activations
    found = np.take_along_axis(log_probs_of(reading, rollout), targets_of(rollout)[..., None], -1)[..., 0]
    mask = rollout.response_mask
    tolerance = 1e-5 if format == "float32" else 0.02
    np.testing.assert_allclose(found[mask], rollout.rollout_logps[mask], atol=tolerance)
    assert np.ptp(found[mask]) > 10 * tolerance


def test_a_reading_in_float32_is_the_trainers_forward():
    engine, rollout = engine_of("float32"), rollout_of("float32")
    found = log_probs_of(read_hidden(engine, params_of(engine), rollout, ONE), rollout)
    for row in range(0, len(found), 5):
        tokens = rollout.tokens[row : row + 1][:, rollout.attention_mask[row]]
        logits = forward(DENSE, masters(DENSE), tokens)[0] / TEMPERATURE
        length = int(rollout.response_mask[row].sum())
        expected = jax.nn.log_softmax(logits)[-length - 1 : -1]
        np.testing.assert_allclose(found[row, :length], expected, atol=2e-5)


@pytest.mark.parametrize("prefill_tokens", [P + T, 2 * (P + T) + 1, 8])
def test_however_many_rows_a_pass_takes_and_in_pieces(prefill_tokens):
    """Of 24 rows: one at a time, two, and each in four pieces."""
    engine, rollout = engine_of("float32"), rollout_of("float32")
    expected = read_hidden(engine, params_of(engine), rollout, ONE).hidden
    other = engine_of("float32", prefill_tokens=prefill_tokens)
    found = read_hidden(other, params_of(other), rollout, ONE).hidden
    mask = rollout.response_mask
    np.testing.assert_allclose(np.asarray(found)[mask], np.asarray(expected)[mask], atol=2e-5)


def test_its_program_can_be_compiled_before_there_is_a_rollout():
    engine = engine_of("float32")
    params = engine.compile_sync(_abstract(masters(DENSE)))
    compiled = scoring.lower_reading(engine, params, G * len(PROMPTS)).compile()
    assert compiled.memory_analysis().output_size_in_bytes >= G * len(PROMPTS) * T * DENSE.hidden_size * 4


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


HEAD = 5


@pytest.mark.parametrize("format", ["float32", pytest.param("int4", marks=SLOW)])
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_rollout_records_the_most_probable_tokens_that_could_be_drawn(format, top_k):
    engine = engine_of(format, records_head=HEAD)
    rollout = sample(engine, top_k=top_k)
    reading = read_hidden(engine, params_of(engine), rollout, ONE)
    log_q, mask = log_probs_of(reading, rollout), rollout.response_mask
    count = min(HEAD, top_k or HEAD)
    assert (rollout.sampler_tokens[mask][:, :count] >= 0).all() and (
        rollout.sampler_tokens[mask][:, count:] == -1
    ).all()
    assert (rollout.sampler_logps[mask][:, count:] == 0).all()
    held = rollout.sampler_logps[mask][:, :count]
    assert (np.diff(held, axis=-1) <= 0).all()
    own = np.take_along_axis(log_q[mask], rollout.sampler_tokens[mask][:, :count], -1)
    if top_k:
        own = own - np.log(np.exp(own).sum(-1, keepdims=True))
    tolerance = 1e-5 if format == "float32" else 0.02
    np.testing.assert_allclose(held, own, atol=tolerance)
    largest = -np.sort(-log_q[mask], axis=-1)[:, :count]
    whole = np.take_along_axis(log_q[mask], rollout.sampler_tokens[mask][:, :count], -1)
    np.testing.assert_allclose(whole, largest, atol=2 * tolerance)
    # the sampled token's own log-prob, where it is one of them
    place = rollout.sampler_tokens[mask] == targets_of(rollout)[mask][:, None]
    assert place.any(1).mean() > 0.5
    np.testing.assert_allclose(rollout.sampler_logps[mask][place], rollout.rollout_logps[mask][place.any(1)], atol=1e-6)


def test_it_samples_the_same_and_records_nothing_unless_asked():
    plain, rollout = sample(engine_of("float32")), sample(engine_of("float32", records_head=HEAD))
    np.testing.assert_array_equal(plain.tokens, rollout.tokens)
    assert plain.sampler_tokens is None and plain.sampler_logps is None and plain.sampler_hidden is None
    with pytest.raises(ValueError, match="records_head is 21; this engine takes 0 to 20"):
        engine_of("float32", records_head=DENSE.vocab_size + 1)


@pytest.mark.parametrize("chunk", [3, T])
@pytest.mark.parametrize("truncated", [False, True])
def test_the_trainers_head_sees_both_distributions(chunk, truncated):
    """A chunk of columns at a time, at the rollout's temperature and over the same candidates, in float64 by hand."""
    engine, rollout = engine_of("int8"), sample(engine_of("int8"), top_k=3 if truncated else 0)
    reading = read_hidden(engine, params_of(engine), rollout, ONE)
    config = dataclasses.replace(DENSE, head_chunk=chunk)

    def both(found):
        assert found.sampler_log_probs.shape[1] <= chunk
        return jnp.sum(jnp.exp(found.sampler_log_probs) * jnp.abs(found.log_probs), axis=-1)

    candidates = rollout.candidate_tokens if truncated else None
    scores = jax.jit(
        lambda params, reading: token_logps(
            config,
            params,
            rollout.tokens,
            rollout.attention_mask,
            response_length=T,
            temperature=rollout.temperature,
            candidate_tokens=candidates,
            quantities={"both": both},
            sampler_hidden=reading.hidden,
            sampler_head=reading.head,
        )
    )(masters(DENSE), reading)
    theirs = log_probs_of(reading, rollout).astype(np.float64)
    exact = engine_of("float32")
    ours = log_probs_of(read_hidden(exact, params_of(exact), rollout, ONE), rollout).astype(np.float64)
    for row, column in np.argwhere(rollout.response_mask)[::7]:
        kept = rollout.candidate_tokens[row, column] if truncated else np.arange(DENSE.vocab_size)
        p, q = (np.exp(x[row, column, kept[kept >= 0]]) for x in (ours, theirs))
        p, q = p / p.sum(), q / q.sum()
        expected = np.sum(q * np.abs(np.log(p)))
        np.testing.assert_allclose(scores.quantities["both"][row, column], expected, rtol=2e-4)
