"""What must hold for any log-probs, masks and rewards: of the objectives with their gradients, and of the metrics."""

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

from dcjax.rl.discrepancy import log_probability_difference, measure, probability_difference, probability_ratio
from dcjax.rl.losses import clipped_surrogate
from dcjax.rl.masked import token_mean
from dcjax.rl.metrics import mismatch_metrics
from dcjax.rl.penalties import centred_on_response, gate, hinge, linear, shifted
from dcjax.rl.transforms import (
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
        attention_mask=np.ones((rows, T + 1), bool),
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


measured = jit(mismatch_metrics)


@jit
def differentiated(inputs, multiplier):
    return {
        name: jax.value_and_grad(partial(loss, objective), has_aux=True)(*inputs, multiplier)
        for name, objective in OBJECTIVES.items()
    }


def run(case, multiplier=0.5, group_rewards=None):
    """Of each objective, all in one program: the summed loss, its denominator, and the gradient to each token."""
    found = jax.device_get(differentiated(inputs(case, group_rewards), np.float32(multiplier)))
    return {name: (float(total), float(denominator), grads) for name, ((total, denominator), grads) in found.items()}


def same(ours, theirs, rtol=1e-5, atol=1e-5):
    for name, expected in theirs.items():
        for a, b in zip(ours[name], expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


# --- λ = 0, and one policy in both places ---

PENALISED = ("dc", "centred", "direct", "direct, sequence")


@few
@given(cases())
def test_without_a_multiplier_it_is_grpo_exactly(case):
    ours = run(case, multiplier=0.0)
    same(ours, {name: ours["grpo"] for name in PENALISED}, rtol=0, atol=0)


@few
@given(cases())
def test_equal_policies_have_no_penalty(case):
    ours = run(case.like(logps=case.old_logps, rollout_logps=case.old_logps), multiplier=7.0)
    same(ours, {name: ours["grpo"] for name in PENALISED}, rtol=0, atol=0)


MEASURES = {
    (signal, level, sides): measure(signal, level=level, sides=sides)
    for signal in SIGNALS
    for level in ("token", "sequence")
    for sides in ("two", "one", "signed")
}


@jit
def every_measure(gap):
    return [discrepancy(**gap) for discrepancy in MEASURES.values()]


@few
@given(cases())
def test_equal_policies_have_no_discrepancy_and_no_mismatch(case):
    gap = {"old_logps": case.old_logps, "rollout_logps": case.old_logps, "mask": case.mask}
    np.testing.assert_array_equal(every_measure(gap), np.zeros((len(MEASURES), ROWS, T)))
    metrics = measured(**gap)
    levels = {"log_ppl_old", "log_ppl_rollout", "log_ppl_old_per_token", "log_ppl_rollout_per_token"}
    shares = {name for name in metrics if name.startswith(("ess", "ratio_", "response_ratio_"))}
    gaps = set(metrics) - levels - shares
    assert {name: float(metrics[name]) for name in gaps} == dict.fromkeys(gaps, 0.0)
    assert {name: float(metrics[name]) for name in shares} == dict.fromkeys(shares, 1.0)


# --- rows ---


@few
@given(cases(), st.permutations(range(G)))
def test_permuting_a_group_permutes(case, order):
    order = np.array([*order, *range(G, ROWS)])
    plain = run(case)
    same(run(case.rows(order)), {name: (*sums, grads[order]) for name, (*sums, grads) in plain.items()})


@few
@given(cases(), st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_what_stands_on_padding_changes_nothing(case, bad):
    names = ("logps", "old_logps", "rollout_logps", "reference_logps")
    spoilt = {key: np.where(case.mask, getattr(case, key), bad).astype("f") for key in names}
    ours = run(case.like(**spoilt))
    same(ours, run(case), rtol=0, atol=0)
    for _, _, grads in ours.values():
        assert (grads[~case.mask] == 0).all()
    gap = {"rollout_logps": case.rollout_logps, "mask": case.mask}
    plain = measured(old_logps=case.old_logps, **gap)
    hidden = measured(old_logps=spoilt["old_logps"], **gap | {"rollout_logps": spoilt["rollout_logps"]})
    assert {key: float(x) for key, x in plain.items()} == {key: float(x) for key, x in hidden.items()}


halves = st.permutations(range(ROWS)).map(lambda order: (np.sort(order[:G]), np.sort(order[G:])))
"""Of the rows, three and three: groups are cut, and each half is of one shape."""


@few
@given(cases(), halves)
def test_rows_without_a_token_change_nothing(case, rows):
    kept, emptied = rows
    case.mask[emptied] = False
    groups = np.repeat(case.rewards.reshape(-1, G), G, axis=0)
    whole, part = run(case, group_rewards=groups), run(case.rows(kept), group_rewards=groups[kept])
    same(part, {name: (*sums, grads[kept]) for name, (*sums, grads) in whole.items()})
    for _, _, grads in whole.values():
        assert (grads[emptied] == 0).all()


@few
@given(cases(), halves)
def test_microbatches_that_cut_groups_add_up(case, rows):
    groups = np.repeat(case.rewards.reshape(-1, G), G, axis=0)
    whole = run(case, group_rewards=groups)
    first, second = (run(case.rows(part), group_rewards=groups[part]) for part in rows)
    order = np.argsort(np.concatenate(rows))
    added = {
        name: (
            first[name][0] + second[name][0],
            first[name][1] + second[name][1],
            np.concatenate([first[name][2], second[name][2]])[order],
        )
        for name in whole
    }
    same(added, whole)


def test_without_any_token_there_is_nothing():
    nothing = Case(*(np.full((ROWS, T), np.nan, "f") for _ in range(4)), np.zeros((ROWS, T), bool), np.ones(ROWS, "f"))
    for total, denominator, grads in run(nothing).values():
        assert (total, denominator, np.abs(grads).max()) == (0, 0, 0)


# --- extremes ---

EXTREMES = st.sampled_from([0.0, -1e-7, -1.0, -20.0, -40.0, -87.5, -104.0, -1e4])


@settings(max_examples=25)
@given(arrays(np.float32, (3, ROWS, T), elements=EXTREMES), arrays(np.float32, (ROWS, T), elements=EXTREMES))
def test_extreme_log_probs_stay_finite_with_finite_gradients(drawn, reference):
    case = Case(*drawn, reference, np.ones((ROWS, T), bool), np.array([1, 0, 0, 1, 1, 1], "f"))
    for name, (total, _, grads) in run(case).items():
        assert np.isfinite(total) and np.isfinite(grads).all(), name
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
    shares = [float(metrics[f"ratio_{name}"]) for name in ("in_band", "within_1_percent", "within_5_percent")]
    assert 0 <= shares[0] <= shares[1] <= shares[2] <= 1
    responses = case.mask.any(axis=1).sum()
    assert 1 / responses - 1e-6 <= float(metrics["ess_sequence"]) <= 1 + 1e-6
    assert float(metrics["log_ppl_abs_diff"]) <= float(metrics["log_diff_mean"]) * case.mask.sum() + 1e-4


# --- gradients ---


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_direct_forms_gradient_against_finite_differences(signal):
    rng, step = np.random.default_rng(0), 1e-6
    with jax.enable_x64(True):
        logps, rollout = -rng.exponential(1, (2, 3)), -rng.exponential(1, (2, 3))
        mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
        case = Case(logps, logps, rollout, logps, mask, np.ones(2, np.float64))
        kinds = [*((shape, "token") for shape in SHAPES), ("linear", "sequence")]

        def totals(x):
            of = inputs(case.like(logps=x, old_logps=logps), np.ones((2, 2)))
            objectives = [
                direct_penalty(measure(signal, level=level), shape=SHAPES[shape], multiplier=0.7)
                for shape, level in kinds
            ]
            return jnp.stack([loss(objective, *of, 0.0)[0] for objective in objectives])

        grads = jit(jax.jacrev(totals))(logps)
        assert grads.dtype == np.float64
        moves = step * np.eye(6).reshape(6, 2, 3)
        up, down = np.asarray(jit(jax.vmap(totals))(np.concatenate([logps + moves, logps - moves]))).reshape(2, 6, -1)
    expected = ((up - down) / (2 * step)).T.reshape(-1, 2, 3)
    for kind, ours, theirs in zip(kinds, grads, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8, err_msg=str(kind))
        assert np.abs(ours[mask]).max() > 0.01


@jit
def detached(inputs, shift):
    """Gradients under the penalty in every shape, and with these shifts of advantages in its place."""

    def grads(transform):
        return jax.grad(partial(loss, chain(estimator, transform)), has_aux=True)(*inputs, 0.5)[0]

    def shifted_by(shift):
        return grads(
            lambda terms, context: dataclasses.replace(terms, advantages=terms.advantages - 0.5 * shift),
        )

    ours = [grads(discrepancy_penalty(probability_difference, shape=shape)) for shape in SHAPES.values()]
    return jnp.stack(ours), jax.vmap(shifted_by)(shift)


@few
@given(cases())
def test_the_detached_forms_gradient_is_grpos_with_shifted_advantages(case):
    gap = np.abs(np.exp(case.old_logps.astype("d")) - np.exp(case.rollout_logps.astype("d")))
    shift = {
        "linear": gap,
        "shifted": gap - 0.1,
        "hinge": np.maximum(gap - 0.1, 0),
        "gate": np.where(gap.astype("f") > np.float32(0.1), gap, 0),
    }
    ours, expected = detached(inputs(case), np.stack([shift[name] for name in SHAPES]).astype("f"))
    for name, a, b in zip(SHAPES, ours, expected, strict=True):
        # where the gap is within rounding of the gate, either side is right
        if name != "gate" or not (np.abs(gap - 0.1) < 1e-6).any():
            # a token exactly on a bound of the clip may fall on either side of it
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6, err_msg=name)


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


@settings(max_examples=25)
@given(st.lists(st.sampled_from(TRANSFORMS), max_size=5), st.integers(0, 5), st.integers(0, 5))
def test_chains_nest_in_any_way(transforms, first, second):
    low, high = sorted((first, second))
    nested = chain(chain(*transforms[:low]), chain(chain(*transforms[low:high]), *transforms[high:]), chain())
    ones = np.ones((ROWS, T), np.float32)
    of = inputs(Case(ones, ones, ones, ones, ones > 0, np.ones(ROWS, np.float32)))

    def program(objective):
        def terms(logps, old_logps, reference_logps, batch):
            context = Context(batch, logps, old_logps, jnp.float32(0.5), jnp.mean(batch.rewards), reference_logps)
            return objective(initial_terms(batch), context)

        return str(jax.make_jaxpr(terms, return_shape=True)(*of))

    assert program(nested) == program(chain(*transforms))
