import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcjax.rl.penalties import as_published, centred_on_response, gate, hinge, linear, penalize, shifted

A = np.array([[1.0, 1.0, -2.0], [0.5, 0.5, 0.5]], np.float32)
DELTA = np.array([[0.0, 0.25, 0.5], [1.0, 0.125, 0.0]], np.float32)


def test_the_penalty_by_hand():
    expected = [[1.0, 0.5, -3.0], [-1.5, 0.25, 0.5]]
    np.testing.assert_array_equal(penalize(A, DELTA, multiplier=2.0), expected)
    np.testing.assert_array_equal(penalize(A, DELTA, multiplier=jnp.float32(2.0)), expected)


def test_without_a_multiplier_advantages_are_untouched():
    np.testing.assert_array_equal(penalize(A, DELTA, multiplier=0.0), A)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (linear, [[0, 0.25, 0.5], [1, 0.125, 0]]),
        (shifted(0.25), [[-0.25, 0, 0.25], [0.75, -0.125, -0.25]]),
        (hinge(0.25), [[0, 0, 0.25], [0.75, 0, 0]]),
        # a token at the threshold is within it
        (gate(0.25), [[0, 0, 0.5], [1, 0, 0]]),
    ],
    ids=["linear", "shifted", "hinge", "gate"],
)
def test_shapes_by_hand(shape, expected):
    np.testing.assert_array_equal(shape(DELTA), expected)
    np.testing.assert_array_equal(penalize(A, DELTA, multiplier=4.0, shape=shape), A - 4 * np.array(expected))


def test_without_a_threshold_every_shape_is_linear():
    for shape in (shifted(0.0), hinge(0.0), gate(0.0)):
        np.testing.assert_array_equal(shape(DELTA), DELTA)


@pytest.mark.parametrize("make", [shifted, hinge, gate])
@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_a_threshold_that_cannot_be_is_refused_with_its_value(make, bad):
    with pytest.raises(ValueError, match=rf"is {bad}; it must be at least 0"):
        make(bad)


def test_no_gradient_flows_through_the_penalty():
    def total(advantages, delta):
        return jnp.sum(penalize(advantages, delta, multiplier=3.0, shape=jnp.square) ** 2)

    to_advantages, to_delta = jax.grad(total, argnums=(0, 1))(jnp.array(A), jnp.array(DELTA))
    np.testing.assert_array_equal(to_delta, np.zeros_like(DELTA))
    np.testing.assert_allclose(to_advantages, 2 * (A - 3 * DELTA**2), rtol=1e-6)


def test_forms_by_hand():
    mask = np.array([[1, 1, 0], [0, 0, 0]], bool)
    hidden = np.where(mask, DELTA, np.inf).astype("f")
    np.testing.assert_array_equal(as_published(hidden, mask), hidden)
    centred = np.asarray(centred_on_response(hidden, mask))
    np.testing.assert_array_equal(centred[0, :2], [-0.125, 0.125])
    assert float(np.where(mask, centred, 0).sum()) == 0
