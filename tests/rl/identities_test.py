"""What must hold for any log-probs, masks and rewards: of the objectives with their gradients, and of the metrics."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcjax.rl.discrepancy import log_probability_difference, measure, probability_difference, probability_ratio
from dcjax.rl.losses import clipped_surrogate
from dcjax.rl.masked import token_mean
from dcjax.rl.metrics import mismatch_metrics
from dcjax.rl.objective import (
    Context,
    chain,
    direct_penalty,
    discrepancy_penalty,
    drop_zero_variance,
    group_relative_advantages,
    initial_terms,
    kl_penalty,
    leave_one_out_advantages,
)
from dcjax.rl.penalties import centred_on_response, gate, hinge, linear, shifted
from dcjax.types import Batch

ROWS, G, T = 6, 3, 5
SIGNALS = [probability_difference, probability_ratio, log_probability_difference]
SHAPES = {"linear": linear, "shifted": shifted(0.1), "hinge": hinge(0.1), "gate": gate(0.1)}
sequence = measure(probability_ratio, level="sequence", sides="one")
estimator = group_relative_advantages()
OBJECTIVES = {
    "grpo": estimator,
    "dc": chain(estimator, discrepancy_penalty(probability_difference)),
    "dc, dropped": chain(estimator, drop_zero_variance(), discrepancy_penalty(probability_ratio, shape=hinge(0.1))),
    "sequence": chain(leave_one_out_advantages(), discrepancy_penalty(sequence, shape=gate(0.1))),
    "centred": chain(estimator, discrepancy_penalty(log_probability_difference, form=centred_on_response)),
    "direct": chain(estimator, direct_penalty(probability_difference)),
    "direct, sequence": chain(estimator, direct_penalty(measure(log_probability_difference, level="sequence"))),
    "kl": chain(estimator, kl_penalty(0.1), discrepancy_penalty(probability_difference)),
}
objectives = pytest.mark.parametrize("name", OBJECTIVES)
few = settings(max_examples=6)


@dataclasses.dataclass
class Case:
    """Arrays that a strategy draws; every row of a group carries the group's rewards."""

    logps: np.ndarray
    old_logps: np.ndarray
    rollout_logps: np.ndarray
    reference_logps: np.ndarray
    mask: np.ndarray
    rewards: np.ndarray

    def rows(self, order):
        """These rows of every array."""
        return Case(**{name: array[order] for name, array in vars(self).items()})

    def like(self, **changes):
        """Another case."""
        return dataclasses.replace(self, **changes)


@st.composite
def cases(draw, low=-8.0):
    logps = arrays(np.float32, (ROWS, T), elements=st.floats(low, 0, width=32))
    mask = draw(arrays(np.bool_, (ROWS, T)))
    mask[0, 0] = True
    rewards = draw(arrays(np.float32, (ROWS,), elements=st.sampled_from([0.0, 0.5, 1.0])))
    return Case(draw(logps), draw(logps), draw(logps), draw(logps), mask, rewards)


def inputs(case, group_rewards=None):
    if group_rewards is None:
        group_rewards = np.repeat(case.rewards.reshape(-1, G), G, axis=0)
    rows = len(case.rewards)
    batch = Batch(
        tokens=np.zeros((rows, T + 1), np.int32),
        prompt_mask=np.ones((rows, 1), bool),
        response_mask=case.mask,
        rollout_logps=case.rollout_logps,
        temperature=np.ones(rows, np.float32),
        rewards=case.rewards,
        group_rewards=group_rewards,
    )
    return case.logps, case.old_logps, case.reference_logps, batch


def loss(objective, logps, old_logps, reference_logps, batch, multiplier, mean_reward=0.5):
    context = Context(batch, logps, old_logps, jnp.asarray(multiplier), jnp.asarray(mean_reward), reference_logps)
    terms = objective(initial_terms(batch), context)
    surrogate = partial(clipped_surrogate, eps_low=0.2, eps_high=0.28)
    losses, _ = surrogate(
        logps, old_logps=old_logps, advantages=terms.advantages, weights=terms.weights, mask=terms.mask
    )
    total, denominator = token_mean(losses + terms.loss, terms.mask)
    return total, denominator


measured = jax.jit(mismatch_metrics)


@cache
def differentiated(name):
    return jax.jit(jax.value_and_grad(partial(loss, OBJECTIVES[name]), has_aux=True))


def run(name, case, multiplier=0.5, group_rewards=None):
    """The summed loss, its denominator, and the gradient to each token."""
    (total, denominator), grads = differentiated(name)(*inputs(case, group_rewards), multiplier)
    return float(total), float(denominator), np.asarray(grads)


def same(ours, theirs, rtol=1e-5, atol=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# --- λ = 0, and one policy in both places ---


@pytest.mark.parametrize("name", ["dc", "centred", "direct", "direct, sequence"])
@few
@given(cases())
def test_without_a_multiplier_it_is_grpo_exactly(name, case):
    for a, b in zip(run(name, case, multiplier=0.0), run("grpo", case), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["dc", "centred", "direct", "direct, sequence"])
@few
@given(cases())
def test_equal_policies_have_no_penalty(name, case):
    one = case.like(logps=case.old_logps, rollout_logps=case.old_logps)
    same(run(name, one, multiplier=7.0), run("grpo", one), rtol=0, atol=0)


@few
@given(cases())
def test_equal_policies_have_no_discrepancy_and_no_mismatch(case):
    gap = {"old_logps": case.old_logps, "rollout_logps": case.old_logps, "mask": case.mask}
    for signal in SIGNALS:
        for level in ("token", "sequence"):
            for sides in ("two", "one", "signed"):
                np.testing.assert_array_equal(measure(signal, level=level, sides=sides)(**gap), np.zeros((ROWS, T)))
    metrics = measured(**gap)
    levels = {"log_ppl_old", "log_ppl_rollout", "log_ppl_old_per_token", "log_ppl_rollout_per_token"}
    assert {name: float(metrics[name]) for name in set(metrics) - levels - {"ess"}} == dict.fromkeys(
        set(metrics) - levels - {"ess"}, 0.0
    )
    assert float(metrics["ess"]) == 1


# --- rows ---


@objectives
@few
@given(cases(), st.permutations(range(G)))
def test_permuting_a_group_permutes(name, case, order):
    order = np.array([*order, *range(G, ROWS)])
    total, denominator, grads = run(name, case)
    same(run(name, case.rows(order)), (total, denominator, grads[order]))


@objectives
@few
@given(cases(), st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_what_stands_on_padding_changes_nothing(name, case, bad):
    names = ("logps", "old_logps", "rollout_logps", "reference_logps")
    spoilt = {key: np.where(case.mask, getattr(case, key), bad).astype("f") for key in names}
    ours = run(name, case.like(**spoilt))
    same(ours, run(name, case), rtol=0, atol=0)
    assert (ours[2][~case.mask] == 0).all()
    gap = {"rollout_logps": case.rollout_logps, "mask": case.mask}
    plain = measured(old_logps=case.old_logps, **gap)
    hidden = measured(old_logps=spoilt["old_logps"], **gap | {"rollout_logps": spoilt["rollout_logps"]})
    assert {key: float(x) for key, x in plain.items()} == {key: float(x) for key, x in hidden.items()}


@objectives
@few
@given(cases(), st.integers(1, ROWS - 1))
def test_a_row_without_a_token_changes_nothing(name, case, row):
    case.mask[row] = False
    groups = np.repeat(case.rewards.reshape(-1, G), G, axis=0)
    kept = np.arange(ROWS) != row
    total, denominator, grads = run(name, case, group_rewards=groups)
    same(run(name, case.rows(kept), group_rewards=groups[kept]), (total, denominator, grads[kept]))
    assert (grads[row] == 0).all()


@objectives
@few
@given(cases(), st.integers(1, ROWS - 1))
def test_microbatches_that_cut_groups_add_up(name, case, cut):
    groups = np.repeat(case.rewards.reshape(-1, G), G, axis=0)
    total, denominator, grads = run(name, case, group_rewards=groups)
    parts = [run(name, case.rows(rows), group_rewards=groups[rows]) for rows in (slice(cut), slice(cut, None))]
    same(
        (sum(part[0] for part in parts), sum(part[1] for part in parts), np.concatenate([part[2] for part in parts])),
        (total, denominator, grads),
    )


@objectives
def test_without_any_token_there_is_nothing(name):
    nothing = Case(*(np.full((ROWS, T), np.nan, "f") for _ in range(4)), np.zeros((ROWS, T), bool), np.ones(ROWS, "f"))
    total, denominator, grads = run(name, nothing)
    assert (total, denominator, np.abs(grads).max()) == (0, 0, 0)


# --- extremes ---

EXTREMES = st.sampled_from([0.0, -1e-7, -1.0, -20.0, -40.0, -87.5, -104.0, -1e4])


@objectives
@settings(max_examples=25)
@given(arrays(np.float32, (3, ROWS, T), elements=EXTREMES), arrays(np.float32, (ROWS, T), elements=EXTREMES))
def test_extreme_log_probs_stay_finite_with_finite_gradients(name, drawn, reference):
    case = Case(*drawn, reference, np.ones((ROWS, T), bool), np.array([1, 0, 0, 1, 1, 1], "f"))
    total, _, grads = run(name, case)
    assert np.isfinite(total)
    assert np.isfinite(grads).all()
    metrics = measured(old_logps=drawn[1], rollout_logps=drawn[2], mask=case.mask)
    assert np.isfinite(list(metrics.values())).all()
    assert 0 < float(metrics["ess"]) <= 1 + 1e-6


@few
@given(cases())
def test_metrics_keep_their_order(case):
    metrics = measured(old_logps=case.old_logps, rollout_logps=case.rollout_logps, mask=case.mask)
    quantiles = [float(metrics[f"prob_diff_{name}"]) for name in ("p50", "p90", "p99", "max")]
    assert quantiles == sorted(quantiles)
    assert 0 <= float(metrics["prob_diff_mean"]) <= quantiles[-1] + 1e-6 <= 1 + 1e-6
    assert 0 < float(metrics["ess"]) <= 1 + 1e-6
    assert float(metrics["k3"]) >= 0
    assert float(metrics["log_ppl_abs_diff"]) <= float(metrics["log_diff_mean"]) * case.mask.sum() + 1e-4


# --- gradients ---


@pytest.mark.parametrize(("shape", "level"), [*((shape, "token") for shape in SHAPES), ("linear", "sequence")])
@pytest.mark.parametrize("signal", SIGNALS)
def test_the_direct_forms_gradient_against_finite_differences(shape, signal, level):
    rng, step = np.random.default_rng(0), 1e-6
    with jax.enable_x64(True):
        logps, rollout = -rng.exponential(1, (2, 3)), -rng.exponential(1, (2, 3))
        mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
        case = Case(logps, logps, rollout, logps, mask, np.ones(2, np.float64))
        groups = np.ones((2, 2))
        objective = direct_penalty(measure(signal, level=level), shape=SHAPES[shape], multiplier=0.7)

        @jax.jit
        def total(x):
            value, _ = loss(objective, *inputs(case.like(logps=x, old_logps=logps), groups), 0.0)
            return value

        grads = jax.grad(total)(jnp.asarray(logps))
        assert grads.dtype == np.float64
        for at in np.ndindex(2, 3):
            moved = np.zeros((2, 3))
            moved[at] = step
            expected = (total(logps + moved) - total(logps - moved)) / (2 * step)
            np.testing.assert_allclose(grads[at], expected, rtol=1e-6, atol=1e-8)
    assert np.abs(grads[mask]).max() > 0.01


@pytest.mark.parametrize("shape", SHAPES)
@few
@given(cases())
def test_the_detached_forms_gradient_is_grpos_with_shifted_advantages(shape, case):
    penalty = discrepancy_penalty(probability_difference, shape=SHAPES[shape])
    gap = np.abs(np.exp(case.old_logps.astype("d")) - np.exp(case.rollout_logps.astype("d")))
    shift = {
        "linear": gap,
        "shifted": gap - 0.1,
        "hinge": np.maximum(gap - 0.1, 0),
        "gate": np.where(gap.astype("f") > np.float32(0.1), gap, 0),
    }[shape]

    def shifts(terms, context):
        return dataclasses.replace(terms, advantages=terms.advantages - 0.5 * jnp.asarray(shift, jnp.float32))

    # where the gap is within rounding of the gate, either side is right
    if shape == "gate" and (np.abs(gap - 0.1) < 1e-6).any():
        return
    ours, expected = (
        jax.grad(partial(loss, chain(estimator, transform)), has_aux=True)(*inputs(case), 0.5)[0]
        for transform in (penalty, shifts)
    )
    # a token exactly on a bound of the clip may fall on either side of it
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-6)


# --- chains ---

TRANSFORMS = [
    estimator,
    leave_one_out_advantages(),
    drop_zero_variance(),
    discrepancy_penalty(probability_difference),
    discrepancy_penalty(sequence, shape=hinge(0.1), form=centred_on_response),
    direct_penalty(probability_ratio, multiplier=0.3),
    kl_penalty(0.1, kind="k2"),
]


@few
@given(cases(), st.lists(st.sampled_from(TRANSFORMS), max_size=5), st.integers(0, 5), st.integers(0, 5))
def test_chains_nest_in_any_way(case, transforms, first, second):
    logps, old_logps, reference_logps, batch = inputs(case)
    context = Context(batch, logps, old_logps, jnp.float32(0.5), jnp.mean(case.rewards), reference_logps)
    low, high = sorted((first, second))
    nested = chain(chain(*transforms[:low]), chain(chain(*transforms[low:high]), *transforms[high:]), chain())
    flat, ours = (of(initial_terms(batch), context) for of in (chain(*transforms), nested))
    assert jax.tree.structure(flat) == jax.tree.structure(ours)
    for a, b in zip(jax.tree.leaves(flat), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(a, b)
