from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit

from dcjax.rl import verl
from dcjax.rl.corrections import masked_importance_weights
from dcjax.rl.masked import token_mean
from dcjax.rl.transforms import Context, initial_terms
from dcjax.types import Batch

# ratios: 4, 1/2 and, hidden, nonsense; 1, 1, 1; a response without a token
OLD = np.log(np.array([[0.8, 0.1, 0.9], [0.5, 0.25, 0.125], [0.5, 0.5, 0.5]], np.float32))
ROLLOUT = np.log(np.array([[0.2, 0.2, 0.1], [0.5, 0.25, 0.125], [0.1, 0.9, 0.5]], np.float32))
MASK = np.array([[True, True, False], [True, True, True], [False, False, False]])
GAP = {"old_logps": OLD, "rollout_logps": ROLLOUT, "mask": MASK}
EVERYTHING = verl.Correction(
    rollout_is="sequence",
    rollout_rs=",".join(verl.DIVERGENCE_OPTIONS),
    rollout_rs_threshold=",".join(["5.0"] * len(verl.DIVERGENCE_OPTIONS)),
    rollout_token_veto_threshold=1e-4,
)


correct = jit(partial(verl.correct, correction=EVERYTHING))


@partial(jit, static_argnums=(0, 1))
def reject(options, thresholds):
    return verl.rejection_mask(**GAP, bounds=verl.parse_bounds(options, thresholds))


@pytest.mark.parametrize(
    ("option", "threshold", "first"),
    # x = ln 4, −ln 2: sum ln 2, mean ln √2; k2 .96 and .24; k3 1.61 and .19
    [
        ("token", "3.0", [False, True, False]),
        ("sequence", "2.1", [True, True, False]),
        ("sequence", "1.9", [False, False, False]),
        ("geometric", "1.5", [True, True, False]),
        ("geometric", "1.4", [False, False, False]),
        ("token_k1", "3.0", [False, True, False]),
        ("token_k2", "0.5", [False, True, False]),
        ("token_k3", "0.5", [False, True, False]),
        ("seq_sum_k2", "1.3", [True, True, False]),
        ("seq_sum_k2", "1.1", [False, False, False]),
        ("seq_mean_k3", "1.0", [True, True, False]),
        ("seq_mean_k3", "0.8", [False, False, False]),
        ("seq_max_k3", "1.7", [True, True, False]),
        ("seq_max_k3", "1.5", [False, False, False]),
    ],
)
def test_rejection_by_hand(option, threshold, first):
    mask, metrics = reject(option, threshold)
    np.testing.assert_array_equal(mask, [first, [True] * 3, [False] * 3])
    kept = sum(first)
    np.testing.assert_allclose(metrics["rollout_rs_masked_fraction"], (2 - kept) / 5, rtol=1e-6)
    # of all three rows, the empty one too
    np.testing.assert_allclose(metrics["rollout_rs_seq_masked_fraction"], (kept < 2) / 3, rtol=1e-6)


def test_asymmetric_bounds_of_k1_are_of_the_inverse_ratio():
    # 4 = π_old/μ is within (1/5, 5); μ/π_old = 1/4 is above 1/8 as well, and 4 is above 3
    np.testing.assert_array_equal(reject("token_k1", "0.125_3.0")[0][0], [True, True, False])
    np.testing.assert_array_equal(reject("token", "0.125_3.0")[0][0], [False, True, False])


def test_bounds_joined_by_commas_must_all_hold():
    both, _ = reject("token_k3,seq_max_k2", "0.5,2.0")
    np.testing.assert_array_equal(both, reject("token_k3", "0.5")[0])
    none, metrics = reject("token_k3,seq_max_k2", "0.5,0.9")
    np.testing.assert_array_equal(none[0], [False] * 3)
    assert {"rollout_rs_token_k3_mean", "rollout_rs_seq_max_k2_mean"} < set(metrics)


def test_the_veto_takes_whole_responses():
    mask, metrics = jit(partial(verl.veto_mask, threshold=0.6))(**GAP)
    np.testing.assert_array_equal(mask, [[False] * 3, [True] * 3, [False] * 3])
    np.testing.assert_allclose(metrics["rollout_is_veto_fraction"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["rollout_is_catastrophic_token_fraction"], 1 / 5, rtol=1e-6)
    np.testing.assert_array_equal(jit(partial(verl.veto_mask, threshold=0.4))(**GAP)[0], MASK)


def test_k3_is_bounded_as_a_penalty():
    arguments = {"reference_logps": np.zeros((1, 2), "f"), "mask": np.ones((1, 2), bool), "kind": "k3"}

    def total(logps):
        kl = verl.kl_penalty(logps=logps, **arguments)
        return jnp.sum(kl), kl

    grad, kl = jit(jax.grad(total, has_aux=True))(np.array([[-1.0, -5.0]], "f"))
    np.testing.assert_allclose(kl, [[np.e - 2, 10]], rtol=1e-6)
    np.testing.assert_allclose(grad, [[1 - np.e, 0]], rtol=1e-6)


def test_the_sum_over_a_constant_does_not_count_responses():
    def loss(rows):
        total, denominator = verl.seq_mean_token_sum_norm(6)(np.ones((rows, 3), "f"), np.ones((rows, 3), bool))
        return total, denominator

    (total, denominator), half = jit(lambda: (loss(4), loss(2)))()
    assert float(total / denominator) == 2
    # over two microbatches, the mean of theirs
    assert float(2 * half[0] / (2 * half[1])) == 1
    with pytest.raises(ValueError, match="loss_scale_factor is 0; it must be at least 1 token"):
        verl.seq_mean_token_sum_norm(0)


def test_paper_bs_masking_keeps_the_denominator_and_verls_does_not():
    mask, _ = reject("token", "0.001_2.0")
    weights = np.asarray(jit(partial(masked_importance_weights, clip_max=2.0))(**GAP))
    np.testing.assert_array_equal(weights > 0, mask)
    losses = np.ones(MASK.shape, np.float32)
    assert float(token_mean(losses * weights, MASK).denominator) == 5
    assert float(token_mean(losses * weights, mask).denominator) == 4


@pytest.mark.parametrize("hidden", ["old_logps", "rollout_logps"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_the_mask_hides_never_matters(hidden, bad):
    poisoned = GAP | {hidden: np.where(MASK, GAP[hidden], bad).astype("f")}
    ours, expected = (correct(**gap) for gap in (poisoned, GAP))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_nothing_to_correct_without_a_token():
    weights, mask, metrics = correct(**GAP | {"mask": np.zeros_like(MASK)})
    assert not np.asarray(mask).any()
    np.testing.assert_array_equal(weights, np.zeros(MASK.shape))
    assert not any(np.isnan(value) for value in metrics.values())


def test_equal_log_probs_are_neither_weighed_nor_rejected():
    geometric = partial(verl.correct, correction=verl.PRESETS["decoupled_geo_rs_token_tis"])
    weights, mask, metrics = jit(geometric)(old_logps=OLD, rollout_logps=OLD, mask=MASK)
    np.testing.assert_array_equal(weights, MASK)
    np.testing.assert_array_equal(mask, MASK)
    assert float(metrics["rollout_corr/kl"]) == 0
    np.testing.assert_allclose(metrics["rollout_corr/rollout_is_eff_sample_size"], 1, rtol=1e-6)


def test_everything_at_once_is_each_by_itself():
    weights, mask, metrics = correct(**GAP)

    @jit
    def apart(gap):
        parts = [
            verl.importance_weights(**gap, level="sequence", threshold=2.0),
            *(verl.rejection_mask(**gap, bounds=(bound,)) for bound in EVERYTHING.bounds),
            verl.veto_mask(**gap, threshold=1e-4),
        ]
        return [part for part, _ in parts], verl.offpolicy_metrics(**gap)

    (alone, *kept), offpolicy = apart(GAP)
    np.testing.assert_allclose(weights, alone, rtol=1e-6)
    np.testing.assert_array_equal(mask, np.logical_and.reduce(kept))
    for name, value in offpolicy.items():
        np.testing.assert_allclose(metrics[f"rollout_corr/{name}"], value, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def context():
    rewards = np.array([1, 0, 1], np.float32)
    batch = Batch(
        tokens=np.zeros((3, 4), np.int32),
        attention_mask=np.ones((3, 4), bool),
        response_mask=MASK,
        rollout_logps=ROLLOUT,
        temperature=np.ones(3, np.float32),
        rewards=rewards,
        group_rewards=np.array([[1, 0]] * 3, np.float32),
    )
    return Context(
        batch=batch,
        # the policy being differentiated has come back to μ
        logps=ROLLOUT,
        old_logps=OLD,
        multiplier=None,
        mean_reward=jnp.asarray(rewards.mean()),
    )


def apply(correction, context, mask=MASK):
    """The terms before it and after."""

    @jit
    def run(context):
        before = initial_terms(context.batch).replace(mask=mask)
        return before, verl.rollout_correction(correction)(before, context)

    return run(context)


def test_a_transform_multiplies_weights_and_edits_the_mask(context):
    correction = verl.Correction(rollout_is="token", rollout_rs="token_k1", rollout_rs_threshold="3.0")
    _, terms = apply(correction, context)
    np.testing.assert_allclose(terms.weights, [[2, 0.5, 0], [1, 1, 1], [0, 0, 0]], rtol=1e-5)
    np.testing.assert_array_equal(terms.mask, [[False, True, False], [True] * 3, [False] * 3])
    np.testing.assert_allclose(terms.metrics["verl/masked_fraction"], [0.5, 0, 0], atol=1e-6)


def test_a_transform_keeps_out_what_others_took_out(context):
    before, terms = apply(verl.PRESETS["disabled"], context, MASK & np.array([[True], [False], [True]]))
    assert not before.mask[1].any()
    np.testing.assert_array_equal(terms.mask, before.mask)


def test_disabled_changes_nothing(context):
    before, after = apply(verl.PRESETS["disabled"], context)
    np.testing.assert_array_equal(after.weights, np.where(MASK, before.weights, 0))
    np.testing.assert_array_equal(after.mask, before.mask)


def test_bypass_weighs_the_policy_that_is_differentiated_without_a_gradient(context):
    transform = verl.rollout_correction(verl.PRESETS["bypass_pg_is"])

    def total(logps):
        weights = transform(initial_terms(context.batch), context.replace(logps=logps)).weights
        return jnp.sum(weights), weights

    grad, weights = jit(jax.grad(total, has_aux=True))(context.logps)
    np.testing.assert_array_equal(weights, MASK)
    np.testing.assert_array_equal(grad, np.zeros(MASK.shape))


def test_presets_by_verls_names():
    geometric = verl.PRESETS["decoupled_geo_rs_seq_tis"]
    assert geometric.bounds == (verl.Bound("seq_mean_k1", 0.999, 1.001),)
    assert (geometric.rollout_is, geometric.rollout_is_threshold, geometric.bypass_mode) == ("sequence", 2.0, False)
    assert verl.PRESETS["decoupled_k3_rs"].bounds == (verl.Bound("seq_mean_k3", 0.0, 0.01),)
    assert verl.PRESETS["decoupled_seq_is_rs"].bounds == (verl.Bound("seq_sum_k1", 0.5, 2.0),)
    assert all(name.startswith("bypass") == preset.bypass_mode for name, preset in verl.PRESETS.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_is": "geometric"}, "rollout_is is 'geometric'; it must be token, sequence or None"),
        ({"rollout_is_threshold": 0.0}, "rollout_is_threshold is 0.0; it must be above 0"),
        ({"rollout_token_veto_threshold": -1.0}, "rollout_token_veto_threshold is -1.0"),
        ({"rollout_rs": "token_k1"}, "its threshold None; give both or neither"),
        ({"rollout_rs": "seq_max_k1", "rollout_rs_threshold": "2.0"}, "rollout_rs is 'seq_max_k1'; it must be one of"),
        ({"rollout_rs": "token_k1,token_k2", "rollout_rs_threshold": "2.0"}, "as many thresholds as options"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": "2.0_0.5"}, "the threshold of token_k1 is '2.0_0.5'"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": "0.5_1_2"}, "it must be u or lower_upper, positive"),
        ({"rollout_rs": "token_k3", "rollout_rs_threshold": "0.5_2.0"}, "it must be u, positive"),
        ({"rollout_rs": "token_k3", "rollout_rs_threshold": "much"}, "the threshold of token_k3 is 'much'"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": "inf"}, "the threshold of token_k1 is 'inf'"),
    ],
)
def test_options_that_cannot_be_are_refused_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        verl.Correction(**options)
