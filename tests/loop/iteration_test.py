"""What one iteration does around the compiled step: groups sampled anew, averages, an alarm, replay, stale weights."""

import contextlib
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from compiling import jit
from stepping import Stepper

from dcjax.data.problems import FixedProblems, TextProblem
from dcjax.errors import RunError
from dcjax.loop import evaluate, setup, transcripts
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.draw import SAMPLING_ROUNDS, Draw, Sampled
from dcjax.loop.reward_collector import Scores
from dcjax.loop.rollouts import InProcess
from dcjax.models import token_logps
from dcjax.recipe.build import abstract_state
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.reward import RewardConfig
from dcjax.rewards.in_process import InProcessRewards
from dcjax.rewards.pool import Counters, Pending
from dcjax.rl.presets import METHODS
from dcjax.serving import rollout
from dcjax.serving.mismatch import MismatchConfig
from dcjax.sharding.hosts import Preemption
from dcjax.sharding.mesh import MeshConfig
from dcjax.types import Rollout

pytestmark = pytest.mark.heavy

G, P, T = 2, tiny.PROMPT_LENGTH, tiny.RESPONSE_LENGTH
CONFIG = replace(
    tiny.CONFIG,
    rollout=replace(tiny.CONFIG.rollout, group_size=G),
    objective=ObjectiveConfig(zero_variance="resample"),
    optimizer=replace(tiny.CONFIG.optimizer, ema_decay=0.5, warmup_steps=0),
)
HERE = InProcessRewards(CONFIG.task.reward)
ALWAYS_RIGHT = InProcessRewards(lambda text, gold, *, finished: 1.0)


def sampled(cursor, rewards):
    """Rows that say which prompt they are of."""
    rows = len(rewards)
    numbers = np.repeat(cursor + np.arange(rows // G), G)
    rollout = Rollout(
        tokens=np.tile(numbers[:, None], (1, P + T)).astype(np.int32),
        attention_mask=np.ones((rows, P + T), bool),
        response_mask=np.ones((rows, T), bool),
        rollout_logps=np.zeros((rows, T), np.float32),
        temperature=np.ones(rows, np.float32),
        versions=np.zeros((rows, T), np.int32),
        finished=np.ones(rows, bool),
        log_mass=np.zeros((rows, T), np.float32),
    )
    problems = [CONFIG.task.problem("train", 0, int(number)) for number in numbers[::G]]
    scores = Scores(np.array(rewards, np.float32))
    return Sampled(problems, rollout, scores, [(problem, 0.0) for problem in problems], 1.0)


@pytest.fixture
def rounds_of(monkeypatch):
    """What rounds of sampling with these rewards draw, and the cursors and keys that they were asked with."""

    def build(*rewards):
        checked = setup.set_up(setup.check(CONFIG), HERE)
        draw, asked = Draw(checked, Preemption(), InProcess(checked)), []

        def sample_once(serving, problems, cursor, key):
            asked.append((cursor, jax.random.key_data(key).tolist()))
            return sampled(cursor, rewards[min(len(asked), len(rewards)) - 1])

        monkeypatch.setattr(draw, "_once", sample_once)
        first = sample_once(None, None, 100, jax.random.key(0))
        return draw._without_equal_groups(first, None, checked.problems, 100, jax.random.key(0)), asked

    return build


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method):
    """Two iterations of a run with int4 rollouts, whose responses are weighed as a whole too."""
    config = replace(
        CONFIG,
        serving=replace(CONFIG.serving, format="int4"),
        objective=ObjectiveConfig(method=method, zero_variance="resample"),
        optimizer=replace(CONFIG.optimizer, ess_base=1.0),
    )
    stepper = Stepper(config, HERE)
    state, cursor = stepper.begin()
    for _ in range(2):
        state, cursor, metrics, _ = stepper.iterate(state, cursor)
        assert np.isfinite([metrics[name] for name in ("loss", "grad_norm", "param_norm")]).all()
        assert 0 <= metrics[f"{method.removesuffix('_squared')}/dropped_fraction"] <= 1
        assert 0 < metrics["ess_scale"] <= 1 and 0 < metrics["mismatch/ess_sequence"] <= 1
        assert {"skew/engine_positive", "skew/engine_negative"} <= set(metrics)
    assert metrics["grad_norm"] > 0


def prompts_of(result):
    numbers = np.asarray(result.rollout.tokens)[::G, 0].tolist()
    assert np.asarray(result.rollout.tokens)[:, 0].tolist() == [n for n in numbers for _ in range(G)]
    assert [problem.prompt for problem in result.problems] == [
        CONFIG.task.problem("train", 0, number).prompt for number in numbers
    ]
    return numbers


MIXED, EQUAL = [0, 1], [1, 1]


def test_a_round_in_which_every_group_differs_is_kept_as_it_is(rounds_of):
    result, asked = rounds_of(MIXED * 4)
    assert prompts_of(result) == [100, 101, 102, 103]
    assert (len(asked), result.prompts_taken) == (1, 4)


def test_groups_of_equal_rewards_are_replaced_by_those_of_further_rounds(rounds_of):
    result, asked = rounds_of(EQUAL + MIXED + EQUAL + MIXED, EQUAL * 3 + MIXED, MIXED * 4)
    assert prompts_of(result) == [101, 103, 107, 108]
    np.testing.assert_array_equal(result.rewards, MIXED * 4)
    assert result.prompts_taken == 12
    # prompts are never asked twice, nor keys
    assert [cursor for cursor, _ in asked] == [100, 104, 108]
    assert len({tuple(key) for _, key in asked}) == 3


def test_what_no_round_could_fill_is_filled_with_groups_that_the_objective_drops(rounds_of):
    result, asked = rounds_of(EQUAL * 2 + MIXED + EQUAL, EQUAL * 4)
    assert len(asked) == SAMPLING_ROUNDS
    assert prompts_of(result) == [102, 100, 101, 103]
    assert result.prompts_taken == 4 * SAMPLING_ROUNDS


def test_the_average_of_the_weights_is_evaluated_beside_the_last_ones(monkeypatch):
    stepper = Stepper(CONFIG, HERE)
    seen = []

    def evaluate_engines(setup, engines, params, version):
        seen.append((tuple(engines), float(params["norm"][0])))
        return [module_row(policy) for policy in engines]

    monkeypatch.setattr(evaluate, "evaluate", evaluate_engines)
    monkeypatch.setattr(evaluate, "averaged_params", lambda opt_state, params: {"norm": np.array([7.0])})
    state = type("State", (), {"params": {"norm": np.array([1.0])}, "opt_state": None, "step": 0})()
    measured = stepper.evaluate(state)
    assert seen == [(("deployed", "training"), 1.0), (("deployed_ema", "training_ema"), 7.0)]
    assert set(measured) == {
        "eval/deployed_accuracy",
        "eval/training_accuracy",
        "eval/deployed_accuracy_ema",
        "eval/training_accuracy_ema",
        "eval/prompts",
    }


def module_row(policy):
    return evaluate.Accuracy(policy, "float32", 1, 4, 0.25, (0.0, 1.0))


@pytest.mark.parametrize(("saturated", "is_told"), [(9.0, False), (10.0, True), (11.0, False)])
def test_a_multiplier_at_its_bound_while_the_gap_rises_is_told_once(monkeypatch, capsys, saturated, is_told):
    config = replace(CONFIG, objective=ObjectiveConfig(max_multiplier=0.75, budget=0.25))
    updater = Stepper(config, HERE).updater
    metrics = {"learning_rate_scale": 0.5, "dual/saturated": saturated, "dual/multiplier": 0.75, "nonfinite_at": -1}
    metrics |= {"mismatch/prob_diff_mean": 0.1, "check/denominator_share": 1.0, "check/log_ratio": 0.0}
    monkeypatch.setattr(updater, "_step", lambda state, batch: (state, metrics))
    _, logged = updater(type("State", (), {"step": 4})(), sampled(0, MIXED * 4))
    told = capsys.readouterr().err
    assert ("step 5: λ has been at its upper bound, 0.75, for 10 iterations" in told) == is_told
    assert logged["dual/budget"] == 0.25
    assert logged["learning_rate"] == pytest.approx(CONFIG.optimizer.learning_rate / 2)


# --- whole iterations ---

SMALL = replace(
    tiny.CONFIG,
    warm_start=replace(tiny.CONFIG.warm_start, steps=0),
    serving=replace(tiny.CONFIG.serving, format="float32"),
)
LEARNING = replace(
    SMALL,
    steps=9,
    model=replace(SMALL.model, num_layers=1),
    optimizer=replace(SMALL.optimizer, learning_rate=3e-2, warmup_steps=0),
)
"""One layer, which every iteration moves far."""


class Alternating:
    """Every group's rewards differ, so that each iteration changes the parameters."""

    counters, asks = None, ()

    def submit(self, texts, golds, finished, known):
        return Pending.of([float(number % 2) for number in range(len(texts))])


score_tokens = jit(token_logps, static_argnums=0, static_argnames="response_length")


def gaps(model, params, rollout, **replayed):
    """|log π − log μ| of each response token, with nothing replayed but what is given."""
    real = rollout.response_mask
    arguments = {"response_length": real.shape[1], "temperature": rollout.temperature} | replayed
    return np.abs(
        score_tokens(model, params, rollout.tokens, rollout.attention_mask, **arguments).logps - rollout.rollout_logps
    )[real]


def test_routing_and_truncation_are_replayed_in_the_update():
    """Every token's last expert is flipped, and few can be drawn: only with replay can the trainer know."""
    drawn = {"replay_routing": True, "top_k": 5, "top_p": 0.9, "temperature": 0.8}
    config = replace(
        SMALL,
        model=replace(tiny.EXPERTS, num_layers=1),
        rollout=replace(SMALL.rollout, **drawn),
        mismatch=MismatchConfig(routing_flips=1.0),
    )
    stepper = Stepper(config, Alternating())
    state, loop = stepper.begin()
    masters = jax.device_get(state.params)
    _, _, metrics, sampled = stepper.iterate(state, loop)
    rollout = sampled.rollout
    assert rollout.response_mask.sum() > 40
    assert metrics["mismatch/prob_diff_max"] < 1e-5
    # without the one, and without the other
    assert gaps(config.model, masters, rollout, candidate_tokens=rollout.candidate_tokens).max() > 1e-2
    assert np.abs(rollout.log_mass).max() > 1e-1


STALENESS = 2


@pytest.fixture
def stale():
    return Stepper(replace(LEARNING, mismatch=MismatchConfig(staleness=STALENESS)), Alternating())


def test_the_weights_that_sample_lag_by_exactly_so_many_iterations(stale):
    state, loop = stale.begin()
    masters = []
    for step in range(STALENESS + 3):
        masters.append(jax.device_get(state.params))
        state, loop, metrics, sampled = stale.iterate(state, loop)
        rollout, served = sampled.rollout, max(step - STALENESS, 0)
        np.testing.assert_array_equal(rollout.versions, np.where(rollout.response_mask, served, -1))
        of_each = [gaps(stale.config.model, params, rollout).max() for params in masters]
        assert of_each[served] < 1e-4
        assert all(gap > 1e-3 for number, gap in enumerate(of_each) if number != served)
        # the trainer's own log-probs are of the newest
        assert (metrics["mismatch/prob_diff_max"] > 1e-4) == (step > 0)
    for kept, expected in zip(state.history, masters[-STALENESS:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(kept), expected)


def test_past_parameters_survive_a_checkpoint(stale, tmp_path):
    state, loop = stale.begin()
    for _ in range(2):
        state, loop, *_ = stale.iterate(state, loop)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, loop)
    state, _, metrics, sampled = stale.iterate(state, loop)
    with Checkpoints(tmp_path) as checkpoints:
        resumed = checkpoints.restore(2, abstract_state(stale.config, stale.mesh))
    again, _, metrics_again, sampled_again = stale.iterate(*resumed)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, sampled_again.rollout, sampled.rollout)
    assert metrics["mismatch/prob_diff_max"] == metrics_again["mismatch/prob_diff_max"] > 1e-4


# --- rollouts ahead of the trainer ---


@pytest.fixture
def ahead():
    stepper = Stepper(replace(LEARNING, rollout=replace(LEARNING.rollout, async_level=STALENESS)), Alternating())
    with stepper.sampler:
        yield stepper


def test_ahead_of_the_trainer_samples_lag_but_their_age_is_no_mismatch(ahead):
    state, loop = ahead.begin()
    for step in range(STALENESS + 3):
        state, loop, metrics, sampled = ahead.iterate(state, loop)
        rollout = sampled.rollout
        np.testing.assert_array_equal(rollout.versions, np.where(rollout.response_mask, max(step - STALENESS, 0), -1))
        # served in float32, the policy that sampled is the trainer's own of then
        assert metrics["mismatch/prob_diff_max"] < 1e-4
        assert (metrics["staleness/prob_diff_max"] > 1e-3) == (step > 0)


def test_ahead_of_the_trainer_a_run_is_resumed_to_the_same_bits(ahead, tmp_path):
    state, loop = ahead.begin()
    for _ in range(3):
        state, loop, *_ = ahead.iterate(state, loop)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, loop)
    state, loop, _, sampled = ahead.iterate(state, loop)
    with Checkpoints(tmp_path) as checkpoints:
        resumed = checkpoints.restore(3, abstract_state(ahead.config, ahead.mesh))
    other = Stepper(ahead.config, Alternating())
    with other.sampler:
        again, same_loop, _, sampled_again = other.iterate(*resumed)
    assert same_loop == loop
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, sampled_again.rollout, sampled.rollout)


# --- transcripts ---

TOLD = {
    "served in int8": replace(SMALL, serving=replace(SMALL.serving, format="int8")),
    "replayed": replace(
        SMALL,
        model=replace(tiny.EXPERTS, num_layers=1),
        rollout=replace(SMALL.rollout, replay_routing=True, top_k=5, top_p=0.9, temperature=0.8),
        mismatch=MismatchConfig(routing_flips=1.0),
    ),
    "ahead": replace(LEARNING, rollout=replace(LEARNING.rollout, async_level=STALENESS)),
    "eight devices": replace(SMALL, mesh=MeshConfig(data=2, fsdp=4)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "eight devices" else name for name in TOLD]
)
def test_what_transcripts_tell_of_tokens_is_what_the_step_measures(name, monkeypatch):
    monkeypatch.setattr(transcripts, "TRANSCRIPTS", 1000)
    stepper = Stepper(TOLD[name], Alternating())
    state, loop = stepper.begin()
    with contextlib.ExitStack() as stack:
        if name == "ahead":
            stack.enter_context(stepper.sampler)
        for _ in range(STALENESS + 1 if name == "ahead" else 1):
            sampled, loop = stepper.sampler(state, loop)
            # each response as that of a problem of its own, so that none is left out
            problems = [problem for problem in sampled.problems for _ in range(sampled.group_size)]
            told = transcripts.transcribe(stepper.setup, state, replace(sampled, problems=problems))
            state, metrics = stepper.updater(state, sampled)
    rollout = sampled.rollout
    tokens = [token for sample in told for token in sample["tokens"]]
    assert len(tokens) == rollout.response_mask.sum()
    np.testing.assert_allclose([t.sampler for t in tokens], np.exp(rollout.rollout_logps[rollout.response_mask]))
    differences = np.abs([token.train - token.sampler for token in tokens])
    assert differences.mean() == pytest.approx(metrics["mismatch/prob_diff_mean"], rel=1e-2, abs=1e-6)
    assert differences.max() == pytest.approx(metrics["mismatch/prob_diff_max"], rel=1e-2, abs=1e-6)
    assert (differences.max() > 1e-3) == (name == "served in int8")
    # special tokens are told, and are no part of the text
    texts = ["".join(token.text for token in sample["tokens"]) for sample in told]
    for special in stepper.setup.tokenizer.all_special_tokens:
        texts = [text.replace(special, "") for text in texts]
    assert texts == [sample["response"] for sample in told]


def test_params_that_are_no_numbers_are_the_updates_to_report(tmp_path):
    config = replace(TOLD["served in int8"], run_dir=tmp_path)
    stepper = Stepper(config, Alternating())
    state, loop = stepper.begin()
    sampled, _ = stepper.sampler(state, loop)
    state = state.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))
    told = transcripts.transcribe(stepper.setup, state, sampled)
    assert all(np.isnan(token.train) for sample in told for token in sample["tokens"])
    config.directory.mkdir(parents=True, exist_ok=True)
    told = r"log-prob at response, token .* is not finite; the batch is in .*bad_batch\.npz"
    with pytest.raises(RunError, match=told):
        stepper.updater(state, sampled)


# --- rewards ---


class Lengths:
    """Scores 1 for texts of odd length; counts its calls as what its limits have stopped, after three of before."""

    asks = ()

    def __init__(self):
        self.counters = Counters(timeouts=3)

    def submit(self, texts, golds, finished, known=None):
        self.counters.timeouts += 1
        return Pending.of([float(len(text) % 2) for text in texts])


def judged(config):
    """What one iteration sampled and logged, and how often its scorer was asked."""
    scorer = Lengths()
    stepper = Stepper(config, scorer)
    state, loop = stepper.begin()
    _, _, metrics, sampled = stepper.iterate(state, loop)
    assert len(set(sampled.rewards.tolist())) > 1
    return sampled, metrics, scorer.counters.timeouts - 3


def test_responses_are_judged_while_others_are_sampled_and_what_they_earn_does_not_depend_on_that(monkeypatch):
    whole, metrics, asked = judged(SMALL)
    assert asked == 1 == metrics["reward/timeouts"] and metrics["reward/restarts"] == 0
    monkeypatch.setattr(rollout, "REFILLS_PER_CALL", 1)
    parts, metrics, asked = judged(SMALL)
    assert asked > 3 and asked == metrics["reward/timeouts"]
    np.testing.assert_array_equal(parts.rollout.tokens, whole.rollout.tokens)
    np.testing.assert_array_equal(parts.rewards, whole.rewards)


class Ladder(FixedProblems):
    """Problems that are asked by the step that success has reached."""

    def at(self, progress):
        return FixedProblems([TextProblem(f"{progress.get('step', 0)}=", "1")], self.heldout)

    def after(self, progress, attempted):
        return {"step": progress.get("step", 0) + 1, "shares": [share for _, share in attempted]}

    def levels(self, progress):
        return {"step": progress.get("step", 0)}


def test_a_curriculum_stands_where_the_cursor_says_and_moves_with_what_was_right():
    """Whatever was drawn before: the cursor alone says what is asked, so that a run resumes there."""
    ladder = Ladder([TextProblem("0=", "1")], [TextProblem("9=", "1")])
    stepper = Stepper(SMALL, Lengths(), ladder)
    state, cursor = stepper.begin()
    for step in range(2):
        state, cursor, metrics, sampled = stepper.iterate(state, cursor)
        assert {problem.prompt for problem in sampled.problems} == {f"{step}="}
        assert metrics["curriculum/step"] == step
        rewards = sampled.rewards.reshape(len(sampled.problems), -1)
        assert 0 < rewards.mean() < 1
        assert cursor.progress == {"step": step + 1, "shares": rewards.mean(axis=1).tolist()}


def test_long_responses_cost_reward_but_no_accuracy():
    shaped, _, _ = judged(replace(SMALL, reward=RewardConfig(overlong_buffer=10, overlong_factor=0.5)))
    plain, _, _ = judged(SMALL)
    lengths = np.asarray(plain.rollout.response_mask).sum(axis=1)
    costs = [0.5 * min(max(length - 10, 0), 10) / 10 for length in lengths]
    assert len(set(costs)) > 1
    np.testing.assert_allclose(shaped.rewards, plain.rewards - costs, atol=1e-6)
    stepper = Stepper(replace(SMALL, reward=RewardConfig(overlong_buffer=20)), ALWAYS_RIGHT)
    assert stepper.evaluate(stepper.begin()[0])["eval/deployed_accuracy"] == 1.0


def test_without_limits_there_is_nothing_to_count():
    stepper = Stepper(SMALL, ALWAYS_RIGHT)
    _, _, metrics, _ = stepper.iterate(*stepper.begin())
    assert not [name for name in metrics if name.startswith("reward/")]


def test_golds_are_looked_at_before_anything_is_sampled(monkeypatch):
    def check(config, problems):
        assert config is CONFIG and problems.golds == ()
        raise RunError("looked at")

    monkeypatch.setattr(setup, "check_golds", check)
    with pytest.raises(RunError, match="looked at"):
        setup.set_up(setup.check(CONFIG), HERE)
