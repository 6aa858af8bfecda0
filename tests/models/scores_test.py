"""Token log-probs against NumPy on whole logits, and how little memory they take."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcjax.models import ModelConfig, abstract_params, forward, token_logps

SMALL = ModelConfig(vocab_size=17, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, head_dim=8)
MOE = dataclasses.replace(SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
B, S, T = 4, 12, 7
TEMPERATURE = np.array([1.0, 0.3, 0.7, 2.5], np.float32)

logits_of = jax.jit(forward, static_argnums=0)
scores_of = jax.jit(token_logps, static_argnums=0, static_argnames="response_length")


@functools.cache
def perturbed(config):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        return jnp.array(1 + 0.1 * x if "norm" in path[-1].key else x * leaf.shape[-1] ** -0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def random_tokens(*shape):
    return np.random.default_rng(0).integers(0, SMALL.vocab_size, shape).astype(np.int32)


def ragged_mask():
    mask = np.ones((B, S), bool)
    mask[1, :2] = mask[3, -2:] = False
    return mask


def log_softmax(logits):
    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def at_tokens(values, tokens):
    return np.take_along_axis(values, tokens[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7, 512])
@pytest.mark.parametrize("original", [SMALL, MOE], ids=["dense", "moe"])
def test_log_probs_and_entropies_against_numpy_whatever_the_chunks(original, chunk):
    config, tokens, mask = dataclasses.replace(original, head_chunk=chunk), random_tokens(B, S), ragged_mask()
    params = perturbed(original)
    scores = scores_of(config, params, tokens, mask, response_length=T, temperature=TEMPERATURE)
    logits = np.asarray(logits_of(original, params, tokens, mask), np.float64)
    distribution = log_softmax(logits[:, -T - 1 : -1] / TEMPERATURE[:, None, None])
    real = mask[:, -T:]
    np.testing.assert_allclose(scores.logps[real], at_tokens(distribution, tokens[:, -T:])[real], atol=2e-5)
    np.testing.assert_allclose(scores.entropy[real], -(np.exp(distribution) * distribution).sum(-1)[real], atol=2e-5)
    assert scores.logps.dtype == scores.entropy.dtype == jnp.float32
    assert np.isfinite(scores.logps).all()


def test_gradients_do_not_depend_on_the_chunks():
    tokens, mask, params = random_tokens(B, S), ragged_mask(), perturbed(SMALL)
    weights = np.random.default_rng(1).normal(size=(2, B, T)).astype(np.float32) * mask[:, -T:]

    def gradient(chunk):
        config = dataclasses.replace(SMALL, head_chunk=chunk)

        def loss(params):
            scores = token_logps(config, params, tokens, mask, response_length=T, temperature=TEMPERATURE)
            return jnp.sum(scores.logps * weights[0] + scores.entropy * weights[1])

        return jax.jit(jax.grad(loss))(params)

    whole = gradient(T)
    for chunk in (1, 3):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(chunk), whole)


def test_no_array_holds_the_logits_of_more_columns_than_a_chunk():
    config = dataclasses.replace(SMALL, vocab_size=1009, head_chunk=4)

    def loss(params, tokens):
        scores = token_logps(config, params, tokens, response_length=32, temperature=np.ones(2, np.float32))
        return jnp.sum(scores.logps)

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
    tokens, params = random_tokens(B, S), perturbed(SMALL)
    scores = scores_of(SMALL, params, tokens, response_length=S - 1, temperature=np.ones(B, "f"))
    distribution = log_softmax(logits_of(SMALL, params, tokens))
    np.testing.assert_allclose(scores.logps, at_tokens(distribution[:, :-1], tokens[:, 1:]), atol=2e-5)


def test_packed_sequences_are_scored_as_rows_of_their_own():
    tokens, params = random_tokens(2, 10), perturbed(SMALL)
    segments = np.repeat([[1] * 4 + [2] * 6], 2, axis=0)
    ones = np.ones(2, np.float32)
    packed = scores_of(SMALL, params, tokens, segment_ids=segments, response_length=9, temperature=ones).logps
    first = scores_of(SMALL, params, tokens[:, :4], response_length=3, temperature=ones).logps
    second = scores_of(SMALL, params, tokens[:, 4:], response_length=5, temperature=ones).logps
    np.testing.assert_allclose(packed[:, :3], first, atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:], second, atol=1e-5)


def test_experts_come_back_and_are_replayed():
    tokens, mask, params = random_tokens(B, S), ragged_mask(), perturbed(MOE)
    arguments = {"response_length": T, "temperature": TEMPERATURE}
    scores = scores_of(MOE, params, tokens, mask, **arguments)
    assert scores.router.experts.shape == (2, B, S - 1, 2)
    again = scores_of(MOE, params, tokens, mask, experts=scores.router.experts, **arguments)
    np.testing.assert_allclose(again.logps, scores.logps, atol=1e-6)
    others = (np.asarray(scores.router.experts) + 1) % 4
    assert np.abs(scores_of(MOE, params, tokens, mask, experts=others, **arguments).logps - scores.logps).max() > 1e-2


@pytest.mark.parametrize("length", [0, S])
def test_a_response_must_leave_a_token_to_predict_it_from(length):
    with pytest.raises(ValueError, match=f"response_length is {length}; of {S} tokens it must leave at least one"):
        token_logps(SMALL, perturbed(SMALL), random_tokens(B, S), response_length=length, temperature=TEMPERATURE)


def test_entropy_of_a_flat_head_is_the_log_of_the_vocabulary():
    config = dataclasses.replace(SMALL, tie_embeddings=False)
    params = perturbed(config)
    params = params | {"lm_head": jnp.zeros_like(params["lm_head"])}
    scores = scores_of(config, params, random_tokens(2, 6), response_length=3, temperature=np.array([0.5, 1], "f"))
    np.testing.assert_allclose(scores.entropy, np.full((2, 3), np.log(config.vocab_size)), rtol=1e-6)
    np.testing.assert_allclose(scores.logps, np.full((2, 3), -np.log(config.vocab_size)), rtol=1e-6)


SUPPORT = 5


def random_support():
    """Of each response token some of the vocabulary with the token itself, or nothing, which is all of it."""
    rng, targets = np.random.default_rng(3), random_tokens(B, S)[:, -T:]
    support = np.full((B, T, SUPPORT), -1, np.int32)
    for row, column in np.ndindex(B, T):
        others = rng.permutation(np.setdiff1d(np.arange(SMALL.vocab_size), targets[row, column]))
        count = rng.integers(0, SUPPORT)
        chosen = np.append(others[:count], targets[row, column]) if rng.random() < 0.8 else []
        support[row, column, : len(chosen)] = rng.permutation(chosen)
    return support


@pytest.mark.parametrize("chunk", [2, 7])
def test_what_the_sampler_could_draw_is_all_that_is_scored(chunk):
    tokens, mask, params, support = random_tokens(B, S), ragged_mask(), perturbed(SMALL), random_support()
    config, arguments = dataclasses.replace(SMALL, head_chunk=chunk), {"response_length": T, "temperature": TEMPERATURE}
    scores = scores_of(config, params, tokens, mask, support=support, **arguments)
    logits = np.asarray(logits_of(SMALL, params, tokens, mask), np.float64)[:, -T - 1 : -1] / TEMPERATURE[:, None, None]
    sizes = set()
    for row, column in np.argwhere(mask[:, -T:]):
        kept = support[row, column][support[row, column] >= 0]
        sizes.add(len(kept))
        kept = kept if len(kept) else np.arange(SMALL.vocab_size)
        left = log_softmax(logits[row, column, kept])
        np.testing.assert_allclose(scores.logps[row, column], left[kept == tokens[row, S - T + column]][0], atol=2e-5)
        np.testing.assert_allclose(scores.entropy[row, column], -(np.exp(left) * left).sum(), atol=2e-5)
    # one token is certain, and none stands for all
    assert {0, 1, SUPPORT} <= sizes


def test_without_a_row_that_was_truncated_a_support_changes_nothing():
    tokens, params = random_tokens(B, S), perturbed(SMALL)
    arguments = {"response_length": T, "temperature": TEMPERATURE}
    whole = scores_of(SMALL, params, tokens, **arguments)
    empty = scores_of(SMALL, params, tokens, support=np.full((B, T, SUPPORT), -1, np.int32), **arguments)
    np.testing.assert_allclose(empty.logps, whole.logps, rtol=1e-6)
    np.testing.assert_allclose(empty.entropy, whole.entropy, rtol=1e-6)


def test_gradients_through_a_support_are_those_of_the_logits_that_are_left():
    """A token outside has no gradient, one that could not be drawn at all a finite log-prob and finite gradients."""
    config = dataclasses.replace(SMALL, tie_embeddings=False)
    tokens, params, support = random_tokens(B, S), perturbed(config), random_support()
    support[0, 0] = [(tokens[0, S - T] + 1) % SMALL.vocab_size, -1, -1, -1, -1]

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, counted):
        scores = token_logps(config, params, tokens, response_length=T, temperature=TEMPERATURE, support=support)
        return jnp.sum(jnp.where(counted, scores.logps + scores.entropy, 0)), scores.logps

    grads, logps = gradient(params, np.arange(B * T).reshape(B, T) == 1)
    kept = support[0, 1][support[0, 1] >= 0]
    assert 1 < len(kept) < SMALL.vocab_size
    assert np.flatnonzero(np.abs(grads["lm_head"]).max(axis=1)).tolist() == sorted(kept)
    assert np.isfinite(logps).all() and logps[0, 0] < -1e30
    grads, _ = gradient(params, np.ones((B, T), bool))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
