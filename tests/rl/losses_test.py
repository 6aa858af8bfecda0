from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcjax.rl.losses import (
    KL_ESTIMATORS,
    cispo,
    clipped_surrogate,
    gspo,
    kl_estimate,
    negative_log_likelihood,
    policy_gradient,
    ratio,
)
from dcjax.rl.masked import seq_mean_token_mean, token_mean

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


BOUNDS = {"eps_low": LOW, "eps_high": HIGH}
SURROGATES = {
    "clipped": partial(clipped_surrogate, **BOUNDS),
    "dual": partial(clipped_surrogate, **BOUNDS, dual_clip=3.0),
    "gspo": partial(gspo, **BOUNDS),
    "cispo": partial(cispo, **BOUNDS),
    "policy_gradient": policy_gradient,
    "likelihood": negative_log_likelihood,
}
EACH = pytest.mark.parametrize("name", SURROGATES)


def total_of(name, arguments):
    """The sum of losses as a function of the log-probs alone."""
    rest = {key: value for key, value in arguments.items() if key != "logps"}
    return lambda logps: SURROGATES[name](logps, **rest)[0].sum()


def spread(rows):
    """One value a response."""
    return np.broadcast_to(np.asarray(rows, np.float32)[:, None], SHAPE)


@EACH
@pytest.mark.parametrize("hidden", ["logps", "old_logps", "advantages", "weights"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_surrogate_sees_what_the_mask_hides(case, name, hidden, bad):
    poisoned = case | {hidden: np.where(case["mask"], case[hidden], bad).astype("f")}
    losses, clipped = SURROGATES[name](**poisoned)
    expected, where = SURROGATES[name](**case)
    np.testing.assert_array_equal(losses, expected)
    np.testing.assert_array_equal(clipped, where)
    assert (np.asarray(losses)[~case["mask"]] == 0).all()
    assert not np.asarray(clipped)[~case["mask"]].any()
    grad = jax.grad(total_of(name, poisoned))(jnp.array(poisoned["logps"]))
    np.testing.assert_array_equal(grad, jax.grad(total_of(name, case))(jnp.array(case["logps"])))
    assert (np.asarray(grad)[~case["mask"]] == 0).all()


@EACH
@pytest.mark.parametrize("gap", [-1e4, -20.0, 20.0, 1e4])
def test_extreme_log_probs_stay_finite(case, name, gap):
    extreme = case | {"logps": case["old_logps"] + np.float32(gap)}
    value, grad = jax.value_and_grad(total_of(name, extreme))(jnp.array(extreme["logps"]))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


@EACH
def test_surrogates_are_float32_or_wider(case, name):
    half = {key: jnp.asarray(value, jnp.bfloat16) for key, value in case.items() if key != "mask"}
    assert SURROGATES[name](**half, mask=case["mask"])[0].dtype == jnp.float32
    with jax.enable_x64(True):
        double = {key: np.asarray(value, np.float64) for key, value in case.items() if key != "mask"}
        assert SURROGATES[name](**double, mask=case["mask"])[0].dtype == np.float64


@EACH
def test_rows_are_independent(case, name):
    whole = SURROGATES[name](**case)[0]
    parts = [
        SURROGATES[name](**{key: value[rows] for key, value in case.items()})[0] for rows in (slice(2), slice(2, 6))
    ]
    np.testing.assert_allclose(jnp.concatenate(parts), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["clipped", "dual", "gspo", "cispo", "policy_gradient"])
def test_on_policy_all_gradients_are_the_policy_gradients(case, name):
    on_policy = case | {"old_logps": case["logps"], "advantages": spread(np.arange(6) - 2.5)}
    grad = jax.grad(total_of(name, on_policy))(jnp.array(case["logps"]))
    expected = np.where(case["mask"], -case["weights"] * on_policy["advantages"], 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("probability_ratio", "advantage", "loss", "slope", "clipped"),
    [
        (2.5, -2.0, 5.0, 5.0, False),
        (2.9, -2.0, 5.8, 5.8, False),
        (3.1, -2.0, 6.0, 0.0, True),  # at most 2 · 3
        (4.0, 2.0, -2.56, 0.0, True),  # the other clip
        (0.5, -2.0, 1.6, 0.0, True),
    ],
)
def test_the_dual_clip_by_hand(probability_ratio, advantage, loss, slope, clipped):
    ones = jnp.ones((1, 1))
    terms = {"old_logps": 0 * ones, "advantages": advantage * ones, "weights": ones, "mask": ones > 0}

    def of(logps):
        losses, where = SURROGATES["dual"](logps, **terms)
        return losses.sum(), where

    (value, where), grad = jax.value_and_grad(of, has_aux=True)(jnp.log(probability_ratio * ones))
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(grad, [[slope]], rtol=1e-5)
    assert bool(where[0, 0]) == clipped


def test_the_dual_clip_is_of_the_loss_before_weighting(case):
    double = SURROGATES["dual"](**case | {"weights": 2 * case["weights"]})[0]
    np.testing.assert_allclose(double, 2 * SURROGATES["dual"](**case)[0], rtol=1e-6)


@pytest.mark.parametrize("bound", [1.0, 0.5, -3.0, float("nan")])
def test_a_dual_clip_that_is_not_above_one_is_refused(case, bound):
    with pytest.raises(ValueError, match=r"dual_clip is .*; it must be above 1, or None"):
        clipped_surrogate(**case, **BOUNDS, dual_clip=bound)


def test_gspo_by_hand():
    # log-ratios .1 and .3: s = exp(.2) = 1.2214, within 1.28; the second response's s = exp(.4) is not
    logps = jnp.array([[0.1, 0.3], [0.4, 0.4]])
    ones = jnp.ones((2, 2))
    terms = {"old_logps": 0 * ones, "advantages": 2 * ones, "weights": ones, "mask": ones > 0}
    losses, clipped = SURROGATES["gspo"](logps, **terms)
    np.testing.assert_allclose(losses, [[-2 * np.exp(0.2)] * 2, [-2.56] * 2], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[False] * 2, [True] * 2])


def test_gspos_gradient_is_that_of_the_responses_ratio(case):
    terms = case | {"advantages": spread([1, -1, 2, 0.5, -0.5, 3]), "weights": spread(np.ones(6))}
    mask, old = case["mask"], case["old_logps"]

    def by_token(logps):
        losses, _ = SURROGATES["gspo"](logps, **{key: value for key, value in terms.items() if key != "logps"})
        return seq_mean_token_mean(losses, mask).total

    def by_response(logps):
        s = jnp.exp(jnp.sum(jnp.where(mask, logps - old, 0), 1) / jnp.maximum(mask.sum(1), 1))
        advantages = terms["advantages"][:, 0]
        losses = -jnp.minimum(s * advantages, jnp.clip(s, 1 - LOW, 1 + HIGH) * advantages)
        return jnp.sum(jnp.where(mask.any(1), losses, 0))

    logps = jnp.array(case["logps"])
    (value, grad), (expected, slope) = (jax.value_and_grad(f)(logps) for f in (by_token, by_response))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-6)


def test_cispo_clips_the_ratio_and_keeps_every_gradient(case):
    losses, clipped = SURROGATES["cispo"](**case)
    r = np.exp(case["logps"] - case["old_logps"])
    bounded = np.clip(r, 1 - LOW, 1 + HIGH)
    slope = -case["weights"] * bounded * case["advantages"]
    mask = case["mask"]
    np.testing.assert_allclose(np.asarray(losses)[mask], (slope * case["logps"])[mask], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(clipped)[mask], (r != bounded)[mask])
    grad = np.asarray(jax.grad(total_of("cispo", case))(jnp.array(case["logps"])))
    np.testing.assert_allclose(grad[mask], slope[mask], rtol=1e-5)


def test_the_policy_gradient_is_the_weighted_likelihood_of_advantages(case):
    losses, clipped = policy_gradient(**case)
    expected = -case["weights"] * case["advantages"] * case["logps"]
    np.testing.assert_allclose(losses, np.where(case["mask"], expected, 0), rtol=1e-6)
    assert not np.asarray(clipped).any()


@pytest.mark.parametrize(
    ("kind", "expected", "slopes"),
    # x = 0, ln 2, −ln 2
    [
        ("k1", [0, np.log(2), -np.log(2)], [1, 1, 1]),
        ("k2", [0, np.log(2) ** 2 / 2, np.log(2) ** 2 / 2], [0, np.log(2), -np.log(2)]),
        ("k3", [0, np.log(2) - 0.5, 1 - np.log(2)], [0, 0.5, -1]),
        ("abs", [0, np.log(2), np.log(2)], [0, 1, -1]),
    ],
)
def test_kl_estimates_by_hand(kind, expected, slopes):
    logps = jnp.log(jnp.array([[0.25, 0.5, 0.125, 1.0]]))
    reference = jnp.full((1, 4), np.log(0.25)).at[0, 3].set(jnp.nan)
    mask = np.array([[True, True, True, False]])

    def of(logps):
        return kl_estimate(logps=logps, reference_logps=reference, mask=mask, kind=kind)

    np.testing.assert_allclose(of(logps), [[*expected, 0]], rtol=1e-5, atol=1e-6)
    grad = np.asarray(jax.grad(lambda logps: of(logps).sum())(logps))[0]
    # |x| has no slope at 0
    np.testing.assert_allclose(grad[1:], [*slopes[1:], 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_are_unbiased(kind):
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    each = kl_estimate(logps=np.log(p)[None], reference_logps=np.log(q)[None], mask=np.ones((1, 3), bool), kind=kind)
    np.testing.assert_allclose(np.sum(p * np.asarray(each)[0]), np.sum(p * np.log(p / q)), rtol=1e-5)


def test_the_expected_gradient_of_k2_is_the_kls_and_that_of_k1_is_nothing():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])

    def expected_gradient(kind):
        def loss(logits):
            logps, mask = jax.nn.log_softmax(logits)[None], np.ones((1, 3), bool)
            each = kl_estimate(logps=logps, reference_logps=np.log(q)[None], mask=mask, kind=kind)
            return jnp.sum(p * each[0])

        return jax.grad(loss)(jnp.log(p))

    def kl(logits):
        logps = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logps) * (logps - np.log(q)))

    np.testing.assert_allclose(expected_gradient("k2"), jax.grad(kl)(jnp.log(p)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(expected_gradient("k1"), np.zeros(3), atol=1e-6)


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_kl_estimates_of_extreme_log_probs_stay_finite(kind, gap):
    def total(logps):
        mask = np.ones(logps.shape, bool)
        return kl_estimate(logps=logps, reference_logps=jnp.zeros_like(logps), mask=mask, kind=kind).sum()

    value, grad = jax.value_and_grad(total)(jnp.full((1, 2), gap))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_another_kl_estimate_is_refused_with_the_names_that_there_are():
    with pytest.raises(ValueError, match="the KL estimate is 'full'; it must be one of k1, k2, k3, abs"):
        kl_estimate(logps=np.zeros((1, 1)), reference_logps=np.zeros((1, 1)), mask=np.ones((1, 1), bool), kind="full")
