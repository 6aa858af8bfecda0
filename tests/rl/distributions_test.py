"""Whole distributions against NumPy loops in float64, heads of the sampler against all of it, and their error bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit

from dcjax.rl import (
    distributions,
    hinge,
    linear,
    log_probability_difference,
    probability_difference,
    probability_ratio,
    sided,
)
from dcjax.types import TokenDistributions

B, C, V = 3, 4, 11
RNG = np.random.default_rng(0)


def pair(spread=1.0, seed=0, vocabulary=V):
    """Logits of π, and of μ at a distance."""
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(B, C, vocabulary)) * 2
    return own.astype(np.float32), (own + spread * rng.normal(size=own.shape)).astype(np.float32)


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return (
        wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    )


def head_of(log_q, size):
    tokens = np.argsort(-log_q, axis=-1)[..., :size]
    return tokens.astype(np.int32), np.take_along_axis(log_q, tokens, -1).astype(np.float32)


def given(own, deployed, size=0):
    log_q = jax.nn.log_softmax(deployed)
    tokens, logps = head_of(np.asarray(log_q), size) if size else (None, None)
    whole = None if size else log_q
    targets = jnp.zeros(own.shape[:2], jnp.int32)
    return TokenDistributions(jax.nn.log_softmax(jnp.asarray(own)), targets, None, whole, tokens, logps)


def loop(function, own, deployed):
    """A function of π and μ as lists, in each state."""
    p, q = np.exp(log_softmax(own)), np.exp(log_softmax(deployed))
    return np.array([[function(p[b, c].tolist(), q[b, c].tolist()) for c in range(C)] for b in range(B)])


GAPS = {
    distributions.total_variation: lambda p, q: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
    distributions.kl_from_sampler: lambda p, q: sum(y * np.log(y / x) for x, y in zip(p, q, strict=True)),
    distributions.kl_to_sampler: lambda p, q: sum(x * np.log(x / y) for x, y in zip(p, q, strict=True)),
    distributions.most_probable_differs: lambda p, q: float(np.argmax(p) != np.argmax(q)),
}


@pytest.mark.parametrize("compute", GAPS, ids=lambda compute: compute.__name__)
def test_gaps_against_loops(compute):
    own, deployed = pair()
    np.testing.assert_allclose(compute(given(own, deployed)), loop(GAPS[compute], own, deployed), rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(compute(given(own, own)), 0, atol=1e-7)


GRADIENTS = {
    distributions.kl_from_sampler: lambda p, q: p - q,
    distributions.kl_to_sampler: lambda p, q: p * (np.log(p / q) - np.sum(p * np.log(p / q))),
    distributions.total_variation: lambda p, q: p * (np.sign(p - q) - np.sum(p * np.sign(p - q))) / 2,
}


@pytest.mark.parametrize("compute", GRADIENTS, ids=lambda compute: compute.__name__)
def test_gradients_of_gaps_by_hand(compute):
    """With respect to the policy's logits; where the policies are one they are 0, TV's too."""
    own, deployed = pair()
    grad = jit(jax.grad(lambda own, deployed: compute(given(own, deployed)).sum()))
    p, q = np.exp(log_softmax(own)), np.exp(log_softmax(deployed))
    expected = np.array([[GRADIENTS[compute](p[b, c], q[b, c]) for c in range(C)] for b in range(B)])
    np.testing.assert_allclose(grad(own, jnp.asarray(deployed)), expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(grad(own, jnp.asarray(own)), 0, atol=1e-6)


SIGNALS = {
    "probability": (probability_difference, lambda p, q: abs(p - q)),
    "ratio": (probability_ratio, lambda p, q: abs(p / q - 1)),
    "log_probability": (log_probability_difference, lambda p, q: abs(np.log(p / q))),
}
SIDES = {"two": lambda d, p, q: d, "one": lambda d, p, q: d * (p > q), "signed": lambda d, p, q: d * np.sign(p - q)}


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("shape", [None, 0.05])
def test_expected_penalties_against_loops(signal, sides, shape):
    own, deployed = pair()
    function, by_hand = SIGNALS[signal]
    compute = distributions.expected_penalty(sided(function, sides), linear if shape is None else hinge(shape))

    def expected(p, q):
        deltas = [SIDES[sides](by_hand(x, y), x, y) for x, y in zip(p, q, strict=True)]
        return sum(y * (d if shape is None else max(d - shape, 0)) for y, d in zip(q, deltas, strict=True))

    found = compute(given(own, deployed))
    np.testing.assert_allclose(found, loop(expected, own, deployed), rtol=2e-4, atol=1e-6)
    assert np.abs(jax.grad(lambda own: compute(given(own, deployed)).sum())(own)).max() == 0


def tis(low, high):
    return lambda ratio: jnp.clip(ratio, low, high)


def score_by_hand(p, q, low=None, high=None):
    """Of NeMo-RL's page: the mass of each token, all of them in the head."""
    return [y if low is None else float(np.clip(x, low * y, high * y)) for x, y in zip(p, q, strict=True)]


@pytest.mark.parametrize("bounds", [None, (0.0, 2.0), (0.5, 1.2)])
def test_the_expected_score_against_loops(bounds):
    own, deployed = pair()
    bounds = bounds or ()
    compute = distributions.expected_score(tis(*bounds) if bounds else distributions.unweighted)

    def value(p, q):
        return sum(m * np.log(x) for m, x in zip(score_by_hand(p, q, *bounds), p, strict=True))

    np.testing.assert_allclose(compute(given(own, deployed)), loop(value, own, deployed), rtol=2e-5)
    # ∇_z Σ m log π = m − (Σ m) π
    grad = jax.grad(lambda own: compute(given(own, deployed)).sum())(own)
    p, q = np.exp(log_softmax(own)), np.exp(log_softmax(deployed))
    mass = np.array([[score_by_hand(p[b, c], q[b, c], *bounds) for c in range(C)] for b in range(B)])
    np.testing.assert_allclose(grad, mass - mass.sum(-1, keepdims=True) * p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bounds", [None, (0.0, 2.0), (0.5, 1.2)])
@pytest.mark.parametrize("size", [1, 4, V])
def test_the_published_head_against_its_formula(bounds, size):
    """C = Σ_H sg(m − α π) log π by a loop, and its gradient."""
    own, deployed = pair()
    log_p, log_q = log_softmax(own), log_softmax(deployed)
    tokens, _ = head_of(log_q, size)
    compute = distributions.expected_score_of_head(tis(*bounds) if bounds else distributions.unweighted)
    values, gradients = np.zeros((B, C)), np.zeros((B, C, V))
    for b, c in np.ndindex(B, C):
        p, q, inside = np.exp(log_p[b, c]), np.exp(log_q[b, c]), set(tokens[b, c].tolist())
        tail_p, tail_q = (sum(x[v] for v in range(V) if v not in inside) for x in (p, q))
        ratio = tail_q / max(tail_p, 1e-6)
        alpha = ratio if bounds is None else float(np.clip(1, bounds[0] * ratio, bounds[1] * ratio))
        for v in inside:
            mass = q[v] if bounds is None else float(np.clip(p[v], bounds[0] * q[v], bounds[1] * q[v]))
            values[b, c] += (mass - alpha * p[v]) * np.log(p[v])
            gradients[b, c] += (mass - alpha * p[v]) * (np.eye(V)[v] - p)
    if size < V:
        # of an empty tail α is a rounding over the least that is divided by, which no gradient sees
        np.testing.assert_allclose(compute(given(own, deployed, size)), values, rtol=1e-4, atol=2e-6)
    grad = jax.grad(lambda own: compute(given(own, deployed, size)).sum())(own)
    np.testing.assert_allclose(grad, gradients, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("bounds", [None, (0.0, 2.0)])
def test_a_head_of_all_tokens_is_exact(bounds):
    """The score's gradient, whatever α is of an empty tail, and the penalty's mean."""
    own, deployed = pair()
    weight = tis(*bounds) if bounds else distributions.unweighted
    whole, head = (
        jax.grad(lambda own, compute=compute, size=size: compute(given(own, deployed, size)).sum())(own)
        for compute, size in (
            (distributions.expected_score(weight), 0),
            (distributions.expected_score_of_head(weight), V),
        )
    )
    np.testing.assert_allclose(head, whole, atol=2e-6)
    exact = distributions.expected_penalty()(given(own, deployed))
    np.testing.assert_allclose(distributions.expected_penalty_of_head(given(own, deployed, V)), exact, atol=1e-6)
    assert np.max(distributions.head_error_bound(given(own, deployed, V))) < 1e-6


@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_what_a_head_misses_of_the_mean_penalty_is_within_its_bound(size, spread):
    for seed in range(20):
        own, deployed = pair(spread, seed)
        exact = loop(lambda p, q: sum(y * abs(x - y) for x, y in zip(p, q, strict=True)), own, deployed)
        found = distributions.expected_penalty_of_head(given(own, deployed, size))
        bound = np.asarray(distributions.head_error_bound(given(own, deployed, size)))
        assert (np.abs(found - exact) <= bound + 1e-6).all()
        assert (bound <= 1).all()


def test_the_bound_is_attained():
    """Outside of the head the two policies have as much, and nothing in common: for all that is known, it is no gap."""
    p, q = np.array([0.4, 0.3, 0.0, 0.3]), np.array([0.4, 0.3, 0.3, 0.0])
    own = np.log(np.maximum(p, 1e-30)).astype(np.float32)[None, None]
    head = np.array([[[0, 1]]], np.int32), np.log(np.array([[[0.4, 0.3]]], np.float32))
    found = TokenDistributions(jnp.asarray(own), jnp.zeros((1, 1), jnp.int32), None, None, *head)
    assert q @ np.abs(p - q) == pytest.approx(0.09)
    np.testing.assert_allclose(distributions.head_error_bound(found), 0.09, rtol=1e-5)
    np.testing.assert_allclose(distributions.expected_penalty_of_head(found), 0, atol=1e-6)


def test_heads_that_hold_fewer_tokens_than_others():
    """As where top-k left fewer: what is -1 is not there, whatever its log-prob."""
    own, deployed = pair()
    tokens, logps = head_of(log_softmax(deployed), 4)
    short = np.where(np.arange(4) < 3, tokens, -1).astype(np.int32), np.where(np.arange(4) < 3, logps, 0)
    log_p, targets = jax.nn.log_softmax(own), jnp.zeros((B, C), jnp.int32)
    three = TokenDistributions(log_p, targets, None, None, tokens[..., :3], logps[..., :3])
    padded = TokenDistributions(log_p, targets, None, None, *short)
    for compute in (
        distributions.expected_score_of_head(),
        distributions.expected_penalty_of_head,
        distributions.head_error_bound,
    ):
        np.testing.assert_array_equal(compute(three), compute(padded))


def test_tokens_that_could_not_be_drawn_add_nothing():
    """Both policies have a finite, very low logit for them, as `token_logps` gives it."""
    own, deployed = pair()
    low = np.float32(np.finfo(np.float32).min / 2)
    cut = np.where(np.arange(V) < 6, own, low), np.where(np.arange(V) < 6, deployed, low)
    computes = [*GAPS, distributions.expected_score(), distributions.expected_penalty(log_probability_difference)]
    for compute in computes:
        grad = jax.grad(lambda own, compute=compute: compute(given(own, cut[1])).sum())(cut[0])
        assert np.isfinite(grad).all() and (np.asarray(grad)[..., 6:] == 0).all()
        whole = compute(given(own[..., :6], deployed[..., :6]))
        np.testing.assert_allclose(compute(given(*cut)), whole, rtol=1e-5, atol=1e-6)


def test_what_is_not_known_is_asked_for_by_name():
    nothing = given(*pair(), size=2)
    with pytest.raises(ValueError, match=r"Requirements\.sampler_distributions has them"):
        distributions.total_variation(nothing)
    with pytest.raises(ValueError, match=r"Requirements\.sampler_head has them"):
        distributions.expected_score_of_head()(given(*pair()))
