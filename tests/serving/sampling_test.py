"""Truncated sampling against NumPy in float64, row by row."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dcjax.serving import sampling
from dcjax.serving.sampling import SamplingParams

ROWS, VOCAB, MOST = 3, 9, 4
ROUNDING = 1e-5
"""A share so close to top_p may fall on either side of it in float32."""


@functools.partial(jax.jit, static_argnames="max_candidates")
def distribution(logits, temperatures, top_ks, top_ps, *, max_candidates=0):
    params = SamplingParams(temperatures=temperatures, top_ks=top_ks, top_ps=top_ps)
    return sampling.distribution(logits, params, max_candidates=max_candidates)


log_probs = jax.jit(sampling.log_probs)
noise_of = jax.jit(sampling.gumbel_noise, static_argnums=2)
drawn_with = jax.jit(lambda drawn_from, noise: sampling.draw(drawn_from, noise=noise))


def of_rows(logits, temperatures, top_ks, top_ps, **options):
    """The distribution, from lists."""
    columns = (np.array(temperatures, np.float32), np.array(top_ks, np.int32), np.array(top_ps, np.float32))
    return distribution(np.array(logits, np.float32), *columns, **options)


def truncate(logits, temperature, top_k, top_p):
    """Probabilities of all tokens, the kept ones by falling probability, and the shares before each that top_p met.

    As Hugging Face's warpers one after the other: temperature, the k largest logits, then the tokens before which the
    others, renormalised, hold less than top_p. The lower id comes first of equal logits.
    """
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    left = p[order] / p[order].sum()
    before = np.concatenate([[0.0], np.cumsum(left)[:-1]])
    return p, order if top_p == 1 else order[before < top_p], before


LOGITS = st.lists(st.integers(-6, 6), min_size=VOCAB, max_size=VOCAB).map(lambda row: np.array(row) / 2)
ROW = st.tuples(
    LOGITS, st.sampled_from([0.0, 0.25, 0.7, 1.0, 3.0]), st.integers(0, VOCAB), st.floats(2**-20, 1, width=32)
)


@settings(max_examples=100)
@given(st.lists(ROW, min_size=ROWS, max_size=ROWS), st.sampled_from([0, MOST]), st.integers(0, VOCAB - 1))
def test_what_is_kept_and_how_much_it_held_is_that_of_numpy(rows, max_candidates, target):
    if max_candidates:
        # wider truncation is refused by the engine
        rows = [(logits, t, min(k, MOST) or (MOST if p < 1 else 0), p) for logits, t, k, p in rows]
    drawn_from = jax.device_get(of_rows(*zip(*rows, strict=True), max_candidates=max_candidates))
    logps = np.asarray(log_probs(drawn_from, np.full(ROWS, target)))
    for row, (logits, temperature, top_k, top_p) in enumerate(rows):
        if temperature == 0:
            assert drawn_from.greedy[row] and drawn_from.log_mass[row] == 0 and logps[row] == 0
            assert (drawn_from.candidate_tokens[row] == -1).all()
            continue
        p, kept, before = truncate(logits, temperature, top_k, top_p)
        assume(np.abs(before - top_p).min() > ROUNDING)
        is_cut = top_k > 0 or top_p < 1
        assert np.flatnonzero(np.isfinite(drawn_from.logits[row])).tolist() == sorted(kept)
        np.testing.assert_allclose(drawn_from.log_mass[row], np.log(p[kept].sum()) if is_cut else 0, atol=1e-5)
        expected = np.log(p[target] / p[kept].sum()) if target in kept else -np.inf
        np.testing.assert_allclose(logps[row], expected, atol=1e-4)
        assert drawn_from.candidate_tokens.shape == (ROWS, max_candidates)
        if max_candidates:
            recorded = kept.tolist() if is_cut else []
            assert drawn_from.candidate_tokens[row].tolist() == recorded + [-1] * (max_candidates - len(recorded))


def test_top_k_comes_before_top_p_by_hand():
    logits = np.log([[0.1, 0.4, 0.2, 0.3]] * 3)
    # of .4 and .3 the first is .57 of what is left; top-p .5 before top-k would have kept both
    drawn_from = of_rows(logits, [1, 1, 1], [2, 2, 0], [0.5, 0.6, 1], max_candidates=3)
    assert drawn_from.candidate_tokens.tolist() == [[1, -1, -1], [1, 3, -1], [-1, -1, -1]]
    np.testing.assert_allclose(drawn_from.log_mass, np.log([0.4, 0.7, 1]), atol=1e-6)
    np.testing.assert_allclose(np.exp(log_probs(drawn_from, np.full(3, 1))), [1, 4 / 7, 0.4], atol=1e-6)


@pytest.mark.parametrize("max_candidates", [0, 5])
def test_of_equal_logits_the_first_are_kept(max_candidates):
    drawn_from = of_rows(np.zeros((2, VOCAB)), [1, 0.5], [5, 5], [1, 0.5], max_candidates=max_candidates)
    kept = np.isfinite(np.asarray(drawn_from.logits))
    assert [np.flatnonzero(row).tolist() for row in kept] == [[0, 1, 2, 3, 4], [0, 1, 2]]


@pytest.mark.parametrize("max_candidates", [0, 5])
def test_a_top_p_of_almost_nothing_leaves_one_token_and_one_of_1_leaves_all(max_candidates):
    logits = np.random.default_rng(0).normal(size=(2, 1000))
    drawn_from = of_rows(logits, [1, 1], [5, 5], [1e-30, 1], max_candidates=max_candidates)
    assert np.isfinite(np.asarray(drawn_from.logits)).sum(axis=1).tolist() == [1, 5]
    best = logits[0].argmax()
    assert np.isfinite(np.asarray(drawn_from.logits)[0, best])
    shifted = logits[0] - logits[0].max()
    np.testing.assert_allclose(np.asarray(drawn_from.log_mass)[0], -np.log(np.exp(shifted).sum()), atol=1e-5)
    assert np.asarray(log_probs(drawn_from, np.full(2, best)))[0] == 0


def test_a_row_that_is_not_truncated_is_untouched_by_its_neighbours():
    logits = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    alone = jax.device_get(of_rows(logits[:1], [0.7], [0], [1]))
    beside = jax.device_get(of_rows(logits, [0.7, 0.7], [0, 3], [1, 0.5]))
    np.testing.assert_array_equal(alone.logits[0], beside.logits[0])
    assert np.isfinite(np.asarray(beside.logits[0])).all() and beside.log_mass[0] == 0


def test_rows_are_sorted_only_if_one_of_them_is_truncated():
    ones = np.ones(2, np.float32)
    program = str(jax.make_jaxpr(distribution)(np.zeros((2, 8), np.float32), ones, np.zeros(2, np.int32), ones))
    before, _, branches = program.partition("cond[")
    assert "top_k" in branches and "top_k[" not in before


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.125, 5, width=32))
def test_a_draw_comes_with_its_log_prob(seed, temperature):
    logits = np.random.default_rng(seed).normal(0, 3, (4, VOCAB)).astype(np.float32)
    keys = np.random.default_rng(seed).integers(0, 2**32, (4, 2), np.uint32)
    temperatures = np.array([temperature, 0.0, 1.0, temperature], np.float32)
    drawn_from = of_rows(logits, temperatures, [0, 4, 0, 0], [1, 0.5, 1, 1])
    noise = noise_of(keys, np.zeros(4, np.int32), VOCAB)
    tokens = np.asarray(drawn_with(drawn_from, noise))
    logps = np.asarray(log_probs(drawn_from, tokens))
    scaled = logits / np.where(temperatures == 0, 1, temperatures)[:, None].astype(np.float64)
    expected = scaled[np.arange(4), tokens] - np.log(np.exp(scaled).sum(1))
    np.testing.assert_allclose(logps[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-4, atol=1e-4)
    # with certainty, whatever else the row asks for
    assert tokens[1] == logits[1].argmax()
    assert logps[1] == 0


def test_each_token_of_a_request_is_drawn_anew():
    # a flat distribution: only the key decides
    keys = np.tile(np.asarray(jax.random.key_data(jax.random.key(0))), (64, 1))
    flat = of_rows(np.zeros((64, 16)), [1] * 64, [0] * 64, [1] * 64)

    def drawn(counts):
        return np.asarray(drawn_with(flat, noise_of(keys, counts, 16)))

    by_count = drawn(np.arange(64, dtype=np.int32))
    assert len(np.unique(by_count)) > 8
    assert np.unique(drawn(np.full(64, 3, np.int32))).tolist() == [int(by_count[3])]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("max_candidates", [0, 5])
def test_logits_that_are_no_numbers_have_no_log_probs(bad, everywhere, max_candidates):
    """As of a format that overflowed: a greedy row would say 0, as if it were certain."""
    logits = np.full((4, VOCAB), bad) if everywhere else np.where(np.arange(VOCAB) == 2, bad, np.zeros((4, VOCAB)))
    drawn_from = of_rows(logits, [0, 1, 1, 1], [0, 0, 5, 5], [1, 1, 1, 0.9], max_candidates=max_candidates)
    tokens = drawn_with(drawn_from, np.zeros((4, VOCAB), np.float32))
    assert not np.isfinite(log_probs(drawn_from, tokens)).any()
