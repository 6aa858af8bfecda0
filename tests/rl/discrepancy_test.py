import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcjax.rl import probability_difference
from dcjax.rl.discrepancy import log_probability_difference, measure, probability_ratio

LOGPS = arrays(np.float32, (3, 3), elements=st.floats(-60, 0, width=32))
SIGNALS = [probability_difference, probability_ratio, log_probability_difference]
NUMPY = {
    probability_difference: lambda p, q: abs(np.exp(p) - np.exp(q)),
    probability_ratio: lambda p, q: abs(np.exp(np.clip(p - q, -20, 20)) - 1),
    log_probability_difference: lambda p, q: abs(p - q),
}
# p = (1/2, 1/4, 1) and q = (1/4, 1/2, 1) on the first row; the second has one token, the third none
OLD = np.log(np.array([[0.5, 0.25, 1], [0.75, 1, 1], [1, 1, 1]], "f"))
ROLLOUT = np.log(np.array([[0.25, 0.5, 1], [0.25, 1, 1], [1, 1, 1]], "f"))
MASK = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
hidden = np.where(MASK, 0, np.nan).astype("f")


@jit
def every_signal(old, rollout):
    return [signal(old_logps=old, rollout_logps=rollout) for signal in SIGNALS]


def delta(old, rollout, signal=probability_difference):
    """One program for every signal, of one shape."""
    rows, tokens = np.shape(old)
    full = np.zeros((2, 3, 3), np.float32)
    full[:, :rows, :tokens] = old, rollout
    return np.asarray(every_signal(*full)[SIGNALS.index(signal)])[:rows, :tokens]


def test_by_hand():
    old, rollout = np.log(np.array([[0.5, 0.25, 1.0]], "f")), np.log(np.array([[0.25, 0.5, 1.0]], "f"))
    np.testing.assert_allclose(delta(old, rollout), [[0.25, 0.25, 0.0]], atol=1e-7)
    np.testing.assert_allclose(delta(old, rollout, probability_ratio), [[1, 0.5, 0]], atol=1e-6)
    log2 = np.log(2)
    np.testing.assert_allclose(delta(old, rollout, log_probability_difference), [[log2, log2, 0]], atol=1e-6)


def test_a_token_that_one_policy_excludes_counts_with_the_other_ones_probability():
    old, rollout = np.array([[-np.inf, 0.0, -np.inf]], "f"), np.array([[np.log(0.75), -np.inf, -np.inf]], "f")
    np.testing.assert_allclose(delta(old, rollout), [[0.75, 1.0, 0.0]], rtol=1e-6)


@settings(max_examples=40)
@given(LOGPS, LOGPS)
def test_it_is_symmetric_bounded_and_against_numpy(old, rollout):
    out = delta(old, rollout)
    np.testing.assert_array_equal(out, delta(rollout, old))
    assert (out >= 0).all()
    assert (out <= 1).all()
    np.testing.assert_allclose(out, np.abs(np.exp(old.astype("d")) - np.exp(rollout.astype("d"))), atol=2e-7)


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_small_gap_keeps_its_digits(signal):
    old = np.full((3, 3), -1.0, "f")
    rollout = old + np.float32([[1e-3, -1e-3, 1e-4]] * 3)
    expected = NUMPY[signal](old.astype("d"), rollout.astype("d"))
    rtol = 1e-5 if signal is not probability_difference else 3e-3
    np.testing.assert_allclose(delta(old, rollout, signal), expected, rtol=rtol)


@settings(max_examples=40)
@given(LOGPS)
def test_one_policy_has_no_gap_to_itself(logps):
    np.testing.assert_array_equal(every_signal(logps, logps), np.zeros((3, 3, 3)))


def test_they_cannot_be_called_by_position():
    logps = jnp.zeros((1, 1))
    for signal in (*SIGNALS, measure(probability_difference)):
        with pytest.raises(TypeError):
            signal(logps, logps)


@pytest.mark.parametrize(
    ("sides", "level", "expected"),
    [
        ("two", "token", [[0.25, 0.25, 0], [0.5, 0, 0], [0, 0, 0]]),
        ("one", "token", [[0.25, 0, 0], [0.5, 0, 0], [0, 0, 0]]),
        ("signed", "token", [[0.25, -0.25, 0], [0.5, 0, 0], [0, 0, 0]]),
        ("two", "sequence", [[0.5 / 3] * 3, [0.5, 0, 0], [0, 0, 0]]),
        ("one", "sequence", [[0.25 / 3] * 3, [0.5, 0, 0], [0, 0, 0]]),
        ("signed", "sequence", [[0, 0, 0], [0.5, 0, 0], [0, 0, 0]]),
    ],
)
def test_sides_and_levels_by_hand_with_padding_that_is_not_a_number(sides, level, expected):
    discrepancy = measure(probability_difference, level=level, sides=sides)
    ours = jit(discrepancy)(old_logps=OLD + hidden, rollout_logps=ROLLOUT - hidden, mask=MASK)
    np.testing.assert_allclose(ours, expected, atol=1e-7)


MEASURES = {
    (signal, level, sides): measure(signal, level=level, sides=sides)
    for signal in SIGNALS
    for level in ("token", "sequence")
    for sides in ("two", "one", "signed")
}


def test_every_measure_against_a_loop():
    rng = np.random.default_rng(0)
    old, rollout, mask = -rng.exponential(1, (4, 5)), -rng.exponential(1, (4, 5)), rng.random((4, 5)) < 0.6
    mask[2] = False
    with jax.enable_x64(True):
        run = jit(lambda gap: [discrepancy(**gap) for discrepancy in MEASURES.values()])
        found = run({"old_logps": old, "rollout_logps": rollout, "mask": mask})
    for (signal, level, sides), ours in zip(MEASURES, found, strict=True):
        expected = np.zeros((4, 5))
        for row in range(4):
            for t in np.flatnonzero(mask[row]):
                p, q = old[row, t], rollout[row, t]
                sign = {"two": 1, "one": float(p > q), "signed": np.sign(p - q)}[sides]
                expected[row, t] = sign * NUMPY[signal](p, q)
            if level == "sequence" and mask[row].any():
                expected[row] = np.where(mask[row], expected[row].sum() / mask[row].sum(), 0)
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-15, err_msg=f"{signal} {level} {sides}")


def test_a_readers_own_signal_is_passed_as_a_function():
    def squared(*, old_logps, rollout_logps):
        return jnp.square(old_logps - rollout_logps)

    ours = measure(squared, sides="one")(old_logps=OLD, rollout_logps=ROLLOUT, mask=MASK)
    np.testing.assert_allclose(ours[0], [np.log(2) ** 2, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("signal", [*SIGNALS, measure(probability_ratio, level="sequence", sides="signed")])
def test_half_precision_is_widened_and_padding_gets_no_gradient(signal):
    half = jnp.asarray(OLD, jnp.bfloat16)
    assert jax.eval_shape(signal, old_logps=half, rollout_logps=half, mask=MASK).dtype == np.float32

    def total(old):
        return jnp.sum(signal(old_logps=old, rollout_logps=ROLLOUT + hidden, mask=MASK))

    grad = np.asarray(jit(jax.grad(total))(OLD + hidden))
    assert np.isfinite(grad).all()
    assert (grad[~MASK] == 0).all()
    assert np.abs(grad[1, 0]) > 0.1


@pytest.mark.parametrize("changes", [{"level": "word"}, {"sides": "three"}])
def test_what_is_not_known_is_refused_with_the_choices(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"{name} is '{value}'; it must be one of "):
        measure(probability_difference, **changes)
