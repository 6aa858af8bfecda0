import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcjax.rl.masked import (
    masked_max,
    masked_mean,
    masked_sum,
    response_mean,
    seq_mean_token_mean,
    seq_mean_token_sum,
    seq_mean_token_sum_norm,
    token_mean,
)

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


AGGREGATIONS = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "seq_mean_token_sum_norm": seq_mean_token_sum_norm(10),
}
EACH = pytest.mark.parametrize("aggregate", AGGREGATIONS.values(), ids=AGGREGATIONS)


@pytest.mark.parametrize(
    ("name", "total", "denominator"),
    # rows sum to 6, 4 and 13, with means 2, 4 and 6.5; the fourth has no token
    [
        ("token_mean", 23.0, 6.0),
        ("seq_mean_token_mean", 12.5, 3.0),
        ("seq_mean_token_sum", 23.0, 3.0),
        ("seq_mean_token_sum_norm", 2.3, 3.0),
    ],
)
def test_aggregations_by_hand(name, total, denominator):
    ours = AGGREGATIONS[name](X, MASK)
    np.testing.assert_allclose(ours, (total, denominator), rtol=1e-6)
    assert ours.total.dtype == ours.denominator.dtype == jnp.float32


@EACH
def test_a_loss_of_nothing_is_zero_over_zero(aggregate):
    assert [float(part) for part in aggregate(X, NOTHING)] == [0.0, 0.0]
    np.testing.assert_array_equal(jax.grad(lambda x: aggregate(x, NOTHING).total)(jnp.array(X)), np.zeros_like(X))


@EACH
def test_no_gradient_of_a_loss_reaches_what_the_mask_hides(aggregate):
    grad = np.asarray(jax.grad(lambda x: aggregate(x, MASK).total)(jnp.array(X)))
    assert (grad[~MASK] == 0).all()
    assert (grad[MASK] > 0).all()


@EACH
def test_rows_without_a_token_change_nothing(aggregate):
    np.testing.assert_array_equal(aggregate(X, MASK), aggregate(X[:3], MASK[:3]))


@EACH
@given(x=VALUES, mask=MASKS, cut=st.integers(0, 3))
def test_parts_of_a_loss_add_up_to_the_whole(aggregate, x, mask, cut):
    whole = aggregate(x, mask)
    parts = [aggregate(x[rows], mask[rows]) for rows in (slice(cut), slice(cut, None))]
    np.testing.assert_allclose(sum(part.total for part in parts), whole.total, rtol=1e-4, atol=1e-3)
    assert float(sum(part.denominator for part in parts)) == float(whole.denominator)


@EACH
def test_losses_are_summed_in_float32_or_wider(aggregate):
    # 256 and 1 do not add up in bfloat16
    x = jnp.array([[256.0, 1.0]], jnp.bfloat16)
    total, denominator = aggregate(x, np.ones((1, 2), bool))
    assert total.dtype == denominator.dtype == jnp.float32
    np.testing.assert_array_equal(total, aggregate(x.astype(jnp.float32), np.ones((1, 2), bool)).total)
    with jax.enable_x64(True):
        assert {part.dtype for part in aggregate(X.astype(np.float64), MASK)} == {np.dtype(np.float64)}


@given(VALUES, MASKS)
def test_on_responses_of_one_length_all_losses_are_the_token_mean_scaled(x, mask):
    mask = np.broadcast_to(mask[:1], mask.shape)
    length = max(mask[0].sum(), 1)
    means = {name: float(total / max(count, 1)) for name, (total, count) in run_all(x, mask).items()}
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(means["seq_mean_token_mean"], means["token_mean"], **close)
    np.testing.assert_allclose(means["seq_mean_token_sum"], means["token_mean"] * length, **close)
    np.testing.assert_allclose(means["seq_mean_token_sum_norm"], means["token_mean"] * length / 10, **close)


def run_all(x, mask):
    return {name: aggregate(x, mask) for name, aggregate in AGGREGATIONS.items()}


def test_a_horizon_is_a_length():
    with pytest.raises(ValueError, match="horizon is 0; it must be at least 1 token"):
        seq_mean_token_sum_norm(0)
