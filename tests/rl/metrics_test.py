from functools import partial

import numpy as np
import pytest
from compiling import jit
from hypothesis import given, settings
from hypothesis import strategies as st

from dcjax.rl import metrics as rl_metrics
from dcjax.rl.masked import masked_mean
from dcjax.rl.metrics import PERCENTILES, budget_metrics, sequence_ess, sign_skew

mismatch_metrics = jit(rl_metrics.mismatch_metrics)
staleness_metrics = jit(rl_metrics.staleness_metrics)
log_quantiles = jit(rl_metrics.log_quantiles)
SHAPE = (5, 6)
"""Of every batch, so that each is one program."""

GAP = {
    "prob_diff_mean",
    "prob_diff_p50",
    "prob_diff_p90",
    "prob_diff_p99",
    "prob_diff_max",
    "log_diff_mean",
    "k1",
    "k3",
    "chi2_token",
    "chi2_sequence",
    "ess",
    "tv",
    "tv_pinsker",
    "ratio_in_band",
    "ratio_within_1_percent",
    "ratio_within_5_percent",
    "response_ratio_in_band",
    "ess_sequence",
}
PPL = {"log_ppl_old", "log_ppl_rollout", "log_ppl_abs_diff"}
SHARES = {name for name in GAP if name.startswith(("ratio_", "response_ratio_", "ess"))}
"""Which are 1 where the policies are one."""
NAMES = GAP | PPL | {f"{name}_per_token" for name in PPL}
# of neighbouring bins' middles to a value between them
RESOLUTION = 1.0091


def corner(old, rollout):
    """The metrics of these log-probs beside padding that is not a number."""
    full, mask = np.full((2, *SHAPE), np.nan, np.float32), np.zeros(SHAPE, bool)
    rows, tokens = np.shape(old)
    full[:, :rows, :tokens], mask[:rows, :tokens] = (old, rollout), True
    return mismatch_metrics(old_logps=full[0], rollout_logps=full[1], mask=mask)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    old = rng.uniform(-4, 0, SHAPE).astype(np.float32)
    rollout = (old + rng.normal(0, 0.3, old.shape)).astype(np.float32)
    lengths = np.array([6, 1, 0, 4, 3])
    mask = np.arange(6) < lengths[:, None]
    hidden = np.where(mask, 0, np.nan)
    return {"old_logps": old + hidden.astype("f"), "rollout_logps": rollout - hidden.astype("f"), "mask": mask}


def test_every_metric_against_a_loop_with_padding_that_is_not_a_number(case):
    deltas, logs, k3s, sums, per_token, old_sums, rollout_sums, lengths = [], [], [], [], [], [], [], []
    for old_row, rollout_row, mask in zip(*(case[name] for name in case), strict=True):
        pairs = [(float(p), float(q)) for p, q, kept in zip(old_row, rollout_row, mask, strict=True) if kept]
        if not pairs:
            continue
        deltas += [abs(np.exp(p) - np.exp(q)) for p, q in pairs]
        logs += [p - q for p, q in pairs]
        k3s += [np.exp(p - q) - 1 - (p - q) for p, q in pairs]
        sums.append(abs(sum(p - q for p, q in pairs)))
        per_token.append(sums[-1] / len(pairs))
        lengths.append(len(pairs))
        old_sums.append(-sum(p for p, _ in pairs))
        rollout_sums.append(-sum(q for _, q in pairs))
    rho, signed = np.exp(logs), np.array(rollout_sums) - np.array(old_sums)
    whole, means = np.exp(signed), np.exp(signed / lengths)
    expected = {
        "ratio_in_band": np.mean([0.999 <= x <= 1.002 for x in rho]),
        "ratio_within_1_percent": np.mean([abs(x - 1) <= 0.01 for x in rho]),
        "ratio_within_5_percent": np.mean([abs(x - 1) <= 0.05 for x in rho]),
        "response_ratio_in_band": np.mean([0.999 <= x <= 1.002 for x in means]),
        "ess_sequence": whole.sum() ** 2 / (len(whole) * (whole**2).sum()),
        "chi2_token": np.mean(rho**2) - 1,
        "chi2_sequence": np.mean(np.exp(2 * signed)) - 1,
        "ess": rho.sum() ** 2 / (len(rho) * (rho**2).sum()),
        "tv": np.mean(np.abs(rho - 1)) / 2,
        "tv_pinsker": np.sqrt(np.mean(k3s) / 2),
        "log_ppl_old": np.mean(old_sums),
        "log_ppl_rollout": np.mean(rollout_sums),
        "log_ppl_old_per_token": np.mean(np.array(old_sums) / lengths),
        "log_ppl_rollout_per_token": np.mean(np.array(rollout_sums) / lengths),
        "prob_diff_mean": np.mean(deltas),
        "prob_diff_max": max(deltas),
        "log_diff_mean": np.mean(np.abs(logs)),
        "k1": -np.mean(logs),
        "k3": np.mean(k3s),
        "log_ppl_abs_diff": np.mean(sums),
        "log_ppl_abs_diff_per_token": np.mean(per_token),
    }
    metrics = mismatch_metrics(**case)
    assert set(metrics) == NAMES == set(expected) | {f"prob_diff_p{percent}" for percent in PERCENTILES}
    for percent in PERCENTILES:
        nearest = np.quantile(deltas, percent / 100, method="inverted_cdf")
        assert nearest / RESOLUTION <= float(metrics[f"prob_diff_p{percent}"]) <= nearest * RESOLUTION
    for name, value in expected.items():
        assert metrics[name].dtype == np.float32
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_one_response_by_hand():
    # p = (1/2, 1/4), q = (1/4, 1/4): δ = (1/4, 0), log r = (log 2, 0), r − 1 − log r = (1 − log 2, 0)
    old, rollout = np.log(np.array([[0.5, 0.25]], "f")), np.log(np.array([[0.25, 0.25]], "f"))
    metrics = corner(old, rollout)
    log2 = np.log(2)
    by_hand = {"prob_diff_mean": 0.125, "prob_diff_max": 0.25, "log_diff_mean": log2 / 2, "k1": -log2 / 2}
    by_hand |= {"k3": (1 - log2) / 2, "log_ppl_abs_diff": log2, "log_ppl_abs_diff_per_token": log2 / 2}
    # ρ = (2, 1): χ² = (4 + 1)/2 − 1, over the response 2² − 1; ESS = 3²/(2·5); ½ · mean (1, 0)
    by_hand |= {"chi2_token": 1.5, "chi2_sequence": 3, "ess": 0.9, "tv": 0.25, "tv_pinsker": ((1 - log2) / 4) ** 0.5}
    by_hand |= {"log_ppl_old": 3 * log2, "log_ppl_rollout": 4 * log2}
    by_hand |= {"log_ppl_old_per_token": 1.5 * log2, "log_ppl_rollout_per_token": 2 * log2}
    # the smaller of two is the median, 0; the others are the larger, from a bin of 1.8%, and not above the largest
    by_hand |= {"prob_diff_p50": 0}
    # one token of two is at 1, the response is at √2, and alone
    by_hand |= {"ratio_in_band": 0.5, "ratio_within_1_percent": 0.5, "ratio_within_5_percent": 0.5}
    by_hand |= {"response_ratio_in_band": 0, "ess_sequence": 1}
    assert set(by_hand) == NAMES - {"prob_diff_p90", "prob_diff_p99"}
    for name in ("prob_diff_p90", "prob_diff_p99"):
        assert 0.25 / RESOLUTION <= float(metrics[name]) <= 0.25
    for name, value in by_hand.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_differences_of_one_sign_add_up_over_a_response_and_of_both_cancel():
    same, mixed = np.full((1, 4), -0.5, "f"), np.array([[-0.5, 0.5, -0.5, 0.5]], "f")
    of = {kind: corner(np.zeros((1, 4)), x) for kind, x in [("+", same), ("±", mixed)]}
    assert float(of["+"]["log_ppl_abs_diff"]) == 2.0
    assert float(of["±"]["log_ppl_abs_diff"]) == 0.0
    assert float(of["+"]["log_diff_mean"]) == float(of["±"]["log_diff_mean"]) == 0.5


def test_without_a_token_everything_is_zero(case):
    metrics = mismatch_metrics(**(case | {"mask": np.zeros_like(case["mask"])}))
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(NAMES, 0.0)


def test_one_policy_has_no_mismatch_with_itself(case):
    metrics = mismatch_metrics(**(case | {"rollout_logps": case["old_logps"]}))
    levels = {name for name in NAMES if name.startswith("log_ppl_") and "diff" not in name}
    assert {name: float(metrics[name]) for name in NAMES - levels} == dict.fromkeys(
        NAMES - levels, 0.0
    ) | dict.fromkeys(SHARES, 1.0)
    assert float(metrics["log_ppl_old"]) == float(metrics["log_ppl_rollout"]) > 0


@pytest.mark.parametrize("size", [1, 7, 100, 3001])
def test_quantiles_are_numpys_within_a_bin(size):
    x = np.exp(np.random.default_rng(size).normal(-7, 2.5, (1, 3001))).clip(0, 1).astype("f")
    mask = (np.random.default_rng(1).random((1, 3001)) < 0.7) & (np.arange(3001) < size)
    mask[0, 0] = True
    ours = np.asarray(log_quantiles(np.where(mask, x, np.nan), mask))
    expected = np.quantile(x[mask], [0.5, 0.9, 0.99], method="inverted_cdf")
    assert ((ours <= expected * RESOLUTION) & (ours >= expected / RESOLUTION)).all()
    if size > 1000:
        np.testing.assert_allclose(ours, np.quantile(x[mask], [0.5, 0.9, 0.99]), rtol=0.05)


def test_quantiles_at_the_ends_of_the_histogram():
    tiny, huge = np.full((1, 3001), 9e-9, "f"), np.ones((1, 3001), "f")
    mask = np.arange(3001)[None] < 4
    np.testing.assert_array_equal(log_quantiles(tiny, mask), [0, 0, 0])
    np.testing.assert_allclose(log_quantiles(huge, mask), [1, 1, 1], rtol=0.0092)
    np.testing.assert_array_equal(log_quantiles(huge, np.zeros_like(mask)), [0, 0, 0])


def test_a_weight_that_is_the_same_everywhere_leaves_every_token_effective():
    for gap in (-800.0, -20.0, -1e-3, 5.0, 800.0):
        np.testing.assert_allclose(corner(np.full((1, 3), gap), np.zeros((1, 3)))["ess"], 1, rtol=1e-6)


def test_a_small_gap_keeps_its_digits():
    gap = np.random.default_rng(0).normal(0, 1e-3, SHAPE)
    old = np.full(SHAPE, -1.0, "f")
    rollout = (old - gap).astype("f")
    x = old.astype("d") - rollout
    metrics = corner(old, rollout)
    np.testing.assert_allclose(metrics["k3"], np.mean(np.expm1(x) - x), rtol=1e-3)
    np.testing.assert_allclose(metrics["chi2_token"], np.mean(np.expm1(2 * x)), rtol=1e-3)
    np.testing.assert_allclose(metrics["tv_pinsker"], np.sqrt(np.mean(np.expm1(x) - x) / 2), rtol=1e-3)


def test_a_huge_gap_stays_finite():
    metrics = corner([[0.0, -800.0]], [[-800.0, 0.0]])
    assert np.isfinite(list(metrics.values())).all()
    # (e²⁰ − 1 − 800 + e⁻²⁰ − 1 + 800) / 2
    np.testing.assert_allclose(metrics["k3"], (np.exp(20) - 2) / 2, rtol=1e-5)


def test_staleness_is_the_same_gap_of_the_policy_to_its_own_past(case):
    mask = case["mask"]
    now = np.where(mask, case["rollout_logps"], np.nan)
    metrics = staleness_metrics(logps=now, old_logps=case["old_logps"], mask=mask)
    p, q = now[mask].astype("d"), case["old_logps"][mask].astype("d")
    np.testing.assert_allclose(metrics["prob_diff_mean"], np.abs(np.exp(p) - np.exp(q)).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["k3"], (np.exp(p - q) - 1 - (p - q)).mean(), rtol=1e-4)
    assert set(metrics) == GAP
    mismatch = mismatch_metrics(old_logps=now, rollout_logps=case["old_logps"], mask=mask)
    assert {name: float(value) for name, value in metrics.items()} == {name: float(mismatch[name]) for name in GAP}


def test_the_budget_by_hand():
    delta = np.array([[0.5, 0.1, 0.3], [0.2, 9, 9], [9, 9, 9]], "f")
    mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    metrics = jit(budget_metrics)(discrepancy=delta, mask=mask, budget=0.25)
    expected = {"discrepancy": 0.25, "excess": 0.0, "over_budget_fraction": 0.5}
    np.testing.assert_allclose([metrics[name] for name in expected], list(expected.values()), atol=1e-7)
    of_tokens = jit(partial(budget_metrics, average=masked_mean))(discrepancy=delta, mask=mask, budget=np.float32(0.25))
    np.testing.assert_allclose(of_tokens["excess"], 1.1 / 4 - 0.25, atol=1e-7)


def test_shares_of_ratios_by_hand():
    """ρ of 1.0015, 1.005, .96 and 1.0, of which the bounds are on both sides; geometric means of responses beside."""
    ratios = np.array([[1.0015, 1.005, 0.96, 1.0], [1.001, 1.001, 1.0, 1.0], [0.998, 1.0, 1.0, 1.0]])
    metrics = corner(np.log(ratios), np.zeros((3, 4)))
    shares = {"ratio_in_band": 9 / 12, "ratio_within_1_percent": 11 / 12, "ratio_within_5_percent": 1}
    # .9914, 1.0005 and .9995
    shares["response_ratio_in_band"] = 2 / 3
    for name, share in shares.items():
        np.testing.assert_allclose(metrics[name], share, rtol=1e-6, err_msg=name)
    # a token is within 1% on either side, and no further
    for ratio, share in ((0.9905, 1), (0.9895, 0), (1.0095, 1), (1.0105, 0)):
        assert float(corner(np.log([[ratio]]), np.zeros((1, 1)))["ratio_within_1_percent"]) == share


def test_the_effective_share_of_responses_by_hand():
    mask = np.array([[True, True], [True, False], [False, False]])
    ess = jit(lambda logps: sequence_ess(logps=logps, reference_logps=np.zeros((3, 2), "f"), mask=mask))
    # w = (2 · 3, 2): 8² / (2 · 40)
    assert float(ess(np.log(np.array([[2, 3], [2, 9], [9, 9]], "f")))) == pytest.approx(0.8, rel=1e-6)
    # sums of thousands of nats neither overflow nor vanish
    for level in (-9e3, 9e3):
        equal = np.array([[level, -1], [level - 1, np.nan], [np.nan, np.nan]], "f")
        assert float(ess(equal)) == pytest.approx(1, rel=1e-6)
        assert float(ess(equal + np.array([[50], [0], [0]], "f"))) == pytest.approx(0.5, rel=1e-6)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_the_effective_share_is_from_one_response_to_all(seed, scale):
    rng = np.random.default_rng(seed)
    logps, mask = (scale * rng.normal(size=SHAPE)).astype("f"), rng.random(SHAPE) < 0.6
    mask[0, 0] = True
    share = float(ESS(logps=logps, reference_logps=np.zeros(SHAPE, "f"), mask=mask))
    assert 1 / mask.any(1).sum() <= share * (1 + 1e-5) and share <= 1 + 1e-5


ESS = jit(sequence_ess)


def test_the_skew_by_hand_adds_up_to_what_ratios_add_to_the_loss(case):
    rng = np.random.default_rng(3)
    mask, logps, engine = case["mask"], case["old_logps"], case["rollout_logps"]
    advantages = rng.normal(size=SHAPE).astype("f")
    found = jit(sign_skew)(logps, {"engine": engine, "self": logps}, advantages, mask)
    assert set(found) == {"engine_positive", "engine_negative", "self_positive", "self_negative"}
    for name, sign in (("positive", 1), ("negative", -1)):
        for i in range(len(mask)):
            seen = [t for t in np.flatnonzero(mask[i]) if sign * advantages[i, t] > 0]
            expected = sum(-(np.exp(float(logps[i, t]) - float(engine[i, t])) - 1) * advantages[i, t] for t in seen)
            np.testing.assert_allclose(found[f"engine_{name}"][i], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(found[f"self_{name}"], np.zeros(len(mask)))
