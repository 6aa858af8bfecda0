"""Token log-probs against NumPy on whole logits, and how little memory they take."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiling import jit
from tiny import masters

from dcjax.models import abstract_params, forward, token_logps

pytestmark = pytest.mark.heavy

# one layer, laid out straight: whatever is scored in one program then shares one pass through it
SMALL = dataclasses.replace(tiny.DENSE, num_layers=1, remat="none")
MOE = dataclasses.replace(tiny.EXPERTS, num_layers=1, remat="none")
UNTIED = dataclasses.replace(SMALL, tie_embeddings=False)
B, S, T = 4, 12, 7
TEMPERATURE = np.array([1.0, 0.3, 0.7, 2.5], np.float32)

logits_of = jit(forward, static_argnums=0)
scores_of = jit(token_logps, static_argnums=0, static_argnames="response_length")


def in_chunks(config, chunk, *args, **kwargs):
    """Scores of T tokens whose logits exist for `chunk` columns at a time."""
    config = dataclasses.replace(config, head_chunk=chunk)
    return token_logps(config, *args, response_length=T, temperature=TEMPERATURE, **kwargs)


def random_tokens(*shape):
    return np.random.default_rng(0).integers(0, SMALL.vocab_size, shape).astype(np.int32)


def ragged_mask():
    mask = np.ones((B, S), bool)
    mask[1, :2] = mask[3, -2:] = False
    return mask


SUPPORT = 5


def random_support():
    """Of each response token some of the vocabulary with the token itself, or nothing, which is all of it."""
    rng, targets = np.random.default_rng(3), random_tokens(B, S)[:, -T:]
    candidate_tokens = np.full((B, T, SUPPORT), -1, np.int32)
    for row, column in np.ndindex(B, T):
        others = rng.permutation(np.setdiff1d(np.arange(SMALL.vocab_size), targets[row, column]))
        count = rng.integers(0, SUPPORT)
        chosen = np.append(others[:count], targets[row, column]) if rng.random() < 0.8 else []
        candidate_tokens[row, column, : len(chosen)] = rng.permutation(chosen)
    return candidate_tokens


def log_softmax(logits):
    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def at_tokens(values, tokens):
    return np.take_along_axis(values, tokens[..., None], -1)[..., 0]


CHUNKS = [1, 2, 3, 6, 7, 512]


@jit
def scores_by_chunk(params, candidate_tokens):
    """Of whole distributions in all CHUNKS, and of supported ones in two."""
    given = params, random_tokens(B, S), ragged_mask()
    whole = {chunk: in_chunks(SMALL, chunk, *given) for chunk in CHUNKS}
    return whole, {chunk: in_chunks(SMALL, chunk, *given, candidate_tokens=candidate_tokens) for chunk in (2, T)}


@functools.cache
def distribution_of(config):
    """Log-probs of the whole vocabulary at the response's columns, and which tokens are real."""
    mask = ragged_mask()
    logits = np.asarray(logits_of(config, masters(config), random_tokens(B, S), mask), np.float64)
    return log_softmax(logits[:, -T - 1 : -1] / TEMPERATURE[:, None, None]), mask[:, -T:]


def assert_scored(scores, config):
    distribution, real = distribution_of(config)
    tokens = random_tokens(B, S)[:, -T:]
    np.testing.assert_allclose(scores.logps[real], at_tokens(distribution, tokens)[real], atol=2e-5)
    np.testing.assert_allclose(scores.entropy[real], -(np.exp(distribution) * distribution).sum(-1)[real], atol=2e-5)
    assert scores.logps.dtype == scores.entropy.dtype == jnp.float32
    assert np.isfinite(scores.logps).all()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_log_probs_and_entropies_against_numpy_whatever_the_chunks(chunk):
    assert_scored(scores_by_chunk(masters(SMALL), random_support())[0][chunk], SMALL)


def test_gradients_do_not_depend_on_the_chunks():
    tokens, mask = random_tokens(B, S), ragged_mask()
    weights = np.random.default_rng(1).normal(size=(2, B, T)).astype(np.float32) * mask[:, -T:]

    def loss(params, chunk):
        scores = in_chunks(SMALL, chunk, params, tokens, mask)
        return jnp.sum(scores.logps * weights[0] + scores.entropy * weights[1])

    @jit
    def gradients(params):
        return [jax.grad(loss)(params, chunk) for chunk in (T, 1, 3)]

    whole, *chunked = gradients(masters(SMALL))
    for grads in chunked:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, whole)


def collision(distributions):
    """Σ_v p_v²: the probability that two samples are equal, which depends on the whole distribution."""
    return jnp.sum(jnp.exp(2 * distributions.log_probs), axis=-1)


def rank(distributions):
    """How many tokens are more probable than the one that was sampled, of those that could be drawn."""
    own = jnp.take_along_axis(distributions.log_probs, distributions.targets[..., None], axis=-1)
    return jnp.sum(distributions.log_probs > own, axis=-1).astype(jnp.float32)


QUANTITIES = {"collision": collision, "rank": rank}


@pytest.mark.parametrize("restricted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_quantities_of_whole_distributions_against_numpy_whatever_the_chunks(restricted):
    candidates = random_support() if restricted else None

    @jit
    def run(params):
        def loss(params, chunk):
            given = params, random_tokens(B, S), ragged_mask()
            scores = in_chunks(SMALL, chunk, *given, candidate_tokens=candidates, quantities=QUANTITIES)
            return jnp.sum(jnp.where(real, scores.quantities["collision"], 0)), scores.quantities

        return [jax.grad(loss, has_aux=True)(params, chunk) for chunk in (T, 3)]

    distribution, real = distribution_of(SMALL)
    (whole, computed), (chunked, computed_in_chunks) = run(masters(SMALL))
    if restricted:
        kept = np.zeros(distribution.shape, bool)
        for row, column in np.ndindex(B, T):
            kept[row, column, candidates[row, column][candidates[row, column] >= 0]] = True
        kept |= (candidates < 0).all(-1, keepdims=True)
        distribution = log_softmax(np.where(kept, distribution, -np.inf))
    own = at_tokens(distribution, random_tokens(B, S)[:, -T:])[..., None]
    for found in (computed, computed_in_chunks):
        np.testing.assert_allclose(found["collision"][real], np.exp(2 * distribution).sum(-1)[real], atol=2e-5)
        np.testing.assert_array_equal(found["rank"][real], (distribution > own).sum(-1)[real])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, chunked)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole)) > 1e-3


@pytest.mark.parametrize("quantities", [{}, QUANTITIES])
def test_no_array_holds_the_logits_of_more_columns_than_a_chunk(quantities):
    config = dataclasses.replace(SMALL, vocab_size=1009, hidden_size=16, head_chunk=4)

    def loss(params, tokens):
        scores = token_logps(
            config, params, tokens, response_length=32, temperature=np.ones(2, np.float32), quantities=quantities
        )
        return jnp.sum(scores.logps) + sum(map(jnp.sum, scores.quantities.values()))

    def most_columns(config_of_loss):
        arguments = abstract_params(config), jax.ShapeDtypeStruct((2, 40), jnp.int32)
        program = jax.jit(jax.grad(config_of_loss)).lower(*arguments).as_text()
        shapes = [tuple(map(int, shape.split("x"))) for shape in re.findall(r"tensor<([\dx]+)x[a-z]\w+>", program)]
        # of arrays with the vocabulary as an axis, but for the head itself and its gradient
        return max(np.prod(shape) // 1009 for shape in shapes if 1009 in shape and config.hidden_size not in shape)

    assert most_columns(loss) == 2 * 4
    config = dataclasses.replace(config, head_chunk=32)
    assert most_columns(loss) == 2 * 32


def test_the_first_response_token_is_predicted_by_the_last_of_the_prompt():
    tokens, params, mask = random_tokens(B, S), masters(SMALL), np.ones((B, S), bool)
    scores = scores_of(SMALL, params, tokens, response_length=S - 1, temperature=np.ones(B, "f"))
    distribution = log_softmax(logits_of(SMALL, params, tokens, mask))
    np.testing.assert_allclose(scores.logps, at_tokens(distribution[:, :-1], tokens[:, 1:]), atol=2e-5)


def test_packed_sequences_are_scored_as_rows_of_their_own():
    tokens, params, ones = random_tokens(B, S), masters(SMALL), np.ones(B, np.float32)
    segments = np.repeat([[1] * 4 + [2] * (S - 4)], B, axis=0)
    packed = scores_of(SMALL, params, tokens, segment_ids=segments, response_length=S - 1, temperature=ones).logps
    first, second = (
        scores_of(SMALL, params, own, response_length=S - 1, temperature=ones).logps
        for own in (tokens, np.roll(tokens, -4, axis=1))
    )
    np.testing.assert_allclose(packed[:, :3], first[:, :3], atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:], second[:, : S - 5], atol=1e-5)


def test_experts_come_back_and_are_replayed():
    tokens, mask, params = random_tokens(B, S), ragged_mask(), masters(MOE)
    arguments = {"response_length": T, "temperature": TEMPERATURE}
    scores = scores_of(MOE, params, tokens, mask, **arguments)
    assert_scored(scores, MOE)
    assert scores.router.experts.shape == (1, B, S - 1, 2)
    again = scores_of(MOE, params, tokens, mask, experts=scores.router.experts, **arguments)
    np.testing.assert_allclose(again.logps, scores.logps, atol=1e-6)
    others = (np.asarray(scores.router.experts) + 1) % 4
    assert np.abs(scores_of(MOE, params, tokens, mask, experts=others, **arguments).logps - scores.logps).max() > 1e-2


@pytest.mark.parametrize("length", [0, S])
def test_a_response_must_leave_a_token_to_predict_it_from(length):
    with pytest.raises(ValueError, match=f"response_length is {length}; of {S} tokens it must leave at least one"):
        token_logps(SMALL, masters(SMALL), random_tokens(B, S), response_length=length, temperature=TEMPERATURE)


@pytest.mark.parametrize("chunk", [2, T])
def test_what_the_sampler_could_draw_is_all_that_is_scored(chunk):
    tokens, mask, candidate_tokens = random_tokens(B, S), ragged_mask(), random_support()
    scores = scores_by_chunk(masters(SMALL), candidate_tokens)[1][chunk]
    distribution, _ = distribution_of(SMALL)
    sizes = set()
    for row, column in np.argwhere(mask[:, -T:]):
        kept = candidate_tokens[row, column][candidate_tokens[row, column] >= 0]
        sizes.add(len(kept))
        kept = kept if len(kept) else np.arange(SMALL.vocab_size)
        left = log_softmax(distribution[row, column, kept])
        np.testing.assert_allclose(scores.logps[row, column], left[kept == tokens[row, S - T + column]][0], atol=2e-5)
        np.testing.assert_allclose(scores.entropy[row, column], -(np.exp(left) * left).sum(), atol=2e-5)
    # one token is certain, and none stands for all
    assert {0, 1, SUPPORT} <= sizes


def test_without_a_row_that_was_truncated_a_support_changes_nothing():
    whole, empty = scores_by_chunk(masters(SMALL, seed=1), np.full((B, T, SUPPORT), -1, np.int32))
    np.testing.assert_allclose(empty[T].logps, whole[T].logps, rtol=1e-6)
    # an entropy is a difference of numbers of up to 3, whose roundings a small entropy keeps: on some CPUs 4e-7 of .3
    np.testing.assert_allclose(empty[T].entropy, whole[T].entropy, rtol=0, atol=1e-6)


@jit
@functools.partial(jax.grad, has_aux=True)
def gradient(params, candidate_tokens, counted):
    """Of the sum of what is counted, and the scores."""
    scores = in_chunks(UNTIED, T, params, random_tokens(B, S), candidate_tokens=candidate_tokens)
    return jnp.sum(jnp.where(counted, scores.logps + scores.entropy, 0)), scores


def test_entropy_of_a_flat_head_is_the_log_of_the_vocabulary():
    params = masters(UNTIED)
    params = params | {"lm_head": np.zeros(params["lm_head"].shape, np.float32)}
    _, scores = gradient(params, np.full((B, T, SUPPORT), -1, np.int32), np.ones((B, T), bool))
    np.testing.assert_allclose(scores.entropy, np.full((B, T), np.log(UNTIED.vocab_size)), rtol=1e-6)
    np.testing.assert_allclose(scores.logps, np.full((B, T), -np.log(UNTIED.vocab_size)), rtol=1e-6)


def test_gradients_through_a_support_are_those_of_the_logits_that_are_left():
    """A token outside has no gradient, one that could not be drawn at all a finite log-prob and finite gradients."""
    tokens, params, candidate_tokens = random_tokens(B, S), masters(UNTIED), random_support()
    candidate_tokens[0, 0] = [(tokens[0, S - T] + 1) % UNTIED.vocab_size, -1, -1, -1, -1]
    grads, scores = gradient(params, candidate_tokens, np.arange(B * T).reshape(B, T) == 1)
    kept = candidate_tokens[0, 1][candidate_tokens[0, 1] >= 0]
    assert 1 < len(kept) < UNTIED.vocab_size
    assert np.flatnonzero(np.abs(grads["lm_head"]).max(axis=1)).tolist() == sorted(kept)
    assert np.isfinite(scores.logps).all() and scores.logps[0, 0] < -1e30
    grads, _ = gradient(params, candidate_tokens, np.ones((B, T), bool))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
