"""From a config to the functions that it names, each against the same put together by hand."""

import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import jit

from dcjax.recipe.build import build_optimizer
from dcjax.recipe.config import Config
from dcjax.recipe.objective import MethodName, ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.rl import (
    Context,
    chain,
    direct_penalty,
    discrepancy_penalty,
    dppo_tv,
    drop_zero_variance,
    gate,
    group_relative_advantages,
    hinge,
    icepop_mask,
    kl_penalty,
    leave_one_out_advantages,
    log_probability_difference,
    measure,
    opsm,
    probability_difference,
    sequence_mis,
    token_tis,
)
from dcjax.rl.advantages import group_rewards
from dcjax.rl.losses import clipped_surrogate, gspo
from dcjax.rl.presets import METHODS
from dcjax.rl.transforms import initial_terms
from dcjax.types import Batch

B, T, G = 6, 5, 3
REWARDS = np.array([1, 0, 0, 1, 1, 1], np.float32)


@pytest.fixture(scope="module")
def context():
    rng = np.random.default_rng(0)
    batch = Batch(
        tokens=rng.integers(0, 9, (B, 2 + T)).astype(np.int32),
        attention_mask=np.ones((B, 2 + T), bool),
        response_mask=np.arange(T) < rng.integers(1, T + 1, (B, 1)),
        rollout_logps=rng.uniform(-2, 0, (B, T)).astype(np.float32),
        temperature=np.ones(B, np.float32),
        rewards=REWARDS,
        group_rewards=np.asarray(group_rewards(REWARDS, group_size=G)),
    )
    logps, old, reference = rng.uniform(-2, 0, (3, B, T)).astype(np.float32)
    return Context(batch, logps, old, jnp.float32(0.4), jnp.mean(batch.rewards), reference)


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), ours, theirs)


def built(config):
    return config.build(updates=1, max_response_length=2 * T)


delta = measure(probability_difference)
BY_HAND = {
    "grpo": ({"algorithm": "grpo"}, [group_relative_advantages()]),
    "dc_grpo": ({}, [group_relative_advantages(), discrepancy_penalty(delta)]),
    "dual_grpo": (
        {"algorithm": "dual_grpo", "initial_multiplier": 0.3},
        [group_relative_advantages(), discrepancy_penalty(delta, multiplier=0.3)],
    ),
    "thresholded": (
        {"algorithm": "thresholded_dual_grpo", "budget": 0.2},
        [group_relative_advantages(), discrepancy_penalty(delta, shape=hinge(0.2), multiplier=0.1)],
    ),
    "gated": (
        {"algorithm": "thresholded_dual_grpo", "budget": 0.2, "penalty": "gate"},
        [group_relative_advantages(), discrepancy_penalty(delta, shape=gate(0.2), multiplier=0.1)],
    ),
    "dc_direct": ({"algorithm": "dc_direct"}, [group_relative_advantages(), direct_penalty(delta)]),
    "paper B": (
        {"algorithm": "grpo", "estimator": "rloo", "zero_variance": "drop", "correction": "token_tis"},
        [leave_one_out_advantages(), drop_zero_variance(), token_tis(2.0)],
    ),
    "everything": (
        {
            "signal": "log_probability",
            "level": "sequence",
            "sides": "one",
            "zero_variance": "resample",
            "correction": "sequence_mis",
            "correction_bound": 1.5,
            "kl_coefficient": 0.02,
            "kl_estimator": "k2",
        },
        [
            group_relative_advantages(),
            drop_zero_variance(),
            discrepancy_penalty(measure(log_probability_difference, level="sequence", sides="one")),
            sequence_mis(1.5),
            kl_penalty(0.02, kind="k2"),
        ],
    ),
    "icepop": (
        {"algorithm": "grpo", "correction": "icepop", "correction_bound": 4.0},
        [group_relative_advantages(), icepop_mask(0.25, 4.0)],
    ),
    "trust region": (
        {"zero_variance": "drop", "method": "dppo_tv", "method_bound": 0.2, "kl_coefficient": 0.02},
        [group_relative_advantages(), discrepancy_penalty(delta), drop_zero_variance(), kl_penalty(0.02), dppo_tv(0.2)],
    ),
    "by response": (
        {"algorithm": "grpo", "estimator": "rloo", "method": "opsm"},
        [leave_one_out_advantages(), opsm()],
    ),
}


@pytest.fixture(scope="module")
def by_hand(context):
    """The terms of each config and of its chain, in one program."""

    @jit
    def run(context):
        def terms(objective):
            return objective(initial_terms(context.batch), context)

        return {
            name: (terms(built(ObjectiveConfig(**fields)).transform), terms(chain(*transforms)))
            for name, (fields, transforms) in BY_HAND.items()
        }

    return run(context)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_config_names_the_chain_that_is_put_together_by_hand(by_hand, name):
    same(*by_hand[name])


def test_m2po_looks_at_the_penalised_advantages_of_the_tokens_of_the_loss(context):
    """In a group of equal rewards the penalty alone gives a token its sign, unless the group is left out."""
    mask = context.batch.response_mask
    log_ratio = np.where(mask, np.float64(context.logps) - context.batch.rollout_logps, 0)

    def dropped(**fields):
        objective = built(ObjectiveConfig(method="m2po", method_bound=1e-9, **fields))
        (kept,) = objective.requires.of_minibatch.values()
        return ~np.asarray(jit(kept)(context)) & mask

    def penalised(**fields):
        terms = jit(lambda context: built(ObjectiveConfig(**fields)).transform(initial_terms(context.batch), context))
        return np.asarray(terms(context).advantages)

    # a bound of nothing drops all that move away
    np.testing.assert_array_equal(dropped(), mask & (penalised() * log_ratio > 0))
    assert dropped()[3:].any()
    np.testing.assert_array_equal(dropped(zero_variance="drop")[:3], dropped()[:3])
    assert not dropped(zero_variance="drop")[3:].any()


def test_the_recipe_has_every_method_and_each_with_its_own_loss():
    assert set(typing.get_args(MethodName)) == set(METHODS)
    ours = built(ObjectiveConfig(surrogate="gspo", method="kpop")).surrogate
    assert ours.func is gspo
    for name, method in METHODS.items():
        surrogate = built(ObjectiveConfig(method=name)).surrogate
        assert surrogate is method.surrogate if method.surrogate else surrogate.func is clipped_surrogate
        assert [each.name for each in built(ObjectiveConfig(method=name)).requires.quantities] == (
            ["m2po_kept"] if name == "m2po" else []
        )


def choices(name):
    return typing.get_args(typing.get_type_hints(ObjectiveConfig)[name])


ESTIMATORS, CORRECTIONS = choices("estimator"), choices("correction")
ALL = list(itertools.product(ESTIMATORS, CORRECTIONS))
SOME = [(ESTIMATORS[number % len(ESTIMATORS)], correction) for number, correction in enumerate(CORRECTIONS)]
"""Each correction once, and each estimator."""


@pytest.mark.parametrize("cells", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_any_estimator_composes_with_the_penalty_and_any_correction(context, cells):
    assert {estimator for estimator, _ in cells} == set(ESTIMATORS)

    @jit
    def run(context):
        def terms(estimator, correction, **fields):
            config = ObjectiveConfig(estimator=estimator, correction=correction, zero_variance="drop", **fields)
            return built(config).transform(initial_terms(context.batch), context)

        return [(terms(*cell), terms(*cell, algorithm="grpo")) for cell in cells]

    mask = context.batch.response_mask
    gap = np.abs(np.exp(context.old_logps) - np.exp(context.batch.rollout_logps)) * mask
    for cell, (with_penalty, without) in zip(cells, run(context), strict=True):
        difference = np.asarray(without.advantages) - with_penalty.advantages
        np.testing.assert_allclose(difference[mask], 0.4 * gap[mask], atol=1e-6, err_msg=str(cell))
        np.testing.assert_array_equal(with_penalty.weights, without.weights, err_msg=str(cell))


@pytest.fixture(scope="module")
def slopes(context):
    """On-policy gradients of every surrogate with every aggregation, in one program."""

    @jit
    def run(context):
        mask, ones = context.batch.response_mask, jnp.ones((B, T))

        def loss(logps, name, aggregation):
            config = ObjectiveConfig(surrogate=name, aggregation=aggregation)
            losses, _ = built(config).surrogate(
                logps, old_logps=context.old_logps, advantages=ones, weights=ones, mask=mask
            )
            total, denominator = built(config).aggregate(losses, mask)
            return total / denominator

        pairs = itertools.product(choices("surrogate"), choices("aggregation"))
        return {" ".join(pair): jax.grad(loss)(context.old_logps, *pair) for pair in pairs}

    return run(context)


@pytest.mark.parametrize("name", choices("surrogate"))
@pytest.mark.parametrize("aggregation", choices("aggregation"))
def test_every_surrogate_goes_with_every_aggregation(context, slopes, name, aggregation):
    mask = context.batch.response_mask
    # on-policy every surrogate is the plain policy gradient; what differs is what a token weighs
    weights = {
        "token_mean": mask / mask.sum(),
        "seq_mean_token_mean": mask / mask.sum(1, keepdims=True) / B,
        "seq_mean_token_sum": mask / B,
        "seq_mean_token_sum_norm": mask / B / (2 * T),
    }[aggregation]
    if name == "gspo":
        # a sequence's ratio has its mean log-ratio's gradient, on each of its tokens
        weights = np.repeat(weights.sum(1, keepdims=True) / mask.sum(1, keepdims=True), T, axis=1) * mask
    np.testing.assert_allclose(slopes[f"{name} {aggregation}"], -weights, rtol=1e-4, atol=1e-7)


def test_the_mean_gap_is_over_responses_or_over_tokens(context):
    mask = context.batch.response_mask
    values = np.arange(B * T, dtype=np.float32).reshape(B, T)
    by_response = jit(built(ObjectiveConfig()).mean_discrepancy)(values, mask)
    by_token = jit(built(ObjectiveConfig(discrepancy_mean="token")).mean_discrepancy)(values, mask)
    rows = zip(values, mask, strict=True)
    np.testing.assert_allclose(by_response, np.mean([row[kept].mean() for row, kept in rows]), rtol=1e-6)
    np.testing.assert_allclose(by_token, values[mask].mean(), rtol=1e-6)


# --- the optimiser ---


def optimizer(steps=10, objective=None, **fields):
    settings = OptimizerConfig(**({"learning_rate": 1.0} | fields))
    return Config(steps=steps, optimizer=settings, objective=objective or ObjectiveConfig())


@pytest.mark.parametrize(
    ("decay", "expected"), [("constant", [1, 1, 1]), ("linear", [1, 0.55, 0.1]), ("cosine", [1, 0.55, 0.1])]
)
def test_schedules_end_at_the_floor(decay, expected):
    schedule = optimizer(decay=decay).optimizer.schedule(10)
    warmed = optimizer(decay=decay, warmup_steps=2, updates=2).optimizer.schedule(10)
    plain, after_warmup = jit(
        lambda: (
            [schedule(jnp.int32(step)) for step in (0, 5, 10)],
            [warmed(jnp.int32(step)) for step in (0, 1, 2, 11, 20)],
        )
    )()
    np.testing.assert_allclose(plain, expected, rtol=1e-6)
    np.testing.assert_allclose(after_warmup, [0, 0.5, *expected], rtol=1e-6)


CHAINS = {
    f"{algorithm}-{decay}": optimizer(decay=decay, ema_decay=0.9, objective=ObjectiveConfig(algorithm=algorithm))
    for algorithm in ("grpo", "dc_grpo")
    for decay in ("constant", "period", "length", "discrepancy", "dual")
} | {
    f"grpo-{decay}-ess": optimizer(
        decay=decay, ema_decay=0.9, ess_base=1.0, objective=ObjectiveConfig(algorithm="grpo")
    )
    for decay in ("constant", "discrepancy")
}


@pytest.fixture(scope="module")
def updated():
    """The first state of every chain, the parameters after an update and the state then, in one program."""

    @jit
    def run(params):
        def update(tx):
            first = tx.init(params)
            changes, after = tx.update(
                params, first, params, discrepancy=jnp.float32(0.5), response_length=10.0, sequence_ess=jnp.float32(0.5)
            )
            return first, optax.apply_updates(params, changes), after

        return {name: update(build_optimizer(config)) for name, config in CHAINS.items()}

    return run({"w": jnp.ones(2)})


@pytest.mark.parametrize("name", CHAINS)
def test_the_chain_holds_what_the_config_asks_for(updated, name):
    state, params, after = updated[name]
    algorithm, decay, *rest = name.split("-")
    fields = ("multiplier", "ema", "learning_rate_scale", "ess_scale")
    held = {name: optax.tree.get(state, name) is not None for name in fields}
    expected = {"multiplier": algorithm == "dc_grpo", "ema": True, "learning_rate_scale": decay != "constant"}
    assert held == expected | {"ess_scale": rest == ["ess"]}
    if rest:
        # behind Adam, whose updates of the same chain without it are as long as the learning rate
        plain = updated[f"{algorithm}-{decay}"]
        np.testing.assert_allclose(params["w"] - 1, 0.5**0.5 * (plain[1]["w"] - 1), rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(after, "ema")["w"], params["w"], atol=1e-6)


def test_a_fixed_period_halves_the_updates():
    config = optimizer(decay="period", decay_period=2, max_grad_norm=1e9)
    tx, params = build_optimizer(config), {"w": jnp.ones(2)}

    def update(state, _):
        changes, state = tx.update(params, state, params, discrepancy=0.0, response_length=1.0)
        return state, -changes["w"][0]

    sizes = jit(lambda: jax.lax.scan(update, tx.init(params), None, length=8)[1])()
    np.testing.assert_allclose(sizes, [1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.1], rtol=1e-4)
