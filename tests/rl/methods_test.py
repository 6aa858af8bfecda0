"""Others' answers to the mismatch: against loops over tokens, values and gradients, and what they reduce to."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit
from hypothesis import given, settings
from hypothesis import strategies as st

from dcjax.rl import by_response, trust_regions
from dcjax.rl.losses import clipped_surrogate, policy_gradient, unit_ratio
from dcjax.rl.objective import Objective
from dcjax.rl.presets import METHODS, with_method
from dcjax.rl.transforms import Context, initial_terms
from dcjax.rl.trust_regions import binary_kl, second_moment_limit
from dcjax.types import Batch

ROWS, T = 6, 5
CLIP = {"eps_low": 0.2, "eps_high": 0.28}
CLIPPED = partial(clipped_surrogate, **CLIP)
few = settings(max_examples=25)


@dataclasses.dataclass
class Case:
    """Arrays [ROWS, T] in float64, padding that is not a number included."""

    logps: np.ndarray
    old_logps: np.ndarray
    rollout_logps: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray

    def like(self, **changes):
        """Another case."""
        return dataclasses.replace(self, **changes)

    def rows(self, order):
        """These rows of every array."""
        return Case(**{name: array[order] for name, array in vars(self).items()})


def draw(seed, scale=0.5):
    """Policies that differ by about `scale` nats; advantages of a response are one number, or of each token its own."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(0, T + 1, (ROWS, 1))
    mask[0] = True
    rollout = np.log(rng.uniform(1e-3, 1, (ROWS, T)) ** rng.choice([0.1, 1, 3], (ROWS, T)))
    # responses that are near and responses that are far apart
    spread = scale * rng.choice([1e-3, 0.03, 1], (ROWS, 1))
    old = np.minimum(rollout + spread * rng.normal(size=(ROWS, T)), 0)
    now = np.minimum(old + 0.3 * scale * rng.normal(size=(ROWS, T)), 0)
    advantages = rng.normal(size=(ROWS, rng.choice([1, T]))) * np.ones((ROWS, T))
    hidden = np.where(mask, 0, np.nan)
    return Case(now + hidden, old + hidden, rollout + hidden, advantages, mask)


def given_advantages(terms, context):
    return dataclasses.replace(terms, advantages=jnp.asarray(context.quantities["advantages"]))


BASE = Objective(given_advantages, surrogate=CLIPPED)
OBJECTIVES = {
    **{name: with_method(BASE, name) for name in METHODS},
    "dppo_tv .02": with_method(BASE, "dppo_tv", bound=0.02),
    "dppo_kl .002": with_method(BASE, "dppo_kl", bound=0.002),
    "ipo .02": with_method(BASE, "ipo", bound=0.02),
    "kpop .01": with_method(BASE, "kpop", bound=0.01),
    "drpo .15": with_method(BASE, "drpo", bound=0.15),
    "opsm .1": with_method(BASE, "opsm", bound=0.1),
    "vexact .05": with_method(BASE, "vexact", bound=0.05),
    # so loose that a ratio of 2 is within it
    "vexact 1": with_method(BASE, "vexact", bound=1.0),
    "seq_mask_tis 1.3": with_method(BASE, "seq_mask_tis", bound=1.3),
    "m2po .5": with_method(BASE, "m2po", bound=0.5),
    # what they reduce to
    "policy gradient": dataclasses.replace(BASE, surrogate=policy_gradient),
    "clipped": BASE,
    "dppo_tv 1": with_method(BASE, "dppo_tv", bound=1.0),
    "dppo_kl inf": with_method(BASE, "dppo_kl", bound=math.inf),
    "ipo 1": with_method(BASE, "ipo", bound=1.0),
    "kpop inf": with_method(BASE, "kpop", bound=math.inf),
    "drpo inf": with_method(BASE, "drpo", bound=math.inf),
    "opsm inf": with_method(BASE, "opsm", bound=math.inf),
    "m2po inf": with_method(BASE, "m2po", bound=math.inf),
}


def context_of(case, logps):
    batch = Batch(
        tokens=np.zeros((len(case.mask), T + 1), np.int32),
        attention_mask=np.ones((len(case.mask), T + 1), bool),
        response_mask=case.mask,
        rollout_logps=case.rollout_logps,
        temperature=np.ones(len(case.mask)),
        rewards=np.zeros(len(case.mask)),
        group_rewards=np.zeros((len(case.mask), 2)),
    )
    quantities = {"advantages": case.advantages}
    return Context(batch, logps, case.old_logps, None, jnp.zeros(()), None, quantities)


@jit
def quantities_of_all(case_arrays):
    """By objective, the quantities of the whole minibatch."""
    case = Case(**case_arrays)
    context = context_of(case, case.logps)
    return {
        name: {key: compute(context) for key, compute in objective.requires.of_minibatch.items()}
        for name, objective in OBJECTIVES.items()
    }


@jit
def losses_of_all(case_arrays, quantities):
    """By objective: losses, their sum's gradient to the log-probs, and the terms."""
    case = Case(**case_arrays)

    def total(logps, objective, found):
        context = context_of(case, logps)
        context = dataclasses.replace(context, quantities={**context.quantities, **found})
        terms = objective.transform(initial_terms(context.batch), context)
        losses, _ = objective.surrogate(
            logps, old_logps=case.old_logps, advantages=terms.advantages, weights=terms.weights, mask=terms.mask
        )
        losses = jnp.where(case.mask, losses + terms.loss, 0)
        return jnp.sum(losses), (losses, terms)

    def of(name):
        grad, (losses, terms) = jax.grad(total, has_aux=True)(case.logps, OBJECTIVES[name], quantities[name])
        return losses, grad, terms

    return {name: of(name) for name in OBJECTIVES}


def run(case):
    """What `losses_of_all` finds, in float64."""
    with jax.enable_x64(True):
        return jax.device_get(losses_of_all(vars(case), quantities_of_all(vars(case))))


# --- the formulas, one token at a time ---


def kl(a, b):
    """Of two distributions over a token and all others."""
    rest = (1 - a + 1e-8) * math.log((1 - a + 1e-8) / (1 - b + 1e-8))
    return a * math.log(a / b) + rest


def tokens(case):
    return list(zip(*np.nonzero(case.mask), strict=True))


def response(case, i):
    return [t for t in range(T) if case.mask[i, t]]


def clipped_loss(x, old, advantage):
    r = math.exp(x - old)
    return -min(r * advantage, min(max(r, 1 - CLIP["eps_low"]), 1 + CLIP["eps_high"]) * advantage)


def m2po_dropped(case, bound):
    """The paper's algorithm: of the tokens in the trust region, the largest one after another."""
    moments = {}
    for i, t in tokens(case):
        x = case.logps[i, t] - case.rollout_logps[i, t]
        if (case.advantages[i, t] > 0 and x > 0) or (case.advantages[i, t] < 0 and x < 0):
            moments[i, t] = x**2
    dropped = set()
    while moments and np.mean(list(moments.values())) > bound:
        largest = max(moments, key=lambda at: moments[at])
        dropped.add(largest)
        del moments[largest]
    return dropped


def loop(name, case, x, bound):
    """Losses [ROWS, T] at the log-probs x, where what is not differentiated is of the case's own log-probs."""
    losses = np.zeros(case.mask.shape)
    dropped = m2po_dropped(case, bound) if name == "m2po" else set()
    for i, t in tokens(case):
        now, frozen, old, mu, a = (
            float(values[i, t]) for values in (x, case.logps, case.old_logps, case.rollout_logps, case.advantages)
        )
        p, q, r, rho = math.exp(frozen), math.exp(mu), math.exp(now - mu), math.exp(old - mu)
        length = len(response(case, i))
        if name == "dppo_tv":
            keep = p - q <= bound if a > 0 else p - q >= -bound
            losses[i, t] = -a * min(math.exp(frozen - mu), 20) * now * keep
        elif name == "dppo_kl":
            keep = kl(q, p) <= bound or (p <= q if a > 0 else p >= q)
            losses[i, t] = -a * min(math.exp(frozen - mu), 20) * now * keep
        elif name == "ipo":
            losses[i, t] = -a * r * (abs(p - q) <= bound)
        elif name == "ipo_squared":
            losses[i, t] = -a * r * (abs(p - q) <= bound) + 1e-3 * (now - mu) ** 2
        elif name == "kpop":
            before = math.exp(old)
            keep = max(kl(before, q), kl(q, before)) <= bound
            losses[i, t] = keep * rho * clipped_loss(now, old, a)
        elif name == "drpo":
            losses[i, t] = -a * r + abs(a) * q * (r - 1) ** 2 / (2 * bound)
        elif name == "opsm":
            mean = sum(case.rollout_logps[i, s] - case.logps[i, s] for s in response(case, i)) / length
            losses[i, t] = clipped_loss(now, old, a) * (not (a < 0 and mean > bound))
        elif name == "vexact":
            ratios = [math.exp(case.old_logps[i, s] - case.rollout_logps[i, s]) for s in response(case, i)]
            mean = sum(ratio - 1 - math.log(ratio) for ratio in ratios) / length
            losses[i, t] = clipped_loss(now, old, a) * min(rho, 2) * (mean <= bound)
        elif name == "seq_mask_tis":
            mean = math.exp(sum(case.old_logps[i, s] - case.rollout_logps[i, s] for s in response(case, i)) / length)
            losses[i, t] = clipped_loss(now, old, a) * rho * (0.999 <= mean <= bound)
        elif name == "m2po":
            losses[i, t] = -a * r * ((i, t) not in dropped)
    return losses


BOUNDS = {
    **{"dppo_tv": 0.15, "dppo_kl": 0.05, "ipo": 0.3, "ipo_squared": 0.1, "kpop": 2.0, "drpo": 12.5, "opsm": 1e-4},
    **{"vexact": 0.001, "seq_mask_tis": 1.002, "m2po": 0.04, "dppo_tv .02": 0.02, "dppo_kl .002": 0.002},
    **{"ipo .02": 0.02, "kpop .01": 0.01, "drpo .15": 0.15, "opsm .1": 0.1, "vexact .05": 0.05},
    "vexact 1": 1.0,
    **{"seq_mask_tis 1.3": 1.3, "m2po .5": 0.5},
}
"""As the sources have them, and others by which more is dropped, or less."""


def check(case):
    found, step = run(case), 1e-6
    for name, bound in BOUNDS.items():
        formula = partial(loop, name.split()[0], case, bound=bound)
        losses, grads, terms = found[name]
        np.testing.assert_allclose(losses, formula(case.logps), rtol=1e-9, atol=1e-12, err_msg=name)
        slopes = (formula(case.logps + step) - formula(case.logps - step)) / (2 * step)
        np.testing.assert_allclose(grads, slopes, rtol=1e-6, atol=1e-7, err_msg=name)
        # what is dropped stays in the denominator
        np.testing.assert_array_equal(terms.mask, case.mask, err_msg=name)
    return found


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.05, 0.5, 2.0]))
def test_losses_and_gradients_are_the_formulas(seed, scale):
    check(draw(seed, scale))


def test_every_method_is_tested_and_each_drops_some_tokens_and_keeps_others():
    assert set(METHODS) <= set(BOUNDS)
    kept = {name: set() for name in BOUNDS}
    for seed in range(20):
        case = draw(seed, 2.0)
        for name, (_, _, terms) in run(case).items():
            if name in kept:
                kept[name] |= set((terms.weights[case.mask] != 0).tolist())
    assert {name for name, seen in kept.items() if seen != {True, False}} == {"drpo", "drpo .15"}


# --- identities ---


def same(found, name, other):
    for ours, theirs in zip(found[name][:2], found[other][:2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12, err_msg=f"{name}, {other}")


@few
@given(seed=st.integers(0, 2**32 - 1))
def test_with_a_bound_that_nothing_exceeds_they_are_one_weight(seed):
    found = run(draw(seed))
    # −Ã r, the policy gradient of what was sampled
    same(found, "drpo inf", "m2po inf")
    same(found, "ipo 1", "m2po inf")
    same(found, "opsm inf", "clipped")
    # another value, whose gradient is the same while r is below its cap of 20
    same(found, "dppo_tv 1", "dppo_kl inf")
    np.testing.assert_allclose(found["dppo_tv 1"][1], found["drpo inf"][1], rtol=1e-9, atol=1e-12)


@few
@given(seed=st.integers(0, 2**32 - 1))
def test_where_the_policies_are_one_they_are_what_they_stand_behind(seed):
    case = draw(seed)
    # the engine has no gap of its own
    found = run(case.like(rollout_logps=case.old_logps))
    for name in ("kpop", "vexact", "seq_mask_tis"):
        same(found, name, "clipped")
    # neither is there an update in between
    found = run(case.like(rollout_logps=case.logps, old_logps=case.logps))
    for name in ("dppo_tv", "dppo_kl"):
        same(found, name, "policy gradient")
    for name in ("ipo", "ipo_squared", "drpo", "m2po", "kpop", "opsm", "vexact", "seq_mask_tis"):
        same(found, name, "clipped")
        np.testing.assert_allclose(found[name][0][case.mask], -case.advantages[case.mask], rtol=1e-12)


@few
@given(seed=st.integers(0, 2**32 - 1))
def test_drpos_gradient_is_its_closed_form(seed):
    case = draw(seed)
    p, q, a = np.exp(case.logps), np.exp(case.rollout_logps), case.advantages
    closed = -a * (p / q) * (1 - np.sign(a * (p - q)) * np.abs(p - q) / 0.15)
    np.testing.assert_allclose(run(case)["drpo .15"][1], np.where(case.mask, closed, 0), rtol=1e-9, atol=1e-12)


@few
@given(seed=st.integers(0, 2**32 - 1))
def test_a_token_that_moves_towards_the_sampler_is_kept(seed):
    case = draw(seed, 2.0)
    towards = case.mask & (case.advantages * (case.logps - case.rollout_logps) <= 0)
    for name, (_, _, terms) in run(case).items():
        if name.startswith(("dppo", "m2po")):
            assert (terms.weights[towards] > 0).all(), name


# --- what every one keeps to ---


@few
@given(seed=st.integers(0, 2**32 - 1))
def test_rows_may_be_cut_anywhere_where_the_minibatchs_quantities_are_given(seed):
    case = draw(seed)
    whole = run(case)
    with jax.enable_x64(True):
        quantities = jax.device_get(quantities_of_all(vars(case)))
        for rows in (slice(0, 3), slice(3, ROWS)):
            cut = jax.tree.map(lambda x, rows=rows: x[rows], quantities)
            part = jax.device_get(losses_of_all(vars(case.rows(rows)), cut))
            jax.tree.map(
                lambda ours, theirs, rows=rows: np.testing.assert_allclose(ours, theirs[rows], rtol=1e-12), part, whole
            )


def test_the_share_that_is_dropped_is_told_by_row():
    case = draw(3, 2.0)
    for name in METHODS:
        _, _, terms = run(case)[name]
        (metric,) = [key for key in terms.metrics if key.endswith("/dropped_fraction")]
        assert metric == f"{name.removesuffix('_squared')}/dropped_fraction"
        for i in range(ROWS):
            dropped = [terms.weights[i, t] == 0 for t in response(case, i)]
            np.testing.assert_allclose(terms.metrics[metric][i], np.mean(dropped) if dropped else 0, rtol=1e-6)


@pytest.mark.parametrize("gap", [-1e4, -30.0, 30.0, 1e4])
def test_extreme_log_probs_stay_finite(gap):
    case = draw(0)
    found = run(case.like(logps=case.rollout_logps + gap, old_logps=case.rollout_logps + gap))
    for name in METHODS:
        losses, grads, terms = found[name]
        assert np.isfinite(losses).all() and np.isfinite(grads).all() and np.isfinite(terms.weights).all(), name


def test_they_compute_in_float32_and_leave_advantages_and_earlier_weights():
    case = draw(1)
    case = Case(**{name: array if name == "mask" else array.astype(np.float32) for name, array in vars(case).items()})
    quantities = quantities_of_all(vars(case))
    for name, (losses, grads, terms) in losses_of_all(vars(case), quantities).items():
        assert {x.dtype for x in (losses, grads, terms.weights, terms.loss)} == {jnp.dtype("float32")}, name
        np.testing.assert_array_equal(terms.advantages, case.advantages)
    twice = dataclasses.replace(BASE, transform=lambda terms, context: _doubled(given_advantages(terms, context)))
    context = context_of(case, case.logps)
    for name in set(METHODS) - {"m2po"}:
        ours, plain = (
            with_method(base, name).transform(initial_terms(context.batch), context) for base in (twice, BASE)
        )
        np.testing.assert_array_equal(ours.weights, 2 * plain.weights)


def _doubled(terms):
    return dataclasses.replace(terms, weights=2 * terms.weights)


# --- by hand ---


@pytest.mark.parametrize(("name", "cap"), [("dppo_tv", 20), ("ipo", 1e4), ("ipo_squared", 1e4)])
def test_a_ratio_above_the_cap_keeps_the_gradient_of_the_cap(name, cap):
    """p = .09 and q = 1e-6, which no bound on probabilities drops."""
    case = draw(0)
    logps, rollout_logps = np.full((ROWS, T), np.log(0.09)), np.full((ROWS, T), np.log(1e-6))
    found = run(case.like(logps=logps, old_logps=logps, rollout_logps=rollout_logps))[name]
    np.testing.assert_allclose(found[2].weights[case.mask], cap)
    squared = 2e-3 * np.log(9e4) if name == "ipo_squared" else 0
    np.testing.assert_allclose(found[1][case.mask], squared - cap * case.advantages[case.mask], rtol=1e-9)


def test_m2po_by_hand():
    """(log r)² of T are .01, .04, .09 and .25, of means .01, .025, .0467 and .0975."""
    log_ratio = np.array([[0.1, 0.2, 0.3, 0.5, -9.0]])
    moments, mask = log_ratio**2, np.array([[True, True, True, True, False]])
    with jax.enable_x64(True):
        for bound, limit in ((0.02, 0.04), (0.03, 0.09), (0.05, 0.25), (0.1, np.inf), (0.001, 0.01)):
            np.testing.assert_allclose(second_moment_limit(moments, mask, bound), limit, rtol=1e-12)
        # nothing is in T
        assert second_moment_limit(moments, np.zeros_like(mask), 0.04) == np.inf
        # equals fall together: {.04}, {.04, .09} and {.04, .09, .09} have means of .04, .065 and .0733
        tied = np.array([[0.09, 0.04, 0.09]])
        np.testing.assert_allclose(second_moment_limit(tied, np.ones((1, 3), bool), 0.07), 0.09)


def test_binary_kl_by_hand():
    found = float(binary_kl(jnp.log(jnp.float32(0.5)), jnp.log(jnp.float32(0.25))))
    assert found == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), rel=1e-5)
    # certain tokens, also where rounding gives more than 1
    for certain in (0.0, 1e-7, -1e-9):
        assert float(binary_kl(jnp.float32(certain), jnp.float32(certain))) == 0
    assert float(binary_kl(jnp.log(jnp.float32(0.5)), jnp.float32(0))) == pytest.approx(
        0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-8), rel=1e-5
    )


def test_the_unit_ratio_has_the_value_of_the_weight_and_the_gradient_of_the_logarithm():
    logps, mask = np.log(np.array([[0.5, 0.25, np.nan]], np.float32)), np.array([[True, True, False]])
    others = {"advantages": np.array([[2.0, -1.0, 1.0]], np.float32), "weights": np.full((1, 3), 3, np.float32)}

    def total(logps):
        losses, clipped = unit_ratio(logps, old_logps=logps, mask=mask, **others)
        return jnp.sum(losses), (losses, clipped)

    grad, (losses, clipped) = jax.grad(total, has_aux=True)(logps)
    np.testing.assert_array_equal(losses, [[-6, 3, 0]])
    np.testing.assert_array_equal(grad, [[-6, 3, 0]])
    assert not clipped.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_method(BASE, "ppo"), "the method is 'ppo'; it must be one of dppo_tv, dppo_kl"),
        (lambda: with_method(BASE, "m2po", bound=0.0), "bound is 0.0; it must be above 0"),
        *((partial(with_method, BASE, name, bound=-1.0), r"-1\.0") for name in METHODS),
        (lambda: by_response.vexact(max_ratio=0.0), "0.001 and 0.0; both must be above 0"),
        (lambda: by_response.seq_mask_tis(0.9), "0.999 and 0.9; the lower must"),
        (lambda: trust_regions.ipo(float("nan")), "bound is nan"),
    ],
)
def test_values_out_of_range_are_quoted(make, message):
    with pytest.raises(ValueError, match=message):
        make()
