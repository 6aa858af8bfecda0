"""The step on packed rows against the step on rows as they are: gradients, λ, δ̄ and every metric, of all objectives."""

import dataclasses
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from batches import grouped_batch
from by_rows import apply_by_rows
from compiling import UNOPTIMISED

from dcjax.recipe import build
from dcjax.recipe.config import Config
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.rl import IterationQuantity, Packing, PolicyOutputs, Requirements
from dcjax.rl.presets import METHODS
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.types import Bins, TokenDistributions, TrainState

pytestmark = pytest.mark.heavy

P, T, G, ROWS, V = tiny.PROMPT_LENGTH, tiny.RESPONSE_LENGTH, 4, 16, 20
COMMON = {"initial_multiplier": 0.3, "dual_lr": 2.0, "budget": 0.01}
SEQUENCES = {"surrogate": "policy_gradient", "aggregation": "seq_mean_token_sum"}


@cache
def make_batch():
    batch = grouped_batch(rows=ROWS, group_size=G, vocab_size=V, prompt_length=P, response_length=T)
    # very near the bigram's, or not, so that corrections keep some rows and tokens and drop others
    noise = np.random.default_rng(4).normal(size=(ROWS, T)) * np.resize([[0.002], [0.4]], (ROWS, 1))
    logps = np.asarray(bigram(NOTHING, TABLE, batch).logps + noise, np.float32)
    return dataclasses.replace(batch, rollout_logps=np.where(batch.response_mask, logps, 0))


@cache
def batch_with_sampler():
    """The same with a sampler whose hidden states are its log-probs."""
    batch = make_batch()
    deployed = np.random.default_rng(5).normal(size=(ROWS, T, V)) * 0.3 + TABLE[batch.tokens[:, P - 1 : -1]]
    log_q = np.asarray(jax.nn.log_softmax(np.float32(deployed)))
    tokens = np.argsort(-log_q, axis=-1)[..., :3].astype(np.int32)
    return dataclasses.replace(
        batch,
        sampler_hidden=log_q,
        sampler_head=np.zeros(()),
        sampler_tokens=tokens,
        sampler_logps=np.take_along_axis(log_q, tokens, -1),
    )


def check(expected, found):
    """All that two steps left."""
    (state, metrics), (ours, measured) = expected, found
    assert measured.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(measured[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
    assert metrics["grad_norm"] > 0 and 0 < metrics["entropy"] < np.log(V)
    for name in ("multiplier", "budget"):
        wanted = optax.tree.get(state.opt_state, name)
        assert (wanted is None) == (optax.tree.get(ours.opt_state, name) is None)
        if wanted is not None:
            np.testing.assert_allclose(optax.tree.get(ours.opt_state, name), wanted, rtol=1e-6)


def same_gradients(expected, found, sums):
    """To 1e-5 of each leaf's largest, in the optimiser's sums of them by this name."""
    leaves = (jax.tree.leaves(optax.tree.get(state.opt_state, sums)) for state, _ in (found, expected))
    for ours, theirs in zip(*leaves, strict=True):
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


# --- every objective, on a policy that takes no time to compile: rows are cut and put back as packing says ---

OBJECTIVES = {
    "dc_grpo": {},
    "grpo, dropped": {"algorithm": "grpo", "zero_variance": "drop"},
    "dc_direct": {"algorithm": "dc_direct", "estimator": "rloo"},
    "dual_grpo": {"algorithm": "dual_grpo", "signal": "ratio", "sides": "one"},
    "thresholded": {"algorithm": "thresholded_dual_grpo", "level": "sequence", "discrepancy_mean": "token"},
    "dr_grpo": {"estimator": "dr_grpo", "aggregation": "seq_mean_token_sum_norm", "penalty": "hinge"},
    "gspo": {"surrogate": "gspo", "aggregation": "seq_mean_token_mean", "penalty_form": "centred"},
    "cispo": {"surrogate": "cispo", "estimator": "reinforce", "signal": "log_probability"},
    "gate": {"penalty": "gate", "correction": "token_tis", "dual_clip": 3.0},
    "sequences": {**SEQUENCES, "correction": "sequence_mis"},
    "geometric": {"correction": "geometric_mis", "correction_bound": 1.5},
    "icepop": {"correction": "icepop"},
    "verl": {"algorithm": "grpo", "verl": "decoupled_geo_rs_seq_tis"},
    "bypass": {"algorithm": "grpo", "verl": "bypass_pg_geo_rs_token_tis", **SEQUENCES},
    "kl": {"kl_coefficient": 0.1, "kl_estimator": "k2"},
    "state_centred": {"penalty_form": "state_centred", "score_centering": True, "correction": "token_tis"},
    "head": {"penalty_form": "state_centred", "score_centering": True, "sampler_head": 3},
    "tv": {"algorithm": "dc_direct", "signal": "total_variation", "level": "sequence"},
    "kl of whole distributions": {"algorithm": "dual_grpo", "signal": "kl_from_sampler", "sides": "two"},
    **{name: {"algorithm": "grpo", "method": name} for name in METHODS},
    "m2po": {"method": "m2po", "zero_variance": "drop", "kl_coefficient": 0.1},
    "m2po, tv": {"algorithm": "dc_direct", "signal": "total_variation", "method": "m2po"},
}
EVERY_DAY = ("m2po", "state_centred")
TABLE = np.random.default_rng(2).normal(size=(V, V)).astype(np.float32)


NOTHING = Requirements()


def bigram(requires, table, batch):
    distribution = jax.nn.log_softmax(table[batch.tokens[:, P - 1 : -1]])
    logps = jnp.take_along_axis(distribution, batch.tokens[:, P:, None], axis=-1)[..., 0]
    found = TokenDistributions(
        distribution, batch.tokens[:, P:], None, batch.sampler_hidden, batch.sampler_tokens, batch.sampler_logps
    )
    quantities = {name: compute(found) for name, compute in requires.of_head.items()}
    entropy = -jnp.sum(jnp.exp(distribution) * distribution, axis=-1)
    return PolicyOutputs(logps, entropy, {"seen": batch.rewards + 1}, quantities)


def bigram_step(objective, batch, updates, table=TABLE):
    """One step of gradient descent; with several updates, old log-probs are computed by microbatches too."""
    tx = optax.chain(
        optax.trace(decay=1.0), optax.scale(-1.0), *([objective.ascent] if objective.ascent is not None else [])
    )
    tx = optax.with_extra_args_support(tx)
    step = build.make_step(objective, partial(bigram, objective.requires), tx, group_size=G, updates=updates)
    reference = jnp.asarray(TABLE + 0.1) if objective.requires.reference_logps else None
    state = TrainState(jnp.zeros((), jnp.int32), jnp.asarray(table), tx.init(table), jnp.zeros(()), reference)
    return jax.jit(step).lower(state, batch).compile(UNOPTIMISED)(state, batch)


@pytest.mark.parametrize(
    "name", [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
)
@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_objective_sees_rows_as_they_are(name, updates):
    config = Config(
        objective=ObjectiveConfig(**(COMMON | OBJECTIVES[name])), optimizer=OptimizerConfig(updates=updates)
    )
    objective, batch = build.objective_of(config), batch_with_sampler()
    packed = Packing(Bins(2 * T, T, T, 4), updates=updates, group_size=G)(batch)
    assert packed.microbatches.count.min() > 1
    expected, found = (bigram_step(objective, rows, updates) for rows in (batch, packed))
    check(expected, found)
    same_gradients(expected, found, "trace")


def unequal_batch():
    """Short responses in the first half of the rows."""
    batch = make_batch()
    mask = batch.attention_mask.copy()
    mask[: ROWS // 2, P + 2 :] = False
    return dataclasses.replace(batch, attention_mask=mask, response_mask=mask[:, P:])


def test_shares_are_cut_each_by_itself():
    """Two shares that need unequal numbers of microbatches, in one program without a mesh: seven long responses, of
    which no two share a microbatch."""
    objective, batch = build.objective_of(Config(objective=ObjectiveConfig(**COMMON))), make_batch()
    mask = batch.attention_mask.copy()
    mask[:, P:] = np.where(np.arange(ROWS)[:, None] < 7, np.arange(T) < T - 1, np.arange(T) < 2)
    batch = dataclasses.replace(batch, attention_mask=mask, response_mask=mask[:, P:])
    packed = Packing(Bins(30, 30, T, 8), shares=2, group_size=G)(batch)
    assert packed.microbatches.count.tolist() == [[4], [3]]
    expected, found = (bigram_step(objective, rows, 1) for rows in (batch, packed))
    check(expected, found)
    same_gradients(expected, found, "trace")


def group_spread(iteration):
    """By token: its log-prob's distance from the mean of its group, whose rows stand side by side."""
    grouped = jnp.where(iteration.batch.response_mask, iteration.old_logps, 0).reshape(-1, G, T)
    return (grouped - grouped.mean(axis=(1, 2), keepdims=True)).reshape(-1, T)


def number(iteration):
    """By row: its number."""
    return jnp.arange(len(iteration.batch.rewards), dtype=jnp.float32)


def with_quantities(objective):
    """The objective with advantages that depend on the place of a row in its iteration."""
    quantities = tuple(IterationQuantity(compute.__name__, compute) for compute in (group_spread, number))

    def transform(terms, context):
        terms = objective.transform(terms, context)
        spread, numbers = (context.quantities[compute.__name__] for compute in (group_spread, number))
        # a row's metric that is zero unless its number came with it
        metrics = terms.metrics | {"weighted": numbers * context.batch.rewards}
        return dataclasses.replace(
            terms, advantages=terms.advantages + spread * (1 + numbers[:, None]), metrics=metrics
        )

    return dataclasses.replace(objective, transform=transform, requires=Requirements(quantities=quantities))


@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_rows_that_moved_to_other_shares_are_seen_in_their_order(updates):
    objective, batch = build.objective_of(Config(objective=ObjectiveConfig(**COMMON))), unequal_batch()
    packed = Packing(Bins(2 * T, T, T, 4), shares=2, updates=updates, group_size=G)(batch)
    assert (packed.tokens != batch.tokens).any(axis=1).sum() > ROWS / 4
    expected, found = (bigram_step(with_quantities(objective), rows, updates) for rows in (batch, packed))
    check(expected, found)
    same_gradients(expected, found, "trace")


@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_moved_row_whose_log_prob_is_not_finite_is_named_by_its_place_in_the_batch(updates):
    objective = build.objective_of(Config(objective=ObjectiveConfig(**COMMON)))
    packed = Packing(Bins(2 * T, T, T, 4), shares=2, updates=updates, group_size=G)(unequal_batch())
    numbered = Packing(Bins(2 * T, T, T, 4), shares=2, updates=updates, group_size=G)(
        dataclasses.replace(unequal_batch(), rewards=np.arange(ROWS, dtype=np.float32))
    )
    moved = numbered.rewards.astype(int)
    # the first of these two as they were sampled is the second as they are packed, and neither is where it was
    places = np.flatnonzero(moved != np.arange(ROWS))
    pairs = ((a, b) for a, b in itertools.combinations(places, 2) if moved[b] < moved[a] and moved[b] != a)
    broken = next(pairs)
    lengths, tokens = packed.response_mask.sum(axis=1), packed.tokens.copy()
    tokens[tokens == 5] = 4
    for row in broken:
        tokens[row, P - 1 + lengths[row] - 1] = 5
    table = TABLE.copy()
    table[5] = np.nan
    batch = dataclasses.replace(packed, tokens=tokens)
    _, metrics = bigram_step(objective, batch, updates, table=table)
    assert divmod(int(metrics["nonfinite_at"]), T) == (moved[broken[1]], lengths[broken[1]] - 1)


# --- the model, packed, as a run builds it ---


ONE = MeshConfig()


@dataclasses.dataclass(frozen=True)
class Case:
    objective: dict
    model: object = tiny.DENSE
    updates: int = 1
    ess_base: float | None = None
    ahead: int = 0
    mesh: MeshConfig = ONE
    replay: bool = False
    top_k: int = 0
    tokens: int = 60


CASES = {
    "one update": Case({}),
    "experts, updates, kl": Case({"kl_coefficient": 0.1}, model=tiny.EXPERTS, updates=2),
    "replayed experts and candidates": Case({"correction": "icepop"}, model=tiny.EXPERTS, replay=True, top_k=6),
    "asynchronous": Case({"penalty": "hinge"}, ahead=1),
    "eight devices": Case({}, updates=2, mesh=MeshConfig(data=2, fsdp=2, tensor=2), tokens=32),
    "experts on four": Case({"surrogate": "gspo"}, model=tiny.EXPERTS, mesh=MeshConfig(expert=2, fsdp=2)),
    # what is of whole minibatches, which are on several devices
    "m2po on four devices": Case(
        {"method": "m2po", "method_bound": 1.0}, updates=2, ess_base=0.9, mesh=MeshConfig(fsdp=2, tensor=2)
    ),
}


def config_of(case):
    return dataclasses.replace(
        tiny.CONFIG,
        model=case.model,
        objective=ObjectiveConfig(**(COMMON | case.objective)),
        # a step of Adam is a sign where gradients exceed epsilon; a large one keeps rounding from deciding it
        optimizer=OptimizerConfig(
            learning_rate=1e-2, epsilon=1.0, updates=case.updates, tokens_per_microbatch=case.tokens
        ),
        rollout=dataclasses.replace(
            tiny.CONFIG.rollout, async_level=case.ahead, replay_routing=case.replay, top_k=case.top_k
        ),
        serving=dataclasses.replace(tiny.CONFIG.serving, devices=0),
        mesh=case.mesh,
    )


def row_step(config):
    """The step of a config on rows as they are, on one device."""
    return build.make_step(
        build.objective_of(config),
        partial(apply_by_rows, config.model),
        build.build_optimizer(config),
        group_size=G,
        updates=config.optimizer.updates,
        ahead=config.rollout.async_level > 0,
    )


@cache
def recorded(replay, top_k):
    """A batch, with the experts and the candidates that an engine would have recorded."""
    rng, batch, extra = np.random.default_rng(3), make_batch(), {}
    if top_k:
        extra["candidate_tokens"] = np.argsort(rng.random((ROWS, T, V)), axis=-1)[..., :top_k].astype(np.int32)
        extra["candidate_tokens"][..., 0] = batch.tokens[:, P:]
    if replay:
        experts = np.argsort(rng.random((ROWS, P + T - 1, 2, 4)), axis=-1)[..., :2].astype(np.int16)
        experts[:, : P - 1] = np.repeat(experts[::G, : P - 1], G, axis=0)
        extra["experts"] = experts
    return dataclasses.replace(batch, **extra)


@pytest.mark.parametrize(
    "name",
    [name if name == "eight devices" else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_a_runs_step_is_that_of_rows_as_they_are(name):
    case = CASES[name]
    config, batch = config_of(case), recorded(case.replay, case.top_k)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ess_base=case.ess_base))
    masters, kept = tiny.masters(case.model), build.PastParams.needed_by(config)

    def run(config, step, batch):
        mesh, tx = make_mesh(config.mesh), build.build_optimizer(config)
        params = jax.device_put(jax.tree.map(jnp.array, masters), build.params_shardings(config, mesh))
        state = build.initial_state(config, mesh, tx, params, kept)
        history = tuple(jax.tree.map(lambda leaf: leaf * 1.01, past) for past in state.history)
        state = dataclasses.replace(state, history=history)
        step = step if hasattr(step, "lower") else jax.jit(step)
        return jax.device_get(step.lower(state, batch).compile(UNOPTIMISED)(state, batch))

    expected = run(dataclasses.replace(config, mesh=ONE), row_step(config), batch)
    packed = config.packing()(batch)
    # on several devices rows have moved to others
    assert packed.microbatches.count.max() > 1 if case.mesh == ONE else (packed.tokens != batch.tokens).any()
    found = run(config, build.compile_train_step(config, make_mesh(config.mesh)), packed)
    check(expected, found)
    same_gradients(expected, found, "mu")
