"""Numbers that verl's own functions gave, in float64; its masked means divide by count + 1e-8, hence the tolerance.

Not covered, because they cannot be expressed here: a group of one (wide/adv), the dual clip and unclamped k3 beyond ±20
(tokens that either touches are set apart below), and verl's refusal of a batch without a token.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcjax.rl import clipped_surrogate, group_relative, mismatch_metrics
from dcjax.rl.losses import ratio
from dcjax.rl.masked import masked_mean, token_mean
from dcjax.rl.metrics import staleness_metrics

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "verl_vectors.json").read_text())
CASES = {case["name"]: case for case in VECTORS["cases"]}
RTOL = 1e-6


def cases(*parts):
    names = [name for name in CASES if all(part in name for part in parts) and not name.startswith("allmasked")]
    assert names
    return pytest.mark.parametrize("name", names)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def load(name):
    case = CASES[name]
    inputs = {key: np.array(value) for key, value in case["inputs"].items()}
    return inputs, inputs["response_mask"].astype(bool), case["params"], case["outputs"]


@cases("/adv/")
def test_group_relative_advantages(name):
    inputs, mask, params, outputs = load(name)
    scores, expected = inputs["token_level_rewards"].sum(1), np.array(outputs["advantages"])
    covered = 0
    for index in np.unique(inputs["index"]):
        rows = np.flatnonzero(inputs["index"] == index)
        if len(rows) == 1:
            continue
        ours = group_relative(scores[rows], group_size=len(rows), scale_by_std=params["norm_adv_by_std_in_grpo"])
        assert ours.dtype == np.float64
        rtol = 1e-4 if "vectorized" in name else RTOL
        np.testing.assert_allclose(np.asarray(ours)[:, None] * mask[rows], expected[rows], rtol=rtol, atol=1e-7)
        covered += len(rows)
    assert covered == (7 if name.startswith("wide") else 8)


@cases("/agg/token-mean/")
def test_token_mean(name):
    inputs, mask, params, outputs = load(name)
    total, denominator = token_mean(inputs["loss_mat"], mask)
    assert total.dtype == np.float64
    # spread over devices, verl divides by the tokens of all of them and scales each one's gradient back up
    divisor = params["batch_num_tokens"] / params["dp_size"] if "dp_size" in params else denominator
    np.testing.assert_allclose(total / divisor, outputs["loss"], rtol=RTOL)


def test_token_mean_without_a_token_is_nothing_over_nothing():
    inputs, mask, _, outputs = load("allmasked/agg/token-mean")
    total, denominator = token_mean(inputs["loss_mat"], mask)
    assert outputs["loss"] == {"nonfinite": "nan"}
    assert (float(total), float(denominator)) == (0, 0)


@cases("/loss/ppo/token-mean/")
def test_clipped_surrogate_with_gradient(name):
    inputs, mask, params, outputs = load(name)
    logps, old, advantages = inputs["log_prob"], inputs["old_log_prob"], inputs["advantages"]
    weights = inputs.get("rollout_is_weights", np.ones(mask.shape))
    r = np.exp(np.clip(logps - old, -20, 20))
    # verl bounds the loss of a bad token that became very likely at −Ã·c: a constant, without gradient
    dual = mask & (advantages < 0) & (r > params["clip_ratio_c"])
    assert dual.any() == (outputs["metrics"]["actor/pg_clipfrac_lower"] > 0)
    constant = (-weights * advantages * params["clip_ratio_c"])[dual].sum()

    def loss(logps):
        losses, clipped = clipped_surrogate(
            logps,
            old_logps=old,
            advantages=advantages,
            weights=weights,
            mask=mask & ~dual,
            eps_low=params["clip_ratio_low"],
            eps_high=params["clip_ratio_high"],
        )
        return (losses.sum() + constant) / mask.sum(), clipped

    (value, clipped), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logps))
    assert value.dtype == grad.dtype == np.float64
    np.testing.assert_allclose(value, outputs["loss"], rtol=RTOL)
    np.testing.assert_allclose(grad, np.array(outputs["grad_log_prob"]), rtol=RTOL, atol=1e-9)
    fraction = masked_mean(clipped.astype(np.float64), mask)
    np.testing.assert_allclose(fraction, outputs["metrics"]["actor/pg_clipfrac"], rtol=RTOL)


@cases("/kl/")
def test_kl_estimators(name):
    inputs, mask, params, outputs = load(name)
    logps, reference, expected = inputs["log_prob"], inputs["ref_log_prob"], np.array(outputs["kl"])
    gap = reference - logps
    # verl bounds k3 at 10; ours is bounded by the log-ratio alone
    mask = mask & (expected < 10) & (np.abs(gap) < 20)
    assert mask.sum() >= 30
    estimator = params["kl_penalty"]
    metrics = mismatch_metrics(old_logps=reference, rollout_logps=logps, mask=mask)
    np.testing.assert_allclose(metrics[estimator], expected[mask].mean(), rtol=RTOL)
    if estimator == "k3":
        stale = staleness_metrics(logps=reference, old_logps=logps, mask=mask)
        np.testing.assert_allclose(stale["k3"], expected[mask].mean(), rtol=RTOL)


@cases("/metrics/offpolicy")
def test_mismatch_metrics(name):
    inputs, mask, _, outputs = load(name)
    old, rollout, expected = inputs["old_log_prob"], inputs["rollout_log_prob"], outputs["metrics"]
    metrics = mismatch_metrics(old_logps=old, rollout_logps=rollout, mask=mask)
    np.testing.assert_allclose(metrics["k1"], expected["kl"], rtol=RTOL)
    # verl's means over rows count the ones without a token, as zeros
    counted = mask.any(1).mean()
    ours = metrics["log_ppl_abs_diff_per_token"] * counted
    np.testing.assert_allclose(ours, expected["log_ppl_abs_diff"], rtol=RTOL)
    assert (counted < 1) == name.startswith("empty")

    gap = old - rollout
    beyond = mask & (np.abs(gap) > 20)
    assert beyond.any() == name.startswith("wide")
    unclamped = (np.exp(gap) - np.asarray(ratio(logps=old, reference_logps=rollout)))[beyond].sum() / mask.sum()
    np.testing.assert_allclose(metrics["k3"] + unclamped, expected["k3_kl"], rtol=RTOL)
