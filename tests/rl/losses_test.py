import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcjax.rl import clipped_surrogate
from dcjax.rl.losses import negative_log_likelihood, ratio
from dcjax.rl.masked import token_mean

LOW, HIGH = 0.2, 0.28
SHAPE = (6, 7)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    old = rng.uniform(-3, -0.1, SHAPE)
    mask = rng.random(SHAPE) < 0.7
    mask[2] = False
    arrays = {
        "logps": old + rng.normal(0, 0.4, SHAPE),
        "old_logps": old,
        "advantages": rng.normal(size=SHAPE),
        "weights": rng.uniform(0, 2, SHAPE),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()} | {"mask": mask}


def surrogate(case, **changes):
    arguments = case | changes
    logps = arguments.pop("logps")
    losses, clipped = clipped_surrogate(logps, **arguments, eps_low=LOW, eps_high=HIGH)
    return *token_mean(losses, arguments["mask"]), clipped


def loop(case):
    """Loss, count, where the gradient is gone, and the gradient, one token at a time in float64."""
    total, count, clipped, grad = 0.0, 0, np.zeros(SHAPE, bool), np.zeros(SHAPE)
    for at in np.ndindex(SHAPE):
        logp, old, advantage, weight = (
            float(case[name][at]) for name in ("logps", "old_logps", "advantages", "weights")
        )
        r = np.exp(logp - old)
        clipped[at] = (advantage > 0 and r > 1 + HIGH) or (advantage < 0 and r < 1 - LOW)
        if case["mask"][at]:
            bounded = min(max(r, 1 - LOW), 1 + HIGH)
            total -= weight * min(r * advantage, bounded * advantage)
            count += 1
            grad[at] = 0.0 if clipped[at] else -weight * advantage * r
    return total, count, clipped, grad


def test_loss_and_clipping_against_a_loop(case):
    total, denominator, clipped = surrogate(case)
    expected, count, where, _ = loop(case)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert float(denominator) == count
    np.testing.assert_array_equal(np.asarray(clipped)[case["mask"]], where[case["mask"]])
    # both bounds are met, by tokens that count
    r = np.exp(case["logps"] - case["old_logps"])
    assert (where & case["mask"] & (r > 1 + HIGH)).any()
    assert (where & case["mask"] & (r < 1 - LOW)).any()


def test_gradient_against_a_loop_and_gone_where_clipped(case):
    grad = np.asarray(jax.grad(lambda logps: surrogate(case, logps=logps)[0])(jnp.array(case["logps"])))
    _, _, clipped, expected = loop(case)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)
    assert (grad[clipped | ~case["mask"]] == 0).all()
    assert (grad[~clipped & case["mask"]] != 0).all()


@pytest.mark.parametrize(
    ("probability_ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.27, 2.0, -2.54, -2.54),
        (1.5, 2.0, -2.56, 0.0),  # above 1 + eps_high: no more to gain
        (0.5, 2.0, -1.0, -1.0),  # a good token that became rare is still pulled up
        (0.81, -2.0, 1.62, 1.62),
        (0.5, -2.0, 1.6, 0.0),  # below 1 − eps_low: no more to gain
        (1.5, -2.0, 3.0, 3.0),  # a bad token that became likely is still pushed down
    ],
)
def test_one_token_by_hand(probability_ratio, advantage, loss, slope):
    def of(logps):
        ones = jnp.ones((1, 1))
        terms = {"old_logps": 0 * ones, "advantages": advantage * ones, "weights": ones, "mask": ones > 0}
        return clipped_surrogate(logps, **terms, eps_low=LOW, eps_high=HIGH)[0].sum()

    value, grad = jax.value_and_grad(of)(jnp.log(jnp.full((1, 1), probability_ratio)))
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(grad, [[slope]], rtol=1e-5)


def test_on_policy_the_gradient_is_that_of_the_plain_policy_gradient(case):
    grad = jax.grad(lambda logps: surrogate(case, logps=logps, old_logps=case["logps"])[0])(jnp.array(case["logps"]))
    expected = np.where(case["mask"], -case["weights"] * case["advantages"], 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


def test_weights_scale_tokens_and_leave_the_count_alone(case):
    plain, count, _ = surrogate(case, weights=np.ones(SHAPE, "f"))
    double, same_count, _ = surrogate(case, weights=np.full(SHAPE, 2, "f"))
    np.testing.assert_allclose(double, 2 * plain, rtol=1e-6)
    assert float(count) == float(same_count) == case["mask"].sum()


def test_nothing_counts_without_a_token(case):
    total, denominator, _ = surrogate(case, mask=np.zeros(SHAPE, bool))
    assert (float(total), float(denominator)) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["logps", "old_logps", "advantages", "weights"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_loss_ignores_what_is_not_finite_on_padding(case, name, bad):
    expected = surrogate(case)[0]
    assert float(surrogate(case, **{name: np.where(case["mask"], case[name], bad).astype("f")})[0]) == float(expected)


@pytest.mark.parametrize("name", ["logps", "old_logps", "advantages", "weights"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_gradient_ignores_what_is_not_finite_on_padding(case, name, bad):
    poisoned = case | {name: np.where(case["mask"], case[name], bad).astype("f")}
    logps = jnp.array(poisoned["logps"])
    grad = np.asarray(jax.grad(lambda logps: surrogate(poisoned, logps=logps)[0])(logps))
    np.testing.assert_allclose(grad, loop(case)[3], rtol=1e-4, atol=1e-6)


def test_log_ratios_are_clamped_to_twenty():
    gap = np.array([[-500.0, -20.5, -3.0, 0.0, 3.0, 20.5, 500.0]], np.float32)
    expected = np.exp([[-20.0, -20.0, -3.0, 0.0, 3.0, 20.0, 20.0]])
    np.testing.assert_allclose(ratio(logps=gap, reference_logps=np.zeros_like(gap)), expected, rtol=1e-5)
    np.testing.assert_allclose(ratio(logps=np.zeros_like(gap), reference_logps=-gap), expected, rtol=1e-5)


def test_negative_log_likelihood_is_the_weighted_sum_of_log_probs(case):
    losses, clipped = negative_log_likelihood(
        case["logps"], weights=case["weights"], mask=case["mask"], old_logps=case["old_logps"]
    )
    total, denominator = token_mean(losses, case["mask"])
    np.testing.assert_allclose(total, -(case["weights"] * case["logps"])[case["mask"]].sum(), rtol=1e-5)
    assert float(denominator) == case["mask"].sum()
    assert not np.asarray(clipped).any()
