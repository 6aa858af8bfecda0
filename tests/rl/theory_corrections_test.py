"""Moments of the corrected policy gradient against loops, sampling and identities; the table of docs/theory.md."""

import cmath
import functools
import itertools
import math
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dcjax.rl.theory import CORRECTIONS, Responses, corrections, gradient_bias, gradient_estimators, log_linear_policy
from dcjax.rl.theory.corrections import uncorrected

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "experiments/corrected_gradients.py"
MODULE = runpy.run_path(str(SCRIPT))


def pair_of_policies(seed, kinds, steps, noise):
    """π, μ and the scores of free logits, and a reward of every response."""
    rng = np.random.default_rng(seed)
    sizes = [kinds ** (step + 1) for step in range(steps)]
    blocks = np.split(np.eye(sum(sizes)), np.cumsum(sizes)[:-1])
    features = [block.reshape(-1, kinds, sum(sizes)) for block in blocks]
    policy, scores = log_linear_policy(features, rng.normal(size=sum(sizes)))
    moved = [table * np.exp(noise * rng.standard_t(2, size=table.shape)) for table in policy]
    behaviour = [table / table.sum(axis=1, keepdims=True) for table in moved]
    return policy, behaviour, scores, rng.integers(0, 2, size=kinds**steps)


def moments(pair, corrected, *, on_policy=False):
    """(E g, E‖g − E g‖²) under one correction."""
    policy, behaviour, scores, rewards = pair
    sampler = policy if on_policy else behaviour
    known = {"policy": policy, "behaviour": sampler, "scores": scores, "rewards": rewards}
    return gradient_estimators(**known, corrections={"it": corrected})["it"]


# ---- Coefficients by loops over responses and tokens


def probabilities_by_loop(tables):
    """[[π(y_t|s_t) of each token] of each response]."""
    kinds, steps = tables[0].shape[1], len(tables)
    found = []
    for response in itertools.product(range(kinds), repeat=steps):
        state, row = 0, []
        for table, token in zip(tables, response, strict=True):
            row.append(float(table[state, token]))
            state = state * kinds + token
        found.append(row)
    return found


def binary_kl(a, b):
    if a == 1:
        return -math.log(b)
    return math.inf if b == 1 else a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))


def derivative(loss, p):
    """−d loss/d log p, by a complex step."""
    return -loss(p * cmath.exp(1e-30j)).imag / 1e-30


def m2po_dropped(tokens, mean_bound):
    """Takes out the largest (log r)², and all equal to it, until the mean is within the bound; {(log r)²: chance}."""
    left = dict(tokens)
    while left and sum(value * chance for value, chance in left.items()) > mean_bound * sum(left.values()):
        del left[max(left)]
    return set(tokens) - set(left)


def coefficients_by_loop(name, policy, behaviour, advantages):
    away = {}
    for p, q, a in zip(policy, behaviour, advantages, strict=True):
        for p_t, q_t in zip(p, q, strict=True):
            if (a > 0 and p_t > q_t) or (a < 0 and p_t < q_t):
                square = math.log(p_t / q_t) ** 2
                away[square] = away.get(square, 0) + math.prod(q)
    dropped = m2po_dropped(away, 0.04)

    def coefficient(p, q, a, p_t, q_t):
        r, logs = p_t / q_t, [math.log(x / y) for x, y in zip(p, q, strict=True)]
        whole, mean = math.exp(sum(logs)), sum(logs) / len(logs)
        gap = p_t - q_t
        match name:
            case "none":
                return a
            case "token weights":
                return a * r
            case "sequence weights":
                return a * whole
            case "token TIS":
                return a * min(r, 2)
            case "sequence TIS":
                return a * min(whole, 2)
            case "geometric TIS":
                return a * min(math.exp(mean), 2)
            case "token MIS":
                return a * r if r <= 2 else 0
            case "sequence MIS":
                return a * whole if whole <= 2 else 0
            case "IcePop":
                return a * r if 0.5 <= r <= 5 else 0
            case "DPPO-TV":
                masked = (a > 0 and gap > 0.15) or (a < 0 and gap < -0.15)
                return 0 if masked else a * min(r, 20)
            case "DPPO-KL":
                masked = binary_kl(q_t, p_t) > 0.05 and ((a > 0 and r > 1) or (a < 0 and r < 1))
                return 0 if masked else a * min(r, 20)
            case "IPO":
                return derivative(lambda x: -a * x / q_t if abs(gap) <= 0.3 else 0 * x, p_t)
            case "IPO, squared":
                return derivative(
                    lambda x: (-a * x / q_t if abs(gap) <= 0.1 else 0) + 1e-3 * cmath.log(x / q_t) ** 2, p_t
                )
            case "KPop":
                return a * r if binary_kl(p_t, q_t) <= 2 and binary_kl(q_t, p_t) <= 2 else 0
            case "DRPO":
                return derivative(lambda x: -a * x / q_t + abs(a) * q_t * (x / q_t - 1) ** 2 / 25, p_t)
            case "M2PO":
                masked = ((a > 0 and r > 1) or (a < 0 and r < 1)) and math.log(r) ** 2 in dropped
                return 0 if masked else a * r
            case "OPSM":
                return 0 if a < 0 and -mean > 1e-4 else a
            case "VeXact":
                k3 = sum(math.exp(log) - 1 - log for log in logs) / len(logs)
                return a * min(r, 2) if k3 <= 0.001 else 0
            case "seq-mask-tis":
                return a * r if 0.999 <= math.exp(mean) <= 1.002 else 0
        raise AssertionError(name)

    return [
        [coefficient(p, q, a, p_t, q_t) for p_t, q_t in zip(p, q, strict=True)]
        for p, q, a in zip(policy, behaviour, advantages, strict=True)
    ]


def advantages_by_loop(behaviour, rewards):
    chances = [math.prod(row) for row in behaviour]
    mean = sum(chance * float(reward) for chance, reward in zip(chances, rewards, strict=True))
    return [float(reward) - mean for reward in rewards]


@functools.cache
def seen(noise, seed=3):
    """What the corrections are given for one pair, by the enumeration itself and by a loop."""
    pair = pair_of_policies(seed, kinds=4, steps=3, noise=noise)
    kept = []

    def look(responses):
        kept.append(responses)
        return uncorrected(responses)

    moments(pair, look)
    policy, behaviour = (probabilities_by_loop(tables) for tables in pair[:2])
    return kept[0], policy, behaviour, advantages_by_loop(behaviour, pair[3])


SEEN = [(noise, seed) for noise in (0.003, 0.1, 0.3, 1.5, 3.0) for seed in range(8)]
"""Gaps at which every threshold acts on some tokens."""


def test_responses_are_those_of_a_loop():
    responses, policy, behaviour, advantages = seen(0.3)
    np.testing.assert_allclose(responses.policy, policy, rtol=1e-14)
    np.testing.assert_allclose(responses.behaviour, behaviour, rtol=1e-14)
    np.testing.assert_allclose(responses.advantages[:, 0], advantages, atol=1e-14)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_coefficients_are_those_of_a_loop(name):
    for case in SEEN:
        responses, *given = seen(*case)
        expected = coefficients_by_loop(name, *given)
        np.testing.assert_allclose(CORRECTIONS[name](responses), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", sorted(set(CORRECTIONS) - {"none", "token weights", "sequence weights"}))
def test_every_threshold_acts_on_some_tokens_and_not_on_all(name):
    """So that the loops above tell the thresholds apart."""
    base = {"sequence": "sequence weights", "OPSM": "none"}.get(name.split()[0], "token weights")
    different = [CORRECTIONS[name](seen(*case)[0]) != CORRECTIONS[base](seen(*case)[0]) for case in SEEN]
    if name in ("DRPO", "IPO, squared", "geometric TIS"):  # which change all
        assert np.mean(different) > 0.9
    else:
        assert 0 < np.mean(different) < 1


def test_vexact_truncates_what_it_keeps():
    """At its own τ no response of fewer than 307 tokens has a ratio above 2: 2 − 1 − log 2 = .307 is 307 τ."""
    responses, policy, behaviour, advantages = seen(0.3)
    found = corrections.vexact(responses, bound=0.2)
    cut = 0
    for row, p, q, a in zip(found, policy, behaviour, advantages, strict=True):
        ratios = [x / y for x, y in zip(p, q, strict=True)]
        kept = sum(r - 1 - math.log(r) for r in ratios) / 3 <= 0.2
        assert row.tolist() == pytest.approx([a * min(r, 2) if kept else 0 for r in ratios], rel=1e-12)
        cut += kept and max(ratios) > 2
    assert 0 < cut < len(found)


# ---- What is known of the moments


def test_on_policy_without_correction_is_the_gradient_of_theorem_3_1():
    pair = pair_of_policies(4, kinds=3, steps=3, noise=0.5)
    policy, behaviour, scores, rewards = pair
    sides = gradient_bias(policy=policy, behaviour=behaviour, scores=scores, rewards=rewards)
    np.testing.assert_allclose(moments(pair, uncorrected, on_policy=True).mean, sides.gradient, atol=1e-15)
    # without its baseline, which changes E g under μ
    probabilities = [math.prod(row) for row in probabilities_by_loop(behaviour)]
    plain = moments(pair, lambda responses: uncorrected(responses) + np.dot(probabilities, rewards))
    np.testing.assert_allclose(plain.mean, sides.actual, atol=1e-15)


@pytest.mark.parametrize("noise", [0.0015, 0.055, 0.5, 1.0])
def test_sequence_weights_are_unbiased_and_no_other_is(noise):
    pair = pair_of_policies(5, kinds=3, steps=3, noise=noise)
    gradient = moments(pair, uncorrected, on_policy=True).mean
    biases = {
        name: np.linalg.norm(moments(pair, correction).mean - gradient) / np.linalg.norm(gradient)
        for name, correction in CORRECTIONS.items()
    }
    assert biases.pop("sequence weights") < 1e-12
    # a truncation that nothing reaches is none
    untouched = [name for name, bias in biases.items() if bias < 1e-12]
    assert set(untouched) <= ({"sequence TIS", "sequence MIS"} if noise < 0.1 else set()), biases


def test_token_weights_are_unbiased_for_a_single_token():
    pair = pair_of_policies(6, kinds=6, steps=1, noise=0.5)
    gradient = moments(pair, uncorrected, on_policy=True).mean
    np.testing.assert_allclose(moments(pair, CORRECTIONS["token weights"]).mean, gradient, atol=1e-15)
    assert np.linalg.norm(moments(pair, uncorrected).mean - gradient) > 0.05 * np.linalg.norm(gradient)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_without_a_gap_every_correction_is_on_policy(name):
    pair = pair_of_policies(7, kinds=3, steps=2, noise=0.5)
    expected, found = (moments(pair, corrected, on_policy=True) for corrected in (uncorrected, CORRECTIONS[name]))
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-15)
    assert found.variance == pytest.approx(expected.variance, rel=1e-13)


@pytest.mark.parametrize(
    ("correction", "base"),
    [
        (partial(corrections.token_mis, clip_max=np.inf), "token weights"),
        (partial(corrections.icepop, low=0.0, high=np.inf), "token weights"),
        (partial(corrections.dppo_tv, bound=1.0, max_ratio=np.inf), "token weights"),
        (partial(corrections.dppo_kl, bound=np.inf, max_ratio=np.inf), "token weights"),
        (partial(corrections.ipo, bound=1.0), "token weights"),
        (partial(corrections.kpop, bound=np.inf), "token weights"),
        (partial(corrections.drpo, bound=np.inf), "token weights"),
        (partial(corrections.m2po, bound=np.inf), "token weights"),
        (partial(corrections.vexact, bound=np.inf, max_ratio=np.inf), "token weights"),
        (partial(corrections.seq_mask_tis, low=0.0, high=np.inf), "token weights"),
        (partial(corrections.sequence_mis, clip_max=np.inf), "sequence weights"),
        (partial(corrections.opsm, bound=np.inf), "none"),
    ],
)
def test_bounds_that_nothing_reaches_leave_the_weights(correction, base):
    responses = seen(1.5)[0]
    np.testing.assert_array_equal(correction(responses), CORRECTIONS[base](responses))


def test_a_single_token_and_two_rewards_never_descend_without_correction():
    """⟨E g, ∇J⟩ = Σ_a μ_a π_a (R_a − E_μ R)(R_a − E_π R), whose terms are all ≥ 0 where R is 0 or 1."""
    for seed in range(100):
        pair = pair_of_policies(seed, kinds=5, steps=1, noise=2.0)
        (pi,), (mu,), _, rewards = (np.array(part) for part in pair)
        gradient, mean = moments(pair, uncorrected, on_policy=True).mean, moments(pair, uncorrected).mean
        terms = mu[0] * pi[0] * (rewards - mu[0] @ rewards) * (rewards - pi[0] @ rewards)
        assert np.all(terms >= 0) and gradient @ mean == pytest.approx(terms.sum(), rel=1e-10, abs=1e-15)


# ---- Sampled responses


def sample(rng, tables, count):
    """Numbers of responses drawn token by token."""
    state = np.zeros(count, int)
    for table in tables:
        token = (rng.random(count)[:, None] > np.cumsum(table, axis=1)[state][:, :-1]).sum(axis=1)
        state = state * table.shape[1] + token
    return state


@pytest.mark.parametrize("name", ["none", "token TIS", "sequence MIS", "IPO, squared", "OPSM"])
def test_a_million_sampled_responses_have_these_moments(name):
    pair = pair_of_policies(8, kinds=3, steps=2, noise=0.4)
    policy, behaviour, _, rewards = pair
    by_loop = [probabilities_by_loop(tables) for tables in (policy, behaviour)]
    coefficients = coefficients_by_loop(name, *by_loop, advantages_by_loop(by_loop[1], rewards))
    estimates = np.zeros((9, 12))
    for number, (first, second) in enumerate(itertools.product(range(3), repeat=2)):
        # logits of the first token, then of the second after each first; ∇ log π = one-hot − π
        estimates[number, :3] = coefficients[number][0] * (np.eye(3)[first] - policy[0][0])
        after = slice(3 + 3 * first, 6 + 3 * first)
        estimates[number, after] = coefficients[number][1] * (np.eye(3)[second] - policy[1][first])
    drawn = estimates[sample(np.random.default_rng(9), behaviour, 1_000_000)]
    expected = moments(pair, CORRECTIONS[name])
    error = drawn.std(axis=0) / 1000
    assert np.all(np.abs(drawn.mean(axis=0) - expected.mean) <= 4.5 * error + 1e-12) and np.all(error < 1e-3)
    squares = np.sum((drawn - drawn.mean(axis=0)) ** 2, axis=1)
    error = squares.std() / 1000
    assert abs(squares.mean() - expected.variance) <= 4.5 * error and error < 0.01 * expected.variance


def test_m2po_is_what_a_large_minibatch_comes_to():
    """Tokens of 100,000 responses, the largest taken out one by one: all kinds but one fall whole or not at all."""
    pair = pair_of_policies(10, kinds=4, steps=2, noise=0.4)
    policy, behaviour = (np.array(probabilities_by_loop(tables)) for tables in pair[:2])
    advantages = np.array(advantages_by_loop(behaviour, pair[3]))[:, None]
    drawn = sample(np.random.default_rng(11), pair[1], 100_000)
    logs = np.log(policy / behaviour)
    squares = np.sort((logs**2)[drawn][(advantages * logs > 0)[drawn]])[::-1]
    total, number = squares.sum(), 0
    while total / (squares.size - number) > 0.04:
        total, number = total - squares[number], number + 1
    found = CORRECTIONS["M2PO"](Responses(policy, behaviour, advantages))
    away = advantages * logs > 0
    dropped, kept = (logs**2)[away & (found == 0)], (logs**2)[away & (found != 0)]
    last = squares[number - 1]  # the kind of which a part is taken out
    assert number > 0 and dropped.size > 1 and kept.size > 1
    assert dropped.min() == pytest.approx(last, rel=1e-12) and kept.max() < last


# ---- The table


def test_the_table_of_the_documentation_is_what_the_script_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed in (REPOSITORY / "docs/theory.md").read_text(encoding="utf-8")
    heads, _, *rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert [name for name, *_ in rows] == list(CORRECTIONS)
    # what the text says: untruncated weights of responses never descend, and every other is seen to
    cosines = [column for column, head in enumerate(heads) if head.endswith("cosine")]
    worst = {row[0]: min(float(row[column]) for column in cosines) for row in rows}
    assert worst.pop("sequence weights") == 1 and max(worst.values()) < 0


def test_the_shares_of_the_text_are_dropped():
    """Of all responses under μ; of OPSM, which drops bad ones only, of the bad ones."""
    known = {("int8", "OPSM"): 0.47, ("int8", "seq-mask-tis"): 0.23, ("int4", "VeXact"): 0.52}
    known[("int4", "seq-mask-tis")] = 0.95
    found = {case: [] for case in known}
    for gap in ("int8", "int4"):
        for pair in MODULE["pairs"](MODULE["NOISES"][gap]):
            policy, behaviour = (np.array(probabilities_by_loop(tables)) for tables in pair[:2])
            chances = behaviour.prod(axis=1)
            responses = Responses(policy, behaviour, (pair.rewards - chances @ pair.rewards)[:, None])
            for name in (name for case, name in known if case == gap):
                among = np.where(pair.rewards == 1, 0, chances) if name == "OPSM" else chances
                dropped = np.all(CORRECTIONS[name](responses) == 0, axis=1)
                found[gap, name].append(among @ dropped / among.sum())
    assert {case: round(np.mean(shares), 2) for case, shares in found.items()} == known


def test_the_pair_by_hand():
    """E g and ∇J of three tokens, from μ_a (R_a − E_μ R) and π_a (R_a − E_π R)."""
    pair = MODULE["three_tokens"]()
    assert pair.mean_gap == pytest.approx((0.02 + 0.0002) * 0.0198, rel=1e-9)
    mean = np.array([0.02 * -0.4901, 0.9798 * 0.0099, 0.0002 * 0.5099])
    gradient = np.array([0.0002 * -0.5099, 0.9798 * -0.0099, 0.02 * 0.4901])
    found = moments(pair[:4], uncorrected)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(moments(pair[:4], uncorrected, on_policy=True).mean, gradient, rtol=1e-9)
    assert mean @ gradient / np.linalg.norm(mean) / np.linalg.norm(gradient) == pytest.approx(-0.4842, abs=1e-4)
    variances = [
        MODULE["outcomes"](pair)[name].variance
        for name in ("DPPO-TV", "DPPO-KL", "IPO", "IPO, squared", "KPop", "DRPO", "token weights")
    ]
    assert (round(min(variances)), round(max(variances))) == (4, 109)


def test_help_says_how_the_pairs_are_made(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 0 and "2 degrees of freedom" in " ".join(capsys.readouterr().out.split())


def test_what_does_not_fit_together_is_refused():
    policy, behaviour, scores, rewards = pair_of_policies(12, kinds=2, steps=2, noise=0.3)
    known = {"policy": policy, "behaviour": behaviour, "scores": scores, "rewards": rewards, "corrections": CORRECTIONS}
    with pytest.raises(ValueError, match="2 steps, 2 steps and 3 responses; behaviour has 4 responses"):
        gradient_estimators(**known | {"rewards": rewards[:3]})
    with pytest.raises(ValueError, match="1 steps, 2 steps and 4 responses; behaviour has 4 responses"):
        gradient_estimators(**known | {"policy": policy[:1]})
    with pytest.raises(ValueError, match=r"step 0 has a row that sums to 1\.2"):
        gradient_estimators(**known | {"policy": [np.array([[0.6, 0.6]]), policy[1]]})
    never = [np.array([[1.0, 0.0]]), behaviour[1]]
    with pytest.raises(ValueError, match="behaviour samples response 2 with probability 0"):
        gradient_estimators(**known | {"behaviour": never})
