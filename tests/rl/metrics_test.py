import numpy as np
import pytest

from dcjax.rl import mismatch_metrics
from dcjax.rl.metrics import staleness_metrics

NAMES = {
    "prob_diff_mean",
    "prob_diff_max",
    "log_diff_mean",
    "k1",
    "k3",
    "log_ppl_abs_diff",
    "log_ppl_abs_diff_per_token",
}


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    old = rng.uniform(-4, 0, (5, 6)).astype(np.float32)
    rollout = (old + rng.normal(0, 0.3, old.shape)).astype(np.float32)
    lengths = np.array([6, 1, 0, 4, 3])
    mask = np.arange(6) < lengths[:, None]
    hidden = np.where(mask, 0, np.nan)
    return {"old_logps": old + hidden.astype("f"), "rollout_logps": rollout - hidden.astype("f"), "mask": mask}


def test_every_metric_against_a_loop_with_padding_that_is_not_a_number(case):
    deltas, logs, k3s, sums, per_token = [], [], [], [], []
    for old_row, rollout_row, mask in zip(*(case[name] for name in case), strict=True):
        pairs = [(float(p), float(q)) for p, q, kept in zip(old_row, rollout_row, mask, strict=True) if kept]
        if not pairs:
            continue
        deltas += [abs(np.exp(p) - np.exp(q)) for p, q in pairs]
        logs += [p - q for p, q in pairs]
        k3s += [np.exp(p - q) - 1 - (p - q) for p, q in pairs]
        sums.append(abs(sum(p - q for p, q in pairs)))
        per_token.append(sums[-1] / len(pairs))
    expected = {
        "prob_diff_mean": np.mean(deltas),
        "prob_diff_max": max(deltas),
        "log_diff_mean": np.mean(np.abs(logs)),
        "k1": -np.mean(logs),
        "k3": np.mean(k3s),
        "log_ppl_abs_diff": np.mean(sums),
        "log_ppl_abs_diff_per_token": np.mean(per_token),
    }
    metrics = mismatch_metrics(**case)
    assert set(metrics) == NAMES
    for name, value in expected.items():
        assert metrics[name].dtype == np.float32
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_one_response_by_hand():
    # p = (1/2, 1/4), q = (1/4, 1/4): δ = (1/4, 0), log r = (log 2, 0), r − 1 − log r = (1 − log 2, 0)
    old, rollout = np.log(np.array([[0.5, 0.25]], "f")), np.log(np.array([[0.25, 0.25]], "f"))
    metrics = mismatch_metrics(old_logps=old, rollout_logps=rollout, mask=np.ones((1, 2), bool))
    log2 = np.log(2)
    by_hand = {"prob_diff_mean": 0.125, "prob_diff_max": 0.25, "log_diff_mean": log2 / 2, "k1": -log2 / 2}
    by_hand |= {"k3": (1 - log2) / 2, "log_ppl_abs_diff": log2, "log_ppl_abs_diff_per_token": log2 / 2}
    assert set(by_hand) == NAMES
    for name, value in by_hand.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_differences_of_one_sign_add_up_over_a_response_and_of_both_cancel():
    old, mask = np.zeros((1, 4), "f"), np.ones((1, 4), bool)
    same, mixed = np.full((1, 4), -0.5, "f"), np.array([[-0.5, 0.5, -0.5, 0.5]], "f")
    of = {kind: mismatch_metrics(old_logps=old, rollout_logps=x, mask=mask) for kind, x in [("+", same), ("±", mixed)]}
    assert float(of["+"]["log_ppl_abs_diff"]) == 2.0
    assert float(of["±"]["log_ppl_abs_diff"]) == 0.0
    assert float(of["+"]["log_diff_mean"]) == float(of["±"]["log_diff_mean"]) == 0.5


def test_a_fully_masked_row_changes_nothing(case):
    kept = case["mask"].any(1)
    assert (~kept).any()
    whole, without = mismatch_metrics(**case), mismatch_metrics(**{name: x[kept] for name, x in case.items()})
    for name in NAMES:
        np.testing.assert_allclose(whole[name], without[name], rtol=1e-6, err_msg=name)


def test_without_a_token_everything_is_zero(case):
    metrics = mismatch_metrics(**(case | {"mask": np.zeros_like(case["mask"])}))
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(NAMES, 0.0)


def test_one_policy_has_no_mismatch_with_itself(case):
    metrics = mismatch_metrics(**(case | {"rollout_logps": case["old_logps"]}))
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(NAMES, 0.0)


def test_a_huge_gap_stays_finite():
    gap = {"old_logps": np.array([[0.0, -800.0]], "f"), "rollout_logps": np.array([[-800.0, 0.0]], "f")}
    metrics = mismatch_metrics(**gap, mask=np.ones((1, 2), bool))
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
    assert set(metrics) == {"prob_diff_mean", "k3"}
