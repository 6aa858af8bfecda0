import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcjax.rl import corrections
from dcjax.rl.corrections import (
    icepop_weights,
    log_importance,
    masked_importance_weights,
    truncated_importance_weights,
)
from dcjax.rl.transforms import Context, chain, drop_zero_variance, initial_terms
from dcjax.types import Batch

# ratios: 4, 1/2 and, hidden, nonsense; 1, 1, 1; a response without a token
OLD = np.log(np.array([[0.8, 0.1, 0.9], [0.5, 0.25, 0.125], [0.5, 0.5, 0.5]], np.float32))
ROLLOUT = np.log(np.array([[0.2, 0.2, 0.1], [0.5, 0.25, 0.125], [0.1, 0.9, 0.5]], np.float32))
MASK = np.array([[True, True, False], [True, True, True], [False, False, False]])
GAP = {"old_logps": OLD, "rollout_logps": ROLLOUT, "mask": MASK}

WEIGHTS = {
    f"{name}/{level}": partial(weigh, clip_max=2.0, level=level)
    for name, weigh in {"tis": truncated_importance_weights, "mis": masked_importance_weights}.items()
    for level in ("token", "sequence", "geometric")
    # 1/2 in float32 logs may fall short of a lower bound of 1/2
} | {"icepop": partial(icepop_weights, low=0.499, high=5.0)}
EACH = pytest.mark.parametrize("name", WEIGHTS)

LOGPS = arrays(np.float32, (3, 3), elements=st.floats(-6, 0, width=32))
MASKS = arrays(np.bool_, (3, 3))


@jit
def weigh_all(gap):
    return {name: weigh(**gap) for name, weigh in WEIGHTS.items()}


@jit
def slopes(gap):
    """Gradients of every sum of weights to both log-probs."""

    def totals(old, rollout):
        found = weigh_all.__wrapped__(gap | {"old_logps": old, "rollout_logps": rollout})
        return {name: jnp.sum(weights) for name, weights in found.items()}

    return jax.jacrev(totals, argnums=(0, 1))(gap["old_logps"], gap["rollout_logps"])


def run(name, **changes):
    """Every kind of weights in one program."""
    return np.asarray(weigh_all(GAP | changes)[name])


@pytest.mark.parametrize(
    ("name", "first"),
    # Π = 2, its root √2
    [
        ("tis/token", [2, 0.5, 0]),
        ("tis/sequence", [2, 2, 0]),
        ("tis/geometric", [2**0.5, 2**0.5, 0]),
        ("mis/token", [0, 0.5, 0]),
        ("mis/geometric", [2**0.5, 2**0.5, 0]),
        ("icepop", [4, 0.5, 0]),
    ],
)
def test_weights_by_hand(name, first):
    np.testing.assert_allclose(run(name), [first, [1, 1, 1], [0, 0, 0]], rtol=1e-5)


def test_icepop_drops_on_both_sides():
    ours = jit(partial(icepop_weights, low=0.6, high=3.0))(**GAP)
    np.testing.assert_allclose(ours, [[0, 0, 0], [1, 1, 1], [0, 0, 0]], rtol=1e-6)


def loop(old, rollout, mask, level, keep):
    weights = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        gaps = [float(old[i, t]) - float(rollout[i, t]) for t in np.flatnonzero(row)]
        for t in np.flatnonzero(row):
            log_ratio = {
                "token": float(old[i, t]) - float(rollout[i, t]),
                "sequence": sum(gaps),
                "geometric": sum(gaps) / len(gaps),
            }[level]
            weights[i, t] = keep(np.exp(min(max(log_ratio, -20), 20)))
    return weights


@settings(max_examples=50)
@given(old=LOGPS, rollout=LOGPS, mask=MASKS)
def test_weights_against_a_loop(old, rollout, mask):
    found = weigh_all({"old_logps": old, "rollout_logps": rollout, "mask": mask})
    for level in ("token", "sequence", "geometric"):
        expected = loop(old, rollout, mask, level, lambda ratio: min(ratio, 2.0))
        np.testing.assert_allclose(found[f"tis/{level}"], expected, rtol=1e-4)
        expected = loop(old, rollout, mask, level, lambda ratio: ratio if ratio <= 2 else 0.0)
        # what lies on the bound may fall on either side of it
        near = np.abs(loop(old, rollout, mask, level, float) - 2) < 1e-3
        np.testing.assert_allclose(np.asarray(found[f"mis/{level}"])[~near], expected[~near], rtol=1e-4)


@settings(max_examples=50)
@given(logps=LOGPS, mask=MASKS)
def test_equal_log_probs_weigh_one(logps, mask):
    for weights in weigh_all({"old_logps": logps, "rollout_logps": logps, "mask": mask}).values():
        np.testing.assert_array_equal(weights, mask)


@EACH
@pytest.mark.parametrize("hidden", ["old_logps", "rollout_logps"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_the_mask_hides_has_no_weight_and_changes_none(name, hidden, bad):
    weights = run(name, **{hidden: np.where(MASK, GAP[hidden], bad).astype("f")})
    np.testing.assert_array_equal(weights, run(name))
    assert (weights[~MASK] == 0).all()


@EACH
def test_no_gradient_flows_through_a_weight(name):
    for grad in slopes(GAP)[name]:
        np.testing.assert_array_equal(grad, np.zeros_like(OLD))


@EACH
@pytest.mark.parametrize("gap", [-1e4, -20.0, 20.0, 1e4])
def test_extreme_log_probs_stay_finite(name, gap):
    assert np.isfinite(run(name, old_logps=ROLLOUT + np.float32(gap))).all()


@EACH
def test_weights_are_float32_or_wider(name):
    weigh = WEIGHTS[name]
    half = {name: jnp.asarray(GAP[name], jnp.bfloat16) for name in ("old_logps", "rollout_logps")}
    assert jax.eval_shape(weigh, **half, mask=MASK).dtype == jnp.float32
    with jax.enable_x64(True):
        double = {name: GAP[name].astype(np.float64) for name in ("old_logps", "rollout_logps")}
        assert jax.eval_shape(weigh, **double, mask=MASK).dtype == np.float64


def test_rows_may_be_cut_anywhere():
    parts = [weigh_all({name: array[rows] for name, array in GAP.items()}) for rows in (slice(1), slice(1, 3))]
    for name in WEIGHTS:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), run(name))


def test_the_log_ratio_is_not_clamped():
    gap = {
        "old_logps": np.zeros((1, 2), "f"),
        "rollout_logps": np.full((1, 2), -30.0, "f"),
        "mask": np.ones((1, 2), bool),
    }
    by_level = jit(lambda: [log_importance(**gap, level=level) for level in ("token", "sequence")])
    np.testing.assert_array_equal(by_level(), [[[30, 30]], [[60, 60]]])


@pytest.mark.parametrize("weigh", [truncated_importance_weights, masked_importance_weights])
@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_that_is_not_above_zero_is_refused(weigh, bound):
    with pytest.raises(ValueError, match=r"clip_max is .*; it must be above 0"):
        weigh(**GAP, clip_max=bound)


@pytest.mark.parametrize("bounds", [(2.0, 0.5), (-0.1, 2.0), (1.0, 1.0)])
def test_bounds_out_of_order_are_refused(bounds):
    low, high = bounds
    with pytest.raises(ValueError, match=f"the bounds are {low} and {high}"):
        icepop_weights(**GAP, low=low, high=high)
    with pytest.raises(ValueError, match=f"the bounds are {low} and {high}"):
        corrections.icepop_mask(low, high)


def test_another_level_is_refused():
    with pytest.raises(ValueError, match="level is 'group'; it must be token, sequence or geometric"):
        truncated_importance_weights(**GAP, clip_max=2.0, level="group")


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
        # the second response's group is all alike
        group_rewards=np.array([[1, 0], [0, 0], [1, 0]], np.float32),
    )
    return Context(batch=batch, logps=OLD, old_logps=OLD, multiplier=None, mean_reward=jnp.asarray(rewards.mean()))


TRANSFORMS = {
    "token_tis": (corrections.token_tis(2.0), "tis/token", [0.5, 0, 0]),
    "token_mis": (corrections.token_mis(2.0), "mis/token", [0.5, 0, 0]),
    "geometric_tis": (corrections.geometric_tis(2.0), "tis/geometric", [0, 0, 0]),
    "geometric_mis": (corrections.geometric_mis(2.0), "mis/geometric", [0, 0, 0]),
}
WHOLE = {"sequence_tis": (corrections.sequence_tis(1.5), 1.5), "sequence_mis": (corrections.sequence_mis(1.5), 0.0)}


@pytest.fixture(scope="module")
def transformed(context):
    """The terms after every transform, weights first set to 3, in one program."""
    correct, drop = corrections.sequence_tis(2.0), drop_zero_variance()
    transforms = {
        **{name: of[0] for name, of in (TRANSFORMS | WHOLE).items()},
        "icepop": corrections.icepop_mask(0.6, 3.0),
        "corrected, dropped": chain(correct, drop),
        "dropped, corrected": chain(drop, correct),
    }

    @jit
    def run(context):
        before = dataclasses.replace(initial_terms(context.batch), weights=jnp.full(MASK.shape, 3.0))
        return {"before": before} | {name: transform(before, context) for name, transform in transforms.items()}

    return run(context)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_multiplies_the_weights_and_counts_what_it_changed(transformed, name):
    _, weights, fractions = TRANSFORMS[name]
    before, after = transformed["before"], transformed[name]
    np.testing.assert_allclose(after.weights, 3 * run(weights), rtol=1e-6)
    np.testing.assert_array_equal(after.metrics[f"{name}/clipped_fraction"], fractions)
    # the denominator stays
    np.testing.assert_array_equal(after.mask, before.mask)
    np.testing.assert_array_equal(after.advantages, before.advantages)


@pytest.mark.parametrize("name", WHOLE)
def test_a_responses_ratio_is_bounded_whole(transformed, name):
    _, weight = WHOLE[name]
    after = transformed[name]
    np.testing.assert_allclose(after.weights, 3 * np.array([[weight, weight, 0], [1, 1, 1], [0, 0, 0]]), rtol=1e-6)
    np.testing.assert_array_equal(after.metrics[f"{name}/clipped_fraction"], [1, 0, 0])


def test_icepop_counts_both_sides(transformed):
    after = transformed["icepop"]
    np.testing.assert_allclose(after.weights, [[0, 0, 0], [3, 3, 3], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(after.metrics["icepop/clipped_fraction"], [1, 0, 0])
    np.testing.assert_array_equal(after.mask, MASK)


def test_corrections_commute_with_what_drops_responses(transformed):
    one, other = transformed["corrected, dropped"], transformed["dropped, corrected"]
    np.testing.assert_array_equal(one.weights, other.weights)
    np.testing.assert_array_equal(one.mask, other.mask)
    assert not one.mask[1].any()


@pytest.mark.parametrize(
    "name", ["token_tis", "sequence_tis", "geometric_tis", "token_mis", "sequence_mis", "geometric_mis"]
)
def test_a_transform_refuses_its_bound_when_it_is_made(name):
    with pytest.raises(ValueError, match="clip_max is 0"):
        getattr(corrections, name)(0.0)
