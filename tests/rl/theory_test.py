"""The papers' statements against generic solvers, automatic differentiation, brute force and sampling."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import lambertw

from dcjax.rl import clipped_surrogate, penalize
from dcjax.rl.theory import (
    best_lr,
    difference_optimum,
    expected_improvement,
    gradient_bias,
    kl_rate,
    largest_gap,
    log_linear_policy,
    log_ratio_optimum,
    penalty_update,
    probability_gap,
    quadratic_improvement,
    ratio_optimum,
    state_distributions,
    state_gaps,
    truncated_weights,
)

TOY_Q = np.array([0.30, 0.30, 0.14, 0.14, 0.06, 0.06])
TOY_ADVANTAGES = np.array([-0.5, 0.5, -0.8, 0.8, -1.2, 1.2])


# ---- Theorem B.1 of paper A. Each form: its solver, its m, dm/dπ, and the weights of m² in the budget.

FORMS = {
    "difference": (difference_optimum, {}, lambda p, q: p - q, lambda p, q: np.ones_like(q), np.ones_like),
    "ratio": (ratio_optimum, {}, lambda p, q: p / q - 1, lambda p, q: 1 / q, np.ones_like),
    "weighted ratio": (ratio_optimum, {"weighted": True}, lambda p, q: p / q - 1, lambda p, q: 1 / q, lambda q: q),
    "log ratio": (log_ratio_optimum, {}, lambda p, q: np.log(p / q), lambda p, q: 1 / p, np.ones_like),
    "one-sided difference": (
        difference_optimum,
        {"one_sided": True},
        lambda p, q: np.maximum(p - q, 0),
        lambda p, q: (p > q) * 1.0,
        np.ones_like,
    ),
    "one-sided ratio": (
        ratio_optimum,
        {"one_sided": True},
        lambda p, q: np.maximum(p / q - 1, 0),
        lambda p, q: (p > q) / q,
        np.ones_like,
    ),
    "one-sided weighted ratio": (
        ratio_optimum,
        {"one_sided": True, "weighted": True},
        lambda p, q: np.maximum(p / q - 1, 0),
        lambda p, q: (p > q) / q,
        lambda q: q,
    ),
}

# budgets of random problems: large enough for actions at zero; the log form is convex up to 1
MOST = dict.fromkeys(FORMS, 0.6) | {"ratio": 30.0, "weighted ratio": 3.0, "log ratio": 0.99}


def solve(form, advantages, q, budget):
    solver, options, *_ = FORMS[form]
    return solver(advantages=advantages, q=q, budget=budget, **options)


def cost(form, policy, q):
    _, _, m, _, weights = FORMS[form]
    return float(weights(q) @ m(policy, q) ** 2)


def random_problem(rng, form, least=1e-3):
    n = int(rng.integers(2, 9))
    q = rng.dirichlet(np.full(n, 2.0)) + 0.02
    most = MOST[form]
    budget = float(np.exp(rng.uniform(np.log(least), np.log(most))))
    return rng.normal(size=n) * np.exp(rng.normal()), q / q.sum(), budget


@functools.cache
def solved(form, count):
    """Random problems with their optima; every other budget is large, so that actions are at zero."""
    rng, found = np.random.default_rng(100), []
    for number in itertools.count():
        problem = random_problem(rng, form, least=MOST[form] / 2 if number % 2 else 1e-3)
        try:
            found.append((*problem, solve(form, *problem)))
        except ValueError as error:
            # the greedy policy is within the budget: only where every m is bounded by 1
            assert "too large" in str(error) and form != "log ratio"
        if len(found) == count:
            return found


few_or_many = pytest.mark.parametrize("count", [12, pytest.param(50, marks=pytest.mark.slow)])


def generic_optimum(form, advantages, q, budget, starts):
    """The best of several SLSQP runs, which know nothing of the closed forms."""
    _, _, m, slope, weights = FORMS[form]
    unit = np.ptp(advantages)
    constraints = [
        {"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like},
        {
            "type": "ineq",
            "fun": lambda p: budget - weights(q) @ m(p, q) ** 2,
            "jac": lambda p: -2 * weights(q) * m(p, q) * slope(p, q),
        },
    ]
    bounds = [(1e-9 if "log" in form else 0.0, 1.0)] * len(q)
    best = None
    for start in starts:
        found = minimize(
            lambda p: -p @ advantages / unit,
            start,
            jac=lambda p: -advantages / unit,
            bounds=bounds,
            constraints=constraints,
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        ).x
        feasible = abs(found.sum() - 1) < 1e-9 and cost(form, found, q) <= budget * (1 + 1e-8) + 1e-9
        if feasible and (best is None or found @ advantages > best @ advantages):
            best = found
    return best


@few_or_many
@pytest.mark.parametrize("form", FORMS)
def test_closed_forms_against_a_generic_solver(form, count):
    rng = np.random.default_rng(sorted(FORMS).index(form))
    for advantages, q, budget, optimum in solved(form, count):
        # the log form is not convex everywhere, so it is started from many places
        starts = [q, *rng.dirichlet(np.full(len(q), 3.0), size=7 if form == "log ratio" else 2)]
        expected = generic_optimum(form, advantages, q, budget, starts)
        scale = np.ptp(advantages)
        np.testing.assert_allclose(optimum.policy @ advantages, expected @ advantages, rtol=0, atol=1e-7 * scale)
        assert optimum.policy @ advantages >= expected @ advantages - 1e-8 * scale
        np.testing.assert_allclose(optimum.policy, expected, rtol=0, atol=1e-6)


@few_or_many
@pytest.mark.parametrize("form", FORMS)
def test_kkt_conditions_hold_and_the_budget_is_active(form, count):
    zeros = 0
    for advantages, q, budget, (policy, beta, nu, spent) in solved(form, count):
        _, _, m, slope, weights = FORMS[form]
        assert policy.dtype == np.float64 and np.all(policy >= 0) and beta > 0
        assert policy.sum() == pytest.approx(1, abs=1e-12)
        assert spent == pytest.approx(budget, rel=1e-9) and cost(form, policy, q) == pytest.approx(budget, rel=1e-9)
        force = advantages - nu - beta * weights(q) * m(policy, q) * slope(policy, q)
        tolerance = 1e-9 * np.ptp(advantages)
        assert np.all(force <= tolerance), "raising an action would pay"
        assert np.all(np.abs(force[policy > 0]) <= tolerance), "an action in use is not stationary"
        zeros += np.any(policy == 0)
    # the log form is positive by itself; every other one meets the bound π ≥ 0
    assert zeros == 0 if form == "log ratio" else zeros > 3


def test_log_ratio_is_on_the_principal_branch():
    for advantages, q, _, (policy, beta, nu, _) in solved("log ratio", 12):
        kappa = q * (advantages - nu) / beta
        assert np.all(kappa < np.exp(-1)) and np.all(policy < np.e * q)
        assert nu >= np.max(advantages - beta / (np.e * q))
        np.testing.assert_allclose(np.log(policy / q), -lambertw(-kappa, 0).real, atol=1e-9)
        # the other branch solves the same equation above e·q, where the penalty is concave in that action
        raised = (kappa > 0) & (kappa < np.exp(-1))
        other = q[raised] * np.exp(-lambertw(-kappa[raised], -1).real)
        np.testing.assert_allclose(beta * np.log(other / q[raised]) / other, (advantages - nu)[raised], rtol=1e-9)
        assert np.all(other > np.e * q[raised])


def test_above_e_q_the_log_form_is_refused_and_the_best_policy_is_elsewhere():
    with pytest.raises(ValueError, match=r"budget 4\.0 takes action 5 to e·q.*at most 1 never does"):
        log_ratio_optimum(advantages=TOY_ADVANTAGES, q=TOY_Q, budget=4.0)
    starts = [TOY_Q, *np.random.default_rng(2).dirichlet(np.full(6, 3.0), size=30)]
    best = generic_optimum("log ratio", TOY_ADVANTAGES, TOY_Q, 4.0, starts)
    # one action, and one only, is on the other branch
    assert np.flatnonzero(best > np.e * TOY_Q).tolist() == [5]
    # A = ν + β m/π: stationary with some β > 0, but no maximum of the penalised objective. Its Hessian has one
    # positive entry, so it is negative definite on Σ d = 0 only where the entries' inverses sum to more than 0
    m = np.log(best / TOY_Q)
    columns = np.stack([np.ones(6), m / best], axis=1)
    (nu, beta), *_ = np.linalg.lstsq(columns, TOY_ADVANTAGES)
    np.testing.assert_allclose(columns @ [nu, beta], TOY_ADVANTAGES, atol=1e-6)
    hessian = -beta * (1 - m) / best**2
    assert beta > 0 and np.sum(hessian > 0) == 1 and np.sum(1 / hessian) < 0


def test_by_hand_two_actions():
    """Half and half, A = ±1: both move by m, Σ m² = 2m², and A − ν = ±1 = β m."""
    q, advantages = np.array([0.5, 0.5]), np.array([1.0, -1.0])
    policy, beta, nu, _ = difference_optimum(advantages=advantages, q=q, budget=0.02)
    np.testing.assert_allclose([*policy, beta, nu], [0.6, 0.4, 10.0, 0.0], atol=1e-12)
    # m = ±.2 in ratio, q² = 1/4: π − q = ±1/(4β) = ±.1
    policy, beta, nu, _ = ratio_optimum(advantages=advantages, q=q, budget=0.08)
    np.testing.assert_allclose([*policy, beta, nu], [0.6, 0.4, 2.5, 0.0], atol=1e-12)
    # E_q[m²] = .04 at the same policy: π − q = ±1/(2β)
    policy, beta, nu, _ = ratio_optimum(advantages=advantages, q=q, budget=0.04, weighted=True)
    np.testing.assert_allclose([*policy, beta, nu], [0.6, 0.4, 5.0, 0.0], atol=1e-12)
    # only the first action pays; the second is marginal, so ν is its advantage and 2 = β · .1
    policy, beta, nu, _ = difference_optimum(advantages=advantages, q=q, budget=0.01, one_sided=True)
    np.testing.assert_allclose([*policy, beta, nu], [0.6, 0.4, 20.0, -1.0], atol=1e-12)


def test_the_log_form_by_hand():
    """π = (.6, .4) from (.5, .5): m = log 1.2 and log .8; β and ν from the two stationarity conditions."""
    m = np.log([1.2, 0.8])
    beta = 2 / (m[0] / 0.6 - m[1] / 0.4)
    optimum = log_ratio_optimum(advantages=np.array([1.0, -1.0]), q=np.array([0.5, 0.5]), budget=float(m @ m))
    np.testing.assert_allclose(optimum.policy, [0.6, 0.4], atol=1e-12)
    np.testing.assert_allclose([optimum.beta, optimum.nu], [beta, 1 - beta * m[0] / 0.6], atol=1e-10)


def test_marginal_actions_and_zeros_of_the_one_sided_toy():
    optimum = ratio_optimum(advantages=TOY_ADVANTAGES, q=TOY_Q, budget=0.1, one_sided=True)
    assert optimum.nu == -0.8 and optimum.policy[4] == 0 and 0 < optimum.policy[2] < TOY_Q[2]
    above = optimum.nu < TOY_ADVANTAGES
    expected = TOY_Q + TOY_Q**2 * (TOY_ADVANTAGES - optimum.nu) / optimum.beta
    np.testing.assert_allclose(optimum.policy[above], expected[above], rtol=1e-12)
    # marginal twins share in proportion to q
    twins = ratio_optimum(
        advantages=np.array([0.0, 0.0, 1.0]), q=np.array([0.6, 0.2, 0.2]), budget=0.01, one_sided=True
    )
    np.testing.assert_allclose(twins.policy, [0.585, 0.195, 0.22], atol=1e-12)


@functools.cache
def toy_optimum(form):
    return solve(form, TOY_ADVANTAGES, TOY_Q, 0.1)


@given(st.floats(-1e3, 1e3), st.floats(0.01, 100), st.sampled_from(sorted(FORMS)), st.permutations(range(6)))
@hypothesis_settings(max_examples=10)
def test_the_policy_depends_on_neither_shift_scale_nor_order_of_the_advantages(shift, scale, form, order):
    order, plain = np.array(order), toy_optimum(form)
    moved = solve(form, (scale * TOY_ADVANTAGES + shift)[order], TOY_Q[order], 0.1)
    np.testing.assert_allclose(moved.policy, plain.policy[order], atol=1e-9)
    np.testing.assert_allclose(moved.beta, scale * plain.beta, rtol=1e-6)
    np.testing.assert_allclose(moved.nu, scale * plain.nu + shift, atol=1e-6 * (scale + abs(shift)))


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_solved_is_refused(form):
    half, signs = np.array([0.5, 0.5]), np.array([1.0, -1.0])
    with pytest.raises(ValueError, match=r"\[0\.5, 0\.6\] sums to 1\.1"):
        solve(form, signs, np.array([0.5, 0.6]), 0.1)
    with pytest.raises(ValueError, match=r"q \[1\.0, 0\.0\]"):
        solve(form, signs, np.array([1.0, 0.0]), 0.1)
    with pytest.raises(ValueError, match=r"advantages \[nan, 1\.0\]"):
        solve(form, np.array([np.nan, 1.0]), half, 0.1)
    with pytest.raises(ValueError, match=r"all 2\.0"):
        solve(form, np.array([2.0, 2.0]), half, 0.1)
    for budget in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match=f"budget {budget} must be above 0"):
            solve(form, signs, half, budget)
    with pytest.raises(ValueError, match=r"budget 1e-40 is too small"):
        solve(form, signs, half, 1e-40)
    with pytest.raises(ValueError, match=r"budget 1000000\.0 is too large"):
        solve(form, signs, half, 1e6)


@pytest.mark.parametrize(
    ("form", "most"),
    [
        # all probability on action 5: Σ (π − q)²; 5 actions at −1 and 1/.06 − 1; the rest of q and .06 (1/.06 − 1)²
        ("difference", 0.94**2 + 2 * 0.3**2 + 2 * 0.14**2 + 0.06**2),
        ("ratio", 5 + (0.94 / 0.06) ** 2),
        ("weighted ratio", 0.94 + 0.94**2 / 0.06),
        ("one-sided difference", 0.94**2),
        ("one-sided ratio", (0.94 / 0.06) ** 2),
    ],
)
def test_the_largest_budget_is_what_the_greedy_policy_spends(form, most):
    close = solve(form, TOY_ADVANTAGES, TOY_Q, most * 0.999)
    assert close.policy[5] > 0.99
    with pytest.raises(ValueError, match=f"must be below {most:.6g}"):
        solve(form, TOY_ADVANTAGES, TOY_Q, most * 1.001)


# ---- Theorem 3.1 and Lemma B.5 of paper B


def free_features(kinds, steps):
    """One-hot in (s, a): every state has its own logits."""
    sizes = [kinds**t * kinds for t in range(steps)]
    blocks = np.split(np.eye(sum(sizes)), np.cumsum(sizes)[:-1])
    return [block.reshape(kinds**t, kinds, -1) for t, block in enumerate(blocks)]


def random_policies(rng, kinds, steps, free):
    features = (
        free_features(kinds, steps)
        if free
        else [rng.normal(size=(kinds**t, kinds, int(rng.integers(1, 2) + 1))) for t in range(steps)]
    )
    parameters = rng.normal(size=features[0].shape[-1])
    policy, scores = log_linear_policy(features, parameters)
    noisy = [table * np.exp(np.exp(rng.normal() - 1) * rng.normal(size=table.shape)) for table in policy]
    behaviour = [table / table.sum(axis=1, keepdims=True) for table in noisy]
    return features, parameters, policy, behaviour, scores


def brute_force_gradient(features, parameters, sampler, rewards):
    """E_{y~sampler}[R(y) ∇ log π(y)] one response at a time, the gradient by complex steps, exact to rounding."""
    kinds, steps = features[0].shape[1], len(features)

    def expected(theta):
        total = 0.0
        for number, response in enumerate(itertools.product(range(kinds), repeat=steps)):
            state, sampled, logp = 0, 1.0, 0.0
            for phi, table, action in zip(features, sampler, response, strict=True):
                sampled *= table[state, action]
                logits = phi[state] @ theta
                logp += logits[action] - np.log(np.sum(np.exp(logits)))
                state = state * kinds + action
            total += sampled * rewards[number] * logp
        return total

    step = 1e-30
    return np.array([expected(parameters + 1j * step * along).imag / step for along in np.eye(len(parameters))])


@pytest.mark.parametrize(("kinds", "steps", "free"), [(2, 3, True), (3, 2, False), (2, 4, False), (4, 1, True)])
def test_gradients_against_brute_force(kinds, steps, free):
    rng = np.random.default_rng(kinds * 10 + steps)
    features, parameters, policy, behaviour, scores = random_policies(rng, kinds, steps, free)
    rewards = rng.integers(0, 2, size=kinds**steps)
    sides = gradient_bias(policy=policy, behaviour=behaviour, scores=scores, rewards=rewards)
    gradient = brute_force_gradient(features, parameters, policy, rewards)
    actual = brute_force_gradient(features, parameters, behaviour, rewards)
    np.testing.assert_allclose(sides.gradient, gradient, atol=1e-12)
    np.testing.assert_allclose(sides.actual, actual, atol=1e-12)
    assert sides.distance == pytest.approx(np.linalg.norm(actual - gradient), abs=1e-12)
    gap = max(
        0.5 * sum(abs(p - q) for p, q in zip(row, other, strict=True))
        for table, others in zip(policy, behaviour, strict=True)
        for row, other in zip(table, others, strict=True)
    )
    norms = [np.linalg.norm(score[s, a]) for score in scores for s, a in np.ndindex(score.shape[:2])]
    assert sides.bound == pytest.approx(2 * max(norms) * gap * steps**2, rel=1e-12)
    assert (sides.largest_gap, sides.score_bound) == pytest.approx((gap, max(norms)), rel=1e-12)


def test_state_distributions_against_brute_force():
    _, _, policy, _, _ = random_policies(np.random.default_rng(5), 3, 3, True)
    distributions = state_distributions(policy)
    for t in range(4):
        expected = []
        for prefix in itertools.product(range(3), repeat=t):
            probability, state = 1.0, 0
            for table, action in zip(policy, prefix, strict=False):
                probability *= table[state, action]
                state = 3 * state + action
            expected.append(probability)
        np.testing.assert_allclose(distributions[t], expected, rtol=1e-13)


def test_both_bounds_hold_on_hundreds_of_policies():
    rng = np.random.default_rng(6)
    largest = {}
    for number in range(200):
        kinds, steps = int(rng.integers(2, 4)), int(rng.integers(1, 5))
        _, _, policy, behaviour, scores = random_policies(rng, kinds, steps, free=number % 2 == 0)
        rewards = rng.integers(0, 2, size=kinds**steps)
        sides = gradient_bias(policy=policy, behaviour=behaviour, scores=scores, rewards=rewards)
        assert sides.distance <= sides.bound
        largest[steps] = max(largest.get(steps, 0), sides.distance / sides.bound)
        distances, bounds = state_gaps(policy=policy, behaviour=behaviour)
        assert distances.shape == bounds.shape == (steps + 1,) and distances[0] == bounds[0] == 0
        assert np.all(distances <= bounds + 1e-14)
        assert distances[1] <= bounds[1] and bounds[-1] == 2 * steps * sides.largest_gap
    assert sorted(largest) == [1, 2, 3, 4] and largest[1] > 0.5


def test_the_gradient_bound_is_attained_by_one_token():
    """One logit z, π = (½, ½), scores ±½ = ±B, μ = (½ + Δ, ½ − Δ), every response rewarded: the gap is Δ = 2BΔ."""
    policy, scores = log_linear_policy([np.array([[[1.0], [0.0]]])], np.zeros(1))
    behaviour = [np.array([[0.7, 0.3]])]
    sides = gradient_bias(policy=policy, behaviour=behaviour, scores=scores, rewards=np.ones(2))
    assert (sides.score_bound, sides.largest_gap) == pytest.approx((0.5, 0.2), abs=1e-15)
    assert sides.distance == pytest.approx(0.2, abs=1e-15) and sides.bound == pytest.approx(0.2, abs=1e-15)
    assert sides.gradient == pytest.approx([0], abs=1e-15)


def test_the_lemma_is_nearly_attained_by_a_rare_stop():
    """π never takes action 1, μ does with probability Δ until it has: d_t are 2(1 − (1 − Δ)^t) apart, of 2tΔ."""
    delta, steps = 1e-4, 6
    policy = [np.tile([1.0, 0.0], (2**t, 1)) for t in range(steps)]
    behaviour = [np.tile([1.0, 0.0], (2**t, 1)) for t in range(steps)]
    for table in behaviour:
        table[0] = [1 - delta, delta]
    distances, bounds = state_gaps(policy=policy, behaviour=behaviour)
    t = np.arange(steps + 1)
    np.testing.assert_allclose(distances, 2 * (1 - (1 - delta) ** t), atol=1e-14)
    np.testing.assert_allclose(bounds, 2 * t * delta, atol=1e-14)
    assert np.all(distances[1:] > 0.999 * bounds[1:]) and np.all(distances <= bounds + 1e-15)


def test_tables_that_do_not_fit_are_refused():
    policy = [np.full((1, 2), 0.5), np.full((2, 2), 0.5)]
    with pytest.raises(ValueError, match=r"step 1 is \(1, 2\); it must be \(2, 2\)"):
        state_distributions([policy[0], policy[0]])
    with pytest.raises(ValueError, match=r"step 1 has a row that sums to 1\.1"):
        state_distributions([policy[0], np.array([[0.5, 0.5], [0.5, 0.6]])])
    with pytest.raises(ValueError, match="policy has 2 steps, behaviour 1"):
        largest_gap(policy=policy, behaviour=policy[:1])
    scores = [np.zeros((1, 2, 1)), np.zeros((2, 2, 1))]
    for rewards in (np.array([0, 1]), np.array([0, 1, 2, 0])):
        with pytest.raises(ValueError, match="rewards must be 0 or 1 for each of the 4 responses"):
            gradient_bias(policy=policy, behaviour=policy, scores=scores, rewards=rewards)


def sample_responses(rng, sampler, count):
    """Actions and states [count, T], drawn token by token."""
    states, actions, state = [], [], np.zeros(count, int)
    for table in sampler:
        action = (rng.random(count)[:, None] > np.cumsum(table, axis=1)[state][:, :-1]).sum(axis=1)
        states.append(state)
        actions.append(action)
        state = state * table.shape[1] + action
    return states, actions, state


@pytest.mark.parametrize("which", ["gradient", "actual"])
def test_a_million_sampled_responses_agree(which):
    rng = np.random.default_rng(7)
    _, _, policy, behaviour, scores = random_policies(rng, 3, 3, free=False)
    rewards = rng.integers(0, 2, size=27)
    expected = getattr(gradient_bias(policy=policy, behaviour=behaviour, scores=scores, rewards=rewards), which)
    sampler = policy if which == "gradient" else behaviour
    states, actions, responses = sample_responses(rng, sampler, 1_000_000)
    total = sum(score[state, action] for score, state, action in zip(scores, states, actions, strict=True))
    assert_mean_is(rewards[responses][:, None] * total, expected)


def assert_mean_is(samples, expected):
    """Within 4.5 standard errors in every coordinate, and the interval is narrow enough to say something."""
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(axis=0) - expected) <= 4.5 * error + 1e-15)
    assert np.all(error < 5e-3)


# ---- Appendix A of paper B


def test_eq_13_is_an_equality_on_a_quadratic():
    rng = np.random.default_rng(8)
    for _ in range(200):
        dimensions, values = int(rng.integers(1, 6)), int(rng.integers(1, 8))
        parameters, estimates = rng.normal(size=dimensions), rng.normal(size=(values, dimensions))
        probabilities = rng.dirichlet(np.ones(values))
        lr, curvature = float(rng.uniform(0, 2)), float(rng.uniform(0.1, 3))
        gradient = -curvature * parameters
        mean = probabilities @ estimates
        variance = float(probabilities @ np.sum((estimates - mean) ** 2, axis=1))
        terms = expected_improvement(
            gradient=gradient, bias=mean - gradient, variance=variance, lr=lr, curvature=curvature
        )
        gained = quadratic_improvement(
            parameters=parameters, estimates=estimates, probabilities=probabilities, lr=lr, curvature=curvature
        )
        size = abs(terms.signal) + abs(terms.alignment) + abs(terms.noise)
        assert abs(terms.total - gained) <= 1e-12 * max(size, 1)


def test_eq_13_by_hand():
    """∇J = 2, bias −1, variance 3, η = ½, L = 1: ½·¾·4 = 1.5, ½·½·(−2) = −.5, −⅛·(3 + 1) = −.5."""
    terms = expected_improvement(gradient=np.array([2.0]), bias=np.array([-1.0]), variance=3.0, lr=0.5, curvature=1.0)
    assert terms == (1.5, -0.5, -0.5) and terms.total == 0.5
    # θ = −2, g = 1 ± √3: J = −½θ² goes from −2 to the mean of −½(−1.5 ± .866)² = −1.5
    gained = quadratic_improvement(
        parameters=np.array([-2.0]),
        estimates=1 + np.sqrt(3) * np.array([[1.0], [-1.0]]),
        probabilities=np.array([0.5, 0.5]),
        lr=0.5,
        curvature=1.0,
    )
    assert gained == pytest.approx(0.5, abs=1e-15)


def test_eq_13_bounds_where_the_curvature_is_smaller():
    """J = −(ℓ/2)‖θ‖² with ℓ < L is L-smooth too: there the bound holds with room."""
    rng = np.random.default_rng(9)
    for _ in range(50):
        parameters, estimates = rng.normal(size=3), rng.normal(size=(4, 3))
        probabilities, mean = np.full(4, 0.25), estimates.mean(axis=0)
        variance = float(((estimates - mean) ** 2).sum(axis=1).mean())
        bound = expected_improvement(
            gradient=-0.5 * parameters, bias=mean + 0.5 * parameters, variance=variance, lr=0.4, curvature=2.0
        )
        gained = quadratic_improvement(
            parameters=parameters, estimates=estimates, probabilities=probabilities, lr=0.4, curvature=0.5
        )
        assert gained > bound.total


def test_the_best_learning_rate_falls_with_noise_and_nothing_is_gained_at_twice_it():
    gradient, bias = np.array([1.0, 0.5]), np.array([-0.2, 0.4])
    previous = np.inf
    for variance in (0.0, 1.0, 4.0, 16.0):
        known = {"gradient": gradient, "bias": bias, "variance": variance, "curvature": 2.0}
        best = best_lr(**known)
        gain = expected_improvement(**known, lr=best).total
        assert best < previous and gain > 0
        assert all(expected_improvement(**known, lr=best * factor).total < gain for factor in (0.99, 1.01))
        assert expected_improvement(**known, lr=2 * best).total == pytest.approx(0, abs=1e-14)
        previous = best
    # a bias that outweighs the gradient: no step helps
    against = {"gradient": gradient, "bias": -2 * gradient, "variance": 0.0, "curvature": 2.0}
    assert best_lr(**against) == 0 and expected_improvement(**against, lr=0.1).total < 0


def test_what_eq_13_refuses():
    known = {"gradient": np.ones(1), "bias": np.zeros(1)}
    with pytest.raises(ValueError, match=r"variance -1\.0"):
        expected_improvement(**known, variance=-1.0, lr=0.1, curvature=1.0)
    with pytest.raises(ValueError, match=r"curvature 0\.0 above 0"):
        best_lr(**known, variance=1.0, curvature=0.0)
    with pytest.raises(ValueError, match="no step moves"):
        best_lr(gradient=np.zeros(1), bias=np.zeros(1), variance=0.0, curvature=1.0)
    with pytest.raises(ValueError, match=r"sum to 0\.9"):
        quadratic_improvement(
            parameters=np.ones(1),
            estimates=np.ones((1, 1)),
            probabilities=np.array([0.9]),
            lr=0.1,
            curvature=1.0,
        )


# ---- the published penalty, to first order

DESCENDS = {"behaviour": np.array([0.2, *[0.8 / 6] * 6]), "policy": np.array([0.5, *[0.5 / 6] * 6])}


def random_pair(rng, n):
    return {"policy": rng.dirichlet(np.ones(n)), "behaviour": rng.dirichlet(np.ones(n)) * 0.98 + 0.02 / n}


def published_update(pair, multiplier, weights=None):
    return penalty_update(**pair, discrepancy=probability_gap(**pair), multiplier=multiplier, weights=weights)


def kl(policy, behaviour):
    return float(np.sum(behaviour * np.log(behaviour / policy)))


def objective_gradient(pair, multiplier, weights):
    """∇_z of E_μ[w · r(z) · (−λδ)], r = exp(log π_z − log π_old), all else constant."""
    constant = pair["behaviour"] * weights * -multiplier * np.abs(pair["policy"] - pair["behaviour"])
    with jax.enable_x64(True):
        return np.asarray(reweighted_gradient(np.log(pair["policy"]), constant))


@jax.jit
def reweighted_gradient(old, constant):
    return jax.grad(lambda logits: jnp.sum(constant * jnp.exp(jax.nn.log_softmax(logits) - old)))(old)


@pytest.mark.parametrize("clip_max", [None, 2.0, np.inf])
def test_the_update_against_automatic_differentiation(clip_max):
    rng = np.random.default_rng(10)
    for n in (2, 3, 7, 21):
        pair = random_pair(rng, n)
        weights = None if clip_max is None else truncated_weights(**pair, clip_max=clip_max)
        update = published_update(pair, 0.3, weights)
        np.testing.assert_allclose(
            update, objective_gradient(pair, 0.3, 1.0 if weights is None else weights), atol=1e-12
        )
        assert abs(update.sum()) < 1e-15


def test_the_update_is_what_the_training_loss_does():
    """Every action as one row of a batch, weighted by how often it is sampled, through the loss that trains."""
    pair = random_pair(np.random.default_rng(19), 9)
    weights = truncated_weights(**pair, clip_max=2.0)
    column = {name: array.astype(np.float32)[:, None] for name, array in pair.items()}

    def loss(logits):
        losses, _ = clipped_surrogate(
            jax.nn.log_softmax(logits)[:, None],
            old_logps=jnp.log(column["policy"]),
            advantages=penalize(jnp.zeros((9, 1)), jnp.abs(column["policy"] - column["behaviour"]), multiplier=0.3),
            weights=(weights * pair["behaviour"])[:, None],
            mask=np.ones((9, 1), bool),
            eps_low=0.2,
            eps_high=0.28,
        )
        return jnp.sum(losses)

    descent = -np.asarray(jax.jit(jax.grad(loss))(np.log(pair["policy"])))
    np.testing.assert_allclose(descent, published_update(pair, 0.3, weights), atol=1e-7)


@pytest.mark.parametrize("clip_max", [None, 2.0])
def test_a_million_sampled_actions_agree(clip_max):
    rng = np.random.default_rng(11)
    pair = random_pair(rng, 5)
    weights = np.ones(5) if clip_max is None else truncated_weights(**pair, clip_max=clip_max)
    actions = rng.choice(5, size=1_000_000, p=pair["behaviour"])
    gap = np.abs(pair["policy"] - pair["behaviour"])
    samples = -0.3 * (weights * gap)[actions][:, None] * (np.eye(5)[actions] - pair["policy"])
    assert_mean_is(samples, published_update(pair, 0.3, weights))


def test_every_sample_lowers_its_own_logit_whichever_policy_is_larger():
    rng = np.random.default_rng(12)
    for _ in range(50):
        pair = random_pair(rng, 6)
        gap = probability_gap(**pair)
        for action in range(6):
            alone = np.eye(6)[action]
            one = penalty_update(policy=pair["policy"], behaviour=alone, discrepancy=gap, multiplier=0.3)
            assert one[action] < 0 and np.all(np.delete(one, action) > 0)


def test_two_actions_are_ascent_on_kl():
    rng = np.random.default_rng(13)
    for _ in range(200):
        pair = random_pair(rng, 2)
        update = published_update(pair, 0.3)
        gap = abs(pair["policy"][0] - pair["behaviour"][0])
        # ∇_z KL(μ‖π) = π − μ
        np.testing.assert_allclose(update, 0.3 * gap * (pair["policy"] - pair["behaviour"]), atol=1e-15)
        assert kl_rate(**pair, update=update) > 0


def test_equal_gaps_are_ascent_on_kl_for_any_number_of_actions():
    rng = np.random.default_rng(14)
    for n in range(2, 30):
        pair = random_pair(rng, n)
        update = penalty_update(**pair, discrepancy=np.full(n, 0.25), multiplier=0.4)
        np.testing.assert_allclose(update, 0.1 * (pair["policy"] - pair["behaviour"]), atol=1e-15)
        corrected = penalty_update(
            **pair,
            discrepancy=np.full(n, 0.25),
            multiplier=0.4,
            weights=truncated_weights(**pair, clip_max=np.inf),
        )
        np.testing.assert_allclose(corrected, 0, atol=1e-16)


def test_the_counterexample_descends():
    """μδ = (.06, 6 × .00667), μ·δ = .1: update −λ(.01, 6 × −.00167), rate −.0035 λ."""
    update = published_update(DESCENDS, 1.0)
    np.testing.assert_allclose(update, [-0.01, *[0.01 / 6] * 6], atol=1e-15)
    assert kl_rate(**DESCENDS, update=update) == pytest.approx(-0.0035, abs=1e-15)
    assert published_update(DESCENDS, 1.0) == pytest.approx(objective_gradient(DESCENDS, 1.0, 1.0), abs=1e-14)


def near_pair(rng, n, noise):
    """π = μ · exp(noise · normal), normalised."""
    behaviour = rng.dirichlet(np.ones(n)) * 0.98 + 0.02 / n
    policy = behaviour * np.exp(noise * rng.normal(size=n))
    return {"policy": policy / policy.sum(), "behaviour": behaviour}


def test_the_rate_is_a_part_that_changes_sign_with_the_gap_and_a_part_that_always_ascends():
    """With d = π − μ: rate = −λ Cov_μ(d, |d|) + λ (μ·|d|) ‖d‖²; a gap and its mirror image together ascend."""
    rng = np.random.default_rng(15)
    for _ in range(200):
        pair = near_pair(rng, int(rng.integers(2, 12)), 0.3)
        policy, behaviour = pair["policy"], pair["behaviour"]
        d = policy - behaviour
        covariance = behaviour @ (d * np.abs(d)) - (behaviour @ d) * (behaviour @ np.abs(d))
        bias = (behaviour @ np.abs(d)) * (d @ d)
        rate = kl_rate(**pair, update=published_update(pair, 0.3))
        assert rate == pytest.approx(0.3 * (bias - covariance), abs=1e-15)
        if np.all(behaviour > d):
            mirrored = {"policy": behaviour - d, "behaviour": behaviour}
            total = rate + kl_rate(**mirrored, update=published_update(mirrored, 0.3))
            assert total == pytest.approx(0.6 * bias, abs=1e-15) and total > 0


@pytest.mark.parametrize(
    ("actions", "noise", "plain", "corrected"),
    [
        pytest.param(8, 0.02, 0.501, 0.521, marks=pytest.mark.slow),
        pytest.param(8, 0.2, 0.41, 0.60, marks=pytest.mark.slow),
        (8, 1.0, 0.104, 0.884),
        pytest.param(1000, 0.02, 0.499, 0.581, marks=pytest.mark.slow),
        (1000, 0.2, 0.575, 0.988),
        pytest.param(1000, 1.0, 0.581, 1.0, marks=pytest.mark.slow),
    ],
)
def test_how_often_a_penalty_descends(actions, noise, plain, corrected):
    """The table of docs/theory.md: close to μ a coin decides; eight actions far from it mostly ascend."""
    rng = np.random.default_rng(18)
    pairs = [near_pair(rng, actions, noise) for _ in range(1000)]
    weights = [truncated_weights(**pair, clip_max=np.inf) for pair in pairs]
    for expected, used in ((plain, [None] * 1000), (corrected, weights)):
        updates = [published_update(pair, 1.0, weight) for pair, weight in zip(pairs, used, strict=True)]
        falls = [kl_rate(**pair, update=update) < 0 for pair, update in zip(pairs, updates, strict=True)]
        # rounding, and another NumPy's generator
        assert np.mean(falls) == pytest.approx(expected, abs=0.06)


def test_the_rate_is_the_derivative_of_kl():
    rng = np.random.default_rng(16)
    for n in (2, 5, 9):
        pair = random_pair(rng, n)
        update = published_update(pair, 0.3)
        step = 1e-5

        def after(scale, pair=pair, update=update):
            moved = pair["policy"] * np.exp(scale * update)
            return kl(moved / moved.sum(), pair["behaviour"])

        measured = (after(step) - after(-step)) / (2 * step)
        assert kl_rate(**pair, update=update) == pytest.approx(measured, rel=1e-5, abs=1e-9)


def test_token_tis_removes_the_bias():
    """Untruncated, the expectation under μ is the one under π; truncated, what is left is where π > C μ."""
    rng = np.random.default_rng(17)
    for _ in range(100):
        pair = random_pair(rng, 6)
        gap = probability_gap(**pair)
        under_policy = penalty_update(policy=pair["policy"], behaviour=pair["policy"], discrepancy=gap, multiplier=0.3)
        corrected = published_update(pair, 0.3, truncated_weights(**pair, clip_max=np.inf))
        np.testing.assert_allclose(corrected, under_policy, atol=1e-15)
        truncated = published_update(pair, 0.3, truncated_weights(**pair, clip_max=2.0))
        exact = np.all(pair["policy"] <= 2 * pair["behaviour"])
        assert np.allclose(truncated, under_policy, atol=1e-14) == exact
    two = random_pair(rng, 2)
    np.testing.assert_allclose(published_update(two, 1.0, truncated_weights(**two, clip_max=np.inf)), 0, atol=1e-16)


def test_what_the_first_order_functions_refuse():
    half, third = np.array([0.5, 0.5]), np.array([0.3, 0.3])
    with pytest.raises(ValueError, match=r"behaviour \[0\.3, 0\.3\] sums to 0\.6"):
        penalty_update(policy=half, behaviour=third, discrepancy=half, multiplier=1.0)
    with pytest.raises(ValueError, match=r"policy \[0\.3, 0\.3\]"):
        kl_rate(policy=third, behaviour=half, update=half)
    with pytest.raises(ValueError, match=r"clip_max 0\.0"):
        truncated_weights(policy=half, behaviour=half, clip_max=0.0)
