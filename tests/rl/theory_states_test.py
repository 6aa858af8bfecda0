"""What sampling from μ does to the logits of one state: each statement by enumeration of its tokens.

Every row of the batch is one token of the state, and its weight is its probability under μ; gradients are those of the
library's own transforms, so that what is tested is what training does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcjax.rl import (
    HeadQuantity,
    StateBaseline,
    chain,
    discrepancy_penalty,
    policy_gradient,
    probability_difference,
    score_centering,
    total_variation,
)
from dcjax.rl.discrepancy import DistributionGap
from dcjax.rl.distributions import SMALLEST_TAIL, expected_score, expected_score_of_head, head_error_bound
from dcjax.rl.theory import kl_rate, penalty_update, probability_gap, split_update
from dcjax.rl.transforms import Context, initial_terms
from dcjax.types import Batch, TokenDistributions

MULTIPLIER, ADVANTAGE = 0.3, 0.7


def pairs(count=40, actions=7, spread=1.0):
    """(π, μ, the logits of π), of many sizes of gaps."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        logits = 1.5 * rng.normal(size=actions)
        policy, behaviour = (
            np.exp(x) / np.exp(x).sum() for x in (logits, logits + rng.uniform(0, spread) * rng.normal(size=actions))
        )
        yield policy, behaviour, logits


def distributions_of(logits, behaviour, head=0):
    """The state's, once for each of its tokens."""
    count = len(behaviour)
    log_p = jnp.broadcast_to(jax.nn.log_softmax(logits), (count, 1, count))
    log_q = jnp.broadcast_to(jnp.log(behaviour), log_p.shape)
    order = np.argsort(-behaviour)[:head]
    tokens = np.broadcast_to(order, (count, 1, head)).astype(np.int32)
    logps = np.broadcast_to(np.log(behaviour[order]), tokens.shape).astype(np.float32)
    targets = jnp.arange(count)[:, None]
    return TokenDistributions(log_p, targets, None, log_q, tokens, logps)


def update(transform, behaviour, logits, quantities=(), old_logits=None, weight=None, head=0):
    """Minus the gradient of the expected loss under μ with respect to the state's logits, float64."""
    count = len(behaviour)
    behaviour, logits = jnp.asarray(behaviour, jnp.float32), jnp.asarray(logits, jnp.float32)
    old = logits if old_logits is None else jnp.asarray(old_logits, jnp.float32)
    batch = Batch(
        tokens=jnp.zeros((count, 2), int),
        attention_mask=jnp.ones((count, 2), bool),
        response_mask=jnp.ones((count, 1), bool),
        rollout_logps=jnp.log(behaviour)[:, None],
        temperature=jnp.ones(count),
        rewards=jnp.zeros(count),
        group_rewards=jnp.zeros((count, 1)),
    )
    held = {
        quantity.name: quantity.compute(distributions_of(old, np.asarray(behaviour), head)) for quantity in quantities
    }

    def loss(logits):
        now = {
            quantity.name: quantity.compute(distributions_of(logits, np.asarray(behaviour), head))
            for quantity in quantities
        }
        logps, old_logps = (jax.nn.log_softmax(x)[:, None] for x in (logits, old))
        context = Context(batch, logps, old_logps, None, jnp.zeros(()), None, now, held)
        terms = transform(initial_terms(batch), context)
        weights = terms.weights if weight is None else weight(logps, old_logps)
        settings = {"old_logps": old_logps, "advantages": terms.advantages, "weights": weights, "mask": terms.mask}
        return jnp.sum(behaviour[:, None] * (policy_gradient(logps, **settings)[0] + terms.loss))

    return -np.asarray(jax.grad(loss)(logits), np.float64)


def constant(advantage):
    """The same advantage for every token, as a response's is."""

    def apply(terms, context):
        return dataclasses.replace(terms, advantages=jnp.full(terms.mask.shape, advantage))

    return apply


PUBLISHED = discrepancy_penalty(probability_difference, multiplier=MULTIPLIER)
BASELINE = StateBaseline.exact()
CENTRED = discrepancy_penalty(probability_difference, multiplier=MULTIPLIER, baseline="expected_penalty")
C = HeadQuantity("C", expected_score())


def test_an_update_is_its_two_parts():
    """The decomposition is what training does, with any advantages."""
    for policy, behaviour, logits in pairs():
        delta = probability_gap(policy=policy, behaviour=behaviour)
        advantages = ADVANTAGE - MULTIPLIER * delta
        parts = split_update(policy=policy, behaviour=behaviour, advantages=advantages)
        found = update(chain(constant(ADVANTAGE), PUBLISHED), behaviour, logits)
        np.testing.assert_allclose(parts.within + parts.drift, found, atol=1e-6)
        penalty = split_update(policy=policy, behaviour=behaviour, advantages=-MULTIPLIER * delta)
        whole = penalty_update(policy=policy, behaviour=behaviour, discrepancy=delta, multiplier=MULTIPLIER)
        np.testing.assert_allclose(penalty.within + penalty.drift, whole, atol=1e-12)
        np.testing.assert_allclose([parts.within.sum(), parts.drift.sum()], 0, atol=1e-12)


def test_the_drift_of_a_penalty_is_ascent_on_the_gap():
    for policy, behaviour, _ in pairs():
        delta = probability_gap(policy=policy, behaviour=behaviour)
        drift = split_update(policy=policy, behaviour=behaviour, advantages=-MULTIPLIER * delta).drift
        rate = kl_rate(policy=policy, behaviour=behaviour, update=drift)
        distance = np.sum((policy - behaviour) ** 2)
        np.testing.assert_allclose(rate, MULTIPLIER * (behaviour @ delta) * distance, rtol=1e-9)
        assert rate > 0


def test_the_centred_penalty_is_the_other_part():
    """Its bias under μ is 0 to 1e-6: nothing along μ − π is left but what tells actions apart."""
    for policy, behaviour, logits in pairs():
        delta = probability_gap(policy=policy, behaviour=behaviour)
        parts = split_update(policy=policy, behaviour=behaviour, advantages=-MULTIPLIER * delta)
        found = update(CENTRED, behaviour, logits, BASELINE.requires.quantities)
        np.testing.assert_allclose(found, parts.within, atol=1e-6)
        mean = behaviour @ (delta - behaviour @ delta)
        assert abs(mean) < 1e-12


def test_a_centred_gap_and_its_mirror_image_cancel():
    """To first order the centred penalty closes as many gaps as it opens; it is the drift that only opens them."""
    for policy, behaviour, _ in pairs():
        mirrored = 2 * behaviour - policy
        if (mirrored <= 0).any():
            continue
        rates = []
        for one in (policy, mirrored):
            delta = probability_gap(policy=one, behaviour=behaviour)
            within = split_update(policy=one, behaviour=behaviour, advantages=-delta).within
            rates.append(kl_rate(policy=one, behaviour=behaviour, update=within))
        np.testing.assert_allclose(sum(rates), 0, atol=1e-12)


def test_the_counterexample_of_two_actions():
    """μ = (.9, .1), π = (.8, .2): the published penalty raises the second action further, the centred one rests."""
    behaviour, policy = np.array([0.9, 0.1]), np.array([0.8, 0.2])
    found = update(PUBLISHED, behaviour, np.log(policy))
    np.testing.assert_allclose(found, MULTIPLIER * 0.1 * np.array([-0.1, 0.1]), atol=1e-7)
    np.testing.assert_allclose(kl_rate(policy=policy, behaviour=behaviour, update=found), MULTIPLIER * 0.002, atol=1e-8)
    centred = update(CENTRED, behaviour, np.log(policy), BASELINE.requires.quantities)
    np.testing.assert_allclose(centred, 0, atol=1e-7)


def test_where_the_policies_are_one_both_forms_are_the_base():
    for policy, _, logits in pairs(5):
        base = update(constant(ADVANTAGE), policy, logits)
        np.testing.assert_allclose(base, 0, atol=1e-6)
        for penalty, quantities in ((PUBLISHED, ()), (CENTRED, BASELINE.requires.quantities)):
            found = update(chain(constant(ADVANTAGE), penalty), policy, logits, quantities)
            np.testing.assert_allclose(found, base, atol=1e-6)


def test_with_whole_importance_weights_the_baseline_does_nothing():
    for _, behaviour, logits in pairs(10):

        def weight(logps, old_logps, behaviour=behaviour):
            return jnp.exp(old_logps) / behaviour[:, None]

        quantities = BASELINE.requires.quantities
        published = update(chain(constant(ADVANTAGE), PUBLISHED), behaviour, logits, weight=weight)
        centred = update(chain(constant(ADVANTAGE), CENTRED), behaviour, logits, quantities, weight=weight)
        np.testing.assert_allclose(centred, published, atol=1e-6)


def test_the_centred_score_has_no_mean():
    """E_μ of Ã (∇ log π − E_μ ∇ log π) is 0 for an advantage that does not depend on the token."""
    for policy, behaviour, logits in pairs():
        plain = update(constant(ADVANTAGE), behaviour, logits)
        np.testing.assert_allclose(plain, ADVANTAGE * (behaviour - policy), atol=1e-6)
        centred = update(chain(constant(ADVANTAGE), score_centering("C")), behaviour, logits, [C])
        np.testing.assert_allclose(centred, 0, atol=1e-6)


def test_with_score_centering_the_published_penalty_is_the_centred_one():
    """What is left of either is the covariance of Ã and the score, in which no baseline counts."""
    for policy, behaviour, logits in pairs(10):
        published = update(chain(constant(ADVANTAGE), PUBLISHED, score_centering("C")), behaviour, logits, [C])
        quantities = [*BASELINE.requires.quantities, C]
        centred = update(chain(constant(ADVANTAGE), CENTRED, score_centering("C")), behaviour, logits, quantities)
        np.testing.assert_allclose(centred, published, atol=1e-6)
        delta = probability_gap(policy=policy, behaviour=behaviour)
        parts = split_update(policy=policy, behaviour=behaviour, advantages=-MULTIPLIER * delta)
        np.testing.assert_allclose(published, parts.within, atol=1e-6)


def ratio_of(logps, old_logps):
    return jax.lax.stop_gradient(jnp.exp(logps - old_logps))


def test_score_centering_ends_where_the_ratio_is_not_one():
    """After an update π is not π_old: the surrogate's score is r ∇ log π, whose mean C does not know."""
    for policy, behaviour, logits in pairs(10):
        moved = logits + 0.3 * np.random.default_rng(3).normal(size=len(logits))
        now = np.exp(moved) / np.exp(moved).sum()
        transform = chain(constant(ADVANTAGE), score_centering("C"))
        left = update(transform, behaviour, moved, [C], old_logits=logits, weight=ratio_of)
        r = now / policy
        expected = ADVANTAGE * (behaviour * r - (behaviour @ r) * now - (behaviour - now))
        np.testing.assert_allclose(left, expected, atol=2e-6)
        assert np.abs(left).max() > 1e-3


def test_a_gap_of_whole_distributions_in_the_advantage_only_widens_it():
    """δ is the same for all tokens: the update is λ δ (π − μ), and minus its mean there is nothing left."""
    gap = DistributionGap("tv", total_variation)
    quantity = HeadQuantity("tv", total_variation)
    for policy, behaviour, logits in pairs(10):
        found = update(discrepancy_penalty(gap, multiplier=MULTIPLIER), behaviour, logits, [quantity])
        delta = np.abs(policy - behaviour).sum() / 2
        np.testing.assert_allclose(found, MULTIPLIER * delta * (policy - behaviour), atol=1e-6)
        assert kl_rate(policy=policy, behaviour=behaviour, update=found) > 0


@pytest.mark.parametrize("head", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)])
def test_what_a_head_loses_of_the_centred_penalty(head):
    """The drift of what its mean is wrong by, which the bound holds."""
    baseline = StateBaseline.of_head(head)
    for policy, behaviour, logits in pairs(15):
        exact = update(CENTRED, behaviour, logits, BASELINE.requires.quantities)
        found = update(CENTRED, behaviour, logits, baseline.requires.quantities, head=head)
        bound = float(head_error_bound(distributions_of(jnp.asarray(logits, jnp.float32), behaviour, head))[0, 0])
        # found − exact = λ · (what the mean is too large by) · (μ − π)
        error = (found - exact) @ (behaviour - policy) / (MULTIPLIER * np.sum((behaviour - policy) ** 2))
        np.testing.assert_allclose(found - exact, MULTIPLIER * error * (behaviour - policy), atol=2e-6)
        assert abs(error) <= bound + 1e-4
        if head == len(policy):
            np.testing.assert_allclose(found, exact, atol=1e-6)


@pytest.mark.parametrize("head", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)])
def test_what_a_head_loses_of_score_centering(head):
    """A (μ − r π) on the tokens outside, which sums to 0 there; nothing of what is within."""
    quantity = HeadQuantity("C", expected_score_of_head())
    for policy, behaviour, logits in pairs(15):
        left = update(chain(constant(ADVANTAGE), score_centering("C")), behaviour, logits, [quantity], head=head)
        outside = np.argsort(-behaviour)[head:]
        expected = np.zeros(len(policy))
        if len(outside):
            ratio = behaviour[outside].sum() / max(policy[outside].sum(), SMALLEST_TAIL)
            expected[outside] = ADVANTAGE * (behaviour[outside] - ratio * policy[outside])
        np.testing.assert_allclose(left, expected, atol=2e-6)
        assert np.abs(left).sum() <= 2 * ADVANTAGE * behaviour[outside].sum() + 2e-5
