"""Numbers that verl's own functions gave, in float64; its masked means divide by count + 1e-8, hence the tolerance.

`COVERED` lists every case by family. What no case of it can be compared on is in the tests named there.
"""

import collections
import functools
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit

from dcjax.rl import verl
from dcjax.rl.advantages import group_relative, leave_one_out
from dcjax.rl.corrections import truncated_importance_weights
from dcjax.rl.losses import cispo, clipped_surrogate, gspo, kl_estimate, policy_gradient
from dcjax.rl.masked import (
    masked_mean,
    seq_mean_token_mean,
    seq_mean_token_sum,
    seq_mean_token_sum_norm,
    token_mean,
)
from dcjax.rl.metrics import mismatch_metrics

VECTORS = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "verl_vectors.json.gz").read_bytes()))
CASES = {case["name"]: case for case in VECTORS["cases"]}
RTOL = 1e-6

compiled_metrics = jit(mismatch_metrics)

COVERED = {
    "adv": 18,  # but for the group of one in `wide`, which has no deviation and no others: `group_relative` refuses it
    "agg": 24,
    "is": 12,
    "loss": 42,
    "kl": 12,
    "rs": 75,
    "mis": 21,
    "veto": 27,
    "unified": 9,
    "metrics": 3,
    "allmasked": 5,  # verl's NaN is 0 of 0 here, and the batch that it refuses has no gap
}


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


def load_gap(name):
    inputs, mask, params, outputs = load(name)
    gap = {"old_logps": inputs["old_log_prob"], "rollout_logps": inputs["rollout_log_prob"], "mask": mask}
    return gap, params, outputs


def close(ours, expected, rtol=RTOL, atol=0.0):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), rtol=rtol, atol=atol)


def same_metrics(ours, expected):
    """Every name of verl's and no other. The deviation of weights that all sit on one bound is verl's own rounding."""
    assert set(ours) == set(expected)
    for name, value in expected.items():
        atol = 1e-7 if name.endswith("_std") else 1e-12
        np.testing.assert_allclose(ours[name], value, rtol=RTOL, atol=atol, err_msg=name)


def test_every_case_is_of_a_family_that_is_covered():
    families = collections.Counter(
        "allmasked" if name.startswith("allmasked") else name.split("/")[1] for name in CASES
    )
    assert families == COVERED
    assert sum(families.values()) == 248


@cases("/adv/")
def test_advantages(name):
    inputs, mask, params, outputs = load(name)
    scores, expected = inputs["token_level_rewards"].sum(1), np.array(outputs["advantages"])
    covered = 0
    for index in np.unique(inputs["index"]):
        rows = np.flatnonzero(inputs["index"] == index)
        if len(rows) == 1:
            continue
        if "rloo" in name:
            ours = leave_one_out(scores[rows], group_size=len(rows))
        else:
            ours = group_relative(scores[rows], group_size=len(rows), scale_by_std=params["norm_adv_by_std_in_grpo"])
        assert ours.dtype == np.float64
        rtol = 1e-4 if "grpo_vectorized" in name else RTOL
        close(np.asarray(ours)[:, None] * mask[rows], expected[rows], rtol=rtol, atol=1e-7)
        covered += len(rows)
    assert covered == (7 if name.startswith("wide") else 8)


def test_a_group_of_one_is_refused_where_verl_has_three_answers():
    answers = set()
    for name in CASES:
        if name.startswith("wide/adv"):
            inputs, _, _, outputs = load(name)
            alone = np.flatnonzero(np.bincount(inputs["index"])[inputs["index"]] == 1)
            score = inputs["token_level_rewards"].sum(1)[alone[0]]
            answers.add(round(outputs["advantages"][alone[0]][0] / score, 7))
    assert answers == {0.0, 0.999999, 1.0}
    with pytest.raises(ValueError, match="group_size is 1"):
        leave_one_out(np.ones(1), group_size=1)


AGGREGATIONS = {
    "token-mean": token_mean,
    "seq-mean-token-mean": seq_mean_token_mean,
    "seq-mean-token-sum": seq_mean_token_sum,
    # verl's default is the padded width
    "seq-mean-token-sum-norm": verl.seq_mean_token_sum_norm(9),
}


@cases("/agg/")
def test_aggregations(name):
    inputs, mask, params, outputs = load(name)
    mode = params["loss_agg_mode"]
    total, denominator = AGGREGATIONS[mode](inputs["loss_mat"], mask)
    assert total.dtype == denominator.dtype == np.float64
    if "dp_size" in params:
        # over devices, verl divides by what all of them hold and scales each one's gradient back up
        shares = {
            "token-mean": params["batch_num_tokens"] / params["dp_size"],
            "seq-mean-token-sum-norm": params["loss_scale_factor"],
        }
        denominator = shares.get(mode, params["global_batch_size"] / params["dp_size"])
    close(total / denominator, outputs["loss"])


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_aggregations_without_a_token_are_nothing(mode):
    inputs, mask, _, outputs = load(f"allmasked/agg/{mode}")
    total, denominator = AGGREGATIONS[mode](inputs["loss_mat"], mask)
    assert float(total) == 0
    if mode.endswith("norm"):
        assert outputs["loss"] == 0
    elif mode == "token-mean":
        assert (outputs["loss"], float(denominator)) == ({"nonfinite": "nan"}, 0)
    else:
        assert float(denominator) == 0


def test_the_norm_of_drgrpo_is_a_mean_over_responses_and_verls_is_a_sum():
    inputs, mask, _, outputs = load("empty/agg/seq-mean-token-sum-norm/local")
    total, denominator = seq_mean_token_sum_norm(9)(inputs["loss_mat"], mask)
    # the one row without a token counts in neither
    assert (float(denominator), len(mask)) == (7, 8)
    close(total / denominator * 7, outputs["loss"])


def surrogate_of(name, params):
    bounds = {"eps_low": params.get("clip_ratio_low"), "eps_high": params.get("clip_ratio_high")}
    if "/ppo/" in name:
        surrogate = lambda *args, **kw: clipped_surrogate(*args, **kw, **bounds, dual_clip=params["clip_ratio_c"])  # noqa: E731
    elif "/reinforce/" in name:
        surrogate = policy_gradient
    else:
        one = gspo if "/gspo/" in name else cispo
        surrogate = lambda *args, **kw: one(*args, **kw, **bounds)  # noqa: E731
    return surrogate, AGGREGATIONS[params.get("loss_agg_mode", "seq-mean-token-mean")]


@functools.cache
def compiled_surrogate(family, params):
    """One program for the three batches of a case."""
    surrogate, aggregate = surrogate_of(family, json.loads(params))

    def loss(logps, old, advantages, weights, mask):
        losses, clipped = surrogate(logps, old_logps=old, advantages=advantages, weights=weights, mask=mask)
        total, denominator = aggregate(losses, mask)
        return total / denominator, clipped

    return jit(jax.value_and_grad(loss, has_aux=True))


@cases("/loss/")
def test_surrogates_with_gradients(name):
    inputs, mask, params, outputs = load(name)
    old = inputs["rollout_log_prob"] if "/reinforce/" in name else inputs["old_log_prob"]
    weights = inputs.get("rollout_is_weights", np.ones(mask.shape))
    family = name[name.index("/") :]
    (value, clipped), grad = compiled_surrogate(family, json.dumps(params))(
        inputs["log_prob"], old, inputs["advantages"], weights, mask
    )
    assert value.dtype == grad.dtype == np.float64
    close(value, outputs["loss"])
    close(grad, outputs["grad_log_prob"], atol=1e-12)
    metrics = outputs["metrics"]
    # the two clips never meet
    expected = metrics.get("actor/pg_clipfrac", 0) + metrics.get("actor/pg_clipfrac_lower", 0)
    close(masked_mean(clipped.astype(np.float64), mask), expected, atol=1e-9)


def test_the_dual_clip_is_met():
    clipped = [CASES[name]["outputs"]["metrics"]["actor/pg_clipfrac_lower"] for name in CASES if "/loss/ppo/" in name]
    assert max(clipped) > 0


@cases("/kl/")
def test_kl_estimates_with_gradients(name):
    inputs, mask, params, outputs = load(name)
    arguments = {"reference_logps": inputs["ref_log_prob"], "mask": mask, "kind": params["kl_penalty"]}

    @jit
    def run(logps):
        def total(logps):
            kl = verl.kl_penalty(logps=logps, **arguments)
            return jnp.sum(kl), kl

        return *jax.grad(total, has_aux=True)(logps), kl_estimate(logps=logps, **arguments)

    grad, kl, ours = run(inputs["log_prob"])
    close(np.asarray(kl)[mask], np.array(outputs["kl"])[mask], atol=1e-15)
    close(grad, outputs["grad_of_masked_sum"], atol=1e-12)
    # no token of these reaches verl's bound of k3
    np.testing.assert_array_equal(ours, kl)


@cases("/is/")
def test_importance_weights(name):
    gap, params, outputs = load_gap(name)
    options = {"level": params["rollout_is"], "threshold": params["rollout_is_threshold"]}
    normalize = params["rollout_is_batch_normalize"]
    weights, metrics = verl.importance_weights(**gap, **options, batch_normalize=normalize)
    close(weights, outputs["weights"], atol=1e-15)
    same_metrics(metrics, outputs["metrics"])
    if not normalize:
        ours = truncated_importance_weights(**gap, level=options["level"], clip_max=options["threshold"])
        close(ours, outputs["weights"], atol=1e-15)


@cases("/rs/")
def test_rejection_by_divergence(name):
    gap, params, outputs = load_gap(name)
    bounds = verl.parse_bounds(params["rollout_rs"], params["rollout_rs_threshold"])
    mask, metrics = verl.rejection_mask(**gap, bounds=bounds)
    np.testing.assert_array_equal(mask, np.array(outputs["response_mask"], bool))
    same_metrics(metrics, outputs["metrics"])


def older_threshold(params):
    """verl kept the two bounds apart then."""
    lower, upper = params["rollout_rs_threshold_lower"], params["rollout_rs_threshold"]
    return str(upper) if lower is None else f"{lower}_{upper}"


@cases("/mis/")
def test_rejection_by_ratio(name):
    gap, params, outputs = load_gap(name)
    bounds = verl.parse_bounds(params["rollout_rs"], older_threshold(params))
    mask, metrics = verl.rejection_mask(**gap, bounds=bounds)
    np.testing.assert_array_equal(mask, np.array(outputs["response_mask"], bool))
    same_metrics(metrics, outputs["metrics"])


def compare_whole(gap, correction, outputs):
    weights, mask, metrics = verl.correct(**gap, correction=correction)
    if correction.rollout_is is None:
        assert "weights" not in outputs
        np.testing.assert_array_equal(weights, gap["mask"])
    else:
        close(weights, outputs["weights"], atol=1e-15)
    np.testing.assert_array_equal(mask, np.array(outputs["response_mask"], bool))
    same_metrics(metrics, outputs["metrics"])


@cases("/veto/")
def test_veto(name):
    gap, params, outputs = load_gap(name)
    rejection = {}
    if params["rollout_rs"] is not None:
        rejection = {"rollout_rs": params["rollout_rs"], "rollout_rs_threshold": older_threshold(params)}
    correction = verl.Correction(
        rollout_is=params["rollout_is"],
        rollout_is_threshold=params["rollout_is_threshold"],
        rollout_token_veto_threshold=params["rollout_token_veto_threshold"],
        **rejection,
    )
    compare_whole(gap, correction, outputs)


@cases("/unified/")
def test_weights_rejection_and_metrics_in_one(name):
    gap, params, outputs = load_gap(name)
    compare_whole(gap, verl.Correction(**params), outputs)


@cases("/metrics/offpolicy")
def test_offpolicy_metrics(name):
    gap, _, outputs = load_gap(name)
    same_metrics(verl.offpolicy_metrics(**gap), outputs["metrics"])


def test_a_batch_without_a_token_has_no_gap_where_verl_refuses_it():
    gap, _, outputs = load_gap("allmasked/metrics/offpolicy")
    assert "error" in outputs
    metrics = {name: float(value) for name, value in jit(verl.offpolicy_metrics)(**gap).items()}
    ones = {"training_ppl", "rollout_ppl", "ppl_ratio"}
    assert metrics == {name: float(name in ones) for name in metrics}


@cases("/metrics/offpolicy")
def test_our_metrics_leave_rows_without_a_token_out_and_verls_count_them(name):
    gap, _, outputs = load_gap(name)
    ours, expected = compiled_metrics(**gap), outputs["metrics"]
    occupied = gap["mask"].any(1)
    assert (occupied.mean() < 1) == name.startswith("empty")
    close(ours["k1"], expected["kl"])
    close(ours["log_ppl_abs_diff_per_token"] * occupied.mean(), expected["log_ppl_abs_diff"])
    x = np.where(gap["mask"], gap["old_logps"] - gap["rollout_logps"], 0)
    beyond = np.abs(x) > 20
    assert beyond.any() == name.startswith("wide")
    # verl clamps no log-ratio in k3_kl
    unclamped = (np.exp(x) - np.exp(np.clip(x, -20, 20)))[beyond].sum() / gap["mask"].sum()
    close(ours["k3"] + unclamped, expected["k3_kl"])
