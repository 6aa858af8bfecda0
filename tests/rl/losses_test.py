from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit

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


class Found(NamedTuple):
    """Of a surrogate on one case."""

    losses: np.ndarray
    clipped: np.ndarray
    grad: np.ndarray
    """Of the sum of losses, to the log-probs."""
    total: np.ndarray
    denominator: np.ndarray


@jit
def every_surrogate(case):
    def run(surrogate):
        def total(logps):
            losses, clipped = surrogate(logps, **{key: value for key, value in case.items() if key != "logps"})
            return jnp.sum(losses), (losses, clipped)

        grad, (losses, clipped) = jax.grad(total, has_aux=True)(case["logps"])
        return Found(losses, clipped, grad, *token_mean(losses, case["mask"]))

    return {name: run(surrogate) for name, surrogate in SURROGATES.items()}


def run(case, name="clipped", **changes):
    """One program for every surrogate and case."""
    return jax.device_get(every_surrogate(case | changes)[name])


def everywhere(logp, advantage):
    """The case with one token in all places."""
    full = partial(np.full, SHAPE, dtype=np.float32)
    return {
        "logps": full(logp),
        "old_logps": full(0),
        "advantages": full(advantage),
        "weights": full(1),
        "mask": np.ones(SHAPE, bool),
    }


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
    found = run(case)
    expected, count, where, _ = loop(case)
    np.testing.assert_allclose(found.total, expected, rtol=1e-5)
    assert float(found.denominator) == count
    np.testing.assert_array_equal(found.clipped[case["mask"]], where[case["mask"]])
    # both bounds are met, by tokens that count
    r = np.exp(case["logps"] - case["old_logps"])
    assert (where & case["mask"] & (r > 1 + HIGH)).any()
    assert (where & case["mask"] & (r < 1 - LOW)).any()


def test_gradient_against_a_loop_and_gone_where_clipped(case):
    grad = run(case).grad
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
    found = run(everywhere(np.log(probability_ratio), advantage))
    np.testing.assert_allclose(found.losses, np.full(SHAPE, loss), rtol=1e-5)
    np.testing.assert_allclose(found.grad, np.full(SHAPE, slope), rtol=1e-5)


def test_weights_scale_tokens_and_leave_the_count_alone(case):
    plain, double = run(case, weights=np.ones(SHAPE, "f")), run(case, weights=np.full(SHAPE, 2, "f"))
    np.testing.assert_allclose(double.total, 2 * plain.total, rtol=1e-6)
    assert float(plain.denominator) == float(double.denominator) == case["mask"].sum()


@EACH
def test_nothing_counts_without_a_token(case, name):
    found = run(case, name, mask=np.zeros(SHAPE, bool))
    assert (float(found.total), float(found.denominator)) == (0.0, 0.0)
    assert (found.grad == 0).all()


def test_log_ratios_are_clamped_to_twenty():
    gap = np.array([[-500.0, -20.5, -3.0, 0.0, 3.0, 20.5, 500.0]], np.float32)
    expected = np.exp([[-20.0, -20.0, -3.0, 0.0, 3.0, 20.0, 20.0]])
    compiled = jit(ratio)
    np.testing.assert_allclose(compiled(logps=gap, reference_logps=np.zeros_like(gap)), expected, rtol=1e-5)
    np.testing.assert_allclose(compiled(logps=np.zeros_like(gap), reference_logps=-gap), expected, rtol=1e-5)


def test_negative_log_likelihood_is_the_weighted_sum_of_log_probs(case):
    found = run(case, "likelihood")
    np.testing.assert_allclose(found.total, -(case["weights"] * case["logps"])[case["mask"]].sum(), rtol=1e-5)
    assert float(found.denominator) == case["mask"].sum()
    assert not found.clipped.any()


def spread(rows):
    """One value a response."""
    return np.broadcast_to(np.asarray(rows, np.float32)[:, None], SHAPE)


@EACH
@pytest.mark.parametrize("hidden", ["logps", "old_logps", "advantages", "weights"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_surrogate_sees_what_the_mask_hides(case, name, hidden, bad):
    ours = run(case, name, **{hidden: np.where(case["mask"], case[hidden], bad).astype("f")})
    for found, expected in zip(ours, run(case, name), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found in ours[:3]:
        assert not found[~case["mask"]].any()


@EACH
@pytest.mark.parametrize("gap", [-1e4, -20.0, 20.0, 1e4])
def test_extreme_log_probs_stay_finite(case, name, gap):
    found = run(case, name, logps=case["old_logps"] + np.float32(gap))
    assert np.isfinite(found.total)
    assert np.isfinite(found.grad).all()


@EACH
def test_surrogates_are_float32_or_wider(case, name):
    half = {key: jnp.asarray(value, jnp.bfloat16) for key, value in case.items() if key != "mask"}
    assert jax.eval_shape(SURROGATES[name], **half, mask=case["mask"])[0].dtype == jnp.float32
    with jax.enable_x64(True):
        double = {key: np.asarray(value, np.float64) for key, value in case.items() if key != "mask"}
        assert jax.eval_shape(SURROGATES[name], **double, mask=case["mask"])[0].dtype == np.float64


@EACH
def test_rows_are_independent(case, name):
    # all rows but the first two are others
    other = {key: np.concatenate([value[:2], value[1:-1][::-1]]) for key, value in case.items()}
    whole, ours = run(case, name), run(other, name)
    np.testing.assert_array_equal(ours.losses[:2], whole.losses[:2])
    np.testing.assert_array_equal(ours.grad[:2], whole.grad[:2])
    assert (ours.losses[2:] != whole.losses[2:]).any()


@pytest.mark.parametrize("name", ["clipped", "dual", "gspo", "cispo", "policy_gradient"])
def test_on_policy_all_gradients_are_the_policy_gradients(case, name):
    on_policy = case | {"old_logps": case["logps"], "advantages": spread(np.arange(6) - 2.5)}
    expected = np.where(case["mask"], -case["weights"] * on_policy["advantages"], 0)
    np.testing.assert_allclose(run(on_policy, name).grad, expected, rtol=1e-5)


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
    found = run(everywhere(np.log(probability_ratio), advantage), "dual")
    np.testing.assert_allclose(found.losses, np.full(SHAPE, loss), rtol=1e-5)
    np.testing.assert_allclose(found.grad, np.full(SHAPE, slope), rtol=1e-5)
    np.testing.assert_array_equal(found.clipped, np.full(SHAPE, clipped))


def test_the_dual_clip_is_of_the_loss_before_weighting(case):
    double = run(case, "dual", weights=2 * case["weights"]).losses
    np.testing.assert_allclose(double, 2 * run(case, "dual").losses, rtol=1e-6)


@pytest.mark.parametrize("bound", [1.0, 0.5, -3.0, float("nan")])
def test_a_dual_clip_that_is_not_above_one_is_refused(case, bound):
    with pytest.raises(ValueError, match=r"dual_clip is .*; it must be above 1, or None"):
        clipped_surrogate(**case, **BOUNDS, dual_clip=bound)


def test_gspo_by_hand():
    # log-ratios .1 and .3: s = exp(.2) = 1.2214, within 1.28; the second response's s = exp(.4) is not
    two = everywhere(0.4, 2.0)
    two["logps"][0, :2] = 0.1, 0.3
    two["mask"][:, 2:] = False
    found = run(two, "gspo")
    np.testing.assert_allclose(found.losses[:2, :2], [[-2 * np.exp(0.2)] * 2, [-2.56] * 2], rtol=1e-6)
    np.testing.assert_array_equal(found.clipped[:2, :2], [[False] * 2, [True] * 2])


def test_gspos_gradient_is_that_of_the_responses_ratio(case):
    advantages = np.array([1, -1, 2, 0.5, -0.5, 3], np.float32)
    terms = case | {"advantages": spread(advantages), "weights": spread(np.ones(6))}
    mask, old = case["mask"], case["old_logps"]

    @jit
    @jax.value_and_grad
    def by_token(logps):
        losses, _ = SURROGATES["gspo"](logps, **{key: value for key, value in terms.items() if key != "logps"})
        return seq_mean_token_mean(losses, mask).total

    @jit
    @jax.value_and_grad
    def by_response(logps):
        s = jnp.exp(jnp.sum(jnp.where(mask, logps - old, 0), 1) / jnp.maximum(mask.sum(1), 1))
        losses = -jnp.minimum(s * advantages, jnp.clip(s, 1 - LOW, 1 + HIGH) * advantages)
        return jnp.sum(jnp.where(mask.any(1), losses, 0))

    (value, grad), (expected, slope) = by_token(case["logps"]), by_response(case["logps"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-6)


def test_cispo_clips_the_ratio_and_keeps_every_gradient(case):
    found = run(case, "cispo")
    r = np.exp(case["logps"] - case["old_logps"])
    bounded = np.clip(r, 1 - LOW, 1 + HIGH)
    slope = -case["weights"] * bounded * case["advantages"]
    mask = case["mask"]
    np.testing.assert_allclose(found.losses[mask], (slope * case["logps"])[mask], rtol=1e-5)
    np.testing.assert_array_equal(found.clipped[mask], (r != bounded)[mask])
    np.testing.assert_allclose(found.grad[mask], slope[mask], rtol=1e-5)


def test_the_policy_gradient_is_the_weighted_likelihood_of_advantages(case):
    found = run(case, "policy_gradient")
    expected = -case["weights"] * case["advantages"] * case["logps"]
    np.testing.assert_allclose(found.losses, np.where(case["mask"], expected, 0), rtol=1e-6)
    assert not found.clipped.any()


@jit
def every_kl_estimate(logps, reference_logps, mask):
    """Of each kind, its estimates and their gradients to the log-probs, [1, 4]."""

    def run(kind):
        def total(logps):
            each = kl_estimate(logps=logps, reference_logps=reference_logps, mask=mask, kind=kind)
            return jnp.sum(each), each

        grad, each = jax.grad(total, has_aux=True)(logps)
        return each[0], grad[0]

    return {kind: run(kind) for kind in KL_ESTIMATORS}


def estimate(kind, logps, reference_logps):
    """Of three tokens, beside a fourth that is not one."""
    arrays = (np.append(np.float32(x), np.float32(bad))[None] for x, bad in ((logps, 0), (reference_logps, np.nan)))
    mask = np.array([[True, True, True, False]])
    each, grad = (np.asarray(x) for x in every_kl_estimate(*arrays, mask)[kind])
    assert (each[3], grad[3]) == (0, 0)
    return each[:3], grad[:3]


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
    each, grad = estimate(kind, np.log([0.25, 0.5, 0.125]), np.log([0.25] * 3))
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-6)
    # |x| has no slope at 0
    np.testing.assert_allclose(grad[1:], slopes[1:], rtol=1e-5, atol=1e-6)


P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
KL = np.sum(P * np.log(P / Q))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_are_unbiased(kind):
    each, _ = estimate(kind, np.log(P), np.log(Q))
    np.testing.assert_allclose(np.sum(P * each), KL, rtol=1e-5)


def test_the_expected_gradient_of_k2_is_the_kls_and_that_of_k1_is_nothing():
    def expected_gradient(kind):
        """To the logits z: ∂ log p_i / ∂z_j is 1{i = j} − p_j."""
        slopes = P * estimate(kind, np.log(P), np.log(Q))[1]
        return slopes - P * slopes.sum()

    np.testing.assert_allclose(expected_gradient("k2"), P * (np.log(P / Q) - KL), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(expected_gradient("k1"), np.zeros(3), atol=1e-6)


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_kl_estimates_of_extreme_log_probs_stay_finite(kind, gap):
    each, grad = estimate(kind, [gap] * 3, [0.0] * 3)
    assert np.isfinite(each).all()
    assert np.isfinite(grad).all()


def test_another_kl_estimate_is_refused_with_the_names_that_there_are():
    with pytest.raises(ValueError, match="the KL estimate is 'full'; it must be one of k1, k2, k3, abs"):
        kl_estimate(logps=np.zeros((1, 1)), reference_logps=np.zeros((1, 1)), mask=np.ones((1, 1), bool), kind="full")
