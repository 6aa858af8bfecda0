import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from hypothesis import given, settings
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

VALUES = arrays(np.float32, (4, 3), elements=st.floats(-100, 100, width=32))
MASKS = arrays(np.bool_, (4, 3))

REDUCTIONS = {"sum": masked_sum, "mean": masked_mean, "max": masked_max, "response_mean": response_mean}
AGGREGATIONS = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "seq_mean_token_sum_norm": seq_mean_token_sum_norm(10),
}
EACH = pytest.mark.parametrize("name", AGGREGATIONS)


@jit
def run(x, mask):
    """Every reduction to a scalar and every aggregation, in one program."""
    return {name: of(x, mask) for name, of in (REDUCTIONS | AGGREGATIONS).items()}


@jit
def gradients(x, mask):
    """Of every reduction, and of the total of every aggregation, to x."""
    return jax.jacrev(
        lambda x: {name: getattr(found, "total", found) for name, found in run.__wrapped__(x, mask).items()}
    )(x)


@jit
def along_axes(x, mask):
    return {axis: (masked_sum(x, mask, axis=axis), masked_mean(x, mask, axis=axis)) for axis in (0, 1)}


def test_reductions_by_hand():
    found, axes = run(X, MASK), along_axes(X, MASK)
    np.testing.assert_allclose(found["sum"], 23.0)
    np.testing.assert_allclose(axes[1][0], [6.0, 4.0, 13.0, 0.0])
    np.testing.assert_allclose(axes[0][0], [10.0, 2.0, 11.0])
    np.testing.assert_allclose(found["mean"], 23 / 6, rtol=1e-6)
    np.testing.assert_allclose(axes[1][1], [2.0, 4.0, 6.5, 0.0])
    np.testing.assert_allclose(found["max"], 8.0)


def test_the_mean_over_responses_weighs_responses_and_not_tokens():
    # (2 + 4 + 6.5) / 3 over the three responses that have a token; the token mean is 23 / 6
    np.testing.assert_allclose(run(X, MASK)["response_mean"], 12.5 / 3, rtol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_with_nothing_to_reduce_the_result_is_zero(name):
    assert float(run(X, NOTHING)[name]) == 0.0


@pytest.mark.parametrize("name", [name for name in [*REDUCTIONS, *AGGREGATIONS] if name != "max"])
def test_no_gradient_reaches_what_the_mask_hides(name):
    grad = np.asarray(gradients(X, MASK)[name])
    assert (grad[~MASK] == 0).all()
    assert (grad[MASK] > 0).all()
    np.testing.assert_array_equal(gradients(X, NOTHING)[name], np.zeros_like(X))


@settings(max_examples=40)
@given(VALUES, MASKS)
def test_reductions_against_loops(x, mask):
    rows = [[float(v) for v, kept in zip(*row, strict=True) if kept] for row in zip(x, mask, strict=True)]
    kept = [v for row in rows for v in row]
    means = [sum(row) / len(row) for row in rows if row]
    hidden = np.where(mask, x, NAN)
    close = {"rtol": 1e-4, "atol": 1e-3}
    found = run(hidden, mask)
    np.testing.assert_allclose(found["sum"], sum(kept), **close)
    np.testing.assert_allclose(found["mean"], sum(kept) / max(len(kept), 1), **close)
    np.testing.assert_allclose(found["response_mean"], sum(means) / max(len(means), 1), **close)
    np.testing.assert_allclose(run(np.abs(hidden), mask)["max"], max(map(abs, kept), default=0.0), **close)


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
    ours = run(X, MASK)[name]
    np.testing.assert_allclose(ours, (total, denominator), rtol=1e-6)
    assert ours.total.dtype == ours.denominator.dtype == jnp.float32


@EACH
def test_a_loss_of_nothing_is_zero_over_zero(name):
    assert [float(part) for part in run(X, NOTHING)[name]] == [0.0, 0.0]


def test_rows_without_a_token_change_nothing():
    jax.tree.map(np.testing.assert_array_equal, run(X, MASK), run(X[:3], MASK[:3]))


@settings(max_examples=40)
@given(x=VALUES, mask=MASKS)
def test_parts_of_a_loss_add_up_to_the_whole(x, mask):
    whole, *parts = (jax.device_get(run(x[rows], mask[rows])) for rows in (slice(None), slice(2), slice(2, None)))
    for name in AGGREGATIONS:
        np.testing.assert_allclose(sum(p[name].total for p in parts), whole[name].total, rtol=1e-4, atol=1e-3)
        assert float(sum(part[name].denominator for part in parts)) == float(whole[name].denominator)


@EACH
def test_losses_are_summed_in_float32_or_wider(name):
    # 256 and 1 do not add up in bfloat16
    x = np.array([[256.0, 1.0, 0.0]] * 4, np.float32)
    mask = np.ones((4, 3), bool)
    total, denominator = run(x.astype(jnp.bfloat16), mask)[name]
    assert total.dtype == denominator.dtype == jnp.float32
    np.testing.assert_array_equal(total, run(x, mask)[name].total)
    with jax.enable_x64(True):
        widest = jax.eval_shape(AGGREGATIONS[name], X.astype(np.float64), MASK)
        assert {part.dtype for part in widest} == {np.dtype(np.float64)}


@settings(max_examples=40)
@given(VALUES, MASKS)
def test_on_responses_of_one_length_all_losses_are_the_token_mean_scaled(x, mask):
    mask = np.broadcast_to(mask[:1], mask.shape)
    length = max(mask[0].sum(), 1)
    found = jax.device_get(run(x, mask))
    means = {name: found[name].total / max(found[name].denominator, 1) for name in AGGREGATIONS}
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(means["seq_mean_token_mean"], means["token_mean"], **close)
    np.testing.assert_allclose(means["seq_mean_token_sum"], means["token_mean"] * length, **close)
    np.testing.assert_allclose(means["seq_mean_token_sum_norm"], means["token_mean"] * length / 10, **close)


def test_a_horizon_is_a_length():
    with pytest.raises(ValueError, match="horizon is 0; it must be at least 1 token"):
        seq_mean_token_sum_norm(0)
