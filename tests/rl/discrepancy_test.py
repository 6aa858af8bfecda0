import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcjax.rl import probability_difference

LOGPS = arrays(np.float32, (2, 3), elements=st.floats(-60, 0, width=32))


def delta(old, rollout):
    return np.asarray(probability_difference(old_logps=old, rollout_logps=rollout))


def test_by_hand():
    old, rollout = np.log(np.array([[0.5, 0.25, 1.0]], "f")), np.log(np.array([[0.25, 0.5, 1.0]], "f"))
    np.testing.assert_allclose(delta(old, rollout), [[0.25, 0.25, 0.0]], atol=1e-7)


def test_a_token_that_one_policy_excludes_counts_with_the_other_ones_probability():
    old, rollout = np.array([[-np.inf, 0.0, -np.inf]], "f"), np.array([[np.log(0.75), -np.inf, -np.inf]], "f")
    np.testing.assert_allclose(delta(old, rollout), [[0.75, 1.0, 0.0]], rtol=1e-6)


@given(LOGPS, LOGPS)
def test_it_is_symmetric_bounded_and_against_numpy(old, rollout):
    out = delta(old, rollout)
    np.testing.assert_array_equal(out, delta(rollout, old))
    assert (out >= 0).all()
    assert (out <= 1).all()
    np.testing.assert_allclose(out, np.abs(np.exp(old.astype("d")) - np.exp(rollout.astype("d"))), atol=2e-7)


@given(LOGPS)
def test_one_policy_has_no_gap_to_itself(logps):
    np.testing.assert_array_equal(delta(logps, logps), np.zeros_like(logps))


def test_it_cannot_be_called_by_position():
    logps = jnp.zeros((1, 1))
    with pytest.raises(TypeError):
        probability_difference(logps, logps)
