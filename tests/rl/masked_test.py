import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcjax.rl.masked import masked_max, masked_mean, masked_sum, response_mean, token_mean

# one full row, a ragged one, a row with a hole, and an empty one; NaN and infinity wherever the mask hides them
NAN, INF = np.nan, np.inf
X = np.array([[1.0, 2.0, 3.0], [4.0, NAN, -INF], [5.0, INF, 8.0], [NAN, NAN, INF]], np.float32)
MASK = np.array([[1, 1, 1], [1, 0, 0], [1, 0, 1], [0, 0, 0]], bool)
NOTHING = np.zeros_like(MASK)

VALUES = arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32))
MASKS = arrays(np.bool_, (3, 4))


def test_reductions_by_hand():
    np.testing.assert_allclose(masked_sum(X, MASK), 23.0)
    np.testing.assert_allclose(masked_sum(X, MASK, axis=1), [6.0, 4.0, 13.0, 0.0])
    np.testing.assert_allclose(masked_sum(X, MASK, axis=0), [10.0, 2.0, 11.0])
    np.testing.assert_allclose(masked_mean(X, MASK), 23 / 6, rtol=1e-6)
    np.testing.assert_allclose(masked_mean(X, MASK, axis=1), [2.0, 4.0, 6.5, 0.0])
    np.testing.assert_allclose(masked_max(X, MASK), 8.0)


def test_the_mean_over_responses_weighs_responses_and_not_tokens():
    # (2 + 4 + 6.5) / 3 over the three responses that have a token; the token mean is 23 / 6
    np.testing.assert_allclose(response_mean(X, MASK), 12.5 / 3, rtol=1e-6)


def test_the_token_mean_keeps_sum_and_count_apart():
    total, denominator = token_mean(X, MASK)
    assert (float(total), float(denominator)) == (23.0, 6.0)
    assert total.dtype == denominator.dtype == jnp.float32


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, masked_max, response_mean])
def test_with_nothing_to_reduce_the_result_is_zero(reduce):
    assert float(reduce(X, NOTHING)) == 0.0


def test_token_sums_of_nothing_are_zero_over_zero():
    assert [float(part) for part in token_mean(X, NOTHING)] == [0.0, 0.0]


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, response_mean, lambda x, mask: token_mean(x, mask).total])
def test_no_gradient_reaches_what_the_mask_hides(reduce):
    grad = np.asarray(jax.grad(reduce)(jnp.array(X), MASK))
    assert (grad[~MASK] == 0).all()
    assert (grad[MASK] > 0).all()


@given(VALUES, MASKS)
def test_reductions_against_loops(x, mask):
    rows = [[float(v) for v, kept in zip(*row, strict=True) if kept] for row in zip(x, mask, strict=True)]
    kept = [v for row in rows for v in row]
    means = [sum(row) / len(row) for row in rows if row]
    hidden = np.where(mask, x, NAN)
    close = {"rtol": 1e-4, "atol": 1e-3}
    np.testing.assert_allclose(masked_sum(hidden, mask), sum(kept), **close)
    np.testing.assert_allclose(masked_mean(hidden, mask), sum(kept) / max(len(kept), 1), **close)
    np.testing.assert_allclose(response_mean(hidden, mask), sum(means) / max(len(means), 1), **close)
    np.testing.assert_allclose(masked_max(np.abs(hidden), mask), max(map(abs, kept), default=0.0), **close)


@given(VALUES, MASKS, st.integers(0, 3))
def test_parts_of_a_token_mean_add_up_to_the_whole(x, mask, cut):
    whole = token_mean(x, mask)
    parts = [token_mean(x[rows], mask[rows]) for rows in (slice(cut), slice(cut, None))]
    np.testing.assert_allclose(sum(part.total for part in parts), whole.total, rtol=1e-4, atol=1e-3)
    assert float(sum(part.denominator for part in parts)) == float(whole.denominator)
